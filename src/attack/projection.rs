/// The step d, smallest in the Linf norm, that takes `x` onto the hyperplane <w, x + d> = <w, x> +
/// `gap` inside the box [0, 1]. Where the box ends before the hyperplane, the step that comes
/// closest to it.
///
/// `x` in [0, 1] and `w` have D entries, and so has d. Every coordinate of a weight goes the same
/// way, or as far as its wall is; those without weight, or with one that is not finite, stay.
/// Sums are in f64, and the time is O(D): the breakpoints are halved by selection, not sorted.
/// The problem and a solution by sorting are in Croce and Hein 2020 (FAB).
pub(super) fn linf_step(x: &[f32], w: &[f32], gap: f64) -> Vec<f32> {
    if gap == 0.0 || gap.is_nan() {
        return vec![0.0; x.len()];
    }
    // The way that closes the gap, and how far the wall is.
    let up = |w: f32| (w > 0.0) == (gap > 0.0);
    let room = |x: f32, w: f32| if up(w) { 1.0 - x } else { x };
    let mut free: Vec<(f32, f32)> = (x.iter().zip(w))
        .filter(|(_, w)| moves(**w))
        .map(|(&x, &w)| (room(x, w).max(0.0), w.abs()))
        .collect();
    let radius = radius(&mut free, gap.abs()) as f32;
    let step = |(&x, &w): (&f32, &f32)| {
        let far = radius.min(room(x, w).max(0.0));
        if !moves(w) {
            0.0
        } else if up(w) {
            far
        } else {
            -far
        }
    };
    x.iter().zip(w).map(step).collect()
}

fn moves(weight: f32) -> bool {
    weight != 0.0 && weight.is_finite()
}

/// The r with sum_i w_i min(r, room_i) = `gap`, of pairs (room, w) with w > 0; infinite where no r
/// is large enough.
fn radius(mut free: &mut [(f32, f32)], gap: f64) -> f64 {
    // What those give that are known to be at their walls, and the weights of those known not to be.
    let (mut at_walls, mut weights) = (0.0, 0.0);
    let product = |&(room, w): &(f32, f32)| f64::from(room) * f64::from(w);
    let weight = |&(_, w): &(f32, f32)| f64::from(w);
    while !free.is_empty() {
        let (near, &mut middle, far) =
            free.select_nth_unstable_by(free.len() / 2, |(a, _), (b, _)| a.total_cmp(b));
        let walls = at_walls + near.iter().map(product).sum::<f64>() + product(&middle);
        let beyond = weights + far.iter().map(weight).sum::<f64>();
        if walls + beyond * f64::from(middle.0) < gap {
            (at_walls, free) = (walls, far);
        } else {
            (weights, free) = (beyond + weight(&middle), near);
        }
    }
    if weights > 0.0 { ((gap - at_walls) / weights).max(0.0) } else { f64::INFINITY }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn norm(d: &[f32]) -> f64 {
        d.iter().map(|d| f64::from(d.abs())).fold(0.0, f64::max)
    }

    fn dot(w: &[f32], d: &[f32]) -> f64 {
        w.iter().zip(d).map(|(&w, &d)| f64::from(w) * f64::from(d)).sum()
    }

    /// How far <w, x + d> can get towards `gap` with |d| <= radius, in the box.
    fn reach(x: &[f32], w: &[f32], gap: f64, radius: f64) -> f64 {
        let furthest = |(&x, &w): (&f32, &f32)| {
            let (x, w) = (f64::from(x), f64::from(w) * gap.signum());
            w * if w > 0.0 { radius.min(1.0 - x) } else { -radius.min(x) }
        };
        x.iter().zip(w).map(furthest).sum()
    }

    /// The radius by bisection; 1 reaches everything that can be reached.
    fn by_bisection(x: &[f32], w: &[f32], gap: f64) -> f64 {
        let (mut low, mut high) = (0.0, 1.0);
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            if reach(x, w, gap, middle) < gap.abs() { low = middle } else { high = middle }
        }
        high
    }

    /// Points with walls and ties, weights of very different size and without any, and gaps within
    /// reach and beyond.
    fn problem() -> impl Strategy<Value = (Vec<f32>, Vec<f32>, f64)> {
        let x = prop_oneof![3 => 0f32..=1.0, 1 => Just(0f32), 1 => Just(1f32), 1 => Just(0.25f32)];
        let w = prop_oneof![3 => -1f32..1.0, 1 => Just(0f32), 1 => -1e-4f32..1e-4, 1 => Just(0.5f32)];
        (prop::collection::vec((x, w), 1..40), -1.3f64..1.3).prop_map(|(pairs, share)| {
            let (x, w): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let most = reach(&x, &w, share.signum(), 1.0);
            (x, w, share * most)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn the_step_is_the_smallest_that_reaches_the_plane((x, w, gap) in problem()) {
            let d = linf_step(&x, &w, gap);
            let most = reach(&x, &w, gap, 1.0);
            for ((x, w), d) in x.iter().zip(&w).zip(&d) {
                prop_assert!((0.0..=1.0).contains(&(x + d)), "{x} {d}");
                prop_assert!(*w != 0.0 || *d == 0.0);
            }
            let tolerance = 1e-6 * w.iter().map(|w| f64::from(w.abs())).sum::<f64>() + 1e-12;
            if gap == 0.0 {
                prop_assert_eq!(norm(&d), 0.0);
            } else if gap.abs() > most {
                // Everything at its wall: nothing comes closer.
                prop_assert!((dot(&w, &d).abs() - most).abs() <= tolerance);
            } else {
                prop_assert!((dot(&w, &d) - gap).abs() <= tolerance, "{} {gap}", dot(&w, &d));
                let want = by_bisection(&x, &w, gap);
                prop_assert!(norm(&d) <= want + 1e-6, "{} {want}", norm(&d));
                // A smaller radius does not reach.
                prop_assert!(reach(&x, &w, gap, norm(&d) * (1.0 - 1e-4) - 1e-6) <= gap.abs() + tolerance);
            }
        }
    }

    #[test]
    fn away_from_the_walls_the_step_is_the_dual_norm() {
        let d = linf_step(&[0.5; 3], &[1.0, -2.0, 0.0], 0.3);
        assert!((norm(&d) - 0.1).abs() < 1e-7 && d[0] > 0.0 && d[1] < 0.0 && d[2] == 0.0, "{d:?}");
    }

    #[test]
    fn no_weight_no_gap_and_no_number_give_no_step() {
        assert_eq!(linf_step(&[0.5; 2], &[0.0; 2], 1.0), [0.0; 2]);
        assert_eq!(linf_step(&[0.5; 2], &[1.0; 2], 0.0), [0.0; 2]);
        assert_eq!(linf_step(&[0.5; 2], &[1.0; 2], f64::NAN), [0.0; 2]);
        assert_eq!(linf_step(&[0.5; 3], &[f32::NAN, f32::INFINITY, 2.0], 0.5), [0.0, 0.0, 0.25]);
        assert_eq!(linf_step(&[0.25; 2], &[1.0, -1.0], f64::INFINITY), [0.75, -0.25]);
        assert_eq!(linf_step(&[], &[], 1.0), [0f32; 0]);
    }
}
