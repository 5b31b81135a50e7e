//! How fast the towers are, and what the defence costs.
//!
//!     cargo bench --no-default-features --bench tower [-- --small | --qwen] [-- -n 5] [-- --batch 1]
//!
//! ViT-L/14 at 336 pixels with random weights in f32, with `--small` four blocks of ViT-B/16 at
//! 224, or with `--qwen` Qwen3-VL-8B's tower at 448. Undefended and defended passes alternate strictly, since a machine's speed drifts; ratios
//! are taken within each pair. One JSON object per line on stdout, progress on stderr.
//!
//! Work is counted as 2 B L (12 N D^2 + 2 N^2 D) for a forward pass, twice that for a step (forward
//! and the gradient at the pixels), and without block 1's attention where beta is 0.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor};
use radapt::Result;
use radapt::defense::acquire::training_free;
use radapt::defense::{Defense, Fra, Gif, TRAINING_FREE_MIX, default_cutoff};
use radapt::tower::clip::{Clip, ClipConfig};
use radapt::tower::qwen::{Qwen, QwenConfig};
use radapt::tower::weights::Weights;
use radapt::tower::{Cotangent, Insertable, Want, Wrt};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

/// Weights drawn at random, the same ones in every run.
struct Seeded;

impl Weights for Seeded {
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let mut seed = DefaultHasher::new();
        name.hash(&mut seed);
        let mut rng = StdRng::seed_from_u64(seed.finish());
        // Norms near one; products that keep the variance of what goes in.
        let (centre, spread) = match shape {
            [_] if name.contains("norm") && name.ends_with("weight") => (1.0, 0.1),
            [_] => (0.0, 0.1),
            [_, inner @ ..] => (0.0, (3.0 / inner.iter().product::<usize>() as f32).sqrt()),
            [] => (0.0, 1.0),
        };
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| centre + spread * (2.0 * rng.random::<f32>() - 1.0))
            .collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    fn contains(&self, _: &str) -> bool {
        false
    }
}

struct Options {
    small: bool,
    qwen: bool,
    repeats: usize,
    batch: usize,
}

impl Options {
    /// `None` where nothing is to be measured: cargo gives `--bench` for `cargo bench` alone.
    fn parse() -> Option<Self> {
        let arguments: Vec<String> = std::env::args().collect();
        let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
        let number = |flag: &str, default: usize| {
            let value = arguments.iter().skip_while(|argument| *argument != flag).nth(1);
            value.map_or(default, |text| {
                text.parse().unwrap_or_else(|_| panic!("{flag}: expected a number, found `{text}`"))
            })
        };
        let options = Self {
            small: has("--small"),
            qwen: has("--qwen"),
            repeats: number("-n", 5).max(1),
            batch: number("--batch", 1).max(1),
        };
        (has("--bench") && !has("--test")).then_some(options)
    }
}

/// Milliseconds of the two, run in turn `repeats` times after one run each that does not count.
fn alternate(
    repeats: usize,
    a: &dyn Fn() -> Result<()>,
    b: &dyn Fn() -> Result<()>,
) -> Result<[Vec<f64>; 2]> {
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..=repeats {
        for (run, times) in [a, b].into_iter().zip(&mut times) {
            let start = Instant::now();
            run()?;
            let milliseconds = start.elapsed().as_secs_f64() * 1e3;
            if round > 0 {
                times.push(milliseconds);
            }
            eprint!(" {milliseconds:.0}");
        }
    }
    eprintln!(" ms");
    Ok(times)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + sorted[middle]) / 2.0 } else { sorted[middle] }
}

fn round(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

fn main() -> anyhow::Result<()> {
    let Some(options) = Options::parse() else {
        eprintln!("nothing is measured without --bench");
        return Ok(());
    };
    if options.qwen {
        let text = r#"{"model_type": "qwen3_vl", "vision_config": {"out_hidden_size": 4096}}"#;
        let config = QwenConfig::parse(text, Path::new("config.json"))?;
        let tower = Qwen::new(&config, &Seeded, [0.5; 3], [0.5; 3])?.at(448, 448)?;
        return measure("Qwen3-VL-8B-448", tower, config.intermediate, &options);
    }
    let (shape, config) = if options.small {
        let sizes = ClipConfig { patch_size: 16, num_hidden_layers: 4, ..Default::default() };
        ("ViT-B/16-224, 4 blocks", sizes)
    } else {
        let sizes = ClipConfig {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            image_size: 336,
            patch_size: 14,
            ..Default::default()
        };
        ("ViT-L/14-336", sizes)
    };
    measure(
        shape,
        Clip::new(&config, &Seeded, None, [0.5; 3], [0.25; 3])?,
        config.intermediate_size,
        &options,
    )
}

fn measure<T: Insertable>(
    shape: &str,
    plain: T,
    intermediate: usize,
    options: &Options,
) -> anyhow::Result<()> {
    let batch = options.batch;
    eprintln!("{shape}, batch {batch}, {} repeats", options.repeats);
    let spec = plain.spec().clone();
    let (height, width) = spec.picture;
    let pixels = Tensor::rand(0f32, 1.0, (batch, 3, height, width), &Device::Cpu)?;

    let anchor = training_free(&plain)?;
    let gif = Arc::new(Gif::new(height, width, default_cutoff(spec.image_size), &Device::Cpu)?);
    let defended = |alpha: f64, beta: f64| -> Result<T> {
        let fra = Arc::new(Fra::new(&anchor, alpha, beta, &Device::Cpu)?);
        Ok(plain.with(Defense { gif: Some(gif.clone()), fra: Some(fra), ..Default::default() }.inserts()))
    };
    let (alpha, beta) = TRAINING_FREE_MIX;
    let (mixed, replaced) = (defended(alpha, beta)?, defended(alpha, 0.0)?);

    let want = if spec.merge.is_some() { Want::merged() } else { Want::pooled() };
    let forward = |tower: &T| tower.forward(&pixels, &want).map(drop);
    let step = |tower: &T| -> Result<()> {
        let (features, tape) = tower.forward_tape(&pixels, &want)?;
        let twice = |x: Option<Tensor>| x.map(|x| x * 2.0).transpose();
        let (pooled, merged) = (twice(features.pooled)?, twice(features.merged)?);
        let cotangent = Cotangent { pooled, merged, ..Default::default() };
        tower.vjp(&tape, &cotangent, Wrt { pixels: true, anchor: false }).map(drop)
    };

    let (n, d) = (spec.tokens() as f64, spec.hidden as f64);
    let mlp = 2.0 * intermediate as f64 / d;
    let attention = 2.0 * batch as f64 * (4.0 * n * d * d + 2.0 * n * n * d);
    let all = spec.blocks as f64 * (attention + 2.0 * batch as f64 * mlp * n * d * d);
    let line = |name: &str, times: &[f64], work: f64| {
        let median = median(times);
        let gflops = round(work / median / 1e6, 1);
        let least = round(times.iter().copied().fold(f64::INFINITY, f64::min), 1);
        let (median, dtype) = (round(median, 1), "f32");
        println!(
            "{}",
            json!({ "name": name, "shape": shape, "dtype": dtype, "batch": batch, "median_ms": median, "min_ms": least, "gflops": gflops })
        );
    };
    let overhead = |name: &str, [plain, defended]: &[Vec<f64>; 2]| {
        let ratios: Vec<f64> = plain.iter().zip(defended).map(|(plain, defended)| defended / plain).collect();
        let all: Vec<f64> = ratios.iter().map(|&ratio| round(ratio, 4)).collect();
        println!(
            "{}",
            json!({ "name": name, "shape": shape, "batch": batch, "ratio_median": round(median(&ratios), 4), "ratios": all })
        );
    };

    let repeats = options.repeats;
    eprint!("forward, undefended and defended in turn:");
    let main = alternate(repeats, &|| forward(&plain), &|| forward(&mixed))?;
    line("forward", &main[0], all);
    line("forward, defended", &main[1], all);
    eprint!("forward, undefended and defended with beta 0 in turn:");
    let beta_zero = alternate(repeats, &|| forward(&plain), &|| forward(&replaced))?;
    line("forward, defended, beta 0", &beta_zero[1], all - attention);
    eprint!("step, undefended and defended in turn:");
    let steps = alternate(repeats.div_ceil(2), &|| step(&plain), &|| step(&mixed))?;
    line("step", &steps[0], 2.0 * all);
    line("step, defended", &steps[1], 2.0 * all);
    overhead("overhead, beta 0", &beta_zero);
    overhead("overhead, step", &steps);
    overhead("overhead", &main);
    Ok(())
}
