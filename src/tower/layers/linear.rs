use candle_core::Tensor;

use super::{compute_dtype, fused};
use crate::Result;

/// `y = x W^T + b`, W of shape `(out, in)`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// From a weight `(out, in)` and a bias `(out,)`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// Rows of W.
    pub fn out_features(&self) -> usize {
        self.weight.dims().first().copied().unwrap_or(0)
    }

    /// The weight as stored, `(out, in)`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias as stored, `(out,)`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The same layer with each tensor replaced by what `f` makes of it.
    pub fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { weight: f(&self.weight)?, bias: self.bias.as_ref().map(f).transpose()? })
    }

    fn compute(&self, stored: &Tensor) -> Result<Tensor> {
        Ok(stored.to_dtype(compute_dtype(stored.device(), stored.dtype()))?)
    }

    /// `(..., in)` to `(..., out)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = product(x, &self.compute(&self.weight)?.t()?)?;
        let Some(bias) = &self.bias else { return Ok(y) };
        let bias = self.compute(bias)?;
        if fused::applies(&y) && fused::applies(&bias) {
            fused::add_bias(&y, &bias)?;
            return Ok(y);
        }
        Ok(y.broadcast_add(&bias)?)
    }

    /// The gradient `(..., out)` at the output to that at the input, `(..., in)`.
    pub fn vjp(&self, gradient: &Tensor) -> Result<Tensor> {
        product(gradient, &self.compute(&self.weight)?)
    }
}

/// `(..., k) x (k, n)` as one product over all leading dimensions.
fn product(x: &Tensor, matrix: &Tensor) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    let inner = dims.pop().unwrap_or(1);
    let rows = dims.iter().product::<usize>();
    dims.push(matrix.dim(1)?);
    Ok(x.reshape((rows, inner))?.matmul(matrix)?.reshape(dims)?)
}
