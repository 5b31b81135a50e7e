//! Scoring: figures with their counts, intervals and threat models.

mod row;
pub mod run;
mod summary;

pub use row::{Attacked, Precision, Row, wilson};
pub use summary::Summary;
