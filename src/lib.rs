//! Adversarially robust vision for large vision-language models.
//!
//! R-Adapt (arXiv 2603.12799) leaves every pre-trained weight as it is and puts two things into
//! the vision tower: a Gaussian input filter ([`defense::Gif`]) and a fixed robustness anchor on
//! the first block's attention output ([`defense::Fra`]).
//!
//! A picture walks one corridor, in serving, attacking, training and analysis alike:
//!
//! ```text
//! bytes -> image::decode -> image::Preprocess -> pixels [B, 3, H, W] f32 in [0, 1]
//!       -> defense::Gif -> normalise -> patch embedding -> block 1: attention -> defense::Fra -> ... -> block L
//!       -> features -> projector and language model (mistral.rs)
//! ```
//!
//! A CLIP's features end in a zero-shot head instead ([`text::ZeroShotHead`]).
//!
//! Every step from the pixels on has its transpose, so a gradient walks the same corridor back:
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use radapt::defense::DefenseOptions;
//! use radapt::model::{Lookup, Model};
//! use radapt::tower::{Cotangent, VisionTower, Want, Wrt};
//!
//! # fn main() -> radapt::Result<()> {
//! // A folder or a Hub id; this one is a tiny random CLIP.
//! let model = Model::find("tests/fixtures/clip/v4", &Lookup::default())?;
//! let preprocess = model.preprocess(None)?;
//! let tower = model.tower(&preprocess, None, &Device::Cpu)?;
//! // GIF and a training-free anchor.
//! let defense = DefenseOptions::default().build(&tower, || model.fingerprint())?;
//! let tower = tower.with(defense.inserts());
//!
//! let pixels = preprocess.batch(&[image::RgbImage::new(30, 20)], &Device::Cpu)?;
//! let (features, tape) = tower.forward_tape(&pixels, &Want::pooled())?;
//! let embeds = features.embeds.expect("this checkpoint has a projection");
//! // The gradient of the sum of the embedding's entries.
//! let cotangent = Cotangent { embeds: Some(Tensor::ones_like(&embeds)?), ..Default::default() };
//! let gradients = tower.vjp(&tape, &cotangent, Wrt { pixels: true, anchor: true })?;
//! assert_eq!(gradients.pixels.expect("asked for").dims(), pixels.dims());
//! # Ok(())
//! # }
//! ```
//!
//! Without the `engine` feature (on by default) the library builds without mistral.rs: pictures,
//! towers with gradients, text encoders, the defence, anchors and their training, attacks and
//! scoring.
#![deny(missing_docs)]
// Which feature an item needs; docs.rs builds on nightly.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod analyze;
pub mod attack;
pub mod data;
pub mod defense;
pub mod demo;
#[cfg(feature = "engine")]
pub mod engine;
mod error;
pub mod eval;
mod hub;
pub mod image;
pub mod model;
mod page;
mod pickle;
pub mod pocket;
#[cfg(feature = "engine")]
pub mod server;
/// What of the chat server needs no language model.
#[cfg(all(feature = "server", not(feature = "engine")))]
pub mod server {
    pub mod gate;
    pub mod intake;
    pub mod keys;
    pub mod listen;
    pub mod metrics;
    #[cfg(feature = "otlp")]
    pub mod traces;
}
pub mod text;
pub mod tower;
pub mod train;

/// The README's programs, which compile and run as the others here do.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub use error::{Error, Result};

// Linked for its `x86-v4` feature alone; see Cargo.toml.
use gemm as _;
