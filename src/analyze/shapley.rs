//! Shapley values of the first block's attention heads in the robust tower (the paper's
//! Appendix B, Fig. 11): what each head adds to the accuracy, on average over all orders in which
//! heads can be added.
//!
//! The value of some heads is the share of pictures that the tower gets right with only these heads
//! in its first block, attacked ones whatever it makes of the clean picture; of the other heads
//! nothing is added to the residual stream (the output projection's bias stays). The paper takes accuracy on adversarial pictures and does not say what
//! stands in for absent heads, nor what its pictures were crafted on; here the threat model is named.
//! The values of all heads add up to the accuracy with all heads less that with none.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Tensor};
use rand_chacha::rand_core::RngCore;
use serde::{Deserialize, Serialize};

use super::plot::{Chart, Figure, Point, Series, below, chart_size};
use super::{Data, Failed, Findings, Pair, Sample, Side, Which, Z, csv, names, pictures, run};
use crate::attack::{
    Attack, Classification, Eps, Pictures, Progress, Subject, Threat, ThreatKind, TowerClassifier, key,
    picture_rng,
};
use crate::text::ZeroShotHead;
use crate::tower::{AttentionMix, Inserts, Precision, VisionTower, Want};
use crate::{Error, Result};

/// The most heads there may be.
const MOST: usize = 64;

/// Orders in which `heads` heads are added: every one there is, where these are no more than
/// `samples`, else so many drawn at random, each on its own.
pub fn orders(heads: usize, samples: usize, seed: u64) -> Vec<Vec<usize>> {
    let all = (1..=heads).try_fold(1usize, |product, i| product.checked_mul(i));
    if all.is_some_and(|all| all <= samples) {
        let mut found: Vec<Vec<usize>> = vec![Vec::new()];
        for _ in 0..heads {
            found = found
                .into_iter()
                .flat_map(|order| {
                    let left = (0..heads).filter(|head| !order.contains(head)).collect::<Vec<_>>();
                    left.into_iter().map(move |head| order.iter().copied().chain([head]).collect())
                })
                .collect();
        }
        return found;
    }
    (0..samples as u64)
        .map(|i| {
            let mut rng = picture_rng(seed, 0, i, "shapley");
            let mut order: Vec<usize> = (0..heads).collect();
            for place in (1..heads).rev() {
                let pick = (u128::from(rng.next_u64()) * (place as u128 + 1)) >> 64;
                order.swap(place, pick as usize);
            }
            order
        })
        .collect()
}

/// The groups of heads that such orders pass through, the empty one and all heads included; bit i
/// is head i.
pub fn coalitions(orders: &[Vec<usize>]) -> Vec<u64> {
    let mut found = BTreeSet::from([0]);
    for order in orders {
        let mut with = 0;
        for head in order {
            with |= 1u64 << head;
            found.insert(with);
        }
    }
    found.into_iter().collect()
}

/// A head's Shapley value with its errors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeadValue {
    /// The head, from 1.
    pub head: usize,
    /// Its value, in points of percent.
    pub value: f64,
    /// Its standard error for the choice of pictures.
    pub error_pictures: f64,
    /// Its standard error for the choice of orders; 0 where all were gone through.
    pub error_orders: f64,
    /// Lower end of the 95 % interval of both errors together.
    pub low: f64,
    /// Upper end of the 95 % interval of both errors together.
    pub high: f64,
}

/// Shapley values from the worth of each of [`coalitions`] on every picture, in the order of the
/// pictures. `exact` says that `orders` are all there are.
///
/// # Errors
/// If a coalition is missing, or not all have as many pictures, or there is none.
pub fn shapley_values(
    heads: usize,
    orders: &[Vec<usize>],
    exact: bool,
    worth: &BTreeMap<u64, Vec<f64>>,
) -> Result<Vec<HeadValue>> {
    let n = worth.values().next().map_or(0, Vec::len);
    if n == 0 || orders.is_empty() || worth.values().any(|w| w.len() != n) {
        return Err(Error::argument("worth", "one per picture of every coalition", n));
    }
    // By head: sums over orders of what it adds to each picture, and by order to all of them.
    let mut by_picture = vec![vec![0.0; n]; heads];
    let mut by_order = vec![Vec::with_capacity(orders.len()); heads];
    let missing =
        |with: u64| Error::argument("worth", "one of every coalition", format!("none of {with:#b}"));
    for order in orders {
        let mut with = 0u64;
        for &head in order {
            let before = worth.get(&with).ok_or_else(|| missing(with))?;
            with |= 1 << head;
            let after = worth.get(&with).ok_or_else(|| missing(with))?;
            let mut whole = 0.0;
            for ((sum, after), before) in by_picture[head].iter_mut().zip(after).zip(before) {
                *sum += after - before;
                whole += after - before;
            }
            by_order[head].push(whole / n as f64);
        }
    }
    let error = |values: &[f64], mean: f64| {
        let n = values.len() as f64;
        let square: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        if values.len() > 1 { (square / (n - 1.0) / n).sqrt() } else { 0.0 }
    };
    let value = |head: usize| {
        let of_picture: Vec<f64> = by_picture[head].iter().map(|sum| sum / orders.len() as f64).collect();
        let value = of_picture.iter().sum::<f64>() / n as f64;
        let error_pictures = error(&of_picture, value);
        let error_orders = if exact { 0.0 } else { error(&by_order[head], value) };
        let both = Z * f64::hypot(error_pictures, error_orders);
        HeadValue {
            head: head + 1,
            value,
            error_pictures,
            error_orders,
            low: value - both,
            high: value + both,
        }
    };
    Ok((0..heads).map(value).collect())
}

/// Shapley values on pictures of one kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Valued {
    /// The attack's name; `None` for clean pictures, as all up to `surrogate`.
    pub attack: Option<String>,
    /// The radius of its ball.
    pub eps: Option<Eps>,
    /// The threat model: what the pictures were crafted on, seen from the robust tower with all its
    /// heads.
    pub threat: Option<ThreatKind>,
    /// The tower crafted on, of transfer pictures.
    pub surrogate: Option<String>,
    /// Pictures.
    pub n: usize,
    /// Percent right with all heads.
    pub whole: f64,
    /// Percent right with none.
    pub none: f64,
    /// By head, in points of percent.
    pub heads: Vec<HeadValue>,
}

/// What the first block's heads have to do with accuracy and robustness.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shapley {
    /// Heads.
    pub heads: usize,
    /// Orders gone through.
    pub orders: usize,
    /// Whether these are all there are.
    pub exact: bool,
    /// Groups of heads that were scored.
    pub coalitions: usize,
    /// On clean pictures, then on attacked ones by threat model.
    pub values: Vec<Valued>,
}

/// The first block's attention output, as it is to be.
struct Fixed(Tensor);

impl AttentionMix for Fixed {
    fn needs_attention(&self) -> bool {
        false
    }

    fn apply(&self, _: Option<&Tensor>, batch: usize, dtype: DType) -> Result<Tensor> {
        if self.0.dim(0)? != batch {
            return Err(Error::argument("attention output", format!("{batch} pictures'"), self.0.dim(0)?));
        }
        Ok(self.0.to_dtype(dtype)?)
    }

    fn vjp_attention(&self, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }

    fn vjp_anchor(&self, _: &Tensor) -> Result<Tensor> {
        Err(Error::Unsupported("heads are scored without a gradient".into()))
    }
}

/// The robust tower with a zero-shot head, some of its first block's heads left out.
struct Ablated<'a> {
    /// Weights as tensors, for the first block.
    plain: &'a crate::tower::clip::Clip,
    /// The same tower, as fast as it gets.
    fast: &'a crate::tower::clip::Clip,
    head: &'a ZeroShotHead,
}

impl Ablated<'_> {
    /// The class that each of pixels `(B, 3, H, W)` is given with only the heads of each coalition:
    /// a row per picture, a column per coalition; the number of classes where logits are not
    /// numbers.
    fn classes(&self, pixels: &Tensor, coalitions: &[u64]) -> Result<Vec<Vec<u32>>> {
        let block = self.plain.block_parts(0)?;
        let bias = block.attention.out.bias().cloned();
        let none = self.head.classes.len() as u32;
        let found = run(self.fast.batch(), pixels, |pixels| {
            let batch = pixels.dim(0)?;
            // One picture after the other: products' bits depend on how many they are given.
            let mut rows: Vec<Vec<Tensor>> = Vec::new();
            for i in 0..batch {
                let features = self.plain.forward(&pixels.narrow(0, i, 1)?, &Want::hidden(0))?;
                let missing = || Error::Unsupported("the tower gave no hidden state".into());
                let stream = features.hidden.first().ok_or_else(missing)?;
                rows.push(block.attention.by_head(&block.norm1.forward(stream)?)?);
            }
            let heads = rows.first().map_or(0, Vec::len);
            let by_head = (0..heads)
                .map(|head| {
                    let column: Vec<&Tensor> = rows.iter().map(|row| &row[head]).collect();
                    Ok(Tensor::cat(&column, 0)?)
                })
                .collect::<Result<Vec<_>>>()?;
            let spec = self.plain.spec();
            let shape = (batch, spec.tokens(), spec.hidden);
            let empty = match &bias {
                Some(bias) => bias.to_dtype(DType::F32)?.broadcast_as(shape)?.contiguous()?,
                None => Tensor::zeros(shape, DType::F32, pixels.device())?,
            };
            let mut columns = Vec::with_capacity(coalitions.len());
            for with in coalitions {
                let mut output = empty.clone();
                for (i, part) in by_head.iter().enumerate().filter(|(i, _)| with >> i & 1 == 1) {
                    debug_assert!(i < MOST);
                    output = (output + part.to_dtype(DType::F32)?)?;
                }
                let mix: Arc<dyn AttentionMix> = Arc::new(Fixed(output));
                let tower = self.fast.with(Inserts { attention: Some(mix), ..Inserts::default() });
                let missing = || Error::Unsupported("the robust tower has no projection".into());
                let embeds = tower.forward(pixels, &Want::pooled())?.embeds.ok_or_else(missing)?;
                let embeds = embeds.to_dtype(DType::F32)?;
                let classes = (0..batch).map(|i| {
                    let logits =
                        self.head.logits(&embeds.narrow(0, i, 1)?)?.flatten_all()?.to_vec1::<f32>()?;
                    Ok(largest(&logits).unwrap_or(none))
                });
                let classes = classes.collect::<Result<Vec<u32>>>()?;
                columns.push(Tensor::from_vec(classes, (batch, 1), &candle_core::Device::Cpu)?);
            }
            Ok(vec![Tensor::cat(&columns, 1)?])
        })?;
        found.first().map_or(Ok(Vec::new()), |rows| Ok(rows.to_vec2::<u32>()?))
    }
}

/// The first of the largest logits; `None` where one is not a number.
fn largest(logits: &[f32]) -> Option<u32> {
    if logits.iter().any(|z| z.is_nan()) {
        return None;
    }
    let mut best = 0;
    for (i, z) in logits.iter().enumerate() {
        if *z > logits[best] {
            best = i;
        }
    }
    Some(best as u32)
}

/// What is gone through.
pub struct Options<'a> {
    /// Orders to draw, where there are more.
    pub orders: usize,
    /// Seed of the orders and of the attack.
    pub seed: u64,
    /// The attack.
    pub attack: &'a dyn Attack,
    /// Under which threat models: `transfer` crafts on the standard tower, `adaptive` on the robust
    /// one with all its heads.
    pub threats: &'a [ThreatKind],
    /// Pictures worked on together; the figures do not depend on it.
    pub batch: usize,
}

/// Shapley values of the first block's heads of the robust tower. `told` hears how many pictures are
/// done, and the share of the attack that is done on those at hand.
///
/// # Errors
/// If a tower has no projection, or more than 64 heads, the attack needs more classes, no picture
/// can be read, or a tower fails.
pub fn shapley(
    pair: &Pair,
    sides: &[Side; 2],
    head: &ZeroShotHead,
    sample: &Sample,
    options: &Options,
    told: &mut dyn FnMut(usize, f64),
) -> Result<(Shapley, Vec<Failed>)> {
    let heads = pair.robust.spec().heads;
    if heads > MOST {
        return Err(Error::argument("--robust", format!("at most {MOST} heads"), heads));
    }
    if options.orders == 0 {
        return Err(Error::argument("--orders", "at least 1", 0));
    }
    let least = options.attack.fewest_classes();
    if least > head.classes.len() {
        let found = format!("{}, which needs {least}", options.attack.name());
        return Err(Error::argument(
            "--attack",
            format!("one that works with {} classes", head.classes.len()),
            found,
        ));
    }
    let orders = orders(heads, options.orders, options.seed);
    let exact = (1..=heads).try_fold(1usize, |product, i| product.checked_mul(i)) == Some(orders.len());
    let coalitions = coalitions(&orders);
    let fast = [Which::Standard, Which::Robust].map(|which| pair.tower(which).clone().packed(Precision::F32));
    let [standard, robust] = fast;
    let (standard, robust) = (standard?, robust?);
    let subjects = [0, 1].map(|i| Subject::undefended(&sides[i].name));
    if subjects[0] == subjects[1] && options.threats.contains(&ThreatKind::Transfer) {
        let expected = "another model than --model for transfer pictures";
        return Err(Error::argument("--robust", expected, &sides[1].name));
    }
    let classifiers = [
        TowerClassifier::new(standard, head, subjects[0].clone())?,
        TowerClassifier::new(robust.clone(), head, subjects[1].clone())?,
    ];
    let ablated = Ablated { plain: &pair.robust, fast: &robust, head };
    // Clean pictures first.
    let kinds: Vec<Option<ThreatKind>> =
        std::iter::once(None).chain(options.threats.iter().copied().map(Some)).collect();
    let mut worth: Vec<BTreeMap<u64, Vec<f64>>> =
        vec![coalitions.iter().map(|with| (*with, Vec::new())).collect(); kinds.len()];
    let mut done = 0;
    let failed = sample.each(&sample.order(), options.batch, |pixels, items| {
        let all = sample.set.items();
        let labels: Vec<usize> = items.iter().map(|&item| all[item].label).collect();
        let keys: Vec<u64> = items.iter().map(|&item| key(&all[item].id)).collect();
        let clean = Pictures::new(pixels, keys)?;
        for (k, (kind, worth)) in kinds.iter().zip(&mut worth).enumerate() {
            let crafted;
            let pixels = match kind {
                None => pixels,
                Some(kind) => {
                    let on = match kind {
                        ThreatKind::Transfer => &classifiers[0],
                        ThreatKind::Adaptive => &classifiers[1],
                    };
                    let task = Classification::new(on, labels.clone())?;
                    let mut progress = |p: &Progress| {
                        let share = p.step as f64 / p.steps.max(1) as f64;
                        told(done, (k as f64 - 1.0 + share) / (kinds.len() - 1) as f64);
                    };
                    crafted = options.attack.craft(&task, &clean, options.seed, &mut progress)?;
                    crafted.pixels()
                }
            };
            let classes = ablated.classes(pixels, &coalitions)?;
            for (row, label) in classes.iter().zip(&labels) {
                for (with, class) in coalitions.iter().zip(row) {
                    if let Some(values) = worth.get_mut(with) {
                        values.push(if *class as usize == *label { 100.0 } else { 0.0 });
                    }
                }
            }
        }
        done += items.len();
        told(done, 0.0);
        Ok(())
    })?;
    let mut values = Vec::new();
    for (kind, worth) in kinds.iter().zip(&worth) {
        let mean =
            |with: u64| worth.get(&with).map_or(0.0, |w| w.iter().sum::<f64>() / w.len().max(1) as f64);
        let whole = coalitions.last().copied().unwrap_or_default();
        let on = kind.map(|kind| kind.crafts_on(&subjects[0], &subjects[1]));
        let threat = kind.zip(on).map(|(kind, on)| kind.threat(on, &subjects[1])).transpose()?;
        values.push(Valued {
            attack: kind.map(|_| options.attack.name().to_string()),
            eps: kind.and_then(|_| options.attack.eps()),
            threat: *kind,
            surrogate: threat.and_then(|threat| match threat {
                Threat::Transfer { surrogate } => Some(surrogate),
                Threat::Adaptive => None,
            }),
            n: done,
            whole: mean(whole),
            none: mean(0),
            heads: shapley_values(heads, &orders, exact, worth)?,
        });
    }
    let found = Shapley { heads, orders: orders.len(), exact, coalitions: coalitions.len(), values };
    Ok((found, failed))
}

impl Valued {
    /// `clean`, or the attack with its threat model.
    fn words(&self) -> String {
        match (&self.attack, self.threat) {
            (Some(attack), Some(threat)) => {
                let eps = self.eps.map_or(String::new(), |eps| format!(" {eps}"));
                format!("{attack}{eps} ({threat})")
            }
            _ => "clean".into(),
        }
    }
}

impl Findings for Shapley {
    const NAME: &'static str = "shapley";

    fn csv(&self) -> Result<String> {
        let head = [
            "attack",
            "eps",
            "threat",
            "n",
            "whole",
            "none",
            "head",
            "value",
            "error_pictures",
            "error_orders",
            "low",
            "high",
        ];
        let mut lines = vec![head.map(String::from).to_vec()];
        for kind in &self.values {
            for h in &kind.heads {
                let mut line = vec![
                    kind.attack.clone().unwrap_or_default(),
                    kind.eps.map(|eps| eps.to_string()).unwrap_or_default(),
                    kind.threat.map(|threat| threat.to_string()).unwrap_or_default(),
                    kind.n.to_string(),
                    kind.whole.to_string(),
                    kind.none.to_string(),
                    h.head.to_string(),
                ];
                line.extend(
                    [h.value, h.error_pictures, h.error_orders, h.low, h.high].map(|v| v.to_string()),
                );
                lines.push(line);
            }
        }
        csv(lines)
    }

    fn svg(&self, towers: [&str; 2], data: Option<&Data>) -> String {
        let gone = if self.exact { "all" } else { "random" };
        let lines = [
            names(towers),
            format!(
                "{} Shapley values over {} {gone} orders of the robust tower's heads; whiskers: 95 % intervals.",
                pictures(data),
                self.orders
            ),
            "How many points of percent right a head brings on average when it joins others; absent heads add \
             nothing."
                .to_string(),
            "transfer: attacked on the standard tower; adaptive: on the robust tower with all its heads. A kind's \
             bars add up to all less none:"
                .to_string(),
            self.values
                .iter()
                .map(|kind| format!("{}: {:.1} % with all, {:.1} % with none.", kind.words(), kind.whole, kind.none))
                .collect::<Vec<_>>()
                .join(" "),
        ];
        const LEFT: f64 = 70.0;
        let (width, height) = chart_size(self.heads, true);
        let wide = (LEFT + width + 30.0).max(760.0);
        let lines = Figure::wrap(wide, &lines);
        let top = Figure::top(lines.len()) + 52.0;
        let places: Vec<String> = (1..=self.heads).map(|head| format!("head {head}")).collect();
        let mut figure = Figure::new(
            wide,
            top + height + below(&places) + 10.0,
            "What each head of the first block brings",
            &lines,
        );
        let ends = self.values.iter().flat_map(|kind| kind.heads.iter().flat_map(|h| [h.low, h.high]));
        let (low, high) = ends.fold((0.0f64, 1.0f64), |(a, b), v| (a.min(v), b.max(v)));
        let words: Vec<String> = self.values.iter().map(Valued::words).collect();
        let series: Vec<Series> = self
            .values
            .iter()
            .zip(&words)
            .map(|(kind, name)| {
                let point = |h: &HeadValue| Some(Point { value: h.value, low: h.low, high: h.high });
                Series { name, points: kind.heads.iter().map(point).collect() }
            })
            .collect();
        let chart = Chart {
            title: "Shapley values",
            places: &places,
            series: &series,
            range: (low, high),
            measure: "points of percent right",
            across: "head of the first block",
            bars: true,
        };
        chart.draw(&mut figure, (LEFT, top));
        figure.finish()
    }

    fn table(&self) -> String {
        let mut lines = Vec::new();
        for kind in &self.values {
            lines.push(format!(
                "{}: {:.1} % right with all heads, {:.1} % with none, n = {}",
                kind.words(),
                kind.whole,
                kind.none,
                kind.n
            ));
            for h in &kind.heads {
                lines
                    .push(format!("  head {:2} {:+7.2}  ({:+.2} to {:+.2})", h.head, h.value, h.low, h.high));
            }
        }
        let all = if self.exact { "all orders" } else { "random orders" };
        lines.push(format!("{} {all}, {} coalitions", self.orders, self.coalitions));
        lines.join("\n")
    }
}
