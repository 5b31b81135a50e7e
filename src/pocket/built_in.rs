//! The pocket models, inside the binary.
//!
//! They are loaded by the same code as any other model, which reads folders; so they are written
//! once into the user's cache, under a name that holds their SHA-256, and checked at every use.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// The name of the built-in LLaVA; its CLIP goes by it too where a command needs a CLIP.
pub const POCKET: &str = "pocket";
/// The name of the built-in CLIP.
pub const POCKET_CLIP: &str = "pocket-clip";

type Files = &'static [(&'static str, &'static [u8])];

macro_rules! files {
    ($folder:literal: $($name:literal),+ $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../pocket/", $folder, "/", $name)))),+]
    };
}

static CLIP: Files = files!("clip": "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json");
static LLAVA: Files = files!("llava": "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json");

/// The folder of the built-in model `name`, written first where it is not there; `None` if no
/// built-in model has that name.
///
/// The folder lies in `$XDG_CACHE_HOME/radapt` or `~/.cache/radapt`, or where neither can be
/// written to in the system's temporary folder.
///
/// # Errors
/// If no folder can be written.
pub fn folder(name: &str) -> Result<Option<PathBuf>> {
    static FOUND: [OnceLock<PathBuf>; 2] = [OnceLock::new(), OnceLock::new()];
    let (files, found) = match name {
        POCKET => (LLAVA, &FOUND[0]),
        POCKET_CLIP => (CLIP, &FOUND[1]),
        _ => return Ok(None),
    };
    if let Some(folder) = found.get() {
        return Ok(Some(folder.clone()));
    }
    let folder = unpack(name, files, &places())?;
    Ok(Some(found.get_or_init(|| folder).clone()))
}

/// Where to write, the best place first.
fn places() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = variable("XDG_CACHE_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".cache")))
        .or_else(|| variable("LOCALAPPDATA"));
    cache.into_iter().chain([std::env::temp_dir()]).map(|place| place.join("radapt")).collect()
}

fn digest(files: Files) -> String {
    let mut hash = Sha256::new();
    for (name, bytes) in files {
        hash.update(name.as_bytes());
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    }
    hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unpack(name: &str, files: Files, places: &[PathBuf]) -> Result<PathBuf> {
    let folder = format!("{name}-{}", digest(files));
    let mut first = None;
    for place in places {
        let path = place.join(&folder);
        if holds(&path, files) {
            return Ok(path);
        }
        match write(place, &path, files) {
            Ok(()) => return Ok(path),
            Err(error) => first = first.or(Some(Error::write(&path, error))),
        }
    }
    Err(first.unwrap_or_else(|| Error::argument("model", "a folder to unpack it into", "none")))
}

/// Whether the folder holds these files, byte for byte.
fn holds(path: &Path, files: Files) -> bool {
    files.iter().all(|(name, bytes)| std::fs::read(path.join(name)).is_ok_and(|found| found == *bytes))
}

/// Writes the folder whole under another name first, so that nobody meets half of it.
fn write(place: &Path, path: &Path, files: Files) -> std::io::Result<()> {
    std::fs::create_dir_all(place)?;
    let unique = format!("{}.{}.part", path.file_name().unwrap_or_default().display(), std::process::id());
    let part = place.join(unique);
    let fill = || {
        std::fs::create_dir_all(&part)?;
        for (name, bytes) in files {
            std::fs::write(part.join(name), bytes)?;
        }
        // A folder that is there and does not hold the files is damaged.
        if path.exists() {
            std::fs::remove_dir_all(path)?;
        }
        std::fs::rename(&part, path)
    };
    let filled = fill();
    if filled.is_err() {
        let _ = std::fs::remove_dir_all(&part);
        // Another process may have been faster.
        if holds(path, files) {
            return Ok(());
        }
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_written_once_mended_where_damaged_and_elsewhere_where_it_must() -> Result<()> {
        let scratch = tempfile::tempdir().unwrap();
        let (good, bad) = (scratch.path().join("good"), scratch.path().join("file"));
        std::fs::write(&bad, "a file where a folder should be").unwrap();
        let path = unpack(POCKET_CLIP, CLIP, &[bad.join("radapt"), good.clone()])?;
        assert!(path.starts_with(&good) && holds(&path, CLIP));
        std::fs::write(path.join("config.json"), "{").unwrap();
        assert_eq!(unpack(POCKET_CLIP, CLIP, std::slice::from_ref(&good))?, path);
        assert!(holds(&path, CLIP));
        let left: Vec<_> = std::fs::read_dir(&good).unwrap().collect();
        assert_eq!(left.len(), 1);
        let error = unpack(POCKET_CLIP, CLIP, &[bad.join("radapt")]).unwrap_err();
        assert!(error.to_string().contains("file/radapt/pocket-clip-"), "{error}");
        Ok(())
    }
}
