//! How suspicious a picture is: how far the defended and the undefended tower disagree on it.
//!
//! On a clean picture the defence changes what the language model reads a little, on an adversarial
//! one crafted on the undefended model it takes much of the attack away, so that the two towers fall
//! apart. An attacker who has the defence can make both agree; see the adaptive figures.
//!
//! The score is 1 minus the mean over tokens of the cosine between the two towers' features, from 0
//! (they agree) to 2. What is high is said by clean pictures ([`Calibration`]).

use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use image::RgbImage;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::coco::{CocoAttack, CraftedSet};
use super::run::{Line, Run, in_shard, shard_size, write_whole};
use super::wilson;
use crate::attack::{FeatureTower, Subject};
use crate::data::LabelledSet;
use crate::image::{DecodeLimits, Preprocess, decode_file};
use crate::{Error, Result};

/// A defended tower and the same without the defence; weights are held once.
#[derive(Clone)]
pub struct Detector {
    plain: FeatureTower,
    defended: FeatureTower,
    preprocess: Preprocess,
}

impl Detector {
    /// Of a defended tower and the way pictures are prepared for it.
    pub fn new(defended: FeatureTower, preprocess: Preprocess) -> Self {
        Self { plain: defended.undefended(), defended, preprocess }
    }

    /// A picture's score, of any size.
    ///
    /// # Errors
    /// If the picture is none for this tower (a contract may refuse extreme sides), or the tower
    /// fails.
    pub fn score(&self, picture: &RgbImage) -> Result<f64> {
        self.preprocess.size_of(picture.height(), picture.width())?;
        let prepared = self.preprocess.prepare(picture);
        disagreement(&self.plain.of(&prepared)?, &self.defended.of(&prepared)?)
    }
}

/// 1 minus the mean cosine, token by token.
pub(crate) fn disagreement(a: &Tensor, b: &Tensor) -> Result<f64> {
    let wide = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let (a, b) = (wide(a)?, wide(b)?);
    let dot = (&a * &b)?.sum(D::Minus1)?;
    let lengths = (a.sqr()?.sum(D::Minus1)? * b.sqr()?.sum(D::Minus1)?)?.sqrt()?;
    let cosine = (dot / lengths.maximum(f64::MIN_POSITIVE)?)?.mean_all()?.to_scalar::<f64>()?;
    if !cosine.is_finite() {
        return Err(Error::Unsupported("the tower gave features that are not numbers".into()));
    }
    Ok((1.0 - cosine).max(0.0))
}

/// The scores of clean pictures, which say what a high one is: a JSON file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// 1.
    pub schema_version: u64,
    /// The model with its defence.
    pub subject: Subject,
    /// The clean pictures by name.
    pub dataset: String,
    /// Their scores, lowest first.
    pub scores: Vec<f64>,
}

impl Calibration {
    /// The version of this format.
    pub const VERSION: u64 = 1;
    /// Fewer pictures than this say nothing of rare scores.
    pub const LEAST: usize = 20;

    /// Of clean pictures' scores.
    ///
    /// # Errors
    /// If there are fewer than [`Calibration::LEAST`], or one is no number.
    pub fn new(subject: Subject, dataset: &str, mut scores: Vec<f64>) -> Result<Self> {
        if scores.len() < Self::LEAST || scores.iter().any(|score| !score.is_finite()) {
            let expected = format!("finite scores of at least {} clean pictures", Self::LEAST);
            return Err(Error::argument("calibration", expected, scores.len()));
        }
        scores.sort_by(f64::total_cmp);
        Ok(Self { schema_version: Self::VERSION, subject, dataset: dataset.into(), scores })
    }

    /// Of a data set's pictures.
    ///
    /// # Errors
    /// If a picture cannot be read or scored, or there are too few.
    pub fn of(
        detector: &Detector,
        subject: Subject,
        set: &LabelledSet,
        limits: &DecodeLimits,
        told: &(dyn Fn() + Sync),
    ) -> Result<Self> {
        let score = |index| {
            let score = detector.score(&set.picture(index, limits)?);
            told();
            score
        };
        let scores = (0..set.items().len()).into_par_iter().map(score).collect::<Result<Vec<_>>>()?;
        Self::new(subject, set.name(), scores)
    }

    /// Reads a file, for the model with its defence.
    ///
    /// # Errors
    /// As [`Calibration::open`], and if it is of another model or defence.
    pub fn read(path: &Path, subject: &Subject) -> Result<Self> {
        let found = Self::open(path)?;
        if found.subject.digest != subject.digest {
            let reason = format!("made for {}, not for {subject}", found.subject);
            return Err(Error::config(path, reason));
        }
        Ok(found)
    }

    /// Reads a file, whatever model it is for.
    ///
    /// # Errors
    /// If it cannot be read, is damaged or of another version.
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
        let found: Self = serde_json::from_str(&text).map_err(|e| Error::config(path, e.to_string()))?;
        if found.schema_version != Self::VERSION {
            let (expected, found) = (Self::VERSION, found.schema_version);
            return Err(Error::config(path, format!("schema_version: expected {expected}, found {found}")));
        }
        Self::new(found.subject, &found.dataset, found.scores).map_err(|e| Error::config(path, e.to_string()))
    }

    /// Writes the file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_whole(path, self)
    }

    /// The share of clean pictures at least as suspicious as this, in (0, 1]: (k + 1) / (n + 1).
    pub fn share(&self, score: f64) -> f64 {
        let below = self.scores.partition_point(|clean| *clean < score);
        (self.scores.len() - below + 1) as f64 / (self.scores.len() + 1) as f64
    }

    /// The score above which a clean picture is called suspicious in this share of cases, the next
    /// larger one that is possible with so few pictures: scores are suspicious if [`Calibration::share`]
    /// is at most `share`.
    pub fn threshold(&self, share: f64) -> f64 {
        let n = self.scores.len();
        // (k + 1) / (n + 1) <= share, k clean pictures at or above it.
        let allowed = (share * (n + 1) as f64 - 1.0 + 1e-9).floor();
        if allowed < 0.0 {
            return f64::INFINITY;
        }
        let allowed = (allowed as usize).min(n);
        match n.checked_sub(allowed + 1) {
            Some(at) => self.scores[at].next_up(),
            None => 0.0,
        }
    }
}

/// A picture's line in `items.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SuspicionLine {
    /// Its place in the data set.
    pub index: usize,
    /// Its name.
    pub id: String,
    /// Why it has no score.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The clean picture's.
    #[serde(default)]
    pub clean: f64,
    /// Those of its adversarial versions.
    #[serde(default)]
    pub attacked: Vec<AttackedScore>,
}

/// An adversarial picture's score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttackedScore {
    /// What made it.
    #[serde(flatten)]
    pub attacked: CocoAttack,
    /// The score.
    pub score: f64,
}

impl Line for SuspicionLine {
    fn index(&self) -> usize {
        self.index
    }

    fn id(&self) -> &str {
        &self.id
    }
}

/// How well adversarial pictures are told from clean ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// `suspicion`.
    pub task: String,
    /// The pictures by name.
    pub dataset: String,
    /// The attack with its threat model.
    #[serde(flatten)]
    pub attacked: CocoAttack,
    /// Pictures, clean and adversarial each; none of them was calibrated on.
    pub n: usize,
    /// The area under the ROC: how often an adversarial picture is more suspicious than a clean one,
    /// in percent. 50 is chance.
    pub auc: f64,
    /// The ends of its 95 % interval (Hanley and McNeil 1982).
    pub auc_interval: (f64, f64),
    /// Points of the ROC.
    pub at: Vec<Point>,
}

/// What a threshold from the calibration half comes to on the other half.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The share of clean pictures asked for, in percent.
    pub asked: f64,
    /// The threshold; null where so few pictures were calibrated on that there is none.
    pub threshold: Option<f64>,
    /// The share of clean pictures that are above it, in percent.
    pub clean: f64,
    /// The share of adversarial ones.
    pub caught: f64,
    /// The ends of its 95 % interval (Wilson).
    pub interval: (f64, f64),
}

/// What a run comes to: its `summary.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SuspicionSummary {
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
    /// Those without a score.
    pub failed: usize,
    /// The clean pictures' scores at 5, 50 and 95 % of them.
    pub clean: [f64; 3],
    /// The figures.
    pub rows: Vec<Figure>,
}

/// Scores of clean and adversarial pictures.
pub struct SuspicionRun<'a> {
    /// The pictures; their labels have no part in it.
    pub set: &'a LabelledSet,
    /// Limits on picture files.
    pub limits: DecodeLimits,
    /// The towers.
    pub detector: Detector,
    /// The defended model.
    pub subject: Subject,
    /// The adversarial pictures.
    pub crafted: Vec<CraftedSet>,
    /// Of the run.
    pub seed: u64,
    /// Pictures worked on together: what a kill loses.
    pub batch: usize,
}

/// Shares of clean pictures that thresholds are given for, in percent.
const ASKED: [f64; 3] = [1.0, 5.0, 10.0];

impl SuspicionRun<'_> {
    /// What decides the result; `more` are the caller's own entries, such as the model's weights.
    pub fn decides(&self, more: Value) -> Value {
        let mut decides = json!({
            "task": "suspicion",
            "version": env!("CARGO_PKG_VERSION"),
            "seed": self.seed,
            "dataset": {
                "name": self.set.name(),
                "items": self.items(None),
                "digest": self.set.digest(),
            },
            "subject": self.subject,
            "crafted": self.crafted.iter().map(CraftedSet::decides).collect::<Vec<_>>(),
        });
        if let (Some(all), Value::Object(more)) = (decides.as_object_mut(), more) {
            all.extend(more);
        }
        decides
    }

    /// The number of items in a shard, or in the whole run.
    pub fn items(&self, shard: Option<(usize, usize)>) -> usize {
        shard_size(shard, self.names())
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        let items = self.set.items().iter().map(|item| item.id.as_str());
        items.chain(self.set.defects().iter().map(|defect| defect.id.as_str()))
    }

    /// Scores what has no score yet.
    ///
    /// # Errors
    /// If the run's folder cannot be written. A picture that cannot be read or scored is an item that
    /// failed, with its reason.
    pub fn run(
        &self,
        run: &mut Run<SuspicionLine>,
        told: &mut dyn FnMut(usize, usize),
    ) -> Result<SuspicionSummary> {
        run.work(self.names(), self.batch, |part, run| {
            told(run.done(), run.manifest().items);
            Ok(part.par_iter().map(|index| self.line(*index)).collect())
        })?;
        told(run.done(), run.manifest().items);
        summarise(run)
    }

    fn line(&self, index: usize) -> SuspicionLine {
        let items = self.set.items();
        let (id, scores) = match items.get(index) {
            Some(item) => (item.id.clone(), self.scores(index, &item.id).map_err(|e| e.to_string())),
            None => {
                let defect = &self.set.defects()[index - items.len()];
                (defect.id.clone(), Err(defect.reason.clone()))
            }
        };
        match scores {
            Ok((clean, attacked)) => SuspicionLine { index, id, error: None, clean, attacked },
            Err(reason) => SuspicionLine { index, id, error: Some(reason), clean: 0.0, attacked: Vec::new() },
        }
    }

    fn scores(&self, index: usize, id: &str) -> Result<(f64, Vec<AttackedScore>)> {
        let clean = self.detector.score(&self.set.picture(index, &self.limits)?)?;
        let sets = self.crafted.iter().filter_map(|set| Some((set, set.attacked(&self.subject)?)));
        let attacked = sets.map(|(set, attacked)| {
            let score = self.detector.score(&decode_file(set.picture(id)?, &self.limits)?)?;
            Ok(AttackedScore { attacked, score })
        });
        Ok((clean, attacked.collect::<Result<_>>()?))
    }
}

/// What a run comes to, from its lines and its manifest alone; written as its `summary.json`.
///
/// # Errors
/// If a line is damaged, or the summary cannot be written.
pub fn summarise(run: &Run<SuspicionLine>) -> Result<SuspicionSummary> {
    let mut all: Vec<SuspicionLine> = run.lines()?.collect::<Result<_>>()?;
    all.sort_by_key(|line| line.index);
    let manifest = run.manifest();
    let dataset = manifest.decides.pointer("/dataset/name").and_then(Value::as_str).unwrap_or_default();
    let mut clean: Vec<f64> = all.iter().filter(|line| line.error.is_none()).map(|line| line.clean).collect();
    clean.sort_by(f64::total_cmp);
    let quantile = |share: f64| {
        let at = (share * clean.len().saturating_sub(1) as f64).round() as usize;
        clean.get(at).copied().unwrap_or_default()
    };
    let summary = SuspicionSummary {
        schema_version: 1,
        fingerprint: manifest.fingerprint.clone(),
        run: manifest.decides.clone(),
        shard: manifest.shard,
        items: manifest.items,
        done: all.len(),
        failed: all.iter().filter(|line| line.error.is_some()).count(),
        clean: [0.05, 0.5, 0.95].map(quantile),
        rows: figures(dataset, &all),
    };
    write_whole(&run.folder().join("summary.json"), &summary)?;
    Ok(summary)
}

/// Every figure of a run, from its lines alone. Half of the pictures, by the hash of their names, are
/// calibrated on, the other half is what the figures are about.
pub fn figures(dataset: &str, all: &[SuspicionLine]) -> Vec<Figure> {
    let good: Vec<&SuspicionLine> = all.iter().filter(|line| line.error.is_none()).collect();
    let mut kinds: Vec<&CocoAttack> = Vec::new();
    for found in good.iter().flat_map(|line| &line.attacked) {
        if !kinds.contains(&&found.attacked) {
            kinds.push(&found.attacked);
        }
    }
    if kinds.is_empty() {
        return Vec::new();
    }
    let (calibrated, held): (Vec<&SuspicionLine>, Vec<&SuspicionLine>) =
        good.iter().partition(|line| in_shard(Some((1, 2)), &line.id));
    // Of a few pictures, as in a small shard, there are no thresholds.
    let calibration = Calibration::new(
        Subject::undefended(dataset),
        dataset,
        calibrated.iter().map(|line| line.clean).collect(),
    )
    .ok();
    let clean: Vec<f64> = held.iter().map(|line| line.clean).collect();
    let mut rows = Vec::new();
    for kind in kinds {
        let of = |line: &&SuspicionLine| {
            line.attacked.iter().find(|found| found.attacked == *kind).map(|found| found.score)
        };
        let scores: Vec<f64> = held.iter().filter_map(of).collect();
        let above = |scores: &[f64], threshold: f64| scores.iter().filter(|s| **s >= threshold).count();
        let at = ASKED.map(|asked| {
            let threshold =
                calibration.as_ref().map_or(f64::INFINITY, |found| found.threshold(asked / 100.0));
            let caught = above(&scores, threshold);
            let share = |count: usize, n: usize| 100.0 * count as f64 / n.max(1) as f64;
            Point {
                asked,
                threshold: threshold.is_finite().then_some(threshold),
                clean: share(above(&clean, threshold), clean.len()),
                caught: share(caught, scores.len()),
                interval: wilson(caught, scores.len()),
            }
        });
        let auc = area(&clean, &scores);
        rows.push(Figure {
            task: "suspicion".into(),
            dataset: dataset.into(),
            attacked: kind.clone(),
            n: scores.len(),
            auc: 100.0 * auc,
            auc_interval: spread(auc, clean.len(), scores.len()),
            at: at.to_vec(),
        });
    }
    rows
}

/// How often a score of `high` is above one of `low`, ties counting half.
fn area(low: &[f64], high: &[f64]) -> f64 {
    let mut low = low.to_vec();
    low.sort_by(f64::total_cmp);
    let won = |score: &f64| {
        let below = low.partition_point(|other| other < score);
        let until = low.partition_point(|other| other <= score);
        below as f64 + (until - below) as f64 / 2.0
    };
    high.iter().map(won).sum::<f64>() / (low.len() * high.len()).max(1) as f64
}

/// Hanley and McNeil's 95 % interval of an area, in percent.
fn spread(auc: f64, low: usize, high: usize) -> (f64, f64) {
    let (low, high) = (low.max(1) as f64, high.max(1) as f64);
    let (q1, q2) = (auc / (2.0 - auc), 2.0 * auc * auc / (1.0 + auc));
    let variance = auc * (1.0 - auc) + (high - 1.0) * (q1 - auc * auc) + (low - 1.0) * (q2 - auc * auc);
    let error = 1.96 * (variance.max(0.0) / (low * high)).sqrt();
    (100.0 * (auc - error).max(0.0), 100.0 * (auc + error).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::{Eps, Threat};

    fn calibration(n: usize) -> Calibration {
        let scores = (0..n).rev().map(|i| i as f64 / n as f64).collect();
        Calibration::new(Subject::undefended("m"), "d", scores).unwrap()
    }

    #[test]
    fn a_threshold_is_where_the_share_begins() {
        let found = calibration(99);
        for share in [0.01, 0.05, 0.1, 0.5, 1.0] {
            let threshold = found.threshold(share);
            assert!(found.share(threshold) <= share + 1e-9, "{share}");
            if threshold > 0.0 {
                assert!(found.share(threshold.next_down()) > share, "{share}");
            }
        }
        assert_eq!(found.share(2.0), 0.01);
        assert_eq!(found.share(0.0), 1.0);
        // 50 pictures know nothing of one in a hundred.
        assert_eq!(calibration(50).threshold(0.01), f64::INFINITY);
        assert!(Calibration::new(Subject::undefended("m"), "d", vec![0.0; 19]).is_err());
        assert!(Calibration::new(Subject::undefended("m"), "d", vec![f64::NAN; 30]).is_err());
    }

    #[test]
    fn a_calibration_is_of_one_model_and_defence() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("calibration.json");
        // Thirty-seconds are the same in JSON to the last bit.
        let found = calibration(32);
        found.write(&path).unwrap();
        assert_eq!(Calibration::read(&path, &found.subject).unwrap(), found);
        let other = Subject { digest: Some("00".into()), ..found.subject.clone() };
        let error = Calibration::read(&path, &other).unwrap_err().to_string();
        assert!(error.contains("made for"), "{error}");
        std::fs::write(&path, "{").unwrap();
        assert!(Calibration::read(&path, &found.subject).is_err());
    }

    #[test]
    fn the_area_is_that_of_all_pairs() {
        let (low, high) = ([0.1, 0.2, 0.3, 0.3], [0.2, 0.3, 0.4]);
        let pairs = high.iter().flat_map(|h| low.iter().map(move |l| (l, h)));
        let won: f64 = pairs
            .map(|(l, h)| {
                if h > l {
                    1.0
                } else if h == l {
                    0.5
                } else {
                    0.0
                }
            })
            .sum();
        assert!((area(&low, &high) - won / 12.0).abs() < 1e-12);
        let (from, to) = spread(0.9, 100, 100);
        assert!(from > 80.0 && from < 90.0 && to > 90.0 && to <= 100.0);
    }

    #[test]
    fn figures_are_of_pictures_not_calibrated_on() {
        let attacked = CocoAttack { attack: "pgd".into(), eps: Eps::of_255(8), threat: Threat::Adaptive };
        let line = |index: usize| SuspicionLine {
            index,
            id: format!("{index}.png"),
            error: None,
            clean: (index % 10) as f64 / 10.0,
            attacked: vec![AttackedScore { attacked: attacked.clone(), score: 5.0 }],
        };
        let all: Vec<SuspicionLine> = (0..400).map(line).collect();
        let rows = figures("d", &all);
        let own = all.iter().filter(|line| !in_shard(Some((1, 2)), &line.id)).count();
        assert_eq!((rows.len(), rows[0].n, rows[0].auc), (1, own, 100.0));
        assert_eq!(rows[0].at[2].caught, 100.0);
        assert!(rows[0].at[2].clean <= 20.0);
        // Too few to calibrate on: an area, and no thresholds.
        let few = figures("d", &all[..12]);
        assert!(
            few[0].n > 0 && few[0].at.iter().all(|point| point.threshold.is_none() && point.caught == 0.0)
        );
        let without = SuspicionLine { attacked: Vec::new(), ..all[0].clone() };
        assert!(figures("d", &[without]).is_empty());
    }
}
