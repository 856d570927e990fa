//! What every conversation with the API server needs: an end in time, and telling lost races from failures.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result};

pub mod watch;
pub mod write;

/// How long the API server may take to answer a request: less than a leader may go without renewing its lease, so that
/// one connection that hangs does not end it.
pub(crate) const ANSWER: Duration = Duration::from_secs(4);

/// The time now. Whoever decides by it takes it as a function, so that tests have another.
pub type Clock = fn() -> jiff::Timestamp;

/// Waits for the answer to a request, but not for ever.
///
/// # Errors
/// The request's own, and that it took too long; `what` says what for.
pub(crate) async fn answer<T>(
    what: impl FnOnce() -> String,
    request: impl Future<Output = kube::Result<T>>,
) -> Result<T> {
    match tokio::time::timeout(ANSWER, request).await {
        Ok(answer) => answer.with_context(what),
        Err(_) => {
            let seconds = ANSWER.as_secs();
            let cause = format!("the API server did not answer within {seconds} s");
            Err(anyhow::Error::msg(cause)).with_context(what)
        }
    }
}

/// Whether somebody else was faster: the object exists already, or was changed since it was read.
pub(crate) fn lost_race(error: &anyhow::Error) -> bool {
    let api = error.downcast_ref::<kube::Error>();
    matches!(api, Some(kube::Error::Api(status)) if status.code == 409)
}
