use candle_core::Tensor;

use super::fused::{self, Gate};
use crate::{Error, Result};

/// The activation between the two products of a block's MLP, as `hidden_act` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(1.702 x)`: `quick_gelu`, OpenAI's CLIP.
    QuickGelu,
    /// `x Phi(x)` with the exact normal distribution: `gelu`, OpenCLIP.
    Gelu,
    /// The tanh approximation of [`Activation::Gelu`]: `gelu_pytorch_tanh`, `gelu_new`.
    GeluTanh,
    /// `x sigmoid(x)`: `silu`, Qwen2.5-VL.
    Silu,
}

const QUICK: f64 = 1.702;
/// sqrt(2 / pi)
const TANH_SCALE: f64 = 0.797_884_560_802_865_4;
const TANH_CUBIC: f64 = 0.044_715;

impl Activation {
    /// By the name that `hidden_act` has in a configuration.
    ///
    /// # Errors
    /// If the name is none of `quick_gelu`, `gelu`, `gelu_pytorch_tanh`, `gelu_new`, `silu`.
    pub fn from_config(name: &str) -> Result<Self> {
        match name {
            "quick_gelu" => Ok(Self::QuickGelu),
            "gelu" => Ok(Self::Gelu),
            "gelu_pytorch_tanh" | "gelu_new" => Ok(Self::GeluTanh),
            "silu" => Ok(Self::Silu),
            other => {
                let known = "quick_gelu, gelu, gelu_pytorch_tanh, gelu_new or silu";
                Err(Error::argument("hidden_act", known, other))
            }
        }
    }

    /// The form that one pass over memory computes.
    fn gate(self) -> Option<Gate> {
        match self {
            Self::QuickGelu => Some(Gate::QuickGelu),
            Self::GeluTanh => Some(Gate::GeluTanh),
            Self::Silu => Some(Gate::Silu),
            Self::Gelu => None,
        }
    }

    /// Elementwise, any shape.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        if let Some(gate) = self.gate().filter(|_| fused::applies(x)) {
            return fused::gate(x, gate);
        }
        Ok(match self {
            Self::QuickGelu => (x * candle_nn::ops::sigmoid(&(x * QUICK)?)?)?,
            Self::Gelu => x.gelu_erf()?,
            Self::GeluTanh => x.gelu()?,
            Self::Silu => (x * candle_nn::ops::sigmoid(x)?)?,
        })
    }

    /// The gradient at the output to that at the input `x`, of the same shape.
    pub fn vjp(self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        if let Some(gate) = self.gate().filter(|_| fused::applies(x) && fused::applies(gradient)) {
            return fused::gate_vjp(x, gradient, gate);
        }
        Ok((gradient * self.derivative(x)?)?)
    }

    fn derivative(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            // s + 1.702 x s (1 - s), s = sigmoid(1.702 x)
            Self::QuickGelu => {
                let s = candle_nn::ops::sigmoid(&(x * QUICK)?)?;
                let slope = ((x * QUICK)? * (1.0 - &s)?)?;
                (&s * (slope + 1.0)?)?
            }
            // Phi(x) + x phi(x)
            Self::Gelu => {
                let phi = ((x.sqr()? * -0.5)?.exp()? * (1.0 / (2.0 * std::f64::consts::PI).sqrt()))?;
                let cumulative = (((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
                (cumulative + (x * phi)?)?
            }
            // (1 + t) / 2 + x (1 - t^2) c (1 + 3 k x^2) / 2, t = tanh(c (x + k x^3))
            Self::GeluTanh => {
                let square = x.sqr()?;
                let t = ((x * ((&square * TANH_CUBIC)? + 1.0)?)? * TANH_SCALE)?.tanh()?;
                let inner = (((square * (3.0 * TANH_CUBIC))? + 1.0)? * (0.5 * TANH_SCALE))?;
                let slope = ((x * (1.0 - t.sqr()?)?)? * inner)?;
                (((t + 1.0)? * 0.5)? + slope)?
            }
            // s + x s (1 - s), s = sigmoid(x)
            Self::Silu => {
                let s = candle_nn::ops::sigmoid(x)?;
                let slope = (x * (1.0 - &s)?)?;
                (&s * (slope + 1.0)?)?
            }
        })
    }
}
