//! What every request passes before and after it is worked on: keys, limits, time, counts, a line in
//! the log.
//!
//! A request's body is read here, within its own time and memory, before the request takes a place
//! among those worked on: a slow sender holds up nobody. A place is kept until the last byte of the
//! answer is out or its reader is gone.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{Instrument, Span};

use super::keys::{Key, KeyLimits, Keys};
use super::metrics::{Answered, Metrics, Route};

/// Bytes of the memory for bodies that a request takes before the first of its own has come.
const FIRST_SHARE: usize = 64 << 10;

/// In logs and counts: the asker was gone before there was an answer.
const GONE: u16 = 499;

/// The header with a request's number.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What the gate lets through.
#[derive(Debug, Clone)]
pub struct GateOptions {
    /// Requests worked on at once.
    pub in_flight: usize,
    /// Requests that wait for that.
    pub queue: usize,
    /// How long they wait at most.
    pub queue_time: Duration,
    /// How long a request may take from its last byte to the answer's last byte.
    pub request_time: Duration,
    /// How long a request's body may take to arrive.
    pub body_time: Duration,
    /// The most bytes a body may have.
    pub max_body: usize,
    /// The most values (numbers, texts, lists, ...) a JSON body may have: read, each takes far more
    /// memory than the two bytes that it can be.
    pub max_values: usize,
    /// The most bytes that bodies may have together.
    pub bodies: usize,
    /// Limits of whoever has none of their own: keys without, and everybody where there are no keys.
    pub limits: KeyLimits,
}

impl Default for GateOptions {
    fn default() -> Self {
        Self {
            in_flight: 16,
            queue: 64,
            queue_time: Duration::from_secs(30),
            request_time: Duration::from_secs(300),
            body_time: Duration::from_secs(30),
            max_body: 65 << 20,
            max_values: 100_000,
            bodies: 1 << 30,
            limits: KeyLimits::default(),
        }
    }
}

/// The gate of a server.
pub struct Gate {
    options: GateOptions,
    keys: Option<Keys>,
    anonymous: Arc<Key>,
    places: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    /// In KiB.
    bodies: Arc<Semaphore>,
    leaving: AtomicBool,
    draining: AtomicBool,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// The target of spans, which are for traces and not for the log.
pub const SPANS: &str = "radapt::spans";

/// In a response's extensions: it is a stream, whose end is not its start.
#[derive(Debug, Clone, Copy)]
pub struct Streamed;

impl Gate {
    /// With keys, or open to everybody.
    pub fn new(options: GateOptions, keys: Option<Keys>) -> Self {
        let semaphore = |n: usize| Arc::new(Semaphore::new(n.min(Semaphore::MAX_PERMITS)));
        Self {
            places: semaphore(options.in_flight.max(1)),
            waiting: semaphore(options.queue),
            bodies: semaphore(
                (options.bodies >> 10).max(options.max_body.div_ceil(1024)).min(u32::MAX as usize),
            ),
            anonymous: Arc::new(Key::anonymous(options.limits)),
            leaving: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            metrics: Arc::default(),
            options,
            keys,
        }
    }

    /// The keys, where there are some.
    pub fn keys(&self) -> Option<&Keys> {
        self.keys.as_ref()
    }

    /// From now on `/ready` answers 503, and every answer ends its connection; requests are taken as
    /// before, for those whose askers have not heard of it yet.
    pub fn leave(&self) {
        self.leaving.store(true, Ordering::Relaxed);
    }

    /// Whether the server is about to stop, and `/ready` says so.
    pub fn leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed) || self.draining()
    }

    /// From now on new requests are told to come back later; those let through end as they would.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether new requests are turned away because the server is about to stop.
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    fn asker(&self, headers: &HeaderMap) -> Option<Arc<Key>> {
        let Some(keys) = &self.keys else { return Some(self.anonymous.clone()) };
        let given = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
        let (scheme, key) = given.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        keys.find(key.trim())
    }

    /// The body, whole, and its share of the memory for bodies.
    ///
    /// The share grows with what has arrived: a sender who only says that much will come takes no room
    /// from the others.
    async fn body(&self, body: Body) -> Result<(Bytes, OwnedSemaphorePermit), Response> {
        let most = self.options.max_body;
        if body.size_hint().lower() > most as u64 {
            self.metrics.turn_away("body");
            return Err(too_large(most));
        }
        let until = tokio::time::Instant::now() + self.options.body_time;
        let mut body = Limited::new(body, most);
        let mut share = self.room(FIRST_SHARE.min(most)).await?;
        let mut found = Vec::new();
        loop {
            let frame = match tokio::time::timeout_at(until, body.frame()).await {
                Ok(None) => break,
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => {
                    self.metrics.turn_away("body");
                    return Err(match error.is::<LengthLimitError>() {
                        true => too_large(most),
                        false => refuse(StatusCode::BAD_REQUEST, "the request's body broke off", "bad_body"),
                    });
                }
                Err(_) => {
                    self.metrics.turn_away("body");
                    let seconds = self.options.body_time.as_secs();
                    let message = format!("the request's body took longer than {seconds} seconds");
                    return Err(refuse(StatusCode::REQUEST_TIMEOUT, &message, "body_timeout"));
                }
            };
            let Ok(data) = frame.into_data() else { continue };
            let (has, needs) = (share.num_permits() << 10, found.len() + data.len());
            if needs > has {
                share.merge(self.room((has * 2).clamp(needs, most.max(needs)) - has).await?);
            }
            found.extend_from_slice(&data);
        }
        if has_more_values(&found, self.options.max_values) {
            self.metrics.turn_away("body");
            let message = format!("the request's body has more than {} values", self.options.max_values);
            return Err(refuse(StatusCode::PAYLOAD_TOO_LARGE, &message, "body_too_large"));
        }
        Ok((found.into(), share))
    }

    /// Room for so many bytes of bodies.
    async fn room(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Response> {
        let share = u32::try_from(bytes.div_ceil(1024).max(1)).unwrap_or(u32::MAX);
        let room = self.bodies.clone().acquire_many_owned(share);
        match tokio::time::timeout(self.options.queue_time, room).await {
            Ok(Ok(share)) => Ok(share),
            _ => {
                self.metrics.turn_away("queue");
                Err(busy("too many bytes are on their way in", self.options.queue_time))
            }
        }
    }

    /// A place among the requests worked on.
    async fn place(&self) -> Result<OwnedSemaphorePermit, Response> {
        if let Ok(place) = self.places.clone().try_acquire_owned() {
            return Ok(place);
        }
        let full = || {
            self.metrics.turn_away("queue");
            busy("the server is at its limit", self.options.queue_time)
        };
        let Ok(_turn) = self.waiting.clone().try_acquire_owned() else { return Err(full()) };
        let _waiting = Counted::new(&self.metrics.waiting);
        match tokio::time::timeout(self.options.queue_time, self.places.clone().acquire_owned()).await {
            Ok(Ok(place)) => Ok(place),
            _ => Err(full()),
        }
    }

    async fn pass(self: &Arc<Self>, request: Request, next: Next, asker: &Arc<Key>) -> Response {
        if self.draining() {
            self.metrics.turn_away("draining");
            let mut response =
                refuse(StatusCode::SERVICE_UNAVAILABLE, "the server is about to stop", "draining");
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
            return response;
        }
        if request.method() != Method::POST {
            return next.run(request).await;
        }
        if let Err(wait) = asker.count() {
            self.metrics.turn_away("rate");
            return later("too many requests within a minute", "rate_limit_exceeded", wait);
        }
        let Some(own) = asker.place() else {
            self.metrics.turn_away("concurrent");
            return later("too many requests at a time", "rate_limit_exceeded", Duration::from_secs(1));
        };
        let (parts, body) = request.into_parts();
        let (body, share) = match self.body(body).await {
            Ok(found) => found,
            Err(refused) => return refused,
        };
        let place = match self.place().await {
            Ok(place) => place,
            Err(refused) => return refused,
        };
        let counted = Counted::new(&self.metrics.in_flight);
        let until = tokio::time::Instant::now() + self.options.request_time;
        let request = Request::from_parts(parts, Body::from(body));
        let response = tokio::time::timeout_at(until, next.run(request)).await;
        drop(share);
        match response {
            Ok(response) => {
                let kept = Kept { _places: (place, own), _counted: counted };
                let (parts, body) = response.into_parts();
                Response::from_parts(
                    parts,
                    Body::new(Timed {
                        body,
                        until: Box::pin(tokio::time::sleep_until(until)),
                        kept: Some(kept),
                    }),
                )
            }
            Err(_) => {
                let seconds = self.options.request_time.as_secs();
                let message = format!("no answer within {seconds} seconds");
                refuse(StatusCode::REQUEST_TIMEOUT, &message, "timeout")
            }
        }
    }
}

/// Whether JSON has more than so many values, told by its commas and brackets before it is read.
fn has_more_values(json: &[u8], most: usize) -> bool {
    let (mut values, mut text, mut escaped) = (1_usize, false, false);
    for byte in json {
        match (text, byte) {
            (true, _) if escaped => escaped = false,
            (true, b'\\') => escaped = true,
            (_, b'"') => text = !text,
            (false, b',' | b'[' | b'{') => {
                values += 1;
                if values > most {
                    return true;
                }
            }
            _ => {}
        }
    }
    false
}

/// The middleware that every request passes.
pub async fn gate(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_string();
    let method = request.method().clone();
    let id = request_id(request.headers());
    let span = tracing::info_span!(
        target: SPANS,
        "request",
        otel.name = format!("{method} {route}"),
        otel.kind = "server",
        http.request.method = %method,
        http.route = route,
        http.response.status_code = tracing::field::Empty,
        radapt.request_id = id,
        radapt.key = tracing::field::Empty,
    );
    #[cfg(feature = "otlp")]
    super::traces::follow(&span, request.headers());
    let open = is_open(&route);
    let asker = if open { Some(gate.anonymous.clone()) } else { gate.asker(request.headers()) };
    // Dropped with this future, it counts an asker that has left.
    let mut done = Done {
        span: span.clone(),
        gate: gate.clone(),
        id,
        method,
        route,
        key: asker.as_ref().map_or_else(|| "none".into(), |asker| asker.name().to_string()),
        status: GONE,
        streamed: false,
        start,
        first: None,
    };
    let mut response = match &asker {
        Some(_) if open => next.run(request).instrument(span.clone()).await,
        Some(asker) => gate.pass(request, next, asker).instrument(span.clone()).await,
        None => {
            gate.metrics.turn_away("key");
            let mut response =
                refuse(StatusCode::UNAUTHORIZED, "no key, or one that is not known here", "invalid_api_key");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            response
        }
    };
    if let Ok(value) = HeaderValue::from_str(&done.id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    if gate.leaving() {
        // Whoever keeps connections open is to open the next one elsewhere.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    done.status = response.status().as_u16();
    done.streamed = response.extensions().get::<Streamed>().is_some();
    let (parts, body) = response.into_parts();
    Response::from_parts(parts, Body::new(Logged { body, done }))
}

/// What a stranger may see: whether the server lives, its pages, and nothing that costs.
fn is_open(route: &str) -> bool {
    matches!(
        route,
        "/health" | "/ready" | "/docs" | "/openapi.json" | "/" | "/playground.css" | "/playground.js"
    )
}

/// The asker's own number for the request where it is harmless, a new one elsewhere.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let harmless = |id: &&str| {
        (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    given.filter(harmless).map_or_else(|| format!("req_{}", uuid::Uuid::new_v4().simple()), str::to_string)
}

/// An error in OpenAI's shape.
fn refuse(status: StatusCode, message: &str, code: &str) -> Response {
    let kind = match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        status if status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    };
    let body = json!({ "error": { "message": message, "type": kind, "param": null, "code": code } });
    (status, axum::Json(body)).into_response()
}

fn too_large(most: usize) -> Response {
    let message = format!("the request's body has more than {most} bytes");
    refuse(StatusCode::PAYLOAD_TOO_LARGE, &message, "body_too_large")
}

fn later(message: &str, code: &str, wait: Duration) -> Response {
    let mut response = refuse(StatusCode::TOO_MANY_REQUESTS, message, code);
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    response
}

fn busy(message: &str, wait: Duration) -> Response {
    later(message, "server_busy", wait.min(Duration::from_secs(5)))
}

/// One more, as long as it lives.
struct Counted(prometheus_client::metrics::gauge::Gauge);

impl Counted {
    fn new(gauge: &prometheus_client::metrics::gauge::Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What a request holds until its answer is out.
struct Kept {
    _places: (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>),
    _counted: Counted,
}

/// A body that ends when its time is over, and keeps its place until then.
struct Timed {
    body: Body,
    until: Pin<Box<tokio::time::Sleep>>,
    kept: Option<Kept>,
}

impl http_body::Body for Timed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.kept.is_none() {
            return Poll::Ready(None);
        }
        if self.until.as_mut().poll(context).is_ready() {
            self.kept = None;
            return Poll::Ready(Some(Err(axum::Error::new(std::io::Error::other(
                "the answer took too long",
            )))));
        }
        let found = Pin::new(&mut self.body).poll_frame(context);
        if matches!(found, Poll::Ready(None | Some(Err(_)))) {
            self.kept = None;
        }
        found
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What is said of a request when its answer is out, or its reader gone.
struct Done {
    /// It ends with the answer.
    span: Span,
    gate: Arc<Gate>,
    id: String,
    method: Method,
    route: String,
    key: String,
    status: u16,
    streamed: bool,
    start: Instant,
    first: Option<Duration>,
}

/// A body after which a request is counted.
struct Logged {
    body: Body,
    done: Done,
}

impl http_body::Body for Logged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let found = Pin::new(&mut self.body).poll_frame(context);
        if self.done.streamed && self.done.first.is_none() && matches!(found, Poll::Ready(Some(Ok(_)))) {
            self.done.first = Some(self.done.start.elapsed());
        }
        found
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        let seconds = self.start.elapsed().as_secs_f64();
        let metrics = &self.gate.metrics;
        let (route, key) = (self.route.clone(), self.key.clone());
        self.span.record("http.response.status_code", self.status);
        self.span.record("radapt.key", &key);
        metrics.seconds.get_or_create(&Route { route: route.clone() }).observe(seconds);
        metrics.requests.get_or_create(&Answered { route, status: self.status, key }).inc();
        if let Some(first) = self.first {
            metrics.first_piece.observe(first.as_secs_f64());
        }
        // Never a path, a body or a picture: what was asked is the asker's.
        tracing::info!(
            target: "radapt::requests",
            id = %self.id,
            method = %self.method,
            route = %self.route,
            status = self.status,
            key = %self.key,
            seconds = format!("{seconds:.3}"),
        );
    }
}
