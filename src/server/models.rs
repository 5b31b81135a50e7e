//! The models a server has: the defended one, and when asked for the same without its defence.

use std::sync::Arc;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json};

use super::suspicion::Suspicion;
use crate::defense::DefenseSummary;
use crate::engine::Engine;

/// The defence that an answer came about with, in every answer of a model.
pub const DEFENSE: HeaderName = HeaderName::from_static("x-radapt-defense");
/// `?1` where a picture of the request is suspicious and such are flagged.
pub const SUSPICIOUS: HeaderName = HeaderName::from_static("x-radapt-suspicious");

/// The models to serve.
pub struct Models {
    /// The one that goes by the server's name.
    pub defended: Engine,
    /// The same without its defence, `NAME:undefended`.
    pub undefended: Option<Engine>,
}

/// One of them by its name.
#[derive(Clone)]
pub struct Model {
    pub name: String,
    pub engine: Arc<Engine>,
    /// The defence as JSON, null where there is none.
    defense: Value,
    header: HeaderValue,
}

impl Model {
    pub fn new(name: String, engine: Engine) -> Self {
        let defense = engine.defense().map(shown);
        let header = defense.as_ref().map_or_else(|| "none".into(), field);
        Self {
            name,
            engine: Arc::new(engine),
            // All of a defence's parts can be written.
            defense: defense.map_or(Value::Null, |defense| json!(defense)),
            header: HeaderValue::from_str(&header).unwrap_or(HeaderValue::from_static("unknown")),
        }
    }

    /// `x_radapt` of an answer: the defence, and what is said of the pictures.
    pub fn x_radapt(&self, pictures: Option<&[Suspicion]>) -> Value {
        let mut json = json!({ "defense": self.defense });
        if let Some(pictures) = pictures {
            json["pictures"] = json!(pictures);
        }
        json
    }

    /// The headers of an answer.
    pub fn headers(&self, pictures: Option<&[Suspicion]>) -> HeaderMap {
        let mut headers = HeaderMap::from_iter([(DEFENSE, self.header.clone())]);
        if pictures.is_some_and(|all| all.iter().any(|picture| picture.suspicious == Some(true))) {
            headers.insert(SUSPICIOUS, HeaderValue::from_static("?1"));
        }
        headers
    }
}

/// A defence as strangers may see it: an anchor's file by its name alone.
fn shown(defense: &DefenseSummary) -> DefenseSummary {
    let name = |path: &String| {
        let stem = std::path::Path::new(path).file_stem();
        stem.map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
    };
    DefenseSummary { anchor: defense.anchor.as_ref().map(name), ..defense.clone() }
}

/// A defence as a structured field (RFC 9651): a list of its parts with their settings.
fn field(defense: &DefenseSummary) -> String {
    let mut parts = Vec::new();
    if let Some(cutoff) = defense.cutoff {
        parts.push(format!("gif;cutoff={}", decimal(cutoff)));
    }
    if let (Some(alpha), Some(beta)) = (defense.alpha, defense.beta) {
        let anchor = defense.anchor.as_deref().unwrap_or("unnamed");
        // A string has printable ASCII, and these two with a backslash.
        let anchor: String = anchor
            .chars()
            .map(|c| if matches!(c, ' '..='~') && !matches!(c, '"' | '\\') { c } else { '_' })
            .collect();
        parts.push(format!("fra;anchor=\"{anchor}\";alpha={};beta={}", decimal(alpha), decimal(beta)));
    }
    parts.join(", ")
}

/// A number as structured fields have it: at most three digits behind the point, at least one.
fn decimal(value: f64) -> String {
    let text = format!("{value:.3}");
    let text = text.trim_end_matches('0');
    if text.ends_with('.') { format!("{text}0") } else { text.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::defense::Method;

    #[test]
    fn a_defence_is_a_structured_field_without_a_path() {
        let defense = DefenseSummary {
            anchor: Some("/home/somebody/secret/my \"an\u{e4}chor.safetensors".into()),
            method: Some(Method::ModelGuided),
            alpha: Some(1.2),
            beta: Some(-0.8),
            cutoff: Some(40.0),
        };
        let expected = r#"gif;cutoff=40.0, fra;anchor="my _an_chor";alpha=1.2;beta=-0.8"#;
        assert_eq!(field(&shown(&defense)), expected);
        let gif = DefenseSummary {
            anchor: None,
            method: None,
            alpha: None,
            beta: None,
            cutoff: Some(7.0 + 1.0 / 7.0),
        };
        assert_eq!(field(&shown(&gif)), "gif;cutoff=7.143");
    }
}
