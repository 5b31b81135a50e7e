//! What the server counts, as Prometheus reads it (OpenMetrics text).

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::intake::Refusal;

/// The content type of [`Metrics::text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A request that was answered.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Answered {
    /// The route's pattern, never the path asked for.
    pub route: String,
    /// The HTTP status.
    pub status: u16,
    /// The key's name.
    pub key: String,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Route {
    /// Its pattern.
    pub route: String,
}

/// Why.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    /// In a word.
    pub reason: Word,
}

/// A word that is known when the program is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Word(pub &'static str);

impl prometheus_client::encoding::EncodeLabelValue for Word {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), std::fmt::Error> {
        prometheus_client::encoding::EncodeLabelValue::encode(&self.0, encoder)
    }
}

/// Everything that is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Requests by route, status and key.
    pub requests: Family<Answered, Counter>,
    /// Seconds until the whole answer was out, by route.
    pub seconds: Family<Route, Histogram>,
    /// Seconds until the first piece of a streamed answer.
    pub first_piece: Histogram,
    /// Requests being worked on.
    pub in_flight: Gauge,
    /// Requests waiting for a place.
    pub waiting: Gauge,
    /// Open connections.
    pub connections: Gauge,
    /// Requests turned away before any work: `key`, `rate`, `concurrent`, `queue`, `draining`, `body`.
    pub turned_away: Family<Reason, Counter>,
    /// Tokens by `prompt` and `completion`.
    pub tokens: Family<Reason, Counter>,
    /// Pictures taken in.
    pub pictures: Counter,
    /// Pictures refused, by reason.
    pub pictures_refused: Family<Reason, Counter>,
    /// How far the two towers disagree on pictures.
    pub suspicion: Histogram,
    /// Suspicious pictures by what was done: `log`, `flag`, `refuse`, or `compared` where nothing was to be.
    pub suspicious: Family<Reason, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("radapt");
        let long =
            || Histogram::new([0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]);
        let found = Self {
            requests: Family::default(),
            seconds: Family::new_with_constructor(long),
            first_piece: long(),
            in_flight: Gauge::default(),
            waiting: Gauge::default(),
            connections: Gauge::default(),
            turned_away: Family::default(),
            tokens: Family::default(),
            pictures: Counter::default(),
            pictures_refused: Family::default(),
            suspicion: Histogram::new([0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5]),
            suspicious: Family::default(),
            registry: Registry::default(),
        };
        registry.register("requests", "Requests by route, status and key", found.requests.clone());
        registry.register("request_seconds", "Seconds until the whole answer was out", found.seconds.clone());
        registry.register(
            "first_piece_seconds",
            "Seconds until the first piece of a streamed answer",
            found.first_piece.clone(),
        );
        registry.register("in_flight", "Requests being worked on", found.in_flight.clone());
        registry.register("waiting", "Requests waiting for a place", found.waiting.clone());
        registry.register("connections", "Open connections", found.connections.clone());
        registry.register("turned_away", "Requests turned away before any work", found.turned_away.clone());
        registry.register("tokens", "Tokens of prompts and completions", found.tokens.clone());
        registry.register("pictures", "Pictures taken in", found.pictures.clone());
        registry.register("pictures_refused", "Pictures refused, by reason", found.pictures_refused.clone());
        registry.register(
            "suspicion_score",
            "How far the defended and the undefended tower disagree on pictures",
            found.suspicion.clone(),
        );
        registry.register(
            "suspicious_pictures",
            "Suspicious pictures by what was done",
            found.suspicious.clone(),
        );
        // A count that is not there yet cannot be told from one that never comes.
        for refusal in Refusal::ALL {
            found.refused(*refusal, 0);
        }
        for reason in ["key", "rate", "concurrent", "queue", "draining", "body"] {
            found.turned_away.get_or_create(&Reason { reason: Word(reason) }).inc_by(0);
        }
        for done in ["log", "flag", "refuse", "compared"] {
            found.suspicious.get_or_create(&Reason { reason: Word(done) }).inc_by(0);
        }
        Self { registry, ..found }
    }
}

impl Metrics {
    /// Counts refused pictures.
    pub fn refused(&self, refusal: Refusal, n: u64) {
        self.pictures_refused.get_or_create(&Reason { reason: Word(refusal.as_str()) }).inc_by(n);
    }

    /// Counts a suspicious picture.
    pub fn suspect(&self, done: &'static str) {
        self.suspicious.get_or_create(&Reason { reason: Word(done) }).inc();
    }

    /// Counts a request turned away.
    pub fn turn_away(&self, reason: &'static str) {
        self.turned_away.get_or_create(&Reason { reason: Word(reason) }).inc();
    }

    /// Counts an answer's tokens.
    pub fn count_tokens(&self, prompt: usize, completion: usize) {
        for (kind, n) in [("prompt", prompt), ("completion", completion)] {
            self.tokens.get_or_create(&Reason { reason: Word(kind) }).inc_by(n as u64);
        }
    }

    /// All of it, as [`CONTENT_TYPE`].
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_there_from_the_start_and_go_up() {
        let metrics = Metrics::default();
        let before = metrics.text();
        assert!(before.contains("radapt_pictures_refused_total{reason=\"private_address\"} 0"), "{before}");
        assert!(before.ends_with("# EOF\n"));
        metrics.refused(Refusal::PrivateAddress, 2);
        metrics.count_tokens(7, 3);
        metrics.turn_away("rate");
        let key = Answered { route: "/v1/models".into(), status: 200, key: "team-a".into() };
        metrics.requests.get_or_create(&key).inc();
        let after = metrics.text();
        assert!(after.contains("reason=\"private_address\"} 2"));
        assert!(after.contains("radapt_tokens_total{reason=\"prompt\"} 7"));
        assert!(after.contains("radapt_turned_away_total{reason=\"rate\"} 1"));
        let line = "radapt_requests_total{route=\"/v1/models\",status=\"200\",key=\"team-a\"} 1";
        assert!(after.lines().any(|found| found == line), "{after}");
    }
}
