//! The chat server: OpenAI's API over [`crate::engine`].
//!
//! Every request passes [`gate`] (keys, limits, time), pictures come in through [`intake`] alone, and
//! [`listen`] holds the sockets. No request can make the server read a file, nor fetch anything but
//! pictures of the hosts that its own host has allowed.
//!
//! The same as `radapt serve`, until Ctrl-C:
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use candle_core::Device;
//! use radapt::engine::{Engine, EngineOptions};
//! use radapt::model::{Lookup, Model};
//! use radapt::server::gate::{Gate, GateOptions};
//! use radapt::server::intake::IntakeOptions;
//! use radapt::server::listen::{ListenOptions, listen};
//! use radapt::server::{Models, ServerOptions, router};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! let model = Model::find("pocket", &Lookup::default())?;
//! let defended = Engine::load(model, EngineOptions::new(Device::Cpu)).await?;
//! let options = ServerOptions {
//!     name: "pocket".into(),
//!     intake: IntakeOptions::default(),
//!     max_tokens: 512,
//!     max_pictures: 8,
//!     max_choices: 4,
//!     watch: None,
//!     perturb: false,
//!     playground: true,
//!     samples: true,
//! };
//! let gate = Arc::new(Gate::new(GateOptions::default(), None));
//! let routes = router(Models { defended, undefended: None }, options, gate.clone())?;
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await?;
//! let stop = async {
//!     let _ = tokio::signal::ctrl_c().await;
//! };
//! listen(listener, routes, gate, ListenOptions::default(), stop).await;
//! # Ok(())
//! # })
//! # }
//! ```

mod api;
mod chat;
mod compare;
mod conversation;
mod docs;
pub mod gate;
pub mod intake;
pub mod keys;
pub mod listen;
pub mod metrics;
mod models;
mod perturb;
mod playground;
mod responses;
pub mod suspicion;
#[cfg(feature = "otlp")]
pub mod traces;

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
use tracing::Instrument;

use crate::eval::suspicion::Detector;
use crate::{Error, Result};

pub use api::ApiError;
use gate::Gate;
use image::RgbImage;
use intake::{Intake, IntakeOptions};
use metrics::Metrics;
use models::Model;
pub use models::Models;
use perturb::Workshop;
use suspicion::{OnSuspect, Suspicion, Watch, WatchOptions};

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
    /// How pictures are watched; `None` if they are not.
    pub watch: Option<WatchOptions>,
    /// Whether `POST /v1/perturb` makes adversarial pictures.
    pub perturb: bool,
    /// Whether there is a page to try the server with at `/`.
    pub playground: bool,
    /// Whether that page offers pictures of the pocket world, which the built-in model knows.
    pub samples: bool,
}

struct Served {
    model: Model,
    undefended: Option<Model>,
    watch: Option<Watch>,
    workshop: Option<Workshop>,
    options: ServerOptions,
    intake: Intake,
    metrics: Arc<Metrics>,
    /// Seconds since 1970 at the start, as `/v1/models` reports it.
    created: u64,
}

impl Served {
    /// The models by their names.
    fn models(&self) -> impl Iterator<Item = &Model> {
        std::iter::once(&self.model).chain(&self.undefended)
    }

    /// The model of this name.
    fn named(&self, name: &str) -> std::result::Result<&Model, ApiError> {
        self.models().find(|model| model.name == name).ok_or_else(|| {
            let names: Vec<String> = self.models().map(|model| format!("`{}`", model.name)).collect();
            ApiError::no_model(name, &names.join(" and "))
        })
    }

    /// Looks at a request's picture, where such are watched, or where the request asks for it.
    async fn watched(
        &self,
        picture: RgbImage,
        label: &str,
        asked: bool,
    ) -> std::result::Result<(RgbImage, Option<Suspicion>), ApiError> {
        match &self.watch {
            Some(watch) if asked || watch.on_suspect().is_some() => {
                let (picture, found) = watch.look(picture, label).await?;
                Ok((picture, Some(found)))
            }
            _ => Ok((picture, None)),
        }
    }

    /// What an answer says of its pictures: nothing, unless they are to be flagged.
    fn flagged<'s>(&self, seen: &'s [Suspicion]) -> Option<&'s [Suspicion]> {
        let watch = self.watch.as_ref()?;
        (watch.on_suspect() == Some(OnSuspect::Flag)).then_some(seen)
    }

    /// The picture of a URL; `label` is its name in messages.
    async fn picture(&self, url: &str, label: &str) -> std::result::Result<RgbImage, ApiError> {
        let span = tracing::info_span!(target: gate::SPANS, "picture");
        match self.intake.picture(url, label).instrument(span).await {
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

    /// A model as `/v1/models` has it.
    fn listed(&self, model: &Model) -> Value {
        let mut x_radapt = model.x_radapt(None);
        x_radapt["compare"] = json!(self.undefended.is_some());
        x_radapt["samples"] = json!(self.options.playground && self.options.samples);
        x_radapt["perturb"] = json!(self.workshop.is_some());
        x_radapt["on_suspect"] =
            json!(self.watch.as_ref().and_then(Watch::on_suspect).map(OnSuspect::as_str));
        json!({
            "id": model.name,
            "object": "model",
            "created": self.created,
            "owned_by": "radapt",
            "x_radapt": x_radapt,
        })
    }
}

/// The routes: `POST /v1/chat/completions`, `POST /v1/responses`, `POST /v1/compare`, `POST
/// /v1/perturb`, `GET /v1/models`, `GET /health` (it lives), `GET /ready` (it takes requests), `GET
/// /metrics`, and what describes them, `GET /openapi.json`, `GET /docs` and the playground at `/`; all
/// behind the gate.
///
/// # Errors
/// If the intake's limits leave no room for a picture, its hosts are not written as such, pictures
/// are to be watched without a defence, or by too few clean ones, or adversarial ones are to be made
/// for a model whose tower is not known.
pub fn router(models: Models, options: ServerOptions, own: Arc<Gate>) -> Result<Router> {
    let intake = Intake::new(options.intake.clone())?;
    let metrics = own.metrics.clone();
    let engine = &models.defended;
    let watch = options.watch.clone().map(|watch| {
        let tower = engine.tower().filter(|_| engine.defense().is_some());
        let Some(tower) = tower else {
            let expected = "a defence: without one there is nothing to disagree";
            return Err(Error::argument("--on-suspect or --compare", expected, "none"));
        };
        Watch::new(Detector::new(tower.clone(), engine.preprocess().clone()), watch, metrics.clone())
    });
    let served = Arc::new(Served {
        watch: watch.transpose()?,
        workshop: options.perturb.then(|| Workshop::new(engine)).transpose()?,
        undefended: models
            .undefended
            .map(|engine| Model::new(format!("{}:undefended", options.name), engine)),
        model: Model::new(options.name.clone(), models.defended),
        intake,
        metrics,
        created: api::now(),
        options,
    });
    let (ready, counted) = (own.clone(), own.metrics.clone());
    let pages =
        if served.options.playground { playground::routes(served.options.samples) } else { Router::new() };
    Ok(pages
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/responses", post(responses::create))
        .route("/v1/compare", post(compare::compare))
        .route("/v1/perturb", post(perturb::perturb))
        .route("/v1/models", get(list))
        .route("/v1/models/{*id}", get(listed))
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
    let (status, word) = match gate.leaving() {
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

async fn list(State(served): State<Arc<Served>>) -> Response {
    let data: Vec<Value> = served.models().map(|model| served.listed(model)).collect();
    axum::Json(json!({ "object": "list", "data": data })).into_response()
}

async fn listed(State(served): State<Arc<Served>>, Path(id): Path<String>) -> Response {
    match served.named(&id) {
        Ok(model) => axum::Json(served.listed(model)).into_response(),
        Err(error) => error.into_response(),
    }
}
