use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How Qwen-VL's processors choose a picture's size: sides that are multiples of a factor, an area
/// within limits, and an aspect ratio as close to the picture's as that allows.
///
/// Equal to `smart_resize` of transformers 5.23 (`image_processing_qwen2_vl.py`): halves are rounded
/// to even.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SmartResize {
    /// What both sides are multiples of, in pixels: a patch's side times the merged patches a side.
    pub factor: u32,
    /// The least area, in pixels.
    pub min_pixels: u64,
    /// The largest area, in pixels.
    pub max_pixels: u64,
}

/// The longest side over the shortest that a picture may have.
const RATIO: f64 = 200.0;

impl SmartResize {
    /// Height and width for a picture of `height` x `width`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a picture without pixels, or one more than 200 times as long as wide.
    pub fn size(&self, height: u32, width: u32) -> Result<(u32, u32)> {
        let found = || format!("{height} x {width}");
        if height == 0 || width == 0 {
            return Err(Error::argument("picture size", "at least 1 x 1", found()));
        }
        let ratio = f64::from(height.max(width)) / f64::from(height.min(width));
        if ratio > RATIO {
            return Err(Error::argument("picture size", "sides at most 200 to 1", found()));
        }
        Ok(self.unchecked(height, width))
    }

    /// The same for any picture that has pixels.
    pub(super) fn unchecked(&self, height: u32, width: u32) -> (u32, u32) {
        let factor = f64::from(self.factor);
        let (h, w) = (f64::from(height), f64::from(width));
        let round = |side: f64| (side / factor).round_ties_even() * factor;
        let (high, wide) = (round(h), round(w));
        let size = if high * wide > self.max_pixels as f64 {
            let beta = (h * w / self.max_pixels as f64).sqrt();
            let shrink = |side: f64| ((side / beta / factor).floor() * factor).max(factor);
            (shrink(h), shrink(w))
        } else if high * wide < self.min_pixels as f64 {
            let beta = (self.min_pixels as f64 / (h * w)).sqrt();
            let enlarge = |side: f64| (side * beta / factor).ceil() * factor;
            (enlarge(h), enlarge(w))
        } else {
            (high, wide)
        };
        // Only with limits that contradict each other can a side still be zero.
        (size.0.max(factor) as u32, size.1.max(factor) as u32)
    }
}
