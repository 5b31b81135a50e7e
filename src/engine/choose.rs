//! Which token comes next: our own sampler, run as mistral.rs' logits processor.
//!
//! mistral.rs has one random generator for all conversations, so that a seed of its own could not
//! repeat an answer; it tries a constrained token before it knows whether the grammar takes it; and
//! an error while it samples one conversation loses a token of every other in the batch. Here each
//! step's random number is keyed by the request's seed, its choice and the step, the grammar is
//! asked first, and the token goes back as logits that leave no other.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use mistralrs_core::llguidance::{Matcher, ParserFactory};
use mistralrs_core::{CustomLogitsProcessor, Response};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use tokio::sync::mpsc::{Receiver, UnboundedSender};

use crate::Error;

/// Temperatures below are greedy: the softmax would overflow.
const GREEDY: f64 = 1e-5;

/// A generated token.
#[derive(Debug, Clone)]
pub struct Token {
    /// Its number in the vocabulary.
    pub id: u32,
    /// Its text, which need not be whole UTF-8; empty for tokens that only steer.
    pub bytes: Vec<u8>,
    /// The natural logarithm of its probability: the model's own, before temperature, penalties and
    /// constraints. 0 where log-probabilities were not asked for.
    pub logprob: f32,
    /// The likeliest tokens at its place, as many as were asked for, best first.
    pub top: Vec<Alternative>,
    /// Whether it is one of the model's end tokens.
    pub ends: bool,
}

/// A token that could have stood there.
#[derive(Debug, Clone)]
pub struct Alternative {
    /// Its number in the vocabulary.
    pub id: u32,
    /// Its text, as [`Token::bytes`].
    pub bytes: Vec<u8>,
    /// The natural logarithm of its probability.
    pub logprob: f32,
}

/// What the sampler tells of its work.
pub(super) enum Step {
    /// The prompt's token ids, image tokens included; before all others.
    Prompt(Vec<u32>),
    /// A token, with the logits it was chosen from where they are traced, and why it is the last.
    Token(Token, Option<Vec<f32>>, Option<Finish>),
    /// The answer cannot go on.
    Failed(Error),
    /// mistral.rs has ended it by itself.
    Over,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finish {
    /// The model or the grammar ended it, or a stop text came.
    Stop,
    /// It has as many tokens as it may, or the model's positions are full.
    Length,
}

/// How tokens are chosen.
pub(super) struct Plan {
    pub temperature: f64,
    pub top_p: f64,
    pub presence_penalty: f64,
    pub frequency_penalty: f64,
    /// Added to these tokens' logits.
    pub bias: Vec<(u32, f32)>,
    pub seed: u64,
    /// Whether the seed was asked for, and is to give the same answer again.
    pub seeded: bool,
    /// Which of a request's answers this is: each has its own random numbers.
    pub choice: u64,
    pub top_logprobs: Option<usize>,
    pub trace: bool,
    /// Tell of the steps when the answer is over, all at once: every telling wakes a thread, which for
    /// a small model takes as long as a token.
    pub whole: bool,
    pub max_tokens: usize,
    /// The model's end tokens.
    pub ends: Arc<[u32]>,
    /// How many positions the model has.
    pub positions: usize,
    pub vocabulary: Arc<ParserFactory>,
}

/// One answer's sampler.
pub(super) struct Chooser {
    plan: Plan,
    steps: UnboundedSender<Step>,
    state: Mutex<State>,
    /// Kept as long as mistral.rs may answer: it takes an answer that nobody can receive for a failure
    /// of all conversations in the batch.
    _responses: Arc<Responses>,
}

/// What mistral.rs answers.
pub(super) type Responses = tokio::sync::Mutex<Receiver<Response>>;

struct State {
    prompt: Option<usize>,
    counts: HashMap<u32, u32>,
    grammar: Option<Matcher>,
    /// Steps not told yet.
    held: Vec<Step>,
    /// Whether the answer is over; mistral.rs may still ask once.
    over: bool,
}

impl Chooser {
    pub fn new(
        plan: Plan,
        grammar: Option<Matcher>,
        steps: UnboundedSender<Step>,
        responses: Arc<Responses>,
    ) -> Self {
        let state = State { prompt: None, counts: HashMap::new(), grammar, held: Vec::new(), over: false };
        Self { plan, steps, state: Mutex::new(state), _responses: responses }
    }

    /// Tells of a step, or keeps it until the answer is over; the prompt goes with the first token.
    fn tell(&self, state: &mut State, step: Step) {
        let waits = self.plan.whole || matches!(step, Step::Prompt(_));
        state.held.push(step);
        if state.over || !waits {
            // Whoever does not listen any more is noticed at the next token.
            for step in state.held.drain(..) {
                let _ = self.steps.send(step);
            }
        }
    }

    /// The next token; `None` if the answer is over or cannot go on.
    fn next(&self, row: &[f32], context: &[u32]) -> Option<u32> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.over || self.steps.is_closed() {
            return None;
        }
        let prompt = match state.prompt {
            Some(prompt) => prompt,
            None => {
                state.prompt = Some(context.len());
                self.tell(&mut state, Step::Prompt(context.to_vec()));
                context.len()
            }
        };
        let step = context.len().saturating_sub(prompt);
        let id = match self.choose(row, step, &mut state) {
            Ok(id) => id,
            Err(error) => {
                state.over = true;
                self.tell(&mut state, Step::Failed(error));
                return None;
            }
        };
        let ends = self.plan.ends.contains(&id);
        let stopped = state.grammar.as_ref().is_some_and(Matcher::is_stopped);
        let full = step + 1 >= self.plan.max_tokens || context.len() >= self.plan.positions;
        let finish = match (ends || stopped, full) {
            (true, _) => Some(Finish::Stop),
            (false, true) => Some(Finish::Length),
            (false, false) => None,
        };
        state.over = finish.is_some();
        *state.counts.entry(id).or_default() += 1;
        let (logprob, top) = match self.plan.top_logprobs {
            None => (0.0, Vec::new()),
            Some(most) => self.logprobs(row, id, most),
        };
        let token = Token { id, bytes: self.bytes(id), logprob, top, ends };
        let trace = self.plan.trace.then(|| row.to_vec());
        self.tell(&mut state, Step::Token(token, trace, finish));
        Some(id)
    }

    fn choose(&self, row: &[f32], step: usize, state: &mut State) -> Result<u32, Error> {
        let plan = &self.plan;
        if row.is_empty() || row.iter().any(|logit| logit.is_nan()) {
            return Err(Error::Engine("the model's logits are not numbers".into()));
        }
        let mut logits = row.to_vec();
        for (&id, &count) in &state.counts {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit -= (plan.presence_penalty + plan.frequency_penalty * f64::from(count)) as f32;
            }
        }
        for &(id, bias) in &plan.bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        let greedy = plan.temperature < GREEDY;
        if let Some(grammar) = &mut state.grammar {
            let accepting = grammar.is_accepting().map_err(constraint)?;
            let first = if greedy { largest(&logits) } else { 0 };
            let taken = greedy
                && match plan.ends.contains(&first) {
                    true => accepting,
                    false => grammar.validate_tokens(&[first]).map_err(constraint)? == 1,
                };
            if !taken {
                let mask = grammar.compute_mask_or_eos().map_err(constraint)?;
                for (id, logit) in (0u32..).zip(logits.iter_mut()) {
                    let allowed = match plan.ends.contains(&id) {
                        true => accepting,
                        false => (id as usize) < mask.len() && mask.is_allowed(id),
                    };
                    if !allowed {
                        *logit = f32::NEG_INFINITY;
                    }
                }
                if logits.iter().all(|&logit| logit == f32::NEG_INFINITY) {
                    return Err(Error::Conversation("no token of the model fits the constraint".into()));
                }
            }
        }
        let id = if greedy { largest(&logits) } else { self.draw(&logits, step) };
        if let Some(grammar) = &mut state.grammar
            && !plan.ends.contains(&id)
        {
            grammar.consume_token(id).map_err(constraint)?;
        }
        Ok(id)
    }

    /// A token by its probability, of those that make up `top_p` together.
    fn draw(&self, logits: &[f32], step: usize) -> u32 {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| (f64::from(logit - most) / self.plan.temperature).exp();
        let mut tokens: Vec<(u32, f64)> =
            (0u32..).zip(logits.iter().map(|&l| weight(l))).filter(|(_, w)| *w > 0.0).collect();
        let total: f64 = tokens.iter().map(|(_, w)| w).sum();
        if self.plan.top_p < 1.0 {
            // The order of equals is settled by the number, so that it is the same every time.
            tokens.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let mut sum = 0.0;
            let kept = tokens.iter().take_while(|(_, w)| {
                let within = sum < self.plan.top_p * total;
                sum += w;
                within
            });
            let kept = kept.count().max(1);
            tokens.truncate(kept);
        }
        let total: f64 = tokens.iter().map(|(_, w)| w).sum();
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&self.plan.seed.to_le_bytes());
        key[8..16].copy_from_slice(&self.plan.choice.to_le_bytes());
        key[16..24].copy_from_slice(&(step as u64).to_le_bytes());
        let unit = (ChaCha12Rng::from_seed(key).next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = unit * total;
        for &(id, weight) in &tokens {
            left -= weight;
            if left < 0.0 {
                return id;
            }
        }
        // Rounding may leave a crumb.
        tokens.last().map_or(0, |&(id, _)| id)
    }

    fn logprobs(&self, row: &[f32], id: u32, most: usize) -> (f32, Vec<Alternative>) {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&l| f64::from(l - largest).exp()).sum();
        let of = |l: f32| (f64::from(l - largest) - sum.ln()) as f32;
        let mut order: Vec<u32> = (0u32..).take(row.len()).collect();
        let by = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
        if most > 0 && most < order.len() {
            order.select_nth_unstable_by(most - 1, by);
        }
        order.truncate(most);
        order.sort_unstable_by(by);
        let top = order.into_iter().map(|id| {
            let bytes = self.plan.vocabulary.tok_env().tok_trie().decode_ext(&[id], true);
            Alternative { id, bytes, logprob: of(row[id as usize]) }
        });
        (row.get(id as usize).map_or(f32::NEG_INFINITY, |&l| of(l)), top.collect())
    }

    fn bytes(&self, id: u32) -> Vec<u8> {
        self.plan.vocabulary.tok_env().tok_trie().decode_ext(&[id], false)
    }
}

impl CustomLogitsProcessor for Chooser {
    /// What a seed draws must not depend on what else is answered at the time: in batches of other
    /// sizes sums differ in their last bits.
    fn alone(&self) -> bool {
        self.plan.seeded && self.plan.temperature >= GREEDY
    }

    fn apply(&self, logits: &Tensor, context: &[u32]) -> candle_core::Result<Tensor> {
        let row = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        // Never an error: mistral.rs would drop a token of every other conversation in the batch.
        // An end token instead ends this one.
        let end = || self.plan.ends.first().copied().unwrap_or_default();
        let id = self.next(&row, context).unwrap_or_else(end);
        let mut only = vec![f32::NEG_INFINITY; row.len()];
        if let Some(logit) = only.get_mut(id as usize) {
            *logit = 0.0;
        }
        Tensor::from_vec(only, row.len(), &Device::Cpu)
    }
}

/// The largest entry; of equals the last, which mistral.rs takes.
fn largest(logits: &[f32]) -> u32 {
    (0u32..).zip(logits).max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(id, _)| id)
}

/// A grammar that became too much at this step.
fn constraint(error: impl std::fmt::Display) -> Error {
    Error::Conversation(format!("the constraint: {}", super::first_line(&error.to_string())))
}
