//! `radapt analyze`

use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::{DType, Device};
use clap::{Args, Subcommand};
use radapt::analyze::replace::{Replace, Role, SetFigures, Stage};
use radapt::analyze::{Analysis, Data, Failed, Findings, Pair, Sample, Side, Tokens};
use radapt::analyze::{attention, cka, insensitivity, replace, shapley, spectrum};
use radapt::attack::{Eps, Named, Settings, Subject, ThreatChoice};
use radapt::data::LabelledSet;
use radapt::data::registry;
use radapt::defense::Defense;
use radapt::eval::classify::{AttackPlan, Classify, Model as UnderTest};
use radapt::eval::run::{Manifest, Run};
use radapt::eval::{Precision, Summary};
use radapt::image::Preprocess;
use radapt::model::{Lookup, Model};
use radapt::text::ZeroShotHead;
use serde::Serialize;
use serde_json::{json, to_value};

use super::classify::{Towers, with_text};
use super::eval::parse_threat;
use super::options::{DataFlags, ModelOptions, PictureLimits, argument};
use super::{Global, print};

/// Compare a standard CLIP tower with an adversarially fine-tuned one of its shape
#[derive(Args)]
pub struct Analyze {
    #[command(subcommand)]
    command: AnalyzeCommand,
}

#[derive(Subcommand)]
enum AnalyzeCommand {
    /// How alike the layers of the two towers are: linear CKA, block by block
    Cka(Box<CkaCommand>),
    /// Replace the standard tower's parts by the robust one's, one after the other, and score each stage
    Replace(Box<ReplaceCommand>),
    /// Which frequencies the patch embeddings let through, and how the robust one's differ
    Spectrum(Box<SpectrumCommand>),
    /// Where in the picture the first block's class token looks
    Attention(Box<AttentionCommand>),
    /// How alike the first attention's outputs are for different pictures, and for a white one
    Insensitivity(Box<InsensitivityCommand>),
    /// What each head of the robust tower's first block brings, as Shapley values
    Shapley(Box<ShapleyCommand>),
}

impl Analyze {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        match self.command {
            AnalyzeCommand::Cka(command) => command.run(global),
            AnalyzeCommand::Replace(command) => command.run(global),
            AnalyzeCommand::Spectrum(command) => command.run(global),
            AnalyzeCommand::Attention(command) => command.run(global),
            AnalyzeCommand::Insensitivity(command) => command.run(global),
            AnalyzeCommand::Shapley(command) => command.run(global),
        }
    }
}

/// Which towers, and where the results go.
#[derive(Args, Clone)]
struct TowerFlags {
    #[command(flatten)]
    model: ModelOptions,
    /// The adversarially fine-tuned model: a folder, a Hub id, a built-in model, or a file of weights
    /// (.pt, .pth, .pth.tar, .bin or .safetensors; nothing in it is executed)
    #[arg(long, value_name = "ROBUST")]
    robust: String,
    /// The robust model's branch, tag or commit on the Hub
    #[arg(long, value_name = "REVISION")]
    robust_revision: Option<String>,
    /// The folder for JSON, CSV and the figure (SVG); files of the analysis in it are written over
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
}

/// Both towers with what belongs to them.
struct Loaded {
    model: Model,
    preprocess: Preprocess,
    device: Device,
    pair: Pair,
    sides: [Side; 2],
}

impl TowerFlags {
    fn load(&self, global: &Global) -> anyhow::Result<Loaded> {
        let options = ModelOptions { model: with_text(&self.model.model), ..self.model.clone() };
        let model = options.find()?;
        let preprocess = model.preprocess(options.contract)?;
        let device = options.device()?;
        let spinner = global.spinner("loading the towers");
        let lookup = Lookup { revision: self.robust_revision.clone(), offline: options.offline };
        let dtype = match options.dtype() {
            // What is analysed is what is scored: rounded weights are crafted on alone.
            Some(dtype) if dtype != DType::F32 => {
                return Err(argument("--dtype", "f32: analyses are exact", dtype.as_str()).into());
            }
            _ => DType::F32,
        };
        let robust = with_text(&self.robust);
        let (pair, sides) = Pair::load(&model, &robust, &lookup, &preprocess, dtype, &device)?;
        spinner.finish_and_clear();
        Ok(Loaded { model, preprocess, device, pair, sides })
    }

    fn data(&self, global: &Global, flags: &DataFlags, loaded: &Loaded) -> radapt::Result<LabelledSet> {
        flags.open(global.seed, loaded.preprocess.width, self.model.offline)
    }

    /// Writes the files of an analysis and says what it found.
    fn finish<T: Findings>(
        &self,
        global: &Global,
        loaded: &Loaded,
        data: Option<Data>,
        failed: Vec<Failed>,
        found: T,
    ) -> anyhow::Result<ExitCode> {
        let analysis = Analysis::new(&loaded.sides, data, global.seed, failed, found);
        let paths = analysis.write(&self.out)?;
        global.say(analysis.result.table());
        finished(global, &paths, &analysis, analysis.failed.len())
    }
}

fn finished(
    global: &Global,
    paths: &[PathBuf],
    analysis: &impl Serialize,
    failed: usize,
) -> anyhow::Result<ExitCode> {
    if failed > 0 {
        let file = paths.first().map(|path| path.display().to_string()).unwrap_or_default();
        global.say(format_args!("warning: pictures that could not be used: {failed}; see {file}"));
    }
    let paths: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    print(global, to_value(analysis)?, &paths.join("\n"))?;
    Ok(if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Which pictures.
#[derive(Args, Clone)]
struct PictureFlags {
    #[command(flatten)]
    data: DataFlags,
    #[command(flatten)]
    limits: PictureLimits,
}

impl PictureFlags {
    fn sample<'a>(&self, set: &'a LabelledSet, loaded: &'a Loaded) -> Sample<'a> {
        let limits = self.limits.limits();
        Sample { set, limits, preprocess: &loaded.preprocess, device: &loaded.device }
    }
}

fn parse_tokens(text: &str) -> Result<Tokens, String> {
    text.parse::<Tokens>().map_err(|e| e.to_string())
}

#[derive(Args)]
struct CkaCommand {
    #[command(flatten)]
    towers: TowerFlags,
    #[command(flatten)]
    pictures: PictureFlags,
    /// What makes a layer's representation: all tokens one after the other, the class token, or the
    /// mean over tokens
    #[arg(long, value_name = "TOKENS", default_value = "all", value_parser = parse_tokens)]
    tokens: Tokens,
    /// Pictures in a minibatch; all layers of both towers are held for so many at once
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(4..))]
    batch: u64,
    /// Leave out the exact estimate over the whole sample, which is made where it fits into 2 GiB
    #[arg(long)]
    minibatch_only: bool,
}

impl CkaCommand {
    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let loaded = self.towers.load(global)?;
        let set = self.towers.data(global, &self.pictures.data, &loaded)?;
        let sample = self.pictures.sample(&set, &loaded);
        let options = cka::Options {
            tokens: self.tokens,
            batch: usize::try_from(self.batch).unwrap_or(usize::MAX),
            minibatch_only: self.minibatch_only,
            seed: global.seed,
        };
        let bar = global.bar("features", set.items().len() as u64);
        let (found, failed) =
            cka::cka(&loaded.pair, &sample, &options, &mut |done| bar.set_position(done as u64))?;
        bar.finish_and_clear();
        let data = sample.data(&failed);
        self.towers.finish(global, &loaded, Some(data), failed, found)
    }
}

#[derive(Args)]
struct SpectrumCommand {
    #[command(flatten)]
    towers: TowerFlags,
}

impl SpectrumCommand {
    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let loaded = self.towers.load(global)?;
        let found = spectrum::spectrum(&loaded.pair)?;
        self.towers.finish(global, &loaded, None, Vec::new(), found)
    }
}

#[derive(Args)]
struct AttentionCommand {
    #[command(flatten)]
    towers: TowerFlags,
    #[command(flatten)]
    pictures: PictureFlags,
    /// Draw the first so many of the pictures; the figures are over all
    #[arg(long, value_name = "N", default_value_t = 6)]
    draw: usize,
    /// Draw every head beside their mean
    #[arg(long)]
    heads: bool,
}

impl AttentionCommand {
    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let loaded = self.towers.load(global)?;
        let set = self.towers.data(global, &self.pictures.data, &loaded)?;
        let sample = self.pictures.sample(&set, &loaded);
        let bar = global.bar("attention", set.items().len() as u64);
        let (found, failed) =
            attention::attention(&loaded.pair, &sample, self.draw, self.heads, &mut |done| {
                bar.set_position(done as u64);
            })?;
        bar.finish_and_clear();
        let data = sample.data(&failed);
        self.towers.finish(global, &loaded, Some(data), failed, found)
    }
}

#[derive(Args)]
struct InsensitivityCommand {
    #[command(flatten)]
    towers: TowerFlags,
    #[command(flatten)]
    pictures: PictureFlags,
    /// What of the output is compared: all tokens one after the other, the class token, or the mean
    /// over tokens
    #[arg(long, value_name = "TOKENS", default_value = "all", value_parser = parse_tokens)]
    tokens: Tokens,
}

impl InsensitivityCommand {
    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let loaded = self.towers.load(global)?;
        let set = self.towers.data(global, &self.pictures.data, &loaded)?;
        let sample = self.pictures.sample(&set, &loaded);
        let bar = global.bar("first attention", set.items().len() as u64);
        let (found, failed) =
            insensitivity::insensitivity(&loaded.pair, &sample, self.tokens, &mut |done| {
                bar.set_position(done as u64);
            })?;
        bar.finish_and_clear();
        if found.pictures < insensitivity::PICTURES {
            let (n, paper) = (found.pictures, insensitivity::PICTURES);
            global.say(format_args!("note: {n} pictures; the paper's figure is of {paper}"));
        }
        let data = sample.data(&failed);
        self.towers.finish(global, &loaded, Some(data), failed, found)
    }
}

/// How pictures are attacked.
#[derive(Args, Clone)]
#[command(next_help_heading = "Attack")]
struct AttackFlags {
    /// The attack, as `radapt attack --help` lists them
    #[arg(long, value_name = "ATTACK", default_value = "apgd-ce")]
    attack: String,
    /// Radius of the attack
    #[arg(long, value_name = "EPS", default_value = "4/255")]
    eps: Eps,
    /// transfer (crafted on the standard tower), adaptive (on the tower scored) or both
    #[arg(long, value_name = "THREAT", default_value = "both", value_parser = parse_threat)]
    threat: ThreatChoice,
    /// Steps instead of the attack's own
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Random starts instead of the attack's own
    #[arg(long, value_name = "N")]
    restarts: Option<usize>,
    /// Pictures worked on together. The figures do not depend on it
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..))]
    batch: u64,
}

impl AttackFlags {
    fn settings(&self) -> radapt::Result<Settings> {
        let settings = Settings { steps: self.steps, restarts: self.restarts, ..Settings::default() };
        if let Some(flag) = settings.unused_by(std::slice::from_ref(&self.attack)) {
            return Err(argument(flag, "an attack that has a use for it", &self.attack));
        }
        Named::new(&self.attack, self.eps, &settings)?;
        Ok(settings)
    }

    fn batch(&self) -> usize {
        usize::try_from(self.batch).unwrap_or(usize::MAX)
    }
}

fn zero_shot(loaded: &Loaded, set: &LabelledSet, templates: &[String]) -> radapt::Result<ZeroShotHead> {
    let text = loaded.model.text(&loaded.device)?;
    ZeroShotHead::with_prompt_names(&text, set.classes(), set.prompt_names(), templates)
}

#[derive(Args)]
struct ShapleyCommand {
    #[command(flatten)]
    towers: TowerFlags,
    #[command(flatten)]
    pictures: PictureFlags,
    #[command(flatten)]
    attack: AttackFlags,
    /// Orders of the heads to draw; where there are no more than that, all are gone through
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..))]
    orders: u64,
}

impl ShapleyCommand {
    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let settings = self.attack.settings()?;
        let Named::Plain(attack) = Named::new(&self.attack.attack, self.attack.eps, &settings)? else {
            return Err(argument("--attack", "a single attack, no suite", &self.attack.attack).into());
        };
        let loaded = self.towers.load(global)?;
        let set = self.towers.data(global, &self.pictures.data, &loaded)?;
        let templates = self.pictures.data.templates(&set)?;
        let head = zero_shot(&loaded, &set, &templates)?;
        let sample = self.pictures.sample(&set, &loaded);
        let options = shapley::Options {
            orders: usize::try_from(self.orders).unwrap_or(usize::MAX),
            seed: global.seed,
            attack: attack.as_ref(),
            threats: self.attack.threat.kinds(),
            batch: self.attack.batch(),
        };
        let bar = global.bar("heads", set.items().len() as u64);
        let mut told = |done: usize, share: f64| {
            bar.set_position(done as u64);
            bar.set_message(format!("heads, attack {:.0} %", 100.0 * share));
        };
        let (found, failed) =
            shapley::shapley(&loaded.pair, &loaded.sides, &head, &sample, &options, &mut told)?;
        bar.finish_and_clear();
        let data = sample.data(&failed);
        self.towers.finish(global, &loaded, Some(data), failed, found)
    }
}

/// Pictures of another kind than the robust tower was fine-tuned on.
#[derive(Args, Clone)]
#[command(next_help_heading = "Data out of distribution")]
struct OtherFlags {
    /// A second set to score, of another kind than the robust model was fine-tuned on; as --data
    #[arg(long, value_name = "PATH")]
    ood_data: Option<String>,
    /// A seeded sample of this many of its pictures; --n where not given
    #[arg(long, value_name = "N", requires = "ood_data", value_parser = clap::value_parser!(u64).range(1..))]
    ood_n: Option<u64>,
    /// Which registered set it is, where its name does not tell
    #[arg(long, value_name = "NAME", requires = "ood_data")]
    ood_dataset: Option<String>,
    /// A file of its class names, one a line in label order, instead of its own
    #[arg(long, value_name = "FILE", requires = "ood_data")]
    ood_classes: Option<PathBuf>,
    /// Its prompts, as --template
    #[arg(long, value_name = "TEMPLATE", requires = "ood_data", default_value = registry::TEMPLATE)]
    ood_template: String,
}

#[derive(Args)]
struct ReplaceCommand {
    #[command(flatten)]
    towers: TowerFlags,
    #[command(flatten)]
    pictures: PictureFlags,
    #[command(flatten)]
    other: OtherFlags,
    #[command(flatten)]
    attack: AttackFlags,
    /// Score these stages alone, each by the last part replaced: none, emb, b1-attn, b1-mlp, ..., out;
    /// all where not given
    #[arg(long, value_name = "PART,...", value_delimiter = ',')]
    parts: Vec<String>,
    /// Score pictures rounded to 8 bits, as files hold them, instead of the attack's own numbers
    #[arg(long)]
    quantise: bool,
    /// Go on with the runs in --out, in its folders `in` and `ood`, if there are any
    #[arg(long)]
    resume: bool,
}

/// Bytes that towers laid out for fast products may take together: each stage has its own, where
/// plain towers share their weights.
const PACKED_BYTES: usize = 2 << 30;

impl ReplaceCommand {
    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let settings = self.attack.settings()?;
        let loaded = self.towers.load(global)?;
        let stages = replace::choose(loaded.model.tower_config()?.num_hidden_layers, &self.parts)?;
        let own = self.pictures.data.clone();
        let mut sets = vec![(Role::InDistribution, "in", own)];
        if let Some(data) = &self.other.ood_data {
            let other = DataFlags {
                data: data.clone(),
                n: self.other.ood_n.or(self.pictures.data.n),
                first: self.pictures.data.first,
                dataset: self.other.ood_dataset.clone(),
                classes: self.other.ood_classes.clone(),
                template: self.other.ood_template.clone(),
            };
            sets.push((Role::OutOfDistribution, "ood", other));
        }
        // All that can be wrong with the data, before hours of attacks.
        let mut opened = Vec::new();
        for (role, folder, flags) in &sets {
            let set = self.towers.data(global, flags, &loaded)?;
            let templates = flags.templates(&set)?;
            let head = zero_shot(&loaded, &set, &templates)?;
            opened.push((*role, *folder, set, templates, head));
        }
        let towers = stages
            .iter()
            .map(|stage| loaded.pair.replaced(stage.replaced))
            .collect::<radapt::Result<Vec<_>>>()?;
        let bytes = |tower: &radapt::tower::clip::Clip| -> radapt::Result<usize> {
            Ok(tower.tensors()?.iter().map(|(_, tensor)| 4 * tensor.elem_count()).sum())
        };
        let all = towers.first().map_or(Ok(0), bytes)?.saturating_mul(towers.len() + 1);
        let towers = towers
            .into_iter()
            .map(|tower| if all <= PACKED_BYTES { Towers::of(tower, None) } else { Ok(Towers::plain(tower)) })
            .collect::<radapt::Result<Vec<_>>>()?;
        let mut figures = Vec::new();
        let mut failed = Vec::new();
        for (role, folder, set, templates, head) in &opened {
            let out = self.towers.out.join(folder);
            let summary =
                self.score(global, &loaded, &settings, &stages, &towers, (set, templates, head), &out)?;
            for flag in &summary.flags {
                global.say(format_args!("warning: {flag}"));
            }
            failed.extend(unread(&out)?);
            figures.push(SetFigures::new(*role, summary));
        }
        let (_, _, set, ..) = opened.first().ok_or_else(|| argument("--data", "a set", "none"))?;
        let first = figures.first().map_or(0, |set| set.items.saturating_sub(set.failed));
        let data = Data {
            name: set.name().into(),
            digest: set.digest(),
            contract: loaded.preprocess.contract.to_string(),
            n: first,
        };
        let found = Replace { stages, sets: figures };
        self.towers.finish(global, &loaded, Some(data), failed, found)
    }

    #[expect(clippy::too_many_arguments, reason = "all of one run")]
    fn score(
        &self,
        global: &Global,
        loaded: &Loaded,
        settings: &Settings,
        stages: &[Stage],
        towers: &[Towers],
        (set, templates, head): (&LabelledSet, &[String], &ZeroShotHead),
        out: &std::path::Path,
    ) -> anyhow::Result<Summary> {
        let classifier =
            |tower: &Towers, subject: Subject| tower.classifier(head, &Defense::default(), subject);
        let models = stages
            .iter()
            .zip(towers)
            .map(|(stage, tower)| classifier(tower, replace::subject(&loaded.sides, stage)))
            .collect::<radapt::Result<Vec<_>>>()?;
        let standard = Towers::of(loaded.pair.standard.clone(), None)?;
        let surrogate = classifier(&standard, Subject::undefended(&loaded.sides[0].name))?;
        let classify = Classify {
            set,
            limits: self.pictures.limits.limits(),
            preprocess: loaded.preprocess.clone(),
            native: false,
            models: stages
                .iter()
                .zip(&models)
                .map(|(stage, model)| UnderTest { defense: stage.name.clone(), classifier: model.as_ref() })
                .collect(),
            surrogate: surrogate.as_ref(),
            attacks: vec![AttackPlan {
                name: self.attack.attack.clone(),
                eps: self.attack.eps,
                settings: settings.clone(),
            }],
            threats: self.attack.threat.kinds().to_vec(),
            pictures: if self.quantise { Precision::EightBit } else { Precision::Float },
            seed: global.seed,
            batch: self.attack.batch(),
            save: false,
            device: loaded.device.clone(),
        };
        let decides = classify.decides(json!({
            "model": { "name": loaded.model.name, "revision": loaded.model.revision, "digest": loaded.sides[0].digest },
            "robust": loaded.sides[1],
            "device": if loaded.device.is_cpu() { "cpu" } else { "gpu" },
            "templates": templates,
        }))?;
        let manifest = Manifest::new(decides, None, classify.items(None)?);
        std::fs::create_dir_all(&self.towers.out)
            .map_err(|source| radapt::Error::Write { path: self.towers.out.clone(), source })?;
        let mut run = Run::open(out, manifest, self.resume)?;
        let bar = global.bar("", 0);
        let summary = classify.run(&mut run, &mut |done| {
            bar.set_length(done.of as u64);
            bar.set_position(done.items as u64);
            let (now, share) = &done.now;
            bar.set_message(format!("{now}, {:.0} %", 100.0 * share));
        })?;
        bar.finish_and_clear();
        Ok(summary)
    }
}

/// The items of a run that could not be scored.
fn unread(run: &std::path::Path) -> anyhow::Result<Vec<Failed>> {
    let path = run.join("items.jsonl");
    let text = std::fs::read_to_string(&path).map_err(|source| radapt::Error::Read { path, source })?;
    let mut found = Vec::new();
    for line in text.lines() {
        let line: radapt::eval::run::ItemLine = serde_json::from_str(line)?;
        found.extend(line.error.map(|reason| Failed { id: line.id, reason }));
    }
    Ok(found)
}
