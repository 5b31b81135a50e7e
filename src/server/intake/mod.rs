//! The only way in for pictures.
//!
//! A picture comes as a `data:` URL, or, where the host has enabled it, as an `https:` URL of a
//! host on its allow-list; nothing else is ever read, files least of all. Whatever it is named or
//! declared as, its bytes decide what it is: they go through [`crate::image::decode`] with its
//! limits, in a pool whose memory is bounded. What comes out is pixels, turned as the EXIF
//! orientation says; all other metadata is gone.
//!
//! A refusal has a reason to count ([`Refusal`]), a message for the asker, and a detail for the log.

mod address;
mod data_url;
mod fetch;
mod hosts;
mod network;
mod pool;
mod refusal;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use image::RgbImage;
use tokio::sync::{Semaphore, SemaphorePermit};

pub use fetch::FetchOptions;
pub use network::Network;
pub use refusal::{IntakeError, Refusal};

use crate::image::DecodeLimits;
use crate::{Error, Result};
use fetch::Fetch;
use network::System;
use pool::{Pool, busy};

/// How pictures are taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IntakeOptions {
    /// Limits on each picture.
    pub limits: DecodeLimits,
    /// Bytes for all pictures that are being taken in: a quarter for their files, a quarter for
    /// decoding small ones, half for large ones; 2 GiB. Decoded pictures that were handed over are
    /// their receiver's.
    pub memory: u64,
    /// Small pictures decoded at once, and half as many large ones (over 16 megapixels, or work to
    /// match); as many as there are processors, but 8 at most, since allocators keep some memory
    /// for each thread.
    pub workers: usize,
    /// Pictures being taken in at once, waiting ones included; 1024.
    pub queue: usize,
    /// How long a picture may wait for each thing it needs, until the server is called busy; 10 s.
    pub queue_time: Duration,
    /// How long decoding may take; 30 s.
    pub decode_time: Duration,
    /// Whether and from where `https:` URLs are fetched; they are not.
    pub fetch: Option<FetchOptions>,
}

impl Default for IntakeOptions {
    fn default() -> Self {
        Self {
            limits: DecodeLimits::default(),
            memory: 2 << 30,
            workers: std::thread::available_parallelism().map_or(2, usize::from).min(8),
            queue: 1024,
            queue_time: Duration::from_secs(10),
            decode_time: Duration::from_secs(30),
            fetch: None,
        }
    }
}

/// Takes pictures in; one for a server, shared by its requests.
pub struct Intake {
    pool: Pool,
    fetch: Option<Fetch>,
    queue: Semaphore,
}

impl std::fmt::Debug for Intake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Intake").field("fetch", &self.fetch.is_some()).finish_non_exhaustive()
    }
}

type Step<T> = std::result::Result<T, IntakeError>;

impl Intake {
    /// With the system's resolver and Mozilla's certificate authorities.
    ///
    /// # Errors
    /// [`Error::Argument`] for limits that leave no room for one picture, and for hosts that are
    /// not written as such.
    pub fn new(options: IntakeOptions) -> Result<Self> {
        let lookups = options.fetch.as_ref().map_or(1, |fetch| fetch.concurrent.clamp(1, 256));
        Self::with_network(options, Arc::new(System::new(lookups)))
    }

    /// With a network of one's own. Addresses are checked all the same.
    ///
    /// # Errors
    /// As [`Intake::new`].
    pub fn with_network(options: IntakeOptions, network: Arc<dyn Network>) -> Result<Self> {
        if options.queue == 0 || options.queue > Semaphore::MAX_PERMITS {
            return Err(Error::argument("pictures taken in at once", "at least 1", options.queue));
        }
        let IntakeOptions { limits, memory, workers, queue, queue_time, decode_time, fetch } = options;
        Ok(Self {
            pool: Pool::new(limits, workers, memory, queue_time, decode_time)?,
            fetch: fetch.map(|options| Fetch::new(options, network)).transpose()?,
            queue: Semaphore::new(queue),
        })
    }

    /// Takes the picture that a URL holds or leads to; `label` is its name in messages, such as
    /// `messages[0].content[1]`. Dropped, it stops.
    ///
    /// # Errors
    /// [`IntakeError`] with the reason.
    pub async fn picture(&self, url: &str, label: &str) -> Step<RgbImage> {
        match (hosts::scheme(url).as_deref(), &self.fetch) {
            (Some("data"), _) => {
                let text = data_url::payload(&url["data:".len()..], label)?;
                let length = data_url::decoded_length(text);
                self.check_bytes(length, label)?;
                let _place = self.enter(label)?;
                let room = self.pool.room(length, label).await?;
                let bytes = data_url::decode(text, label).await?;
                self.pool.decode(bytes.into(), room, label).await
            }
            (Some("https"), Some(fetch)) => {
                let _place = self.enter(label)?;
                let (bytes, room) = fetch.fetch(url, label, &self.pool).await?;
                self.pool.decode(bytes, room, label).await
            }
            (Some("https"), None) => Err(IntakeError::new(
                Refusal::FetchDisabled,
                label,
                "this server fetches no URLs; send the picture itself as `data:image/...;base64,`",
            )),
            _ => Err(hosts::other_scheme(label)),
        }
    }

    /// Takes a picture that was uploaded.
    ///
    /// # Errors
    /// [`IntakeError`] with the reason.
    pub async fn picture_from_bytes(&self, bytes: impl Into<Bytes>, label: &str) -> Step<RgbImage> {
        let bytes = bytes.into();
        self.check_bytes(bytes.len() as u64, label)?;
        let _place = self.enter(label)?;
        let room = self.pool.room(bytes.len() as u64, label).await?;
        self.pool.decode(bytes, room, label).await
    }

    fn enter(&self, label: &str) -> Step<SemaphorePermit<'_>> {
        self.queue.try_acquire().map_err(|_| busy(label))
    }

    fn check_bytes(&self, found: u64, label: &str) -> Step<()> {
        let limit = self.pool.max_bytes();
        if found > limit {
            return Err(IntakeError::new(
                Refusal::TooLarge,
                label,
                format_args!("it has {found} bytes, the limit is {limit}"),
            ));
        }
        Ok(())
    }
}
