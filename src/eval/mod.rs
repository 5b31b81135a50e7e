//! Scoring: figures with their counts, intervals and threat models.

pub mod report;
mod row;
mod summary;

pub use row::{Attacked, Precision, Row, wilson};
pub use summary::Summary;
