//! What V-Attack looked at and what it did, as pictures.

use candle_core::{DType, Device, Tensor};
use image::{Rgb, RgbImage};

use super::{Localised, Window, mask};
use crate::image::rgb_from_pixels;
use crate::{Error, Result};

/// The picture `(3, H, W)` with the patches outside the mask darkened, and a red frame around the
/// best 15 % of the soft map, which the notebook's crop keeps inside.
///
/// # Errors
/// If the pixels have another shape.
pub fn map_of_mask(pixels: &Tensor, localised: &Localised) -> Result<RgbImage> {
    let mut map = rgb_from_pixels(pixels)?;
    let size = (map.height() as usize, map.width() as usize);
    let (rows, columns) = localised.grid;
    for (x, y, pixel) in map.enumerate_pixels_mut() {
        let patch = (y as usize * rows / size.0) * columns + x as usize * columns / size.1;
        if !localised.mask.get(patch).copied().unwrap_or(false) {
            *pixel = Rgb(pixel.0.map(|sample| sample / 4));
        }
    }
    let Window { top, left, height, width } = mask::bounds(&localised.soft(size), size, 0.15);
    let red = Rgb([255, 0, 0]);
    let (bottom, right) = (top + height - 1, left + width - 1);
    for x in left..=right {
        map.put_pixel(x as u32, top as u32, red);
        map.put_pixel(x as u32, bottom as u32, red);
    }
    for y in top..=bottom {
        map.put_pixel(left as u32, y as u32, red);
        map.put_pixel(right as u32, y as u32, red);
    }
    Ok(map)
}

/// The difference of two pictures `(3, H, W)`, magnified so that its largest entry is black or white;
/// no difference is grey.
///
/// # Errors
/// If the shapes differ.
pub fn map_of_perturbation(adversarial: &Tensor, clean: &Tensor) -> Result<RgbImage> {
    if adversarial.dims() != clean.dims() {
        let expected = format!("the shape of the clean picture, {:?}", clean.dims());
        return Err(Error::argument("adversarial picture", expected, format!("{:?}", adversarial.dims())));
    }
    let wide = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32);
    let change = (wide(adversarial)? - wide(clean)?)?;
    let largest = change.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    let scale = if largest > 0.0 { 0.5 / f64::from(largest) } else { 0.0 };
    rgb_from_pixels(&((change * scale)? + 0.5)?)
}
