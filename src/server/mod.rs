//! The chat server: OpenAI's API over [`crate::engine`].
//!
//! Pictures come in as `data:` URLs and through [`crate::image::decode`] alone, with its limits;
//! no request can make the server read a file or fetch a URL.

mod api;
mod chat;
mod conversation;
mod docs;
mod pictures;
mod responses;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::engine::Engine;
use crate::image::DecodeLimits;
use crate::{Error, Result};

pub use api::ApiError;
use pictures::Intake;

/// What a server is started with.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// The model's name in the API.
    pub name: String,
    /// Limits on every picture.
    pub limits: DecodeLimits,
    /// The most bytes a request may have.
    pub max_body: usize,
    /// The most tokens an answer may have; also the default where a request names none.
    pub max_tokens: usize,
    /// The most pictures a request may have.
    pub max_pictures: usize,
    /// The most answers a request may ask for, as `n`.
    pub max_choices: usize,
}

struct Served {
    engine: Arc<Engine>,
    options: ServerOptions,
    intake: Intake,
    /// Seconds since 1970 at the start, as `/v1/models` reports it.
    created: u64,
}

impl Served {
    /// The engine behind a model's name.
    fn engine(&self, model: &str) -> std::result::Result<Arc<Engine>, ApiError> {
        if model == self.options.name {
            return Ok(self.engine.clone());
        }
        Err(ApiError::no_model(model, &format!("`{}`", self.options.name)))
    }

    fn model(&self) -> Value {
        json!({ "id": self.options.name, "object": "model", "created": self.created, "owned_by": "radapt" })
    }
}

/// The routes: `POST /v1/chat/completions`, `POST /v1/responses`, `GET /v1/models`, `GET /health`, and
/// what describes them, `GET /openapi.json` and `GET /docs`.
pub fn router(engine: Engine, options: ServerOptions) -> Router {
    let limit = DefaultBodyLimit::max(options.max_body);
    let intake = Intake::new(options.limits);
    let served = Arc::new(Served { engine: Arc::new(engine), intake, options, created: api::now() });
    Router::new()
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/responses", post(responses::create))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/health", get(|| async { axum::Json(json!({ "status": "ok" })) }))
        .route("/openapi.json", get(docs::document))
        .route("/docs", get(docs::page))
        .fallback(|| async { ApiError::not_found("no such route") })
        .method_not_allowed_fallback(|| async {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method not allowed here", None)
        })
        .layer(limit)
        .with_state(served)
}

/// Serves until Ctrl-C or SIGTERM, then lets running requests end.
///
/// # Errors
/// If the socket fails.
pub async fn serve(listener: TcpListener, router: Router) -> Result<()> {
    let address = listener.local_addr().map_err(|e| Error::Engine(e.to_string()))?;
    axum::serve(listener, router)
        .with_graceful_shutdown(stop_signal())
        .await
        .map_err(|e| Error::Engine(format!("serving on {address}: {e}")))
}

/// Binds an address.
///
/// # Errors
/// If it is taken, or not one of this machine's.
pub async fn bind(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|e| Error::argument("--addr", "an address to listen on", format!("{address}: {e}")))
}

async fn stop_signal() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = interrupt => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    // A failure to listen for the signal leaves the default handling in place.
    let _ = interrupt.await;
}

async fn models(State(served): State<Arc<Served>>) -> Response {
    axum::Json(json!({ "object": "list", "data": [served.model()] })).into_response()
}

async fn model(State(served): State<Arc<Served>>, Path(id): Path<String>) -> Response {
    match served.engine(&id) {
        Ok(_) => axum::Json(served.model()).into_response(),
        Err(error) => error.into_response(),
    }
}
