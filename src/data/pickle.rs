//! CIFAR's Python batches: pickles, read without executing anything.
//!
//! Of the functions a pickle may name only those are taken that numpy itself puts into one to
//! rebuild an array of bytes; a batch that names another is refused.
//!
//! The arrays: numpy's `ndarray.__reduce__`.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use crate::pickle::{Object, Pickle, Step, Text, Value};
use crate::{Error, Result};

/// A batch of CIFAR.
pub(super) struct Batch {
    /// Whether it has CIFAR-100's fine labels.
    pub fine: bool,
    pub labels: Vec<usize>,
    /// Where the pixels start in the file.
    pub start: u64,
    /// Of the array of pixels.
    pub shape: Vec<u64>,
}

/// Reads a batch's labels and where its pixels lie.
pub(super) fn batch(path: &Path) -> Result<Batch> {
    let pickle = read(path)?;
    let get = |key: &str| pickle.entry(pickle.root, key);
    let (fine, labels) = match (get("fine_labels"), get("labels")) {
        (Some(fine), _) => (true, fine),
        (None, Some(labels)) => (false, labels),
        (None, None) => return Err(Error::data(path, "has neither `labels` nor `fine_labels`")),
    };
    let Value::List(labels) = &pickle.values[labels] else {
        return Err(Error::data(path, "its labels are no list"));
    };
    let number = |at: &usize| match pickle.values[*at] {
        // Out of range either way, and told of as such.
        Value::Int(label) => Ok(usize::try_from(label).unwrap_or(usize::MAX)),
        _ => Err(Error::data(path, "one of its labels is no number")),
    };
    let labels = labels.iter().map(number).collect::<Result<Vec<_>>>()?;
    let data = get("data").and_then(|at| array(&pickle, at).transpose()).transpose();
    match data.map_err(|reason| damaged(path, &reason))? {
        Some((start, shape)) => Ok(Batch { fine, labels, start, shape }),
        None => Err(Error::data(path, "its `data` is no array of bytes")),
    }
}

/// Reads the class names of `batches.meta` or `meta`.
pub(super) fn label_names(path: &Path) -> Result<Vec<String>> {
    let pickle = read(path)?;
    let get = |key: &str| pickle.entry(pickle.root, key).map(|at| &pickle.values[at]);
    let Some(Value::List(names)) = get("fine_label_names").or_else(|| get("label_names")) else {
        return Err(Error::data(path, "has no list `label_names` or `fine_label_names`"));
    };
    let text = |at: &usize| match pickle.text(*at) {
        Some(text) => Ok(text.to_string()),
        None => Err(Error::data(path, "one of its class names is no text")),
    };
    names.iter().map(text).collect()
}

fn damaged(path: &Path, reason: &str) -> Error {
    Error::data(path, format!("as a pickle: {reason}"))
}

/// Reads a pickle that ends with a dictionary and names nothing but numpy's functions.
fn read(path: &Path) -> Result<Pickle> {
    let failed = |e| Error::read(path, e);
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let (pickle, _) =
        Pickle::read(&mut BufReader::new(file), 0, length).map_err(|reason| damaged(path, &reason))?;
    for value in &pickle.values {
        if let Value::Global { module, name } = value
            && function(module, name).is_none()
        {
            return Err(damaged(path, &format!("it asks for `{module}.{name}`, which is refused")));
        }
    }
    match pickle.values[pickle.root] {
        Value::Dict(_) => Ok(pickle),
        _ => Err(damaged(path, "expected a dictionary")),
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Function {
    Reconstruct,
    FromBuffer,
    DataType,
    /// The class of arrays, an argument of the first.
    Ndarray,
}

fn function(module: &str, name: &str) -> Option<Function> {
    match (module, name) {
        ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => Some(Function::Reconstruct),
        ("numpy.core.numeric" | "numpy._core.numeric", "_frombuffer") => Some(Function::FromBuffer),
        ("numpy", "dtype") => Some(Function::DataType),
        ("numpy", "ndarray") => Some(Function::Ndarray),
        _ => None,
    }
}

/// The function called for this value, and the object that stands for the call.
fn call(pickle: &Pickle, at: usize) -> Option<(Function, &Object)> {
    let Value::Object(object) = &pickle.values[at] else { return None };
    let (module, name) = pickle.global(object.called)?;
    Some((function(module, name)?, object))
}

/// Where an array of bytes lies in the file, and its shape; `None` of what is no array.
fn array(pickle: &Pickle, at: usize) -> Step<Option<(u64, Vec<u64>)>> {
    let (buffer, kind, shape, rows) = match call(pickle, at) {
        Some((Function::Reconstruct, Object { state: Some(state), .. })) => {
            let &[_, shape, kind, columns, buffer] = pickle.tuple(*state) else {
                return Err("an array's state is not numpy's".into());
            };
            let rows = matches!(pickle.values[columns], Value::Bool(false) | Value::Int(0));
            (buffer, kind, shape, rows)
        }
        Some((Function::FromBuffer, object)) => {
            let &[buffer, kind, shape, order] = pickle.tuple(object.arguments) else {
                return Err("an array's arguments are not numpy's".into());
            };
            (buffer, kind, shape, pickle.text(order) == Some("C"))
        }
        _ => return Ok(None),
    };
    let kind = match call(pickle, kind) {
        Some((Function::DataType, object)) => {
            pickle.tuple(object.arguments).first().and_then(|name| pickle.text(*name))
        }
        _ => None,
    };
    match kind {
        Some("u1" | "|u1" | "uint8") => {}
        Some(other) => return Err(format!("an array is of type `{other}`, expected bytes")),
        None => return Err("an array is not of bytes".into()),
    }
    if !rows {
        return Err("an array is stored by columns".into());
    }
    let size = |at: &usize| match pickle.values[*at] {
        Value::Int(size) => u64::try_from(size).map_err(|_| "an array's shape is negative".to_string()),
        _ => Err("an array's shape is not of numbers".into()),
    };
    let shape = match &pickle.values[shape] {
        Value::Tuple(sizes) => sizes.iter().map(size).collect::<Step<Vec<u64>>>()?,
        _ => return Err("an array's shape is no tuple".into()),
    };
    let all = shape.iter().try_fold(1u64, |all, size| all.checked_mul(*size));
    match &pickle.values[buffer] {
        Value::Text(Text { start: Some(start), length, .. }) if Some(*length) == all => {
            Ok(Some((*start, shape)))
        }
        Value::Text(Text { start: Some(_), length, .. }) => {
            Err(format!("an array of shape {shape:?} has {length} bytes"))
        }
        _ => Err("an array's bytes are stored as text; save it with protocol 3 or later".into()),
    }
}
