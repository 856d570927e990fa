//! Reads a location's Secrets, tries its store, and sees to its passphrase.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::api::core::v1::{Secret, SecretKeySelector};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, PostParams};
use kube::{Client, ResourceExt};
use proto::v1::Repository;

use super::config::{Description, Secrets, describe};
use super::passphrase::{Decision, KEY, Passphrase, SecretFacts, decide, random, secret_name};
use super::store::Store;
use super::validate::validate;
use crate::api::BackupStorageLocation;

/// What agents need for a location that works.
#[derive(Clone, PartialEq)]
pub struct Usable {
    /// Store and passphrase.
    pub repository: Repository,
    /// Whether there was a repository when the store was tried.
    pub repository_exists: bool,
    /// A passphrase that the repository may still have; may be empty.
    pub previous_passphrase: Vec<u8>,
    /// Name of the Secret with the passphrase.
    pub secret: String,
    /// Whether the operator said that he keeps a copy of it.
    pub exported: bool,
    /// What was ignored, and what to do about it.
    pub remarks: Vec<String>,
}

impl fmt::Debug for Usable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { repository, repository_exists, secret, exported, remarks, .. } = self;
        f.debug_struct("Usable")
            .field("repository", repository)
            .field("repository_exists", repository_exists)
            .field("secret", secret)
            .field("exported", exported)
            .field("remarks", remarks)
            .finish_non_exhaustive()
    }
}

/// What a check found: a location that works, or why it does not and what to do.
pub type Checked = Result<Usable, String>;

/// Checks, with the store that the check before left open, if there is one. Returns the one that is open now: after a
/// failure none, so that the next check finds out anew what is wrong.
///
/// # Errors
/// When the cluster does not answer, which says nothing about the location.
pub async fn check(
    client: &Client,
    location: &BackupStorageLocation,
    open: Option<Store>,
) -> Result<(Checked, Option<Store>), kube::Error> {
    let unusable = |why: String| Ok((Err(why), None));
    let namespace = location.namespace().unwrap_or_default();
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &namespace);
    let spec = &location.spec;
    let credential = value(&secrets, spec.credential.as_ref()).await?;
    let ca = value(&secrets, spec.object_storage.ca_cert_ref.as_ref()).await?;
    let named =
        spec.object_storage.ca_cert_ref.as_ref().filter(|named| named.optional != Some(true));
    if let (Some(named), None) = (named, &ca) {
        return unusable(format!(
            "Secret '{}' with key '{}' (spec.objectStorage.caCertRef) does not exist: create it",
            named.name, named.key
        ));
    }
    let given = Secrets { credential: credential.as_deref(), ca: ca.as_deref() };
    let described = match describe(location, given) {
        Ok(described) => described,
        Err(why) => return unusable(why),
    };
    let Description { repository, remarks, .. } = described.clone();
    let (store, proof) = match validate(described, open, spec.is_read_only()).await {
        Ok(proven) => proven,
        Err(why) => return unusable(why),
    };
    let name = secret_name(location);
    let found = secrets.get_opt(&name).await?;
    let decision = decision_on(found.as_ref(), proof.repository_exists, spec.is_read_only(), &name);
    let (passphrase, exported) = match decision {
        Decision::Use { passphrase, exported } => (passphrase, exported),
        Decision::Refuse(why) => return unusable(why),
        Decision::Create => match create(&secrets, &name, location).await? {
            Ok(passphrase) => (passphrase, false),
            Err(why) => return unusable(why),
        },
    };
    let usable = Usable {
        repository: Repository { passphrase: passphrase.current, ..repository },
        repository_exists: proof.repository_exists,
        previous_passphrase: passphrase.previous,
        secret: name,
        exported,
        remarks,
    };
    Ok((Ok(usable), Some(store)))
}

fn decision_on(secret: Option<&Secret>, exists: bool, read_only: bool, name: &str) -> Decision {
    let facts = secret.map(|secret| SecretFacts {
        data: secret.data.as_ref(),
        annotations: secret.metadata.annotations.as_ref(),
    });
    decide(exists, read_only, facts.as_ref(), name)
}

async fn value(
    secrets: &Api<Secret>,
    wanted: Option<&SecretKeySelector>,
) -> Result<Option<Vec<u8>>, kube::Error> {
    let Some(wanted) = wanted else {
        return Ok(None);
    };
    let secret = secrets.get_opt(&wanted.name).await?;
    let data = secret.and_then(|secret| secret.data).unwrap_or_default();
    Ok(data.get(&wanted.key).map(|value| value.0.clone()))
}

/// Makes a passphrase. Whoever made one at the same time comes first.
async fn create(
    secrets: &Api<Secret>,
    name: &str,
    location: &BackupStorageLocation,
) -> Result<Result<Passphrase, String>, kube::Error> {
    let Ok(text) = random() else {
        return Ok(Err("this machine has no randomness for a passphrase".to_owned()));
    };
    // No owner: the Secret must outlive the location.
    let label = (crate::api::STORAGE_LOCATION.to_owned(), location.name_any());
    let secret = Secret {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: (label.1.len() <= 63).then(|| BTreeMap::from([label])),
            ..ObjectMeta::default()
        },
        string_data: Some(BTreeMap::from([(KEY.to_owned(), text)])),
        ..Secret::default()
    };
    let made = match secrets.create(&PostParams::default(), &secret).await {
        Ok(made) => made,
        Err(kube::Error::Api(status)) if status.is_already_exists() => secrets.get(name).await?,
        Err(error) => return Err(error),
    };
    match decision_on(Some(&made), false, false, name) {
        Decision::Use { passphrase, .. } => Ok(Ok(passphrase)),
        Decision::Refuse(why) => Ok(Err(why)),
        Decision::Create => Ok(Err(format!("Secret '{name}' vanished"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_secret_is_printed() {
        let usable = Usable {
            repository: Repository { passphrase: b"hidden".to_vec(), ..Default::default() },
            repository_exists: true,
            previous_passphrase: b"hidden".to_vec(),
            secret: "the-secret".to_owned(),
            exported: false,
            remarks: Vec::new(),
        };
        let text = format!("{usable:?}");
        // As text, and as bytes are shown.
        assert!(text.contains("the-secret") && !text.contains("hidden"), "{text}");
        assert!(!text.contains("104, 105"), "{text}");
    }
}
