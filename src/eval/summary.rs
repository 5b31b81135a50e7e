use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Row;
use crate::{Error, Result};

/// What a run comes to: `summary.json` in its folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// [`Summary::VERSION`].
    pub schema_version: u64,
    /// SHA-256 of everything that decides the result, as `run.json` has it.
    pub fingerprint: String,
    /// Everything that decides the result: `run.json` without its bookkeeping. At least `task`,
    /// `dataset` (`{name, items, ...}`), `model` (`{name, ...}`), `seed` and `version` are in it.
    pub run: Value,
    /// Which shard it is of how many, where it is one: `[1, 3]`.
    pub shard: Option<(usize, usize)>,
    /// Items of the run, or of the shard.
    pub items: usize,
    /// Items with a line in `items.jsonl`, failed ones included. Fewer than `items` in a run that
    /// is not complete.
    pub done: usize,
    /// Items that could not be scored, each with its reason in `items.jsonl`. They are in no row.
    pub failed: usize,
    /// The figures, clean rows first.
    pub rows: Vec<Row>,
    /// What the attacks noticed that casts doubt on a figure: AutoAttack's warnings, NaN gradients.
    pub flags: Vec<String>,
}

impl Summary {
    /// The version of this format.
    pub const VERSION: u64 = 1;

    /// Reads the summary of a run's folder, or the file itself.
    ///
    /// # Errors
    /// If there is none, it is damaged, of another version, or a row of attacked pictures has no
    /// threat model.
    pub fn read(path: &Path) -> Result<Self> {
        let path = if path.is_dir() { path.join("summary.json") } else { path.to_path_buf() };
        let text = std::fs::read_to_string(&path).map_err(|e| Error::read(&path, e))?;
        let summary: Self = serde_json::from_str(&text).map_err(|e| Error::config(&path, e.to_string()))?;
        if summary.schema_version != Self::VERSION {
            let (expected, found) = (Self::VERSION, summary.schema_version);
            return Err(Error::config(path, format!("schema_version: expected {expected}, found {found}")));
        }
        Ok(summary)
    }
}
