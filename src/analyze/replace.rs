//! Progressive replacement (the paper's Section 3.1 and 3.3, Appendices A and C): the standard
//! tower's parts are replaced by the robust one's, one after the other in the order a picture passes
//! them, and the tower is scored after each, clean and attacked.
//!
//! The scoring is that of [`crate::eval::classify`], each stage going by its name where a defence
//! does there: `none`, `emb`, `b1-attn`, `b1-mlp` and so on, the last part replaced.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::plot::{Chart, Figure, Point, Series, below, chart_size};
use super::{Data, Findings, Pair, Side, csv, names};
use crate::attack::{Subject, ThreatKind};
use crate::eval::{Row, Summary};
use crate::tower::VisionTower;
use crate::tower::clip::{Clip, Part};
use crate::{Error, Result};

/// A tower on the way from the standard to the robust one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// The last part replaced, as [`Part`] is displayed; `none` for the standard tower.
    pub name: String,
    /// Parts replaced, from the first.
    pub replaced: usize,
}

/// All stages of towers with so many blocks: the standard tower, then a part more each.
pub fn stages(blocks: usize) -> Vec<Stage> {
    let parts = Part::all(blocks).into_iter().enumerate();
    let after = parts.map(|(i, part)| Stage { name: part.to_string(), replaced: i + 1 });
    std::iter::once(Stage { name: "none".into(), replaced: 0 }).chain(after).collect()
}

/// The stages of these names, in their order on the way; all where none is named.
///
/// # Errors
/// If there is no such stage.
pub fn choose(blocks: usize, names: &[String]) -> Result<Vec<Stage>> {
    let all = stages(blocks);
    if let Some(unknown) = names.iter().find(|name| all.iter().all(|stage| stage.name != **name)) {
        let expected = format!("none, emb, b1-attn, b1-mlp, ..., b{blocks}-mlp or out");
        return Err(Error::argument("--parts", expected, unknown));
    }
    Ok(all.into_iter().filter(|stage| names.is_empty() || names.contains(&stage.name)).collect())
}

impl Pair {
    /// The standard tower with its first `replaced` parts the robust one's. With 0 it is the
    /// standard, with all of them the robust tower, bit for bit.
    ///
    /// # Errors
    /// If there are not as many parts, or the projections' widths differ and are to be exchanged.
    pub fn replaced(&self, replaced: usize) -> Result<Clip> {
        let parts = Part::all(self.standard.spec().blocks);
        let Some(first) = parts.get(..replaced) else {
            return Err(Error::argument("parts", format!("at most {}", parts.len()), replaced));
        };
        self.standard.with_parts(&self.robust, first)
    }
}

/// What results say of a stage; the standard tower itself is undefended.
pub fn subject(sides: &[Side; 2], stage: &Stage) -> Subject {
    let [standard, robust] = sides;
    if stage.replaced == 0 {
        return Subject::undefended(&standard.name);
    }
    let mut hash = Sha256::new();
    hash.update(b"replaced");
    hash.update(&robust.digest);
    hash.update((stage.replaced as u64).to_le_bytes());
    let digest = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Subject {
        model: standard.name.clone(),
        defense: Some(format!("all up to {} of {}", stage.name, robust.name)),
        digest: Some(digest),
    }
}

/// What pictures are to the robust tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Of the kind it was fine-tuned on.
    InDistribution,
    /// Of another kind.
    OutOfDistribution,
}

impl Role {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::InDistribution => "in-distribution",
            Self::OutOfDistribution => "out-of-distribution",
        }
    }
}

/// Figures of all stages on one set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SetFigures {
    /// What the set is to the robust tower, as the caller says.
    pub role: Role,
    /// The set's name.
    pub dataset: String,
    /// Items of it.
    pub items: usize,
    /// Items that could not be scored; they are in no row.
    pub failed: usize,
    /// The figures, a stage's name as `defense`; a robust one has its threat model.
    pub rows: Vec<Row>,
    /// What the attacks noticed that casts doubt on a figure.
    pub flags: Vec<String>,
}

impl SetFigures {
    /// Of a run over the stages.
    pub fn new(role: Role, summary: Summary) -> Self {
        let dataset = summary.rows.first().map(|row| row.dataset.clone()).unwrap_or_default();
        let (items, failed) = (summary.items, summary.failed);
        Self { role, dataset, items, failed, rows: summary.rows, flags: summary.flags }
    }

    /// A stage's figure: clean, or under a threat model.
    pub fn row(&self, stage: &str, threat: Option<ThreatKind>) -> Option<&Row> {
        let of =
            |row: &&Row| row.defense == stage && row.attacked.as_ref().map(|a| a.threat.kind()) == threat;
        self.rows.iter().find(of)
    }

    /// The attack in words.
    fn attack(&self) -> String {
        self.rows.iter().find_map(|row| row.attacked.as_ref()).map_or("no attack".into(), |attacked| {
            let eps = attacked.eps.map_or(String::new(), |eps| format!(" at eps {eps}"));
            format!("{}{eps}", attacked.attack)
        })
    }
}

/// Accuracy as a standard tower becomes a robust one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Replace {
    /// The stages scored, in order.
    pub stages: Vec<Stage>,
    /// Their figures, set by set.
    pub sets: Vec<SetFigures>,
}

/// Clean, and under each threat model.
const COLUMNS: [(&str, Option<ThreatKind>); 3] = [
    ("clean", None),
    ("attacked (transfer)", Some(ThreatKind::Transfer)),
    ("attacked (adaptive)", Some(ThreatKind::Adaptive)),
];

impl Findings for Replace {
    const NAME: &'static str = "replace";

    fn csv(&self) -> Result<String> {
        let head = [
            "role", "dataset", "stage", "replaced", "attack", "eps", "threat", "n", "correct", "percent",
            "low", "high",
        ];
        let mut lines = vec![head.map(String::from).to_vec()];
        for set in &self.sets {
            for stage in &self.stages {
                for row in set.rows.iter().filter(|row| row.defense == stage.name) {
                    let (low, high) = row.interval();
                    let attacked = row.attacked.as_ref();
                    let eps = attacked.and_then(|a| a.eps).map(|eps| eps.to_string());
                    lines.push(vec![
                        set.role.words().into(),
                        set.dataset.clone(),
                        stage.name.clone(),
                        stage.replaced.to_string(),
                        attacked.map(|a| a.attack.clone()).unwrap_or_default(),
                        eps.unwrap_or_default(),
                        attacked.map(|a| a.threat.to_string()).unwrap_or_default(),
                        row.n.to_string(),
                        row.correct.to_string(),
                        row.value().to_string(),
                        low.to_string(),
                        high.to_string(),
                    ]);
                }
            }
        }
        csv(lines)
    }

    fn svg(&self, towers: [&str; 2], _: Option<&Data>) -> String {
        let attack = self.sets.first().map(SetFigures::attack).unwrap_or_default();
        let lines = [
            names(towers),
            "From left to right one part more of the standard tower is replaced by the robust tower's; bars: 95 % \
             intervals."
                .to_string(),
            format!("Attack: {attack}. transfer: pictures crafted on the untouched standard tower."),
            "adaptive: crafted on the very tower that is scored. none: the standard tower; out: all of the robust \
             one."
                .to_string(),
        ];
        const LEFT: f64 = 70.0;
        let (width, height) = chart_size(self.stages.len(), false);
        let places: Vec<String> = self.stages.iter().map(|stage| stage.name.clone()).collect();
        let wide = (LEFT + width + 30.0).max(720.0);
        let lines = Figure::wrap(wide, &lines);
        let top = Figure::top(lines.len()) + 52.0;
        let row = height + below(&places) + 62.0;
        let mut figure = Figure::new(
            wide,
            top + row * self.sets.len().max(1) as f64 - 50.0,
            "Which part brings the robustness? Replacing one after the other",
            &lines,
        );
        for (i, set) in self.sets.iter().enumerate() {
            let series: Vec<Series> = COLUMNS
                .iter()
                .map(|(name, threat)| {
                    let point = |stage: &Stage| {
                        let row = set.row(&stage.name, *threat).filter(|row| row.n > 0)?;
                        let (low, high) = row.interval();
                        Some(Point { value: row.value(), low, high })
                    };
                    Series { name, points: self.stages.iter().map(point).collect() }
                })
                .filter(|series| series.points.iter().any(Option::is_some))
                .collect();
            let n = set.rows.first().map_or(0, |row| row.n);
            let title = format!("{}: {}, n = {n}", set.role.words(), set.dataset);
            let chart = Chart {
                title: &title,
                places: &places,
                series: &series,
                range: (0.0, 100.0),
                measure: "percent right",
                across: "last part replaced",
                bars: false,
            };
            chart.draw(&mut figure, (LEFT, top + row * i as f64));
        }
        figure.finish()
    }

    fn table(&self) -> String {
        let mut lines = Vec::new();
        for set in &self.sets {
            let n = set.rows.first().map_or(0, |row| row.n);
            let (role, dataset) = (set.role.words(), &set.dataset);
            lines.push(format!("{role}: {dataset}, n = {n}, {}; percent right", set.attack()));
            let head = COLUMNS.map(|(name, _)| format!("{name:>28}")).concat();
            lines.push(format!("{:10}{head}", "replaced"));
            for stage in &self.stages {
                let cells = COLUMNS.map(|(_, threat)| {
                    let text = set.row(&stage.name, threat).map_or("-".into(), |row| {
                        let (low, high) = row.interval();
                        format!("{:.1} ({low:.1} to {high:.1})", row.value())
                    });
                    format!("{text:>28}")
                });
                lines.push(format!("{:10}{}", stage.name, cells.concat()));
            }
        }
        lines.join("\n")
    }
}
