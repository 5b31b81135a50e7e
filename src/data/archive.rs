//! Tars, read where they lie: WebDataset's and those of an image folder.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use tar::{Archive, EntryType};

use super::folder::{Folders, Gather, Named, UNREADABLE, named};
use super::{Defect, Item, Place};
use crate::{Error, Result};

/// The size of a tar's headers, and what its members are padded to.
const BLOCK: u64 = 512;
/// The longest `.cls` member that is read; a label has a few digits.
const MAX_LABEL: u64 = 64;

/// What is in the tars, in the order they came.
pub(super) struct Members {
    /// Whether there is a `.cls` among them, as in a WebDataset.
    pub labelled: bool,
    members: Vec<Member>,
    defects: Vec<Defect>,
}

struct Member {
    /// The tar's file name.
    shard: String,
    path: String,
    kind: Kind,
}

enum Kind {
    Picture(Place),
    Unreadable,
    Label(std::result::Result<usize, String>),
}

impl Members {
    /// Walks the headers of `files`; of the members, labels alone are read.
    pub fn read(files: &[impl AsRef<Path>]) -> Result<Self> {
        let mut all = Self { labelled: false, members: Vec::new(), defects: Vec::new() };
        for (number, file) in files.iter().enumerate() {
            all.add(number, file.as_ref())?;
        }
        all.labelled = all.members.iter().any(|member| matches!(member.kind, Kind::Label(_)));
        Ok(all)
    }

    fn add(&mut self, number: usize, path: &Path) -> Result<()> {
        let shard = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let failed = |e: std::io::Error| Error::data(path, format!("is no whole tar: {e}"));
        let open = || File::open(path).map_err(|e| Error::read(path, e));
        let mut file = open()?;
        let size = file.metadata().map_err(|e| Error::read(path, e))?.len();
        let mut end = 0;
        let mut archive = Archive::new(open()?);
        for entry in archive.entries_with_seek().map_err(failed)? {
            let mut entry = entry.map_err(failed)?;
            let name = match std::str::from_utf8(&entry.path_bytes()) {
                Ok(name) => name.trim_start_matches("./").to_string(),
                Err(_) => {
                    let id = format!("{shard}/{}", String::from_utf8_lossy(&entry.path_bytes()));
                    self.defects.push(Defect { id, reason: "has a name that is not UTF-8".into() });
                    String::new()
                }
            };
            let (start, length) = (entry.raw_file_position(), entry.size());
            let whole = start.checked_add(length).filter(|end| *end <= size).ok_or_else(|| {
                let left = size.saturating_sub(start);
                Error::data(path, format!("ends within `{name}`, after {left} of {length} bytes"))
            })?;
            end = whole.next_multiple_of(BLOCK);
            let kind = match entry.header().entry_type() {
                EntryType::Regular | EntryType::Continuous => {
                    let place = Place { file: number, start, length };
                    match kind(&name) {
                        None => continue,
                        Some(Named::Picture) => Kind::Picture(place),
                        Some(Named::Unreadable) => Kind::Unreadable,
                        Some(Named::Else) => Kind::Label(label(&mut entry).map_err(failed)?),
                    }
                }
                EntryType::Directory => continue,
                _ if kind(&name).is_some() => {
                    let reason = "is a link or a sparse file".into();
                    self.defects.push(Defect { id: format!("{shard}/{name}"), reason });
                    continue;
                }
                _ => continue,
            };
            self.members.push(Member { shard: shard.clone(), path: name, kind });
        }
        // A tar that was cut between two members has nothing else to tell it by.
        let mut mark = [1; BLOCK as usize];
        let marked = file.seek(SeekFrom::Start(end)).and_then(|_| file.read_exact(&mut mark));
        if marked.is_err() || mark != [0; BLOCK as usize] {
            return Err(Error::data(path, "ends without a tar's end mark; it was cut, or is no tar"));
        }
        Ok(())
    }

    /// The items of a WebDataset: a picture and a label for each key, which is a member's path up
    /// to the first dot of its name.
    pub fn samples(self) -> (Vec<Item>, Vec<Defect>) {
        type Sample = (Option<Place>, Option<std::result::Result<usize, String>>);
        let mut defects = self.defects;
        let mut samples: HashMap<String, Sample> = HashMap::new();
        for Member { shard, path, kind } in self.members {
            let id = format!("{shard}/{}", key(&path));
            let twice = |what: &str| Defect { id: id.clone(), reason: format!("has two {what}") };
            let (picture, label) = samples.entry(id.clone()).or_default();
            match kind {
                Kind::Unreadable => {
                    defects.push(Defect { id: format!("{shard}/{path}"), reason: UNREADABLE.into() });
                }
                Kind::Picture(_) if picture.is_some() => defects.push(twice("pictures")),
                Kind::Picture(place) => *picture = Some(place),
                Kind::Label(_) if label.is_some() => defects.push(twice("labels")),
                Kind::Label(found) => *label = Some(found),
            }
        }
        let mut items = Vec::new();
        for (id, sample) in samples {
            let reason = match sample {
                (Some(place), Some(Ok(label))) => {
                    items.push(Item { id, label, place });
                    continue;
                }
                (Some(_), Some(Err(found))) => format!("has the label {found}, expected a number"),
                (Some(_), None) => "has no `.cls`".into(),
                (None, Some(_)) => "has no picture".into(),
                (None, None) => continue,
            };
            defects.push(Defect { id, reason });
        }
        (items, defects)
    }

    /// The pictures of an image folder: `CLASS/*.jpg`, below one more folder or not.
    pub fn folders(self) -> Folders {
        let mut gather = Gather::new(self.defects);
        let skipped = shared(self.members.iter().map(|member| member.path.as_str()));
        for Member { shard, path, kind } in self.members {
            let id = format!("{shard}/{path}");
            match (kind, path.get(skipped..).and_then(|inner| inner.split_once('/'))) {
                (Kind::Picture(place), Some((class, _))) => gather.picture(class, id, place),
                (Kind::Picture(_), None) => {
                    gather.defects.push(Defect { id, reason: "has no `.cls` and no folder".into() });
                }
                (Kind::Unreadable, _) => gather.defects.push(Defect { id, reason: UNREADABLE.into() }),
                (Kind::Label(_), _) => {}
            }
        }
        gather.finish()
    }
}

/// What a member is by its name; of [`Named::Else`] labels alone. Hidden ones are none.
fn kind(path: &str) -> Option<Named> {
    let name = path.rsplit('/').next().unwrap_or(path);
    match named(name) {
        _ if name.starts_with('.') => None,
        Named::Else => name.ends_with(".cls").then_some(Named::Else),
        kind => Some(kind),
    }
}

fn key(path: &str) -> &str {
    let name = path.rfind('/').map_or(0, |slash| slash + 1);
    path[name..].find('.').map_or(path, |dot| &path[..name + dot])
}

fn label(entry: &mut impl Read) -> std::io::Result<std::result::Result<usize, String>> {
    let mut bytes = Vec::new();
    entry.take(MAX_LABEL).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim();
    Ok(text.parse().map_err(|_| format!("`{text}`")))
}

/// The length of the folders that all paths lie in, where classes lie below them.
fn shared<'a>(paths: impl Iterator<Item = &'a str> + Clone) -> usize {
    let mut skipped = 0;
    loop {
        let mut first = None;
        for path in paths.clone() {
            let Some((folder, inner)) = path.get(skipped..).and_then(|path| path.split_once('/')) else {
                return skipped;
            };
            if !inner.contains('/') || *first.get_or_insert(folder) != folder {
                return skipped;
            }
        }
        match first {
            Some(folder) => skipped += folder.len() + 1,
            None => return skipped,
        }
    }
}
