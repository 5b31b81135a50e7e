//! How much of the first attention's output is the same whatever the picture: the mean cosine of
//! its outputs for two different pictures, and for a picture and a uniform white one (the paper's
//! Section 3.2 and Fig. 10).

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::plot::{Anchor, Figure, HeatMap, MARGIN, Scale, below, colour_bar};
use super::{
    Data, Failed, Findings, Pair, Sample, Tokens, Which, Z, csv, mean_interval, names, pictures, run,
};
use crate::tower::{Insertable, VisionTower};
use crate::{Error, Result};

/// Pictures from which on the paper's figure is comparable.
pub const PICTURES: usize = 300;

/// A mean cosine with its 95 % interval.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cosine {
    /// The tower that sees the one picture.
    pub first: Which,
    /// The tower that sees the other, or the white one.
    pub second: Which,
    /// The mean.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

/// Mean cosines of first attention outputs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Insensitivity {
    /// What makes a picture's output.
    pub tokens: Tokens,
    /// Pictures.
    pub pictures: usize,
    /// Between different pictures, over all pairs; the intervals by the jackknife over pictures.
    pub between_pictures: Vec<Cosine>,
    /// Between a picture and the uniform white one.
    pub with_white: Vec<Cosine>,
}

/// A vector's entries over its length; zero stays zero.
pub(super) fn unit(vector: Vec<f32>) -> Vec<f32> {
    let length = dot(&vector, &vector).sqrt();
    let scale = |v: f32| if length > 0.0 { (f64::from(v) / length) as f32 } else { 0.0 };
    vector.into_iter().map(scale).collect()
}

fn dot<A: Into<f64> + Copy, B: Into<f64> + Copy>(a: &[A], b: &[B]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (*a).into() * (*b).into()).sum()
}

/// The mean cosine between row i of `a` and row j of `b` over all i other than j, with a 95 %
/// interval by the jackknife over rows. Both are `(n, F)` of the same n pictures; n is at least 2.
///
/// # Errors
/// If the shapes differ, or there are too few rows.
pub fn between(a: &Tensor, b: &Tensor) -> Result<(f64, f64, f64)> {
    let rows = |x: &Tensor| -> Result<Vec<Vec<f32>>> {
        Ok(x.to_dtype(DType::F32)?.to_vec2::<f32>()?.into_iter().map(unit).collect())
    };
    let (n, _) = a.dims2()?;
    if a.dims() != b.dims() || n < 2 {
        let expected = "two features of the same pictures, at least 2";
        return Err(Error::argument("features", expected, format!("{:?} and {:?}", a.dims(), b.dims())));
    }
    Ok(mean_between(&rows(a)?, &rows(b)?))
}

/// As [`between`], of unit vectors.
pub(super) fn mean_between(a: &[Vec<f32>], b: &[Vec<f32>]) -> (f64, f64, f64) {
    let sum = |rows: &[Vec<f32>]| {
        let mut sum = vec![0.0; rows.first().map_or(0, Vec::len)];
        rows.iter().for_each(|row| sum.iter_mut().zip(row).for_each(|(sum, v)| *sum += f64::from(*v)));
        sum
    };
    let (sum_a, sum_b) = (sum(a), sum(b));
    let n = a.len() as f64;
    // Of each picture, the sum over pairs that it is in, on either side.
    let own: Vec<f64> = a
        .iter()
        .zip(b)
        .map(|(a, b)| {
            let same = dot(a, b);
            dot(a, &sum_b) - same + dot(&sum_a, b) - same
        })
        .collect();
    let total: f64 = own.iter().sum::<f64>() / 2.0;
    let value = total / (n * (n - 1.0));
    if a.len() < 3 {
        return (value, -1.0, 1.0);
    }
    let without: Vec<f64> = own.iter().map(|own| (total - own) / ((n - 1.0) * (n - 2.0))).collect();
    let mean = without.iter().sum::<f64>() / n;
    let error = ((n - 1.0) / n * without.iter().map(|v| (v - mean).powi(2)).sum::<f64>()).sqrt();
    (value, (value - Z * error).max(-1.0), (value + Z * error).min(1.0))
}

/// Mean cosines of two towers over pictures. `told` hears how many are done.
///
/// # Errors
/// If fewer than 2 pictures can be read, or a tower fails.
pub fn insensitivity(
    pair: &Pair,
    sample: &Sample,
    tokens: Tokens,
    told: &mut dyn FnMut(usize),
) -> Result<(Insensitivity, Vec<Failed>)> {
    const BATCH: usize = 64;
    let towers = [Which::Standard, Which::Robust];
    let attention = |which: Which, pixels: &Tensor| -> Result<Vec<Vec<f32>>> {
        let tower = pair.tower(which);
        let found = run(tower.batch(), pixels, |pixels| {
            Ok(vec![tokens.take(&Insertable::first_attention(tower, pixels)?)?])
        })?;
        let rows = found.first().map_or(Ok(Vec::new()), |rows| rows.to_vec2::<f32>())?;
        Ok(rows.into_iter().map(unit).collect())
    };
    let (height, width) = pair.standard.spec().picture;
    let white = Tensor::ones((1, 3, height, width), DType::F32, sample.device)?;
    let white = [attention(towers[0], &white)?, attention(towers[1], &white)?];
    let mut outputs: [Vec<Vec<f32>>; 2] = Default::default();
    let failed = sample.each(&sample.order(), BATCH, |pixels, _| {
        for (which, all) in towers.into_iter().zip(&mut outputs) {
            all.extend(attention(which, pixels)?);
        }
        told(outputs[0].len());
        Ok(())
    })?;
    let n = outputs[0].len();
    if n < 2 {
        return Err(Error::argument("--n", "at least 2 pictures that can be read", n));
    }
    let (mut between_pictures, mut with_white) = (Vec::new(), Vec::new());
    for (i, first) in towers.into_iter().enumerate() {
        for (j, second) in towers.into_iter().enumerate() {
            if i <= j {
                let (value, low, high) = mean_between(&outputs[i], &outputs[j]);
                between_pictures.push(Cosine { first, second, value, low, high });
            }
            let cosines: Vec<f64> = outputs[i].iter().map(|row| dot(row, &white[j][0])).collect();
            let (value, low, high) = mean_interval(&cosines);
            let (low, high) = (low.max(-1.0), high.min(1.0));
            with_white.push(Cosine { first, second, value, low, high });
        }
    }
    Ok((Insensitivity { tokens, pictures: n, between_pictures, with_white }, failed))
}

impl Insensitivity {
    /// The cosine of a list for two towers, in either order where it has one.
    fn find(list: &[Cosine], first: Which, second: Which) -> Option<&Cosine> {
        let exact = list.iter().find(|c| (c.first, c.second) == (first, second));
        exact.or_else(|| list.iter().find(|c| (c.second, c.first) == (first, second)))
    }

    fn lists(&self) -> [(&'static str, &[Cosine]); 2] {
        [("picture-picture", &self.between_pictures), ("picture-white", &self.with_white)]
    }
}

impl Findings for Insensitivity {
    const NAME: &'static str = "insensitivity";

    fn csv(&self) -> Result<String> {
        let head = ["pair", "first", "second", "pictures", "cosine", "low", "high"];
        let mut lines = vec![head.map(String::from).to_vec()];
        for (name, list) in self.lists() {
            for c in list {
                let numbers = [c.value, c.low, c.high].map(|v| v.to_string());
                let mut line =
                    vec![name.into(), c.first.to_string(), c.second.to_string(), self.pictures.to_string()];
                line.extend(numbers);
                lines.push(line);
            }
        }
        csv(lines)
    }

    fn svg(&self, towers: [&str; 2], data: Option<&Data>) -> String {
        const CELL: f64 = 96.0;
        let lines = [
            names(towers),
            format!("{} Cosine of the first attention's outputs, mean and 95 % interval.", pictures(data)),
            "1: the output is the same whatever is seen (input-insensitive); 0: nothing is shared."
                .to_string(),
        ];
        let side = 2.0 * CELL;
        let second = 2.0 * MARGIN[0] + side + 20.0;
        let title = "Does the first attention depend on the picture?";
        let width = second + side + 130.0;
        let lines = Figure::wrap(width, &lines);
        let top = Figure::top(lines.len()) + MARGIN[1];
        let which = [Which::Standard, Which::Robust];
        let labels = which.map(|which| which.to_string());
        let mut figure = Figure::new(width, top + side + below(&labels), title, &lines);
        let least =
            self.lists().iter().flat_map(|(_, list)| list.iter()).fold(0.0, |a: f64, c| a.min(c.value));
        let scale = Scale::Sequential(least, 1.0);
        let mut right = 0.0;
        let titles = ["Two different pictures", "A picture and a white one"];
        let axes = [
            ["tower that sees the one", "tower that sees the other"],
            ["tower that sees the picture", "tower that sees white"],
        ];
        for (i, (_, list)) in self.lists().into_iter().enumerate() {
            let x = if i == 0 { MARGIN[0] } else { second };
            let found = which.map(|a| which.map(|b| Self::find(list, a, b)));
            let values: Vec<Vec<Option<f64>>> =
                found.iter().map(|row| row.iter().map(|c| c.map(|c| c.value)).collect()).collect();
            let map = HeatMap {
                title: titles[i],
                axes: axes[i],
                rows: &labels,
                columns: &labels,
                values: &values,
                scale,
                cell: CELL,
                digits: 3,
            };
            (right, _) = map.draw(&mut figure, (x, top));
            for (r, row) in found.iter().enumerate() {
                for (c, cosine) in row.iter().enumerate() {
                    let Some(cosine) = cosine else { continue };
                    let at = (x + CELL * (c as f64 + 0.5), top + CELL * (r as f64 + 0.5) + 20.0);
                    let text = format!("{:.3} to {:.3}", cosine.low, cosine.high);
                    figure.inked(at, Anchor::Middle, scale, cosine.value, &text);
                }
            }
        }
        colour_bar(&mut figure, (right + 24.0, top), side, scale, 2, "mean cosine");
        figure.finish()
    }

    fn table(&self) -> String {
        let mut lines =
            vec![format!("{:16} {:9} {:9} {:>7}  {}", "pair", "first", "second", "cosine", "95 % interval")];
        for (name, list) in self.lists() {
            for c in list {
                let (first, second) = (c.first.to_string(), c.second.to_string());
                lines.push(format!(
                    "{name:16} {first:9} {second:9} {:7.3}  {:.3} to {:.3}",
                    c.value, c.low, c.high
                ));
            }
        }
        lines.push(format!("{} pictures", self.pictures));
        lines.join("\n")
    }
}
