use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};

use crate::attack::{Eps, Threat};

/// One figure: how many of n items came out right. A figure on attacked pictures has a threat
/// model, one on clean pictures has none; there is no other kind.
///
/// In JSON as `{task, dataset, defense, attack, eps, threat, surrogate, n, correct, value, low,
/// high}`, where `attack`, `eps`, `threat` and `surrogate` are null for clean pictures.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// `zero-shot`, `caption` or `vqa`.
    pub task: String,
    /// The pictures by name.
    pub dataset: String,
    /// The defence in short: `none`, `gif`, `fra`, `gif+fra`.
    pub defense: String,
    /// How the pictures were attacked.
    pub attacked: Option<Attacked>,
    /// Items scored.
    pub n: usize,
    /// Items that came out right. Under attack: right on the clean picture as well.
    pub correct: usize,
}

/// An attack with its threat model, as a figure carries it.
#[derive(Debug, Clone, PartialEq)]
pub struct Attacked {
    /// The attack's name.
    pub attack: String,
    /// The radius of its ball.
    pub eps: Eps,
    /// The threat model.
    pub threat: Threat,
}

impl Row {
    /// The share that came out right, in percent; 0 of 0 items.
    pub fn value(&self) -> f64 {
        if self.n == 0 { 0.0 } else { 100.0 * self.correct as f64 / self.n as f64 }
    }

    /// Its Wilson 95 % interval, in percent.
    pub fn interval(&self) -> (f64, f64) {
        wilson(self.correct, self.n)
    }
}

impl Serialize for Row {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut row = serializer.serialize_struct("Row", 12)?;
        let attacked = self.attacked.as_ref();
        let surrogate = attacked.and_then(|a| match &a.threat {
            Threat::Transfer { surrogate } => Some(surrogate),
            Threat::Adaptive => None,
        });
        row.serialize_field("task", &self.task)?;
        row.serialize_field("dataset", &self.dataset)?;
        row.serialize_field("defense", &self.defense)?;
        row.serialize_field("attack", &attacked.map(|a| &a.attack))?;
        row.serialize_field("eps", &attacked.map(|a| a.eps))?;
        row.serialize_field("threat", &attacked.map(|a| a.threat.to_string()))?;
        row.serialize_field("surrogate", &surrogate)?;
        row.serialize_field("n", &self.n)?;
        row.serialize_field("correct", &self.correct)?;
        row.serialize_field("value", &self.value())?;
        row.serialize_field("low", &self.interval().0)?;
        row.serialize_field("high", &self.interval().1)?;
        row.end()
    }
}

/// The Wilson 95 % interval of `correct` of `n`, in percent; the whole range for n = 0.
pub fn wilson(correct: usize, n: usize) -> (f64, f64) {
    if n == 0 {
        return (0.0, 100.0);
    }
    const Z: f64 = 1.959_963_984_540_054;
    let (n, p) = (n as f64, correct as f64 / n as f64);
    let scale = 1.0 / (1.0 + Z * Z / n);
    let middle = (p + Z * Z / (2.0 * n)) * scale;
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt() * scale;
    (100.0 * (middle - half).max(0.0), 100.0 * (middle + half).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_wilsons() {
        // statsmodels 0.14: proportion_confint(81, 263, method="wilson")
        let (low, high) = wilson(81, 263);
        assert!((low - 25.527).abs() < 0.01 && (high - 36.622).abs() < 0.01, "{low} {high}");
        assert_eq!(wilson(0, 10).0, 0.0);
        assert!((wilson(10, 10).1 - 100.0).abs() < 1e-9);
        assert_eq!(wilson(0, 0), (0.0, 100.0));
    }

    #[test]
    fn a_clean_row_has_no_threat_and_an_attacked_one_has() {
        let clean = Row {
            task: "zero-shot".into(),
            dataset: "pocket".into(),
            defense: "none".into(),
            attacked: None,
            n: 4,
            correct: 3,
        };
        let json = serde_json::to_value(&clean).unwrap();
        assert!(json["threat"].is_null() && json["attack"].is_null());
        assert_eq!(json["value"], 75.0);
        let attacked = Attacked {
            attack: "pgd".into(),
            eps: Eps::of_255(8),
            threat: Threat::Transfer { surrogate: "m".into() },
        };
        let json = serde_json::to_value(Row { attacked: Some(attacked), ..clean }).unwrap();
        assert_eq!(
            (&json["threat"], &json["surrogate"], &json["eps"]),
            (&"transfer".into(), &"m".into(), &"8/255".into())
        );
    }
}
