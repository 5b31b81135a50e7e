//! `data:` URLs (RFC 2397), base64 only.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::{IntakeError, Refusal};

/// The longest media type with its parameters; it is not looked at.
const MAX_HEAD: usize = 1024;
/// Base64 characters that are decoded between two chances for other tasks: a multiple of four.
const STEP: usize = 64 << 10;

/// The base64 text of what follows `data:`.
pub fn payload<'a>(rest: &'a str, label: &str) -> Result<&'a str, IntakeError> {
    let bad = |reason: &str| IntakeError::new(Refusal::BadUrl, label, reason);
    let head = rest.as_bytes().get(..MAX_HEAD + 1).unwrap_or(rest.as_bytes());
    let comma =
        head.iter().position(|&b| b == b',').ok_or_else(|| bad("expected `data:image/...;base64,` first"))?;
    let head = &head[..comma];
    if head.iter().any(|b| !matches!(b, 0x20..0x7f)) {
        return Err(bad("the media type of a data: URL is plain ASCII"));
    }
    // Spaces around parameters are tolerated, as in a content type.
    let last = head.rsplit(|&b| b == b';').next().unwrap_or_default().trim_ascii();
    if !head.contains(&b';') || !last.eq_ignore_ascii_case(b"base64") {
        return Err(bad("only data: URLs in base64 are taken: `data:image/...;base64,`"));
    }
    Ok(&rest[comma + 1..])
}

/// How many bytes a base64 text stands for at most.
pub fn decoded_length(text: &str) -> u64 {
    let padding = text.bytes().rev().take(2).take_while(|&b| b == b'=').count() as u64;
    (text.len() as u64).div_ceil(4).saturating_mul(3).saturating_sub(padding)
}

/// Decodes strict base64 (RFC 4648: no white space, padded, no stray bits), letting other tasks run
/// in between.
pub async fn decode(text: &str, label: &str) -> Result<Vec<u8>, IntakeError> {
    let bad = || IntakeError::new(Refusal::BadBase64, label, "its data is not base64 (RFC 4648, padded)");
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3 + 3);
    let mut rest = text.as_bytes();
    loop {
        let (step, after) = rest.split_at(rest.len().min(STEP));
        let before = bytes.len();
        STANDARD.decode_vec(step, &mut bytes).map_err(|_| bad())?;
        if after.is_empty() {
            return Ok(bytes);
        }
        // Padding belongs to the end.
        if bytes.len() - before != STEP / 4 * 3 {
            return Err(bad());
        }
        rest = after;
        tokio::task::yield_now().await;
    }
}
