//! Labelled pictures on disk: image folders, WebDataset tars, CIFAR-10, CIFAR-100 and STL10 as
//! their authors publish them, and the pocket world.
//!
//! A [`LabelledSet`] holds an index alone; every picture is read when it is asked for, from any
//! thread, so that memory does not grow with the set. [`registry`] knows the 16 sets of the paper.
//!
//! ```
//! use radapt::data::LabelledSet;
//! use radapt::image::DecodeLimits;
//! use radapt::pocket::Split;
//!
//! # fn main() -> radapt::Result<()> {
//! let set = LabelledSet::pocket(Split::Test, 0, 100, 96)?.sample(10, 7);
//! let item = &set.items()[3];
//! let picture = set.picture(3, &DecodeLimits::default())?;
//! println!("{}: {}, {} pixels wide", item.id, set.classes()[item.label], picture.width());
//! # Ok(())
//! # }
//! ```

mod archive;
pub mod captioned;
mod cifar;
pub mod coco;
pub mod coco300;
mod folder;
mod names;
mod open;
mod pickle;
pub mod questions;
pub mod registry;
mod stl10;

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use image::RgbImage;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

use crate::image::{DecodeLimits, decode, decode_file};
use crate::model::Lookup;
use crate::pocket::{self, KINDS, Split};
use crate::{Error, Result};
pub use open::OpenOptions;
use registry::Entry;

/// A picture of a [`LabelledSet`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its name, unique in its set and the same wherever the set lies, such as
    /// `0.tar/n01440764_10026`, `airplane/0001.png` or `test_batch.bin/000123`.
    pub id: String,
    /// Its class, an index into [`LabelledSet::classes`].
    pub label: usize,
    place: Place,
}

/// Where an item's bytes lie; [`Source`] says how they are read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Place {
    /// Which of the source's files.
    file: usize,
    /// Of its bytes; a scene's index in the pocket world.
    start: u64,
    /// Of its bytes.
    length: u64,
}

/// An item that cannot be used, as the index showed already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defect {
    /// The item's name.
    pub id: String,
    /// What is wrong with it.
    pub reason: String,
}

#[derive(Debug, Clone)]
enum Source {
    /// Picture files under a folder, by id.
    Files(PathBuf),
    /// Picture files within other files.
    Packed(Vec<PathBuf>),
    /// Square pictures as bare bytes: a plane each for red, green and blue, in rows or columns.
    Planes { file: PathBuf, side: u32, columns: bool },
    /// Scenes, drawn on demand.
    Pocket { split: Split, seed: u64, size: u32 },
}

/// Pictures with the classes they belong to, in bytewise order of their ids.
#[derive(Debug, Clone)]
pub struct LabelledSet {
    name: String,
    classes: Vec<String>,
    prompt_names: Vec<String>,
    templates: Option<Vec<String>>,
    entry: Option<&'static Entry>,
    items: Vec<Item>,
    defects: Vec<Defect>,
    source: Source,
}

/// What a format's reader finds; [`LabelledSet::new`] checks it.
struct Found {
    name: String,
    prompt_names: Vec<String>,
    templates: Option<Vec<String>>,
    entry: Option<&'static Entry>,
    items: Vec<Item>,
    defects: Vec<Defect>,
    source: Source,
}

impl LabelledSet {
    /// Indexes the data set in a file or folder; what it is, its names and its first bytes tell:
    ///
    /// - CIFAR-10 and CIFAR-100, binary or Python, and STL10, binary: one of their files, or the
    ///   folder they are published as, of which the test split is taken;
    /// - WebDataset: a `.tar` with members `KEY.jpg` (`.jpeg`, `.png`, `.webp`) and `KEY.cls`, a
    ///   folder of such tars, or one with them in `test/`; `classnames.txt` and
    ///   `zeroshot_classification_templates.txt` lie beside them or above a folder named after a
    ///   split; if there is a `nshards.txt`, every shard must be there;
    /// - an image folder `CLASS/*.jpg`, or a tar of one. Classes count in bytewise order of the
    ///   folders' names, and are called the same with spaces for underscores. With a file of class
    ///   names (`classnames.txt` beside them, or [`OpenOptions::classes`]) folders that are all named
    ///   there have the label of their name, and others, as many as there are names, that of their
    ///   place.
    ///
    /// # Errors
    /// If it is none of these, a file of it is cut or damaged, its classes have no names, or no item
    /// can be used. A single bad item is a [`Defect`].
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        Self::new(path, open::open(path, options)?)
    }

    /// Finds a data set: a file or folder ([`LabelledSet::open`]), or else one of CLIP_benchmark's
    /// WebDatasets on the Hub, by a registered name ([`registry`]) or an id `organisation/name`, from
    /// the cache or, unless offline, from the Hub. Of those the evaluated split is taken, `test`
    /// where it is not registered. The environment is honoured as by [`crate::model::Model::find`].
    ///
    /// # Errors
    /// As [`LabelledSet::open`]; also if there is neither, or it cannot be downloaded whole.
    pub fn find(name: &str, options: &OpenOptions, lookup: &Lookup) -> Result<Self> {
        let path = Path::new(name);
        if path.exists() {
            return Self::open(path, options);
        }
        let (folder, found) = open::from_hub(name, options, lookup)?;
        Self::new(&folder, found)
    }

    /// The pocket world's scenes `0..n` of a split and seed, `size` pixels wide and high, with its
    /// kinds as classes.
    ///
    /// # Errors
    /// If `n` is 0 or the size is none of [`pocket::SIDES`].
    pub fn pocket(split: Split, seed: u64, n: u64, size: u32) -> Result<Self> {
        if !pocket::SIDES.contains(&size) {
            return Err(Error::argument("size", "96 to 224 pixels", size));
        }
        if n == 0 {
            return Err(Error::argument("n", "at least 1 scene", 0));
        }
        let item = |index| Item {
            id: format!("pocket-{}-{seed}/{index:012}", split.name()),
            label: pocket::kind_of(split, seed, index),
            place: Place { start: index, ..Place::default() },
        };
        let found = Found {
            name: format!("pocket {}", split.name()),
            prompt_names: KINDS.iter().map(|kind| kind.name.to_string()).collect(),
            templates: Some(vec![pocket::score::TEMPLATE.to_string()]),
            entry: None,
            items: (0..n).map(item).collect(),
            defects: Vec::new(),
            source: Source::Pocket { split, seed, size },
        };
        Self::new(Path::new("pocket"), found)
    }

    fn new(path: &Path, found: Found) -> Result<Self> {
        let Found { name, prompt_names, templates, entry, mut items, mut defects, source } = found;
        if prompt_names.is_empty() {
            return Err(Error::data(path, "has no classes"));
        }
        items.sort_by(|a, b| a.id.cmp(&b.id));
        let (all, mut last) = (items.len(), None::<String>);
        items.retain(|item| {
            let reason = if last.as_ref() == Some(&item.id) {
                "comes twice".to_string()
            } else if item.label >= prompt_names.len() {
                format!("has label {}, but there are {} classes", item.label, prompt_names.len())
            } else {
                last = Some(item.id.clone());
                return true;
            };
            defects.push(Defect { id: item.id.clone(), reason });
            false
        });
        defects.sort_by(|a, b| a.id.cmp(&b.id));
        if items.is_empty() {
            let reason = match defects.first() {
                Some(Defect { id, reason }) => {
                    format!("no item of {} can be used; `{id}` {reason}", all.max(defects.len()))
                }
                None => "has no pictures".into(),
            };
            return Err(Error::data(path, reason));
        }
        let classes = told_apart(&prompt_names);
        Ok(Self { name, classes, prompt_names, templates, entry, items, defects, source })
    }

    /// What it is called: its registered name, or that of its file or folder.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One name for each class, in label order. Where names come twice (`crane` and `maillot` do
    /// in ImageNet's list) the second is `crane (2)` and so on; [`LabelledSet::prompt_names`] has
    /// them as they are.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// What goes into a template for each class, in label order. For a zero-shot head of both see
    /// [`crate::text::ZeroShotHead::with_prompt_names`].
    pub fn prompt_names(&self) -> &[String] {
        &self.prompt_names
    }

    /// The templates that come with it, each with a place `{class}`: those of
    /// `zeroshot_classification_templates.txt` beside it, else those of its [`Entry`].
    pub fn templates(&self) -> Option<&[String]> {
        self.templates.as_deref()
    }

    /// What is known about it, if it is one of the registered sets.
    pub fn entry(&self) -> Option<&'static Entry> {
        self.entry
    }

    /// The pictures, in bytewise order of their ids.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// The items that are no part of [`LabelledSet::items`] because they cannot be used: without a
    /// label or a picture, with a label out of range, a second time under the same id.
    pub fn defects(&self) -> &[Defect] {
        &self.defects
    }

    /// SHA-256, in hex, over the ids and labels of its items and the prompt names of its classes;
    /// not over the pictures.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(b"radapt labelled set 1\0");
        hash.update((self.prompt_names.len() as u64).to_le_bytes());
        let mut text = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        self.prompt_names.iter().for_each(|name| text(name));
        for item in &self.items {
            text(&item.id);
            text(&item.label.to_string());
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// `n` of its items, or all of them if it has fewer, drawn without replacement by ChaCha8; in
    /// the order they had. The draw is the same on every platform, and one of fewer items with the
    /// same seed is part of it.
    pub fn sample(mut self, n: usize, seed: u64) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"radapt sample\0");
        hash.update(seed.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(hash.finalize().into());
        let mut order: Vec<usize> = (0..self.items.len()).collect();
        let n = n.min(order.len());
        for i in 0..n {
            let left = (order.len() - i) as u128;
            let pick = ((u128::from(rng.next_u64()) * left) >> 64) as usize;
            order.swap(i, i + pick);
        }
        let chosen: HashSet<usize> = order[..n].iter().copied().collect();
        let mut i = 0..;
        self.items.retain(|_| i.next().is_some_and(|i| chosen.contains(&i)));
        self
    }

    /// Its first `n` items, or all of them if it has fewer.
    pub fn first(mut self, n: usize) -> Self {
        self.items.truncate(n);
        self
    }

    /// A seeded sample of `n` items and one of `held_out` others.
    ///
    /// # Errors
    /// If it has fewer items than that together.
    pub fn split(self, n: usize, held_out: usize, seed: u64) -> Result<(Self, Self)> {
        let (all, has) = (n.saturating_add(held_out), self.items.len());
        if all > has {
            let expected = format!("{n} pictures and {held_out} others (--n, --held-out, --validate)");
            return Err(Error::argument("data", expected, has));
        }
        // A draw of fewer is part of one of more.
        let (first, both) = (self.clone().sample(n, seed), self.sample(all, seed));
        let within: HashSet<&str> = first.items.iter().map(|item| item.id.as_str()).collect();
        let mut second = both;
        second.items.retain(|item| !within.contains(item.id.as_str()));
        second.defects.clear();
        Ok((first, second))
    }

    /// Shard `i` of `n`, counted from 1: the items and defects whose id's hash falls there. The
    /// shards of a set are disjoint and together all of it; one may be empty.
    ///
    /// # Errors
    /// If `i` is not in `1..=n`.
    pub fn shard(mut self, i: u64, n: u64) -> Result<Self> {
        if i == 0 || i > n {
            return Err(Error::argument("shard", "I/N with I from 1 to N", format!("{i}/{n}")));
        }
        let within = |id: &str| crate::attack::key(id) % n == i - 1;
        self.items.retain(|item| within(&item.id));
        self.defects.retain(|defect| within(&defect.id));
        Ok(self)
    }

    /// Reads and decodes the picture of item `index`.
    ///
    /// # Errors
    /// If there is no such item, or its picture cannot be read or decoded, or is over a limit; the
    /// error names the item and concerns it alone.
    pub fn picture(&self, index: usize, limits: &DecodeLimits) -> Result<RgbImage> {
        let Some(Item { id, place, .. }) = self.items.get(index) else {
            return Err(Error::argument("index", format!("below {}", self.items.len()), index));
        };
        match &self.source {
            Source::Files(root) => decode_file(&root.join(id), limits),
            Source::Packed(files) => decode(&bytes(id, &files[place.file], place, limits)?, id, limits),
            Source::Planes { file, side, columns } => {
                let planes = bytes(id, file, place, limits)?;
                Ok(from_planes(&planes, *side, *columns))
            }
            Source::Pocket { split, seed, size } => {
                Ok(pocket::draw(*split, *seed, place.start, *size)?.picture)
            }
        }
    }
}

/// Reads an item's bytes. The file is opened each time, so that threads share nothing.
fn bytes(id: &str, file: &Path, place: &Place, limits: &DecodeLimits) -> Result<Vec<u8>> {
    if place.length > limits.max_bytes {
        let (found, limit) = (place.length, limits.max_bytes);
        return Err(Error::PictureTooLarge { name: id.into(), unit: "bytes", found, limit });
    }
    let read = || {
        let mut file = File::open(file)?;
        file.seek(SeekFrom::Start(place.start))?;
        let mut bytes = vec![0; place.length as usize];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    };
    read().map_err(|e: std::io::Error| Error::Picture {
        name: id.into(),
        reason: format!("cannot read `{}`: {e}", file.display()),
    })
}

/// A picture of planes of `side` x `side` bytes for red, green and blue.
fn from_planes(planes: &[u8], side: u32, columns: bool) -> RgbImage {
    let side_ = side as usize;
    RgbImage::from_fn(side, side, |x, y| {
        let (x, y) = (x as usize, y as usize);
        let at = if columns { x * side_ + y } else { y * side_ + x };
        image::Rgb([0, 1, 2].map(|c| planes.get(c * side_ * side_ + at).copied().unwrap_or_default()))
    })
}

/// The names, each made unique: a second `crane` is `crane (2)`.
fn told_apart(names: &[String]) -> Vec<String> {
    let given: HashSet<&String> = names.iter().collect();
    let mut taken = HashSet::new();
    names
        .iter()
        .map(|name| {
            let mut key = name.clone();
            let mut count = 2;
            while taken.contains(&key) || (key != *name && given.contains(&key)) {
                key = format!("{name} ({count})");
                count += 1;
            }
            taken.insert(key.clone());
            key
        })
        .collect()
}
