use candle_core::{D, Tensor};

use super::Linear;
use crate::Result;

/// Multi-head self-attention with an output projection, no mask.
#[derive(Debug, Clone)]
pub struct Attention {
    /// The query projection.
    pub q: Linear,
    /// The key projection.
    pub k: Linear,
    /// The value projection.
    pub v: Linear,
    /// The output projection.
    pub out: Linear,
    /// Number of heads.
    pub heads: usize,
}

/// What [`Attention::vjp`] needs: queries (scaled), keys and values, each `(B h, N, D / h)`.
/// The probabilities are computed again instead of being kept.
#[derive(Debug, Clone)]
pub struct AttentionTape {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Attention {
    fn scale(&self, width: usize) -> f64 {
        ((width / self.heads) as f64).powf(-0.5)
    }

    /// `(B, N, D)` to `(B h, N, D / h)`.
    fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let head = width / self.heads;
        let x = x.reshape((batch, tokens, self.heads, head))?.transpose(1, 2)?;
        Ok(x.contiguous()?.reshape((batch * self.heads, tokens, head))?)
    }

    /// `(B h, N, D / h)` to `(B, N, D)`.
    fn join(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, tokens, head) = x.dims3()?;
        let batch = rows / self.heads;
        let x = x.reshape((batch, self.heads, tokens, head))?.transpose(1, 2)?;
        Ok(x.reshape((batch, tokens, self.heads * head))?)
    }

    /// `(B, N, D)` to `(B, N, D)`, and what the gradient needs.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, AttentionTape)> {
        let width = x.dim(D::Minus1)?;
        let q = self.split(&(self.q.forward(x)? * self.scale(width))?)?;
        let k = self.split(&self.k.forward(x)?)?;
        let v = self.split(&self.v.forward(x)?)?;
        let context = probabilities(&q, &k)?.matmul(&v)?;
        Ok((self.out.forward(&self.join(&context)?)?, AttentionTape { q, k, v }))
    }

    /// The gradient at the output to that at the input, both `(B, N, D)`.
    pub fn vjp(&self, tape: &AttentionTape, gradient: &Tensor) -> Result<Tensor> {
        let width = gradient.dim(D::Minus1)?;
        let context = self.split(&self.out.vjp(gradient)?)?;
        let p = probabilities(&tape.q, &tape.k)?;
        let v = p.t()?.matmul(&context)?;
        // Through the softmax: P (dP - sum(dP P)).
        let dp = context.matmul(&tape.v.t()?)?;
        let weighted = (&p * &dp)?;
        let along = weighted.sum_keepdim(D::Minus1)?;
        let scores = (weighted - p.broadcast_mul(&along)?)?;
        let q = (scores.matmul(&tape.k)? * self.scale(width))?;
        let k = scores.t()?.matmul(&tape.q)?;
        let gradient = self.q.vjp(&self.join(&q)?)?;
        let gradient = (gradient + self.k.vjp(&self.join(&k)?)?)?;
        Ok((gradient + self.v.vjp(&self.join(&v)?)?)?)
    }
}

/// softmax(q k^T), `(B h, N, N)`.
fn probabilities(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    // Fused, without a backward of candle's; `vjp` does not need one.
    Ok(candle_nn::ops::softmax_last_dim(&q.matmul(&k.t()?)?)?)
}
