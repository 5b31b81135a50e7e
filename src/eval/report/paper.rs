//! Figures in the layout of the paper's tables, the paper's own beside them.

use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::{Value, json};

use super::super::Row;
use super::super::sweep::Parameter;
use super::arrange::Setting;
use super::grid::{Cell, Grid, GridLine, Group};
use super::{Run, count, name};
use crate::attack::{Eps, Threat};
use crate::data::registry;
use crate::page::undefended_or;

/// Why the paper's robust figures are labelled as they are.
const THREAT: &str = "The paper does not name its threat model. Its robust figures fit pictures that were crafted on the \
                      undefended CLIP and then shown to every model, so they are labelled transfer here; that is \
                      inferred. Three of them are above the clean figure of the same model, which cannot be where an attack \
                      works on that model and both are of the same pictures (Table 1: TeCoA on FGVCA and PCAM, FARE on \
                      PCAM); APGD-CE is weaker than PGD on every R-Adapt model at 4/255, and C&W hardly grows with eps \
                      (Table 2); FARE keeps 52.8 of 56.2, where its own authors find it to lose half to an attack on itself; \
                      and the averages of Table 1’s “AutoAttack” are those of Table 2’s APGD-CE. Tables 5 and 11 are made \
                      with V-Attack, which is built on a public CLIP and has no place for a defence. (This project’s notes, \
                      attacks.md, section 4.)";
/// What must be said wherever adaptive figures stand beside the paper's.
const ADAPTIVE: &str = "Lines with adaptive are not what the paper measures: that attacker knows the defence. They stand here so \
                        that nobody takes the transfer figures for all there is, and are not to be compared with the paper’s.";
const COUNTING: &str = "Under attack ours counts a picture only if it was right before as well, so it is never above the clean \
                        figure; the paper does not say how it counts, nor how many pictures of a set it takes.";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Paper {
    source: String,
    model: Vec<Model>,
    table: Vec<Table>,
    encoder: Vec<Encoder>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Model {
    key: String,
    name: String,
    ids: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Encoder {
    name: String,
    encoder: String,
    id: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    number: u32,
    title: String,
    model: String,
    unit: String,
    tasks: Vec<String>,
    /// What its columns vary, where they do.
    parameter: Option<Parameter>,
    #[serde(default)]
    attack: Vec<String>,
    eps: Option<Eps>,
    columns: Vec<Column>,
    row: Vec<PaperRow>,
}

/// A column: what of ours belongs in it.
#[derive(Deserialize, Clone)]
#[serde(deny_unknown_fields)]
struct Column {
    name: String,
    /// A set's name, `mean` over sets, or none where a line has its own.
    dataset: Option<String>,
    task: Option<String>,
    /// Any of these attacks; none for clean pictures.
    #[serde(default)]
    attack: Vec<String>,
    eps: Option<Eps>,
    /// The parameter's value.
    at: Option<u64>,
    /// Whether it is ours alone.
    #[serde(skip)]
    is_extra: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PaperRow {
    name: String,
    method: String,
    block: Option<String>,
    #[serde(default)]
    attack: Vec<String>,
    eps: Option<Eps>,
    dataset: Option<String>,
    /// The radius that the anchor was trained at, in 1/255.
    budget: Option<String>,
    values: Vec<f64>,
}

static PAPER: LazyLock<Paper> = LazyLock::new(|| {
    // Only an edit of that file can fail here, and no test of reports passes then.
    toml::from_str(include_str!("paper.toml")).expect("paper.toml holds the paper's tables")
});

/// A figure of the paper, for CSV.
pub(super) struct Printed {
    pub table: u32,
    pub row: String,
    pub column: String,
    pub unit: &'static str,
    pub dataset: String,
    pub task: String,
    /// As the paper calls it.
    pub attack: Option<String>,
    pub eps: Option<Eps>,
    pub value: f64,
}

/// The tables that ours have figures for.
pub(super) struct Beside {
    pub lead: Vec<String>,
    /// Each with its number.
    pub tables: Vec<(u32, Grid)>,
}

/// A figure of ours with what tells where it belongs.
struct Ours<'a> {
    run: usize,
    model: &'a str,
    row: &'a Row,
    parts: Parts<'a>,
}

/// What a defence is made of, from its words in `run.json`.
#[derive(Clone, Copy, Default, PartialEq)]
struct Parts<'a> {
    gif: bool,
    fra: bool,
    /// The anchor's name or file.
    anchor: &'a str,
    /// `training-free`, `model-guided` or `data-driven`.
    method: &'a str,
}

impl<'a> Parts<'a> {
    fn of(words: &'a str) -> Self {
        let gif = words.starts_with("GIF (cutoff ");
        let Some((_, rest)) = words.split_once("FRA (anchor ") else {
            return Self { gif, ..Self::default() };
        };
        let inner = rest.split(", alpha ").next().unwrap_or_default();
        let (anchor, method) = inner.rsplit_once(", ").unwrap_or((inner, inner));
        Self { gif, fra: true, anchor, method }
    }

    /// The anchor's file without folder and ending.
    fn stem(&self) -> &'a str {
        let file = self.anchor.rsplit('/').next().unwrap_or_default();
        file.strip_suffix(".safetensors").unwrap_or(file)
    }

    /// The one number in the anchor's name.
    fn number(&self) -> Option<&'a str> {
        let mut numbers = self
            .stem()
            .split(['-', '_', '.'])
            .filter(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
        numbers.next().filter(|_| numbers.next().is_none())
    }

    /// The number behind `images-` or `epochs-`, which is how the recipes call their anchors.
    fn trained(&self, parameter: Parameter) -> Option<u64> {
        let prefix = match parameter {
            Parameter::Pictures => "images-",
            Parameter::Epochs => "epochs-",
            _ => return None,
        };
        self.stem().strip_prefix(prefix)?.parse().ok()
    }
}

/// Whose adversarial training a name speaks of.
fn robust(name: &str) -> Option<&'static str> {
    let name = name.to_lowercase();
    ["tecoa", "tga", "fare"].into_iter().find(|known| name.contains(known))
}

fn is_qwen(model: &str) -> bool {
    model.to_lowercase().contains("qwen")
}

impl Ours<'_> {
    /// The method of the paper's tables that it is, if it is one.
    fn method(&self) -> Option<String> {
        let Parts { gif, fra, .. } = self.parts;
        if self.row.defense == "none" {
            let last = self.model.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
            return Some(robust(last).unwrap_or("clip").into());
        }
        match (gif, fra, self.parts.method) {
            (true, true, "training-free") => Some("r-clip".into()),
            (true, true, "data-driven") => Some("plus".into()),
            (true, true, "model-guided") => {
                let by = robust(self.parts.stem()).or_else(|| robust(&self.row.defense));
                by.map(|by| format!("r-{by}"))
            }
            _ => None,
        }
    }

    /// Its line in the table of the two parts.
    fn ablated(&self) -> Option<&'static str> {
        match (self.row.defense == "none", self.parts.gif, self.parts.fra) {
            (true, ..) => Some("clip"),
            (_, true, true) => Some("gif+fra"),
            (_, true, false) => Some("gif"),
            (_, false, true) => Some("fra"),
            _ => None,
        }
    }

    fn is(&self, attack: &[String], eps: Option<Eps>) -> bool {
        match &self.row.attacked {
            None => attack.is_empty(),
            Some(a) => attack.contains(&a.attack) && a.eps == eps,
        }
    }
}

/// A set's own name, under whatever name it was given.
fn set_name(name: &str) -> &str {
    registry::entry(name).map_or(name, |entry| entry.name.as_str())
}

/// One line of ours.
struct Line<'a> {
    model: &'a str,
    defense: &'a str,
    parts: Parts<'a>,
    setting: Option<Setting<'a>>,
    /// Where lines of several attacks stand below each other.
    attack: Option<&'a str>,
    /// Where lines of several sets stand below each other.
    dataset: Option<&'a str>,
    rows: Vec<(usize, &'a Row)>,
}

/// How a table's lines are told from each other, besides by model, defence and threat model.
#[derive(Clone, Copy)]
struct Split {
    attack: bool,
    dataset: bool,
}

/// The lines of these figures. Clean ones go with the attacked ones of their runs; those that have
/// none are lines of their own.
fn lines<'a>(attacked: &[&Ours<'a>], clean: &[&Ours<'a>], split: Split) -> Vec<Line<'a>> {
    let mut lines: Vec<Line> = Vec::new();
    let mut put = |ours: &Ours<'a>, setting: Option<Setting<'a>>| {
        let attack = ours.row.attacked.as_ref().map(|a| a.attack.as_str()).filter(|_| split.attack);
        let dataset = split.dataset.then_some(ours.row.dataset.as_str());
        let same = |line: &&mut Line| {
            (line.model, line.defense, line.setting, line.attack, line.dataset, line.parts)
                == (ours.model, ours.row.defense.as_str(), setting, attack, dataset, ours.parts)
        };
        match lines.iter_mut().find(same) {
            Some(line) => line.rows.push((ours.run, ours.row)),
            None => lines.push(Line {
                model: ours.model,
                defense: &ours.row.defense,
                parts: ours.parts,
                setting,
                attack,
                dataset,
                rows: vec![(ours.run, ours.row)],
            }),
        }
    };
    attacked.iter().for_each(|ours| put(ours, Setting::of(ours.row)));
    let mut alone = Vec::new();
    for ours in clean {
        let fits = |line: &&mut Line| {
            (line.model, line.defense, line.parts) == (ours.model, ours.row.defense.as_str(), ours.parts)
                && line.setting.is_some()
                && line.dataset.is_none_or(|dataset| dataset == ours.row.dataset)
                && line.rows.iter().any(|(run, _)| *run == ours.run)
        };
        lines.iter_mut().filter(fits).for_each(|line| line.rows.push((ours.run, ours.row)));
        // A clean figure of another run of the same adds nothing to lines that have one.
        let known = lines.iter().any(|line| {
            (line.model, line.defense, line.parts) == (ours.model, ours.row.defense.as_str(), ours.parts)
                && line.dataset.is_none_or(|dataset| dataset == ours.row.dataset)
        });
        if !known {
            alone.push(*ours);
        }
    }
    // What can be compared with the paper's comes first.
    lines.sort_by_key(|line| line.setting.is_some_and(|setting| *setting.threat == Threat::Adaptive));
    let mut put = |ours: &Ours<'a>| {
        let dataset = split.dataset.then_some(ours.row.dataset.as_str());
        let same = |line: &&mut Line| {
            (line.model, line.defense, line.setting, line.dataset, line.parts)
                == (ours.model, ours.row.defense.as_str(), None, dataset, ours.parts)
        };
        match lines.iter_mut().find(same) {
            Some(line) => line.rows.push((ours.run, ours.row)),
            None => lines.push(Line {
                model: ours.model,
                defense: &ours.row.defense,
                parts: ours.parts,
                setting: None,
                attack: None,
                dataset,
                rows: vec![(ours.run, ours.row)],
            }),
        }
    };
    alone.into_iter().for_each(&mut put);
    lines
}

/// Ours in the paper's layout.
pub(super) fn beside(runs: &[Run]) -> Beside {
    let ours = all(runs);
    let mut tables: Vec<(u32, Grid)> = Vec::new();
    for table in &PAPER.table {
        let grid = match table.parameter {
            Some(parameter) => trained(runs, &ours, table, parameter),
            None => compared(runs, &ours, table),
        };
        tables.extend(grid.map(|grid| (table.number, grid)));
    }
    tables.extend(encoders(runs).map(|grid| (10, grid)));
    tables.sort_by_key(|(number, _)| *number);
    let mut lead = Vec::new();
    if tables.is_empty() {
        lead.push("None of the figures given has a place in the paper’s tables.".into());
        return Beside { lead, tables };
    }
    lead.push(format!("The lines marked “the paper” are printed figures ({}).", PAPER.source));
    let strangers = strangers(runs);
    if !strangers.is_empty() {
        lead.push(stand_ins(&strangers));
    }
    lead.extend([THREAT, ADAPTIVE, COUNTING].map(String::from));
    let numbers = PAPER.table.iter().map(|table| table.number).chain([10]);
    let mut without: Vec<u32> =
        numbers.filter(|number| !tables.iter().any(|(shown, _)| shown == number)).collect();
    without.sort_unstable();
    if !without.is_empty() {
        let without: Vec<String> = without.iter().map(u32::to_string).collect();
        lead.push(format!("No figure given belongs to these tables: {}.", without.join(", ")));
    }
    Beside { lead, tables }
}

/// The models that are none of the paper's.
pub(super) fn strangers(runs: &[Run]) -> Vec<&str> {
    let mut out: Vec<&str> = Vec::new();
    for run in runs {
        let known = PAPER.model.iter().any(|model| model.ids.contains(&run.model));
        if !known && !out.contains(&run.model.as_str()) {
            out.push(&run.model);
        }
    }
    out
}

/// What is to be known of models that are not the paper's.
pub(super) fn stand_ins(names: &[&str]) -> String {
    let paper: Vec<&str> = PAPER.model.iter().map(|model| model.name.as_str()).collect();
    format!(
        "Not models of the paper ({}): {}. Their figures beside the paper’s show whether an effect is there on other \
         models as well; they reproduce none of its figures.",
        paper.join(", "),
        names.join(", ")
    )
}

fn all(runs: &[Run]) -> Vec<Ours<'_>> {
    let mut out = Vec::new();
    for (i, run) in runs.iter().enumerate() {
        let words = |defense: &str| {
            let all = run.summary.run["defenses"].as_array().into_iter().flatten();
            all.filter(|d| d["name"] == defense).find_map(|d| d["subject"]["defense"].as_str())
        };
        for row in run.summary.rows.iter().filter(|row| row.n > 0) {
            let parts = words(&row.defense).map(Parts::of).unwrap_or_default();
            out.push(Ours { run: i, model: &run.model, row, parts });
        }
    }
    out
}

/// A table of methods.
fn compared(runs: &[Run], ours: &[Ours], table: &Table) -> Option<Grid> {
    let per_set = table.columns.iter().any(|column| column.task.is_some());
    let ablation = table.number == 6;
    let blocks = table.row.iter().any(|row| row.block.is_some());
    let split = Split { attack: ablation || blocks, dataset: per_set };
    let here: Vec<&Ours> = ours
        .iter()
        .filter(|o| {
            table.tasks.contains(&o.row.task)
                && runs[o.run].points.is_empty()
                && (!per_set || table.model == "clip" || is_qwen(o.model) == (table.model == "qwen"))
                && (!ablation || has_one_part(ours, o.run))
        })
        .collect();
    let mut columns = table.columns.clone();
    if !per_set && columns.iter().any(|column| column.dataset.as_deref() != Some("mean")) {
        columns.extend(extra_columns(table, &here, blocks));
    }
    let key = |o: &Ours| if ablation { o.ablated().map(String::from) } else { o.method() };
    let budget = |o: &Ours| o.parts.number().map(String::from);
    let budgets: Vec<&str> = table.row.iter().filter_map(|row| row.budget.as_deref()).collect();
    let fits = |o: &Ours, row: &PaperRow| {
        key(o).as_deref() == Some(&row.method)
            && row.budget.as_ref().is_none_or(|wanted| budget(o).as_ref() == Some(wanted))
    };
    // A defence of this project that the table has no line for.
    let is_extra = |o: &Ours| {
        let unknown = key(o).is_none_or(|key| !table.row.iter().any(|row| row.method == key));
        let untrained = !budgets.is_empty()
            && key(o).as_deref() == Some("plus")
            && budget(o).is_none_or(|found| !budgets.contains(&found.as_str()));
        (unknown && (o.parts.gif || o.parts.fra)) || untrained
    };
    let mut any = false;
    let mut any_attacked = false;
    let mut any_adaptive = false;
    let mut groups: Vec<Group> = Vec::new();
    let mut seen_blocks: Vec<Option<&str>> = Vec::new();
    for row in &table.row {
        if !seen_blocks.contains(&row.block.as_deref()) {
            seen_blocks.push(row.block.as_deref());
        }
    }
    for block in seen_blocks {
        let rows: Vec<&PaperRow> = table.row.iter().filter(|row| row.block.as_deref() == block).collect();
        let mut title = block.map(String::from);
        if let (Some(title), Some(eps)) = (&mut title, rows.first().and_then(|row| row.eps)) {
            *title += &format!(" at eps {eps}");
        }
        let is_attacked = |o: &Ours| {
            rows.first().is_some_and(|row| {
                if blocks {
                    !row.attack.is_empty() && o.is(&row.attack, row.eps)
                } else {
                    columns.iter().any(|c| !c.attack.is_empty() && o.is(&c.attack, c.eps))
                }
            }) && o.row.attacked.is_some()
        };
        let is_clean = |o: &Ours| {
            o.row.attacked.is_none() && rows.first().is_some_and(|row| !blocks || row.attack.is_empty())
        };
        let mut group = Group { title, lines: Vec::new() };
        let mut add = |group: &mut Group, method: &str, picked: &dyn Fn(&Ours) -> bool| {
            let attacked: Vec<&Ours> =
                here.iter().copied().filter(|&o| picked(o) && is_attacked(o)).collect();
            let clean: Vec<&Ours> = here.iter().copied().filter(|&o| picked(o) && is_clean(o)).collect();
            for line in lines(&attacked, &clean, split) {
                any = true;
                any_attacked |= line.setting.is_some();
                any_adaptive |= line.setting.is_some_and(|s| *s.threat == Threat::Adaptive);
                let condition = rows.first().filter(|_| blocks).copied();
                group.lines.push(our_line(runs, table, &columns, method, condition, &line));
            }
        };
        for row in &rows {
            group.lines.push(paper_line(table, &columns, row));
            add(&mut group, &row.name, &|o| fits(o, row));
        }
        groups.push(group);
        let mut more = Group {
            title: Some("Ours alone: the paper’s table has no such line".into()),
            lines: Vec::new(),
        };
        add(&mut more, "", &|o| is_extra(o));
        if !more.lines.is_empty() {
            groups.push(more);
        }
    }
    // The averages over sets are about attacks; without one they are Table 1's.
    if !any || (!any_attacked && !blocks && !per_set) {
        return None;
    }
    let mut heads =
        vec![("Method".to_owned(), false), ("Figures of".into(), false), ("Threat".into(), false)];
    heads.extend(columns.iter().map(|column| {
        let extra = if column.is_extra { " (not in the paper)" } else { "" };
        (format!("{}{extra}", column.name), true)
    }));
    let mut foot = Vec::new();
    if ablation {
        foot.push(
            "The marks of the paper’s two middle lines are lost in the text this was taken from; its section 5.3 gives GIF alone \
             57.5 and FRA alone 44.2 on Caltech256, “respectively”, and they are named by that."
                .into(),
        );
    }
    if table.row.iter().any(|row| row.budget.is_some()) {
        foot.push(
            "The radius that an anchor of ours was trained at is not in a run: lines are placed by the one number in the \
             anchor’s name."
                .into(),
        );
    }
    finish(runs, table, heads, groups, foot, any_adaptive)
}

fn finish(
    runs: &[Run],
    table: &Table,
    heads: Vec<(String, bool)>,
    groups: Vec<Group>,
    mut foot: Vec<String>,
    any_adaptive: bool,
) -> Option<Grid> {
    foot.insert(0, "The paper’s transfer is inferred; the reasons stand above the tables.".into());
    if any_adaptive {
        foot.insert(1, ADAPTIVE.into());
    }
    if runs.iter().any(|run| !run.is_complete()) {
        foot.push("* From a run that is not complete.".into());
    }
    Some(Grid {
        title: format!("Table {}: {}", table.number, table.title),
        lead: vec![format!("In {}. Ours with the Wilson 95 % interval of a single set.", table.unit)],
        heads,
        groups,
        foot,
        drawings: Vec::new(),
    })
}

/// Whether a run took the two parts of the defence apart.
fn has_one_part(ours: &[Ours], run: usize) -> bool {
    ours.iter().any(|o| o.run == run && matches!(o.ablated(), Some("gif" | "fra")))
}

/// Columns for sets that the table has none for.
fn extra_columns(table: &Table, here: &[&Ours], blocks: bool) -> Vec<Column> {
    let mut sets: Vec<&str> = Vec::new();
    for o in here {
        let set = set_name(&o.row.dataset);
        let known = table.columns.iter().any(|column| column.dataset.as_deref() == Some(set));
        if !known && !sets.contains(&set) {
            sets.push(set);
        }
    }
    let mut out = Vec::new();
    for set in sets {
        // One column a set, or its conditions as those of the first set.
        let first = table.columns.first().and_then(|column| column.dataset.clone());
        for like in table.columns.iter().filter(|column| column.dataset == first) {
            let suffix = like.name.split_once(' ').map(|(_, rest)| format!(" {rest}"));
            let name = format!("{set}{}", suffix.filter(|_| !blocks).unwrap_or_default());
            out.push(Column { name, dataset: Some(set.into()), is_extra: true, ..like.clone() });
        }
    }
    out
}

fn paper_line(table: &Table, columns: &[Column], row: &PaperRow) -> GridLine {
    let model = PAPER.model.iter().find(|model| model.key == table.model);
    let is_robust = !row.attack.is_empty()
        || table.parameter.is_some()
        || (row.block.is_none() && columns.iter().any(|column| !column.attack.is_empty()));
    let threat = if is_robust { Cell::threat(Some("transfer")).under("inferred") } else { Cell::dash() };
    let mut cells = vec![
        Cell::new(row.name.as_str()),
        Cell::new("the paper").under(model.map_or("", |model| model.name.as_str())),
        threat,
    ];
    cells.extend(
        (0..columns.len()).map(|i| row.values.get(i).map_or_else(Cell::dash, |v| Cell::number(*v, 1))),
    );
    GridLine { is_paper: true, cells }
}

/// Our line: what it is of, its threat model, and its figures by the table's columns. In a block
/// the condition is the block's and the columns are sets.
fn our_line(
    runs: &[Run],
    table: &Table,
    columns: &[Column],
    method: &str,
    condition: Option<&PaperRow>,
    line: &Line,
) -> GridLine {
    let mut sets: Vec<&str> = Vec::new();
    for (_, row) in &line.rows {
        if !sets.contains(&set_name(&row.dataset)) {
            sets.push(set_name(&row.dataset));
        }
    }
    let is_mean = columns.iter().all(|column| column.dataset.as_deref() == Some("mean"));
    let sixteen = registry::entries().iter().all(|entry| sets.contains(&entry.name.as_str()));
    let mut cells = vec![
        Cell::new(if method.is_empty() { undefended_or(line.defense) } else { method }),
        whose(runs, table, line, is_mean.then_some((sets.as_slice(), sixteen)), line.dataset),
        threat(line),
    ];
    let value = |column: &Column, set: &str| -> Vec<(usize, &Row)> {
        let (attack, eps) = match condition {
            Some(row) => (&row.attack, row.eps),
            None => (&column.attack, column.eps),
        };
        let task = column.task.as_deref().or(table.tasks.first().map(String::as_str));
        let mut found: Vec<(usize, &Row)> = Vec::new();
        for (run, row) in &line.rows {
            let is = match &row.attacked {
                None => attack.is_empty(),
                Some(a) => attack.contains(&a.attack) && a.eps == eps,
            };
            // Runs that measured the same on the same pictures.
            let again = |(other, had): &(usize, &Row)| {
                (had.n, had.correct, &had.attacked) == (row.n, row.correct, &row.attacked)
                    && runs[*other].summary.run["dataset"] == runs[*run].summary.run["dataset"]
            };
            if is
                && set_name(&row.dataset) == set
                && Some(row.task.as_str()) == task
                && !found.iter().any(again)
            {
                found.push((*run, row));
            }
        }
        found
    };
    // A line of one attack has its name beside the threat model.
    let attacks = |column: &Column| -> Vec<String> {
        if line.attack.is_some() { Vec::new() } else { column.attack.clone() }
    };
    for column in columns {
        let cell = match column.dataset.as_deref() {
            Some("mean") => {
                let all: Vec<&str> = if is_mean {
                    sets.clone()
                } else {
                    registry::entries().iter().map(|entry| entry.name.as_str()).collect()
                };
                let each: Vec<Vec<(usize, &Row)>> = all.iter().map(|set| value(column, set)).collect();
                mean(runs, &each, &attacks(column))
            }
            Some(set) if line.dataset.is_none() => cell(runs, &value(column, set), &attacks(column)),
            _ => cell(runs, &value(column, set_name(line.dataset.unwrap_or_default())), &attacks(column)),
        };
        cells.push(cell);
    }
    GridLine::new(cells)
}

fn mark(run: &Run) -> &'static str {
    if run.is_complete() { "" } else { "*" }
}

fn cell(runs: &[Run], found: &[(usize, &Row)], attacks: &[String]) -> Cell {
    match found {
        [] => Cell::dash(),
        [(run, row)] => {
            let mut cell = Cell::interval(row.value(), row.interval(), 1);
            cell.text += mark(&runs[*run]);
            // Where a column takes several attacks, the one that is not its first is named.
            if let Some(a) = row.attacked.as_ref().filter(|a| attacks.first() != Some(&a.attack))
                && attacks.len() > 1
            {
                cell.under += &format!(" {}", a.attack);
            }
            cell
        }
        several => {
            let each = several.iter().map(|(run, row)| {
                let attack = row.attacked.as_ref().filter(|_| attacks.len() > 1);
                let attack = attack.map(|a| format!("{}, ", a.attack)).unwrap_or_default();
                format!("{:.1}{} ({attack}run {})", row.value(), mark(&runs[*run]), run + 1)
            });
            Cell::new(each.collect::<Vec<_>>().join(", "))
        }
    }
}

/// The mean over sets, where each has one figure.
fn mean(runs: &[Run], each: &[Vec<(usize, &Row)>], attacks: &[String]) -> Cell {
    if let [one] = each {
        return cell(runs, one, attacks);
    }
    let values: Option<Vec<(usize, f64)>> = each
        .iter()
        .map(|found| match found.as_slice() {
            [(run, row)] => Some((*run, row.value())),
            _ => None,
        })
        .collect();
    let Some(values) = values.filter(|values| !values.is_empty()) else { return Cell::dash() };
    let unfinished = values.iter().any(|(run, _)| !runs[*run].is_complete());
    let mean = values.iter().map(|(_, value)| value).sum::<f64>() / values.len() as f64;
    let mut cell = Cell::number(mean, 1);
    cell.text += if unfinished { "*" } else { "" };
    cell
}

/// Whose figures a line has: never to be taken for the paper's.
fn whose(
    runs: &[Run],
    table: &Table,
    line: &Line,
    averaged: Option<(&[&str], bool)>,
    dataset: Option<&str>,
) -> Cell {
    let paper = PAPER.model.iter().find(|model| model.key == table.model);
    let is_papers = paper.is_some_and(|model| model.ids.iter().any(|id| id == line.model));
    let mut under = Vec::new();
    under.push(match (is_papers, line.defense == "none" && robust(line.model).is_some()) {
        (true, _) => "the paper’s model".to_owned(),
        (false, true) => "not known to be the paper’s model".into(),
        _ => format!("not the paper’s {}", paper.map_or("model", |model| model.name.as_str())),
    });
    if line.defense != "none" {
        under.push(format!("defence {}", line.defense));
    }
    match averaged {
        Some((_, true)) => under.push("mean of the 16 sets".into()),
        Some(([one], _)) => under.push(format!("{one} alone, not the 16 sets")),
        Some((sets, _)) => {
            under.push(format!("mean of {} sets alone, not the 16: {}", sets.len(), sets.join(", ")));
        }
        None => {}
    }
    if let Some(dataset) = dataset {
        let papers = table.columns.first().and_then(|column| column.dataset.as_deref()).unwrap_or_default();
        let is = dataset.to_lowercase().contains(papers);
        under.push(if is { dataset.into() } else { format!("{dataset}, not {papers}") });
    }
    under.push(format!("n = {}", count(line.rows.iter().map(|(_, row)| row.n))));
    let mut numbers: Vec<usize> = line.rows.iter().map(|(run, _)| run + 1).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let numbers: Vec<String> = numbers.iter().map(usize::to_string).collect();
    let s = if numbers.len() == 1 || runs.len() == 1 { "" } else { "s" };
    under.push(format!("run{s} {}", numbers.join(", ")));
    Cell::new(format!("ours: {}", line.model)).under(under.join("; "))
}

fn threat(line: &Line) -> Cell {
    let Some(setting) = line.setting else { return Cell::dash() };
    let mut under = Vec::new();
    match setting.surrogate() {
        Some(on) => under.push(format!("crafted on {on}")),
        None => under.push("not comparable with the paper’s".into()),
    }
    under.push(setting.holds().into());
    under.extend(line.attack.map(String::from));
    Cell::threat(Some(&setting.threat.to_string())).under(under.join("; "))
}

/// A table of what an anchor was trained with: our lines are sweeps, and runs with anchors that the
/// recipes name by it.
fn trained(runs: &[Run], ours: &[Ours], table: &Table, parameter: Parameter) -> Option<Grid> {
    struct Trained<'a> {
        of: &'a Ours<'a>,
        value: u64,
        /// Where the other parameters stand.
        rest: String,
    }
    let mut found: Vec<Trained> = Vec::new();
    for o in ours {
        if !table.tasks.contains(&o.row.task) || o.row.attacked.is_none() || !o.is(&table.attack, table.eps) {
            continue;
        }
        let point = runs[o.run].points.iter().find(|(name, _)| *name == o.row.defense);
        match point {
            Some((_, point)) => {
                let Some(value) = point.value(parameter) else { continue };
                let rest: Vec<String> = Parameter::ALL
                    .into_iter()
                    .filter(|other| *other != parameter)
                    .filter_map(|other| point.value(other).map(|value| format!("{other} {value}")))
                    .collect();
                found.push(Trained { of: o, value: value as u64, rest: rest.join(", ") });
            }
            None => {
                let value = o.parts.trained(parameter);
                found.extend(value.map(|value| Trained {
                    of: o,
                    value,
                    rest: "placed by the anchors’ names".into(),
                }));
            }
        }
    }
    let mut lines: Vec<Vec<Trained>> = Vec::new();
    for one in found {
        let same = |line: &&mut Vec<Trained>| {
            line.first().is_some_and(|first| {
                let key = |t: &Trained<'_>| {
                    let attack = t.of.row.attacked.as_ref().map(|a| a.attack.clone());
                    (t.of.model.to_owned(), t.of.row.dataset.clone(), t.rest.clone(), attack)
                };
                key(first) == key(&one) && Setting::of(first.of.row) == Setting::of(one.of.row)
            })
        };
        match lines.iter_mut().find(same) {
            Some(line) => line.push(one),
            None => lines.push(vec![one]),
        }
    }
    // One value is no series.
    lines.retain(|line| line.iter().any(|one| one.value != line[0].value));
    if lines.is_empty() {
        return None;
    }
    let mut columns = table.columns.clone();
    let mut more: Vec<u64> = lines.iter().flatten().map(|one| one.value).collect();
    more.sort_unstable();
    more.dedup();
    for value in more {
        if !columns.iter().any(|column| column.at == Some(value)) {
            let like = Column {
                name: value.to_string(),
                dataset: None,
                task: None,
                attack: Vec::new(),
                eps: None,
                at: Some(value),
                is_extra: true,
            };
            columns.push(like);
        }
    }
    let any_adaptive = lines
        .iter()
        .flatten()
        .any(|one| one.of.row.attacked.as_ref().is_some_and(|a| a.threat == Threat::Adaptive));
    let line = |all: &[Trained]| {
        let first = all[0].of;
        let as_line = Line {
            model: first.model,
            defense: &all[0].rest,
            parts: first.parts,
            setting: Setting::of(first.row),
            attack: first.row.attacked.as_ref().map(|a| a.attack.as_str()),
            dataset: None,
            rows: all.iter().map(|one| (one.of.run, one.of.row)).collect(),
        };
        let mut cells = vec![
            Cell::new(first.row.dataset.as_str()),
            whose(runs, table, &as_line, None, None),
            threat(&as_line),
        ];
        cells.extend(columns.iter().map(|column| {
            let mut here: Vec<(usize, &Row)> = Vec::new();
            for one in all.iter().filter(|one| Some(one.value) == column.at) {
                here.push((one.of.run, one.of.row));
            }
            cell(runs, &here, &[])
        }));
        GridLine::new(cells)
    };
    let mut group = Group::default();
    let mut placed = vec![false; lines.len()];
    for row in &table.row {
        group.lines.push(paper_line(table, &columns, row));
        for (i, ours) in lines.iter().enumerate() {
            if row.dataset.as_deref() == Some(set_name(&ours[0].of.row.dataset)) {
                placed[i] = true;
                group.lines.push(line(ours));
            }
        }
    }
    let mut groups = vec![group];
    let rest: Vec<GridLine> =
        lines.iter().zip(&placed).filter(|(_, placed)| !**placed).map(|(ours, _)| line(ours)).collect();
    if !rest.is_empty() {
        groups.push(Group {
            title: Some("Ours alone: sets that the paper’s table has not".into()),
            lines: rest,
        });
    }
    let mut heads =
        vec![("Data set".to_owned(), false), ("Figures of".into(), false), ("Threat".into(), false)];
    heads.extend(columns.iter().map(|column| {
        let extra = if column.is_extra { " (not in the paper)" } else { "" };
        (format!("{} {parameter}{extra}", column.name), true)
    }));
    let foot = vec![format!(
        "Right answers under attack, ours at eps {}; the paper names neither attack nor radius for this table.",
        table.eps.map(|eps| eps.to_string()).unwrap_or_default()
    )];
    finish(runs, table, heads, groups, foot, any_adaptive)
}

/// Table 10: which language models there are.
fn encoders(runs: &[Run]) -> Option<Grid> {
    let mut seen: Vec<(&str, bool)> = Vec::new();
    let mut lines = Vec::new();
    for paper in &PAPER.encoder {
        lines.push(GridLine {
            is_paper: true,
            cells: vec![
                Cell::new(paper.name.as_str()),
                Cell::new("the paper"),
                Cell::new(paper.encoder.as_str()),
                Cell::new(paper.id.as_str()),
            ],
        });
        for run in runs {
            let speaks = matches!(run.summary.run["task"].as_str(), Some("coco" | "questions"));
            let qwen = is_qwen(&run.model);
            if !speaks || qwen != is_qwen(&paper.name) || seen.contains(&(run.model.as_str(), qwen)) {
                continue;
            }
            seen.push((&run.model, qwen));
            let digest: String =
                name(&run.summary.run["model"]["digest"]).unwrap_or_default().chars().take(12).collect();
            let is_papers = run.model == paper.id;
            lines.push(GridLine::new(vec![
                Cell::new(paper.name.as_str()),
                Cell::new("ours").under(if is_papers {
                    "the paper’s model".to_owned()
                } else {
                    format!("not {}, a stand-in for it", paper.name)
                }),
                if is_papers { Cell::new(paper.encoder.as_str()) } else { Cell::dash() },
                Cell::new(run.model.as_str()).under(if digest.is_empty() {
                    String::new()
                } else {
                    format!("weights {digest}")
                }),
            ]));
        }
    }
    if seen.is_empty() {
        return None;
    }
    Some(Grid {
        title: "Table 10: The language models".into(),
        heads: ["Model", "Figures of", "Vision encoder", "Hugging Face id"].map(|h| (h.into(), false)).into(),
        groups: vec![Group { title: None, lines }],
        ..Grid::default()
    })
}

impl Beside {
    /// `{source, notes, tables}`, each of the tables with its number.
    pub fn json(&self) -> Value {
        let tables: Vec<Value> = self
            .tables
            .iter()
            .map(|(number, grid)| {
                let mut json = grid.json();
                json["table"] = (*number).into();
                json
            })
            .collect();
        json!({ "source": PAPER.source, "notes": self.lead, "tables": tables })
    }

    /// The paper's figures in these tables.
    pub fn printed(&self) -> Vec<Printed> {
        let mut out = Vec::new();
        for table in PAPER.table.iter().filter(|t| self.tables.iter().any(|(number, _)| *number == t.number))
        {
            for row in &table.row {
                for (column, value) in table.columns.iter().zip(&row.values) {
                    let (attack, eps) = [(&table.attack, table.eps), (&row.attack, row.eps)]
                        .into_iter()
                        .find(|(attack, _)| !attack.is_empty())
                        .unwrap_or((&column.attack, column.eps));
                    let dataset = row.dataset.as_ref().or(column.dataset.as_ref());
                    out.push(Printed {
                        table: table.number,
                        row: row.name.clone(),
                        column: column.name.clone(),
                        unit: "%",
                        dataset: match dataset.map(String::as_str) {
                            Some("mean") => "mean of 16 sets".into(),
                            other => other.unwrap_or_default().into(),
                        },
                        task: column
                            .task
                            .clone()
                            .or_else(|| table.tasks.first().cloned())
                            .unwrap_or_default(),
                        attack: match attack.as_slice() {
                            [] => None,
                            _ if table.parameter.is_some() => Some("not named".into()),
                            several if several.iter().any(|name| name == "autoattack") => {
                                Some("autoattack".into())
                            }
                            [first, ..] => Some(first.clone()),
                        },
                        eps: eps.filter(|_| table.parameter.is_none()),
                        value: *value,
                    });
                }
            }
        }
        out
    }
}

/// What the paper's pictures were crafted on, as far as it can be told.
pub(super) const SURROGATE: &str = "the undefended CLIP (inferred)";
