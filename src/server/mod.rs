//! The chat server: OpenAI's API over [`crate::engine`].
//!
//! Every request passes [`gate`] (keys, limits, time), pictures come in through [`intake`] alone, and
//! [`listen`] holds the sockets. No request can make the server read a file, nor fetch anything but
//! pictures of the hosts that its own host has allowed.

mod api;
mod chat;
mod conversation;
mod docs;
pub mod gate;
pub mod intake;
pub mod keys;
pub mod listen;
pub mod metrics;
mod responses;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::engine::Engine;
use crate::{Error, Result};

pub use api::ApiError;
use gate::Gate;
use image::RgbImage;
use intake::{Intake, IntakeOptions};
use metrics::Metrics;

/// What a server is started with.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// The model's name in the API.
    pub name: String,
    /// How pictures are taken in.
    pub intake: IntakeOptions,
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
    metrics: Arc<Metrics>,
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

    /// The picture of a URL; `label` is its name in messages.
    async fn picture(&self, url: &str, label: &str) -> std::result::Result<RgbImage, ApiError> {
        match self.intake.picture(url, label).await {
            Ok(picture) => {
                self.metrics.pictures.inc();
                Ok(picture)
            }
            Err(error) => {
                self.metrics.refused(error.refusal, 1);
                tracing::info!(
                    target: "radapt::intake",
                    refusal = error.refusal.as_str(),
                    detail = error.detail().unwrap_or_default(),
                    "a picture was refused"
                );
                Err(error.into())
            }
        }
    }

    fn model(&self) -> Value {
        json!({ "id": self.options.name, "object": "model", "created": self.created, "owned_by": "radapt" })
    }
}

/// The routes: `POST /v1/chat/completions`, `POST /v1/responses`, `GET /v1/models`, `GET /health` (it
/// lives), `GET /ready` (it takes requests), `GET /metrics`, and what describes them, `GET
/// /openapi.json` and `GET /docs`; all behind the gate.
///
/// # Errors
/// If the intake's limits leave no room for a picture, or its hosts are not written as such.
pub fn router(engine: Engine, options: ServerOptions, own: Arc<Gate>) -> Result<Router> {
    let intake = Intake::new(options.intake.clone())?;
    let metrics = own.metrics.clone();
    let served = Arc::new(Served { engine: Arc::new(engine), intake, metrics, options, created: api::now() });
    let (ready, counted) = (own.clone(), own.metrics.clone());
    Ok(Router::new()
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/responses", post(responses::create))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/health", get(|| async { axum::Json(json!({ "status": "ok" })) }))
        .route("/ready", get(move || std::future::ready(readiness(&ready))))
        .route(
            "/metrics",
            get(move || std::future::ready(([(CONTENT_TYPE, metrics::CONTENT_TYPE)], counted.text()))),
        )
        .route("/openapi.json", get(docs::document))
        .route("/docs", get(docs::page))
        .fallback(|| async { ApiError::not_found("no such route") })
        .method_not_allowed_fallback(|| async {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method not allowed here", None)
        })
        // The gate reads bodies, with its own limit.
        .layer(DefaultBodyLimit::disable())
        .layer(axum::middleware::from_fn_with_state(own, gate::gate))
        .with_state(served))
}

fn readiness(gate: &Gate) -> Response {
    let (status, word) = match gate.draining() {
        true => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        false => (StatusCode::OK, "ready"),
    };
    (status, axum::Json(json!({ "status": word }))).into_response()
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

/// Waits for Ctrl-C or SIGTERM.
pub async fn stop_signal() {
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
