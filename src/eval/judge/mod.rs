//! What a response names: the object of the picture, the target of the attack, both or neither.
//!
//! [`WordJudge`] decides by words alone, the same way every time; [`LlmJudge`] asks a language
//! model. [`Agreement`] says how far they agree.
//!
//! ```
//! use radapt::eval::judge::{Case, Verdict, WordJudge};
//!
//! # fn main() -> radapt::Result<()> {
//! let judge = WordJudge::new()?;
//! let case = Case::new("There is no ferret here, but a tabby kitten.", "Black cat", "ferret");
//! assert_eq!(judge.verdict(&case), Verdict::Original);
//! # Ok(())
//! # }
//! ```

mod agreement;
mod cache;
mod lexicon;
mod llm;
mod prompt;
mod text;
mod words;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};
pub use agreement::Agreement;
pub use llm::{Endpoint, LlmAnswer, LlmJudge};
pub use prompt::JudgePrompt;
pub use words::{Judgement, WordJudge};

/// A response to be judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// What a model said about the picture.
    pub response: String,
    /// The object that is in the picture, such as `Black cat`.
    pub original: String,
    /// The object an attack aimed at.
    pub target: String,
    /// What the model was asked, where it is known: a bare `yes` is judged by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub question: Option<String>,
}

impl Case {
    /// A case without its question.
    pub fn new(response: impl Into<String>, original: impl Into<String>, target: impl Into<String>) -> Self {
        Self { response: response.into(), original: original.into(), target: target.into(), question: None }
    }

    /// # Errors
    /// If the original or the target names nothing.
    pub fn check(&self) -> Result<()> {
        for (what, name) in [("original", &self.original), ("target", &self.target)] {
            if text::tokens(name).is_empty() {
                return Err(Error::argument(what, "the name of an object", format!("`{name}`")));
            }
        }
        Ok(())
    }
}

/// What a response names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The object of the picture alone.
    Original,
    /// The target alone.
    Target,
    /// Both of them.
    Both,
    /// Neither of them, or nothing that tells them apart.
    Neither,
}

impl Verdict {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Original, Self::Target, Self::Both, Self::Neither];

    /// Its name: `original`, `target`, `both` or `neither`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Original => "original",
            Self::Target => "target",
            Self::Both => "both",
            Self::Neither => "neither",
        }
    }

    fn of(original: bool, target: bool) -> Self {
        match (original, target) {
            (true, false) => Self::Original,
            (false, true) => Self::Target,
            (true, true) => Self::Both,
            (false, false) => Self::Neither,
        }
    }

    /// The same with the two objects exchanged.
    pub fn swapped(self) -> Self {
        match self {
            Self::Original => Self::Target,
            Self::Target => Self::Original,
            other => other,
        }
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// SHA-256 of parts in hex, each with its length before it.
fn sha256(parts: &[&str]) -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
