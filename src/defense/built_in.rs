//! Anchors inside the binary; `anchors/README.md` has a card for each.

use super::Anchor;
use crate::{Error, Result};

/// Name and file of every built-in anchor.
static ANCHORS: &[(&str, &[u8])] = &[
    ("pocket-white", include_bytes!("../../anchors/pocket-white.safetensors")),
    ("pocket-4-static", include_bytes!("../../anchors/pocket-4-static.safetensors")),
    ("pocket-8-static", include_bytes!("../../anchors/pocket-8-static.safetensors")),
    ("pocket-16-static", include_bytes!("../../anchors/pocket-16-static.safetensors")),
    ("pocket-4-adaptive", include_bytes!("../../anchors/pocket-4-adaptive.safetensors")),
    ("pocket-8-adaptive", include_bytes!("../../anchors/pocket-8-adaptive.safetensors")),
    ("pocket-16-adaptive", include_bytes!("../../anchors/pocket-16-adaptive.safetensors")),
    ("pocket-4-embedding", include_bytes!("../../anchors/pocket-4-embedding.safetensors")),
    ("pocket-8-embedding", include_bytes!("../../anchors/pocket-8-embedding.safetensors")),
    ("pocket-16-embedding", include_bytes!("../../anchors/pocket-16-embedding.safetensors")),
];

/// The built-in anchors' names.
pub fn names() -> impl Iterator<Item = &'static str> {
    ANCHORS.iter().map(|(name, _)| *name)
}

/// The file of the built-in anchor `name`, `None` where there is none of that name.
pub fn bytes(name: &str) -> Option<&'static [u8]> {
    ANCHORS.iter().find(|(built_in, _)| *built_in == name).map(|(_, bytes)| *bytes)
}

/// The built-in anchor `name`.
///
/// # Errors
/// If there is none of that name.
pub fn anchor(name: &str) -> Result<Anchor> {
    let found = ANCHORS.iter().find(|(built_in, _)| *built_in == name);
    let (_, bytes) =
        found.ok_or_else(|| Error::argument("anchor", names().collect::<Vec<_>>().join(" or "), name))?;
    Anchor::parse(bytes).map_err(|reason| Error::Anchor { path: name.into(), reason })
}
