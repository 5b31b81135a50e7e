//! A pre-norm transformer (CLIP's: layer norms with bias, quick_gelu) whose weights learn, with its
//! backward pass by hand on plain buffers.
//!
//! Three quarters of the time of the same model on candle's automatic differentiation went into
//! fresh memory and into passes that copy or add; here buffers are kept from step to step, a chunk
//! of a few pictures stays in the cache through a block, and gradients are added by the products
//! themselves.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;

use super::parameters::{Gradients, Parameters};
use crate::Result;
use crate::tower::layers::fused::{self, Gate};

/// Added to the variance in every norm.
pub const EPS: f32 = 1e-5;

/// The sizes of a transformer.
#[derive(Debug, Clone, Copy)]
pub struct Stack {
    /// Width of the residual stream, D.
    pub width: usize,
    /// Width of the MLP, F.
    pub inner: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// Attention heads per block.
    pub heads: usize,
}

/// A matrix within a buffer: where it begins, and the steps from row to row and column to column.
#[derive(Clone, Copy)]
struct View {
    start: usize,
    row: usize,
    column: usize,
}

impl View {
    fn rows(width: usize) -> Self {
        Self { start: 0, row: width, column: 1 }
    }
    fn at(start: usize, row: usize) -> Self {
        Self { start, row, column: 1 }
    }
    fn t(self) -> Self {
        Self { row: self.column, column: self.row, ..self }
    }
    fn last(self, rows: usize, columns: usize) -> usize {
        self.start + (rows - 1) * self.row + (columns - 1) * self.column
    }
}

/// `out = a b` or `out += a b`, with `a` `(m, k)` and `b` `(k, n)`.
#[allow(clippy::too_many_arguments)]
fn product(
    out: &mut [f32],
    o: View,
    a: &[f32],
    va: View,
    b: &[f32],
    vb: View,
    (m, n, k): (usize, usize, usize),
    add: bool,
) {
    assert!(m > 0 && n > 0 && k > 0);
    assert!(o.last(m, n) < out.len() && va.last(m, k) < a.len() && vb.last(k, n) < b.len());
    let step = |n: usize| n as isize;
    // Safety: every element of the three matrices lies in its slice, as asserted, and `out` is
    // borrowed mutably, so it overlaps neither of the others.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr().add(o.start),
            step(o.column),
            step(o.row),
            add,
            a.as_ptr().add(va.start),
            step(va.column),
            step(va.row),
            b.as_ptr().add(vb.start),
            step(vb.column),
            step(vb.row),
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `out = x W^T + b`: `x` `(rows, i)`, W `(o, i)`.
pub fn affine(
    out: &mut [f32],
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    rows: usize,
    i: usize,
    o: usize,
) {
    product(out, View::rows(o), x, View::rows(i), weight, View::rows(i).t(), (rows, o, i), false);
    if let Some(bias) = bias {
        out.chunks_exact_mut(o).for_each(|row| fused::bias_row(row, bias));
    }
}

/// `weight += g^T x` and `bias += sum of rows of g`.
pub fn affine_weights(
    weight: &mut [f32],
    bias: Option<&mut [f32]>,
    g: &[f32],
    x: &[f32],
    rows: usize,
    i: usize,
    o: usize,
) {
    product(weight, View::rows(i), g, View::rows(o).t(), x, View::rows(i), (o, i, rows), true);
    if let Some(bias) = bias {
        g.chunks_exact(o).for_each(|row| fused::bias_row(bias, row));
    }
}

/// Each row of `x` normalised.
pub fn norm(out: &mut [f32], x: &[f32], weight: &[f32], bias: &[f32]) {
    let rows = out.chunks_exact_mut(weight.len()).zip(x.chunks_exact(weight.len()));
    rows.for_each(|(out, x)| fused::norm_row(out, x, weight, bias, EPS));
}

/// `out` becomes the gradient at the norm's input; those of its weights are added.
pub fn norm_back(out: &mut [f32], x: &[f32], g: &[f32], weight: &[f32], dw: &mut [f32], db: &mut [f32]) {
    let d = weight.len();
    for ((out, x), g) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(g.chunks_exact(d)) {
        fused::norm_weights_row(dw, db, x, g, EPS);
        fused::norm_vjp_row(out, x, g, weight, EPS);
    }
}

/// The 16 weights of a block, in this order everywhere.
const PARTS: [&str; 16] = [
    "layer_norm1.weight",
    "layer_norm1.bias",
    "self_attn.q_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.weight",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.weight",
    "self_attn.v_proj.bias",
    "self_attn.out_proj.weight",
    "self_attn.out_proj.bias",
    "layer_norm2.weight",
    "layer_norm2.bias",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
    "mlp.fc2.bias",
];

/// Adds the blocks' weights, drawn as in transformers' `CLIPPreTrainedModel._init_weights`.
pub fn initialise(p: &mut Parameters, prefix: &str, stack: Stack) {
    let (d, f) = (stack.width, stack.inner);
    let width = (d as f64).powf(-0.5);
    let deep = (2.0 * stack.blocks as f64).powf(-0.5);
    for i in 0..stack.blocks {
        for part in PARTS {
            let name = format!("{prefix}.encoder.layers.{i}.{part}");
            match part {
                "layer_norm1.weight" | "layer_norm2.weight" => p.constant(&name, 1.0, &[d]),
                "mlp.fc1.weight" => p.normal(&name, width * 0.5f64.sqrt(), &[f, d]),
                "mlp.fc1.bias" => p.constant(&name, 0.0, &[f]),
                "mlp.fc2.weight" => p.normal(&name, width * deep, &[d, f]),
                "self_attn.out_proj.weight" => p.normal(&name, width * deep, &[d, d]),
                part if part.ends_with("bias") => p.constant(&name, 0.0, &[d]),
                _ => p.normal(&name, width, &[d, d]),
            }
        }
    }
}

/// A transformer over some of the weights of [`Parameters`].
pub struct Transformer<'a> {
    stack: Stack,
    causal: bool,
    /// Per block, the places of its weights, and the weights.
    blocks: Vec<([usize; 16], [&'a [f32]; 16])>,
}

/// What a backward pass needs of a forward pass over `(B, N, D)`.
pub struct Tape {
    batch: usize,
    tokens: usize,
    /// Pictures per chunk.
    chunk: usize,
    values: Vec<f32>,
    /// Per block and picture the factors of attention and MLP.
    kept: Vec<[f32; 2]>,
}

/// Pictures worth of rows that a chunk has about.
const CHUNK_ROWS: usize = 260;

impl<'a> Transformer<'a> {
    /// Over the weights `prefix.encoder.layers.*`.
    ///
    /// # Errors
    /// If one is missing.
    pub fn new(p: &'a Parameters, prefix: &str, stack: Stack, causal: bool) -> Result<Self> {
        let block = |i: usize| {
            let mut places = [0; 16];
            let mut weights: [&[f32]; 16] = [&[]; 16];
            for (slot, part) in PARTS.iter().enumerate() {
                places[slot] = p.place(&format!("{prefix}.encoder.layers.{i}.{part}"))?;
                weights[slot] = p.values(places[slot]);
            }
            Ok((places, weights))
        };
        Ok(Self { stack, causal, blocks: (0..stack.blocks).map(block).collect::<Result<_>>()? })
    }

    /// Numbers kept per block for `pictures`: the block's input, q, k, v, context and the stream
    /// between attention and MLP, the MLP's inner layer, the probabilities.
    fn kept(&self, pictures: usize, tokens: usize) -> usize {
        pictures * tokens * (6 * self.stack.width + self.stack.inner + self.stack.heads * tokens)
    }

    /// Runs the blocks over `x` `(B N, D)` in place. Where `drop` gives a chance, whole branches
    /// are left out per picture. `spare` is a buffer to use again.
    pub fn forward(
        &self,
        x: &mut [f32],
        batch: usize,
        drop: Option<(f64, &mut ChaCha8Rng)>,
        spare: Vec<f32>,
    ) -> Tape {
        let Stack { width: d, inner: f, heads, blocks } = self.stack;
        let tokens = x.len() / d / batch;
        let chunk = (CHUNK_ROWS / tokens).max(1);
        let mut kept = vec![[1.0; 2]; blocks * batch];
        if let Some((chance, rng)) = drop {
            for factor in kept.iter_mut().flatten() {
                let left = f64::from(rng.next_u32()) / 4_294_967_296.0 < chance;
                *factor = if left { 0.0 } else { (1.0 / (1.0 - chance)) as f32 };
            }
        }
        let mut values = spare;
        values.resize(blocks * self.kept(batch, tokens), 0.0);
        let (mut h, mut act) = (vec![0f32; chunk * tokens * d], vec![0f32; chunk * tokens * f]);
        let scale = ((d / heads) as f32).powf(-0.5);
        let mut rest = &mut values[..];
        for (c, x) in x.chunks_mut(chunk * tokens * d).enumerate() {
            let rows = x.len() / d;
            let pictures = rows / tokens;
            let (h, act) = (&mut h[..rows * d], &mut act[..rows * f]);
            for (b, (_, w)) in self.blocks.iter().enumerate() {
                let (mine, after) = rest.split_at_mut(self.kept(pictures, tokens));
                rest = after;
                let [input, q, k, v, context, middle, up, p] = parts(mine, rows, d, f);
                input.copy_from_slice(x);
                norm(h, x, w[0], w[1]);
                affine(q, h, w[2], Some(w[3]), rows, d, d);
                affine(k, h, w[4], Some(w[5]), rows, d, d);
                affine(v, h, w[6], Some(w[7]), rows, d, d);
                let side = d / heads;
                for (head, p) in p.chunks_exact_mut(tokens * tokens).enumerate() {
                    let at = View::at(head / heads * tokens * d + head % heads * side, d);
                    product(p, View::rows(tokens), q, at, k, at.t(), (tokens, tokens, side), false);
                    for (i, row) in p.chunks_exact_mut(tokens).enumerate() {
                        let (seen, hidden) = row.split_at_mut(if self.causal { i + 1 } else { tokens });
                        seen.iter_mut().for_each(|s| *s *= scale);
                        fused::softmax_row(seen);
                        hidden.fill(0.0);
                    }
                    product(context, at, p, View::rows(tokens), v, at, (tokens, side, tokens), false);
                }
                affine(h, context, w[8], Some(w[9]), rows, d, d);
                let factor = |row: usize, branch: usize| kept[b * batch + c * chunk + row][branch];
                for (i, (x, h)) in x.chunks_exact_mut(tokens * d).zip(h.chunks_exact(tokens * d)).enumerate()
                {
                    fused::add_scaled(x, h, factor(i, 0));
                }
                middle.copy_from_slice(x);
                norm(h, x, w[10], w[11]);
                affine(up, h, w[12], Some(w[13]), rows, d, f);
                fused::gate_chunk(act, up, Gate::QuickGelu);
                affine(h, act, w[14], Some(w[15]), rows, f, d);
                for (i, (x, h)) in x.chunks_exact_mut(tokens * d).zip(h.chunks_exact(tokens * d)).enumerate()
                {
                    fused::add_scaled(x, h, factor(i, 1));
                }
            }
        }
        Tape { batch, tokens, chunk, values, kept }
    }

    /// Takes the gradient `g` `(B N, D)` at the output to that at the input, in place, and adds the
    /// weights' gradients. Returns the tape's buffer for the next forward pass.
    pub fn backward(&self, tape: Tape, g: &mut [f32], gradients: &mut Gradients) -> Vec<f32> {
        let Stack { width: d, inner: f, heads, blocks } = self.stack;
        let Tape { batch, tokens, chunk, mut values, kept } = tape;
        let most = chunk * tokens;
        let mut h = vec![0f32; most * d];
        let mut branch = vec![0f32; most * d];
        let mut dh = vec![0f32; most * d];
        let (mut dq, mut dk, mut dv) = (vec![0f32; most * d], vec![0f32; most * d], vec![0f32; most * d]);
        let (mut act, mut dact) = (vec![0f32; most * f], vec![0f32; most * f]);
        let mut ds = vec![0f32; tokens * tokens];
        let scale = ((d / heads) as f32).powf(-0.5);
        let mut rest = &mut values[..];
        for (c, g) in g.chunks_mut(most * d).enumerate() {
            let rows = g.len() / d;
            let pictures = rows / tokens;
            let (chunk_values, after) = rest.split_at_mut(blocks * self.kept(pictures, tokens));
            rest = after;
            let (h, branch, dh) = (&mut h[..rows * d], &mut branch[..rows * d], &mut dh[..rows * d]);
            let (dq, dk, dv) = (&mut dq[..rows * d], &mut dk[..rows * d], &mut dv[..rows * d]);
            let (act, dact) = (&mut act[..rows * f], &mut dact[..rows * f]);
            for (b, mine) in chunk_values.chunks_exact_mut(self.kept(pictures, tokens)).enumerate().rev() {
                let (at, w) = &self.blocks[b];
                let [input, q, k, v, context, middle, up, p] = parts(mine, rows, d, f);
                let scaled = |out: &mut [f32], g: &[f32], which: usize| {
                    for (i, (out, g)) in
                        out.chunks_exact_mut(tokens * d).zip(g.chunks_exact(tokens * d)).enumerate()
                    {
                        let factor = kept[b * batch + c * chunk + i][which];
                        out.iter_mut().zip(g).for_each(|(o, g)| *o = factor * g);
                    }
                };
                // The MLP.
                scaled(branch, g, 1);
                fused::gate_chunk(act, up, Gate::QuickGelu);
                with_two(gradients, at[14], at[15], |w, b| {
                    affine_weights(w, Some(b), branch, act, rows, f, d)
                });
                product(act, View::rows(f), branch, View::rows(d), w[14], View::rows(f), (rows, f, d), false);
                fused::gate_vjp_chunk(dact, up, act, Gate::QuickGelu);
                norm(h, middle, w[10], w[11]);
                with_two(gradients, at[12], at[13], |w, b| affine_weights(w, Some(b), dact, h, rows, d, f));
                product(h, View::rows(d), dact, View::rows(f), w[12], View::rows(d), (rows, d, f), false);
                with_two(gradients, at[10], at[11], |dw, db| norm_back(dh, middle, h, w[10], dw, db));
                fused::bias_row(g, dh);
                // Attention.
                scaled(branch, g, 0);
                with_two(gradients, at[8], at[9], |w, b| {
                    affine_weights(w, Some(b), branch, context, rows, d, d)
                });
                product(h, View::rows(d), branch, View::rows(d), w[8], View::rows(d), (rows, d, d), false);
                let side = d / heads;
                for (head, p) in p.chunks_exact(tokens * tokens).enumerate() {
                    let (all, at) =
                        (View::rows(tokens), View::at(head / heads * tokens * d + head % heads * side, d));
                    product(dv, at, p, all.t(), h, at, (tokens, side, tokens), false);
                    product(&mut ds, all, h, at, v, at.t(), (tokens, tokens, side), false);
                    for (ds, p) in ds.chunks_exact_mut(tokens).zip(p.chunks_exact(tokens)) {
                        fused::softmax_vjp_row(ds, p);
                        ds.iter_mut().for_each(|s| *s *= scale);
                    }
                    product(dq, at, &ds, all, k, at, (tokens, side, tokens), false);
                    product(dk, at, &ds, all.t(), q, at, (tokens, side, tokens), false);
                }
                norm(branch, input, w[0], w[1]);
                for (slot, dx) in [(2, &*dq), (4, &*dk), (6, &*dv)] {
                    with_two(gradients, at[slot], at[slot + 1], |w, b| {
                        affine_weights(w, Some(b), dx, branch, rows, d, d)
                    });
                    product(
                        h,
                        View::rows(d),
                        dx,
                        View::rows(d),
                        w[slot],
                        View::rows(d),
                        (rows, d, d),
                        slot != 2,
                    );
                }
                with_two(gradients, at[0], at[1], |dw, db| norm_back(dh, input, h, w[0], dw, db));
                fused::bias_row(g, dh);
            }
        }
        values
    }
}

/// A block's kept numbers by kind.
fn parts(mine: &mut [f32], rows: usize, d: usize, f: usize) -> [&mut [f32]; 8] {
    let mut rest = mine;
    let mut take = |n: usize| {
        let (a, b) = std::mem::take(&mut rest).split_at_mut(n);
        rest = b;
        a
    };
    let [a, b, c, e, g, h] = std::array::from_fn(|_| take(rows * d));
    let up = take(rows * f);
    let left = std::mem::take(&mut rest);
    [a, b, c, e, g, h, up, left]
}

/// Two gradients at once; `first` comes before `second`.
pub fn with_two(
    gradients: &mut Gradients,
    first: usize,
    second: usize,
    f: impl FnOnce(&mut [f32], &mut [f32]),
) {
    let (a, b) = gradients.split_at_mut(second);
    f(&mut a[first], &mut b[0]);
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};
    use rand_chacha::rand_core::SeedableRng;

    use super::super::autograd::{attend, join_heads, layer_norm, linear, mask, split_heads};
    use super::*;

    fn gelu(x: &Tensor) -> Result<Tensor> {
        Ok((x * ((x * -1.702)?.exp()? + 1.0)?.recip()?)?)
    }

    #[test]
    fn forward_and_gradients_are_those_of_candles_differentiation() -> Result<()> {
        let stack = Stack { width: 24, inner: 40, blocks: 3, heads: 3 };
        let (batch, tokens) = (7, 65);
        for (causal, chance) in [(false, None), (true, None), (false, Some(0.4))] {
            let mut p = Parameters::new(3);
            initialise(&mut p, "m", stack);
            let x = Tensor::randn(0f32, 1f32, (batch * tokens, 24), &Device::Cpu)?;
            let g = Tensor::randn(0f32, 1f32, (batch * tokens, 24), &Device::Cpu)?;
            let (mut ours, mut back): (Vec<f32>, Vec<f32>) =
                (x.flatten_all()?.to_vec1()?, g.flatten_all()?.to_vec1()?);
            let transformer = Transformer::new(&p, "m", stack, causal)?;
            let mut rng = ChaCha8Rng::seed_from_u64(5);
            let tape = transformer.forward(&mut ours, batch, chance.map(|c| (c, &mut rng)), vec![7.0; 99]);
            let kept = tape.kept.clone();
            let mut gradients = p.zeros();
            transformer.backward(tape, &mut back, &mut gradients);

            let leaves = p.leaves(|_| true)?;
            let leaf = Var::from_tensor(&x)?;
            let mut x = leaf.as_tensor().clone();
            for i in 0..stack.blocks {
                let get = |part: &str| leaves.get(&format!("m.encoder.layers.{i}.{part}"));
                let layer = |x: &Tensor, n: &str| {
                    linear(x, get(&format!("{n}.weight"))?, Some(get(&format!("{n}.bias"))?))
                };
                let factor = |which: usize| -> Result<Tensor> {
                    let all = (0..batch * tokens).map(|r| kept[i * batch + r / tokens][which]).collect();
                    Ok(Tensor::from_vec(all, (batch * tokens, 1), &Device::Cpu)?)
                };
                let h = layer_norm(&x, get("layer_norm1.weight")?, get("layer_norm1.bias")?, f64::from(EPS))?;
                let head = |n: &str| split_heads(&layer(&h, n)?, batch, stack.heads);
                let h = attend(
                    &head("self_attn.q_proj")?,
                    &head("self_attn.k_proj")?,
                    &head("self_attn.v_proj")?,
                    mask(batch, tokens, causal),
                )?;
                let h = layer(&join_heads(&h, batch)?, "self_attn.out_proj")?;
                x = (x + h.broadcast_mul(&factor(0)?)?)?;
                let h = layer_norm(&x, get("layer_norm2.weight")?, get("layer_norm2.bias")?, f64::from(EPS))?;
                let h = layer(&gelu(&layer(&h, "mlp.fc1")?)?, "mlp.fc2")?;
                x = (x + h.broadcast_mul(&factor(1)?)?)?;
            }
            let close = |what: &str, ours: &[f32], theirs: Vec<f32>| {
                let most = theirs.iter().fold(0f32, |m, v| m.max(v.abs()));
                let off = ours.iter().zip(&theirs).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                // Key biases have a gradient of exactly zero.
                assert!(off <= 3e-5 * most.max(1.0), "{what}: {off} of {most}, causal {causal}, {chance:?}");
            };
            close("output", &ours, x.flatten_all()?.to_vec1()?);
            let store = (x * g)?.sum_all()?.backward()?;
            close(
                "input",
                &back,
                store
                    .get(&leaf)
                    .map(|g| g.flatten_all())
                    .transpose()?
                    .map(|g| g.to_vec1())
                    .transpose()?
                    .unwrap_or_default(),
            );
            let mut theirs = p.zeros();
            leaves.add(&p, &store, &mut theirs)?;
            for (name, (ours, theirs)) in p.names().iter().zip(gradients.iter().zip(theirs)) {
                close(name, ours, theirs);
            }
        }
        Ok(())
    }
}
