//! What `radapt eval classify` and `radapt attack` share: a classification run, from flags to its
//! summary.

use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::{DType, Device};
use clap::Args;
use radapt::attack::{Classifier, Eps, Mixed, Named, Settings, Subject, ThreatKind, TowerClassifier};
use radapt::defense::{AnchorChoice, Defense, DefenseOptions};
use radapt::eval::classify::{AttackPlan, Classify, Model as UnderTest};
use radapt::eval::run::{Manifest, Run};
use radapt::eval::{Precision, Summary};
use radapt::image::Preprocess;
use radapt::model::Model;
use radapt::pocket::built_in::{POCKET, POCKET_CLIP};
use radapt::text::ZeroShotHead;
use radapt::tower::clip::Clip;
use radapt::tower::{Precision as Products, VisionTower};
use serde_json::json;

use super::options::{DataFlags, DefenseFlags, ModelOptions, PictureLimits, argument};
use super::row_table::row_table;
use super::{Global, print};

/// Flags of every classification run.
#[derive(Args, Clone)]
pub struct RunFlags {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub data: DataFlags,
    #[command(flatten)]
    pub defense: DefenseFlags,
    /// Another model to craft transfer pictures on, undefended; the model itself where not given
    #[arg(long, value_name = "MODEL")]
    surrogate: Option<String>,
    /// Attack pictures at their own size, the resize to the model's inside the attacked function,
    /// as AutoAttack does on CIFAR
    #[arg(long)]
    native_size: bool,
    /// Score pictures rounded to 8 bits, as files hold them, instead of the attack's own numbers
    #[arg(long)]
    quantise: bool,
    /// Steps instead of the attacks' own
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Random starts instead of the attacks' own
    #[arg(long, value_name = "N")]
    restarts: Option<usize>,
    /// Target classes instead of the attacks' own
    #[arg(long, value_name = "N")]
    targets: Option<usize>,
    /// Square's queries
    #[arg(long, value_name = "N")]
    queries: Option<usize>,
    /// Leave a picture as soon as it is fooled: the same robust accuracy sooner; adaptive alone
    #[arg(long)]
    early_stop: bool,
    /// The run's folder
    #[arg(long, value_name = "RUN")]
    pub out: PathBuf,
    /// Go on with the run in --out, if there is one
    #[arg(long)]
    pub resume: bool,
    /// Work on shard I of N alone, to be put together with `radapt eval merge`
    #[arg(long, value_name = "I/N", value_parser = parse_shard)]
    pub shard: Option<(usize, usize)>,
    /// Pictures worked on together: what a kill loses. The figures do not depend on it
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..))]
    pub batch: u64,
    #[command(flatten)]
    pub limits: PictureLimits,
}

pub fn parse_shard(text: &str) -> Result<(usize, usize), String> {
    let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parts
        .filter(|(i, n)| (1..=*n).contains(i))
        .ok_or_else(|| format!("expected I/N with I from 1 to N, such as 2/3, found `{text}`"))
}

/// What differs between the commands.
pub struct What {
    /// By name.
    pub attacks: Vec<String>,
    pub eps: Vec<Eps>,
    pub threats: Vec<ThreatKind>,
    /// Score every part of the defence as well.
    pub ablate: bool,
    /// Score the undefended model beside the defended one.
    pub undefended: bool,
    /// Write the pictures.
    pub save: bool,
    /// Other defences to score, by the name they have in figures.
    pub others: Vec<(String, DefenseOptions)>,
    /// Whether the defence of the flags is scored as well.
    pub flagged: bool,
}

impl RunFlags {
    pub fn run(&self, global: &Global, what: &What) -> anyhow::Result<ExitCode> {
        let summary = self.summary(global, what)?;
        for flag in &summary.flags {
            global.say(format_args!("warning: {flag}"));
        }
        if summary.failed > 0 {
            global.say(format_args!(
                "warning: {} of {} items could not be scored; see {}",
                summary.failed,
                summary.items,
                self.out.join("items.jsonl").display()
            ));
        }
        print(global, serde_json::to_value(&summary)?, &row_table(&summary.rows))?;
        Ok(if summary.failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }

    /// What is changed of the attacks.
    ///
    /// # Errors
    /// If none of them has a use for it, one is unknown or needs other classes or threats.
    fn settings(&self, what: &What) -> anyhow::Result<Settings> {
        let settings = Settings {
            steps: self.steps,
            restarts: self.restarts,
            targets: self.targets,
            queries: self.queries,
            stop_when_fooled: self.early_stop,
        };
        if let Some(flag) = settings.unused_by(&what.attacks) {
            let found = if what.attacks.is_empty() { "no attack".into() } else { what.attacks.join(", ") };
            return Err(argument(flag, "an attack that has a use for it", &found).into());
        }
        for name in &what.attacks {
            for &eps in &what.eps {
                Named::new(name, eps, &settings)?;
            }
        }
        if self.early_stop && what.threats.contains(&ThreatKind::Transfer) {
            let expected = "adaptive attacks alone: what has just fooled one model rarely fools another";
            return Err(argument("--early-stop", expected, "--threat transfer or both").into());
        }
        Ok(settings)
    }

    /// That none of the flags is given that an attack on features has no use for.
    ///
    /// # Errors
    /// If one is.
    pub fn check_features(&self) -> radapt::Result<()> {
        let given = [
            ("--surrogate", self.surrogate.is_some()),
            ("--native-size", self.native_size),
            ("--restarts", self.restarts.is_some()),
            ("--targets", self.targets.is_some()),
            ("--queries", self.queries.is_some()),
            ("--early-stop", self.early_stop),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(argument(flag, "a model with a text side to go with it", "none")),
            None => Ok(()),
        }
    }

    /// What is changed of an attack on features.
    pub fn feature_settings(&self) -> Settings {
        Settings { steps: self.steps, ..Settings::default() }
    }

    /// Whether a run of this could begin: its attacks, its data, its prompts.
    pub fn check(&self, global: &Global, what: &What) -> anyhow::Result<()> {
        self.settings(what)?;
        let options = ModelOptions { model: with_text(&self.model.model), ..self.model.clone() };
        let side = options.find()?.tower_config()?.image_size as u32;
        let set = self.data.open(global.seed, side, options.offline)?;
        self.data.templates(&set)?;
        Ok(())
    }

    pub fn summary(&self, global: &Global, what: &What) -> anyhow::Result<Summary> {
        let device = self.model.device()?;
        let options = ModelOptions { model: with_text(&self.model.model), ..self.model.clone() };
        let model = options.find()?;
        let preprocess = model.preprocess(options.contract)?;
        let side = model.tower_config()?.image_size as u32;
        let set = self.data.open(global.seed, side, options.offline)?;
        let templates = self.data.templates(&set)?;
        let head = |model: &Model| {
            ZeroShotHead::with_prompt_names(
                &model.text(&device)?,
                set.classes(),
                set.prompt_names(),
                &templates,
            )
        };
        let spinner = global.spinner("loading the model");
        let own_head = head(&model)?;
        let own = Towers::load(&model, &preprocess, options.dtype(), &device)?;
        let tower = &own.exact;

        let asked = self.defense.options();
        let mut defenses: Vec<(String, DefenseOptions)> = Vec::new();
        let undefended = DefenseOptions { anchor: AnchorChoice::None, ..DefenseOptions::default() };
        let full = asked.build(tower, || model.fingerprint())?;
        let full_name = short_name(&full);
        if what.undefended || full_name == "none" || what.ablate {
            defenses.push(("none".into(), undefended));
        }
        if what.ablate {
            if full_name != "gif+fra" {
                return Err(argument("--ablate", "a defence of both parts", &full_name).into());
            }
            let plain = DefenseOptions { alpha: None, beta: None, ..asked.clone() };
            defenses.push(("gif".into(), DefenseOptions { no_fra: true, ..plain }));
            defenses.push(("fra".into(), DefenseOptions { no_gif: true, cutoff: None, ..asked.clone() }));
        }
        if full_name != "none" && what.flagged {
            defenses.push((full_name, asked));
        }
        defenses.extend(what.others.iter().cloned());
        for (i, (name, _)) in defenses.iter().enumerate() {
            if defenses.iter().take(i).any(|(other, _)| other == name) {
                return Err(argument("--also", "anchors that are called by different names", name).into());
            }
        }
        let mut models = Vec::new();
        for (name, options) in defenses {
            let defense = options.build(tower, || model.fingerprint())?;
            let subject = Subject::new(&model.name, &defense)?;
            models.push((name, own.classifier(&own_head, &defense, subject)?));
        }
        let other = self
            .surrogate
            .as_ref()
            .map(|name| ModelOptions { model: with_text(name), ..options.clone() }.find());
        let other = other.transpose()?;
        let surrogate_head = match &other {
            Some(other) => head(other)?,
            None => own_head.clone(),
        };
        let undefended = Defense::default();
        let surrogate = match &other {
            Some(other) => {
                let prepared = other.preprocess(options.contract)?;
                let found = Towers::load(other, &prepared, options.dtype(), &device)?;
                let size = found.exact.spec().image_size;
                if size != tower.spec().image_size {
                    let expected = format!("a model for pictures of {side}x{side}");
                    return Err(argument("--surrogate", &expected, &format!("{size}x{size}")).into());
                }
                found.classifier(&surrogate_head, &undefended, Subject::undefended(&other.name))?
            }
            None => own.classifier(&surrogate_head, &undefended, Subject::undefended(&model.name))?,
        };
        spinner.finish_and_clear();

        let settings = self.settings(what)?;
        let plan = |name: &String, eps: &Eps| AttackPlan {
            name: name.clone(),
            eps: *eps,
            settings: settings.clone(),
        };
        let classify = Classify {
            set: &set,
            limits: self.limits.limits(),
            preprocess,
            native: self.native_size,
            models: models
                .iter()
                .map(|(defense, classifier)| UnderTest {
                    defense: defense.clone(),
                    classifier: classifier.as_ref(),
                })
                .collect(),
            surrogate: surrogate.as_ref(),
            attacks: what
                .eps
                .iter()
                .enumerate()
                // The one attack without a radius is run once.
                .flat_map(|(i, eps)| {
                    what.attacks
                        .iter()
                        .filter(move |name| i == 0 || *name != "cw-l2")
                        .map(move |name| plan(name, eps))
                })
                .collect(),
            threats: what.threats.clone(),
            pictures: if self.quantise { Precision::EightBit } else { Precision::Float },
            seed: global.seed,
            batch: self.batch as usize,
            save: what.save,
            device,
        };
        let name = |model: &Model| -> anyhow::Result<_> {
            Ok(json!({ "name": model.name, "revision": model.revision, "digest": model.digest()? }))
        };
        let decides = classify.decides(json!({
            "model": name(&model)?,
            "surrogate_model": other.as_ref().map(name).transpose()?,
            "dtype": options.dtype().map(|dtype| dtype.as_str()),
            "device": if classify.device.is_cpu() { "cpu" } else { "gpu" },
            "templates": templates,
        }))?;
        let manifest = Manifest::new(decides, self.shard, classify.items(self.shard)?);
        let mut run = Run::open(&self.out, manifest, self.resume)?;
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

/// The built-in LLaVA's tower has no text side; the CLIP it was trained with has.
pub fn with_text(model: &str) -> String {
    if model == POCKET { POCKET_CLIP.into() } else { model.into() }
}

/// A model's tower in f32, and in the precision that pictures are crafted in where that is another.
pub struct Towers {
    pub exact: Clip,
    pub craft: Option<Clip>,
}

impl Towers {
    pub fn load(
        model: &Model,
        preprocess: &Preprocess,
        dtype: Option<DType>,
        device: &Device,
    ) -> radapt::Result<Self> {
        Self::of(model.tower(preprocess, Some(DType::F32), device)?, dtype)
    }

    /// Of a tower in f32.
    pub fn of(exact: Clip, dtype: Option<DType>) -> radapt::Result<Self> {
        let craft = match dtype {
            Some(DType::BF16) if exact.device().is_cpu() => Some(exact.clone().packed(Products::Bf16)?),
            Some(dtype) if dtype != DType::F32 => Some(exact.to_dtype(dtype)?),
            _ => None,
        };
        Ok(Self { exact: exact.packed(Products::F32)?, craft })
    }

    /// Of a tower in f32, its weights left where they are, shared with others.
    pub fn plain(exact: Clip) -> Self {
        Self { exact, craft: None }
    }

    /// Gradients may be of lower precision; whether a picture is fooled is said in f32.
    pub fn classifier<'a>(
        &self,
        head: &'a ZeroShotHead,
        defense: &Defense,
        subject: Subject,
    ) -> radapt::Result<Box<dyn Classifier + 'a>> {
        let make = |tower: &Clip| TowerClassifier::new(tower.with(defense.inserts()), head, subject.clone());
        let exact = make(&self.exact)?;
        Ok(match &self.craft {
            Some(craft) => Box::new(Mixed::new(make(craft)?, exact)?),
            None => Box::new(exact),
        })
    }
}

/// `none`, `gif`, `fra` or `gif+fra`.
pub fn short_name(defense: &Defense) -> String {
    match (&defense.gif, &defense.fra) {
        (None, None) => "none",
        (Some(_), None) => "gif",
        (None, Some(_)) => "fra",
        (Some(_), Some(_)) => "gif+fra",
    }
    .into()
}
