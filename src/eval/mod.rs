//! Scoring: figures with their counts, intervals and threat models.

mod row;
mod summary;

pub use row::{Attacked, Precision, Row, wilson};
pub use summary::Summary;
