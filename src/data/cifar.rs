//! CIFAR-10 and CIFAR-100, as their authors publish them.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::pickle::{self, Batch};
use super::{Item, Place};
use crate::{Error, Result};

/// The pictures' side in pixels.
pub(super) const SIDE: u32 = 32;
/// Bytes of a picture.
const PICTURE: u64 = 3 * 32 * 32;

/// Which of the two a file belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cifar {
    Ten,
    Hundred,
}

impl Cifar {
    /// Its name in the registry.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ten => "cifar10",
            Self::Hundred => "cifar100",
        }
    }

    /// Bytes of labels before a picture; CIFAR-100's coarse label comes before the fine one.
    fn labels(self) -> u64 {
        match self {
            Self::Ten => 1,
            Self::Hundred => 2,
        }
    }

    /// Which one a binary file is of, by its name, else by its length.
    fn of_binary(path: &Path, length: u64) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let whole = |cifar: Self| length > 0 && length.is_multiple_of(cifar.labels() + PICTURE);
        let cifar = match &*name {
            "test.bin" | "train.bin" => Self::Hundred,
            name if name.contains("_batch") => Self::Ten,
            _ => match (whole(Self::Ten), whole(Self::Hundred)) {
                (true, false) => Self::Ten,
                (false, true) => Self::Hundred,
                _ => {
                    let reason = format!(
                        "has {length} bytes, expected CIFAR-10's 3073 for each picture or CIFAR-100's 3074"
                    );
                    return Err(Error::data(path, reason));
                }
            },
        };
        if whole(cifar) {
            return Ok(cifar);
        }
        let row = cifar.labels() + PICTURE;
        Err(Error::data(path, format!("has {length} bytes, expected {row} for each picture")))
    }
}

/// The items of a binary file.
pub(super) fn binary(path: &Path) -> Result<(Cifar, Vec<Item>)> {
    let failed = |e| Error::read(path, e);
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let cifar = Cifar::of_binary(path, length)?;
    let row = cifar.labels() + PICTURE;
    let mut file = BufReader::new(file);
    let mut items = Vec::new();
    for i in 0..length / row {
        let mut labels = [0; 2];
        let labels = &mut labels[..cifar.labels() as usize];
        file.read_exact(labels).map_err(failed)?;
        file.seek_relative(PICTURE as i64).map_err(failed)?;
        let label = labels.last().copied().unwrap_or_default().into();
        items.push(item(path, i, label, i * row + cifar.labels()));
    }
    Ok((cifar, items))
}

/// The items of a Python batch.
pub(super) fn python(path: &Path) -> Result<(Cifar, Vec<Item>)> {
    let Batch { fine, labels, start, shape } = pickle::batch(path)?;
    if shape != [labels.len() as u64, PICTURE] {
        let reason = format!("`data` has shape {shape:?}, expected [{}, {PICTURE}]", labels.len());
        return Err(Error::data(path, reason));
    }
    let cifar = if fine { Cifar::Hundred } else { Cifar::Ten };
    let items = labels.into_iter().zip(0..);
    Ok((cifar, items.map(|(label, i)| item(path, i, label, start + i * PICTURE)).collect()))
}

fn item(path: &Path, index: u64, label: usize, start: u64) -> Item {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Item { id: format!("{name}/{index:06}"), label, place: Place { file: 0, start, length: PICTURE } }
}

/// The class names beside a file, where they are.
pub(super) fn names(cifar: Cifar, beside: &Path) -> Result<Option<(PathBuf, Vec<String>)>> {
    let (text, pickled) = match cifar {
        Cifar::Ten => ("batches.meta.txt", "batches.meta"),
        Cifar::Hundred => ("fine_label_names.txt", "meta"),
    };
    let (text, pickled) = (beside.join(text), beside.join(pickled));
    // CIFAR-100's are written like `maple_tree`.
    let spaced = |names: Vec<String>| names.iter().map(|name| super::names::spaced(name)).collect();
    if text.is_file() {
        let names = super::names::read_names(&text)?;
        return Ok(Some((text, spaced(names))));
    }
    if pickled.is_file() {
        let names = pickle::label_names(&pickled)?;
        return Ok(Some((pickled, spaced(names))));
    }
    Ok(None)
}
