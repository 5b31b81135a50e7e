//! Reports to test with.

use super::report::{Report, Row};
use crate::attack::{Threat, ThreatKind};
use crate::eval::wilson;

pub(super) fn row(
    task: &'static str,
    defense: &str,
    threat: Option<ThreatKind>,
    correct: usize,
    target: usize,
    n: usize,
) -> Row {
    let (low, high) = wilson(correct, n);
    Row {
        task,
        defense: defense.into(),
        attack: threat.map(|_| "v-attack".into()),
        eps: threat.map(|_| "16/255".into()),
        threat: threat.map(|kind| match kind {
            ThreatKind::Transfer => Threat::Transfer { surrogate: "pocket-clip".into() },
            ThreatKind::Adaptive => Threat::Adaptive,
        }),
        n,
        correct,
        target,
        value: 100.0 * correct as f64 / n.max(1) as f64,
        low,
        high,
    }
}

/// Right answers: clean, clean defended, attacked, transfer, adaptive.
pub(super) fn rows(task: &'static str, [a, b, c, d, e]: [usize; 5], n: usize) -> Vec<Row> {
    use ThreatKind::{Adaptive, Transfer};
    vec![
        row(task, "none", None, a, 0, n),
        row(task, "gif+fra", None, b, 0, n),
        row(task, "none", Some(Transfer), c, (n - c).saturating_sub(1), n),
        row(task, "gif+fra", Some(Transfer), d, (n - d) / 3, n),
        row(task, "gif+fra", Some(Adaptive), e, (n - e).saturating_sub(3), n),
    ]
}

pub(super) fn report(rows: Vec<Row>) -> Report {
    Report {
        model: "pocket-llava".into(),
        defense: "GIF (cutoff 17.1429) and FRA (anchor training-free, alpha 1.2, beta -0.8)".into(),
        attack: "V-Attack, 100 steps on the values of the last 4 blocks of pocket-clip".into(),
        eps: "16/255".into(),
        command: "radapt demo --seed 7 --out demo.html".into(),
        seed: 7,
        rows,
        pictures: Vec::new(),
        seconds: 41.26,
    }
}
