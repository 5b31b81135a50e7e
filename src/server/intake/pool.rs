//! Decoding in a bounded pool.
//!
//! Pictures are decoded in two classes, told from the header: small ones and large ones. Each class
//! has its own slots and its own part of the memory, so that large or slow pictures wait for each
//! other and never hold up a small one. Within a class it is first come, first served.
//!
//! They are decoded on a few threads of the pool's own. Allocators keep freed memory for each
//! thread: on the hundreds that the server's runtime has for blocking work it added up to twice the
//! bound.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use image::RgbImage;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{IntakeError, Refusal};
use crate::image::{DecodeLimits, Header, decode, measure};
use crate::{Error, Result};

/// A small picture's pixels, times the passes over them, plus its bytes.
const SMALL_WORK: u64 = 16 << 20;
/// A small picture's memory.
const SMALL_MEMORY: u64 = 128 << 20;
/// What is measured without a thread of its own, in bytes.
const SHORT: usize = 64 << 10;
/// More threads than any machine has processors for.
const MAX_WORKERS: usize = 1024;
/// The unit of memory permits.
const KIB: u64 = 1024;

pub struct Pool {
    limits: DecodeLimits,
    queue_time: Duration,
    decode_time: Duration,
    /// Bytes of encoded pictures, in KiB.
    encoded: Arc<Semaphore>,
    /// What a small picture may take, in bytes.
    small_memory: u64,
    measuring: Semaphore,
    small: Class,
    large: Class,
    threads: Threads,
}

/// A runtime that only lends its blocking threads.
struct Threads(Option<Runtime>);

impl Threads {
    fn new(most: usize) -> Result<Self> {
        let runtime = Builder::new_current_thread()
            .max_blocking_threads(most)
            .thread_name("picture")
            .build()
            .map_err(|e| Error::Unsupported(format!("threads for pictures: {e}")))?;
        Ok(Self(Some(runtime)))
    }

    fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<JoinHandle<T>> {
        self.0.as_ref().map(|runtime| runtime.spawn_blocking(work))
    }
}

impl Drop for Threads {
    /// A runtime that is dropped waits for its threads, which is not allowed within another.
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

struct Class {
    slots: Arc<Semaphore>,
    memory: Arc<Semaphore>,
}

impl Class {
    fn new(slots: usize, bytes: u64) -> Self {
        Self { slots: Arc::new(Semaphore::new(slots)), memory: Arc::new(semaphore(bytes)) }
    }
}

/// What decoders copy of a file at most, in bytes.
fn copies(length: u64) -> u64 {
    length.saturating_mul(4).saturating_add(4 * KIB)
}

/// In KiB, of as many as a semaphore can count at most.
fn semaphore(bytes: u64) -> Semaphore {
    Semaphore::new(usize::try_from(bytes / KIB).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS))
}

/// Room for a picture's bytes; it is free again when this is dropped.
pub struct Room(OwnedSemaphorePermit);

impl Pool {
    /// A quarter of `memory` is for encoded pictures, a quarter for small and half for large ones.
    pub fn new(
        limits: DecodeLimits,
        workers: usize,
        memory: u64,
        queue_time: Duration,
        decode_time: Duration,
    ) -> Result<Self> {
        if !(1..=MAX_WORKERS).contains(&workers) {
            return Err(Error::argument("picture workers", format!("1 to {MAX_WORKERS}"), workers));
        }
        // Half for a large picture, and a quarter for a file in a buffer that grew.
        let least = limits.max_memory.saturating_add(copies(limits.max_bytes)).saturating_mul(2);
        if memory < least {
            return Err(Error::argument(
                "memory for pictures",
                format!("at least {} MiB with these limits on one", least.div_ceil(1 << 20)),
                format!("{} MiB", memory >> 20),
            ));
        }
        let large = workers.div_ceil(2);
        Ok(Self {
            limits,
            queue_time,
            decode_time,
            encoded: Arc::new(semaphore(memory / 4)),
            small_memory: SMALL_MEMORY.min(memory / 4),
            measuring: Semaphore::new(large),
            small: Class::new(workers, memory / 4),
            large: Class::new(large, memory / 2),
            threads: Threads::new(workers + 2 * large)?,
        })
    }

    pub fn max_bytes(&self) -> u64 {
        self.limits.max_bytes
    }

    /// Waits for room for so many encoded bytes.
    pub async fn room(&self, bytes: u64, label: &str) -> std::result::Result<Room, IntakeError> {
        let kib = permits(bytes);
        let permit = self.in_time(Arc::clone(&self.encoded).acquire_many_owned(kib), label).await?;
        Ok(Room(permit))
    }

    /// Makes room for more bytes at once or not at all: streams that wait for each other would
    /// never end.
    pub fn widen(&self, room: &mut Room, bytes: u64, label: &str) -> std::result::Result<(), IntakeError> {
        let more = permits(bytes).saturating_sub(u32::try_from(room.0.num_permits()).unwrap_or(u32::MAX));
        if more > 0 {
            let permit = Arc::clone(&self.encoded).try_acquire_many_owned(more).map_err(|_| busy(label))?;
            room.0.merge(permit);
        }
        Ok(())
    }

    /// Waits for something, for as long as a picture may be queued.
    pub async fn in_time<T, E>(
        &self,
        wait: impl Future<Output = std::result::Result<T, E>>,
        label: &str,
    ) -> std::result::Result<T, IntakeError> {
        timeout(self.queue_time, wait).await.ok().and_then(std::result::Result::ok).ok_or_else(|| busy(label))
    }

    /// Decodes a picture when its turn has come.
    pub async fn decode(
        &self,
        bytes: Bytes,
        room: Room,
        label: &str,
    ) -> std::result::Result<RgbImage, IntakeError> {
        let limits = self.limits;
        let header = if bytes.len() <= SHORT {
            measure(&bytes, label, &limits)
        } else {
            let _slot = self.in_time(self.measuring.acquire(), label).await?;
            let (bytes, name) = (bytes.clone(), label.to_owned());
            self.run(move || measure(&bytes, &name, &limits), label).await?
        };
        let header = header.map_err(|e| refused(e, label))?;
        let class = self.class(&header, bytes.len());
        // What needs more than the limit is refused by `decode` before it takes it.
        let most = limits.max_memory.saturating_add(copies(bytes.len() as u64));
        let kib = u32::try_from(header.memory.min(most).div_ceil(KIB)).unwrap_or(u32::MAX);
        let (slots, memory) = (Arc::clone(&class.slots), Arc::clone(&class.memory));
        // The slot first: what waits for memory then are few, and no memory is held while waiting.
        let permits = async {
            let slot = slots.acquire_owned().await?;
            Ok::<_, tokio::sync::AcquireError>((slot, memory.acquire_many_owned(kib).await?))
        };
        let permits = self.in_time(permits, label).await?;
        let name = label.to_owned();
        // The permits go along and come back: a decoder cannot be stopped, so when its client has
        // gone its memory is still in use, and the picture is this pool's until it is handed over.
        let decoding = move || {
            let decoded = decode(&bytes, &name, &limits);
            (decoded, permits, room)
        };
        let (decoded, ..) = self.run(decoding, label).await?;
        decoded.map_err(|e| refused(e, label))
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
        label: &str,
    ) -> std::result::Result<T, IntakeError> {
        let running = self.threads.spawn(work).ok_or_else(|| busy(label))?;
        match timeout(self.decode_time, running).await {
            Ok(Ok(done)) => Ok(done),
            // A decoder panicked; that is a bug, but one that this picture has found.
            Ok(Err(e)) => {
                Err(IntakeError::new(Refusal::NotAPicture, label, "it cannot be decoded").with_detail(e))
            }
            Err(_) => Err(IntakeError::new(Refusal::Timeout, label, "decoding it took too long")),
        }
    }

    fn class(&self, header: &Header, bytes: usize) -> &Class {
        let pixels = u64::from(header.width) * u64::from(header.height);
        let work = pixels.saturating_mul(u64::from(header.passes)).saturating_add(bytes as u64);
        if work <= SMALL_WORK && header.memory <= self.small_memory { &self.small } else { &self.large }
    }
}

fn permits(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(KIB).max(1)).unwrap_or(u32::MAX)
}

pub fn busy(label: &str) -> IntakeError {
    IntakeError::new(Refusal::Busy, label, "the server is busy with other pictures; try again")
}

fn refused(error: Error, label: &str) -> IntakeError {
    let refusal = match &error {
        Error::PictureTooLarge { unit: "bytes", .. } => Refusal::TooLarge,
        Error::PictureTooLarge { unit: "pixels", .. } => Refusal::TooManyPixels,
        Error::PictureTooLarge { .. } => Refusal::TooMuchMemory,
        _ => Refusal::NotAPicture,
    };
    match error {
        Error::PictureTooLarge { unit, found, limit, .. } => {
            IntakeError::new(refusal, label, format_args!("it has {found} {unit}, the limit is {limit}"))
        }
        Error::Picture { reason, .. } => IntakeError::new(refusal, label, reason),
        other => IntakeError::new(refusal, label, "it cannot be decoded").with_detail(other),
    }
}
