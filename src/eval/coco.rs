//! CAP and VQA: what a language model says of pictures with a known object, clean and adversarial,
//! and whether it names the object (the paper's Tables 5 and 11).
//!
//! Adversarial pictures come from finished runs of `radapt attack`, so that one crafting serves every
//! model that is asked. Every response is kept; verdicts are the words judge's
//! ([`super::judge::WordJudge`]), and a language model's beside it where one is given.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use image::RgbImage;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::judge::{Agreement, Case, LlmAnswer, LlmJudge, Verdict, WordJudge};
use super::metrics::caption::{CaptionScores, Captioned, score};
use super::prompts::TaskPrompt;
use super::run::{Line, Manifest, Run, in_shard, lines, write_whole};
pub use super::vattack::Source;
use super::{Attacked, Precision, Row, Summary};
use crate::attack::{Eps, Subject, Threat, ThreatKind};
use crate::data::coco300::ObjectSet;
use crate::image::{DecodeLimits, decode_file};
use crate::{Error, Result};

/// A question about a picture.
pub struct Asked<'a> {
    /// The picture, of any size.
    pub picture: &'a RgbImage,
    /// The words.
    pub prompt: String,
    /// The most tokens the answer may have.
    pub max_tokens: usize,
}

/// A language model that looks at pictures.
pub trait Speaker {
    /// Its answers, greedily, in order. Each may fail by itself, with the reason.
    ///
    /// # Errors
    /// If nothing can be asked any more.
    fn answers(&self, asked: &[Asked<'_>]) -> Result<Vec<std::result::Result<String, String>>>;
}

/// A model that is asked, by its defence.
#[derive(Debug, Clone)]
pub struct Spoken {
    /// The defence's name in figures: `none`, `gif+fra`, or an anchor's.
    pub defense: String,
    /// The model with it.
    pub subject: Subject,
}

/// The adversarial pictures of one run and radius.
#[derive(Debug, Clone, Serialize)]
pub struct CraftedSet {
    /// The run's folder.
    pub folder: PathBuf,
    /// The run's fingerprint.
    pub fingerprint: String,
    /// The attack.
    pub attack: String,
    /// The radius.
    pub eps: Eps,
    /// What was crafted on whom.
    pub kind: ThreatKind,
    /// What was crafted on, in words.
    pub surrogate: String,
    /// The defended model that adaptive pictures were crafted on; `None` of transfer pictures.
    pub through: Option<Subject>,
    /// Height and width of the pictures, in pixels.
    pub size: (usize, usize),
    /// By the picture's name: its file.
    #[serde(skip)]
    pictures: HashMap<String, PathBuf>,
    /// By the last part of names such as `CLASS/NAME`, which labelled pictures have and words about
    /// them do not; `None` where several end in it.
    #[serde(skip)]
    last_parts: HashMap<String, Option<PathBuf>>,
}

/// What is read of a line of a run of `radapt attack`.
#[derive(Serialize, Deserialize)]
struct CraftedLine {
    index: usize,
    id: String,
    #[serde(default)]
    attacked: Vec<CraftedPicture>,
}

#[derive(Serialize, Deserialize)]
struct CraftedPicture {
    eps: Eps,
    #[serde(flatten)]
    threat: Threat,
    picture: String,
}

impl Line for CraftedLine {
    fn index(&self) -> usize {
        self.index
    }

    fn id(&self) -> &str {
        &self.id
    }
}

impl CraftedSet {
    /// The pictures of a run of `radapt attack v-attack` or of another attack on features, by radius.
    ///
    /// # Errors
    /// If the folder is no such run, or it is not complete.
    pub fn read(folder: &Path) -> Result<Vec<Self>> {
        let manifest = Manifest::read(folder)?;
        let decides = &manifest.decides;
        let attack = match decides["task"].as_str() {
            Some("v-attack") => "v-attack",
            Some("features") => "pgd",
            other => {
                let found = other.unwrap_or("none");
                let reason = format!("task: expected v-attack or features, found `{found}`");
                return Err(Error::config(folder.join("run.json"), reason));
            }
        };
        let wrong = |e: serde_json::Error| Error::config(folder.join("run.json"), e.to_string());
        let own = decides.pointer("/defense/subject").cloned().unwrap_or_default();
        let own: Subject = serde_json::from_value(own).map_err(wrong)?;
        let side = |key: &str| decides["preprocess"][key].as_u64().unwrap_or_default() as usize;
        let mut sets: Vec<Self> = Vec::new();
        let mut count = 0;
        for line in lines::<CraftedLine>(folder)? {
            let line = line?;
            count += 1;
            for found in line.attacked {
                let place = sets.iter().position(|set| set.eps == found.eps);
                let place = match place {
                    Some(place) => place,
                    None => {
                        let surrogate = match &found.threat {
                            Threat::Transfer { surrogate } => surrogate.clone(),
                            Threat::Adaptive => own.to_string(),
                        };
                        sets.push(Self {
                            folder: folder.to_path_buf(),
                            fingerprint: manifest.fingerprint.clone(),
                            attack: attack.into(),
                            eps: found.eps,
                            kind: found.threat.kind(),
                            surrogate,
                            through: (found.threat == Threat::Adaptive).then(|| own.clone()),
                            size: (side("height"), side("width")),
                            pictures: HashMap::new(),
                            last_parts: HashMap::new(),
                        });
                        sets.len() - 1
                    }
                };
                // Names of files beside the run and nothing else.
                let beside = Path::new(&found.picture);
                if beside.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
                    let reason = format!("names a picture outside its folder: `{}`", found.picture);
                    return Err(Error::config(folder.join("items.jsonl"), reason));
                }
                if let Some(set) = sets.get_mut(place) {
                    let name = file_of(&line.id);
                    if let Some((_, last)) = name.rsplit_once('/') {
                        let entry = set.last_parts.entry(last.to_string());
                        entry.and_modify(|file| *file = None).or_insert(Some(folder.join(beside)));
                    }
                    set.pictures.insert(name, folder.join(beside));
                }
            }
        }
        if count < manifest.items {
            let reason = format!("not complete: {count} of {} pictures", manifest.items);
            return Err(Error::config(folder, reason));
        }
        if sets.is_empty() {
            return Err(Error::config(folder, "expected adversarial pictures, found none"));
        }
        Ok(sets)
    }

    /// What these pictures are to a model; `None` if they were made for another one.
    ///
    /// Adaptive pictures were crafted through a defence, and are that to models with the same one: of
    /// the same numbers, or made in the same way from the tower of another checkpoint of it.
    pub fn threat(&self, subject: &Subject) -> Option<Threat> {
        match &self.through {
            None => Some(Threat::Transfer { surrogate: self.surrogate.clone() }),
            Some(own) => {
                (own.digest == subject.digest || own.defense == subject.defense).then_some(Threat::Adaptive)
            }
        }
    }
}

/// What a picture is looked up by. Pocket's scenes have two names: `pocket-test-0/000000000007` among
/// labelled pictures, and `000000000007.png` where there are words about them.
fn file_of(name: &str) -> String {
    match name.strip_prefix("pocket-").and_then(|rest| rest.rsplit_once('/')) {
        Some((_, number)) => format!("{number}.png"),
        None => name.to_string(),
    }
}

impl CraftedSet {
    /// What made these pictures, as a figure of this model says it; `None` if they were made for
    /// another one.
    pub fn attacked(&self, subject: &Subject) -> Option<CocoAttack> {
        let threat = self.threat(subject)?;
        Some(CocoAttack { attack: self.attack.clone(), eps: self.eps, threat })
    }

    /// The file of the adversarial picture of this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn picture(&self, name: &str) -> Result<&Path> {
        let name_of = file_of(name);
        let other = match self.last_parts.get(&name_of) {
            Some(Some(file)) => Ok(file.as_path()),
            Some(None) => Err("several"),
            None => Err("none"),
        };
        self.pictures.get(&name_of).map_or(other, |file| Ok(file)).map_err(|many| {
            let found = format!("{many} in `{}`", self.folder.display());
            Error::argument("adversarial picture", format!("one of `{name}`"), found)
        })
    }

    /// What of it decides a result.
    pub(super) fn decides(&self) -> Value {
        json!({
            "fingerprint": self.fingerprint, "attack": self.attack, "eps": self.eps, "threat": self.kind,
            "surrogate": self.surrogate,
        })
    }
}

/// An evaluation: every model is asked about every picture it has a threat model for.
pub struct CocoRun<'a> {
    /// Objects, targets, questions.
    pub set: &'a ObjectSet,
    /// The clean pictures.
    pub source: Source,
    /// Limits on picture files.
    pub limits: DecodeLimits,
    /// The models.
    pub models: Vec<Spoken>,
    /// The adversarial pictures.
    pub crafted: Vec<CraftedSet>,
    /// How a caption is asked for.
    pub caption: TaskPrompt,
    /// How a question is put.
    pub question: TaskPrompt,
    /// Captions by people, by the picture's name, for CIDEr and BLEU; none where empty.
    pub references: HashMap<String, Vec<String>>,
    /// Pictures that are asked about together: what a kill loses.
    pub batch: usize,
    /// Of the sample of pictures.
    pub seed: u64,
}

/// One row of a set before one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cell {
    pub model: usize,
    /// `None` is the clean picture.
    pub crafted: Option<usize>,
    pub row: usize,
}

impl Cell {
    /// Every row before every model, clean and by the crafted sets that are for it; of each row its
    /// picture's name, `None` where there is no picture.
    pub fn all(
        models: &[Spoken],
        crafted: &[CraftedSet],
        rows: &[Option<&str>],
        shard: Option<(usize, usize)>,
    ) -> Vec<Self> {
        let mut all = Vec::new();
        for (model, spoken) in models.iter().enumerate() {
            let sets = (0..crafted.len()).filter(|i| crafted[*i].threat(&spoken.subject).is_some());
            for crafted in std::iter::once(None).chain(sets.map(Some)) {
                for (row, picture) in rows.iter().enumerate() {
                    // All there is of a picture is in one shard.
                    if picture.is_some_and(|name| in_shard(shard, name)) {
                        all.push(Self { model, crafted, row });
                    }
                }
            }
        }
        all
    }

    /// Its place in the whole run, of so many crafted sets and rows.
    pub fn index(self, sets: usize, rows: usize) -> usize {
        (self.model * (1 + sets) + self.crafted.map_or(0, |i| i + 1)) * rows + self.row
    }
}

/// The line of a picture before a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CocoLine {
    /// Its place in the run.
    pub index: usize,
    /// `DEFENCE/clean/IMAGE` or `DEFENCE/ATTACK EPS THREAT/IMAGE`, and behind a `#` the row.
    pub id: String,
    /// The row of the set.
    pub row: usize,
    /// The picture's name.
    pub image: String,
    /// The object in it.
    pub original: String,
    /// What an attack wants it to be taken for.
    pub target: String,
    /// The model's defence.
    pub defense: String,
    /// The attack; `None` for the clean picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attacked: Option<CocoAttack>,
    /// Why there is no response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Captions by people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub references: Vec<String>,
    /// The caption first, then the answers.
    #[serde(default)]
    pub responses: Vec<CocoResponse>,
}

/// What a picture was attacked with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CocoAttack {
    /// By its name.
    pub attack: String,
    /// The radius.
    pub eps: Eps,
    /// The threat model.
    #[serde(flatten)]
    pub threat: Threat,
}

/// What a model said.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CocoResponse {
    /// `caption` or `vqa`.
    pub task: String,
    /// What was asked, word by word.
    pub prompt: String,
    /// The question without the words around it; `None` of a caption.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub question: Option<String>,
    /// What was said.
    pub response: String,
    /// What it names, by the words judge.
    pub verdict: Verdict,
}

impl Line for CocoLine {
    fn index(&self) -> usize {
        self.index
    }

    fn id(&self) -> &str {
        &self.id
    }
}

/// Responses by what they name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdicts {
    /// `caption` or `vqa`.
    pub task: String,
    /// The model's defence.
    pub defense: String,
    /// `None` for clean pictures.
    pub attacked: Option<CocoAttack>,
    /// `words`, or the language model that judged.
    pub judge: String,
    /// Responses judged.
    pub n: usize,
    /// How many name what.
    pub counts: BTreeMap<String, usize>,
    /// How many could not be judged; they are in no count.
    pub failed: usize,
    /// CIDEr and BLEU of the captions, where there are captions by people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub captions: Option<Value>,
}

/// What a run comes to: `summary.json`, which has all of [`Summary`] and more.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CocoSummary {
    /// The figures: responses that name the object, and under attack do so on the clean picture too.
    #[serde(flatten)]
    pub summary: Summary,
    /// The same responses by what they name, attacked ones whatever was said of the clean picture.
    pub verdicts: Vec<Verdicts>,
    /// How far the two judges agree, where there are two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreement: Option<Value>,
    /// Pictures of the set that are not there, by name; they are no items of the run.
    pub missing: Vec<String>,
}

/// How far a run is.
pub struct CocoProgress {
    /// Pictures done, and of how many.
    pub done: usize,
    /// Of how many.
    pub of: usize,
    /// The model that is asked.
    pub defense: String,
}

impl CocoRun<'_> {
    /// What decides the result; `more` are the caller's own entries, such as the model's weights.
    pub fn decides(&self, more: Value) -> Value {
        let rows: Vec<Value> = self
            .set
            .rows()
            .iter()
            .enumerate()
            .map(|(i, row)| json!([row.image, row.keyword, row.target, row.asked(), self.source.has(i)]))
            .collect();
        let digest = Sha256::digest(Value::from(rows).to_string());
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let pictures = match &self.source {
            Source::Files(_) => json!("files"),
            Source::Pocket { split, seed, size } => json!(["pocket", split.name(), seed, size]),
        };
        let missing: Vec<&str> = (0..self.set.rows().len())
            .filter(|row| !self.source.has(*row))
            .map(|row| self.set.rows()[row].image.as_str())
            .collect();
        let defects: Vec<String> = self
            .set
            .defects()
            .iter()
            .map(|defect| format!("row {}: {}: {}", defect.row, defect.kind.name(), defect.detail))
            .collect();
        let mut decides = json!({
            "task": "coco",
            "version": env!("CARGO_PKG_VERSION"),
            "seed": self.seed,
            "dataset": {
                "name": self.set.name(),
                "items": self.cells(None).len(),
                "rows": self.set.rows().len(),
                "digest": digest,
                "pictures": pictures,
                "missing": missing,
                "defects": defects,
            },
            "defenses": self.models.iter()
                .map(|model| json!({ "name": model.defense, "subject": model.subject }))
                .collect::<Vec<_>>(),
            "crafted": self.crafted.iter().map(CraftedSet::decides).collect::<Vec<_>>(),
            "prompts": { "caption": self.caption, "question": self.question },
            "decoding": "greedy",
            "judge": "words",
        });
        if let (Some(all), Value::Object(more)) = (decides.as_object_mut(), more) {
            all.extend(more);
        }
        decides
    }

    /// The number of items in a shard, or in the whole run: pictures times models.
    pub fn items(&self, shard: Option<(usize, usize)>) -> usize {
        self.cells(shard).len()
    }

    fn cells(&self, shard: Option<(usize, usize)>) -> Vec<Cell> {
        let rows = self.set.rows().iter().enumerate();
        let rows: Vec<Option<&str>> =
            rows.map(|(i, row)| self.source.has(i).then_some(row.image.as_str())).collect();
        Cell::all(&self.models, &self.crafted, &rows, shard)
    }

    fn index(&self, cell: Cell) -> usize {
        cell.index(self.crafted.len(), self.set.rows().len())
    }

    /// Asks what has not been asked yet. `load` loads a model when its turn comes; one is held at a time.
    /// `llm` judges the responses as well.
    ///
    /// # Errors
    /// If a model cannot be loaded or asked, or the run's folder cannot be written. A picture that
    /// cannot be read or that the model refuses is an item that failed, with its reason.
    pub fn run(
        &self,
        run: &mut Run<CocoLine>,
        load: &mut dyn FnMut(usize) -> Result<Box<dyn Speaker>>,
        llm: Option<&LlmJudge>,
        told: &mut dyn FnMut(&CocoProgress),
    ) -> Result<CocoSummary> {
        let words = WordJudge::new()?;
        let cells = self.cells(run.manifest().shard);
        let of = cells.len();
        for (i, spoken) in self.models.iter().enumerate() {
            let pending: Vec<Cell> =
                cells.iter().copied().filter(|cell| cell.model == i && !run.has(self.index(*cell))).collect();
            if pending.is_empty() {
                continue;
            }
            let progress = |done: usize| CocoProgress { done, of, defense: spoken.defense.clone() };
            told(&progress(run.done()));
            let speaker = load(i)?;
            for part in pending.chunks(self.batch.max(1)) {
                let lines = self.ask(speaker.as_ref(), &words, part)?;
                run.append(&lines)?;
                told(&progress(run.done()));
            }
        }
        summarise(run, llm)
    }

    fn picture(&self, cell: Cell) -> Result<RgbImage> {
        let name = &self.set.rows()[cell.row].image;
        match cell.crafted.and_then(|i| self.crafted.get(i)) {
            Some(set) => decode_file(set.picture(name)?, &self.limits),
            None => self.source.picture(cell.row, name, &self.limits),
        }
    }

    fn ask(&self, speaker: &dyn Speaker, words: &WordJudge, part: &[Cell]) -> Result<Vec<CocoLine>> {
        let pictures: Vec<_> = part.iter().map(|cell| self.picture(*cell)).collect();
        let mut asked = Vec::new();
        let mut of = Vec::new();
        for (i, (cell, picture)) in part.iter().zip(&pictures).enumerate() {
            let Ok(picture) = picture else { continue };
            let row = &self.set.rows()[cell.row];
            let prompt = self.caption.prompt.clone();
            asked.push(Asked { picture, prompt, max_tokens: self.caption.max_tokens });
            of.push((i, None));
            for question in row.asked() {
                let prompt = self.question.ask(question);
                asked.push(Asked { picture, prompt, max_tokens: self.question.max_tokens });
                of.push((i, Some(question.clone())));
            }
        }
        let answers = speaker.answers(&asked)?;
        let mut lines: Vec<CocoLine> = part
            .iter()
            .zip(&pictures)
            .map(|(cell, picture)| self.line(*cell, picture.as_ref().err().map(ToString::to_string)))
            .collect();
        for ((asked, (i, question)), answer) in asked.iter().zip(of).zip(answers) {
            let Some(line) = lines.get_mut(i) else { continue };
            match answer {
                Ok(response) => {
                    let case = Case {
                        response: response.clone(),
                        original: line.original.clone(),
                        target: line.target.clone(),
                        question: question.clone(),
                    };
                    line.responses.push(CocoResponse {
                        task: if question.is_some() { "vqa" } else { "caption" }.into(),
                        prompt: asked.prompt.clone(),
                        question,
                        verdict: words.verdict(&case),
                        response,
                    });
                }
                Err(reason) => {
                    line.error.get_or_insert(reason);
                }
            }
        }
        for line in lines.iter_mut().filter(|line| line.error.is_some()) {
            // Half a picture is no item.
            line.responses.clear();
        }
        Ok(lines)
    }

    fn line(&self, cell: Cell, error: Option<String>) -> CocoLine {
        let row = &self.set.rows()[cell.row];
        let set = cell.crafted.and_then(|i| self.crafted.get(i));
        let attacked = set.and_then(|set| set.attacked(&self.models[cell.model].subject));
        let kind =
            attacked.as_ref().map_or("clean".to_string(), |a| format!("{} {} {}", a.attack, a.eps, a.threat));
        let defense = self.models[cell.model].defense.clone();
        CocoLine {
            index: self.index(cell),
            id: format!("{defense}/{kind}/{}#{}", row.image, cell.row),
            row: cell.row,
            image: row.image.clone(),
            original: row.keyword.clone(),
            target: row.target.clone(),
            defense,
            attacked,
            error,
            references: self.references.get(&row.image).cloned().unwrap_or_default(),
            responses: Vec::new(),
        }
    }
}

/// What a run comes to, from its lines and its manifest alone; `llm` judges the responses as well.
///
/// # Errors
/// If a line is damaged, or captions cannot be scored.
pub fn summarise(run: &Run<CocoLine>, llm: Option<&LlmJudge>) -> Result<CocoSummary> {
    let mut all: Vec<CocoLine> = run.lines()?.collect::<Result<_>>()?;
    all.sort_by_key(|line| line.index);
    let manifest = run.manifest();
    let dataset = &manifest.decides["dataset"];
    let texts = |key: &str| -> Vec<String> {
        let list = dataset[key].as_array().into_iter().flatten();
        list.filter_map(|text| text.as_str().map(String::from)).collect()
    };
    let (missing, mut flags) = (texts("missing"), texts("defects"));
    if !missing.is_empty() {
        flags.push(format!(
            "{} of {} pictures are not there and were not asked about",
            missing.len(),
            dataset["rows"]
        ));
    }
    let (rows, mut verdicts) = figures(dataset["name"].as_str().unwrap_or_default(), &all)?;
    let mut agreement = None;
    if let Some(judge) = llm {
        let answers = verdicts_of(judge, &all)?;
        let words = all.iter().flat_map(|line| line.responses.iter().map(|found| found.verdict));
        let both = answers.iter().zip(words).filter_map(|(llm, words)| Some((words, llm.verdict()?)));
        let found = Agreement::new(both);
        let failed = answers.iter().filter(|answer| answer.verdict().is_none()).count();
        agreement = Some(json!({ "agreement": found, "failed": failed, "judge": judge.decides() }));
        let name = judge.decides()["model"].as_str().unwrap_or("llm").to_string();
        verdicts.extend(llm_verdicts(&name, &all, &answers));
    }
    let summary = CocoSummary {
        summary: Summary {
            schema_version: Summary::VERSION,
            fingerprint: manifest.fingerprint.clone(),
            run: manifest.decides.clone(),
            shard: manifest.shard,
            items: manifest.items,
            done: all.len(),
            failed: all.iter().filter(|line| line.error.is_some()).count(),
            rows,
            flags,
        },
        verdicts,
        agreement,
        missing,
    };
    write_whole(&run.folder().join("summary.json"), &summary)?;
    Ok(summary)
}

/// One per response, in the order of the lines.
fn verdicts_of(judge: &LlmJudge, all: &[CocoLine]) -> Result<Vec<LlmAnswer>> {
    let cases: Vec<Case> = all
        .iter()
        .flat_map(|line| {
            line.responses.iter().map(|found| Case {
                response: found.response.clone(),
                original: line.original.clone(),
                target: line.target.clone(),
                question: found.question.clone(),
            })
        })
        .collect();
    judge.judge_all(&cases, &|_| {})
}

/// The defence and the attack of some lines.
type Group<'a> = (&'a str, Option<&'a CocoAttack>);

/// Groups in the order in which they come.
fn groups(all: &[CocoLine]) -> Vec<Group<'_>> {
    let mut found: Vec<Group<'_>> = Vec::new();
    for line in all {
        let group = (line.defense.as_str(), line.attacked.as_ref());
        if !found.contains(&group) {
            found.push(group);
        }
    }
    // Clean figures first.
    found.sort_by_key(|(_, attacked)| attacked.is_some());
    found
}

const TASKS: [&str; 2] = ["caption", "vqa"];

/// Every figure of a run, from its lines alone.
///
/// # Errors
/// If captions cannot be scored.
pub fn figures(dataset: &str, all: &[CocoLine]) -> Result<(Vec<Row>, Vec<Verdicts>)> {
    let good = || all.iter().filter(|line| line.error.is_none());
    let clean: HashMap<(&str, usize), &CocoLine> = good()
        .filter(|line| line.attacked.is_none())
        .map(|line| ((line.defense.as_str(), line.row), line))
        .collect();
    let (mut rows, mut verdicts) = (Vec::new(), Vec::new());
    for (defense, attacked) in groups(all) {
        let own =
            || good().filter(|line| (line.defense.as_str(), line.attacked.as_ref()) == (defense, attacked));
        for task in TASKS {
            let (mut n, mut correct) = (0, 0);
            let mut counts: BTreeMap<String, usize> =
                Verdict::ALL.iter().map(|verdict| (verdict.name().to_string(), 0)).collect();
            let mut captions = Vec::new();
            for line in own() {
                let before = clean.get(&(defense, line.row));
                for (i, found) in line.responses.iter().enumerate().filter(|(_, found)| found.task == task) {
                    n += 1;
                    *counts.entry(found.verdict.name().to_string()).or_default() += 1;
                    let right = |found: &CocoResponse| found.verdict == Verdict::Original;
                    // What is wrong of the clean picture is never robust.
                    let held = attacked.is_none()
                        || before.and_then(|line| line.responses.get(i)).is_some_and(right);
                    correct += usize::from(right(found) && held);
                    if i == 0 && !line.references.is_empty() {
                        captions.push(Captioned::new(&found.response, &line.references));
                    }
                }
            }
            if n == 0 {
                continue;
            }
            rows.push(Row {
                task: task.into(),
                dataset: dataset.into(),
                defense: defense.into(),
                attacked: attacked.map(|attack| Attacked {
                    attack: attack.attack.clone(),
                    eps: Some(attack.eps),
                    threat: attack.threat.clone(),
                    pictures: Precision::EightBit,
                }),
                n,
                correct,
                mean_per_class: None,
            });
            let scores: Option<CaptionScores> =
                if captions.is_empty() { None } else { Some(score(&captions)?) };
            verdicts.push(Verdicts {
                task: task.into(),
                defense: defense.into(),
                attacked: attacked.cloned(),
                judge: "words".into(),
                n,
                counts,
                failed: 0,
                captions: scores.map(|scores| json!({ "n": captions.len(), "scores": scores })),
            });
        }
    }
    Ok((rows, verdicts))
}

fn llm_verdicts(judge: &str, all: &[CocoLine], answers: &[LlmAnswer]) -> Vec<Verdicts> {
    let mut given = answers.iter();
    let by_line: Vec<(&CocoLine, Vec<(&CocoResponse, &LlmAnswer)>)> =
        all.iter().map(|line| (line, line.responses.iter().zip(given.by_ref()).collect())).collect();
    let mut verdicts = Vec::new();
    for (defense, attacked) in groups(all) {
        for task in TASKS {
            let own = by_line
                .iter()
                .filter(|(line, _)| (line.defense.as_str(), line.attacked.as_ref()) == (defense, attacked));
            let found: Vec<Option<Verdict>> = own
                .flat_map(|(_, found)| found.iter().filter(|(response, _)| response.task == task))
                .map(|(_, answer)| answer.verdict())
                .collect();
            if found.is_empty() {
                continue;
            }
            let mut counts: BTreeMap<String, usize> =
                Verdict::ALL.iter().map(|verdict| (verdict.name().to_string(), 0)).collect();
            for verdict in found.iter().flatten() {
                *counts.entry(verdict.name().to_string()).or_default() += 1;
            }
            let failed = found.iter().filter(|verdict| verdict.is_none()).count();
            verdicts.push(Verdicts {
                task: task.into(),
                defense: defense.into(),
                attacked: attacked.cloned(),
                judge: judge.into(),
                n: found.len() - failed,
                counts,
                failed,
                captions: None,
            });
        }
    }
    verdicts
}
