//! POPE (arXiv 2305.10355): is an object there, yes or no?

use serde::{Deserialize, Serialize};

/// Whether an answer says yes, as the LLaVA and FARE scripts read it: its first sentence, commas left
/// out, says no if one of its words is `No`, `not` or `no`; everything else says yes, silence too.
pub fn says_yes(answer: &str) -> bool {
    let first = answer.split('.').next().unwrap_or_default().replace(',', "");
    !first.split(' ').any(|word| matches!(word.trim(), "No" | "not" | "no"))
}

/// POPE's figures over one of its splits; yes is the positive class. Shares are in percent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Pope {
    /// Questions.
    pub n: usize,
    /// Of them answered right.
    pub correct: usize,
    /// The share answered right; 0 of 0 questions.
    pub accuracy: f64,
    /// The share of answers of yes that are right; 0 where no answer is yes.
    pub precision: f64,
    /// The share of questions to be answered with yes that are; 0 where there are none.
    pub recall: f64,
    /// The harmonic mean of precision and recall; 0 where both are.
    pub f1: f64,
    /// The share of answers of yes.
    pub yes_ratio: f64,
}

impl Pope {
    /// Of pairs: whether the answer says yes, whether yes is right.
    pub fn new(pairs: impl IntoIterator<Item = (bool, bool)>) -> Self {
        let (mut n, mut correct, mut yes, mut truth, mut both) = (0, 0, 0, 0, 0);
        for (said, right) in pairs {
            n += 1;
            correct += usize::from(said == right);
            yes += usize::from(said);
            truth += usize::from(right);
            both += usize::from(said && right);
        }
        let share = |part: usize, of: usize| if of == 0 { 0.0 } else { 100.0 * part as f64 / of as f64 };
        let (precision, recall) = (share(both, yes), share(both, truth));
        let f1 = if both == 0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) };
        let (accuracy, yes_ratio) = (share(correct, n), share(yes, n));
        Self { n, correct, accuracy, precision, recall, f1, yes_ratio }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_as_the_scripts_read_them() {
        for yes in ["Yes", "yes, there is a cat.", "", "There is a cat. It is not red.", "Nothing", "NO"] {
            assert!(says_yes(yes), "{yes}");
        }
        for no in ["No", "no.", "No, there is none", "There is not a cat.", "Yes, no"] {
            assert!(!says_yes(no), "{no}");
        }
    }

    #[test]
    fn figures_are_those_of_the_counts() {
        // 6 true positives, 2 false ones, 3 true negatives, 1 false one.
        let pairs = [(6, (true, true)), (2, (true, false)), (3, (false, false)), (1, (false, true))];
        let all = pairs.into_iter().flat_map(|(n, pair)| std::iter::repeat_n(pair, n));
        let found = Pope::new(all);
        assert_eq!((found.n, found.correct, found.accuracy, found.precision), (12, 9, 75.0, 75.0));
        assert!((found.recall - 600.0 / 7.0).abs() < 1e-9);
        assert!((found.f1 - 80.0).abs() < 1e-9);
        assert!((found.yes_ratio - 200.0 / 3.0).abs() < 1e-9);
        let never = Pope::new([(false, true)]);
        assert_eq!((never.precision, never.recall, never.f1), (0.0, 0.0, 0.0));
        assert_eq!(Pope::new([]).accuracy, 0.0);
    }
}
