use candle_core::{D, Tensor};

use super::{Linear, fused};
use crate::Result;

/// Multi-head self-attention with an output projection; no mask but in
/// [`Attention::forward_causal`].
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

    /// Queries (scaled), keys and values of `(B, N, D)`.
    fn project(&self, x: &Tensor) -> Result<AttentionTape> {
        let width = x.dim(D::Minus1)?;
        let q = self.split(&(self.q.forward(x)? * self.scale(width))?)?;
        let k = self.split(&self.k.forward(x)?)?;
        let v = self.split(&self.v.forward(x)?)?;
        Ok(AttentionTape { q, k, v })
    }

    /// `(B, N, D)` to `(B, N, D)`, and what the gradient needs.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, AttentionTape)> {
        let AttentionTape { q, k, v } = self.project(x)?;
        let context = by_heads(&q, |start, heads| {
            let part = |x: &Tensor| x.narrow(0, start, heads);
            Ok([probabilities(&part(&q)?, &part(&k)?)?.matmul(&part(&v)?)?])
        })?;
        let [context] = context;
        Ok((self.out.forward(&self.join(&context)?)?, AttentionTape { q, k, v }))
    }

    /// `(B, N, D)` to `(B, N, D)`, each token attending to itself and to those before it. Without a
    /// gradient: of the towers, only text encoders are causal.
    pub fn forward_causal(&self, x: &Tensor) -> Result<Tensor> {
        let AttentionTape { q, k, v } = self.project(x)?;
        let tokens = q.dim(1)?;
        let later =
            (0..tokens * tokens).map(|i| if i % tokens > i / tokens { f32::NEG_INFINITY } else { 0.0 });
        let mask = Tensor::from_iter(later, q.device())?.reshape((tokens, tokens))?.to_dtype(q.dtype())?;
        let [context] = by_heads(&q, |start, heads| {
            let part = |x: &Tensor| x.narrow(0, start, heads);
            let scores = part(&q)?.matmul(&part(&k)?.t()?)?.broadcast_add(&mask)?;
            Ok([softmax(scores)?.matmul(&part(&v)?)?])
        })?;
        self.out.forward(&self.join(&context)?)
    }

    /// The gradient at the output to that at the input, both `(B, N, D)`.
    pub fn vjp(&self, tape: &AttentionTape, gradient: &Tensor) -> Result<Tensor> {
        let width = gradient.dim(D::Minus1)?;
        let context = self.split(&self.out.vjp(gradient)?)?;
        let [q, k, v] = by_heads(&context, |start, heads| {
            let part = |x: &Tensor| x.narrow(0, start, heads);
            let (q, k, v, context) = (part(&tape.q)?, part(&tape.k)?, part(&tape.v)?, part(&context)?);
            let p = probabilities(&q, &k)?;
            let gradient_v = p.t()?.matmul(&context)?;
            // Through the softmax: P (dP - sum(dP P)).
            let scores = context.matmul(&v.t()?)?;
            let scores = if fused::applies(&scores) && fused::applies(&p) {
                fused::softmax_vjp(&scores, &p)?;
                scores
            } else {
                let weighted = (&p * scores)?;
                let along = weighted.sum_keepdim(D::Minus1)?;
                (weighted - p.broadcast_mul(&along)?)?
            };
            let gradient_q = (scores.matmul(&k)? * self.scale(width))?;
            Ok([gradient_q, scores.t()?.matmul(&q)?, gradient_v])
        })?;
        let gradient = self.q.vjp(&self.join(&q)?)?;
        let gradient = (gradient + self.k.vjp(&self.join(&k)?)?)?;
        Ok((gradient + self.v.vjp(&self.join(&v)?)?)?)
    }
}

/// softmax(q k^T), `(B h, N, N)`.
fn probabilities(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    softmax(q.matmul(&k.t()?)?)
}

/// softmax over the last dimension of `scores`, which must be nobody else's.
fn softmax(scores: Tensor) -> Result<Tensor> {
    if fused::applies(&scores) {
        fused::softmax(&scores)?;
        return Ok(scores);
    }
    // Without a backward of candle's; `vjp` does not need one.
    Ok(candle_nn::ops::softmax_last_dim(&scores)?)
}

/// Scores held at once on a CPU, 4 MiB of f32: what fits its caches, and what its allocator keeps
/// instead of asking the system for fresh pages each time.
const SCORES: usize = 1 << 20;

/// Runs `f(start, heads)` over the rows of `x`, `(B h, N, D / h)`, as many heads at a time as
/// suits the device, and puts the results together again.
fn by_heads<const K: usize>(
    x: &Tensor,
    f: impl Fn(usize, usize) -> Result<[Tensor; K]>,
) -> Result<[Tensor; K]> {
    let (rows, tokens, _) = x.dims3()?;
    let group = if x.device().is_cpu() { (SCORES / (tokens * tokens).max(1)).max(1) } else { rows };
    if group >= rows {
        return f(0, rows);
    }
    let parts = (0..rows)
        .step_by(group)
        .map(|start| f(start, group.min(rows - start)))
        .collect::<Result<Vec<_>>>()?;
    let mut whole = parts[0].clone();
    for (i, slot) in whole.iter_mut().enumerate() {
        let column: Vec<&Tensor> = parts.iter().map(|part| &part[i]).collect();
        *slot = Tensor::cat(&column, 0)?;
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn heads_in_groups_give_the_same_bits_as_all_at_once() -> Result<()> {
        // Six heads of 400 tokens at a time, and one left over.
        let random = || Tensor::randn(0f32, 1f32, (7, 400, 8), &Device::Cpu);
        let (q, k, v) = (random()?, random()?, random()?);
        let attend = |start: usize, heads: usize| {
            let part = |x: &Tensor| x.narrow(0, start, heads);
            let p = probabilities(&part(&q)?, &part(&k)?)?;
            Ok([p.matmul(&part(&v)?)?, p.t()?.matmul(&part(&q)?)?])
        };
        let (grouped, whole) = (by_heads(&q, attend)?, attend(0, 7)?);
        for (a, b) in grouped.iter().zip(&whole) {
            assert_eq!(a.to_vec3::<f32>()?, b.to_vec3::<f32>()?);
        }
        Ok(())
    }
}
