//! Attention of one head of one picture at a time, scores in blocks of 48 queries that stay in the
//! caches: no N x N matrix is ever in memory.

use std::arch::x86_64::*;

use super::kernel::{Format, LANES, ROWS, Single, Walk, accumulate, empty, for_each};
use super::memory::{Mat, with_scratch};
use super::rows::{MARGIN, Span, exp, gather, scatter};

/// Where queries, keys and values of a batch are.
#[derive(Clone, Copy)]
pub struct Heads {
    /// `(queries, D)`.
    pub q: Mat,
    /// `(tokens, 2 D)`: keys, then values.
    pub kv: Mat,
    pub batch: usize,
    /// Tokens of a picture.
    pub tokens: usize,
    /// Queries of a picture: all its tokens, or its first alone.
    pub queries: usize,
    pub heads: usize,
    /// D / h.
    pub width: usize,
}

/// The shapes of a head's own matrices, f32: `(rows, stride)` with features as rows, and `(tokens,
/// rows)`.
#[derive(Clone, Copy)]
struct Shape {
    /// The head's width, filled up to a multiple of 16.
    rows: usize,
    stride: usize,
    /// Tokens, filled up.
    keys: usize,
    /// Queries, filled up.
    queries: usize,
}

/// Vectors of queries in a block.
const BLOCK: usize = 3;

impl Heads {
    fn shape(&self) -> Shape {
        let keys = self.tokens.next_multiple_of(LANES);
        Shape {
            rows: self.width.next_multiple_of(LANES),
            stride: keys + 2 * MARGIN,
            keys,
            queries: self.queries.next_multiple_of(LANES),
        }
    }

    fn scale(&self) -> f32 {
        (self.width as f32).powf(-0.5)
    }

    /// A head's features of the tokens of a picture, as rows at `to`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn rows<F: Format>(&self, from: Mat, first: usize, span: Span, to: *mut f32, scale: f32) {
        let Shape { rows, stride, .. } = self.shape();
        // Safety: the caller's.
        unsafe {
            gather::<F>(from, first..first + self.width, span, to, stride, scale);
            std::slice::from_raw_parts_mut(to.add(self.width * stride), (rows - self.width) * stride)
                .fill(0.0);
        }
    }

    fn spans(&self, picture: usize) -> (Span, Span) {
        let span = |tokens: usize| Span { from: picture * tokens, tokens };
        (span(self.queries), span(self.tokens))
    }

    /// softmax(q k^T / sqrt(d)) v to `context`, `(queries, D)`.
    pub fn forward<F: Format>(&self, context: Mat) {
        let shape = self.shape();
        let matrix = shape.rows * shape.stride;
        for_each(self.batch * self.heads, |task| {
            let (picture, head) = (task / self.heads, task % self.heads);
            with_scratch(4 * matrix + shape.keys * BLOCK * LANES, |scratch| {
                let at = |i: usize| scratch.cast::<f32>().wrapping_add(i * matrix);
                let (q, k, v, out, p) = (at(0), at(1), at(2), at(3), at(4));
                let (queries, keys) = self.spans(picture);
                let (first, d) = (head * self.width, self.heads * self.width);
                // Safety: the scratch is that long; heads of pictures share no numbers.
                unsafe {
                    self.rows::<F>(self.q, first, queries, q, self.scale());
                    self.rows::<F>(self.kv, first, keys, k, 1.0);
                    self.rows::<F>(self.kv, d + first, keys, v, 1.0);
                    for (i, vectors) in blocks(shape.queries) {
                        let (q, out) = (q.add(i), out.add(MARGIN + i));
                        match vectors {
                            3 => self.attend::<3>(shape, q, k, v, p, out),
                            2 => self.attend::<2>(shape, q, k, v, p, out),
                            _ => self.attend::<1>(shape, q, k, v, p, out),
                        }
                    }
                    scatter::<F>(out, shape.stride, context, first..first + self.width, queries, false);
                }
            });
        });
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn attend<const NV: usize>(
        &self,
        shape: Shape,
        q: *const f32,
        k: *const f32,
        v: *const f32,
        p: *mut f32,
        out: *mut f32,
    ) {
        // Safety: the caller's.
        unsafe {
            along_features::<NV>(shape, k, q, p);
            softmax::<NV>(p, self.tokens, shape.keys);
            along_keys::<NV>(shape, v, p, out, 1.0);
        }
    }

    /// From the gradient `(queries, D)` at the context: those at the queries, `(queries, D)`, and
    /// at keys and values, `(tokens, 2 D)`.
    pub fn vjp<F: Format>(&self, gradient: Mat, to_q: Mat, to_kv: Mat) {
        let shape = self.shape();
        let Shape { rows, stride, keys, queries } = shape;
        let (matrix, scores) = (rows * stride, keys * BLOCK * LANES);
        let (by_key, by_query) = (rows * keys, rows * queries);
        let words = 5 * matrix + 2 * scores + 2 * by_key + 2 * by_query;
        for_each(self.batch * self.heads, |task| {
            let (picture, head) = (task / self.heads, task % self.heads);
            with_scratch(words, |scratch| {
                let mut next = scratch.cast::<f32>();
                let mut take = |length: usize| {
                    let start = next;
                    next = next.wrapping_add(length);
                    start
                };
                let [q, k, v, g, out] = [(); 5].map(|()| take(matrix));
                let [p, s] = [(); 2].map(|()| take(scores));
                let [dk, dv] = [(); 2].map(|()| take(by_key));
                let [q_by_token, g_by_token] = [(); 2].map(|()| take(by_query));
                let (asking, asked) = self.spans(picture);
                let (first, d) = (head * self.width, self.heads * self.width);
                // Safety: the scratch is that long; heads of pictures share no numbers.
                unsafe {
                    self.rows::<F>(self.q, first, asking, q, self.scale());
                    self.rows::<F>(self.kv, first, asked, k, 1.0);
                    self.rows::<F>(self.kv, d + first, asked, v, 1.0);
                    self.rows::<F>(gradient, first, asking, g, 1.0);
                    transpose(q.add(MARGIN), stride, q_by_token, rows, rows, queries);
                    transpose(g.add(MARGIN), stride, g_by_token, rows, rows, queries);
                    std::slice::from_raw_parts_mut(dk, 2 * by_key).fill(0.0);
                    let head = Head { shape, tokens: self.tokens, scale: self.scale(), q, k, v, g, p, s };
                    let sums = Sums { dq: out, dk, dv, q_by_token, g_by_token };
                    for (i, vectors) in blocks(queries) {
                        match vectors {
                            3 => head.vjp::<3>(i, &sums),
                            2 => head.vjp::<2>(i, &sums),
                            _ => head.vjp::<1>(i, &sums),
                        }
                    }
                    let features = first..first + self.width;
                    scatter::<F>(out, stride, to_q, features.clone(), asking, false);
                    transpose(dk, rows, out.add(MARGIN), stride, keys, rows);
                    scatter::<F>(out, stride, to_kv, features, asked, false);
                    transpose(dv, rows, out.add(MARGIN), stride, keys, rows);
                    scatter::<F>(out, stride, to_kv, d + first..d + first + self.width, asked, false);
                }
            });
        });
    }
}

/// The first query of each block and its number of vectors.
fn blocks(queries: usize) -> impl Iterator<Item = (usize, usize)> {
    let all = queries / LANES;
    let mut done = 0;
    std::iter::from_fn(move || {
        let rest = all - done;
        let vectors = if rest == 4 { 2 } else { rest.min(BLOCK) };
        let from = done * LANES;
        done += vectors;
        (vectors > 0).then_some((from, vectors))
    })
}

/// A head's own matrices with features as rows, `g` the gradient at its context; `p` and `s` are
/// for scores.
struct Head {
    shape: Shape,
    tokens: usize,
    scale: f32,
    q: *const f32,
    k: *const f32,
    v: *const f32,
    g: *const f32,
    p: *mut f32,
    s: *mut f32,
}

/// Gradients, and what they need with tokens as rows.
struct Sums {
    dq: *mut f32,
    dk: *mut f32,
    dv: *mut f32,
    q_by_token: *const f32,
    g_by_token: *const f32,
}

impl Head {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn vjp<const NV: usize>(&self, i: usize, sums: &Sums) {
        let Self { shape, p, s, .. } = *self;
        // Safety: the caller's.
        unsafe {
            along_features::<NV>(shape, self.k, self.q.add(i), p);
            softmax::<NV>(p, self.tokens, shape.keys);
            along_features::<NV>(shape, self.v, self.g.add(i), s);
            softmax_vjp::<NV>(s, p, self.tokens, shape.keys);
            along_keys::<NV>(shape, self.k, s, sums.dq.add(MARGIN + i), self.scale);
            along_queries::<NV>(shape, p, sums.g_by_token.add(i * shape.rows), sums.dv);
            along_queries::<NV>(shape, s, sums.q_by_token.add(i * shape.rows), sums.dk);
        }
    }
}

/// Sums over features: `(keys, NV * 16)` at `to`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn along_features<const NV: usize>(shape: Shape, keys: *const f32, queries: *const f32, to: *mut f32) {
    let Shape { rows, stride, .. } = shape;
    let walk = Walk {
        row: 1,
        step: stride,
        block: 16 * stride,
        vector_step: stride,
        vector: LANES,
        blocks: rows / 16,
    };
    // Safety: the caller's.
    unsafe {
        for j in (0..shape.keys).step_by(ROWS) {
            let mut acc = empty::<NV>();
            let (a, b) = (keys.add(MARGIN + j), queries.add(MARGIN));
            accumulate::<Single, NV>(&mut acc, a.cast(), b.cast(), walk);
            for (r, row) in acc.iter().enumerate() {
                for (v, sum) in row.iter().enumerate() {
                    _mm512_storeu_ps(to.add(((j + r) * NV + v) * LANES), *sum);
                }
            }
        }
    }
}

/// Sums over keys of `weights`, `(keys, NV * 16)`, times `values`: features as rows at `to`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn along_keys<const NV: usize>(
    shape: Shape,
    values: *const f32,
    weights: *const f32,
    to: *mut f32,
    scale: f32,
) {
    let Shape { rows, stride, keys, .. } = shape;
    let walk =
        Walk { row: stride, step: 1, block: 16, vector_step: NV * LANES, vector: LANES, blocks: keys / 16 };
    let scale = _mm512_set1_ps(scale);
    // Safety: the caller's.
    unsafe {
        for d in (0..rows).step_by(ROWS) {
            let mut acc = empty::<NV>();
            let a = values.add(d * stride + MARGIN);
            accumulate::<Single, NV>(&mut acc, a.cast(), weights.cast(), walk);
            for (r, row) in acc.iter().enumerate() {
                for (v, sum) in row.iter().enumerate() {
                    _mm512_storeu_ps(to.add((d + r) * stride + v * LANES), _mm512_mul_ps(*sum, scale));
                }
            }
        }
    }
}

/// Sums over this block's queries of `weights`, `(keys, NV * 16)`, times `values`, `(queries,
/// rows)`, added to `(keys, rows)` at `to`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn along_queries<const NV: usize>(
    shape: Shape,
    weights: *const f32,
    values: *const f32,
    to: *mut f32,
) {
    // Safety: the caller's.
    unsafe {
        for j in (0..shape.keys).step_by(ROWS) {
            let a = weights.add(j * NV * LANES);
            let mut d = 0;
            while d < shape.rows {
                let rest = (shape.rows - d) / LANES;
                let (b, to) = (values.add(d), to.add(j * shape.rows + d));
                // Two and two rather than three and one.
                match if rest == 4 { 2 } else { rest.min(3) } {
                    3 => added::<NV, 3>(shape.rows, a, b, to),
                    2 => added::<NV, 2>(shape.rows, a, b, to),
                    _ => added::<NV, 1>(shape.rows, a, b, to),
                }
                d += LANES * if rest == 4 { 2 } else { rest.min(3) };
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn added<const NV: usize, const ND: usize>(rows: usize, a: *const f32, b: *const f32, to: *mut f32) {
    let walk = Walk { row: NV * LANES, step: 1, block: 16, vector_step: rows, vector: LANES, blocks: NV };
    let mut acc = empty::<ND>();
    // Safety: the caller's.
    unsafe {
        for (r, row) in acc.iter_mut().enumerate() {
            for (v, sum) in row.iter_mut().enumerate() {
                *sum = _mm512_loadu_ps(to.add(r * rows + v * LANES));
            }
        }
        accumulate::<Single, ND>(&mut acc, a.cast(), b.cast(), walk);
        for (r, row) in acc.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                _mm512_storeu_ps(to.add(r * rows + v * LANES), *sum);
            }
        }
    }
}

/// softmax over the first `tokens` of `keys` rows, in place; the others become 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn softmax<const NV: usize>(p: *mut f32, tokens: usize, keys: usize) {
    // Safety: the caller's.
    unsafe {
        let at = |j: usize, v: usize| p.add((j * NV + v) * LANES);
        let mut most = [_mm512_set1_ps(f32::NEG_INFINITY); NV];
        for j in 0..tokens {
            for (v, most) in most.iter_mut().enumerate() {
                *most = _mm512_max_ps(*most, _mm512_loadu_ps(at(j, v)));
            }
        }
        let mut sums = [_mm512_setzero_ps(); NV];
        for j in 0..tokens {
            for v in 0..NV {
                let e = exp(_mm512_sub_ps(_mm512_loadu_ps(at(j, v)), most[v]));
                sums[v] = _mm512_add_ps(sums[v], e);
                _mm512_storeu_ps(at(j, v), e);
            }
        }
        let scales = sums.map(|sum| _mm512_div_ps(_mm512_set1_ps(1.0), sum));
        for j in 0..tokens {
            for (v, scale) in scales.iter().enumerate() {
                _mm512_storeu_ps(at(j, v), _mm512_mul_ps(_mm512_loadu_ps(at(j, v)), *scale));
            }
        }
        std::slice::from_raw_parts_mut(at(tokens, 0), (keys - tokens) * NV * LANES).fill(0.0);
    }
}

/// p (g - sum(p g)), in place of g; rows behind `tokens` become 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn softmax_vjp<const NV: usize>(g: *mut f32, p: *const f32, tokens: usize, keys: usize) {
    // Safety: the caller's.
    unsafe {
        let at = |j: usize, v: usize| (j * NV + v) * LANES;
        let mut along = [_mm512_setzero_ps(); NV];
        for j in 0..tokens {
            for (v, along) in along.iter_mut().enumerate() {
                let (g, p) = (_mm512_loadu_ps(g.add(at(j, v))), _mm512_loadu_ps(p.add(at(j, v))));
                *along = _mm512_fmadd_ps(g, p, *along);
            }
        }
        for j in 0..tokens {
            for (v, along) in along.iter().enumerate() {
                let to = g.add(at(j, v));
                let (g, p) = (_mm512_loadu_ps(to), _mm512_loadu_ps(p.add(at(j, v))));
                _mm512_storeu_ps(to, _mm512_mul_ps(p, _mm512_sub_ps(g, *along)));
            }
        }
        std::slice::from_raw_parts_mut(g.add(at(tokens, 0)), (keys - tokens) * NV * LANES).fill(0.0);
    }
}

/// `(rows, columns)` to `(columns, rows)`, both multiples of 16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn transpose(
    from: *const f32,
    from_stride: usize,
    to: *mut f32,
    to_stride: usize,
    rows: usize,
    columns: usize,
) {
    for row in (0..rows).step_by(LANES) {
        for column in (0..columns).step_by(LANES) {
            // Safety: the caller's.
            unsafe {
                let from = from.add(row * from_stride + column);
                transpose_16(from, from_stride, to.add(column * to_stride + row), to_stride);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn transpose_16(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    // Safety: the caller's.
    unsafe {
        // Four rows at a time: quarter c of `fours[g]` has, in its 128-bit lane l, column 4 l + c.
        let mut fours = [[_mm512_setzero_ps(); 4]; 4];
        for (g, four) in fours.iter_mut().enumerate() {
            let row = |i: usize| _mm512_loadu_ps(from.add((4 * g + i) * from_stride));
            let (a, b, c, d) = (row(0), row(1), row(2), row(3));
            let pd = |x: __m512| _mm512_castps_pd(x);
            let (low, high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let (low_2, high_2) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            *four = [
                _mm512_castpd_ps(_mm512_unpacklo_pd(pd(low), pd(low_2))),
                _mm512_castpd_ps(_mm512_unpackhi_pd(pd(low), pd(low_2))),
                _mm512_castpd_ps(_mm512_unpacklo_pd(pd(high), pd(high_2))),
                _mm512_castpd_ps(_mm512_unpackhi_pd(pd(high), pd(high_2))),
            ];
        }
        for c in 0..4 {
            let [g0, g1, g2, g3] = fours.map(|four| four[c]);
            let (a, b) = (_mm512_shuffle_f32x4::<0x88>(g0, g1), _mm512_shuffle_f32x4::<0xdd>(g0, g1));
            let (e, f) = (_mm512_shuffle_f32x4::<0x88>(g2, g3), _mm512_shuffle_f32x4::<0xdd>(g2, g3));
            let columns = [
                _mm512_shuffle_f32x4::<0x88>(a, e),
                _mm512_shuffle_f32x4::<0x88>(b, f),
                _mm512_shuffle_f32x4::<0xdd>(a, e),
                _mm512_shuffle_f32x4::<0xdd>(b, f),
            ];
            for (lane, column) in columns.into_iter().enumerate() {
                _mm512_storeu_ps(to.add((4 * lane + c) * to_stride), column);
            }
        }
    }
}
