//! The spectral shift map of the patch embedding (the paper's Eq. 4): |F(W robust)| - |F(W standard)|
//! for each frequency of a patch, F being the discrete Fourier transform of the kernels.
//!
//! The kernels are D x 3; the paper does not say how they become one map. Here it is the mean over
//! all of them of the magnitudes, the phases being of no matter.

use std::f64::consts::TAU;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::plot::{Figure, HeatMap, MARGIN, Scale, below, colour_bar};
use super::{Data, Findings, Pair, csv, names};
use crate::{Error, Result};

/// Spectra of two patch embeddings, their difference, and how it falls over frequency.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spectrum {
    /// Side of a patch, P, in pixels.
    pub patch: usize,
    /// The frequency of each row and column, in cycles per patch: 0 at place P / 2, rounded down.
    pub frequencies: Vec<i64>,
    /// Mean magnitude of the standard tower's kernels, P rows of P; vertical frequency down.
    pub standard_magnitude: Vec<Vec<f64>>,
    /// The same of the robust tower's.
    pub robust_magnitude: Vec<Vec<f64>>,
    /// The robust tower's less the standard one's.
    pub shift: Vec<Vec<f64>>,
    /// The same by distance from frequency 0, in rings one cycle wide.
    pub rings: Vec<Ring>,
}

/// Frequencies of about one distance from 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ring {
    /// The distance, rounded to whole cycles per patch.
    pub radius: usize,
    /// Mean magnitude in the standard tower.
    pub standard: f64,
    /// Mean magnitude in the robust tower.
    pub robust: f64,
    /// `robust` less `standard`.
    pub shift: f64,
    /// `shift` over `standard`; `None` where that is 0.
    pub relative: Option<f64>,
}

/// The mean magnitude over all kernels of `weight` `(D, C, P, P)` for each frequency, the lowest in
/// the middle (at P / 2, rounded down, as NumPy's `fftshift` puts it); P rows of P.
///
/// # Errors
/// If the kernels are not square, or there are none.
pub fn magnitudes(weight: &Tensor) -> Result<Vec<Vec<f64>>> {
    let (d, channels, p, across) = weight.dims4()?;
    if p != across || d * channels * p == 0 {
        return Err(Error::argument("kernels", "square ones", format!("{:?}", weight.dims())));
    }
    let values = weight
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .contiguous()?
        .flatten_all()?
        .to_vec1::<f64>()?;
    let turn: Vec<(f64, f64)> = (0..p)
        .map(|i| {
            let angle = -TAU * i as f64 / p as f64;
            (angle.cos(), angle.sin())
        })
        .collect();
    let mut sums = vec![0.0; p * p];
    let mut rows = vec![(0.0, 0.0); p * p];
    for kernel in values.chunks_exact(p * p) {
        // Along each row, then down the columns of that.
        for y in 0..p {
            for v in 0..p {
                rows[y * p + v] = (0..p).fold((0.0, 0.0), |(re, im), x| {
                    let (cos, sin) = turn[v * x % p];
                    (re + kernel[y * p + x] * cos, im + kernel[y * p + x] * sin)
                });
            }
        }
        for u in 0..p {
            for v in 0..p {
                let (re, im) = (0..p).fold((0.0, 0.0), |(re, im), y| {
                    let ((cos, sin), (a, b)) = (turn[u * y % p], rows[y * p + v]);
                    (re + a * cos - b * sin, im + a * sin + b * cos)
                });
                sums[u * p + v] += f64::hypot(re, im);
            }
        }
    }
    let kernels = (d * channels) as f64;
    let at = |place: usize| (place + p - p / 2) % p;
    Ok((0..p).map(|u| (0..p).map(|v| sums[at(u) * p + at(v)] / kernels).collect()).collect())
}

/// The spectral shift of two towers' patch embeddings.
///
/// # Errors
/// As [`magnitudes`].
pub fn spectrum(pair: &Pair) -> Result<Spectrum> {
    let standard = magnitudes(&pair.standard.patch_embedding()?)?;
    let robust = magnitudes(&pair.robust.patch_embedding()?)?;
    let patch = standard.len();
    let frequencies: Vec<i64> = (0..patch).map(|i| i as i64 - (patch / 2) as i64).collect();
    let both = |f: fn(f64, f64) -> f64| -> Vec<Vec<f64>> {
        let row = |(a, b): (&Vec<f64>, &Vec<f64>)| a.iter().zip(b).map(|(a, b)| f(*a, *b)).collect();
        standard.iter().zip(&robust).map(row).collect()
    };
    let shift = both(|standard, robust| robust - standard);
    // Sums over each ring, and its frequencies.
    let mut rings: Vec<(f64, f64, usize)> = Vec::new();
    for (y, fy) in frequencies.iter().enumerate() {
        for (x, fx) in frequencies.iter().enumerate() {
            let radius = f64::hypot(*fy as f64, *fx as f64).round() as usize;
            if rings.len() <= radius {
                rings.resize(radius + 1, (0.0, 0.0, 0));
            }
            let ring = &mut rings[radius];
            *ring = (ring.0 + standard[y][x], ring.1 + robust[y][x], ring.2 + 1);
        }
    }
    let rings = rings.into_iter().enumerate().filter(|(_, ring)| ring.2 > 0).map(|(radius, (a, b, n))| {
        let (standard, robust) = (a / n as f64, b / n as f64);
        let shift = robust - standard;
        Ring { radius, standard, robust, shift, relative: (standard > 0.0).then(|| shift / standard) }
    });
    let rings = rings.collect();
    Ok(Spectrum { patch, frequencies, standard_magnitude: standard, robust_magnitude: robust, shift, rings })
}

impl Findings for Spectrum {
    const NAME: &'static str = "spectrum";

    fn csv(&self) -> Result<String> {
        let head = ["vertical", "horizontal", "standard", "robust", "shift"].map(String::from).to_vec();
        let mut lines = vec![head];
        for (y, fy) in self.frequencies.iter().enumerate() {
            for (x, fx) in self.frequencies.iter().enumerate() {
                let values = [self.standard_magnitude[y][x], self.robust_magnitude[y][x], self.shift[y][x]];
                let line = [fy.to_string(), fx.to_string()].into_iter().chain(values.map(|v| v.to_string()));
                lines.push(line.collect());
            }
        }
        csv(lines)
    }

    fn svg(&self, towers: [&str; 2], _: Option<&Data>) -> String {
        let cell = (400.0 / self.patch.max(1) as f64).clamp(8.0, 52.0);
        let side = cell * self.patch as f64;
        let lines = [
            names(towers),
            "Strength of the patch embedding's kernels at each frequency, robust less standard, mean over all \
             kernels."
                .to_string(),
            "Middle: even areas and slow changes; edge: fine grain. Red: the robust tower lets more through; \
             blue: less."
                .to_string(),
        ];
        let width = (MARGIN[0] + side + 150.0).max(660.0);
        let lines = Figure::wrap(width, &lines);
        let top = Figure::top(lines.len()) + MARGIN[1];
        let labels: Vec<String> = self.frequencies.iter().map(i64::to_string).collect();
        let title = "What the patch embedding lets through: spectral shift";
        let mut figure = Figure::new(width, top + side + below(&labels), title, &lines);
        let most = self.shift.iter().flatten().fold(0.0, |most: f64, v| most.max(v.abs()));
        let values: Vec<Vec<Option<f64>>> =
            self.shift.iter().map(|row| row.iter().map(|v| Some(*v)).collect()).collect();
        let map = HeatMap {
            title: "Spectral shift",
            axes: ["vertical frequency, cycles per patch", "horizontal frequency, cycles per patch"],
            rows: &labels,
            columns: &labels,
            values: &values,
            scale: Scale::Diverging(most),
            cell,
            digits: digits(most),
        };
        let (right, _) = map.draw(&mut figure, (MARGIN[0], top));
        let meaning = "shift of the magnitude";
        colour_bar(&mut figure, (right + 24.0, top), side, Scale::Diverging(most), digits(most), meaning);
        figure.finish()
    }

    fn table(&self) -> String {
        let mut lines = vec![format!(
            "{:>16} {:>10} {:>10} {:>10} {:>9}",
            "cycles per patch", "standard", "robust", "shift", "relative"
        )];
        for ring in &self.rings {
            let relative = ring.relative.map_or("-".into(), |v| format!("{:+.1} %", 100.0 * v));
            lines.push(format!(
                "{:>16} {:>10.4} {:>10.4} {:>+10.4} {:>9}",
                ring.radius, ring.standard, ring.robust, ring.shift, relative
            ));
        }
        lines.join("\n")
    }
}

/// Digits behind the point that tell numbers up to `most` apart.
fn digits(most: f64) -> usize {
    if most > 0.0 { (2.0 - most.log10().floor()).clamp(0.0, 6.0) as usize } else { 2 }
}
