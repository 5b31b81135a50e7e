//! PyTorch's checkpoint files (`torch.save`: `.pt`, `.pth`, `.pth.tar`, `.bin`), read without
//! executing anything.
//!
//! Such a file is a pickle of dictionaries, in which each tensor is a call of `torch._utils`'
//! rebuilding functions on a storage beside it. Those calls are understood, not made; a training
//! checkpoint's other entries (optimizer classes, argument namespaces) stay opaque and do not
//! matter unless one stands where a tensor is asked for. Tensors of nested dictionaries go by their
//! keys joined with dots: `vision_encoder_state_dict.conv1.weight`.
//!
//! The formats: PyTorch's `torch/serialization.py`, the zip since 1.6 and the one before it, and
//! `torch/_utils.py`. candle's reader (`candle_core::pickle` 0.10.2) executes nothing either, but it
//! knows one level of dictionaries, contiguous tensors and only the instructions that a plain state
//! dict has, copies a value each time it is referred to, and panics on calls with too few arguments.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use zip::{CompressionMethod, ZipArchive};

use crate::pickle::{Object, Pickle, Step, Value};
use crate::{Error, Result};

/// What a file of the older format begins with: a pickle of the number 0x1950a86a20f9469cfc6c.
const LEGACY: [u8; 15] =
    [0x80, 2, 0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.'];
const ZIP: [u8; 4] = *b"PK\x03\x04";
/// How deep dictionaries may lie in each other, and parameters; training checkpoints have three
/// levels.
const MAX_DEPTH: usize = 8;
/// The most entries of a file; the largest CLIP's checkpoint with its optimizer's state has 4,000.
const MAX_ENTRIES: usize = 1 << 16;
/// The longest key that is looked at.
const MAX_KEY: usize = 256;

/// A checkpoint file of PyTorch's.
pub(super) struct TorchFile {
    path: PathBuf,
    entries: HashMap<String, Entry>,
}

/// What a name in the file stands for.
enum Entry {
    Stored(Stored),
    /// Something that is no tensor, or one of a kind that is not read: in the words of an error.
    Other(String),
}

/// Where a tensor's entries lie.
struct Stored {
    dtype: DType,
    shape: Vec<usize>,
    /// In entries.
    strides: Vec<u64>,
    /// Of its first entry and the one after its last, in bytes of the file.
    span: (u64, u64),
}

/// A storage: where it lies in the file, in bytes.
type Storages = HashMap<String, (u64, u64)>;

impl TorchFile {
    /// Whether a file begins as one of PyTorch's.
    pub fn is_one(path: &Path) -> bool {
        let mut start = Vec::new();
        let read = File::open(path).and_then(|file| file.take(LEGACY.len() as u64).read_to_end(&mut start));
        read.is_ok() && (start.starts_with(&ZIP) || start == LEGACY)
    }

    /// Reads what tensors there are and where they lie.
    ///
    /// # Errors
    /// [`Error::Config`] if it is no checkpoint, is damaged, or is a TorchScript archive.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |e| Error::read(path, e);
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let entries = read(BufReader::new(file), length).map_err(|reason| Error::config(path, reason))?;
        Ok(Self { path: path.to_path_buf(), entries })
    }

    /// The names of all entries, of tensors and of others.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.entries.keys()
    }

    /// The shape of a tensor; `None` of what is none.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        match self.entries.get(name) {
            Some(Entry::Stored(stored)) => Some(&stored.shape),
            _ => None,
        }
    }

    /// Reads a tensor, contiguous, in the dtype it is stored in; `None` if there is no such entry.
    ///
    /// # Errors
    /// If the entry is no tensor of floating-point numbers, or the file cannot be read.
    pub fn get(&self, name: &str, device: &Device) -> Result<Option<Tensor>> {
        let stored = match self.entries.get(name) {
            None => return Ok(None),
            Some(Entry::Stored(stored)) => stored,
            Some(Entry::Other(what)) => {
                return Err(Error::config(
                    &self.path,
                    format!("weight `{name}` is {what}, expected a tensor of F32, F16 or BF16"),
                ));
            }
        };
        let (start, end) = stored.span;
        // Checked against the file's length as it was opened.
        let mut bytes = Vec::new();
        let read = File::open(&self.path).and_then(|mut file| {
            file.seek(SeekFrom::Start(start))?;
            bytes.reserve_exact((end - start) as usize);
            file.take(end - start).read_to_end(&mut bytes)
        });
        read.map_err(|e| Error::read(&self.path, e))?;
        if bytes.len() as u64 != end - start {
            return Err(Error::config(&self.path, format!("ends within weight `{name}`")));
        }
        let bytes = stored.gather(bytes);
        Ok(Some(Tensor::from_raw_buffer(&bytes, stored.dtype, &stored.shape, device)?))
    }
}

impl Stored {
    /// The tensor's bytes by rows, from those of its span.
    fn gather(&self, span: Vec<u8>) -> Vec<u8> {
        let size = self.dtype.size_in_bytes();
        let count: usize = self.shape.iter().product();
        if count == 0 {
            return Vec::new();
        }
        if count * size == span.len() && self.strides == contiguous(&self.shape) {
            return span;
        }
        let mut bytes = Vec::with_capacity(count * size);
        let mut index = vec![0usize; self.shape.len()];
        for _ in 0..count {
            let at: u64 = index.iter().zip(&self.strides).map(|(i, stride)| *i as u64 * stride).sum();
            let at = at as usize * size;
            bytes.extend_from_slice(&span[at..at + size]);
            for (i, side) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < *side {
                    break;
                }
                *i = 0;
            }
        }
        bytes
    }
}

fn contiguous(shape: &[usize]) -> Vec<u64> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i] as u64;
    }
    strides
}

fn read(mut file: BufReader<File>, length: u64) -> Step<HashMap<String, Entry>> {
    let mut start = Vec::new();
    file.by_ref().take(LEGACY.len() as u64).read_to_end(&mut start).map_err(|e| e.to_string())?;
    let (pickle, storages) = if start.starts_with(&ZIP) {
        zipped(file, length)?
    } else if start == LEGACY {
        legacy(file, length)?
    } else {
        return Err("is neither a safetensors file nor a PyTorch checkpoint".into());
    };
    entries(&pickle, &storages, length)
}

fn as_pickle(reason: String) -> String {
    format!("as a pickle: {reason}")
}

/// The format since PyTorch 1.6: a zip of stored entries, in one folder.
fn zipped(file: BufReader<File>, length: u64) -> Step<(Pickle, Storages)> {
    let damaged = |e: zip::result::ZipError| format!("is not a complete PyTorch checkpoint: {e}");
    let mut zip = ZipArchive::new(file).map_err(damaged)?;
    if zip.file_names().any(|name| name.ends_with("/constants.pkl")) {
        return Err(
            "is a TorchScript archive, expected a state dict: `torch.jit.load` it and save its `state_dict()`"
                .into(),
        );
    }
    let mut places: HashMap<String, (u64, u64)> = HashMap::new();
    for i in 0..zip.len() {
        let entry = zip.by_index_raw(i).map_err(damaged)?;
        let (name, size) = (entry.name().to_string(), entry.size());
        if entry.encrypted() || entry.compression() != CompressionMethod::Stored {
            return Err(format!("its entry `{}` is compressed, which PyTorch's are not", brief(&name)));
        }
        let start = entry.data_start().ok_or_else(|| format!("its entry `{}` has no place", brief(&name)))?;
        match start.checked_add(size).filter(|end| *end <= length) {
            Some(end) => places.insert(name, (start, end)),
            None => return Err(format!("ends within its entry `{}`", brief(&name))),
        };
    }
    let mut pickles = places.keys().filter_map(|name| name.strip_suffix("data.pkl"));
    let Some(folder) = pickles.next().map(ToString::to_string) else {
        return Err("is a zip without `data.pkl`: not a PyTorch checkpoint".into());
    };
    if pickles.next().is_some() {
        return Err("has more than one `data.pkl`".into());
    }
    let mut file = zip.into_inner();
    if let Some(&(start, end)) = places.get(&format!("{folder}byteorder")) {
        let mut order = Vec::new();
        file.seek(SeekFrom::Start(start)).map_err(|e| e.to_string())?;
        file.by_ref().take((end - start).min(16)).read_to_end(&mut order).map_err(|e| e.to_string())?;
        if order != b"little" {
            let order = String::from_utf8_lossy(&order).into_owned();
            return Err(format!("its numbers are `{order}` endian, expected little"));
        }
    }
    let (start, end) = places[&format!("{folder}data.pkl")];
    let (pickle, _) = Pickle::read(&mut file, start, end).map_err(as_pickle)?;
    let below = format!("{folder}data/");
    let storages = places.into_iter();
    let storages = storages.filter_map(|(name, place)| Some((name.strip_prefix(&below)?.to_string(), place)));
    Ok((pickle, storages.collect()))
}

/// The format before: pickles of a number that marks it, of a version, of the system, of the object
/// and of the storages' keys, then each storage after the number of its entries.
fn legacy(mut file: BufReader<File>, length: u64) -> Step<(Pickle, Storages)> {
    let mut at = LEGACY.len() as u64;
    let mut next = |file: &mut BufReader<File>| -> Step<Pickle> {
        let (pickle, end) = Pickle::read(file, at, length).map_err(as_pickle)?;
        at = end;
        Ok(pickle)
    };
    let version = next(&mut file)?;
    if !matches!(version.values[version.root], Value::Int(1001)) {
        return Err("is of an unknown version of PyTorch's older format".into());
    }
    let system = next(&mut file)?;
    let little = system.entry(system.root, "little_endian").map(|at| &system.values[at]);
    if !matches!(little, Some(Value::Bool(true))) {
        return Err("its numbers are not said to be little endian".into());
    }
    let object = next(&mut file)?;
    let keys = next(&mut file)?;
    let mut sizes = HashMap::new();
    for value in &object.values {
        if let Value::Stored(name) = value
            && let Some(storage) = Storage::of(&object, *name)
        {
            sizes.insert(storage.key.to_string(), storage.kind);
        }
    }
    let Value::List(list) = &keys.values[keys.root] else {
        return Err("its list of storages is no list".into());
    };
    let mut storages = Storages::new();
    for key in list {
        let key = keys.text(*key).ok_or("a storage's key is no text")?;
        let kind =
            sizes.get(key).ok_or_else(|| format!("its storage `{}` belongs to nothing", brief(key)))?;
        let size =
            entry_size(kind).ok_or_else(|| format!("its storage `{}` is a `{}`", brief(key), brief(kind)))?;
        let ends = || format!("ends within its storage `{}`", brief(key));
        let mut count = [0; 8];
        file.seek(SeekFrom::Start(at)).map_err(|e| e.to_string())?;
        file.read_exact(&mut count).map_err(|_| ends())?;
        let start = at + 8;
        let bytes = u64::try_from(i64::from_le_bytes(count)).ok().and_then(|count| count.checked_mul(size));
        let end = bytes.and_then(|bytes| start.checked_add(bytes)).filter(|end| *end <= length);
        at = end.ok_or_else(ends)?;
        storages.insert(key.to_string(), (start, at));
    }
    Ok((object, storages))
}

/// Bytes per entry of the storages of older PyTorch's.
fn entry_size(kind: &str) -> Option<u64> {
    Some(match kind {
        "ByteStorage" | "CharStorage" | "BoolStorage" => 1,
        "HalfStorage" | "BFloat16Storage" | "ShortStorage" => 2,
        "FloatStorage" | "IntStorage" => 4,
        "DoubleStorage" | "LongStorage" | "ComplexFloatStorage" => 8,
        "ComplexDoubleStorage" => 16,
        _ => return None,
    })
}

/// A storage as the pickle names it.
struct Storage<'p> {
    /// `FloatStorage` and so on.
    kind: &'p str,
    key: &'p str,
    /// How many entries it is said to have.
    count: u64,
}

impl<'p> Storage<'p> {
    fn of(pickle: &'p Pickle, name: usize) -> Option<Self> {
        let &[marker, kind, key, _, count, ref rest @ ..] = pickle.tuple(name) else { return None };
        // The older format may add that it is a part of another.
        let whole = rest.iter().all(|at| matches!(pickle.values[*at], Value::Other));
        let Value::Int(count) = pickle.values[count] else { return None };
        let (module, kind) = pickle.global(kind)?;
        let known = pickle.text(marker) == Some("storage") && module == "torch" && whole;
        Some(Self { kind, key: pickle.text(key)?, count: u64::try_from(count).ok()? }).filter(|_| known)
    }
}

/// Every entry of the dictionaries the pickle ends with, by its keys joined with dots.
fn entries(pickle: &Pickle, storages: &Storages, length: u64) -> Step<HashMap<String, Entry>> {
    if !matches!(pickle.values[pickle.root], Value::Dict(_)) {
        let what = described(pickle, pickle.root);
        return Err(format!("expected a dictionary of tensors, found {what}"));
    }
    let mut found = HashMap::new();
    let mut dictionaries = vec![(String::new(), pickle.root, 0)];
    let mut seen = 0;
    while let Some((prefix, at, depth)) = dictionaries.pop() {
        let Value::Dict(entries) = &pickle.values[at] else { continue };
        seen += entries.len();
        if seen > MAX_ENTRIES {
            return Err(format!("holds more than {MAX_ENTRIES} entries"));
        }
        for &(key, value) in entries {
            let key = match &pickle.values[key] {
                Value::Int(key) => key.to_string(),
                _ => match pickle.text(key) {
                    Some(key) if key.len() <= MAX_KEY => key.to_string(),
                    _ => continue,
                },
            };
            let name = format!("{prefix}{key}");
            match &pickle.values[value] {
                Value::Dict(_) if depth < MAX_DEPTH => {
                    dictionaries.push((format!("{name}."), value, depth + 1))
                }
                Value::Object(_) => {
                    let entry = tensor(pickle, value, storages, length);
                    let entry = entry.map_err(|reason| format!("tensor `{}`: {reason}", brief(&name)))?;
                    found.insert(name, entry);
                }
                _ => {
                    let what = described(pickle, value);
                    found.insert(name, Entry::Other(what));
                }
            }
        }
    }
    Ok(found)
}

/// Text out of a file as messages show it: on one line and not endless.
fn brief(text: &str) -> String {
    text.chars().take(100).flat_map(char::escape_debug).collect()
}

/// A value in the words of an error.
fn described(pickle: &Pickle, at: usize) -> String {
    let named = |at| pickle.global(at).map(|(module, name)| brief(&format!("{module}.{name}")));
    match &pickle.values[at] {
        Value::Object(Object { called, .. }) => match named(*called) {
            Some(name) => format!("what `{name}` would return, which is not called"),
            None => "what an unknown call would return".into(),
        },
        Value::Global { .. } => format!("the name `{}`", named(at).unwrap_or_default()),
        Value::Dict(_) => "a dictionary".into(),
        Value::List(_) | Value::Tuple(_) => "a list".into(),
        Value::Text(_) => "a text".into(),
        Value::Bool(_) | Value::Int(_) | Value::Other => "a number, or none".into(),
        Value::Stored(_) => "a storage without a shape".into(),
    }
}

/// The tensor that a call would rebuild.
///
/// # Errors
/// If the call is PyTorch's for a tensor, but its arguments are not, or do not fit its storage.
fn tensor(pickle: &Pickle, at: usize, storages: &Storages, length: u64) -> Step<Entry> {
    let other = || Ok(Entry::Other(described(pickle, at)));
    let Value::Object(object) = &pickle.values[at] else { return other() };
    let (mut called, mut arguments) = (object.called, object.arguments);
    let mut wraps = 0;
    let arguments = loop {
        wraps += 1;
        if wraps > MAX_DEPTH {
            return Err(format!("is wrapped more than {MAX_DEPTH} times"));
        }
        let given = pickle.tuple(arguments);
        match (pickle.global(called), given) {
            (Some(("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor")), _) => break given,
            // The tensor is the first argument.
            (
                Some(("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state")),
                &[inner, ..],
            ) => {
                let Value::Object(inner) = &pickle.values[inner] else { return other() };
                (called, arguments) = (inner.called, inner.arguments);
            }
            // A subclass: what rebuilds the tensor, its type, and the arguments.
            (Some(("torch._tensor", "_rebuild_from_type_v2")), &[inner, _, given, ..]) => {
                (called, arguments) = (inner, given);
            }
            _ => return other(),
        }
    };
    let &[storage, offset, shape, strides, ..] = arguments else {
        return Err(format!("has {} arguments, expected at least 4", arguments.len()));
    };
    let Value::Stored(name) = pickle.values[storage] else {
        return Err(format!("its storage is {}", described(pickle, storage)));
    };
    let storage = Storage::of(pickle, name).ok_or("its storage is not named as PyTorch does")?;
    let dtype = match storage.kind {
        "FloatStorage" => DType::F32,
        "DoubleStorage" => DType::F64,
        "HalfStorage" => DType::F16,
        "BFloat16Storage" => DType::BF16,
        kind => return Ok(Entry::Other(format!("a tensor in a `{}`", brief(kind)))),
    };
    let number = |at: usize| match pickle.values[at] {
        Value::Int(number) => u64::try_from(number).ok(),
        _ => None,
    };
    let numbers = |at: usize, what: &str| -> Step<Vec<u64>> {
        let wrong = || format!("its {what} is not of whole numbers from zero");
        match &pickle.values[at] {
            Value::Tuple(items) => {
                items.iter().map(|at| number(*at)).collect::<Option<_>>().ok_or_else(wrong)
            }
            _ => Err(wrong()),
        }
    };
    let offset = number(offset).ok_or("its offset is not a whole number from zero")?;
    let (shape, strides) = (numbers(shape, "shape")?, numbers(strides, "stride")?);
    if shape.len() != strides.len() || shape.len() > 8 {
        return Err(format!("has {} sides and {} strides", shape.len(), strides.len()));
    }
    let key = storage.key;
    let &(start, end) =
        storages.get(key).ok_or_else(|| format!("its storage `{}` is missing", brief(key)))?;
    let size = dtype.size_in_bytes() as u64;
    let room = ((end - start) / size).min(storage.count);
    // The entry after the last one it has in its storage.
    let reach = if shape.contains(&0) {
        Some(offset)
    } else {
        let sides = shape.iter().zip(&strides);
        let last = sides.map(|(side, stride)| (side - 1).checked_mul(*stride));
        last.chain([Some(offset)]).try_fold(1u64, |sum, part| sum.checked_add(part?))
    };
    let reach = reach.filter(|reach| *reach <= room).ok_or_else(|| {
        let key = brief(key);
        format!("of shape {shape:?} from entry {offset} is not within its storage `{key}` of {room} entries")
    })?;
    // An expanded tensor takes more memory than it has in the file.
    let bytes = shape.iter().try_fold(size, |all, side| all.checked_mul(*side));
    if bytes.is_none_or(|bytes| bytes > length) {
        return Err(format!("of shape {shape:?} is larger than the file"));
    }
    let shape: Option<Vec<usize>> = shape.into_iter().map(|side| usize::try_from(side).ok()).collect();
    let shape = shape.ok_or("has a side beyond this machine's numbers")?;
    Ok(Entry::Stored(Stored { dtype, shape, strides, span: (start + offset * size, start + reach * size) }))
}
