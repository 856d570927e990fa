//! `init` and `key`: making a repository, and the keys that open it.

use std::sync::Arc;

use anyhow::Result;
use chunkstore::chunker::ChunkerConfig;
use chunkstore::codec::seal::Secret;
use chunkstore::id::{RepositoryId, SlotId};
use chunkstore::key_slot::{self, KdfCost, Unlock};
use chunkstore::repository::Repository;
use serde::Serialize;

use super::args::{Global, Init, KeyCommand};
use super::output::{Output, printable};
use super::secret::{self, Given};
use super::{DONE, now};

pub(super) fn init(global: &Global, init: &Init, output: &Output) -> Result<u8> {
    let repository = create(global, init, output)?;
    #[derive(Serialize)]
    struct Made {
        repository: RepositoryId,
        location: String,
    }
    let location = repository.store().location();
    output.line(format!("made repository {} at {location}", repository.keys().repository));
    output.object(&Made { repository: repository.keys().repository, location });
    Ok(DONE)
}

/// Makes a repository; without a secret given, also a key file.
///
/// # Errors
/// When there is one already, or the folder cannot be used.
pub(super) fn create(global: &Global, init: &Init, output: &Output) -> Result<Arc<Repository>> {
    // A secret that cannot be read must not leave a folder behind.
    let given = secret::given(global)?;
    let store = secret::new_store(global)?;
    let chunker = match init.fixed_chunks {
        Some(size) => ChunkerConfig::Fixed { size: usize::try_from(size)? },
        None => ChunkerConfig::default(),
    };
    let id = RepositoryId::random();
    let make = |unlock: &Unlock| {
        Repository::create_as(store.clone(), id, unlock, KdfCost::DEFAULT, chunker, now())
    };
    let key_file = match given {
        Given::Unlock(unlock) => return Ok(Arc::new(make(&unlock)?)),
        Given::Default => secret::default_key_file(id)?,
    };
    // The key is durable before anything is sealed with it.
    let key = Secret::random();
    secret::write_key_file(&key_file, &key, &format!("of repository {id}"))?;
    let repository = make(&Unlock::KeyFile(key)).inspect_err(|_| {
        // It opens nothing; keep the folder clean.
        let _left_behind = std::fs::remove_file(&key_file);
    })?;
    output.note(format_args!(
        "The key of this repository is in the file {}\n\
         Keep a copy of it in a safe place elsewhere: without it nothing can be restored.",
        key_file.display()
    ));
    Ok(Arc::new(repository))
}

pub(super) fn key(global: &Global, command: &KeyCommand, output: &Output) -> Result<u8> {
    match command {
        KeyCommand::Add { new_password_file, new_key_file, label } => {
            let repository = secret::open(global)?;
            let unlock = match (new_password_file, new_key_file) {
                (Some(path), _) => Unlock::Passphrase(secret::read_password(global, path)?),
                (None, Some(path)) => {
                    let key = Secret::random();
                    let comment = format!("of repository {}", repository.keys().repository);
                    secret::write_key_file(path, &key, &comment)?;
                    Unlock::KeyFile(key)
                }
                (None, None) => anyhow::bail!("give --new-password-file or --new-key-file"),
            };
            let slot = key_slot::add(
                repository.store(),
                repository.keys(),
                &unlock,
                KdfCost::DEFAULT,
                label,
                now(),
            )?;
            output.line(format!("added key {}", slot.slot));
            output.object(&slot);
        }
        KeyCommand::List => {
            let slots = key_slot::list(&*secret::store(global)?)?;
            for slot in &slots {
                let kind = match slot.kind {
                    key_slot::SlotKind::Passphrase => "password",
                    key_slot::SlotKind::KeyFile => "key file",
                };
                let label = printable(&slot.label);
                output.line(format!("{}  {kind:8}  {}  {label}", slot.slot, slot.created));
            }
            output.object(&slots);
        }
        KeyCommand::Remove { id } => {
            // Who cannot open the repository shall not lock others out by accident.
            let repository = secret::open(global)?;
            let slot: SlotId = id.parse()?;
            key_slot::remove(repository.store(), slot)?;
            output.line(format!("removed key {slot}"));
        }
    }
    Ok(DONE)
}
