//! Where an anchor comes from.

use candle_core::{DType, Device, Tensor};

use crate::tower::stem::Stem;
use crate::tower::{Insertable, TowerSpec};
use crate::{Error, Result};

/// The training-free anchor, the paper's Eq. 6: the tower's own first attention output on a
/// uniform white picture, `(N, D)` f32 on the CPU. Whatever is put into the tower is ignored.
pub fn training_free(tower: &impl Insertable) -> Result<Tensor> {
    let (height, width) = tower.spec().picture;
    let white = Tensor::ones((1, 3, height, width), DType::F32, tower.device())?;
    let attention = tower.first_attention(&white)?;
    Ok(attention.squeeze(0)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
}

/// The model-guided anchor, the paper's Eq. 7: the first attention output of `robust`, an
/// adversarially fine-tuned model, on a uniform white picture of its own size, for a tower `base`.
/// `(N, D)` f32 on the CPU, of the base's N.
///
/// Where the robust model has other patches than the base, its rows are interpolated over the grid
/// ([`interpolate`]) and its own patches down and across are returned too. (The paper has one
/// resolution throughout.)
///
/// # Errors
/// [`Error::AnchorMismatch`] if the widths differ, or only one of them has a class token.
pub fn model_guided(robust: &Stem, base: &TowerSpec) -> Result<(Tensor, Option<(usize, usize)>)> {
    let spec = robust.spec();
    let mismatch = |reason: String| Error::AnchorMismatch {
        reason,
        hint: "the robust model has to be a fine-tuned copy of the base, or of a model of its width".into(),
    };
    if spec.hidden != base.hidden {
        let (found, expected) = (spec.hidden, base.hidden);
        return Err(mismatch(format!("the robust model is {found} wide, the base {expected}")));
    }
    if spec.class_token != base.class_token {
        let of = |class_token| if class_token { "one" } else { "none" };
        let (found, expected) = (of(spec.class_token), of(base.class_token));
        return Err(mismatch(format!("the robust model has {found} class token, the base {expected}")));
    }
    let values = robust.white_attention()?;
    if spec.grid == base.grid {
        return Ok((values, None));
    }
    Ok((interpolate(&values, spec.class_token, spec.grid, base.grid)?, Some(spec.grid)))
}

/// The rows of `values`, `(N, D)` f32, for another grid: those of patches interpolated bilinearly by
/// the places of their centres, as PyTorch's `interpolate` does with `align_corners=False`; a class
/// token's row, the first, as it is. Grids are patches down and across.
///
/// # Errors
/// If `values` has another number of rows than `from` makes, or a grid is empty.
pub fn interpolate(
    values: &Tensor,
    class_token: bool,
    from: (usize, usize),
    to: (usize, usize),
) -> Result<Tensor> {
    let (rows, width) = values.dims2()?;
    let first = usize::from(class_token);
    if rows != from.0 * from.1 + first || rows == first || to.0 * to.1 == 0 {
        let (h, w) = from;
        return Err(Error::argument("anchor", format!("{} rows for {h}x{w} patches", h * w + first), rows));
    }
    let data = values.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
    let mut all = Vec::with_capacity((to.0 * to.1 + first) * width);
    all.extend(data.iter().take(first).flatten());
    for corners in corners(from, to) {
        all.extend((0..width).map(|i| {
            let value = |(row, share): &(usize, f64)| f64::from(data[first + row][i]) * share;
            corners.iter().map(value).sum::<f64>() as f32
        }));
    }
    Ok(Tensor::from_vec(all, (to.0 * to.1 + first, width), &Device::Cpu)?)
}

/// The transpose of [`interpolate`] for anchors without a class token: takes a gradient `(N', D)` f32
/// at the interpolated anchor, of grid `to`, to that at the anchor, `(N, D)` of grid `from`.
///
/// # Errors
/// If the gradient has another number of rows than `to` makes.
pub fn interpolate_vjp(gradient: &Tensor, from: (usize, usize), to: (usize, usize)) -> Result<Tensor> {
    let (rows, width) = gradient.dims2()?;
    if rows != to.0 * to.1 {
        return Err(Error::argument("gradient", format!("{} rows", to.0 * to.1), rows));
    }
    let data = gradient.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
    let mut sums = vec![0f64; from.0 * from.1 * width];
    for (row, corners) in data.iter().zip(corners(from, to)) {
        for (at, share) in corners {
            let sums = sums.iter_mut().skip(at * width);
            sums.zip(row).for_each(|(sum, value)| *sum += f64::from(*value) * share);
        }
    }
    let sums: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
    Ok(Tensor::from_vec(sums, (from.0 * from.1, width), &Device::Cpu)?)
}

/// For each place of the grid `to`, row by row, the four of the grid `from` it lies between, and
/// their shares.
fn corners(from: (usize, usize), to: (usize, usize)) -> Vec<[(usize, f64); 4]> {
    let (down, across) = (between(from.0, to.0), between(from.1, to.1));
    let mut all = Vec::with_capacity(to.0 * to.1);
    for &(top, bottom, y) in &down {
        for &(left, right, x) in &across {
            let at = |y: usize, x: usize| y * from.1 + x;
            all.push([
                (at(top, left), (1.0 - y) * (1.0 - x)),
                (at(top, right), (1.0 - y) * x),
                (at(bottom, left), y * (1.0 - x)),
                (at(bottom, right), y * x),
            ]);
        }
    }
    all
}

/// For each of `to` places the two of `from` it lies between, and how far it is from the first.
fn between(from: usize, to: usize) -> Vec<(usize, usize, f64)> {
    let place = |i: usize| {
        let at = ((i as f64 + 0.5) * from as f64 / to as f64 - 0.5).max(0.0);
        let first = (at as usize).min(from - 1);
        (first, (first + 1).min(from - 1), at - first as f64)
    };
    (0..to).map(place).collect()
}
