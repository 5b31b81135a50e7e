//! Answers that were given already, one a line.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

#[derive(Serialize, Deserialize)]
struct Line {
    key: String,
    model: String,
    answer: String,
}

/// Answers by key, in a file that grows. A process that is killed loses its last answer at most.
#[derive(Debug)]
pub(super) struct Cache {
    path: PathBuf,
    inner: Mutex<(HashMap<String, String>, File)>,
}

impl Cache {
    /// # Errors
    /// If the file cannot be opened, another process has it open, or a line of it is damaged other
    /// than the last, which is dropped when it was cut off.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(|e| Error::write(path, e))?;
        if file.try_lock().is_err() {
            return Err(Error::config(path, "another process is using this cache"));
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(|e| Error::read(path, e))?;
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        let mut answers = HashMap::new();
        for (i, line) in text[..whole].lines().enumerate() {
            let line: Line = serde_json::from_str(line)
                .map_err(|e| Error::config(path, format!("line {}: {e}", i + 1)))?;
            answers.insert(line.key, line.answer);
        }
        if whole < text.len() {
            file.set_len(whole as u64).map_err(|e| Error::write(path, e))?;
            file.seek(SeekFrom::End(0)).map_err(|e| Error::write(path, e))?;
        }
        Ok(Self { path: path.to_path_buf(), inner: Mutex::new((answers, file)) })
    }

    pub(super) fn get(&self, key: &str) -> Option<String> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).0.get(key).cloned()
    }

    pub(super) fn put(&self, key: &str, model: &str, answer: &str) -> Result<()> {
        let line = Line { key: key.into(), model: model.into(), answer: answer.into() };
        let mut text = serde_json::to_string(&line).map_err(|e| Error::config(&self.path, e.to_string()))?;
        text.push('\n');
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.1.write_all(text.as_bytes()).map_err(|e| Error::write(&self.path, e))?;
        inner.0.insert(key.into(), answer.into());
        Ok(())
    }
}
