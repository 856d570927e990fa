//! Writes statuses, again and again until it is done or cannot be.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use kube::api::{Api, Patch, PatchParams};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Between attempts, at least and at most.
const WAIT: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Why a change was refused for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The object is gone, or another one has its name.
    Gone,
    /// It was changed by somebody else, or is not as it should be.
    Conflict,
}

/// What must hold for a change to be made.
#[derive(Debug, Clone, Default)]
pub struct Precondition {
    /// The object's UID.
    pub uid: String,
    /// Its version, where a race matters.
    pub version: Option<String>,
}

/// How many requests of a room are under way at once: a backup of thousands must not keep the API server from everything
/// else. A turn is for one request: who waits before he tries again holds none, so that what is refused again and again
/// keeps nobody from being served.
#[derive(Debug, Clone)]
pub struct RequestTurns(Arc<Semaphore>);

impl RequestTurns {
    /// So many at once.
    pub fn new(most: usize) -> Self {
        Self(Arc::new(Semaphore::new(most)))
    }

    /// A turn, until it is dropped.
    pub async fn take(&self) -> Option<SemaphorePermit<'_>> {
        // Nobody closes it.
        self.0.acquire().await.ok()
    }
}

/// Changes the status by a merge patch.
///
/// # Errors
/// When it was refused for good, after a pause in which whoever changed it is heard of. While the API server does not
/// answer it goes on trying.
pub async fn write_status<K>(
    api: &Api<K>,
    turns: &RequestTurns,
    name: &str,
    precondition: &Precondition,
    status: &Value,
) -> Result<K, Refused>
where
    K: Clone + DeserializeOwned + Debug,
{
    let mut body = json!({"metadata": {"uid": precondition.uid}, "status": status});
    if let Some(version) = &precondition.version {
        body["metadata"]["resourceVersion"] = json!(version);
    }
    let (mut wait, most) = WAIT;
    loop {
        let answer = {
            let _turn = turns.take().await;
            api.patch(name, &PatchParams::default(), &Patch::Merge(&body)).await
        };
        let error = match answer {
            Ok(object) => return Ok(object),
            Err(error) => error,
        };
        if let kube::Error::Api(status) = &error {
            match status.code {
                404 => {
                    tokio::time::sleep(WAIT.0).await;
                    return Err(Refused::Gone);
                }
                // A policy of the cluster may forbid it, or the object be too large.
                400 | 403 | 413 | 422 => {
                    tracing::error!(name, %error, "a status is not as the API server wants it");
                    tokio::time::sleep(WAIT.1).await;
                    return Err(Refused::Conflict);
                }
                409 => {
                    tracing::debug!(name, %error, "a change of status was refused");
                    tokio::time::sleep(WAIT.0).await;
                    return Err(Refused::Conflict);
                }
                _ => {}
            }
        }
        tracing::warn!(name, %error, "cannot write a status, trying again");
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(most);
    }
}
