//! `prompts/judge.toml`.

use std::path::Path;

use serde::Deserialize;

use super::{Case, Verdict, sha256};
use crate::{Error, Result};

const TEXT: &str = include_str!("../../../prompts/judge.toml");

/// What the LLM judge is asked, and how its answer is read.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JudgePrompt {
    /// Counted up with every change of the words.
    pub version: u32,
    /// Of the answer, at most.
    pub max_tokens: u32,
    /// The system message.
    pub system: String,
    /// The user's message with the places `{first}`, `{second}` and `{response}`.
    pub user: String,
}

impl JudgePrompt {
    /// The one in the binary.
    ///
    /// # Errors
    /// If it is damaged, which this package's tests exclude.
    pub fn new() -> Result<Self> {
        toml::from_str(TEXT).map_err(|e| Error::config(Path::new("prompts/judge.toml"), e.to_string()))
    }

    /// Whether the target is object A for this case; half of all cases, by their hash.
    pub fn swaps(case: &Case) -> bool {
        let hash = sha256(&["radapt judge order", &case.original, &case.target, &case.response]);
        hash.as_bytes()[0].is_ascii_digit() && (hash.as_bytes()[0] - b'0') < 8
    }

    /// The user's message about a case.
    pub fn ask(&self, case: &Case) -> String {
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        let (first, second) = match Self::swaps(case) {
            false => (&case.original, &case.target),
            true => (&case.target, &case.original),
        };
        // One pass over the template, so that a response with `{first}` in it stays as it is.
        let mut out = String::new();
        let mut rest = self.user.as_str();
        while let Some(at) = rest.find('{') {
            out += &rest[..at];
            rest = &rest[at..];
            let places = [("{first}", first), ("{second}", second), ("{response}", &case.response)];
            match places.iter().find(|(place, _)| rest.starts_with(place)) {
                Some((place, text)) => {
                    out += &quoted(text);
                    rest = &rest[place.len()..];
                }
                None => {
                    out.push('{');
                    rest = &rest[1..];
                }
            }
        }
        out + rest
    }

    /// The verdict an answer gives on a case: `A`, `B`, `both` or `neither` in any case, with a full
    /// stop at most. Anything else is `None`.
    pub fn parse(case: &Case, answer: &str) -> Option<Verdict> {
        let answer = answer.trim();
        let verdict = match answer.strip_suffix('.').unwrap_or(answer).to_ascii_lowercase().as_str() {
            "a" => Verdict::Original,
            "b" => Verdict::Target,
            "both" => Verdict::Both,
            "neither" => Verdict::Neither,
            _ => return None,
        };
        Some(if Self::swaps(case) { verdict.swapped() } else { verdict })
    }
}
