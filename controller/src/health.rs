//! The HTTP server for probes and metrics. Only the leader is ready, so that only it gets the agents' connections; and
//! only when it has seen all custom resources: while it cannot list one of them (a definition is missing, or a right), it
//! does nothing, and says so.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use axum::Router;
use axum::extract;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use crate::metrics::Metrics;

/// A server that listens, but does not answer yet.
#[derive(Debug)]
pub struct Health {
    listener: TcpListener,
    state: Answers,
}

#[derive(Debug, Clone)]
struct Answers {
    metrics: Arc<Metrics>,
    readiness: Readiness,
}

/// Lists without which nothing is done.
const LISTS: [&str; 3] =
    ["BackupStorageLocations", "BackupRepositories", "PodVolumeBackups and PodVolumeRestores"];

/// Whether this controller works. Copies are the same one.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    leads: bool,
    listed: BTreeSet<&'static str>,
}

impl Readiness {
    /// It is the leader.
    pub fn lead(&self) {
        self.lock().leads = true;
    }

    /// All objects of these kinds are known.
    pub fn listed(&self, kinds: &'static str) {
        self.lock().listed.insert(kinds);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why it does not work, if so.
    fn obstacle(&self) -> Option<String> {
        let state = self.lock();
        if !state.leads {
            return Some("another controller is the leader\n".to_owned());
        }
        let missing: Vec<&str> =
            LISTS.into_iter().filter(|kinds| !state.listed.contains(kinds)).collect();
        (!missing.is_empty()).then(|| {
            format!(
                "the leader cannot list {} yet: are their definitions (deploy/crds) and its rights there? \
                 its log says more\n",
                missing.join(", ")
            )
        })
    }
}

impl Health {
    /// Listens.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn bind(
        address: SocketAddr,
        metrics: Arc<Metrics>,
        readiness: Readiness,
    ) -> Result<Self> {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen on {address} for probes and metrics"))?;
        Ok(Self { listener, state: Answers { metrics, readiness } })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The system's.
    pub fn address(&self) -> Result<SocketAddr> {
        self.listener.local_addr().context("a listener has no address")
    }

    /// Answers, for ever.
    ///
    /// # Errors
    /// When it cannot go on.
    pub async fn serve(self) -> Result<()> {
        let routes = Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .with_state(self.state);
        axum::serve(self.listener, routes).await.context("cannot serve probes and metrics")
    }
}

async fn ready(extract::State(answers): extract::State<Answers>) -> (StatusCode, String) {
    match answers.readiness.obstacle() {
        None => (StatusCode::OK, "leader\n".to_owned()),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, why),
    }
}

async fn metrics(extract::State(Answers { metrics, .. }): extract::State<Answers>) -> Response {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => {
            tracing::error!("cannot write the metrics: {error}");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn only_the_leader_is_ready_and_all_are_healthy() {
        let metrics = Arc::new(Metrics::default());
        let readiness = Readiness::default();
        let any = ([127, 0, 0, 1], 0).into();
        let health = Health::bind(any, metrics.clone(), readiness.clone()).await.unwrap();
        let address = health.address().unwrap();
        let server = tokio::spawn(health.serve());
        assert!(ask(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(ask(address, "/readyz").await.starts_with("HTTP/1.1 503"));
        metrics.leader.set(1);
        readiness.lead();
        readiness.listed(LISTS[0]);
        readiness.listed(LISTS[1]);
        let not_yet = ask(address, "/readyz").await;
        assert!(not_yet.starts_with("HTTP/1.1 503") && not_yet.contains(LISTS[2]), "{not_yet}");
        assert!(!not_yet.contains(LISTS[0]), "{not_yet}");
        readiness.listed(LISTS[2]);
        assert!(ask(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        let text = ask(address, "/metrics").await;
        assert!(text.contains("application/openmetrics-text") && text.contains("ebackup_leader 1"));
        assert!(ask(address, "/else").await.starts_with("HTTP/1.1 404"));
        server.abort();
    }
}
