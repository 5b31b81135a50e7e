use candle_core::{D, DType, Device, Tensor};

use super::fused;
use crate::Result;

/// Rotary positions in two axes: the first quarter of a head's channels is turned against the third
/// by angles of the token's row, the second against the fourth by angles of its column.
///
/// After transformers 5.23 `Qwen3VLVisionRotaryEmbedding`, the same in all three Qwen-VL towers.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// `(N, d)` f32: cosines, and behind them the sines of the same angles.
    turns: Tensor,
}

impl Rotary {
    /// For tokens at `places`, row and column, in heads of `width` channels, a multiple of 4.
    ///
    /// # Errors
    /// If the device fails.
    pub fn axial(places: &[(usize, usize)], width: usize, theta: f64, device: &Device) -> Result<Self> {
        let quarter = width / 4;
        // As the reference computes them, in f32.
        let frequencies: Vec<f32> =
            (0..quarter).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / (2 * quarter) as f32)).collect();
        let mut turns = Vec::with_capacity(places.len() * width);
        for &(row, column) in places {
            let angles =
                || [row, column].into_iter().flat_map(|at| frequencies.iter().map(move |f| at as f32 * f));
            turns.extend(angles().map(|angle| f64::from(angle).cos() as f32));
            turns.extend(angles().map(|angle| f64::from(angle).sin() as f32));
        }
        Ok(Self { turns: Tensor::from_vec(turns, (places.len(), width), device)? })
    }

    /// Queries or keys `(R, N, d)`, turned. They must be nobody else's: they may be changed in place.
    pub fn forward(&self, x: Tensor) -> Result<Tensor> {
        self.turn(x, false)
    }

    /// The gradient at the turned to that at what was turned: turned back. It too may be changed in
    /// place.
    pub fn vjp(&self, gradient: Tensor) -> Result<Tensor> {
        self.turn(gradient, true)
    }

    fn turn(&self, x: Tensor, back: bool) -> Result<Tensor> {
        if fused::applies(&x) && fused::applies(&self.turns) {
            fused::turn(&x, &self.turns, back)?;
            return Ok(x);
        }
        let half = x.dim(D::Minus1)? / 2;
        let dtype = x.dtype();
        let x = x.to_dtype(DType::F32)?;
        let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
        let (cos, sin) = (self.turns.narrow(1, 0, half)?, self.turns.narrow(1, half, half)?);
        let sin = if back { sin.neg()? } else { sin };
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Ok(Tensor::cat(&[first, second], D::Minus1)?.to_dtype(dtype)?)
    }
}
