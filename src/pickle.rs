//! Python's pickles, read without executing anything.
//!
//! A pickle is a program for a stack machine. This runs those of its instructions that build
//! numbers, texts, lists and dictionaries. A class or function it names is kept as a name, and a
//! call of it as a call that is not made ([`Value::Object`]): whoever wants the data knows the few
//! calls it is told in, and what they would have returned.
//!
//! Large texts are not read: where they lie in the file is enough. What a pickle may hold is
//! bounded, and values refer to each other by number, so that nothing here recurses.
//!
//! The format: Python's `pickletools`.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};

/// The longest text that is read, file names among them.
const MAX_TEXT: u64 = 4096;
/// The most values a pickle may hold; CIFAR's largest has 100,000.
const MAX_VALUES: usize = 1 << 22;
/// The most instructions; they bound what lists and the stack hold.
const MAX_STEPS: usize = 1 << 24;

/// A value; numbers in it are indices into [`Pickle::values`].
#[derive(Debug, Clone)]
pub(crate) enum Value {
    /// `None`, and what need not be known: a fraction, a number beyond 64 bits.
    Other,
    Bool(bool),
    Int(i64),
    Text(Text),
    List(Vec<usize>),
    Tuple(Vec<usize>),
    /// Also `collections.OrderedDict` and `defaultdict`. A key may be there twice; the last counts.
    Dict(Vec<(usize, usize)>),
    /// A class or function by name.
    Global {
        module: String,
        name: String,
    },
    /// What a call would have made.
    Object(Object),
    /// What lies outside the pickle, under this name.
    Stored(usize),
}

/// A call that was not made.
#[derive(Debug, Clone)]
pub(crate) struct Object {
    /// What was to be called.
    pub called: usize,
    /// A tuple.
    pub arguments: usize,
    /// What the result was to be given (`__setstate__`).
    pub state: Option<usize>,
}

/// Bytes or text.
#[derive(Debug, Clone)]
pub(crate) struct Text {
    /// Where it lies in the file, if it lies there as it is.
    pub start: Option<u64>,
    pub length: u64,
    /// What it says, unless it is long or not UTF-8.
    pub content: Option<String>,
}

/// A pickle's values.
pub(crate) struct Pickle {
    pub values: Vec<Value>,
    /// The value it ends with.
    pub root: usize,
}

impl Pickle {
    /// Reads the pickle that starts at byte `start` of `file` and ends before `end`; returns where
    /// it ends too. What is wrong otherwise is told in words that follow a colon.
    pub fn read(file: &mut BufReader<File>, start: u64, end: u64) -> Step<(Self, u64)> {
        file.seek(SeekFrom::Start(start)).map_err(|e| e.to_string())?;
        let mut machine = Machine {
            file,
            at: start,
            start,
            end,
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            copied: 0,
        };
        let root = machine.run()?;
        let at = machine.at;
        Ok((Self { values: machine.values, root }, at))
    }

    /// The value of the last entry of `dict` called `key`.
    pub fn entry(&self, dict: usize, key: &str) -> Option<usize> {
        let Value::Dict(entries) = &self.values[dict] else { return None };
        entries.iter().rev().find(|(at, _)| self.text(*at) == Some(key)).map(|(_, value)| *value)
    }

    /// What a text says; `None` of anything else.
    pub fn text(&self, at: usize) -> Option<&str> {
        match &self.values[at] {
            Value::Text(Text { content, .. }) => content.as_deref(),
            _ => None,
        }
    }

    /// The items of a tuple; none of anything else.
    pub fn tuple(&self, at: usize) -> &[usize] {
        match &self.values[at] {
            Value::Tuple(items) => items,
            _ => &[],
        }
    }

    /// A class or function by module and name.
    pub fn global(&self, at: usize) -> Option<(&str, &str)> {
        match &self.values[at] {
            Value::Global { module, name } => Some((module, name)),
            _ => None,
        }
    }
}

pub(crate) type Step<T> = std::result::Result<T, String>;

struct Machine<'f> {
    file: &'f mut BufReader<File>,
    /// Where in the file it reads.
    at: u64,
    start: u64,
    end: u64,
    values: Vec<Value>,
    stack: Vec<usize>,
    /// How long the stack was at each mark.
    marks: Vec<usize>,
    memo: HashMap<u64, usize>,
    /// Entries of dictionaries made from lists, which may be made from one list many times.
    copied: usize,
}

impl Machine<'_> {
    /// Runs to the end; returns the value there.
    fn run(&mut self) -> Step<usize> {
        for _ in 0..MAX_STEPS {
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
                0x88 => self.push(Value::Bool(true))?,
                0x89 => self.push(Value::Bool(false))?,
                b'K' => self.int(1)?,
                b'M' => self.int(2)?,
                b'J' => {
                    let value = self.number(4)? as u32 as i32;
                    self.push(Value::Int(value.into()))?;
                }
                0x8a => self.long(1)?,
                0x8b => self.long(4)?,
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
                // A set is as good as a list.
                b']' | 0x8f => self.push(Value::List(Vec::new()))?,
                b')' => self.push(Value::Tuple(Vec::new()))?,
                b'd' => {
                    let pairs = pairs(&self.since_mark()?)?;
                    self.push(Value::Dict(pairs))?;
                }
                b'l' | 0x91 => {
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
                b'e' | 0x90 => {
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
                    self.push(Value::Global { module, name })?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (module, name) = (self.content(module)?.into(), self.content(name)?.into());
                    self.push(Value::Global { module, name })?;
                }
                b'R' => self.reduce()?,
                b'b' => self.build()?,
                0x81 | 0x92 => {
                    // The second comes with keyword arguments.
                    if instruction == 0x92 {
                        self.pop()?;
                    }
                    self.reduce()?;
                }
                b'o' => {
                    let mut arguments = self.since_mark()?;
                    if arguments.is_empty() {
                        return Err("a class is missing".into());
                    }
                    let called = arguments.remove(0);
                    self.stack.push(called);
                    self.push(Value::Tuple(arguments))?;
                    self.reduce()?;
                }
                b'i' => {
                    let (module, name) = (self.line()?, self.line()?);
                    let arguments = self.since_mark()?;
                    self.push(Value::Global { module, name })?;
                    self.push(Value::Tuple(arguments))?;
                    self.reduce()?;
                }
                b'Q' => {
                    let name = self.pop()?;
                    self.push(Value::Stored(name))?;
                }
                other => return Err(format!("instruction {other:#04x} is not read")),
            }
        }
        Err(format!("it has more than {MAX_STEPS} instructions"))
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
            // What a call would have made may take items; here it stays unknown.
            Value::Object(_) => Ok(()),
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
            Value::Object(_) => Ok(()),
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

    /// A call: not made, but for the dictionaries that are like any other.
    fn reduce(&mut self) -> Step<()> {
        let (arguments, called) = (self.pop()?, self.pop()?);
        let Value::Tuple(given) = &self.values[arguments] else {
            return Err("arguments are no tuple".into());
        };
        let dictionary = match &self.values[called] {
            Value::Global { module, name } if module == "collections" => match (name.as_str(), &**given) {
                ("OrderedDict", []) | ("defaultdict", [] | [_]) => Some(Vec::new()),
                ("OrderedDict", [items]) => self.entries(*items),
                _ => None,
            },
            _ => None,
        };
        self.copied += dictionary.as_ref().map_or(0, Vec::len);
        if self.copied > MAX_VALUES {
            return Err(format!("it holds more than {MAX_VALUES} values"));
        }
        self.push(match dictionary {
            Some(entries) => Value::Dict(entries),
            None => Value::Object(Object { called, arguments, state: None }),
        })
    }

    /// A list of pairs as a dictionary's entries, as Python 2 wrote an `OrderedDict`.
    fn entries(&self, list: usize) -> Option<Vec<(usize, usize)>> {
        let Value::List(list) = &self.values[list] else { return None };
        let pair = |at: &usize| match &self.values[*at] {
            Value::List(pair) | Value::Tuple(pair) => match pair[..] {
                [key, value] => Some((key, value)),
                _ => None,
            },
            _ => None,
        };
        list.iter().map(pair).collect()
    }

    fn build(&mut self) -> Step<()> {
        let state = self.pop()?;
        let top = self.top()?;
        match &mut self.values[top] {
            Value::Object(object) => object.state = Some(state),
            // A dictionary's attributes.
            Value::Dict(_) => {}
            _ => return Err("a state is given to what takes none".into()),
        }
        Ok(())
    }

    /// A little-endian number of at most 8 bytes.
    fn number(&mut self, bytes: usize) -> Step<u64> {
        let mut number = [0; 8];
        if self.end.saturating_sub(self.at) < bytes as u64 {
            return Err(self.ends());
        }
        self.file.read_exact(&mut number[..bytes]).map_err(|_| self.ends())?;
        self.at += bytes as u64;
        Ok(u64::from_le_bytes(number))
    }

    fn int(&mut self, bytes: usize) -> Step<()> {
        let value = self.number(bytes)?;
        self.push(Value::Int(value as i64))
    }

    /// A number after its length, which has `bytes` bytes.
    fn long(&mut self, bytes: usize) -> Step<()> {
        let bytes = self.number(bytes)?;
        if bytes > 8 {
            self.skip(bytes, "a number")?;
            return self.push(Value::Other);
        }
        let bytes = bytes as usize;
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
        let content = if length <= MAX_TEXT && length <= self.end.saturating_sub(start) {
            let mut content = vec![0; length as usize];
            self.file.read_exact(&mut content).map_err(|_| self.ends())?;
            self.at += length;
            String::from_utf8(content).ok()
        } else {
            self.skip(length, "text")?;
            None
        };
        self.push(Value::Text(Text { start: Some(start), length, content }))
    }

    fn skip(&mut self, length: u64, what: &str) -> Step<()> {
        if length > self.end.saturating_sub(self.at) {
            return Err(format!("ends within {length} bytes of {what}"));
        }
        self.file.seek_relative(length as i64).map_err(|e| e.to_string())?;
        self.at += length;
        Ok(())
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
        let most = MAX_TEXT.min(self.end.saturating_sub(self.at));
        let count = (&mut *self.file).take(most).read_until(b'\n', &mut line).map_err(|e| e.to_string())?;
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
        format!("ends after {} bytes", self.end.saturating_sub(self.start))
    }
}

fn pairs(flat: &[usize]) -> Step<Vec<(usize, usize)>> {
    let (pairs, rest) = flat.as_chunks::<2>();
    if !rest.is_empty() {
        return Err("a dictionary's key has no value".into());
    }
    Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
}
