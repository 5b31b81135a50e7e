use candle_core::{D, DType, Tensor};

use super::fused;
use crate::Result;

/// Layer normalisation over the last dimension, with weight and bias.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// From a weight `(D,)`, a bias `(D,)` and the epsilon added to the variance.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self { weight, bias, eps }
    }

    /// The weight as stored, `(D,)`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias as stored, `(D,)`.
    pub fn bias(&self) -> &Tensor {
        &self.bias
    }

    /// The epsilon added to the variance.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// The same layer with each tensor replaced by what `f` makes of it.
    pub fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { weight: f(&self.weight)?, bias: f(&self.bias)?, eps: self.eps })
    }

    /// `(..., D)` to `(..., D)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // The fused operation has no backward of candle's; ours is `vjp`.
        let (weight, bias) = (self.weight.to_dtype(x.dtype())?, self.bias.to_dtype(x.dtype())?);
        Ok(candle_nn::ops::layer_norm(&x.contiguous()?, &weight, &bias, self.eps as f32)?)
    }

    /// The gradient at the output to that at the input `x`, both `(..., D)`.
    ///
    /// With x^ = (x - mean) / s and g' = g w:  (g' - mean(g') - x^ mean(g' x^)) / s.
    pub fn vjp(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        let weight = self.weight.to_dtype(DType::F32)?;
        if [x, gradient, &weight].into_iter().all(fused::applies) {
            return fused::norm_vjp(x, gradient, &weight, self.eps);
        }
        // Half precision has too few bits for the two means.
        let (x, gradient) = (x.to_dtype(DType::F32)?, gradient.to_dtype(DType::F32)?);
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let scale = (variance + self.eps)?.sqrt()?.recip()?;
        let normal = centred.broadcast_mul(&scale)?;
        let weighted = gradient.broadcast_mul(&weight)?;
        let along = (&weighted * &normal)?.mean_keepdim(D::Minus1)?;
        let flat = weighted.mean_keepdim(D::Minus1)?;
        let inner = weighted.broadcast_sub(&flat)?.sub(&normal.broadcast_mul(&along)?)?;
        Ok(inner.broadcast_mul(&scale)?.to_dtype(dtype)?)
    }
}

/// Division by the root of the mean square over the last dimension, times a weight.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// From a weight `(D,)` and the epsilon added to the mean square.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self { weight, eps }
    }

    /// `(..., D)` to `(..., D)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // The fused operation has no backward of candle's; ours is `vjp`.
        let weight = self.weight.to_dtype(x.dtype())?;
        Ok(candle_nn::ops::rms_norm(&x.contiguous()?, &weight, self.eps as f32)?)
    }

    /// The gradient at the output to that at the input `x`, both `(..., D)`.
    ///
    /// With r = 1 / sqrt(mean(x^2) + eps) and g' = g w:  r (g' - x r^2 mean(g' x)).
    pub fn vjp(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        let (x, gradient) = (x.to_dtype(DType::F32)?, gradient.to_dtype(DType::F32)?);
        let weighted = gradient.broadcast_mul(&self.weight.to_dtype(DType::F32)?)?;
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?.recip()?;
        let along = ((&weighted * &x)?.mean_keepdim(D::Minus1)? * scale.sqr()?)?;
        let inner = weighted.sub(&x.broadcast_mul(&along)?)?;
        Ok(inner.broadcast_mul(&scale)?.to_dtype(dtype)?)
    }
}

/// The norms that towers have.
#[derive(Debug, Clone)]
pub enum Norm {
    /// With mean and bias.
    Layer(LayerNorm),
    /// Without.
    Rms(RmsNorm),
}

impl Norm {
    /// `(..., D)` to `(..., D)`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Layer(norm) => norm.forward(x),
            Self::Rms(norm) => norm.forward(x),
        }
    }

    /// The gradient at the output to that at the input `x`, both `(..., D)`.
    pub fn vjp(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        match self {
            Self::Layer(norm) => norm.vjp(x, gradient),
            Self::Rms(norm) => norm.vjp(x, gradient),
        }
    }

    /// Its tensors, by the names they have in checkpoints.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::Layer(norm) => vec![("weight", &norm.weight), ("bias", &norm.bias)],
            Self::Rms(norm) => vec![("weight", &norm.weight)],
        }
    }

    /// The same layer with each tensor replaced by what `f` makes of it.
    pub fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(match self {
            Self::Layer(norm) => Self::Layer(norm.map(f)?),
            Self::Rms(norm) => Self::Rms(RmsNorm { weight: f(&norm.weight)?, eps: norm.eps }),
        })
    }
}
