//! Training of the pocket models: a CLIP, then a LLaVA on its frozen tower, from pictures drawn as
//! they are needed.
//!
//! A step's pictures, words and dropped paths hang on the seed and the step alone, so a run that
//! was stopped goes on as if it had not been, and no data set is kept. A step's batch is split into
//! a fixed number of groups, each with its own graph on its own thread; gradients are added in the
//! groups' order, whatever the number of cores.

mod autograd;
pub mod clip;
pub mod llava;
mod parameters;
mod transformer;
pub(crate) mod words;

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};
use parameters::{AdamW, Gradients, Parameters};

/// Length and pace of a training run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Steps in all.
    pub steps: u64,
    /// Steps to do in this call, at most; the rest waits for the next one.
    #[serde(skip)]
    pub until: Option<u64>,
    /// Pictures per group.
    pub group: usize,
    /// Groups per step: the batch is `group * groups`.
    pub groups: usize,
    /// The highest learning rate.
    pub rate: f64,
    /// Steps over which the rate rises from 0; then it falls to 0 along a cosine.
    pub warmup: u64,
    /// AdamW's decay of matrices.
    pub weight_decay: f64,
    /// Of pictures, words, initial weights and dropped paths.
    pub seed: u64,
}

impl Plan {
    /// The learning rate of step `step`, of which the first is 1.
    pub fn rate_at(&self, step: u64) -> f64 {
        if step <= self.warmup {
            return self.rate * step as f64 / self.warmup as f64;
        }
        let done = (step - self.warmup) as f64 / self.steps.saturating_sub(self.warmup).max(1) as f64;
        self.rate * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
    }

    fn adam(&self) -> AdamW {
        AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-6, weight_decay: self.weight_decay, clip: 1.0 }
    }
}

/// One line of `losses.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Its number; the first is 1.
    pub step: u64,
    /// The mean loss over the batch.
    pub loss: f64,
    /// The share of training examples answered rightly, in percent.
    pub accuracy: f64,
}

/// What a group of one step comes to: the sum of losses and of right answers over `n` examples.
struct Share {
    gradients: Gradients,
    loss: f64,
    right: f64,
    n: f64,
}

/// Runs a plan in `folder`, which holds `state.safetensors` and `losses.jsonl`, from where it
/// stands. `share(parameters, step, group)` computes one group; `told` hears of every step.
fn run(
    plan: &Plan,
    folder: &Path,
    parameters: &mut Parameters,
    clamp: Option<(&str, f32)>,
    share: impl Fn(&Parameters, u64, usize) -> Result<Share> + Sync,
    told: &mut dyn FnMut(&Step),
) -> Result<()> {
    if plan.group == 0 || plan.groups == 0 {
        let found = format!("{} groups of {}", plan.groups, plan.group);
        return Err(Error::argument("plan", "at least one group of one picture", found));
    }
    std::fs::create_dir_all(folder).map_err(|e| Error::write(folder, e))?;
    let state = folder.join("state.safetensors");
    let log = folder.join("losses.jsonl");
    check_plan(plan, &folder.join("plan.json"))?;
    let start = if state.is_file() { parameters.load(&state)? } else { 0 };
    // Steps after the last saved state are done again.
    let mut lines = read_losses(&log)?;
    lines.retain(|line| line.step <= start);
    let end = plan.until.unwrap_or(plan.steps).min(plan.steps);
    for step in start + 1..=end {
        let shares = in_parallel(plan.groups, |group| share(parameters, step, group))?;
        let mut sum: Gradients = Vec::new();
        let (mut loss, mut right, mut n) = (0.0, 0.0, 0.0);
        for share in shares {
            (loss, right, n) = (loss + share.loss, right + share.right, n + share.n);
            if sum.is_empty() {
                sum = share.gradients;
            } else {
                let pairs = sum.iter_mut().zip(&share.gradients);
                pairs.for_each(|(a, b)| a.iter_mut().zip(b).for_each(|(a, b)| *a += b));
            }
        }
        let scale = 1.0 / plan.groups as f32;
        sum.iter_mut().flatten().for_each(|g| *g *= scale);
        parameters.step(&sum, step, plan.rate_at(step), &plan.adam());
        if let Some((name, most)) = clamp {
            parameters.clamp(name, most)?;
        }
        lines.push(Step { step, loss: loss / n, accuracy: 100.0 * right / n });
        told(&lines[lines.len() - 1]);
        if step % 100 == 0 || step == end {
            // The state last: lines beyond it are done again, lines before it could not be.
            write_losses(&log, &lines)?;
            parameters.save(&state, step)?;
        }
    }
    Ok(())
}

/// A folder belongs to one plan; another one would spoil it without a word.
fn check_plan(plan: &Plan, path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(plan).map_err(candle_core::Error::wrap)?;
    check_same(path, &text, "is of a run with another plan; use another folder")
}

/// Writes `text` where there is none yet, and refuses any other text.
fn check_same(path: &Path, text: &str, reason: &str) -> Result<()> {
    match std::fs::read_to_string(path) {
        Ok(found) if found == text => Ok(()),
        Ok(_) => Err(Error::config(path, reason)),
        Err(_) => write_whole(path, text.as_bytes()),
    }
}

fn read_losses(path: &Path) -> Result<Vec<Step>> {
    let Ok(text) = std::fs::read_to_string(path) else { return Ok(Vec::new()) };
    let parse = |line| serde_json::from_str(line).map_err(|e| Error::config(path, e.to_string()));
    text.lines().map(parse).collect()
}

fn write_losses(path: &Path, lines: &[Step]) -> Result<()> {
    let mut text = String::new();
    for line in lines {
        text += &serde_json::to_string(line).map_err(candle_core::Error::wrap)?;
        text.push('\n');
    }
    write_whole(path, text.as_bytes())
}

/// Writes a file whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = PathBuf::from(path);
    temporary.as_mut_os_string().push(".part");
    let write = || {
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|e| Error::write(path, e))
}

/// Runs `f` for 0 to `n`, as many at once as there are cores, each on one thread; results in order.
fn in_parallel<T: Send>(n: usize, f: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.clamp(1, n);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let slots: Vec<std::sync::Mutex<Option<Result<T>>>> = (0..n).map(|_| Default::default()).collect();
    let work = || {
        loop {
            let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if i >= n {
                return;
            }
            let result = f(i);
            if let Ok(mut slot) = slots[i].lock() {
                *slot = Some(result);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            // A pool of its own keeps the parallel loops inside each operation on this thread.
            scope.spawn(|| match rayon::ThreadPoolBuilder::new().num_threads(1).build() {
                Ok(pool) => pool.install(work),
                Err(_) => work(),
            });
        }
    });
    let taken = slots.into_iter().map(|slot| slot.into_inner().ok().flatten());
    taken
        .map(|slot| slot.unwrap_or_else(|| Err(Error::argument("training", "a result", "a panic"))))
        .collect()
}

fn write_json(path: &Path, json: &serde_json::Value) -> Result<()> {
    let text = serde_json::to_string_pretty(json).map_err(candle_core::Error::wrap)?;
    write_whole(path, text.as_bytes())
}

/// Writes `model.safetensors` in half precision.
fn write_model(folder: &Path, tensors: Vec<(String, Vec<usize>, Vec<u8>)>) -> Result<()> {
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| {
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F16, shape.clone(), bytes)?;
            Ok((name, view))
        })
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(candle_core::Error::wrap)?;
    let metadata = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(candle_core::Error::wrap)?;
    write_whole(&folder.join("model.safetensors"), &bytes)
}
