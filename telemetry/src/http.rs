//! `/metrics`, `/health` and `/live`, beside gRPC on a process's one port.

use std::sync::Arc;

use axum::http::{StatusCode, header};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A process's metrics as text.
pub struct Page {
    handle: PrometheusHandle,
    collect: Box<dyn Fn() + Send + Sync>,
    upkeep: JoinHandle<()>,
}

impl Page {
    pub(crate) fn new(
        handle: PrometheusHandle,
        collect: Box<dyn Fn() + Send + Sync>,
        upkeep: JoinHandle<()>,
    ) -> Self {
        Self { handle, collect, upkeep }
    }

    /// Reads what is kept elsewhere, then writes everything down.
    pub fn render(&self) -> String {
        (self.collect)();
        self.handle.render()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.upkeep.abort();
    }
}

/// The three pages. `/health` is 200 while `ready`, 503 otherwise; `/live` is 200 while the process answers.
pub fn routes(page: Page, ready: watch::Receiver<bool>) -> axum::Router {
    let page = Arc::new(page);
    let metrics = move || {
        let page = Arc::clone(&page);
        async move { ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page.render()) }
    };
    let health = move || {
        let is_ready = *ready.borrow();
        async move {
            match is_ready {
                true => (StatusCode::OK, "ready\n"),
                false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
            }
        }
    };
    axum::Router::new()
        .route("/metrics", get(metrics))
        .route("/health", get(health))
        .route("/live", get(|| async { "live\n" }))
}
