//! How suspicious the pictures of requests are, and what is done about it.
//!
//! The score is how far the defended and the undefended tower disagree on a picture
//! ([`crate::eval::suspicion`]); what is high is said by clean pictures.

use std::num::NonZeroUsize;
use std::sync::Arc;

use axum::http::StatusCode;
use image::RgbImage;
use serde::Serialize;
use tokio::sync::Semaphore;

use super::api::ApiError;
use super::metrics::Metrics;
use crate::Error;
use crate::eval::suspicion::{Calibration, Detector};

/// What is done about a suspicious picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnSuspect {
    /// It is logged and counted.
    Log,
    /// The response says so too, in `x_radapt` and in a header.
    Flag,
    /// The request is refused.
    Refuse,
}

impl OnSuspect {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Flag => "flag",
            Self::Refuse => "refuse",
        }
    }
}

/// What pictures are watched by.
#[derive(Debug, Clone)]
pub struct WatchOptions {
    /// The scores of clean pictures, without which a score says little.
    pub calibration: Option<Calibration>,
    /// The share of clean pictures that may be called suspicious, in (0, 1).
    pub share: f64,
    /// What is done about them; where it is not told, pictures are looked at in comparisons alone.
    pub on_suspect: Option<OnSuspect>,
}

/// How suspicious a picture is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Suspicion {
    /// 1 minus the mean cosine of the two towers' features.
    pub score: f64,
    /// The share of clean pictures at least as suspicious, where the server is calibrated.
    pub share: Option<f64>,
    /// Whether that is less than the server allows for.
    pub suspicious: Option<bool>,
}

/// Looks at pictures.
pub struct Watch {
    detector: Arc<Detector>,
    options: WatchOptions,
    /// At or above it a score is suspicious.
    threshold: Option<f64>,
    /// As many at once as there are processors: each holds the features of a picture.
    slots: Semaphore,
    metrics: Arc<Metrics>,
}

/// That a share of clean pictures is one.
///
/// # Errors
/// If it is not within (0, 1).
pub fn check_share(share: f64) -> crate::Result<()> {
    if share > 0.0 && share < 1.0 {
        return Ok(());
    }
    Err(Error::argument("--suspect-share", "a share in (0, 1)", share))
}

impl Watch {
    /// With a defended tower and the undefended one.
    ///
    /// # Errors
    /// If the clean pictures are too few for the share asked for, or there are none where something
    /// is to be done.
    pub fn new(detector: Detector, options: WatchOptions, metrics: Arc<Metrics>) -> crate::Result<Self> {
        check_share(options.share)?;
        let threshold = options.calibration.as_ref().map(|clean| clean.threshold(options.share));
        match threshold {
            None if options.on_suspect.is_some() => {
                let expected = "clean pictures to go with it, by --calibration or --calibrate";
                return Err(Error::argument("--on-suspect", expected, "none"));
            }
            Some(threshold) if threshold.is_infinite() => {
                let clean = options.calibration.as_ref().map_or(0, |clean| clean.scores.len());
                let needed = (1.0 / options.share).ceil() - 1.0;
                let expected = format!("at least {needed} clean pictures for it");
                return Err(Error::argument("--suspect-share", expected, clean));
            }
            _ => {}
        }
        let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Ok(Self {
            detector: Arc::new(detector),
            options,
            threshold,
            slots: Semaphore::new(processors),
            metrics,
        })
    }

    /// What is done about suspicious pictures.
    pub fn on_suspect(&self) -> Option<OnSuspect> {
        self.options.on_suspect
    }

    /// Looks at a picture, and gives it back.
    ///
    /// # Errors
    /// If it is suspicious and such are refused; if it is none for the tower, or the tower fails.
    pub async fn look(&self, picture: RgbImage, label: &str) -> Result<(RgbImage, Suspicion), ApiError> {
        let stopped = || ApiError::from(Error::Engine("looking at a picture was cut off".into()));
        let slot = self.slots.acquire().await.map_err(|_| stopped())?;
        let detector = self.detector.clone();
        let work = move || (detector.score(&picture), picture);
        let (score, picture) = tokio::task::spawn_blocking(work).await.map_err(|_| stopped())?;
        drop(slot);
        let score = score?;
        let found = Suspicion {
            score,
            share: self.options.calibration.as_ref().map(|clean| clean.share(score)),
            suspicious: self.threshold.map(|threshold| score >= threshold),
        };
        self.metrics.suspicion.observe(score);
        if found.suspicious == Some(true) {
            let done = self.options.on_suspect.map_or("compared", OnSuspect::as_str);
            self.metrics.suspect(done);
            tracing::info!(target: "radapt::suspicion", score, share = found.share, done, "a suspicious picture");
            if self.options.on_suspect == Some(OnSuspect::Refuse) {
                let message = format!("{label} is refused: it looks like an adversarial one");
                let refused = ApiError::new(StatusCode::BAD_REQUEST, message, None);
                return Err(refused.with_code("suspicious_picture"));
            }
        }
        Ok((picture, found))
    }
}
