//! A run's folder: `run.json` (what it is), `items.jsonl` (a line per item), resumed after a kill,
//! split into shards and merged.

use std::collections::HashSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::attack::{Eps, Flag, Threat, key};
use crate::{Error, Result};

const RUN: &str = "run.json";
const ITEMS: &str = "items.jsonl";
const LOCK: &str = "run.lock";

/// What a run is: `run.json` in its folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`Manifest::VERSION`].
    pub schema_version: u64,
    /// SHA-256 of `decides`.
    pub fingerprint: String,
    /// Which shard this is of how many, where it is one.
    pub shard: Option<(usize, usize)>,
    /// Items of the run, or of the shard.
    pub items: usize,
    /// Everything that decides the result of the whole run.
    pub decides: Value,
}

impl Manifest {
    /// The version of this format.
    pub const VERSION: u64 = 1;

    /// A run of `items` items (those of the shard, where it is one).
    pub fn new(decides: Value, shard: Option<(usize, usize)>, items: usize) -> Self {
        Self { schema_version: Self::VERSION, fingerprint: fingerprint(&decides), shard, items, decides }
    }

    /// Reads a run's.
    ///
    /// # Errors
    /// If there is none, or it is damaged or of another version.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(RUN);
        let text = std::fs::read_to_string(&path).map_err(|e| Error::read(&path, e))?;
        let found: Self = serde_json::from_str(&text).map_err(|e| Error::config(&path, e.to_string()))?;
        if found.schema_version != Self::VERSION {
            let (expected, found) = (Self::VERSION, found.schema_version);
            return Err(Error::config(path, format!("schema_version: expected {expected}, found {found}")));
        }
        if found.fingerprint != fingerprint(&found.decides) {
            return Err(Error::config(path, "the fingerprint is not that of its contents"));
        }
        Ok(found)
    }
}

/// SHA-256 of a JSON value, whatever the order of its keys and the last digits of its numbers.
fn fingerprint(value: &Value) -> String {
    fn feed(value: &Value, hash: &mut Sha256) {
        match value {
            Value::Object(fields) => {
                let mut keys: Vec<&String> = fields.keys().collect();
                keys.sort_unstable();
                hash.update(b"{");
                for key in keys {
                    hash.update(Value::from(key.as_str()).to_string());
                    hash.update(b":");
                    feed(&fields[key], hash);
                    hash.update(b",");
                }
                hash.update(b"}");
            }
            Value::Array(values) => {
                hash.update(b"[");
                for value in values {
                    feed(value, hash);
                    hash.update(b",");
                }
                hash.update(b"]");
            }
            // JSON gives some numbers back with another last bit.
            Value::Number(number) if number.is_f64() => {
                hash.update(format!("{:.12e}", number.as_f64().unwrap_or(f64::NAN)));
            }
            other => hash.update(other.to_string()),
        }
    }
    let mut hash = Sha256::new();
    feed(value, &mut hash);
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The paths at which two values differ, with both values.
fn differences(path: &str, expected: &Value, found: &Value, all: &mut Vec<String>) {
    match (expected, found) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
            keys.sort_unstable();
            keys.dedup();
            for key in keys {
                let at = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                differences(&at, a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null), all);
            }
        }
        _ if expected != found => {
            let short = |value: &Value| {
                let text = value.to_string();
                if text.chars().count() > 60 {
                    format!("{}...", text.chars().take(57).collect::<String>())
                } else {
                    text
                }
            };
            all.push(format!("{path} was {}, is {}", short(expected), short(found)));
        }
        _ => {}
    }
}

/// A line of `items.jsonl`: all that is known of an item, enough to compute every figure again.
pub trait Line: Serialize + DeserializeOwned {
    /// The item's place in the data set, before any subset or shard.
    fn index(&self) -> usize;
    /// The item's name.
    fn id(&self) -> &str;
}

impl Line for ItemLine {
    fn index(&self) -> usize {
        self.index
    }

    fn id(&self) -> &str {
        &self.id
    }
}

/// The line of a classification.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ItemLine {
    /// Its place in the data set, before any subset or shard.
    pub index: usize,
    /// Its name.
    pub id: String,
    /// Its class; `None` where it has none.
    pub label: Option<usize>,
    /// Why it could not be scored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The class that each model gives the clean picture, by the defence's name.
    #[serde(default)]
    pub clean: Vec<Prediction>,
    /// What each attack came to, on models that get the clean picture right.
    #[serde(default)]
    pub attacked: Vec<AttackedItem>,
}

/// What a model says of a clean picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// The defence by its name in the run.
    pub defense: String,
    /// The class.
    pub class: usize,
}

/// What a model says of an adversarial picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttackedItem {
    /// The attack's name.
    pub attack: String,
    /// The radius of its ball.
    pub eps: Option<Eps>,
    /// Whose gradients it had.
    #[serde(flatten)]
    pub threat: Threat,
    /// The defence of the model that is scored, by its name in the run.
    pub defense: String,
    /// The class it gives the picture as crafted.
    pub class: usize,
    /// The class it gives the picture rounded to 8 bits.
    pub class_8bit: usize,
    /// Whether the model crafted on is fooled, where that is known.
    pub fooled: Option<bool>,
    /// The attack of AutoAttack's that fooled the model crafted on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken_by: Option<String>,
    /// The largest change of a pixel.
    pub linf: f32,
    /// Whether the gradient was zero where the attack began.
    #[serde(default, skip_serializing_if = "is_false")]
    pub zero_gradient: bool,
    /// Entries of its gradients that were not numbers.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub nan_gradients: u64,
    /// What was noticed of the model crafted on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<Flag>,
}

fn is_false(value: &bool) -> bool {
    !value
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// Begins a run in `folder`, or, with `resume`, goes on with the one that is there; while the file
/// returned lives, no other process can.
///
/// # Errors
/// As [`Run::open`].
pub(crate) fn claim(folder: &Path, manifest: &Manifest, resume: bool) -> Result<File> {
    std::fs::create_dir_all(folder).map_err(|e| Error::write(folder, e))?;
    let lock = folder.join(LOCK);
    let path = folder.join(RUN);
    if !path.exists() {
        let mut entries = std::fs::read_dir(folder).map_err(|e| Error::read(folder, e))?;
        if let Some(other) = entries.find_map(|entry| {
            let name = entry.ok()?.file_name();
            (name != LOCK && name != ITEMS && !name.to_string_lossy().ends_with(".part")).then_some(name)
        }) {
            return Err(Error::config(
                folder,
                format!("expected an empty folder or a run, found `{}`", other.to_string_lossy()),
            ));
        }
    }
    let lock = {
        let file = File::create(&lock).map_err(|e| Error::write(&lock, e))?;
        match file.try_lock() {
            Ok(()) => file,
            Err(TryLockError::WouldBlock) => {
                return Err(Error::config(folder, "another process is working on this run"));
            }
            Err(TryLockError::Error(e)) => return Err(Error::write(&lock, e)),
        }
    };
    if path.exists() {
        let found = Manifest::read(folder)?;
        if !resume {
            return Err(Error::Exists {
                path: folder.to_path_buf(),
                hint: "give --resume to go on with the run that is there, or another --out".into(),
            });
        }
        if (&found.fingerprint, found.shard, found.items)
            != (&manifest.fingerprint, manifest.shard, manifest.items)
        {
            let mut all = Vec::new();
            differences("", &found.decides, &manifest.decides, &mut all);
            if found.shard != manifest.shard {
                let text = |shard: Option<(usize, usize)>| {
                    shard.map_or("none".to_string(), |(i, n)| format!("{i}/{n}"))
                };
                all.push(format!("shard was {}, is {}", text(found.shard), text(manifest.shard)));
            }
            return Err(Error::config(folder, format!("this is another run: {}", all.join("; "))));
        }
    } else {
        write_whole(&path, manifest)?;
    }
    Ok(lock)
}

/// A run's folder, open for writing by this process alone.
///
/// `run.json` says what the run is, `items.jsonl` has a line per item, appended and synced in
/// batches; a process that is killed loses its last batch at most.
#[derive(Debug)]
pub struct Run<L = ItemLine> {
    folder: PathBuf,
    manifest: Manifest,
    items: File,
    done: HashSet<usize>,
    /// Held while this lives.
    _lock: File,
    line: PhantomData<fn() -> L>,
}

impl<L: Line> Run<L> {
    /// Begins a run in `folder`, or, with `resume`, goes on with the one that is there.
    ///
    /// # Errors
    /// If there is a run already and it is not to be resumed, or is another one (the error says
    /// what differs), or another process has it open, or the folder holds other things.
    pub fn open(folder: &Path, manifest: Manifest, resume: bool) -> Result<Self> {
        let lock = claim(folder, &manifest, resume)?;
        let path = folder.join(ITEMS);
        let mut items = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .map_err(|e| Error::write(&path, e))?;
        let done = whole_lines::<L>(&mut items, &path)?;
        Ok(Self { folder: folder.to_path_buf(), manifest, items, done, _lock: lock, line: PhantomData })
    }

    /// What it is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether the item of this index has its line.
    pub fn has(&self, index: usize) -> bool {
        self.done.contains(&index)
    }

    /// How many items have.
    pub fn done(&self) -> usize {
        self.done.len()
    }

    /// Gives the items without a line to `make`, `batch` at a time, and appends what comes back.
    /// `named` are the names of all items of the whole run, of which a shard takes its own.
    ///
    /// # Errors
    /// Those of `make`, or if the lines cannot be written.
    pub fn work<'a>(
        &mut self,
        named: impl Iterator<Item = &'a str>,
        batch: usize,
        mut make: impl FnMut(&[usize], &Self) -> Result<Vec<L>>,
    ) -> Result<()> {
        let shard = self.manifest.shard;
        let own = named.enumerate().filter(|(_, name)| in_shard(shard, name)).map(|(index, _)| index);
        let pending: Vec<usize> = own.filter(|index| !self.has(*index)).collect();
        for part in pending.chunks(batch.max(1)) {
            let lines = make(part, self)?;
            self.append(&lines)?;
        }
        Ok(())
    }

    /// Appends lines and waits until they are on the disk.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn append(&mut self, lines: &[L]) -> Result<()> {
        let path = self.folder.join(ITEMS);
        let mut text = String::new();
        for line in lines {
            text += &serde_json::to_string(line).map_err(|e| Error::config(&path, e.to_string()))?;
            text.push('\n');
        }
        self.append_text(&text)?;
        self.done.extend(lines.iter().map(L::index));
        Ok(())
    }

    fn append_text(&mut self, text: &str) -> Result<()> {
        let path = self.folder.join(ITEMS);
        self.items.write_all(text.as_bytes()).map_err(|e| Error::write(&path, e))?;
        self.items.sync_data().map_err(|e| Error::write(&path, e))
    }

    /// Its lines, one at a time.
    ///
    /// # Errors
    /// If the file cannot be opened; each line if it is damaged.
    pub fn lines(&self) -> Result<impl Iterator<Item = Result<L>> + use<L>> {
        lines(&self.folder)
    }
}

/// The lines of a run's `items.jsonl`, one at a time.
///
/// # Errors
/// If the file cannot be opened; each line if it is damaged.
pub fn lines<L: Line>(folder: &Path) -> Result<impl Iterator<Item = Result<L>> + use<L>> {
    Ok(texts(folder)?.map(|found| Ok(found?.1)))
}

/// The same, each with its text.
fn texts<L: Line>(folder: &Path) -> Result<impl Iterator<Item = Result<(String, L)>> + use<L>> {
    let path = folder.join(ITEMS);
    let file = File::open(&path).map_err(|e| Error::read(&path, e))?;
    Ok(BufReader::new(file).lines().enumerate().map(move |(i, line)| {
        let line = line.map_err(|e| Error::read(&path, e))?;
        let found = parse(&line, i + 1, &path)?;
        Ok((line, found))
    }))
}

fn parse<L: Line>(line: &str, number: usize, path: &Path) -> Result<L> {
    serde_json::from_str(line).map_err(|e| Error::config(path, format!("line {number}: {e}")))
}

/// The indices of the items in the file. A last line that was cut off is dropped, from the file as
/// well.
fn whole_lines<L: Line>(file: &mut File, path: &Path) -> Result<HashSet<usize>> {
    let mut done = HashSet::new();
    let read = |e| Error::read(path, e);
    file.seek(SeekFrom::Start(0)).map_err(read)?;
    let mut reader = BufReader::new(&mut *file);
    let (mut line, mut whole, mut number) = (Vec::new(), 0u64, 0);
    while reader.read_until(b'\n', &mut line).map_err(read)? > 0 {
        number += 1;
        if line.last() != Some(&b'\n') {
            break;
        }
        let text = String::from_utf8_lossy(&line);
        let item: L = parse(text.trim_end(), number, path)?;
        let index = item.index();
        if !done.insert(index) {
            return Err(Error::config(path, format!("line {number}: item {index} a second time")));
        }
        whole += line.len() as u64;
        line.clear();
    }
    file.set_len(whole).map_err(|e| Error::write(path, e))?;
    file.seek(SeekFrom::End(0)).map_err(read)?;
    Ok(done)
}

/// Writes JSON so that a reader finds the whole of it or what was there before.
pub(crate) fn write_whole(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::config(path, e.to_string()))?;
    let beside = path.with_extension("part");
    let fail = |e| Error::write(&beside, e);
    let mut file = File::create(&beside).map_err(fail)?;
    file.write_all(text.as_bytes()).and_then(|()| file.write_all(b"\n")).map_err(fail)?;
    file.sync_data().map_err(fail)?;
    std::fs::rename(&beside, path).map_err(|e| Error::write(path, e))
}

/// How many of these items are in a shard; all where there is none.
pub fn shard_size<'a>(shard: Option<(usize, usize)>, named: impl Iterator<Item = &'a str>) -> usize {
    named.filter(|name| in_shard(shard, name)).count()
}

/// Whether an item of this name is in a shard; all are where there is none.
pub fn in_shard(shard: Option<(usize, usize)>, name: &str) -> bool {
    shard.is_none_or(|(i, n)| key(name) % n.max(1) as u64 + 1 == i as u64)
}

/// Puts the shards of one run together in `out`, in the order of the data set, and says what it
/// holds. Pictures and what else lies beside the shards' lines is linked or copied.
///
/// # Errors
/// If they are not of one run, one is missing, comes twice or is not complete, an item is in two
/// of them, or `out` holds something already.
pub fn merge<L: Line>(shards: &[PathBuf], out: &Path) -> Result<Run<L>> {
    let mut manifests = Vec::new();
    for folder in shards {
        manifests.push((folder, Manifest::read(folder)?));
    }
    let Some((_, first)) = manifests.first() else {
        return Err(Error::argument("runs", "at least one shard", 0));
    };
    let Some((_, of)) = first.shard else {
        return Err(Error::argument("runs", "shards", format!("the whole run `{}`", shards[0].display())));
    };
    let mut seen = vec![None; of];
    for (folder, manifest) in &manifests {
        if manifest.fingerprint != first.fingerprint {
            let mut all = Vec::new();
            differences("", &first.decides, &manifest.decides, &mut all);
            let reason = format!("another run than `{}`: {}", shards[0].display(), all.join("; "));
            return Err(Error::config(*folder, reason));
        }
        match manifest.shard {
            Some((i, n)) if n == of && (1..=of).contains(&i) => {
                if let Some(other) = seen[i - 1].replace(*folder) {
                    let reason = format!("shard {i}/{of} a second time, after `{}`", Path::display(other));
                    return Err(Error::config(*folder, reason));
                }
            }
            other => {
                let found = other.map_or("the whole run".to_string(), |(i, n)| format!("shard {i}/{n}"));
                return Err(Error::config(*folder, format!("expected a shard of {of}, found {found}")));
            }
        }
    }
    if let Some(missing) = seen.iter().position(Option::is_none) {
        return Err(Error::argument(
            "runs",
            format!("all {of} shards"),
            format!("none that is {}/{of}", missing + 1),
        ));
    }
    // The texts are taken over as they are: read and written again, numbers can lose their last bit.
    let mut all: Vec<(String, L)> = Vec::new();
    for (folder, manifest) in &manifests {
        let found = texts(folder)?.collect::<Result<Vec<_>>>()?;
        if found.len() != manifest.items {
            let reason = format!("not complete: {} of {} items", found.len(), manifest.items);
            return Err(Error::config(*folder, reason));
        }
        all.extend(found);
    }
    all.sort_by_key(|(_, line)| line.index());
    if let Some(pair) = all.windows(2).find(|pair| pair[0].1.index() == pair[1].1.index()) {
        return Err(Error::argument(
            "runs",
            "every item once",
            format!("`{}` in two shards", pair[0].1.id()),
        ));
    }
    let expected = first.decides.pointer("/dataset/items").and_then(Value::as_u64);
    if let Some(expected) = expected.filter(|&expected| expected != all.len() as u64) {
        return Err(Error::argument("runs", format!("{expected} items"), all.len()));
    }
    let manifest = Manifest::new(first.decides.clone(), None, all.len());
    let mut run = Run::open(out, manifest, false)?;
    run.append_text(&all.iter().flat_map(|(text, _)| [text.as_str(), "\n"]).collect::<String>())?;
    run.done = all.iter().map(|(_, line)| line.index()).collect();
    for (folder, _) in &manifests {
        for kept in KEPT {
            take_over(&folder.join(kept), &out.join(kept))?;
        }
    }
    Ok(run)
}

/// What lies in a run's folder beside its lines and belongs to the merged run too.
const KEPT: [&str; 3] = ["pictures", "maps", "captions.safetensors"];

/// Puts a file, or all of a folder's, where the merged run has it; a link where the disk allows it.
fn take_over(from: &Path, to: &Path) -> Result<()> {
    if from.is_file() {
        if !to.exists() && std::fs::hard_link(from, to).is_err() {
            std::fs::copy(from, to).map_err(|e| Error::write(to, e))?;
        }
        return Ok(());
    }
    if !from.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(to).map_err(|e| Error::write(to, e))?;
    for entry in std::fs::read_dir(from).map_err(|e| Error::read(from, e))? {
        let name = entry.map_err(|e| Error::read(from, e))?.file_name();
        take_over(&from.join(&name), &to.join(&name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    type Run = super::Run<ItemLine>;

    fn line(index: usize) -> ItemLine {
        let clean = vec![Prediction { defense: "none".into(), class: 1 }];
        ItemLine { index, id: format!("{index}"), label: Some(1), error: None, clean, attacked: Vec::new() }
    }

    fn manifest(seed: u64, shard: Option<(usize, usize)>) -> Manifest {
        Manifest::new(json!({ "seed": seed, "dataset": { "items": 4 } }), shard, 3)
    }

    #[test]
    fn the_fingerprint_does_not_depend_on_the_order_of_keys() {
        let a: Value = serde_json::from_str(r#"{"a": 1, "b": {"c": [1, 2], "d": null}}"#).unwrap();
        let b: Value = serde_json::from_str(r#"{"b": {"d": null, "c": [1, 2]}, "a": 1}"#).unwrap();
        let c: Value = serde_json::from_str(r#"{"b": {"d": null, "c": [2, 1]}, "a": 1}"#).unwrap();
        assert_eq!(fingerprint(&a), fingerprint(&b));
        assert_ne!(fingerprint(&a), fingerprint(&c));
        assert_eq!(fingerprint(&json!({ "x": 0.1 + 0.2 })), fingerprint(&json!({ "x": 0.3 })));
        assert_ne!(fingerprint(&json!({ "x": 0.3 })), fingerprint(&json!({ "x": 0.300001 })));
    }

    #[test]
    fn a_line_that_was_cut_off_is_dropped_and_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = Run::open(folder.path(), manifest(0, None), false).unwrap();
        run.append(&[line(0), line(2)]).unwrap();
        let whole = std::fs::read(folder.path().join(ITEMS)).unwrap();
        drop(run);
        for cut in 0..whole.len() {
            std::fs::write(folder.path().join(ITEMS), &whole[..cut]).unwrap();
            let mut run = Run::open(folder.path(), manifest(0, None), true).unwrap();
            let missing: Vec<ItemLine> = [0, 2].into_iter().filter(|&i| !run.has(i)).map(line).collect();
            assert!(!missing.is_empty());
            run.append(&missing).unwrap();
            assert_eq!(std::fs::read(folder.path().join(ITEMS)).unwrap(), whole, "{cut}");
        }
    }

    #[test]
    fn only_the_same_run_is_resumed_and_by_one_process() {
        let folder = tempfile::tempdir().unwrap();
        let run = Run::open(folder.path(), manifest(0, None), false).unwrap();
        let error = Run::open(folder.path(), manifest(0, None), true).unwrap_err().to_string();
        assert!(error.ends_with("another process is working on this run"), "{error}");
        drop(run);
        assert!(matches!(Run::open(folder.path(), manifest(0, None), false), Err(Error::Exists { .. })));
        let error = Run::open(folder.path(), manifest(1, None), true).unwrap_err().to_string();
        assert!(error.ends_with("this is another run: seed was 0, is 1"), "{error}");
        let error = Run::open(folder.path(), manifest(0, Some((1, 2))), true).unwrap_err().to_string();
        assert!(error.ends_with("this is another run: shard was none, is 1/2"), "{error}");
        Run::open(folder.path(), manifest(0, None), true).unwrap();
        // A folder of other things is left alone.
        let other = tempfile::tempdir().unwrap();
        std::fs::write(other.path().join("thesis.tex"), "x").unwrap();
        let error = Run::open(other.path(), manifest(0, None), true).unwrap_err().to_string();
        assert!(error.ends_with("expected an empty folder or a run, found `thesis.tex`"), "{error}");
    }

    #[test]
    fn merge_refuses_gaps_overlaps_and_other_runs() {
        let folder = tempfile::tempdir().unwrap();
        let shard = |name: &str, seed: u64, shard: (usize, usize), items: &[usize], of: usize| {
            let path = folder.path().join(name);
            let manifest = Manifest { items: of, ..manifest(seed, Some(shard)) };
            let mut run = Run::open(&path, manifest, false).unwrap();
            run.append(&items.iter().map(|&i| line(i)).collect::<Vec<_>>()).unwrap();
            path
        };
        let one = shard("one", 0, (1, 2), &[0, 3], 2);
        let two = shard("two", 0, (2, 2), &[1, 2], 2);
        let out = folder.path().join("out");
        let refused = |runs: &[&PathBuf], end: &str| {
            let runs: Vec<PathBuf> = runs.iter().map(|path| path.to_path_buf()).collect();
            let error = merge::<ItemLine>(&runs, &folder.path().join("never")).unwrap_err().to_string();
            assert!(error.contains(end), "{error}");
        };
        refused(&[&one], "expected all 2 shards, found none that is 2/2");
        refused(&[&one, &two, &two], "shard 2/2 a second time");
        refused(&[&one, &shard("seed", 1, (2, 2), &[1], 1)], "seed was 0, is 1");
        refused(&[&one, &shard("three", 0, (2, 3), &[1], 1)], "expected a shard of 2, found shard 2/3");
        refused(&[&one, &shard("less", 0, (2, 2), &[1], 2)], "not complete: 1 of 2 items");
        refused(&[&one, &shard("twice", 0, (2, 2), &[3], 1)], "`3` in two shards");
        refused(&[&one, &shard("none", 0, (2, 2), &[], 0)], "expected 4 items, found 2");
        let run = merge::<ItemLine>(&[two, one], &out).unwrap();
        let found: Vec<usize> = run.lines().unwrap().map(|line| line.unwrap().index).collect();
        assert_eq!(found, [0, 1, 2, 3]);
        assert_eq!((run.manifest().items, run.manifest().shard), (4, None));
        refused(&[&out], "expected shards, found the whole run");
    }
}
