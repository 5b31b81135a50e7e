//! Rows in the order a reader looks for them.

use super::super::{Precision, Row};
use super::Run;
use crate::attack::{Eps, Threat};

/// Attacks from the plainest to the worst case; others come after, by name.
const ATTACKS: [&str; 11] = [
    "pgd",
    "cw",
    "apgd",
    "apgd-ce",
    "apgd-dlr",
    "apgd-t",
    "apgd-csr",
    "fab",
    "fab-t",
    "square",
    "autoattack",
];
const DEFENSES: [&str; 4] = ["none", "gif", "fra", "gif+fra"];

/// What a figure is about, inside a run.
#[derive(PartialEq)]
pub(super) struct Key<'a> {
    task: &'a str,
    dataset: &'a str,
    defense: &'a str,
    setting: Option<Setting<'a>>,
    condition: Condition<'a>,
}

impl<'a> Key<'a> {
    pub fn of(row: &'a Row) -> Self {
        Self {
            task: &row.task,
            dataset: &row.dataset,
            defense: &row.defense,
            setting: Setting::of(row),
            condition: Condition::of(row),
        }
    }
}

/// A threat model and what the pictures hold.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Setting<'a> {
    pub threat: &'a Threat,
    pub pictures: Precision,
}

impl<'a> Setting<'a> {
    pub fn of(row: &'a Row) -> Option<Self> {
        row.attacked.as_ref().map(|a| Self { threat: &a.threat, pictures: a.pictures })
    }

    /// What the pictures were crafted on, where that is not the model scored.
    pub fn surrogate(self) -> Option<&'a str> {
        match self.threat {
            Threat::Transfer { surrogate } => Some(surrogate),
            Threat::Adaptive => None,
        }
    }

    pub fn holds(self) -> &'static str {
        match self.pictures {
            Precision::Float => "float",
            Precision::EightBit => "8-bit",
        }
    }

    fn order(self) -> (bool, &'a str, &'static str) {
        (matches!(self.threat, Threat::Adaptive), self.surrogate().unwrap_or_default(), self.holds())
    }
}

/// Clean, or an attack with its radius.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Condition<'a> {
    /// `None` for clean pictures.
    pub attack: Option<&'a str>,
    pub eps: Option<Eps>,
}

impl<'a> Condition<'a> {
    pub fn of(row: &'a Row) -> Self {
        let attacked = row.attacked.as_ref();
        Self { attack: attacked.map(|a| a.attack.as_str()), eps: attacked.and_then(|a| a.eps) }
    }

    /// `clean`, `pgd @ 4/255`, `cw`.
    pub fn label(self) -> String {
        match (self.attack, self.eps) {
            (None, _) => "clean".into(),
            (Some(attack), None) => attack.into(),
            (Some(attack), Some(eps)) => format!("{attack} @ {eps}"),
        }
    }

    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let eps = |of: &Self| of.eps.map_or(f64::INFINITY, Eps::value);
        self.attack
            .map(attack_order)
            .cmp(&other.attack.map(attack_order))
            .then(eps(self).total_cmp(&eps(other)))
    }
}

/// A defence of a run under one threat model.
pub(super) struct Line<'a> {
    /// The run's index.
    pub run: usize,
    pub model: &'a str,
    pub defense: &'a str,
    /// `None` where nothing was attacked.
    pub setting: Option<Setting<'a>>,
    pub clean: Option<&'a Row>,
    /// As [`Section::columns`].
    pub cells: Vec<Option<&'a Row>>,
}

impl<'a> Line<'a> {
    pub fn rows(&self) -> impl Iterator<Item = &'a Row> {
        self.clean.into_iter().chain(self.cells.iter().copied().flatten())
    }
}

/// One task on one data set.
pub(super) struct Section<'a> {
    pub task: &'a str,
    pub dataset: &'a str,
    /// The indices of its runs.
    pub runs: Vec<usize>,
    /// Every attack with every radius, in order.
    pub columns: Vec<Condition<'a>>,
    pub lines: Vec<Line<'a>>,
}

impl<'a> Section<'a> {
    pub fn is_attacked(&self) -> bool {
        !self.columns.is_empty()
    }

    /// Whether its runs are of several models.
    pub fn has_models(&self) -> bool {
        self.lines.iter().any(|line| line.model != self.lines[0].model)
    }

    /// Its attacks, each once, in order.
    pub fn attacks(&self) -> Vec<&'a str> {
        let mut attacks: Vec<&str> = self.columns.iter().filter_map(|column| column.attack).collect();
        attacks.dedup();
        attacks
    }

    /// Its radii, each once, from the least; `None`, for attacks that have none, comes last.
    pub fn radii(&self) -> Vec<Option<Eps>> {
        let mut radii: Vec<Option<Eps>> = Vec::new();
        for column in &self.columns {
            if !radii.contains(&column.eps) {
                radii.push(column.eps);
            }
        }
        let value = |eps: &Option<Eps>| eps.map_or(f64::INFINITY, Eps::value);
        radii.sort_by(|a, b| value(a).total_cmp(&value(b)));
        radii
    }

    /// The defences with transfer figures and without adaptive ones.
    pub fn not_adaptive(&self) -> Vec<&'a str> {
        let has = |line: &Line, adaptive: bool| {
            line.setting.is_some_and(|setting| matches!(setting.threat, Threat::Adaptive) == adaptive)
        };
        let mut out: Vec<&str> = Vec::new();
        for line in self.lines.iter().filter(|line| line.defense != "none" && has(line, false)) {
            let adaptive = self
                .lines
                .iter()
                .any(|other| (other.defense, other.model) == (line.defense, line.model) && has(other, true));
            if !adaptive && !out.contains(&line.defense) {
                out.push(line.defense);
            }
        }
        out
    }
}

/// The sections in the order of the runs, each with its lines and columns sorted.
pub(super) fn sections(runs: &[Run]) -> Vec<Section<'_>> {
    let mut sections: Vec<Section> = Vec::new();
    for (index, run) in runs.iter().enumerate() {
        for row in run.section_rows() {
            let place = sections.iter().position(|s| (s.task, s.dataset) == (&row.task, &row.dataset));
            let place = place.unwrap_or_else(|| {
                let (task, dataset) = (row.task.as_str(), row.dataset.as_str());
                sections.push(Section {
                    task,
                    dataset,
                    runs: Vec::new(),
                    columns: Vec::new(),
                    lines: Vec::new(),
                });
                sections.len() - 1
            });
            let section = &mut sections[place];
            if !section.runs.contains(&index) {
                section.runs.push(index);
            }
            let condition = Condition::of(row);
            if condition.attack.is_some() && !section.columns.contains(&condition) {
                section.columns.push(condition);
            }
        }
    }
    for section in &mut sections {
        section.columns.sort_by(Condition::cmp);
        for &index in &section.runs {
            section.lines.extend(lines(index, &runs[index], section.task, section.dataset, &section.columns));
        }
        // Stable: runs stay in the order given, and a model's with it.
        let models = models(runs);
        section.lines.sort_by_key(|line| {
            let model = models.iter().position(|&model| model == line.model);
            (model, line.setting.map(Setting::order), defense_order(line.defense), line.run)
        });
    }
    sections
}

fn lines<'a>(
    index: usize,
    run: &'a Run,
    task: &str,
    dataset: &str,
    columns: &[Condition<'a>],
) -> Vec<Line<'a>> {
    let mut lines: Vec<Line> = Vec::new();
    let rows = || {
        run.section_rows().iter().filter(|row| (row.task.as_str(), row.dataset.as_str()) == (task, dataset))
    };
    let clean = |defense: &str| rows().find(|row| row.defense == defense && row.attacked.is_none());
    for row in rows() {
        let setting = Setting::of(row);
        let attacked = || rows().any(|other| other.defense == row.defense && other.attacked.is_some());
        if setting.is_none() && attacked() {
            continue;
        }
        let place = lines.iter().position(|line| line.defense == row.defense && line.setting == setting);
        let place = place.unwrap_or_else(|| {
            lines.push(Line {
                run: index,
                model: &run.model,
                defense: &row.defense,
                setting,
                clean: clean(&row.defense),
                cells: vec![None; columns.len()],
            });
            lines.len() - 1
        });
        if let Some(column) = columns.iter().position(|column| *column == Condition::of(row)) {
            lines[place].cells[column] = Some(row);
        }
    }
    lines
}

/// All data sets of one task in one table, as the paper has them.
pub(super) struct Overview<'a> {
    pub task: &'a str,
    pub datasets: Vec<Column<'a>>,
    pub has_models: bool,
    pub lines: Vec<OverviewLine<'a>>,
}

/// A data set of an [`Overview`].
pub(super) struct Column<'a> {
    pub dataset: &'a str,
    /// Whether the mean of the classes' shares is its metric.
    pub per_class: bool,
    pub n: String,
}

/// A condition under a threat model on every data set.
pub(super) struct OverviewLine<'a> {
    pub condition: Condition<'a>,
    pub model: &'a str,
    pub defense: &'a str,
    pub setting: Option<Setting<'a>>,
    /// For each data set the values in percent with their runs' indices: none, one, or several
    /// where several runs measured the same.
    pub cells: Vec<Vec<(usize, f64)>>,
}

impl OverviewLine<'_> {
    /// The mean over the data sets, where each has one value.
    pub fn average(&self) -> Option<f64> {
        let values: Option<Vec<f64>> = self
            .cells
            .iter()
            .map(|cell| match cell.as_slice() {
                [(_, value)] => Some(*value),
                _ => None,
            })
            .collect();
        values.map(|values| values.iter().sum::<f64>() / values.len() as f64)
    }

    /// The indices of its runs.
    pub fn runs(&self) -> impl Iterator<Item = usize> {
        self.cells.iter().flatten().map(|(run, _)| *run)
    }
}

/// An overview for each task with several data sets.
pub(super) fn overviews(runs: &[Run]) -> Vec<Overview<'_>> {
    let sections = sections(runs);
    let mut tasks: Vec<&str> = sections.iter().map(|section| section.task).collect();
    tasks.sort_unstable();
    tasks.dedup();
    tasks.into_iter().filter_map(|task| overview(runs, &sections, task)).collect()
}

fn overview<'a>(runs: &'a [Run], sections: &[Section<'a>], task: &'a str) -> Option<Overview<'a>> {
    let sections: Vec<&Section> = sections.iter().filter(|section| section.task == task).collect();
    if sections.len() < 2 {
        return None;
    }
    let models = models(runs);
    let mut datasets = Vec::new();
    let mut lines: Vec<OverviewLine> = Vec::new();
    for (place, section) in sections.iter().enumerate() {
        let of_section = |row: &&Row| (row.task.as_str(), row.dataset.as_str()) == (task, section.dataset);
        let rows = || {
            let runs = runs.iter().enumerate();
            runs.flat_map(|(i, run)| run.section_rows().iter().map(move |row| (i, run, row)))
                .filter(|(_, _, row)| of_section(row) && row.n > 0)
        };
        let per_class = rows().all(|(_, _, row)| row.mean_per_class.is_some());
        datasets.push(Column {
            dataset: section.dataset,
            per_class,
            n: super::count(rows().map(|(_, _, row)| row.n)),
        });
        for (index, run, row) in rows() {
            let (condition, setting) = (Condition::of(row), Setting::of(row));
            let same = |line: &OverviewLine| {
                line.condition == condition
                    && line.setting == setting
                    && (line.model, line.defense) == (run.model.as_str(), row.defense.as_str())
            };
            let at = lines.iter().position(same).unwrap_or_else(|| {
                lines.push(OverviewLine {
                    condition,
                    model: &run.model,
                    defense: &row.defense,
                    setting,
                    cells: vec![Vec::new(); sections.len()],
                });
                lines.len() - 1
            });
            let value = row.mean_per_class.filter(|_| per_class).unwrap_or_else(|| row.value());
            lines[at].cells[place].push((index, value));
        }
    }
    lines.sort_by(|a, b| {
        let order = |line: &OverviewLine<'a>| {
            let model = models.iter().position(|&model| model == line.model);
            (model, line.setting.map(Setting::order), defense_order(line.defense))
        };
        a.condition.cmp(&b.condition).then_with(|| order(a).cmp(&order(b)))
    });
    let has_models = lines.iter().any(|line| line.model != lines[0].model);
    Some(Overview { task, datasets, has_models, lines })
}

/// The models in the order of the runs, each once.
fn models(runs: &[Run]) -> Vec<&str> {
    let mut models: Vec<&str> = Vec::new();
    for run in runs {
        if !models.contains(&run.model.as_str()) {
            models.push(&run.model);
        }
    }
    models
}

fn attack_order(name: &str) -> (usize, &str) {
    (ATTACKS.iter().position(|&known| known == name).unwrap_or(ATTACKS.len()), name)
}

fn defense_order(name: &str) -> (usize, &str) {
    (DEFENSES.iter().position(|&known| known == name).unwrap_or(DEFENSES.len()), name)
}
