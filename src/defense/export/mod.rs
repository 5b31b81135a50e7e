//! The defence for other programs: an anchor and one Python file that hooks it into a model that
//! transformers, open_clip or vLLM has loaded.
//!
//! The Python needs torch and safetensors alone. It is kept here as it is, in real files: what all
//! hosts share in `core.py`, the rest in a file per host.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{Anchor, built_in};
use crate::image::Contract;
use crate::{Error, Result};

const CORE: &str = include_str!("core.py");
const TRANSFORMERS: &str = include_str!("transformers.py");
const OPEN_CLIP: &str = include_str!("open_clip.py");
const VLLM: &str = include_str!("vllm.py");
const VLLM_PROJECT: &str = include_str!("pyproject.toml");
/// The line of a host's file that stands for [`CORE`].
const IMPORT: &str = "from core import *\n";

/// A program that an anchor can be taken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// Hugging Face's transformers, versions 4 and 5.
    Transformers,
    /// OpenCLIP, and OpenAI's `clip`.
    OpenClip,
    /// vLLM, by a plugin.
    Vllm,
}

impl Host {
    /// Every host.
    pub const ALL: [Self; 3] = [Self::Transformers, Self::OpenClip, Self::Vllm];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Transformers => "transformers",
            Self::OpenClip => "open_clip",
            Self::Vllm => "vllm",
        }
    }

    /// The Python module that [`write()`] makes, relative to its folder.
    pub fn module(self) -> &'static str {
        match self {
            Self::Transformers => "radapt_transformers.py",
            Self::OpenClip => "radapt_open_clip.py",
            Self::Vllm => "radapt_vllm/__init__.py",
        }
    }

    /// The module's text.
    fn python(self) -> String {
        let own = match self {
            Self::Transformers => TRANSFORMERS,
            Self::OpenClip => OPEN_CLIP,
            Self::Vllm => VLLM,
        };
        // Its description is of `core.py`.
        let core = CORE.splitn(3, "\"\"\"").nth(2).unwrap_or(CORE).trim_start();
        own.replacen(IMPORT, core, 1)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Host {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let found = Self::ALL.into_iter().find(|host| host.name() == s);
        found.ok_or_else(|| format!("expected transformers, open_clip or vllm, found `{s}`"))
    }
}

/// Writes an anchor, as the bytes it has, and the Python that puts it into `host`'s models, into
/// `folder`, which is made where it is absent. `anchor` is a file or a built-in anchor's name.
///
/// Gives back what the folder now holds of it: the anchor, the Python module and, for vLLM, the
/// `pyproject.toml` that makes a plugin of the two.
///
/// # Errors
/// As [`Anchor::load`]; [`Error::Exists`] if a file of that name holds something else and
/// `replace` is not given, before anything is written; if the folder cannot be written to.
pub fn write(anchor: &Path, host: Host, folder: &Path, replace: bool) -> Result<Vec<PathBuf>> {
    let bytes = match anchor.to_str().and_then(built_in::bytes) {
        Some(bytes) => bytes.to_vec(),
        None => {
            if Anchor::load(anchor)?.meta.contract == Contract::Qwen {
                // The hooks know CLIP's tower, whose tokens are one grid in one order.
                let found = "one of a Qwen-VL's (contract qwen)";
                return Err(Error::argument("anchor", "one of a CLIP tower", found));
            }
            std::fs::read(anchor).map_err(|e| Error::read(anchor, e))?
        }
    };
    let module = folder.join(host.module());
    let mut files =
        vec![(module.with_file_name("anchor.safetensors"), bytes), (module, host.python().into_bytes())];
    if host == Host::Vllm {
        files.push((folder.join("pyproject.toml"), VLLM_PROJECT.into()));
    }
    for (path, bytes) in &files {
        // The same bytes again change nothing.
        let taken = path.symlink_metadata().is_ok() && std::fs::read(path).ok().as_ref() != Some(bytes);
        if taken && !replace {
            let hint = "give --force to replace it, or another --out".into();
            return Err(Error::Exists { path: path.clone(), hint });
        }
    }
    for (path, bytes) in &files {
        let parent = path.parent().unwrap_or(folder);
        std::fs::create_dir_all(parent).map_err(|e| Error::write(parent, e))?;
        let partial = path.with_extension(format!("{}.partial", std::process::id()));
        let done = std::fs::write(&partial, bytes).and_then(|()| std::fs::rename(&partial, path));
        done.map_err(|e| {
            // The partial file may not exist; what matters is the first error.
            let _ = std::fs::remove_file(&partial);
            Error::write(path, e)
        })?;
    }
    Ok(files.into_iter().map(|(path, _)| path).collect())
}
