//! Scoring: figures with their counts, intervals and threat models.

mod row;

pub use row::{Attacked, Row, wilson};
