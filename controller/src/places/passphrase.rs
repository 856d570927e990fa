//! The passphrase of a location's repository: whoever loses it loses all backups, so it must be known outside
//! the cluster. Pure decisions; `check` carries them out.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;

use crate::api::BackupStorageLocation;

/// Key of the passphrase in its Secret.
pub const KEY: &str = "passphrase";
/// Key of the one in force before, while the repository may still have that one.
pub const PREVIOUS_KEY: &str = "previous-passphrase";
/// Annotation of the Secret by which the operator says that he keeps a copy: `"true"`.
pub const EXPORTED: &str = "ebackup.io/key-exported";

/// What a location's Secret says.
#[derive(Clone, PartialEq, Eq)]
pub struct Passphrase {
    /// In force.
    pub current: Vec<u8>,
    /// In force before; may be empty.
    pub previous: Vec<u8>,
}

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrase(…)")
    }
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Use it. `exported` tells whether the operator keeps a copy.
    Use {
        /// It.
        passphrase: Passphrase,
        /// Whether the operator said that he keeps a copy.
        exported: bool,
    },
    /// There is no repository and no Secret: make one at random.
    Create,
    /// Nothing can be done without the operator.
    Refuse(String),
}

/// Name of the Secret of a location.
pub fn secret_name(location: &BackupStorageLocation) -> String {
    match location.spec.setting("passphraseSecret") {
        Some(name) => name.to_owned(),
        None => {
            let name = location.metadata.name.as_deref().unwrap_or_default();
            format!("ebackup-repository-{name}")
        }
    }
}

/// Decides by whether there is a repository in the bucket, and by the Secret, if there is one.
pub fn decide(
    repository_exists: bool,
    read_only: bool,
    secret: Option<&SecretFacts<'_>>,
    name: &str,
) -> Decision {
    match secret {
        None if repository_exists => Decision::Refuse(format!(
            "the bucket holds a repository, whose passphrase is not in this cluster: create Secret \
             '{name}' with it, under the key '{KEY}'"
        )),
        None if read_only => Decision::Refuse(format!(
            "the bucket holds no repository, and the location is ReadOnly, so none can be made: check \
             bucket and prefix, or Secret '{name}'"
        )),
        None => Decision::Create,
        Some(facts) => {
            let key = |key: &str| facts.data.and_then(|data| data.get(key));
            let trimmed = |value: Option<&ByteString>| {
                value.map(|value| value.0.trim_ascii().to_vec()).unwrap_or_default()
            };
            let current = trimmed(key(KEY));
            if current.is_empty() {
                return Decision::Refuse(format!(
                    "Secret '{name}' has no key '{KEY}', or an empty one: put the repository's \
                     passphrase there"
                ));
            }
            let annotation = facts.annotations.and_then(|all| all.get(EXPORTED));
            let exported = annotation.is_some_and(|value| value == "true");
            Decision::Use {
                passphrase: Passphrase { current, previous: trimmed(key(PREVIOUS_KEY)) },
                exported,
            }
        }
    }
}

/// What matters of a Secret.
#[derive(Default)]
pub struct SecretFacts<'a> {
    /// Its data.
    pub data: Option<&'a BTreeMap<String, ByteString>>,
    /// Its annotations.
    pub annotations: Option<&'a BTreeMap<String, String>>,
}

/// A new passphrase of 160 random bits: 32 letters and digits that are hard to confuse.
///
/// # Errors
/// When the system has no randomness.
pub fn random() -> Result<String, getrandom::Error> {
    const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes)?;
    Ok(bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passphrase_is_never_made_up_for_a_repository_that_exists() {
        let data = |pairs: &[(&str, &str)]| -> BTreeMap<String, ByteString> {
            let pair = |(key, value): &(&str, &str)| {
                ((*key).to_owned(), ByteString(value.as_bytes().to_vec()))
            };
            pairs.iter().map(pair).collect()
        };
        let good = data(&[(KEY, "secret\n"), (PREVIOUS_KEY, "old")]);
        let empty = data(&[(KEY, "\n")]);
        let yes = BTreeMap::from([(EXPORTED.to_owned(), "true".to_owned())]);
        let no = BTreeMap::from([(EXPORTED.to_owned(), "false".to_owned())]);
        let usable = |exported| Decision::Use {
            passphrase: Passphrase { current: b"secret".to_vec(), previous: b"old".to_vec() },
            exported,
        };
        let facts = |data, annotations| Some(SecretFacts { data: Some(data), annotations });
        let table = [
            (false, false, None, Ok(Decision::Create)),
            (true, false, None, Err("create Secret 'name'")),
            (true, true, None, Err("create Secret 'name'")),
            (false, true, None, Err("ReadOnly")),
            (false, false, facts(&good, None), Ok(usable(false))),
            (true, false, facts(&good, Some(&no)), Ok(usable(false))),
            (true, true, facts(&good, Some(&yes)), Ok(usable(true))),
            (true, false, facts(&empty, Some(&yes)), Err("has no key 'passphrase'")),
            (false, false, Some(SecretFacts::default()), Err("has no key 'passphrase'")),
        ];
        for (exists, read_only, secret, expected) in table {
            let decision = decide(exists, read_only, secret.as_ref(), "name");
            match (decision, expected) {
                (Decision::Refuse(why), Err(part)) => assert!(why.contains(part), "{why}"),
                (decision, expected) => assert_eq!(Ok(decision), expected),
            }
        }
    }

    #[test]
    fn passphrases_differ() {
        let (one, other) = (random().unwrap(), random().unwrap());
        assert_eq!(one.len(), 32);
        assert_ne!(one, other);
    }

    #[test]
    fn the_secret_is_named_after_the_location_unless_told_otherwise() {
        let mut location = BackupStorageLocation::default();
        location.metadata.name = Some("here".to_owned());
        assert_eq!(secret_name(&location), "ebackup-repository-here");
        let other = BTreeMap::from([("passphraseSecret".to_owned(), "mine".to_owned())]);
        location.spec.config = Some(other);
        assert_eq!(secret_name(&location), "mine");
    }
}
