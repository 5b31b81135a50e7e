//! R-Adapt+: an anchor optimised on adversarial pictures, the paper's Eq. 8.
//!
//! Every weight stays frozen and GIF is on; the anchor alone follows its gradient, which stops at
//! the first block. Pictures are crafted once on the undefended model, as the paper has it
//! ([`Examples::Static`]), or anew against the anchor as it stands ([`Examples::Adaptive`], ours).
//!
//! A training lives in a folder ([`Training::run`]): the prepared and the crafted pictures, and
//! its state after every so many steps. Killed and begun again it goes on, and ends in the same
//! anchor to the byte: on a CPU always, on a GPU as far as its products are the same from run to run.
//!
//! ```
//! use candle_core::Device;
//! use radapt::data::LabelledSet;
//! use radapt::defense::{acquire::training_free, default_cutoff};
//! use radapt::image::DecodeLimits;
//! use radapt::model::{Lookup, Model};
//! use radapt::pocket::Split;
//! use radapt::text::ZeroShotHead;
//! use radapt::train::{Goal, Plan, Training, TrainingSet};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let model = Model::find("pocket-clip", &Lookup::default())?;
//! let preprocess = model.preprocess(None)?;
//! let tower = model.tower(&preprocess, None, &Device::Cpu)?;
//! let set = LabelledSet::pocket(Split::Train, 0, 4, preprocess.width)?;
//! let head = ZeroShotHead::new(&model.text(&Device::Cpu)?, set.classes(), &["a {class}."])?;
//!
//! let mut plan = Plan { epochs: 1, batch: 4, ..Plan::paper(default_cutoff(96)) };
//! plan.settings.steps = Some(1);
//! let training = Training {
//!     plan,
//!     tower: &tower,
//!     craft: None,
//!     model: model.name.clone(),
//!     goal: Goal::CrossEntropy { head: &head },
//!     initial: training_free(&tower)?,
//!     data: TrainingSet {
//!         set: &set,
//!         held_out: None,
//!         limits: DecodeLimits::default(),
//!         preprocess: &preprocess,
//!     },
//!     save_every: 20,
//!     pictures: None,
//!     others: Vec::new(),
//! };
//! let folder = tempfile::tempdir()?;
//! let decides = training.decides(serde_json::json!({ "digest": model.digest()? }))?;
//! let trained = training.run(folder.path(), decides, true, &mut |_| {})?;
//! assert_eq!(trained.anchor.dims(), training.initial.dims());
//! # Ok(())
//! # }
//! ```

mod goal;
mod optimizer;
mod state;
mod store;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use image::RgbImage;
use rand_chacha::rand_core::RngCore;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use goal::Goal;
pub use optimizer::{Optimizer, Schedule};
pub use state::{Epoch, Measured, Step};

use crate::attack::{Eps, Pictures, Settings, Subject, key, picture_rng, quantise};
use crate::data::{Defect, LabelledSet};
use crate::defense::acquire::{interpolate, interpolate_vjp};
use crate::defense::{Defense, Fra, Gif, Method, default_cutoff};
use crate::eval::run::{Manifest, claim, write_whole};
use crate::image::{DecodeLimits, Preprocess, pixels_from_rgb};
use crate::tower::Insertable;
use crate::{Error, Result};
use state::State;
use store::Store;

/// alpha and beta of the paper's Table 9 for R-Adapt+.
pub const TRAINED_MIX: (f64, f64) = (0.8, 0.2);

/// Which adversarial pictures an anchor is trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Examples {
    /// Crafted once on the undefended model and rounded to 8 bits, as files hold them: the paper's.
    Static,
    /// Crafted in every epoch against the anchor as it stands, gradients through GIF and FRA.
    Adaptive,
}

impl std::fmt::Display for Examples {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Static => "static",
            Self::Adaptive => "adaptive",
        })
    }
}

/// Which epoch's anchor a training ends in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// That of the lowest held-out loss; without held-out pictures the last.
    Best,
    /// The last.
    Last,
}

/// How an anchor is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The anchor's factor.
    pub alpha: f64,
    /// The attention output's factor.
    pub beta: f64,
    /// GIF's cutoff D0, in frequency bins of the tower's picture.
    pub cutoff: f64,
    /// Which adversarial pictures.
    pub examples: Examples,
    /// The attack that crafts them, by its name; for features `pgd` alone.
    pub attack: String,
    /// Its radius, in pixel units of [0, 1].
    pub eps: Eps,
    /// What is changed of it.
    pub settings: Settings,
    /// The share of the loss that is taken on the clean pictures, 0 to 1; 0 in the paper.
    pub clean: f64,
    /// Passes over the pictures.
    pub epochs: usize,
    /// Pictures in a step.
    pub batch: usize,
    /// What a gradient does to the anchor.
    pub optimizer: Optimizer,
    /// What becomes of the learning rate.
    pub schedule: Schedule,
    /// Stop after this many epochs without a lower held-out loss.
    pub patience: Option<usize>,
    /// Which epoch's anchor is kept.
    pub keep: Keep,
    /// Of the order of pictures and of the attacks.
    pub seed: u64,
}

impl Plan {
    /// The paper's: Eq. 8 with Table 9's alpha and beta, eps 4/255, 10 epochs. What it does not
    /// say is ours: batches of 50, Adam at 0.01 along a cosine.
    pub fn paper(cutoff: f64) -> Self {
        let (alpha, beta) = TRAINED_MIX;
        Self {
            alpha,
            beta,
            cutoff,
            examples: Examples::Static,
            attack: "pgd".into(),
            eps: Eps::of_255(4),
            settings: Settings::default(),
            clean: 0.0,
            epochs: 10,
            batch: 50,
            optimizer: Optimizer::ADAM,
            schedule: Schedule::Cosine,
            patience: None,
            keep: Keep::Best,
            seed: 0,
        }
    }

    fn check(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.clean) {
            return Err(Error::argument("clean share", "from 0 to below 1", self.clean));
        }
        for (what, value) in [("epochs", self.epochs), ("batch", self.batch)] {
            if value == 0 {
                return Err(Error::argument(what, "at least 1", value));
            }
        }
        if self.patience == Some(0) {
            return Err(Error::argument("patience", "at least 1 epoch", 0));
        }
        self.optimizer.check()
    }
}

/// Labelled pictures as they are trained on.
pub struct TrainingSet<'a> {
    /// What the anchor is optimised on.
    pub set: &'a LabelledSet,
    /// What stops it early and chooses the epoch; disjoint from `set`. It may be missing.
    pub held_out: Option<&'a LabelledSet>,
    /// Limits on picture files.
    pub limits: DecodeLimits,
    /// From a picture file to the tower's pixels.
    pub preprocess: &'a Preprocess,
}

/// A training: all that decides the anchor.
pub struct Training<'a, T> {
    /// How.
    pub plan: Plan,
    /// The frozen tower with nothing put in.
    pub tower: &'a T,
    /// The same in the precision pictures are crafted in, where that is another.
    pub craft: Option<&'a T>,
    /// The model's name.
    pub model: String,
    /// What is to become small.
    pub goal: Goal<'a>,
    /// Where the anchor begins, `(N, D)`: in the paper the tower's own on a white picture.
    pub initial: Tensor,
    /// On what.
    pub data: TrainingSet<'a>,
    /// Steps between two states on disk: what a kill loses. The anchor does not depend on it.
    pub save_every: usize,
    /// A folder for the prepared and crafted pictures, which trainings share that differ in neither;
    /// the training's own where not given.
    pub pictures: Option<PathBuf>,
    /// Other sizes that steps take turns with, in a tower for pictures of any size; the anchor is
    /// interpolated to each. Every picture is prepared and crafted at every size.
    pub others: Vec<Resolution<'a, T>>,
}

/// A tower at one size of picture.
pub struct Resolution<'a, T> {
    /// The frozen tower with nothing put in.
    pub tower: &'a T,
    /// The same in the precision pictures are crafted in, where that is another.
    pub craft: Option<&'a T>,
    /// From a picture file to the tower's pixels.
    pub preprocess: &'a Preprocess,
}

impl<T> Clone for Resolution<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Resolution<'_, T> {}

/// How far a training is.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// What is being done: `reading`, `crafting`, `epoch 3`, `held-out pictures`.
    pub now: String,
    /// Pictures of that done.
    pub done: usize,
    /// Pictures of that in all.
    pub of: usize,
    /// The mean loss of the epoch so far.
    pub loss: Option<f64>,
    /// An epoch that has just ended.
    pub ended: Option<Epoch>,
}

/// What a training came to.
#[derive(Debug, Clone)]
pub struct Trained {
    /// `(N, D)` f32 on the CPU: that of the best epoch on the held-out pictures or of the last, as
    /// [`Plan::keep`] says.
    pub anchor: Tensor,
    /// The epoch the anchor is of; 0 is the anchor it began with.
    pub epoch: usize,
    /// Whether it stopped before its last epoch.
    pub stopped: bool,
    /// The loss of every step.
    pub steps: Vec<Step>,
    /// The held-out figures of every epoch, the first before any step.
    pub epochs: Vec<Epoch>,
    /// Pictures it was trained on.
    pub pictures: usize,
    /// Pictures that could not be read.
    pub defects: Vec<Defect>,
}

impl Trained {
    /// What an anchor's metadata says of it ([`crate::defense::AnchorMeta::training`]).
    pub fn metadata(&self, plan: &Plan, goal: &Goal) -> BTreeMap<String, String> {
        let round = |value: f64| (value * 1e5).round() / 1e5;
        let losses: Vec<Value> = self
            .epochs
            .iter()
            .map(|epoch| {
                json!({
                    "epoch": epoch.epoch,
                    "train": epoch.train.as_ref().map(|m| round(m.loss)),
                    "held_out": epoch.held_out.as_ref().map(|m| round(m.loss)),
                })
            })
            .collect();
        [
            ("eps", plan.eps.to_string()),
            ("epochs", plan.epochs.to_string()),
            ("best_epoch", self.epoch.to_string()),
            ("images", self.pictures.to_string()),
            ("attack", json!({ "name": plan.attack, "settings": plan.settings }).to_string()),
            ("examples", plan.examples.to_string()),
            ("objective", goal.name().to_string()),
            ("seed", plan.seed.to_string()),
            ("losses", Value::from(losses).to_string()),
            ("optimizer", json!(plan.optimizer).to_string()),
            ("schedule", plan.schedule.to_string()),
            ("batch", plan.batch.to_string()),
            ("clean_share", plan.clean.to_string()),
        ]
        .into_iter()
        .map(|(key, value)| (key.to_string(), value))
        .collect()
    }

    /// The method these anchors are of.
    pub const METHOD: Method = Method::DataDriven;
}

/// The pictures of a training that could be read: a row each, those to train on first.
struct Rows {
    keys: Vec<u64>,
    labels: Vec<usize>,
    /// Rows below this are trained on, the others are held out.
    trained: usize,
    /// At every size.
    clean: Vec<Store>,
    /// Crafted on the undefended model.
    /// At every size, of static examples.
    crafted: Vec<Store>,
    defects: Vec<Defect>,
}

/// `pictures.json`: which of the data's pictures have a row.
#[derive(Serialize, Deserialize)]
struct Prepared {
    /// Numbers in the training set, then in the held-out set.
    rows: [Vec<usize>; 2],
    defects: Vec<(String, String)>,
}

impl<T: Insertable> Training<'_, T> {
    /// What decides the result; `more` are the caller's own entries, such as the model's weights
    /// and the head's templates.
    ///
    /// # Errors
    /// If the initial anchor cannot be read from its device.
    pub fn decides(&self, more: Value) -> Result<Value> {
        let set = |set: &LabelledSet| json!({ "name": set.name(), "items": set.items().len(), "digest": set.digest() });
        let p = self.data.preprocess;
        let mut decides = json!({
            "task": "anchor",
            "version": env!("CARGO_PKG_VERSION"),
            "plan": self.plan,
            "goal": self.goal.describe(),
            "tower": format!("{:?}", self.tower.precision()),
            "device": if self.tower.device().is_cpu() { "cpu" } else { "gpu" },
            "crafted_in": self.craft.map(|craft| format!("{:?} {:?}", craft.dtype(), craft.precision())),
            "initial": digest(&self.initial)?,
            "dataset": set(self.data.set),
            "held_out": self.data.held_out.map(set),
            "preprocess": {
                "contract": p.contract.to_string(),
                "width": p.width,
                "height": p.height,
                "resize": format!("{:?}, {:?}", p.scale, p.filter),
            },
        });
        if let (Some(all), false) = (decides.as_object_mut(), self.others.is_empty()) {
            let size = |other: &Resolution<T>| json!([other.preprocess.height, other.preprocess.width]);
            all.insert("other_sizes".into(), self.others.iter().map(size).collect());
        }
        if let (Some(all), Value::Object(more)) = (decides.as_object_mut(), more) {
            all.extend(more);
        }
        Ok(decides)
    }

    /// Trains in `folder`, or goes on with the training that is there.
    ///
    /// # Errors
    /// If the plan or the data are unusable, the folder holds another training (the error says what
    /// differs) or one that is not to be resumed, no picture can be read, or the model fails.
    pub fn run(
        &self,
        folder: &Path,
        decides: Value,
        resume: bool,
        told: &mut dyn FnMut(&Progress),
    ) -> Result<Trained> {
        self.plan.check()?;
        if self.plan.patience.is_some() && self.data.held_out.is_none() {
            return Err(Error::argument("patience", "held-out pictures to go with it", "none"));
        }
        let classes = match &self.goal {
            Goal::CrossEntropy { head } => Some(head.classes.len()),
            Goal::Embedding { .. } => None,
        };
        if let Some(classes) = classes
            && classes != self.data.set.classes().len()
        {
            let expected = format!("{classes} classes, as the head has");
            return Err(Error::argument("data", expected, self.data.set.classes().len()));
        }
        self.goal.check(&self.plan, self.tower)?;
        for at in self.sizes() {
            let (height, width) = at.tower.spec().picture;
            let (h, w) = (at.preprocess.height as usize, at.preprocess.width as usize);
            if (h, w) != (height, width) {
                let expected = format!("{height}x{width}, as the tower's");
                return Err(Error::argument("pictures", expected, format!("{h}x{w}")));
            }
        }
        let initial = self.initial.flatten_all()?.to_vec1::<f32>()?;
        for (at, gif) in self.sizes().into_iter().zip(self.gifs()?) {
            self.defense(&initial, &gif, at)?;
        }
        if self.pictures.as_deref() == Some(folder) {
            return Err(Error::argument("shared pictures", "a folder of their own", folder.display()));
        }
        let _shared = self.claim_shared(&decides)?;
        let _lock = claim(folder, &Manifest::new(decides, None, self.items()), resume)?;
        let rows = self.prepare(self.pictures.as_deref().unwrap_or(folder), told)?;
        let state = self.optimise(folder, &rows, told)?;
        let spec = self.tower.spec();
        let held_out = rows.trained < rows.labels.len();
        let best = held_out && self.plan.keep == Keep::Best;
        let anchor = if best { &state.best } else { &state.anchor };
        state.write_curve(&folder.join("losses.csv"))?;
        Ok(Trained {
            anchor: Tensor::from_vec(anchor.clone(), (spec.tokens(), spec.hidden), &Device::Cpu)?,
            epoch: if best { state.best_epoch } else { state.epochs.len().saturating_sub(1) },
            stopped: state.epochs.len() <= self.plan.epochs,
            steps: state.steps,
            epochs: state.epochs,
            pictures: rows.trained,
            defects: rows.defects,
        })
    }

    /// The folder of shared pictures for this training alone, where there is one.
    fn claim_shared(&self, decides: &Value) -> Result<Option<std::fs::File>> {
        let Some(shared) = &self.pictures else {
            return Ok(None);
        };
        let mut decides = decides.clone();
        if let Some(fields) = decides.as_object_mut() {
            fields.remove("initial");
            let plan = &self.plan;
            let crafted = (plan.examples == Examples::Static).then(|| {
                json!({ "attack": plan.attack, "eps": plan.eps, "settings": plan.settings, "seed": plan.seed })
            });
            fields.insert("plan".into(), json!({ "crafted": crafted }));
        }
        claim(shared, &Manifest::new(decides, None, self.items()), true).map(Some)
    }

    /// The training's own size and those that take turns with it.
    fn sizes(&self) -> Vec<Resolution<'_, T>> {
        let own = Resolution { tower: self.tower, craft: self.craft, preprocess: self.data.preprocess };
        std::iter::once(own).chain(self.others.iter().copied()).collect()
    }

    fn items(&self) -> usize {
        self.data.set.items().len() + self.data.held_out.map_or(0, |set| set.items().len())
    }

    /// Reads every picture once and, for static examples, crafts every one.
    fn prepare(&self, folder: &Path, told: &mut dyn FnMut(&Progress)) -> Result<Rows> {
        const AT_ONCE: usize = 64;
        let of = self.items();
        let sizes = self.sizes();
        let side = |at: &Resolution<T>| (at.preprocess.width as usize, at.preprocess.height as usize);
        let list = folder.join("pictures.json");
        // The first is the training's own size.
        let file = |what: &str, i: usize| match i {
            0 => folder.join(format!("{what}.u8")),
            i => folder.join(format!("{what}-{i}.u8")),
        };
        let mut tell = |now: &str, done: usize, of: usize| {
            told(&Progress { now: now.into(), done, of, loss: None, ended: None });
        };
        let sets: Vec<&LabelledSet> = std::iter::once(self.data.set).chain(self.data.held_out).collect();
        if !list.exists() {
            let mut prepared = Prepared { rows: [Vec::new(), Vec::new()], defects: Vec::new() };
            let stores = sizes.iter().enumerate().map(|(i, at)| {
                let (width, height) = side(at);
                Store::create(&file("pictures", i), width, height)
            });
            let mut stores = stores.collect::<Result<Vec<_>>>()?;
            let mut done = 0;
            for (set, rows) in sets.iter().zip(&mut prepared.rows) {
                let all: Vec<usize> = (0..set.items().len()).collect();
                for part in all.chunks(AT_ONCE) {
                    let read = |&i: &usize| -> Result<Vec<RgbImage>> {
                        let picture = set.picture(i, &self.data.limits)?;
                        Ok(sizes.iter().map(|at| at.preprocess.prepare(&picture)).collect())
                    };
                    let found: Vec<Result<Vec<RgbImage>>> = part.par_iter().map(read).collect();
                    for (&i, pictures) in part.iter().zip(found) {
                        match pictures {
                            Ok(pictures) => {
                                for (store, picture) in stores.iter_mut().zip(&pictures) {
                                    store.append(picture.as_raw())?;
                                }
                                rows.push(i);
                            }
                            Err(error) => {
                                prepared.defects.push((set.items()[i].id.clone(), error.to_string()));
                            }
                        }
                    }
                    done += part.len();
                    tell("reading", done, of);
                }
                let defects = set.defects().iter().map(|defect| (defect.id.clone(), defect.reason.clone()));
                prepared.defects.extend(defects);
            }
            for store in &mut stores {
                store.sync()?;
            }
            write_whole(&list, &prepared)?;
        }
        let text = std::fs::read_to_string(&list).map_err(|e| Error::read(&list, e))?;
        let prepared: Prepared =
            serde_json::from_str(&text).map_err(|e| Error::config(&list, e.to_string()))?;
        let mut rows = Rows {
            keys: Vec::new(),
            labels: Vec::new(),
            trained: prepared.rows[0].len(),
            clean: Vec::new(),
            crafted: Vec::new(),
            defects: prepared.defects.into_iter().map(|(id, reason)| Defect { id, reason }).collect(),
        };
        for (set, found) in sets.iter().zip(&prepared.rows) {
            for item in found.iter().filter_map(|&i| set.items().get(i)) {
                rows.keys.push(key(&item.id));
                rows.labels.push(item.label);
            }
        }
        for (i, at) in sizes.iter().enumerate() {
            let (width, height) = side(at);
            let path = file("pictures", i);
            let store = Store::open_or_create(&path, width, height)?;
            if rows.keys.len() != store.len() {
                let reason = format!("expected {} pictures, found {}", rows.keys.len(), store.len());
                return Err(Error::config(path, reason));
            }
            rows.clean.push(store);
        }
        if rows.trained == 0 {
            let reason =
                rows.defects.first().map_or(String::new(), |d| format!("; `{}`: {}", d.id, d.reason));
            return Err(Error::argument("data", "a picture that can be read", format!("none{reason}")));
        }
        if self.data.held_out.is_some() && rows.trained == rows.labels.len() {
            return Err(Error::argument("held-out pictures", "one that can be read", "none"));
        }
        if self.plan.examples == Examples::Static {
            for (i, at) in sizes.into_iter().enumerate() {
                let store = self.craft_all(&rows, i, at, &file("crafted", i), &mut tell)?;
                rows.crafted.push(store);
            }
        }
        Ok(rows)
    }

    /// Crafts what is not crafted yet at a size, the `i`th, on the undefended model.
    fn craft_all(
        &self,
        rows: &Rows,
        i: usize,
        at: Resolution<'_, T>,
        path: &Path,
        tell: &mut dyn FnMut(&str, usize, usize),
    ) -> Result<Store> {
        const AT_ONCE: usize = 64;
        let mut store =
            Store::open_or_create(path, at.preprocess.width as usize, at.preprocess.height as usize)?;
        let of = rows.labels.len();
        if store.len() > of {
            return Err(Error::config(path, format!("expected {of} pictures, found {}", store.len())));
        }
        if store.len() < of {
            store.cut_to_groups(AT_ONCE)?;
        }
        let tower = at.craft.unwrap_or(at.tower);
        let subject = Subject::undefended(&self.model);
        while store.len() < of {
            let part: Vec<usize> = (store.len()..of.min(store.len() + AT_ONCE)).collect();
            tell("crafting on the undefended model", store.len(), of);
            let clean = self.pixels(&rows.clean[i], &part)?;
            let seed = self.draw("static", 0);
            let found = self.craft(at.tower, tower, subject.clone(), &clean, rows, &part, seed)?;
            let found = quantise(&found, &clean, self.plan.eps)?;
            for row in 0..part.len() {
                store.append(&store::bytes(&found.get(row)?)?)?;
            }
            store.sync()?;
        }
        tell("crafting on the undefended model", of, of);
        Ok(store)
    }

    /// The seed of the attacks for a purpose, so that no two of them begin alike.
    fn draw(&self, purpose: &str, round: usize) -> u64 {
        picture_rng(self.plan.seed, round as u64, 1, purpose).next_u64()
    }

    /// The filter at each size: at the training's own the plan's cutoff, at others the same as
    /// [`default_cutoff`] would have it.
    fn gifs(&self) -> Result<Vec<Arc<Gif>>> {
        self.sizes().iter().map(|at| self.gif_at(at.tower)).collect()
    }

    fn gif_at(&self, tower: &T) -> Result<Arc<Gif>> {
        let (own, size) = (self.tower.spec().image_size, tower.spec().image_size);
        let share = if own == size { 1.0 } else { default_cutoff(size) / default_cutoff(own) };
        let (height, width) = tower.spec().picture;
        Ok(Arc::new(Gif::new(height, width, self.plan.cutoff * share, tower.device())?))
    }

    /// Pixels `(R, 3, H, W)` of these rows.
    fn pixels(&self, store: &Store, rows: &[usize]) -> Result<Tensor> {
        let device = self.tower.device();
        let pixels = rows
            .iter()
            .map(|&row| pixels_from_rgb(&store.picture(row)?, device))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&pixels, 0)?)
    }

    /// Nothing, GIF alone, and GIF with `anchor`, `(N, D)` at the training's own size: what a
    /// validation compares, as it is at a size.
    ///
    /// # Errors
    /// If the anchor is not of the tower's shape.
    pub fn compared(&self, anchor: &Tensor, at: Resolution<'_, T>) -> Result<Vec<(&'static str, Defense)>> {
        let gif = self.gif_at(at.tower)?;
        let alone = Defense { gif: Some(gif.clone()), ..Defense::default() };
        let values = anchor.flatten_all()?.to_vec1::<f32>()?;
        let both = Defense { anchor: Some("trained".into()), ..self.defense(&values, &gif, at)? };
        Ok(vec![("none", Defense::default()), ("gif", alone), ("gif+fra", both)])
    }

    /// Adversarial pixels of these rows, crafted on `tower`, which is `bare` with or without a defence.
    #[expect(clippy::too_many_arguments, reason = "each is another thing")]
    fn craft(
        &self,
        bare: &T,
        tower: &T,
        subject: Subject,
        clean: &Tensor,
        rows: &Rows,
        part: &[usize],
        seed: u64,
    ) -> Result<Tensor> {
        let pictures = Pictures::new(clean, part.iter().map(|&row| rows.keys[row]).collect())?;
        let labels = part.iter().map(|&row| rows.labels[row]).collect();
        self.goal.craft(&self.plan, bare, tower, subject, &pictures, labels, seed)
    }

    /// GIF and this anchor, `(N, D)` at the training's own size, as they are at another.
    fn defense(&self, anchor: &[f32], gif: &Arc<Gif>, at: Resolution<'_, T>) -> Result<Defense> {
        let (spec, there) = (self.tower.spec(), at.tower.spec());
        let mut anchor = Tensor::from_slice(anchor, (spec.tokens(), spec.hidden), &Device::Cpu)?;
        if there.grid != spec.grid {
            anchor = interpolate(&anchor, spec.class_token, spec.grid, there.grid)?;
        }
        let fra = Fra::new(&anchor, self.plan.alpha, self.plan.beta, self.tower.device())?;
        Ok(Defense {
            gif: Some(gif.clone()),
            fra: Some(Arc::new(fra)),
            anchor: Some("in training".into()),
            method: Some(Method::DataDriven),
        })
    }

    /// The adversarial pixels of these rows for the tower as it is defended now; `epoch` is `None`
    /// for held-out pictures, which begin alike after every epoch, so that epochs can be compared.
    fn examples(
        &self,
        rows: &Rows,
        part: &[usize],
        clean: &Tensor,
        defense: &Defense,
        epoch: Option<usize>,
        (i, at): (usize, Resolution<'_, T>),
    ) -> Result<Tensor> {
        match rows.crafted.get(i) {
            Some(store) => self.pixels(store, part),
            None => {
                let tower = at.craft.unwrap_or(at.tower).with(defense.inserts());
                let subject = Subject::new(&self.model, defense)?;
                let seed = epoch.map_or_else(|| self.draw("held out", 0), |epoch| self.draw("epoch", epoch));
                self.craft(at.tower, &tower, subject, clean, rows, part, seed)
            }
        }
    }

    fn optimise(&self, folder: &Path, rows: &Rows, told: &mut dyn FnMut(&Progress)) -> Result<State> {
        let plan = &self.plan;
        let path = folder.join("state.safetensors");
        let initial = self.initial.flatten_all()?.to_vec1::<f32>()?;
        let mut state = match State::read(&path, initial.len())? {
            Some(state) => state,
            None => State::new(initial),
        };
        let (sizes, gifs) = (self.sizes(), self.gifs()?);
        let per_epoch = rows.trained.div_ceil(plan.batch);
        let total = per_epoch * plan.epochs;
        let mut order = (usize::MAX, Vec::new());
        loop {
            let (epoch, within) = (state.steps.len() / per_epoch, state.steps.len() % per_epoch);
            if within == 0 && state.epochs.len() <= epoch {
                self.end_epoch(&mut state, rows, &gifs, epoch, per_epoch, told)?;
                state.write(&path)?;
            }
            let worse = state.epochs.len().saturating_sub(1 + state.best_epoch);
            if within == 0 && (epoch == plan.epochs || plan.patience.is_some_and(|most| worse >= most)) {
                return Ok(state);
            }
            if order.0 != epoch {
                order = (epoch, epoch_order(rows.trained, plan.seed, epoch));
            }
            let part: Vec<usize> =
                order.1.iter().copied().skip(within * plan.batch).take(plan.batch).collect();
            let i = state.steps.len() % sizes.len();
            let defense = self.defense(&state.anchor, &gifs[i], sizes[i])?;
            let found = self.loss(rows, &part, &defense, Some(epoch), (i, sizes[i]))?;
            let rate = plan.schedule.factor(state.steps.len(), total);
            plan.optimizer.step(&mut state.anchor, &found.gradient, &mut state.moments, rate);
            state.steps.push(Step { epoch: epoch + 1, loss: found.measured.loss });
            if state.anchor.iter().any(|value| !value.is_finite()) {
                return Err(Error::argument(
                    "learning rate",
                    "one that the anchor survives",
                    format!("numbers that are not finite after step {}", state.steps.len()),
                ));
            }
            let so_far = &state.steps[epoch * per_epoch..];
            told(&Progress {
                now: format!("epoch {} of {}", epoch + 1, plan.epochs),
                done: epoch * rows.trained + (within * plan.batch + part.len()).min(rows.trained),
                of: plan.epochs * rows.trained,
                loss: Some(so_far.iter().map(|step| step.loss).sum::<f64>() / so_far.len() as f64),
                ended: None,
            });
            if state.steps.len().is_multiple_of(self.save_every.max(1)) {
                state.write(&path)?;
            }
        }
    }

    /// Measures the held-out pictures, and keeps the anchor if it is the best.
    fn end_epoch(
        &self,
        state: &mut State,
        rows: &Rows,
        gifs: &[Arc<Gif>],
        epoch: usize,
        per_epoch: usize,
        told: &mut dyn FnMut(&Progress),
    ) -> Result<()> {
        let sizes = self.sizes();
        let defenses = sizes.iter().zip(gifs).map(|(at, gif)| self.defense(&state.anchor, gif, *at));
        let defenses = defenses.collect::<Result<Vec<_>>>()?;
        let held_out: Vec<usize> = (rows.trained..rows.labels.len()).collect();
        let mut sum = Measured::default();
        for (chunk, part) in held_out.chunks(self.plan.batch).enumerate() {
            let i = chunk % sizes.len();
            let found = self.loss(rows, part, &defenses[i], None, (i, sizes[i]))?;
            sum.add(&found.measured, part.len());
            let done = part[0] + part.len() - rows.trained;
            told(&Progress {
                now: "held-out pictures".into(),
                done,
                of: held_out.len(),
                loss: None,
                ended: None,
            });
        }
        let measured = (!held_out.is_empty()).then(|| sum.over(held_out.len()));
        let last = &state.steps[state.steps.len().saturating_sub(per_epoch)..];
        let train = (epoch > 0).then(|| Measured {
            loss: last.iter().map(|step| step.loss).sum::<f64>() / last.len().max(1) as f64,
            clean: None,
            adversarial: None,
        });
        let lowest = state.epochs.iter().filter_map(|epoch| epoch.held_out.as_ref().map(|m| m.loss));
        let best = lowest.fold(f64::INFINITY, f64::min);
        if measured.as_ref().is_none_or(|m| m.loss < best) {
            state.best = state.anchor.clone();
            state.best_epoch = epoch;
        }
        let ended = Epoch { epoch, train, held_out: measured };
        state.epochs.push(ended.clone());
        let n = held_out.len();
        told(&Progress { now: "held-out pictures".into(), done: n, of: n, loss: None, ended: Some(ended) });
        Ok(())
    }

    /// The loss of these rows, means over them, and in an epoch its gradient at the anchor.
    fn loss(
        &self,
        rows: &Rows,
        part: &[usize],
        defense: &Defense,
        epoch: Option<usize>,
        (i, at): (usize, Resolution<'_, T>),
    ) -> Result<LossAndGradient> {
        let gradient = epoch.is_some();
        let tower = at.tower.with(defense.inserts());
        let clean = self.pixels(&rows.clean[i], part)?;
        let examples = self.examples(rows, part, &clean, defense, epoch, (i, at))?;
        let labels: Vec<usize> = part.iter().map(|&row| rows.labels[row]).collect();
        let share = self.plan.clean;
        let mut kinds = vec![(&examples, 1.0 - share)];
        // In training the clean pictures cost a pass of their own; held-out figures show them.
        if share > 0.0 || !gradient {
            kinds.push((&clean, share));
        }
        let (own, there) = (self.tower.spec(), at.tower.spec());
        let mut sum = vec![0f32; if gradient { there.tokens() * there.hidden } else { 0 }];
        let mut loss = 0.0;
        let mut right = [None, None];
        for (i, (pixels, weight)) in kinds.into_iter().enumerate() {
            let found =
                self.goal.loss_and_gradient(at.tower, &tower, pixels, &clean, &labels, weight, gradient)?;
            loss += weight * found.loss / part.len() as f64;
            right[i] = found.right.map(|right| right as f64);
            for (sum, value) in sum.iter_mut().zip(&found.gradient) {
                *sum += value;
            }
        }
        if gradient && there.grid != own.grid {
            let found = Tensor::from_vec(sum, (there.tokens(), there.hidden), &Device::Cpu)?;
            sum = interpolate_vjp(&found, own.grid, there.grid)?.flatten_all()?.to_vec1::<f32>()?;
        }
        let percent = |right: Option<f64>| right.map(|right| 100.0 * right / part.len() as f64);
        Ok(LossAndGradient {
            measured: Measured { loss, adversarial: percent(right[0]), clean: percent(right[1]) },
            gradient: sum,
        })
    }
}

/// How far a tower's features are from those of the undefended tower on the clean picture: means
/// of |f - f0|^2 / |f0|^2.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Distances {
    /// Pictures measured.
    pub n: usize,
    /// On the clean pictures.
    pub clean: f64,
    /// On pictures crafted on the undefended tower.
    pub transfer: f64,
    /// On pictures crafted on the tower itself.
    pub adaptive: f64,
}

impl<T: Insertable> Training<'_, T> {
    /// What each of these defences comes to on the pictures of `set` that can be read, where the goal
    /// is features, at a size that may be another than the training's. Transfer pictures are crafted
    /// once for all.
    ///
    /// # Errors
    /// If no picture can be read, or the model fails.
    pub fn distances(
        &self,
        at: Resolution<'_, T>,
        set: &LabelledSet,
        defenses: &[Defense],
        told: &mut dyn FnMut(&Progress),
    ) -> Result<Vec<Distances>> {
        let attacked = at.craft.unwrap_or(at.tower);
        let seed = self.draw("validation", 0);
        let all: Vec<usize> = (0..set.items().len()).collect();
        let mut sums = vec![[0.0; 3]; defenses.len()];
        let mut n = 0;
        for part in all.chunks(self.plan.batch) {
            let mut pixels = Vec::new();
            let mut keys = Vec::new();
            for &i in part {
                // One that cannot be read counts for nothing, as in training.
                if let Ok(picture) = set.picture(i, &self.data.limits) {
                    let picture = at.preprocess.prepare(&picture);
                    pixels.push(pixels_from_rgb(&picture, at.tower.device())?);
                    keys.push(key(&set.items()[i].id));
                }
            }
            if pixels.is_empty() {
                continue;
            }
            let clean = Tensor::stack(&pixels, 0)?;
            let labels = vec![0; keys.len()];
            let pictures = Pictures::new(&clean, keys)?;
            let craft = |tower: &T, subject: Subject| {
                self.goal.craft(&self.plan, at.tower, tower, subject, &pictures, labels.clone(), seed)
            };
            let transfer = craft(attacked, Subject::undefended(&self.model))?;
            for (defense, sums) in defenses.iter().zip(&mut sums) {
                let tower = at.tower.with(defense.inserts());
                let subject = Subject::new(&self.model, defense)?;
                let adaptive = craft(&attacked.with(defense.inserts()), subject)?;
                for (sum, pixels) in sums.iter_mut().zip([&clean, &transfer, &adaptive]) {
                    let goal = &self.goal;
                    let found =
                        goal.loss_and_gradient(at.tower, &tower, pixels, &clean, &labels, 1.0, false)?;
                    *sum += found.loss;
                }
            }
            n += labels.len();
            let done = part.last().map_or(0, |last| last + 1);
            told(&Progress { now: "validation".into(), done, of: all.len(), loss: None, ended: None });
        }
        if n == 0 {
            return Err(Error::argument("validation pictures", "one that can be read", "none"));
        }
        let mean = |sum: f64| sum / n as f64;
        let distances = |[clean, transfer, adaptive]: [f64; 3]| Distances {
            n,
            clean: mean(clean),
            transfer: mean(transfer),
            adaptive: mean(adaptive),
        };
        Ok(sums.into_iter().map(distances).collect())
    }
}

struct LossAndGradient {
    measured: Measured,
    gradient: Vec<f32>,
}

/// The order of `n` pictures in an epoch: a shuffle by ChaCha8, the same on every platform.
pub fn epoch_order(n: usize, seed: u64, epoch: usize) -> Vec<usize> {
    let mut rng = picture_rng(seed, epoch as u64, 0, "the order of an epoch");
    let mut order: Vec<usize> = (0..n).collect();
    for i in 0..n {
        let left = (n - i) as u128;
        let pick = ((u128::from(rng.next_u64()) * left) >> 64) as usize;
        order.swap(i, i + pick);
    }
    order
}

fn digest(tensor: &Tensor) -> Result<String> {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    for value in tensor.flatten_all()?.to_vec1::<f32>()? {
        hash.update(value.to_le_bytes());
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
