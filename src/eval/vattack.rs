//! V-Attack over pictures with objects and targets: PNG files for a language model to be asked
//! about, and what the CLIP attacked calls them.
//!
//! The figures here are CLIP's own: its zero-shot class among all objects and targets of the set.
//! What a language model says of the pictures is another matter.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use image::RgbImage;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::classify::{file_name, pictures_folder, save_picture};
use super::run::{Line, Run, shard_size, write_whole};
use super::wilson;
use crate::attack::vattack::{Surrogate, VAttack, map_of_mask, map_of_perturbation};
use crate::attack::{
    Classification, Classifier, Eps, Outcome, Pictures, Subject, Threat, ThreatKind, key, quantise,
};
use crate::data::coco300::ObjectSet;
use crate::image::{DecodeLimits, Preprocess, decode_file, pixels_from_rgb};
use crate::pocket::{self, Split};
use crate::text::ClipText;
use crate::tower::clip::Clip;
use crate::{Error, Result};

/// Where the pictures of a set are.
pub enum Source {
    /// Files, by row; `None` where there is none.
    Files(Vec<Option<PathBuf>>),
    /// The pocket world's scenes, drawn at this size.
    Pocket {
        /// Which split.
        split: Split,
        /// The stream's seed.
        seed: u64,
        /// The side in pixels.
        size: u32,
    },
}

impl Source {
    /// Whether row `index` has a picture.
    pub fn has(&self, index: usize) -> bool {
        match self {
            Self::Files(paths) => paths.get(index).is_some_and(Option::is_some),
            Self::Pocket { .. } => true,
        }
    }

    /// The picture of row `index`, called `name`.
    ///
    /// # Errors
    /// If there is none, or it cannot be read.
    pub fn picture(&self, index: usize, name: &str, limits: &DecodeLimits) -> Result<RgbImage> {
        match self {
            Self::Pocket { split, seed, size } => {
                Ok(pocket::draw(*split, *seed, index as u64, *size)?.picture)
            }
            Self::Files(paths) => match paths.get(index).and_then(Option::as_ref) {
                Some(path) => decode_file(path, limits),
                None => Err(Error::Picture { name: name.into(), reason: "there is no such file".into() }),
            },
        }
    }
}

/// A CLIP to craft on, before it is told any words.
pub struct Crafter {
    /// The tower, with what is put in.
    pub tower: Clip,
    /// Which model it is.
    pub subject: Subject,
    /// Its text tower.
    pub text: ClipText,
    /// Its loss's factor.
    pub weight: f64,
}

/// V-Attack over a set.
pub struct VAttackRun<'a> {
    /// What the pictures show and are to be taken for.
    pub set: &'a ObjectSet,
    /// The pictures.
    pub source: Source,
    /// Limits on picture files.
    pub limits: DecodeLimits,
    /// From a picture file to the pictures attacked, of one size.
    pub preprocess: &'a Preprocess,
    /// What is crafted on.
    pub crafters: Vec<Crafter>,
    /// The crafters by a short name, that of the folder: `none`, or the target's defence.
    pub crafted_on: String,
    /// The model under attack with its defence, its classes those of [`classes`], and the defence's
    /// short name.
    pub target: (&'a dyn Classifier, String),
    /// The same without the defence.
    pub undefended: &'a dyn Classifier,
    /// The classes of both.
    pub classes: Vec<String>,
    /// Whose gradients the attacker has.
    pub threat: ThreatKind,
    /// One per radius.
    pub attacks: Vec<VAttack>,
    /// Whether maps of the mask and of the perturbation are written.
    pub maps: bool,
    /// Of what is drawn at random.
    pub seed: u64,
    /// Pictures worked on together: what a kill loses.
    pub batch: usize,
    /// Where the pictures are worked on.
    pub device: Device,
}

/// The objects and targets of a set in small letters, each once, in the order of the alphabet.
pub fn classes(set: &ObjectSet) -> Vec<String> {
    let words = set.rows().iter().flat_map(|row| [&row.keyword, &row.target]);
    let mut all: Vec<String> = words.map(|word| word.to_lowercase()).collect();
    all.sort();
    all.dedup();
    all
}

/// A picture's line in `items.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VAttackLine {
    /// Its row in the set.
    pub index: usize,
    /// The picture's file name.
    pub id: String,
    /// The object in it.
    pub source: String,
    /// What it is to be taken for.
    pub target: String,
    /// Why it could not be attacked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What the defended model calls the clean picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clean: Option<String>,
    /// What the undefended model calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clean_undefended: Option<String>,
    /// What each radius came to.
    #[serde(default)]
    pub attacked: Vec<VAttacked>,
}

/// What a radius came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VAttacked {
    /// The radius.
    pub eps: Eps,
    /// Whose gradients it had.
    #[serde(flatten)]
    pub threat: Threat,
    /// The target's defence.
    pub defense: String,
    /// The picture, below the run's folder.
    pub picture: String,
    /// What the defended model calls the picture, rounded to 8 bits.
    pub class: String,
    /// What the undefended model calls it.
    pub class_undefended: String,
    /// The share of patches that the first surrogate took for the source.
    pub masked: f64,
    /// The largest change of a pixel.
    pub linf: f32,
    /// Losses before and after, and the gradients taken.
    pub outcome: Outcome,
}

impl Line for VAttackLine {
    fn index(&self) -> usize {
        self.index
    }

    fn id(&self) -> &str {
        &self.id
    }
}

/// A share with its 95 % interval (Wilson).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// How many.
    pub count: usize,
    /// In percent.
    pub value: f64,
    /// The interval's ends.
    pub interval: (f64, f64),
}

impl Share {
    fn of(count: usize, n: usize) -> Self {
        Self { count, value: 100.0 * count as f64 / n.max(1) as f64, interval: wilson(count, n) }
    }
}

/// A figure of a run: what one model calls the pictures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VAttackRow {
    /// The data by name.
    pub dataset: String,
    /// The defence of the model asked.
    pub defense: String,
    /// `none` for clean pictures, else `v-attack`.
    pub attack: String,
    /// The radius.
    pub eps: Option<Eps>,
    /// Whose gradients the attacker had, of the model asked: there is none for clean pictures.
    #[serde(flatten)]
    pub threat: Option<Threat>,
    /// Pictures.
    pub n: usize,
    /// Called by the name of the object in them.
    pub source: Share,
    /// Called by the name of the target.
    pub target: Share,
}

/// What a run comes to: its `summary.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VAttackSummary {
    /// 1.
    pub schema_version: u64,
    /// SHA-256 of everything that decides the result.
    pub fingerprint: String,
    /// Everything that decides the result.
    pub run: Value,
    /// Which shard this is of how many, where it is one.
    pub shard: Option<(usize, usize)>,
    /// Rows of the set, or of the shard.
    pub items: usize,
    /// Those with a line.
    pub done: usize,
    /// Those whose picture could not be read or attacked.
    pub failed: usize,
    /// The figures.
    pub rows: Vec<VAttackRow>,
}

const ATTACK: &str = "v-attack";

impl VAttackRun<'_> {
    /// What decides the result; `more` are the caller's own entries, such as the models' weights.
    pub fn decides(&self, more: Value) -> Value {
        let p = self.preprocess;
        let words: Vec<_> = self.set.rows().iter().map(|r| [&r.image, &r.keyword, &r.target]).collect();
        let pictures = match &self.source {
            Source::Files(paths) => json!(paths.iter().map(|path| path.is_some()).collect::<Vec<_>>()),
            Source::Pocket { split, seed, size } => json!([split.name(), seed, size]),
        };
        let mut decides = json!({
            "task": ATTACK,
            "version": env!("CARGO_PKG_VERSION"),
            "seed": self.seed,
            "dataset": {
                "name": self.set.name(),
                "items": self.set.rows().len(),
                "digest": format!("{:016x}", key(&json!([words, pictures]).to_string())),
            },
            "preprocess": {
                "contract": p.contract.to_string(),
                "width": p.width,
                "height": p.height,
                "resize": format!("{:?}, {:?}", p.scale, p.filter),
            },
            "defense": { "name": self.target.1, "subject": self.target.0.subject() },
            "surrogates": self.crafters.iter()
                .map(|c| json!({ "model": c.subject, "weight": c.weight }))
                .collect::<Vec<_>>(),
            "classes": self.classes,
            "attacks": self.attacks,
            "threat": self.threat,
            "maps": self.maps,
        });
        if let (Some(all), Value::Object(more)) = (decides.as_object_mut(), more) {
            all.extend(more);
        }
        decides
    }

    /// Does what of the run is not done yet. `told` is given the pictures done, their number, and
    /// the share of the present ones' steps.
    ///
    /// # Errors
    /// If a model fails, the pictures are no such attack on the target ([`ThreatKind::threat`]), or
    /// the run's folder cannot be written. A picture that cannot be read is an item that failed, in
    /// `items.jsonl` with its reason.
    pub fn run(
        &self,
        run: &mut Run<VAttackLine>,
        told: &mut dyn FnMut(usize, usize, f64),
    ) -> Result<VAttackSummary> {
        run.work(self.names(), self.batch, |part, run| {
            let (done, of) = (run.done(), run.manifest().items);
            told(done, of, 0.0);
            self.lines(part, run, &mut |share| told(done, of, share))
        })?;
        told(run.done(), run.manifest().items, 0.0);
        summarise(run)
    }

    /// The number of items in a shard, or in the whole run.
    pub fn items(&self, shard: Option<(usize, usize)>) -> usize {
        shard_size(shard, self.names())
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.set.rows().iter().map(|row| row.image.as_str())
    }

    fn lines(
        &self,
        part: &[usize],
        run: &Run<VAttackLine>,
        told: &mut dyn FnMut(f64),
    ) -> Result<Vec<VAttackLine>> {
        let rows = self.set.rows();
        let read = |&index: &usize| {
            let picture = self.source.picture(index, &rows[index].image, &self.limits);
            picture.map(|picture| self.preprocess.prepare(&picture)).map_err(|e| e.to_string())
        };
        let found: Vec<_> = part.par_iter().map(read).collect();
        let mut lines: Vec<VAttackLine> = part
            .iter()
            .zip(&found)
            .map(|(&index, picture)| VAttackLine {
                index,
                id: rows[index].image.clone(),
                source: rows[index].keyword.clone(),
                target: rows[index].target.clone(),
                error: picture.as_ref().err().cloned(),
                clean: None,
                clean_undefended: None,
                attacked: Vec::new(),
            })
            .collect();
        let good: Vec<usize> = (0..part.len()).filter(|&i| found[i].is_ok()).collect();
        if good.is_empty() {
            return Ok(lines);
        }
        let pixels = found.iter().filter_map(|picture| picture.as_ref().ok());
        let pixels = pixels.map(|picture| pixels_from_rgb(picture, &self.device));
        let clean = Tensor::stack(&pixels.collect::<Result<Vec<_>>>()?, 0)?;
        // Rows of a set can be of one picture: the row is part of its key and of its name.
        let keys = good.iter().map(|&i| key(&self.name(lines[i].index)));
        let pictures = Pictures::new(&clean, keys.collect())?;
        let words: Vec<(String, String)> =
            good.iter().map(|&i| (lines[i].source.clone(), lines[i].target.clone())).collect();
        let surrogate =
            |c: &Crafter| Surrogate::of_words(c.tower.clone(), c.subject.clone(), c.weight, &c.text, &words);
        let surrogates = self.crafters.iter().map(surrogate).collect::<Result<Vec<_>>>()?;
        let (own, plain) = (self.named(self.target.0, &clean)?, self.named(self.undefended, &clean)?);
        for (row, &i) in good.iter().enumerate() {
            lines[i].clean = Some(own[row].clone());
            lines[i].clean_undefended = Some(plain[row].clone());
        }
        for (number, attack) in self.attacks.iter().enumerate() {
            let made = attack.craft(&surrogates, &pictures, self.seed, &mut |progress| {
                let share = progress.step as f64 / progress.steps.max(1) as f64;
                told((number as f64 + share) / self.attacks.len() as f64);
            })?;
            let threat = self.threat.threat(&made.crafted.recipe().crafted_on, self.target.0.subject())?;
            let adversarial = quantise(made.crafted.pixels(), &clean, attack.eps)?;
            let change: Vec<f32> = (&adversarial - &clean)?.abs()?.flatten_from(1)?.max(1)?.to_vec1()?;
            let own = self.named(self.target.0, &adversarial)?;
            let plain = self.named(self.undefended, &adversarial)?;
            let folder = pictures_folder(run.folder(), ATTACK, attack.eps, &self.crafted_on);
            for (row, &i) in good.iter().enumerate() {
                let name = self.name(lines[i].index);
                save_picture(&adversarial.get(row)?, &folder, &name)?;
                let mask = made.localised[row].as_ref();
                if let (true, Some(mask)) = (self.maps, mask) {
                    let maps =
                        run.folder().join("maps").join(folder_of(&run.folder().join("pictures"), &folder));
                    write_map(&map_of_mask(&clean.get(row)?, mask)?, &maps, &format!("{name}.mask"))?;
                    let change = map_of_perturbation(&adversarial.get(row)?, &clean.get(row)?)?;
                    write_map(&change, &maps, &format!("{name}.perturbation"))?;
                }
                let share = |mask: &[bool]| {
                    mask.iter().filter(|kept| **kept).count() as f64 / mask.len().max(1) as f64
                };
                lines[i].attacked.push(VAttacked {
                    eps: attack.eps,
                    threat: threat.clone(),
                    defense: self.target.1.clone(),
                    picture: folder_of(run.folder(), &folder.join(file_name(&name))).display().to_string(),
                    class: own[row].clone(),
                    class_undefended: plain[row].clone(),
                    masked: mask.map_or(0.0, |found| share(&found.mask)),
                    linf: change[row],
                    outcome: made.crafted.outcomes()[row].clone(),
                });
            }
        }
        Ok(lines)
    }

    /// A row's name: its picture's without the ending, and the row where the picture came before.
    fn name(&self, index: usize) -> String {
        let rows = self.set.rows();
        let image = &rows[index].image;
        let stem = Path::new(image).file_stem().map_or(image.clone(), |s| s.to_string_lossy().into_owned());
        match rows[..index].iter().any(|row| row.image == *image) {
            true => format!("{stem}.row{index}"),
            false => stem,
        }
    }

    fn named(&self, classifier: &dyn Classifier, pixels: &Tensor) -> Result<Vec<String>> {
        let task = Classification::new(classifier, Vec::new())?;
        let found = task.predictions(pixels)?;
        Ok(found.into_iter().filter_map(|class| self.classes.get(class).cloned()).collect())
    }
}

/// What a run comes to, from its lines and its manifest alone; written as its `summary.json`.
///
/// # Errors
/// If a line is damaged, or the summary cannot be written.
pub fn summarise(run: &Run<VAttackLine>) -> Result<VAttackSummary> {
    let mut lines = run.lines()?.collect::<Result<Vec<_>>>()?;
    lines.sort_by_key(|line| line.index);
    let manifest = run.manifest();
    let text = |at: &str| manifest.decides.pointer(at).and_then(Value::as_str).unwrap_or_default();
    let summary = VAttackSummary {
        schema_version: 1,
        fingerprint: manifest.fingerprint.clone(),
        run: manifest.decides.clone(),
        shard: manifest.shard,
        items: manifest.items,
        done: lines.len(),
        failed: lines.iter().filter(|line| line.error.is_some()).count(),
        rows: rows(&lines, text("/dataset/name"), text("/defense/name")),
    };
    write_whole(&run.folder().join("summary.json"), &summary)?;
    Ok(summary)
}

/// The figures of a run's lines, clean ones first: of the model under attack, `defense`, and of the
/// undefended one where that is another.
pub fn rows(lines: &[VAttackLine], dataset: &str, defense: &str) -> Vec<VAttackRow> {
    let count = |names: &[(&str, &VAttackLine)]| {
        let by = |pick: fn(&VAttackLine) -> &str| {
            let same = |(name, line): &&(&str, &VAttackLine)| *name == pick(line).to_lowercase();
            Share::of(names.iter().filter(same).count(), names.len())
        };
        (by(|line| &line.source), by(|line| &line.target))
    };
    let models: &[(&str, bool)] =
        if defense == "none" { &[("none", true)] } else { &[("none", false), (defense, true)] };
    let mut all = Vec::new();
    let mut radii: Vec<Eps> = Vec::new();
    for found in lines.iter().flat_map(|line| &line.attacked) {
        if !radii.contains(&found.eps) {
            radii.push(found.eps);
        }
    }
    for &(name, own) in models {
        let clean =
            |line: &'_ VAttackLine| if own { line.clean.clone() } else { line.clean_undefended.clone() };
        let named: Vec<(String, &VAttackLine)> =
            lines.iter().filter_map(|line| Some((clean(line)?, line))).collect();
        let named: Vec<(&str, &VAttackLine)> =
            named.iter().map(|(name, line)| (name.as_str(), *line)).collect();
        let (source, target) = count(&named);
        all.push(VAttackRow {
            dataset: dataset.into(),
            defense: name.into(),
            attack: "none".into(),
            eps: None,
            threat: None,
            n: named.len(),
            source,
            target,
        });
    }
    for eps in radii {
        for &(name, own) in models {
            let found =
                lines.iter().filter_map(|line| Some((line.attacked.iter().find(|a| a.eps == eps)?, line)));
            let found: Vec<(&VAttacked, &VAttackLine)> = found.collect();
            let Some((first, _)) = found.first() else { continue };
            // What was crafted on the defended model is transferred to the undefended one.
            let threat = match (&first.threat, own) {
                (Threat::Adaptive, false) => {
                    Threat::Transfer { surrogate: format!("the model with {defense}") }
                }
                (threat, _) => threat.clone(),
            };
            let named: Vec<(&str, &VAttackLine)> = found
                .iter()
                .map(|(a, line)| (if own { a.class.as_str() } else { a.class_undefended.as_str() }, *line))
                .collect();
            let (source, target) = count(&named);
            all.push(VAttackRow {
                dataset: dataset.into(),
                defense: name.into(),
                attack: ATTACK.into(),
                eps: Some(eps),
                threat: Some(threat),
                n: named.len(),
                source,
                target,
            });
        }
    }
    all
}

/// A path below the run's folder.
fn folder_of(run: &Path, path: &Path) -> PathBuf {
    path.strip_prefix(run).unwrap_or(path).to_path_buf()
}

fn write_map(map: &RgbImage, folder: &Path, name: &str) -> Result<()> {
    let path = folder.join(file_name(name));
    std::fs::create_dir_all(folder).map_err(|e| Error::write(folder, e))?;
    map.save_with_format(&path, image::ImageFormat::Png)
        .map_err(|e| Error::write(&path, std::io::Error::other(e)))
}
