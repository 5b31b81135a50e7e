use candle_core::{Device, Tensor};

use crate::tower::InputFilter;
use crate::{Error, Result};

/// The Gaussian Input Filter, the paper's Eq. 5: x~ = F^-1(F(x) . exp(-D^2 / 2 D0^2)).
///
/// D^2 = u^2 + v^2 counts frequency bins from the centre, so the mask is a product of a mask in u
/// and one in v, and the filter is G_h X G_w^T with two real, symmetric, circulant matrices: exact,
/// differentiable, its own transpose, and two small products on any device.
pub struct Gif {
    cutoff: f64,
    /// `(H, H)`.
    rows: Tensor,
    /// `(W, W)`.
    columns: Tensor,
}

/// D0 of the paper, in bins: 40, at its picture sizes 224 and 336. Smaller pictures have fewer
/// bins, and get the same share of them as 40 is of 224.
pub fn default_cutoff(image_size: usize) -> f64 {
    40.0 * (image_size as f64 / 224.0).min(1.0)
}

impl Gif {
    /// The filter for pictures of `height` x `width` with cutoff D0 in frequency bins.
    ///
    /// # Errors
    /// If the cutoff is not positive and finite, or a side is zero.
    pub fn new(height: usize, width: usize, cutoff: f64, device: &Device) -> Result<Self> {
        if !(cutoff.is_finite() && cutoff > 0.0) {
            return Err(Error::argument("cutoff", "a positive number of frequency bins", cutoff));
        }
        if height == 0 || width == 0 {
            return Err(Error::argument("picture size", "at least 1 x 1", format!("{height} x {width}")));
        }
        let rows = Tensor::from_vec(circulant(height, cutoff), (height, height), device)?;
        let columns = Tensor::from_vec(circulant(width, cutoff), (width, width), device)?;
        Ok(Self { cutoff, rows, columns })
    }

    /// The cutoff D0, in frequency bins.
    pub fn cutoff(&self) -> f64 {
        self.cutoff
    }

    /// Filters `(B, C, H, W)` f32.
    ///
    /// # Errors
    /// If the picture has another size than the filter.
    pub fn filter(&self, pixels: &Tensor) -> Result<Tensor> {
        let (batch, channels, height, width) = pixels.dims4()?;
        let (rows, columns) = (self.rows.dim(0)?, self.columns.dim(0)?);
        if (height, width) != (rows, columns) {
            return Err(Error::argument(
                "picture size",
                format!("{rows} x {columns}"),
                format!("{height} x {width}"),
            ));
        }
        let planes = batch * channels;
        // Both matrices are symmetric, so neither needs transposing. Two plain products: candle
        // 0.10.2 gets a batched one wrong whose left matrix is expanded over the batch.
        let x = pixels.reshape((planes * height, width))?.matmul(&self.columns)?;
        let x = x.reshape((planes, height, width))?.transpose(1, 2)?.reshape((planes * width, height))?;
        let x = x.matmul(&self.rows)?.reshape((planes, width, height))?.transpose(1, 2)?.contiguous()?;
        Ok(x.reshape((batch, channels, height, width))?)
    }
}

impl InputFilter for Gif {
    fn apply(&self, pixels: &Tensor) -> Result<Tensor> {
        self.filter(pixels)
    }

    fn adjoint(&self, gradient: &Tensor) -> Result<Tensor> {
        self.filter(gradient)
    }
}

/// F^-1 diag(exp(-d^2 / 2 D0^2)) F for one axis, row by row. Frequencies run from -floor(n/2), as
/// they do after an fftshift; the mask is even in d, so the matrix is real and symmetric.
fn circulant(n: usize, cutoff: f64) -> Vec<f32> {
    let half = (n / 2) as i64;
    let mask: Vec<(i64, f64)> =
        (-half..n as i64 - half).map(|d| (d, (-0.5 * (d as f64 / cutoff).powi(2)).exp())).collect();
    let kernel: Vec<f32> = (0..n as i64)
        .map(|j| {
            let wave = |d: i64| {
                (2.0 * std::f64::consts::PI * ((d * j).rem_euclid(n as i64) as f64) / n as f64).cos()
            };
            (mask.iter().map(|&(d, h)| h * wave(d)).sum::<f64>() / n as f64) as f32
        })
        .collect();
    let mut matrix = Vec::with_capacity(n * n);
    for i in 0..n {
        matrix.extend((0..n).map(|j| kernel[i.abs_diff(j)]));
    }
    matrix
}
