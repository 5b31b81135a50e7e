use candle_core::Tensor;

use super::super::layers::{Activation, Attention, Linear, Norm};
use super::grid::Grid;
use crate::Result;

/// A block's MLP.
#[derive(Debug, Clone)]
pub(super) enum Mlp {
    /// fc2(act(fc1(x)))
    Plain { fc1: Linear, fc2: Linear },
    /// down(act(gate(x)) up(x))
    Gated { gate: Linear, up: Linear, down: Linear },
}

/// The inner layer before the activation.
pub(super) enum MlpTape {
    Plain(Tensor),
    Gated { gate: Tensor, up: Tensor },
}

impl Mlp {
    pub fn forward(&self, x: &Tensor, activation: Activation) -> Result<(Tensor, MlpTape)> {
        match self {
            Self::Plain { fc1, fc2 } => {
                let inner = fc1.forward(x)?;
                Ok((fc2.forward(&activation.forward(&inner)?)?, MlpTape::Plain(inner)))
            }
            Self::Gated { gate, up, down } => {
                let (gate, up) = (gate.forward(x)?, up.forward(x)?);
                let y = down.forward(&(activation.forward(&gate)? * &up)?)?;
                Ok((y, MlpTape::Gated { gate, up }))
            }
        }
    }

    pub fn vjp(&self, tape: &MlpTape, gradient: &Tensor, activation: Activation) -> Result<Tensor> {
        match (self, tape) {
            (Self::Plain { fc1, fc2 }, MlpTape::Plain(inner)) => {
                fc1.vjp(&activation.vjp(inner, &fc2.vjp(gradient)?)?)
            }
            (Self::Gated { gate, up, down }, MlpTape::Gated { gate: g, up: u }) => {
                let product = down.vjp(gradient)?;
                let at_up = (activation.forward(g)? * &product)?;
                let at_gate = activation.vjp(g, &(product * u)?)?;
                Ok((gate.vjp(&at_gate)? + up.vjp(&at_up)?)?)
            }
            _ => Err(crate::Error::argument("tape", "one of this tower", "a tape of another")),
        }
    }

    /// Its layers, by the names they have in checkpoints of `v3`, Qwen3-VL, or an older tower.
    pub fn layers(&self, v3: bool) -> Vec<(&'static str, &Linear)> {
        match self {
            Self::Plain { fc1, fc2 } if v3 => vec![("linear_fc1", fc1), ("linear_fc2", fc2)],
            Self::Plain { fc1, fc2 } => vec![("fc1", fc1), ("fc2", fc2)],
            Self::Gated { gate, up, down } => {
                vec![("gate_proj", gate), ("up_proj", up), ("down_proj", down)]
            }
        }
    }

    pub fn map(&self, f: impl Fn(&Linear) -> Result<Linear>) -> Result<Self> {
        Ok(match self {
            Self::Plain { fc1, fc2 } => Self::Plain { fc1: f(fc1)?, fc2: f(fc2)? },
            Self::Gated { gate, up, down } => Self::Gated { gate: f(gate)?, up: f(up)?, down: f(down)? },
        })
    }
}

/// A pre-norm block.
#[derive(Debug, Clone)]
pub(super) struct Block {
    pub norm1: Norm,
    pub attention: Attention,
    /// Whether tokens attend within windows alone.
    pub windowed: bool,
    pub norm2: Norm,
    pub mlp: Mlp,
}

/// What becomes of a group of patches: one token for the language model.
#[derive(Debug, Clone)]
pub(super) struct Merger {
    pub norm: Norm,
    /// Whether the norm is over the whole group, and not over each patch.
    pub whole: bool,
    pub fc1: Linear,
    pub fc2: Linear,
    /// Patches in a group.
    pub group: usize,
}

pub(super) struct MergerTape {
    /// `(B, N, D)`, group by group.
    input: Tensor,
    up: Tensor,
}

impl Merger {
    /// The exact GELU, whatever the blocks have.
    const ACTIVATION: Activation = Activation::Gelu;

    /// `(B, N, D)` to `(B, N / group, out)`.
    pub fn forward(&self, stream: &Tensor, grid: &Grid) -> Result<(Tensor, MergerTape)> {
        let (batch, tokens, width) = stream.dims3()?;
        let input = stream.index_select(&grid.grouped, 1)?;
        let shape = (batch, tokens / self.group, self.group * width);
        let normal = if self.whole {
            self.norm.forward(&input.reshape(shape)?)?
        } else {
            self.norm.forward(&input)?.reshape(shape)?
        };
        let up = self.fc1.forward(&normal)?;
        let out = self.fc2.forward(&Self::ACTIVATION.forward(&up)?)?;
        Ok((out, MergerTape { input, up }))
    }

    /// The gradient at the output to that at the stream.
    pub fn vjp(&self, tape: &MergerTape, gradient: &Tensor, grid: &Grid) -> Result<Tensor> {
        let (batch, tokens, width) = tape.input.dims3()?;
        let normal = self.fc1.vjp(&Self::ACTIVATION.vjp(&tape.up, &self.fc2.vjp(gradient)?)?)?;
        let input = if self.whole {
            let shape = (batch, tokens / self.group, self.group * width);
            self.norm.vjp(&tape.input.reshape(shape)?, &normal)?.reshape((batch, tokens, width))?
        } else {
            self.norm.vjp(&tape.input, &normal.reshape((batch, tokens, width))?)?
        };
        Ok(input.index_select(&grid.back, 1)?)
    }

    pub fn map(
        &self,
        norm: impl Fn(&Norm) -> Result<Norm>,
        linear: impl Fn(&Linear) -> Result<Linear>,
    ) -> Result<Self> {
        let (fc1, fc2) = (linear(&self.fc1)?, linear(&self.fc2)?);
        Ok(Self { norm: norm(&self.norm)?, whole: self.whole, fc1, fc2, group: self.group })
    }
}
