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
//! Every step from the pixels on has its transpose, so a gradient walks the same corridor back.
//!
//! Without the `engine` feature (on by default) the library builds without mistral.rs: pictures,
//! towers with gradients, the defence and anchors.
#![deny(missing_docs)]

pub mod defense;
#[cfg(feature = "engine")]
pub mod engine;
mod error;
pub mod image;
pub mod model;
#[cfg(feature = "engine")]
pub mod server;
pub mod tower;

pub use error::{Error, Result};

// Linked for its `x86-v4` feature alone; see Cargo.toml.
use gemm as _;
