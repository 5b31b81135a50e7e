//! V-Attack against PyTorch (`fixtures/vattack/make.py`), against finite differences, and what it
//! must keep to whatever it is given.

mod fixture;
mod toy;

use std::slice::from_ref;

use candle_core::{DType, Device, IndexOp, Tensor};
use fixture::{Fixture, assert_close, assert_same, clip, values};
use radapt::attack::vattack::{
    Crop, Drawn, Localise, Localised, Made, Preset, Surrogate, VAttack, ValueLoss, Window, map_of_mask,
    map_of_perturbation,
};
use radapt::attack::{Eps, Pictures, Subject, ThreatKind, picture_rng, quantise};
use radapt::tower::clip::Clip;
use radapt::tower::{Precision, VisionTower};
use toy::{eps, linf, photos, pictures, quiet, random};

const STEPS: usize = 20;

fn surrogate(tower: Clip, name: &str, weight: f64, fixture: &Fixture, case: &str, i: usize) -> Surrogate {
    let [source, target] = ["source", "target"].map(|which| fixture.tensor(&format!("{case}.{i}.{which}")));
    Surrogate::new(tower, Subject::undefended(name), weight, &source, &target).unwrap()
}

/// The attack, surrogates and pictures of one of the fixture's cases.
fn case(fixture: &Fixture, name: &str) -> (VAttack, Vec<Surrogate>, Pictures) {
    let form = if name == "notebook" { VAttack::notebook } else { VAttack::paper };
    let attack = VAttack { steps: STEPS, ..form(eps("16/255")) };
    let mut surrogates = vec![surrogate(clip("v5"), "v5", 1.0, fixture, name, 0)];
    if name == "ensemble" {
        surrogates.push(surrogate(clip("gelu"), "gelu", 0.5, fixture, name, 1));
    }
    (attack, surrogates, pictures(&fixture.tensor(&format!("{name}.pixels"))))
}

fn drawn(fixture: &Fixture, name: &str) -> Drawn {
    let windows = fixture.tensor(&format!("{name}.windows")).to_vec2::<i64>().unwrap();
    let window = |w: Vec<i64>| {
        let [top, left, height, width] = [w[0], w[1], w[2], w[3]].map(|v| v as usize);
        Window { top, left, height, width }
    };
    Drawn {
        noise: Some(fixture.tensor(&format!("{name}.noise"))),
        windows: Some(windows.into_iter().map(window).collect()),
    }
}

fn masks(localised: &[Localised]) -> Vec<Vec<bool>> {
    localised.iter().map(|found| found.mask.clone()).collect()
}

fn table(rows: Vec<Vec<f32>>) -> Tensor {
    Tensor::new(rows, &Device::Cpu).unwrap()
}

#[test]
fn scores_mask_loss_and_gradient_are_pytorchs() {
    let fixture = Fixture::open("vattack/expected.safetensors");
    for name in ["notebook", "paper"] {
        let (attack, surrogates, pictures) = case(&fixture, name);
        let get = |what: &str| fixture.tensor(&format!("{name}.0.{what}"));
        let loss = ValueLoss::new(&attack, &surrogates[0]).unwrap();
        let found = loss.localised(pictures.pixels(), &[0, 1]).unwrap();
        let scores = table(found.iter().map(|f| f.scores.clone()).collect());
        assert_close(&format!("{name}: scores"), &scores, &get("scores"), 1e-5);
        let as_numbers = |mask: &Vec<bool>| mask.iter().map(|m| f32::from(u8::from(*m))).collect();
        let mask = table(masks(&found).iter().map(as_numbers).collect());
        assert_same(&format!("{name}: mask"), &mask, &get("mask"));
        let (value, gradient) = loss.values_and_gradient(pictures.pixels(), &[0, 1], &masks(&found)).unwrap();
        let value = Tensor::new(value, &Device::Cpu).unwrap();
        assert_close(&format!("{name}: loss"), &value, &get("loss").to_dtype(DType::F64).unwrap(), 1e-5);
        assert_close(&format!("{name}: gradient"), &gradient, &get("grad"), 1e-4);
    }
}

#[test]
fn twenty_steps_with_fixed_crops_end_where_pytorch_ends() {
    let fixture = Fixture::open("vattack/expected.safetensors");
    for name in ["notebook", "paper", "ensemble"] {
        let (attack, surrogates, pictures) = case(&fixture, name);
        let made = attack.craft_with(&surrogates, &pictures, 0, &drawn(&fixture, name), &mut quiet).unwrap();
        let want = fixture.tensor(&format!("{name}.final"));
        let differ = (made.crafted.pixels() - &want).unwrap().abs().unwrap();
        let most = values(&differ).into_iter().fold(0.0, f64::max);
        println!("{name}: {most:.1e}");
        // A step is 1/255 or 3/255: no sign and no mask was another.
        assert!(most < 2e-6, "{name} differs by {most:.1e}");
    }
}

#[test]
fn the_gradient_is_that_of_finite_differences() {
    let fixture = Fixture::open("vattack/expected.safetensors");
    for name in ["notebook", "paper"] {
        let (attack, surrogates, pictures) = case(&fixture, name);
        let loss = ValueLoss::new(&attack, &surrogates[0]).unwrap();
        let pixels = pictures.pixels().i(..1).unwrap();
        let masks = masks(&loss.localised(&pixels, &[0]).unwrap());
        let (_, gradient) = loss.values_and_gradient(&pixels, &[0], &masks).unwrap();
        for seed in 0..3 {
            let direction = random(&[1, 3, 20, 20], seed, -1.0, 1.0);
            let slope: f64 = values(&(&gradient * &direction).unwrap()).iter().sum();
            let at = |h: f64| {
                let moved = (&pixels + (&direction * h).unwrap()).unwrap();
                loss.values_of(&moved, &[0], &masks).unwrap()[0]
            };
            let h = 2e-3;
            let measured = (at(h) - at(-h)) / (2.0 * h);
            let scale = values(&gradient).iter().map(|g| g.abs()).sum::<f64>() / 20.0;
            assert!((slope - measured).abs() < 2e-2 * scale, "{name}: {slope} and {measured}, of {scale}");
        }
    }
}

#[test]
fn swapped_words_negate_the_loss_and_an_empty_mask_has_none() {
    let fixture = Fixture::open("vattack/expected.safetensors");
    let (attack, surrogates, pictures) = case(&fixture, "paper");
    let swapped = {
        let [s, t] = ["source", "target"].map(|which| fixture.tensor(&format!("paper.0.{which}")));
        Surrogate::new(clip("v5"), Subject::undefended("v5"), 1.0, &t, &s).unwrap()
    };
    let masks = vec![(0..25).map(|i| i % 3 == 0).collect::<Vec<bool>>(), vec![true; 25]];
    let of = |s: &Surrogate, masks: &[Vec<bool>]| {
        let loss = ValueLoss::new(&attack, s).unwrap();
        loss.values_and_gradient(pictures.pixels(), &[0, 1], masks).unwrap()
    };
    let ((a, ga), (b, gb)) = (of(&surrogates[0], &masks), of(&swapped, &masks));
    for (a, b) in a.iter().zip(&b) {
        assert!(*a != 0.0 && (a + b).abs() < 1e-6 * a.abs().max(1e-2), "{a} and {b}");
    }
    assert_close("gradient", &ga, &gb.neg().unwrap(), 1e-5);
    let (none, gradient) = of(&surrogates[0], &[vec![false; 25], vec![false; 25]]);
    assert_eq!(none, [0.0, 0.0]);
    assert!(values(&gradient).iter().all(|g| *g == 0.0));
}

#[test]
fn a_mask_is_neither_empty_nor_full_unless_the_scores_say_nothing() {
    let fixture = Fixture::open("vattack/expected.safetensors");
    for name in ["notebook", "paper"] {
        let (attack, surrogates, _) = case(&fixture, name);
        let loss = ValueLoss::new(&attack, &surrogates[0]).unwrap();
        for seed in 0..5 {
            for found in loss.localised(&photos(2, 20, 20, seed), &[0, 1]).unwrap() {
                assert!(found.mask.contains(&true) && found.mask.contains(&false), "{name} {seed}");
                let low = found.scores.iter().copied().fold(f32::INFINITY, f32::min);
                let high = found.scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                for (score, kept) in found.scores.iter().zip(&found.mask) {
                    assert_eq!(*kept, *score > (low + high) / 2.0);
                }
            }
        }
    }
    // A source of every direction at once is no one's: all scores are 0 and nothing is told apart.
    let zero = Tensor::zeros((2, 24), DType::F32, &Device::Cpu).unwrap();
    let target = fixture.tensor("paper.0.target");
    let blind = Surrogate::new(clip("v5"), Subject::undefended("v5"), 1.0, &zero, &target).unwrap();
    let loss = ValueLoss::new(&VAttack::paper(eps("16/255")), &blind).unwrap();
    for found in loss.localised(&photos(2, 20, 20, 0), &[0, 1]).unwrap() {
        assert!(found.mask.iter().all(|kept| *kept));
    }
}

#[test]
fn crops_lie_in_the_picture_and_hold_their_box() {
    let size = (40, 30);
    let whole = Window::whole(size);
    let mut seen = std::collections::HashSet::new();
    for seed in 0..400u64 {
        let mut rng = picture_rng(seed, 0, 0, "test");
        let n = |most: usize, i: u32| (seed as usize * 7919 + i as usize * 104729) % most;
        let (height, width) = (1 + n(40, 0), 1 + n(30, 1));
        let bounds = Window { top: n(41 - height, 2), left: n(31 - width, 3), height, width };
        let centric = Crop::Centric { least: 0.75, share: 0.15 }.draw(size, &bounds, &mut rng);
        assert!(whole.contains(&centric) && centric.contains(&bounds), "{bounds:?} {centric:?}");
        assert!(centric.height >= 30 && centric.width >= 22, "{centric:?}");
        seen.insert((centric.top, centric.left, centric.height, centric.width));
        let random = Crop::Random { least: 0.75 }.draw(size, &bounds, &mut rng);
        assert!(whole.contains(&random), "{random:?}");
        assert!(random.height * random.width >= 870, "{random:?}");
        assert_eq!(Crop::Whole.draw(size, &bounds, &mut rng), whole);
    }
    assert!(seen.len() > 100);
}

fn settings(form: fn(Eps) -> VAttack, steps: usize) -> VAttack {
    VAttack { steps, ..form(eps("16/255")) }
}

fn craft(attack: &VAttack, surrogates: &[Surrogate], pictures: &Pictures, seed: u64) -> Made {
    attack.craft(surrogates, pictures, seed, &mut quiet).unwrap()
}

#[test]
fn results_stay_in_the_ball_and_the_box_as_floats_and_as_png() {
    let fixture = Fixture::open("vattack/expected.safetensors");
    for form in [VAttack::notebook, VAttack::paper] {
        for radius in ["4/255", "16/255"] {
            let attack = VAttack { steps: 12, momentum: 0.9, ..form(eps(radius)) };
            let surrogates = [surrogate(clip("v5"), "v5", 1.0, &fixture, "paper", 0)];
            // Samples of 0 and 255 among them: the box is met.
            let clean = photos(2, 20, 20, 3);
            let made = craft(&attack, &surrogates, &pictures(&clean), 1);
            let pixels = made.crafted.pixels();
            let quantised = quantise(pixels, &clean, eps(radius)).unwrap();
            for found in [pixels, &quantised] {
                assert!(values(found).iter().all(|v| (0.0..=1.0).contains(v)));
                for row in 0..2 {
                    assert!(linf(found, &clean, row) <= eps(radius).value() + 1e-6);
                    assert!(linf(found, &clean, row) > 0.5 * eps(radius).value());
                }
            }
            for outcome in made.crafted.outcomes() {
                assert!(outcome.attacked && outcome.gradients == 12);
                assert!(outcome.loss > outcome.clean_loss, "{outcome:?}");
            }
            assert_eq!(made.crafted.recipe().crafted_on, Subject::undefended("v5"));
            assert_eq!(made.crafted.recipe().attack, "v-attack");
        }
    }
}

#[test]
fn without_a_radius_or_a_step_nothing_moves_but_by_the_start() {
    let fixture = Fixture::open("vattack/expected.safetensors");
    let surrogates = [surrogate(clip("v5"), "v5", 1.0, &fixture, "paper", 0)];
    let clean = photos(2, 20, 20, 5);
    for form in [VAttack::notebook, VAttack::paper] {
        let still = craft(&VAttack { steps: 4, ..form(eps("0")) }, &surrogates, &pictures(&clean), 0);
        assert_same("eps 0", still.crafted.pixels(), &clean);
        let attack = settings(form, 0);
        let start = craft(&attack, &surrogates, &pictures(&clean), 0);
        let most = linf(start.crafted.pixels(), &clean, 0);
        assert!(most <= attack.alpha + 1e-6);
        assert_eq!(most > 0.0, attack.random_start);
    }
}

#[test]
fn outside_of_the_crops_the_start_stays() {
    let fixture = Fixture::open("vattack/expected.safetensors");
    let surrogates = [surrogate(clip("v5"), "v5", 1.0, &fixture, "paper", 0)];
    // No sample near 0 or 1, where the box would cut the start.
    let clean = ((photos(2, 20, 20, 6) * 0.5).unwrap() + 0.25).unwrap();
    let windows = vec![Window { top: 3, left: 0, height: 15, width: 17 }; 6];
    for form in [VAttack::notebook, VAttack::paper] {
        let attack = VAttack { random_start: true, ..settings(form, 6) };
        let noise = random(&[2, 3, 20, 20], 9, -1.0, 1.0);
        let drawn = Drawn { noise: Some(noise.clone()), windows: Some(windows.clone()) };
        let made = attack.craft_with(&surrogates, &pictures(&clean), 0, &drawn, &mut quiet).unwrap();
        let start = (&clean + (noise * attack.alpha).unwrap()).unwrap();
        let moved = (made.crafted.pixels() - &start).unwrap().abs().unwrap().max(0).unwrap().max(0).unwrap();
        let moved = moved.to_vec2::<f32>().unwrap();
        for (y, row) in moved.iter().enumerate() {
            for (x, &change) in row.iter().enumerate() {
                let inside = (3..18).contains(&y) && x < 17;
                assert!(inside || change < 1e-7, "({y}, {x}) moved by {change}");
            }
        }
        assert!(moved.iter().flatten().any(|change| *change > 1e-3));
    }
}

#[test]
fn a_picture_does_not_depend_on_its_batch_and_a_seed_gives_the_same_bytes() {
    let fixture = Fixture::open("vattack/expected.safetensors");
    let clean = photos(2, 20, 20, 8);
    let packed = clip("v5").packed(Precision::F32).unwrap();
    println!("packed: {:?}", packed.precision());
    for tower in [clip("v5"), packed] {
        for form in [VAttack::notebook, VAttack::paper] {
            let attack = settings(form, 5);
            let both = surrogate(tower.clone(), "v5", 1.0, &fixture, "paper", 0);
            let made = craft(&attack, from_ref(&both), &pictures(&clean), 7);
            let again = craft(&attack, from_ref(&both), &pictures(&clean), 7);
            assert_same("the same seed", again.crafted.pixels(), made.crafted.pixels());
            let other = craft(&attack, &[both], &pictures(&clean), 8);
            assert!(
                values(&(other.crafted.pixels() - made.crafted.pixels()).unwrap()).iter().any(|v| *v != 0.0)
            );
            for row in 0..2 {
                let text = |which: &str| fixture.tensor(&format!("paper.0.{which}")).i(row..row + 1).unwrap();
                let subject = Subject::undefended("v5");
                let one =
                    Surrogate::new(tower.clone(), subject, 1.0, &text("source"), &text("target")).unwrap();
                let pixels = clean.i(row..row + 1).unwrap();
                let key = pictures(&clean).keys()[row];
                let alone = Pictures::new(&pixels, vec![key]).unwrap();
                let alone = craft(&attack, &[one], &alone, 7);
                let want = made.crafted.pixels().i(row..row + 1).unwrap();
                assert_same("alone and in a batch", alone.crafted.pixels(), &want);
            }
        }
    }
}

#[test]
fn a_packed_tower_gives_the_plain_ones_gradient() {
    let fixture = Fixture::open("vattack/expected.safetensors");
    for name in ["notebook", "paper"] {
        let (attack, surrogates, pictures) = case(&fixture, name);
        let packed = clip("v5").packed(Precision::F32).unwrap();
        let packed = surrogate(packed, "v5", 1.0, &fixture, name, 0);
        let of = |s: &Surrogate| {
            let loss = ValueLoss::new(&attack, s).unwrap();
            let found = loss.localised(pictures.pixels(), &[0, 1]).unwrap();
            loss.values_and_gradient(pictures.pixels(), &[0, 1], &masks(&found)).unwrap()
        };
        assert_close(name, &of(&packed).1, &of(&surrogates[0]).1, 1e-5);
    }
}

#[test]
fn pictures_not_chosen_are_left_alone() {
    let fixture = Fixture::open("vattack/expected.safetensors");
    let surrogates = [surrogate(clip("v5"), "v5", 1.0, &fixture, "paper", 0)];
    let clean = photos(2, 20, 20, 11);
    let chosen = pictures(&clean).only(vec![false, true]).unwrap();
    let made = craft(&settings(VAttack::paper, 3), &surrogates, &chosen, 0);
    assert_same("the first", &made.crafted.pixels().i(0).unwrap(), &clean.i(0).unwrap());
    assert!(linf(made.crafted.pixels(), &clean, 1) > 0.0);
    assert!(made.localised[0].is_none() && made.localised[1].is_some());
    assert!(!made.crafted.outcomes()[0].attacked);
}

#[test]
fn what_does_not_fit_is_refused() {
    let fixture = Fixture::open("vattack/expected.safetensors");
    let one = || surrogate(clip("v5"), "v5", 1.0, &fixture, "paper", 0);
    let clean = photos(2, 20, 20, 0);
    let refused = |attack: VAttack, surrogates: &[Surrogate], clean: &Tensor| {
        attack.craft(surrogates, &pictures(clean), 0, &mut quiet).unwrap_err().to_string()
    };
    let paper = || settings(VAttack::paper, 1);
    assert!(refused(paper(), &[], &clean).contains("surrogates"));
    assert!(refused(paper(), &[one()], &photos(3, 20, 20, 0)).contains("words"));
    assert!(refused(VAttack { blocks: 5, ..paper() }, &[one()], &clean).contains("1 to 4"));
    assert!(refused(VAttack { alpha: -1.0, ..paper() }, &[one()], &clean).contains("alpha"));
    assert!(
        refused(VAttack { crop: Crop::Random { least: 0.0 }, ..paper() }, &[one()], &clean).contains("crop")
    );
    let keys = Localise::Keys { block: Some(4), rounds: 20 };
    assert!(refused(VAttack { localise: keys, ..paper() }, &[one()], &clean).contains("block"));
    let text = Tensor::zeros((2, 7), DType::F32, &Device::Cpu).unwrap();
    assert!(Surrogate::new(clip("v5"), Subject::undefended("v5"), 1.0, &text, &text).is_err());
    let text = fixture.tensor("paper.0.source");
    assert!(Surrogate::new(clip("v5"), Subject::undefended("v5"), 0.0, &text, &text).is_err());
    // A tower without a projection, as a LLaVA's is.
    let bare = clip("v5_bare");
    assert!(bare.spec().projection.is_none());
    assert!(Surrogate::new(bare, Subject::undefended("bare"), 1.0, &text, &text).is_err());
    assert!("sideways".parse::<Preset>().is_err());
}

#[test]
fn several_surrogates_go_by_a_name_of_their_own_and_are_no_adaptive_attack() {
    let fixture = Fixture::open("vattack/expected.safetensors");
    let (attack, surrogates, pictures) = case(&fixture, "ensemble");
    let made = craft(&VAttack { steps: 1, ..attack }, &surrogates, &pictures, 0);
    let on = &made.crafted.recipe().crafted_on;
    assert_eq!(on.to_string(), "v5 + gelu");
    let target = Subject::undefended("v5");
    assert!(ThreatKind::Adaptive.threat(on, &target).is_err());
    assert!(ThreatKind::Transfer.threat(on, &target).is_ok());
}

#[test]
fn maps_show_the_mask_and_the_perturbation() {
    let clean = Tensor::full(0.8f32, (3, 20, 20), &Device::Cpu).unwrap();
    let mut mask = vec![false; 25];
    mask[7] = true;
    let mut scores = vec![0.0; 25];
    scores[7] = 1.0;
    let map = map_of_mask(&clean, &Localised { grid: (5, 5), scores, mask }).unwrap();
    assert_eq!(map.get_pixel(9, 5).0, [204; 3]);
    assert_eq!(map.get_pixel(0, 0).0, [51; 3]);
    assert!(map.pixels().any(|pixel| pixel.0 == [255, 0, 0]));
    let moved = (&clean + random(&[3, 20, 20], 1, -0.01, 0.01)).unwrap();
    let map = map_of_perturbation(&moved, &clean).unwrap();
    let samples: Vec<u8> = map.into_raw();
    assert!(samples.contains(&0) || samples.contains(&255));
    let none = map_of_perturbation(&clean, &clean).unwrap();
    assert!(none.into_raw().iter().all(|sample| *sample == 128));
    assert!(map_of_perturbation(&moved.i(..1).unwrap(), &clean).is_err());
}
