//! `radapt serve`

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use radapt::engine::Engine;
use radapt::image::DecodeLimits;
use radapt::server::gate::{Gate, GateOptions};
use radapt::server::intake::{FetchOptions, Intake, IntakeOptions};
use radapt::server::keys::{KeyLimits, Keys};
use radapt::server::listen::{ListenOptions, listen};
use radapt::server::{ServerOptions, bind, router, stop_signal};
use serde_json::json;

use super::options::{DefenseFlags, ModelOptions, PictureLimits, argument};
use super::{Global, chat, print};

/// Serve a model over OpenAI's API: POST /v1/chat/completions, POST /v1/responses, GET /v1/models,
/// GET /health. GET /docs describes it.
///
/// Pictures come as `data:` URLs, and from the hosts of --fetch; the server reads no files.
///
/// Every flag may be given as a variable too, RADAPT_MAX_TOKENS for --max-tokens, and as a key of the
/// same name in a file, max-tokens. A flag comes before the variable, that before the file.
#[derive(Args)]
pub struct Serve {
    /// A TOML file of flags
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Load everything, say whether it is in order, and exit: 0 if it is, 1 or 2 if not
    #[arg(long)]
    check: bool,
    /// Where to listen
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    addr: SocketAddr,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    defense: DefenseFlags,
    #[command(flatten)]
    limits: PictureLimits,
    /// The model's name in the API; its Hub id or folder name where not given
    #[arg(long, value_name = "NAME", help_heading = "Answer")]
    name: Option<String>,
    /// The most tokens an answer may have
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Answer")]
    max_tokens: usize,
    /// The most pictures a request may have
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Picture limits")]
    max_pictures: usize,
    /// The most answers a request may ask for, as `n`
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Answer")]
    max_choices: usize,
    /// Quantise the language model as it is loaded (q4k, q8_0, 4, 8, ...)
    #[arg(long, value_name = "TYPE", help_heading = "Answer")]
    isq: Option<String>,
    #[command(flatten)]
    gate: GateFlags,
}

/// Who may ask, and how much.
#[derive(Args)]
#[command(next_help_heading = "Limits")]
struct GateFlags {
    /// A TOML file of API keys, read again when it changes; everybody may ask where not given
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    /// Requests a minute for each key that has no limit of its own, and for all together without keys
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<NonZeroU32>,
    /// Requests at a time, likewise
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    concurrent: Option<u32>,
    /// Requests worked on at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    in_flight: u32,
    /// Requests that wait for that; further ones are told to come back later
    #[arg(long, value_name = "N", default_value_t = 64)]
    queue: u32,
    /// How long they wait at most
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = seconds)]
    queue_time: f64,
    /// How long an answer may take, to its last byte
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0, value_parser = seconds)]
    request_time: f64,
    /// How long a request's body may take to arrive
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = seconds)]
    body_time: f64,
    /// How long a request's headers may take, and a connection may idle
    #[arg(long, value_name = "SECONDS", default_value_t = 15.0, value_parser = seconds)]
    header_time: f64,
    /// Open connections at most
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    connections: u32,
    /// How long new requests are answered with 503 after SIGTERM, before the door is shut
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0, value_parser = seconds)]
    linger: f64,
    /// How long running requests have to end after that
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, value_parser = seconds)]
    drain_time: f64,
    /// Hosts that pictures are fetched from by https: example.org, *.example.org, or * for any public one;
    /// none where not given
    #[arg(long, value_name = "HOST,...", value_delimiter = ',')]
    fetch: Vec<String>,
    /// Bytes for all pictures that are being taken in
    #[arg(long, value_name = "BYTES", default_value_t = 2 << 30)]
    picture_memory: u64,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err(format!("expected seconds from 0 to 86400, found `{text}`")),
    }
}

impl GateFlags {
    /// The gate for bodies of `max_body` bytes.
    fn gate(&self, max_body: usize) -> radapt::Result<Arc<Gate>> {
        let limits = KeyLimits {
            requests_per_minute: self.requests_per_minute,
            concurrent: self.concurrent.map(|n| n as usize),
        };
        let keys = self.keys.as_deref().map(|file| Keys::open(file, limits)).transpose()?;
        if let (Some(file), Some(true)) = (&self.keys, keys.as_ref().map(Keys::is_empty)) {
            return Err(argument(
                "--keys",
                "at least one key, or nobody gets in",
                &file.display().to_string(),
            ));
        }
        let options = GateOptions {
            in_flight: self.in_flight as usize,
            queue: self.queue as usize,
            queue_time: Duration::from_secs_f64(self.queue_time),
            request_time: Duration::from_secs_f64(self.request_time),
            body_time: Duration::from_secs_f64(self.body_time),
            max_body,
            limits,
            ..GateOptions::default()
        };
        Ok(Arc::new(Gate::new(options, keys)))
    }

    fn sockets(&self) -> ListenOptions {
        ListenOptions {
            connections: self.connections as usize,
            header_time: Duration::from_secs_f64(self.header_time),
            linger: Duration::from_secs_f64(self.linger),
            drain_time: Duration::from_secs_f64(self.drain_time),
        }
    }

    fn intake(&self, limits: DecodeLimits) -> IntakeOptions {
        IntakeOptions {
            limits,
            memory: self.picture_memory,
            fetch: (!self.fetch.is_empty()).then(|| FetchOptions::new(&self.fetch)),
            ..IntakeOptions::default()
        }
    }
}

impl Serve {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let runtime = tokio::runtime::Runtime::new()?;
        if !self.check {
            return runtime.block_on(self.listen(global));
        }
        let checked = runtime.block_on(self.load(global));
        let json = match &checked {
            Ok((engine, options, _)) => json!({
                "ok": true,
                "model": options.name,
                "defense": engine.defense(),
                "contract": engine.preprocess().contract,
                "address": self.addr.to_string(),
            }),
            Err(error) => json!({ "ok": false, "reason": error.to_string() }),
        };
        if global.json {
            print(global, json, "")?;
        }
        let (engine, options, gate) = checked?;
        let name = options.name.clone();
        drop(router(engine, options, gate)?);
        global.say(format_args!("all is in order to serve {name} at http://{}", self.addr));
        Ok(ExitCode::SUCCESS)
    }

    /// All that is needed to serve.
    async fn load(&self, global: &Global) -> anyhow::Result<(Engine, ServerOptions, Arc<Gate>)> {
        for (flag, value) in [("--max-tokens", self.max_tokens), ("--max-choices", self.max_choices)] {
            if value == 0 {
                return Err(argument(flag, "at least 1", "0").into());
            }
        }
        if self.name.as_ref().is_some_and(|name| name.trim().is_empty()) {
            return Err(argument("--name", "a name", "none").into());
        }
        let limits = self.limits.limits();
        // One picture at its limit in base64, which takes four bytes for three, and a conversation;
        // or several smaller ones.
        let max_body = usize::try_from(limits.max_bytes.saturating_mul(2))?.saturating_add(1 << 20);
        let gate = self.gate.gate(max_body)?;
        let intake = self.gate.intake(limits);
        // What is wrong with it should not be found out after minutes of loading.
        Intake::new(intake.clone())?;
        // As many as are let through at once.
        let sequences = NonZeroUsize::new(self.gate.in_flight as usize);
        let engine = chat::load(&self.model, &self.defense, self.isq.clone(), sequences, global).await?;
        let given = &engine.model().name;
        let folder = std::path::Path::new(given).canonicalize().ok();
        let short = folder.as_deref().and_then(|f| f.file_name()).map(|f| f.to_string_lossy().into_owned());
        let name = self.name.clone().or(short).unwrap_or_else(|| given.clone());
        let options = ServerOptions {
            name,
            intake,
            max_tokens: self.max_tokens,
            max_pictures: self.max_pictures,
            max_choices: self.max_choices,
        };
        Ok((engine, options, gate))
    }

    async fn listen(self, global: &Global) -> anyhow::Result<ExitCode> {
        // A taken port should not be found out after minutes of loading.
        let listener = bind(self.addr).await?;
        let address = listener.local_addr()?;
        let (engine, options, gate) = self.load(global).await?;
        let name = options.name.clone();
        let json = json!({ "address": address.to_string(), "model": name, "defense": engine.defense() });
        let router = router(engine, options, gate.clone())?;
        if global.json {
            print(global, json, "")?;
        } else {
            global.say(format_args!("serving {name} at http://{address}"));
        }
        let ended = listen(listener, router, gate, self.gate.sockets(), stop_signal()).await;
        if !ended {
            global.say("warning: answers that were not done in time were cut off");
        }
        Ok(if ended { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
