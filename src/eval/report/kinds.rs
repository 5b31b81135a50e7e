//! Runs of every kind, from their folders.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::super::coco::{CocoAttack, Verdicts};
use super::super::features::FeatureSummary;
use super::super::questions::QuestionSummary;
use super::super::suspicion::SuspicionSummary;
use super::super::sweep;
use super::super::vattack::VAttackSummary;
use super::super::{Precision, Row, Summary, wilson};
use super::analyses::{Analysis, NAMES};
use super::grid::{Cell, Drawing, Grid, GridLine, Group};
use super::{Run, count, name};
use crate::attack::{Eps, Threat};
use crate::page::{printable, undefended_or};
use crate::{Error, Result};

/// A drawing larger than this is left out of a page, in bytes.
const LARGEST: u64 = 4 << 20;
const SWEEP: &str = "sweep.json";

/// What a path stands for.
pub(super) enum Given {
    Run(Box<Run>),
    Analysis(Analysis),
}

/// Figures of one kind on one data set stand in one table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Topic {
    Retrieval,
    Sweep,
    Said,
    Pope,
    Vqa,
    VAttack,
    Features,
    Suspicion,
}

/// A figure that is no [`Row`], or a row that stands in a table of its own kind.
#[derive(Debug, Clone)]
pub(super) struct Figure {
    pub topic: Topic,
    pub task: String,
    pub dataset: String,
    pub defense: String,
    /// `None` for clean pictures.
    pub by: Option<By>,
    pub n: usize,
    /// What is measured, with its unit.
    pub measure: String,
    pub value: f64,
    pub correct: Option<usize>,
    pub interval: Option<(f64, f64)>,
    /// Digits behind the point.
    pub digits: usize,
}

/// An attack with its threat model, which no attacked figure goes without.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct By {
    pub attack: String,
    pub eps: Option<Eps>,
    pub threat: Threat,
    pub pictures: Precision,
}

impl By {
    /// `pgd @ 4/255`, `cw`.
    pub fn label(&self) -> String {
        self.eps.map_or_else(|| self.attack.clone(), |eps| format!("{} @ {eps}", self.attack))
    }

    pub fn surrogate(&self) -> Option<&str> {
        match &self.threat {
            Threat::Transfer { surrogate } => Some(surrogate),
            Threat::Adaptive => None,
        }
    }

    // What `radapt attack` and the runs on its pictures work on are files.
    fn of_files(attack: &CocoAttack) -> Self {
        Self {
            attack: attack.attack.clone(),
            eps: Some(attack.eps),
            threat: attack.threat.clone(),
            pictures: Precision::EightBit,
        }
    }
}

impl Figure {
    /// As a line of `figures` in a report's JSON.
    pub fn json(&self, number: usize, run: &Run) -> Value {
        let by = self.by.as_ref();
        json!({
            "run": number, "fingerprint": run.summary.fingerprint, "model": run.model, "task": self.task,
            "dataset": self.dataset, "defense": self.defense, "attack": by.map(|by| &by.attack),
            "eps": by.and_then(|by| by.eps), "threat": by.map(|by| by.threat.kind()),
            "surrogate": by.and_then(By::surrogate), "pictures": by.map(|by| by.pictures), "n": self.n,
            "measure": self.measure, "value": self.value, "correct": self.correct,
            "low": self.interval.map(|interval| interval.0), "high": self.interval.map(|interval| interval.1),
        })
    }
}

impl Topic {
    fn title(self) -> &'static str {
        match self {
            Self::Retrieval => "Retrieval",
            Self::Sweep => "Sweep",
            Self::Said => "What the answers name",
            Self::Pope => "Questions answered with yes or no (POPE)",
            Self::Vqa => "Questions (VQA accuracy)",
            Self::VAttack => "What V-Attack’s pictures are called",
            Self::Features => "How far an attack moves features",
            Self::Suspicion => "Telling adversarial pictures by their suspicion score",
        }
    }

    fn lead(self) -> &'static str {
        match self {
            Self::Retrieval => {
                "Share of pictures (image to text) and of captions (text to image) whose partner is among the first k, in \
                 percent, with its Wilson 95 % interval. Under attack it must be found with the clean pictures as well."
            }
            Self::Sweep => {
                "Share of pictures that came out right in percent, with its Wilson 95 % interval, by the setting of the \
                 defence; under attack, right on the clean picture as well."
            }
            Self::Said => {
                "Share of answers in percent that name the object in the picture, the attack’s target, both or neither, by \
                 the judge. Attacked ones count whatever was said of the clean picture, unlike in the tables of right answers."
            }
            Self::Pope => {
                "In percent. “Right” has its Wilson 95 % interval, and under attack needs the answer to the clean picture to \
                 be right as well; the others are about the answers as they are. Yes to every question gives a recall of 100."
            }
            Self::Vqa => {
                "VQAv2’s accuracy in percent with the 95 % interval of the mean; under attack of the worse of both answers."
            }
            Self::VAttack => {
                "Share of pictures in percent, with its Wilson 95 % interval, that a zero-shot CLIP calls by the name of the \
                 object in them, and by that of the attack’s target."
            }
            Self::Features => {
                "Mean cosine between a model’s features of the adversarial and of the clean picture: 1 is unmoved. “Without \
                 the defence” is the same on the undefended tower, which an adaptive attack does not aim at."
            }
            Self::Suspicion => {
                "How often an adversarial picture is more suspicious than a clean one (AUC, 50 % is chance, with its 95 % \
                 interval), and the share of adversarial pictures above a threshold that lets through all but the named \
                 share of clean ones. Half of the clean pictures set the thresholds, the figures are of the other half."
            }
        }
    }
}

/// Reads what is at a path.
pub(super) fn read(path: &Path) -> Result<Vec<Given>> {
    if !path.is_dir() {
        return Ok(vec![file(path)?]);
    }
    for name in [SWEEP, "summary.json"] {
        if path.join(name).is_file() {
            return Ok(vec![file(&path.join(name))?.called(path)]);
        }
    }
    let analyses: Vec<PathBuf> =
        NAMES.iter().map(|name| path.join(format!("{name}.json"))).filter(|file| file.is_file()).collect();
    if analyses.is_empty() {
        let reason = "expected summary.json of a run that has one, sweep.json, or an analysis such as \
                      cka.json, found none of them";
        return Err(Error::config(path, reason));
    }
    analyses.iter().map(|path| file(path)).collect()
}

impl Given {
    /// A run is called by its folder, as it was given.
    fn called(mut self, path: &Path) -> Self {
        if let Self::Run(run) = &mut self {
            run.path = path.to_path_buf();
        }
        self
    }
}

fn file(path: &Path) -> Result<Given> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
    let json: Value = serde_json::from_str(&text).map_err(|e| Error::config(path, e.to_string()))?;
    if json["schema_version"] != Summary::VERSION {
        let found = &json["schema_version"];
        return Err(Error::config(
            path,
            format!("schema_version: expected {}, found {found}", Summary::VERSION),
        ));
    }
    if !json["analysis"].is_null() {
        return Ok(Given::Analysis(Analysis::read(path, &json)?));
    }
    if json["axes"].is_array() {
        return Ok(Given::Run(Box::new(read_sweep(path, &json)?)));
    }
    let task = json["run"]["task"].as_str();
    threats_named(path, "rows", &json["rows"])?;
    let run = match task {
        Some("zero-shot") => Run::new(path.into(), of(path, &json)?)?,
        Some("retrieve") => Run { is_pivot: true, ..Run::new(path.into(), of(path, &json)?)? },
        Some("coco") => {
            let attacks = json["verdicts"].as_array().into_iter().flatten();
            let attacks: Vec<Value> = attacks.map(|v| v["attacked"].clone()).collect();
            threats_named(path, "verdicts", &attacks.into())?;
            let more: Said = of(path, &json)?;
            let run = Run::new(path.into(), of(path, &json)?)?;
            let dataset = name(&run.summary.run["dataset"]).unwrap_or_default();
            Run { figures: more.verdicts.iter().flat_map(|v| said(v, &dataset)).collect(), ..run }
        }
        Some("questions") => {
            let found: QuestionSummary = of(path, &json)?;
            let figures = found.rows.iter().flat_map(answered).collect();
            let mut run = bare(path, &json)?;
            if found.missing > 0 {
                run.summary.flags.push(format!("the pictures of {} questions are not there", found.missing));
            }
            Run { figures, ..run }
        }
        Some("v-attack") => {
            let found: VAttackSummary = of(path, &json)?;
            let figures = found.rows.iter().flat_map(called).collect();
            Run { figures, ..bare(path, &json)? }
        }
        Some("features") => {
            let found: FeatureSummary = of(path, &json)?;
            let figures = found.rows.iter().flat_map(moved).collect();
            Run { figures, ..bare(path, &json)? }
        }
        Some("suspicion") => {
            let found: SuspicionSummary = of(path, &json)?;
            let subject = &found.run["subject"]["defense"];
            let defense = subject.as_str().unwrap_or("none");
            let figures = found.rows.iter().flat_map(|row| suspected(row, defense)).collect();
            Run { figures, ..bare(path, &json)? }
        }
        other => {
            let found = other.map_or("none".into(), |task| format!("`{task}`"));
            let reason = format!(
                "run.task: expected zero-shot, retrieve, coco, questions, v-attack, features or suspicion, found {found}"
            );
            return Err(Error::config(path, reason));
        }
    };
    Ok(Given::Run(Box::new(run)))
}

/// What of a coco run's summary is not in [`Summary`].
#[derive(Deserialize)]
struct Said {
    verdicts: Vec<Verdicts>,
}

fn of<T: DeserializeOwned>(path: &Path, json: &Value) -> Result<T> {
    // From text, where numbers are read as they are in files.
    serde_json::from_str(&json.to_string()).map_err(|e| Error::config(path, e.to_string()))
}

/// A run whose figures are no rows.
fn bare(path: &Path, json: &Value) -> Result<Run> {
    let mut json = json.clone();
    json["rows"] = Value::Array(Vec::new());
    json["flags"] = Value::Array(Vec::new());
    Run::new(path.into(), of(path, &json)?)
}

/// That nothing attacked is without a threat model. Reading alone would take such a row for a clean
/// one where its kind has the attack as an option.
pub(super) fn threats_named(path: &Path, place: &str, rows: &Value) -> Result<()> {
    for (i, row) in rows.as_array().into_iter().flatten().enumerate() {
        let is = |key: &str| !row[key].is_null() && row[key] != "none";
        let wrong = |what: &str| Err(Error::config(path, format!("{place}[{i}]: {what}")));
        match row["threat"].as_str() {
            None if is("attack") || is("eps") => {
                return wrong("threat: expected transfer or adaptive of an attacked figure, found none");
            }
            Some("transfer") if !row["surrogate"].is_string() => {
                return wrong("surrogate: expected one for transfer, found none");
            }
            Some("transfer" | "adaptive") | None => {}
            Some(_) => return wrong("threat: expected transfer or adaptive"),
        }
    }
    Ok(())
}

/// A drawing beside a file; why it is left out, if it is.
pub(super) fn drawing(path: &Path, title: &str) -> Result<std::result::Result<Drawing, String>> {
    let Ok(meta) = std::fs::metadata(path) else {
        return Ok(Err(format!("there is no drawing {}", path.display())));
    };
    if meta.len() > LARGEST {
        return Ok(Err(format!(
            "the drawing {} is left out: it has {} MB, the most is {}",
            path.display(),
            meta.len() >> 20,
            LARGEST >> 20
        )));
    }
    let svg = std::fs::read(path).map_err(|e| Error::read(path, e))?;
    Ok(Ok(Drawing { title: title.into(), path: path.into(), svg }))
}

fn read_sweep(path: &Path, json: &Value) -> Result<Run> {
    #[derive(Deserialize)]
    struct Named {
        name: String,
        point: sweep::Point,
    }
    #[derive(Deserialize)]
    struct Document {
        points: Vec<Named>,
        #[serde(default)]
        plots: Vec<String>,
    }
    let document: Document = of(path, json)?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let run = Run::new(path.into(), Summary::read(&folder.join("run"))?)?;
    let mut notes = Vec::new();
    let mut drawings = Vec::new();
    for file in &document.plots {
        // Names of files beside the sweep and nothing else.
        if Path::new(file).file_name() != Some(file.as_ref()) {
            return Err(Error::config(path, format!("plots: names a file outside its folder: `{file}`")));
        }
        let title = format!("Percent right, clean and under each threat model: {}", file.replace(".svg", ""));
        match drawing(&folder.join(file), &title)? {
            Ok(drawing) => drawings.push(drawing),
            Err(why) => notes.push(why),
        }
    }
    let points = document.points.into_iter().map(|named| (named.name, named.point)).collect();
    Ok(Run { is_pivot: true, points, drawings, notes, ..run })
}

fn said(verdicts: &Verdicts, dataset: &str) -> Vec<Figure> {
    let figure = |measure: &str, value: f64, correct: Option<usize>| Figure {
        topic: Topic::Said,
        task: format!("{}, judged by {}", verdicts.task, verdicts.judge),
        dataset: dataset.into(),
        defense: verdicts.defense.clone(),
        by: verdicts.attacked.as_ref().map(By::of_files),
        n: verdicts.n,
        measure: measure.into(),
        value,
        correct,
        interval: None,
        digits: 1,
    };
    let mut out: Vec<Figure> = ["original", "target", "both", "neither"]
        .into_iter()
        .map(|kind| {
            let count = verdicts.counts.get(kind).copied().unwrap_or_default();
            figure(&format!("{kind}, %"), percent(count, verdicts.n), Some(count))
        })
        .collect();
    let scores = verdicts.captions.as_ref().map(|captions| &captions["scores"]);
    for (key, measure) in [("cider", "CIDEr"), ("bleu4", "BLEU-4")] {
        out.extend(scores.and_then(|scores| scores[key].as_f64()).map(|value| figure(measure, value, None)));
    }
    out
}

fn answered(row: &super::super::questions::QuestionRow) -> Vec<Figure> {
    let figure = |measure: &str, value: f64, interval| Figure {
        topic: if row.task == "pope" { Topic::Pope } else { Topic::Vqa },
        task: row.task.clone(),
        dataset: row.dataset.clone(),
        defense: row.defense.clone(),
        by: row.attacked.as_ref().map(By::of_files),
        n: row.n,
        measure: measure.into(),
        value,
        correct: None,
        interval,
        digits: 1,
    };
    let mut out = vec![figure("right, %", row.value, Some((row.low, row.high)))];
    if let Some(pope) = &row.pope {
        for (measure, value) in [
            ("F1, %", pope.f1),
            ("precision, %", pope.precision),
            ("recall, %", pope.recall),
            ("yes, %", pope.yes_ratio),
        ] {
            out.push(figure(measure, value, None));
        }
    }
    out
}

fn called(row: &super::super::vattack::VAttackRow) -> Vec<Figure> {
    let by = row.threat.as_ref().map(|threat| By {
        attack: row.attack.clone(),
        eps: row.eps,
        threat: threat.clone(),
        pictures: Precision::EightBit,
    });
    [("by the object’s name, %", row.source), ("by the target’s name, %", row.target)]
        .into_iter()
        .map(|(measure, share)| Figure {
            topic: Topic::VAttack,
            task: "v-attack".into(),
            dataset: row.dataset.clone(),
            defense: row.defense.clone(),
            by: by.clone(),
            n: row.n,
            measure: measure.into(),
            value: share.value,
            correct: Some(share.count),
            interval: Some(share.interval),
            digits: 1,
        })
        .collect()
}

fn moved(row: &super::super::features::FeatureRow) -> Vec<Figure> {
    [("mean cosine", row.value), ("without the defence", row.value_undefended)]
        .into_iter()
        .map(|(measure, value)| Figure {
            topic: Topic::Features,
            task: row.task.clone(),
            dataset: row.dataset.clone(),
            defense: row.defense.clone(),
            by: Some(By {
                attack: row.attack.clone(),
                eps: Some(row.eps),
                threat: row.threat.clone(),
                pictures: if row.pictures == "float" { Precision::Float } else { Precision::EightBit },
            }),
            n: row.n,
            measure: measure.into(),
            value,
            correct: None,
            interval: None,
            digits: 3,
        })
        .collect()
}

fn suspected(row: &super::super::suspicion::Figure, defense: &str) -> Vec<Figure> {
    let figure = |measure: String, value, interval| Figure {
        topic: Topic::Suspicion,
        task: row.task.clone(),
        dataset: row.dataset.clone(),
        defense: defense.into(),
        by: Some(By::of_files(&row.attacked)),
        n: row.n,
        measure,
        value,
        correct: None,
        interval,
        digits: 1,
    };
    let mut out = vec![figure("AUC, %".into(), row.auc, Some(row.auc_interval))];
    for point in row.at.iter().filter(|point| point.threshold.is_some()) {
        let measure = format!("caught at {} % of clean, %", point.asked);
        out.push(figure(measure, point.caught, Some(point.interval)));
    }
    out
}

/// Rows of retrieval and sweeps, as figures of those kinds.
fn pivoted(topic: Topic, row: &Row) -> Figure {
    Figure {
        topic,
        task: if topic == Topic::Retrieval { "retrieve".into() } else { row.task.clone() },
        dataset: row.dataset.clone(),
        defense: row.defense.clone(),
        by: row.attacked.as_ref().map(|a| By {
            attack: a.attack.clone(),
            eps: a.eps,
            threat: a.threat.clone(),
            pictures: a.pictures,
        }),
        n: row.n,
        measure: if topic == Topic::Retrieval { format!("{}, %", row.task) } else { "right, %".into() },
        value: row.value(),
        correct: Some(row.correct),
        interval: Some(wilson(row.correct, row.n)),
        digits: 1,
    }
}

fn percent(count: usize, n: usize) -> f64 {
    100.0 * count as f64 / n.max(1) as f64
}

/// All figures that are not in the sections of right answers, with their runs' indices.
pub(super) fn figures(runs: &[Run]) -> Vec<(usize, Figure)> {
    let mut out = Vec::new();
    for (i, run) in runs.iter().enumerate() {
        if run.is_pivot {
            let topic = if run.points.is_empty() { Topic::Retrieval } else { Topic::Sweep };
            out.extend(run.summary.rows.iter().map(|row| (i, pivoted(topic, row))));
        }
        out.extend(run.figures.iter().map(|figure| (i, figure.clone())));
    }
    out
}

/// The figures of one kind on one data set, as a table each.
pub(super) fn grids(runs: &[Run]) -> Vec<Grid> {
    let all = figures(runs);
    let mut places: Vec<(Topic, &str)> = Vec::new();
    for (_, figure) in &all {
        let place = (figure.topic, figure.dataset.as_str());
        if !places.contains(&place) {
            places.push(place);
        }
    }
    places.iter().map(|&(topic, dataset)| grid(runs, &all, topic, dataset)).collect()
}

fn grid(runs: &[Run], all: &[(usize, Figure)], topic: Topic, dataset: &str) -> Grid {
    let here: Vec<&(usize, Figure)> =
        all.iter().filter(|(_, f)| f.topic == topic && f.dataset == dataset).collect();
    let mut measures: Vec<&str> = Vec::new();
    let mut lines: Vec<(usize, &Figure, Vec<&Figure>)> = Vec::new();
    for (run, figure) in &here {
        if !measures.contains(&figure.measure.as_str()) {
            measures.push(&figure.measure);
        }
        let same = |(other, first, _): &&mut (usize, &Figure, Vec<&Figure>)| {
            (*other, &first.task, &first.defense, &first.by)
                == (*run, &figure.task, &figure.defense, &figure.by)
        };
        match lines.iter_mut().find(same) {
            Some((.., found)) => found.push(figure),
            None => lines.push((*run, figure, vec![figure])),
        }
    }
    let several = lines.iter().any(|(run, ..)| *run != lines[0].0);
    let has_models = lines.iter().any(|(run, ..)| runs[*run].model != runs[lines[0].0].model);
    let has_tasks = topic == Topic::Said;
    let mut heads: Vec<(String, bool)> = Vec::new();
    for (head, is) in [
        ("Model", has_models),
        ("Task", has_tasks),
        (if topic == Topic::Sweep { "Setting" } else { "Defence" }, true),
        ("Attack", true),
        ("Threat", true),
        ("Surrogate", true),
        ("Pictures", true),
        ("Run", several),
    ] {
        if is {
            heads.push((head.into(), false));
        }
    }
    heads.push(("n".into(), true));
    heads.extend(measures.iter().map(|measure| ((*measure).to_owned(), true)));
    let mut groups: Vec<Group> = Vec::new();
    for (run, first, found) in &lines {
        let mark = if runs[*run].is_complete() { "" } else { "*" };
        let mut cells = Vec::new();
        if has_models {
            cells.push(Cell::new(runs[*run].model.as_str()));
        }
        if has_tasks {
            cells.push(Cell::new(first.task.as_str()));
        }
        cells.push(Cell::new(undefended_or(&first.defense)));
        match &first.by {
            None => {
                cells.push(Cell::new("clean"));
                cells.extend([Cell::dash(), Cell::dash(), Cell::dash()]);
            }
            Some(by) => cells.extend([
                Cell::new(by.label()),
                Cell::threat(Some(&by.threat.to_string())),
                by.surrogate().map_or_else(Cell::dash, Cell::new),
                Cell::new(by.pictures.to_string()),
            ]),
        }
        if several {
            cells.push(Cell::new((run + 1).to_string()));
        }
        cells.push(Cell::new(count(found.iter().map(|figure| figure.n))));
        for measure in &measures {
            let figure = found.iter().find(|figure| figure.measure == *measure && figure.n > 0);
            let mut cell = figure.map_or_else(Cell::dash, |figure| match figure.interval {
                Some(interval) => Cell::interval(figure.value, interval, figure.digits),
                None => Cell::number(figure.value, figure.digits),
            });
            if cell.value.is_some() {
                cell.text += mark;
            }
            cells.push(cell);
        }
        // The eye finds a model's lines together.
        let title = (has_models || several).then(|| {
            let run = &runs[*run];
            format!("{}: {}", run.model, printable(&run.path.display().to_string()))
        });
        match groups.last_mut() {
            Some(group) if group.title == title => group.lines.push(GridLine::new(cells)),
            _ => groups.push(Group { title, lines: vec![GridLine::new(cells)] }),
        }
    }
    let mut foot = Vec::new();
    if lines.iter().any(|(run, ..)| !runs[*run].is_complete()) {
        foot.push("* From a run that is not complete.".into());
    }
    let mut seen: Vec<usize> = lines.iter().map(|(run, ..)| *run).collect();
    seen.dedup();
    let drawings = if topic == Topic::Sweep {
        seen.iter().flat_map(|run| runs[*run].drawings.iter().cloned()).collect()
    } else {
        Vec::new()
    };
    Grid {
        title: format!("{}: {dataset}", topic.title()),
        lead: vec![topic.lead().into()],
        heads,
        groups,
        foot,
        drawings,
    }
}

/// Defences of these kinds that were attacked by transfer and not adaptively, each with where.
pub(super) fn not_adaptive(runs: &[Run]) -> Vec<String> {
    let all = figures(runs);
    let mut out: Vec<String> = Vec::new();
    for (run, figure) in &all {
        let Some(By { threat: Threat::Transfer { .. }, .. }) = &figure.by else { continue };
        let adaptive = all.iter().any(|(other, f)| {
            (f.topic, &f.dataset, &f.defense) == (figure.topic, &figure.dataset, &figure.defense)
                && runs[*other].model == runs[*run].model
                && f.by.as_ref().is_some_and(|by| by.threat == Threat::Adaptive)
        });
        let note = format!(
            "{} on {}: {} was attacked by transfer alone, which says nothing about an attacker who knows the defence.",
            figure.topic.title(),
            figure.dataset,
            figure.defense
        );
        // Verdicts are about the answers that are in the sections of right answers, with this note.
        if figure.defense != "none" && !adaptive && figure.topic != Topic::Said && !out.contains(&note) {
            out.push(note);
        }
    }
    out
}
