//! `/status`, a page for people, and `/status.json`, the same for scripts. Both only read.

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::{Html, IntoResponse, Redirect};
use axum::routing::get;

use super::{Board, json};

/// Nothing from elsewhere is loaded, whatever is typed into the page.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The two pages, and the way to them.
pub fn routes(board: Board) -> Router {
    Router::new()
        .route("/", get(|| async { Redirect::temporary("/status") }))
        .route("/status", get(page))
        .route("/status.json", get(status))
        .with_state(board)
}

async fn page() -> impl IntoResponse {
    ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(include_str!("page.html")))
}

async fn status(State(board): State<Board>) -> impl IntoResponse {
    ([(header::CACHE_CONTROL, "no-store")], axum::Json(json::status(&board.status())))
}
