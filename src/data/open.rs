//! What a path holds.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use hf_hub::RepoType;

use super::archive::Members;
use super::folder::{self, Folders};
use super::names::{beside, is_split, label_folders, read_names, read_templates};
use super::registry::{self, Entry};
use super::{Defect, Found, Item, Source, cifar, stl10};
use crate::hub;
use crate::model::Lookup;
use crate::{Error, Result};

const CLASSES: &str = "classnames.txt";
const TEMPLATES: &str = "zeroshot_classification_templates.txt";
const SHARDS: &str = "nshards.txt";

/// How [`super::LabelledSet::open`] reads a set.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// A file of class names, one a line in label order, instead of those that come with the set.
    pub classes: Option<PathBuf>,
    /// The registered set it is ([`registry::entries`]), where its name does not tell; it must have
    /// as many classes.
    pub dataset: Option<String>,
}

/// The WebDataset of a registered set, or of a Hub id.
pub(super) fn from_hub(name: &str, options: &OpenOptions, lookup: &Lookup) -> Result<(PathBuf, Found)> {
    let entry = registry::entry(name).ok();
    let id = match entry {
        Some(Entry { hub: Some(id), .. }) => id,
        Some(Entry { title, .. }) => {
            let reason = format!("no WebDataset of {title} is known on the Hub; give a folder of it");
            return Err(Error::data(name, reason));
        }
        None if hub::is_id(name) => name,
        None => {
            let reason = "no such file or folder, no registered set, and not a Hub id `organisation/name`";
            return Err(Error::data(name, reason));
        }
    };
    let split = entry.and_then(|entry| entry.split.as_deref()).unwrap_or("test");
    let wanted = |file: &str| match file.strip_prefix(split).and_then(|file| file.strip_prefix('/')) {
        Some(file) => !file.contains('/') && (file.ends_with(".tar") || file == SHARDS),
        None => [CLASSES, TEMPLATES].contains(&file),
    };
    let folder = hub::folder(id, RepoType::Dataset, lookup, |file, _| wanted(file), &[CLASSES])
        .map_err(|reason| Error::data(id, reason))?;
    let called = id.rsplit('/').next().unwrap_or(id).to_string();
    let tars = folder.join(split);
    let shards = shards(&tars)?;
    if shards.is_empty() {
        return Err(Error::data(id, format!("has no tars in `{split}/`")));
    }
    let found = Reader { path: &folder, called, options }.tars(&folder, shards)?;
    Ok((folder, found))
}

pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<Found> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::read(path, e))?;
    let reader = Reader { path, called: set_name(path), options };
    if !metadata.is_dir() {
        return reader.file(path);
    }
    // Published folders first: beside their files there may be others.
    let published = [
        ("test_batch.bin", Kind::Binary),
        ("test.bin", Kind::Binary),
        ("test_X.bin", Kind::Stl10),
        ("test_batch", Kind::Python),
        ("test", Kind::Python),
    ];
    for (name, kind) in published {
        let file = path.join(name);
        if file.is_file() {
            return reader.one(&file, kind);
        }
    }
    for folder in [path.to_path_buf(), path.join("test")] {
        let shards = shards(&folder)?;
        if !shards.is_empty() {
            return reader.tars(&folder, shards);
        }
    }
    reader.folder()
}

/// Class names and the file they come from.
type Names = Option<(PathBuf, Vec<String>)>;

/// The files that are a whole set.
#[derive(Clone, Copy)]
enum Kind {
    Binary,
    Python,
    Stl10,
}

struct Reader<'a> {
    /// As it was given, or where the Hub's cache has it.
    path: &'a Path,
    /// What the set is called, unless its format tells.
    called: String,
    options: &'a OpenOptions,
}

impl Reader<'_> {
    fn file(&self, file: &Path) -> Result<Found> {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with("_X.bin") {
            return self.one(file, Kind::Stl10);
        }
        if name.ends_with(".bin") {
            return self.one(file, Kind::Binary);
        }
        if name.ends_with(".tar") {
            return self.tars(&parent(file), vec![file.to_path_buf()]);
        }
        let mut first = [0];
        let failed = |e| Error::read(file, e);
        let count = File::open(file).map_err(failed)?.read(&mut first).map_err(failed)?;
        // A pickle's first byte: of protocol 2 and later, or the mark that begins a dictionary.
        if count == 1 && [0x80, b'('].contains(&first[0]) {
            return self.one(file, Kind::Python);
        }
        Err(Error::data(file, "expected a folder, a `.tar`, or a file of CIFAR-10, CIFAR-100 or STL10"))
    }

    /// A set in one file.
    fn one(&self, file: &Path, kind: Kind) -> Result<Found> {
        let folder = parent(file);
        let (name, items, defects, side, beside) = match kind {
            Kind::Stl10 => {
                let (items, defects) = stl10::index(file)?;
                ("stl10", items, defects, stl10::SIDE, stl10::names(&folder))
            }
            Kind::Binary | Kind::Python => {
                let (cifar, items) = match kind {
                    Kind::Python => cifar::python(file)?,
                    _ => cifar::binary(file)?,
                };
                (cifar.name(), items, Vec::new(), cifar::SIDE, cifar::names(cifar, &folder))
            }
        };
        let prompt_names = match self.names(|| beside)? {
            Some((_, names)) => names,
            None => self.registered(name).unwrap_or_default(),
        };
        let columns = matches!(kind, Kind::Stl10);
        let source = Source::Planes { file: file.to_path_buf(), side, columns };
        self.found(name, &folder, (prompt_names, items, defects), source)
    }

    fn tars(&self, folder: &Path, files: Vec<PathBuf>) -> Result<Found> {
        let members = Members::read(&files)?;
        let names = self.names(|| names_beside(folder))?;
        let found = if members.labelled {
            let names = match names {
                Some((_, names)) => Some(names),
                None => self.registered(&self.called),
            };
            let names = names.ok_or_else(|| {
                Error::data(self.path, format!("has no `{CLASSES}` beside it; give one with `--classes`"))
            })?;
            let (items, defects) = members.samples();
            (names, items, defects)
        } else {
            self.labelled(members.folders(), names)?
        };
        self.found(&self.called, folder, found, Source::Packed(files))
    }

    fn folder(&self) -> Result<Found> {
        let folders = folder::index(self.path)?;
        if folders.items.is_empty() && folders.defects.is_empty() {
            let reason = "holds no data set: no tars, no files of CIFAR or STL10, \
                          no folders `CLASS/` of pictures";
            return Err(Error::data(self.path, reason));
        }
        let found = self.labelled(folders, self.names(|| names_beside(self.path))?)?;
        self.found(&self.called, self.path, found, Source::Files(self.path.to_path_buf()))
    }

    /// An image folder's class names, items and defects.
    fn labelled(&self, folders: Folders, names: Names) -> Result<(Vec<String>, Vec<Item>, Vec<Defect>)> {
        let Folders { names: folders, mut items, defects } = folders;
        let (labels, names) = label_folders(&folders, names)?;
        for item in &mut items {
            item.label = labels.get(item.label).copied().unwrap_or(usize::MAX);
        }
        Ok((names, items, defects))
    }

    fn found(
        &self,
        name: &str,
        folder: &Path,
        (prompt_names, items, defects): (Vec<String>, Vec<Item>, Vec<Defect>),
        source: Source,
    ) -> Result<Found> {
        let entry = self.entry(name, prompt_names.len())?;
        let name = entry.map_or(name, |entry| entry.name.as_str()).to_string();
        let templates = self.templates(folder, entry)?;
        Ok(Found { name, prompt_names, templates, entry, items, defects, source })
    }

    /// The registered set of `classes`: the one asked for, or the one so called.
    fn entry(&self, name: &str, classes: usize) -> Result<Option<&'static Entry>> {
        let Some(asked) = &self.options.dataset else {
            return Ok(registry::entries().iter().find(|entry| entry.fits(name, classes)));
        };
        let entry = registry::entry(asked)?;
        if entry.classes == classes {
            return Ok(Some(entry));
        }
        let reason = format!("has {classes} classes, but {} has {}", entry.title, entry.classes);
        Err(Error::data(self.path, reason))
    }

    /// The class names: those asked for, or those `beside`.
    fn names(&self, beside: impl FnOnce() -> Result<Names>) -> Result<Names> {
        match &self.options.classes {
            Some(file) => Ok(Some((file.clone(), read_names(file)?))),
            None => beside(),
        }
    }

    /// The class names that are registered for a set so called, or asked for.
    fn registered(&self, name: &str) -> Option<Vec<String>> {
        let name = self.options.dataset.as_deref().unwrap_or(name);
        registry::entry(name).ok().and_then(|entry| entry.class_names.clone())
    }

    fn templates(&self, folder: &Path, entry: Option<&'static Entry>) -> Result<Option<Vec<String>>> {
        match beside(folder, TEMPLATES) {
            Some(file) => read_templates(&file).map(Some),
            None => Ok(entry.and_then(|entry| entry.templates.clone())),
        }
    }
}

fn names_beside(folder: &Path) -> Result<Names> {
    match beside(folder, CLASSES) {
        Some(file) => {
            let names = read_names(&file)?;
            Ok(Some((file, names)))
        }
        None => Ok(None),
    }
}

/// The folder a file lies in.
fn parent(file: &Path) -> PathBuf {
    match file.parent() {
        Some(folder) if folder.as_os_str().is_empty() => PathBuf::from("."),
        Some(folder) => folder.to_path_buf(),
        None => PathBuf::from("."),
    }
}

/// What a set at a path is called: its file or folder, but for numbered shards and splits.
fn set_name(path: &Path) -> String {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let mut at = path.as_path();
    loop {
        let name = if at.is_dir() { at.file_name() } else { at.file_stem() };
        let name = name.unwrap_or_default().to_string_lossy().into_owned();
        let numbered = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
        match at.parent() {
            Some(above) if numbered || is_split(at) => at = above,
            _ => return name,
        }
    }
}

/// The tars in a folder, in bytewise order; as many as `nshards.txt` says where there is one.
fn shards(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut shards = Vec::new();
    let failed = |e| Error::read(folder, e);
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".tar") && !name.starts_with('.') && path.is_file() {
            shards.push(path);
        }
    }
    shards.sort();
    let count = folder.join(SHARDS);
    if count.is_file() {
        let text = std::fs::read_to_string(&count).map_err(|e| Error::read(&count, e))?;
        let all: usize = text.trim().parse().map_err(|_| {
            Error::data(&count, format!("expected the number of shards, found `{}`", text.trim()))
        })?;
        if all != shards.len() {
            let reason = format!("has {} tars, but `{SHARDS}` says {all}", shards.len());
            return Err(Error::data(folder, reason));
        }
    }
    Ok(shards)
}
