//! Resizing with the arithmetic of Pillow's `Image.resize`, byte for byte.
//!
//! The algorithm: one pass along the rows and one along the columns; each output sample is a
//! weighted sum of the input samples under the filter, which is widened by the scale when
//! shrinking; weights are normalised in `f64`, then rounded to 22 fractional bits; sums are
//! rounded and clipped to 8 bits after each pass. An axis that keeps its size is left as it is.
//! The order of the passes is that of Pillow 13.0, see `down_first`.

use std::ops::Range;

use ::image::RgbImage;
use rayon::prelude::*;

/// The kernel that pictures are resized with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Filter {
    /// The triangle filter, Pillow's `BILINEAR` (2).
    Bilinear,
    /// Keys' cubic filter with a = -1/2, Pillow's `BICUBIC` (3).
    Bicubic,
}

impl Filter {
    /// The kernel is zero at this distance and beyond, in output or input pixels, the larger.
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, distance: f64) -> f64 {
        let x = distance.abs();
        match self {
            Self::Bilinear if x < 1.0 => 1.0 - x,
            Self::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            // The order of operations matters to the last bit.
            Self::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5,
            _ => 0.0,
        }
    }
}

/// One row of the matrix of [`resize_matrix`]: an output sample as a sum of input samples.
#[derive(Debug, Clone, PartialEq)]
pub struct ResizeRow {
    /// The first input index that has a weight.
    pub start: usize,
    /// The weights of the inputs from `start` on; they sum to 1.
    pub weights: Vec<f64>,
}

/// The matrix `[output, input]` that resizes one axis, as sparse rows.
///
/// This is the map that [`resize`] applies along each axis, before its weights are rounded to 22
/// fractional bits and its results to 8 bits. It is the identity when the sizes are equal, and has
/// no rows or rows without weights when `output` or `input` is zero.
pub fn resize_matrix(input: usize, output: usize, filter: Filter) -> Vec<ResizeRow> {
    matrix_rows(input, output, filter, 0..output)
}

/// The rows `wanted` of [`resize_matrix`].
fn matrix_rows(input: usize, output: usize, filter: Filter, wanted: Range<usize>) -> Vec<ResizeRow> {
    if input == output {
        return wanted.map(|start| ResizeRow { start, weights: vec![1.0] }).collect();
    }
    let scale = input as f64 / output as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let narrow = 1.0 / stretch;
    wanted
        .map(|index| {
            let center = (index as f64 + 0.5) * scale;
            // Casts saturate at zero and drop the fraction, as the reference does after clamping.
            let start = ((center - support + 0.5) as usize).min(input);
            let end = ((center + support + 0.5) as usize).clamp(start, input);
            let mut weights: Vec<f64> =
                (start..end).map(|from| filter.weight((from as f64 - center + 0.5) * narrow)).collect();
            let sum: f64 = weights.iter().sum();
            if sum != 0.0 {
                for weight in &mut weights {
                    *weight /= sum;
                }
            }
            ResizeRow { start, weights }
        })
        .collect()
}

/// Fractional bits of a fixed-point weight: 32, less 8 for the sample, less 2 for overshoot.
const FRACTION: u32 = 22;
const HALF: i32 = 1 << (FRACTION - 1);

fn to_sample(sum: i32) -> u8 {
    (sum >> FRACTION).clamp(0, 255) as u8
}

/// A [`ResizeRow`] in fixed point, over the part of a padded axis that holds the picture.
struct Taps {
    /// The first index into the picture itself.
    start: usize,
    weights: Vec<i32>,
    /// The sum of the weights that fall on the padding.
    padding: i32,
}

impl Taps {
    /// What comes of padding alone.
    fn of_padding(&self, background: [u8; 3]) -> [u8; 3] {
        let sum = self.weights.iter().sum::<i32>() + self.padding;
        background.map(|sample| to_sample(HALF + sum * i32::from(sample)))
    }
}

fn fixed(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << FRACTION);
    (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

/// The taps of an axis of `padded` samples, of which `length` from `offset` on are the picture's.
fn axis_taps(offset: usize, length: usize, padded: usize, to: &Axis, filter: Filter) -> Vec<Taps> {
    matrix_rows(padded, to.size, filter, to.window.clone())
        .into_iter()
        .map(|row| {
            let end = row.start + row.weights.len();
            let first = offset.clamp(row.start, end);
            let last = (offset + length).clamp(first, end);
            let mut taps = Taps { start: first.saturating_sub(offset), weights: Vec::new(), padding: 0 };
            for (index, weight) in (row.start..).zip(row.weights) {
                let weight = fixed(weight);
                if (first..last).contains(&index) {
                    taps.weights.push(weight);
                } else {
                    taps.padding += weight;
                }
            }
            taps
        })
        .collect()
}

/// A picture inside a larger one of one colour, which is never built.
pub(super) struct Padded<'a> {
    /// The picture.
    pub(super) image: &'a RgbImage,
    /// Where it is in the larger one.
    pub(super) left: usize,
    pub(super) top: usize,
    /// The larger one's size.
    pub(super) width: usize,
    pub(super) height: usize,
    /// The colour around the picture.
    pub(super) background: [u8; 3],
}

impl<'a> Padded<'a> {
    /// A picture with nothing around it.
    pub(super) fn plain(image: &'a RgbImage) -> Self {
        let (width, height) = (image.width() as usize, image.height() as usize);
        Self { image, left: 0, top: 0, width, height, background: [0; 3] }
    }
}

/// The size that one axis is resized to, and the part of it that is wanted.
pub(super) struct Axis {
    pub(super) size: usize,
    pub(super) window: Range<usize>,
}

/// Resizes a picture to `width` x `height`, equal to `Image.resize` of Pillow 13.0 on mode `RGB`.
///
/// Earlier versions of Pillow differ by a few levels in 255 where the height shrinks far more than
/// the width, as they rounded between the passes in the other order.
///
/// The result has no pixels when `width` or `height` is zero, and is black when `image` has none.
pub fn resize(image: &RgbImage, width: u32, height: u32, filter: Filter) -> RgbImage {
    if (width, height) == image.dimensions() {
        return image.clone();
    }
    let axis = |size: u32| Axis { size: size as usize, window: 0..size as usize };
    resize_window(&Padded::plain(image), &axis(width), &axis(height), filter)
}

/// The given window of what [`resize`] would make of a padded picture; only the window is computed.
pub(super) fn resize_window(from: &Padded<'_>, across: &Axis, down: &Axis, filter: Filter) -> RgbImage {
    let (width, height) = (across.window.len(), down.window.len());
    let mut result = RgbImage::new(width as u32, height as u32);
    let (columns, rows) = (from.image.width() as usize, from.image.height() as usize);
    if width == 0 || height == 0 || columns == 0 || rows == 0 {
        return result;
    }
    let column_taps = axis_taps(from.left, columns, from.width, across, filter);
    let row_taps = axis_taps(from.top, rows, from.height, down, filter);
    let (line, source_line) = (width * 3, columns * 3);
    let samples: &[u8] = from.image;

    if down_first(from, across, down) {
        let used = used(&column_taps);
        let part = used.len() * 3;
        let row = |y: usize| {
            let start = y * source_line + used.start * 3;
            samples.get(start..start + part).unwrap_or_default()
        };
        let padding = from.background.repeat(used.len());
        result.par_chunks_exact_mut(line).zip(&row_taps).for_each_init(
            || (vec![0; part], vec![0; part]),
            |(sums, flat), (out, taps)| {
                sum_rows(taps, row, &padding, sums, flat);
                let background = taps.of_padding(from.background);
                sum_columns(&column_taps, flat, used.start, background, out);
            },
        );
    } else {
        // Only these rows of the picture reach the window.
        let used = used(&row_taps);
        let mut narrow = vec![0; used.len() * line];
        let samples = samples.get(used.start * source_line..).unwrap_or_default();
        narrow
            .par_chunks_exact_mut(line)
            .zip(samples.par_chunks_exact(source_line))
            .for_each(|(out, row)| sum_columns(&column_taps, row, 0, from.background, out));
        let row = |y: usize| {
            let start = y.saturating_sub(used.start) * line;
            narrow.get(start..start + line).unwrap_or_default()
        };
        let padding: Vec<u8> = column_taps.iter().flat_map(|taps| taps.of_padding(from.background)).collect();
        result
            .par_chunks_exact_mut(line)
            .zip(&row_taps)
            .for_each_init(|| vec![0; line], |sums, (out, taps)| sum_rows(taps, row, &padding, sums, out));
    }
    result
}

/// Whether the columns are resized before the rows, which rounding makes visible.
///
/// Pillow 13.0 does so when the height shrinks by more than twice what the width does; 12.2 for
/// pictures over a hundred times as tall as wide, earlier versions never.
fn down_first(from: &Padded<'_>, across: &Axis, down: &Axis) -> bool {
    let lost = |from: usize, to: usize| from as i128 - to as i128;
    lost(from.height, down.size) > 0 && lost(from.height, down.size) > 2 * lost(from.width, across.size)
}

/// The part of an axis of the picture that any of the taps use.
fn used(taps: &[Taps]) -> Range<usize> {
    let used = taps.iter().filter(|taps| !taps.weights.is_empty());
    let start = used.clone().map(|taps| taps.start).min().unwrap_or(0);
    let end = used.map(|taps| taps.start + taps.weights.len()).max().unwrap_or(0);
    start..end
}

/// One row of output from the rows of input, of which `padding` is one outside of the picture.
fn sum_rows<'a>(
    taps: &Taps,
    row: impl Fn(usize) -> &'a [u8],
    padding: &[u8],
    sums: &mut [i32],
    out: &mut [u8],
) {
    for (sum, &sample) in sums.iter_mut().zip(padding) {
        *sum = HALF + taps.padding * i32::from(sample);
    }
    for (y, &weight) in (taps.start..).zip(&taps.weights) {
        for (sum, &sample) in sums.iter_mut().zip(row(y)) {
            *sum += weight * i32::from(sample);
        }
    }
    for (out, &sum) in out.iter_mut().zip(&*sums) {
        *out = to_sample(sum);
    }
}

/// One row of output from one row of input, which starts at column `first` of the picture.
fn sum_columns(taps: &[Taps], row: &[u8], first: usize, background: [u8; 3], out: &mut [u8]) {
    let (pixels, _) = row.as_chunks::<3>();
    let (out, _) = out.as_chunks_mut::<3>();
    for (out, taps) in out.iter_mut().zip(taps) {
        let mut sums = background.map(|sample| HALF + taps.padding * i32::from(sample));
        let pixels = pixels.get(taps.start.saturating_sub(first)..).unwrap_or_default();
        for (&weight, pixel) in taps.weights.iter().zip(pixels) {
            for (sum, &sample) in sums.iter_mut().zip(pixel) {
                *sum += weight * i32::from(sample);
            }
        }
        *out = sums.map(to_sample);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_sum_to_one_and_stay_inside() {
        for filter in [Filter::Bilinear, Filter::Bicubic] {
            for (input, output) in [(1, 1), (1, 9), (9, 1), (7, 5), (5, 7), (1000, 3), (3, 1000), (336, 336)]
            {
                let matrix = resize_matrix(input, output, filter);
                assert_eq!(matrix.len(), output);
                for row in matrix {
                    assert!(!row.weights.is_empty() && row.start + row.weights.len() <= input);
                    assert!((row.weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn empty_sizes_do_not_fail() {
        let empty = RgbImage::new(0, 0);
        assert_eq!(resize(&empty, 3, 2, Filter::Bicubic), RgbImage::new(3, 2));
        assert_eq!(resize(&RgbImage::new(4, 4), 0, 2, Filter::Bilinear).dimensions(), (0, 2));
        assert!(resize_matrix(0, 2, Filter::Bilinear).iter().all(|row| row.weights.is_empty()));
    }

    #[test]
    fn a_window_of_a_padded_picture_is_cut_from_the_whole() {
        let image =
            RgbImage::from_fn(13, 31, |x, y| ::image::Rgb([(x * 19) as u8, (y * 8) as u8, (x * y) as u8]));
        let background = [122, 116, 104];
        let mut square = RgbImage::from_pixel(31, 31, ::image::Rgb(background));
        ::image::imageops::replace(&mut square, &image, 9, 0);
        for (width, height) in [(31, 31), (31, 20), (20, 31), (14, 14), (50, 40), (50, 12)] {
            for filter in [Filter::Bilinear, Filter::Bicubic] {
                let whole = resize(&square, width, height, filter);
                let expected = ::image::imageops::crop_imm(&whole, 3, 2, 10, 9).to_image();
                let padded = Padded { image: &image, left: 9, top: 0, width: 31, height: 31, background };
                let across = Axis { size: width as usize, window: 3..13 };
                let down = Axis { size: height as usize, window: 2..11 };
                assert_eq!(
                    resize_window(&padded, &across, &down, filter),
                    expected,
                    "{width}x{height} {filter:?}"
                );
            }
        }
    }
}
