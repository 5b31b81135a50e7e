//! Pictures with captions by people, for retrieval: Karpathy's splits of Flickr30k and COCO, COCO's own
//! captions, and the pocket world.

use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;

use super::coco::Coco;
use crate::pocket::{self, Dataset, Split};
use crate::{Error, Result};

/// A picture with its captions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptionedPicture {
    /// Its file name.
    pub name: String,
    /// At least one.
    pub captions: Vec<String>,
}

/// Pictures with captions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptionedSet {
    name: String,
    pictures: Vec<CaptionedPicture>,
}

/// `dataset_flickr30k.json`, `dataset_coco.json`.
#[derive(Deserialize)]
struct Karpathy {
    dataset: String,
    images: Vec<KarpathyImage>,
}

#[derive(Deserialize)]
struct KarpathyImage {
    filename: String,
    split: String,
    sentences: Vec<KarpathySentence>,
}

#[derive(Deserialize)]
struct KarpathySentence {
    raw: String,
}

/// Only COCO's own file has annotations.
#[derive(Deserialize)]
struct Kind {
    dataset: Option<serde::de::IgnoredAny>,
}

impl CaptionedSet {
    /// A file of Karpathy's splits, of which one is taken, or COCO's captions file, which has none.
    ///
    /// # Errors
    /// If the file is neither, or has no picture of the split.
    pub fn open(path: &Path, split: &str) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
        let wrong = |e: serde_json::Error| Error::config(path, e.to_string());
        let kind: Kind = serde_json::from_str(&text).map_err(wrong)?;
        if kind.dataset.is_none() {
            let coco = Coco::captions_alone(path)?;
            let pictures = coco.images().iter().map(|image| CaptionedPicture {
                name: image.file_name.clone(),
                captions: coco.captions(image.id).to_vec(),
            });
            let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            return Self::new(&name, pictures.collect()).map_err(|reason| Error::config(path, reason));
        }
        let file: Karpathy = serde_json::from_str(&text).map_err(wrong)?;
        // COCO's Karpathy training split is `train` and `restval`.
        let of = |image: &&KarpathyImage| image.split == split;
        let pictures = file.images.iter().filter(of).map(|image| CaptionedPicture {
            name: image.filename.clone(),
            captions: image.sentences.iter().map(|sentence| sentence.raw.clone()).collect(),
        });
        Self::new(&format!("{} {split}", file.dataset), pictures.collect())
            .map_err(|reason| Error::config(path, format!("split {split}: {reason}")))
    }

    /// The pocket world's scenes `0..n`, one caption each.
    ///
    /// # Errors
    /// If `n` is 0.
    pub fn pocket(split: Split, seed: u64, n: u64) -> Result<Self> {
        let picture = |index| {
            let scene = pocket::draw(split, seed, index, *pocket::SIDES.start())?;
            Ok(CaptionedPicture { name: Dataset::file_name(index), captions: vec![scene.caption] })
        };
        let pictures = (0..n).map(picture).collect::<Result<_>>()?;
        Self::new("pocket", pictures).map_err(|reason| Error::argument("pictures", "at least one", reason))
    }

    fn new(name: &str, pictures: Vec<CaptionedPicture>) -> std::result::Result<Self, String> {
        let pictures: Vec<CaptionedPicture> =
            pictures.into_iter().filter(|picture| !picture.captions.is_empty()).collect();
        if pictures.is_empty() {
            return Err("expected pictures with captions, found none".into());
        }
        let mut seen = HashSet::new();
        if let Some(twice) = pictures.iter().find(|picture| !seen.insert(&picture.name)) {
            return Err(format!("picture `{}` is there twice", twice.name));
        }
        Ok(Self { name: name.into(), pictures })
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The pictures.
    pub fn pictures(&self) -> &[CaptionedPicture] {
        &self.pictures
    }

    /// The first `n`.
    #[must_use]
    pub fn first(mut self, n: usize) -> Self {
        self.pictures.truncate(n.max(1));
        self
    }
}
