//! Scoring: figures with their counts, intervals and threat models.

pub mod classify;
pub mod features;
pub mod report;
mod row;
pub mod run;
mod summary;
pub mod sweep;

pub use row::{Attacked, Precision, Row, wilson};
pub use summary::Summary;
