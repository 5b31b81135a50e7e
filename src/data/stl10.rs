//! STL10's binary files.

use std::path::{Path, PathBuf};

use super::{Defect, Item, Place};
use crate::{Error, Result};

/// The pictures' side in pixels.
pub(super) const SIDE: u32 = 96;
/// Bytes of a picture.
const PICTURE: u64 = 3 * 96 * 96;

/// The items of `NAME_X.bin` with the labels, counted from 1, of `NAME_y.bin` beside it.
pub(super) fn index(pictures: &Path) -> Result<(Vec<Item>, Vec<Defect>)> {
    let name = pictures.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let labels = labels_of(pictures, &name)?;
    let found = std::fs::metadata(pictures).map_err(|e| Error::read(pictures, e))?.len();
    let bytes = std::fs::read(&labels).map_err(|e| Error::read(&labels, e))?;
    let expected = bytes.len() as u64 * PICTURE;
    if found != expected {
        let reason =
            format!("has {found} bytes, expected {expected} for the labels in `{}`", labels.display());
        return Err(Error::data(pictures, reason));
    }
    let (mut items, mut defects) = (Vec::new(), Vec::new());
    for (byte, i) in bytes.into_iter().zip(0..) {
        let id = format!("{name}/{i:06}");
        match usize::from(byte).checked_sub(1) {
            Some(label) => {
                let place = Place { file: 0, start: i * PICTURE, length: PICTURE };
                items.push(Item { id, label, place });
            }
            None => {
                let reason = "has label 0, but STL10's labels count from 1".into();
                defects.push(Defect { id, reason });
            }
        }
    }
    Ok((items, defects))
}

fn labels_of(pictures: &Path, name: &str) -> Result<PathBuf> {
    match name.strip_suffix("_X.bin") {
        Some("unlabeled") | None => {
            Err(Error::data(pictures, "expected STL10's `test_X.bin` or `train_X.bin`, which have labels"))
        }
        Some(split) => Ok(pictures.with_file_name(format!("{split}_y.bin"))),
    }
}

/// The class names beside a file, where they are.
pub(super) fn names(beside: &Path) -> Result<Option<(PathBuf, Vec<String>)>> {
    let file = beside.join("class_names.txt");
    if !file.is_file() {
        return Ok(None);
    }
    let names = super::names::read_names(&file)?;
    Ok(Some((file, names)))
}
