//! Pictures: from a file's bytes to the numbers a vision tower takes.
//!
//! The corridor is `bytes → `[`decode`]` → `[`Preprocess::prepare`]` → `[`Preprocess::batch`],
//! which ends in a tensor `[B, 3, H, W]` of `f32` in `[0, 1]`. The tower subtracts the mean and
//! divides by the deviation itself, so that perturbations are measured in pixels of this tensor.
//!
//! Everything after decoding is linear in the pixels up to rounding to 8 bits: padding,
//! [`resize()`] (whose matrix is [`resize_matrix`]), cropping and the division by 255.

mod contract;
mod decode;
mod resize;
mod smart;

pub use contract::{Contract, Preprocess, Scale, pixels_from_rgb, rgb_from_pixels};
pub use decode::{DecodeLimits, Header, MAX_SIDE, decode, decode_file, measure};
pub use resize::{Filter, ResizeRow, resize, resize_matrix};
pub use smart::SmartResize;
