//! What goes to stderr of what happens inside, and traces.

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use super::Global;

/// What a command's log is like.
#[derive(Default)]
pub struct Logging {
    /// A line for every request, however little else is asked for.
    pub requests: bool,
    /// Each line is a JSON object.
    pub json: bool,
    /// The collector that spans are sent to.
    #[cfg(feature = "otlp")]
    pub otlp: Option<String>,
}

/// What has to live until the end, so that nothing is lost.
#[derive(Default)]
pub struct Traces {
    #[cfg(feature = "otlp")]
    _exporter: Option<radapt::server::traces::Exporter>,
}

/// Begins to log.
pub fn start(global: &Global, logging: &Logging) -> radapt::Result<Traces> {
    let level = match global.verbose {
        0 if logging.requests && !global.quiet => {
            "warn,mistralrs_core=off,mistralrs_quant=off,radapt::requests=info,radapt::intake=info,\
             radapt::suspicion=info,radapt::server=info"
        }
        // mistral.rs logs what it also returns as an error, which is then ours to report.
        0 => "warn,mistralrs_core=off,mistralrs_quant=off",
        1 => "info,radapt::spans=off",
        _ => "debug,radapt::spans=off",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| level.into());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && !logging.json);
    let lines = match logging.json {
        true => lines.json().flatten_event(true).with_filter(filter).boxed(),
        false => lines.with_filter(filter).boxed(),
    };
    let subscriber = tracing_subscriber::registry().with(lines);
    #[cfg(feature = "otlp")]
    if let Some(endpoint) = &logging.otlp {
        let (layer, exporter) = radapt::server::traces::layer(endpoint)?;
        subscriber.with(layer).init();
        return Ok(Traces { _exporter: Some(exporter) });
    }
    subscriber.init();
    Ok(Traces::default())
}
