use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;
use serde::{Deserialize, Serialize};

use crate::image::{Filter, resize_matrix};
use crate::{Error, Result};

/// A part of a picture, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Rows above it.
    pub top: usize,
    /// Columns left of it.
    pub left: usize,
    /// Its rows.
    pub height: usize,
    /// Its columns.
    pub width: usize,
}

impl Window {
    /// All of a picture.
    pub fn whole((height, width): (usize, usize)) -> Self {
        Self { top: 0, left: 0, height, width }
    }

    /// Whether all of `other` lies in it.
    pub fn contains(&self, other: &Self) -> bool {
        self.top <= other.top
            && self.left <= other.left
            && other.top + other.height <= self.top + self.height
            && other.left + other.width <= self.left + self.width
    }

    /// This part of pixels `(B, 3, H, W)`.
    pub(super) fn of(&self, pixels: &Tensor) -> Result<Tensor> {
        Ok(pixels.narrow(2, self.top, self.height)?.narrow(3, self.left, self.width)?)
    }

    /// A picture of `size` that is `part` here and 0 elsewhere.
    pub(super) fn place(&self, part: &Tensor, (height, width): (usize, usize)) -> Result<Tensor> {
        let below = height - self.top - self.height;
        let right = width - self.left - self.width;
        Ok(part.pad_with_zeros(2, self.top, below)?.pad_with_zeros(3, self.left, right)?)
    }
}

/// Which part of the picture a step looks at.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Crop {
    /// All of it, every time.
    Whole,
    /// The notebook's semantic-centric crop: sides of U(`least`, 1) of the picture's, but no less
    /// than the box around the best `share` of the soft map, which stays inside.
    Centric {
        /// The shortest side, as a share of the picture's.
        least: f64,
        /// The share of pixels that the box holds the best of.
        share: f64,
    },
    /// torchvision's `RandomResizedCrop`: an area of U(`least`, 1) of the picture's, an aspect ratio
    /// from 3/4 to 4/3, anywhere.
    Random {
        /// The smallest area, as a share of the picture's.
        least: f64,
    },
}

impl Crop {
    pub(super) fn check(self) -> Result<()> {
        let shares = match self {
            Self::Whole => return Ok(()),
            Self::Centric { least, share } => [least, share],
            Self::Random { least } => [least, 1.0],
        };
        match shares.iter().find(|share| !(**share > 0.0 && **share <= 1.0)) {
            Some(share) => Err(Error::argument("crop", "shares above 0 and up to 1", share)),
            None => Ok(()),
        }
    }

    /// Draws a window of a picture of `size`; `bounds` is the box that a centric one keeps.
    pub fn draw(self, size: (usize, usize), bounds: &Window, rng: &mut ChaCha8Rng) -> Window {
        match self {
            Self::Whole => Window::whole(size),
            Self::Centric { least, .. } => centric(size, least, bounds, rng),
            Self::Random { least } => random(size, least, rng),
        }
    }
}

/// Uniform in [0, 1).
fn share(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Uniform in `low..=high`.
fn whole_number(rng: &mut ChaCha8Rng, low: usize, high: usize) -> usize {
    low + (share(rng) * (high - low + 1) as f64) as usize
}

fn centric((height, width): (usize, usize), least: f64, bounds: &Window, rng: &mut ChaCha8Rng) -> Window {
    let mut side = |all: usize, box_side: usize| {
        let side = (all as f64 * (least + (1.0 - least) * share(rng))) as usize;
        side.min(all).max(box_side).max(1)
    };
    let (h, w) = (side(height, bounds.height), side(width, bounds.width));
    // Every place that keeps the box inside and does not leave the picture.
    let mut place = |all: usize, side: usize, start: usize, box_side: usize| {
        whole_number(rng, start.saturating_sub(side - box_side), start.min(all - side))
    };
    let top = place(height, h, bounds.top, bounds.height);
    let left = place(width, w, bounds.left, bounds.width);
    Window { top, left, height: h, width: w }
}

fn random((height, width): (usize, usize), least: f64, rng: &mut ChaCha8Rng) -> Window {
    let area = (height * width) as f64;
    let widest = (4.0f64 / 3.0).ln();
    for _ in 0..10 {
        let target = area * (least + (1.0 - least) * share(rng));
        let ratio = (widest * (2.0 * share(rng) - 1.0)).exp();
        let w = (target * ratio).sqrt().round_ties_even() as usize;
        let h = (target / ratio).sqrt().round_ties_even() as usize;
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            let (top, left) = (whole_number(rng, 0, height - h), whole_number(rng, 0, width - w));
            return Window { top, left, height: h, width: w };
        }
    }
    Window::whole((height, width))
}

/// A matrix `[output, input]` that resizes one axis; `None` where the sizes are equal.
fn matrix(rows: Vec<(usize, Vec<f64>)>, input: usize, device: &Device) -> Result<Tensor> {
    let mut values = vec![0f32; rows.len() * input];
    for (row, (start, weights)) in values.chunks_exact_mut(input).zip(&rows) {
        for (slot, weight) in row.iter_mut().skip(*start).zip(weights) {
            *slot = *weight as f32;
        }
    }
    Ok(Tensor::from_vec(values, (rows.len(), input), device)?)
}

/// A linear resize of pictures, with its transpose.
pub(super) struct Resize {
    /// `(h, H)` and `(w, W)`; `None` where a side stays as it is.
    rows: Option<Tensor>,
    columns: Option<Tensor>,
}

impl Resize {
    /// Bilinear; where a side shrinks its kernel is widened (antialiasing), which a crop at the
    /// tower's own size never needs.
    pub(super) fn smooth(from: (usize, usize), to: (usize, usize), device: &Device) -> Result<Self> {
        let side = |input: usize, output: usize| {
            let rows = resize_matrix(input, output, Filter::Bilinear);
            let rows = rows.into_iter().map(|row| (row.start, row.weights)).collect();
            (input != output).then(|| matrix(rows, input, device)).transpose()
        };
        Ok(Self { rows: side(from.0, to.0)?, columns: side(from.1, to.1)? })
    }

    /// Bilinear between the nearest two samples, also where a side shrinks, as torch's
    /// `interpolate` without antialiasing.
    pub(super) fn plain(from: (usize, usize), to: (usize, usize), device: &Device) -> Result<Self> {
        let side = |input: usize, output: usize| {
            let rows = (0..output).map(|i| {
                let (start, weight) = between(i, input, output);
                (start, if weight > 0.0 { vec![1.0 - weight, weight] } else { vec![1.0] })
            });
            (input != output).then(|| matrix(rows.collect(), input, device)).transpose()
        };
        Ok(Self { rows: side(from.0, to.0)?, columns: side(from.1, to.1)? })
    }

    /// `(1, 3, H, W)` to `(1, 3, h, w)`.
    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        sandwich(self.rows.as_ref(), x, self.columns.as_ref())
    }

    /// A gradient `(1, 3, h, w)` back to `(1, 3, H, W)`.
    pub(super) fn adjoint(&self, x: &Tensor) -> Result<Tensor> {
        let t = |m: &Option<Tensor>| m.as_ref().map(Tensor::t).transpose();
        sandwich(t(&self.rows)?.as_ref(), x, t(&self.columns)?.as_ref())
    }
}

/// Where output sample `i` falls among the inputs: the first of its two, and the second's weight.
pub(super) fn between(i: usize, input: usize, output: usize) -> (usize, f64) {
    let place = ((i as f64 + 0.5) * input as f64 / output as f64 - 0.5).max(0.0);
    let start = (place as usize).min(input - 1);
    (start, if start + 1 < input { place - start as f64 } else { 0.0 })
}

/// R X C^T for every plane of one picture.
fn sandwich(rows: Option<&Tensor>, x: &Tensor, columns: Option<&Tensor>) -> Result<Tensor> {
    let (one, channels, height, width) = x.dims4()?;
    let planes = one * channels;
    let mut x = x.contiguous()?;
    let mut wide = width;
    if let Some(columns) = columns {
        wide = columns.dim(0)?;
        x = x.reshape((planes * height, width))?.matmul(&columns.t()?)?;
    }
    x = x.reshape((planes, height, wide))?;
    let mut high = height;
    if let Some(rows) = rows {
        high = rows.dim(0)?;
        let turned = x.transpose(1, 2)?.reshape((planes * wide, height))?.matmul(&rows.t()?)?;
        x = turned.reshape((planes, wide, high))?.transpose(1, 2)?.contiguous()?;
    }
    Ok(x.reshape((one, channels, high, wide))?)
}
