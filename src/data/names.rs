//! Files of class names and templates, one a line.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Folders that hold one split of a set whose names lie one level up.
const SPLITS: [&str; 5] = ["test", "train", "val", "valid", "validation"];

/// The largest file of names; ImageNet's has 10 kB.
const MAX_BYTES: u64 = 1 << 20;

pub(super) fn is_split(folder: &Path) -> bool {
    folder.file_name().and_then(|name| name.to_str()).is_some_and(|name| SPLITS.contains(&name))
}

/// `name` in `folder`, or above it where that is named after a split.
pub(super) fn beside(folder: &Path, name: &str) -> Option<PathBuf> {
    let above = folder.parent().filter(|_| is_split(folder));
    [Some(folder), above].into_iter().flatten().map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// The names in a file, one a line.
pub(super) fn read_names(file: &Path) -> Result<Vec<String>> {
    let size = std::fs::metadata(file).map_err(|e| Error::read(file, e))?.len();
    if size > MAX_BYTES {
        return Err(Error::data(file, format!("expected names, one a line, found {size} bytes")));
    }
    let text = std::fs::read_to_string(file).map_err(|e| Error::read(file, e))?;
    let text = text.trim_start_matches('\u{feff}').trim_end();
    let names: Vec<String> = text.lines().map(|line| line.trim().to_string()).collect();
    match names.iter().position(String::is_empty) {
        _ if text.is_empty() => Err(Error::data(file, "expected names, one a line, found none")),
        // A line left out would shift every label after it.
        Some(line) => Err(Error::data(file, format!("line {} is empty", line + 1))),
        None => Ok(names),
    }
}

/// The templates in a file, one a line, with `{class}` for CLIP_benchmark's `{c}`.
pub(super) fn read_templates(file: &Path) -> Result<Vec<String>> {
    let templates = read_names(file)?.into_iter().map(|line| line.replace("{c}", "{class}"));
    let place = |template: String| match template.contains("{class}") {
        true => Ok(template),
        false => Err(Error::data(file, format!("template `{template}` has no place `{{c}}`"))),
    };
    templates.map(place).collect()
}

/// A folder's name as a class's.
pub(super) fn spaced(folder: &str) -> String {
    folder.replace('_', " ")
}

/// The labels of folders in order, and the names of all classes; see
/// [`super::LabelledSet::open`]. `file` is where the names come from.
pub(super) fn label_folders(
    folders: &[String],
    names: Option<(PathBuf, Vec<String>)>,
) -> Result<(Vec<usize>, Vec<String>)> {
    let in_order = || (0..folders.len()).collect::<Vec<_>>();
    let Some((file, names)) = names else {
        return Ok((in_order(), folders.iter().map(|folder| spaced(folder)).collect()));
    };
    let named =
        |folder: &String| names.iter().position(|name| name == folder || spaced(name).eq(&spaced(folder)));
    if let Some(labels) = folders.iter().map(named).collect::<Option<Vec<_>>>() {
        let mut distinct = labels.clone();
        distinct.sort_unstable();
        distinct.dedup();
        if distinct.len() == folders.len() {
            return Ok((labels, names));
        }
    }
    if names.len() != folders.len() {
        let reason =
            format!("has {} names for {} folders that are not all named so", names.len(), folders.len());
        return Err(Error::data(file, reason));
    }
    Ok((in_order(), names))
}
