//! The report as Markdown.

use super::arrange::{Line, Overview, Section, Setting, overviews, sections};
use super::{MARK, Report, Run, count, figure, paper};
use crate::page::{printable, undefended_or};

/// What every Markdown report begins with.
pub(super) const FIRST: &str = "<!-- radapt eval report -->";

pub(super) fn markdown(report: &Report) -> String {
    debug_assert!(FIRST.contains(MARK));
    let mut out = format!("{FIRST}\n# Robustness report: {}\n\n", text(&report.datasets().join(", ")));
    let notes = report.notes();
    if notes.is_empty() {
        out += "All runs are complete, every item was scored, and no attack raised a warning.\n";
    }
    for note in &notes {
        out += &format!("- {}\n", text(note));
    }
    out += "\nShare of items that came out right in percent, with its Wilson 95 % interval; under attack, right \
            on the clean picture as well. `transfer` pictures were crafted on the surrogate, which is not the \
            defended model: the attacker does not know of the defence. `adaptive` pictures were crafted on the model that \
            is scored, with gradients through its defence. After the @ is eps, the largest change of a pixel.\n";
    if report.paper {
        let beside = paper::beside(&report.runs);
        out += "\n## Beside the paper’s tables\n";
        beside.lead.iter().for_each(|words| out += &format!("\n{}\n", text(words)));
        beside.tables.iter().for_each(|(_, grid)| out += &grid.markdown("###"));
    }
    let overviews = overviews(&report.runs);
    for overview in &overviews {
        out += &all(report, overview);
    }
    for section in sections(&report.runs) {
        out += &one(report, &section);
    }
    let grids = report.grids();
    grids.iter().for_each(|grid| out += &grid.markdown("##"));
    if !grids.is_empty() {
        out += "\n";
        let other = |run: &Run| run.is_pivot || (run.section_rows().is_empty() && !run.figures.is_empty());
        (0..report.runs.len()).filter(|&i| other(&report.runs[i])).for_each(|run| out += &made(report, run));
    }
    for analysis in &report.analyses {
        analysis.grids.iter().for_each(|grid| out += &grid.markdown("##"));
        let facts: Vec<String> =
            analysis.facts.iter().map(|(name, value)| format!("{name} {}", text(value))).collect();
        out += &format!("\n- {}: {}\n", text(&analysis.path.display().to_string()), facts.join(", "));
    }
    let unused: Vec<usize> = (0..report.runs.len())
        .filter(|&i| report.runs[i].summary.rows.is_empty() && report.runs[i].figures.is_empty())
        .collect();
    if !unused.is_empty() {
        out += "\n## Runs without figures\n\n";
        unused.iter().for_each(|&run| out += &made(report, run));
    }
    out
}

fn one(report: &Report, section: &Section) -> String {
    let mut out = format!("\n## {} on {}\n\n", text(section.task), text(section.dataset));
    let (several, models) = (section.runs.len() > 1, section.has_models());
    let mut head = vec!["defence".to_owned(), "threat".into(), "surrogate".into(), "pictures".into()];
    if models {
        head.insert(0, "model".into());
    }
    if several {
        head.push("run".into());
    }
    let labels = head.len();
    head.extend(["n".into(), "clean".into()]);
    head.extend(section.columns.iter().map(|column| text(&column.label())));
    out += &header(&head, labels);
    for line in &section.lines {
        let mark = if report.runs[line.run].is_complete() { "" } else { "*" };
        let mut cells = threat(line.setting);
        cells.insert(0, text(undefended_or(line.defense)));
        if models {
            cells.insert(0, text(line.model));
        }
        if several {
            cells.push((line.run + 1).to_string());
        }
        cells.push(count(line.rows().map(|row| row.n)));
        cells.push(cell(line, None, mark));
        cells.extend((0..line.cells.len()).map(|column| cell(line, Some(column), mark)));
        out += &record(&cells);
    }
    out += "\n";
    section.runs.iter().for_each(|&run| out += &made(report, run));
    out
}

fn cell(line: &Line, column: Option<usize>, mark: &str) -> String {
    let row = column.map_or(line.clean, |column| line.cells[column]);
    row.map_or("–".into(), |row| {
        let mean = row.mean_per_class.map(|mean| format!("; per class {mean:.1}")).unwrap_or_default();
        format!("{}{mean}{mark}", figure(row))
    })
}

fn all(report: &Report, overview: &Overview) -> String {
    let mut out = format!("\n## {} on all data sets\n\n", text(overview.task));
    let mut head =
        vec!["pictures".to_owned(), "defence (threat)".into(), "surrogate".into(), "scored as".into()];
    if overview.has_models {
        head.insert(0, "model".into());
    }
    let labels = head.len();
    for column in &overview.datasets {
        let metric = if column.per_class { "per class, " } else { "" };
        head.push(format!("{} ({metric}n = {})", text(column.dataset), column.n));
    }
    head.push("average".into());
    out += &header(&head, labels);
    for line in &overview.lines {
        let threat = threat(line.setting);
        let defense = text(undefended_or(line.defense));
        let defense = if line.setting.is_some() { format!("{defense} ({})", threat[0]) } else { defense };
        let mut cells = vec![text(&line.condition.label()), defense, threat[1].clone(), threat[2].clone()];
        if overview.has_models {
            cells.insert(0, text(line.model));
        }
        let mark = |run: usize| if report.runs[run].is_complete() { "" } else { "*" };
        for cell in &line.cells {
            cells.push(match cell.as_slice() {
                [] => "–".into(),
                [(run, value)] => format!("{value:.1}{}", mark(*run)),
                several => {
                    let each =
                        several.iter().map(|(run, v)| format!("{v:.1}{} (run {})", mark(*run), run + 1));
                    each.collect::<Vec<_>>().join(", ")
                }
            });
        }
        let unfinished = if line.runs().any(|run| !report.runs[run].is_complete()) { "*" } else { "" };
        cells.push(line.average().map_or("–".into(), |average| format!("{average:.1}{unfinished}")));
        out += &record(&cells);
    }
    out += "\nThe average is over the data sets, each with the same weight, and only where each has one figure. The \
            intervals are in the tables below.\n";
    out
}

/// Threat, surrogate and what the pictures hold.
fn threat(setting: Option<Setting>) -> Vec<String> {
    match setting {
        None => vec!["–".into(); 3],
        Some(setting) => vec![
            setting.threat.to_string(),
            setting.surrogate().map_or("–".into(), text),
            setting.holds().into(),
        ],
    }
}

/// A line about a run.
fn made(report: &Report, run: usize) -> String {
    let facts = report.runs[run].facts();
    let facts: Vec<String> = facts.iter().map(|(name, value)| format!("{name} {}", text(value))).collect();
    format!(
        "- Run {} ({}): {}\n",
        run + 1,
        text(&report.runs[run].path.display().to_string()),
        facts.join(", ")
    )
}

fn header(names: &[String], labels: usize) -> String {
    let rule: Vec<String> =
        (0..names.len()).map(|i| if i < labels { "---".into() } else { "---:".into() }).collect();
    record(names) + &record(&rule)
}

fn record(cells: &[String]) -> String {
    format!("| {} |\n", cells.join(" | "))
}

/// The text with nothing in it that Markdown or HTML would read as more than text.
pub(super) fn text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in printable(text).chars() {
        match c {
            '\\' | '|' | '`' | '*' | '[' | ']' => out.extend(['\\', c]),
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            c => out.push(c),
        }
    }
    out
}
