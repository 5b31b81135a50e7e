//! Figures of captions and answers beyond right and wrong: [`caption`] has CIDEr-D and BLEU-4,
//! [`vqa`] VQAv2's accuracy, [`pope`] POPE's figures.

pub mod caption;
pub mod pope;
pub mod vqa;
