//! `radapt serve`

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use radapt::defense::{AnchorChoice, DefenseOptions};
use radapt::engine::Engine;
use radapt::eval::suspicion::{Calibration, Detector};
use radapt::image::DecodeLimits;
use radapt::pocket::built_in::POCKET;
use radapt::server::gate::{Gate, GateOptions};
use radapt::server::intake::{FetchOptions, Intake, IntakeOptions};
use radapt::server::keys::{KeyLimits, Keys};
use radapt::server::listen::{ListenOptions, listen};
use radapt::server::suspicion::{OnSuspect, WatchOptions, check_share};
use radapt::server::{Models, ServerOptions, bind, router, stop_signal};
use serde_json::json;

use super::logging::Logging;
use super::options::{DataFlags, DefenseFlags, ModelOptions, PictureLimits, argument};
use super::{Global, chat, print};

/// Serve a model over OpenAI's API: POST /v1/chat/completions, POST /v1/responses, GET /v1/models,
/// GET /health. GET /docs describes it, and a page to try it with is at /.
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
    /// How lines of the log look: text or json
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "text", help_heading = "Log")]
    log_format: LogFormat,
    /// Send traces to this OpenTelemetry collector, such as http://127.0.0.1:4318
    #[cfg(feature = "otlp")]
    #[arg(long, value_name = "URL", help_heading = "Log")]
    otlp: Option<String>,
    #[command(flatten)]
    gate: GateFlags,
    #[command(flatten)]
    robustness: RobustnessFlags,
}

/// The defence as something the API shows.
#[derive(Args)]
#[command(next_help_heading = "Robustness")]
struct RobustnessFlags {
    /// Serve the model without its defence too, as NAME:undefended, and POST /v1/compare: the language
    /// model is loaded a second time
    #[arg(long)]
    compare: bool,
    /// What to do about pictures on which the defended and the undefended tower disagree more than on
    /// clean ones: log, flag (say so in the response) or refuse; see `radapt eval suspicion` for how
    /// well that tells them apart
    #[arg(long, value_name = "ACTION", value_enum)]
    on_suspect: Option<Action>,
    /// The scores of clean pictures, a file that `radapt eval suspicion` writes
    #[arg(long, value_name = "FILE", conflicts_with = "calibrate")]
    calibration: Option<PathBuf>,
    /// Score these clean pictures at the start instead: anything that --data of the evaluations takes;
    /// pocket:validation where the model is the built-in pocket
    #[arg(long, value_name = "PATH")]
    calibrate: Option<String>,
    /// How many of them
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u64).range(20..))]
    calibrate_n: u64,
    /// The share of clean pictures that may be called suspicious
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    suspect_share: f64,
    /// Offer POST /v1/perturb, which makes an adversarial version of a picture, one at a time
    #[arg(long)]
    perturb: bool,
    /// Leave out the page at /
    #[arg(long)]
    no_playground: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Action {
    Log,
    Flag,
    Refuse,
}

impl RobustnessFlags {
    /// Whether what was asked for needs a defence, and which flag asked.
    fn needs_defense(&self) -> Option<&'static str> {
        match (self.compare, self.on_suspect) {
            (true, _) => Some("--compare"),
            (_, Some(_)) => Some("--on-suspect"),
            _ => None,
        }
    }

    /// What is wrong with the flags and can be told before a model is loaded.
    fn check(&self) -> radapt::Result<()> {
        check_share(self.suspect_share)?;
        let given =
            [("--calibration", self.calibration.is_some()), ("--calibrate", self.calibrate.is_some())];
        if let (None, Some((flag, _))) = (self.needs_defense(), given.iter().find(|(_, given)| *given)) {
            return Err(argument(flag, "--on-suspect or --compare to go with it", "neither"));
        }
        self.calibration.as_deref().map_or(Ok(()), |file| Calibration::open(file).map(drop))
    }

    /// How pictures are watched, if they are.
    fn watch(
        &self,
        model: &ModelOptions,
        engine: &Engine,
        global: &Global,
    ) -> anyhow::Result<Option<WatchOptions>> {
        if self.needs_defense().is_none() {
            return Ok(None);
        }
        Ok(Some(WatchOptions {
            calibration: self.calibration(model, engine, global)?,
            share: self.suspect_share,
            on_suspect: self.on_suspect.map(|action| match action {
                Action::Log => OnSuspect::Log,
                Action::Flag => OnSuspect::Flag,
                Action::Refuse => OnSuspect::Refuse,
            }),
        }))
    }

    fn calibration(
        &self,
        model: &ModelOptions,
        engine: &Engine,
        global: &Global,
    ) -> anyhow::Result<Option<Calibration>> {
        let (Some(subject), Some(tower)) = (engine.subject(), engine.tower()) else { return Ok(None) };
        if let Some(file) = &self.calibration {
            return Ok(Some(Calibration::read(file, subject)?));
        }
        // The pocket model's own world is what it is asked about.
        let own = (model.model == POCKET).then(|| "pocket:validation".to_string());
        let Some(data) = self.calibrate.clone().or(own) else { return Ok(None) };
        let flags = DataFlags {
            data,
            n: Some(self.calibrate_n),
            first: false,
            dataset: None,
            classes: None,
            template: String::new(),
        };
        let preprocess = engine.preprocess();
        let side = preprocess.width.max(preprocess.height).clamp(96, 224);
        let set = flags.open(global.seed, side, model.offline)?;
        let detector = Detector::new(tower.clone(), preprocess.clone());
        let bar = global.bar("calibrating", set.items().len() as u64);
        let calibration =
            Calibration::of(&detector, subject.clone(), &set, &DecodeLimits::default(), &|| bar.inc(1))?;
        bar.finish_and_clear();
        Ok(Some(calibration))
    }
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
    /// How long after SIGTERM only /ready says so, with 503, and requests are taken as before: longer than
    /// a load balancer takes to notice
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0, value_parser = seconds)]
    notice: f64,
    /// How long new requests are answered with 503 after that, before the door is shut
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
            notice: Duration::from_secs_f64(self.notice),
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

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

impl Serve {
    /// What its log is like.
    pub fn logging(&self) -> Logging {
        Logging {
            requests: true,
            json: self.log_format == LogFormat::Json,
            #[cfg(feature = "otlp")]
            otlp: self.otlp.clone(),
        }
    }

    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let runtime = tokio::runtime::Runtime::new()?;
        if !self.check {
            return runtime.block_on(self.listen(global));
        }
        let checked = runtime.block_on(self.load(global));
        let json = match &checked {
            Ok((models, options, _)) => json!({
                "ok": true,
                "model": options.name,
                "defense": models.defended.defense(),
                "contract": models.defended.preprocess().contract,
                "address": self.addr.to_string(),
            }),
            Err(error) => json!({ "ok": false, "reason": error.to_string() }),
        };
        if global.json {
            print(global, json, "")?;
        }
        let (models, options, gate) = checked?;
        let name = options.name.clone();
        drop(router(models, options, gate)?);
        global.say(format_args!("all is in order to serve {name} at http://{}", self.addr));
        Ok(ExitCode::SUCCESS)
    }

    /// All that is needed to serve.
    async fn load(&self, global: &Global) -> anyhow::Result<(Models, ServerOptions, Arc<Gate>)> {
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
        self.robustness.check()?;
        // As many as are let through at once.
        let sequences = NonZeroUsize::new(self.gate.in_flight as usize);
        let defense = self.defense.options();
        let none = DefenseOptions { anchor: AnchorChoice::None, ..DefenseOptions::default() };
        let asks = self.robustness.needs_defense();
        if let (Some(flag), true) = (asks, defense == none) {
            return Err(argument(
                flag,
                "a defence: without one there is nothing to compare",
                "--anchor none",
            )
            .into());
        }
        let engine = chat::load(&self.model, defense, self.isq.clone(), sequences, global).await?;
        let watch = self.robustness.watch(&self.model, &engine, global)?;
        let undefended = match self.robustness.compare {
            true => Some(chat::load(&self.model, none, self.isq.clone(), sequences, global).await?),
            false => None,
        };
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
            watch,
            perturb: self.robustness.perturb,
            playground: !self.robustness.no_playground,
            samples: self.model.model == POCKET,
        };
        Ok((Models { defended: engine, undefended }, options, gate))
    }

    async fn listen(self, global: &Global) -> anyhow::Result<ExitCode> {
        // A taken port should not be found out after minutes of loading.
        let listener = bind(self.addr).await?;
        let address = listener.local_addr()?;
        let (models, options, gate) = self.load(global).await?;
        let name = options.name.clone();
        let json =
            json!({ "address": address.to_string(), "model": name, "defense": models.defended.defense() });
        let router = router(models, options, gate.clone())?;
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
