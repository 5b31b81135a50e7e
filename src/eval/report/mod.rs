//! Runs, sweeps and analyses side by side, and beside the paper's tables: Markdown, CSV, JSON, and one
//! HTML page with plots.

mod analyses;
mod arrange;
mod grid;
mod kinds;
mod markdown;
mod page;
mod paper;
mod plot;
mod table;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::sweep::Point;
use super::{Row, Summary};
use crate::page::{printable, shorten, undefended_or};
use crate::{Error, Result};
use analyses::Analysis;
use arrange::{Key, sections};
use grid::{Drawing, Grid};
use kinds::{Figure, Given};

/// What tells a report from other files, in every format but CSV, which has its header.
const MARK: &str = "radapt eval report";
/// The longest setting printed, in characters.
const LONGEST: usize = 300;

/// Figures of one or several runs.
///
/// No robust figure leaves it without its threat model and, for transfer, its surrogate. What casts
/// doubt on a figure comes first: runs that are not complete, items that failed, what the attacks
/// noticed.
#[derive(Debug)]
pub struct Report {
    runs: Vec<Run>,
    analyses: Vec<Analysis>,
    paper: bool,
}

/// A run with its folder.
#[derive(Debug)]
struct Run {
    path: PathBuf,
    model: String,
    summary: Summary,
    /// Whether its rows stand in a table of their kind, not in the sections of right answers.
    is_pivot: bool,
    /// What else it measured.
    figures: Vec<Figure>,
    /// The settings of a sweep, by the names that its rows have for defences.
    points: Vec<(String, Point)>,
    drawings: Vec<Drawing>,
    /// What casts doubt on it, besides its flags.
    notes: Vec<String>,
}

/// What a report is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Tables in GitHub's Markdown.
    Markdown,
    /// One line per figure with all its fields.
    Csv,
    /// One page that needs nothing else, with plots.
    Html,
    /// One document with runs, rows and notes.
    Json,
}

impl Report {
    /// Reads what is at each path: a run's folder or its `summary.json`, of `eval classify`, `retrieve`,
    /// `coco`, `vqa` or `suspicion` or of `attack v-attack` or `features`; a sweep's folder or its
    /// `sweep.json`; an analysis' JSON, or a folder with several.
    ///
    /// # Errors
    /// If one cannot be read or is none of these, an attacked figure has no threat model, and all of
    /// [`Report::new`].
    pub fn read(paths: &[PathBuf]) -> Result<Self> {
        let mut runs = Vec::new();
        let mut analyses: Vec<Analysis> = Vec::new();
        for path in paths {
            for given in kinds::read(path)? {
                match given {
                    Given::Run(run) => runs.push(*run),
                    Given::Analysis(found) => {
                        if analyses.iter().any(|first| first.path == found.path) {
                            let found = format!("`{}` twice", found.path.display());
                            return Err(Error::argument("RUN", "each analysis once", found));
                        }
                        analyses.push(found);
                    }
                }
            }
        }
        Self::join(runs, analyses)
    }

    /// From runs, each with the path to call it by.
    ///
    /// # Errors
    /// If there is none, one is a shard, one is given twice, one does not name its model, or one has
    /// two figures for the same thing.
    pub fn new(runs: Vec<(PathBuf, Summary)>) -> Result<Self> {
        let runs = runs.into_iter().map(|(path, summary)| Run::new(path, summary));
        Self::join(runs.collect::<Result<_>>()?, Vec::new())
    }

    fn join(runs: Vec<Run>, analyses: Vec<Analysis>) -> Result<Self> {
        if runs.is_empty() && analyses.is_empty() {
            return Err(Error::argument("RUN", "at least one run folder", "none"));
        }
        for (i, run) in runs.iter().enumerate() {
            let same = |other: &&Run| other.summary.fingerprint == run.summary.fingerprint;
            if let Some(first) = runs[..i].iter().find(same) {
                let found = format!(
                    "`{}` and `{}`, which are the same run",
                    first.path.display(),
                    run.path.display()
                );
                return Err(Error::argument("RUN", "each run once", found));
            }
        }
        Ok(Self { runs, analyses, paper: false })
    }

    /// The same with the paper's tables as far as there are figures for them, its own figures beside.
    #[must_use]
    pub fn beside_paper(self) -> Self {
        Self { paper: true, ..self }
    }

    /// Whether every run is.
    pub fn is_complete(&self) -> bool {
        self.runs.iter().all(Run::is_complete)
    }

    /// What a reader must know before the figures, in sentences; empty if there is nothing.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for (i, run) in self.runs.iter().enumerate() {
            let Summary { items, done, failed, rows, .. } = &run.summary;
            let number = i + 1;
            if done < items {
                notes.push(format!(
                    "Run {number} is not complete: {done} of {items} items are done. Its figures, marked *, are about those alone."
                ));
            }
            if *failed > 0 {
                notes.push(format!(
                    "Run {number}: {failed} of {done} items could not be scored and are in no figure."
                ));
            }
            if rows.is_empty() && run.figures.is_empty() {
                notes.push(format!("Run {number} has no figures."));
            }
        }
        for (i, run) in self.runs.iter().enumerate() {
            let flags = run.summary.flags.iter().chain(&run.notes);
            notes.extend(flags.map(|flag| format!("Run {} warns: {}", i + 1, printable(flag))));
        }
        for analysis in &self.analyses {
            let name = &analysis.name;
            notes.extend(analysis.notes.iter().map(|note| format!("Analysis {name}: {}", printable(note))));
        }
        if self.paper {
            let strangers = paper::strangers(&self.runs);
            if !strangers.is_empty() {
                notes.push(paper::stand_ins(&strangers));
            }
        }
        for section in sections(&self.runs) {
            let place = format!("{} on {}", section.task, section.dataset);
            let mut sets = section.runs.iter().map(|&run| &self.runs[run].summary.run["dataset"]);
            let first = sets.next();
            if sets.any(|set| Some(set) != first) {
                notes.push(format!(
                    "{place}: the runs are not on the same pictures (`dataset` differs), so compare their figures with care."
                ));
            }
            if section.is_attacked() {
                if !section.lines.iter().any(|line| line.defense == "none") {
                    notes.push(format!(
                        "{place}: no undefended model was measured, so what a defence adds cannot be read off."
                    ));
                }
                for defense in section.not_adaptive() {
                    notes.push(format!(
                        "{place}: {defense} was attacked by transfer alone, which says nothing about an attacker who knows the defence."
                    ));
                }
            }
        }
        notes.extend(kinds::not_adaptive(&self.runs));
        notes
    }

    /// The report in this format.
    ///
    /// # Errors
    /// None with runs read from files.
    pub fn render(&self, format: Format) -> Result<String> {
        match format {
            Format::Markdown => Ok(markdown::markdown(self)),
            Format::Csv => table::csv(self),
            Format::Html => Ok(page::page(self)),
            Format::Json => Ok(format!("{:#}\n", self.json()?)),
        }
    }

    /// The report as `{schema_version, report, complete, notes, runs, rows}`. Each of `rows` is a
    /// [`Row`] with the number and fingerprint of its run and with the run's model. Where there are
    /// any, also `figures`, of what is no share of right answers, `analyses`, and `paper`.
    ///
    /// # Errors
    /// None with runs read from files.
    pub fn json(&self) -> Result<Value> {
        let mut rows = Vec::new();
        for (i, run, row) in self.rows() {
            let mut value = serde_json::to_value(row).map_err(|e| Error::config(&run.path, e.to_string()))?;
            value["run"] = i.into();
            value["fingerprint"] = run.summary.fingerprint.clone().into();
            value["model"] = run.model.clone().into();
            rows.push(value);
        }
        let runs: Vec<Value> = (1..)
            .zip(&self.runs)
            .map(|(i, run)| {
                let Summary { fingerprint, run: settings, items, done, failed, flags, .. } = &run.summary;
                json!({
                    "run": i, "path": run.path.display().to_string(), "fingerprint": fingerprint,
                    "items": items, "done": done, "failed": failed, "complete": run.is_complete(),
                    "flags": flags, "settings": settings,
                })
            })
            .collect();
        let mut out = json!({
            "schema_version": Summary::VERSION, "report": MARK, "complete": self.is_complete(),
            "notes": self.notes(), "runs": runs, "rows": rows,
        });
        let figures: Vec<Value> = self.others().map(|(i, run, figure)| figure.json(i, run)).collect();
        if !figures.is_empty() {
            out["figures"] = figures.into();
        }
        if !self.analyses.is_empty() {
            out["analyses"] = self.analyses.iter().map(Analysis::json).collect();
        }
        if self.paper {
            out["paper"] = paper::beside(&self.runs).json();
        }
        Ok(out)
    }

    /// Writes the report in this format, over an earlier report if there is one.
    ///
    /// # Errors
    /// If the file holds something else than a report, or cannot be written.
    pub fn write(&self, path: &Path, format: Format) -> Result<()> {
        let text = self.render(format)?;
        replaceable(path)?;
        std::fs::write(path, text).map_err(|e| Error::write(path, e))
    }

    /// All rows, each with its run and the run's number.
    fn rows(&self) -> impl Iterator<Item = (usize, &Run, &Row)> {
        (1..).zip(&self.runs).flat_map(|(i, run)| run.summary.rows.iter().map(move |row| (i, run, row)))
    }

    /// All figures that are no rows, each with its run and the run's number.
    fn others(&self) -> impl Iterator<Item = (usize, &Run, &Figure)> {
        (1..).zip(&self.runs).flat_map(|(i, run)| run.figures.iter().map(move |figure| (i, run, figure)))
    }

    /// The names of the data sets, each once.
    fn datasets(&self) -> Vec<&str> {
        let rows = self.rows().map(|(_, _, row)| row.dataset.as_str());
        let others = self.others().map(|(_, _, figure)| figure.dataset.as_str());
        let analyses = self.analyses.iter().flat_map(|analysis| analysis.datasets.iter().map(String::as_str));
        let mut names: Vec<&str> = Vec::new();
        for name in rows.chain(others).chain(analyses) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    /// The tables of figures that stand in no section of right answers.
    fn grids(&self) -> Vec<Grid> {
        kinds::grids(&self.runs)
    }
}

impl Format {
    /// The format that a file's ending stands for.
    ///
    /// # Errors
    /// If it stands for none.
    pub fn of(path: &Path) -> Result<Self> {
        let ending = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        match ending.as_deref() {
            Some("md" | "markdown") => Ok(Self::Markdown),
            Some("csv") => Ok(Self::Csv),
            Some("html" | "htm") => Ok(Self::Html),
            Some("json") => Ok(Self::Json),
            _ => Err(Error::argument(
                "--out",
                "a name ending in .md, .csv, .html or .json, or --format",
                path.display(),
            )),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Markdown => "md",
            Self::Csv => "csv",
            Self::Html => "html",
            Self::Json => "json",
        })
    }
}

impl Run {
    fn new(path: PathBuf, summary: Summary) -> Result<Self> {
        if let Some((index, of)) = summary.shard
            && of > 1
        {
            return Err(Error::Shard { path, index, of });
        }
        if summary.done > summary.items || summary.failed > summary.done {
            let Summary { items, done, failed, .. } = summary;
            let found = format!("items {items}, done {done}, failed {failed}");
            return Err(Error::config(path, format!("expected failed <= done <= items, found {found}")));
        }
        for (i, row) in summary.rows.iter().enumerate() {
            if summary.rows[..i].iter().any(|earlier| Key::of(earlier) == Key::of(row)) {
                return Err(Error::config(
                    path,
                    format!("rows: expected one figure each, found two for {}", words(row)),
                ));
            }
        }
        let Some(model) = name(&summary.run["model"]) else {
            return Err(Error::config(path, "run.model.name: expected the model's name, found none"));
        };
        Ok(Self {
            path,
            model,
            summary,
            is_pivot: false,
            figures: Vec::new(),
            points: Vec::new(),
            drawings: Vec::new(),
            notes: Vec::new(),
        })
    }

    /// Its rows, where they stand in the sections of right answers.
    fn section_rows(&self) -> &[Row] {
        if self.is_pivot { &[] } else { &self.summary.rows }
    }

    fn is_complete(&self) -> bool {
        self.summary.done == self.summary.items
    }

    /// What identifies it, by name.
    fn facts(&self) -> Vec<(&'static str, String)> {
        let Summary { run, items, done, failed, fingerprint, .. } = &self.summary;
        let scored = done - failed;
        let mut anchors = BTreeSet::new();
        collect_anchors(run, &mut anchors);
        let or = |found: Option<String>| found.unwrap_or_else(|| "not stated".into());
        vec![
            ("model", self.model.clone()),
            (
                "anchor",
                if anchors.is_empty() {
                    "none".into()
                } else {
                    anchors.into_iter().collect::<Vec<_>>().join(", ")
                },
            ),
            ("n", if scored == *items { items.to_string() } else { format!("{scored} of {items}") }),
            ("seed", or(name(&run["seed"]))),
            ("version", or(name(&run["version"]).map(|version| format!("radapt {version}")))),
            ("fingerprint", fingerprint.chars().take(12).collect()),
        ]
    }

    /// Everything that decides its result, one setting after the other with its path in `run`.
    fn settings(&self) -> Vec<(String, String)> {
        let mut out = Vec::new();
        flatten("", &self.summary.run, &mut out);
        out
    }
}

/// A scalar, or an object's name.
fn name(value: &Value) -> Option<String> {
    match value {
        Value::Null | Value::Array(_) => None,
        Value::Object(fields) => fields.get("name").and_then(Value::as_str).map(str::to_owned),
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

/// Everything under a key `anchor`, in short.
fn collect_anchors(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                if key != "anchor" {
                    collect_anchors(value, found);
                    continue;
                }
                let digest = ["sha256", "digest", "hash"].into_iter().find_map(|key| value[key].as_str());
                let digest = digest.map(|digest| digest.chars().take(12).collect::<String>());
                match (name(value), digest) {
                    (Some(name), Some(digest)) => found.insert(format!("{name} ({digest})")),
                    (Some(one), None) | (None, Some(one)) => found.insert(one),
                    (None, None) if value.is_null() => false,
                    (None, None) => found.insert(shorten(&value.to_string(), LONGEST)),
                };
            }
        }
        Value::Array(values) => values.iter().for_each(|value| collect_anchors(value, found)),
        _ => {}
    }
}

fn flatten(path: &str, value: &Value, out: &mut Vec<(String, String)>) {
    let below =
        |key: &dyn fmt::Display| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
    let nested = |value: &Value| value.is_object() || value.is_array();
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            fields.iter().for_each(|(key, value)| flatten(&below(key), value, out));
        }
        Value::Array(values) if values.iter().any(nested) => {
            values.iter().enumerate().for_each(|(i, value)| flatten(&below(&i), value, out));
        }
        Value::Array(values) => {
            let values: Vec<String> = values.iter().filter_map(name).collect();
            out.push((path.into(), shorten(&values.join(", "), LONGEST)));
        }
        other => out.push((path.into(), name(other).map_or("none".into(), |text| shorten(&text, LONGEST)))),
    }
}

/// A row by its names.
fn words(row: &Row) -> String {
    let attacked = row.attacked.as_ref().map(|a| {
        let eps = a.eps.map(|eps| format!(" at eps {eps}")).unwrap_or_default();
        format!(", {}{eps}, {}", a.attack, a.threat)
    });
    let defense = undefended_or(&row.defense);
    format!("{} on {}, {defense}{}", row.task, row.dataset, attacked.unwrap_or_else(|| ", clean".into()))
}

/// The share with its interval in percent; a dash for a row about nothing.
fn figure(row: &Row) -> String {
    if row.n == 0 {
        return "–".into();
    }
    let (low, high) = row.interval();
    format!("{:.1} ({low:.1} to {high:.1})", row.value())
}

/// How many items: one number, or the least and the most.
fn count(rows: impl Iterator<Item = usize>) -> String {
    let counts: BTreeSet<usize> = rows.collect();
    match (counts.first(), counts.last()) {
        (Some(least), Some(most)) if least < most => format!("{least} to {most}"),
        (Some(n), _) => n.to_string(),
        _ => "–".into(),
    }
}

/// Refuses to write over a file that no report is in.
fn replaceable(path: &Path) -> Result<()> {
    // A pipe or a terminal has nothing to lose.
    if !path.is_file() {
        return Ok(());
    }
    let bytes = std::fs::read(path).map_err(|e| Error::read(path, e))?;
    let text = String::from_utf8_lossy(&bytes);
    let ours = text.trim().is_empty()
        || text.starts_with(markdown::FIRST)
        || text.starts_with(&table::COLUMNS.join(","))
        || text.lines().take(8).any(|line| line == page::GENERATOR)
        || serde_json::from_str::<Value>(&text).is_ok_and(|json| json["report"] == MARK);
    if ours {
        return Ok(());
    }
    let hint = "it holds no report, so it is not overwritten: remove it, or write to another file";
    Err(Error::Exists { path: path.into(), hint: hint.into() })
}
