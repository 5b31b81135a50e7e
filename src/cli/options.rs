//! Flags that several commands share. They mean the same everywhere.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device};
use clap::{Args, ValueEnum};
use radapt::data::{LabelledSet, OpenOptions, registry};
use radapt::defense::{AnchorChoice, DefenseOptions};
use radapt::image::Contract;
use radapt::image::DecodeLimits;
use radapt::model::{Lookup, Model};
use radapt::pocket::Split;
use radapt::pocket::built_in::POCKET;
use radapt::{Error, Result};

/// Which model, and how it is held.
#[derive(Args, Clone)]
pub struct ModelOptions {
    /// A folder, a Hub id such as llava-hf/llava-1.5-7b-hf, or the built-in pocket
    #[arg(long, value_name = "MODEL", env = "RADAPT_MODEL", default_value = POCKET)]
    pub model: String,
    /// A branch, tag or commit on the Hub
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// Never touch the network (HF_HUB_OFFLINE=1 says the same)
    #[arg(long)]
    pub offline: bool,
    /// How pictures are prepared: clip, llava-pad, llava-crop or squash; the model's own where not given,
    /// of a Qwen-VL always qwen
    #[arg(long, value_name = "CONTRACT", value_parser = parse_contract)]
    pub contract: Option<Contract>,
    /// cpu, cuda, cuda:N or metal
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// The dtype weights are held in; f32 where not given, but bf16 of a language model that is not on a
    /// CPU
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<Dtype>,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

fn parse_contract(text: &str) -> std::result::Result<Contract, String> {
    text.parse::<Contract>().map_err(|e| e.to_string())
}

impl ModelOptions {
    pub fn find(&self) -> Result<Model> {
        Model::find(&self.model, &Lookup { revision: self.revision.clone(), offline: self.offline })
    }

    pub fn device(&self) -> Result<Device> {
        device(&self.device)
    }

    pub fn dtype(&self) -> Option<DType> {
        self.dtype.map(|dtype| match dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::Bf16 => DType::BF16,
        })
    }
}

/// The device of that name, the same each time it is asked for: tensors of two handles to one Metal
/// device do not go together, and each handle to a CUDA device has libraries of its own.
pub fn device(name: &str) -> Result<Device> {
    static OPEN: Mutex<Vec<(String, Device)>> = Mutex::new(Vec::new());
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, device)) = open.iter().find(|(known, _)| known == name) {
        return Ok(device.clone());
    }
    let device = new_device(name)?;
    open.push((name.into(), device.clone()));
    Ok(device)
}

fn new_device(name: &str) -> Result<Device> {
    let number = |text: &str| text.parse::<usize>().ok();
    let device = match name.split_once(':') {
        None if name == "cpu" => Ok(Device::Cpu),
        None if name == "cuda" => Device::new_cuda(0),
        None if name == "metal" => Device::new_metal(0),
        Some(("cuda", n)) if number(n).is_some() => Device::new_cuda(number(n).unwrap_or(0)),
        _ => return Err(argument("--device", "cpu, cuda, cuda:N or metal", name)),
    };
    device.map_err(|e| argument("--device", "a device this build can use", &format!("{name}: {e}")))
}

/// The split that `--data` names of the pocket world; `None` for other data.
pub fn pocket_split(data: &str) -> Result<Option<Split>> {
    let split = match data.strip_prefix("pocket") {
        Some("") => "test",
        Some(rest) if rest.starts_with(':') => &rest[1..],
        _ => return Ok(None),
    };
    let parsed = super::pocket::parse_split(split);
    parsed.map(Some).map_err(|e| argument("--data", "pocket, pocket:validation or pocket:train", &e))
}

/// A picture's size: `448`, a square, or `448x336`, height and width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub height: u32,
    pub width: u32,
}

impl std::str::FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        const MOST: u32 = 16_384;
        let side = |text: &str| text.parse::<u32>().ok().filter(|side| (1..=MOST).contains(side));
        let (height, width) = text.split_once('x').unwrap_or((text, text));
        match (side(height), side(width)) {
            (Some(height), Some(width)) => Ok(Self { height, width }),
            _ => Err(format!("expected pixels such as 448 or 448x336, sides up to {MOST}, found `{text}`")),
        }
    }
}

/// The size of pictures on a Qwen-VL where none is given: sides of whole tokens for every one of them.
pub const QWEN_SIZE: Size = Size { height: 448, width: 448 };

/// What a model with a tower for pictures of any size is to take, and that no other is given sizes.
pub fn sizes(model: &Model, given: &[Size]) -> Result<Vec<Size>> {
    if !model.kind.is_qwen() {
        return match given.first() {
            None => Ok(Vec::new()),
            Some(size) => {
                let found = format!("{}x{}", size.height, size.width);
                Err(argument("--size", "none: this model's pictures have one size", &found))
            }
        };
    }
    Ok(if given.is_empty() { vec![QWEN_SIZE] } else { given.to_vec() })
}

/// That no size is given where pictures have one.
pub fn no_size(given: Option<Size>) -> Result<()> {
    match given {
        None => Ok(()),
        Some(Size { height, width }) => {
            let expected = "none: a CLIP's pictures have one size";
            Err(argument("--size", expected, &format!("{height}x{width}")))
        }
    }
}

pub fn argument(what: &str, expected: &str, found: &str) -> Error {
    Error::Argument {
        what: what.into(),
        expected: expected.into(),
        found: found.lines().next().unwrap_or_default().into(),
    }
}

/// Which labelled pictures, and the words for their classes.
#[derive(Args, Clone)]
#[command(next_help_heading = "Data")]
pub struct DataFlags {
    /// An image folder, WebDataset tars, CIFAR or STL10 files, a registered set's name or its Hub
    /// id, or the built-in pocket (pocket:validation and pocket:train are its other splits)
    #[arg(long, value_name = "PATH", default_value = "pocket")]
    pub data: String,
    /// A seeded sample of this many pictures; all where not given, 520 of pocket
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub n: Option<u64>,
    /// Take the first N pictures instead of a sample
    #[arg(long, requires = "n")]
    pub first: bool,
    /// Which registered set the data is, where its name does not tell: cifar10, imagenet, ...
    #[arg(long, value_name = "NAME")]
    pub dataset: Option<String>,
    /// A file of class names, one a line in label order, instead of the data's own
    #[arg(long, value_name = "FILE")]
    pub classes: Option<PathBuf>,
    /// A prompt with {class} in it, a file of such prompts, or `own` for those that come with the
    /// data
    #[arg(long, value_name = "TEMPLATE", default_value = registry::TEMPLATE)]
    pub template: String,
}

impl DataFlags {
    /// The pictures; `size` is the side the pocket world is drawn at.
    pub fn open(&self, seed: u64, size: u32, offline: bool) -> Result<LabelledSet> {
        let n = self.n.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
        let split = match self.data.as_str() {
            "pocket" => Some(Split::Test),
            other => other
                .strip_prefix("pocket:")
                .map(super::pocket::parse_split)
                .transpose()
                .map_err(|e| argument("--data", "pocket, pocket:validation or pocket:train", &e))?,
        };
        if let Some(split) = split {
            for (flag, given) in
                [("--classes", self.classes.is_some()), ("--dataset", self.dataset.is_some())]
            {
                if given {
                    return Err(argument(flag, "none with pocket, which has its own", "one"));
                }
            }
            return LabelledSet::pocket(split, 0, self.n.unwrap_or(520), size);
        }
        let options = OpenOptions { classes: self.classes.clone(), dataset: self.dataset.clone() };
        let set = LabelledSet::find(&self.data, &options, &Lookup { revision: None, offline })?;
        Ok(match n {
            Some(n) if self.first => set.first(n),
            Some(n) => set.sample(n, seed),
            None => set,
        })
    }

    /// The prompts.
    pub fn templates(&self, set: &LabelledSet) -> Result<Vec<String>> {
        if self.template == "own" {
            let own = set.templates().map(<[String]>::to_vec);
            return own.ok_or_else(|| argument("--template", "a prompt: this data brings none", "own"));
        }
        if self.template.contains("{class}") || self.template.contains("{c}") {
            return Ok(vec![self.template.clone()]);
        }
        let path = Path::new(&self.template);
        let text = std::fs::read_to_string(path).map_err(|e| {
            argument(
                "--template",
                "a prompt with {class} in it, a file, or own",
                &format!("{}: {e}", self.template),
            )
        })?;
        Ok(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(ToString::to_string).collect())
    }
}

/// What is put into the tower.
#[derive(Args, Clone)]
#[command(next_help_heading = "Defence")]
pub struct DefenseFlags {
    /// An anchor file, a built-in anchor's name, training-free, or none for the undefended model
    #[arg(long, value_name = "ANCHOR", default_value = "training-free")]
    pub anchor: String,
    /// The anchor's factor, instead of the anchor's own
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    alpha: Option<f64>,
    /// The attention output's factor, instead of the anchor's own
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    beta: Option<f64>,
    /// Cutoff D0 of the Gaussian input filter in frequency bins of the tower's picture; with
    /// --anchor none it switches the filter on alone
    #[arg(long, value_name = "BINS")]
    cutoff: Option<f64>,
    /// Leave the Gaussian input filter out
    #[arg(long)]
    no_gif: bool,
    /// Leave the anchor out
    #[arg(long)]
    no_fra: bool,
    /// Accept an anchor made on another tower of the same shape
    #[arg(long)]
    allow_mismatch: bool,
}

impl DefenseFlags {
    pub fn options(&self) -> DefenseOptions {
        DefenseOptions {
            anchor: match self.anchor.parse::<AnchorChoice>() {
                Ok(choice) => choice,
                Err(never) => match never {},
            },
            alpha: self.alpha,
            beta: self.beta,
            cutoff: self.cutoff,
            no_gif: self.no_gif,
            no_fra: self.no_fra,
            allow_mismatch: self.allow_mismatch,
        }
    }
}

/// Limits on every picture that comes in.
#[derive(Args, Clone)]
#[command(next_help_heading = "Picture limits")]
pub struct PictureLimits {
    /// The most bytes a picture file may have
    #[arg(long, value_name = "BYTES", default_value_t = DecodeLimits::default().max_bytes)]
    max_image_bytes: u64,
    /// The most pixels a picture may have
    #[arg(long, value_name = "PIXELS", default_value_t = DecodeLimits::default().max_pixels)]
    max_pixels: u64,
    /// The most memory decoding one picture may take, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = DecodeLimits::default().max_memory)]
    max_image_memory: u64,
}

impl PictureLimits {
    pub fn limits(&self) -> DecodeLimits {
        DecodeLimits {
            max_bytes: self.max_image_bytes,
            max_pixels: self.max_pixels,
            max_memory: self.max_image_memory,
        }
    }
}
