//! The rows as CSV.

use super::arrange::Setting;
use super::kinds::By;
use super::{Report, Run, paper};
use crate::{Error, Result};

/// The columns, in their order.
pub(super) const COLUMNS: [&str; 23] = [
    "run",
    "fingerprint",
    "model",
    "items",
    "done",
    "failed",
    "complete",
    "task",
    "dataset",
    "defense",
    "attack",
    "eps",
    "eps_value",
    "threat",
    "surrogate",
    "pictures",
    "n",
    "correct",
    "value",
    "low",
    "high",
    "mean_per_class",
    "seed",
];

/// Columns behind these where a report holds more than rows: what is measured, whose figure it is,
/// and its place in the paper.
const MORE: [&str; 5] = ["measure", "source", "paper_table", "paper_row", "paper_column"];

/// One line per row and figure. What it has not is empty; numbers are printed in full. Analyses are
/// in the CSV files that they come with.
pub(super) fn csv(report: &Report) -> Result<String> {
    let failed = |e: &dyn std::fmt::Display| Error::config("CSV", e.to_string());
    let is_more = report.paper || report.others().next().is_some();
    let mut out = csv::Writer::from_writer(Vec::new());
    let mut write = |mut record: Vec<String>, more: [String; 5]| {
        if is_more {
            record.extend(more);
        }
        out.write_record(record).map_err(|e| failed(&e))
    };
    write(COLUMNS.map(String::from).into(), MORE.map(String::from))?;
    let of_run = |number: usize, run: &Run| {
        vec![
            number.to_string(),
            run.summary.fingerprint.clone(),
            run.model.clone(),
            run.summary.items.to_string(),
            run.summary.done.to_string(),
            run.summary.failed.to_string(),
            run.is_complete().to_string(),
        ]
    };
    let ours = |measure: &str| [measure, "ours", "", "", ""].map(String::from);
    for (number, run, row) in report.rows() {
        let (setting, (low, high)) = (Setting::of(row), row.interval());
        let eps = row.attacked.as_ref().and_then(|a| a.eps);
        let measured = |value: f64| if row.n == 0 { String::new() } else { value.to_string() };
        let mut record = of_run(number, run);
        record.extend([
            row.task.clone(),
            row.dataset.clone(),
            row.defense.clone(),
            row.attacked.as_ref().map(|a| a.attack.clone()).unwrap_or_default(),
            eps.map(|eps| eps.to_string()).unwrap_or_default(),
            eps.map(|eps| eps.value().to_string()).unwrap_or_default(),
            setting.map(|s| s.threat.to_string()).unwrap_or_default(),
            setting.and_then(Setting::surrogate).unwrap_or_default().to_owned(),
            setting.map(Setting::holds).unwrap_or_default().to_owned(),
            row.n.to_string(),
            row.correct.to_string(),
            measured(row.value()),
            measured(low),
            measured(high),
            row.mean_per_class.map(|mean| mean.to_string()).unwrap_or_default(),
            super::name(&run.summary.run["seed"]).unwrap_or_default(),
        ]);
        write(record, ours("right, %"))?;
    }
    for (number, run, figure) in report.others() {
        let by = figure.by.as_ref();
        let eps = by.and_then(|by| by.eps);
        let measured = |value: f64| if figure.n == 0 { String::new() } else { value.to_string() };
        let end = |end: Option<f64>| end.map(measured).unwrap_or_default();
        let mut record = of_run(number, run);
        record.extend([
            figure.task.clone(),
            figure.dataset.clone(),
            figure.defense.clone(),
            by.map(|by| by.attack.clone()).unwrap_or_default(),
            eps.map(|eps| eps.to_string()).unwrap_or_default(),
            eps.map(|eps| eps.value().to_string()).unwrap_or_default(),
            by.map(|by| by.threat.to_string()).unwrap_or_default(),
            by.and_then(By::surrogate).unwrap_or_default().to_owned(),
            by.map(|by| by.pictures.to_string()).unwrap_or_default(),
            figure.n.to_string(),
            figure.correct.map(|correct| correct.to_string()).unwrap_or_default(),
            measured(figure.value),
            end(figure.interval.map(|interval| interval.0)),
            end(figure.interval.map(|interval| interval.1)),
            String::new(),
            super::name(&run.summary.run["seed"]).unwrap_or_default(),
        ]);
        write(record, ours(&figure.measure))?;
    }
    if report.paper {
        for printed in paper::beside(&report.runs).printed() {
            let is_attacked = printed.attack.is_some();
            let of_attacked = |text: &str| if is_attacked { text.to_owned() } else { String::new() };
            let mut record = vec![String::new(); 7];
            record.extend([
                printed.task,
                printed.dataset,
                printed.row.clone(),
                printed.attack.unwrap_or_default(),
                printed.eps.map(|eps| eps.to_string()).unwrap_or_default(),
                printed.eps.map(|eps| eps.value().to_string()).unwrap_or_default(),
                of_attacked("transfer"),
                of_attacked(paper::SURROGATE),
                String::new(),
                String::new(),
                String::new(),
                printed.value.to_string(),
            ]);
            record.extend(vec![String::new(); 4]);
            let measure = format!("right, {}", printed.unit);
            write(record, [measure, "paper".into(), printed.table.to_string(), printed.row, printed.column])?;
        }
    }
    let bytes = out.into_inner().map_err(|e| failed(&e))?;
    String::from_utf8(bytes).map_err(|e| failed(&e))
}
