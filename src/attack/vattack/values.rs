//! The value features of a tower's blocks in the space of its texts, and V-Attack's loss on them.

use candle_core::{DType, Tensor};

use super::super::classifier::{pixel_gradient, scaled, unit, unit_vjp};
use super::super::objective::in_batches;
use super::super::{Evaluation, Subject};
use super::mask::Localised;
use super::{Localise, Sum, VAttack};
use crate::text::ClipText;
use crate::tower::clip::{BlockParts, Clip};
use crate::tower::layers::{AttentionTape, LayerNorm, Linear};
use crate::tower::{Cotangent, VisionTower, Want};
use crate::{Error, Result};

/// A CLIP to craft on, with what its text tower makes of each picture's words.
#[derive(Clone)]
pub struct Surrogate {
    tower: Clip,
    subject: Subject,
    weight: f64,
    /// `(B, P)` f32, of length 1.
    source: Tensor,
    /// `(B, P)` f32, of length 1.
    target: Tensor,
}

impl Surrogate {
    /// `subject` says which model this is, with what is put into `tower`. `weight` is its loss's
    /// factor among those of several surrogates. `source` and `target` are text embeddings `(B, P)`,
    /// a row per picture and of any length: of what it shows, and of what it is to be taken for.
    ///
    /// # Errors
    /// If the tower has no projection, the embeddings have another shape, or the weight is no
    /// positive number.
    pub fn new(tower: Clip, subject: Subject, weight: f64, source: &Tensor, target: &Tensor) -> Result<Self> {
        let Some(width) = tower.spec().projection else {
            return Err(Error::Unsupported(format!("{subject}: the vision tower has no projection")));
        };
        if !(weight.is_finite() && weight > 0.0) {
            return Err(Error::argument("weight of a surrogate", "a positive number", weight));
        }
        for embeds in [source, target] {
            match *embeds.dims() {
                [batch, found] if batch > 0 && batch == source.dim(0)? && found == width => {}
                ref dims => {
                    let expected = format!("shape [B, {width}] for source and target");
                    return Err(Error::argument("text embeddings", expected, format!("{dims:?}")));
                }
            }
        }
        let normal = |x: &Tensor| -> Result<Tensor> {
            Ok(unit(&x.to_device(tower.device())?.to_dtype(DType::F32)?.contiguous()?)?.0)
        };
        Ok(Self { source: normal(source)?, target: normal(target)?, tower, subject, weight })
    }

    /// With the words of each picture, source and target, as they are: no prompt around them.
    ///
    /// # Errors
    /// As [`Surrogate::new`], or if there are no words or a text cannot be embedded.
    pub fn of_words(
        tower: Clip,
        subject: Subject,
        weight: f64,
        text: &ClipText,
        words: &[(String, String)],
    ) -> Result<Self> {
        if words.is_empty() {
            return Err(Error::argument("words", "a source and a target per picture", "none"));
        }
        // Each by itself: what else is in a batch shows in the last bits.
        let embeds = |pick: &dyn Fn(&(String, String)) -> String| -> Result<Tensor> {
            let rows = words.iter().map(|pair| text.embed(&[pick(pair)])).collect::<Result<Vec<_>>>()?;
            Ok(Tensor::cat(&rows, 0)?)
        };
        let (source, target) = (embeds(&|pair| pair.0.clone())?, embeds(&|pair| pair.1.clone())?);
        Self::new(tower, subject, weight, &source, &target)
    }

    /// Which model it is, defence included.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// Its loss's factor.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// Number of pictures it has words for, B.
    pub fn pictures(&self) -> usize {
        self.source.dims().first().copied().unwrap_or(0)
    }

    /// The side of the pictures its tower takes.
    pub fn side(&self) -> usize {
        self.tower.spec().image_size
    }
}

/// A block whose values are read, in f32.
struct Block {
    /// The hidden state it reads.
    state: usize,
    parts: BlockParts,
}

/// What the gradient of a block's tokens needs.
struct BlockTape {
    /// `(1, N, D)`.
    hidden: Tensor,
    attention: Option<AttentionTape>,
    /// Before the final norm, `(1, N, D)`.
    out: Tensor,
    /// `(1, N, P)` of length 1, and their lengths.
    unit: Tensor,
    lengths: Tensor,
}

/// V-Attack's loss on one surrogate: value tokens against the words of a picture.
///
/// V_j = v_proj(norm1(h)), of the hidden state h that block j reads, enhanced where that is asked
/// for, then out_proj of block j, the final norm and the projection, scaled to length 1.
pub struct ValueLoss<'a> {
    surrogate: &'a Surrogate,
    blocks: Vec<Block>,
    /// The block whose keys tie patches together, where they do.
    keys: Option<(Block, usize)>,
    localise: Localise,
    enhance: bool,
    sum: Sum,
    post_norm: LayerNorm,
    projection: Linear,
}

impl<'a> ValueLoss<'a> {
    /// As `attack` says.
    ///
    /// # Errors
    /// If the tower has no such blocks.
    pub fn new(attack: &VAttack, surrogate: &'a Surrogate) -> Result<Self> {
        let tower = &surrogate.tower;
        let count = tower.spec().blocks;
        attack.check_tower(tower)?;
        let wide = |tensor: &Tensor| -> Result<Tensor> { Ok(tensor.to_dtype(DType::F32)?) };
        let block = |i: usize| -> Result<Block> {
            let parts = tower.block_parts(i)?;
            let a = &parts.attention;
            let [q, k, v, out] = [&a.q, &a.k, &a.v, &a.out].map(|layer| layer.map(wide));
            let attention =
                crate::tower::layers::Attention { q: q?, k: k?, v: v?, out: out?, heads: a.heads };
            Ok(Block { state: i, parts: BlockParts { norm1: parts.norm1.map(wide)?, attention } })
        };
        let keys = match attack.localise {
            Localise::Keys { block: found, rounds } => {
                // Block 8 of the original's 24, and the same share of another tower.
                Some((block(found.unwrap_or(8 * count / 24))?, rounds))
            }
            Localise::SelfValues | Localise::Values => None,
        };
        let projection = tower.projection().ok_or_else(|| {
            Error::Unsupported(format!("{}: the vision tower has no projection", surrogate.subject))
        })?;
        Ok(Self {
            surrogate,
            blocks: (count - attack.blocks..count).map(block).collect::<Result<_>>()?,
            keys,
            localise: attack.localise,
            enhance: attack.enhance,
            sum: attack.sum,
            post_norm: tower.post_norm().map(wide)?,
            projection: projection.map(wide)?,
        })
    }

    /// Patches down and across.
    pub fn grid(&self) -> (usize, usize) {
        self.surrogate.tower.spec().grid
    }

    fn values(&self, block: &Block, hidden: &Tensor) -> Result<Tensor> {
        block.parts.attention.v.forward(&block.parts.norm1.forward(hidden)?)
    }

    /// Values, or what was made of them, in the space of the texts: before the final norm, of
    /// length 1, and the lengths.
    fn embed(&self, block: &Block, values: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let out = block.parts.attention.out.forward(values)?;
        let (unit, lengths) = unit(&self.projection.forward(&self.post_norm.forward(&out)?)?)?;
        Ok((out, unit, lengths))
    }

    /// One picture's tokens of one block, from the hidden state `(1, N, D)` it reads.
    fn tokens(&self, block: &Block, hidden: Tensor) -> Result<BlockTape> {
        let mut values = self.values(block, &hidden)?;
        let mut attention = None;
        if self.enhance {
            let (mixed, tape) = block.parts.attention.self_values(&values)?;
            (values, attention) = (mixed, Some(tape));
        }
        let (out, unit, lengths) = self.embed(block, &values)?;
        Ok(BlockTape { hidden, attention, out, unit, lengths })
    }

    /// The gradient `(1, N, P)` at a block's tokens to that at the hidden state.
    fn tokens_vjp(&self, block: &Block, tape: &BlockTape, gradient: &Tensor) -> Result<Tensor> {
        let gradient = unit_vjp(&tape.unit, &tape.lengths, gradient)?;
        let gradient = self.post_norm.vjp(&tape.out, &self.projection.vjp(&gradient)?)?;
        let attention = &block.parts.attention;
        let mut gradient = attention.out.vjp(&gradient)?;
        if let Some(tape) = &tape.attention {
            gradient = attention.self_values_vjp(tape, &gradient)?;
        }
        block.parts.norm1.vjp(&tape.hidden, &attention.v.vjp(&gradient)?)
    }

    /// What ties the patches of one clean picture together, from the hidden state of the block of
    /// [`Localise::Keys`]: the rounds of softmax(K K^T / sqrt(d)) as one matrix `(h, N, N)`.
    fn affinity(&self, block: &Block, rounds: usize, hidden: &Tensor) -> Result<Option<Tensor>> {
        let once = block.parts.attention.key_affinity(&block.parts.norm1.forward(hidden)?)?;
        let mut power: Option<Tensor> = None;
        for bit in (0..usize::BITS - rounds.leading_zeros()).rev() {
            power = match power {
                Some(half) => Some(half.matmul(&half)?),
                None => None,
            };
            if rounds >> bit & 1 == 1 {
                power = Some(match power {
                    Some(even) => even.matmul(&once)?,
                    None => once.clone(),
                });
            }
        }
        Ok(power)
    }

    /// The cosine of every patch with the source's text, from the hidden state `(1, N, D)` that the
    /// last block reads.
    fn scores(&self, hidden: &Tensor, row: usize, affinity: Option<&Tensor>) -> Result<Vec<f32>> {
        let Some(block) = self.blocks.last() else { return Ok(Vec::new()) };
        let mut values = self.values(block, hidden)?;
        match (self.localise, affinity) {
            (Localise::SelfValues, _) => values = block.parts.attention.self_values(&values)?.0,
            (Localise::Keys { .. }, Some(weights)) => {
                values = block.parts.attention.spread(weights, &values)?;
            }
            _ => {}
        }
        let (_, unit, _) = self.embed(block, &values)?;
        self.along(&unit, &self.surrogate.source.narrow(0, row, 1)?)
    }

    /// The product of every patch's token, of `(1, N, P)`, with a vector `(1, P)`.
    fn along(&self, tokens: &Tensor, vector: &Tensor) -> Result<Vec<f32>> {
        let skip = self.skip();
        let all = tokens.squeeze(0)?.matmul(&vector.t()?.contiguous()?)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(all.get(skip..).unwrap_or_default().to_vec())
    }

    fn skip(&self) -> usize {
        usize::from(self.surrogate.tower.spec().class_token)
    }

    /// Where the pictures `rows` show their sources, and what [`Localise::Keys`] ties their patches
    /// with; of pixels `(R, 3, H, W)` in the tower's size.
    ///
    /// # Errors
    /// If the model fails or gives what is no number.
    pub(super) fn localise(
        &self,
        pixels: &Tensor,
        rows: &[usize],
    ) -> Result<(Vec<Localised>, Vec<Option<Tensor>>)> {
        let tower = &self.surrogate.tower;
        let last = tower.spec().blocks - 1;
        let hidden: Vec<usize> = self.keys.iter().map(|(block, _)| block.state).chain([last]).collect();
        let want = Want { hidden, ..Want::default() };
        let (mut found, mut ties) = (Vec::new(), Vec::new());
        for (start, part) in rows.chunks(tower.batch().max(1)).enumerate() {
            let start = start * tower.batch().max(1);
            let features = tower.forward(&pixels.narrow(0, start, part.len())?, &want)?;
            for (i, &row) in part.iter().enumerate() {
                let mut states = features.hidden.iter().map(|state| self.of_one(state, i));
                let affinity = match &self.keys {
                    Some((block, rounds)) => match states.next() {
                        Some(state) => self.affinity(block, *rounds, &state?)?,
                        None => None,
                    },
                    None => None,
                };
                let missing = || Error::Unsupported("the tower gave no hidden state".into());
                let scores = self.scores(&states.next().ok_or_else(missing)??, row, affinity.as_ref())?;
                check(&scores)?;
                found.push(Localised::new(self.grid(), scores));
                ties.push(affinity);
            }
        }
        Ok((found, ties))
    }

    /// Where the pictures `rows` show their sources, of pixels `(R, 3, S, S)` in the tower's size.
    ///
    /// # Errors
    /// If the model fails or gives what is no number.
    pub fn localised(&self, pixels: &Tensor, rows: &[usize]) -> Result<Vec<Localised>> {
        Ok(self.localise(pixels, rows)?.0)
    }

    /// The hidden state of picture `i` alone, in f32.
    fn of_one(&self, state: &Tensor, i: usize) -> Result<Tensor> {
        Ok(state.narrow(0, i, 1)?.to_dtype(DType::F32)?.contiguous()?)
    }

    /// The loss of pictures `rows`, at pixels `(R, 3, S, S)` in the tower's size, over the patches of
    /// `masks` (one per picture).
    ///
    /// # Errors
    /// If the model fails or gives what is no number.
    pub fn values_of(&self, pixels: &Tensor, rows: &[usize], masks: &[Vec<bool>]) -> Result<Vec<f64>> {
        let tower = &self.surrogate.tower;
        let order: Vec<usize> = (0..rows.len()).collect();
        let (found, _) = in_batches(pixels, &order, tower.batch(), |pixels, part| {
            let features = tower.forward(pixels, &self.want())?;
            let mut loss = Vec::new();
            for (i, &at) in part.iter().enumerate() {
                let states = features.hidden.iter().map(|state| self.of_one(state, i));
                let tapes = self.blocks.iter().zip(states).map(|(block, state)| self.tokens(block, state?));
                loss.push(self.loss(&tapes.collect::<Result<Vec<_>>>()?, rows[at], &masks[at])?);
            }
            Ok((Evaluation { loss, fooled: None }, Vec::new()))
        })?;
        Ok(found.loss)
    }

    /// The same with the gradient `(R, 3, S, S)` f32 of each picture's loss at its pixels, and the
    /// scores of the patches where they are asked for, with what ties them (one per picture).
    ///
    /// # Errors
    /// As [`ValueLoss::values_of`].
    pub(super) fn step(
        &self,
        pixels: &Tensor,
        rows: &[usize],
        masks: &[Vec<bool>],
        ties: Option<&[Option<Tensor>]>,
    ) -> Result<(Vec<f64>, Tensor, Option<Vec<Localised>>)> {
        let tower = &self.surrogate.tower;
        let order: Vec<usize> = (0..rows.len()).collect();
        let (found, mut tensors) = in_batches(pixels, &order, tower.batch(), |pixels, part| {
            let (features, tape) = tower.forward_tape(pixels, &self.want())?;
            let (mut loss, mut scores) = (Vec::new(), Vec::new());
            let mut cotangents: Vec<Vec<Tensor>> = vec![Vec::new(); self.blocks.len()];
            for (i, &at) in part.iter().enumerate() {
                let states = features.hidden.iter().map(|state| self.of_one(state, i));
                let tapes = self.blocks.iter().zip(states).map(|(block, state)| self.tokens(block, state?));
                let tapes = tapes.collect::<Result<Vec<_>>>()?;
                loss.push(self.loss(&tapes, rows[at], &masks[at])?);
                let gradient = self.loss_vjp(rows[at], &masks[at])?;
                for ((block, tape), column) in self.blocks.iter().zip(&tapes).zip(&mut cotangents) {
                    column.push(self.tokens_vjp(block, tape, &gradient)?);
                }
                if let (Some(ties), Some(last)) = (ties, tapes.last()) {
                    let found = self.scores(&last.hidden, rows[at], ties[at].as_ref())?;
                    check(&found)?;
                    scores.push(Tensor::from_vec(found, (1, self.patches()), tower.device())?);
                }
            }
            // All at once, so that one power of two scales a picture's.
            let columns = cotangents.iter().map(|column| Ok(Tensor::cat(column, 0)?));
            let whole = Tensor::cat(&columns.collect::<Result<Vec<_>>>()?, 1)?;
            let (whole, undo) = scaled(&whole)?;
            let tokens = tower.spec().tokens();
            let hidden = self.blocks.iter().enumerate().zip(&features.hidden).map(|((i, block), state)| {
                let gradient = whole.narrow(1, i * tokens, tokens)?.contiguous()?;
                Ok((block.state, gradient.to_dtype(state.dtype())?))
            });
            let cotangent = Cotangent { hidden: hidden.collect::<Result<_>>()?, ..Default::default() };
            let gradient = pixel_gradient(tower, &tape, &cotangent)?.broadcast_mul(&undo)?;
            let mut tensors = vec![gradient];
            if !scores.is_empty() {
                tensors.push(Tensor::cat(&scores, 0)?);
            }
            Ok((Evaluation { loss, fooled: None }, tensors))
        })?;
        let scores = if tensors.len() > 1 { tensors.pop() } else { None };
        let scores = scores.map(|scores| -> Result<Vec<Localised>> {
            let rows = scores.to_vec2::<f32>()?;
            Ok(rows.into_iter().map(|scores| Localised::new(self.grid(), scores)).collect())
        });
        let missing = || Error::Unsupported("the tower gave no gradient at the pixels".into());
        Ok((found.loss, tensors.pop().ok_or_else(missing)?, scores.transpose()?))
    }

    /// The loss and its gradient at pixels `(R, 3, S, S)` of the pictures `rows`, see
    /// [`ValueLoss::values_of`].
    ///
    /// # Errors
    /// As [`ValueLoss::values_of`].
    pub fn values_and_gradient(
        &self,
        pixels: &Tensor,
        rows: &[usize],
        masks: &[Vec<bool>],
    ) -> Result<(Vec<f64>, Tensor)> {
        let (loss, gradient, _) = self.step(pixels, rows, masks, None)?;
        Ok((loss, gradient))
    }

    fn want(&self) -> Want {
        Want { hidden: self.blocks.iter().map(|block| block.state).collect(), ..Want::default() }
    }

    fn patches(&self) -> usize {
        let (rows, columns) = self.grid();
        rows * columns
    }

    /// The factor of every patch.
    fn factor(&self) -> f64 {
        match self.sum {
            Sum::Patches => 1.0,
            Sum::Mean => 1.0 / self.patches() as f64,
        }
    }

    /// target - source, `(1, P)`.
    fn direction(&self, row: usize) -> Result<Tensor> {
        Ok((self.surrogate.target.narrow(0, row, 1)? - self.surrogate.source.narrow(0, row, 1)?)?)
    }

    fn loss(&self, tapes: &[BlockTape], row: usize, mask: &[bool]) -> Result<f64> {
        let direction = self.direction(row)?;
        let mut sum = 0.0;
        for tape in tapes {
            let along = self.along(&tape.unit, &direction)?;
            sum += along.iter().zip(mask).filter(|(_, kept)| **kept).map(|(v, _)| f64::from(*v)).sum::<f64>();
        }
        if !sum.is_finite() {
            return Err(Error::Unsupported("the tower gave features that are not numbers".into()));
        }
        Ok(sum * self.factor())
    }

    /// The gradient at the tokens of every block, `(1, N, P)`.
    fn loss_vjp(&self, row: usize, mask: &[bool]) -> Result<Tensor> {
        let factor = self.factor() as f32;
        let kept = mask.iter().map(|kept| if *kept { factor } else { 0.0 });
        let weights: Vec<f32> = vec![0.0; self.skip()].into_iter().chain(kept).collect();
        let weights =
            Tensor::from_vec(weights, (1, self.skip() + mask.len(), 1), self.surrogate.tower.device())?;
        Ok(weights.broadcast_mul(&self.direction(row)?.unsqueeze(1)?)?)
    }
}

fn check(scores: &[f32]) -> Result<()> {
    match scores.iter().all(|score| score.is_finite()) {
        true => Ok(()),
        false => Err(Error::Unsupported("the tower gave features that are not numbers".into())),
    }
}
