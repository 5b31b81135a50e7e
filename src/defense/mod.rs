//! The defence: a Gaussian input filter and a fixed robustness anchor, put into a frozen tower.
//!
//! R-Adapt (arXiv 2603.12799), Section 4. Nothing here changes a weight: [`Gif`] filters the
//! picture, [`Fra`] mixes an [`Anchor`] into the first block's attention output.
//!
//! ```
//! use candle_core::Device;
//! use radapt::defense::{AnchorChoice, DefenseOptions, Gif, default_cutoff};
//! use radapt::model::{Lookup, Model};
//!
//! # fn main() -> radapt::Result<()> {
//! let model = Model::find("pocket-clip", &Lookup::default())?;
//! let preprocess = model.preprocess(None)?;
//! let tower = model.tower(&preprocess, None, &Device::Cpu)?;
//!
//! // Without options: GIF, and an anchor from a white picture at the paper's alpha and beta.
//! let defense = DefenseOptions::default().build(&tower, || model.fingerprint())?;
//! println!("{}", defense.summary().expect("there is one"));
//!
//! // A trained anchor instead: a file's path, or a built-in one's name. Its own alpha, beta and
//! // cutoff hold where none are given.
//! let anchor = AnchorChoice::File("pocket-8-adaptive".into());
//! let trained = DefenseOptions { anchor, ..Default::default() };
//! let robust = tower.with(trained.build(&tower, || model.fingerprint())?.inserts());
//!
//! // GIF is nothing but a filter on pixels (B, 3, H, W), and keeps one colour as it is.
//! let gif = Gif::new(96, 96, default_cutoff(96), &Device::Cpu)?;
//! let grey = (candle_core::Tensor::ones((1, 3, 96, 96), candle_core::DType::F32, &Device::Cpu)? * 0.5)?;
//! let change = (gif.filter(&grey)? - &grey)?.abs()?.max_all()?.to_scalar::<f32>()?;
//! assert!(change < 1e-5);
//! # drop(robust);
//! # Ok(())
//! # }
//! ```

pub mod acquire;
pub mod anchor;
pub mod built_in;
pub mod export;
mod fra;
mod gif;
pub mod grids;
pub mod guide;
pub mod presets;

pub use anchor::{Anchor, AnchorMeta, Method};
pub use fra::Fra;
pub use gif::{Gif, default_cutoff};
pub use presets::Preset;

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use crate::tower::{Insertable, Inserts};
use crate::{Error, Result};

/// alpha and beta of the paper's Table 9 for a training-free anchor.
pub const TRAINING_FREE_MIX: (f64, f64) = (1.2, -0.8);

/// Which anchor to use.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum AnchorChoice {
    /// The undefended tower; GIF too is off unless a cutoff is given.
    None,
    /// The tower's own, from a white picture.
    #[default]
    TrainingFree,
    /// A built-in anchor by its name ([`built_in`]), or an anchor file.
    File(PathBuf),
}

impl std::str::FromStr for AnchorChoice {
    type Err = std::convert::Infallible;
    fn from_str(s: &str) -> std::result::Result<Self, Self::Err> {
        Ok(match s {
            "none" => Self::None,
            "training-free" => Self::TrainingFree,
            path => Self::File(path.into()),
        })
    }
}

/// A defence as the user asks for it; what is not given comes from the anchor, or from the
/// paper's defaults.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DefenseOptions {
    /// The anchor.
    pub anchor: AnchorChoice,
    /// The anchor's factor.
    pub alpha: Option<f64>,
    /// The attention output's factor.
    pub beta: Option<f64>,
    /// GIF's cutoff D0, in frequency bins of the tower's picture.
    pub cutoff: Option<f64>,
    /// Leave GIF out.
    pub no_gif: bool,
    /// Leave the anchor out.
    pub no_fra: bool,
    /// Accept an anchor made on another tower of the same shape.
    pub allow_mismatch: bool,
}

impl DefenseOptions {
    /// Makes the defence for `tower`. `fingerprint` is asked for when an anchor file is used.
    ///
    /// # Errors
    /// If the anchor file is damaged or does not fit, or a number is out of range.
    pub fn build(
        &self,
        tower: &impl Insertable,
        fingerprint: impl FnOnce() -> Result<String>,
    ) -> Result<Defense> {
        self.make(&self.source(fingerprint)?, tower)
    }

    /// Where the anchor is to come from, read and checked as far as that goes without a size.
    fn source(&self, fingerprint: impl FnOnce() -> Result<String>) -> Result<Source> {
        Ok(match &self.anchor {
            AnchorChoice::None => Source::None,
            AnchorChoice::TrainingFree => Source::TrainingFree,
            AnchorChoice::File(path) => {
                Source::File { anchor: Box::new(Anchor::find(path)?), fingerprint: fingerprint()? }
            }
        })
    }

    fn make(&self, source: &Source, tower: &impl Insertable) -> Result<Defense> {
        let spec = tower.spec();
        let (alpha, beta) = TRAINING_FREE_MIX;
        let mut cutoff = default_cutoff(spec.image_size);
        let mut defense = Defense::default();
        let anchor = match source {
            Source::None => None,
            Source::TrainingFree => {
                defense.anchor = Some("training-free".into());
                defense.method = Some(Method::TrainingFree);
                // Not worth a pass where it is left out.
                let values = if self.no_fra { None } else { Some(acquire::training_free(tower)?) };
                Some((values, alpha, beta))
            }
            Source::File { anchor, fingerprint } => {
                let values = anchor.fitted(spec, fingerprint, self.allow_mismatch)?;
                cutoff = anchor.meta.cutoff_at(spec.image_size);
                defense.anchor = match &self.anchor {
                    AnchorChoice::File(path) => Some(path.display().to_string()),
                    _ => None,
                };
                defense.method = Some(anchor.meta.method);
                Some((Some(values), anchor.meta.alpha, anchor.meta.beta))
            }
        };
        for (flag, given) in [("alpha", self.alpha), ("beta", self.beta)] {
            if given.is_some() && (anchor.is_none() || self.no_fra) {
                return Err(Error::argument(format!("--{flag}"), "an anchor to go with it", "none"));
            }
        }
        if self.cutoff.is_some() && self.no_gif {
            return Err(Error::argument("--cutoff", "not together with --no-gif", "both"));
        }
        if !self.no_gif && (anchor.is_some() || self.cutoff.is_some()) {
            let (height, width) = spec.picture;
            let cutoff = self.cutoff.unwrap_or(cutoff);
            defense.gif = Some(Arc::new(Gif::new(height, width, cutoff, tower.device())?));
        }
        if let (Some((Some(values), alpha, beta)), false) = (anchor, self.no_fra) {
            let (alpha, beta) = (self.alpha.unwrap_or(alpha), self.beta.unwrap_or(beta));
            defense.fra = Some(Arc::new(Fra::new(&values, alpha, beta, tower.device())?));
        }
        Ok(defense)
    }
}

/// An anchor before it is brought to a grid.
enum Source {
    None,
    TrainingFree,
    File { anchor: Box<Anchor>, fingerprint: String },
}

/// What is put into a tower, and how to say so.
#[derive(Clone, Default)]
pub struct Defense {
    /// The filter on the picture.
    pub gif: Option<Arc<Gif>>,
    /// The mix on the first attention output.
    pub fra: Option<Arc<Fra>>,
    /// Where the anchor came from: a file, or `training-free`.
    pub anchor: Option<String>,
    /// How the anchor was acquired.
    pub method: Option<Method>,
}

/// A defence as results and servers report it. `None` fields are parts that are off.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DefenseSummary {
    /// Where the anchor came from.
    pub anchor: Option<String>,
    /// `training-free`, `model-guided` or `data-driven`.
    pub method: Option<Method>,
    /// The anchor's factor.
    pub alpha: Option<f64>,
    /// The attention output's factor.
    pub beta: Option<f64>,
    /// GIF's cutoff D0, in frequency bins of the tower's picture.
    pub cutoff: Option<f64>,
}

impl Defense {
    /// What the tower takes.
    pub fn inserts(&self) -> Inserts {
        Inserts {
            input: self.gif.clone().map(|gif| gif as _),
            attention: self.fra.clone().map(|fra| fra as _),
        }
    }

    /// `None` for the undefended tower.
    pub fn summary(&self) -> Option<DefenseSummary> {
        if self.gif.is_none() && self.fra.is_none() {
            return None;
        }
        Some(DefenseSummary {
            anchor: self.fra.as_ref().and(self.anchor.clone()),
            method: self.fra.as_ref().and(self.method),
            alpha: self.fra.as_ref().map(|fra| fra.alpha()),
            beta: self.fra.as_ref().map(|fra| fra.beta()),
            cutoff: self.gif.as_ref().map(|gif| gif.cutoff()),
        })
    }
}

impl std::fmt::Display for DefenseSummary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut parts = Vec::new();
        if let Some(cutoff) = self.cutoff {
            // Enough digits to tell two settings apart.
            parts.push(format!("GIF (cutoff {})", (cutoff * 1e4).round() / 1e4));
        }
        if let (Some(alpha), Some(beta)) = (self.alpha, self.beta) {
            let anchor = self.anchor.as_deref().unwrap_or("unnamed");
            let method = self.method.map(|method| method.to_string()).filter(|method| method != anchor);
            let method = method.map(|method| format!(", {method}")).unwrap_or_default();
            parts.push(format!("FRA (anchor {anchor}{method}, alpha {alpha}, beta {beta})"));
        }
        f.write_str(&parts.join(" and "))
    }
}
