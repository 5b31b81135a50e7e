//! The rows as CSV.

use super::Report;
use super::arrange::Setting;
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

/// One line per row. What a row has not is empty; numbers are printed in full.
pub(super) fn csv(report: &Report) -> Result<String> {
    let failed = |e: &dyn std::fmt::Display| Error::config("CSV", e.to_string());
    let mut out = csv::Writer::from_writer(Vec::new());
    out.write_record(COLUMNS).map_err(|e| failed(&e))?;
    for (number, run, row) in report.rows() {
        let (setting, (low, high)) = (Setting::of(row), row.interval());
        let eps = row.attacked.as_ref().and_then(|a| a.eps);
        let measured = |value: f64| if row.n == 0 { String::new() } else { value.to_string() };
        out.write_record([
            number.to_string(),
            run.summary.fingerprint.clone(),
            run.model.clone(),
            run.summary.items.to_string(),
            run.summary.done.to_string(),
            run.summary.failed.to_string(),
            run.is_complete().to_string(),
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
        ])
        .map_err(|e| failed(&e))?;
    }
    let bytes = out.into_inner().map_err(|e| failed(&e))?;
    String::from_utf8(bytes).map_err(|e| failed(&e))
}
