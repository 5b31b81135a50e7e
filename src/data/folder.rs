//! Image folders: `CLASS/*.jpg`.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Defect, Item, Place};
use crate::{Error, Result};

/// Extensions of the formats [`crate::image::decode`] reads.
const PICTURES: [&str; 6] = ["jpg", "jpeg", "png", "webp", "bmp", "gif"];
/// Extensions of pictures it does not read.
const OTHERS: [&str; 9] = ["tif", "tiff", "ppm", "pgm", "pbm", "jp2", "avif", "heic", "jxl"];

/// What a file's name says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Named {
    Picture,
    /// A picture of a format that is not read.
    Unreadable,
    Else,
}

pub(super) fn named(name: &str) -> Named {
    let extension = name.rsplit_once('.').map(|(_, e)| e.to_ascii_lowercase()).unwrap_or_default();
    match extension.as_str() {
        e if PICTURES.contains(&e) => Named::Picture,
        e if OTHERS.contains(&e) => Named::Unreadable,
        _ => Named::Else,
    }
}

pub(super) const UNREADABLE: &str = "is no PNG, JPEG, WebP, BMP or GIF file";

/// The folders that are classes, sorted, and the pictures with their folder as label.
pub(super) struct Folders {
    pub names: Vec<String>,
    pub items: Vec<Item>,
    pub defects: Vec<Defect>,
}

/// Gathers pictures by their class's folder.
pub(super) struct Gather {
    /// The pictures of each class.
    classes: BTreeMap<String, Vec<(String, Place)>>,
    pub defects: Vec<Defect>,
}

impl Gather {
    pub fn new(defects: Vec<Defect>) -> Self {
        Self { classes: BTreeMap::new(), defects }
    }

    pub fn class(&mut self, class: &str) {
        self.classes.entry(class.to_string()).or_default();
    }

    pub fn picture(&mut self, class: &str, id: String, place: Place) {
        self.classes.entry(class.to_string()).or_default().push((id, place));
    }

    pub fn finish(self) -> Folders {
        let names = self.classes.keys().cloned().collect();
        let items = self
            .classes
            .into_values()
            .enumerate()
            .flat_map(|(label, ids)| ids.into_iter().map(move |(id, place)| Item { id, label, place }))
            .collect();
        Folders { names, items, defects: self.defects }
    }
}

/// Every picture in the folders of `root`, at any depth. Hidden files and folders are left out, and
/// links to folders are followed for classes alone.
pub(super) fn index(root: &Path) -> Result<Folders> {
    let mut gather = Gather::new(Vec::new());
    for (name, is_folder) in listing(root)? {
        match name {
            Ok(class) if is_folder || root.join(&class).is_dir() => {
                gather.class(&class);
                walk(root, &class, &class, &mut gather)?;
            }
            Ok(_) => {}
            Err(defect) if is_folder => gather.defects.push(defect),
            Err(_) => {}
        }
    }
    Ok(gather.finish())
}

fn walk(root: &Path, class: &str, inner: &str, gather: &mut Gather) -> Result<()> {
    for (name, is_folder) in listing(&root.join(inner))? {
        let name = match name {
            Ok(name) => name,
            Err(Defect { id, reason }) => {
                gather.defects.push(Defect { id: format!("{inner}/{id}"), reason });
                continue;
            }
        };
        let id = format!("{inner}/{name}");
        match named(&name) {
            _ if is_folder => walk(root, class, &id, gather)?,
            Named::Picture => gather.picture(class, id, Place::default()),
            Named::Unreadable => gather.defects.push(Defect { id, reason: UNREADABLE.into() }),
            Named::Else => {}
        }
    }
    Ok(())
}

/// The names in a folder that are not hidden, and whether each is a folder itself.
fn listing(folder: &Path) -> Result<Vec<(std::result::Result<String, Defect>, bool)>> {
    let failed = |e| Error::read(folder, e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let is_folder = entry.file_type().map_err(failed)?.is_dir();
        let name = entry.file_name().into_string().map_err(|name| Defect {
            id: name.to_string_lossy().into_owned(),
            reason: "has a name that is not UTF-8".into(),
        });
        if !name.as_ref().is_ok_and(|name| name.starts_with('.')) {
            names.push((name, is_folder));
        }
    }
    Ok(names)
}
