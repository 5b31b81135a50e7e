//! Questions with known answers, clean and attacked: VQAv2's accuracy and POPE's figures.
//!
//! As elsewhere here, an answer to an attacked picture is worth no more than the same model's answer
//! to the clean one, so that a robust figure is never above its clean one.

use std::collections::HashMap;

use image::RgbImage;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::coco::{Asked, Cell, CocoAttack, CraftedSet, Source, Speaker, Spoken};
use super::metrics::pope::{Pope, says_yes};
use super::metrics::vqa::{accuracy, cut};
use super::prompts::TaskPrompt;
use super::run::{Line, Run, write_whole};
use super::wilson;
use crate::Result;
use crate::data::questions::{QuestionSet, Truth};
use crate::image::{DecodeLimits, decode_file};

/// An evaluation: every model is asked every question about every picture it has a threat model for.
pub struct QuestionRun<'a> {
    /// The questions.
    pub set: &'a QuestionSet,
    /// The clean pictures, by question.
    pub source: Source,
    /// Which of the source's pictures a question is about.
    pub pictures: Vec<usize>,
    /// Limits on picture files.
    pub limits: DecodeLimits,
    /// The models.
    pub models: Vec<Spoken>,
    /// The adversarial pictures.
    pub crafted: Vec<CraftedSet>,
    /// How a question is put.
    pub prompt: TaskPrompt,
    /// Of the run.
    pub seed: u64,
    /// Questions asked together: what a kill loses.
    pub batch: usize,
}

/// A line of `items.jsonl`: an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuestionLine {
    /// Its place in the run.
    pub index: usize,
    /// Model, pictures and question.
    pub id: String,
    /// The question's row in the set.
    pub row: usize,
    /// The picture.
    pub image: String,
    /// The question.
    pub question: String,
    /// What is right.
    pub truth: Truth,
    /// The model's defence.
    pub defense: String,
    /// Of an adversarial picture: what made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attacked: Option<CocoAttack>,
    /// Why there is no answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What the model said.
    #[serde(default)]
    pub response: String,
}

impl QuestionLine {
    /// What the answer is worth, in [0, 1].
    pub fn score(&self) -> f64 {
        match &self.truth {
            Truth::Humans(humans) => accuracy(cut(&self.response), humans),
            Truth::Yes(yes) => f64::from(u8::from(says_yes(&self.response) == *yes)),
        }
    }
}

impl Line for QuestionLine {
    fn index(&self) -> usize {
        self.index
    }

    fn id(&self) -> &str {
        &self.id
    }
}

/// A figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuestionRow {
    /// `vqa` (VQAv2's accuracy) or `pope`.
    pub task: String,
    /// The questions by name.
    pub dataset: String,
    /// The model's defence.
    pub defense: String,
    /// The attack with its threat model; absent for clean pictures.
    #[serde(flatten)]
    pub attacked: Option<CocoAttack>,
    /// Answers.
    pub n: usize,
    /// Their mean worth in percent; under attack that of the worse of both answers.
    pub value: f64,
    /// The lower end of the 95 % interval: Wilson's of POPE, of VQA's accuracy that of the mean
    /// (1.96 standard errors).
    pub low: f64,
    /// The upper end.
    pub high: f64,
    /// POPE's figures of the answers as they are, whatever was said of the clean pictures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pope: Option<Pope>,
}

/// What a run comes to: its `summary.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuestionSummary {
    /// 1.
    pub schema_version: u64,
    /// SHA-256 of everything that decides the result.
    pub fingerprint: String,
    /// Everything that decides the result.
    pub run: Value,
    /// Which shard this is of how many, where it is one.
    pub shard: Option<(usize, usize)>,
    /// Answers of the run, or of the shard.
    pub items: usize,
    /// Those with a line.
    pub done: usize,
    /// Those without an answer.
    pub failed: usize,
    /// Questions whose picture is not there; they are no items of the run.
    pub missing: usize,
    /// The figures, clean ones first.
    pub rows: Vec<QuestionRow>,
}

impl QuestionRun<'_> {
    /// What decides the result; `more` are the caller's own entries, such as the model's weights.
    pub fn decides(&self, more: Value) -> Value {
        let rows = self.set.rows().iter().enumerate();
        let rows = rows.map(|(i, row)| json!([row.id, row.image, row.question, row.truth, self.has(i)]));
        let digest = Sha256::digest(Value::from(rows.collect::<Vec<_>>()).to_string());
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let missing = (0..self.set.rows().len()).filter(|row| !self.has(*row)).count();
        let mut decides = json!({
            "task": "questions",
            "version": env!("CARGO_PKG_VERSION"),
            "seed": self.seed,
            "dataset": {
                "name": self.set.name(),
                "items": self.items(None),
                "questions": self.set.rows().len(),
                "missing": missing,
                "digest": digest,
            },
            "defenses": self.models.iter()
                .map(|model| json!({ "name": model.defense, "subject": model.subject }))
                .collect::<Vec<_>>(),
            "crafted": self.crafted.iter().map(CraftedSet::decides).collect::<Vec<_>>(),
            "prompt": self.prompt,
            "decoding": "greedy",
        });
        if let (Some(all), Value::Object(more)) = (decides.as_object_mut(), more) {
            all.extend(more);
        }
        decides
    }

    fn has(&self, row: usize) -> bool {
        self.pictures.get(row).is_some_and(|picture| self.source.has(*picture))
    }

    /// The number of items in a shard, or in the whole run: questions times models and pictures.
    pub fn items(&self, shard: Option<(usize, usize)>) -> usize {
        self.cells(shard).len()
    }

    fn cells(&self, shard: Option<(usize, usize)>) -> Vec<Cell> {
        let rows = self.set.rows().iter().enumerate();
        let rows: Vec<Option<&str>> =
            rows.map(|(i, row)| self.has(i).then_some(row.image.as_str())).collect();
        Cell::all(&self.models, &self.crafted, &rows, shard)
    }

    fn index(&self, cell: Cell) -> usize {
        cell.index(self.crafted.len(), self.set.rows().len())
    }

    /// Asks what has not been asked yet. `load` loads a model when its turn comes; one is held at a
    /// time. `told` is given the answers there are, and of how many.
    ///
    /// # Errors
    /// If a model cannot be loaded or asked, or the run's folder cannot be written. A picture that
    /// cannot be read or that the model refuses is an item that failed, with its reason.
    pub fn run(
        &self,
        run: &mut Run<QuestionLine>,
        load: &mut dyn FnMut(usize) -> Result<Box<dyn Speaker>>,
        told: &mut dyn FnMut(usize, usize),
    ) -> Result<QuestionSummary> {
        let cells = self.cells(run.manifest().shard);
        for model in 0..self.models.len() {
            let pending: Vec<Cell> = cells
                .iter()
                .copied()
                .filter(|cell| cell.model == model && !run.has(self.index(*cell)))
                .collect();
            if pending.is_empty() {
                continue;
            }
            told(run.done(), cells.len());
            let speaker = load(model)?;
            for part in pending.chunks(self.batch.max(1)) {
                run.append(&self.ask(speaker.as_ref(), part)?)?;
                told(run.done(), cells.len());
            }
        }
        summarise(run)
    }

    fn picture(&self, cell: Cell) -> Result<RgbImage> {
        let name = &self.set.rows()[cell.row].image;
        match cell.crafted.and_then(|i| self.crafted.get(i)) {
            Some(set) => decode_file(set.picture(name)?, &self.limits),
            None => self.source.picture(self.pictures[cell.row], name, &self.limits),
        }
    }

    fn ask(&self, speaker: &dyn Speaker, part: &[Cell]) -> Result<Vec<QuestionLine>> {
        let pictures: Vec<Result<RgbImage>> = part.iter().map(|cell| self.picture(*cell)).collect();
        let mut lines: Vec<QuestionLine> = part
            .iter()
            .zip(&pictures)
            .map(|(cell, picture)| self.line(*cell, picture.as_ref().err().map(ToString::to_string)))
            .collect();
        let there =
            || pictures.iter().enumerate().filter_map(|(i, picture)| Some((i, picture.as_ref().ok()?)));
        let asked: Vec<Asked> = there()
            .map(|(i, picture)| Asked {
                picture,
                prompt: self.prompt.ask(&lines[i].question),
                max_tokens: self.prompt.max_tokens,
            })
            .collect();
        let answers = speaker.answers(&asked)?;
        let places: Vec<usize> = there().map(|(i, _)| i).collect();
        for (i, answer) in places.into_iter().zip(answers) {
            match answer {
                Ok(response) => lines[i].response = response,
                Err(reason) => lines[i].error = Some(reason),
            }
        }
        Ok(lines)
    }

    fn line(&self, cell: Cell, error: Option<String>) -> QuestionLine {
        let row = &self.set.rows()[cell.row];
        let spoken = &self.models[cell.model];
        let set = cell.crafted.and_then(|i| self.crafted.get(i));
        let attacked = set.and_then(|set| set.attacked(&spoken.subject));
        let kind =
            attacked.as_ref().map_or("clean".to_string(), |a| format!("{} {} {}", a.attack, a.eps, a.threat));
        QuestionLine {
            index: self.index(cell),
            id: format!("{}/{kind}/{}", spoken.defense, row.id),
            row: cell.row,
            image: row.image.clone(),
            question: row.question.clone(),
            truth: row.truth.clone(),
            defense: spoken.defense.clone(),
            attacked,
            error,
            response: String::new(),
        }
    }
}

/// What a run comes to, from its lines and its manifest alone; written as its `summary.json`.
///
/// # Errors
/// If a line is damaged, or the summary cannot be written.
pub fn summarise(run: &Run<QuestionLine>) -> Result<QuestionSummary> {
    let mut all: Vec<QuestionLine> = run.lines()?.collect::<Result<_>>()?;
    all.sort_by_key(|line| line.index);
    let manifest = run.manifest();
    let dataset = &manifest.decides["dataset"];
    let summary = QuestionSummary {
        schema_version: 1,
        fingerprint: manifest.fingerprint.clone(),
        run: manifest.decides.clone(),
        shard: manifest.shard,
        items: manifest.items,
        done: all.len(),
        failed: all.iter().filter(|line| line.error.is_some()).count(),
        missing: dataset["missing"].as_u64().unwrap_or_default() as usize,
        rows: figures(dataset["name"].as_str().unwrap_or_default(), &all),
    };
    write_whole(&run.folder().join("summary.json"), &summary)?;
    Ok(summary)
}

/// Every figure of a run, from its lines alone.
pub fn figures(dataset: &str, all: &[QuestionLine]) -> Vec<QuestionRow> {
    let good = || all.iter().filter(|line| line.error.is_none());
    let clean: HashMap<(&str, usize), f64> = good()
        .filter(|line| line.attacked.is_none())
        .map(|line| ((line.defense.as_str(), line.row), line.score()))
        .collect();
    let mut groups: Vec<(&str, Option<&CocoAttack>)> = Vec::new();
    for line in all {
        let group = (line.defense.as_str(), line.attacked.as_ref());
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    groups.sort_by_key(|(_, attacked)| attacked.is_some());
    let mut rows = Vec::new();
    for (defense, attacked) in groups {
        let own: Vec<&QuestionLine> = good()
            .filter(|line| (line.defense.as_str(), line.attacked.as_ref()) == (defense, attacked))
            // What was not answered of the clean picture cannot be robust, and is no figure.
            .filter(|line| clean.contains_key(&(defense, line.row)))
            .collect();
        let worth = |line: &&QuestionLine| {
            let before = clean.get(&(defense, line.row)).copied().unwrap_or_default();
            line.score().min(before)
        };
        let scores: Vec<f64> = own.iter().map(worth).collect();
        let pairs: Vec<(bool, bool)> = own
            .iter()
            .filter_map(|line| match &line.truth {
                Truth::Yes(yes) => Some((says_yes(&line.response), *yes)),
                Truth::Humans(_) => None,
            })
            .collect();
        let n = scores.len();
        let sum: f64 = scores.iter().sum();
        let mean = sum / n.max(1) as f64;
        let is_pope = !pairs.is_empty();
        let (low, high) = if is_pope {
            wilson(sum.round() as usize, n)
        } else {
            let variance = scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>();
            let error = (variance / n.saturating_sub(1).max(1) as f64 / n.max(1) as f64).sqrt();
            ((100.0 * (mean - 1.96 * error)).max(0.0), (100.0 * (mean + 1.96 * error)).min(100.0))
        };
        rows.push(QuestionRow {
            task: if is_pope { "pope" } else { "vqa" }.into(),
            dataset: dataset.into(),
            defense: defense.into(),
            attacked: attacked.cloned(),
            n,
            value: 100.0 * mean,
            low,
            high,
            pope: is_pope.then(|| Pope::new(pairs)),
        });
    }
    rows
}
