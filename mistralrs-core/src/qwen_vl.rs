//! Pictures, prompts and positions of the Qwen-VL models (Qwen2-VL, Qwen2.5-VL, Qwen3-VL and its
//! mixture of experts), once for all four.
//!
//! Upstream has three copies of this, each of which fails or goes astray with several sequences
//! at once, several pictures, or a wrong number of placeholders (`../README.md` has the list).
//! Here everything that depends on a prompt is worked out from its token ids before the model
//! runs: where each picture's tokens lie, and the three-part position of every token. The model
//! is left with encoding the pictures and putting them in place.

use std::any::Any;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Tensor};
use image::{imageops::FilterType, DynamicImage, GenericImageView};
use tokenizers::Tokenizer;

use crate::device_map::DeviceMapper;
use crate::paged_attention::encoder_cache::EncoderCacheManager;
use crate::pipeline::text_models_inputs_processor::{
    get_completion_input, get_prompt_input, InnerInputProcessorOutput, InputMetadata, PagedAttentionMeta,
};
use crate::pipeline::{
    InputProcessorOutput, InputsProcessor, InputsProcessorType, MessagesAction, Processor,
};
use crate::sequence::{build_mm_features_from_ranges, Sequence};
use crate::vision_models::preprocessor_config::{PreProcessorConfig, ToFilter};
use crate::vision_models::ModelInputs;
use crate::vision_tower::{Encoded, Resize};

const IMAGE_PAD: &str = "<|image_pad|>";
const VIDEO_PAD: &str = "<|video_pad|>";
/// The longest side may be this many times the shortest, as in transformers.
const MAX_RATIO: f64 = 200.0;
const CLIP_MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
const CLIP_STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];

/// The processor of all four models.
pub(crate) struct QwenProcessor(Arc<QwenInputs>);

impl QwenProcessor {
    /// `config` is the text of the model's `config.json`.
    pub(crate) fn new(config: &str, max_edge: Option<u32>) -> Self {
        let config: serde_json::Value = serde_json::from_str(config).unwrap_or_default();
        let number = |path: &str| {
            config.pointer(path).and_then(serde_json::Value::as_u64).map(|number| number as usize)
        };
        Self(Arc::new(QwenInputs {
            image_token: number("/image_token_id").map(|id| id as u32),
            most: number("/text_config/max_position_embeddings").or(number("/max_position_embeddings")),
            patch: number("/vision_config/patch_size"),
            merge: number("/vision_config/spatial_merge_size"),
            temporal: number("/vision_config/temporal_patch_size"),
            max_edge,
            resize: crate::vision_tower::resize(),
        }))
    }
}

impl Processor for QwenProcessor {
    fn inputs_processor(&self) -> Arc<dyn InputsProcessor> {
        self.0.clone()
    }
    fn get_special_tokens(&self) -> &[&'static str] {
        &[IMAGE_PAD, VIDEO_PAD]
    }
    // The model's own chat template places the pictures; flattened to text they would be lost.
    fn template_action(&self) -> MessagesAction {
        MessagesAction::Keep
    }
}

struct QwenInputs {
    image_token: Option<u32>,
    /// The most tokens a prompt may have.
    most: Option<usize>,
    patch: Option<usize>,
    merge: Option<usize>,
    temporal: Option<usize>,
    max_edge: Option<u32>,
    /// The embedder's resizing, which is Pillow's to the byte; upstream's rounds only once.
    resize: Option<Resize>,
}

/// A grid of patches: time, height, width.
type Grid = [u32; 3];

/// One picture of one prompt.
pub(crate) struct Picture {
    /// The row of the batch it belongs to.
    row: usize,
    /// Where its tokens begin in that row, and how many they are.
    start: usize,
    tokens: usize,
    /// What the encoder cache knows it by.
    hash: u64,
    grid: Grid,
    /// `(t * h * w, channels * temporal * patch * patch)` in f32, on the CPU.
    patches: Tensor,
}

/// What the input processor hands to the model.
pub(crate) struct QwenArgs {
    /// `(3, batch, tokens)` of i64: time, height and width.
    positions: Tensor,
    pictures: Vec<Picture>,
}

impl QwenArgs {
    /// Those of a text of `input_ids`' shape, `(batch, tokens)`.
    pub(crate) fn of_text(input_ids: &Tensor) -> Result<Self> {
        let (batch, length) = input_ids.dims2()?;
        let row = Tensor::arange(0i64, length as i64, input_ids.device())?;
        Ok(Self { positions: row.reshape((1, 1, ()))?.repeat((3, batch, 1))?, pictures: Vec::new() })
    }

    /// What `args` is, if the input processor made it.
    pub(crate) fn from_any(args: Box<dyn Any>) -> Result<Self> {
        match args.downcast::<Self>() {
            Ok(args) => Ok(*args),
            Err(_) => candle_core::bail!("these are not the inputs of a Qwen-VL model"),
        }
    }

    /// The positions, for the rotary embedding.
    pub(crate) fn positions(&self) -> &Tensor {
        &self.positions
    }
}

/// How large the pictures and patches of one model are.
struct Sizes {
    patch: usize,
    merge: usize,
    temporal: usize,
    min_pixels: usize,
    max_pixels: usize,
}

impl QwenInputs {
    fn sizes(&self, config: &PreProcessorConfig) -> anyhow::Result<Sizes> {
        let of = |name: &str, value: Option<usize>| match value {
            Some(number) if number > 0 => Ok(number),
            _ => Err(anyhow::anyhow!("preprocessor_config.json has no usable {name}")),
        };
        let edge = |name: &str| config.size.as_ref().and_then(|size| size.get(name)).map(|&n| n as usize);
        Ok(Sizes {
            patch: of("patch_size", config.patch_size.or(self.patch))?,
            merge: of("merge_size", config.merge_size.or(self.merge))?,
            temporal: of("temporal_patch_size", config.temporal_patch_size.or(self.temporal))?,
            min_pixels: config.min_pixels.or(edge("shortest_edge")).unwrap_or(56 * 56),
            max_pixels: config.max_pixels.or(edge("longest_edge")).unwrap_or(28 * 28 * 1280),
        })
    }

    /// The patches of a picture and their grid.
    fn patches(
        &self,
        image: &DynamicImage,
        config: &PreProcessorConfig,
        sizes: &Sizes,
    ) -> anyhow::Result<(Tensor, Grid)> {
        let padded;
        let mut image = image;
        if let Some(max_edge) = self.max_edge {
            padded = mistralrs_vision::pad_to_max_edge(std::slice::from_ref(image), max_edge);
            image = padded.first().unwrap_or(image);
        }
        let (width, height) = image.dimensions();
        let (width, height) = (width as usize, height as usize);
        let factor = sizes.patch * sizes.merge;
        let (new_height, new_width) = if config.do_resize.unwrap_or(true) {
            smart_resize(height, width, factor, sizes.min_pixels, sizes.max_pixels)?
        } else {
            (height, width)
        };
        if new_height == 0 || new_width == 0 || new_height % factor != 0 || new_width % factor != 0 {
            anyhow::bail!("a picture of {new_width}x{new_height} pixels is not made of squares of {factor}");
        }
        let resized = if (new_height, new_width) == (height, width) {
            image.to_rgb8()
        } else {
            let image = DynamicImage::ImageRgb8(image.to_rgb8());
            match &self.resize {
                Some(resize) => resize(&image, new_width as u32, new_height as u32).to_rgb8(),
                None => {
                    let filter = match config.resampling {
                        Some(_) => config.resampling.to_filter()?,
                        None => FilterType::CatmullRom,
                    };
                    image.resize_exact(new_width as u32, new_height as u32, filter).to_rgb8()
                }
            }
        };

        // A division by 255 in f32: upstream's tensor operation multiplies by the rounded
        // reciprocal, which is another number for half of all levels.
        let scale = if config.do_rescale.unwrap_or(true) { 255f32 } else { 1f32 };
        let normalize = config.do_normalize.unwrap_or(true);
        let mean = config.image_mean.unwrap_or(CLIP_MEAN).map(|value| value as f32);
        let std = config.image_std.unwrap_or(CLIP_STD).map(|value| value as f32);
        let value = |channel: usize, level: u8| {
            let value = f32::from(level) / scale;
            if normalize {
                (value - mean[channel]) / std[channel]
            } else {
                value
            }
        };

        let (grid_h, grid_w) = (new_height / sizes.patch, new_width / sizes.patch);
        let (patch, merge) = (sizes.patch, sizes.merge);
        let mut values = Vec::with_capacity(3 * sizes.temporal * new_height * new_width);
        let levels = resized.as_raw();
        // The patches of one merged token follow each other.
        for block_y in 0..grid_h / merge {
            for block_x in 0..grid_w / merge {
                for within in 0..merge * merge {
                    let top = (block_y * merge + within / merge) * patch;
                    let left = (block_x * merge + within % merge) * patch;
                    for channel in 0..3 {
                        // A still is its own next frame.
                        for _ in 0..sizes.temporal {
                            for y in top..top + patch {
                                let row = (y * new_width + left) * 3;
                                values.extend(
                                    levels[row..row + patch * 3]
                                        .iter()
                                        .skip(channel)
                                        .step_by(3)
                                        .map(|&level| value(channel, level)),
                                );
                            }
                        }
                    }
                }
            }
        }
        let dims = (grid_h * grid_w, 3 * sizes.temporal * patch * patch);
        Ok((Tensor::from_vec(values, dims, &Device::Cpu)?, [1, grid_h as u32, grid_w as u32]))
    }

    /// Puts the pictures of `seq` into its prompt and says where they are: the placeholders are
    /// widened in the token ids. Upstream decodes the prompt, repeats them in the text and encodes
    /// it again, which need not give the same tokens.
    fn place(
        &self,
        row: usize,
        seq: &mut Sequence,
        tokenizer: &Tokenizer,
        config: &PreProcessorConfig,
        sizes: &Sizes,
        paged: Option<&mut PagedAttentionMeta>,
    ) -> anyhow::Result<Vec<Picture>> {
        let encoded = seq
            .images()
            .unwrap_or_default()
            .iter()
            .map(|image| self.patches(image, config, sizes))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let hashes = seq.image_hashes().unwrap_or_default().to_vec();
        if !encoded.is_empty() && (seq.token_offset() != 0 || hashes.len() < encoded.len()) {
            anyhow::bail!("the prompt has pictures, which the prefix cache knows nothing of");
        }
        let Some(image_token) = self.image_token.or(tokenizer.token_to_id(IMAGE_PAD)) else {
            anyhow::bail!("neither config.json nor the tokenizer has `{IMAGE_PAD}`");
        };

        let widen = !seq.multimodal.has_changed_prompt;
        // An answer may have such a token too; it stands for nothing.
        let prompt = if widen { usize::MAX } else { seq.prompt_tokens() };
        let unit = (sizes.merge * sizes.merge) as u32;
        let (mut ids, mut pictures) = (Vec::new(), Vec::<Picture>::new());
        let (mut image, mut within) = (0usize, 0usize);
        for (at, &token) in seq.get_toks().iter().enumerate() {
            if token != image_token || at >= prompt {
                ids.push(token);
                continue;
            }
            let Some((patches, grid)) = encoded.get(image) else {
                anyhow::bail!(
                    "the prompt has more `{IMAGE_PAD}` tokens than its {} picture(s)",
                    encoded.len()
                );
            };
            let tokens = (grid.iter().product::<u32>() / unit) as usize;
            for _ in 0..if widen { tokens } else { 1 } {
                if within == 0 {
                    let (start, hash) = (ids.len(), hashes[image]);
                    let (grid, patches) = (*grid, patches.clone());
                    pictures.push(Picture { row, start, tokens, hash, grid, patches });
                }
                ids.push(token);
                within += 1;
                if within == tokens {
                    (image, within) = (image + 1, 0);
                }
            }
        }
        if image != encoded.len() {
            anyhow::bail!("the prompt has {image} `{IMAGE_PAD}` token(s) for {} picture(s)", encoded.len());
        }
        if let Some(most) = self.most.filter(|&most| ids.len() > most) {
            anyhow::bail!("the prompt has {} tokens with its picture(s), the model takes {most}", ids.len());
        }

        if widen && !pictures.is_empty() {
            let text = tokenizer.decode(&ids, false).map_err(anyhow::Error::msg)?;
            seq.set_initial_prompt(text);
            if seq.mm_features().is_empty() {
                let ranges: Vec<_> = pictures.iter().map(|p| (p.start, p.tokens)).collect();
                seq.set_mm_features(build_mm_features_from_ranges(&ranges, &hashes, "img"));
            }
            seq.set_toks_and_reallocate(ids, paged);
            // Decoding needs the grids for its positions, when the pictures may be gone.
            let grids: Vec<u32> = pictures.iter().flat_map(|picture| picture.grid).collect();
            seq.multimodal.rope_img_grid_thw =
                Some(Tensor::from_vec(grids, (pictures.len(), 3), &Device::Cpu)?);
        }
        seq.multimodal.has_changed_prompt = true;
        Ok(pictures)
    }
}

/// The size transformers resizes to, `(height, width)`.
fn smart_resize(
    height: usize,
    width: usize,
    factor: usize,
    min_pixels: usize,
    max_pixels: usize,
) -> anyhow::Result<(usize, usize)> {
    let (h, w, f) = (height as f64, width as f64, factor as f64);
    let ratio = h.max(w) / h.min(w);
    if !(ratio <= MAX_RATIO) {
        anyhow::bail!("a picture's sides may be as 1 to {MAX_RATIO}, found {width}x{height}");
    }
    // Halves go to the even number, as in Python; upstream's go up.
    let near = |side: f64| (side / f).round_ties_even() as usize * factor;
    let (near_h, near_w) = (near(h), near(w));
    Ok(if near_h * near_w > max_pixels {
        let beta = (h * w / max_pixels as f64).sqrt();
        // Upstream lacks the lower bound, and refuses sides below the factor.
        let down = |side: f64| ((side / beta / f).floor() as usize * factor).max(factor);
        (down(h), down(w))
    } else if near_h * near_w < min_pixels {
        let beta = (min_pixels as f64 / (h * w)).sqrt();
        let up = |side: f64| (side * beta / f).ceil() as usize * factor;
        (up(h), up(w))
    } else {
        (near_h, near_w)
    })
}

/// The positions of `length` tokens with pictures among them, each given by where it starts and
/// its grid of merged patches. A text token goes one on in all three parts. A picture's tokens
/// count time, rows and columns from where it stands; what follows goes on after its longer side.
fn positions(length: usize, pictures: &[(usize, [usize; 3])]) -> [Vec<i64>; 3] {
    let mut parts: [Vec<i64>; 3] = std::array::from_fn(|_| Vec::with_capacity(length));
    let mut next = 0i64;
    let mut text = |parts: &mut [Vec<i64>; 3], next: &mut i64, until: usize| {
        while parts[0].len() < until {
            parts.iter_mut().for_each(|part| part.push(*next));
            *next += 1;
        }
    };
    for &(start, [t, h, w]) in pictures {
        text(&mut parts, &mut next, start);
        for at in 0..t * h * w {
            let place = [at / (h * w), at / w % h, at % w];
            for (part, place) in parts.iter_mut().zip(place) {
                part.push(next + place as i64);
            }
        }
        next += h.max(w) as i64;
    }
    text(&mut parts, &mut next, length);
    parts
}

fn merged(grid: Grid, merge: usize) -> [usize; 3] {
    let [t, h, w] = grid.map(|side| side as usize);
    [t, h / merge, w / merge]
}

/// How far the positions of an answer lag behind its place in the sequence.
fn lag(seq: &Sequence, merge: usize) -> Result<i64> {
    let Some(grids) = &seq.multimodal.rope_img_grid_thw else {
        return Ok(0);
    };
    let grids = grids.to_vec2::<u32>()?;
    Ok(grids
        .iter()
        .map(|grid| {
            let [t, h, w] = merged([grid[0], grid[1], grid[2]], merge);
            (t * h * w) as i64 - h.max(w) as i64
        })
        .sum())
}

impl InputsProcessor for QwenInputs {
    fn get_type(&self) -> InputsProcessorType {
        InputsProcessorType::Vision
    }

    fn process_inputs(
        &self,
        tokenizer: Option<Arc<Tokenizer>>,
        input_seqs: &mut [&mut Sequence],
        is_prompt: bool,
        is_xlora: bool,
        device: &Device,
        no_kv_cache: bool,
        last_n_context_len: Option<(usize, usize)>,
        return_raw_logits: bool,
        sliding_window: Option<usize>,
        other_config: Option<Arc<dyn Any>>,
        mut paged_attn_metadata: Option<PagedAttentionMeta>,
        mapper: Option<&dyn DeviceMapper>,
    ) -> anyhow::Result<InputProcessorOutput> {
        if is_xlora || no_kv_cache {
            anyhow::bail!("a Qwen-VL model takes no X-LoRA and needs its key-value cache");
        }
        let Some(tokenizer) = tokenizer else {
            anyhow::bail!("a Qwen-VL model needs its tokenizer");
        };
        let config = other_config.ok_or_else(|| anyhow::anyhow!("no preprocessor_config.json"))?;
        let config: &PreProcessorConfig =
            config.downcast_ref().ok_or_else(|| anyhow::anyhow!("no preprocessor_config.json"))?;
        let sizes = self.sizes(config)?;

        let mut pictures = Vec::new();
        // At the first decoding step a sequence still holds its pictures, which are in place by then.
        if is_prompt {
            for (row, seq) in input_seqs.iter_mut().enumerate() {
                let paged = paged_attn_metadata.as_mut();
                pictures.extend(self.place(row, seq, &tokenizer, config, &sizes, paged)?);
            }
        }

        let tokens: Vec<&[u32]> = input_seqs.iter().map(|seq| seq.get_toks()).collect();
        let lengths: Vec<usize> = tokens.iter().map(|tokens| tokens.len()).collect();
        let paged = paged_attn_metadata.is_some();
        let InnerInputProcessorOutput {
            inputs:
                InputMetadata {
                    input,
                    positions: offsets,
                    context_lens,
                    position_ids,
                    paged_attn_meta,
                    flash_meta,
                },
            seq_indices,
        } = if is_prompt {
            get_prompt_input(
                tokens,
                input_seqs,
                device,
                last_n_context_len,
                return_raw_logits,
                paged_attn_metadata.as_mut(),
                mapper,
                sliding_window,
            )?
        } else {
            get_completion_input(
                tokens,
                input_seqs,
                device,
                no_kv_cache,
                last_n_context_len,
                return_raw_logits,
                paged_attn_metadata.as_mut(),
                mapper,
                sliding_window,
            )?
        };

        let (batch, width) = input.dims2()?;
        // Padding lies behind a row and no other token looks at it.
        let mut parts = vec![0i64; 3 * batch * width];
        for (row, seq) in input_seqs.iter().enumerate() {
            let write = |parts: &mut [i64], part: usize, at: usize, position: i64| {
                parts[(part * batch + row) * width + at] = position;
            };
            if !is_prompt {
                let position = offsets[row] as i64 - lag(seq, sizes.merge)?;
                (0..3).for_each(|part| write(&mut parts, part, 0, position));
                continue;
            }
            let own: Vec<_> = pictures
                .iter()
                .filter(|picture| picture.row == row)
                .map(|picture| (picture.start, merged(picture.grid, sizes.merge)))
                .collect();
            let cached = if paged { seq.prefix_cache_len() } else { 0 };
            let offset = seq.token_offset() as i64;
            for (part, positions) in positions(lengths[row], &own).iter().enumerate() {
                for (at, position) in positions[cached..].iter().enumerate() {
                    write(&mut parts, part, at, position + offset);
                }
            }
            for picture in pictures.iter_mut().filter(|picture| picture.row == row) {
                // A picture that the cache holds has no tokens left to take it.
                match picture.start.checked_sub(cached) {
                    Some(start) => picture.start = start,
                    None => picture.tokens = 0,
                }
            }
        }
        pictures.retain(|picture| picture.tokens > 0);

        let positions = Tensor::from_vec(parts, (3, batch, width), device)?;
        Ok(InputProcessorOutput {
            inputs: Box::new(ModelInputs {
                input_ids: input,
                seqlen_offsets: offsets,
                context_lens,
                position_ids,
                pixel_values: None,
                model_specific_args: Box::new(QwenArgs { positions, pictures }),
                paged_attn_meta,
                flash_meta,
            }),
            seq_indices,
        })
    }
}

/// A prompt with its pictures in place.
pub(crate) struct Placed {
    /// `(batch, tokens, hidden)`.
    pub(crate) embeds: Tensor,
    /// `(batch, tokens)`, 1 where a picture is; `None` where there is none.
    pub(crate) mask: Option<Tensor>,
    /// For each early block of the language model what it adds at those places, in their order.
    pub(crate) deepstack: Option<Vec<Tensor>>,
}

/// Puts the pictures of `args` into `embeds`, the embedded prompt.
///
/// Each picture goes through `encode` by itself, so what is made of it, and what the cache holds,
/// depends on no other picture in the batch.
pub(crate) fn place_pictures(
    mut embeds: Tensor,
    args: &QwenArgs,
    cache: &Mutex<EncoderCacheManager>,
    cache_salt: u64,
    encode: impl Fn(&Tensor, &Tensor) -> Result<Encoded>,
) -> Result<Placed> {
    if args.pictures.is_empty() {
        return Ok(Placed { embeds, mask: None, deepstack: None });
    }
    let (batch, length, hidden) = embeds.dims3()?;
    let (device, dtype) = (embeds.device().clone(), embeds.dtype());
    let mut mask = vec![0u8; batch * length];
    let mut layers: Vec<Vec<Tensor>> = Vec::new();
    for picture in &args.pictures {
        let key = picture.hash ^ cache_salt;
        let lock = || cache.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let held = lock().get(key);
        let parts = match held {
            Some(parts) => parts,
            None => {
                let grid = Tensor::new(&[picture.grid], &device)?;
                let encoded = encode(&picture.patches.to_device(&device)?, &grid)?;
                let mut parts = vec![encoded.embeddings];
                parts.extend(encoded.deepstack);
                lock().insert(key, parts.clone());
                parts
            }
        };
        for part in &parts {
            if part.dims() != [picture.tokens, hidden] {
                candle_core::bail!(
                    "the vision tower made {:?} of a picture, expected {:?}",
                    part.dims(),
                    [picture.tokens, hidden]
                );
            }
        }
        let mut parts = parts.iter().map(|part| part.to_device(&device)?.to_dtype(dtype));
        let Some(tokens) = parts.next().transpose()? else {
            candle_core::bail!("the vision tower made nothing of a picture");
        };
        let (from, to) = (picture.start, picture.start + picture.tokens);
        let place = [picture.row..picture.row + 1, from..to, 0..hidden];
        embeds = embeds.slice_assign(&place, &tokens.unsqueeze(0)?)?;
        mask[picture.row * length..][from..to].fill(1);
        for (layer, features) in parts.enumerate() {
            if layers.len() == layer {
                layers.push(Vec::new());
            }
            layers[layer].push(features?);
        }
    }
    let deepstack = layers.iter().map(|features| Tensor::cat(features, 0)).collect::<Result<Vec<_>>>()?;
    let mask = Tensor::from_vec(mask, (batch, length), &device)?;
    Ok(Placed { embeds, mask: Some(mask), deepstack: Some(deepstack) })
}
