use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::defense::Defense;
use crate::{Error, Result};

/// A model that pictures are crafted on or scored on: enough to tell two apart.
///
/// Two are the same if their models and digests are, whatever the words for the defence.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Subject {
    /// Name, revision and whatever else tells this model from others.
    pub model: String,
    /// The defence in words.
    pub defense: Option<String>,
    /// SHA-256 over the defence's numbers, the anchor's included; `None` for the undefended model.
    pub digest: Option<String>,
}

impl Subject {
    /// The model without any defence.
    pub fn undefended(model: impl Into<String>) -> Self {
        Self { model: model.into(), defense: None, digest: None }
    }

    /// The model with `defense` put in.
    ///
    /// # Errors
    /// If the anchor cannot be read from its device.
    pub fn new(model: impl Into<String>, defense: &Defense) -> Result<Self> {
        let Some(summary) = defense.summary() else {
            return Ok(Self::undefended(model));
        };
        let mut hash = Sha256::new();
        if let Some(gif) = &defense.gif {
            hash.update(b"gif");
            hash.update(gif.cutoff().to_le_bytes());
        }
        if let Some(fra) = &defense.fra {
            hash.update(b"fra");
            hash.update(fra.alpha().to_le_bytes());
            hash.update(fra.beta().to_le_bytes());
            for value in fra.anchor().flatten_all()?.to_vec1::<f32>()? {
                hash.update(value.to_le_bytes());
            }
        }
        let digest = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { model: model.into(), defense: Some(summary.to_string()), digest: Some(digest) })
    }

    /// Whether nothing is put in.
    pub fn is_undefended(&self) -> bool {
        self.digest.is_none()
    }
}

impl PartialEq for Subject {
    fn eq(&self, other: &Self) -> bool {
        (&self.model, &self.digest) == (&other.model, &other.digest)
    }
}

impl Eq for Subject {}

impl std::hash::Hash for Subject {
    fn hash<S: std::hash::Hasher>(&self, state: &mut S) {
        (&self.model, &self.digest).hash(state);
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.model)?;
        self.defense.as_ref().map_or(Ok(()), |defense| write!(f, " with {defense}"))
    }
}

/// The two threat models, without their circumstances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ThreatKind {
    /// The attacker has a surrogate, and the target never sees a gradient.
    Transfer,
    /// The attacker has the target itself, defence and all.
    Adaptive,
}

impl ThreatKind {
    /// The model to craft on against `target`. Where it is the same for both kinds, as on an
    /// undefended target that is its own surrogate, one crafting serves both.
    pub fn crafts_on<'a>(self, surrogate: &'a Subject, target: &'a Subject) -> &'a Subject {
        match self {
            Self::Transfer => surrogate,
            Self::Adaptive => target,
        }
    }

    /// What pictures crafted on `crafted_on` are to `target`, if they are of this kind.
    ///
    /// # Errors
    /// For adaptive pictures crafted on another model than the target, and for transfer pictures
    /// crafted on the target itself, unless that is undefended.
    pub fn threat(self, crafted_on: &Subject, target: &Subject) -> Result<Threat> {
        let same = crafted_on == target;
        match self {
            Self::Adaptive if same => Ok(Threat::Adaptive),
            Self::Transfer if !same || target.is_undefended() => {
                Ok(Threat::Transfer { surrogate: crafted_on.to_string() })
            }
            Self::Adaptive => {
                Err(Error::argument("threat", format!("adaptive pictures, crafted on {target}"), crafted_on))
            }
            Self::Transfer => Err(Error::argument(
                "threat",
                format!("transfer pictures, crafted on another model than {target}"),
                crafted_on,
            )),
        }
    }
}

impl fmt::Display for ThreatKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Transfer => "transfer",
            Self::Adaptive => "adaptive",
        })
    }
}

/// The threat model of a robust figure, which no such figure goes without.
///
/// In JSON `{"threat": "transfer", "surrogate": NAME}` or `{"threat": "adaptive"}`, to be
/// flattened into the result's object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "threat", rename_all = "kebab-case")]
pub enum Threat {
    /// Crafted on another model, or on the undefended target.
    Transfer {
        /// The model crafted on.
        surrogate: String,
    },
    /// Crafted on the target itself, with gradients through its defence.
    Adaptive,
}

impl Threat {
    /// Without the circumstances.
    pub fn kind(&self) -> ThreatKind {
        match self {
            Self::Transfer { .. } => ThreatKind::Transfer,
            Self::Adaptive => ThreatKind::Adaptive,
        }
    }
}

impl fmt::Display for Threat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind().fmt(f)
    }
}

/// What `--threat` takes: `transfer`, `adaptive` or `both`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreatChoice {
    /// One of them.
    Only(ThreatKind),
    /// Both, side by side.
    Both,
}

impl ThreatChoice {
    /// The kinds asked for, transfer first.
    pub fn kinds(self) -> &'static [ThreatKind] {
        match self {
            Self::Only(ThreatKind::Transfer) => &[ThreatKind::Transfer],
            Self::Only(ThreatKind::Adaptive) => &[ThreatKind::Adaptive],
            Self::Both => &[ThreatKind::Transfer, ThreatKind::Adaptive],
        }
    }
}

impl FromStr for ThreatChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "transfer" => Ok(Self::Only(ThreatKind::Transfer)),
            "adaptive" => Ok(Self::Only(ThreatKind::Adaptive)),
            "both" => Ok(Self::Both),
            other => Err(Error::argument("threat", "transfer, adaptive or both", other)),
        }
    }
}

impl fmt::Display for ThreatChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Only(kind) => kind.fmt(f),
            Self::Both => f.write_str("both"),
        }
    }
}
