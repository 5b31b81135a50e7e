//! The defence of a tower that takes pictures of any size.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::{Defense, DefenseOptions, DefenseSummary, Source};
use crate::Result;
use crate::tower::qwen::Qwen;
use crate::tower::{GridInserts, Inserts};

/// Tokens of all grids whose defences are kept.
const TOKENS: usize = 1 << 14;

/// A defence that is made anew for every grid: the filter for the picture's size, a training-free
/// anchor from a white picture of that size, a stored anchor interpolated to it.
pub struct GridDefense {
    bare: Qwen,
    options: DefenseOptions,
    source: Source,
    summary: Option<DefenseSummary>,
    made: Mutex<HashMap<(usize, usize), Defense>>,
}

impl DefenseOptions {
    /// Makes the defence for pictures of any size on `tower`, whatever is put into it.
    /// `fingerprint` is asked for when an anchor file is used.
    ///
    /// # Errors
    /// If the anchor file is damaged or does not fit, or a number is out of range.
    pub fn for_grids(
        &self,
        tower: &Qwen,
        fingerprint: impl FnOnce() -> Result<String>,
    ) -> Result<GridDefense> {
        let source = self.source(fingerprint)?;
        let bare = tower.with_grids(None);
        // Whatever is wrong is wrong at one size as at any other. There and beyond the cutoff is the
        // anchor's own.
        let side = middling(&bare);
        let first = self.make(&source, &bare.at(side, side)?)?;
        let options = self.clone();
        Ok(GridDefense { bare, options, source, summary: first.summary(), made: Mutex::default() })
    }
}

/// A middling size: what differs between two defences differs there too.
fn middling(tower: &Qwen) -> usize {
    224usize.next_multiple_of(tower.config().factor())
}

impl GridDefense {
    /// The defence at a middling size, by which it is told from others.
    ///
    /// # Errors
    /// If the tower fails.
    pub fn middling(&self) -> Result<Defense> {
        let side = middling(&self.bare) / self.bare.config().patch;
        self.at((side, side))
    }

    /// The defence at a grid of patches down and across.
    ///
    /// # Errors
    /// If the grid is none of the tower's, or the tower fails.
    pub fn at(&self, grid: (usize, usize)) -> Result<Defense> {
        let lock = || self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(defense) = lock().get(&grid) {
            return Ok(defense.clone());
        }
        let patch = self.bare.config().patch;
        // Another thread may make the same in the meantime; either is as good.
        let defense = self.options.make(&self.source, &self.bare.at(grid.0 * patch, grid.1 * patch)?)?;
        let mut made = lock();
        if made.keys().map(|(h, w)| h * w).sum::<usize>() + grid.0 * grid.1 > TOKENS {
            made.clear();
        }
        made.insert(grid, defense.clone());
        Ok(defense)
    }

    /// `None` for the undefended tower. The cutoff is that for pictures of 224 pixels and more.
    pub fn summary(&self) -> Option<DefenseSummary> {
        self.summary.clone()
    }
}

impl GridInserts for GridDefense {
    fn at(&self, grid: (usize, usize)) -> Result<Inserts> {
        Ok(GridDefense::at(self, grid)?.inserts())
    }
}
