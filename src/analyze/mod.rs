//! What makes a vision tower robust: a standard CLIP tower and an adversarially fine-tuned one of
//! the same shape, side by side; the paper's Section 3 and Appendices A to C.
//!
//! - [`cka`]: how alike the representations of their blocks are;
//! - [`replace`]: what becomes of accuracy and robustness as the standard tower's parts are replaced
//!   by the robust one's, one after the other;
//! - [`spectrum`]: which frequencies the patch embedding of each lets through;
//! - [`attention`]: where in the picture the first block's class token looks;
//! - [`insensitivity`]: how much the first attention's output depends on the picture at all;
//! - [`shapley`]: how much each head of the first block has to do with robustness.
//!
//! Each comes to an [`Analysis`], which is written as JSON, CSV and a figure.
//!
//! ```
//! use candle_core::Device;
//! use radapt::analyze::{Pair, Sample, Tokens, cka};
//! use radapt::data::LabelledSet;
//! use radapt::image::DecodeLimits;
//! use radapt::model::{Lookup, Model};
//! use radapt::pocket::Split;
//!
//! # fn main() -> radapt::Result<()> {
//! let model = Model::find("pocket-clip", &Lookup::default())?;
//! let preprocess = model.preprocess(None)?;
//! let tower = model.tower(&preprocess, None, &Device::Cpu)?;
//! // A tower against itself; an adversarially fine-tuned copy of it is what is of interest.
//! let pair = Pair::new(tower.clone(), tower)?;
//! let set = LabelledSet::pocket(Split::Test, 0, 8, preprocess.width)?;
//! let limits = DecodeLimits::default();
//! let sample = Sample { set: &set, limits, preprocess: &preprocess, device: &Device::Cpu };
//! let options =
//!     cka::Options { tokens: Tokens::Class, batch: 8, minibatch_only: true, seed: 0 };
//! let (found, failed) = cka::cka(&pair, &sample, &options, &mut |_| {})?;
//! assert!(failed.is_empty());
//! # drop(found);
//! # Ok(())
//! # }
//! ```

pub mod attention;
pub mod cka;
pub mod insensitivity;
mod plot;
pub mod replace;
pub mod shapley;
pub mod spectrum;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::attack::{Evaluation, in_batches};
use crate::data::LabelledSet;
use crate::eval::run::write_whole;
use crate::image::{DecodeLimits, Preprocess, pixels_from_rgb};
use crate::model::{Lookup, Model, digest};
use crate::tower::clip::Clip;
use crate::tower::stem::VisionWeights;
use crate::tower::weights::Checkpoint;
use crate::tower::{TowerSpec, VisionTower};
use crate::{Error, Result};

/// A tower of an analysis: enough to tell which it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// The model's folder, file, Hub id or built-in name as it was given.
    pub name: String,
    /// The commit on the Hub; `None` of others.
    pub revision: Option<String>,
    /// SHA-256 over its weight files, and its configuration where it has one.
    pub digest: String,
}

/// Which of the two towers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Which {
    /// The standard one.
    Standard,
    /// The adversarially fine-tuned one.
    Robust,
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Standard => "standard",
            Self::Robust => "robust",
        })
    }
}

/// Two CLIP towers of one shape, undefended and not packed.
#[derive(Clone)]
pub struct Pair {
    /// The standard one.
    pub standard: Clip,
    /// The adversarially fine-tuned one.
    pub robust: Clip,
}

impl Pair {
    /// Both; what is put into them is left out.
    ///
    /// # Errors
    /// If their shapes, activations, dtypes or devices differ. The projection may: only
    /// [`replace`] and [`shapley`] need it.
    pub fn new(standard: Clip, robust: Clip) -> Result<Self> {
        check_shape(standard.spec(), robust.spec())?;
        // Unpacked, and it says what else differs.
        let standard = standard.with(Default::default()).with_parts(&robust, &[])?;
        let robust = robust.with(Default::default()).with_parts(&standard, &[])?;
        Ok(Self { standard, robust })
    }

    /// The tower of `standard` and that of `robust`: a folder, a built-in model, a Hub id, or a file
    /// of weights as FARE and TeCoA are published, of which nothing is executed. Such a file does
    /// not say its activation, heads and normalisation, which are then those of `standard`.
    ///
    /// `preprocess` is the standard model's; weights are held in `dtype`.
    ///
    /// # Errors
    /// If one cannot be found or read, has no CLIP vision tower, or they differ in shape.
    pub fn load(
        standard: &Model,
        robust: &str,
        lookup: &Lookup,
        preprocess: &Preprocess,
        dtype: DType,
        device: &Device,
    ) -> Result<(Self, [Side; 2])> {
        let config = standard.tower_config()?;
        let path = Path::new(robust);
        let (tower, side) = if path.is_file() {
            let checkpoint = Checkpoint::open(path)?;
            let weights = VisionWeights::find(&checkpoint, device)?;
            weights.check_design()?;
            let mut found = weights.config()?;
            check_shape(&config.spec(), &TowerSpec { heads: config.num_attention_heads, ..found.spec() })?;
            found.num_attention_heads = config.num_attention_heads;
            found.hidden_act.clone_from(&config.hidden_act);
            found.layer_norm_eps = config.layer_norm_eps;
            found.projection_dim = config.projection_dim;
            let (mean, std) = (preprocess.mean, preprocess.std);
            let tower = Clip::new(&found, &weights, Some(&weights), mean, std)?.to_dtype(dtype)?;
            let digest = digest(checkpoint.files())?;
            (tower, Side { name: robust.into(), revision: None, digest })
        } else {
            let model = Model::find(robust, lookup)?;
            check_shape(&config.spec(), &model.tower_config()?.spec())?;
            let tower = model.tower(&model.preprocess(None)?, Some(dtype), device)?;
            (tower, Side { name: robust.into(), revision: model.commit(), digest: model.digest()? })
        };
        let own = standard.tower(preprocess, Some(dtype), device)?;
        let name = standard.name.clone();
        let own_side = Side { name, revision: standard.commit(), digest: standard.digest()? };
        Ok((Self::new(own, tower)?, [own_side, side]))
    }

    /// One of them.
    pub fn tower(&self, which: Which) -> &Clip {
        match which {
            Which::Standard => &self.standard,
            Which::Robust => &self.robust,
        }
    }
}

/// Refuses a robust tower of another shape, and names what differs.
fn check_shape(standard: &TowerSpec, robust: &TowerSpec) -> Result<()> {
    let square = |(h, w): (usize, usize)| format!("{h}x{w}");
    let parts = [
        ("blocks", standard.blocks.to_string(), robust.blocks.to_string()),
        ("channels", standard.hidden.to_string(), robust.hidden.to_string()),
        ("heads", standard.heads.to_string(), robust.heads.to_string()),
        ("pixels a patch", standard.patch_size.to_string(), robust.patch_size.to_string()),
        ("pixels a picture", square(standard.picture), square(robust.picture)),
    ];
    match parts.iter().find(|(_, ours, theirs)| ours != theirs) {
        None => Ok(()),
        Some((what, ours, theirs)) => {
            let expected = format!("a tower of the standard one's shape, with {ours} {what}");
            Err(Error::argument("--robust", expected, theirs))
        }
    }
}

/// Which tokens of a layer make its representation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tokens {
    /// All of them, one after the other: N D numbers.
    All,
    /// The class token alone: D numbers.
    Class,
    /// The mean over all tokens: D numbers.
    Mean,
}

impl Tokens {
    /// `(B, N, D)` to `(B, F)` f32.
    ///
    /// # Errors
    /// If the shape is another.
    pub fn take(self, hidden: &Tensor) -> Result<Tensor> {
        hidden.dims3()?;
        let hidden = hidden.to_dtype(DType::F32)?;
        Ok(match self {
            Self::All => hidden.flatten_from(1)?,
            Self::Class => hidden.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?,
            Self::Mean => hidden.mean(1)?,
        })
    }
}

impl fmt::Display for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::All => "all",
            Self::Class => "class",
            Self::Mean => "mean",
        })
    }
}

impl FromStr for Tokens {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "all" => Ok(Self::All),
            "class" => Ok(Self::Class),
            "mean" => Ok(Self::Mean),
            other => Err(Error::argument("--tokens", "all, class or mean", other)),
        }
    }
}

/// A picture that could not be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// Its name.
    pub id: String,
    /// What is wrong with it.
    pub reason: String,
}

/// The pictures of an analysis.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Data {
    /// The set's name.
    pub name: String,
    /// Its digest, over names and labels ([`LabelledSet::digest`]).
    pub digest: String,
    /// How pictures were prepared.
    pub contract: String,
    /// Pictures used, those that failed not among them.
    pub n: usize,
}

/// Pictures to be read, each when it is needed.
pub struct Sample<'a> {
    /// The set, subsets drawn.
    pub set: &'a LabelledSet,
    /// Limits on its files.
    pub limits: DecodeLimits,
    /// From a picture to the towers' pixels.
    pub preprocess: &'a Preprocess,
    /// Where pixels are put.
    pub device: &'a Device,
}

impl Sample<'_> {
    /// Reads the items `order`, `batch` of them at a time, and gives `f` the pixels `(B, 3, H, W)`
    /// f32 in [0, 1] of those that can be read, and their numbers. Those that cannot are returned,
    /// with the set's own defects; they end nothing.
    ///
    /// # Errors
    /// If `f` fails, or no picture can be read.
    pub fn each(
        &self,
        order: &[usize],
        batch: usize,
        mut f: impl FnMut(&Tensor, &[usize]) -> Result<()>,
    ) -> Result<Vec<Failed>> {
        let mut failed: Vec<Failed> = Vec::new();
        let mut read = 0;
        for items in order.chunks(batch.max(1)) {
            let pictures: Vec<Result<Tensor>> = items
                .par_iter()
                .map(|&item| {
                    let picture = self.set.picture(item, &self.limits)?;
                    if picture.width() * picture.height() == 0 {
                        let name = self.set.items()[item].id.clone();
                        return Err(Error::Picture { name, reason: "has no pixels".into() });
                    }
                    pixels_from_rgb(&self.preprocess.prepare(&picture), self.device)
                })
                .collect();
            let (mut pixels, mut found) = (Vec::new(), Vec::new());
            for (picture, &item) in pictures.into_iter().zip(items) {
                match picture {
                    Ok(picture) => {
                        pixels.push(picture);
                        found.push(item);
                    }
                    Err(error) => {
                        let id = self.set.items().get(item).map(|item| item.id.clone()).unwrap_or_default();
                        failed.push(Failed { id, reason: error.to_string() });
                    }
                }
            }
            read += found.len();
            if !pixels.is_empty() {
                f(&Tensor::stack(&pixels, 0)?, &found)?;
            }
        }
        let defects = self.set.defects().iter();
        failed.extend(defects.map(|d| Failed { id: d.id.clone(), reason: d.reason.clone() }));
        if read == 0 {
            let reason = failed.first().map_or("it is empty".to_string(), |f| f.reason.clone());
            return Err(Error::data(self.set.name(), format!("no picture can be read: {reason}")));
        }
        failed.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(failed)
    }

    /// All its items, in order.
    pub fn order(&self) -> Vec<usize> {
        (0..self.set.items().len()).collect()
    }

    /// What to say of it where `failed` pictures could not be used.
    pub fn data(&self, failed: &[Failed]) -> Data {
        let all = self.set.items().len() + self.set.defects().len();
        Data {
            name: self.set.name().into(),
            digest: self.set.digest(),
            contract: self.preprocess.contract.to_string(),
            n: all.saturating_sub(failed.len()),
        }
    }
}

/// Runs `f` on pixels `(B, 3, H, W)`, as many at once as leave a picture's result independent of
/// its batch; its tensors have a row per picture, and so have those returned.
fn run(
    batch: usize,
    pixels: &Tensor,
    f: impl Fn(&Tensor) -> Result<Vec<Tensor>> + Sync,
) -> Result<Vec<Tensor>> {
    let rows: Vec<usize> = (0..pixels.dim(0)?).collect();
    Ok(in_batches(pixels, &rows, batch, |pixels, _| Ok((Evaluation::default(), f(pixels)?)))?.1)
}

/// What an analysis found.
pub trait Findings: Serialize {
    /// The analysis' name, and that of its files.
    const NAME: &'static str;

    /// Its numbers as CSV, with a line of names.
    ///
    /// # Errors
    /// If a field cannot be written.
    fn csv(&self) -> Result<String>;

    /// Its figure. `towers` are the standard and the robust tower's names.
    fn svg(&self, towers: [&str; 2], data: Option<&Data>) -> String;

    /// The most important of it, in a few lines.
    fn table(&self) -> String;
}

/// What an analysis found, with all that it depends on; on a CPU the same seed gives the same bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Analysis<T> {
    /// [`VERSION`].
    pub schema_version: u64,
    /// Its name: `cka`, `replace`, `spectrum`, `attention`, `insensitivity` or `shapley`.
    pub analysis: String,
    /// Of this library.
    pub version: String,
    /// Of all that was drawn at random.
    pub seed: u64,
    /// The standard tower.
    pub standard: Side,
    /// The robust tower.
    pub robust: Side,
    /// The pictures; `None` where only weights were looked at.
    pub data: Option<Data>,
    /// Pictures that could not be used.
    pub failed: Vec<Failed>,
    /// What was found.
    #[serde(flatten)]
    pub result: T,
}

/// The version of the JSON that analyses write.
pub const VERSION: u64 = 1;

impl<T: Findings> Analysis<T> {
    /// What was found of two towers.
    pub fn new(sides: &[Side; 2], data: Option<Data>, seed: u64, failed: Vec<Failed>, result: T) -> Self {
        let [standard, robust] = sides.clone();
        Self {
            schema_version: VERSION,
            analysis: T::NAME.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            seed,
            standard,
            robust,
            data,
            failed,
            result,
        }
    }

    /// Writes `NAME.json`, `NAME.csv` and `NAME.svg` into `folder`, which is made where there is
    /// none, over what is there, and returns their paths.
    ///
    /// # Errors
    /// If one cannot be written.
    pub fn write(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        std::fs::create_dir_all(folder).map_err(|e| Error::write(folder, e))?;
        let paths = ["json", "csv", "svg"].map(|end| folder.join(format!("{}.{end}", T::NAME)));
        write_whole(&paths[0], self)?;
        let towers = [self.standard.name.as_str(), self.robust.name.as_str()];
        for (path, text) in
            paths.iter().skip(1).zip([self.result.csv()?, self.result.svg(towers, self.data.as_ref())])
        {
            std::fs::write(path, text).map_err(|e| Error::write(path, e))?;
        }
        Ok(paths.to_vec())
    }
}

/// Lines of CSV, the first of them names.
fn csv(lines: impl IntoIterator<Item = Vec<String>>) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    let failed = |e: String| Error::Unsupported(format!("csv: {e}"));
    for line in lines {
        writer.write_record(&line).map_err(|e| failed(e.to_string()))?;
    }
    let bytes = writer.into_inner().map_err(|e| failed(e.to_string()))?;
    String::from_utf8(bytes).map_err(|e| failed(e.to_string()))
}

/// A model's name without the folders above it, for figures.
fn short(name: &str) -> &str {
    let end = name.trim_end_matches('/');
    end.rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or(name)
}

/// `standard: A, robust: B`, for figures.
fn names([standard, robust]: [&str; 2]) -> String {
    format!("Standard tower: {}. Robust tower: {}.", short(standard), short(robust))
}

/// What pictures a figure is of.
fn pictures(data: Option<&Data>) -> String {
    data.map_or(String::new(), |data| format!("{} pictures of {}.", data.n, data.name))
}

/// The mean with a 95 % interval by the normal distribution; of one value, the value.
fn mean_interval(values: &[f64]) -> (f64, f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let square = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
    let error = if values.len() > 1 { (square / (n - 1.0) / n).sqrt() } else { 0.0 };
    (mean, mean - Z * error, mean + Z * error)
}

/// Standard errors to either side that hold 95 % of a normal distribution.
const Z: f64 = 1.959_963_984_540_054;
