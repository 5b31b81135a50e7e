//! Square: its schedule, that it sees values alone, and the laws of every attack.

mod fixture;
mod toy;

use std::cell::RefCell;
use std::sync::atomic::Ordering;
use std::time::Instant;

use candle_core::{IndexOp, Tensor};
use fixture::{assert_same, values};
use proptest::prelude::*;
use radapt::Result;
use radapt::attack::{
    Attack, Classification, Eps, Evaluation, Loss, Maximise, Objective, OnLoss, Outcome, Pictures, Recipe,
    Square, Subject, ThreatKind,
};
use serde_json::{Value, json};
use toy::{
    Toy, assert_lawful, assert_lawful_on_a_clip, assert_progress, count, craft, eps, linf, photos, pictures,
    quiet, trained,
};

fn on_margin(square: Square) -> OnLoss<Square> {
    square.on(Loss::Margin { kappa: None })
}

fn square(eps: Eps, queries: usize) -> Square {
    Square { queries, ..Square::standard(eps) }
}

/// The mean of the samples of a picture against a pattern, without a goal; it notes all it is
/// asked and panics where a gradient is asked for.
struct Pattern {
    subject: Subject,
    pattern: Tensor,
    pictures: usize,
    asked: RefCell<Vec<(Vec<usize>, Tensor)>>,
}

impl Pattern {
    fn new(pattern: Tensor, pictures: usize) -> Self {
        Self { subject: Subject::undefended("pattern"), pattern, pictures, asked: RefCell::default() }
    }
}

impl Objective for Pattern {
    fn subject(&self) -> &Subject {
        &self.subject
    }

    fn pictures(&self) -> usize {
        self.pictures
    }

    fn describe(&self) -> Value {
        json!({ "loss": "pattern" })
    }

    fn values(&self, pixels: &Tensor, rows: &[usize]) -> Result<Evaluation> {
        self.asked.borrow_mut().push((rows.to_vec(), pixels.clone()));
        let of = |x: Tensor| values(&x).iter().zip(values(&self.pattern)).map(|(x, p)| x * p).sum();
        let loss = (0..rows.len()).map(|i| Ok(of(pixels.i(i)?))).collect::<Result<Vec<f64>>>()?;
        Ok(Evaluation { loss, fooled: None })
    }

    fn values_and_gradient(&self, _: &Tensor, _: &[usize]) -> Result<(Evaluation, Tensor)> {
        panic!("no gradient is to be asked for")
    }
}

#[test]
fn sides_are_those_of_the_schedule() {
    let square = Square::standard(eps("4/255"));
    let queries = [0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 4999];
    let at = |side: usize| queries.map(|query| square.side(query, side, side));
    assert_eq!(at(224), [200, 200, 142, 142, 100, 100, 71, 71, 50, 50, 35, 35, 25, 25, 18, 18]);
    assert_eq!(at(336), [301, 301, 213, 213, 150, 150, 106, 106, 75, 75, 53, 53, 38, 38, 27, 27]);
    assert_eq!([6001, 8000, 8001, 100_000].map(|q| square.side(q, 224, 224)), [13, 13, 9, 9]);
    assert_eq!([0, 4999].map(|query| square.side(query, 1, 1)), [1, 1]);
    // By the area, and no longer than the shorter side.
    assert_eq!([0, 60, 4999].map(|query| square.side(query, 4, 100)), [4, 4, 2]);
    // Half of the queries, the same sides.
    let stretched = Square { queries: 5000, ..Square::torchattacks(eps("4/255")) };
    let whole = Square { queries: 10_000, ..Square::standard(eps("4/255")) };
    for query in 0..5000 {
        assert_eq!(stretched.side(query, 224, 224), whole.side(2 * query, 224, 224));
    }
    assert_eq!((square.queries, square.p_init, square.rescale), (5000, 0.8, false));
    assert!(Square::torchattacks(eps("4/255")).rescale);
}

#[test]
fn it_climbs_by_values_alone() {
    let mut model = Toy::mlp(5, 105, 1);
    model.forward_only = true;
    let pixels = photos(6, 5, 7, 2);
    let labels = model.labels(&pixels);
    let attack = on_margin(square(eps("10/255"), 300));
    let crafted = craft(&attack, &model, &labels, &pixels, 0);
    let fooled = crafted.outcomes().iter().filter(|outcome| outcome.fooled == Some(true)).count();
    assert!(fooled > 0 && fooled < 6, "{fooled} of 6: eps should fool some of them");
    let mut queries = 6;
    for outcome in crafted.outcomes() {
        assert!(outcome.loss >= outcome.clean_loss);
        assert_eq!(outcome.gradients, 0);
        let spent = outcome.queries.unwrap();
        assert!(spent <= 301 && (outcome.fooled == Some(true) || spent == 301), "{outcome:?}");
        queries += spent;
    }
    // The clean pictures and the queries, and no more.
    assert_eq!(model.forwards.load(Ordering::Relaxed), queries);
}

#[test]
fn every_query_is_a_square_on_the_best_so_far() {
    let (height, width) = (9, 6);
    let pixels = toy::random(&[2, 3, height, width], 3, 0.2, 0.8);
    let objective = Pattern::new(toy::random(&[3, height, width], 4, -1.0, 1.0), 2);
    let square = square(eps("8/255"), 1200);
    let crafted = square.maximise(&objective, &pictures(&pixels), 0, &mut quiet).unwrap();
    let asked = objective.asked.into_inner();
    assert_eq!(asked.len(), 1202);
    assert_same("clean first", &asked[0].1, &pixels);
    let eps = square.eps.value();
    for row in 0..2 {
        let clean = values(&pixels.i(row).unwrap());
        let of = |query: usize| values(&asked[query].1.i(row).unwrap());
        let at = |c: usize, y: usize, x: usize| (c * height + y) * width + x;
        let loss = |x: &[f64]| -> f64 { x.iter().zip(values(&objective.pattern)).map(|(x, p)| x * p).sum() };
        let mut best = of(1);
        for c in 0..3 {
            for x in 0..width {
                let up = best[at(c, 0, x)] > clean[at(c, 0, x)];
                assert!((0..height).all(|y| (best[at(c, y, x)] > clean[at(c, y, x)]) == up), "a stripe");
            }
        }
        for query in 2..1202 {
            let found = of(query);
            // Only x +- eps is ever tried.
            assert!(found.iter().zip(&clean).all(|(f, c)| ((f - c).abs() - eps).abs() < 1e-6));
            let changed: Vec<(usize, usize)> = (0..3 * height * width)
                .filter(|&i| found[i] != best[i])
                .map(|i| (i / width % height, i % width))
                .collect();
            let side = square.side(query - 2, height, width);
            for pick in [|p: &(usize, usize)| p.0, |p: &(usize, usize)| p.1] {
                let (low, high) = (changed.iter().map(pick).min(), changed.iter().map(pick).max());
                if let (Some(low), Some(high)) = (low, high) {
                    assert!(high - low < side, "query {query}: {low} to {high}, side {side}");
                }
            }
            if loss(&found) > loss(&best) {
                best = found;
            }
        }
        let returned = values(&crafted.pixels().i(row).unwrap());
        assert_eq!(returned, best);
        assert!((crafted.outcomes()[row].loss.unwrap() - loss(&best)).abs() < 1e-9);
        assert_eq!(crafted.outcomes()[row].fooled, None);
        assert_eq!(crafted.outcomes()[row].queries, Some(1201));
    }
    assert_eq!(crafted.recipe().objective, json!({ "loss": "pattern" }));
    // It finds most of what there is in the corner of the ball, whose last row and column it leaves.
    let most: f64 = values(&objective.pattern).iter().map(|p| p.abs() * eps).sum();
    for outcome in crafted.outcomes() {
        let share = (outcome.loss.unwrap() - outcome.clean_loss.unwrap()) / most;
        println!("{share:.2} of the most there is");
        assert!(share > 0.5, "{share}");
    }
}

#[test]
fn more_queries_are_never_worse() {
    let model = Toy::mlp(4, 108, 5);
    let pixels = photos(4, 6, 6, 6);
    let labels = model.labels(&pixels);
    let mut before = [f64::NEG_INFINITY; 4];
    for queries in [0, 1, 5, 20, 80, 200] {
        let crafted = craft(&on_margin(square(eps("2/255"), queries)), &model, &labels, &pixels, 0);
        for (before, outcome) in before.iter_mut().zip(crafted.outcomes()) {
            assert!(outcome.loss.unwrap() >= *before && outcome.loss >= outcome.clean_loss);
            *before = outcome.loss.unwrap();
        }
    }
}

#[test]
fn nothing_better_than_the_clean_picture_returns_it() {
    // The pattern rewards the clean picture itself only.
    struct Still(Pattern);
    impl Objective for Still {
        fn subject(&self) -> &Subject {
            &self.0.subject
        }
        fn pictures(&self) -> usize {
            self.0.pictures
        }
        fn describe(&self) -> Value {
            json!({})
        }
        fn values(&self, pixels: &Tensor, rows: &[usize]) -> Result<Evaluation> {
            let of = |i: usize| -linf(pixels, &self.0.pattern.unsqueeze(0).unwrap(), i);
            Ok(Evaluation { loss: (0..rows.len()).map(of).collect(), fooled: None })
        }
        fn values_and_gradient(&self, _: &Tensor, _: &[usize]) -> Result<(Evaluation, Tensor)> {
            panic!("no gradient is to be asked for")
        }
    }
    let pixels = photos(1, 5, 5, 7);
    let objective = Still(Pattern::new(pixels.clone(), 1));
    // The first picture of the batch is compared with the pattern's.
    let crafted = square(eps("4/255"), 20).maximise(&objective, &pictures(&pixels), 0, &mut quiet).unwrap();
    assert_same("clean", crafted.pixels(), &pixels);
    assert_eq!(crafted.outcomes()[0].loss, Some(0.0));
}

#[test]
fn the_laws_of_every_attack_hold() {
    for (classes, seed) in [(2, 10), (3, 20), (12, 30)] {
        for (height, width) in [(5, 7), (7, 5), (1, 1)] {
            let entries = 3 * height * width;
            for model in [Toy::linear(classes, entries, seed), Toy::mlp(classes, entries, seed)] {
                let pixels = photos(5, height, width, seed);
                let mut labels = model.labels(&pixels);
                labels[1] = (labels[1] + 1) % classes;
                for eps in [eps("0"), eps("3/255"), eps("0.2"), eps("1")] {
                    for square in [square(eps, 40), Square { queries: 40, ..Square::torchattacks(eps) }] {
                        let crafted = assert_lawful(&on_margin(square), &model, &pixels, &labels);
                        if eps.value() == 0.0 {
                            assert_same("eps 0", crafted.pixels(), &pixels);
                        }
                    }
                }
            }
        }
        let (model, pixels) = (Toy::mlp(classes, 105, seed), photos(5, 5, 7, seed));
        let labels = model.labels(&pixels);
        assert_progress(&on_margin(square(eps("8/255"), 50)), &model, &pixels, &labels);
    }
}

#[test]
fn pictures_wrong_already_cost_one_look_and_fooled_ones_leave() {
    let model = Toy::mlp(3, 108, 8);
    let pixels = photos(4, 6, 6, 9);
    let right = model.labels(&pixels);
    let wrong: Vec<usize> = right.iter().map(|label| (label + 1) % 3).collect();
    let attack = on_margin(square(eps("4/255"), 100));
    let crafted = craft(&attack, &model, &wrong, &pixels, 0);
    assert_same("wrong already", crafted.pixels(), &pixels);
    assert_eq!(model.forwards.load(Ordering::Relaxed), 4);
    for outcome in crafted.outcomes() {
        let want = Outcome { fooled: Some(true), ..Outcome::default() };
        assert_eq!(Outcome { clean_loss: None, loss: None, ..outcome.clone() }, want);
    }
    // With all of the box as the ball, they are soon fooled.
    let crafted = craft(&on_margin(square(eps("1"), 100)), &model, &right, &pixels, 0);
    assert!(crafted.outcomes().iter().all(|o| o.fooled == Some(true) && o.queries < Some(101)));
}

#[test]
fn logits_that_are_no_number_count_as_wrong() {
    let mut model = Toy::mlp(4, 108, 11);
    let pixels = photos(5, 6, 6, 12);
    let labels = model.labels(&pixels);
    for above in [-1.0, 0.2, 0.5, 0.8] {
        model.nan_logit = Some((1, above));
        assert_lawful(&on_margin(square(eps("20/255"), 60)), &model, &pixels, &labels);
    }
}

#[test]
fn parameters_are_checked_and_recorded() {
    let model = Toy::linear(3, 108, 13);
    let pixels = photos(2, 6, 6, 14);
    let task = Classification::new(&model, vec![0, 1]).unwrap();
    let run = |square: Square| on_margin(square).craft(&task, &pictures(&pixels), 7, &mut quiet);
    for p_init in [0.0, -0.1, 1.1, f64::NAN] {
        assert!(run(Square { p_init, ..square(eps("4/255"), 3) }).is_err());
    }
    let crafted = run(square(eps("4/255"), 3)).unwrap();
    let recipe = crafted.recipe();
    assert_eq!((recipe.attack.as_str(), recipe.seed, recipe.eps), ("square", 7, Some(eps("4/255"))));
    assert_eq!(recipe.objective["loss"], json!("margin"));
    assert_eq!(serde_json::from_value::<Recipe>(json!(recipe)).unwrap(), *recipe);
    assert_eq!(serde_json::from_value::<Square>(recipe.parameters.clone()).unwrap(), square(eps("4/255"), 3));
    let few: Pictures = pictures(&pixels.narrow(0, 0, 1).unwrap());
    assert!(on_margin(square(eps("4/255"), 3)).craft(&task, &few, 0, &mut quiet).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn it_stays_in_the_ball_on_any_shape(
        height in 1usize..12,
        width in 1usize..12,
        n in 0u8..=255,
        p_init in 0.01f64..=1.0,
        rescale: bool,
        seed: u64,
    ) {
        let pixels = photos(2, height, width, seed);
        let objective = Pattern::new(toy::random(&[3, height, width], seed, -1.0, 1.0), 2);
        let square = Square { eps: Eps::of_255(n), queries: 25, p_init, rescale };
        let crafted = square.maximise(&objective, &pictures(&pixels), seed, &mut quiet).unwrap();
        for row in 0..2 {
            prop_assert!(linf(crafted.pixels(), &pixels, row) <= square.eps.value() + 1e-6);
            prop_assert!(crafted.outcomes()[row].loss >= crafted.outcomes()[row].clean_loss);
        }
        prop_assert!(values(crafted.pixels()).iter().all(|v| (0.0..=1.0).contains(v)));
    }
}

#[test]
fn a_tiny_clip_is_attacked_lawfully_with_and_without_its_defence() {
    assert!(assert_lawful_on_a_clip(&on_margin(square(eps("60/255"), 30))) > 0);
}

// --- a trained CLIP -----------------------------------------------------------------------------

fn measure(photos: usize, square: Square) -> (usize, usize) {
    let Some(trained) = trained(photos) else { return (0, 0) };
    let task = trained.task();
    let rows: Vec<usize> = (0..photos).collect();
    let clean = task.correct(&trained.pixels, &rows).unwrap();
    let start = Instant::now();
    let crafted = on_margin(square.clone()).craft(&task, &trained.pictures(), 0, &mut quiet).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    let queries: usize = crafted.outcomes().iter().filter_map(|outcome| outcome.queries).sum();
    let float = crafted.score(&task, ThreatKind::Adaptive, &clean).unwrap();
    let bytes =
        crafted.quantised(&trained.pixels).unwrap().score(&task, ThreatKind::Adaptive, &clean).unwrap();
    println!(
        "square at {}, {} queries (adaptive, undefended): of {photos} photos {} right, {} after it, {} in 8 \
         bits; {queries} queries in {seconds:.1} s, {:.2} ms per query",
        square.eps,
        square.queries,
        count(&clean),
        count(float.robust()),
        count(bytes.robust()),
        1e3 * seconds / queries as f64,
    );
    (count(&clean), count(float.robust()))
}

#[test]
fn square_fools_a_trained_clip() {
    let (clean, robust) = measure(20, square(eps("8/255"), 40));
    assert!(clean == 0 || robust < clean, "{robust} of {clean}");
}

/// `cargo test --release --no-default-features --test attack_square -- --ignored --nocapture`
#[test]
#[ignore = "a measurement: minutes"]
fn measure_square_on_a_trained_clip() {
    measure(100, square(eps("4/255"), 500));
    measure(100, square(eps("1/255"), 500));
}
