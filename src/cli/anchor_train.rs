//! `radapt anchor train`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::{DType, Device};
use clap::{Args, ValueEnum};
use radapt::attack::{Eps, Feature, Named, Settings, Subject, Threat, ThreatKind};
use radapt::data::{LabelledSet, registry};
use radapt::defense::acquire::training_free;
use radapt::defense::{self, AnchorMeta, Defense, default_cutoff};
use radapt::eval::classify::{AttackPlan, Classify, Model as UnderTest};
use radapt::eval::run::{Manifest, Run};
use radapt::eval::{Precision, Row};
use radapt::image::Preprocess;
use radapt::model::{Model, ModelKind};
use radapt::text::ZeroShotHead;
use radapt::tower::Insertable;
use radapt::tower::qwen::QwenAt;
use radapt::train::{
    Epoch, Examples, Goal, Keep, Optimizer, Plan, Resolution, Schedule, TRAINED_MIX, Trained, Training,
    TrainingSet,
};
use serde_json::{Value, json};

use super::anchor::fields;
use super::classify::{Towers, with_text};
use super::options::{DataFlags, ModelOptions, PictureLimits, Size, argument, sizes};
use super::row_table::row_table;
use super::{Global, print};

#[derive(Args, Clone)]
pub struct Train {
    #[command(flatten)]
    pub model: ModelOptions,
    /// Where to write the anchor
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// The training's folder: pictures, state, losses and validation; FILE.training where not given
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Go on with the training in its folder, if there is one
    #[arg(long)]
    pub resume: bool,
    /// A folder for the prepared and crafted pictures, to be shared by trainings on the same
    #[arg(long, value_name = "DIR")]
    pub share: Option<PathBuf>,
    #[command(flatten)]
    pub pictures: TrainingPictures,
    #[command(flatten)]
    pub recipe: Recipe,
    /// Another anchor to begin with, a file or a built-in one; the tower's own on a white picture
    /// where not given
    #[arg(long, value_name = "ANCHOR")]
    initial: Option<PathBuf>,
    /// The attack of the validation at the end; apgd-ce where not given, pgd on features
    #[arg(long, value_name = "ATTACK")]
    pub validation_attack: Option<String>,
    /// Steps between two states on disk; the anchor does not depend on it
    #[arg(long, value_name = "STEPS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    save_every: u64,
    /// The picture's size on a Qwen-VL, alone: 448 (the default) or 448x336, height and width. Of several
    /// the anchor is of the first one's grid, and steps take turns with the others
    #[arg(long, value_name = "SIZE,...", value_delimiter = ',')]
    pub size: Vec<Size>,
    /// Further sizes to validate at on a Qwen-VL
    #[arg(long, value_name = "SIZE,...", value_delimiter = ',')]
    validation_size: Vec<Size>,
    #[command(flatten)]
    limits: PictureLimits,
}

/// Which pictures are trained on.
#[derive(Args, Clone)]
#[command(next_help_heading = "Data")]
pub struct TrainingPictures {
    /// Labelled pictures, as `eval classify --data`
    #[arg(long, value_name = "PATH", default_value = "pocket:train")]
    pub data: String,
    /// Pictures to train on, a seeded sample
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..))]
    pub n: u64,
    /// Other pictures of the same data that choose the epoch; 0 for none, which keeps the last
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub held_out: u64,
    /// Yet others for the clean, transfer and adaptive figures in the anchor's metadata; 0 for none
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub validate: u64,
    /// Which registered set the data is, where its name does not tell
    #[arg(long, value_name = "NAME")]
    dataset: Option<String>,
    /// A file of class names, one a line in label order, instead of the data's own
    #[arg(long, value_name = "FILE")]
    classes: Option<PathBuf>,
    /// A prompt with {class} in it, a file of such prompts, or `own`
    #[arg(long, value_name = "TEMPLATE", default_value = registry::TEMPLATE)]
    template: String,
}

/// How an anchor is trained.
#[derive(Args, Clone)]
#[command(next_help_heading = "Training")]
pub struct Recipe {
    /// The anchor's factor
    #[arg(long, value_name = "NUMBER", default_value_t = TRAINED_MIX.0, allow_negative_numbers = true)]
    pub alpha: f64,
    /// The attention output's factor
    #[arg(long, value_name = "NUMBER", default_value_t = TRAINED_MIX.1, allow_negative_numbers = true)]
    pub beta: f64,
    /// GIF's cutoff D0; 40 bins, fewer for pictures under 224 pixels, where not given
    #[arg(long, value_name = "BINS")]
    pub cutoff: Option<f64>,
    /// Pictures crafted once on the undefended model (static, the paper's) or anew against the
    /// anchor as it stands (adaptive)
    #[arg(long, value_name = "WHICH", default_value = "static")]
    pub examples: ExamplesFlag,
    /// ce: the zero-shot head's cross-entropy; embedding: stay with the undefended model's clean
    /// features, for towers without a text side
    #[arg(long, value_name = "OBJECTIVE", default_value = "ce")]
    pub objective: Objective,
    /// The radius pictures are crafted at
    #[arg(long, value_name = "EPS", default_value = "4/255")]
    pub eps: Eps,
    /// The attack that crafts them, as `radapt attack --help` lists them
    #[arg(long, value_name = "ATTACK", default_value = "pgd")]
    pub attack: String,
    /// Its steps instead of its own
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// The share of the loss taken on the clean pictures, from 0 (the paper) to below 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub clean_share: f64,
    /// Passes over the pictures
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub epochs: usize,
    /// Pictures in a step
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub batch: usize,
    /// adam or sgd
    #[arg(long, value_name = "NAME", default_value = "adam")]
    pub optimizer: OptimizerFlag,
    /// The learning rate; 0.01 for adam, 1 for sgd where not given
    #[arg(long, value_name = "RATE")]
    pub rate: Option<f64>,
    /// SGD's momentum; 0.9 where not given
    #[arg(long, value_name = "NUMBER")]
    pub momentum: Option<f64>,
    /// cosine or constant
    #[arg(long, value_name = "NAME", default_value = "cosine")]
    pub schedule: Schedule,
    /// Stop after this many epochs without a lower held-out loss
    #[arg(long, value_name = "EPOCHS")]
    pub patience: Option<usize>,
    /// Keep the anchor of the epoch with the lowest held-out loss, or of the last
    #[arg(long, value_name = "WHICH", default_value = "best")]
    pub keep: KeepFlag,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum KeepFlag {
    Best,
    Last,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum ExamplesFlag {
    Static,
    Adaptive,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Objective {
    Ce,
    Embedding,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OptimizerFlag {
    Adam,
    Sgd,
}

impl TrainingPictures {
    /// The pictures to train on, those held out and those to validate on.
    pub fn open(
        &self,
        seed: u64,
        size: u32,
        offline: bool,
    ) -> radapt::Result<(LabelledSet, Option<LabelledSet>, Option<LabelledSet>)> {
        let whole = self.n.saturating_add(self.held_out).saturating_add(self.validate);
        let drawn = self.data == "pocket" || self.data.starts_with("pocket:");
        let flags = DataFlags {
            data: self.data.clone(),
            // Scenes without number; of files all, to be drawn from.
            n: drawn.then_some(whole),
            first: true,
            dataset: self.dataset.clone(),
            classes: self.classes.clone(),
            template: self.template.clone(),
        };
        let set = flags.open(seed, size, offline)?;
        let number = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let (rest, validate) =
            set.split(number(self.n.saturating_add(self.held_out)), number(self.validate), seed)?;
        let (train, held_out) = rest.split(number(self.n), number(self.held_out), seed)?;
        Ok((train, (self.held_out > 0).then_some(held_out), (self.validate > 0).then_some(validate)))
    }

    fn templates(&self, set: &LabelledSet) -> radapt::Result<Vec<String>> {
        let flags = DataFlags {
            data: self.data.clone(),
            n: None,
            first: false,
            dataset: None,
            classes: None,
            template: self.template.clone(),
        };
        flags.templates(set)
    }
}

impl Recipe {
    pub fn plan(&self, image_size: usize, seed: u64) -> radapt::Result<Plan> {
        let optimizer = match (self.optimizer, self.momentum) {
            (OptimizerFlag::Adam, None) => Optimizer::Adam { rate: self.rate.unwrap_or(0.01) },
            (OptimizerFlag::Adam, Some(_)) => {
                return Err(argument("--momentum", "sgd to go with it", "adam"));
            }
            (OptimizerFlag::Sgd, momentum) => {
                Optimizer::Sgd { rate: self.rate.unwrap_or(1.0), momentum: momentum.unwrap_or(0.9) }
            }
        };
        let settings = Settings { steps: self.steps, ..Settings::default() };
        if let Some(flag) = settings.unused_by(std::slice::from_ref(&self.attack)) {
            return Err(argument(flag, "an attack that has a use for it", &self.attack));
        }
        Ok(Plan {
            alpha: self.alpha,
            beta: self.beta,
            cutoff: self.cutoff.unwrap_or(default_cutoff(image_size)),
            examples: match self.examples {
                ExamplesFlag::Static => Examples::Static,
                ExamplesFlag::Adaptive => Examples::Adaptive,
            },
            attack: self.attack.clone(),
            eps: self.eps,
            settings,
            clean: self.clean_share,
            epochs: self.epochs,
            batch: self.batch,
            optimizer,
            schedule: self.schedule,
            patience: self.patience,
            keep: match self.keep {
                KeepFlag::Best => Keep::Best,
                KeepFlag::Last => Keep::Last,
            },
            seed,
        })
    }
}

/// A tower at one size, as a training takes it.
struct Place<T> {
    exact: T,
    craft: Option<T>,
    preprocess: Preprocess,
}

impl<T> Place<T> {
    fn resolution(&self) -> Resolution<'_, T> {
        Resolution { tower: &self.exact, craft: self.craft.as_ref(), preprocess: &self.preprocess }
    }
}

/// What a training stands on.
struct Ground<T> {
    model: Model,
    /// The sizes that are trained on, the anchor's first, and behind them those that are only validated
    /// on.
    places: Vec<Place<T>>,
    /// How many of them are trained on.
    trained: usize,
    /// A CLIP with its head.
    clip: Option<(Towers, ZeroShotHead)>,
    templates: Vec<String>,
    train: LabelledSet,
    held_out: Option<LabelledSet>,
    validate: Option<LabelledSet>,
    /// Whether they are of the split that evaluations score.
    evaluated: bool,
    device: Device,
}

impl Train {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let (json, failed) = self.train(global)?;
        print(global, json, &self.out.display().to_string())?;
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }

    /// Trains and writes the anchor. What there is to say of it, and whether a picture could not be
    /// read.
    pub fn train(&self, global: &Global) -> anyhow::Result<(Value, bool)> {
        let options = match self.recipe.objective {
            Objective::Ce => ModelOptions { model: with_text(&self.model.model), ..self.model.clone() },
            Objective::Embedding => self.model.clone(),
        };
        let model = options.find()?;
        let sizes = sizes(&model, &self.size)?;
        if let (false, Some(_)) = (model.kind.is_qwen(), self.validation_size.first()) {
            return Err(argument("--validation-size", "a Qwen-VL to go with it", &model.name).into());
        }
        let spinner = global.spinner("loading the model");
        if model.kind.is_qwen() {
            let preprocess = model.preprocess(options.contract)?;
            let tower = model.qwen(&preprocess, Some(DType::F32), &options.device()?)?;
            let craft = match options.dtype() {
                Some(dtype) if dtype != DType::F32 => Some(tower.to_dtype(dtype)?),
                _ => None,
            };
            let place = |size: &Size| -> radapt::Result<Place<QwenAt>> {
                let (height, width) = (size.height as usize, size.width as usize);
                Ok(Place {
                    exact: tower.at(height, width)?,
                    craft: craft.as_ref().map(|craft| craft.at(height, width)).transpose()?,
                    preprocess: preprocess.fixed(size.height, size.width),
                })
            };
            let places =
                sizes.iter().chain(&self.validation_size).map(place).collect::<radapt::Result<_>>()?;
            // As large as pocket's scenes are drawn, or as the pictures are.
            let side = sizes.first().map_or(0, |size| size.height.max(size.width)).clamp(96, 224);
            let ground = self.ground(model, places, sizes.len(), None, &options, side, global.seed)?;
            spinner.finish_and_clear();
            return self.train_on(global, ground);
        }
        let preprocess = model.preprocess(options.contract)?;
        let side = model.tower_config()?.image_size as u32;
        let towers = Towers::load(&model, &preprocess, options.dtype(), &options.device()?)?;
        let places = vec![Place { exact: towers.exact.clone(), craft: towers.craft.clone(), preprocess }];
        let ground = self.ground(model, places, 1, Some(towers), &options, side, global.seed)?;
        spinner.finish_and_clear();
        self.train_on(global, ground)
    }

    fn train_on<T: Insertable>(&self, global: &Global, ground: Ground<T>) -> anyhow::Result<(Value, bool)> {
        let Some(own) = ground.places.first() else {
            return Err(argument("--size", "at least one", "none").into());
        };
        let spec = own.exact.spec().clone();
        let plan = self.recipe.plan(spec.image_size, global.seed)?;
        let attack = self.validation_attack.as_deref();
        let attack = attack.unwrap_or(if ground.clip.is_some() { "apgd-ce" } else { "pgd" });
        let validation =
            AttackPlan { name: attack.to_string(), eps: plan.eps, settings: Settings::default() };
        let named = Named::new(&validation.name, validation.eps, &validation.settings)?;
        match ground.head() {
            None if attack != "pgd" => {
                return Err(argument("--validation-attack", "pgd for features", attack).into());
            }
            Some(head) if named.as_attack().fewest_classes() > head.classes.len() => {
                let expected = format!("one that works with {} classes", head.classes.len());
                return Err(argument("--validation-attack", &expected, attack).into());
            }
            _ => {}
        }
        // Before hours of training.
        let parent = self.out.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Some(parent) = parent.filter(|parent| !parent.is_dir()) {
            return Err(
                argument("--out", "a file in a folder that is there", &parent.display().to_string()).into()
            );
        }
        if ground.evaluated {
            global.say(format_args!(
                "warning: `{}` is the split that `eval classify` scores; figures of this anchor on it are \
                 not on held-out pictures",
                self.pictures.data
            ));
        }
        let (initial, initial_name) = match &self.initial {
            None => (training_free(&own.exact)?, None),
            Some(path) => {
                let anchor = defense::Anchor::find(path)?;
                let values = anchor.fitted(&spec, &ground.model.fingerprint()?, false)?;
                let sha = anchor.sha256()?;
                (values, Some(format!("{} {sha}", path.display())))
            }
        };
        let goal = match ground.head() {
            Some(head) => Goal::CrossEntropy { head },
            None => Goal::Embedding { feature: feature(&ground.model, &spec)? },
        };
        let training = Training {
            plan,
            tower: &own.exact,
            craft: own.craft.as_ref(),
            model: ground.model.name.clone(),
            goal,
            initial,
            data: TrainingSet {
                set: &ground.train,
                held_out: ground.held_out.as_ref(),
                limits: self.limits.limits(),
                preprocess: &own.preprocess,
            },
            save_every: self.save_every as usize,
            pictures: self.share.clone(),
            others: ground.places.iter().take(ground.trained).skip(1).map(Place::resolution).collect(),
        };
        let work = self.work.clone().unwrap_or_else(|| {
            let mut name = self.out.clone().into_os_string();
            name.push(".training");
            name.into()
        });
        let decides = training.decides(json!({
            "model": {
                "name": ground.model.name,
                "revision": ground.model.revision,
                "digest": ground.model.digest()?,
            },
            "templates": ground.templates,
        }))?;
        let bar = global.bar("", 0);
        let mut stage = String::new();
        let examples = training.plan.examples;
        let mut told = |done: &radapt::train::Progress| {
            bar.set_length(done.of as u64);
            bar.set_position(done.done as u64);
            let now = done.now.split(' ').next().unwrap_or_default();
            if stage != now {
                // Another kind of work goes at another pace.
                stage = now.to_string();
                bar.reset_eta();
            }
            let loss = done.loss.map(|loss| format!(", loss {loss:.4}")).unwrap_or_default();
            bar.set_message(format!("{}{loss}", done.now));
            if let Some(epoch) = &done.ended {
                bar.suspend(|| say_epoch(global, epoch, examples));
            }
        };
        let trained = training.run(&work, decides.clone(), self.resume, &mut told)?;
        bar.finish_and_clear();
        if trained.epoch == 0 {
            global.say("warning: no epoch came out better than the anchor it began with, which is kept");
        }
        let rows = match &ground.validate {
            None => Vec::new(),
            Some(set) if ground.clip.is_none() => {
                let rows = distances(&ground, &training, &trained, set, &mut told)?;
                rows.iter().for_each(|row| global.say(format_args!("{}", distance_line(row))));
                rows
            }
            Some(set) => {
                let found =
                    self.validate(global, &ground, set, &training, &trained, &validation, &decides, &work)?;
                global.say(row_table(&found));
                found.iter().map(serde_json::to_value).collect::<Result<_, _>>()?
            }
        };
        bar.finish_and_clear();

        let mut more = trained.metadata(&training.plan, &training.goal);
        let data = json!({ "name": ground.train.name(), "digest": ground.train.digest() });
        more.insert("data".into(), data.to_string());
        if ground.clip.is_some() {
            more.insert("templates".into(), Value::from(ground.templates.clone()).to_string());
        }
        if let Some(name) = initial_name {
            more.insert("initial".into(), name);
        }
        if !rows.is_empty() {
            more.insert("validation".into(), Value::from(rows.clone()).to_string());
        }
        if ground.trained > 1 {
            let size = |place: &Place<T>| format!("{}x{}", place.preprocess.height, place.preprocess.width);
            let sizes: Vec<String> = ground.places.iter().take(ground.trained).map(size).collect();
            more.insert("sizes".into(), sizes.join(","));
        }
        let plan = &training.plan;
        let anchor = defense::Anchor {
            values: trained.anchor.clone(),
            meta: AnchorMeta {
                training: more,
                ..super::anchor::meta(
                    &ground.model,
                    &spec,
                    own.preprocess.contract,
                    Trained::METHOD,
                    (plan.alpha, plan.beta, plan.cutoff),
                )?
            },
        };
        anchor.save(&self.out)?;
        for defect in &trained.defects {
            global.say(format_args!("warning: left out `{}`: {}", defect.id, defect.reason));
        }
        let mut json = fields(&anchor)?;
        json.insert("file".into(), self.out.display().to_string().into());
        json.insert("sha256".into(), anchor.sha256()?.into());
        json.insert("folder".into(), work.display().to_string().into());
        json.insert("epoch".into(), trained.epoch.into());
        json.insert("stopped".into(), trained.stopped.into());
        json.insert("steps".into(), trained.steps.iter().map(|step| step.loss).collect::<Vec<_>>().into());
        json.insert("epochs".into(), epochs(&trained.epochs, &training.plan, &ground.model.name)?);
        json.insert("rows".into(), rows.into());
        let defects =
            trained.defects.iter().map(|defect| json!({ "id": defect.id, "reason": defect.reason }));
        json.insert("failed".into(), defects.collect());
        Ok((Value::Object(json), !trained.defects.is_empty()))
    }

    /// The data for a model whose tower is loaded, and a CLIP's head. `side` is what drawn pictures
    /// are drawn at.
    #[expect(clippy::too_many_arguments, reason = "each is another thing")]
    fn ground<T>(
        &self,
        model: Model,
        places: Vec<Place<T>>,
        trained: usize,
        towers: Option<Towers>,
        options: &ModelOptions,
        side: u32,
        seed: u64,
    ) -> anyhow::Result<Ground<T>> {
        let device = options.device()?;
        if self.recipe.objective == Objective::Ce && model.kind != ModelKind::Clip {
            let found = format!("ce on `{}`", model.name);
            return Err(argument("--objective", "embedding for a model without a text side", &found).into());
        }
        let (train, held_out, validate) = self.pictures.open(seed, side, options.offline)?;
        // A name or a Hub id stands for the split that is scored.
        let data = Path::new(&self.pictures.data);
        let evaluated = matches!(self.pictures.data.as_str(), "pocket" | "pocket:test")
            || !data.exists() && !self.pictures.data.starts_with("pocket:")
            // Of the published folders and files of CIFAR and STL10 it is their test split.
            || train.items().first().is_some_and(|item| item.id.starts_with("test"));
        let (clip, templates) = match (self.recipe.objective, towers) {
            (Objective::Ce, Some(towers)) => {
                let templates = self.pictures.templates(&train)?;
                let text = model.text(&device)?;
                let (classes, names) = (train.classes(), train.prompt_names());
                let head = ZeroShotHead::with_prompt_names(&text, classes, names, &templates)?;
                (Some((towers, head)), templates)
            }
            _ => (None, Vec::new()),
        };
        Ok(Ground { model, places, trained, clip, templates, train, held_out, validate, evaluated, device })
    }

    /// Clean, transfer and adaptive figures on pictures that had no part in the training: undefended,
    /// GIF alone, and GIF with the anchor.
    #[expect(clippy::too_many_arguments, reason = "each is another thing")]
    fn validate<T: Insertable>(
        &self,
        global: &Global,
        ground: &Ground<T>,
        set: &LabelledSet,
        training: &Training<T>,
        trained: &Trained,
        attack: &AttackPlan,
        decides: &Value,
        work: &Path,
    ) -> anyhow::Result<Vec<Row>> {
        let (Some((towers, head)), Some(own)) = (&ground.clip, ground.places.first()) else {
            return Ok(Vec::new());
        };
        let defenses = training.compared(&trained.anchor, own.resolution())?;
        let models = defenses
            .iter()
            .map(|(name, defense)| {
                let subject = Subject::new(&ground.model.name, defense)?;
                Ok((*name, towers.classifier(head, defense, subject)?))
            })
            .collect::<radapt::Result<Vec<_>>>()?;
        let surrogate =
            towers.classifier(head, &Defense::default(), Subject::undefended(&ground.model.name))?;
        let classify = Classify {
            set,
            limits: self.limits.limits(),
            preprocess: own.preprocess.clone(),
            native: false,
            models: models
                .iter()
                .map(|(name, model)| UnderTest { defense: (*name).into(), classifier: model.as_ref() })
                .collect(),
            surrogate: surrogate.as_ref(),
            attacks: vec![attack.clone()],
            threats: vec![ThreatKind::Transfer, ThreatKind::Adaptive],
            pictures: Precision::Float,
            seed: global.seed,
            batch: 16,
            save: false,
            device: ground.device.clone(),
        };
        let decides = classify.decides(json!({ "model": decides["model"], "training": decides }))?;
        let manifest = Manifest::new(decides, None, classify.items(None)?);
        let mut run = Run::open(&work.join(format!("validation-{}", attack.name)), manifest, true)?;
        let bar = global.bar("", 0);
        let summary = classify.run(&mut run, &mut |done| {
            bar.set_length(done.of as u64);
            bar.set_position(done.items as u64);
            bar.set_message(format!("validation: {}", done.now.0));
        })?;
        bar.finish_and_clear();
        Ok(summary.rows)
    }
}

impl<T> Ground<T> {
    fn head(&self) -> Option<&ZeroShotHead> {
        self.clip.as_ref().map(|(_, head)| head)
    }
}

/// The features a model reads: a CLIP's embedding, a LLaVA's patch tokens, a Qwen-VL's merged ones.
pub fn feature(model: &Model, spec: &radapt::tower::TowerSpec) -> radapt::Result<Feature> {
    Ok(match model.kind {
        ModelKind::Clip if spec.projection.is_some() => Feature::Embeds,
        ModelKind::Clip => Feature::Pooled,
        ModelKind::Llava | ModelKind::LlavaNext => Feature::Patches(model.features()?.0),
        ModelKind::Qwen2Vl | ModelKind::Qwen2_5Vl | ModelKind::Qwen3Vl | ModelKind::Qwen3VlMoe => {
            Feature::Merged
        }
    })
}

/// The validation of a training on features: mean distances from the undefended tower's clean ones, at
/// every size.
fn distances<T: Insertable>(
    ground: &Ground<T>,
    training: &Training<T>,
    trained: &Trained,
    set: &LabelledSet,
    told: &mut dyn FnMut(&radapt::train::Progress),
) -> anyhow::Result<Vec<Value>> {
    let mut rows = Vec::new();
    for (i, place) in ground.places.iter().enumerate() {
        let compared = training.compared(&trained.anchor, place.resolution())?;
        let (names, defenses): (Vec<_>, Vec<_>) = compared.into_iter().unzip();
        let sized = ground.model.kind.is_qwen();
        let size = format!("{}x{}", place.preprocess.height, place.preprocess.width);
        let all = training.distances(place.resolution(), set, &defenses, told)?;
        for (name, found) in names.into_iter().zip(all) {
            let row = |threat: Option<ThreatKind>, value: f64| {
                let mut row = json!({
                    "task": "embedding",
                    "measure": "squared distance over squared length",
                    "dataset": set.name(),
                    "defense": name,
                    "attack": threat.map(|_| "pgd"),
                    "eps": threat.map(|_| training.plan.eps),
                    "threat": threat,
                    "surrogate":
                        threat.filter(|kind| *kind == ThreatKind::Transfer).map(|_| &ground.model.name),
                    "n": found.n,
                    "value": value,
                });
                if let (true, Some(fields)) = (sized, row.as_object_mut()) {
                    fields.insert("size".into(), size.clone().into());
                    fields.insert("trained_at".into(), (i < ground.trained).into());
                }
                row
            };
            rows.push(row(None, found.clean));
            rows.push(row(Some(ThreatKind::Transfer), found.transfer));
            rows.push(row(Some(ThreatKind::Adaptive), found.adaptive));
        }
    }
    Ok(rows)
}

/// The epochs' figures as JSON. Each of pictures under attack gets the attack and the threat model, which
/// the training has once for all of them: no such figure stands alone.
fn epochs(epochs: &[Epoch], plan: &Plan, model: &str) -> serde_json::Result<Value> {
    let threat = match plan.examples {
        Examples::Static => Threat::Transfer { surrogate: model.into() },
        Examples::Adaptive => Threat::Adaptive,
    };
    let mut json = serde_json::to_value(epochs)?;
    for epoch in json.as_array_mut().into_iter().flatten() {
        for part in ["train", "held_out"] {
            let Some(fields) = epoch[part].as_object_mut() else { continue };
            if fields.get("adversarial").is_some_and(Value::is_number) {
                fields.insert("attack".into(), plan.attack.as_str().into());
                fields.insert("eps".into(), serde_json::to_value(plan.eps)?);
                if let Value::Object(threat) = serde_json::to_value(&threat)? {
                    fields.extend(threat);
                }
            }
        }
    }
    Ok(json)
}

/// A line about a row of [`distances`].
pub fn distance_line(row: &Value) -> String {
    let text = |key: &str| row[key].as_str().unwrap_or_default().to_string();
    let attacked = match row["threat"].as_str() {
        None => "clean".to_string(),
        Some(threat) => format!("{} {}, {threat}", text("attack"), text("eps")),
    };
    let size = row["size"].as_str().map(|size| format!(" at {size}")).unwrap_or_default();
    let value = row["value"].as_f64().unwrap_or_default();
    format!(
        "{}{size}, {attacked}: {value:.4} from the undefended model's clean features (n = {})",
        text("defense"),
        row["n"]
    )
}

/// A line about an epoch, its attacked figure with its threat model.
fn say_epoch(global: &Global, epoch: &Epoch, examples: Examples) {
    let Some(held_out) = &epoch.held_out else {
        return;
    };
    let percent = |name: &str, value: Option<f64>| {
        value.map(|value| format!(", {name} {value:.1} %")).unwrap_or_default()
    };
    let threat = match examples {
        Examples::Static => "attacked (transfer) right",
        Examples::Adaptive => "attacked (adaptive) right",
    };
    global.say(format_args!(
        "epoch {}: held-out loss {:.4}{}{}",
        epoch.epoch,
        held_out.loss,
        percent("clean right", held_out.clean),
        percent(threat, held_out.adversarial)
    ));
}
