//! Metrics and health by HTTP, for Prometheus and the kubelet.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;

use super::Agent;

/// Serves until the program ends.
///
/// # Errors
/// When the listener fails.
pub(super) async fn serve(agent: Arc<Agent>, listener: TcpListener) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .with_state(agent);
    axum::serve(listener, router).await
}

async fn metrics(State(agent): State<Arc<Agent>>) -> impl IntoResponse {
    let (running, waiting) = {
        let jobs = agent.jobs();
        (jobs.running().len(), jobs.waiting())
    };
    agent.metrics.running.set(running as i64);
    agent.metrics.waiting.set(waiting as i64);
    let text = agent.metrics.text().map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok::<_, StatusCode>(([(CONTENT_TYPE, kind)], text))
}

/// Ready is who can be given work.
async fn ready(State(agent): State<Arc<Agent>>) -> impl IntoResponse {
    if agent.is_connected() {
        (StatusCode::OK, "connected\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not connected to the controller\n")
    }
}
