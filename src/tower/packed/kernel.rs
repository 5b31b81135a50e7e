//! Matrix products in registers: sixteen tokens to a vector, weights broadcast.
//!
//! A product's operands lie in *words* of 32 bits: one f32, or two bf16 that are next to each other
//! along the dimension that is summed over. Activations are in panels of 16 tokens, word after
//! word, so one vector is one word of 16 tokens; weights are in lines of 16 words that belong to
//! one output feature ([`Packed`]). Every number of a result is one chain of fused additions over
//! its words in order, whatever the number of tokens and of threads: a token's result does not
//! depend on what else is in the batch, to the bit.

use std::arch::x86_64::*;
use std::mem::transmute;
use std::ops::Range;

use rayon::prelude::*;

use super::memory::{Mat, Packed, with_scratch};

/// Tokens in a panel: the 32-bit lanes of a vector.
pub const LANES: usize = 16;

/// What a word is and how two of them multiply.
pub trait Format: Copy + Send + Sync + 'static {
    /// Numbers in a word, along the dimension that is summed over.
    const PER_WORD: usize;
    /// acc + a b, summed within the word.
    ///
    /// # Safety
    /// The processor must have what [`super::supported`] asks for.
    unsafe fn multiply(acc: __m512, a: __m512i, b: __m512i) -> __m512;
    /// Puts two neighbours along the features, 16 tokens each, to feature pair `pair` of a panel.
    ///
    /// # Safety
    /// As for [`Format::multiply`], and the panel must have the pair.
    unsafe fn store(panel: *mut u32, pair: usize, mask: __mmask16, a: __m512, b: __m512);
    /// What [`Format::store`] has put there.
    ///
    /// # Safety
    /// As for [`Format::store`].
    unsafe fn load(panel: *const u32, pair: usize) -> (__m512, __m512);
}

/// A word is one f32.
#[derive(Clone, Copy)]
pub struct Single;

/// A word is two bf16.
#[derive(Clone, Copy)]
pub struct Brain;

impl Format for Single {
    const PER_WORD: usize = 1;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn multiply(acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn store(panel: *mut u32, pair: usize, mask: __mmask16, a: __m512, b: __m512) {
        // Safety: the caller's.
        unsafe {
            let to = panel.add(pair * 2 * LANES).cast::<f32>();
            _mm512_mask_storeu_ps(to, mask, a);
            _mm512_mask_storeu_ps(to.add(LANES), mask, b);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn load(panel: *const u32, pair: usize) -> (__m512, __m512) {
        // Safety: the caller's.
        unsafe {
            let from = panel.add(pair * 2 * LANES).cast::<f32>();
            (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(LANES)))
        }
    }
}

impl Format for Brain {
    const PER_WORD: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn multiply(acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        // Safety: both are plain vectors of bits.
        unsafe { _mm512_dpbf16_ps(acc, transmute::<__m512i, __m512bh>(a), transmute::<__m512i, __m512bh>(b)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn store(panel: *mut u32, pair: usize, mask: __mmask16, a: __m512, b: __m512) {
        // Safety: the caller's.
        unsafe { _mm512_mask_storeu_epi32(panel.add(pair * LANES).cast(), mask, join(a, b)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn load(panel: *const u32, pair: usize) -> (__m512, __m512) {
        // Safety: the caller's.
        unsafe {
            let both = _mm512_loadu_si512(panel.add(pair * LANES).cast());
            let high = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)), _mm512_castsi512_ps(high))
        }
    }
}

/// Two vectors rounded to bf16, `a` in the low half of each word.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub fn join(a: __m512, b: __m512) -> __m512i {
    // Safety: both are plain vectors of bits.
    let (a, b): (__m256i, __m256i) =
        unsafe { [a, b].map(|x| transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x))).into() };
    let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(b));
    _mm512_or_si512(_mm512_cvtepu16_epi32(a), high)
}

/// Rows of the broadcast operand in a tile.
pub const ROWS: usize = 8;

/// Where the words of a tile's operands are: `blocks` times 16 words.
#[derive(Clone, Copy)]
pub struct Walk {
    /// From a row of the broadcast operand to the next.
    pub row: usize,
    /// From a word of it to the next.
    pub step: usize,
    /// From 16 words of it to the next 16.
    pub block: usize,
    /// From a word of the vector operand to the next.
    pub vector_step: usize,
    /// From one of its vectors to the next.
    pub vector: usize,
    /// How many times 16 words.
    pub blocks: usize,
}

/// Adds `blocks * 16` words to a tile of [`ROWS`] by `NV` vectors.
///
/// # Safety
/// As for [`Format::multiply`]; `a` and `b` must have the words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub unsafe fn accumulate<F: Format, const NV: usize>(
    acc: &mut [[__m512; NV]; ROWS],
    mut a: *const u32,
    mut b: *const u32,
    walk: Walk,
) {
    // Safety: the caller's.
    unsafe {
        for _ in 0..walk.blocks {
            for w in 0..16 {
                let mut vectors = [_mm512_setzero_si512(); NV];
                for (v, vector) in vectors.iter_mut().enumerate() {
                    *vector = _mm512_loadu_si512(b.add(v * walk.vector + w * walk.vector_step).cast());
                }
                for (r, row) in acc.iter_mut().enumerate() {
                    let scalar = _mm512_set1_epi32(*a.add(r * walk.row + w * walk.step) as i32);
                    for (sum, vector) in row.iter_mut().zip(vectors) {
                        *sum = F::multiply(*sum, scalar, vector);
                    }
                }
            }
            a = a.add(walk.block);
            b = b.add(16 * walk.vector_step);
        }
    }
}

/// An empty tile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub fn empty<const NV: usize>() -> [[__m512; NV]; ROWS] {
    [[_mm512_setzero_ps(); NV]; ROWS]
}

/// What becomes of a product's result, two features of 16 tokens at a time.
pub trait Finish: Sync {
    /// Takes features `2 pair` and `2 pair + 1` of the tokens of `panel`.
    ///
    /// # Safety
    /// As for [`Format::multiply`]; each pair of each panel comes once.
    unsafe fn pair(&self, panel: usize, pair: usize, a: __m512, b: __m512);
}

/// Words summed before a tile goes on to other rows: three panels of them fit the first cache.
const CHUNK: usize = 128;
/// Panels whose words stay in the second cache while a task goes through its weights.
const PANELS: usize = 13;

/// One product: `x` `(tokens, words)` with a weight, to `features` features.
struct Product<'a, F, E> {
    weight: &'a Packed<F>,
    transposed: bool,
    x: Mat,
    words: usize,
    finish: &'a E,
}

/// x W^T of `panels` panels, each result given to `finish`; with `transposed` x W.
pub fn product<F: Format, E: Finish>(
    weight: &Packed<F>,
    transposed: bool,
    x: Mat,
    panels: usize,
    finish: &E,
) {
    let (features, inner) = if transposed { (weight.inner, weight.out) } else { (weight.out, weight.inner) };
    let words = inner / F::PER_WORD;
    debug_assert_eq!(x.words, words);
    let groups = panels.div_ceil(PANELS);
    let threads = rayon::current_num_threads();
    // Whole lines of 32 numbers; enough tasks that the last one does not keep the others waiting.
    let width = [256, 128, 64].into_iter().find(|w| groups * features / w >= 4 * threads).unwrap_or(32);
    let chunks = features.div_ceil(width);
    let product = Product { weight, transposed, x, words, finish };
    let task = |task: usize| {
        let (group, chunk) = (task / chunks, task % chunks);
        let panels = panels * group / groups..panels * (group + 1) / groups;
        let features = chunk * width..((chunk + 1) * width).min(features);
        // Safety: packed weights exist only where `supported` said so, and tasks share nothing.
        unsafe { product.run(panels, features) }
    };
    for_each(groups * chunks, task);
}

/// Runs `task` for 0 to `tasks`, side by side.
pub fn for_each(tasks: usize, task: impl Fn(usize) + Sync + Send) {
    if tasks == 1 || rayon::current_num_threads() == 1 {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    }
}

impl<F: Format, E: Finish> Product<'_, F, E> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn run(&self, panels: Range<usize>, features: Range<usize>) {
        let width = features.len();
        let (sums, turned) = (panels.len() * width * LANES, CHUNK * width);
        with_scratch(sums + turned, |scratch| {
            let sums_at = scratch.cast::<f32>();
            // Safety: the scratch is that long.
            let turned = unsafe { scratch.add(sums) };
            for from in (0..self.words).step_by(CHUNK) {
                let length = CHUNK.min(self.words - from);
                // Safety: the caller's; `weights` gives where these words lie.
                unsafe {
                    let (a, walk) = self.weights(&features, from, length, turned);
                    let mut panel = panels.start;
                    while panel < panels.end {
                        let rest = panels.end - panel;
                        // Two and two rather than three and one.
                        let nv = if rest == 4 { 2 } else { rest.min(3) };
                        for row in (0..width).step_by(ROWS) {
                            let to = sums_at.add(((panel - panels.start) * width + row) * LANES);
                            let a = a(row);
                            let b = self.x.panel(panel).add(from * LANES);
                            let stage = (from == 0, from + length == self.words);
                            let at = (panel, (features.start + row) / 2);
                            match nv {
                                3 => self.tile::<3>(a, b, walk, to, width, stage, at),
                                2 => self.tile::<2>(a, b, walk, to, width, stage, at),
                                _ => self.tile::<1>(a, b, walk, to, width, stage, at),
                            }
                        }
                        panel += nv;
                    }
                }
            }
        });
    }

    /// Where row `r` of `features` has its words from `from` on, and how to walk along them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn weights(
        &self,
        features: &Range<usize>,
        from: usize,
        length: usize,
        turned: *mut u32,
    ) -> (impl Fn(usize) -> *const u32 + use<F, E>, Walk) {
        let lines = self.weight.words();
        let (rows, first) = (self.weight.out, features.start);
        let mut walk = Walk {
            row: 1,
            step: LANES,
            block: 16 * LANES,
            vector_step: LANES,
            vector: self.words * LANES,
            blocks: length / 16,
        };
        // Safety: within the weight; the caller's for the rest.
        unsafe {
            let (base, shift, stride) = if !self.transposed {
                walk = Walk { row: LANES, step: 1, block: rows * LANES, ..walk };
                (lines.add((from / 16 * rows + first) * LANES), LANES, 0)
            } else if F::PER_WORD == 1 {
                (lines.add((first / 16 * rows + from) * LANES), 1, rows * LANES)
            } else {
                // The words of the transposed weight pair other numbers.
                for (block, k) in (first..features.end).step_by(32).enumerate() {
                    let line = lines.add((k / 32 * rows + 2 * from) * LANES);
                    turn(line, turned.add(block * 2 * length * LANES), length);
                }
                (turned.cast_const(), 1, length * LANES)
            };
            let at = move |row: usize| match shift {
                1 => base.add(row / 16 * stride + row % 16),
                shift => base.add(row * shift),
            };
            (at, walk)
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    #[allow(clippy::too_many_arguments)]
    unsafe fn tile<const NV: usize>(
        &self,
        a: *const u32,
        b: *const u32,
        walk: Walk,
        sums: *mut f32,
        width: usize,
        (first, last): (bool, bool),
        (panel, pair): (usize, usize),
    ) {
        // Safety: the caller's.
        unsafe {
            let mut acc = empty::<NV>();
            if !first {
                for (r, row) in acc.iter_mut().enumerate() {
                    for (v, sum) in row.iter_mut().enumerate() {
                        *sum = _mm512_loadu_ps(sums.add((v * width + r) * LANES));
                    }
                }
            }
            if self.transposed {
                let walk = Walk { row: 1, step: LANES, block: 16 * LANES, vector_step: LANES, ..walk };
                accumulate::<F, NV>(&mut acc, a, b, walk);
            } else {
                let walk = Walk { row: LANES, step: 1, vector_step: LANES, ..walk };
                accumulate::<F, NV>(&mut acc, a, b, walk);
            }
            if last {
                for (p, rows) in acc.chunks_exact(2).enumerate() {
                    for (v, (a, b)) in rows[0].iter().zip(rows[1]).enumerate() {
                        self.finish.pair(panel + v, pair + p, *a, b);
                    }
                }
            } else {
                for (r, row) in acc.iter().enumerate() {
                    for (v, sum) in row.iter().enumerate() {
                        _mm512_storeu_ps(sums.add((v * width + r) * LANES), *sum);
                    }
                }
            }
        }
    }
}

/// Two lines of 32 numbers each, one row of the weight after the other, to words that pair the
/// rows: `length` words for the first 16 numbers, then for the others.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn turn(lines: *const u32, to: *mut u32, length: usize) {
    let mut order = [[0u16; 32]; 2];
    for i in 0..16u16 {
        for half in 0..2u16 {
            let at = &mut order[usize::from(half)];
            at[usize::from(2 * i)] = 16 * half + i;
            at[usize::from(2 * i + 1)] = 32 + 16 * half + i;
        }
    }
    // Safety: the caller's.
    unsafe {
        let (low, high) =
            (_mm512_loadu_si512(order[0].as_ptr().cast()), _mm512_loadu_si512(order[1].as_ptr().cast()));
        for w in 0..length {
            let a = _mm512_loadu_si512(lines.add(2 * w * LANES).cast());
            let b = _mm512_loadu_si512(lines.add((2 * w + 1) * LANES).cast());
            let to = to.add(w * LANES);
            _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(to.add(length * LANES).cast(), _mm512_permutex2var_epi16(a, high, b));
        }
    }
}
