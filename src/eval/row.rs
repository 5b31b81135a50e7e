use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::attack::{Eps, Threat, ThreatKind};

/// One figure: how many of n items came out right. A figure on attacked pictures has a threat
/// model, one on clean pictures has none; there is no other kind.
///
/// In JSON as `{task, dataset, defense, attack, eps, threat, surrogate, pictures, n, correct, value,
/// low, high, mean_per_class}`, where `attack`, `eps`, `threat`, `surrogate` and `pictures` are null
/// for clean pictures. It is read back the same way; `value`, `low` and `high` are computed anew.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// `zero-shot`, `caption` or `vqa`.
    pub task: String,
    /// The pictures by name.
    pub dataset: String,
    /// The defence in short: `none`, `gif`, `fra`, `gif+fra`, or the name of an anchor or setting scored
    /// beside it.
    pub defense: String,
    /// How the pictures were attacked.
    pub attacked: Option<Attacked>,
    /// Items scored.
    pub n: usize,
    /// Items that came out right. Under attack: right on the clean picture as well.
    pub correct: usize,
    /// The mean of the classes' own shares in percent, for sets whose metric it is.
    pub mean_per_class: Option<f64>,
}

/// An attack with its threat model, as a figure carries it.
#[derive(Debug, Clone, PartialEq)]
pub struct Attacked {
    /// The attack's name.
    pub attack: String,
    /// The radius of its ball; `None` for attacks that have none.
    pub eps: Option<Eps>,
    /// The threat model.
    pub threat: Threat,
    /// What the scored pictures hold.
    pub pictures: Precision,
}

/// What adversarial pictures hold when they are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Precision {
    /// What the attack made, any numbers in [0, 1]: as AutoAttack and RobustBench score.
    #[serde(rename = "float")]
    Float,
    /// Rounded to 8 bits and cut to the ball again: what a file can hold.
    #[serde(rename = "8-bit")]
    EightBit,
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

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Float => "float",
            Self::EightBit => "8-bit",
        })
    }
}

/// A row as JSON has it.
#[derive(Serialize, Deserialize)]
struct Flat {
    task: String,
    dataset: String,
    defense: String,
    attack: Option<String>,
    eps: Option<Eps>,
    threat: Option<ThreatKind>,
    surrogate: Option<String>,
    pictures: Option<Precision>,
    n: usize,
    correct: usize,
    #[serde(default)]
    value: f64,
    #[serde(default)]
    low: f64,
    #[serde(default)]
    high: f64,
    #[serde(default)]
    mean_per_class: Option<f64>,
}

impl Serialize for Row {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let attacked = self.attacked.clone();
        let surrogate = attacked.as_ref().and_then(|a| match &a.threat {
            Threat::Transfer { surrogate } => Some(surrogate.clone()),
            Threat::Adaptive => None,
        });
        let (low, high) = self.interval();
        Flat {
            task: self.task.clone(),
            dataset: self.dataset.clone(),
            defense: self.defense.clone(),
            eps: attacked.as_ref().and_then(|a| a.eps),
            threat: attacked.as_ref().map(|a| a.threat.kind()),
            pictures: attacked.as_ref().map(|a| a.pictures),
            attack: attacked.map(|a| a.attack),
            surrogate,
            n: self.n,
            correct: self.correct,
            value: self.value(),
            low,
            high,
            mean_per_class: self.mean_per_class,
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Row {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let flat = Flat::deserialize(deserializer)?;
        let attacked = match (flat.attack, flat.threat, flat.surrogate, flat.pictures) {
            (None, None, None, None) => None,
            (Some(attack), Some(kind), surrogate, Some(pictures)) => {
                let threat = match (kind, surrogate) {
                    (ThreatKind::Transfer, Some(surrogate)) => Threat::Transfer { surrogate },
                    (ThreatKind::Adaptive, None) => Threat::Adaptive,
                    _ => {
                        return Err(D::Error::custom(
                            "surrogate: expected one for transfer and none for adaptive",
                        ));
                    }
                };
                Some(Attacked { attack, eps: flat.eps, threat, pictures })
            }
            _ => return Err(D::Error::custom("expected attack, threat and pictures together or not at all")),
        };
        if flat.correct > flat.n {
            return Err(D::Error::custom(format!(
                "correct: expected 0 to {}, found {}",
                flat.n, flat.correct
            )));
        }
        Ok(Self {
            task: flat.task,
            dataset: flat.dataset,
            defense: flat.defense,
            attacked,
            n: flat.n,
            correct: flat.correct,
            mean_per_class: flat.mean_per_class,
        })
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
            mean_per_class: None,
        };
        let json = serde_json::to_value(&clean).unwrap();
        assert!(json["threat"].is_null() && json["attack"].is_null());
        assert_eq!(json["value"], 75.0);
        let attacked = Attacked {
            attack: "pgd".into(),
            eps: Some(Eps::of_255(8)),
            threat: Threat::Transfer { surrogate: "m".into() },
            pictures: Precision::EightBit,
        };
        let row = Row { attacked: Some(attacked), ..clean };
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!(
            (&json["threat"], &json["surrogate"], &json["eps"], &json["pictures"]),
            (&"transfer".into(), &"m".into(), &"8/255".into(), &"8-bit".into())
        );
        assert_eq!(serde_json::from_value::<Row>(json.clone()).unwrap(), row);
        for key in ["threat", "surrogate", "pictures"] {
            let mut without = json.clone();
            without[key] = serde_json::Value::Null;
            assert!(serde_json::from_value::<Row>(without).is_err(), "{key}");
        }
    }
}
