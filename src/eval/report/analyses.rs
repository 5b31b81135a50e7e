//! What `radapt analyze` wrote, from its JSON.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use super::super::Row;
use super::grid::{Cell, Grid, GridLine, Group};
use super::kinds::{By, drawing, threats_named};
use crate::attack::{Eps, Threat, ThreatKind};
use crate::{Error, Result};

/// The analyses, as their files are called.
pub(super) const NAMES: [&str; 6] = ["cka", "replace", "spectrum", "attention", "insensitivity", "shapley"];

/// An analysis of two towers.
#[derive(Debug)]
pub(super) struct Analysis {
    pub path: PathBuf,
    /// One of [`NAMES`].
    pub name: String,
    /// What identifies it, by name.
    pub facts: Vec<(&'static str, String)>,
    pub datasets: Vec<String>,
    pub grids: Vec<Grid>,
    /// What casts doubt on it.
    pub notes: Vec<String>,
}

#[derive(Deserialize)]
struct Head {
    analysis: String,
    version: String,
    seed: u64,
    standard: Side,
    robust: Side,
    data: Option<Data>,
    #[serde(default)]
    failed: Vec<Value>,
}

#[derive(Deserialize)]
struct Side {
    name: String,
    digest: String,
}

#[derive(Deserialize)]
struct Data {
    name: String,
    n: usize,
}

#[derive(Deserialize)]
struct Cka {
    layers: Vec<String>,
    batches: usize,
    minibatch: Crossed,
}

#[derive(Deserialize)]
struct Crossed {
    cross: Vec<Vec<Option<f64>>>,
}

#[derive(Deserialize)]
struct Replace {
    stages: Vec<Stage>,
    sets: Vec<Set>,
}

#[derive(Deserialize)]
struct Stage {
    name: String,
}

#[derive(Deserialize)]
struct Set {
    role: String,
    dataset: String,
    rows: Vec<Row>,
    #[serde(default)]
    flags: Vec<String>,
}

#[derive(Deserialize)]
struct Spectrum {
    rings: Vec<Ring>,
}

#[derive(Deserialize)]
struct Ring {
    radius: f64,
    standard: f64,
    robust: f64,
    relative: Option<f64>,
}

#[derive(Deserialize)]
struct Attention {
    habits: Vec<Habit>,
}

#[derive(Deserialize)]
struct Habit {
    tower: String,
    class: Mean,
    entropy: Mean,
    brightness: Option<Mean>,
    between_pictures: Option<Mean>,
}

#[derive(Deserialize)]
struct Mean {
    value: f64,
    low: f64,
    high: f64,
}

#[derive(Deserialize)]
struct Insensitivity {
    pictures: usize,
    between_pictures: Vec<Pair>,
    with_white: Vec<Pair>,
}

#[derive(Deserialize)]
struct Pair {
    first: String,
    second: String,
    #[serde(flatten)]
    mean: Mean,
}

#[derive(Deserialize)]
struct Shapley {
    values: Vec<Values>,
}

#[derive(Deserialize)]
struct Values {
    attack: Option<String>,
    eps: Option<Eps>,
    threat: Option<ThreatKind>,
    surrogate: Option<String>,
    n: usize,
    whole: f64,
    none: f64,
    heads: Vec<HeadValue>,
}

#[derive(Deserialize)]
struct HeadValue {
    head: usize,
    #[serde(flatten)]
    mean: Mean,
}

impl Mean {
    fn cell(&self, digits: usize) -> Cell {
        Cell::interval(self.value, (self.low, self.high), digits)
    }
}

impl Analysis {
    /// From a file with this in it.
    pub fn read(path: &Path, json: &Value) -> Result<Self> {
        fn of<T: serde::de::DeserializeOwned>(path: &Path, json: &Value) -> Result<T> {
            serde_json::from_str(&json.to_string()).map_err(|e| Error::config(path, e.to_string()))
        }
        if !NAMES.iter().any(|known| json["analysis"] == *known) {
            let reason = format!("analysis: expected {}, found {}", NAMES.join(", "), json["analysis"]);
            return Err(Error::config(path, reason));
        }
        let head: Head = of(path, json)?;
        let mut notes = Vec::new();
        if !head.failed.is_empty() {
            notes.push(format!("{} pictures could not be read and are in no figure", head.failed.len()));
        }
        let mut datasets: Vec<String> = head.data.iter().map(|data| data.name.clone()).collect();
        let mut grids = match head.analysis.as_str() {
            "cka" => vec![cka(path, of(path, json)?)?],
            "replace" => {
                let found: Replace = of(path, json)?;
                for set in &found.sets {
                    notes.extend(set.flags.iter().cloned());
                    if !datasets.contains(&set.dataset) {
                        datasets.push(set.dataset.clone());
                    }
                }
                replace(found)
            }
            "spectrum" => vec![spectrum(of(path, json)?)],
            "attention" => vec![attention(of(path, json)?)],
            "insensitivity" => vec![insensitivity(of(path, json)?)],
            _ => {
                threats_named(path, "values", &json["values"])?;
                vec![shapley(path, of(path, json)?)?]
            }
        };
        let svg = path.with_extension("svg");
        if let Some(first) = grids.first_mut() {
            match drawing(&svg, &first.title)? {
                Ok(drawing) => first.drawings.push(drawing),
                Err(why) => notes.push(why),
            }
        }
        let side =
            |side: &Side| format!("{} ({})", side.name, side.digest.chars().take(12).collect::<String>());
        let data = head.data.as_ref();
        let facts = vec![
            ("standard tower", side(&head.standard)),
            ("robust tower", side(&head.robust)),
            ("pictures", data.map_or("none".into(), |data| format!("{} of {}", data.n, data.name))),
            ("seed", head.seed.to_string()),
            ("version", format!("radapt {}", head.version)),
        ];
        Ok(Self { path: path.into(), name: head.analysis, facts, datasets, grids, notes })
    }

    /// `{analysis, path, facts, notes, tables}`.
    pub fn json(&self) -> Value {
        let facts: serde_json::Map<String, Value> =
            self.facts.iter().map(|(name, value)| ((*name).to_owned(), value.clone().into())).collect();
        json!({
            "analysis": self.name, "path": self.path.display().to_string(), "facts": facts,
            "notes": self.notes, "tables": self.grids.iter().map(Grid::json).collect::<Vec<_>>(),
        })
    }
}

fn cka(path: &Path, found: Cka) -> Result<Grid> {
    let lines = found.layers.iter().enumerate().map(|(i, layer)| {
        let at = |j: usize| found.minibatch.cross.get(i).and_then(|row| row.get(j)).copied();
        let cell = |value: Option<f64>| value.map_or_else(Cell::dash, |value| Cell::number(value, 3));
        at(i).zip(at(0)).map(|(same, first)| vec![Cell::new(layer.as_str()), cell(same), cell(first)])
    });
    let lines: Option<Vec<Vec<Cell>>> = lines.collect();
    let lines = lines.ok_or_else(|| {
        Error::config(path, format!("minibatch.cross: expected {0} x {0} numbers", found.layers.len()))
    })?;
    let first = found.layers.first().map_or("", String::as_str);
    let heads = [
        ("Layer", false),
        ("its like in the robust tower", true),
        (&format!("the robust tower’s {first}"), true),
    ];
    let mut grid = Grid::simple("How alike the layers of the two towers are (CKA)", &heads, lines);
    grid.lead.push(format!(
        "Linear CKA from {} minibatches: 1 is the same representation up to rotation and scale, 0 nothing in common. Where \
         the robust tower left the standard one, the figure falls.",
        found.batches
    ));
    Ok(grid)
}

fn replace(found: Replace) -> Vec<Grid> {
    let one = |set: &Set| {
        // Clean first, then each attack with its threat model, which stands in the head.
        let mut columns: Vec<Option<By>> = Vec::new();
        let by = |row: &Row| {
            row.attacked.as_ref().map(|a| By {
                attack: a.attack.clone(),
                eps: a.eps,
                threat: a.threat.clone(),
                pictures: a.pictures,
            })
        };
        for row in &set.rows {
            let by = by(row);
            if !columns.contains(&by) {
                columns.push(by);
            }
        }
        let head = |by: &Option<By>| match by {
            None => "clean".to_owned(),
            Some(by) => match by.surrogate() {
                Some(on) => {
                    format!("{}, transfer, crafted on {on}, {}", by.label(), by.pictures)
                }
                None => format!("{}, adaptive, {}", by.label(), by.pictures),
            },
        };
        let lines = found
            .stages
            .iter()
            .map(|stage| {
                let cells = columns.iter().map(|column| {
                    let row = set.rows.iter().find(|row| row.defense == stage.name && by(row) == *column);
                    row.filter(|row| row.n > 0)
                        .map_or_else(Cell::dash, |row| Cell::interval(row.value(), row.interval(), 1))
                });
                GridLine::new(std::iter::once(Cell::new(stage.name.as_str())).chain(cells).collect())
            })
            .collect();
        let mut heads = vec![("Replaced up to".to_owned(), false)];
        heads.extend(columns.iter().map(|column| (head(column), true)));
        let n = super::count(set.rows.iter().map(|row| row.n));
        Grid {
            title: format!("Progressive replacement: {} ({})", set.dataset, set.role),
            lead: vec![format!(
                "Share of pictures that came out right in percent, n = {n}, with its Wilson 95 % interval, as the parts of the \
                 standard tower are replaced by the robust one’s, in order and cumulatively; under attack, right on \
                 the clean picture as well. Adaptive pictures are crafted anew on each mixture."
            )],
            heads,
            groups: vec![Group { title: None, lines }],
            ..Grid::default()
        }
    };
    found.sets.iter().map(one).collect()
}

fn spectrum(found: Spectrum) -> Grid {
    let lines = found
        .rings
        .iter()
        .map(|ring| {
            vec![
                Cell::new(ring.radius.to_string()),
                Cell::number(ring.standard, 4),
                Cell::number(ring.robust, 4),
                ring.relative.map_or_else(Cell::dash, |share| Cell::number(100.0 * share, 1)),
            ]
        })
        .collect();
    let heads =
        [("Frequency, cycles a patch", false), ("standard", true), ("robust", true), ("change, %", true)];
    let mut grid = Grid::simple("Which frequencies the patch embedding lets through", &heads, lines);
    grid.lead.push(
        "Mean magnitude of the patch embedding’s kernels at each distance from frequency 0. A robust tower that \
         filters noise falls at the high ones."
            .into(),
    );
    grid
}

fn attention(found: Attention) -> Grid {
    let lines = found
        .habits
        .iter()
        .map(|habit| {
            let optional = |mean: &Option<Mean>| mean.as_ref().map_or_else(Cell::dash, |mean| mean.cell(3));
            vec![
                Cell::new(habit.tower.as_str()),
                habit.class.cell(3),
                habit.entropy.cell(3),
                optional(&habit.brightness),
                optional(&habit.between_pictures),
            ]
        })
        .collect();
    let heads = [
        ("Tower", false),
        ("on itself", true),
        ("spread (entropy)", true),
        ("correlation with brightness", true),
        ("alike between pictures", true),
    ];
    let mut grid = Grid::simple("Where the first block’s class token looks", &heads, lines);
    grid.lead.push(
        "Means over the pictures with 95 % intervals: the share of attention on the class token itself, the entropy over \
         the patches (1 is even), the correlation with the patches’ brightness, and the cosine between the maps of two \
         pictures."
            .into(),
    );
    grid
}

fn insensitivity(found: Insensitivity) -> Grid {
    let line = |what: &str, pair: &Pair| {
        let towers = match (&pair.first, &pair.second) {
            (a, b) if a == b => a.clone(),
            (a, b) => format!("{a} and {b}"),
        };
        vec![Cell::new(what), Cell::new(towers), pair.mean.cell(3)]
    };
    let lines = found
        .between_pictures
        .iter()
        .map(|pair| line("two pictures", pair))
        .chain(found.with_white.iter().map(|pair| line("a picture and white", pair)))
        .collect();
    let heads = [("Between", false), ("Towers", false), ("mean cosine", true)];
    let mut grid = Grid::simple("How little the first attention depends on the picture", &heads, lines);
    grid.lead.push(format!(
        "Mean cosine of the first attention’s outputs with its 95 % interval, {} pictures: 1 is an output that does not depend \
         on the picture.",
        found.pictures
    ));
    grid
}

fn shapley(path: &Path, found: Shapley) -> Result<Grid> {
    let mut heads: Vec<(String, bool)> = ["Attack", "Threat", "Surrogate"].map(|h| (h.into(), false)).into();
    heads.extend(["n", "all heads", "no head"].map(|head| (head.to_owned(), true)));
    let count = found.values.first().map_or(0, |values| values.heads.len());
    heads.extend((1..=count).map(|head| (format!("head {head}"), true)));
    let mut lines = Vec::new();
    for values in &found.values {
        let threat = match (values.threat, &values.surrogate) {
            (Some(ThreatKind::Transfer), Some(surrogate)) => {
                Some(Threat::Transfer { surrogate: surrogate.clone() })
            }
            (Some(ThreatKind::Adaptive), _) => Some(Threat::Adaptive),
            _ => None,
        };
        let attack = values.attack.as_deref().map_or("clean".into(), |attack| {
            values.eps.map_or_else(|| attack.to_owned(), |eps| format!("{attack} @ {eps}"))
        });
        let surrogate = values.surrogate.as_deref().filter(|_| threat.is_some());
        let mut cells = vec![
            Cell::new(attack),
            Cell::threat(threat.map(|threat| threat.to_string()).as_deref()),
            surrogate.map_or_else(Cell::dash, Cell::new),
            Cell::new(values.n.to_string()),
            Cell::number(values.whole, 1),
            Cell::number(values.none, 1),
        ];
        if values.heads.len() != count || values.heads.iter().enumerate().any(|(i, h)| h.head != i + 1) {
            return Err(Error::config(path, format!("values: expected heads 1 to {count} in each")));
        }
        cells.extend(values.heads.iter().map(|head| head.mean.cell(1)));
        lines.push(GridLine::new(cells));
    }
    Ok(Grid {
        title: "What each head of the first block adds (Shapley values)".into(),
        lead: vec![
            "Percentage points that a head of the robust tower’s first block adds to the share of pictures it gets right, on \
             average over the orders in which heads can be added, with its 95 % interval; absent heads add nothing to the \
             residual stream. Attacked pictures count whatever the tower makes of the clean ones."
                .into(),
        ],
        heads,
        groups: vec![Group { title: None, lines }],
        ..Grid::default()
    })
}
