//! The demo: what an attack does to a model, with and without the defence, for a reader who has
//! never heard of either.
//!
//! A run comes to a [`report::Report`]: figures, each with its threat model, and pictures with
//! what the models say of them. [`page::page`] makes one HTML file of it that needs nothing else,
//! [`page::table`] the figures alone for a terminal. Neither judges anything again: what an answer
//! names is decided where the report is filled.

mod headline;
pub mod page;
pub mod report;
#[cfg(feature = "engine")]
mod run;
#[cfg(test)]
mod sample;

#[cfg(feature = "engine")]
pub use run::{Demo, Stage, answers};
