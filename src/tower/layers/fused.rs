//! Row-wise operations in one pass over memory, for contiguous f32 on a CPU.
//!
//! candle composes these from several passes, each over a fresh tensor, and its exponential is one
//! number at a time; at ViT-L's sizes that costs as much as the matrix products do. Each function
//! here says whether it applies, and its caller has the composed form for every other device.
//!
//! Sums run in a fixed number of lanes, whatever the processor, so that results have the same bits
//! on all of them.

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, InplaceOp1, InplaceOp2, Layout, Shape, Tensor,
};
use rayon::prelude::*;

use crate::Result;

type Candle<T> = candle_core::Result<T>;

/// Partial sums that a reduction runs side by side.
const LANES: usize = 16;

/// Whether these functions take `x`.
pub fn applies(x: &Tensor) -> bool {
    super::on_host(x.device()) && x.dtype() == DType::F32 && x.is_contiguous()
}

/// Compiles `$body` for AVX2 as well and picks at run time. The instructions change, the results do
/// not: products and sums stay separate.
macro_rules! vectorised {
    ($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),*) $body:block) => {
        $(#[$doc])*
        pub(crate) fn $name($($argument: $type),*) {
            #[inline(always)]
            fn body($($argument: $type),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn wide($($argument: $type),*) {
                    body($($argument),*);
                }
                if is_x86_feature_detected!("avx2") {
                    // Safety: the processor has just said that it has AVX2.
                    return unsafe { wide($($argument),*) };
                }
            }
            body($($argument),*);
        }
    };
}

/// e^x to 3e-7 relative, without branches so that it runs on several numbers at once. Below -87 it
/// stays at e^-87.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // The nearest whole power of two, by the bits that adding 1.5 * 2^23 rounds away.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let power = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    // ln 2 in two parts, the first with few enough bits that its multiples are exact.
    let r = (x - power * 0.693_359_4) + power * 2.121_944_4e-4;
    let series = 1.0
        + r * (1.0
            + r * (0.5 + r * (0.166_666_66 + r * (0.041_666_66 + r * (0.008_333_39 + r * 0.001_393_1)))));
    series * f32::from_bits(((power as i32 + 127) << 23) as u32)
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
fn sum(row: &[f32], mut f: impl FnMut(usize, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let mut chunks = row.chunks_exact(LANES);
    for (c, chunk) in chunks.by_ref().enumerate() {
        for (lane, value) in chunk.iter().enumerate() {
            lanes[lane] += f(c * LANES + lane, *value);
        }
    }
    let done = row.len() - chunks.remainder().len();
    for (i, value) in chunks.remainder().iter().enumerate() {
        lanes[i] += f(done + i, *value);
    }
    lanes.iter().sum()
}

/// A row's mean, and 1 over the root of its variance plus `eps`.
#[inline(always)]
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let scale = 1.0 / x.len() as f32;
    let mean = sum(x, |_, x| x) * scale;
    let variance = sum(x, |_, x| (x - mean) * (x - mean)) * scale;
    (mean, 1.0 / (variance + eps).sqrt())
}

vectorised! {
    /// softmax, in place.
    fn softmax_row(row: &mut [f32]) {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for chunk in row.chunks(LANES) {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane = if *value > *lane { *value } else { *lane };
            }
        }
        let most = lanes.iter().fold(f32::NEG_INFINITY, |most, lane| most.max(*lane));
        for value in row.iter_mut() {
            *value = exp(*value - most);
        }
        let scale = 1.0 / sum(row, |_, value| value);
        for value in row.iter_mut() {
            *value *= scale;
        }
    }
}

vectorised! {
    /// p (g - sum(p g)), in place of g.
    fn softmax_vjp_row(gradient: &mut [f32], p: &[f32]) {
        let along = sum(gradient, |i, g| g * p[i]);
        for (g, p) in gradient.iter_mut().zip(p) {
            *g = p * (*g - along);
        }
    }
}

vectorised! {
    /// y + b, in place of y.
    fn bias_row(row: &mut [f32], bias: &[f32]) {
        for (y, b) in row.iter_mut().zip(bias) {
            *y += b;
        }
    }
}

/// x sigmoid(p(x)), the shape that the activations of the towers share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// p(x) = 1.702 x
    QuickGelu,
    /// p(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3): since (1 + tanh u) / 2 = sigmoid(2 u), this is the
    /// tanh approximation of GELU.
    GeluTanh,
    /// p(x) = x
    Silu,
}

/// 2 sqrt(2 / pi)
const TANH_SCALE: f32 = 1.595_769;
const TANH_CUBIC: f32 = 0.044_715;

impl Gate {
    /// p(x) and its derivative.
    #[inline(always)]
    fn at(self, x: f32) -> (f32, f32) {
        match self {
            Self::QuickGelu => (1.702 * x, 1.702),
            Self::GeluTanh => {
                let square = x * x;
                let slope = TANH_SCALE * (1.0 + 3.0 * TANH_CUBIC * square);
                (TANH_SCALE * x * (1.0 + TANH_CUBIC * square), slope)
            }
            Self::Silu => (x, 1.0),
        }
    }
}

vectorised! {
    /// x s, s = sigmoid(p(x))
    fn gate_chunk(out: &mut [f32], x: &[f32], gate: Gate) {
        for (y, x) in out.iter_mut().zip(x) {
            *y = x * sigmoid(gate.at(*x).0);
        }
    }
}

vectorised! {
    /// g (s + x s (1 - s) p'(x)), s = sigmoid(p(x))
    fn gate_vjp_chunk(out: &mut [f32], x: &[f32], gradient: &[f32], gate: Gate) {
        for ((y, x), g) in out.iter_mut().zip(x).zip(gradient) {
            let (inner, slope) = gate.at(*x);
            let s = sigmoid(inner);
            *y = g * (s + slope * x * s * (1.0 - s));
        }
    }
}

vectorised! {
    /// The pairs (a, b) of a row's two halves turned: (a c - b s, b c + a s), in place. `turn` has
    /// the cosines and behind them the sines.
    fn turn_row(row: &mut [f32], turn: &[f32], sign: f32) {
        let half = row.len() / 2;
        let (first, second) = row.split_at_mut(half);
        let (cosines, sines) = turn.split_at(half);
        for (((a, b), c), s) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
            let (x, y, s) = (*a, *b, s * sign);
            *a = x * c - y * s;
            *b = y * c + x * s;
        }
    }
}

vectorised! {
    /// (x - mean) / s w + b
    fn norm_row(out: &mut [f32], x: &[f32], weight: &[f32], bias: &[f32], eps: f32) {
        let (mean, inverse) = moments(x, eps);
        for (((y, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *y = (x - mean) * inverse * w + b;
        }
    }
}

vectorised! {
    /// Adds one row's gradients of a norm's weight and bias.
    fn norm_weights_row(weight: &mut [f32], bias: &mut [f32], x: &[f32], gradient: &[f32], eps: f32) {
        let (mean, inverse) = moments(x, eps);
        for (((w, b), x), g) in weight.iter_mut().zip(bias).zip(x).zip(gradient) {
            *w += g * (x - mean) * inverse;
            *b += g;
        }
    }
}

vectorised! {
    /// x + f y, in place of x.
    fn add_scaled(x: &mut [f32], y: &[f32], factor: f32) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += factor * y;
        }
    }
}

vectorised! {
    /// (w - mean(w) - x^ mean(w x^)) / s with w = g weight, x^ = (x - mean) / s.
    fn norm_vjp_row(out: &mut [f32], x: &[f32], gradient: &[f32], weight: &[f32], eps: f32) {
        let scale = 1.0 / x.len() as f32;
        let (mean, inverse) = moments(x, eps);
        let flat = sum(gradient, |i, g| g * weight[i]) * scale;
        let along = sum(gradient, |i, g| g * weight[i] * (x[i] - mean)) * inverse * scale;
        for (((y, x), g), w) in out.iter_mut().zip(x).zip(gradient).zip(weight) {
            *y = (g * w - flat - (x - mean) * inverse * along) * inverse;
        }
    }
}

/// Rows for one task: enough numbers to be worth a thread's while.
fn rows_per_task(width: usize) -> usize {
    (1 << 14) / width.max(1) + 1
}

fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Candle<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => Err(candle_core::Error::RequiresContiguous { op: "fused row operation" }),
    }
}

fn slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Candle<&'a mut [f32]> {
    match (layout.contiguous_offsets(), storage) {
        (Some((start, end)), CpuStorage::F32(values)) => Ok(&mut values[start..end]),
        _ => Err(candle_core::Error::RequiresContiguous { op: "fused row operation" }),
    }
}

/// Slices are walked side by side and would end with the shorter one.
fn same_shape(a: &Layout, b: &Layout, op: &'static str) -> Candle<()> {
    let (lhs, rhs) = (a.shape().clone(), b.shape().clone());
    if lhs == rhs { Ok(()) } else { Err(candle_core::Error::ShapeMismatchBinaryOp { lhs, rhs, op }.bt()) }
}

/// One row of `width` numbers that goes with every row of another tensor.
fn row<'a>(storage: &'a CpuStorage, layout: &Layout, width: usize, op: &'static str) -> Candle<&'a [f32]> {
    let values = slice(storage, layout)?;
    if values.len() != width {
        let (msg, got) = (op.to_string(), layout.shape().clone());
        return Err(candle_core::Error::UnexpectedShape { msg, expected: width.into(), got }.bt());
    }
    Ok(values)
}

fn width(layout: &Layout) -> usize {
    layout.dims().last().copied().unwrap_or(1).max(1)
}

struct Softmax;

impl InplaceOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }
    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Candle<()> {
        let width = width(layout);
        let rows = slice_mut(storage, layout)?.par_chunks_mut(width);
        rows.with_min_len(rows_per_task(width)).for_each(softmax_row);
        Ok(())
    }
}

/// softmax over the last dimension, in place. `x` must be nobody else's.
pub fn softmax(x: &Tensor) -> Result<()> {
    Ok(x.inplace_op1(&Softmax)?)
}

struct SoftmaxVjp;

impl InplaceOp2 for SoftmaxVjp {
    fn name(&self) -> &'static str {
        "softmax-vjp"
    }
    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Candle<()> {
        same_shape(l1, l2, self.name())?;
        let width = width(l1);
        let rows = slice_mut(s1, l1)?.par_chunks_mut(width).zip(slice(s2, l2)?.par_chunks(width));
        rows.with_min_len(rows_per_task(width)).for_each(|(gradient, p)| softmax_vjp_row(gradient, p));
        Ok(())
    }
}

/// The gradient at probabilities `p` to that at the scores, in place of `gradient`, which must be
/// nobody else's.
pub fn softmax_vjp(gradient: &Tensor, p: &Tensor) -> Result<()> {
    Ok(gradient.inplace_op2(p, &SoftmaxVjp)?)
}

struct Bias;

impl InplaceOp2 for Bias {
    fn name(&self) -> &'static str {
        "bias"
    }
    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Candle<()> {
        let width = width(l1);
        let bias = row(s2, l2, width, self.name())?;
        let rows = slice_mut(s1, l1)?.par_chunks_mut(width);
        rows.with_min_len(rows_per_task(width)).for_each(|row| bias_row(row, bias));
        Ok(())
    }
}

/// Adds `bias` `(n,)` to every row of `x` `(..., n)`, in place. `x` must be nobody else's.
pub fn add_bias(x: &Tensor, bias: &Tensor) -> Result<()> {
    Ok(x.inplace_op2(bias, &Bias)?)
}

/// Numbers per task of an elementwise operation.
const CHUNK: usize = 1 << 14;

struct Gated(Gate);

impl CustomOp1 for Gated {
    fn name(&self) -> &'static str {
        "gate"
    }
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let x = slice(storage, layout)?;
        let mut out = vec![0f32; x.len()];
        let chunks = out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
        chunks.for_each(|(out, x)| gate_chunk(out, x, self.0));
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

/// x sigmoid(p(x)), any shape.
pub fn gate(x: &Tensor, gate: Gate) -> Result<Tensor> {
    Ok(x.apply_op1_no_bwd(&Gated(gate))?)
}

struct GatedVjp(Gate);

impl CustomOp2 for GatedVjp {
    fn name(&self) -> &'static str {
        "gate-vjp"
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        same_shape(l1, l2, self.name())?;
        let (x, gradient) = (slice(s1, l1)?, slice(s2, l2)?);
        let mut out = vec![0f32; x.len()];
        let chunks = out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(gradient.par_chunks(CHUNK));
        chunks.for_each(|((out, x), gradient)| gate_vjp_chunk(out, x, gradient, self.0));
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

/// The gradient at [`gate`]'s result to that at `x`, of the same shape.
pub fn gate_vjp(x: &Tensor, gradient: &Tensor, gate: Gate) -> Result<Tensor> {
    Ok(x.apply_op2_no_bwd(gradient, &GatedVjp(gate))?)
}

/// Turns rows by angles that repeat every `turn` rows; -1 turns them back.
struct Turn {
    sign: f32,
}

impl InplaceOp2 for Turn {
    fn name(&self) -> &'static str {
        "turn"
    }
    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Candle<()> {
        let width = width(l1);
        let (values, turns) = (slice_mut(s1, l1)?, slice(s2, l2)?);
        if l2.dims().last() != Some(&width) || turns.is_empty() || values.len() % turns.len() != 0 {
            let (lhs, rhs) = (l1.shape().clone(), l2.shape().clone());
            return Err(candle_core::Error::ShapeMismatchBinaryOp { lhs, rhs, op: self.name() }.bt());
        }
        let tokens = turns.len() / width;
        values.par_chunks_mut(width).with_min_len(rows_per_task(width)).enumerate().for_each(|(i, row)| {
            let start = i % tokens * width;
            turn_row(row, &turns[start..start + width], self.sign);
        });
        Ok(())
    }
}

/// Turns the pairs of `x` `(R, N, d)`, in place, by the angles whose cosines and sines are `turns`
/// `(N, d)`, half of a row each; the other way where `back`. `x` must be nobody else's.
pub fn turn(x: &Tensor, turns: &Tensor, back: bool) -> Result<()> {
    Ok(x.inplace_op2(turns, &Turn { sign: if back { -1.0 } else { 1.0 } })?)
}

struct NormVjp {
    eps: f32,
}

impl CustomOp3 for NormVjp {
    fn name(&self) -> &'static str {
        "norm-vjp"
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        same_shape(l1, l2, self.name())?;
        let (x, gradient, width) = (slice(s1, l1)?, slice(s2, l2)?, width(l1));
        let weight = row(s3, l3, width, self.name())?;
        let mut out = vec![0f32; x.len()];
        let rows = out.par_chunks_mut(width).zip(x.par_chunks(width)).zip(gradient.par_chunks(width));
        rows.with_min_len(rows_per_task(width))
            .for_each(|((out, x), gradient)| norm_vjp_row(out, x, gradient, weight, self.eps));
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

/// The gradient at a layer norm's result to that at its input `x`, both `(..., D)`.
pub fn norm_vjp(x: &Tensor, gradient: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(x.apply_op3_no_bwd(gradient, weight, &NormVjp { eps: eps as f32 })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_exact_to_single_precision() {
        let worst = (-870_000..=880_000).map(|i| i as f32 / 1e4).map(|x| {
            let exact = f64::from(x).exp();
            ((f64::from(exp(x)) - exact) / exact).abs()
        });
        let worst = worst.fold(0.0, f64::max);
        assert!(worst < 3e-7, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(f32::NAN).is_nan());
    }
}
