use candle_core::{D, DType, Device, Tensor};

use super::{Linear, Rotary, fused, on_host};
use crate::{Error, Result};

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

/// Where the tokens are, and which of them attend to which.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// What turns queries and keys.
    pub rotary: Option<Rotary>,
    /// Windows within which tokens attend; all to all where there are none.
    pub windows: Option<Windows>,
}

/// A partition of the tokens into windows.
#[derive(Debug, Clone)]
pub struct Windows {
    /// `(N,)` u32: the tokens, window by window, those of one size together.
    order: Tensor,
    /// `(N,)` u32: where each token is in `order`.
    back: Tensor,
    /// Number of windows and their tokens, as they follow in `order`.
    runs: Vec<(usize, usize)>,
}

impl Windows {
    /// From each window's tokens; together they are all tokens, each once.
    ///
    /// # Errors
    /// If the device fails.
    pub fn new(mut windows: Vec<Vec<u32>>, device: &Device) -> Result<Self> {
        windows.retain(|window| !window.is_empty());
        windows.sort_by_key(|window| std::cmp::Reverse(window.len()));
        let runs = windows.chunk_by(|a, b| a.len() == b.len()).map(|run| (run.len(), run[0].len())).collect();
        let order: Vec<u32> = windows.into_iter().flatten().collect();
        let mut back = vec![0u32; order.len()];
        for (place, token) in order.iter().enumerate() {
            back[*token as usize] = place as u32;
        }
        let n = order.len();
        Ok(Self {
            order: Tensor::from_vec(order, n, device)?,
            back: Tensor::from_vec(back, n, device)?,
            runs,
        })
    }

    /// Runs `f` on each run of windows of the `(R, N, d)` tensors in `order`, as `(R windows, n, d)`,
    /// and puts its results, of that shape, together as `(R, N, d)`.
    fn within<const J: usize, const K: usize>(
        &self,
        tensors: [&Tensor; J],
        f: impl Fn([Tensor; J]) -> Result<[Tensor; K]>,
    ) -> Result<[Tensor; K]> {
        let rows = tensors[0].dim(0)?;
        let mut parts: [Vec<Tensor>; K] = std::array::from_fn(|_| Vec::with_capacity(self.runs.len()));
        let mut start = 0;
        for &(windows, tokens) in &self.runs {
            let part = |x: &Tensor| -> Result<Tensor> {
                let width = x.dim(2)?;
                let run = x.narrow(1, start, windows * tokens)?.contiguous()?;
                Ok(run.reshape((rows * windows, tokens, width))?)
            };
            let mut taken = tensors.map(Tensor::clone);
            for slot in &mut taken {
                *slot = part(slot)?;
            }
            for (whole, found) in parts.iter_mut().zip(f(taken)?) {
                let width = found.dim(2)?;
                whole.push(found.reshape((rows, windows * tokens, width))?);
            }
            start += windows * tokens;
        }
        let whole = parts.iter().map(|part| Ok(Tensor::cat(part, 1)?)).collect::<Result<Vec<_>>>()?;
        whole.try_into().map_err(|_| Error::Unsupported("windows lost a part".into()))
    }
}

/// What [`Attention::vjp`] needs: queries (scaled), keys and values, each `(B h, N, D / h)`, turned
/// and in the order of the windows where there are such.
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
        let tape = self.project(x)?;
        let context = attend(&tape)?;
        Ok((self.out.forward(&self.join(&context)?)?, tape))
    }

    /// The same with tokens at `places`.
    pub fn forward_at(&self, x: &Tensor, places: &Places) -> Result<(Tensor, AttentionTape)> {
        let mut tape = self.project(x)?;
        if let Some(rotary) = &places.rotary {
            (tape.q, tape.k) = (rotary.forward(tape.q)?, rotary.forward(tape.k)?);
        }
        let context = match &places.windows {
            None => attend(&tape)?,
            Some(windows) => {
                for slot in [&mut tape.q, &mut tape.k, &mut tape.v] {
                    *slot = slot.index_select(&windows.order, 1)?;
                }
                let [context] = windows.within([&tape.q, &tape.k, &tape.v], |[q, k, v]| {
                    Ok([attend(&AttentionTape { q, k, v })?])
                })?;
                context.index_select(&windows.back, 1)?
            }
        };
        Ok((self.out.forward(&self.join(&context)?)?, tape))
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
        let context = self.split(&self.out.vjp(gradient)?)?;
        let [q, k, v] = attend_vjp(tape, &context)?;
        self.project_vjp(q, &k, &v)
    }

    /// The same of [`Attention::forward_at`].
    pub fn vjp_at(&self, tape: &AttentionTape, gradient: &Tensor, places: &Places) -> Result<Tensor> {
        let context = self.split(&self.out.vjp(gradient)?)?;
        let [mut q, mut k, v] = match &places.windows {
            None => attend_vjp(tape, &context)?,
            Some(windows) => {
                let context = context.index_select(&windows.order, 1)?;
                let all = [&tape.q, &tape.k, &tape.v, &context];
                let found = windows
                    .within(all, |[q, k, v, context]| attend_vjp(&AttentionTape { q, k, v }, &context))?;
                let [q, k, v] = &found;
                let back = |x: &Tensor| x.index_select(&windows.back, 1);
                [back(q)?, back(k)?, back(v)?]
            }
        };
        if let Some(rotary) = &places.rotary {
            (q, k) = (rotary.vjp(q)?, rotary.vjp(k)?);
        }
        self.project_vjp(q, &k, &v)
    }

    /// softmax(V V^T / sqrt(D / h)) V by heads of values `(B, N, D)`: attention with the values as
    /// queries and keys too, before the output projection. The tape is for
    /// [`Attention::self_values_vjp`] alone.
    pub fn self_values(&self, values: &Tensor) -> Result<(Tensor, AttentionTape)> {
        let scale = self.scale(values.dim(D::Minus1)?);
        let v = self.split(values)?;
        let tape = AttentionTape { q: (&v * scale)?, k: v.clone(), v };
        Ok((self.join(&attend(&tape)?)?, tape))
    }

    /// The gradient at [`Attention::self_values`]' result to that at the values, both `(B, N, D)`.
    pub fn self_values_vjp(&self, tape: &AttentionTape, gradient: &Tensor) -> Result<Tensor> {
        let scale = self.scale(gradient.dim(D::Minus1)?);
        let [q, k, v] = attend_vjp(tape, &self.split(gradient)?)?;
        self.join(&(((q * scale)? + k)? + v)?)
    }

    /// softmax(K K^T / sqrt(D / h)) of the keys of `(B, N, D)`: `(B h, N, N)`, rows that sum to 1.
    pub fn key_affinity(&self, x: &Tensor) -> Result<Tensor> {
        let k = self.split(&self.k.forward(x)?)?;
        probabilities(&(&k * self.scale(x.dim(D::Minus1)?))?, &k)
    }

    /// softmax(Q K^T / sqrt(D / h)) of `(B, N, D)`, what each token attends to: `(B h, N, N)`, rows
    /// that sum to 1, a picture's heads one after the other.
    pub fn weights(&self, x: &Tensor) -> Result<Tensor> {
        let AttentionTape { q, k, .. } = self.project(x)?;
        probabilities(&q, &k)
    }

    /// What each head adds to the output of [`Attention::forward`], for `(B, N, D)`: as many
    /// `(B, N, D)` as heads, whose sum with the output projection's bias is the output.
    pub fn by_head(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let tape = self.project(x)?;
        let context = self.join(&attend(&tape)?)?;
        let width = context.dim(D::Minus1)? / self.heads;
        let part = |head: usize| {
            let own = context.narrow(D::Minus1, head * width, width)?.contiguous()?;
            let weight = self.out.weight().narrow(1, head * width, width)?.contiguous()?;
            Linear::new(weight, None).forward(&own)
        };
        (0..self.heads).map(part).collect()
    }

    /// `(B h, N, N)` weights times values `(B, N, D)`, by heads: `(B, N, D)`.
    pub fn spread(&self, weights: &Tensor, values: &Tensor) -> Result<Tensor> {
        self.join(&weights.matmul(&self.split(values)?)?)
    }

    /// The gradients at queries (scaled), keys and values, each `(B h, N, D / h)`, to that at the
    /// input `(B, N, D)`.
    fn project_vjp(&self, q: Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let width = q.dim(2)? * self.heads;
        let gradient = self.q.vjp(&self.join(&(q * self.scale(width))?)?)?;
        let gradient = (gradient + self.k.vjp(&self.join(k)?)?)?;
        Ok((gradient + self.v.vjp(&self.join(v)?)?)?)
    }
}

/// softmax(q k^T) v, `(R, N, d)`.
fn attend(tape: &AttentionTape) -> Result<Tensor> {
    let [context] = by_heads(&tape.q, |start, heads| {
        let part = |x: &Tensor| x.narrow(0, start, heads);
        Ok([probabilities(&part(&tape.q)?, &part(&tape.k)?)?.matmul(&part(&tape.v)?)?])
    })?;
    Ok(context)
}

/// The gradient at [`attend`]'s result to those at queries, keys and values, each `(R, N, d)`.
fn attend_vjp(tape: &AttentionTape, context: &Tensor) -> Result<[Tensor; 3]> {
    by_heads(context, |start, heads| {
        let part = |x: &Tensor| x.narrow(0, start, heads);
        let (q, k, v, context) = (part(&tape.q)?, part(&tape.k)?, part(&tape.v)?, part(context)?);
        let p = probabilities(&q, &k)?;
        let gradient_v = p.t()?.matmul(&context)?;
        // Through the softmax: P (dP - sum(dP P)).
        let scores = context.matmul(&v.t()?)?;
        let scores = if fused::applies(&scores) && fused::applies(&p) {
            fused::softmax_vjp(&scores, &p)?;
            scores
        } else {
            // The sums of dP P along the keys are those of dO O along the channels, which are far
            // fewer; candle would sum half precision in half precision, so they are taken in f32.
            let (own, context) = (p.matmul(&v)?.to_dtype(DType::F32)?, context.to_dtype(DType::F32)?);
            let along = (own * context)?.sum_keepdim(D::Minus1)?.to_dtype(p.dtype())?;
            (&p * scores.broadcast_sub(&along)?)?
        };
        Ok([scores.matmul(&k)?, scores.t()?.matmul(&q)?, gradient_v])
    })
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

/// Scores held at once elsewhere, 1 GiB of f32: a picture of some thousand tokens would fill a
/// device with them. candle's kernels number a tensor's entries with 32 bits, so a head's alone
/// must not be more than [`i32::MAX`].
const DEVICE_SCORES: usize = 1 << 28;

/// Runs `f(start, heads)` over the rows of `x`, `(B h, N, D / h)`, as many heads at a time as
/// suits the device, and puts the results together again.
fn by_heads<const K: usize>(
    x: &Tensor,
    f: impl Fn(usize, usize) -> Result<[Tensor; K]>,
) -> Result<[Tensor; K]> {
    let (rows, tokens, _) = x.dims3()?;
    let of_a_head = (tokens * tokens).max(1);
    let host = on_host(x.device());
    if !host && of_a_head > i32::MAX as usize {
        let expected = format!("at most {} that attend to each other, on this device", i32::MAX.isqrt());
        return Err(Error::argument("patches of a picture", expected, tokens));
    }
    let group = (if host { SCORES } else { DEVICE_SCORES } / of_a_head).max(1);
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
