//! Runs side by side: Markdown, CSV, JSON, and one HTML page with plots.

mod arrange;
mod markdown;
mod page;
mod plot;
mod table;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Row, Summary};
use crate::page::{printable, shorten, undefended_or};
use crate::{Error, Result};
use arrange::{Key, sections};

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
}

/// A run with its folder.
#[derive(Debug)]
struct Run {
    path: PathBuf,
    model: String,
    summary: Summary,
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
    /// Reads `summary.json` of each run's folder, or the file itself.
    ///
    /// # Errors
    /// If one cannot be read, and all of [`Report::new`].
    pub fn read(runs: &[PathBuf]) -> Result<Self> {
        Self::new(runs.iter().map(|path| Ok((path.clone(), Summary::read(path)?))).collect::<Result<_>>()?)
    }

    /// From runs, each with the path to call it by.
    ///
    /// # Errors
    /// If there is none, one is a shard, one is given twice, one does not name its model, or one has
    /// two figures for the same thing.
    pub fn new(runs: Vec<(PathBuf, Summary)>) -> Result<Self> {
        if runs.is_empty() {
            return Err(Error::argument("RUN", "at least one run folder", "none"));
        }
        let mut checked: Vec<Run> = Vec::with_capacity(runs.len());
        for (path, summary) in runs {
            if let Some((index, of)) = summary.shard
                && of > 1
            {
                return Err(Error::Shard { path, index, of });
            }
            if let Some(first) = checked.iter().find(|run| run.summary.fingerprint == summary.fingerprint) {
                let found =
                    format!("`{}` and `{}`, which are the same run", first.path.display(), path.display());
                return Err(Error::argument("RUN", "each run once", found));
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
            checked.push(Run { path, model, summary });
        }
        Ok(Self { runs: checked })
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
            if rows.is_empty() {
                notes.push(format!("Run {number} has no figures."));
            }
        }
        for (i, run) in self.runs.iter().enumerate() {
            notes.extend(
                run.summary.flags.iter().map(|flag| format!("Run {} warns: {}", i + 1, printable(flag))),
            );
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
    /// [`Row`] with the number and fingerprint of its run and with the run's model.
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
        Ok(json!({
            "schema_version": Summary::VERSION, "report": MARK, "complete": self.is_complete(),
            "notes": self.notes(), "runs": runs, "rows": rows,
        }))
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

    /// The names of the data sets, each once.
    fn datasets(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for (_, _, row) in self.rows() {
            if !names.contains(&row.dataset.as_str()) {
                names.push(&row.dataset);
            }
        }
        names
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
