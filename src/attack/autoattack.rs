use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::loss::{largest, rows as logit_rows};
use super::pictures::select;
use super::{Attack, Classification, Crafted, Outcome, Pictures, Progress, Recipe};
use crate::{Error, Result};

/// Something an evaluation noticed that casts doubt on its figures (AutoAttack's `flags_doc.md`).
///
/// There is no flag for a model that takes gradients in its forward pass: a [`super::Classifier`]
/// has a function for either.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "flag", rename_all = "kebab-case")]
pub enum Flag {
    /// Two forward passes over the same pictures differ.
    Randomised,
    /// The logits look like probabilities: between 0 and 1, and their sum is 1.
    Probabilities,
    /// An attack needs more classes than there are, and was left out.
    TooFewClasses {
        /// The attack.
        attack: String,
        /// The fewest it works with.
        needs: usize,
        /// The classes there are.
        classes: usize,
    },
    /// An attack has fewer target classes than it would take.
    FewerTargets {
        /// The attack.
        attack: String,
        /// The targets it would take.
        targets: usize,
        /// The classes there are.
        classes: usize,
    },
    /// Gradients were zero everywhere where a walk began.
    ZeroGradient {
        /// Pictures with such a gradient.
        pictures: usize,
    },
    /// Gradients had entries that are not numbers.
    NanGradient {
        /// Pictures with such a gradient.
        pictures: usize,
    },
    /// Square, which sees no gradient, fools pictures that the attacks with gradients do not.
    SquareBeatsGradients {
        /// Pictures that only Square fooled.
        pictures: usize,
        /// Of so many.
        of: usize,
    },
}

impl fmt::Display for Flag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Randomised => f.write_str(
                "the model is random: figures of a deterministic attack are not to be trusted, use the preset rand",
            ),
            Self::Probabilities => {
                f.write_str("the logits look like probabilities, whose gradients vanish: give the attack logits")
            }
            Self::TooFewClasses { attack, needs, classes } => {
                write!(f, "{attack} needs {needs} classes and was left out: there are {classes}")
            }
            Self::FewerTargets { attack, targets, classes } => {
                write!(f, "{attack} would take {targets} target classes: there are {classes} classes")
            }
            Self::ZeroGradient { pictures } => {
                write!(f, "the gradient was zero where an attack began on {pictures} pictures: it may be hidden")
            }
            Self::NanGradient { pictures } => {
                write!(f, "gradients were not numbers on {pictures} pictures, and taken for zero there")
            }
            Self::SquareBeatsGradients { pictures, of } => write!(
                f,
                "square fooled {pictures} of {of} pictures that no gradient had: robustness is probably overestimated"
            ),
        }
    }
}

impl Flag {
    /// Square's flag, where it fooled more than 0.2 % of all pictures on its own.
    pub fn square(pictures: usize, of: usize) -> Option<Self> {
        (pictures as f64 > 0.002 * of as f64).then_some(Self::SquareBeatsGradients { pictures, of })
    }
}

/// AutoAttack (Croce and Hein 2020): attacks one after the other, each beginning with the clean
/// pictures, on the pictures that are still given their label. What is left is the pointwise worst
/// case over all of them.
///
/// Pictures that the model gets wrong as they are, and those no attack fools, are returned
/// untouched.
pub struct AutoAttack {
    name: String,
    attacks: Vec<Box<dyn Attack + Send + Sync>>,
    state: Option<PathBuf>,
}

/// What [`AutoAttack::evaluate`] finds.
#[derive(Debug, Clone)]
pub struct Evaluated {
    /// The adversarial pictures.
    pub crafted: Crafted,
    /// Per picture, whether it is given its label untouched; false where it was not chosen.
    pub clean: Vec<bool>,
    /// Per picture, the attack that fooled it.
    pub broken_by: Vec<Option<String>>,
    /// After each attack that was run, in order, how many pictures are still given their label.
    pub robust_after: Vec<(String, usize)>,
    /// What casts doubt on that.
    pub flags: Vec<Flag>,
}

impl Evaluated {
    /// Per picture, whether it is given its label untouched and under every attack.
    pub fn robust(&self) -> Vec<bool> {
        self.clean.iter().zip(&self.broken_by).map(|(&clean, broken)| clean && broken.is_none()).collect()
    }
}

/// Between two attacks. No outcome has a loss in it: those of several attacks do not compare, and
/// JSON would not give back their last bits.
#[derive(Serialize, Deserialize)]
struct State {
    version: u64,
    fingerprint: String,
    clean: Vec<bool>,
    broken_by: Vec<Option<String>>,
    outcomes: Vec<Outcome>,
    robust_after: Vec<(String, usize)>,
    flags: Vec<Flag>,
    /// Of the pixels beside it.
    sha256: String,
}

const STATE_VERSION: u64 = 1;

impl AutoAttack {
    /// From attacks in order, under a name for results.
    ///
    /// # Errors
    /// If there are none, one comes twice, or they are not all within the same eps.
    pub fn new(name: impl Into<String>, attacks: Vec<Box<dyn Attack + Send + Sync>>) -> Result<Self> {
        if attacks.is_empty() {
            return Err(Error::argument("attacks", "at least one", 0));
        }
        for (i, attack) in attacks.iter().enumerate() {
            if attacks.iter().take(i).any(|before| before.name() == attack.name()) {
                return Err(Error::argument("attacks", "each once", format!("{} twice", attack.name())));
            }
            if attack.eps() != attacks[0].eps() {
                let radius = |of: &dyn Attack| of.eps().map_or("no eps".into(), |eps| eps.to_string());
                let found =
                    [attack, &attacks[0]].map(|of| format!("{} with {}", of.name(), radius(of.as_ref())));
                return Err(Error::argument("attacks", "all within the same eps", found.join(" and ")));
            }
        }
        Ok(Self { name: name.into(), attacks, state: None })
    }

    /// The same with its state written to `path` after every attack, and read from there where it
    /// exists, so that a run that was cut off goes on with the attack it was at. The caller removes
    /// the file.
    pub fn with_state(self, path: impl Into<PathBuf>) -> Self {
        Self { state: Some(path.into()), ..self }
    }

    /// The attacks by name, in order.
    pub fn attacks(&self) -> Vec<&str> {
        self.attacks.iter().map(|attack| attack.name()).collect()
    }

    /// Runs the attacks.
    ///
    /// # Errors
    /// As [`Attack::craft`], or if the state cannot be read or written, or is of another run.
    pub fn evaluate(
        &self,
        task: &Classification,
        pictures: &Pictures,
        seed: u64,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Evaluated> {
        let n = pictures.len();
        if task.labels().len() != n {
            return Err(Error::argument("pictures", format!("one per label, {}", task.labels().len()), n));
        }
        let fingerprint = self.fingerprint(task, pictures, seed)?;
        let mut pixels: Vec<Tensor> =
            (0..n).map(|row| pictures.pixels().narrow(0, row, 1)).collect::<candle_core::Result<_>>()?;
        let mut state = match self.state.as_deref().filter(|path| path.exists()) {
            Some(path) => {
                let (state, saved) = read_state(path, &fingerprint, pictures)?;
                for (row, pixels) in
                    pixels.iter_mut().enumerate().filter(|(row, _)| state.broken_by[*row].is_some())
                {
                    *pixels = saved.narrow(0, row, 1)?.force_contiguous()?;
                }
                state
            }
            None => self.begin(task, pictures, fingerprint)?,
        };
        let steps = 1000;
        for (number, attack) in self.attacks.iter().enumerate() {
            let robust: Vec<bool> = state
                .clean
                .iter()
                .zip(&state.broken_by)
                .map(|(&clean, broken)| clean && broken.is_none())
                .collect();
            let left = robust.iter().filter(|robust| **robust).count();
            let known = state.robust_after.iter().any(|(name, _)| name == attack.name());
            if left == 0 || known || attack.fewest_classes() > task.classifier().classes() {
                continue;
            }
            let broken = state.broken_by.iter().flatten().count();
            let rows: Vec<usize> = (0..n).filter(|&row| robust[row]).collect();
            let crafted =
                attack.craft(task, &pictures.clone().only(robust)?, seed, &mut |inner: &Progress| {
                    let within = steps * inner.step / inner.steps.max(1);
                    progress(&Progress {
                        step: number * steps + within,
                        steps: self.attacks.len() * steps,
                        active: inner.active,
                        fooled: inner.fooled.map(|fooled| broken + fooled),
                    });
                })?;
            let correct = task.correct(&select(crafted.pixels(), &rows)?, &rows)?;
            for (&row, correct) in rows.iter().zip(correct) {
                let (now, before) = (&crafted.outcomes()[row], &mut state.outcomes[row]);
                before.attacked |= now.attacked;
                before.gradients += now.gradients;
                before.nan_gradients += now.nan_gradients;
                before.zero_gradient |= now.zero_gradient;
                if let Some(queries) = now.queries {
                    before.queries = Some(before.queries.unwrap_or(0) + queries);
                }
                if !correct {
                    before.fooled = Some(true);
                    state.broken_by[row] = Some(attack.name().into());
                    pixels[row] = crafted.pixels().narrow(0, row, 1)?.force_contiguous()?;
                }
            }
            let left = rows.iter().filter(|&&row| state.broken_by[row].is_none()).count();
            state.robust_after.push((attack.name().into(), left));
            if let Some(path) = &self.state {
                write_state(path, &mut state, &Tensor::cat(&pixels, 0)?)?;
            }
        }
        let recipe = Recipe {
            attack: self.name.clone(),
            parameters: self.parameters(),
            objective: json!({ "goal": "misclassify" }),
            eps: self.attacks.iter().find_map(|attack| attack.eps()),
            seed,
            crafted_on: task.classifier().subject().clone(),
            quantised: false,
        };
        let crafted = Crafted::new(pictures, Tensor::cat(&pixels, 0)?, recipe, state.outcomes)?;
        let mut flags = state.flags;
        flags.extend(flags_of_outcomes(crafted.outcomes()));
        let by_square = state.broken_by.iter().flatten().filter(|name| *name == "square").count();
        // Where others came after it, they were not shown what it had fooled.
        let (others, last) = (state.robust_after.len() > 1, state.robust_after.last());
        if others && last.is_some_and(|(name, _)| name == "square") {
            flags.extend(Flag::square(by_square, pictures.rows().len()));
        }
        let (clean, broken_by, robust_after) = (state.clean, state.broken_by, state.robust_after);
        Ok(Evaluated { crafted, clean, broken_by, robust_after, flags })
    }

    /// Clean answers, and the checks that come before any attack.
    fn begin(&self, task: &Classification, pictures: &Pictures, fingerprint: String) -> Result<State> {
        let n = pictures.len();
        let rows = pictures.rows();
        let mut clean = vec![false; n];
        let mut flags = Vec::new();
        if !rows.is_empty() {
            let chosen = select(pictures.pixels(), &rows)?;
            let logits = logit_rows(&task.logits(&chosen)?)?;
            for (z, &row) in logits.iter().zip(&rows) {
                clean[row] = super::loss::wins(z, task.labels()[row]);
            }
            let random = self.attacks.iter().any(|attack| attack.expects_randomness());
            if !random && is_random(task, &chosen, &logits)? {
                flags.push(Flag::Randomised);
            }
            if are_probabilities(&logits) {
                flags.push(Flag::Probabilities);
            }
        }
        let classes = task.classifier().classes();
        for attack in &self.attacks {
            let name = attack.name().to_string();
            let needs = attack.fewest_classes();
            match attack.targets() {
                _ if needs > classes => flags.push(Flag::TooFewClasses { attack: name, needs, classes }),
                Some(targets) if targets + 1 > classes => {
                    flags.push(Flag::FewerTargets { attack: name, targets, classes });
                }
                _ => {}
            }
        }
        let outcome =
            |row: usize| Outcome { fooled: rows.contains(&row).then_some(!clean[row]), ..Default::default() };
        let outcomes = (0..n).map(outcome).collect();
        Ok(State {
            version: STATE_VERSION,
            fingerprint,
            clean,
            broken_by: vec![None; n],
            outcomes,
            robust_after: Vec::new(),
            flags,
            sha256: String::new(),
        })
    }

    /// SHA-256 over all that decides the result.
    fn fingerprint(&self, task: &Classification, pictures: &Pictures, seed: u64) -> Result<String> {
        let mut hash = Sha256::new();
        let parts = json!({
            "attacks": self.parameters(),
            "model": task.classifier().subject(),
            "labels": task.labels(),
            "keys": pictures.keys(),
            "shape": pictures.pixels().dims(),
            "rows": pictures.rows(),
            "seed": seed,
        });
        hash.update(parts.to_string());
        for value in pictures.pixels().flatten_all()?.to_vec1::<f32>()? {
            hash.update(value.to_le_bytes());
        }
        Ok(sha256(hash))
    }
}

impl Attack for AutoAttack {
    fn name(&self) -> &str {
        &self.name
    }

    fn parameters(&self) -> Value {
        let each =
            self.attacks.iter().map(|of| json!({ "attack": of.name(), "parameters": of.parameters() }));
        json!({ "attacks": each.collect::<Vec<_>>() })
    }

    fn eps(&self) -> Option<super::Eps> {
        self.attacks.iter().find_map(|attack| attack.eps())
    }

    fn craft(
        &self,
        task: &Classification,
        pictures: &Pictures,
        seed: u64,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Crafted> {
        Ok(self.evaluate(task, pictures, seed, progress)?.crafted)
    }
}

/// The flags that what became of pictures gives rise to.
pub fn flags_of_outcomes(outcomes: &[Outcome]) -> Vec<Flag> {
    let count = |f: fn(&Outcome) -> bool| outcomes.iter().filter(|outcome| f(outcome)).count();
    let mut flags = Vec::new();
    let zero = count(|outcome| outcome.zero_gradient);
    if zero > 0 {
        flags.push(Flag::ZeroGradient { pictures: zero });
    }
    let nan = count(|outcome| outcome.nan_gradients > 0);
    if nan > 0 {
        flags.push(Flag::NanGradient { pictures: nan });
    }
    flags
}

/// Whether four more forward passes give other answers, or logits (scaled to length 1) that differ
/// by more than 1e-4.
fn is_random(task: &Classification, pixels: &Tensor, logits: &[Vec<f64>]) -> Result<bool> {
    let unit = |z: &[f64]| {
        let length = z.iter().map(|v| v * v).sum::<f64>().sqrt() + 1e-10;
        z.iter().map(|v| v / length).collect::<Vec<f64>>()
    };
    for _ in 0..4 {
        for (again, first) in logit_rows(&task.logits(pixels)?)?.iter().zip(logits) {
            let distance =
                unit(again).iter().zip(unit(first)).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
            if largest(again) != largest(first) || distance > 1e-4 {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn are_probabilities(logits: &[Vec<f64>]) -> bool {
    const TOLERANCE: f64 = 1e-5;
    logits.iter().all(|z| {
        z.iter().all(|v| (-TOLERANCE..=1.0 + TOLERANCE).contains(v))
            && (z.iter().sum::<f64>() - 1.0).abs() < TOLERANCE
    })
}

/// In hexadecimal.
fn sha256(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn write_state(path: &Path, state: &mut State, pixels: &Tensor) -> Result<()> {
    let bytes: Vec<u8> =
        pixels.flatten_all()?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect();
    let damaged = |e: &dyn fmt::Display| Error::config(path, e.to_string());
    let view = TensorView::new(Dtype::F32, pixels.dims().to_vec(), &bytes).map_err(|e| damaged(&e))?;
    state.sha256 = sha256(Sha256::new_with_prefix(&bytes));
    let text = serde_json::to_string(state).map_err(|e| damaged(&e))?;
    let file = safetensors::serialize([("pixels", view)], Some(HashMap::from([("state".into(), text)])))
        .map_err(|e| damaged(&e))?;
    // A kill leaves the state before or the one after, never half of one.
    let beside = path.with_extension("part");
    std::fs::write(&beside, file).map_err(|e| Error::write(&beside, e))?;
    std::fs::rename(&beside, path).map_err(|e| Error::write(path, e))
}

fn read_state(path: &Path, fingerprint: &str, pictures: &Pictures) -> Result<(State, Tensor)> {
    let bytes = std::fs::read(path).map_err(|e| Error::read(path, e))?;
    let damaged =
        |reason: String| Error::config(path, format!("not the state of an AutoAttack run: {reason}"));
    let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(e.to_string()))?;
    let text = metadata.metadata().as_ref().and_then(|all| all.get("state"));
    let text = text.ok_or_else(|| damaged("no `state` in its metadata".into()))?;
    let state: State = serde_json::from_str(text).map_err(|e| damaged(e.to_string()))?;
    if state.version != STATE_VERSION {
        return Err(damaged(format!("expected version {STATE_VERSION}, found {}", state.version)));
    }
    if state.fingerprint != fingerprint {
        return Err(damaged("it is of another model, other attacks, pictures or another seed".into()));
    }
    let n = pictures.len();
    if [state.clean.len(), state.broken_by.len(), state.outcomes.len()] != [n; 3] {
        return Err(damaged(format!("expected {n} pictures")));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|e| damaged(e.to_string()))?;
    let view = file.tensor("pixels").map_err(|e| damaged(e.to_string()))?;
    if view.shape() != pictures.pixels().dims() || view.dtype() != Dtype::F32 {
        return Err(damaged(format!("pixels of shape {:?}", view.shape())));
    }
    if sha256(Sha256::new_with_prefix(view.data())) != state.sha256 {
        return Err(damaged("its pixels are not those written".into()));
    }
    let values: Vec<f32> =
        view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    Ok((state, Tensor::from_vec(values, view.shape(), pictures.pixels().device())?))
}
