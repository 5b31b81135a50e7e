//! What a run of the demo comes to.

use serde::Serialize;

use crate::attack::Threat;
use crate::eval::judge::Verdict;

/// Everything a reader is shown.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The model by name.
    pub model: String,
    /// The defence in force, in words.
    pub defense: String,
    /// The attack in words: its name, steps and objective.
    pub attack: String,
    /// The largest change of a pixel, as `16/255`.
    pub eps: String,
    /// The command that made this: `radapt demo --seed 7`.
    pub command: String,
    /// Seed of the pictures and of the attack.
    pub seed: u64,
    /// The figures, clean rows first.
    pub rows: Vec<Row>,
    /// The pictures, in the order they were drawn.
    pub pictures: Vec<Picture>,
    /// Wall-clock seconds of the whole.
    pub seconds: f64,
}

/// One figure: how many answers name the object that is in the picture.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// `caption`, `vqa` or `zero-shot`.
    pub task: &'static str,
    /// `none` for the undefended model, else the defence: `gif+fra`.
    pub defense: String,
    /// The attack's name; `None` for clean pictures.
    pub attack: Option<String>,
    /// As in [`Report::eps`]; `None` for clean pictures.
    pub eps: Option<String>,
    /// The threat model; `None` for clean pictures and for nothing else.
    #[serde(flatten)]
    pub threat: Option<Threat>,
    /// Answers judged.
    pub n: usize,
    /// Answers that name the object.
    pub correct: usize,
    /// Answers that name the attacker's target instead.
    pub target: usize,
    /// `correct` in percent.
    pub value: f64,
    /// Lower end of the Wilson 95 % interval, in percent.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

/// One picture with its adversarial versions.
#[derive(Debug, Clone, Serialize)]
pub struct Picture {
    /// What is in it: `apple`.
    pub object: String,
    /// What the attacker wants it to be taken for: `hammer`.
    pub target: String,
    /// Its reference caption.
    pub caption: String,
    /// As drawn.
    pub clean: Version,
    /// Crafted on the undefended model.
    pub transfer: Version,
    /// Crafted on the defended model, gradients through the defence.
    pub adaptive: Version,
}

/// A picture, and what the models say of it.
#[derive(Debug, Clone, Serialize)]
pub struct Version {
    /// The picture as PNG; not in the JSON.
    #[serde(skip)]
    pub png: Vec<u8>,
    /// The change against the clean picture, magnified around grey, as PNG; empty for the clean one.
    #[serde(skip)]
    pub change: Vec<u8>,
    /// What the undefended model says; `None` where the version was crafted on the defended one.
    pub undefended: Option<Vec<Answer>>,
    /// What the defended model says.
    pub defended: Vec<Answer>,
}

/// One answer with its verdict.
#[derive(Debug, Clone, Serialize)]
pub struct Answer {
    /// What was asked.
    pub question: String,
    /// What the model said.
    pub answer: String,
    /// Whether the answer names the picture's object, the attacker's target, both or neither.
    pub verdict: Verdict,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_its_threat_in_json() {
        let row = |threat| Row {
            task: "caption",
            defense: "none".into(),
            attack: None,
            eps: None,
            threat,
            n: 1,
            correct: 1,
            target: 0,
            value: 100.0,
            low: 20.7,
            high: 100.0,
        };
        let json = |threat| serde_json::to_value(row(threat)).expect("plain data");
        assert_eq!(json(Some(Threat::Adaptive))["threat"], "adaptive");
        let transfer = json(Some(Threat::Transfer { surrogate: "pocket".into() }));
        assert_eq!((&transfer["threat"], &transfer["surrogate"]), (&"transfer".into(), &"pocket".into()));
        assert_eq!(json(None).get("threat"), None);
    }
}
