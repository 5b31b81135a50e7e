//! `radapt bench attack | v-attack | anchor`

use std::process::{Command as Process, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use candle_core::{DType, Device, Tensor};
use clap::{Args, Subcommand, ValueEnum};
use radapt::attack::vattack::{Preset, Surrogate, VAttack};
use radapt::attack::{Eps, Pictures, Settings, Subject, picture_rng, uniform};
use radapt::data::LabelledSet;
use radapt::defense::acquire::training_free;
use radapt::defense::{Defense, Fra, Gif, TRAINING_FREE_MIX, default_cutoff};
use radapt::image::{Contract, DecodeLimits, Preprocess};
use radapt::model::{Lookup, Model};
use radapt::pocket::Split;
use radapt::text::ZeroShotHead;
use radapt::tower::clip::{Clip, ClipConfig};
use radapt::tower::qwen::{Family, Qwen, QwenConfig};
use radapt::tower::weights::Weights;
use radapt::tower::{Cotangent, Insertable, Inserts, Precision, TowerSpec, VisionTower, Want, Wrt};
use radapt::train::{Goal, Plan, Training, TrainingSet};
use radapt::{Error, Result};
use serde_json::{Value, json};

use super::options::{argument, device};
use super::{Global, print};

#[derive(Args)]
pub struct Bench {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Time the attack step, forward and gradient at the pixels
    Attack(Attack),
    /// Time V-Attack's step, crops and masks included
    #[command(name = "v-attack")]
    Value(ValueSteps),
    /// Time a step of R-Adapt+, forward and gradient at the anchor of a batch
    Anchor(Anchor),
}

/// Each case runs in a process of its own, so that its peak memory is its own.
#[derive(Args)]
struct Attack {
    /// Towers of these shapes with random weights; all are the two of CLIP
    #[arg(long, value_name = "SHAPE", default_value = "all", conflicts_with = "model")]
    shape: Shapes,
    /// The tower of a model instead: a folder, a Hub id or a built-in one
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Pictures at once
    #[arg(long, value_name = "N,...", default_value = "1,4", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..))]
    batch: Vec<u16>,
    /// f32, or bf16 with the f32 tower beside it that verifies
    #[arg(long, value_name = "DTYPE,...", default_value = "f32,bf16", value_delimiter = ',')]
    dtype: Vec<Dtype>,
    /// Timed runs of each, after one that does not count
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    repeats: u16,
    /// Put in the training-free defence, GIF and FRA
    #[arg(long)]
    defended: bool,
    /// cpu, cuda, cuda:N or metal
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Run the one case given here, in this process
    #[arg(long, hide = true)]
    here: bool,
}

#[derive(Clone, Copy, ValueEnum, PartialEq)]
enum Shapes {
    All,
    #[value(name = "vit-b-16-224")]
    VitB16,
    #[value(name = "vit-l-14-336")]
    VitL14,
    /// Qwen3-VL-8B's, for pictures of 448 x 448
    #[value(name = "qwen3-vl-8b-448")]
    Qwen3Vl8b,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    Bf16,
}

impl Dtype {
    fn precision(self) -> Precision {
        match self {
            Self::F32 => Precision::F32,
            Self::Bf16 => Precision::Bf16,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

impl Shapes {
    fn each(self) -> &'static [Self] {
        match self {
            Self::All => &[Self::VitB16, Self::VitL14],
            Self::VitB16 => &[Self::VitB16],
            Self::VitL14 => &[Self::VitL14],
            Self::Qwen3Vl8b => &[Self::Qwen3Vl8b],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::VitB16 => "vit-b-16-224",
            Self::VitL14 => "vit-l-14-336",
            Self::Qwen3Vl8b => "qwen3-vl-8b-448",
        }
    }

    /// The sizes of CLIP's ViT-B/16 and of the ViT-L/14 that LLaVA-1.5 has.
    fn config(self) -> ClipConfig {
        match self {
            Self::VitL14 => ClipConfig {
                hidden_size: 1024,
                intermediate_size: 4096,
                num_hidden_layers: 24,
                num_attention_heads: 16,
                image_size: 336,
                patch_size: 14,
                projection_dim: 768,
                ..Default::default()
            },
            _ => ClipConfig { patch_size: 16, ..Default::default() },
        }
    }
}

/// The sizes of Qwen3-VL-8B's tower.
fn qwen3_vl_8b() -> QwenConfig {
    QwenConfig {
        family: Family::Qwen3Vl,
        blocks: 27,
        hidden: 1152,
        intermediate: 4304,
        heads: 16,
        activation: "gelu_pytorch_tanh".into(),
        patch: 16,
        frames: 2,
        merge: 2,
        out: 4096,
        theta: 10_000.0,
        window: 112,
        full_attention: Vec::new(),
        positions: 2304,
        deepstack: vec![8, 16, 24],
    }
}

/// The side of the pictures that it is given.
const QWEN_SIDE: usize = 448;

/// Weights drawn at random by their names.
struct Random {
    seed: u64,
    device: Device,
}

impl Weights for Random {
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let mut rng = picture_rng(self.seed, 0, 0, name);
        // Norms near one; products that keep the variance of what goes in.
        let (centre, spread) = match shape {
            [_] if name.contains("norm") && name.ends_with("weight") => (1.0, 0.1),
            [_] => (0.0, 0.1),
            [_, inner @ ..] => (0.0, (3.0 / inner.iter().product::<usize>() as f32).sqrt()),
            [] => (0.0, 1.0),
        };
        let mut values = uniform(&mut rng, shape.iter().product());
        values.iter_mut().for_each(|value| *value = centre + spread * *value);
        Ok(Tensor::from_vec(values, shape, &self.device)?)
    }

    fn contains(&self, name: &str) -> bool {
        name == "visual_projection.weight"
    }
}

impl Bench {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Attack(attack) if attack.here => attack.here(global),
            Command::Attack(attack) => attack.run(global),
            Command::Value(value) => value.run(global),
            Command::Anchor(anchor) => anchor.run(global),
        }
    }
}

impl Attack {
    /// For its tower alone.
    fn of(shape: OneShape, model: &Option<String>, device: &str) -> Self {
        Self {
            shape: match shape {
                OneShape::VitB16 => Shapes::VitB16,
                OneShape::VitL14 => Shapes::VitL14,
            },
            model: model.clone(),
            batch: Vec::new(),
            dtype: Vec::new(),
            repeats: 1,
            defended: false,
            device: device.into(),
            here: true,
        }
    }

    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        if let Some(name) = &self.model {
            // Here once, not in the process of every case.
            Model::find(name, &Lookup::default())?;
        }
        let shapes: Vec<Option<Shapes>> = match &self.model {
            Some(_) => vec![None],
            None => self.shape.each().iter().copied().map(Some).collect(),
        };
        let mut rows: Vec<Value> = Vec::new();
        for shape in shapes {
            for &batch in &self.batch {
                for &dtype in &self.dtype {
                    let what = match shape {
                        Some(shape) => shape.name(),
                        None => self.model.as_deref().unwrap_or_default(),
                    };
                    global.say(format!("{what}, batch {batch}, {}", dtype.name()));
                    rows.extend(self.case(global, shape, batch, dtype)?);
                }
            }
        }
        let mut text = format!(
            "{:<14} {:<8} {:<5} {:>5} {:>10} {:>10} {:>9} {:>8} {:>8}",
            "shape", "what", "dtype", "batch", "median ms", "least ms", "images/s", "GFLOP/s", "peak MB"
        );
        for row in &rows {
            let word = |key: &str| row[key].as_str().unwrap_or_default().to_string();
            let number =
                |key: &str, digits: usize| format!("{:.digits$}", row[key].as_f64().unwrap_or(f64::NAN));
            text += &format!(
                "\n{:<14} {:<8} {:<5} {:>5} {:>10} {:>10} {:>9} {:>8} {:>8}",
                word("shape"),
                word("name"),
                word("dtype"),
                number("batch", 0),
                number("median_ms", 1),
                number("min_ms", 1),
                number("images_per_second", 2),
                number("gflops", 0),
                number("peak_rss_mb", 0),
            );
        }
        print(global, json!({ "rows": rows }), &text)?;
        Ok(ExitCode::SUCCESS)
    }

    /// One case, by this program in another process.
    fn case(
        &self,
        global: &Global,
        shape: Option<Shapes>,
        batch: u16,
        dtype: Dtype,
    ) -> anyhow::Result<Vec<Value>> {
        let program = std::env::current_exe().context("this program's own file")?;
        let mut process = Process::new(program);
        process.args(["bench", "attack", "--here", "--json", "--dtype", dtype.name()]);
        process.args(["--batch", &batch.to_string(), "--repeats", &self.repeats.to_string()]);
        process.args(["--seed", &global.seed.to_string(), "--device", &self.device]);
        match (&self.model, shape) {
            (Some(model), _) => process.args(["--model", model]),
            (None, Some(shape)) => process.args(["--shape", shape.name()]),
            (None, None) => &mut process,
        };
        if self.defended {
            process.arg("--defended");
        }
        let output = process.stderr(Stdio::inherit()).output().context("this program again")?;
        if output.status.code() == Some(2) {
            // It has said which flag is wrong, in the same words.
            std::process::exit(2);
        }
        if !output.status.success() {
            bail!("the case failed: {}", output.status);
        }
        let mut json: Value = serde_json::from_slice(&output.stdout).context("the case's figures")?;
        match json["rows"].take() {
            Value::Array(rows) => Ok(rows),
            other => bail!("the case gave no rows but {other}"),
        }
    }

    fn here(self, global: &Global) -> anyhow::Result<ExitCode> {
        let (&[batch], &[dtype]) = (&self.batch[..], &self.dtype[..]) else {
            return Err(argument("--here", "one batch and one dtype", "several").into());
        };
        let batch = usize::from(batch);
        if self.model.is_none() && self.shape == Shapes::Qwen3Vl8b {
            let (config, random) =
                (qwen3_vl_8b(), Random { seed: global.seed, device: device(&self.device)? });
            let tower = Qwen::new(&config, &random, [0.5; 3], [0.5; 3])?;
            let at = |tower: &Qwen| -> Result<_> {
                let tower = tower.at(QWEN_SIDE, QWEN_SIDE)?;
                Ok(tower.with(self.inserts(&tower)?))
            };
            let exact = at(&tower)?;
            let craft = match dtype {
                Dtype::F32 => None,
                Dtype::Bf16 => Some(at(&tower.to_dtype(DType::BF16)?)?),
            };
            return self.timed(global, (exact, craft), config.intermediate, batch, dtype);
        }
        let (config, tower) = self.tower(global)?;
        let craft = match dtype {
            Dtype::F32 => None,
            Dtype::Bf16 => Some(tower.clone().packed(Precision::Bf16)?),
        };
        let exact = tower.packed(Precision::F32)?;
        self.timed(global, (exact, craft), config.intermediate_size, batch, dtype)
    }

    /// Times a case: `exact` alone, or the steps of `craft` and what `exact` takes to verify.
    fn timed<T: VisionTower>(
        &self,
        global: &Global,
        (exact, craft): (T, Option<T>),
        intermediate: usize,
        batch: usize,
        dtype: Dtype,
    ) -> anyhow::Result<ExitCode> {
        let shape = self.model.as_deref().unwrap_or(self.shape.name());
        let (height, width) = exact.spec().picture;
        let mut rng = picture_rng(global.seed, 0, 0, "bench");
        let pixels: Vec<f32> =
            uniform(&mut rng, batch * 3 * height * width).into_iter().map(|v| (v + 1.0) / 2.0).collect();
        let pixels = Tensor::from_vec(pixels, (batch, 3, height, width), exact.device())?;
        let work = work(exact.spec(), intermediate, batch);
        let name = if craft.is_some() { "verify" } else { "forward" };
        let verify = self.time(exact.device(), || forward(&exact, &pixels))?;
        let step = self.time(exact.device(), || step(craft.as_ref().unwrap_or(&exact), &pixels))?;
        let found = [(name, work, verify), ("step", 2.0 * work, step)];
        let peak = peak_rss()?;
        let rows: Vec<Value> = found
            .into_iter()
            .map(|(name, work, mut times)| {
                let median = sorted_median(&mut times);
                json!({
                    "name": name,
                    "shape": shape,
                    "dtype": dtype.name(),
                    "device": self.device,
                    "batch": batch,
                    "median_ms": median,
                    "min_ms": times[0],
                    "images_per_second": batch as f64 / median * 1e3,
                    "gflops": work / median / 1e6,
                    "peak_rss_mb": peak,
                })
            })
            .collect();
        print(global, json!({ "rows": rows }), "")?;
        Ok(ExitCode::SUCCESS)
    }

    /// The tower in question and its sizes.
    fn tower(&self, global: &Global) -> Result<(ClipConfig, Clip)> {
        let device = device(&self.device)?;
        let (config, tower) = match &self.model {
            Some(name) => {
                let model = Model::find(name, &Lookup::default())?;
                (model.tower_config()?, model.tower(&model.preprocess(None)?, None, &device)?)
            }
            None => {
                let (config, random) = (self.shape.config(), Random { seed: global.seed, device });
                let tower = Clip::new(&config, &random, Some(&random), [0.5; 3], [0.25; 3])?;
                (config, tower)
            }
        };
        let inserts = self.inserts(&tower)?;
        Ok((config, tower.with(inserts)))
    }

    /// The training-free defence, if it is to be put in.
    fn inserts(&self, tower: &impl Insertable) -> Result<Inserts> {
        if !self.defended {
            return Ok(Inserts::default());
        }
        let (spec, (alpha, beta)) = (tower.spec(), TRAINING_FREE_MIX);
        let (height, width) = spec.picture;
        let gif = Gif::new(height, width, default_cutoff(spec.image_size), tower.device())?;
        let fra = Fra::new(&training_free(tower)?, alpha, beta, tower.device())?;
        Ok(Defense { gif: Some(Arc::new(gif)), fra: Some(Arc::new(fra)), ..Default::default() }.inserts())
    }

    /// Milliseconds of each run, until the device is done with it.
    fn time(&self, device: &Device, run: impl Fn() -> Result<()>) -> Result<Vec<f64>> {
        run()?;
        device.synchronize()?;
        (0..self.repeats)
            .map(|_| {
                let start = Instant::now();
                run()?;
                device.synchronize()?;
                Ok(start.elapsed().as_secs_f64() * 1e3)
            })
            .collect()
    }
}

/// V-Attack on random pictures and random words.
#[derive(Args)]
struct ValueSteps {
    /// A tower of this shape with random weights
    #[arg(long, value_name = "SHAPE", default_value = "vit-l-14-336", conflicts_with = "model")]
    shape: OneShape,
    /// The tower of a model instead: a folder, a Hub id or a built-in one
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// paper or notebook
    #[arg(long, value_name = "PRESET", default_value = "notebook")]
    preset: Preset,
    /// Pictures at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// f32 or bf16
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    dtype: Dtype,
    /// Timed steps, after one that does not count
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    steps: u16,
    /// cpu, cuda, cuda:N or metal
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
}

impl ValueSteps {
    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let attack = Attack::of(self.shape, &self.model, &self.device);
        let shape = self.model.as_deref().unwrap_or(attack.shape.name()).to_string();
        let (_, tower) = attack.tower(global)?;
        let tower = tower.packed(self.dtype.precision())?;
        let device = tower.device().clone();
        let (batch, side) = (usize::from(self.batch), tower.spec().image_size);
        let width = tower.spec().projection.context("a tower with a projection")?;
        let random = |what: &str, shape: &[usize]| -> Result<Tensor> {
            let mut rng = picture_rng(global.seed, 0, 0, what);
            Ok(Tensor::from_vec(uniform(&mut rng, shape.iter().product()), shape, &device)?)
        };
        let pixels = ((random("bench", &[batch, 3, side, side])? + 1.0)? / 2.0)?;
        let pictures = Pictures::new(&pixels, (0..batch as u64).collect())?;
        let words = [random("source", &[batch, width])?, random("target", &[batch, width])?];
        let surrogate = Surrogate::new(tower, Subject::undefended(&shape), 1.0, &words[0], &words[1])?;
        let steps = usize::from(self.steps) + 1;
        let attack = VAttack { steps, ..VAttack::preset(self.preset, Eps::of_255(16)) };
        let mut at = Vec::new();
        let start = Instant::now();
        attack.craft(&[surrogate], &pictures, global.seed, &mut |_| at.push(Instant::now()))?;
        let whole = start.elapsed().as_secs_f64();
        let mut times: Vec<f64> = at.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect();
        let median = sorted_median(&mut times);
        let row = json!({
            "name": "v-attack step",
            "preset": self.preset,
            "shape": shape,
            "dtype": self.dtype.name(),
            "device": self.device,
            "batch": batch,
            "median_ms": median,
            "min_ms": times[0],
            "images_per_second": batch as f64 / median * 1e3,
            "outside_steps_ms": (whole * 1e3 - median * steps as f64).max(0.0),
            "peak_rss_mb": peak_rss()?,
        });
        let hourly =
            3.6e6 * batch as f64 / (median * VAttack::preset(self.preset, Eps::of_255(16)).steps as f64);
        let text = format!(
            "{shape}, {}, batch {batch}, {}: {median:.1} ms a step, {hourly:.1} pictures an hour, peak {:.0} MB",
            self.preset,
            self.dtype.name(),
            peak_rss()?
        );
        print(global, json!({ "rows": [row] }), &text)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// One epoch on pictures that nothing attacks: what a training does but for the crafting.
#[derive(Args)]
struct Anchor {
    /// A tower of this shape with random weights
    #[arg(long, value_name = "SHAPE", default_value = "vit-b-16-224", conflicts_with = "model")]
    shape: OneShape,
    /// The tower of a model instead: a folder, a Hub id or a built-in one
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Pictures in the epoch
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(2..))]
    n: u64,
    /// Pictures in a step
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// f32 or bf16; trainings are in f32
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    dtype: Dtype,
    /// cpu, cuda, cuda:N or metal
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum OneShape {
    #[value(name = "vit-b-16-224")]
    VitB16,
    #[value(name = "vit-l-14-336")]
    VitL14,
}

impl Anchor {
    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let attack = Attack::of(self.shape, &self.model, &self.device);
        let shape = self.model.as_deref().unwrap_or(attack.shape.name()).to_string();
        let batch = usize::from(self.batch);
        if self.n <= u64::from(self.batch) {
            return Err(argument("--n", "more pictures than are in a step", &self.n.to_string()).into());
        }
        let (config, tower) = attack.tower(global)?;
        let tower = tower.packed(self.dtype.precision())?;
        let side = u32::try_from(config.image_size)?;
        let set = LabelledSet::pocket(Split::Train, 0, self.n, 96)?;
        let preprocess = Preprocess::clip(side, Contract::Squash);
        let width = tower.spec().projection.context("a tower with a projection")?;
        let classes = set.classes().to_vec();
        let mut rng = picture_rng(global.seed, 0, 0, "bench head");
        let weights = uniform(&mut rng, classes.len() * width);
        let weights = Tensor::from_vec(weights, (classes.len(), width), tower.device())?;
        let length = weights.sqr()?.sum_keepdim(1)?.sqrt()?;
        let head = ZeroShotHead { classes, weights: weights.broadcast_div(&length)?, logit_scale: 100.0 };
        let training = Training {
            plan: Plan {
                eps: Eps::of_255(0),
                epochs: 1,
                batch,
                settings: Settings { steps: Some(0), ..Settings::default() },
                ..Plan::paper(default_cutoff(config.image_size))
            },
            tower: &tower,
            craft: None,
            model: shape.clone(),
            goal: Goal::CrossEntropy { head: &head },
            initial: training_free(&tower)?,
            data: TrainingSet {
                set: &set,
                held_out: None,
                limits: DecodeLimits::default(),
                preprocess: &preprocess,
            },
            save_every: usize::MAX,
            pictures: None,
            others: Vec::new(),
        };
        let folder = tempfile::tempdir()?;
        let mut at = Vec::new();
        let bar = global.bar("", 0);
        training.run(folder.path(), training.decides(json!({}))?, false, &mut |done| {
            bar.set_length(done.of as u64);
            bar.set_position(done.done as u64);
            bar.set_message(done.now.clone());
            if done.loss.is_some() {
                at.push(Instant::now());
            }
        })?;
        bar.finish_and_clear();
        // The last step may be of fewer pictures, the first is timed by none.
        let whole = self.n as usize / batch;
        let mut times: Vec<f64> =
            at[..whole].windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect();
        if times.is_empty() {
            return Err(argument("--n", "at least two whole steps", &self.n.to_string()).into());
        }
        let median = sorted_median(&mut times);
        let row = json!({
            "name": "anchor step",
            "shape": shape,
            "dtype": self.dtype.name(),
            "device": self.device,
            "batch": batch,
            "median_ms": median,
            "min_ms": times[0],
            "images_per_second": batch as f64 / median * 1e3,
            "gflops": 2.0 * work(tower.spec(), config.intermediate_size, batch) / median / 1e6,
            "peak_rss_mb": peak_rss()?,
        });
        let text = format!(
            "{shape}, batch {batch}: {median:.1} ms a step, {:.1} pictures a second, peak {:.0} MB",
            batch as f64 / median * 1e3,
            peak_rss()?
        );
        print(global, json!({ "rows": [row] }), &text)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Sorts times, of which there is at least one, and gives their median.
fn sorted_median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    (times[(times.len() - 1) / 2] + times[times.len() / 2]) / 2.0
}

/// The output that the step's loss is of.
fn want(tower: &impl VisionTower) -> Want {
    if tower.spec().merge.is_some() { Want::merged() } else { Want::pooled() }
}

fn forward(tower: &impl VisionTower, pixels: &Tensor) -> Result<()> {
    tower.forward(pixels, &want(tower)).map(drop)
}

/// Forward, and the gradient of the embeddings' squared length: of all that a language model reads
/// where there is one to read it.
fn step(tower: &impl VisionTower, pixels: &Tensor) -> Result<()> {
    let (features, tape) = tower.forward_tape(pixels, &want(tower))?;
    let twice = |tensor: Option<Tensor>| tensor.map(|tensor| tensor * 2.0).transpose();
    let deepstack = features.deepstack.iter().enumerate().map(|(i, x)| Ok((i, (x * 2.0)?)));
    let deepstack = deepstack.collect::<Result<_>>()?;
    let (merged, embeds) = (twice(features.merged)?, twice(features.embeds)?);
    let pooled = if embeds.is_some() { None } else { twice(features.pooled)? };
    let cotangent = Cotangent { merged, embeds, pooled, deepstack, ..Default::default() };
    tower.vjp(&tape, &cotangent, Wrt { pixels: true, anchor: false }).map(drop)
}

/// Multiplications and additions of a forward pass: 2 B L (4 N D^2 + 2 N D M + 2 N^2 D) with M the
/// MLP's width. What is left out of the last block counts as done; patches and mergers do not count.
fn work(spec: &TowerSpec, intermediate: usize, batch: usize) -> f64 {
    let (d, m, n) = (spec.hidden as f64, intermediate as f64, spec.tokens() as f64);
    let block = 4.0 * n * d * d + 2.0 * n * d * m + 2.0 * n * n * d;
    2.0 * batch as f64 * spec.blocks as f64 * block
}

/// The most memory this process has had so far, in 10^6 bytes.
fn peak_rss() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    kilobytes
        .map(|kilobytes| kilobytes * 1.024e-3)
        .ok_or_else(|| Error::Unsupported("the peak memory: this system does not say".into()))
}
