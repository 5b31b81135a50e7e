use serde::Serialize;

use super::Verdict;

/// How far two judges agree on the cases that both have judged.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Agreement {
    /// Cases that both have judged.
    pub n: usize,
    /// Of those, with the same verdict.
    pub agreed: usize,
    /// Their share in percent; none of 0 cases.
    pub share: Option<f64>,
    /// Cohen's kappa: 1 for full agreement, 0 for as much as chance would give. None where it is
    /// not defined: for 0 cases, and where both gave one and the same verdict throughout.
    pub kappa: Option<f64>,
    /// How often the first said the row's verdict and the second the column's, in the order of
    /// [`Verdict::ALL`].
    pub table: [[usize; 4]; 4],
}

impl Agreement {
    /// Of pairs of verdicts, the first judge's first.
    pub fn new(pairs: impl IntoIterator<Item = (Verdict, Verdict)>) -> Self {
        let mut table = [[0; 4]; 4];
        for (first, second) in pairs {
            table[first as usize][second as usize] += 1;
        }
        let n: usize = table.iter().flatten().sum();
        let agreed: usize = (0..4).map(|i| table[i][i]).sum();
        let total = n as f64;
        let chance: f64 = (0..4)
            .map(|i| {
                let row: usize = table[i].iter().sum();
                let column: usize = table.iter().map(|row| row[i]).sum();
                row as f64 * column as f64 / (total * total)
            })
            .sum();
        let observed = agreed as f64 / total;
        let kappa = (n > 0 && chance < 1.0).then(|| (observed - chance) / (1.0 - chance));
        Self { n, agreed, share: (n > 0).then_some(100.0 * observed), kappa, table }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kappa_is_cohens() {
        // Cohen's textbook table: 20 both yes, 15 both no, 5 and 10 apart: 0.7 observed, 0.5 by chance.
        let pairs = |n, a, b| std::iter::repeat_n((a, b), n);
        let (yes, no) = (Verdict::Original, Verdict::Neither);
        let all =
            pairs(20, yes, yes).chain(pairs(5, yes, no)).chain(pairs(10, no, yes)).chain(pairs(15, no, no));
        let found = Agreement::new(all);
        assert_eq!((found.n, found.agreed), (50, 35));
        assert!((found.share.unwrap() - 70.0).abs() < 1e-9);
        assert!((found.kappa.unwrap() - 0.4).abs() < 1e-12);
        assert_eq!(found.table[0][3], 5);
    }

    #[test]
    fn there_is_no_kappa_without_variety() {
        assert_eq!(Agreement::new([]).share, None);
        let same = Agreement::new([(Verdict::Target, Verdict::Target); 3]);
        assert_eq!((same.share, same.kappa), (Some(100.0), None));
    }
}
