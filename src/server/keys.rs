//! Who may ask, and how much: API keys from a TOML file, read again when it changes.
//!
//! ```toml
//! [[key]]
//! name = "team-a"                # in logs and metrics
//! sha256 = "9f86d081884c7d65..." # of the key itself; or `key = "sk-..."` in the clear
//! requests_per_minute = 60       # with a burst of as many; without it, the server's default
//! concurrent = 4
//! ```

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{Error, Result};

/// What one asker may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeyLimits {
    /// Requests a minute, with a burst of as many; any number where `None`.
    pub requests_per_minute: Option<NonZeroU32>,
    /// Requests at a time; any number where `None`.
    pub concurrent: Option<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    key: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    key: Option<String>,
    sha256: Option<String>,
    requests_per_minute: Option<NonZeroU32>,
    concurrent: Option<usize>,
}

/// An asker.
pub struct Key {
    name: String,
    digest: [u8; 32],
    limits: KeyLimits,
    rate: Option<DefaultDirectRateLimiter>,
    concurrent: Option<Arc<Semaphore>>,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("name", &self.name).field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Key {
    fn new(name: String, digest: [u8; 32], limits: KeyLimits) -> Self {
        Self {
            name,
            digest,
            limits,
            rate: limits.requests_per_minute.map(|n| RateLimiter::direct(Quota::per_minute(n))),
            concurrent: limits.concurrent.map(|n| Arc::new(Semaphore::new(n.min(Semaphore::MAX_PERMITS)))),
        }
    }

    /// Whoever comes without a key, where none is asked for; all of them share the limits.
    pub fn anonymous(limits: KeyLimits) -> Self {
        Self::new("anonymous".into(), [0; 32], limits)
    }

    /// Its name in logs and metrics; not a secret.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Counts a request.
    ///
    /// # Errors
    /// How long to wait, where there were too many within the last minute.
    pub fn count(&self) -> std::result::Result<(), Duration> {
        let Some(rate) = &self.rate else { return Ok(()) };
        rate.check().map_err(|until| until.wait_time_from(DefaultClock::default().now()))
    }

    /// A place among the requests at a time, kept until it is dropped; `None` where there are too
    /// many.
    pub fn place(&self) -> Option<Option<OwnedSemaphorePermit>> {
        match &self.concurrent {
            None => Some(None),
            Some(places) => places.clone().try_acquire_owned().ok().map(Some),
        }
    }
}

/// The keys of a file.
#[derive(Debug)]
pub struct Keys {
    path: PathBuf,
    defaults: KeyLimits,
    now: RwLock<Table>,
}

#[derive(Debug)]
struct Table {
    keys: Vec<Arc<Key>>,
    changed: Option<SystemTime>,
    length: u64,
}

impl Keys {
    /// Reads the file; `defaults` are for keys that have no limits of their own.
    ///
    /// # Errors
    /// If it cannot be read, or is no such file. No message holds a key.
    pub fn open(path: &Path, defaults: KeyLimits) -> Result<Self> {
        let now = RwLock::new(read(path, defaults, &[])?);
        Ok(Self { path: path.to_path_buf(), defaults, now })
    }

    /// The asker with this key. The time it takes does not tell how much of a key is right.
    pub fn find(&self, presented: &str) -> Option<Arc<Key>> {
        let digest: [u8; 32] = Sha256::digest(presented.as_bytes()).into();
        let table = self.now.read().unwrap_or_else(PoisonError::into_inner);
        let mut found = None;
        for key in &table.keys {
            if bool::from(key.digest.ct_eq(&digest)) {
                found = Some(key.clone());
            }
        }
        found
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.now.read().unwrap_or_else(PoisonError::into_inner).keys.len()
    }

    /// Whether there is none, and nobody gets in.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads the file again if it has changed, and says whether it had. Keys that stay as they were
    /// keep what they have used of their limits.
    ///
    /// # Errors
    /// As [`Keys::open`]; the keys there were stay in force.
    pub fn refresh(&self) -> Result<bool> {
        let (changed, length) = stamp(&self.path)?;
        let before = {
            let table = self.now.read().unwrap_or_else(PoisonError::into_inner);
            if (table.changed, table.length) == (changed, length) {
                return Ok(false);
            }
            table.keys.clone()
        };
        let table = match read(&self.path, self.defaults, &before) {
            Ok(table) => table,
            Err(error) => {
                // Said once, not at every look.
                let mut table = self.now.write().unwrap_or_else(PoisonError::into_inner);
                (table.changed, table.length) = (changed, length);
                return Err(error);
            }
        };
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = table;
        Ok(true)
    }
}

fn stamp(path: &Path) -> Result<(Option<SystemTime>, u64)> {
    let found = std::fs::metadata(path).map_err(|e| Error::read(path, e))?;
    Ok((found.modified().ok(), found.len()))
}

fn read(path: &Path, defaults: KeyLimits, before: &[Arc<Key>]) -> Result<Table> {
    let (changed, length) = stamp(path)?;
    let text = std::fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
    // toml's own messages quote the line, which may hold a key.
    let file: File = toml::from_str(&text).map_err(|e| Error::config(path, e.message()))?;
    let mut keys: Vec<Arc<Key>> = Vec::new();
    for (i, entry) in file.key.into_iter().enumerate() {
        let wrong = |reason: &str| Error::config(path, format!("key {} (`{}`): {reason}", i + 1, entry.name));
        // It stands in logs and in the metrics' labels.
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if !(1..=64).contains(&entry.name.len()) || !entry.name.chars().all(plain) {
            let expected = "expected a name of 1 to 64 letters, digits, `-`, `_` and `.`";
            return Err(Error::config(path, format!("key {}: {expected}", i + 1)));
        }
        let digest = match (&entry.key, &entry.sha256) {
            (Some(key), None) if key.len() >= 16 => Sha256::digest(key.as_bytes()).into(),
            (Some(_), None) => return Err(wrong("expected a key of at least 16 characters")),
            (None, Some(text)) => {
                from_hex(text).ok_or_else(|| wrong("sha256: expected 64 hexadecimal digits"))?
            }
            _ => return Err(wrong("expected `key` or `sha256`, and one of them")),
        };
        if keys.iter().any(|other| other.digest == digest || other.name == entry.name) {
            return Err(wrong("comes a second time"));
        }
        if entry.concurrent == Some(0) {
            return Err(wrong("concurrent: expected at least 1"));
        }
        let limits = KeyLimits {
            requests_per_minute: entry.requests_per_minute.or(defaults.requests_per_minute),
            concurrent: entry.concurrent.or(defaults.concurrent),
        };
        let same = |key: &&Arc<Key>| key.digest == digest && key.name == entry.name && key.limits == limits;
        let kept = before.iter().find(same).cloned();
        keys.push(kept.unwrap_or_else(|| Arc::new(Key::new(entry.name, digest, limits))));
    }
    Ok(Table { keys, changed, length })
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        std::fs::write(&path, text).unwrap();
        (folder, path)
    }

    const ONE: &str = "[[key]]\nname = \"one\"\nkey = \"sk-0123456789abcdef\"\nrequests_per_minute = 2\n";

    #[test]
    fn keys_are_found_by_themselves_and_by_their_digest() {
        let digest: String =
            Sha256::digest("sk-another-key-of-many").iter().map(|byte| format!("{byte:02x}")).collect();
        let text = format!("{ONE}[[key]]\nname = \"two\"\nsha256 = \"{digest}\"\nconcurrent = 1\n");
        let (_folder, path) = file(&text);
        let keys = Keys::open(&path, KeyLimits::default()).unwrap();
        assert_eq!((keys.len(), keys.is_empty()), (2, false));
        assert_eq!(keys.find("sk-0123456789abcdef").unwrap().name(), "one");
        let two = keys.find("sk-another-key-of-many").unwrap();
        for wrong in ["", "sk-0123456789abcde", "sk-0123456789abcdef ", "SK-0123456789abcdef", &digest] {
            assert!(keys.find(wrong).is_none(), "{wrong}");
        }
        let place = two.place().unwrap();
        assert!(two.place().is_none());
        drop(place);
        assert!(two.place().is_some());
        let one = keys.find("sk-0123456789abcdef").unwrap();
        assert!(one.count().is_ok() && one.count().is_ok());
        let wait = one.count().unwrap_err();
        assert!(wait > Duration::from_secs(20) && wait <= Duration::from_secs(30), "{wait:?}");
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_bad_one_changes_nothing() {
        let (_folder, path) = file(ONE);
        let keys = Keys::open(&path, KeyLimits::default()).unwrap();
        assert!(!keys.refresh().unwrap());
        let one = keys.find("sk-0123456789abcdef").unwrap();
        assert!(one.count().is_ok() && one.count().is_ok() && one.count().is_err());
        std::fs::write(&path, format!("{ONE}[[key]]\nname = \"two\"\nkey = \"sk-two-two-two-two\"\n"))
            .unwrap();
        assert!(keys.refresh().unwrap());
        assert!(keys.find("sk-two-two-two-two").is_some());
        // What it has used, it has used.
        assert!(keys.find("sk-0123456789abcdef").unwrap().count().is_err());
        std::fs::write(&path, "[[key]]\nname = 1").unwrap();
        assert!(keys.refresh().is_err());
        assert!(!keys.refresh().unwrap());
        assert_eq!(keys.len(), 2);
        std::fs::write(&path, "").unwrap();
        assert!(keys.refresh().unwrap());
        assert!(keys.is_empty() && keys.find("sk-two-two-two-two").is_none());
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_without_its_keys() {
        let secret = "sk-very-secret-indeed";
        for (text, says) in [
            (format!("[[key]]\nname = \"a\"\nkye = \"{secret}\""), "kye"),
            (format!("[[key]]\nname = \"a\"\nkey = \"{secret}\"\nsha256 = \"00\""), "one of them"),
            ("[[key]]\nname = \"a\"".to_string(), "one of them"),
            ("[[key]]\nname = \"a\"\nkey = \"short\"".to_string(), "16 characters"),
            (format!("[[key]]\nname = \"a\"\nsha256 = \"{secret}\""), "64 hexadecimal"),
            (format!("[[key]]\nname = \"\"\nkey = \"{secret}\""), "name"),
            (format!("[[key]]\nname = \"a b\"\nkey = \"{secret}\""), "letters"),
            (format!("[[key]]\nname = \"a\"\nkey = \"{secret}\"\nconcurrent = 0"), "concurrent"),
            (format!("{ONE}[[key]]\nname = \"one\"\nkey = \"{secret}\""), "second time"),
            (format!("key = \"{secret}"), ""),
        ] {
            let (_folder, path) = file(&text);
            let error = Keys::open(&path, KeyLimits::default()).unwrap_err().to_string();
            assert!(error.contains(says) && !error.contains(secret), "{text}: {error}");
        }
        assert!(Keys::open(Path::new("/nowhere/keys.toml"), KeyLimits::default()).is_err());
    }
}
