use candle_core::{DType, Device, Tensor};

use super::super::layers::{Places, Rotary, Windows};
use super::config::{Family, QwenConfig};
use crate::{Error, Result};

/// What the tower needs for pictures of one grid. Tokens are in the order of the picture, row by row.
pub(super) struct Grid {
    /// Patches down and across.
    pub size: (usize, usize),
    /// Every token attends to every other.
    pub places: Places,
    /// The same within windows, where the tower has such.
    pub windowed: Option<Places>,
    /// `(1, N, D)` f32: the learnt positions at this grid, where the tower has such.
    pub positions: Option<Tensor>,
    /// `(N,)` u32: the tokens as they are merged, group by group.
    pub grouped: Tensor,
    /// `(N,)` u32: where each token is in `grouped`.
    pub back: Tensor,
}

impl Grid {
    /// `table` are the learnt positions, `(side^2, D)`.
    pub fn new(
        config: &QwenConfig,
        (rows, columns): (usize, usize),
        table: Option<&Tensor>,
        device: &Device,
    ) -> Result<Self> {
        let m = config.merge;
        if rows == 0 || columns == 0 || rows % m != 0 || columns % m != 0 {
            let expected = format!("multiples of {m} patches a side");
            return Err(Error::argument("grid", expected, format!("{rows}x{columns}")));
        }
        let n = rows * columns;
        let places: Vec<(usize, usize)> = (0..n).map(|i| (i / columns, i % columns)).collect();
        let rotary = Rotary::axial(&places, config.hidden / config.heads, config.theta, device)?;
        let windowed = if config.family == Family::Qwen2_5Vl {
            // A window's side in merged tokens; those at the end of a row or column may be cut.
            let side = config.window / m / config.patch * m;
            let across = columns.div_ceil(side);
            let mut windows = vec![Vec::new(); rows.div_ceil(side) * across];
            for (token, (row, column)) in places.iter().enumerate() {
                windows[row / side * across + column / side].push(token as u32);
            }
            let windows = Some(Windows::new(windows, device)?);
            Some(Places { rotary: Some(rotary.clone()), windows })
        } else {
            None
        };
        let mut grouped = Vec::with_capacity(n);
        for row in (0..rows).step_by(m) {
            for column in (0..columns).step_by(m) {
                grouped.extend((0..m * m).map(|i| ((row + i / m) * columns + column + i % m) as u32));
            }
        }
        let mut back = vec![0u32; n];
        for (place, token) in grouped.iter().enumerate() {
            back[*token as usize] = place as u32;
        }
        let positions = table.map(|table| positions(table, config, (rows, columns), device)).transpose()?;
        Ok(Self {
            size: (rows, columns),
            places: Places { rotary: Some(rotary), windows: None },
            windowed,
            positions,
            grouped: Tensor::from_vec(grouped, n, device)?,
            back: Tensor::from_vec(back, n, device)?,
        })
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.size.0 * self.size.1
    }
}

/// The learnt positions between which a place lies, and their weights, in the reference's f32: the
/// ends of the grid are those of the table (`align_corners`).
fn taps(place: usize, size: usize, side: usize) -> [(usize, f32); 2] {
    let at = place as f32 * (side - 1) as f32 / (size - 1).max(1) as f32;
    let first = at.floor();
    let weight = |offset: f32| (1.0 - (at - first - offset).abs()).max(0.0);
    let index = first as usize;
    [(index.min(side - 1), weight(0.0)), ((index + 1).min(side - 1), weight(1.0))]
}

/// After transformers 5.23 `vision_utils.get_vision_interpolation_indices_and_weights`, bilinear.
fn positions(
    table: &Tensor,
    config: &QwenConfig,
    (rows, columns): (usize, usize),
    device: &Device,
) -> Result<Tensor> {
    let (side, width) = (config.positions_side(), config.hidden);
    let table = table.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let mut values = Vec::with_capacity(rows * columns * width);
    for row in 0..rows {
        let down = taps(row, rows, side);
        for column in 0..columns {
            let across = taps(column, columns, side);
            let corners =
                down.iter().flat_map(|(y, v)| across.iter().map(move |(x, w)| (y * side + x, v * w)));
            let corners: Vec<(usize, f32)> = corners.collect();
            values.extend((0..width).map(|channel| {
                corners.iter().map(|(at, weight)| table[at * width + channel] * weight).sum::<f32>()
            }));
        }
    }
    Ok(Tensor::from_vec(values, (1, rows * columns, width), device)?)
}
