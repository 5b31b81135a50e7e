//! CLIP's blocks on packed weights.

use std::marker::PhantomData;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};

use super::attention::Heads;
use super::kernel::{Format, LANES, Single, for_each, product};
use super::memory::{Buffer, Mat, Packed, Pool};
use super::rows::{Activated, Deactivated, Keep, Norm, Plain, Residual, Span, Words, convert, scatter};
use super::{Engine, Outside};
use crate::tower::layers::{Activation, LayerNorm, Linear};
use crate::tower::{AttentionMix, Cotangent, Features, Gradients, Inserts, Precision, TowerSpec, Want, Wrt};
use crate::{Error, Result};

/// A linear layer and its bias, filled up like the weight.
struct Layer<F> {
    weight: Packed<F>,
    bias: Vec<f32>,
}

impl<F: Format> Layer<F> {
    fn new(layers: &[&Linear]) -> Result<Self> {
        let weights: Vec<&Tensor> = layers.iter().map(|layer| layer.weight()).collect();
        let weight = Packed::new(&weights)?;
        let mut bias = Vec::with_capacity(weight.out);
        for layer in layers {
            match layer.bias() {
                Some(values) => bias.extend(floats(values)?),
                None => bias.resize(bias.len() + layer.out_features(), 0.0),
            }
        }
        bias.resize(weight.out, 0.0);
        Ok(Self { weight, bias })
    }

    /// Words per token of a result.
    fn words(&self) -> usize {
        self.weight.out / F::PER_WORD
    }
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn norm(layer: &LayerNorm) -> Result<Norm> {
    Ok(Norm { weight: floats(layer.weight())?, bias: floats(layer.bias())?, eps: layer.eps() as f32 })
}

/// A block's layers, packed.
struct Block<F> {
    norm1: Norm,
    q: Layer<F>,
    kv: Layer<F>,
    out: Layer<F>,
    norm2: Norm,
    fc1: Layer<F>,
    fc2: Layer<F>,
}

/// The encoder, blocks with words of `F`. Patches, norms, the residual stream and the projection
/// are f32.
pub struct Encoder<F> {
    spec: TowerSpec,
    activation: Activation,
    mean: Vec<f32>,
    inverse_std: Vec<f32>,
    patches: Layer<Single>,
    /// Positions with the class token added to the first, a row of tokens per feature, with
    /// margins as [`scatter`] wants them.
    positions: Vec<f32>,
    stride: usize,
    pre_norm: Norm,
    blocks: Vec<Block<F>>,
    post_norm: Norm,
    projection: Option<Layer<Single>>,
    /// For all tokens, and for one per picture.
    pools: [Arc<Pool>; 2],
}

/// What a block's gradient needs, words of the encoder's format.
struct BlockTape {
    input: Buffer,
    /// Queries, keys and values.
    attention: Option<(Buffer, Buffer)>,
    middle: Buffer,
    /// The MLP before its activation; `None` where it is computed again.
    up: Option<Buffer>,
    /// Whether all but keys, values and the input are of class tokens alone.
    class: bool,
}

/// Bytes that the MLPs' inner layers may take in an f32 tape. They are almost half of it; what is
/// larger is computed again for the gradient, to the same bits, for a sixth more work.
const INNER: usize = 192 << 20;

/// What a forward pass keeps.
pub struct Tape {
    batch: usize,
    embedded: Buffer,
    blocks: Vec<BlockTape>,
    class: Option<Buffer>,
}

/// Tokens in a batch.
#[derive(Clone, Copy)]
struct Rows {
    batch: usize,
    tokens: usize,
}

impl Rows {
    fn all(self) -> usize {
        self.batch * self.tokens
    }
    fn panels(self) -> usize {
        self.all().div_ceil(LANES)
    }
    /// One per picture.
    fn class(self) -> Self {
        Self { tokens: 1, ..self }
    }
}

/// Runs `f` for every panel.
fn panels(rows: Rows, f: impl Fn(usize) + Sync + Send) {
    for_each(rows.panels(), f);
}

/// Runs `f` on a thread of the pool, where what it splits up is handed over fastest.
fn in_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

impl<F: Format> Encoder<F> {
    /// Takes the blocks one after the other, so that what they held can go meanwhile.
    pub fn new(outside: Outside<'_>, blocks: impl Iterator<Item = super::Block>) -> Result<Self> {
        let blocks = blocks.map(|block| {
            Ok(Block {
                norm1: norm(&block.norm1)?,
                q: Layer::new(&[&block.q])?,
                kv: Layer::new(&[&block.k, &block.v])?,
                out: Layer::new(&[&block.out])?,
                norm2: norm(&block.norm2)?,
                fc1: Layer::new(&[&block.fc1])?,
                fc2: Layer::new(&[&block.fc2])?,
            })
        });
        let (tokens, d) = (outside.spec.tokens(), outside.spec.hidden);
        let stride = tokens.next_multiple_of(LANES) + 2 * LANES;
        let mut positions = vec![0f32; d * stride];
        let (class, rows) = (floats(outside.class)?, floats(outside.positions)?);
        for (t, row) in rows.chunks_exact(d).enumerate() {
            for (f, value) in row.iter().enumerate() {
                let class = if t == 0 { class[f] } else { 0.0 };
                positions[f * stride + LANES + t] = value + class;
            }
        }
        Ok(Self {
            blocks: blocks.collect::<Result<_>>()?,
            spec: outside.spec.clone(),
            activation: outside.activation,
            mean: floats(outside.mean)?,
            inverse_std: floats(outside.inverse_std)?,
            patches: Layer::new(&[outside.patches])?,
            positions,
            stride,
            pre_norm: norm(outside.pre_norm)?,
            post_norm: norm(outside.post_norm)?,
            projection: outside.projection.map(|layer| Layer::new(&[layer])).transpose()?,
            pools: Default::default(),
        })
    }

    fn rows(&self, batch: usize) -> Rows {
        Rows { batch, tokens: self.spec.tokens() }
    }

    /// A buffer for these rows, which are all or one per picture.
    fn take(&self, rows: Rows, words: usize) -> Buffer {
        self.pools[usize::from(rows.tokens == 1)].take(rows.panels(), words)
    }

    /// A buffer of f32 of the stream's width.
    fn stream(&self, rows: Rows) -> Buffer {
        self.take(rows, self.spec.hidden)
    }

    /// A buffer of words of `F` of the stream's width.
    fn narrow(&self, rows: Rows) -> Buffer {
        self.take(rows, self.spec.hidden / F::PER_WORD)
    }

    /// Patch rows of normalised pixels, f32, with zeros where class tokens are.
    fn patch_rows(&self, pixels: &[f32], rows: Rows, to: Mat) {
        let (grid, p, side) = (self.spec.grid, self.spec.patch_size, self.spec.image_size);
        let plane = side * side;
        let mean_and_scale: Vec<(f32, f32)> =
            self.mean.iter().copied().zip(self.inverse_std.iter().copied()).collect();
        panels(rows, |panel| {
            // Safety: each panel once, and the words fill it.
            let panel_words = unsafe {
                let start = to.panel(panel).cast::<f32>();
                std::slice::from_raw_parts_mut(start, to.words * LANES)
            };
            panel_words.fill(0.0);
            for lane in 0..LANES {
                let row = panel * LANES + lane;
                let (picture, token) = (row / rows.tokens, row % rows.tokens);
                if row >= rows.all() || token == 0 {
                    continue;
                }
                let (y, x) = ((token - 1) / grid.1 * p, (token - 1) % grid.1 * p);
                let mut word = lane;
                for (c, (mean, scale)) in mean_and_scale.iter().enumerate() {
                    for dy in 0..p {
                        let at = (picture * 3 + c) * plane + (y + dy) * side + x;
                        for value in &pixels[at..at + p] {
                            panel_words[word] = (value - mean) * scale;
                            word += LANES;
                        }
                    }
                }
            }
        });
    }

    /// The way back: the gradient at the pixels from that at the patch rows.
    fn patch_rows_vjp(&self, from: Mat, rows: Rows) -> Vec<f32> {
        let (grid, p, side) = (self.spec.grid, self.spec.patch_size, self.spec.image_size);
        let mut pixels = vec![0f32; rows.batch * 3 * side * side];
        for (plane, pixels) in pixels.chunks_exact_mut(side * side).enumerate() {
            let (picture, c) = (plane / 3, plane % 3);
            for token in 1..rows.tokens {
                let row = picture * rows.tokens + token;
                let (y, x) = ((token - 1) / grid.1 * p, (token - 1) % grid.1 * p);
                // Safety: the panel is there, with 3 P P words.
                let words =
                    unsafe { from.panel(row / LANES).cast::<f32>().add(c * p * p * LANES + row % LANES) };
                for dy in 0..p {
                    let line = &mut pixels[(y + dy) * side + x..][..p];
                    for (dx, value) in line.iter_mut().enumerate() {
                        // Safety: as above.
                        *value = unsafe { *words.add((dy * p + dx) * LANES) } * self.inverse_std[c];
                    }
                }
            }
        }
        pixels
    }

    /// Words of the first token of each picture.
    fn class_of(&self, from: &Buffer, rows: Rows) -> Buffer {
        let found = self.take(rows.class(), from.words);
        each_class(rows, from.mat(), found.mat(), |from, to| {
            // Safety: both are words of buffers that no one else writes now.
            unsafe { *to = *from }
        });
        found
    }

    fn run(
        &self,
        pixels: &Tensor,
        want: &Want,
        inserts: &Inserts,
        keep: bool,
    ) -> Result<(Features, Option<Tape>)> {
        let rows = self.rows(pixels.dim(0)?);
        let filtered = match &inserts.input {
            Some(filter) => each_picture(pixels, |pixels| filter.apply(pixels))?,
            None => pixels.clone(),
        };
        let embedded = self.stream(rows);
        {
            let patches = self.take(rows, self.patches.weight.inner);
            slice(&filtered, |pixels| self.patch_rows(pixels, rows, patches.mat()))?;
            for picture in 0..rows.batch {
                let span = Span { from: picture * rows.tokens, tokens: rows.tokens };
                let all = 0..self.spec.hidden;
                // Safety: the positions have margins; pictures share no lanes.
                unsafe {
                    scatter::<Single>(self.positions.as_ptr(), self.stride, embedded.mat(), all, span, false);
                }
            }
            let finish = Residual { bias: &self.patches.bias, from: embedded.mat(), to: embedded.mat() };
            product(&self.patches.weight, false, patches.mat(), rows.panels(), &finish);
        }
        let mut stream = self.stream(rows);
        let (from, to) = (embedded.mat(), stream.mat());
        // Safety: each panel once.
        panels(rows, |p| unsafe { self.pre_norm.forward::<Single>(from.panel(p), to.panel(p), None) });
        let mut tape = keep.then(|| Tape { batch: rows.batch, embedded, blocks: Vec::new(), class: None });
        let last = want.last_block(self.blocks.len());
        let mut hidden: Vec<Option<Tensor>> = vec![None; want.hidden.len()];
        let mut give = |block: usize, stream: &Buffer| -> Result<()> {
            for (slot, _) in hidden.iter_mut().zip(&want.hidden).filter(|(_, wanted)| **wanted == block) {
                *slot = Some(self.tensor(stream, rows)?);
            }
            Ok(())
        };
        give(0, &stream)?;
        // Of the last block only the class token's output is wanted, unless it is a hidden state.
        let mut class_alone = false;
        for i in 0..last {
            class_alone = want.pooled && i + 1 == last && !want.hidden.contains(&last);
            let mix = if i == 0 { inserts.attention.as_deref() } else { None };
            class_alone &= mix.is_none();
            let kept;
            (stream, kept) = self.block_forward(&self.blocks[i], stream, rows, class_alone, mix, keep)?;
            if let (Some(tape), Some(kept)) = (&mut tape, kept) {
                tape.blocks.push(kept);
            }
            if !class_alone {
                give(i + 1, &stream)?;
            }
        }
        let (mut pooled, mut embeds) = (None, None);
        if want.pooled {
            let class = if class_alone { stream } else { self.class_of(&stream, rows) };
            let small = rows.class();
            let normal = self.stream(small);
            let (from, to) = (class.mat(), normal.mat());
            // Safety: each panel once.
            panels(small, |p| unsafe { self.post_norm.forward::<Single>(from.panel(p), to.panel(p), None) });
            if let Some(projection) = &self.projection {
                let found = self.take(small, projection.words());
                let finish = Words::<Single> { to: found.mat(), format: PhantomData };
                product(&projection.weight, false, normal.mat(), small.panels(), &finish);
                let width = self.spec.projection.unwrap_or_default();
                embeds = Some(tokens(&found, small, width)?.squeeze(1)?);
            }
            pooled = Some(self.tensor(&normal, small)?.squeeze(1)?);
            if let Some(tape) = &mut tape {
                tape.class = Some(class);
            }
        }
        let hidden = hidden.into_iter().flatten().collect();
        Ok((Features { hidden, pooled, embeds, ..Features::default() }, tape))
    }

    /// Rows of a stream as a tensor `(B, tokens, D)`.
    fn tensor(&self, stream: &Buffer, rows: Rows) -> Result<Tensor> {
        tokens(stream, rows, self.spec.hidden)
    }

    /// A block: its output, of class tokens alone if `class`, and what its gradient needs if
    /// `keep`.
    fn block_forward(
        &self,
        block: &Block<F>,
        stream: Buffer,
        rows: Rows,
        class: bool,
        mix: Option<&dyn AttentionMix>,
        keep: bool,
    ) -> Result<(Buffer, Option<BlockTape>)> {
        let asking = if class { rows.class() } else { rows };
        // f32 keeps the stream itself, bf16 a copy of half the size.
        let copies = keep && F::PER_WORD > 1;
        let input = copies.then(|| self.narrow(rows));
        let mut attention = None;
        let mut context = None;
        if mix.is_none_or(|mix| mix.needs_attention()) {
            let normal = self.narrow(rows);
            self.normalise(&block.norm1, &stream, &normal, input.as_ref(), rows);
            let q = self.narrow(asking);
            let kv = self.take(rows, block.kv.words());
            let of_class = class.then(|| self.class_of(&normal, rows));
            let keep_q = Keep::<F> { bias: &block.q.bias, to: q.mat(), format: PhantomData };
            let source = of_class.as_ref().unwrap_or(&normal).mat();
            product(&block.q.weight, false, source, asking.panels(), &keep_q);
            let keep_kv = Keep::<F> { bias: &block.kv.bias, to: kv.mat(), format: PhantomData };
            product(&block.kv.weight, false, normal.mat(), rows.panels(), &keep_kv);
            drop((normal, of_class));
            let found = self.narrow(asking);
            self.heads(&q, &kv, rows, asking).forward::<F>(found.mat());
            (attention, context) = (Some((q, kv)), Some(found));
        } else if let Some(input) = &input {
            self.convert(&stream, input, rows);
        }
        let (from, middle, held) = if class {
            let own = self.class_of(&stream, rows);
            (own.mat(), own, Some(stream))
        } else if keep && input.is_none() {
            (stream.mat(), self.stream(rows), Some(stream))
        } else {
            (stream.mat(), stream, None)
        };
        let input = input.or(held).filter(|_| keep);
        let residual = |layer: &Layer<F>, x: &Buffer, from: Mat, to: &Buffer| {
            let finish = Residual { bias: &layer.bias, from, to: to.mat() };
            product(&layer.weight, false, x.mat(), asking.panels(), &finish);
        };
        match (mix, &context) {
            (None, Some(context)) => residual(&block.out, context, from, &middle),
            (None, None) => return Err(Error::Unsupported("attention skipped without a mix".into())),
            (Some(mix), context) => {
                let attended = context.as_ref().map(|context| {
                    let to = self.stream(rows);
                    let finish = Keep::<Single> { bias: &block.out.bias, to: to.mat(), format: PhantomData };
                    product(&block.out.weight, false, context.mat(), rows.panels(), &finish);
                    self.tensor(&to, rows)
                });
                let mixed = mix.apply(attended.transpose()?.as_ref(), rows.batch, DType::F32)?;
                put(&mixed, rows, self.spec.hidden, Some(from), middle.mat())?;
            }
        }
        drop(context);
        let copy = copies.then(|| self.narrow(asking));
        let normal = self.narrow(asking);
        self.normalise(&block.norm2, &middle, &normal, copy.as_ref(), asking);
        // In bf16 the stream is not kept to the bit, so the inner layer is.
        let inner = self.blocks.len() * rows.all() * block.fc1.words() * 4;
        let up = (keep && (copies || inner <= INNER)).then(|| self.take(asking, block.fc1.words()));
        let act = self.take(asking, block.fc1.words());
        let finish = Activated::<F> {
            bias: &block.fc1.bias,
            activation: self.activation,
            up: up.as_ref().map(Buffer::mat),
            to: act.mat(),
            format: PhantomData,
        };
        product(&block.fc1.weight, false, normal.mat(), asking.panels(), &finish);
        drop(normal);
        let (from, output, held) = if keep && copy.is_none() {
            (middle.mat(), self.stream(asking), Some(middle))
        } else {
            (middle.mat(), middle, None)
        };
        residual(&block.fc2, &act, from, &output);
        let tape = match (input, copy.or(held).filter(|_| keep)) {
            (Some(input), Some(middle)) => Some(BlockTape { input, attention, middle, up, class }),
            _ => None,
        };
        Ok((output, tape))
    }

    fn heads(&self, q: &Buffer, kv: &Buffer, rows: Rows, asking: Rows) -> Heads {
        Heads {
            q: q.mat(),
            kv: kv.mat(),
            batch: rows.batch,
            tokens: rows.tokens,
            queries: asking.tokens,
            heads: self.spec.heads,
            width: self.spec.hidden / self.spec.heads,
        }
    }

    fn normalise(&self, norm: &Norm, x: &Buffer, to: &Buffer, copy: Option<&Buffer>, rows: Rows) {
        let (x, to, copy) = (x.mat(), to.mat(), copy.map(Buffer::mat));
        // Safety: each panel once.
        panels(rows, |p| unsafe {
            norm.forward::<F>(x.panel(p), to.panel(p), copy.map(|copy| copy.panel(p)))
        });
    }

    fn convert(&self, x: &Buffer, to: &Buffer, rows: Rows) {
        let (x, to, width) = (x.mat(), to.mat(), self.spec.hidden);
        // Safety: each panel once.
        panels(rows, |p| unsafe { convert::<F>(x.panel(p), to.panel(p), width) });
    }

    /// The gradient `stream` as words of `F`: itself, or a copy.
    fn words_of(&self, stream: &Buffer, copy: &Option<Buffer>) -> Mat {
        copy.as_ref().unwrap_or(stream).mat()
    }

    /// Turns `gradient`, at a block's output, into that at its middle.
    fn mlp_vjp(
        &self,
        block: &Block<F>,
        tape: &BlockTape,
        gradient: &Buffer,
        copy: &Option<Buffer>,
        rows: Rows,
    ) {
        let again = tape.up.is_none().then(|| {
            let normal = self.narrow(rows);
            self.normalise(&block.norm2, &tape.middle, &normal, None, rows);
            let up = self.take(rows, block.fc1.words());
            let finish = Keep::<F> { bias: &block.fc1.bias, to: up.mat(), format: PhantomData };
            product(&block.fc1.weight, false, normal.mat(), rows.panels(), &finish);
            up
        });
        let kept = tape.up.as_ref().map(Buffer::mat);
        let up = again.unwrap_or_else(|| self.take(rows, block.fc1.words()));
        let finish = Deactivated::<F> {
            activation: self.activation,
            up: kept.unwrap_or(up.mat()),
            to: up.mat(),
            format: PhantomData,
        };
        product(&block.fc2.weight, true, self.words_of(gradient, copy), rows.panels(), &finish);
        let normal = self.stream(rows);
        product(&block.fc1.weight, true, up.mat(), rows.panels(), &Plain { to: normal.mat(), add: false });
        self.norm_vjp(&block.norm2, &tape.middle, &normal, gradient, copy, rows);
    }

    /// Adds to `gradient` what comes back through a norm of `x` from the gradient `at` its result.
    fn norm_vjp(
        &self,
        norm: &Norm,
        x: &Buffer,
        at: &Buffer,
        gradient: &Buffer,
        copy: &Option<Buffer>,
        rows: Rows,
    ) {
        let (x, at, to, copy) = (x.mat(), at.mat(), gradient.mat(), copy.as_ref().map(Buffer::mat));
        // Safety: each panel once.
        panels(rows, |p| unsafe {
            norm.vjp::<F>(x.panel(p), at.panel(p), to.panel(p), true, copy.map(|copy| copy.panel(p)));
        });
    }

    fn copy(&self, gradient: &Buffer, rows: Rows) -> Option<Buffer> {
        (F::PER_WORD > 1).then(|| {
            let copy = self.narrow(rows);
            self.convert(gradient, &copy, rows);
            copy
        })
    }

    /// The gradient of class tokens at the last block's output from those at the pooled outputs.
    fn pooled_vjp(&self, tape: &Tape, cotangent: &Cotangent) -> Result<Option<Buffer>> {
        if cotangent.pooled.is_none() && cotangent.embeds.is_none() {
            return Ok(None);
        }
        let small = Rows { batch: tape.batch, tokens: 1 };
        let Some(class) = &tape.class else {
            let expected = "none at the pooled output: the tape stops before it";
            return Err(Error::argument("cotangent", expected, "one"));
        };
        let d = self.spec.hidden;
        let normal = self.stream(small);
        match (&cotangent.embeds, &self.projection) {
            (Some(given), Some(projection)) => {
                let words = self.take(small, projection.words());
                put(given, small, self.spec.projection.unwrap_or_default(), None, words.mat())?;
                let finish = Plain { to: normal.mat(), add: false };
                product(&projection.weight, true, words.mat(), small.panels(), &finish);
            }
            (Some(_), None) => {
                let expected = "none at embeds: the tower has no projection";
                return Err(Error::argument("cotangent", expected, "one"));
            }
            (None, _) => zero(normal.mat(), small),
        }
        if let Some(given) = &cotangent.pooled {
            put(given, small, d, Some(normal.mat()), normal.mat())?;
        }
        let gradient = self.stream(small);
        let (x, at, to) = (class.mat(), normal.mat(), gradient.mat());
        // Safety: each panel once.
        panels(small, |p| unsafe {
            self.post_norm.vjp::<Single>(x.panel(p), at.panel(p), to.panel(p), false, None);
        });
        Ok(Some(gradient))
    }

    /// A gradient of class tokens as one of all tokens.
    fn spread(&self, class: &Buffer, rows: Rows) -> Buffer {
        let all = self.stream(rows);
        zero(all.mat(), rows);
        each_class(rows, all.mat(), class.mat(), |to, from| {
            // Safety: words of buffers that no one else writes now.
            unsafe { *to = *from }
        });
        all
    }

    fn back(&self, tape: &Tape, cotangent: &Cotangent, wrt: Wrt, inserts: &Inserts) -> Result<Gradients> {
        let rows = self.rows(tape.batch);
        let d = self.spec.hidden;
        let last = tape.blocks.len();
        let of_class = |block: usize| block == last && tape.blocks.last().is_some_and(|tape| tape.class);
        for (block, _) in &cotangent.hidden {
            if *block > last || of_class(*block) {
                let most = if of_class(last) { last - 1 } else { last };
                return Err(Error::argument("cotangent", format!("blocks 0 to {most} of this tape"), block));
            }
        }
        let mut gradients = Gradients::default();
        // At class tokens alone where the last block was run for them alone.
        let mut gradient = self.pooled_vjp(tape, cotangent)?;
        if !of_class(last) {
            gradient = gradient.map(|class| self.spread(&class, rows));
        }
        let given = |block: usize, gradient: &mut Option<Buffer>| -> Result<()> {
            for (_, given) in cotangent.hidden.iter().filter(|(b, _)| *b == block) {
                match gradient {
                    Some(gradient) => put(given, rows, d, Some(gradient.mat()), gradient.mat())?,
                    None => {
                        let found = self.stream(rows);
                        put(given, rows, d, None, found.mat())?;
                        *gradient = Some(found);
                    }
                }
            }
            Ok(())
        };
        for (i, (block, tape)) in self.blocks.iter().zip(&tape.blocks).enumerate().rev() {
            given(i + 1, &mut gradient)?;
            let Some(reached) = gradient.take() else { continue };
            let asking = if tape.class { rows.class() } else { rows };
            let copy = self.copy(&reached, asking);
            self.mlp_vjp(block, tape, &reached, &copy, asking);
            let mut attended = None;
            let mut needs = true;
            if let Some(mix) = inserts.attention.as_ref().filter(|_| i == 0) {
                let middle = self.tensor(&reached, rows)?;
                if wrt.anchor {
                    gradients.anchor = Some(mix.vjp_anchor(&middle)?);
                }
                let attention = mix.vjp_attention(&middle)?;
                needs = attention.is_some();
                attended = attention
                    .map(|attention| -> Result<Buffer> {
                        let wide = self.stream(rows);
                        put(&attention, rows, d, None, wide.mat())?;
                        Ok(self.copy(&wide, rows).unwrap_or(wide))
                    })
                    .transpose()?;
            }
            if i == 0 && !wrt.pixels {
                break;
            }
            gradient = Some(match &tape.attention {
                Some((q, kv)) if needs => {
                    let at = attended.as_ref().map_or_else(|| self.words_of(&reached, &copy), Buffer::mat);
                    let context = self.narrow(asking);
                    let finish = Words::<F> { to: context.mat(), format: PhantomData };
                    product(&block.out.weight, true, at, asking.panels(), &finish);
                    let (dq, dkv) = (self.narrow(asking), self.take(rows, block.kv.words()));
                    self.heads(q, kv, rows, asking).vjp::<F>(context.mat(), dq.mat(), dkv.mat());
                    drop(context);
                    let normal = self.stream(rows);
                    let finish = Plain { to: normal.mat(), add: false };
                    product(&block.kv.weight, true, dkv.mat(), rows.panels(), &finish);
                    if tape.class {
                        let small = self.stream(asking);
                        let finish = Plain { to: small.mat(), add: false };
                        product(&block.q.weight, true, dq.mat(), asking.panels(), &finish);
                        each_class(rows, normal.mat(), small.mat(), |to, from| {
                            // Safety: words of buffers that no one else writes now.
                            unsafe {
                                let sum = f32::from_bits(*to) + f32::from_bits(*from);
                                *to = sum.to_bits();
                            }
                        });
                    } else {
                        let finish = Plain { to: normal.mat(), add: true };
                        product(&block.q.weight, true, dq.mat(), rows.panels(), &finish);
                    }
                    let whole = if tape.class { self.spread(&reached, rows) } else { reached };
                    self.norm_vjp(&block.norm1, &tape.input, &normal, &whole, &None, rows);
                    whole
                }
                _ => reached,
            });
        }
        if wrt.anchor && gradients.anchor.is_none() {
            if inserts.attention.is_none() {
                return Err(Error::argument("wrt", "no anchor gradient: no anchor is put in", "one"));
            }
            // Only outputs before the anchor's place were differentiated.
            gradients.anchor = Some(Tensor::zeros((rows.tokens, d), DType::F32, &Device::Cpu)?);
        }
        if wrt.pixels {
            given(0, &mut gradient)?;
            let side = self.spec.image_size;
            let shape = (rows.batch, 3, side, side);
            gradients.pixels = Some(match gradient {
                Some(gradient) => {
                    let embedded = self.stream(rows);
                    let (x, at, to) = (tape.embedded.mat(), gradient.mat(), embedded.mat());
                    // Safety: each panel once.
                    panels(rows, |p| unsafe {
                        self.pre_norm.vjp::<Single>(x.panel(p), at.panel(p), to.panel(p), false, None);
                    });
                    let patches = self.take(rows, self.patches.weight.inner);
                    let finish = Plain { to: patches.mat(), add: false };
                    product(&self.patches.weight, true, embedded.mat(), rows.panels(), &finish);
                    let filtered =
                        Tensor::from_vec(self.patch_rows_vjp(patches.mat(), rows), shape, &Device::Cpu)?;
                    match &inserts.input {
                        Some(filter) => each_picture(&filtered, |gradient| filter.adjoint(gradient))?,
                        None => filtered,
                    }
                }
                None => Tensor::zeros(shape, DType::F32, &Device::Cpu)?,
            });
        }
        Ok(gradients)
    }
}

impl<F: Format> Engine for Encoder<F> {
    fn forward(
        &self,
        pixels: &Tensor,
        want: &Want,
        inserts: &Inserts,
        keep: bool,
    ) -> Result<(Features, Option<Tape>)> {
        in_pool(|| self.run(pixels, want, inserts, keep))
    }

    fn vjp(&self, tape: &Tape, cotangent: &Cotangent, wrt: Wrt, inserts: &Inserts) -> Result<Gradients> {
        in_pool(|| self.back(tape, cotangent, wrt, inserts))
    }

    fn precision(&self) -> Precision {
        if F::PER_WORD == 1 { Precision::F32 } else { Precision::Bf16 }
    }

    fn block(&self, i: usize) -> Result<super::Block> {
        let missing = || Error::argument("block", format!("0 to {}", self.blocks.len()), i);
        let block = self.blocks.get(i).ok_or_else(missing)?;
        let d = self.spec.hidden;
        let row = |values: &[f32]| Tensor::new(values, &Device::Cpu);
        let part = |layer: &Layer<F>, from: usize, rows: usize| -> Result<Linear> {
            let weight = layer.weight.tensor()?.narrow(0, from, rows)?.force_contiguous()?;
            Ok(Linear::new(weight, Some(row(&layer.bias[from..from + rows])?)))
        };
        let norm = |norm: &Norm| -> Result<LayerNorm> {
            Ok(LayerNorm::new(row(&norm.weight)?, row(&norm.bias)?, f64::from(norm.eps)))
        };
        Ok(super::Block {
            norm1: norm(&block.norm1)?,
            q: part(&block.q, 0, d)?,
            k: part(&block.kv, 0, d)?,
            v: part(&block.kv, d, d)?,
            out: part(&block.out, 0, d)?,
            norm2: norm(&block.norm2)?,
            fc1: part(&block.fc1, 0, block.fc1.weight.rows())?,
            fc2: part(&block.fc2, 0, d)?,
        })
    }

    fn tape_bytes(&self) -> usize {
        let words = |block: &Block<F>| 5 * self.spec.hidden / F::PER_WORD + block.fc1.words();
        let numbers = self.blocks.iter().map(words).sum::<usize>() + self.spec.hidden;
        4 * numbers * self.spec.tokens()
    }
}

/// Runs `f` on each word of each picture's first token in `all` and of its row in `class`.
fn each_class(rows: Rows, all: Mat, class: Mat, f: impl Fn(*mut u32, *mut u32)) {
    let words = all.words;
    for picture in 0..rows.batch {
        let row = picture * rows.tokens;
        // Safety: both have the row.
        unsafe {
            let all = all.panel(row / LANES).add(row % LANES);
            let class = class.panel(picture / LANES).add(picture % LANES);
            for word in 0..words {
                f(all.add(word * LANES), class.add(word * LANES));
            }
        }
    }
}

fn zero(to: Mat, rows: Rows) {
    panels(rows, |p| {
        // Safety: each panel once.
        unsafe { std::slice::from_raw_parts_mut(to.panel(p), to.words * LANES).fill(0) }
    });
}

/// f32 rows as a tensor `(B, tokens, width)`.
fn tokens(from: &Buffer, rows: Rows, width: usize) -> Result<Tensor> {
    let from = from.mat();
    let mut values = vec![0f32; rows.all() * width];
    for (row, values) in values.chunks_exact_mut(width).enumerate() {
        // Safety: the panel is there, with at least `width` words.
        let words = unsafe { from.panel(row / LANES).cast::<f32>().add(row % LANES) };
        for (f, value) in values.iter_mut().enumerate() {
            // Safety: as above.
            *value = unsafe { *words.add(f * LANES) };
        }
    }
    Ok(Tensor::from_vec(values, (rows.batch, rows.tokens, width), &Device::Cpu)?)
}

/// The way back from [`tokens`], from a tensor with as many numbers, of any dtype; what is in
/// `base` is added. Words behind `width` become 0.
fn put(tensor: &Tensor, rows: Rows, width: usize, base: Option<Mat>, to: Mat) -> Result<()> {
    if tensor.elem_count() != rows.all() * width {
        let expected = format!("{} pictures of {} tokens, {width} wide", rows.batch, rows.tokens);
        return Err(Error::argument("a tower's tensor", expected, format!("{:?}", tensor.dims())));
    }
    let tensor = tensor.to_dtype(DType::F32)?;
    slice(&tensor, |values| {
        panels(rows, |panel| {
            for lane in 0..LANES.min(rows.all() - panel * LANES) {
                let row = panel * LANES + lane;
                // Safety: each panel once; both have `to.words` words.
                unsafe {
                    let to_row = to.panel(panel).cast::<f32>().add(lane);
                    let base = base.map(|base| base.panel(panel).cast::<f32>().add(lane));
                    for f in 0..to.words {
                        let value = if f < width { values[row * width + f] } else { 0.0 };
                        *to_row.add(f * LANES) = value + base.map_or(0.0, |base| *base.add(f * LANES));
                    }
                }
            }
        });
    })
}

/// Gives `f` one picture of `(B, 3, H, W)` at a time, and puts the results together: the bits of
/// what it does may depend on how many it is given.
fn each_picture(pixels: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let parts = (0..pixels.dim(0)?).map(|row| f(&pixels.narrow(0, row, 1)?)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 0)?)
}

/// Gives `f` the numbers of an f32 tensor on a CPU.
fn slice<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((from, to))) => Ok(f(&values[from..to])),
        _ => Err(Error::Unsupported("a tensor that is not f32 on the CPU".into())),
    }
}
