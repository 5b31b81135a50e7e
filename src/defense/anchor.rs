//! The anchor file: one safetensors file with the tensor `anchor`, f32 `(N, D)` in tower order (the
//! class token where there is one, then the patches row by row of the picture), and everything
//! about it in its metadata.
//!
//! All of it is checked on load. Files are written atomically, and the same anchor always gives
//! the same bytes.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::Path;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::image::Contract;
use crate::tower::TowerSpec;
use crate::{Error, Result};

/// The only version of the format there is.
const VERSION: &str = "1";
const TENSOR: &str = "anchor";
/// Of an anchor for the largest tower in use, times ten: what is larger is no anchor.
const MAX_BYTES: u64 = 1 << 28;
/// Files begun by this process, so that two threads never write into one.
static SAVES: AtomicU64 = AtomicU64::new(0);

/// How an anchor was acquired (the paper's Section 4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// The model itself, fed a white picture.
    TrainingFree,
    /// An adversarially fine-tuned model, fed a white picture.
    ModelGuided,
    /// Optimised on adversarial pictures (R-Adapt+).
    DataDriven,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TrainingFree => "training-free",
            Self::ModelGuided => "model-guided",
            Self::DataDriven => "data-driven",
        })
    }
}

impl FromStr for Method {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        match s {
            "training-free" => Ok(Self::TrainingFree),
            "model-guided" => Ok(Self::ModelGuided),
            "data-driven" => Ok(Self::DataDriven),
            other => Err(format!("expected training-free, model-guided or data-driven, found `{other}`")),
        }
    }
}

/// What an anchor's metadata says. Keys in the file carry the prefix `radapt.`.
#[derive(Debug, Clone, PartialEq)]
pub struct AnchorMeta {
    /// How it was acquired.
    pub method: Method,
    /// The model it was made on, as it was named then.
    pub base_model: String,
    /// That model's revision, or empty.
    pub base_revision: String,
    /// [`crate::tower::clip::Clip::fingerprint`] of the tower it was made on.
    pub fingerprint: String,
    /// The model that guided it, or empty.
    pub guide_model: String,
    /// Patches down and across in the model that guided it, where they were others and its rows
    /// were interpolated. A key that need not be there.
    pub interpolated_from: Option<(usize, usize)>,
    /// Patches down and across.
    pub grid: (usize, usize),
    /// Whether row 0 belongs to a class token.
    pub class_token: bool,
    /// Side of the tower's picture, in pixels; the shorter one where it is not square.
    pub image_size: usize,
    /// How pictures were prepared.
    pub contract: Contract,
    /// The anchor's factor it is meant to be used with.
    pub alpha: f64,
    /// The attention output's factor it is meant to be used with.
    pub beta: f64,
    /// GIF's cutoff it is meant to be used with, in frequency bins.
    pub cutoff: f64,
    /// For data-driven anchors how it was trained; empty for the others. Keys without prefix:
    /// `eps`, `epochs`, `images`, `attack`, `examples`, `objective`, `seed`, `losses`, and where they
    /// are known `best_epoch`, `optimizer`, `schedule`, `batch`, `clean_share`, `data`, `templates`,
    /// `initial`, `sizes` (of the pictures, where they were several) and `validation` (a JSON array of figures, each attacked one with its threat model).
    pub training: BTreeMap<String, String>,
}

/// The keys of [`AnchorMeta::training`] that every data-driven anchor has.
const TRAINING: [&str; 8] = ["eps", "epochs", "images", "attack", "examples", "objective", "seed", "losses"];
/// Those that it may have.
const MORE_TRAINING: [&str; 10] = [
    "best_epoch",
    "optimizer",
    "schedule",
    "batch",
    "clean_share",
    "data",
    "templates",
    "initial",
    "sizes",
    "validation",
];

/// An anchor with its metadata.
#[derive(Debug, Clone)]
pub struct Anchor {
    /// `(N, D)` f32 on the CPU.
    pub values: Tensor,
    /// What is known about it.
    pub meta: AnchorMeta,
}

impl Anchor {
    /// A built-in anchor by its name, or an anchor file.
    ///
    /// # Errors
    /// As [`Anchor::load`].
    pub fn find(name: &Path) -> Result<Self> {
        match name.to_str().filter(|name| super::built_in::names().any(|built_in| built_in == *name)) {
            Some(name) => super::built_in::anchor(name),
            None => Self::load(name),
        }
    }

    /// Reads and checks an anchor file.
    ///
    /// # Errors
    /// [`Error::Anchor`] naming what is wrong: not safetensors, truncated, a missing or impossible
    /// metadata value, an unknown version, another shape than the metadata says, a value that is
    /// not finite.
    pub fn load(path: &Path) -> Result<Self> {
        let fail = |reason: String| Error::Anchor { path: path.to_path_buf(), reason };
        let size = std::fs::metadata(path).map_err(|e| Error::read(path, e))?;
        if !size.is_file() {
            return Err(fail("is not a file".into()));
        }
        if size.len() > MAX_BYTES {
            return Err(fail(format!("has {} bytes, more than any anchor ({MAX_BYTES})", size.len())));
        }
        let bytes = std::fs::read(path).map_err(|e| Error::read(path, e))?;
        Self::parse(&bytes).map_err(|reason| fail(shown(&reason)))
    }

    pub(super) fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        let damaged = |e: safetensors::SafeTensorError| format!("is not a complete safetensors file: {e}");
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
        let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
        let empty = Default::default();
        let meta = AnchorMeta::parse(header.metadata().as_ref().unwrap_or(&empty))?;
        let tensor = file.tensor(TENSOR).map_err(|_| {
            format!(
                "has no tensor `{TENSOR}`; it has: {}",
                file.names().into_iter().collect::<Vec<_>>().join(", ")
            )
        })?;
        if tensor.dtype() != Dtype::F32 {
            return Err(format!("tensor `{TENSOR}` is {:?}, expected F32", tensor.dtype()));
        }
        let [tokens, width] = tensor.shape() else {
            return Err(format!("tensor `{TENSOR}` has shape {:?}, expected [N, D]", tensor.shape()));
        };
        let rows = meta.tokens();
        if *tokens != rows || *width == 0 {
            let (h, w) = meta.grid;
            return Err(format!(
                "tensor `{TENSOR}` has shape {:?}, but grid {h}x{w} {} class token makes {rows} rows",
                tensor.shape(),
                if meta.class_token { "with a" } else { "without" }
            ));
        }
        let values: Vec<f32> =
            tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(format!(
                "row {} of tensor `{TENSOR}` holds {}, expected finite numbers",
                at / width,
                values[at]
            ));
        }
        let values = Tensor::from_vec(values, (*tokens, *width), &Device::Cpu).map_err(|e| e.to_string())?;
        Ok(Self { values, meta })
    }

    /// Writes the file, replacing it in one step.
    ///
    /// # Errors
    /// If the folder cannot be written to, or the file would be refused by [`Anchor::load`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let bytes = self.to_bytes()?;
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let count = SAVES.fetch_add(1, Ordering::Relaxed);
        let partial = folder.join(format!(".{name}.{}-{count}.partial", std::process::id()));
        let written = std::fs::File::create(&partial)
            .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
            .and_then(|()| std::fs::rename(&partial, path));
        written.map_err(|e| {
            // The partial file may not exist; what matters is the first error.
            let _ = std::fs::remove_file(&partial);
            Error::write(path, e)
        })
    }

    /// The file's bytes. The library that reads it keeps metadata in a hash map and so writes it
    /// in a random order; here it is sorted, so that one anchor has one file.
    fn to_bytes(&self) -> Result<Vec<u8>> {
        let (tokens, width) = self.values.dims2()?;
        if tokens != self.meta.tokens() {
            return Err(Error::argument("anchor", format!("{} rows", self.meta.tokens()), tokens));
        }
        let values = self.values.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        let header = serde_json::json!({
            "__metadata__": self.meta.entries(),
            TENSOR: { "dtype": "F32", "shape": [tokens, width], "data_offsets": [0, 4 * values.len()] },
        });
        let mut header = header.to_string().into_bytes();
        // Readers want the data aligned.
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        for value in values {
            bytes.extend(value.to_le_bytes());
        }
        let unreadable = |reason: String| Error::argument("anchor", "one that can be read back", reason);
        if Self::parse(&bytes).map_err(unreadable)?.meta != self.meta {
            return Err(unreadable("metadata that its file cannot hold".into()));
        }
        Ok(bytes)
    }

    /// SHA-256 of the file this anchor makes, which names it in results.
    pub fn sha256(&self) -> Result<String> {
        Ok(Sha256::digest(self.to_bytes()?).iter().map(|b| format!("{b:02x}")).collect())
    }

    /// The anchor's values `(N, D)` for a tower of this shape and fingerprint: as they are, or in a
    /// tower for pictures of any size interpolated to its grid
    /// ([`super::acquire::interpolate`]).
    ///
    /// # Errors
    /// As [`Anchor::check`].
    pub fn fitted(&self, spec: &TowerSpec, fingerprint: &str, allow_mismatch: bool) -> Result<Tensor> {
        if spec.merge.is_none() || self.meta.class_token || self.values.dim(1)? != spec.hidden {
            self.check(spec, fingerprint, allow_mismatch)?;
            return Ok(self.values.clone());
        }
        let own = TowerSpec { grid: self.meta.grid, ..spec.clone() };
        self.check(&own, fingerprint, allow_mismatch)?;
        if self.meta.grid == spec.grid {
            return Ok(self.values.clone());
        }
        super::acquire::interpolate(&self.values, false, self.meta.grid, spec.grid)
    }

    /// Whether this anchor belongs into a tower of this shape and fingerprint.
    ///
    /// # Errors
    /// [`Error::AnchorMismatch`] on another shape, and on another fingerprint unless
    /// `allow_mismatch`.
    pub fn check(&self, spec: &TowerSpec, fingerprint: &str, allow_mismatch: bool) -> Result<()> {
        let (rows, width) = self.values.dims2()?;
        let (tokens, hidden) = (spec.tokens(), spec.hidden);
        let (h, w) = self.meta.grid;
        let (base, size) = (shown(&self.meta.base_model), self.meta.image_size);
        let same_grid = self.meta.grid == spec.grid && self.meta.class_token == spec.class_token;
        if (rows, width) != (tokens, hidden) || !same_grid {
            let (gh, gw) = spec.grid;
            return Err(Error::AnchorMismatch {
                reason: format!("it has shape [{rows}, {width}], the tower needs [{tokens}, {hidden}]"),
                hint: format!(
                    "this anchor is for {h}x{w} patches of `{base}` at {size} pixels; the model has {gh}x{gw} at {}",
                    spec.image_size
                ),
            });
        }
        if self.meta.fingerprint != fingerprint && !allow_mismatch {
            let short = |s: &str| s.chars().take(12).collect::<String>();
            return Err(Error::AnchorMismatch {
                reason: format!(
                    "it was made on a tower with fingerprint {}..., this one has {}...",
                    short(&self.meta.fingerprint),
                    short(fingerprint)
                ),
                hint: format!("it was made on `{base}`; `--allow-mismatch` uses it all the same"),
            });
        }
        Ok(())
    }
}

/// Whether this is a JSON array of figures, none of them on attacked pictures without a threat model.
fn figures_have_threats(text: &str) -> bool {
    let Ok(rows) = serde_json::from_str::<Vec<serde_json::Value>>(text) else {
        return false;
    };
    rows.iter().all(|row| match row.get("threat").unwrap_or(&serde_json::Value::Null) {
        serde_json::Value::String(threat) => threat == "transfer" || threat == "adaptive",
        other => {
            other.is_null() && row.is_object() && row.get("attack").is_none_or(|attack| attack.is_null())
        }
    })
}

/// Text out of a file as messages show it: on one line and not endless.
fn shown(text: &str) -> String {
    const MOST: usize = 400;
    let mut line = String::new();
    for c in text.chars().take(MOST) {
        if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
    }
    if text.chars().nth(MOST).is_some() {
        line.push_str("...");
    }
    line
}

impl AnchorMeta {
    /// GIF's cutoff for pictures whose shorter side has so many pixels: that of the anchor, or, where
    /// its own pictures were under 224 pixels or these are, the same share of their bins, as
    /// [`super::default_cutoff`] has it.
    pub fn cutoff_at(&self, image_size: usize) -> f64 {
        if image_size == self.image_size {
            return self.cutoff;
        }
        self.cutoff * super::default_cutoff(image_size) / super::default_cutoff(self.image_size)
    }

    /// Rows the anchor must have.
    pub fn tokens(&self) -> usize {
        self.grid.0.saturating_mul(self.grid.1).saturating_add(usize::from(self.class_token))
    }

    /// The metadata as it stands in the file, sorted by key.
    pub fn entries(&self) -> BTreeMap<String, String> {
        let mut entries: BTreeMap<String, String> = [
            ("version", VERSION.to_string()),
            ("method", self.method.to_string()),
            ("base_model", self.base_model.clone()),
            ("base_revision", self.base_revision.clone()),
            ("fingerprint", self.fingerprint.clone()),
            ("guide_model", self.guide_model.clone()),
            ("grid", format!("{}x{}", self.grid.0, self.grid.1)),
            ("class_token", self.class_token.to_string()),
            ("image_size", self.image_size.to_string()),
            ("contract", self.contract.to_string()),
            ("alpha", self.alpha.to_string()),
            ("beta", self.beta.to_string()),
            ("cutoff", self.cutoff.to_string()),
        ]
        .into_iter()
        .map(|(key, value)| (format!("radapt.{key}"), value))
        .collect();
        entries.extend(
            self.interpolated_from.map(|(h, w)| ("radapt.interpolated_from".into(), format!("{h}x{w}"))),
        );
        entries.extend(self.training.iter().map(|(key, value)| (format!("radapt.{key}"), value.clone())));
        entries
    }

    fn parse(metadata: &std::collections::HashMap<String, String>) -> std::result::Result<Self, String> {
        let get = |key: &str| metadata.get(&format!("radapt.{key}")).map(String::as_str);
        let need = |key: &str| get(key).ok_or_else(|| format!("its metadata has no `radapt.{key}`"));
        match get("version") {
            None => return Err("its metadata has no `radapt.version`: it is not an anchor".into()),
            Some(VERSION) => {}
            Some(other) => {
                return Err(format!("is of version `{other}`, this radapt reads version {VERSION}"));
            }
        }
        let wrong = |key: &str, expected: &str, found: &str| {
            format!("radapt.{key}: expected {expected}, found `{found}`")
        };
        let number = |key: &str, expected: &str, allowed: fn(f64) -> bool| {
            let text = need(key)?;
            let value = text.parse::<f64>().ok().filter(|v| v.is_finite() && allowed(*v));
            value.ok_or_else(|| wrong(key, expected, text))
        };
        let method = Method::from_str(need("method")?).map_err(|e| format!("radapt.method: {e}"))?;
        let sides = |key: &str, text: &str| -> std::result::Result<(usize, usize), String> {
            let sides = text.split_once('x').and_then(|(h, w)| Some((h.parse().ok()?, w.parse().ok()?)));
            sides.filter(|&(h, w)| h > 0 && w > 0).ok_or_else(|| wrong(key, "ROWSxCOLUMNS", text))
        };
        let grid = sides("grid", need("grid")?)?;
        let interpolated_from =
            get("interpolated_from").map(|text| sides("interpolated_from", text)).transpose()?;
        let class_token = need("class_token")?;
        let fingerprint = need("fingerprint")?;
        if fingerprint.len() != 64 || !fingerprint.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong("fingerprint", "64 hexadecimal digits", fingerprint));
        }
        let image_size = need("image_size")?;
        let contract = need("contract")?;
        let mut training = BTreeMap::new();
        for key in TRAINING.into_iter().chain(MORE_TRAINING) {
            match get(key) {
                Some(value) => {
                    training.insert(key.to_string(), value.to_string());
                }
                None if method == Method::DataDriven && TRAINING.contains(&key) => {
                    need(key)?;
                }
                None => {}
            }
        }
        if let Some(rows) = training.get("validation")
            && !figures_have_threats(rows)
        {
            let expected = "figures, each attacked one with `threat` transfer or adaptive";
            return Err(wrong("validation", expected, rows));
        }
        Ok(Self {
            method,
            base_model: need("base_model")?.to_string(),
            base_revision: need("base_revision")?.to_string(),
            fingerprint: fingerprint.to_ascii_lowercase(),
            guide_model: need("guide_model")?.to_string(),
            interpolated_from,
            grid,
            class_token: class_token
                .parse()
                .map_err(|_| wrong("class_token", "true or false", class_token))?,
            image_size: image_size
                .parse()
                .ok()
                .filter(|&n: &usize| n > 0)
                .ok_or_else(|| wrong("image_size", "a number of pixels", image_size))?,
            contract: contract.parse().map_err(|_| wrong("contract", "a picture contract", contract))?,
            alpha: number("alpha", "a finite number", |_| true)?,
            beta: number("beta", "a finite number", |_| true)?,
            cutoff: number("cutoff", "a positive number", |v| v > 0.0)?,
            training,
        })
    }
}
