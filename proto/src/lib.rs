//! What the controller and the agents on the nodes say to each other: the types and the two sides of the
//! service in `proto/mover/v1/mover.proto`, whose comments are the documentation. No logic.

use std::fmt;

/// Version 1 of the protocol.
pub mod v1 {
    tonic::include_proto!("mover.v1");
}

/// The audience of the tokens by which agents prove who they are.
pub const TOKEN_AUDIENCE: &str = "ebackup-controller";

/// Folder of a repository below the prefix of its location. `_` cannot occur in the name of a namespace, so it
/// never is a repository that restic made for one.
pub const REPOSITORY_FOLDER: &str = "restic/_chunkstore";

/// The tag of a snapshot that holds the id of the job it was made by.
pub const JOB_TAG: &str = "job";

impl fmt::Debug for v1::Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(…)")
    }
}

impl fmt::Debug for v1::Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repository")
            .field("location", &self.location)
            .field("url", &self.url)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for v1::OpenRepository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenRepository").field("create", &self.create).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::v1;

    #[test]
    fn secrets_are_not_printed() {
        let job = v1::Job {
            repository: Some(v1::Repository {
                credentials: Some(v1::Credentials {
                    access_key: "hidden-1".to_owned(),
                    secret_key: "hidden-2".to_owned(),
                    session_token: "hidden-3".to_owned(),
                }),
                passphrase: b"hidden-4".to_vec(),
                ..Default::default()
            }),
            work: Some(v1::job::Work::Open(v1::OpenRepository {
                create: true,
                previous_passphrase: b"hidden-5".to_vec(),
            })),
            ..Default::default()
        };
        let text = format!("{job:?}");
        assert!(!text.contains("hidden") && !text.contains("104, 105"), "{text}");
    }
}
