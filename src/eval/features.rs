//! Attacks on what a language model reads of pictures, for models without a text side of their own.
//!
//! PGD turns a tower's features away from those of the clean picture, as the attacks of the demo do.
//! There is no right and wrong here: a figure is the mean cosine, token by token, between a model's
//! features of the adversarial picture and of the clean one. What the model then says is another
//! matter.

use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::classify::{file_name, pictures_folder, save_picture};
use super::run::{Line, Run, shard_size, write_whole};
use crate::attack::{
    Direction, Eps, Feature, FeatureObjective, Maximise, Pgd, Pictures, Settings, Subject, Threat,
    ThreatKind, key, quantise, with_settings,
};
use crate::data::LabelledSet;
use crate::image::{DecodeLimits, Preprocess, pixels_from_rgb};
use crate::tower::Insertable;
use crate::{Error, Result};

/// A model attacked through its tower.
pub struct FeatureAttack<'a, T> {
    /// The pictures; their labels have no part in it.
    pub set: &'a LabelledSet,
    /// Limits on picture files.
    pub limits: DecodeLimits,
    /// From a picture file to the tower's pixels, of one size.
    pub preprocess: &'a Preprocess,
    /// The tower with nothing put in, and who that is.
    pub undefended: (T, Subject),
    /// The tower with its defence, and who that is; the undefended one again where there is none.
    pub target: (T, Subject),
    /// The target's defence by its short name: `none`, `gif`, `fra` or `gif+fra`.
    pub defense: String,
    /// Which features.
    pub feature: Feature,
    /// Whose gradients the attacker has.
    pub threat: ThreatKind,
    /// Radii.
    pub eps: Vec<Eps>,
    /// What is changed of PGD.
    pub settings: Settings,
    /// Of the random starts.
    pub seed: u64,
    /// Pictures worked on together: what a kill loses.
    pub batch: usize,
}

/// A picture's line in `items.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FeatureLine {
    /// Its place in the data set.
    pub index: usize,
    /// Its name.
    pub id: String,
    /// Why it could not be attacked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What each radius came to.
    #[serde(default)]
    pub attacked: Vec<MovedFeatures>,
}

/// How far an adversarial picture has moved the target's features.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MovedFeatures {
    /// `pgd`.
    pub attack: String,
    /// The radius.
    pub eps: Eps,
    /// Whose gradients it had.
    #[serde(flatten)]
    pub threat: Threat,
    /// The target's defence.
    pub defense: String,
    /// The picture, below the run's folder.
    pub picture: String,
    /// The mean over tokens of the cosine with the target's features of the clean picture. The
    /// picture is rounded to 8 bits.
    pub cosine: f64,
    /// The same on the undefended tower, which an adaptive attack does not aim at.
    pub cosine_undefended: f64,
    /// The largest change of a pixel.
    pub linf: f32,
}

impl Line for FeatureLine {
    fn index(&self) -> usize {
        self.index
    }

    fn id(&self) -> &str {
        &self.id
    }
}

/// A figure of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FeatureRow {
    /// `features`.
    pub task: String,
    /// What `value` is.
    pub measure: String,
    /// The pictures by name.
    pub dataset: String,
    /// The target's defence.
    pub defense: String,
    /// `pgd`.
    pub attack: String,
    /// The radius.
    pub eps: Eps,
    /// The threat model.
    #[serde(flatten)]
    pub threat: Threat,
    /// What the pictures hold: `8-bit`.
    pub pictures: String,
    /// Pictures.
    pub n: usize,
    /// The mean.
    pub value: f64,
    /// The mean on the undefended tower.
    pub value_undefended: f64,
}

/// What a run comes to: its `summary.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FeatureSummary {
    /// 1.
    pub schema_version: u64,
    /// SHA-256 of everything that decides the result.
    pub fingerprint: String,
    /// Everything that decides the result.
    pub run: Value,
    /// Which shard this is of how many, where it is one.
    pub shard: Option<(usize, usize)>,
    /// Pictures of the run, or of the shard.
    pub items: usize,
    /// Those with a line.
    pub done: usize,
    /// Those that could not be attacked.
    pub failed: usize,
    /// The figures, one per radius.
    pub rows: Vec<FeatureRow>,
}

const ATTACK: &str = "pgd";
const MEASURE: &str = "mean cosine with the model's own features of the clean picture";

impl<T: Insertable> FeatureAttack<'_, T> {
    /// What decides the result; `more` are the caller's own entries, such as the model's weights.
    pub fn decides(&self, more: Value) -> Value {
        let p = self.preprocess;
        let mut decides = json!({
            "task": "features",
            "version": env!("CARGO_PKG_VERSION"),
            "seed": self.seed,
            "dataset": {
                "name": self.set.name(),
                "items": self.set.items().len() + self.set.defects().len(),
                "digest": self.set.digest(),
            },
            "preprocess": {
                "contract": p.contract.to_string(),
                "width": p.width,
                "height": p.height,
                "resize": format!("{:?}, {:?}", p.scale, p.filter),
            },
            "defense": { "name": self.defense, "subject": self.target.1 },
            "surrogate": self.undefended.1,
            "feature": self.feature,
            "attack": ATTACK,
            "eps": self.eps,
            "settings": self.settings,
            "threat": self.threat,
        });
        if let (Some(all), Value::Object(more)) = (decides.as_object_mut(), more) {
            all.extend(more);
        }
        decides
    }

    /// Does what of the run is not done yet: crafts pictures, writes them as PNG, and says how far they
    /// move the features. `told` is given the pictures done and their number.
    ///
    /// # Errors
    /// If the model fails, or the run's folder cannot be written. A picture that cannot be read is an
    /// item that failed, in `items.jsonl` with its reason.
    pub fn run(
        &self,
        run: &mut Run<FeatureLine>,
        told: &mut dyn FnMut(usize, usize),
    ) -> Result<FeatureSummary> {
        run.work(self.names(), self.batch, |part, run| {
            told(run.done(), run.manifest().items);
            self.lines(part, run)
        })?;
        told(run.done(), run.manifest().items);
        summarise(run)
    }

    /// The number of items in a shard, or in the whole run.
    pub fn items(&self, shard: Option<(usize, usize)>) -> usize {
        shard_size(shard, self.names())
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        let items = self.set.items().iter().map(|item| item.id.as_str());
        items.chain(self.set.defects().iter().map(|defect| defect.id.as_str()))
    }

    fn lines(&self, part: &[usize], run: &Run<FeatureLine>) -> Result<Vec<FeatureLine>> {
        let items = self.set.items();
        let read = |&index: &usize| match items.get(index) {
            Some(item) => {
                let picture = self.set.picture(index, &self.limits).map_err(|e| e.to_string());
                (item.id.clone(), picture.map(|picture| self.preprocess.prepare(&picture)))
            }
            None => {
                let defect = &self.set.defects()[index - items.len()];
                (defect.id.clone(), Err(defect.reason.clone()))
            }
        };
        let found: Vec<_> = part.par_iter().map(read).collect();
        let mut lines: Vec<FeatureLine> = part
            .iter()
            .zip(&found)
            .map(|(&index, (id, picture))| FeatureLine {
                index,
                id: id.clone(),
                error: picture.as_ref().err().cloned(),
                attacked: Vec::new(),
            })
            .collect();
        let good: Vec<usize> = (0..part.len()).filter(|&i| found[i].1.is_ok()).collect();
        if good.is_empty() {
            return Ok(lines);
        }
        let device = self.undefended.0.device();
        let pixels = found.iter().filter_map(|(_, picture)| picture.as_ref().ok());
        let pixels = pixels.map(|picture| pixels_from_rgb(picture, device)).collect::<Result<Vec<_>>>()?;
        let clean = Tensor::stack(&pixels, 0)?;
        let keys = good.iter().map(|&i| key(&lines[i].id)).collect();
        let pictures = Pictures::new(&clean, keys)?;
        let (on, name) = match self.threat.crafts_on(&self.undefended.1, &self.target.1) {
            subject if *subject == self.undefended.1 => (&self.undefended, "none"),
            _ => (&self.target, self.defense.as_str()),
        };
        let threat = self.threat.threat(&on.1, &self.target.1)?;
        let (tower, subject) = on;
        let objective = FeatureObjective::new(
            tower,
            subject.clone(),
            self.feature,
            Direction::Away,
            &self.features(tower, &clean)?,
        )?;
        let [own, plain] = [&self.target.0, &self.undefended.0];
        let (own_clean, plain_clean) = (self.features(own, &clean)?, self.features(plain, &clean)?);
        for &eps in &self.eps {
            let pgd = with_settings(Pgd::new(eps), &self.settings);
            let made = pgd.maximise(&objective, &pictures, self.seed, &mut |_| {})?;
            let made = quantise(made.pixels(), &clean, eps)?;
            let change: Vec<f32> = (&made - &clean)?.abs()?.flatten_from(1)?.max(1)?.to_vec1()?;
            let cosine = cosines(&self.features(own, &made)?, &own_clean)?;
            let undefended = cosines(&self.features(plain, &made)?, &plain_clean)?;
            let folder = pictures_folder(run.folder(), ATTACK, eps, name);
            for (row, &i) in good.iter().enumerate() {
                let path = folder.join(file_name(&lines[i].id));
                save_picture(&made.get(row)?, &folder, &lines[i].id)?;
                let picture = path.strip_prefix(run.folder()).unwrap_or(&path).display().to_string();
                lines[i].attacked.push(MovedFeatures {
                    picture,
                    attack: ATTACK.into(),
                    eps,
                    threat: threat.clone(),
                    defense: self.defense.clone(),
                    cosine: cosine[row],
                    cosine_undefended: undefended[row],
                    linf: change[row],
                });
            }
        }
        Ok(lines)
    }

    /// Features `(B, T, D)`, as many pictures at a time as the tower likes.
    fn features(&self, tower: &T, pixels: &Tensor) -> Result<Tensor> {
        let (batch, at_once) = (pixels.dim(0)?, tower.batch().max(1));
        let parts = (0..batch)
            .step_by(at_once)
            .map(|start| self.feature.of(tower, &pixels.narrow(0, start, at_once.min(batch - start))?))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }
}

/// What a run comes to, from its lines and its manifest alone; written as its `summary.json`.
///
/// # Errors
/// If a line is damaged, or the summary cannot be written.
pub fn summarise(run: &Run<FeatureLine>) -> Result<FeatureSummary> {
    let mut lines = run.lines()?.collect::<Result<Vec<_>>>()?;
    // A mean's last bits are its summands' order.
    lines.sort_by_key(|line| line.index);
    let manifest = run.manifest();
    let dataset = manifest.decides.pointer("/dataset/name").and_then(Value::as_str).unwrap_or_default();
    let mut rows: Vec<FeatureRow> = Vec::new();
    for found in lines.iter().flat_map(|line| &line.attacked) {
        let place = match rows.iter().position(|row| row.eps == found.eps) {
            Some(place) => place,
            None => {
                rows.push(FeatureRow {
                    task: "features".into(),
                    measure: MEASURE.into(),
                    dataset: dataset.into(),
                    defense: found.defense.clone(),
                    attack: found.attack.clone(),
                    eps: found.eps,
                    threat: found.threat.clone(),
                    pictures: "8-bit".into(),
                    n: 0,
                    value: 0.0,
                    value_undefended: 0.0,
                });
                rows.len() - 1
            }
        };
        let row = &mut rows[place];
        row.n += 1;
        row.value += found.cosine;
        row.value_undefended += found.cosine_undefended;
    }
    for row in &mut rows {
        row.value /= row.n as f64;
        row.value_undefended /= row.n as f64;
    }
    let summary = FeatureSummary {
        schema_version: 1,
        fingerprint: manifest.fingerprint.clone(),
        run: manifest.decides.clone(),
        shard: manifest.shard,
        items: manifest.items,
        done: lines.len(),
        failed: lines.iter().filter(|line| line.error.is_some()).count(),
        rows,
    };
    write_whole(&run.folder().join("summary.json"), &summary)?;
    Ok(summary)
}

/// The mean over tokens of the cosine, by picture.
fn cosines(a: &Tensor, b: &Tensor) -> Result<Vec<f64>> {
    let wide = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let (a, b) = (wide(a)?, wide(b)?);
    let dot = (&a * &b)?.sum(D::Minus1)?;
    let lengths = (a.sqr()?.sum(D::Minus1)? * b.sqr()?.sum(D::Minus1)?)?.sqrt()?;
    // A token without length has no direction; it counts as kept where it was without before.
    let cosine = (dot / lengths.maximum(f64::MIN_POSITIVE)?)?;
    let mean = cosine.mean(1)?.to_vec1::<f64>()?;
    if mean.iter().any(|value| !value.is_finite()) {
        return Err(Error::Unsupported("the tower gave features that are not numbers".into()));
    }
    Ok(mean)
}
