//! CIFAR's Python batches: pickles, read without executing anything.
//!
//! A pickle is a program for a stack machine. This reads the part of its instructions that numbers,
//! texts, lists, dictionaries and numpy's arrays of bytes are made of, and knows no function but
//! those that numpy itself puts into a pickle to rebuild an array. Large texts are not read: where
//! they lie in the file is enough.
//!
//! The format: Python's `pickletools`; the arrays: numpy's `ndarray.__reduce__`.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use crate::{Error, Result};

/// The longest text that is read, file names among them.
const MAX_TEXT: u64 = 4096;
/// The most values a pickle may hold; CIFAR's largest has 100,000.
const MAX_VALUES: usize = 1 << 22;

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
    let pickle = Pickle::read(path)?;
    let (fine, labels) = match (pickle.get("fine_labels"), pickle.get("labels")) {
        (Some(fine), _) => (true, fine),
        (None, Some(labels)) => (false, labels),
        (None, None) => return Err(Error::data(path, "has neither `labels` nor `fine_labels`")),
    };
    let Value::List(labels) = labels else {
        return Err(Error::data(path, "its labels are no list"));
    };
    let number = |at: &usize| match pickle.values[*at] {
        // Out of range either way, and told of as such.
        Value::Int(label) => Ok(usize::try_from(label).unwrap_or(usize::MAX)),
        _ => Err(Error::data(path, "one of its labels is no number")),
    };
    let labels = labels.iter().map(number).collect::<Result<Vec<_>>>()?;
    match pickle.get("data") {
        Some(Value::Array(Some(Array { start, shape }))) => {
            Ok(Batch { fine, labels, start: *start, shape: shape.clone() })
        }
        _ => Err(Error::data(path, "its `data` is no array of bytes")),
    }
}

/// Reads the class names of `batches.meta` or `meta`.
pub(super) fn label_names(path: &Path) -> Result<Vec<String>> {
    let pickle = Pickle::read(path)?;
    let names = pickle.get("fine_label_names").or_else(|| pickle.get("label_names"));
    let Some(Value::List(names)) = names else {
        return Err(Error::data(path, "has no list `label_names` or `fine_label_names`"));
    };
    let text = |at: &usize| match &pickle.values[*at] {
        Value::Text(Text { content: Some(text), .. }) => Ok(text.clone()),
        _ => Err(Error::data(path, "one of its class names is no text")),
    };
    names.iter().map(text).collect()
}

/// Indices are into [`Pickle::values`].
#[derive(Debug, Clone)]
enum Value {
    Int(i64),
    Text(Text),
    List(Vec<usize>),
    Tuple(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    Function(Function),
    /// numpy's type of bytes.
    ByteType,
    Array(Option<Array>),
    /// What need not be known: `None`, a fraction.
    Other,
}

/// Bytes or text.
#[derive(Debug, Clone)]
struct Text {
    /// Where it lies in the file, if it lies there as it is.
    start: Option<u64>,
    length: u64,
    /// What it says, unless it is long or not UTF-8.
    content: Option<String>,
}

#[derive(Debug, Clone)]
struct Array {
    start: u64,
    shape: Vec<u64>,
}

#[derive(Debug, Clone, Copy)]
enum Function {
    Reconstruct,
    FromBuffer,
    DataType,
    /// The class of arrays, an argument of the first.
    Ndarray,
}

struct Pickle {
    values: Vec<Value>,
    /// The dictionary it ends with.
    root: Vec<(usize, usize)>,
}

impl Pickle {
    fn read(path: &Path) -> Result<Self> {
        let failed = |e| Error::read(path, e);
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut machine = Machine {
            file: BufReader::new(file),
            at: 0,
            length,
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        let root = machine.run().map_err(|reason| Error::data(path, format!("as a pickle: {reason}")))?;
        match machine.values[root].clone() {
            Value::Dict(root) => Ok(Self { values: machine.values, root }),
            _ => Err(Error::data(path, "as a pickle: expected a dictionary")),
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        let called = |at: usize| match &self.values[at] {
            Value::Text(Text { content, .. }) => content.as_deref() == Some(key),
            _ => false,
        };
        self.root.iter().rev().find(|(at, _)| called(*at)).map(|(_, value)| &self.values[*value])
    }
}

type Step<T> = std::result::Result<T, String>;

struct Machine {
    file: BufReader<File>,
    /// How much of the file was read.
    at: u64,
    length: u64,
    values: Vec<Value>,
    stack: Vec<usize>,
    /// How long the stack was at each mark.
    marks: Vec<usize>,
    memo: HashMap<u64, usize>,
}

impl Machine {
    /// Runs to the end; returns the value there.
    fn run(&mut self) -> Step<usize> {
        loop {
            let instruction = self.number(1)? as u8;
            match instruction {
                b'.' => return self.pop(),
                0x80 => {
                    let protocol = self.number(1)?;
                    if protocol > 5 {
                        return Err(format!("protocol {protocol} is not known"));
                    }
                }
                // A frame's length.
                0x95 => {
                    self.number(8)?;
                }
                b'(' => self.marks.push(self.stack.len()),
                b'0' => {
                    self.pop()?;
                }
                b'1' => {
                    self.since_mark()?;
                }
                b'2' => {
                    let top = self.top()?;
                    self.stack.push(top);
                }
                // A buffer made read-only.
                0x98 => {}
                b'N' => self.push(Value::Other)?,
                0x88 => self.push(Value::Int(1))?,
                0x89 => self.push(Value::Int(0))?,
                b'K' => self.int(1)?,
                b'M' => self.int(2)?,
                b'J' => {
                    let value = self.number(4)? as u32 as i32;
                    self.push(Value::Int(value.into()))?;
                }
                0x8a => self.long()?,
                b'I' | b'L' => {
                    let line = self.line()?;
                    let digits = line.trim_end_matches('L');
                    let value = digits.parse().map_err(|_| format!("`{line}` is no number"))?;
                    self.push(Value::Int(value))?;
                }
                b'G' => {
                    self.number(8)?;
                    self.push(Value::Other)?;
                }
                b'F' => {
                    self.line()?;
                    self.push(Value::Other)?;
                }
                b'U' | b'C' | 0x8c => self.text(1)?,
                b'T' | b'B' | b'X' => self.text(4)?,
                0x8d | 0x8e | 0x96 => self.text(8)?,
                b'S' => self.quoted()?,
                b'V' => {
                    let line = self.line()?;
                    self.unescaped(line)?;
                }
                b'}' => self.push(Value::Dict(Vec::new()))?,
                b']' => self.push(Value::List(Vec::new()))?,
                b')' => self.push(Value::Tuple(Vec::new()))?,
                b'd' => {
                    let pairs = pairs(&self.since_mark()?)?;
                    self.push(Value::Dict(pairs))?;
                }
                b'l' => {
                    let items = self.since_mark()?;
                    self.push(Value::List(items))?;
                }
                b't' => {
                    let items = self.since_mark()?;
                    self.push(Value::Tuple(items))?;
                }
                0x85..=0x87 => {
                    let count = usize::from(instruction - 0x84);
                    let from = self.stack.len().checked_sub(count).ok_or("its stack is empty")?;
                    let items = self.stack.split_off(from);
                    self.push(Value::Tuple(items))?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.extend(&[item])?;
                }
                b'e' => {
                    let items = self.since_mark()?;
                    self.extend(&items)?;
                }
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.insert(&[(key, value)])?;
                }
                b'u' => {
                    let pairs = pairs(&self.since_mark()?)?;
                    self.insert(&pairs)?;
                }
                b'q' => self.put(1)?,
                b'r' => self.put(4)?,
                b'p' => {
                    let slot = self.slot()?;
                    let top = self.top()?;
                    self.memo.insert(slot, top);
                }
                0x94 => {
                    let top = self.top()?;
                    self.memo.insert(self.memo.len() as u64, top);
                }
                b'h' => self.get(1)?,
                b'j' => self.get(4)?,
                b'g' => {
                    let slot = self.slot()?;
                    self.recall(slot)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(Value::Function(function(&module, &name)?))?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let found = function(self.content(module)?, self.content(name)?)?;
                    self.push(Value::Function(found))?;
                }
                b'R' => self.reduce()?,
                b'b' => self.build()?,
                other => return Err(format!("instruction {other:#04x} is not read")),
            }
        }
    }

    fn push(&mut self, value: Value) -> Step<()> {
        if self.values.len() >= MAX_VALUES {
            return Err(format!("it holds more than {MAX_VALUES} values"));
        }
        self.stack.push(self.values.len());
        self.values.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Step<usize> {
        self.stack.pop().ok_or_else(|| "its stack is empty".into())
    }

    fn top(&self) -> Step<usize> {
        self.stack.last().copied().ok_or_else(|| "its stack is empty".into())
    }

    fn since_mark(&mut self) -> Step<Vec<usize>> {
        match self.marks.pop() {
            Some(mark) if mark <= self.stack.len() => Ok(self.stack.split_off(mark)),
            _ => Err("a mark is missing".into()),
        }
    }

    fn extend(&mut self, items: &[usize]) -> Step<()> {
        let top = self.top()?;
        match &mut self.values[top] {
            Value::List(list) => {
                list.extend(items);
                Ok(())
            }
            _ => Err("something is appended to what is no list".into()),
        }
    }

    fn insert(&mut self, pairs: &[(usize, usize)]) -> Step<()> {
        let top = self.top()?;
        match &mut self.values[top] {
            Value::Dict(dict) => {
                dict.extend(pairs);
                Ok(())
            }
            _ => Err("something is inserted into what is no dictionary".into()),
        }
    }

    fn put(&mut self, bytes: usize) -> Step<()> {
        let slot = self.number(bytes)?;
        let top = self.top()?;
        self.memo.insert(slot, top);
        Ok(())
    }

    fn get(&mut self, bytes: usize) -> Step<()> {
        let slot = self.number(bytes)?;
        self.recall(slot)
    }

    fn recall(&mut self, slot: u64) -> Step<()> {
        let value = self.memo.get(&slot).ok_or_else(|| format!("nothing was remembered as {slot}"))?;
        self.stack.push(*value);
        Ok(())
    }

    fn slot(&mut self) -> Step<u64> {
        let line = self.line()?;
        line.parse().map_err(|_| format!("`{line}` is no number"))
    }

    fn content(&self, at: usize) -> Step<&str> {
        match &self.values[at] {
            Value::Text(Text { content: Some(text), .. }) => Ok(text),
            _ => Err("a name is no text".into()),
        }
    }

    /// Calls a function: the value is made by [`Machine::build`], or at once from a buffer.
    fn reduce(&mut self) -> Step<()> {
        let (arguments, called) = (self.pop()?, self.pop()?);
        let Value::Tuple(arguments) = self.values[arguments].clone() else {
            return Err("arguments are no tuple".into());
        };
        let value = match (&self.values[called], &*arguments) {
            (Value::Function(Function::Reconstruct), _) => Value::Array(None),
            (Value::Function(Function::DataType), [name, ..]) => match self.content(*name)? {
                "u1" | "|u1" | "uint8" => Value::ByteType,
                other => return Err(format!("an array is of type `{other}`, expected bytes")),
            },
            (Value::Function(Function::FromBuffer), [buffer, kind, shape, order]) => {
                let rows = self.content(*order)? == "C";
                self.array(*buffer, *kind, *shape, rows)?
            }
            _ => return Err("something is called that is no function of numpy's".into()),
        };
        self.push(value)
    }

    /// Gives an array or its type the state in the tuple on top.
    fn build(&mut self) -> Step<()> {
        let state = self.pop()?;
        let top = self.top()?;
        match self.values[top] {
            Value::ByteType => Ok(()),
            Value::Array(None) => {
                let fields = match &self.values[state] {
                    Value::Tuple(fields) => fields.clone(),
                    _ => Vec::new(),
                };
                let [_, shape, kind, columns, buffer] = *fields else {
                    return Err("an array's state is not numpy's".into());
                };
                let rows = matches!(self.values[columns], Value::Int(0));
                self.values[top] = self.array(buffer, kind, shape, rows)?;
                Ok(())
            }
            _ => Err("a state is given to what is no array".into()),
        }
    }

    fn array(&self, buffer: usize, kind: usize, shape: usize, rows: bool) -> Step<Value> {
        if !matches!(self.values[kind], Value::ByteType) {
            return Err("an array is not of bytes".into());
        }
        if !rows {
            return Err("an array is stored by columns".into());
        }
        let size = |at: &usize| match self.values[*at] {
            Value::Int(size) => u64::try_from(size).map_err(|_| "an array's shape is negative".to_string()),
            _ => Err("an array's shape is not of numbers".into()),
        };
        let shape = match &self.values[shape] {
            Value::Tuple(sizes) => sizes.iter().map(size).collect::<Step<Vec<u64>>>()?,
            _ => return Err("an array's shape is no tuple".into()),
        };
        let all = shape.iter().try_fold(1u64, |all, size| all.checked_mul(*size));
        match &self.values[buffer] {
            Value::Text(Text { start: Some(start), length, .. }) if Some(*length) == all => {
                Ok(Value::Array(Some(Array { start: *start, shape })))
            }
            Value::Text(Text { start: Some(_), length, .. }) => {
                Err(format!("an array of shape {shape:?} has {length} bytes"))
            }
            _ => Err("an array's bytes are stored as text; save it with protocol 3 or later".into()),
        }
    }

    /// A little-endian number of at most 8 bytes.
    fn number(&mut self, bytes: usize) -> Step<u64> {
        let mut number = [0; 8];
        self.file.read_exact(&mut number[..bytes]).map_err(|_| self.ends())?;
        self.at += bytes as u64;
        Ok(u64::from_le_bytes(number))
    }

    fn int(&mut self, bytes: usize) -> Step<()> {
        let value = self.number(bytes)?;
        self.push(Value::Int(value as i64))
    }

    fn long(&mut self) -> Step<()> {
        let bytes = self.number(1)? as usize;
        if bytes > 8 {
            return Err(format!("a number has {bytes} bytes"));
        }
        let value = self.number(bytes)?;
        // The sign is the highest bit of those there are.
        let unused = 64 - 8 * bytes as u32;
        let value = if bytes == 0 { 0 } else { ((value << unused) as i64) >> unused };
        self.push(Value::Int(value))
    }

    /// A text after its length, which has `bytes` bytes.
    fn text(&mut self, bytes: usize) -> Step<()> {
        let length = self.number(bytes)?;
        let start = self.at;
        if start.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(format!("ends within {length} bytes of text"));
        }
        let content = if length <= MAX_TEXT {
            let mut content = vec![0; length as usize];
            self.file.read_exact(&mut content).map_err(|_| self.ends())?;
            String::from_utf8(content).ok()
        } else {
            self.file.seek_relative(length as i64).map_err(|e| e.to_string())?;
            None
        };
        self.at += length;
        self.push(Value::Text(Text { start: Some(start), length, content }))
    }

    fn quoted(&mut self) -> Step<()> {
        let line = self.line()?;
        let quoted = |quote| line.strip_prefix(quote).and_then(|line: &str| line.strip_suffix(quote));
        let text = quoted('\'').or_else(|| quoted('"')).ok_or("a text is not in quotes")?;
        self.unescaped(text.to_string())
    }

    /// A text of a line, of which escapes are not read.
    fn unescaped(&mut self, text: String) -> Step<()> {
        if text.contains('\\') {
            return Err("a text has escapes; save it with protocol 2 or later".into());
        }
        let length = text.len() as u64;
        self.push(Value::Text(Text { start: None, length, content: Some(text) }))
    }

    fn line(&mut self) -> Step<String> {
        let mut line = Vec::new();
        let count =
            (&mut self.file).take(MAX_TEXT).read_until(b'\n', &mut line).map_err(|e| e.to_string())?;
        self.at += count as u64;
        if line.pop() != Some(b'\n') {
            return Err(if count as u64 == MAX_TEXT { "a line is too long".into() } else { self.ends() });
        }
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        String::from_utf8(line).map_err(|_| "a line is not UTF-8".into())
    }

    fn ends(&self) -> String {
        format!("ends after {} bytes", self.length)
    }
}

fn pairs(flat: &[usize]) -> Step<Vec<(usize, usize)>> {
    let (pairs, rest) = flat.as_chunks::<2>();
    if !rest.is_empty() {
        return Err("a dictionary's key has no value".into());
    }
    Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
}

fn function(module: &str, name: &str) -> Step<Function> {
    match (module, name) {
        ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => Ok(Function::Reconstruct),
        ("numpy.core.numeric" | "numpy._core.numeric", "_frombuffer") => Ok(Function::FromBuffer),
        ("numpy", "dtype") => Ok(Function::DataType),
        ("numpy", "ndarray") => Ok(Function::Ndarray),
        _ => Err(format!("it asks for `{module}.{name}`, which is refused")),
    }
}
