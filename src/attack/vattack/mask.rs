use super::Window;
use super::crop::between;

/// Where a picture shows the source object, patch by patch.
#[derive(Debug, Clone, PartialEq)]
pub struct Localised {
    /// Patches down and across.
    pub grid: (usize, usize),
    /// The cosine of each patch with the source's text, row by row.
    pub scores: Vec<f32>,
    /// Whether each patch is the object's: its score is above the middle between the lowest and the
    /// highest. All of them are where the scores are all the same, as they then say nothing.
    pub mask: Vec<bool>,
}

impl Localised {
    pub(super) fn new(grid: (usize, usize), scores: Vec<f32>) -> Self {
        let low = scores.iter().copied().fold(f32::INFINITY, f32::min);
        let high = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let threshold = (low + high) / 2.0;
        let mut mask: Vec<bool> = scores.iter().map(|score| *score > threshold).collect();
        if !mask.contains(&true) {
            mask.fill(true);
        }
        Self { grid, scores, mask }
    }

    /// The patches of the object as a crop `window` of a picture of `size`, resized to the tower's
    /// own, has them: the mask is stretched over the picture, cut and sampled again, each to the
    /// nearest, as torch's `interpolate` does. It can be empty.
    pub fn cropped(&self, size: (usize, usize), window: &Window) -> Vec<bool> {
        let (rows, columns) = self.grid;
        let line = |n: usize, start: usize, side: usize, all: usize| -> Vec<usize> {
            (0..n).map(|i| nearest(start + nearest(i, side, n), n, all)).collect()
        };
        let down = line(rows, window.top, window.height, size.0);
        let across = line(columns, window.left, window.width, size.1);
        down.iter().flat_map(|&y| across.iter().map(move |&x| self.mask[y * columns + x])).collect()
    }

    /// The scores over a picture of `size`, bilinear between the patches' centres.
    pub fn soft(&self, (height, width): (usize, usize)) -> Vec<f32> {
        let (rows, columns) = self.grid;
        let across: Vec<(usize, f64)> = (0..width).map(|x| between(x, columns, width)).collect();
        let line = |y: usize| -> Vec<f64> {
            let row = &self.scores[y * columns..(y + 1) * columns];
            let at = |&(start, weight): &(usize, f64)| {
                let right = row[(start + 1).min(columns - 1)];
                f64::from(row[start]) * (1.0 - weight) + f64::from(right) * weight
            };
            across.iter().map(at).collect()
        };
        let lines: Vec<Vec<f64>> = (0..rows).map(line).collect();
        let row = |y: usize| {
            let (start, weight) = between(y, rows, height);
            let below = (start + 1).min(rows - 1);
            (lines[start].iter().zip(&lines[below]))
                .map(move |(a, b)| (a * (1.0 - weight) + b * weight) as f32)
                .collect::<Vec<_>>()
        };
        (0..height).flat_map(row).collect()
    }
}

/// The input sample nearest to output sample `i`, with the rounding of torch's `interpolate`.
fn nearest(i: usize, input: usize, output: usize) -> usize {
    ((i as f32 * (input as f32 / output as f32)) as usize).min(input - 1)
}

/// The box around the best `share` of a soft map over a picture of `size`.
pub(super) fn bounds(soft: &[f32], (height, width): (usize, usize), share: f64) -> Window {
    let count = ((share * soft.len() as f64) as usize).clamp(1, soft.len());
    let mut sorted = soft.to_vec();
    let (_, threshold, _) = sorted.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
    let threshold = *threshold;
    let (mut top, mut bottom, mut left, mut right) = (height, 0, width, 0);
    for (i, _) in soft.iter().enumerate().filter(|(_, value)| **value >= threshold) {
        let (y, x) = (i / width, i % width);
        (top, bottom) = (top.min(y), bottom.max(y + 1));
        (left, right) = (left.min(x), right.max(x + 1));
    }
    if top >= bottom || left >= right {
        // No number among them.
        return Window::whole((height, width));
    }
    Window { top, left, height: bottom - top, width: right - left }
}
