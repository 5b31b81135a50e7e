//! Linear centred kernel alignment (CKA) of two towers' layers: 1 where two layers hold the same
//! representation up to rotation and scale, 0 where they have nothing to do with each other.
//!
//! For large sets the estimate over minibatches (Nguyen et al. 2021, "Do Wide and Deep Networks
//! Learn the Same Things?", with the unbiased HSIC of Song et al. 2012), which is the same for any
//! size of minibatch up to chance; where all features fit into memory also the paper's Eq. 3 over
//! the whole sample, whose HSIC is biased upwards.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::plot::{Figure, HeatMap, MARGIN, Scale, below, colour_bar};
use super::{Data, Failed, Findings, Pair, Sample, Tokens, Which, csv, names, pictures, run};
use crate::attack::picture_rng;
use crate::tower::{VisionTower, Want};
use crate::{Error, Result};
use rand_chacha::rand_core::RngCore;

/// The most bytes that the exact estimate may hold.
pub const EXACT_BYTES: usize = 2 << 30;
/// The smallest minibatch that unbiased HSIC is defined for.
pub const SMALLEST: usize = 4;
/// A layer whose centred features are this much smaller than the features does not vary beyond
/// rounding.
const STILL: f64 = 1e-12;

/// CKA of each layer of one tower (rows) with each of another (columns); `None` where a layer does
/// not vary from picture to picture, as the class token before block 1.
pub type Map = Vec<Vec<Option<f64>>>;

/// The three maps that two towers have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Maps {
    /// Standard tower's layers down, robust tower's across.
    pub cross: Map,
    /// The standard tower's with its own.
    pub standard: Map,
    /// The robust tower's with its own.
    pub robust: Map,
}

/// How alike two towers' layers are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cka {
    /// What makes a layer's representation.
    pub tokens: Tokens,
    /// The layers: `emb`, the input of block 1, and `b1` and so on, the output of a block.
    pub layers: Vec<String>,
    /// Pictures in a minibatch.
    pub batch: usize,
    /// Minibatches.
    pub batches: usize,
    /// The estimate over minibatches.
    pub minibatch: Maps,
    /// The paper's Eq. 3 over the whole sample, where it fits.
    pub exact: Option<Maps>,
    /// Why there is no `exact`.
    pub exact_left_out: Option<String>,
}

/// Features centred over pictures and multiplied with themselves: `(B, F)` of any dtype to the
/// centred Gram matrix, B rows of B, and the mean square of the uncentred features' lengths.
fn gram(features: &Tensor) -> Result<(Vec<f64>, f64)> {
    let (n, _) = features.dims2()?;
    let x = features.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let size = x.sqr()?.sum_all()?.to_scalar::<f64>()? / n.max(1) as f64;
    let x = x.broadcast_sub(&x.mean_keepdim(0)?)?;
    Ok((x.matmul(&x.t()?)?.flatten_all()?.to_vec1()?, size))
}

/// The centred Gram matrix with its diagonal and what is left of its rows' means taken out, so that
/// products of two such matrices are unbiased (Székely and Rizzo 2014); over n (n - 3) they are the
/// HSIC of Song et al.
fn u_centred(mut gram: Vec<f64>, n: usize) -> Vec<f64> {
    for i in 0..n {
        gram[i * n + i] = 0.0;
    }
    let sums: Vec<f64> = gram.chunks_exact(n).map(|row| row.iter().sum()).collect();
    let whole: f64 = sums.iter().sum::<f64>() / ((n - 1) as f64 * (n - 2) as f64);
    let part = (n - 2) as f64;
    for (i, row) in gram.chunks_exact_mut(n).enumerate() {
        for (j, value) in row.iter_mut().enumerate() {
            *value = if i == j { 0.0 } else { *value - sums[i] / part - sums[j] / part + whole };
        }
    }
    gram
}

/// Sums of HSIC between layers.
#[derive(Debug, Clone)]
pub struct Hsic {
    layers: usize,
    /// Each layer with each, row by row.
    sums: Vec<f64>,
    /// Of each layer, the largest mean square of its features' lengths in a minibatch.
    sizes: Vec<f64>,
    batches: usize,
}

impl Hsic {
    /// For so many layers, of whatever towers.
    pub fn new(layers: usize) -> Self {
        Self { layers, sums: vec![0.0; layers * layers], sizes: vec![0.0; layers], batches: 0 }
    }

    /// Minibatches so far.
    pub fn batches(&self) -> usize {
        self.batches
    }

    /// Adds a minibatch's unbiased HSIC: `features` are `(B, F)` for each layer, F its own, with the
    /// same pictures in the same rows.
    ///
    /// # Errors
    /// If there are other than as many layers, or fewer than 4 pictures.
    pub fn add(&mut self, features: &[Tensor]) -> Result<()> {
        let n = self.check(features, SMALLEST)?;
        let grams: Vec<(Vec<f64>, f64)> = features.iter().map(gram).collect::<Result<_>>()?;
        let (grams, sizes): (Vec<_>, Vec<_>) =
            grams.into_iter().map(|(gram, size)| (u_centred(gram, n), size)).unzip();
        self.accumulate(&grams, &sizes, 1.0 / (n as f64 * (n as f64 - 3.0)));
        Ok(())
    }

    fn check(&self, features: &[Tensor], least: usize) -> Result<usize> {
        if features.len() != self.layers {
            return Err(Error::argument("features", format!("{} layers", self.layers), features.len()));
        }
        let mut n = None;
        for layer in features {
            let (rows, _) = layer.dims2()?;
            if rows < least || n.is_some_and(|n| n != rows) {
                let expected = n.map_or(format!("at least {least} pictures"), |n| format!("{n} pictures"));
                return Err(Error::argument("features", expected, rows));
            }
            n = Some(rows);
        }
        n.ok_or_else(|| Error::argument("features", "at least one layer", 0))
    }

    fn accumulate(&mut self, grams: &[Vec<f64>], sizes: &[f64], share: f64) {
        let layers = self.layers;
        let pairs: Vec<(usize, usize)> = (0..layers).flat_map(|i| (i..layers).map(move |j| (i, j))).collect();
        let found: Vec<f64> = pairs
            .par_iter()
            .map(|&(i, j)| share * grams[i].iter().zip(&grams[j]).map(|(a, b)| a * b).sum::<f64>())
            .collect();
        for ((i, j), value) in pairs.into_iter().zip(found) {
            self.sums[i * layers + j] += value;
            if i != j {
                self.sums[j * layers + i] += value;
            }
        }
        for (size, found) in self.sizes.iter_mut().zip(sizes) {
            *size = size.max(*found);
        }
        self.batches += 1;
    }

    /// The CKA of the layers `rows` with the layers `columns`.
    pub fn cka(&self, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>) -> Map {
        let own = |i: usize| {
            let value = self.sums[i * self.layers + i] / self.batches.max(1) as f64;
            (value > 0.0 && value.sqrt() > STILL * self.sizes[i]).then(|| value.sqrt())
        };
        let at = |i: usize, j: usize| {
            let value = self.sums[i * self.layers + j] / self.batches.max(1) as f64;
            Some(value / (own(i)? * own(j)?))
        };
        rows.map(|i| columns.clone().map(|j| at(i, j)).collect()).collect()
    }

    /// The maps of two towers of `layers` layers each, the standard tower's first.
    fn maps(&self, layers: usize) -> Maps {
        let (standard, robust) = (0..layers, layers..2 * layers);
        Maps {
            cross: self.cka(standard.clone(), robust.clone()),
            standard: self.cka(standard.clone(), standard),
            robust: self.cka(robust.clone(), robust),
        }
    }
}

/// HSIC of the paper's Eq. 3 over a whole sample: tr(K H L H), biased. `features` as in
/// [`Hsic::add`], of at least 2 pictures.
///
/// # Errors
/// As [`Hsic::add`].
pub fn exact(features: &[Tensor]) -> Result<Hsic> {
    let mut hsic = Hsic::new(features.len());
    hsic.check(features, 2)?;
    let grams: Vec<(Vec<f64>, f64)> = features.iter().map(gram).collect::<Result<_>>()?;
    let (grams, sizes): (Vec<_>, Vec<_>) = grams.into_iter().unzip();
    // Centred, the sum over all pairs is of the order of n^2.
    let n = features.first().map_or(1, |layer| layer.dims()[0]) as f64;
    hsic.accumulate(&grams, &sizes, 1.0 / (n * n));
    Ok(hsic)
}

/// How the pictures are gone through.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// What makes a layer's representation.
    pub tokens: Tokens,
    /// Pictures in a minibatch, at least 4. Both towers' features of so many are held at once.
    pub batch: usize,
    /// Leave the exact estimate out.
    pub minibatch_only: bool,
    /// Seed of which pictures come together in a minibatch.
    pub seed: u64,
}

/// Numbers of the pictures in an order drawn at random, which depends on their names and `seed`.
fn shuffled(sample: &Sample, seed: u64) -> Vec<usize> {
    let draw = |item: &usize| {
        let key = crate::attack::key(&sample.set.items()[*item].id);
        (picture_rng(seed, key, 0, "cka").next_u64(), *item)
    };
    let mut order = sample.order();
    order.sort_by_cached_key(draw);
    order
}

/// CKA of two towers over pictures. `told` hears how many are done.
///
/// # Errors
/// If the minibatch is too small, no minibatch has enough pictures that can be read, or a tower
/// fails.
pub fn cka(
    pair: &Pair,
    sample: &Sample,
    options: &Options,
    told: &mut dyn FnMut(usize),
) -> Result<(Cka, Vec<Failed>)> {
    if options.batch < SMALLEST {
        return Err(Error::argument("--batch", format!("at least {SMALLEST} pictures"), options.batch));
    }
    let spec = pair.standard.spec();
    let layers = spec.blocks + 1;
    let want = Want { hidden: (0..layers).collect(), ..Want::default() };
    let order = shuffled(sample, options.seed);
    // Minibatches of nearly one size: none is too small at the end.
    let batches = order.len().div_ceil(options.batch).max(1);
    let batches = if order.len() / batches < SMALLEST { (order.len() / SMALLEST).max(1) } else { batches };
    let size = order.len().div_ceil(batches);
    let width = match options.tokens {
        Tokens::All => spec.tokens() * spec.hidden,
        Tokens::Class | Tokens::Mean => spec.hidden,
    };
    let n = order.len();
    let bytes = 2 * layers * n * (4 * width + 8 * n);
    let exact_left_out = if options.minibatch_only {
        Some("it was not asked for".to_string())
    } else {
        (bytes > EXACT_BYTES).then(|| {
            format!(
                "it would hold {:.1} GiB, more than {}",
                bytes as f64 / f64::from(1 << 30),
                EXACT_BYTES >> 30
            )
        })
    };
    let mut hsic = Hsic::new(2 * layers);
    let mut kept: Vec<Vec<Tensor>> = vec![Vec::new(); 2 * layers];
    let mut done = 0;
    let mut small: Vec<Failed> = Vec::new();
    let mut failed = sample.each(&order, size, |pixels, items| {
        done += items.len();
        let mut features = Vec::new();
        for which in [Which::Standard, Which::Robust] {
            let tower = pair.tower(which);
            let found = run(tower.batch(), pixels, |pixels| {
                tower.forward(pixels, &want)?.hidden.iter().map(|layer| options.tokens.take(layer)).collect()
            })?;
            features.extend(found);
        }
        if items.len() >= SMALLEST {
            hsic.add(&features)?;
        } else {
            let reason = format!("fewer than {SMALLEST} of its minibatch can be read");
            let fail =
                |&item: &usize| Failed { id: sample.set.items()[item].id.clone(), reason: reason.clone() };
            small.extend(items.iter().map(fail));
        }
        if exact_left_out.is_none() && items.len() >= SMALLEST {
            kept.iter_mut().zip(features).for_each(|(all, part)| all.push(part));
        }
        told(done);
        Ok(())
    })?;
    if hsic.batches() == 0 {
        return Err(Error::argument("--n", format!("at least {SMALLEST} pictures that can be read"), done));
    }
    failed.extend(small);
    let exact = if exact_left_out.is_none() {
        let whole = kept.iter().map(|parts| Ok(Tensor::cat(parts, 0)?)).collect::<Result<Vec<_>>>()?;
        Some(exact(&whole)?.maps(layers))
    } else {
        None
    };
    let name = |layer: usize| if layer == 0 { "emb".into() } else { format!("b{layer}") };
    let found = Cka {
        tokens: options.tokens,
        layers: (0..layers).map(name).collect(),
        batch: size,
        batches: hsic.batches(),
        minibatch: hsic.maps(layers),
        exact,
        exact_left_out,
    };
    Ok((found, failed))
}

impl Cka {
    fn estimates(&self) -> Vec<(&'static str, &Maps)> {
        let exact = self.exact.as_ref().map(|maps| ("exact", maps));
        std::iter::once(("minibatch", &self.minibatch)).chain(exact).collect()
    }
}

impl Findings for Cka {
    const NAME: &'static str = "cka";

    fn csv(&self) -> Result<String> {
        let head = ["estimate", "towers", "row", "column", "cka"].map(String::from).to_vec();
        let mut lines = vec![head];
        for (estimate, maps) in self.estimates() {
            for (towers, map) in [
                ("standard-robust", &maps.cross),
                ("standard-standard", &maps.standard),
                ("robust-robust", &maps.robust),
            ] {
                for (row, values) in self.layers.iter().zip(map) {
                    for (column, value) in self.layers.iter().zip(values) {
                        let value = value.map_or(String::new(), |value| value.to_string());
                        lines.push(vec![estimate.into(), towers.into(), row.clone(), column.clone(), value]);
                    }
                }
            }
        }
        csv(lines)
    }

    fn svg(&self, towers: [&str; 2], data: Option<&Data>) -> String {
        let cell = (380.0 / self.layers.len().max(1) as f64).clamp(12.0, 44.0);
        let side = cell * self.layers.len() as f64;
        let tokens = match self.tokens {
            Tokens::All => "all tokens of a picture",
            Tokens::Class => "the class token",
            Tokens::Mean => "the mean over a picture's tokens",
        };
        let lines = [
            names(towers),
            format!(
                "{} Features: {tokens}. Linear CKA, {} minibatches of about {} (unbiased HSIC).",
                pictures(data),
                self.batches,
                self.batch
            ),
            "1: the two layers hold the same representation up to rotation and scale; 0: nothing in common. emb: \
             the input of block 1; b1: the output of block 1."
                .to_string(),
            "Left: had the fine-tuning changed nothing, it would look like the right one, bright on the diagonal."
                .to_string(),
        ];
        let second = MARGIN[0] + side + MARGIN[0] + 10.0;
        let width = (second + side + 120.0).max(820.0);
        let lines = Figure::wrap(width, &lines);
        let top = Figure::top(lines.len()) + MARGIN[1];
        let mut figure = Figure::new(
            width,
            top + side + below(&self.layers),
            "How alike the layers of the two towers are (CKA)",
            &lines,
        );
        let scale = Scale::Sequential(0.0, 1.0);
        let mut draw = |title: &str, axes: [&str; 2], values: &Map, x: f64| {
            let map = HeatMap {
                title,
                axes,
                rows: &self.layers,
                columns: &self.layers,
                values,
                scale,
                cell,
                digits: 2,
            };
            map.draw(&mut figure, (x, top))
        };
        let maps = &self.minibatch;
        draw(
            "Standard and robust",
            ["layer of the standard tower", "layer of the robust tower"],
            &maps.cross,
            MARGIN[0],
        );
        let (right, _) = draw(
            "Standard and itself, for comparison",
            ["layer of the standard tower", "layer of the standard tower"],
            &maps.standard,
            second,
        );
        colour_bar(&mut figure, (right + 24.0, top), side, scale, 2, "CKA");
        figure.finish()
    }

    fn table(&self) -> String {
        let cell = |value: &Option<f64>| value.map_or("     -".into(), |value| format!("{value:6.3}"));
        let names: Vec<String> = self.layers.iter().map(|name| format!("{name:>6}")).collect();
        let mut lines = vec![format!(
            "CKA, standard tower's layers down, robust tower's across\n{:>6} {}",
            "",
            names.join(" ")
        )];
        for (name, row) in self.layers.iter().zip(&self.minibatch.cross) {
            lines.push(format!("{name:>6} {}", row.iter().map(cell).collect::<Vec<_>>().join(" ")));
        }
        if let Some(reason) = &self.exact_left_out {
            lines.push(format!("the exact estimate was left out: {reason}"));
        }
        lines.join("\n")
    }
}
