//! How a model wants a picture prepared.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ::image::{RgbImage, imageops};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::SmartResize;
use super::resize::{Axis, Filter, Padded, resize, resize_matrix, resize_window};
use crate::error::{Error, Result};

/// The ways in which pictures of any shape are brought to a tower's size.
///
/// Written and parsed as `clip`, `llava-pad`, `llava-crop`, `squash` and `qwen`, also by serde.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contract {
    /// Shortest side to the model's size, then a crop of the centre, as `CLIPImageProcessor`.
    Clip,
    /// Padded to a square of the mean colour, then resized, as the original LLaVA (`expand2square`)
    /// and as `LlavaImageProcessor` with `do_pad`.
    LlavaPad,
    /// As [`Contract::Clip`]: what `LlavaImageProcessor` does without `do_pad`, so that the ends of
    /// a long picture are not seen.
    LlavaCrop,
    /// Resized to the final size at once, without regard to the aspect ratio.
    Squash,
    /// To the size that [`SmartResize`] chooses for each picture, as `Qwen2VLImageProcessor`; or to
    /// one size, where that is fixed.
    Qwen,
}

impl Contract {
    /// All contracts, in the order in which they are listed to the user.
    pub const ALL: [Self; 5] = [Self::Clip, Self::LlavaPad, Self::LlavaCrop, Self::Squash, Self::Qwen];

    /// The contract's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Clip => "clip",
            Self::LlavaPad => "llava-pad",
            Self::LlavaCrop => "llava-crop",
            Self::Squash => "squash",
            Self::Qwen => "qwen",
        }
    }
}

impl fmt::Display for Contract {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Contract {
    type Err = Error;

    /// Parses a name.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`], which lists the names, for any other string.
    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|contract| contract.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::argument("image contract", format!("one of {names}"), format!("`{name}`"))
        })
    }
}

/// What a picture is resized to before its centre is cropped, which [`Contract::Squash`] and
/// [`Contract::Qwen`] do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// The shorter side to so many pixels, the longer one in proportion, rounded down.
    ShortestEdge(u32),
    /// To exactly this size, without regard to the aspect ratio.
    Exact {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
    },
    /// To a size that depends on the picture ([`Contract::Qwen`]).
    Smart(SmartResize),
}

impl Scale {
    /// The size that a picture of `width` x `height` is resized to.
    fn apply(self, width: usize, height: usize) -> (usize, usize) {
        let longer = |edge: u32, long: usize, short: usize| edge as usize * long / short.max(1);
        match self {
            Self::ShortestEdge(edge) if width <= height => (edge as usize, longer(edge, height, width)),
            Self::ShortestEdge(edge) => (longer(edge, width, height), edge as usize),
            Self::Exact { width, height } => (width as usize, height as usize),
            Self::Smart(smart) => {
                let (height, width) = smart.unchecked(side(height), side(width));
                (width as usize, height as usize)
            }
        }
    }
}

fn side(pixels: usize) -> u32 {
    u32::try_from(pixels).unwrap_or(u32::MAX)
}

/// How a model prepares a picture: from a decoded picture to its input pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocess {
    /// The way from any shape to the final size.
    pub contract: Contract,
    /// The final width, in pixels; 0 where it depends on the picture.
    pub width: u32,
    /// The final height, in pixels; 0 where it depends on the picture.
    pub height: u32,
    /// What is resized to before the crop.
    pub scale: Scale,
    /// The kernel of the resize.
    pub filter: Filter,
    /// The mean that the tower subtracts from pixels in `[0, 1]`, per channel.
    pub mean: [f32; 3],
    /// The deviation that the tower then divides by, per channel.
    pub std: [f32; 3],
    /// The colour that [`Contract::LlavaPad`] pads with: 255 times the mean, rounded down.
    pub background: [u8; 3],
}

const CLIP_MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
const CLIP_STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];

/// OpenCLIP's configuration of a whole model.
const OPEN_CLIP: &str = "open_clip_config.json";

/// The largest side that a configuration may ask for; larger ones are mistakes.
const MAX_CONFIGURED: u64 = 16_384;

impl Preprocess {
    /// OpenAI CLIP's preparation at `image_size` pixels: bicubic, its mean and deviation.
    pub fn clip(image_size: u32, contract: Contract) -> Self {
        Self {
            contract,
            width: image_size,
            height: image_size,
            scale: Scale::ShortestEdge(image_size),
            filter: Filter::Bicubic,
            mean: CLIP_MEAN.map(|x| x as f32),
            std: CLIP_STD.map(|x| x as f32),
            background: CLIP_MEAN.map(background),
        }
    }

    /// Reads how the model in a folder prepares pictures.
    ///
    /// From `preprocessor_config.json`, or else from `processor_config.json`, there from the object
    /// `image_processor` if it has one, or else from the object `preprocess_cfg` of OpenCLIP's
    /// `open_clip_config.json`. What neither file says is as in [`Preprocess::clip`] at
    /// `image_size`, the side in pixels from the vision model's own configuration; a final size
    /// that is not given as `crop_size` is that of `size`. Unknown keys are ignored.
    ///
    /// `contract` is used if given; otherwise [`Contract::LlavaPad`] if the file has `do_pad`,
    /// otherwise `default`.
    ///
    /// # Errors
    ///
    /// [`Error::Config`], which names the file and the key, for values of the wrong kind and for
    /// steps that are not supported; [`Error::Read`] for a file that is there and cannot be read;
    /// [`Error::Argument`] for an `image_size` of zero or more than 16384.
    pub fn from_folder(
        dir: &Path,
        image_size: u32,
        contract: Option<Contract>,
        default: Contract,
    ) -> Result<Self> {
        if !(1..=MAX_CONFIGURED).contains(&u64::from(image_size)) {
            return Err(Error::argument("image size", format!("1 to {MAX_CONFIGURED} pixels"), image_size));
        }
        match Config::find(dir)? {
            Some(config) => config.preprocess(image_size, contract, default),
            None => {
                let contract = contract.unwrap_or(default);
                not_qwen(contract)?;
                Ok(Self::clip(image_size, contract))
            }
        }
    }

    /// Reads how the Qwen-VL in a folder prepares pictures, for a tower of this patch side and this
    /// many merged patches a side.
    ///
    /// From the same files as [`Preprocess::from_folder`]: `size` with `shortest_edge` and
    /// `longest_edge`, which are areas, or `min_pixels` and `max_pixels`, which win. What they do not
    /// say is as in transformers 5.23's `Qwen2VLImageProcessor`.
    ///
    /// # Errors
    ///
    /// As [`Preprocess::from_folder`], and if the file has another patch than the tower.
    pub fn qwen_from_folder(dir: &Path, patch: u32, merge: u32) -> Result<Self> {
        let config = match Config::find(dir)? {
            Some(config) => config,
            None => Config { path: dir.join("preprocessor_config.json"), keys: Map::new() },
        };
        config.qwen(patch, merge)
    }

    /// The same with every picture brought to one size: what attacks and trainings take, whose
    /// pictures go together.
    #[must_use]
    pub fn fixed(&self, height: u32, width: u32) -> Self {
        Self { width, height, scale: Scale::Exact { width, height }, ..self.clone() }
    }

    /// Whether every picture comes out of the same size.
    pub fn is_fixed(&self) -> bool {
        self.width > 0 && self.height > 0
    }

    /// The height and width that a picture of `height` x `width` comes out with.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] for a picture that the contract does not take: a Qwen-VL's is at most 200
    /// times as long as wide.
    pub fn size_of(&self, height: u32, width: u32) -> Result<(u32, u32)> {
        match self.scale {
            Scale::Smart(smart) => smart.size(height, width),
            _ => Ok((self.height, self.width)),
        }
    }

    /// Brings a picture to exactly `width` x `height` as the contract says.
    ///
    /// Equal byte for byte to `CLIPImageProcessor` and `LlavaImageProcessor` of transformers 5.23
    /// on Pillow 13.0, before they rescale and normalise: the crop starts at half the surplus, rounded
    /// down; where the resized picture is smaller than the final size it is set on black, half the
    /// lack rounded up from the top and the left. Padding to a square starts at half the
    /// difference, rounded down, in transformers and in the original LLaVA alike.
    ///
    /// Nothing larger than the picture is built on the way, whatever its aspect ratio. A picture
    /// without pixels comes out black. [`Contract::Qwen`] without a fixed size takes what
    /// [`Preprocess::size_of`] refuses all the same.
    pub fn prepare(&self, image: &RgbImage) -> RgbImage {
        if let Scale::Smart(_) = self.scale {
            let (width, height) = match image.dimensions() {
                (0, _) | (_, 0) => return RgbImage::new(0, 0),
                (width, height) => self.scale.apply(width as usize, height as usize),
            };
            return resize(image, side(width), side(height), self.filter);
        }
        if matches!(self.contract, Contract::Squash | Contract::Qwen) {
            return resize(image, self.width, self.height, self.filter);
        }
        let mut source = Padded::plain(image);
        if self.contract == Contract::LlavaPad {
            let side = source.width.max(source.height);
            source.left = (side - source.width) / 2;
            source.top = (side - source.height) / 2;
            (source.width, source.height) = (side, side);
            source.background = self.background;
        }
        let (width, height) = self.scale.apply(source.width, source.height);
        let (across, left) = center(width, self.width as usize);
        let (down, top) = center(height, self.height as usize);
        let cropped = resize_window(&source, &across, &down, self.filter);
        if cropped.dimensions() == (self.width, self.height) {
            return cropped;
        }
        let mut result = RgbImage::new(self.width, self.height);
        imageops::replace(&mut result, &cropped, left, top);
        result
    }

    /// What [`Preprocess::prepare`] does to the columns and rows of a picture of `height` x `width`
    /// as dense matrices, before any rounding: the result is R X C^T with R `[self.height, height]`
    /// and C `[self.width, width]`, row by row.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] for [`Contract::LlavaPad`], which adds a colour to that, and for a
    /// picture without pixels.
    pub fn matrices(&self, height: usize, width: usize) -> Result<[Vec<f32>; 2]> {
        if self.contract == Contract::LlavaPad {
            return Err(Error::argument(
                "contract",
                "a resize and a crop (clip, llava-crop, squash)",
                "llava-pad",
            ));
        }
        if !self.is_fixed() {
            return Err(Error::argument("contract", "one with a fixed size", self.contract.name()));
        }
        if height * width == 0 {
            return Err(Error::argument("picture size", "at least 1 x 1", format!("{height} x {width}")));
        }
        let (high, wide) = (self.height as usize, self.width as usize);
        let (scaled_wide, scaled_high) = match self.contract {
            Contract::Squash | Contract::Qwen => (wide, high),
            _ => self.scale.apply(width, height),
        };
        let axis = |input: usize, scaled: usize, wanted: usize| {
            let (axis, offset) = center(scaled, wanted);
            let mut dense = vec![0f32; wanted * input];
            let rows = resize_matrix(input, scaled, self.filter);
            for (i, row) in rows.into_iter().skip(axis.window.start).take(axis.window.len()).enumerate() {
                for (j, weight) in row.weights.into_iter().enumerate() {
                    dense[(i + offset as usize) * input + row.start + j] = weight as f32;
                }
            }
            dense
        };
        Ok([axis(height, scaled_high, high), axis(width, scaled_wide, wide)])
    }

    /// Prepares a picture as the tensor that a tower takes: `[3, height, width]`, `f32` in `[0, 1]`.
    ///
    /// # Errors
    ///
    /// [`Error::Tensor`] if the device fails.
    pub fn pixels(&self, image: &RgbImage, device: &Device) -> Result<Tensor> {
        pixels_from_rgb(&self.prepare(image), device)
    }

    /// Prepares pictures as one batch: `[B, 3, height, width]`, `f32` in `[0, 1]`.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] for no pictures at all, [`Error::Tensor`] if the device fails.
    pub fn batch(&self, images: &[RgbImage], device: &Device) -> Result<Tensor> {
        if images.is_empty() {
            return Err(Error::argument("batch of pictures", "at least one", "none"));
        }
        let pixels = images.iter().map(|image| self.pixels(image, device)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&pixels, 0)?)
    }
}

/// That a tower of one size is not asked for sizes that depend on the picture.
fn not_qwen(contract: Contract) -> Result<()> {
    match contract {
        Contract::Qwen => {
            Err(Error::argument("contract", "clip, llava-pad, llava-crop or squash for this model", "qwen"))
        }
        _ => Ok(()),
    }
}

/// The part of a resized axis that is kept, and where it starts in the result.
fn center(size: usize, wanted: usize) -> (Axis, i64) {
    let start = size.saturating_sub(wanted) / 2;
    let offset = wanted.saturating_sub(size).div_ceil(2);
    (Axis { size, window: start..start + size.min(wanted) }, offset as i64)
}

/// A picture's samples as a tensor `[3, height, width]`, `f32`: each divided by 255.
///
/// # Errors
///
/// [`Error::Tensor`] if the device fails.
pub fn pixels_from_rgb(image: &RgbImage, device: &Device) -> Result<Tensor> {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let planes: Vec<f32> = (0..3)
        .flat_map(|channel| image.iter().skip(channel).step_by(3))
        .map(|&sample| f32::from(sample) / 255.0)
        .collect();
    Ok(Tensor::from_vec(planes, (3, height, width), device)?)
}

/// A tensor `[3, height, width]`, `f32` in `[0, 1]`, as a picture: the inverse of
/// [`pixels_from_rgb`].
///
/// Samples are 255 times the values, rounded to the nearest, halves to even, and clamped.
///
/// # Errors
///
/// [`Error::Argument`] for another type, another number of channels or values that are not
/// numbers, [`Error::Tensor`] for another number of axes or if the device fails.
pub fn rgb_from_pixels(pixels: &Tensor) -> Result<RgbImage> {
    let (channels, height, width) = pixels.dims3()?;
    if channels != 3 || pixels.dtype() != DType::F32 {
        let found = format!("{:?} {}", pixels.dims(), pixels.dtype().as_str());
        return Err(Error::argument("pixels", "[3, height, width] f32", found));
    }
    let values = pixels.permute((1, 2, 0))?.flatten_all()?.to_vec1::<f32>()?;
    if values.iter().any(|value| value.is_nan()) {
        return Err(Error::argument("pixels", "values in [0, 1]", "NaN"));
    }
    let samples = values.into_iter().map(|value| (value * 255.0).round_ties_even().clamp(0.0, 255.0) as u8);
    let size = u32::try_from(width).ok().zip(u32::try_from(height).ok());
    size.and_then(|(width, height)| RgbImage::from_raw(width, height, samples.collect())).ok_or_else(|| {
        Error::argument("pixels", "at most 2^32 - 1 pixels a side", format!("{:?}", pixels.dims()))
    })
}

/// As `int(mean * 255)` in Python's arithmetic.
fn background(mean: f64) -> u8 {
    (mean * 255.0) as u8
}

/// An image processor's configuration and the file it is from.
struct Config {
    path: PathBuf,
    keys: Map<String, Value>,
}

impl Config {
    fn find(dir: &Path) -> Result<Option<Self>> {
        for file in ["preprocessor_config.json", "processor_config.json", OPEN_CLIP] {
            let path = dir.join(file);
            let text = match fs::read(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::read(path, error)),
            };
            let keys: Value = serde_json::from_slice(&text)
                .map_err(|error| Error::config(&path, format!("not valid json: {error}")))?;
            let Value::Object(mut keys) = keys else {
                return Err(Error::config(path, "expected a json object"));
            };
            if file == "processor_config.json" {
                match keys.remove("image_processor") {
                    Some(Value::Object(nested)) => keys = nested,
                    None | Some(Value::Null) => {}
                    Some(other) => {
                        return Err(Error::config(
                            path,
                            format!("`image_processor`: expected an object, found {other}"),
                        ));
                    }
                }
            }
            let config = Self { path, keys };
            return if file == OPEN_CLIP { config.open_clip() } else { Ok(Some(config)) };
        }
        Ok(None)
    }

    /// The keys that say what OpenCLIP's `preprocess_cfg` does (open_clip `transform.py`,
    /// `PreprocessCfg`).
    fn open_clip(mut self) -> Result<Option<Self>> {
        let Some(Value::Object(given)) = self.keys.remove("preprocess_cfg") else { return Ok(None) };
        self.keys = given;
        let mut keys = Map::new();
        for (from, to) in [("mean", "image_mean"), ("std", "image_std")] {
            keys.extend(self.get(from).map(|value| (to.to_string(), value.clone())));
        }
        let size = match self.get("size") {
            Some(Value::Array(sides)) => match &sides[..] {
                [height, width] => Some(serde_json::json!({ "height": height, "width": width })),
                _ => return Err(self.expected("size", "a number, or height and width", &self.keys["size"])),
            },
            size => size.cloned(),
        };
        match (self.get("resize_mode").map(Value::as_str), size) {
            (None | Some(Some("shortest")), Some(size)) => {
                // The shorter side to the size, which must then be one number for both.
                let edge = if size["height"] == size["width"] { size.get("height") } else { None };
                keys.insert("size".into(), edge.unwrap_or(&size).clone());
                keys.insert("crop_size".into(), size);
            }
            (None | Some(Some("shortest")), None) => {}
            (_, _) => {
                return Err(self.expected("resize_mode", "\"shortest\"", &self.keys["resize_mode"]));
            }
        }
        match self.get("interpolation").map(Value::as_str) {
            None | Some(Some("bicubic")) => {}
            Some(Some("bilinear")) => {
                keys.insert("resample".into(), 2.into());
            }
            Some(_) => {
                let found = &self.keys["interpolation"];
                return Err(self.expected("interpolation", "\"bicubic\" or \"bilinear\"", found));
            }
        }
        self.keys = keys;
        Ok(Some(self))
    }

    fn preprocess(
        &self,
        image_size: u32,
        contract: Option<Contract>,
        default: Contract,
    ) -> Result<Preprocess> {
        for step in ["do_resize", "do_center_crop", "do_rescale", "do_normalize"] {
            if self.flag(step)? == Some(false) {
                return Err(self.wrong(step, "false is not supported, this step is always done"));
            }
        }
        let padded = self.flag("do_pad")? == Some(true);
        let contract = contract.unwrap_or(if padded { Contract::LlavaPad } else { default });
        not_qwen(contract)?;
        let scale = self.scale()?.unwrap_or(Scale::ShortestEdge(image_size));
        let (width, height) = match (self.crop_size()?, scale) {
            (Some(size), _) => size,
            (None, Scale::ShortestEdge(edge)) => (edge, edge),
            (None, Scale::Exact { width, height }) => (width, height),
            (None, Scale::Smart(_)) => (image_size, image_size),
        };
        Ok(Preprocess { contract, width, height, scale, ..self.normal()? })
    }

    fn qwen(&self, patch: u32, merge: u32) -> Result<Preprocess> {
        for step in ["do_resize", "do_rescale", "do_normalize"] {
            if self.flag(step)? == Some(false) {
                return Err(self.wrong(step, "false is not supported, this step is always done"));
            }
        }
        for (key, side) in [("patch_size", patch), ("merge_size", merge)] {
            if let Some(found) = self.get(key).filter(|found| found.as_u64() != Some(side.into())) {
                return Err(self.expected(key, &format!("{side}, as the tower has"), found));
            }
        }
        // Areas, whatever they are called.
        let area = |object: &Map<String, Value>, key: &str| -> Result<Option<u64>> {
            let Some(value) = object.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
            let most = MAX_CONFIGURED * MAX_CONFIGURED;
            match value.as_u64().filter(|area| (1..=most).contains(area)) {
                Some(area) => Ok(Some(area)),
                None => Err(self.expected(key, &format!("1 to {most} pixels"), value)),
            }
        };
        let empty = Map::new();
        let size = match self.get("size") {
            None => &empty,
            Some(Value::Object(size)) => size,
            Some(other) => {
                let expected = "{\"shortest_edge\": n, \"longest_edge\": n}";
                return Err(self.expected("size", expected, other));
            }
        };
        let limit = |top: &str, inner: &str, default: u64| -> Result<u64> {
            let found = [area(&self.keys, top)?, area(size, inner)?, area(size, top)?];
            match found.into_iter().flatten().next() {
                Some(area) => Ok(area),
                None if size.is_empty() => Ok(default),
                None => Err(self.expected("size", &format!("`{inner}` in it"), &Value::Object(size.clone()))),
            }
        };
        let min_pixels = limit("min_pixels", "shortest_edge", 56 * 56)?;
        let max_pixels = limit("max_pixels", "longest_edge", 28 * 28 * 1280)?;
        if min_pixels > max_pixels {
            return Err(self.wrong("size", format!("at least {min_pixels} pixels and at most {max_pixels}")));
        }
        let factor = patch.checked_mul(merge).filter(|factor| u64::from(*factor) <= MAX_CONFIGURED);
        let factor = factor.ok_or_else(|| self.wrong("patch_size", "too large"))?;
        Ok(Preprocess {
            contract: Contract::Qwen,
            width: 0,
            height: 0,
            scale: Scale::Smart(SmartResize { factor, min_pixels, max_pixels }),
            ..self.normal()?
        })
    }

    /// The filter and the normalisation, at no size.
    fn normal(&self) -> Result<Preprocess> {
        let mean = self.channels("image_mean")?.unwrap_or(CLIP_MEAN);
        let std = self.channels("image_std")?.unwrap_or(CLIP_STD);
        // Also catches what is zero only as f32, and negative deviations.
        if std.iter().any(|&x| x as f32 <= 0.0) {
            return Err(self.wrong("image_std", format!("expected positive numbers, found {std:?}")));
        }
        if let Some(factor) = self.get("rescale_factor")
            && !factor.as_f64().is_some_and(|factor| (factor - 1.0 / 255.0).abs() <= 1e-6)
        {
            return Err(self.expected("rescale_factor", "1/255", factor));
        }
        Ok(Preprocess {
            contract: Contract::Squash,
            width: 0,
            height: 0,
            scale: Scale::Exact { width: 0, height: 0 },
            filter: self.filter()?,
            mean: mean.map(|x| x as f32),
            std: std.map(|x| x as f32),
            background: mean.map(background),
        })
    }

    /// A key's value; `null` is as good as none.
    fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, reason: impl fmt::Display) -> Error {
        Error::config(&self.path, format!("`{key}`: {reason}"))
    }

    fn expected(&self, key: &str, expected: &str, found: &Value) -> Error {
        self.wrong(key, format!("expected {expected}, found {found}"))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key)
            .map(|value| value.as_bool().ok_or_else(|| self.expected(key, "true or false", value)))
            .transpose()
    }

    fn side(&self, key: &str, value: &Value) -> Result<u32> {
        value
            .as_u64()
            .filter(|side| (1..=MAX_CONFIGURED).contains(side))
            .and_then(|side| u32::try_from(side).ok())
            .ok_or_else(|| self.expected(key, &format!("1 to {MAX_CONFIGURED} pixels"), value))
    }

    /// The values of the given keys of an object that has these and no others but `null`s.
    fn sides<const N: usize>(&self, key: &str, value: &Value, names: [&str; N]) -> Result<Option<[u32; N]>> {
        let Some(object) = value.as_object() else { return Ok(None) };
        let given = object.iter().filter(|(_, side)| !side.is_null()).count();
        let values = names.map(|name| object.get(name).filter(|side| !side.is_null()));
        if given != N || values.iter().any(Option::is_none) {
            return Ok(None);
        }
        let mut sides = [0; N];
        for (side, value) in sides.iter_mut().zip(values.into_iter().flatten()) {
            *side = self.side(key, value)?;
        }
        Ok(Some(sides))
    }

    fn scale(&self) -> Result<Option<Scale>> {
        let key = "size";
        let Some(value) = self.get(key) else { return Ok(None) };
        if value.is_number() {
            return Ok(Some(Scale::ShortestEdge(self.side(key, value)?)));
        }
        if let Some([edge]) = self.sides(key, value, ["shortest_edge"])? {
            return Ok(Some(Scale::ShortestEdge(edge)));
        }
        if let Some([width, height]) = self.sides(key, value, ["width", "height"])? {
            return Ok(Some(Scale::Exact { width, height }));
        }
        let expected = "an integer, {\"shortest_edge\": n} or {\"height\": h, \"width\": w}";
        Err(self.expected(key, expected, value))
    }

    fn crop_size(&self) -> Result<Option<(u32, u32)>> {
        let key = "crop_size";
        let Some(value) = self.get(key) else { return Ok(None) };
        if value.is_number() {
            let side = self.side(key, value)?;
            return Ok(Some((side, side)));
        }
        match self.sides(key, value, ["width", "height"])? {
            Some([width, height]) => Ok(Some((width, height))),
            None => Err(self.expected(key, "an integer or {\"height\": h, \"width\": w}", value)),
        }
    }

    fn filter(&self) -> Result<Filter> {
        let key = "resample";
        match self.get(key) {
            None => Ok(Filter::Bicubic),
            Some(value) => match value.as_u64() {
                Some(2) => Ok(Filter::Bilinear),
                Some(3) => Ok(Filter::Bicubic),
                _ => Err(self.expected(key, "2 (bilinear) or 3 (bicubic)", value)),
            },
        }
    }

    fn channels(&self, key: &str) -> Result<Option<[f64; 3]>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let numbers = value.as_array().map(|list| list.iter().map_while(Value::as_f64).collect::<Vec<_>>());
        let whole = value.as_array().is_some_and(|list| list.len() == 3);
        match numbers.as_deref() {
            // Also as f32, which a mean of 1e300 is not.
            Some(&[r, g, b]) if whole && [r, g, b].iter().all(|&x| (x as f32).is_finite()) => {
                Ok(Some([r, g, b]))
            }
            _ => Err(self.expected(key, "three numbers", value)),
        }
    }
}
