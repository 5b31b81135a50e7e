//! What a model is asked about a picture: `prompts/cap.toml` and `prompts/vqa.toml`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The preset that figures are given for where no other is asked for: V-Attack's, which the paper
/// follows.
pub const PRESET: &str = "v-attack";

/// Words for a model, and how long its answer may be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskPrompt {
    /// With a place `{question}`, for questions.
    pub prompt: String,
    /// Of the answer.
    pub max_tokens: usize,
}

impl TaskPrompt {
    /// The words for a question.
    pub fn ask(&self, question: &str) -> String {
        self.prompt.replace("{question}", question)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "version")]
    _version: u32,
    preset: BTreeMap<String, TaskPrompt>,
}

fn preset(name: &str, file: &str, text: &str) -> Result<TaskPrompt> {
    let mut all =
        toml::from_str::<File>(text).map_err(|e| Error::config(Path::new(file), e.to_string()))?.preset;
    let names: Vec<String> = all.keys().cloned().collect();
    all.remove(name).ok_or_else(|| Error::argument("prompt", names.join(", "), name))
}

/// How a caption is asked for: `v-attack` or `fare`.
///
/// # Errors
/// If there is no such preset.
pub fn caption(name: &str) -> Result<TaskPrompt> {
    preset(name, "prompts/cap.toml", include_str!("../../prompts/cap.toml"))
}

/// How a question is put: `v-attack`, `in-image`, `fare`, `textvqa` or `vizwiz`.
///
/// # Errors
/// If there is no such preset.
pub fn question(name: &str) -> Result<TaskPrompt> {
    preset(name, "prompts/vqa.toml", include_str!("../../prompts/vqa.toml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    // A change of these words changes every figure that was made with them: count the version up.
    #[test]
    fn the_words_are_those_of_the_sources() {
        let cap = |name| caption(name).map(|p| (p.prompt, p.max_tokens)).unwrap();
        assert_eq!(cap("v-attack"), ("Describe the image briefly in one sentence.".into(), 200));
        assert_eq!(cap("fare"), ("Provide a short caption for this image.".into(), 20));
        let vqa = |name| question(name).map(|p| (p.ask("What is {it}?"), p.max_tokens)).unwrap();
        let short = "Answer the question using a single word or phrase.";
        assert_eq!(vqa("v-attack"), ("What is {it}?".into(), 200));
        assert_eq!(vqa("in-image"), ("In this image, What is {it}?".into(), 200));
        assert_eq!(vqa("fare"), (format!("What is {{it}}?\n{short}"), 5));
        assert_eq!(vqa("textvqa"), (format!("What is {{it}}?\n{short}"), 10));
        let unsure = "When the provided information is insufficient, respond with 'Unanswerable'.";
        assert_eq!(vqa("vizwiz"), (format!("What is {{it}}?\n{unsure}\n{short}"), 5));
        let error = question("none").unwrap_err().to_string();
        assert!(error.contains("fare, in-image") && error.ends_with("found none"), "{error}");
    }
}
