//! Where the class token looks in the first block: its attention to each patch, over the picture
//! (the paper's Fig. 3 b, 13 and 14), with figures of how spread, how bright and how alike the
//! maps are.

use std::io::Cursor;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::insensitivity::{mean_between, unit};
use super::plot::{Anchor, Figure, Scale, colour_bar};
use super::{Data, Failed, Findings, Pair, Sample, Which, csv, mean_interval, names, pictures, run};
use crate::image::rgb_from_pixels;
use crate::tower::{VisionTower, Want};
use crate::{Error, Result};

/// What the class token of one tower's first block looks at in one picture; weights sum to 1 with
/// its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// Its weight on itself, mean over the heads.
    pub class: f64,
    /// Its weight on each patch, row by row of the picture, mean over the heads.
    pub patches: Vec<f64>,
    /// The same of each head.
    pub heads: Vec<Vec<f64>>,
}

/// A picture that is drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Drawn {
    /// Its name.
    pub id: String,
    /// What the standard tower looks at.
    pub standard: Seen,
    /// What the robust tower looks at.
    pub robust: Seen,
    /// The prepared picture as PNG, for the figure alone.
    #[serde(skip)]
    png: Vec<u8>,
}

/// A mean with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// The mean.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl From<(f64, f64, f64)> for Mean {
    fn from((value, low, high): (f64, f64, f64)) -> Self {
        Self { value, low, high }
    }
}

/// Figures of one tower's maps over all pictures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Habit {
    /// Which tower.
    pub tower: Which,
    /// The class token's weight on itself.
    pub class: Mean,
    /// Entropy of the patches' weights, over that of equal weights: 1 looks everywhere alike.
    pub entropy: Mean,
    /// Pearson correlation of a patch's weight with its brightness (Rec. 601 luma); positive: it
    /// looks at what is bright. Pictures of one brightness are left out; `None` if all are.
    pub brightness: Option<Mean>,
    /// Mean cosine of the maps of two different pictures: 1 looks at the same places in all.
    /// `None` of fewer than 2 pictures.
    pub between_pictures: Option<Mean>,
}

/// First-block attention maps of two towers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attention {
    /// Patches down and across.
    pub grid: (usize, usize),
    /// Pictures that the figures are of.
    pub pictures: usize,
    /// The figures, of the standard tower and of the robust one.
    pub habits: Vec<Habit>,
    /// The pictures that are drawn.
    pub drawn: Vec<Drawn>,
    /// Whether every head is drawn.
    pub each_head: bool,
}

/// The class token's weights in `tower`'s first block for pixels `(B, 3, H, W)`: `(B, h, N)`, the
/// first of N its own.
///
/// # Errors
/// If the pixels have another shape than the tower's.
pub fn class_weights(tower: &crate::tower::clip::Clip, pixels: &Tensor) -> Result<Tensor> {
    let block = tower.block_parts(0)?;
    let (tokens, heads) = (tower.spec().tokens(), tower.spec().heads);
    let found = run(tower.batch(), pixels, |pixels| {
        let features = tower.forward(pixels, &Want::hidden(0))?;
        let missing = || Error::Unsupported("the tower gave no hidden state".into());
        let stream = features.hidden.first().ok_or_else(missing)?;
        let weights = block.attention.weights(&block.norm1.forward(stream)?)?;
        let weights = weights.narrow(1, 0, 1)?.reshape((pixels.dim(0)?, heads, tokens))?;
        Ok(vec![weights.to_dtype(DType::F32)?.to_device(&Device::Cpu)?])
    })?;
    found.into_iter().next().ok_or_else(|| Error::argument("pixels", "at least one picture", "none"))
}

/// The brightness of each patch of pixels `(3, H, W)`, row by row.
fn brightness(pixels: &Tensor, grid: (usize, usize), patch: usize) -> Result<Vec<f64>> {
    let planes = pixels.to_device(&Device::Cpu)?.to_vec3::<f32>()?;
    let luma = |y: usize, x: usize| {
        [0.299, 0.587, 0.114]
            .iter()
            .zip(&planes)
            .map(|(share, plane)| share * f64::from(plane[y][x]))
            .sum::<f64>()
    };
    let mut all = Vec::with_capacity(grid.0 * grid.1);
    for row in 0..grid.0 {
        for column in 0..grid.1 {
            let places = (0..patch * patch).map(|i| (row * patch + i / patch, column * patch + i % patch));
            all.push(places.map(|(y, x)| luma(y, x)).sum::<f64>() / (patch * patch) as f64);
        }
    }
    Ok(all)
}

/// Pearson's correlation; `None` where one of them does not vary.
fn correlation(a: &[f64], b: &[f64]) -> Option<f64> {
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        a.iter().zip(b).map(|(a, b)| f(a - mean_a, b - mean_b)).sum()
    };
    let (own_a, own_b) = (sum(&|a, _| a * a), sum(&|_, b| b * b));
    (own_a > 1e-18 && own_b > 1e-18).then(|| sum(&|a, b| a * b) / (own_a * own_b).sqrt())
}

/// Entropy of weights, over that of equal ones.
fn entropy(weights: &[f64]) -> f64 {
    let whole: f64 = weights.iter().sum();
    if weights.len() < 2 || whole <= 0.0 {
        return 1.0;
    }
    let terms = weights.iter().map(|w| w / whole).filter(|p| *p > 0.0).map(|p| -p * p.ln());
    terms.sum::<f64>() / (weights.len() as f64).ln()
}

/// What a tower's maps come to, picture by picture.
#[derive(Default)]
struct Found {
    class: Vec<f64>,
    entropy: Vec<f64>,
    brightness: Vec<f64>,
    maps: Vec<Vec<f32>>,
}

/// First-block attention of two towers over pictures, the first `drawn` of which are kept to be
/// drawn, each head beside the mean of all where `each_head`. `told` hears how many are done.
///
/// # Errors
/// If no picture can be read, or a tower fails.
pub fn attention(
    pair: &Pair,
    sample: &Sample,
    drawn: usize,
    each_head: bool,
    told: &mut dyn FnMut(usize),
) -> Result<(Attention, Vec<Failed>)> {
    const BATCH: usize = 64;
    let spec = pair.standard.spec();
    let (grid, patch) = (spec.grid, spec.patch_size);
    let towers = [Which::Standard, Which::Robust];
    let mut found: [Found; 2] = Default::default();
    let mut kept: Vec<Drawn> = Vec::new();
    let mut done = 0;
    let failed = sample.each(&sample.order(), BATCH, |pixels, items| {
        let weights = towers
            .map(|which| class_weights(pair.tower(which), pixels)?.to_vec3::<f32>().map_err(Error::from));
        let [standard, robust] = weights;
        let weights = [standard?, robust?];
        for (i, &item) in items.iter().enumerate() {
            let picture = pixels.get(i)?;
            let bright = brightness(&picture, grid, patch)?;
            let seen = [&weights[0][i], &weights[1][i]].map(|heads| seen(heads));
            for (found, seen) in found.iter_mut().zip(&seen) {
                found.class.push(seen.class);
                found.entropy.push(entropy(&seen.patches));
                found.brightness.extend(correlation(&seen.patches, &bright));
                found.maps.push(unit(seen.patches.iter().map(|w| *w as f32).collect()));
            }
            if kept.len() < drawn {
                let [standard, robust] = seen;
                let id = sample.set.items()[item].id.clone();
                kept.push(Drawn { id, standard, robust, png: png(&picture)? });
            }
        }
        done += items.len();
        told(done);
        Ok(())
    })?;
    let habits = towers.into_iter().zip(&found).map(|(tower, found)| Habit {
        tower,
        class: mean_interval(&found.class).into(),
        entropy: mean_interval(&found.entropy).into(),
        brightness: (!found.brightness.is_empty()).then(|| mean_interval(&found.brightness).into()),
        between_pictures: (found.maps.len() > 1).then(|| mean_between(&found.maps, &found.maps).into()),
    });
    let habits = habits.collect();
    Ok((Attention { grid, pictures: done, habits, drawn: kept, each_head }, failed))
}

/// From a picture's weights by head, the class token's own first.
fn seen(heads: &[Vec<f32>]) -> Seen {
    let n = heads.len().max(1) as f64;
    let tokens = heads.first().map_or(0, Vec::len);
    let mean = |token: usize| heads.iter().map(|head| f64::from(head[token])).sum::<f64>() / n;
    Seen {
        class: if tokens > 0 { mean(0) } else { 0.0 },
        patches: (1..tokens).map(mean).collect(),
        heads: heads.iter().map(|head| head.iter().skip(1).map(|w| f64::from(*w)).collect()).collect(),
    }
}

fn png(pixels: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(Vec::new());
    let picture = rgb_from_pixels(&pixels.to_device(&Device::Cpu)?)?;
    let failed = |e: image::ImageError| Error::Unsupported(format!("png: {e}"));
    picture.write_to(&mut bytes, image::ImageFormat::Png).map_err(failed)?;
    Ok(bytes.into_inner())
}

impl Findings for Attention {
    const NAME: &'static str = "attention";

    fn csv(&self) -> Result<String> {
        let head = ["picture", "tower", "row", "column", "weight"].map(String::from).to_vec();
        let mut lines = vec![head];
        for drawn in &self.drawn {
            for (tower, seen) in [(Which::Standard, &drawn.standard), (Which::Robust, &drawn.robust)] {
                for (i, weight) in seen.patches.iter().enumerate() {
                    let (row, column) = (i / self.grid.1.max(1), i % self.grid.1.max(1));
                    let place = [row.to_string(), column.to_string(), weight.to_string()];
                    lines.push([drawn.id.clone(), tower.to_string()].into_iter().chain(place).collect());
                }
            }
        }
        csv(lines)
    }

    fn svg(&self, towers: [&str; 2], data: Option<&Data>) -> String {
        const SIDE: f64 = 132.0;
        const APART: f64 = 16.0;
        const LEFT: f64 = 20.0;
        let heads = if self.each_head { self.drawn.first().map_or(0, |d| d.standard.heads.len()) } else { 0 };
        let lines = [
            names(towers),
            format!("{} First {} drawn.", pictures(data), self.drawn.len()),
            "How much of its attention the class token of block 1 gives to each patch, mean over the heads."
                .to_string(),
            "Each map has its own scale, from none to its largest weight, which is given below it (max), with the \
             class token's weight on itself (own)."
                .to_string(),
        ];
        let mut columns: Vec<(String, Which, Option<usize>)> = Vec::new();
        for which in [Which::Standard, Which::Robust] {
            columns.push((format!("{which} tower"), which, None));
            columns.extend((0..heads).map(|head| (format!("{which}, head {}", head + 1), which, Some(head))));
        }
        let row_height = SIDE + 40.0;
        let across = LEFT + (SIDE + APART) * (columns.len() + 1) as f64;
        let rows = self.drawn.len().max(1) as f64;
        let width = (across + 110.0).max(640.0);
        let lines = Figure::wrap(width, &lines);
        let top = Figure::top(lines.len()) + 26.0;
        let mut figure =
            Figure::new(width, top + row_height * rows + 10.0, "Where the first block looks", &lines);
        figure.bold((LEFT, top - 10.0), Anchor::Start, "picture");
        for (i, (name, ..)) in columns.iter().enumerate() {
            figure.bold((LEFT + (SIDE + APART) * (i + 1) as f64, top - 10.0), Anchor::Start, name);
        }
        let scale = Scale::Sequential(0.0, 1.0);
        for (r, drawn) in self.drawn.iter().enumerate() {
            let y = top + row_height * r as f64;
            let uri = format!("data:image/png;base64,{}", STANDARD.encode(&drawn.png));
            let picture = |x: f64| {
                format!(
                    "<image x=\"{x:.1}\" y=\"{y:.1}\" width=\"{SIDE}\" height=\"{SIDE}\" href=\"{uri}\"/>\n"
                )
            };
            figure.raw(&picture(LEFT));
            figure.text((LEFT, y + SIDE + 16.0), Anchor::Start, &crate::page::shorten(&drawn.id, 22));
            for (i, (_, which, head)) in columns.iter().enumerate() {
                let seen = if *which == Which::Standard { &drawn.standard } else { &drawn.robust };
                let weights = head.map_or(&seen.patches, |head| &seen.heads[head]);
                let x = LEFT + (SIDE + APART) * (i + 1) as f64;
                let most = weights.iter().copied().fold(0.0, f64::max);
                let cell = (SIDE / self.grid.1.max(1) as f64, SIDE / self.grid.0.max(1) as f64);
                figure.raw(&picture(x));
                figure.raw("<g fill-opacity=\"0.72\">\n");
                for (i, weight) in weights.iter().enumerate() {
                    let (row, column) = (i / self.grid.1.max(1), i % self.grid.1.max(1));
                    let corner = (x + cell.0 * column as f64, y + cell.1 * row as f64);
                    let colour = scale.colour(Some(if most > 0.0 { weight / most } else { 0.0 }));
                    figure.rect(corner, cell, &colour, &format!("{:.2} %", 100.0 * weight));
                }
                figure.raw("</g>\n");
                let text = match head {
                    None => format!("max {:.1} %, own {:.1} %", 100.0 * most, 100.0 * seen.class),
                    Some(_) => format!("max {:.1} %", 100.0 * most),
                };
                figure.text((x, y + SIDE + 16.0), Anchor::Start, &text);
            }
        }
        colour_bar(&mut figure, (across + 6.0, top), SIDE, scale, 2, "of the map's largest");
        figure.finish()
    }

    fn table(&self) -> String {
        let mut lines = vec![format!(
            "{:9} {:>14} {:>12} {:>24} {:>18}",
            "tower", "class on class", "entropy", "brightness correlation", "cosine of two maps"
        )];
        let text = |mean: &Mean| format!("{:.3}", mean.value);
        for habit in &self.habits {
            let optional = |mean: &Option<Mean>| mean.as_ref().map_or("-".into(), text);
            lines.push(format!(
                "{:9} {:>14} {:>12} {:>24} {:>18}",
                habit.tower.to_string(),
                text(&habit.class),
                text(&habit.entropy),
                optional(&habit.brightness),
                optional(&habit.between_pictures),
            ));
        }
        lines.push(format!("{} pictures", self.pictures));
        lines.join("\n")
    }
}
