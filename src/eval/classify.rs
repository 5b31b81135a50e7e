//! Zero-shot classification, clean and attacked: the paper's Tables 1, 2, 3 and 6.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use image::RgbImage;
use rayon::prelude::*;
use serde_json::{Value, json};

use super::run::{AttackedItem, ItemLine, Prediction, Run, write_whole};
use super::{Attacked, Precision, Row, Summary};
use crate::attack::{
    Classification, Classifier, Crafted, Eps, Flag, Named, Pictures, Progress, Recipe, Resized, Settings,
    Subject, Threat, ThreatKind, key,
};
use crate::data::LabelledSet;
use crate::data::registry::Metric;
use crate::image::{DecodeLimits, Preprocess, pixels_from_rgb, rgb_from_pixels};
use crate::{Error, Result};

/// How often a run that goes on writes its summary.
const SUMMARY_EVERY: Duration = Duration::from_secs(60);

/// The name of the task in figures.
pub const TASK: &str = "zero-shot";

/// An item of a run, before its picture is read.
#[derive(Debug, Clone)]
struct Planned {
    /// Its place in the whole run.
    index: usize,
    /// Its place in the data set at hand, or why it has none.
    source: std::result::Result<usize, String>,
    id: String,
    label: Option<usize>,
}

/// An attack of a run: its name, its ball and how it is changed from the published one.
#[derive(Debug, Clone)]
pub struct AttackPlan {
    /// One of [`crate::attack::NAMES`].
    pub name: String,
    /// The radius.
    pub eps: Eps,
    /// What is changed.
    pub settings: Settings,
}

impl AttackPlan {
    fn build(&self) -> Result<Named> {
        Named::new(&self.name, self.eps, &self.settings)
    }
}

/// A model under test.
pub struct Model<'a> {
    /// The defence's short name in figures: `none`, `gif+fra`.
    pub defense: String,
    /// The model with its defence.
    pub classifier: &'a dyn Classifier,
}

/// All that decides what a run finds, but for the shard.
pub struct Classify<'a> {
    /// The whole data set of the run, subsets drawn.
    pub set: &'a LabelledSet,
    /// Limits on its picture files.
    pub limits: DecodeLimits,
    /// From a picture file to the model's pixels.
    pub preprocess: Preprocess,
    /// Attack pictures at their own size, the resize inside the differentiated function.
    pub native: bool,
    /// The models under test.
    pub models: Vec<Model<'a>>,
    /// What transfer pictures are crafted on: the undefended model, or another.
    pub surrogate: &'a dyn Classifier,
    /// The attacks.
    pub attacks: Vec<AttackPlan>,
    /// Under which threat models.
    pub threats: Vec<ThreatKind>,
    /// What the pictures hold when the figures are made; both answers are in every item's line.
    pub pictures: Precision,
    /// Of all that is drawn at random.
    pub seed: u64,
    /// Items worked on together, and lost together when the process is killed. It does not change
    /// what is found.
    pub batch: usize,
    /// Write the adversarial pictures as PNG into the run's folder.
    pub save: bool,
    /// Where pictures are put.
    pub device: Device,
}

/// How far a run is.
#[derive(Debug, Clone, PartialEq)]
pub struct Done {
    /// Items with a line.
    pub items: usize,
    /// Items of the run.
    pub of: usize,
    /// What is being done to the present batch, and how much of that is done, 0 to 1.
    pub now: (String, f64),
}

impl Classify<'_> {
    /// What `run.json` says of this; `more` are the caller's own entries, such as the models'
    /// weights and the templates of the head.
    ///
    /// # Errors
    /// If an attack's name or setting is wrong, it comes twice, or there are too few classes for it.
    pub fn decides(&self, more: Value) -> Result<Value> {
        let classes = self.surrogate.classes();
        if self.native {
            // Refused here, before there is a run, where the contract is no resize.
            self.preprocess.matrices(1, 1)?;
        }
        let mut attacks = Vec::new();
        for (i, plan) in self.attacks.iter().enumerate() {
            let attack = plan.build()?;
            let attack = attack.as_attack();
            if self.attacks.iter().take(i).any(|before| (&before.name, before.eps) == (&plan.name, plan.eps))
            {
                return Err(Error::argument(
                    "--attack",
                    "each attack and eps once",
                    format!("{} twice", plan.name),
                ));
            }
            if attack.fewest_classes() > classes {
                let expected = format!("one that works with {classes} classes");
                return Err(Error::argument(
                    "--attack",
                    expected,
                    format!("{}, which needs {}", plan.name, attack.fewest_classes()),
                ));
            }
            if self.threats.contains(&ThreatKind::Transfer) && plan.settings.stop_when_fooled {
                return Err(Error::argument(
                    "--early-stop",
                    "adaptive attacks alone: what has just fooled one model rarely fools another",
                    "--threat transfer or both",
                ));
            }
            attacks
                .push(json!({ "attack": plan.name, "eps": attack.eps(), "parameters": attack.parameters() }));
        }
        let models: Vec<Value> = self
            .models
            .iter()
            .map(|model| json!({ "name": model.defense, "subject": model.classifier.subject() }))
            .collect();
        let p = &self.preprocess;
        let mut decides = json!({
            "task": TASK,
            "version": env!("CARGO_PKG_VERSION"),
            "seed": self.seed,
            "dataset": {
                "name": self.set.name(),
                "items": self.set.items().len() + self.set.defects().len(),
                "digest": self.set.digest(),
                "metric": self.metric(),
            },
            "preprocess": {
                "contract": p.contract.to_string(),
                "native": self.native,
                "width": p.width,
                "height": p.height,
                "resize": format!("{:?}, {:?}", p.scale, p.filter),
            },
            "defenses": models,
            "surrogate": self.surrogate.subject(),
            "attacks": attacks,
            "threats": self.threats,
            "pictures": self.pictures,
        });
        if let (Some(all), Value::Object(more)) = (decides.as_object_mut(), more) {
            all.extend(more);
        }
        Ok(decides)
    }

    fn metric(&self) -> Metric {
        self.set.entry().map_or(Metric::Accuracy, |entry| entry.metric)
    }

    /// The number of items in a shard, or in the whole run.
    ///
    /// # Errors
    /// If the shard is none of those.
    pub fn items(&self, shard: Option<(usize, usize)>) -> Result<usize> {
        Ok(self.plan(shard)?.len())
    }

    /// The items of a shard, or of the whole run, in order.
    fn plan(&self, shard: Option<(usize, usize)>) -> Result<Vec<Planned>> {
        let items = self.set.items().iter().enumerate().map(|(i, item)| Planned {
            index: i,
            source: Ok(i),
            id: item.id.clone(),
            label: Some(item.label),
        });
        let after = self.set.items().len();
        let defects = self.set.defects().iter().enumerate().map(|(i, defect)| Planned {
            index: after + i,
            source: Err(defect.reason.clone()),
            id: defect.id.clone(),
            label: None,
        });
        let mut all: Vec<Planned> = items.chain(defects).collect();
        if let Some((i, n)) = shard {
            let part = self.set.clone().shard(i as u64, n as u64)?;
            let within: std::collections::HashSet<&str> = part
                .items()
                .iter()
                .map(|item| item.id.as_str())
                .chain(part.defects().iter().map(|defect| defect.id.as_str()))
                .collect();
            all.retain(|item| within.contains(item.id.as_str()));
        }
        Ok(all)
    }

    /// Does what of the run is not done yet, and writes its summary.
    ///
    /// # Errors
    /// If a model fails, or the run's folder cannot be written. A picture that cannot be read is an
    /// item that failed, in `items.jsonl` with its reason.
    pub fn run(&self, run: &mut Run, told: &mut dyn FnMut(&Done)) -> Result<Summary> {
        let plan = self.plan(run.manifest().shard)?;
        let of = plan.len();
        let pending: Vec<Planned> = plan.into_iter().filter(|item| !run.has(item.index)).collect();
        let states = run.folder().join("state");
        let mut summarised = Instant::now();
        for batch in pending.chunks(self.batch.max(1)) {
            let items = run.done();
            let mut tell = |now: (String, f64)| told(&Done { items, of, now });
            tell(("reading".into(), 0.0));
            let lines = self.batch(batch, run.folder(), &states, &mut tell)?;
            run.append(&lines)?;
            // What was kept of a batch that is done now.
            match std::fs::remove_dir_all(&states) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::write(&states, e)),
                _ => {}
            }
            // For whoever looks at a run that goes on, or was killed.
            if summarised.elapsed() > SUMMARY_EVERY {
                summarise(run)?;
                summarised = Instant::now();
            }
        }
        told(&Done { items: run.done(), of, now: ("done".into(), 1.0) });
        summarise(run)
    }

    /// The lines of some items.
    fn batch(
        &self,
        items: &[Planned],
        folder: &Path,
        states: &Path,
        tell: &mut dyn FnMut((String, f64)),
    ) -> Result<Vec<ItemLine>> {
        let read = |item: &Planned| -> std::result::Result<RgbImage, String> {
            let picture = self.set.picture(item.source.clone()?, &self.limits).map_err(|e| e.to_string())?;
            if !self.native {
                return Ok(self.preprocess.prepare(&picture));
            }
            if picture.width() * picture.height() == 0 { Err("has no pixels".into()) } else { Ok(picture) }
        };
        let pictures: Vec<_> = items.par_iter().map(read).collect();
        let mut lines: Vec<ItemLine> = items
            .iter()
            .zip(&pictures)
            .map(|(item, picture)| ItemLine {
                index: item.index,
                id: item.id.clone(),
                label: item.label,
                error: picture.as_ref().err().cloned(),
                clean: Vec::new(),
                attacked: Vec::new(),
            })
            .collect();
        // Pictures of one size go together.
        let mut sizes: BTreeMap<(u32, u32), Vec<usize>> = BTreeMap::new();
        for (i, picture) in pictures.iter().enumerate() {
            if let Ok(picture) = picture {
                sizes.entry((picture.height(), picture.width())).or_default().push(i);
            }
        }
        for ((height, width), members) in sizes {
            let pixels = members
                .iter()
                .filter_map(|&i| pictures[i].as_ref().ok())
                .map(|picture| pixels_from_rgb(picture, &self.device))
                .collect::<Result<Vec<_>>>()?;
            let pixels = Tensor::stack(&pixels, 0)?;
            let group = Group { classify: self, members, pixels, folder, states };
            if self.native {
                let (height, width) = (height as usize, width as usize);
                let resized = |inner| Resized::new(inner, &self.preprocess, height, width, &self.device);
                let surrogate = resized(self.surrogate)?;
                let models =
                    self.models.iter().map(|model| resized(model.classifier)).collect::<Result<Vec<_>>>()?;
                let models: Vec<&dyn Classifier> = models.iter().map(|model| model as _).collect();
                group.score(&surrogate, &models, &mut lines, tell)?;
            } else {
                let models: Vec<&dyn Classifier> = self.models.iter().map(|model| model.classifier).collect();
                group.score(self.surrogate, &models, &mut lines, tell)?;
            }
        }
        Ok(lines)
    }
}

/// Pictures of one size within a batch.
struct Group<'a> {
    classify: &'a Classify<'a>,
    /// Their places in the batch.
    members: Vec<usize>,
    pixels: Tensor,
    folder: &'a Path,
    states: &'a Path,
}

/// Pictures crafted on one model.
struct Made {
    crafted: Crafted,
    rounded: Crafted,
    broken_by: Vec<Option<String>>,
    flags: Vec<Flag>,
}

impl Group<'_> {
    fn score(
        &self,
        surrogate: &dyn Classifier,
        models: &[&dyn Classifier],
        lines: &mut [ItemLine],
        tell: &mut dyn FnMut((String, f64)),
    ) -> Result<()> {
        let c = self.classify;
        // Every member has a label: items without one have no picture.
        let labels: Vec<usize> = self.members.iter().map(|&i| lines[i].label.unwrap_or_default()).collect();
        let keys: Vec<u64> = self.members.iter().map(|&i| key(&lines[i].id)).collect();
        let pictures = Pictures::new(&self.pixels, keys)?;
        let tasks = models
            .iter()
            .map(|model| Classification::new(*model, labels.clone()))
            .collect::<Result<Vec<_>>>()?;
        let mut right = Vec::new();
        for (task, model) in tasks.iter().zip(&c.models) {
            tell((format!("clean, {}", model.defense), 0.0));
            let classes = task.predictions(&self.pixels)?;
            for (&i, &class) in self.members.iter().zip(&classes) {
                lines[i].clean.push(Prediction { defense: model.defense.clone(), class });
            }
            right.push(
                classes.iter().zip(&labels).map(|(class, label)| class == label).collect::<Vec<bool>>(),
            );
        }
        let surrogate = Classification::new(surrogate, labels)?;
        for plan in &c.attacks {
            // What is crafted on which model, and for which pictures: those that a model scored
            // with them gets right.
            let mut needed: Vec<(&Classification, Vec<bool>)> = Vec::new();
            for &kind in &c.threats {
                for (task, right) in tasks.iter().zip(&right) {
                    let on = self.source(kind, &surrogate, task);
                    let subject = on.classifier().subject();
                    match needed.iter_mut().find(|(other, _)| other.classifier().subject() == subject) {
                        Some((_, rows)) => rows.iter_mut().zip(right).for_each(|(row, right)| *row |= right),
                        None => needed.push((on, right.clone())),
                    }
                }
            }
            let mut made: HashMap<Subject, Made> = HashMap::new();
            for (task, rows) in needed {
                let subject = task.classifier().subject().clone();
                let found = self.craft(plan, task, &pictures, rows, lines, tell)?;
                made.insert(subject, found);
            }
            for &kind in &c.threats {
                for ((task, model), right) in tasks.iter().zip(&c.models).zip(&right) {
                    let rows: Vec<usize> = (0..right.len()).filter(|&row| right[row]).collect();
                    if rows.is_empty() {
                        continue;
                    }
                    let subject = self.source(kind, &surrogate, task).classifier().subject();
                    let Some(made) = made.get(subject) else { continue };
                    let threat = kind.threat(subject, task.classifier().subject())?;
                    for (row, item) in self.scored(plan, task, &model.defense, threat, made, &rows)? {
                        lines[self.members[row]].attacked.push(item);
                    }
                }
            }
        }
        Ok(())
    }

    /// The task to craft on.
    fn source<'t, 'c>(
        &self,
        kind: ThreatKind,
        surrogate: &'t Classification<'c>,
        target: &'t Classification<'c>,
    ) -> &'t Classification<'c> {
        let (a, b) = (surrogate.classifier().subject(), target.classifier().subject());
        if kind.crafts_on(a, b) == a { surrogate } else { target }
    }

    fn craft(
        &self,
        plan: &AttackPlan,
        task: &Classification,
        pictures: &Pictures,
        rows: Vec<bool>,
        lines: &[ItemLine],
        tell: &mut dyn FnMut((String, f64)),
    ) -> Result<Made> {
        let c = self.classify;
        let pictures = pictures.clone().only(rows)?;
        let on = c.models.iter().find(|model| model.classifier.subject() == task.classifier().subject());
        let on = on.map_or("surrogate", |model| &model.defense);
        let name = format!("{} at {} on {on}", plan.name, plan.eps);
        let mut progress = |progress: &Progress| {
            tell((name.clone(), progress.step as f64 / progress.steps.max(1) as f64));
        };
        let (crafted, broken_by, flags) = match plan.build()? {
            Named::Plain(attack) => (
                attack.craft(task, &pictures, c.seed, &mut progress)?,
                vec![None; pictures.len()],
                Vec::new(),
            ),
            Named::AutoAttack(attack) => {
                std::fs::create_dir_all(self.states).map_err(|e| Error::write(self.states, e))?;
                // Of this batch: with the first of its pictures in its name.
                let first = pictures.keys().first().copied().unwrap_or_default();
                let digest = task.classifier().subject().digest.clone().unwrap_or_else(|| "none".into());
                let eps = plan.eps.to_string().replace('/', "of");
                let digest: String = digest.chars().take(8).collect();
                let name = safe(&plan.name);
                let file = format!("{name}-{eps}-{digest}-{first:016x}.safetensors");
                let found = attack.with_state(self.states.join(file)).evaluate(
                    task,
                    &pictures,
                    c.seed,
                    &mut progress,
                )?;
                let told = |flag: &Flag| matches!(flag, Flag::Randomised | Flag::Probabilities);
                (found.crafted, found.broken_by, found.flags.into_iter().filter(told).collect())
            }
        };
        let rounded = crafted.clone().quantised(&self.pixels)?;
        if c.save {
            self.save(plan, on, &rounded, &pictures.rows(), lines)?;
        }
        Ok(Made { crafted, rounded, broken_by, flags })
    }

    /// Writes pictures as `pictures/ATTACK/EPS/crafted-on-DEFENCE/ID.png`.
    fn save(
        &self,
        plan: &AttackPlan,
        on: &str,
        made: &Crafted,
        rows: &[usize],
        lines: &[ItemLine],
    ) -> Result<()> {
        let folder = pictures_folder(self.folder, &plan.name, plan.eps, on);
        for &row in rows {
            let line = &lines[self.members[row]];
            save_picture(&made.pixels().get(row)?, &folder, &line.id)?;
        }
        Ok(())
    }

    /// What `task`'s model makes of the pictures `rows`.
    fn scored(
        &self,
        plan: &AttackPlan,
        task: &Classification,
        defense: &str,
        threat: Threat,
        made: &Made,
        rows: &[usize],
    ) -> Result<Vec<(usize, AttackedItem)>> {
        let ids: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        let ids = Tensor::new(ids, self.pixels.device())?;
        let pick = |pixels: &Tensor| pixels.index_select(&ids, 0);
        let adversarial = pick(made.crafted.pixels())?;
        let change: Vec<f32> =
            (&adversarial - pick(&self.pixels)?)?.abs()?.flatten_from(1)?.max(1)?.to_vec1()?;
        let classes = task.predictions(&adversarial)?;
        let rounded = task.predictions(&pick(made.rounded.pixels())?)?;
        let recipe: &Recipe = made.crafted.recipe();
        let items = rows.iter().enumerate().map(|(i, &row)| {
            let outcome = &made.crafted.outcomes()[row];
            let item = AttackedItem {
                attack: plan.name.clone(),
                eps: recipe.eps,
                threat: threat.clone(),
                defense: defense.into(),
                class: classes[i],
                class_8bit: rounded[i],
                fooled: outcome.fooled,
                broken_by: made.broken_by[row].clone(),
                linf: change[i],
                zero_gradient: outcome.zero_gradient,
                nan_gradients: outcome.nan_gradients,
                flags: made.flags.clone(),
            };
            (row, item)
        });
        Ok(items.collect())
    }
}

/// Where a run's adversarial pictures are: `pictures/ATTACK/EPS/crafted-on-DEFENCE`.
pub(super) fn pictures_folder(run: &Path, attack: &str, eps: Eps, on: &str) -> PathBuf {
    let eps = eps.to_string().replace('/', "of");
    run.join("pictures").join(safe(attack)).join(eps).join(format!("crafted-on-{on}"))
}

/// Writes pixels `(3, H, W)`, rounded to 8 bits, as `FOLDER/ID.png`.
pub(super) fn save_picture(pixels: &Tensor, folder: &Path, id: &str) -> Result<()> {
    let path = folder.join(file_name(id));
    let parent = path.parent().unwrap_or(folder);
    std::fs::create_dir_all(parent).map_err(|e| Error::write(parent, e))?;
    rgb_from_pixels(pixels)?
        .save_with_format(&path, image::ImageFormat::Png)
        .map_err(|e| Error::write(&path, std::io::Error::other(e)))
}

/// What every file system takes as a name.
fn safe(part: &str) -> String {
    part.chars().map(|c| if c.is_ascii_alphanumeric() || "-_. ".contains(c) { c } else { '_' }).collect()
}

/// An item's name as that of a PNG file below a folder, whatever is in it.
pub(super) fn file_name(id: &str) -> PathBuf {
    let parts = id.split('/').map(safe).filter(|part| !matches!(part.as_str(), "" | "." | ".."));
    let mut name = parts.collect::<PathBuf>().into_os_string();
    if name.to_str() != Some(id) {
        // Two names may have become one.
        name.push(format!("-{:08x}", key(id) as u32));
    }
    name.push(".png");
    name.into()
}

/// The counts behind one figure.
#[derive(Default, Clone)]
struct Count {
    n: usize,
    correct: usize,
    /// By class: items, and right ones.
    classes: BTreeMap<usize, (usize, usize)>,
}

impl Count {
    fn add(&mut self, label: usize, right: bool) {
        self.n += 1;
        self.correct += usize::from(right);
        let (n, correct) = self.classes.entry(label).or_default();
        *n += 1;
        *correct += usize::from(right);
    }

    fn mean_per_class(&self) -> Option<f64> {
        let shares = self.classes.values().map(|&(n, correct)| 100.0 * correct as f64 / n as f64);
        (!self.classes.is_empty()).then(|| shares.sum::<f64>() / self.classes.len() as f64)
    }
}

/// What of `run.json` the figures need.
struct Decided {
    dataset: String,
    metric: Metric,
    defenses: Vec<String>,
    /// Name and eps as text.
    attacks: Vec<(String, Option<Eps>)>,
    threats: Vec<ThreatKind>,
    pictures: Precision,
}

impl Decided {
    fn read(decides: &Value, folder: &Path) -> Result<Self> {
        fn at<T: serde::de::DeserializeOwned>(value: &Value, path: &str, folder: &Path) -> Result<T> {
            let found = value.pointer(path).cloned().unwrap_or(Value::Null);
            serde_json::from_value(found)
                .map_err(|e| Error::config(folder.join("run.json"), format!("{path}: {e}")))
        }
        let list = |path: &str| at::<Vec<Value>>(decides, path, folder);
        Ok(Self {
            dataset: at(decides, "/dataset/name", folder)?,
            metric: at(decides, "/dataset/metric", folder)?,
            defenses: list("/defenses")?.iter().map(|d| at(d, "/name", folder)).collect::<Result<_>>()?,
            attacks: list("/attacks")?
                .iter()
                .map(|attack| Ok((at(attack, "/attack", folder)?, at(attack, "/eps", folder)?)))
                .collect::<Result<_>>()?,
            threats: at(decides, "/threats", folder)?,
            pictures: at(decides, "/pictures", folder)?,
        })
    }
}

/// Computes a run's summary from its lines, writes it into its folder and returns it.
///
/// Where a run has several attacks of one radius there is also a figure for the worst of them,
/// picture by picture.
///
/// # Errors
/// If a file of the run is damaged or cannot be written.
pub fn summarise(run: &Run) -> Result<Summary> {
    let manifest = run.manifest();
    let decided = Decided::read(&manifest.decides, run.folder())?;
    let eps_key = |eps: Option<Eps>| eps.map(|eps| eps.to_string()).unwrap_or_default();
    // Attacks of one radius, in order of their first.
    let mut radii: Vec<(Option<Eps>, Vec<&str>)> = Vec::new();
    for (name, eps) in &decided.attacks {
        match radii.iter_mut().find(|(other, _)| other == eps) {
            Some((_, names)) => names.push(name),
            None => radii.push((*eps, vec![name])),
        }
    }
    let mut clean: HashMap<String, Count> = HashMap::new();
    // By attack (None: the worst), eps, threat and defence; with the surrogate's name.
    type Key = (Option<String>, String, ThreatKind, String);
    let mut attacked: HashMap<Key, (Count, Option<Threat>)> = HashMap::new();
    let mut doubts: BTreeMap<(String, String, String), [usize; 3]> = BTreeMap::new();
    let mut seen: Vec<Flag> = Vec::new();
    let (mut done, mut failed) = (0, 0);
    for line in run.lines()? {
        let line = line?;
        done += 1;
        let (None, Some(label)) = (&line.error, line.label) else {
            failed += 1;
            continue;
        };
        for prediction in &line.clean {
            clean.entry(prediction.defense.clone()).or_default().add(label, prediction.class == label);
        }
        for item in &line.attacked {
            let about = doubts.entry((item.attack.clone(), eps_key(item.eps), crafted_on(item))).or_default();
            about[0] += usize::from(item.zero_gradient);
            about[1] += usize::from(item.nan_gradients > 0);
            about[2] += usize::from(item.broken_by.as_deref() == Some("square"));
            for flag in &item.flags {
                if !seen.contains(flag) {
                    seen.push(flag.clone());
                }
            }
        }
        for defense in &decided.defenses {
            let right = line.clean.iter().any(|p| p.defense == *defense && p.class == label);
            for &kind in &decided.threats {
                for (eps, names) in &radii {
                    let mut worst = right;
                    for &name in names {
                        let found = line.attacked.iter().find(|item| {
                            item.attack == name
                                && item.eps == *eps
                                && item.threat.kind() == kind
                                && item.defense == *defense
                        });
                        let class = found.map(|item| match decided.pictures {
                            Precision::Float => item.class,
                            Precision::EightBit => item.class_8bit,
                        });
                        if right && class.is_none() {
                            let (folder, id) = (run.folder().join("items.jsonl"), &line.id);
                            return Err(Error::config(
                                folder,
                                format!("item `{id}` has no result of {name} on {defense}"),
                            ));
                        }
                        let robust = right && class == Some(label);
                        worst &= robust;
                        let key = (Some(name.to_string()), eps_key(*eps), kind, defense.clone());
                        let (count, threat) = attacked.entry(key).or_default();
                        count.add(label, robust);
                        if threat.is_none() {
                            *threat = found.map(|item| item.threat.clone());
                        }
                    }
                    let key = (None, eps_key(*eps), kind, defense.clone());
                    attacked.entry(key).or_default().0.add(label, worst);
                }
            }
        }
    }
    let row = |defense: &str, attack: Option<Attacked>, count: &Count| Row {
        task: TASK.into(),
        dataset: decided.dataset.clone(),
        defense: defense.into(),
        attacked: attack,
        n: count.n,
        correct: count.correct,
        mean_per_class: (decided.metric == Metric::MeanPerClass).then(|| count.mean_per_class()).flatten(),
    };
    let none = Count::default();
    let mut rows: Vec<Row> =
        decided.defenses.iter().map(|d| row(d, None, clean.get(d).unwrap_or(&none))).collect();
    let surrogate: Subject = serde_json::from_value(manifest.decides["surrogate"].clone())
        .map_err(|e| Error::config(run.folder().join("run.json"), format!("surrogate: {e}")))?;
    for (eps, names) in &radii {
        let mut each: Vec<(Option<String>, String)> =
            names.iter().map(|name| (Some(name.to_string()), name.to_string())).collect();
        if names.len() > 1 {
            each.push((None, format!("worst of {}", names.join(", "))));
        }
        for (key, name) in each {
            for &kind in &decided.threats {
                for defense in &decided.defenses {
                    let found = attacked.get(&(key.clone(), eps_key(*eps), kind, defense.clone()));
                    let count = found.map_or(&none, |(count, _)| count);
                    let threat = found.and_then(|(_, threat)| threat.clone()).unwrap_or_else(|| match kind {
                        ThreatKind::Transfer => Threat::Transfer { surrogate: surrogate.to_string() },
                        ThreatKind::Adaptive => Threat::Adaptive,
                    });
                    let attack =
                        Attacked { attack: name.clone(), eps: *eps, threat, pictures: decided.pictures };
                    rows.push(row(defense, Some(attack), count));
                }
            }
        }
    }
    let mut flags: Vec<String> = seen.iter().map(ToString::to_string).collect();
    for ((attack, eps, on), [zero, nan, square]) in doubts {
        let mut add = |flag: Flag| flags.push(format!("{attack} at {eps} on {on}: {flag}"));
        if zero > 0 {
            add(Flag::ZeroGradient { pictures: zero });
        }
        if nan > 0 {
            add(Flag::NanGradient { pictures: nan });
        }
        // Only where Square came last was all else tried before it.
        let last = attack == "autoattack" || attack.starts_with("custom:") && attack.ends_with("+square");
        if let Some(flag) = Flag::square(square, done - failed).filter(|_| last) {
            add(flag);
        }
    }
    let summary = Summary {
        schema_version: Summary::VERSION,
        fingerprint: manifest.fingerprint.clone(),
        run: manifest.decides.clone(),
        shard: manifest.shard,
        items: manifest.items,
        done,
        failed,
        rows,
        flags,
    };
    write_whole(&run.folder().join("summary.json"), &summary)?;
    Ok(summary)
}

/// The model an item was crafted on, in words.
fn crafted_on(item: &AttackedItem) -> String {
    match &item.threat {
        Threat::Transfer { surrogate } => format!("{surrogate}, scored on {} (transfer)", item.defense),
        Threat::Adaptive => format!("{} (adaptive)", item.defense),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_has_a_file_of_its_own_below_the_folder() {
        assert_eq!(file_name("0.tar/n01440764_10026"), Path::new("0.tar/n01440764_10026.png"));
        let strange = ["../../etc/passwd", "/etc/passwd", "a:b", "a?b", "a_b", "", "..", "a//b", "a/./b"];
        let mut found: Vec<PathBuf> = strange.iter().map(|id| file_name(id)).collect();
        for path in &found {
            assert!(path.is_relative() && !path.to_string_lossy().contains(".."), "{}", path.display());
        }
        found.sort();
        found.dedup();
        assert_eq!(found.len(), strange.len());
    }
}
