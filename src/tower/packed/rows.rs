//! What happens between the products, 16 tokens at a time.

use std::arch::x86_64::*;

use super::kernel::{Finish, Format, LANES, Single};
use super::memory::Mat;
use crate::tower::layers::Activation;

/// e^x to 2e-7 relative; below -87 it stays at e^-87. NaN stays NaN, being the second operand.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub fn exp(x: __m512) -> __m512 {
    let x = _mm512_max_ps(_mm512_set1_ps(-87.0), _mm512_min_ps(_mm512_set1_ps(88.0), x));
    let power = _mm512_roundscale_ps::<0>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, the first with few enough bits that its multiples are exact.
    let r = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693_359_4), x);
    let r = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.121_944_4e-4), r);
    let series = [0.008_333_39, 0.041_666_66, 0.166_666_66, 0.5, 1.0, 1.0].into_iter();
    let series =
        series.fold(_mm512_set1_ps(0.001_393_1), |sum, next| _mm512_fmadd_ps(sum, r, _mm512_set1_ps(next)));
    _mm512_scalef_ps(series, power)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn sigmoid(x: __m512) -> __m512 {
    let one = _mm512_set1_ps(1.0);
    _mm512_div_ps(one, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))))
}

/// The normal distribution to 1e-7 (Abramowitz and Stegun 7.1.26), and its density.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn normal(x: __m512) -> (__m512, __m512) {
    let one = _mm512_set1_ps(1.0);
    let z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(std::f32::consts::FRAC_1_SQRT_2));
    let bell = exp(_mm512_fnmadd_ps(z, z, _mm512_setzero_ps()));
    let t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.327_591_1), one));
    let series = [-1.453_152_f32, 1.421_413_8, -0.284_496_72, 0.254_829_6].into_iter();
    let series =
        series.fold(_mm512_set1_ps(1.061_405_4), |sum, next| _mm512_fmadd_ps(sum, t, _mm512_set1_ps(next)));
    // Half of what is beyond |x|.
    let tail = _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(series, t), bell), _mm512_set1_ps(0.5));
    let positive = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_setzero_ps());
    let below = _mm512_mask_blend_ps(positive, tail, _mm512_sub_ps(one, tail));
    (below, _mm512_mul_ps(bell, _mm512_set1_ps(0.398_942_3)))
}

/// tanh(c (x + k x^3)) of the tanh approximation, and the derivative of its argument.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn tanh(x: __m512) -> (__m512, __m512) {
    let (c, k) = (0.797_884_6, 0.044_715);
    let (one, square) = (_mm512_set1_ps(1.0), _mm512_mul_ps(x, x));
    let inner = _mm512_fmadd_ps(square, _mm512_set1_ps(c * k), _mm512_set1_ps(c));
    let slope = _mm512_fmadd_ps(square, _mm512_set1_ps(3.0 * c * k), _mm512_set1_ps(c));
    // 2 sigmoid(2 u) - 1
    let u = _mm512_mul_ps(_mm512_mul_ps(x, inner), _mm512_set1_ps(2.0));
    (_mm512_fmsub_ps(sigmoid(u), _mm512_set1_ps(2.0), one), slope)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn activate(activation: Activation, x: __m512) -> __m512 {
    match activation {
        Activation::QuickGelu => _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(x, _mm512_set1_ps(1.702)))),
        Activation::Gelu => _mm512_mul_ps(x, normal(x).0),
        Activation::GeluTanh => {
            let half = _mm512_mul_ps(x, _mm512_set1_ps(0.5));
            _mm512_fmadd_ps(half, tanh(x).0, half)
        }
        Activation::Silu => _mm512_mul_ps(x, sigmoid(x)),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn slope(activation: Activation, x: __m512) -> __m512 {
    let (one, half) = (_mm512_set1_ps(1.0), _mm512_set1_ps(0.5));
    match activation {
        // s (1 + 1.702 x (1 - s)), s = sigmoid(1.702 x)
        Activation::QuickGelu => {
            let x = _mm512_mul_ps(x, _mm512_set1_ps(1.702));
            let s = sigmoid(x);
            _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one))
        }
        Activation::Gelu => {
            let (below, density) = normal(x);
            _mm512_fmadd_ps(x, density, below)
        }
        // (1 + t) / 2 + x (1 - t^2) u' / 2
        Activation::GeluTanh => {
            let (t, inner) = tanh(x);
            let curve = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_fnmadd_ps(t, t, one)), inner);
            _mm512_mul_ps(half, _mm512_add_ps(_mm512_add_ps(one, t), curve))
        }
        // s (1 + x (1 - s)), s = sigmoid(x)
        Activation::Silu => {
            let s = sigmoid(x);
            _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one))
        }
    }
}

const ALL: __mmask16 = 0xffff;

/// Two neighbours of a per-feature row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn both(row: &[f32], pair: usize) -> (__m512, __m512) {
    (_mm512_set1_ps(row[2 * pair]), _mm512_set1_ps(row[2 * pair + 1]))
}

/// The result plus a bias, as words of `F`.
pub struct Keep<'a, F> {
    pub bias: &'a [f32],
    pub to: Mat,
    pub format: std::marker::PhantomData<F>,
}

impl<F: Format> Finish for Keep<'_, F> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn pair(&self, panel: usize, pair: usize, a: __m512, b: __m512) {
        let (bias_a, bias_b) = both(self.bias, pair);
        // Safety: the caller's.
        unsafe {
            F::store(self.to.panel(panel), pair, ALL, _mm512_add_ps(a, bias_a), _mm512_add_ps(b, bias_b));
        }
    }
}

/// f32 without a bias, or added to what is there.
pub struct Plain {
    pub to: Mat,
    pub add: bool,
}

impl Finish for Plain {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn pair(&self, panel: usize, pair: usize, mut a: __m512, mut b: __m512) {
        // Safety: the caller's.
        unsafe {
            let to = self.to.panel(panel);
            if self.add {
                let (old_a, old_b) = Single::load(to, pair);
                (a, b) = (_mm512_add_ps(a, old_a), _mm512_add_ps(b, old_b));
            }
            Single::store(to, pair, ALL, a, b);
        }
    }
}

/// The residual stream plus the result and a bias; `from` and `to` may be the same.
pub struct Residual<'a> {
    pub bias: &'a [f32],
    pub from: Mat,
    pub to: Mat,
}

impl Finish for Residual<'_> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn pair(&self, panel: usize, pair: usize, a: __m512, b: __m512) {
        let (bias_a, bias_b) = both(self.bias, pair);
        // Safety: the caller's.
        unsafe {
            let (old_a, old_b) = Single::load(self.from.panel(panel), pair);
            let (a, b) = (_mm512_add_ps(a, bias_a), _mm512_add_ps(b, bias_b));
            Single::store(self.to.panel(panel), pair, ALL, _mm512_add_ps(old_a, a), _mm512_add_ps(old_b, b));
        }
    }
}

/// The MLP's inner layer: with a bias, kept before the activation where `up` says, and after it.
pub struct Activated<'a, F> {
    pub bias: &'a [f32],
    pub activation: Activation,
    pub up: Option<Mat>,
    pub to: Mat,
    pub format: std::marker::PhantomData<F>,
}

impl<F: Format> Finish for Activated<'_, F> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn pair(&self, panel: usize, pair: usize, a: __m512, b: __m512) {
        let (bias_a, bias_b) = both(self.bias, pair);
        let (a, b) = (_mm512_add_ps(a, bias_a), _mm512_add_ps(b, bias_b));
        // Safety: the caller's.
        unsafe {
            if let Some(up) = self.up {
                F::store(up.panel(panel), pair, ALL, a, b);
            }
            let (a, b) = (activate(self.activation, a), activate(self.activation, b));
            F::store(self.to.panel(panel), pair, ALL, a, b);
        }
    }
}

/// The gradient at the MLP's inner layer before its activation.
pub struct Deactivated<F> {
    pub activation: Activation,
    pub up: Mat,
    pub to: Mat,
    pub format: std::marker::PhantomData<F>,
}

impl<F: Format> Finish for Deactivated<F> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn pair(&self, panel: usize, pair: usize, a: __m512, b: __m512) {
        // Safety: the caller's.
        unsafe {
            let (up_a, up_b) = F::load(self.up.panel(panel), pair);
            let (a, b) = (
                _mm512_mul_ps(a, slope(self.activation, up_a)),
                _mm512_mul_ps(b, slope(self.activation, up_b)),
            );
            F::store(self.to.panel(panel), pair, ALL, a, b);
        }
    }
}

/// Means and 1 / deviations of 16 tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn moments<F: Format>(x: *const u32, width: usize, eps: f32) -> (__m512, __m512) {
    let scale = _mm512_set1_ps(1.0 / width as f32);
    let mut sums = [_mm512_setzero_ps(); 4];
    // Safety: the caller's.
    unsafe {
        for pair in 0..width / 2 {
            let (a, b) = F::load(x, pair);
            let at = 2 * (pair % 2);
            sums[at] = _mm512_add_ps(sums[at], a);
            sums[at + 1] = _mm512_add_ps(sums[at + 1], b);
        }
        let mean = _mm512_mul_ps(together(sums), scale);
        sums = [_mm512_setzero_ps(); 4];
        for pair in 0..width / 2 {
            let (a, b) = F::load(x, pair);
            let (a, b) = (_mm512_sub_ps(a, mean), _mm512_sub_ps(b, mean));
            let at = 2 * (pair % 2);
            sums[at] = _mm512_fmadd_ps(a, a, sums[at]);
            sums[at + 1] = _mm512_fmadd_ps(b, b, sums[at + 1]);
        }
        let variance = _mm512_fmadd_ps(together(sums), scale, _mm512_set1_ps(eps));
        (mean, _mm512_div_ps(_mm512_set1_ps(1.0), _mm512_sqrt_ps(variance)))
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn together([a, b, c, d]: [__m512; 4]) -> __m512 {
    _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d))
}

/// A layer norm's weight and bias.
pub struct Norm {
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    pub eps: f32,
}

impl Norm {
    /// Panel `x`, f32, normalised to words of `F`; where `copy` says, `x` itself as words of `F`.
    ///
    /// # Safety
    /// The panels must be as wide as the norm.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    pub unsafe fn forward<F: Format>(&self, x: *const u32, to: *mut u32, copy: Option<*mut u32>) {
        let width = self.weight.len();
        // Safety: the caller's.
        unsafe {
            let (mean, inverse) = moments::<Single>(x, width, self.eps);
            for pair in 0..width / 2 {
                let (a, b) = Single::load(x, pair);
                if let Some(copy) = copy {
                    F::store(copy, pair, ALL, a, b);
                }
                let ((wa, wb), (ba, bb)) = (both(&self.weight, pair), both(&self.bias, pair));
                let a = _mm512_mul_ps(_mm512_sub_ps(a, mean), inverse);
                let b = _mm512_mul_ps(_mm512_sub_ps(b, mean), inverse);
                F::store(to, pair, ALL, _mm512_fmadd_ps(a, wa, ba), _mm512_fmadd_ps(b, wb, bb));
            }
        }
    }

    /// The gradient at the result, f32, to that at panel `x`, which is put to `to`, f32, or with
    /// `add` added to what is there; where `copy` says also as words of `F`.
    ///
    /// With x^ = (x - mean) / s and g' = g w:  (g' - mean(g') - x^ mean(g' x^)) / s.
    ///
    /// # Safety
    /// As for [`Norm::forward`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    pub unsafe fn vjp<F: Format>(
        &self,
        x: *const u32,
        gradient: *const u32,
        to: *mut u32,
        add: bool,
        copy: Option<*mut u32>,
    ) {
        let width = self.weight.len();
        let scale = _mm512_set1_ps(1.0 / width as f32);
        // Safety: the caller's.
        unsafe {
            let (mean, inverse) = moments::<F>(x, width, self.eps);
            let (mut flat, mut along) = ([_mm512_setzero_ps(); 4], [_mm512_setzero_ps(); 4]);
            for pair in 0..width / 2 {
                let ((xa, xb), (ga, gb)) = (F::load(x, pair), Single::load(gradient, pair));
                let (wa, wb) = both(&self.weight, pair);
                let (ga, gb) = (_mm512_mul_ps(ga, wa), _mm512_mul_ps(gb, wb));
                let at = 2 * (pair % 2);
                flat[at] = _mm512_add_ps(flat[at], ga);
                flat[at + 1] = _mm512_add_ps(flat[at + 1], gb);
                along[at] = _mm512_fmadd_ps(ga, _mm512_sub_ps(xa, mean), along[at]);
                along[at + 1] = _mm512_fmadd_ps(gb, _mm512_sub_ps(xb, mean), along[at + 1]);
            }
            let flat = _mm512_mul_ps(together(flat), scale);
            // Twice 1 / s: x^ is not formed.
            let along = _mm512_mul_ps(together(along), _mm512_mul_ps(scale, _mm512_mul_ps(inverse, inverse)));
            for pair in 0..width / 2 {
                let ((xa, xb), (ga, gb)) = (F::load(x, pair), Single::load(gradient, pair));
                let (wa, wb) = both(&self.weight, pair);
                let a = _mm512_fmsub_ps(ga, wa, flat);
                let b = _mm512_fmsub_ps(gb, wb, flat);
                let a = _mm512_fnmadd_ps(_mm512_sub_ps(xa, mean), along, a);
                let b = _mm512_fnmadd_ps(_mm512_sub_ps(xb, mean), along, b);
                let (mut a, mut b) = (_mm512_mul_ps(a, inverse), _mm512_mul_ps(b, inverse));
                if add {
                    let (old_a, old_b) = Single::load(to, pair);
                    (a, b) = (_mm512_add_ps(a, old_a), _mm512_add_ps(b, old_b));
                }
                Single::store(to, pair, ALL, a, b);
                if let Some(copy) = copy {
                    F::store(copy, pair, ALL, a, b);
                }
            }
        }
    }
}

/// f32 words as words of `F`, `width` features.
///
/// # Safety
/// Both panels must be that wide.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub unsafe fn convert<F: Format>(x: *const u32, to: *mut u32, width: usize) {
    for pair in 0..width / 2 {
        // Safety: the caller's.
        unsafe {
            let (a, b) = Single::load(x, pair);
            F::store(to, pair, ALL, a, b);
        }
    }
}

/// The tokens of one picture in panels: rows `from` to `from + tokens` of all.
#[derive(Clone, Copy)]
pub struct Span {
    pub from: usize,
    pub tokens: usize,
}

impl Span {
    /// Panels touched, each with the mask of its lanes that are the picture's and the place of its
    /// lane 0 relative to the picture's first token.
    fn panels(self) -> impl Iterator<Item = (usize, __mmask16, isize)> {
        let end = self.from + self.tokens;
        (self.from / LANES..end.div_ceil(LANES)).map(move |panel| {
            let first = panel * LANES;
            let low = self.from.saturating_sub(first);
            let high = (end - first).min(LANES);
            let mask = (((1u32 << high) - 1) & !((1u32 << low) - 1)) as __mmask16;
            (panel, mask, first as isize - self.from as isize)
        })
    }
}

/// Columns before the first token in a row of a picture's own matrix: a panel's lanes may reach
/// over both ends.
pub const MARGIN: usize = LANES;

/// Features `features` of a picture to rows of f32, times `scale`: row f has feature f, with
/// [`MARGIN`] columns before the first token, zeros behind the last.
///
/// # Safety
/// `to` must have `stride` numbers per feature, at least two margins more than tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub unsafe fn gather<F: Format>(
    from: Mat,
    features: std::ops::Range<usize>,
    span: Span,
    to: *mut f32,
    stride: usize,
    scale: f32,
) {
    let scale = _mm512_set1_ps(scale);
    let rows = features.len();
    // Safety: the caller's.
    unsafe {
        for (panel, mask, shift) in span.panels() {
            let at = to.offset(MARGIN as isize + shift);
            for row in (0..rows).step_by(2) {
                let (a, b) = F::load(from.panel(panel), (features.start + row) / 2);
                let (a, b) = (_mm512_maskz_mul_ps(mask, a, scale), _mm512_maskz_mul_ps(mask, b, scale));
                _mm512_storeu_ps(at.add(row * stride), a);
                _mm512_storeu_ps(at.add((row + 1) * stride), b);
            }
        }
        for row in 0..rows {
            let end = MARGIN + span.tokens;
            let zeros = std::slice::from_raw_parts_mut(to.add(row * stride + end), stride - end);
            zeros.fill(0.0);
        }
    }
}

/// The way back from [`gather`], leaving other pictures' tokens alone; with `add` it adds, for f32
/// alone.
///
/// # Safety
/// As for [`gather`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub unsafe fn scatter<F: Format>(
    from: *const f32,
    stride: usize,
    to: Mat,
    features: std::ops::Range<usize>,
    span: Span,
    add: bool,
) {
    // Safety: the caller's.
    unsafe {
        for (panel, mask, shift) in span.panels() {
            let at = from.offset(MARGIN as isize + shift);
            for row in (0..features.len()).step_by(2) {
                let pair = (features.start + row) / 2;
                let (mut a, mut b) =
                    (_mm512_loadu_ps(at.add(row * stride)), _mm512_loadu_ps(at.add((row + 1) * stride)));
                if add {
                    let (old_a, old_b) = F::load(to.panel(panel), pair);
                    (a, b) = (_mm512_add_ps(a, old_a), _mm512_add_ps(b, old_b));
                }
                F::store(to.panel(panel), pair, mask, a, b);
            }
        }
    }
}

/// The result as words of `F`.
pub struct Words<F> {
    pub to: Mat,
    pub format: std::marker::PhantomData<F>,
}

impl<F: Format> Finish for Words<F> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn pair(&self, panel: usize, pair: usize, a: __m512, b: __m512) {
        // Safety: the caller's.
        unsafe { F::store(self.to.panel(panel), pair, ALL, a, b) }
    }
}
