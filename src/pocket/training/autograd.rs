//! Layers whose weights learn: on candle's automatic differentiation, unlike the towers of
//! [`crate::tower`], which never form a weight's gradient.
//!
//! candle-nn's fused softmax and norms have no backward; the operations here do, by the towers' own
//! row-wise kernels. Everything is f32 on a CPU, activations are `(rows, width)`.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Shape, Tensor};

use crate::Result;
use crate::tower::layers::fused;

type Candle<T> = candle_core::Result<T>;

fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Candle<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => Err(candle_core::Error::RequiresContiguous { op: "training operation" }),
    }
}

fn wrap<T>(result: Result<T>) -> Candle<T> {
    result.map_err(candle_core::Error::wrap)
}

/// The sum over rows, `(rows, n)` to `(n,)`, as a product with ones.
fn sum_rows(x: &Tensor) -> Candle<Tensor> {
    let (rows, width) = x.dims2()?;
    Tensor::ones((1, rows), x.dtype(), x.device())?.matmul(x)?.reshape(width)
}

struct AddBias;

impl CustomOp2 for AddBias {
    fn name(&self) -> &'static str {
        "add-bias"
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        let (x, bias) = (values(s1, l1)?, values(s2, l2)?);
        let mut out = x.to_vec();
        out.chunks_exact_mut(bias.len()).for_each(|row| fused::bias_row(row, bias));
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(g.clone()), Some(sum_rows(&g.contiguous()?)?)))
    }
}

/// `x W^T + b`: `(rows, in)` to `(rows, out)`, W `(out, in)`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.matmul(&weight.t()?)?;
    Ok(match bias {
        Some(bias) => y.apply_op2(bias, AddBias)?,
        None => y,
    })
}

struct Norm {
    eps: f64,
}

impl CustomOp3 for Norm {
    fn name(&self) -> &'static str {
        "layer-norm"
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
        let (x, weight, bias) = (values(s1, l1)?, values(s2, l2)?, values(s3, l3)?);
        let mut out = vec![0f32; x.len()];
        for (out, x) in out.chunks_exact_mut(weight.len()).zip(x.chunks_exact(weight.len())) {
            fused::norm_row(out, x, weight, bias, self.eps as f32);
        }
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let g = g.contiguous()?;
        let (one, zero) = (Tensor::ones_like(weight)?, Tensor::zeros_like(weight)?);
        let normal = candle_nn::ops::layer_norm(&x.detach(), &one, &zero, self.eps as f32)?;
        let along = sum_rows(&(normal * &g)?)?;
        let flat = sum_rows(&g)?;
        Ok((
            Some(wrap(fused::norm_vjp(&x.detach(), &g, &weight.detach(), self.eps))?),
            Some(along),
            Some(flat),
        ))
    }
}

/// Layer normalisation of each row.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(x.apply_op3(weight, bias, Norm { eps })?)
}

/// Which tokens each token attends to, `(B, N, N)`: 0 for those, minus a large number for others.
pub type Mask = Arc<Vec<f32>>;

/// Every token, or each one itself and those before it.
#[cfg(test)]
pub fn mask(batch: usize, tokens: usize, causal: bool) -> Mask {
    let at = |i: usize| if causal && i % tokens > i / tokens % tokens { -1e9 } else { 0.0 };
    Arc::new((0..batch * tokens * tokens).map(at).collect())
}

/// softmax(scale x) over the last dimension, `(B h, N, N)`.
struct Softmax {
    scale: f32,
    mask: Mask,
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let (heads, tokens, width) = layout.shape().dims3()?;
        let mut out = values(storage, layout)?.to_vec();
        let each = heads / (self.mask.len() / (tokens * width));
        for (i, row) in out.chunks_exact_mut(width).enumerate() {
            let at = (i / tokens / each * tokens + i % tokens) * width;
            row.iter_mut().zip(&self.mask[at..at + width]).for_each(|(x, m)| *x = *x * self.scale + m);
            fused::softmax_row(row);
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
    fn bwd(&self, _: &Tensor, p: &Tensor, g: &Tensor) -> Candle<Option<Tensor>> {
        // A copy of our own, scaled, which the kernel then works on in place.
        let g = (g * f64::from(self.scale))?;
        wrap(fused::softmax_vjp(&g, &p.detach()))?;
        Ok(Some(g))
    }
}

/// Attention of heads `(B h, N, d)` each, scores divided by sqrt(d).
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask) -> Result<Tensor> {
    let scale = (q.dim(2)? as f32).powf(-0.5);
    let p = q.matmul(&k.t()?)?.apply_op1(Softmax { scale, mask })?;
    Ok(p.matmul(v)?)
}

/// `(B N, h d)` to `(B h, N, d)`.
pub fn split_heads(x: &Tensor, batch: usize, heads: usize) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let (tokens, head) = (rows / batch, width / heads);
    let x = x.reshape((batch, tokens, heads, head))?.transpose(1, 2)?.contiguous()?;
    Ok(x.reshape((batch * heads, tokens, head))?)
}

/// `(B h, N, d)` to `(B N, h d)`.
pub fn join_heads(x: &Tensor, batch: usize) -> Result<Tensor> {
    let (rows, tokens, head) = x.dims3()?;
    let heads = rows / batch;
    let x = x.reshape((batch, heads, tokens, head))?.transpose(1, 2)?.contiguous()?;
    Ok(x.reshape((batch * tokens, heads * head))?)
}

/// log softmax of each row.
pub fn log_softmax(x: &Tensor) -> Result<Tensor> {
    Ok(candle_nn::ops::log_softmax(x, 1)?)
}

/// Each row over its length.
pub fn unit_rows(x: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_div(&(x.sqr()?.sum_keepdim(1)? + 1e-12)?.sqrt()?)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// Gradients against those of the same function in candle's plain operations.
    fn same_gradients(
        fast: impl Fn(&[Var]) -> Result<Tensor>,
        plain: impl Fn(&[Var]) -> Result<Tensor>,
        shapes: &[&[usize]],
    ) {
        let vars: Vec<Var> =
            shapes.iter().map(|s| Var::randn(0f32, 1f32, *s, &Device::Cpu).unwrap()).collect();
        let (a, b) = (fast(&vars).unwrap(), plain(&vars).unwrap());
        let weight = Tensor::randn(0f32, 1f32, a.shape(), &Device::Cpu).unwrap();
        let close = |a: &Tensor, b: &Tensor| {
            let scale = b.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            let off = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(off <= 2e-5 * scale, "{off} of {scale}");
        };
        close(&a, &b);
        let (ga, gb) =
            ((a * &weight).unwrap().backward().unwrap(), (b * &weight).unwrap().backward().unwrap());
        for var in &vars {
            close(ga.get(var).unwrap(), gb.get(var).unwrap());
        }
    }

    #[test]
    fn gradients_are_those_of_plain_operations() {
        same_gradients(
            |v| linear(&v[0], &v[1], Some(&v[2])),
            |v| Ok(v[0].matmul(&v[1].t()?)?.broadcast_add(&v[2])?),
            &[&[7, 5], &[3, 5], &[3]],
        );
        same_gradients(
            |v| layer_norm(&v[0], &v[1], &v[2], 1e-5),
            |v| {
                let x = v[0].broadcast_sub(&v[0].mean_keepdim(1)?)?;
                let s = (x.sqr()?.mean_keepdim(1)? + 1e-5)?.sqrt()?;
                Ok(x.broadcast_div(&s)?.broadcast_mul(&v[1])?.broadcast_add(&v[2])?)
            },
            &[&[9, 20], &[20], &[20]],
        );
        for causal in [false, true] {
            same_gradients(
                |v| attend(&v[0], &v[1], &v[2], mask(2, 5, causal)),
                |v| {
                    let scores = (v[0].matmul(&v[1].t()?)? * (8f64).powf(-0.5))?;
                    let mask = mask(1, 5, causal).to_vec();
                    let e = scores.broadcast_add(&Tensor::from_vec(mask, (5, 5), &Device::Cpu)?)?.exp()?;
                    Ok(e.broadcast_div(&e.sum_keepdim(2)?)?.matmul(&v[2])?)
                },
                &[&[4, 5, 8], &[4, 5, 8], &[4, 5, 8]],
            );
        }
        same_gradients(
            |v| join_heads(&split_heads(&v[0], 2, 3)?, 2),
            |v| Ok((v[0].as_tensor() * 1.0)?),
            &[&[8, 6]],
        );
    }
}
