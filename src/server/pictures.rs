//! How pictures come in.

use axum::http::StatusCode;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::RgbImage;

use super::api::ApiError;
use crate::Error;
use crate::image::{DecodeLimits, decode};

/// The only way in for pictures: `data:` URLs, decoded within limits.
pub struct Intake {
    limits: DecodeLimits,
}

/// Why a picture was not taken.
#[derive(Debug)]
pub enum IntakeError {
    /// It is no `data:` URL of a picture.
    Url(String),
    /// It is not a picture, or too large.
    Decode(Error),
}

impl From<IntakeError> for ApiError {
    fn from(error: IntakeError) -> Self {
        match error {
            IntakeError::Url(reason) => Self::new(StatusCode::BAD_REQUEST, reason, None),
            IntakeError::Decode(error) => error.into(),
        }
    }
}

impl Intake {
    /// With limits on every picture.
    pub fn new(limits: DecodeLimits) -> Self {
        Self { limits }
    }

    /// The picture of a URL; `label` names it in errors.
    ///
    /// # Errors
    /// If it is not a `data:` URL in base64, not a picture or over a limit.
    pub async fn picture(&self, url: &str, label: &str) -> Result<RgbImage, IntakeError> {
        let bytes = data_url(url).map_err(|reason| IntakeError::Url(format!("{label}: {reason}")))?;
        let (label, limits) = (label.to_string(), self.limits);
        // Decoding takes milliseconds of a core and must not hold up other connections.
        let decoding = tokio::task::spawn_blocking(move || decode(&bytes, &label, &limits));
        let decoded = decoding.await.map_err(|e| IntakeError::Decode(Error::Engine(e.to_string())))?;
        decoded.map_err(IntakeError::Decode)
    }
}

/// The bytes of a `data:` URL in base64. Every other URL is refused.
fn data_url(url: &str) -> Result<Vec<u8>, String> {
    let Some(rest) = url.strip_prefix("data:") else {
        let scheme = url.split_once(':').map_or("none", |(scheme, _)| scheme);
        let scheme: String = scheme.chars().take(16).collect();
        return Err(format!("image_url: expected a `data:` URL, found scheme `{scheme}`"));
    };
    let Some((kind, data)) = rest.split_once(',') else {
        return Err("image_url: the `data:` URL has no comma".into());
    };
    if !kind.ends_with(";base64") {
        return Err("image_url: expected `data:image/...;base64,`".into());
    }
    STANDARD.decode(data.trim()).map_err(|e| format!("image_url: not base64: {e}"))
}
