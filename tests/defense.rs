//! GIF against a Fourier transform, and the defended tower against PyTorch and against the
//! undefended one.
//!
//! Differences are the largest absolute one over the reference's largest entry. Reached on a
//! machine with AVX-512: GIF 2e-6, defended outputs 3e-7 and gradients 1e-6.

mod fixture;

use std::sync::Arc;

use candle_core::{DType, Device, IndexOp, Tensor};
use fixture::{Fixture, Memory, assert_close, assert_same, clip, clip_config, difference, values};
use radapt::defense::acquire::training_free;
use radapt::defense::{Defense, Fra, Gif, Method, TRAINING_FREE_MIX, default_cutoff};
use radapt::tower::clip::Clip;
use radapt::tower::{
    AttentionMix, Cotangent, Features, Gradients, InputFilter, Inserts, VisionTower, Want, Wrt,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustfft::FftPlanner;
use rustfft::num_complex::Complex;

const OUTPUT: f64 = 1e-5;
const GRADIENT: f64 = 1e-4;
const BOTH: Wrt = Wrt { pixels: true, anchor: true };
const SIZES: [(usize, usize); 14] = [
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 17),
    (16, 1),
    (2, 2),
    (3, 2),
    (7, 11),
    (8, 5),
    (16, 16),
    (37, 53),
    (20, 64),
    (97, 31),
    (336, 336),
];
const CUTOFFS: [f64; 6] = [0.3, 1.0, 2.5, 7.0, 40.0, 1e3];

fn expected() -> Fixture {
    Fixture::open("clip/expected.safetensors")
}

fn gif(height: usize, width: usize, cutoff: f64) -> Gif {
    Gif::new(height, width, cutoff, &Device::Cpu).unwrap()
}

fn fra(anchor: &Tensor, alpha: f64, beta: f64) -> Fra {
    Fra::new(anchor, alpha, beta, &Device::Cpu).unwrap()
}

fn defended(tower: &Clip, gif: Option<Gif>, fra: Option<Fra>) -> Clip {
    let defense = Defense { gif: gif.map(Arc::new), fra: fra.map(Arc::new), ..Default::default() };
    tower.with(defense.inserts())
}

/// Uniform in [0, 1].
fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn at_embeds(gradient: &Tensor) -> Cotangent {
    Cotangent { embeds: Some(gradient.clone()), ..Default::default() }
}

fn at_hidden(block: usize, gradient: &Tensor) -> Cotangent {
    Cotangent { hidden: vec![(block, gradient.clone())], ..Default::default() }
}

fn run(tower: &Clip, pixels: &Tensor, cotangent: &Cotangent, wrt: Wrt) -> (Features, Gradients) {
    let (features, tape) = tower.forward_tape(pixels, &Want::everything(tower.spec())).unwrap();
    let gradients = tower.vjp(&tape, cotangent, wrt).unwrap();
    (features, gradients)
}

#[track_caller]
fn assert_same_run(what: &str, found: &(Features, Gradients), want: &(Features, Gradients)) {
    for (block, (found, want)) in found.0.hidden.iter().zip(&want.0.hidden).enumerate() {
        assert_same(&format!("{what}: hidden {block}"), found, want);
    }
    assert_same(
        &format!("{what}: pooled"),
        found.0.pooled.as_ref().unwrap(),
        want.0.pooled.as_ref().unwrap(),
    );
    let [found, want] = [found, want].map(|(_, gradients)| gradients.pixels.as_ref().unwrap());
    assert_same(&format!("{what}: gradient"), found, want);
}

// --- GIF ---------------------------------------------------------------------------------------

/// The discrete Fourier transform of rows, then of columns, without any factor.
fn fft2(plane: &mut [Complex<f64>], height: usize, width: usize, inverse: bool) {
    let mut planner = FftPlanner::new();
    let mut plan = |n| if inverse { planner.plan_fft_inverse(n) } else { planner.plan_fft_forward(n) };
    let (rows, columns) = (plan(width), plan(height));
    plane.chunks_exact_mut(width).for_each(|row| rows.process(row));
    for x in 0..width {
        let mut column: Vec<_> = (0..height).map(|y| plane[y * width + x]).collect();
        columns.process(&mut column);
        column.into_iter().enumerate().for_each(|(y, value)| plane[y * width + x] = value);
    }
}

/// The paper's Eq. 5 as it is written: transform, multiply, transform back.
fn by_fourier(pixels: &Tensor, cutoff: f64) -> Tensor {
    let (_, _, height, width) = pixels.dims4().unwrap();
    // Bin i of n stands for frequency i or i - n, whichever is nearer to zero.
    let frequency =
        |i: usize, n: usize| (if i <= (n - 1) / 2 { i as f64 } else { i as f64 - n as f64 }) / cutoff;
    let mut filtered = Vec::new();
    for plane in values(pixels).chunks_exact(height * width) {
        let mut plane: Vec<_> = plane.iter().map(|&v| Complex::new(v, 0.0)).collect();
        fft2(&mut plane, height, width, false);
        for (i, value) in plane.iter_mut().enumerate() {
            let (u, v) = (frequency(i / width, height), frequency(i % width, width));
            *value *= (-0.5 * (u * u + v * v)).exp() / (height * width) as f64;
        }
        fft2(&mut plane, height, width, true);
        filtered.extend(plane.iter().map(|value| value.re));
    }
    Tensor::from_vec(filtered, pixels.dims(), &Device::Cpu).unwrap()
}

#[test]
fn gif_equals_the_fourier_transform_for_any_size_and_cutoff() {
    let mut worst: f64 = 0.0;
    for (i, (height, width)) in SIZES.into_iter().enumerate() {
        let pixels = random(&[2, 3, height, width], i as u64);
        for cutoff in CUTOFFS {
            let found = gif(height, width, cutoff).filter(&pixels).unwrap();
            let difference = difference(&found, &by_fourier(&pixels, cutoff));
            assert!(difference <= OUTPUT, "{height}x{width}, cutoff {cutoff}: {difference:.1e}");
            worst = worst.max(difference);
        }
    }
    println!("GIF against rustfft: {worst:.1e}");
}

#[test]
fn gif_equals_pytorch() {
    let expected = expected();
    for (input, output, cutoff) in [
        ("gif.7x11.in", "gif.7x11.out", 2.5),
        ("gif.8x5.in", "gif.8x5.out", 2.5),
        ("pixels", "gif.pixels", 4.0),
    ] {
        let pixels = expected.tensor(input);
        let (_, _, height, width) = pixels.dims4().unwrap();
        assert_close(
            output,
            &gif(height, width, cutoff).filter(&pixels).unwrap(),
            &expected.tensor(output),
            OUTPUT,
        );
    }
}

#[test]
fn gif_is_its_own_transpose() {
    for (i, (height, width)) in SIZES.into_iter().enumerate() {
        let (x, y) =
            (random(&[1, 3, height, width], i as u64), random(&[1, 3, height, width], 100 + i as u64));
        // Around zero, so that the products are not all of one sign.
        let [x, y] = [x, y].map(|t| (t - 0.5).unwrap());
        let dot =
            |a: &Tensor, b: &Tensor| -> f64 { values(a).iter().zip(values(b)).map(|(a, b)| a * b).sum() };
        for cutoff in CUTOFFS {
            let gif = gif(height, width, cutoff);
            let (left, right) = (dot(&gif.apply(&x).unwrap(), &y), dot(&x, &gif.adjoint(&y).unwrap()));
            let size = (dot(&x, &x) * dot(&y, &y)).sqrt();
            assert!(
                (left - right).abs() <= 1e-6 * size,
                "{height}x{width}, cutoff {cutoff}: {left} and {right}"
            );
        }
    }
}

#[test]
fn gif_takes_a_transposed_picture_for_what_it_shows() {
    let pixels = random(&[1, 3, 7, 11], 1);
    let gif = gif(7, 11, 2.5);
    let turned = pixels.transpose(2, 3).unwrap().contiguous().unwrap().transpose(2, 3).unwrap();
    assert!(!turned.is_contiguous());
    assert_same("apply", &gif.apply(&turned).unwrap(), &gif.apply(&pixels).unwrap());
    assert_same("adjoint", &gif.adjoint(&turned).unwrap(), &gif.adjoint(&pixels).unwrap());
}

#[test]
fn gif_leaves_a_uniform_picture_as_it_is() {
    for (height, width) in SIZES {
        for cutoff in CUTOFFS {
            let uniform =
                (Tensor::ones((1, 3, height, width), DType::F32, &Device::Cpu).unwrap() * 0.7).unwrap();
            let difference = difference(&gif(height, width, cutoff).filter(&uniform).unwrap(), &uniform);
            assert!(difference <= 2e-6, "{height}x{width}, cutoff {cutoff}: {difference:.1e}");
        }
    }
}

#[test]
fn gif_with_a_large_cutoff_changes_nothing_and_with_a_small_one_leaves_the_mean() {
    let pixels = random(&[1, 3, 9, 14], 1);
    for cutoff in [1e6, 1e200, f64::MAX] {
        assert_close(
            &format!("cutoff {cutoff:e}"),
            &gif(9, 14, cutoff).filter(&pixels).unwrap(),
            &pixels,
            1e-6,
        );
    }
    let mean = pixels.mean_keepdim(3).unwrap().mean_keepdim(2).unwrap().broadcast_as(pixels.shape()).unwrap();
    for cutoff in [1e-2, 1e-200, f64::MIN_POSITIVE] {
        assert_close(
            &format!("cutoff {cutoff:e}"),
            &gif(9, 14, cutoff).filter(&pixels).unwrap(),
            &mean,
            1e-6,
        );
    }
}

#[test]
fn a_smaller_cutoff_keeps_less() {
    let pixels = random(&[1, 3, 20, 20], 1);
    let detail = |cutoff: f64| {
        let filtered = gif(20, 20, cutoff).filter(&pixels).unwrap();
        values(&(&filtered - 0.5).unwrap()).iter().map(|v| v * v).sum::<f64>()
    };
    let kept: Vec<f64> = [1.0, 2.0, 4.0, 8.0, 16.0].map(detail).to_vec();
    assert!(kept.windows(2).all(|pair| pair[0] < pair[1]), "{kept:?}");
}

#[test]
fn the_default_cutoff_is_the_papers_forty_and_less_for_small_pictures() {
    assert_eq!([224, 336, 1024].map(default_cutoff), [40.0; 3]);
    assert_eq!(default_cutoff(112), 20.0);
}

// --- The defended tower ------------------------------------------------------------------------

#[test]
fn the_training_free_anchor_equals_pytorch() {
    let want = expected().tensor("anchor");
    let anchor = training_free(&clip("v4")).unwrap();
    assert_close("anchor", &anchor, &want, OUTPUT);
    let filtered = defended(&clip("v4"), Some(gif(20, 20, 1.0)), Some(fra(&want, 1.2, -0.8)));
    assert_same("whatever is put in", &training_free(&filtered).unwrap(), &anchor);
}

#[test]
fn the_first_attention_is_that_of_each_picture() {
    let pixels = expected().tensor("pixels");
    let tower = clip("v4");
    let white = Tensor::cat(
        &[&pixels.i(..1).unwrap(), &Tensor::ones((1, 3, 20, 20), DType::F32, &Device::Cpu).unwrap()],
        0,
    );
    let attention = tower.first_attention(&white.unwrap()).unwrap();
    assert_close("white", &attention.i(1).unwrap(), &training_free(&tower).unwrap(), 1e-6);
    assert!(difference(&attention.i(0).unwrap(), &attention.i(1).unwrap()) > 0.1);
}

/// The six defended towers of the fixture: name, alpha, beta, whether GIF is in.
const DEFENCES: [(&str, f64, f64, bool); 6] = [
    ("a1.2_b-0.8_gif", 1.2, -0.8, true),
    ("a1.2_b-0.8_nogif", 1.2, -0.8, false),
    ("a1.2_b0.0_gif", 1.2, 0.0, true),
    ("a1.2_b0.0_nogif", 1.2, 0.0, false),
    ("a0.8_b0.2_gif", 0.8, 0.2, true),
    ("a0.8_b0.2_nogif", 0.8, 0.2, false),
];

#[test]
fn defended_outputs_and_gradients_equal_pytorch() {
    let expected = expected();
    let pixels = expected.tensor("pixels");
    for (name, alpha, beta, filtered) in DEFENCES {
        let fra = fra(&expected.tensor("anchor"), alpha, beta);
        let tower = defended(&clip("v4"), filtered.then(|| gif(20, 20, 4.0)), Some(fra));
        let losses = [
            ("embeds", at_embeds(&expected.tensor("c_embeds"))),
            ("hidden3", at_hidden(3, &expected.tensor("c_hidden"))),
        ];
        for (loss, cotangent) in losses {
            let (features, gradients) = run(&tower, &pixels, &cotangent, BOTH);
            let want = |what: &str| expected.tensor(&format!("def.{name}.{what}"));
            assert_close(&format!("{name} hidden.3"), &features.hidden[3], &want("hidden.3"), OUTPUT);
            assert_close(&format!("{name} embeds"), &features.embeds.unwrap(), &want("embeds"), OUTPUT);
            for (what, found) in [("pixels", gradients.pixels), ("anchor", gradients.anchor)] {
                let what = format!("grad.{loss}.{what}");
                assert_close(&format!("{name} {what}"), &found.unwrap(), &want(&what), GRADIENT);
            }
        }
    }
}

#[test]
fn a_gradient_is_the_same_whatever_else_is_asked_for() {
    let expected = expected();
    let pixels = expected.tensor("pixels");
    for (name, alpha, beta, filtered) in DEFENCES {
        let fra = fra(&expected.tensor("anchor"), alpha, beta);
        let tower = defended(&clip("v4"), filtered.then(|| gif(20, 20, 4.0)), Some(fra));
        let cotangent = Cotangent {
            hidden: vec![(0, expected.tensor("c_hidden")), (2, expected.tensor("c_hidden"))],
            embeds: Some(expected.tensor("c_embeds")),
            ..Default::default()
        };
        let (_, both) = run(&tower, &pixels, &cotangent, BOTH);
        let (_, anchor) = run(&tower, &pixels, &cotangent, Wrt { pixels: false, anchor: true });
        let (_, image) = run(&tower, &pixels, &cotangent, Wrt { pixels: true, anchor: false });
        assert!(anchor.pixels.is_none() && image.anchor.is_none());
        assert_same(&format!("{name} anchor"), &anchor.anchor.unwrap(), &both.anchor.unwrap());
        assert_same(&format!("{name} pixels"), &image.pixels.unwrap(), &both.pixels.unwrap());
    }
}

#[test]
fn the_anchors_gradient_from_the_input_of_block_one_is_zero() {
    let expected = expected();
    let tower = defended(&clip("v4"), None, Some(fra(&expected.tensor("anchor"), 1.2, -0.8)));
    let cotangent = at_hidden(0, &expected.tensor("c_hidden"));
    for want in [Want::hidden(0), Want::hidden(2)] {
        let (_, tape) = tower.forward_tape(&expected.tensor("pixels"), &want).unwrap();
        let gradients = tower.vjp(&tape, &cotangent, BOTH).unwrap();
        let anchor = gradients.anchor.unwrap();
        assert_eq!(anchor.dims(), [26, 32]);
        assert!(values(&anchor).iter().all(|&v| v == 0.0));
        assert!(values(&gradients.pixels.unwrap()).iter().any(|&v| v != 0.0));
    }
}

#[test]
fn alpha_zero_and_beta_one_without_gif_is_the_undefended_tower_to_the_bit() {
    let expected = expected();
    let pixels = expected.tensor("pixels");
    for folder in ["v4", "gelu", "gelu_tanh"] {
        let tower = clip(folder);
        let neutral = defended(&tower, None, Some(fra(&expected.tensor("anchor"), 0.0, 1.0)));
        for cotangent in [at_embeds(&expected.tensor("c_embeds")), at_hidden(3, &expected.tensor("c_hidden"))]
        {
            let wrt = Wrt { pixels: true, anchor: false };
            let found = run(&neutral, &pixels, &cotangent, wrt);
            assert_same_run(folder, &found, &run(&tower, &pixels, &cotangent, wrt));
            assert_same_run(
                folder,
                &found,
                &run(&neutral.with(Inserts::default()), &pixels, &cotangent, wrt),
            );
        }
    }
}

#[test]
fn an_anchor_of_zeros_scales_the_attention_alone() {
    let expected = expected();
    let pixels = expected.tensor("pixels");
    let zeros = expected.tensor("anchor").zeros_like().unwrap();
    let found = defended(&clip("v5_bare"), None, Some(fra(&zeros, 1.2, 0.5)));
    // The same by halving the output projection, which is exact.
    let halved = ["weight", "bias"].into_iter().fold(Memory::of(&clip("v5_bare")), |memory, part| {
        memory.change(&format!("encoder.layers.0.self_attn.out_proj.{part}"), |t| t * 0.5)
    });
    let want = halved.tower(&clip_config("v5_bare"));
    let cotangent = at_hidden(3, &expected.tensor("c_hidden"));
    let wrt = Wrt { pixels: true, anchor: false };
    assert_same_run(
        "beta 0.5",
        &run(&found, &pixels, &cotangent, wrt),
        &run(&want, &pixels, &cotangent, wrt),
    );
}

#[test]
fn beta_zero_never_touches_the_first_attention() {
    let expected = expected();
    let (pixels, anchor) = (expected.tensor("pixels"), expected.tensor("anchor"));
    let config = clip_config("v5_bare");
    let sound = clip("v5_bare");
    // Whoever reads one of these weights answers NaN.
    let broken =
        ["q_proj", "k_proj", "v_proj", "out_proj"].into_iter().fold(Memory::of(&sound), |memory, part| {
            memory.change(&format!("encoder.layers.0.self_attn.{part}.weight"), |t| t * f64::NAN)
        });
    let broken = broken.tower(&config);
    let cotangent = at_hidden(3, &expected.tensor("c_hidden"));
    let run = |tower: &Clip, beta: f64| {
        run(&defended(tower, None, Some(fra(&anchor, 1.2, beta))), &pixels, &cotangent, BOTH)
    };
    let want = run(&sound, 0.0);
    assert_same_run("beta 0", &run(&broken, 0.0), &want);
    let (features, _) = run(&broken, 0.1);
    assert!(values(&features.hidden[1]).iter().all(|v| v.is_nan()), "the broken weights do break");
    assert!(!fra(&anchor, 1.2, 0.0).needs_attention() && fra(&anchor, 1.2, 1e-30).needs_attention());

    let near = run(&sound, 1e-7);
    for block in 0..=4 {
        assert_close(
            &format!("beta 1e-7 hidden {block}"),
            &near.0.hidden[block],
            &want.0.hidden[block],
            1e-6,
        );
    }
    assert_close("beta 1e-7 gradient", &near.1.pixels.unwrap(), &want.1.pixels.unwrap(), 1e-6);
    assert_close("beta 1e-7 anchor gradient", &near.1.anchor.unwrap(), &want.1.anchor.unwrap(), 1e-6);
}

#[test]
fn the_anchors_gradient_is_what_the_loss_does_when_the_anchor_moves() {
    let expected = expected();
    let (pixels, anchor, given) =
        (expected.tensor("pixels"), expected.tensor("anchor"), expected.tensor("c_embeds"));
    let tower = clip("v4");
    let (_, gradients) =
        run(&defended(&tower, None, Some(fra(&anchor, 1.2, -0.8))), &pixels, &at_embeds(&given), BOTH);
    let gradient = gradients.anchor.unwrap();
    let norm = values(&gradient).iter().map(|v| v * v).sum::<f64>().sqrt();
    let loss = |step: f64| -> f64 {
        let moved = (&anchor + (&gradient * (step / norm)).unwrap()).unwrap();
        let tower = defended(&tower, None, Some(fra(&moved, 1.2, -0.8)));
        let embeds = tower.forward(&pixels, &Want::pooled()).unwrap().embeds.unwrap();
        values(&embeds).iter().zip(values(&given)).map(|(a, b)| a * b).sum()
    };
    let slope = |step: f64| (loss(step) - loss(-step)) / (2.0 * step);
    let found = (4.0 * slope(0.05) - slope(0.1)) / 3.0;
    println!("anchor slope: {found} for {norm}: {:.1e}", (found / norm - 1.0).abs());
    assert!((found / norm - 1.0).abs() <= GRADIENT, "{found} for {norm}");
}

#[test]
fn half_weights_are_defended_like_their_rounded_values() {
    let expected = expected();
    let pixels = expected.tensor("pixels");
    let half = clip("v4").to_dtype(DType::F16).unwrap();
    let rounded = half.to_dtype(DType::F32).unwrap();
    let cotangent = at_embeds(&expected.tensor("c_embeds"));
    let run = |tower: &Clip| {
        let fra = fra(&training_free(tower).unwrap(), TRAINING_FREE_MIX.0, TRAINING_FREE_MIX.1);
        run(&defended(tower, Some(gif(20, 20, 4.0)), Some(fra)), &pixels, &cotangent, BOTH)
    };
    assert_same_run("f16", &run(&half), &run(&rounded));
}

#[test]
fn the_defence_changes_what_the_tower_answers() {
    let expected = expected();
    let pixels = expected.tensor("pixels");
    let tower = clip("v4");
    let plain = tower.forward(&pixels, &Want::pooled()).unwrap().embeds.unwrap();
    let filtered = defended(&tower, Some(gif(20, 20, 4.0)), None);
    let anchored = defended(&tower, None, Some(fra(&expected.tensor("anchor"), 1.2, -0.8)));
    for tower in [filtered, anchored] {
        assert!(difference(&tower.forward(&pixels, &Want::pooled()).unwrap().embeds.unwrap(), &plain) > 0.05);
    }
}

// --- Errors and words --------------------------------------------------------------------------

#[track_caller]
fn assert_error<T>(result: radapt::Result<T>, message: &str) {
    assert_eq!(result.err().expect("an error").to_string(), message);
}

#[test]
fn cutoffs_that_are_not_positive_numbers_are_errors() {
    for cutoff in [0.0, -0.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let found = Gif::new(4, 4, cutoff, &Device::Cpu);
        assert_error(found, &format!("cutoff: expected a positive number of frequency bins, found {cutoff}"));
    }
    for (height, width) in [(0, 4), (4, 0)] {
        let message = format!("picture size: expected at least 1 x 1, found {height} x {width}");
        assert_error(Gif::new(height, width, 1.0, &Device::Cpu), &message);
    }
}

#[test]
fn a_picture_of_another_size_than_the_filters_is_an_error() {
    let message = "picture size: expected 4 x 6, found 6 x 4";
    assert_error(gif(4, 6, 1.0).filter(&random(&[1, 3, 6, 4], 1)), message);
    assert_error(gif(4, 6, 1.0).adjoint(&random(&[1, 3, 6, 4], 1)), message);
    let tower = defended(&clip("v4"), Some(gif(24, 24, 1.0)), None);
    let result = tower.forward(&expected().tensor("pixels"), &Want::pooled());
    assert_error(result, "picture size: expected 24 x 24, found 20 x 20");
}

#[test]
fn factors_that_are_not_finite_in_f32_are_errors() {
    let anchor = expected().tensor("anchor");
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e39] {
        assert_error(
            Fra::new(&anchor, value, 0.2, &Device::Cpu),
            &format!("alpha: expected a finite number, found {value}"),
        );
        assert_error(
            Fra::new(&anchor, 1.2, value, &Device::Cpu),
            &format!("beta: expected a finite number, found {value}"),
        );
    }
}

#[test]
fn an_anchor_of_another_shape_than_the_attention_is_an_error() {
    let anchor = expected().tensor("anchor");
    assert!(Fra::new(&anchor.unsqueeze(0).unwrap(), 1.2, 0.2, &Device::Cpu).is_err());
    assert!(Fra::new(&anchor.i(0).unwrap(), 1.2, 0.2, &Device::Cpu).is_err());
    let cut = |rows: usize, columns: usize| anchor.i((..rows, ..columns)).unwrap();
    for wrong in [cut(1, 32), cut(26, 1), cut(1, 1), cut(25, 32), cut(26, 31)] {
        for beta in [-0.8, 0.0] {
            let tower = defended(&clip("v4"), None, Some(fra(&wrong, 1.2, beta)));
            let result = tower.forward(&expected().tensor("pixels"), &Want::hidden(1));
            assert!(result.is_err(), "{:?} with beta {beta}", wrong.dims());
        }
    }
}

#[test]
fn a_defence_says_what_it_is() {
    let anchor = expected().tensor("anchor");
    let gif = Arc::new(gif(20, 20, 40.0));
    let fra = Arc::new(fra(&anchor, 1.2, -0.8));
    let method = Some(Method::TrainingFree);
    assert_eq!(Defense::default().summary(), None);
    // An anchor that is not used is not told of.
    let unused = Defense { anchor: Some("a.safetensors".into()), method, ..Default::default() };
    assert_eq!(unused.summary(), None);
    let cases = [
        (Some(&gif), None, Some("a.safetensors"), "GIF (cutoff 40)"),
        (None, Some(&fra), None, "FRA (anchor unnamed, training-free, alpha 1.2, beta -0.8)"),
        (None, Some(&fra), Some("training-free"), "FRA (anchor training-free, alpha 1.2, beta -0.8)"),
        (
            Some(&gif),
            Some(&fra),
            Some("a.safetensors"),
            "GIF (cutoff 40) and FRA (anchor a.safetensors, training-free, alpha 1.2, beta -0.8)",
        ),
    ];
    for (gif, fra, anchor, text) in cases {
        let defense =
            Defense { gif: gif.cloned(), fra: fra.cloned(), anchor: anchor.map(Into::into), method };
        let summary = defense.summary().unwrap();
        assert_eq!(summary.to_string(), text);
        assert_eq!(summary.cutoff, gif.map(|gif| gif.cutoff()));
        assert_eq!((summary.alpha, summary.beta), (fra.map(|f| f.alpha()), fra.map(|f| f.beta())));
        assert_eq!(summary.method, fra.and(method));
        assert_eq!(summary.anchor.as_deref(), fra.and(anchor));
        let (inserts, [input, attention]) = (defense.inserts(), [gif.is_some(), fra.is_some()]);
        assert_eq!((inserts.input.is_some(), inserts.attention.is_some()), (input, attention));
    }
}

#[test]
fn a_summary_in_json_has_null_for_parts_that_are_off() {
    let defense = Defense { gif: Some(Arc::new(gif(4, 4, 2.5))), ..Default::default() };
    let json = serde_json::to_value(defense.summary()).unwrap();
    let want =
        serde_json::json!({ "anchor": null, "method": null, "alpha": null, "beta": null, "cutoff": 2.5 });
    assert_eq!(json, want);
    let fra = fra(&expected().tensor("anchor"), 1.2, 0.2);
    let defense =
        Defense { fra: Some(Arc::new(fra)), method: Some(Method::ModelGuided), ..Default::default() };
    let json = serde_json::to_value(defense.summary()).unwrap();
    assert_eq!(
        (&json["method"], &json["beta"], &json["cutoff"]),
        (&"model-guided".into(), &0.2.into(), &().into())
    );
    assert!(serde_json::to_value(Defense::default().summary()).unwrap().is_null());
}
