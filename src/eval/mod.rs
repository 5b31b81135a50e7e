//! Scoring: figures with their counts, intervals and threat models.

pub mod classify;
pub mod coco;
pub mod features;
pub mod judge;
pub mod metrics;
pub mod prompts;
pub mod questions;
pub mod report;
pub mod retrieve;
mod row;
pub mod run;
pub mod select;
mod summary;
pub mod suspicion;
pub mod sweep;
pub mod vattack;

pub use row::{Attacked, Precision, Row, wilson};
pub use summary::Summary;
