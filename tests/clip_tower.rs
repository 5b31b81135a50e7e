//! The CLIP tower against PyTorch, against candle's autograd, against finite differences, and
//! against itself.
//!
//! Differences are the largest absolute one over the reference's largest entry. Reached on a
//! machine with AVX-512: outputs 4e-7 and gradients 7e-7 of PyTorch in f64, a whole tower 6e-7 and
//! attention's gradient alone 4e-6 of autograd in f64, finite differences 2e-6.

mod fixture;

use std::path::Path;

use candle_core::{D, DType, Device, IndexOp, Tensor, Var};
use fixture::{
    Fixture, MEAN, Memory, STD, assert_close, assert_same, clip, clip_config, difference, path, values,
};
use radapt::tower::clip::{Clip, ClipConfig, feature_block, without_class_token};
use radapt::tower::layers::{Activation, Attention, LayerNorm, Linear};
use radapt::tower::weights::{Checkpoint, Weights};
use radapt::tower::{Cotangent, Gradients, VisionTower, Want, Wrt};
use radapt::{Error, Result};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const ACTIVATIONS: [(&str, &str); 3] = [("quick_gelu", "v4"), ("gelu", "gelu"), ("gelu_tanh", "gelu_tanh")];
const OUTPUT: f64 = 1e-5;
const GRADIENT: f64 = 1e-4;
const PIXELS: Wrt = Wrt { pixels: true, anchor: false };

fn expected() -> Fixture {
    Fixture::open("clip/expected.safetensors")
}

fn everything(tower: &Clip) -> Want {
    Want::everything(tower.spec())
}

fn at_embeds(gradient: Tensor) -> Cotangent {
    Cotangent { embeds: Some(gradient), ..Default::default() }
}

fn at_pooled(gradient: Tensor) -> Cotangent {
    Cotangent { pooled: Some(gradient), ..Default::default() }
}

fn at_hidden(block: usize, gradient: Tensor) -> Cotangent {
    Cotangent { hidden: vec![(block, gradient)], ..Default::default() }
}

/// The gradient at the pixels, from a tape of every output.
fn gradient(tower: &Clip, pixels: &Tensor, cotangent: &Cotangent) -> Tensor {
    let (_, tape) = tower.forward_tape(pixels, &everything(tower)).unwrap();
    tower.vjp(&tape, cotangent, PIXELS).unwrap().pixels.unwrap()
}

/// Uniform in [-1, 1].
fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The sum of the products of the entries, in f64.
fn dot(a: &Tensor, b: &Tensor) -> f64 {
    values(a).iter().zip(values(b)).map(|(a, b)| a * b).sum()
}

// --- Outputs -----------------------------------------------------------------------------------

#[test]
fn every_output_equals_pytorch() {
    let expected = expected();
    let pixels = expected.tensor("pixels");
    for (activation, folder) in ACTIVATIONS {
        let tower = clip(folder);
        let features = tower.forward(&pixels, &everything(&tower)).unwrap();
        for (block, hidden) in features.hidden.iter().enumerate() {
            let name = format!("{activation}.hidden.{block}");
            assert_close(&name, hidden, &expected.tensor(&name), OUTPUT);
        }
        for (name, found) in [("pooled", features.pooled), ("embeds", features.embeds)] {
            let name = format!("{activation}.{name}");
            assert_close(&name, &found.unwrap(), &expected.tensor(&name), OUTPUT);
        }
    }
}

#[test]
fn every_checkpoint_layout_gives_the_same_bits() {
    let pixels = expected().tensor("pixels");
    let reference = clip("v4");
    let want = reference.forward(&pixels, &everything(&reference)).unwrap();
    for folder in ["v5", "v5_sharded", "v5_bare"] {
        let tower = clip(folder);
        let found = tower.forward(&pixels, &everything(&tower)).unwrap();
        for (block, (found, want)) in found.hidden.iter().zip(&want.hidden).enumerate() {
            assert_same(&format!("{folder} hidden {block}"), found, want);
        }
        assert_same(&format!("{folder} pooled"), &found.pooled.unwrap(), want.pooled.as_ref().unwrap());
        if folder == "v5_bare" {
            assert!(found.embeds.is_none(), "a checkpoint without projection has no embeds");
            assert_eq!(tower.spec().projection, None);
        } else {
            assert_same(&format!("{folder} embeds"), &found.embeds.unwrap(), want.embeds.as_ref().unwrap());
            assert_eq!(tower.spec(), reference.spec());
        }
    }
}

#[test]
fn the_spec_says_what_the_tower_is() {
    let spec = clip("v4").spec().clone();
    assert_eq!((spec.family, spec.image_size, spec.patch_size, spec.grid), ("clip", 20, 4, (5, 5)));
    assert_eq!((spec.class_token, spec.tokens(), spec.hidden), (true, 26, 32));
    assert_eq!((spec.blocks, spec.heads, spec.projection), (4, 4, Some(24)));
}

#[test]
fn feature_layers_count_the_input_as_state_zero() {
    for (layer, block) in [(-2, 23), (-1, 24), (-25, 0), (0, 0), (1, 1), (24, 24)] {
        assert_eq!(feature_block(layer, 24).unwrap(), block, "layer {layer}");
    }
    for layer in [-26, 25, i64::MIN, i64::MAX] {
        let message = feature_block(layer, 24).unwrap_err().to_string();
        assert_eq!(message, format!("vision_feature_layer: expected -25 to 24, found {layer}"));
    }
}

#[test]
fn feature_layer_minus_two_is_the_output_of_the_last_but_one_block() {
    let expected = expected();
    let block = feature_block(-2, clip("v4").spec().blocks).unwrap();
    let hidden = clip("v4").forward(&expected.tensor("pixels"), &Want::hidden(block)).unwrap().hidden;
    assert_close("layer -2", &hidden[0], &expected.tensor("quick_gelu.hidden.3"), OUTPUT);
    let patches = without_class_token(&hidden[0]).unwrap();
    assert_same("its patches", &patches, &hidden[0].i((.., 1.., ..)).unwrap());
}

#[test]
fn blocks_behind_the_last_output_asked_for_change_nothing() {
    let pixels = expected().tensor("pixels");
    let tower = clip("v4");
    let all = tower.forward(&pixels, &everything(&tower)).unwrap();
    for block in 0..=4 {
        let alone = tower.forward(&pixels, &Want::hidden(block)).unwrap();
        assert_same(&format!("hidden {block}"), &alone.hidden[0], &all.hidden[block]);
        assert!(alone.hidden.len() == 1 && alone.pooled.is_none() && alone.embeds.is_none());
    }
    let pooled = tower.forward(&pixels, &Want::pooled()).unwrap();
    assert!(pooled.hidden.is_empty());
    assert_same("pooled", &pooled.pooled.unwrap(), &all.pooled.unwrap());
}

#[test]
fn hidden_states_come_in_the_order_asked_for() {
    let pixels = expected().tensor("pixels");
    let tower = clip("v4");
    let all = tower.forward(&pixels, &everything(&tower)).unwrap().hidden;
    let order = [3, 0, 3, 1];
    let found = tower
        .forward(&pixels, &Want { hidden: order.to_vec(), pooled: false, merged: false })
        .unwrap()
        .hidden;
    assert_eq!(found.len(), order.len());
    for (found, block) in found.iter().zip(order) {
        assert_same(&format!("block {block}"), found, &all[block]);
    }
}

#[test]
fn keeping_a_tape_changes_no_bit() {
    let pixels = expected().tensor("pixels");
    let tower = clip("v4");
    let plain = tower.forward(&pixels, &everything(&tower)).unwrap();
    let (taped, _) = tower.forward_tape(&pixels, &everything(&tower)).unwrap();
    for (taped, plain) in taped.hidden.iter().zip(&plain.hidden) {
        assert_same("hidden", taped, plain);
    }
    assert_same("embeds", &taped.embeds.unwrap(), &plain.embeds.unwrap());
}

#[test]
fn half_weights_compute_as_the_rounded_weights_in_f32() {
    let expected = expected();
    let pixels = expected.tensor("pixels");
    for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        let half = clip("v4").to_dtype(dtype).unwrap();
        assert_eq!(half.dtype(), dtype);
        assert!(half.tensors().unwrap().iter().all(|(_, tensor)| tensor.dtype() == dtype));
        let rounded = half.to_dtype(DType::F32).unwrap();
        let found = half.forward(&pixels, &everything(&half)).unwrap();
        let want = rounded.forward(&pixels, &everything(&half)).unwrap();
        for (block, (found, want)) in found.hidden.iter().zip(&want.hidden).enumerate() {
            assert_eq!(found.dtype(), DType::F32);
            assert_same(&format!("{dtype:?} hidden {block}"), found, want);
        }
        let embeds = found.embeds.unwrap();
        assert_same(&format!("{dtype:?} embeds"), &embeds, &want.embeds.unwrap());
        assert_close(
            &format!("{dtype:?} embeds, rounded or not"),
            &embeds,
            &expected.tensor("quick_gelu.embeds"),
            tolerance,
        );
        let cotangent = at_embeds(expected.tensor("c_embeds"));
        let found = gradient(&half, &pixels, &cotangent);
        assert_same(&format!("{dtype:?} gradient"), &found, &gradient(&rounded, &pixels, &cotangent));
        let want = expected.tensor("grad.embeds.pixels");
        assert_close(&format!("{dtype:?} gradient, rounded or not"), &found, &want, 2.0 * tolerance);
    }
}

/// Equal to the bit on a machine with AVX-512, also at ViT-L's sizes; but that is the matrix product's
/// to keep, and one row alone (a picture's projection) may take another kernel, 3e-6 away.
#[test]
fn a_batch_answers_as_each_picture_alone() {
    let expected = expected();
    let (pixels, given) = (expected.tensor("pixels"), expected.tensor("c_embeds"));
    let tower = clip("v4");
    let batch = tower.forward(&pixels, &everything(&tower)).unwrap();
    let batch_gradient = gradient(&tower, &pixels, &at_embeds(given.clone()));
    for row in 0..3 {
        let picture = pixels.i(row..row + 1).unwrap();
        let alone = tower.forward(&picture, &everything(&tower)).unwrap();
        for (block, (alone, batch)) in alone.hidden.iter().zip(&batch.hidden).enumerate() {
            assert_close(
                &format!("picture {row} hidden {block}"),
                alone,
                &batch.i(row..row + 1).unwrap(),
                2e-6,
            );
        }
        let embeds = batch.embeds.as_ref().unwrap().i(row..row + 1).unwrap();
        assert_close(&format!("picture {row} embeds"), &alone.embeds.unwrap(), &embeds, 2e-6);
        let found = gradient(&tower, &picture, &at_embeds(given.i(row..row + 1).unwrap()));
        assert_close(
            &format!("picture {row} gradient"),
            &found,
            &batch_gradient.i(row..row + 1).unwrap(),
            1e-5,
        );
    }
}

#[test]
fn pixels_beyond_the_last_whole_patch_are_neither_seen_nor_given_a_gradient() {
    let expected = expected();
    let (pixels, given) = (expected.tensor("pixels"), expected.tensor("c_hidden"));
    let small = clip("v5_bare");
    let config = ClipConfig { image_size: 22, ..clip_config("v5_bare") };
    let large = Memory::of(&small).tower(&config);
    assert_eq!(large.spec().grid, (5, 5));
    let margin = random(&[3, 3, 22, 22], 1).abs().unwrap();
    let larger = margin.slice_assign(&[0..3, 0..3, 0..20, 0..20], &pixels).unwrap();
    let found = large.forward(&larger, &Want::hidden(4)).unwrap().hidden;
    assert_same("hidden", &found[0], &small.forward(&pixels, &Want::hidden(4)).unwrap().hidden[0]);
    let found = gradient(&large, &larger, &at_hidden(4, given.clone()));
    let want = gradient(&small, &pixels, &at_hidden(4, given));
    assert_same("gradient", &found.i((.., .., ..20, ..20)).unwrap(), &want);
    let rest = [found.i((.., .., 20.., ..)).unwrap(), found.i((.., .., .., 20..)).unwrap()];
    assert!(rest.iter().all(|part| values(part).iter().all(|&v| v == 0.0)));
}

// --- Gradients ---------------------------------------------------------------------------------

#[test]
fn pixel_gradients_equal_pytorch() {
    let expected = expected();
    let pixels = expected.tensor("pixels");
    for (activation, folder) in ACTIVATIONS {
        let suffix = if activation == "quick_gelu" { String::new() } else { format!(".{activation}") };
        let name = format!("grad.embeds.pixels{suffix}");
        let found = gradient(&clip(folder), &pixels, &at_embeds(expected.tensor("c_embeds")));
        assert_close(&name, &found, &expected.tensor(&name), GRADIENT);
    }
    let found = gradient(&clip("v4"), &pixels, &at_hidden(3, expected.tensor("c_hidden")));
    assert_close("grad.hidden3.pixels", &found, &expected.tensor("grad.hidden3.pixels"), GRADIENT);
}

/// (f(x + h d) - f(x - h d)) / 2h by Richardson's extrapolation from three steps; the difference is
/// over |gradient| |d|. Reached in f32: 2e-6.
#[test]
fn gradients_equal_finite_differences_along_any_direction() {
    let expected = expected();
    let pixels = expected.tensor("pixels");
    let (hidden, embeds) = (expected.tensor("c_hidden"), expected.tensor("c_embeds"));
    let cotangent =
        Cotangent { hidden: vec![(2, hidden.clone())], embeds: Some(embeds.clone()), ..Default::default() };
    let want = Want { hidden: vec![2], pooled: true, merged: false };
    for (activation, folder) in ACTIVATIONS {
        let tower = clip(folder);
        let gradient = gradient(&tower, &pixels, &cotangent);
        let norm = dot(&gradient, &gradient).sqrt();
        let value = |direction: &Tensor, step: f64| {
            let moved = (&pixels + (direction * step).unwrap()).unwrap();
            let features = tower.forward(&moved, &want).unwrap();
            dot(&features.hidden[0], &hidden) + dot(&features.embeds.unwrap(), &embeds)
        };
        let random = (0..8).map(|seed| random(gradient.dims(), seed));
        for (i, direction) in std::iter::once(gradient.clone()).chain(random).enumerate() {
            let direction = (&direction / dot(&direction, &direction).sqrt()).unwrap();
            let slope = |step: f64| (value(&direction, step) - value(&direction, -step)) / (2.0 * step);
            let [coarse, middle, fine] = [0.4, 0.2, 0.1].map(slope);
            let (coarse, fine) = ((4.0 * middle - coarse) / 3.0, (4.0 * fine - middle) / 3.0);
            let (found, exact) = ((16.0 * fine - coarse) / 15.0, dot(&gradient, &direction));
            let error = (found - exact).abs() / norm;
            println!("{activation} direction {i}: {found:.6} for {exact:.6}, {error:.1e}");
            assert!(error <= 2e-5, "{activation} direction {i}: {found} for {exact}");
        }
    }
}

#[test]
fn cotangents_add_up_over_the_outputs() {
    let expected = expected();
    let pixels = expected.tensor("pixels");
    let tower = clip("v4");
    let hidden: Vec<(usize, Tensor)> =
        (0..=4).map(|block| (block, random(&[3, 26, 32], block as u64))).collect();
    let (pooled, embeds) = (random(&[3, 32], 10), random(&[3, 24], 11));
    let together = Cotangent {
        hidden: hidden.clone(),
        pooled: Some(pooled.clone()),
        embeds: Some(embeds.clone()),
        ..Default::default()
    };
    let mut parts: Vec<Cotangent> =
        hidden.into_iter().map(|(block, given)| at_hidden(block, given)).collect();
    parts.extend([at_pooled(pooled), at_embeds(embeds)]);
    let sum = parts
        .iter()
        .map(|part| {
            let part = gradient(&tower, &pixels, part);
            assert!(values(&part).iter().any(|&v| v != 0.0), "no output is without a gradient");
            part
        })
        .reduce(|a, b| (a + b).unwrap())
        .unwrap();
    assert_close("the sum", &gradient(&tower, &pixels, &together), &sum, 5e-6);
}

#[test]
fn one_output_given_two_cotangents_gets_their_sum() {
    let pixels = expected().tensor("pixels");
    let tower = clip("v4");
    let (a, b) = (random(&[3, 26, 32], 1), random(&[3, 26, 32], 2));
    let twice = Cotangent { hidden: vec![(2, a.clone()), (2, b.clone())], ..Default::default() };
    let found = gradient(&tower, &pixels, &twice);
    assert_close("twice", &found, &gradient(&tower, &pixels, &at_hidden(2, (a + b).unwrap())), 5e-6);
}

#[test]
fn a_cotangent_at_pooled_is_the_one_at_embeds_before_the_projection() {
    let expected = expected();
    let (pixels, given) = (expected.tensor("pixels"), expected.tensor("c_embeds"));
    let tower = clip("v4");
    let projection = Checkpoint::open(&path("clip/v4")).unwrap();
    let projection = projection.at("", &Device::Cpu).get("visual_projection.weight", &[24, 32]).unwrap();
    let pooled = given.matmul(&projection).unwrap();
    let found = gradient(&tower, &pixels, &at_pooled(pooled.clone()));
    assert_close("pooled", &found, &expected.tensor("grad.embeds.pixels"), GRADIENT);
    let bare = gradient(&clip("v5_bare"), &pixels, &at_pooled(pooled));
    assert_same("without a projection", &bare, &found);
}

#[test]
fn a_tape_serves_more_than_once_and_answers_the_same() {
    let expected = expected();
    let tower = clip("v4");
    let (_, tape) = tower.forward_tape(&expected.tensor("pixels"), &everything(&tower)).unwrap();
    let run = |cotangent: &Cotangent| tower.vjp(&tape, cotangent, PIXELS).unwrap().pixels.unwrap();
    let first = run(&at_embeds(expected.tensor("c_embeds")));
    let other = run(&at_hidden(3, expected.tensor("c_hidden")));
    assert_close("another cotangent", &other, &expected.tensor("grad.hidden3.pixels"), GRADIENT);
    assert_same("the first again", &run(&at_embeds(expected.tensor("c_embeds"))), &first);
}

#[test]
fn without_a_cotangent_the_gradient_is_zero_and_only_what_is_asked_for_is_given() {
    let pixels = expected().tensor("pixels");
    let tower = clip("v4");
    let zero = gradient(&tower, &pixels, &Cotangent::default());
    assert_eq!(zero.dims(), pixels.dims());
    assert!(values(&zero).iter().all(|&v| v == 0.0));
    let (_, tape) = tower.forward_tape(&pixels, &Want::hidden(1)).unwrap();
    let nothing = Wrt { pixels: false, anchor: false };
    let Gradients { pixels, anchor } =
        tower.vjp(&tape, &at_hidden(1, random(&[3, 26, 32], 1)), nothing).unwrap();
    assert!(pixels.is_none() && anchor.is_none());
}

// --- Against candle's autograd, in f64, from operations that have a gradient there -------------

/// A tower written once more, the plain way.
struct Oracle {
    weights: Memory,
    config: ClipConfig,
}

impl Oracle {
    fn get(&self, name: &str) -> Tensor {
        self.weights.0[name].to_dtype(DType::F64).unwrap()
    }

    fn linear(&self, x: &Tensor, name: &str) -> candle_core::Result<Tensor> {
        let weight = self.get(&format!("{name}.weight")).t()?;
        x.broadcast_matmul(&weight)?.broadcast_add(&self.get(&format!("{name}.bias")))
    }

    fn norm(&self, x: &Tensor, name: &str) -> candle_core::Result<Tensor> {
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + self.config.layer_norm_eps)?.sqrt()?;
        let normal = centred.broadcast_div(&deviation)?;
        normal
            .broadcast_mul(&self.get(&format!("{name}.weight")))?
            .broadcast_add(&self.get(&format!("{name}.bias")))
    }

    fn activation(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self.config.hidden_act.as_str() {
            "quick_gelu" => x / ((x * -1.702)?.exp()? + 1.0)?,
            "gelu" => (x * 0.5)? * ((x / 2f64.sqrt())?.erf()? + 1.0)?,
            "gelu_new" => {
                let inner = ((x + (x.powf(3.0)? * 0.044715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
                (x * 0.5)? * (inner.tanh()? + 1.0)?
            }
            other => panic!("{other}"),
        }
    }

    fn attention(&self, x: &Tensor, name: &str) -> candle_core::Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let heads = self.config.num_attention_heads;
        let head = width / heads;
        let part = |part: &str| {
            let x = self.linear(x, &format!("{name}.{part}_proj"))?;
            x.reshape((batch, tokens, heads, head))?.transpose(1, 2)?.contiguous()
        };
        let scores = (part("q")?.matmul(&part("k")?.t()?)? / (head as f64).sqrt())?;
        let context = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&part("v")?)?;
        self.linear(&context.transpose(1, 2)?.reshape((batch, tokens, width))?, &format!("{name}.out_proj"))
    }

    fn block(&self, x: &Tensor, i: usize) -> candle_core::Result<Tensor> {
        let at = |part: &str| format!("encoder.layers.{i}.{part}");
        let x = (x + self.attention(&self.norm(x, &at("layer_norm1"))?, &at("self_attn"))?)?;
        let up = self.linear(&self.norm(&x, &at("layer_norm2"))?, &at("mlp.fc1"))?;
        &x + self.linear(&self.activation(&up)?, &at("mlp.fc2"))?
    }

    /// Every hidden state, and the pooled embedding. The patch embedding is a convolution here.
    fn forward(&self, pixels: &Tensor) -> candle_core::Result<(Vec<Tensor>, Tensor)> {
        let (batch, width) = (pixels.dim(0)?, self.config.hidden_size);
        let channel = |values: [f32; 3]| {
            Tensor::new(&values, &Device::Cpu)?.to_dtype(DType::F64)?.reshape((1, 3, 1, 1))
        };
        let normal = pixels.broadcast_sub(&channel(MEAN)?)?.broadcast_div(&channel(STD)?)?;
        let kernel = self.get("embeddings.patch_embedding.weight");
        let patches =
            normal.conv2d(&kernel, 0, self.config.patch_size, 1, 1)?.flatten_from(2)?.transpose(1, 2)?;
        let class = self.get("embeddings.class_embedding").reshape((1, 1, width))?.repeat((batch, 1, 1))?;
        let embedded = Tensor::cat(&[class, patches.contiguous()?], 1)?;
        let embedded = embedded.broadcast_add(&self.get("embeddings.position_embedding.weight"))?;
        let mut hidden = vec![self.norm(&embedded, "pre_layrnorm")?];
        for i in 0..self.config.num_hidden_layers {
            hidden.push(self.block(&hidden[i], i)?);
        }
        let class = hidden[self.config.num_hidden_layers].i((.., 0, ..))?;
        Ok((hidden, self.norm(&class, "post_layernorm")?))
    }
}

/// Of other proportions than the fixtures: three heads, a patch that does not divide the picture.
fn odd_tower(activation: &str) -> (Clip, Oracle) {
    let config = ClipConfig {
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        image_size: 10,
        patch_size: 3,
        hidden_act: activation.into(),
        ..Default::default()
    };
    let mut names = vec![
        ("embeddings.class_embedding".to_string(), vec![24]),
        ("embeddings.patch_embedding.weight".to_string(), vec![24, 3, 3, 3]),
        ("embeddings.position_embedding.weight".to_string(), vec![10, 24]),
    ];
    let mut layer = |name: String, weight: Vec<usize>| {
        names.push((format!("{name}.bias"), vec![weight[0]]));
        names.push((format!("{name}.weight"), weight));
    };
    layer("pre_layrnorm".into(), vec![24]);
    layer("post_layernorm".into(), vec![24]);
    for i in 0..2 {
        let at = |part: &str| format!("encoder.layers.{i}.{part}");
        for part in ["q", "k", "v", "out"] {
            layer(at(&format!("self_attn.{part}_proj")), vec![24, 24]);
        }
        layer(at("layer_norm1"), vec![24]);
        layer(at("layer_norm2"), vec![24]);
        layer(at("mlp.fc1"), vec![40, 24]);
        layer(at("mlp.fc2"), vec![24, 40]);
    }
    let tensors = names.into_iter().enumerate().map(|(i, (name, shape))| {
        // Strong enough to move the softmax and the activation away from their linear parts.
        let strength = if shape.len() > 1 { 0.4 } else { 1.0 };
        let tensor = (random(&shape, 100 + i as u64) * strength).unwrap();
        (name, tensor)
    });
    let weights = Memory(tensors.collect());
    (weights.tower(&config), Oracle { weights, config })
}

#[test]
fn towers_of_other_proportions_equal_candles_autograd() {
    for activation in ["quick_gelu", "gelu", "gelu_new"] {
        let (tower, oracle) = odd_tower(activation);
        let pixels = random(&[2, 3, 10, 10], 1).abs().unwrap();
        let variable = Var::from_tensor(&pixels.to_dtype(DType::F64).unwrap()).unwrap();
        let (hidden, pooled) = oracle.forward(variable.as_tensor()).unwrap();
        let features = tower.forward(&pixels, &everything(&tower)).unwrap();
        for (block, (found, want)) in features.hidden.iter().zip(&hidden).enumerate() {
            assert_close(&format!("{activation} hidden {block}"), found, want, OUTPUT);
        }
        assert_close(&format!("{activation} pooled"), &features.pooled.unwrap(), &pooled, OUTPUT);
        let outputs = hidden.iter().enumerate().map(|(block, state)| {
            let given = random(state.dims(), 7);
            (format!("hidden {block}"), state, given.clone(), at_hidden(block, given))
        });
        let given = random(pooled.dims(), 8);
        let outputs = outputs.chain([("pooled".into(), &pooled, given.clone(), at_pooled(given))]);
        for (name, output, given, cotangent) in outputs {
            let loss = (output * given.to_dtype(DType::F64).unwrap()).unwrap().sum_all().unwrap();
            let gradients = loss.backward().unwrap();
            let want = gradients.get(&variable).expect("autograd reaches the pixels");
            assert!(values(want).iter().any(|&v| v != 0.0));
            let found = gradient(&tower, &pixels, &cotangent);
            assert_close(&format!("{activation} gradient from {name}"), &found, want, OUTPUT);
        }
    }
}

/// The gradient that `forward` has by candle's autograd.
fn autograd(
    x: &Tensor,
    given: &Tensor,
    forward: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
) -> (Tensor, Tensor) {
    let variable = Var::from_tensor(&x.to_dtype(DType::F64).unwrap()).unwrap();
    let output = forward(variable.as_tensor()).unwrap();
    let loss = (&output * given.to_dtype(DType::F64).unwrap()).unwrap().sum_all().unwrap();
    (output.detach(), loss.backward().unwrap().get(&variable).expect("a gradient").clone())
}

#[test]
fn each_layer_alone_equals_candles_autograd() {
    let (_, oracle) = odd_tower("gelu");
    let get = |name: &str| oracle.weights.0[&format!("encoder.layers.1.{name}")].clone();
    let linear = |name: &str| Linear::new(get(&format!("{name}.weight")), Some(get(&format!("{name}.bias"))));
    let (x, given) = (random(&[2, 7, 24], 1), random(&[2, 7, 24], 2));
    // Far from zero mean and unit variance, as the residual stream of a real tower is.
    let x = ((x * 3.0).unwrap() + 5.0).unwrap();

    let (want, want_gradient) = autograd(&x, &given, |x| oracle.norm(x, "encoder.layers.1.layer_norm1"));
    let norm =
        LayerNorm::new(get("layer_norm1.weight"), get("layer_norm1.bias"), oracle.config.layer_norm_eps);
    assert_close("norm", &norm.forward(&x).unwrap(), &want, OUTPUT);
    assert_close("norm gradient", &norm.vjp(&x, &given).unwrap(), &want_gradient, OUTPUT);

    let (want, want_gradient) = autograd(&x, &given, |x| oracle.attention(x, "encoder.layers.1.self_attn"));
    let part = |name: &str| linear(&format!("self_attn.{name}_proj"));
    let attention = Attention { q: part("q"), k: part("k"), v: part("v"), out: part("out"), heads: 3 };
    let (found, tape) = attention.forward(&x).unwrap();
    assert_close("attention", &found, &want, OUTPUT);
    assert_close("attention gradient", &attention.vjp(&tape, &given).unwrap(), &want_gradient, 2e-5);

    let given = random(&[2, 7, 40], 3);
    let (want, want_gradient) = autograd(&x, &given, |x| oracle.linear(x, "encoder.layers.1.mlp.fc1"));
    let layer = linear("mlp.fc1");
    assert_close("linear", &layer.forward(&x).unwrap(), &want, OUTPUT);
    assert_close("linear gradient", &layer.vjp(&given).unwrap(), &want_gradient, OUTPUT);
}

#[test]
fn activations_and_their_slopes_hold_far_from_zero() {
    let x: Vec<f32> = (-400..=400).map(|i| i as f32 / 20.0).chain([0.0, -0.0, 90.0, -90.0]).collect();
    let x = Tensor::new(x, &Device::Cpu).unwrap();
    let ones = x.ones_like().unwrap();
    for name in ["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh"] {
        let act = if name == "gelu_pytorch_tanh" { "gelu_new" } else { name };
        let config = ClipConfig { hidden_act: act.into(), ..Default::default() };
        let oracle = Oracle { weights: Memory(Default::default()), config };
        let (want, slope) = autograd(&x, &ones, |x| oracle.activation(x));
        let activation = Activation::from_config(name).unwrap();
        let near = |what: &str, found: Tensor, want: Tensor, scale: f64| {
            for ((x, found), want) in values(&x).into_iter().zip(values(&found)).zip(values(&want)) {
                let allowed = 1e-6 * scale.max(want.abs());
                assert!((found - want).abs() <= allowed, "{name}{what} at {x}: {found} for {want}");
            }
        };
        near("", activation.forward(&x).unwrap(), want, 1.0);
        near("'s slope", activation.vjp(&x, &ones).unwrap(), slope, 2.0);
    }
    let message = Activation::from_config("relu").unwrap_err().to_string();
    assert_eq!(
        message,
        "hidden_act: expected quick_gelu, gelu, gelu_pytorch_tanh, gelu_new or silu, found relu"
    );
}

// --- Errors ------------------------------------------------------------------------------------

#[track_caller]
fn assert_error<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("an error").to_string();
    for part in parts {
        assert!(message.contains(part), "`{message}` does not say `{part}`");
    }
    assert_eq!(message.lines().count(), 1, "`{message}` has several lines");
}

#[test]
fn pixels_of_another_shape_or_type_are_an_error() {
    let tower = clip("v4");
    let shapes: [&[usize]; 7] = [
        &[3, 20, 20],
        &[1, 1, 20, 20],
        &[1, 4, 20, 20],
        &[1, 3, 20, 21],
        &[1, 3, 19, 20],
        &[0, 3, 20, 20],
        &[2, 20, 20, 3],
    ];
    for shape in shapes {
        let pixels = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let parts = ["pixels", "[B, 3, 20, 20]", &format!("{shape:?}")];
        assert_error(tower.forward(&pixels, &Want::pooled()), &parts);
        assert_error(tower.forward_tape(&pixels, &Want::pooled()), &parts);
        assert_error(tower.first_attention(&pixels), &parts);
    }
    for dtype in [DType::F64, DType::F16, DType::U8] {
        let pixels = Tensor::zeros((1, 3, 20, 20), dtype, &Device::Cpu).unwrap();
        assert_error(tower.forward(&pixels, &Want::pooled()), &["pixels", "f32", &format!("{dtype:?}")]);
    }
}

#[test]
fn a_block_that_does_not_exist_is_an_error() {
    let pixels = expected().tensor("pixels");
    for want in [Want::hidden(5), Want { hidden: vec![0, usize::MAX], pooled: true, merged: false }] {
        assert_error(
            clip("v4").forward(&pixels, &want),
            &["block", "0 to 4", &want.hidden.last().unwrap().to_string()],
        );
    }
}

#[test]
fn a_cotangent_where_the_tape_has_no_output_is_an_error() {
    let pixels = expected().tensor("pixels");
    let tower = clip("v4");
    let given = || random(&[3, 26, 32], 1);
    let (_, tape) = tower.forward_tape(&pixels, &Want::hidden(2)).unwrap();
    let vjp = |cotangent: Cotangent| tower.vjp(&tape, &cotangent, PIXELS);
    assert!(vjp(at_hidden(2, given())).is_ok());
    assert_error(vjp(at_hidden(3, given())), &["cotangent", "blocks 0 to 2", "3"]);
    assert_error(vjp(at_pooled(random(&[3, 32], 1))), &["cotangent", "pooled"]);
    assert_error(vjp(at_embeds(random(&[3, 24], 1))), &["cotangent", "pooled"]);
    let bare = clip("v5_bare");
    let (_, tape) = bare.forward_tape(&pixels, &Want::pooled()).unwrap();
    assert_error(bare.vjp(&tape, &at_embeds(random(&[3, 24], 1)), PIXELS), &["cotangent", "projection"]);
}

#[test]
fn a_cotangent_of_another_shape_is_an_error() {
    let pixels = expected().tensor("pixels");
    let tower = clip("v4");
    let (_, tape) = tower.forward_tape(&pixels, &everything(&tower)).unwrap();
    let shapes: [&[usize]; 4] = [&[2, 26, 32], &[3, 25, 32], &[3, 26, 31], &[26, 32]];
    for block in 0..=4 {
        for shape in shapes {
            assert!(
                tower.vjp(&tape, &at_hidden(block, random(shape, 1)), PIXELS).is_err(),
                "{shape:?} at {block}"
            );
        }
    }
    assert!(tower.vjp(&tape, &at_embeds(random(&[1, 24], 1)), PIXELS).is_err());
    assert!(tower.vjp(&tape, &at_pooled(random(&[3, 24], 1)), PIXELS).is_err());
}

#[test]
fn the_gradient_of_an_anchor_that_is_not_there_is_an_error() {
    let tower = clip("v4");
    let (_, tape) = tower.forward_tape(&expected().tensor("pixels"), &Want::hidden(2)).unwrap();
    for pixels in [true, false] {
        let wrt = Wrt { pixels, anchor: true };
        assert_error(tower.vjp(&tape, &at_hidden(2, random(&[3, 26, 32], 1)), wrt), &["no anchor is put in"]);
    }
}

/// A folder with `clip/v5`'s configuration and these weights.
fn folder_with(tensors: &[(String, Tensor)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    folder
}

fn load(folder: &Path) -> Result<Clip> {
    Clip::load(&Checkpoint::open(folder)?, &clip_config("v5"), MEAN, STD, &Device::Cpu)
}

fn v5_tensors() -> Vec<(String, Tensor)> {
    let tensors = candle_core::safetensors::load(path("clip/v5/model.safetensors"), &Device::Cpu).unwrap();
    let mut tensors: Vec<(String, Tensor)> = tensors.into_iter().collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors
}

#[test]
fn each_missing_weight_is_named_with_its_file() {
    let tensors = v5_tensors();
    assert_eq!(tensors.len(), 72);
    for (missing, _) in &tensors {
        let rest: Vec<_> = tensors.iter().filter(|(name, _)| name != missing).cloned().collect();
        let folder = folder_with(&rest);
        let result = load(folder.path());
        match missing.as_str() {
            "visual_projection.weight" => assert_eq!(result.unwrap().spec().projection, None),
            // What a tower is recognised by.
            "vision_model.embeddings.class_embedding" => {
                assert_error(result, &[folder.path().to_str().unwrap(), "embeddings.class_embedding"]);
            }
            _ => {
                let error = result.err().expect(missing);
                assert!(error.hint().is_some());
                let file = folder.path().join("model.safetensors");
                assert_eq!(error.to_string(), format!("`{}`: weight `{missing}` is missing", file.display()));
            }
        }
    }
}

#[test]
fn each_weight_of_another_shape_is_named_with_both_shapes() {
    let tensors = v5_tensors();
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        let mut changed = tensors.clone();
        changed[i].1 = tensor.narrow(0, 0, tensor.dim(0).unwrap() - 1).unwrap().contiguous().unwrap();
        let folder = folder_with(&changed);
        let message = load(folder.path()).err().expect(name).to_string();
        let file = folder.path().join("model.safetensors");
        let (found, expected) = (changed[i].1.dims(), tensor.dims());
        assert_eq!(
            message,
            format!("`{}`: weight `{name}` has shape {found:?}, expected {expected:?}", file.display())
        );
    }
}

#[test]
fn weights_that_are_not_floating_point_are_an_error() {
    let mut tensors = v5_tensors();
    let name = "vision_model.encoder.layers.2.mlp.fc1.weight";
    let weight = tensors.iter_mut().find(|(n, _)| n == name).unwrap();
    weight.1 = weight.1.to_dtype(DType::U8).unwrap();
    assert_error(load(folder_with(&tensors).path()), &["model.safetensors", name, "U8"]);
}

#[test]
fn a_checkpoint_without_or_with_two_towers_is_an_error() {
    let tensors = v5_tensors();
    let renamed =
        |prefix: &str| tensors.iter().map(|(n, t)| (format!("{prefix}{n}"), t.clone())).collect::<Vec<_>>();
    let text: Vec<_> = tensors
        .iter()
        .map(|(n, t)| (n.replace("vision", "text").replace("class", "cls"), t.clone()))
        .collect();
    assert_error(load(folder_with(&text).path()), &["no CLIP vision tower"]);
    let two = [renamed("a."), renamed("b.")].concat();
    assert_error(
        load(folder_with(&two).path()),
        &["more than one vision tower: a.vision_model., b.vision_model."],
    );
    assert!(load(folder_with(&renamed("any.prefix.")).path()).is_ok());
}

#[test]
fn a_truncated_checkpoint_is_an_error_at_every_length() {
    let whole = std::fs::read(path("clip/v5/model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    for length in
        [0, 1, 7, 8, 9, header / 2, header - 1, header, header + 4, whole.len() / 2, whole.len() - 1]
    {
        std::fs::write(&file, &whole[..length]).unwrap();
        assert_error(load(folder.path()), &[file.to_str().unwrap(), "not a complete safetensors checkpoint"]);
    }
    std::fs::write(&file, &whole).unwrap();
    assert!(load(folder.path()).is_ok());
}

#[test]
fn a_folder_without_weights_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    assert_error(
        load(folder.path()),
        &["cannot read", folder.path().join("model.safetensors").to_str().unwrap()],
    );
    assert_error(load(&folder.path().join("nowhere")), &["cannot read", "nowhere"]);
}

#[test]
fn an_index_names_files_beside_itself_and_no_others() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("model");
    std::fs::create_dir(&folder).unwrap();
    let weights = path("clip/v5/model.safetensors");
    std::fs::copy(&weights, outer.path().join("x.safetensors")).unwrap();
    std::fs::copy(&weights, folder.join("x.safetensors")).unwrap();
    let index = folder.join("model.safetensors.index.json");
    let name_file = |name: &str| {
        let map: serde_json::Map<_, _> =
            v5_tensors().into_iter().map(|(tensor, _)| (tensor, name.into())).collect();
        std::fs::write(&index, serde_json::json!({ "weight_map": map }).to_string()).unwrap();
        load(&folder)
    };
    assert!(name_file("x.safetensors").is_ok());
    let absolute = outer.path().join("x.safetensors");
    for name in [
        "../x.safetensors",
        absolute.to_str().unwrap(),
        "a/../../x.safetensors",
        "..",
        ".",
        "",
        "./x.safetensors",
    ] {
        assert_error(name_file(name), &[index.to_str().unwrap(), "outside its folder", name]);
    }
    let shard = folder.join("model-00001-of-00002.safetensors");
    assert_error(name_file("model-00001-of-00002.safetensors"), &["cannot read", shard.to_str().unwrap()]);
}

#[test]
fn a_damaged_index_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    for text in ["", "{", "[]", "{}", r#"{"weight_map": 1}"#, r#"{"weight_map": {"a": 1}}"#] {
        std::fs::write(&index, text).unwrap();
        assert_error(load(folder.path()), &[index.to_str().unwrap()]);
    }
    std::fs::write(&index, r#"{"weight_map": {}}"#).unwrap();
    assert!(load(folder.path()).is_err(), "an index without files");
}

#[test]
fn impossible_configurations_are_errors_that_name_the_entry() {
    let parse = |text: &str| ClipConfig::parse(text, Path::new("m/config.json"));
    let cases = [
        ("", "EOF"),
        ("7", "vision_config"),
        (r#"{"hidden_size": 0}"#, "hidden_size is 0"),
        (r#"{"hidden_size": -1}"#, "-1"),
        (r#"{"patch_size": 1e9}"#, "vision_config"),
        (r#"{"num_hidden_layers": 99999999}"#, "num_hidden_layers is 99999999"),
        (r#"{"hidden_size": 30, "num_attention_heads": 4}"#, "not a multiple"),
        (r#"{"image_size": 8, "patch_size": 16}"#, "patch_size 16 is larger than image_size 8"),
        (r#"{"hidden_act": "relu"}"#, "hidden_act"),
        (r#"{"model_type": "siglip_vision_model"}"#, "siglip_vision_model"),
        (
            r#"{"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}"#,
            "siglip_vision_model",
        ),
    ];
    for (text, part) in cases {
        assert_error(parse(text), &["`m/config.json`", part]);
    }
    let nested =
        parse(r#"{"model_type": "clip", "projection_dim": 7, "vision_config": {"hidden_size": 24}}"#)
            .unwrap();
    assert_eq!((nested.hidden_size, nested.projection_dim, nested.patch_size), (24, 7, 32));
}

#[test]
fn the_measure_itself_notices_a_difference() {
    let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
    assert_eq!(difference(&tensor(&[1.0, -4.0]), &tensor(&[1.5, -4.0])), 0.125);
    assert_eq!(difference(&tensor(&[f32::NAN, 1.0]), &tensor(&[1.0, 1.0])), f64::INFINITY);
    let missing = Memory(Default::default()).get("x", &[1]);
    assert!(matches!(missing, Err(Error::MissingWeight { .. })));
}
