use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::optimizer::Moments;
use crate::{Error, Result};

/// A step: its epoch, counted from 1, and the mean loss of its pictures before it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Counted from 1.
    pub epoch: usize,
    /// Before the step.
    pub loss: f64,
}

/// Means over some pictures.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// What is minimised.
    pub loss: f64,
    /// Percent of the adversarial pictures given their labels, where there is a head. A figure of
    /// training, on static examples transfer, on adaptive ones adaptive.
    pub adversarial: Option<f64>,
    /// Percent of the clean pictures.
    pub clean: Option<f64>,
}

impl Measured {
    pub(super) fn add(&mut self, other: &Self, n: usize) {
        let n = n as f64;
        self.loss += other.loss * n;
        for (sum, value) in [(&mut self.adversarial, other.adversarial), (&mut self.clean, other.clean)] {
            *sum = value.map(|value| sum.unwrap_or(0.0) + value * n);
        }
    }

    pub(super) fn over(&self, n: usize) -> Self {
        let n = n as f64;
        Self {
            loss: self.loss / n,
            adversarial: self.adversarial.map(|value| value / n),
            clean: self.clean.map(|value| value / n),
        }
    }
}

/// What an epoch came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    /// 0 is before any step.
    pub epoch: usize,
    /// The mean over its steps, while the anchor moved.
    pub train: Option<Measured>,
    /// After it, on the held-out pictures.
    pub held_out: Option<Measured>,
}

/// All that a training goes on from.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct State {
    pub(super) anchor: Vec<f32>,
    pub(super) moments: Moments,
    pub(super) best: Vec<f32>,
    pub(super) best_epoch: usize,
    pub(super) steps: Vec<Step>,
    pub(super) epochs: Vec<Epoch>,
}

/// The part of a [`State`] that is no tensor. Numbers stand as their bits: JSON gives some back with
/// another last bit, and knows no infinity.
#[derive(Serialize, Deserialize)]
struct Story {
    moved: u64,
    best_epoch: usize,
    /// Epoch and loss.
    steps: Vec<(usize, u64)>,
    /// Epoch, the training's and the held-out figures: loss, adversarial, clean.
    epochs: Vec<(usize, [Option<Bits>; 2])>,
}

type Bits = (u64, Option<u64>, Option<u64>);

fn to_bits(measured: &Measured) -> Bits {
    (measured.loss.to_bits(), measured.adversarial.map(f64::to_bits), measured.clean.map(f64::to_bits))
}

fn of_bits((loss, adversarial, clean): Bits) -> Measured {
    Measured {
        loss: f64::from_bits(loss),
        adversarial: adversarial.map(f64::from_bits),
        clean: clean.map(f64::from_bits),
    }
}

const STORY: &str = "radapt.training";

impl State {
    pub(super) fn new(anchor: Vec<f32>) -> Self {
        Self {
            moments: Moments::new(anchor.len()),
            best: anchor.clone(),
            best_epoch: 0,
            steps: Vec::new(),
            epochs: Vec::new(),
            anchor,
        }
    }

    /// Writes it in one step: a reader finds this or the one before.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let damaged = |e: String| Error::config(path, e);
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let tensors = [
            ("anchor", bytes(&self.anchor)),
            ("best", bytes(&self.best)),
            ("first", bytes(&self.moments.first)),
            ("second", bytes(&self.moments.second)),
        ];
        let views = tensors
            .iter()
            .map(|(name, data)| Ok((*name, TensorView::new(Dtype::F32, vec![data.len() / 4], data)?)))
            .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(|e| damaged(e.to_string()))?;
        let story = Story {
            moved: self.moments.steps,
            best_epoch: self.best_epoch,
            steps: self.steps.iter().map(|step| (step.epoch, step.loss.to_bits())).collect(),
            epochs: self
                .epochs
                .iter()
                .map(|e| (e.epoch, [e.train.as_ref().map(to_bits), e.held_out.as_ref().map(to_bits)]))
                .collect(),
        };
        let story = serde_json::to_string(&story).map_err(|e| damaged(e.to_string()))?;
        let metadata = HashMap::from([(STORY.to_string(), story)]);
        let whole = safetensors::serialize(views, Some(metadata)).map_err(|e| damaged(e.to_string()))?;
        let beside = path.with_extension("part");
        let written = File::create(&beside)
            .and_then(|mut file| file.write_all(&whole).and_then(|()| file.sync_data()))
            .and_then(|()| std::fs::rename(&beside, path));
        written.map_err(|e| Error::write(path, e))
    }

    /// Reads what [`State::write`] wrote, of an anchor of `n` numbers; `None` if there is nothing.
    pub(super) fn read(path: &Path, n: usize) -> Result<Option<Self>> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::read(path, e)),
        };
        let damaged = |e: String| Error::config(path, format!("is no state of a training: {e}"));
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(e.to_string()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| damaged(e.to_string()))?;
        let story = header.metadata().as_ref().and_then(|metadata| metadata.get(STORY));
        let story = story.ok_or_else(|| damaged(format!("its metadata has no `{STORY}`")))?;
        let story: Story = serde_json::from_str(story).map_err(|e| damaged(e.to_string()))?;
        let tensor = |name: &str| -> Result<Vec<f32>> {
            let tensor = file.tensor(name).map_err(|e| damaged(e.to_string()))?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != [n] {
                let found = format!("{:?} {:?}", tensor.dtype(), tensor.shape());
                return Err(damaged(format!("{name}: expected F32 [{n}], found {found}")));
            }
            let four = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            Ok(tensor.data().chunks_exact(4).map(four).collect())
        };
        Ok(Some(Self {
            anchor: tensor("anchor")?,
            moments: Moments { steps: story.moved, first: tensor("first")?, second: tensor("second")? },
            best: tensor("best")?,
            best_epoch: story.best_epoch,
            steps: story
                .steps
                .into_iter()
                .map(|(epoch, loss)| Step { epoch, loss: f64::from_bits(loss) })
                .collect(),
            epochs: story
                .epochs
                .into_iter()
                .map(|(epoch, [train, held_out])| Epoch {
                    epoch,
                    train: train.map(of_bits),
                    held_out: held_out.map(of_bits),
                })
                .collect(),
        }))
    }

    /// The losses as CSV: `kind,epoch,step,loss,clean,adversarial`.
    pub(super) fn write_curve(&self, path: &Path) -> Result<()> {
        let mut text = String::from("kind,epoch,step,loss,clean,adversarial\n");
        for (i, step) in self.steps.iter().enumerate() {
            text += &format!("step,{},{},{},,\n", step.epoch, i + 1, step.loss);
        }
        let number = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
        for epoch in &self.epochs {
            for (kind, found) in [("train", &epoch.train), ("held-out", &epoch.held_out)] {
                if let Some(found) = found {
                    let (clean, adversarial) = (number(found.clean), number(found.adversarial));
                    text += &format!("{kind},{},,{},{clean},{adversarial}\n", epoch.epoch, found.loss);
                }
            }
        }
        std::fs::write(path, text).map_err(|e| Error::write(path, e))
    }
}
