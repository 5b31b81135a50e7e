//! mistralrs-core 0.8.1, patched by radapt so that an embedder can supply the vision tower.
//!
//! The published source is fetched, checked and patched by `build.rs`; nothing of it is kept
//! in this repository. `../README.md` says hunk by hunk what is changed and why.

// Upstream calls its own exported macros by absolute path; from an included file rustc takes
// them for macro-expanded ones.
#![allow(macro_expanded_macro_exports_accessed_by_absolute_paths)]
// Upstream code is linted by upstream.
#![allow(warnings, clippy::all)]

mod qwen_vl;
pub mod vision_tower;

include!(concat!(env!("OUT_DIR"), "/mistralrs-core-0.8.1/src/lib.rs"));
