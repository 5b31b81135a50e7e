//! The objects: one function per kind, each on `[-100, 100]` on both axes, y down.

use super::Dice;
use super::draft::{Draft, Rgb, mix, shade};
use super::texture::Texture;

const WHITE: Rgb = [244.0, 244.0, 240.0];
const BLACK: Rgb = [32.0, 30.0, 32.0];
const STEEL: Rgb = [168.0, 172.0, 180.0];
const TIRE: Rgb = [42.0, 42.0, 46.0];
const GLASS: Rgb = [110.0, 150.0, 175.0];
const TWIG: Rgb = [98.0, 66.0, 38.0];
const LEAF: Rgb = [74.0, 140.0, 52.0];
const GOLD: Rgb = [240.0, 205.0, 70.0];

/// Draws one kind in a colour.
pub(super) type Drawing = fn(&mut Draft, &mut Dice, Rgb);

fn shine(d: &mut Draft, at: [f32; 4]) {
    d.oval(WHITE, 0.45, at);
    d.oval(WHITE, 0.5, [at[0], at[1], at[2] * 0.5, at[3] * 0.5]);
}

pub(super) fn apple(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.body(c, "M0 -46 C25 -78 98 -72 94 0 C92 60 46 100 18 92 C8 88 -8 88 -18 92 C-46 100 -92 60 -94 0 C-98 -72 -25 -78 0 -46 Z");
    d.oval(mix(c, [250.0, 220.0, 90.0], 0.5), 0.35, [dice.range(-30.0, 40.0), 20.0, 34.0, 44.0]);
    d.texture(Texture::Skin, 0.16, dice.seed());
    d.oval(shade(c, 0.5), 0.8, [0.0, -47.0, 22.0, 7.0]);
    d.line(TWIG, 9.0, "M0 -46 Q0 -74 14 -94");
    d.body(LEAF, "M8 -66 C28 -108 68 -104 88 -88 C66 -58 34 -52 8 -66 Z");
    d.line(shade(LEAF, 0.65), 2.5, "M10 -67 Q45 -86 84 -87");
    shine(d, [-46.0, -22.0, 14.0, 24.0]);
}

pub(super) fn pear(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.body(c, "M0 -80 C24 -80 32 -58 36 -34 C42 -4 78 8 76 46 C74 88 36 98 0 96 C-36 98 -74 88 -76 46 C-78 8 -42 -4 -36 -34 C-32 -58 -24 -80 0 -80 Z");
    d.oval([205.0, 110.0, 60.0], 0.28, [dice.range(20.0, 36.0), 46.0, 26.0, 36.0]);
    d.texture(Texture::Skin, 0.15, dice.seed());
    let spots: Vec<_> = (0..26)
        .map(|_| {
            let (x, y) = (dice.range(-58.0, 58.0), dice.range(10.0, 84.0));
            [x * if y < 25.0 { 0.7 } else { 1.0 }, y, 2.2, 2.2]
        })
        .collect();
    d.dots([120.0, 90.0, 40.0], 0.65, &spots);
    d.line(TWIG, 9.0, "M0 -78 Q2 -92 12 -108");
    if dice.chance(0.6) {
        d.body(LEAF, "M6 -86 C26 -112 56 -106 66 -96 C52 -76 26 -74 6 -86 Z");
    }
    shine(d, [-34.0, 34.0, 12.0, 24.0]);
}

pub(super) fn banana(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.body(c, "M-90 -50 C-86 40 -6 98 80 62 L94 46 L88 32 C40 48 -28 18 -56 -54 L-62 -80 L-80 -80 Z");
    d.tint(shade(c, 0.78), 0.7, "M-90 -50 C-86 40 -6 98 80 62 L90 52 C20 74 -50 34 -76 -52 Z");
    d.texture(Texture::Skin, 0.13, dice.seed());
    d.line(shade(c, 0.62), 3.0, "M-74 -52 C-54 28 14 64 86 48");
    d.fill([92.0, 70.0, 34.0], "M-82 -66 L-80 -84 L-62 -84 L-59 -66 Z");
    d.fill([80.0, 58.0, 30.0], "M80 62 L94 47 L88 34 L76 40 Z");
    let spots: Vec<_> = (0..dice.below(12) + 5)
        .map(|_| {
            let t = dice.range(0.1, 0.9);
            let (x, y) = (-72.0 + 140.0 * t, -30.0 + 150.0 * t - 72.0 * t * t);
            [x + dice.range(-5.0, 5.0), y + dice.range(-9.0, 5.0), dice.range(1.5, 5.0), dice.range(1.5, 3.0)]
        })
        .collect();
    d.dots([110.0, 72.0, 30.0], 0.7, &spots);
    d.line(mix(c, WHITE, 0.6), 4.0, "M-58 -30 C-40 14 -10 34 30 42");
}

pub(super) fn strawberry(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.body(
        c,
        "M0 98 C-42 72 -88 20 -80 -25 C-74 -64 -26 -68 0 -52 C26 -68 74 -64 80 -25 C88 20 42 72 0 98 Z",
    );
    d.texture(Texture::Cast, 0.12, dice.seed());
    let (mut pits, mut seeds) = (Vec::new(), Vec::new());
    for row in 0..7 {
        let y = -34.0 + 18.0 * row as f32;
        let half = if row < 3 { 66.0 } else { 66.0 - 15.0 * (row as f32 - 2.0) };
        let mut x = -half + if row % 2 == 0 { 4.0 } else { 14.0 };
        while x < half {
            let (jx, jy) = (x + dice.range(-2.5, 2.5), y + dice.range(-2.5, 2.5));
            pits.push([jx, jy, 5.0, 6.5]);
            seeds.push([jx, jy + 1.0, 3.0, 4.5]);
            x += 21.0;
        }
    }
    d.dots(shade(c, 0.6), 0.8, &pits);
    d.dots([246.0, 214.0, 110.0], 1.0, &seeds);
    d.body(LEAF, "M0 -60 L-22 -28 L-32 -52 L-70 -34 L-52 -60 L-84 -74 L-40 -78 L-14 -90 L14 -90 L40 -78 L84 -74 L52 -60 L70 -34 L32 -52 L22 -28 Z");
    d.line(shade(LEAF, 0.8), 9.0, "M0 -80 Q2 -98 14 -106");
    shine(d, [-44.0, -8.0, 9.0, 16.0]);
}

fn wheel(d: &mut Draft, x: f32, y: f32, r: f32) {
    d.oval(TIRE, 1.0, [x, y, r, r]);
    d.oval(STEEL, 1.0, [x, y, r * 0.55, r * 0.55]);
    d.oval(TIRE, 1.0, [x, y, r * 0.18, r * 0.18]);
}

pub(super) fn car(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.body(c, "M-97 40 L-98 8 C-96 -8 -76 -13 -58 -15 L-30 -50 C-22 -56 22 -56 30 -51 L62 -14 C86 -9 97 0 98 16 L97 40 Z");
    d.texture(Texture::Paint, 0.14, dice.seed());
    d.fill(shade(c, 0.6), "M-97 32 L97 32 L96 42 L-96 42 Z");
    d.fill(GLASS, "M-47 -15 L-25 -44 L-4 -46 L-4 -15 Z");
    d.fill(GLASS, "M5 -15 L5 -46 L24 -44 L48 -15 Z");
    d.tint(WHITE, 0.5, "M-38 -15 L-18 -42 L-10 -43 L-30 -15 Z M16 -15 L16 -44 L22 -43 L28 -15 Z");
    d.line(shade(c, 0.55), 2.5, "M0 -48 L0 30 M-50 -12 L-48 10 M54 -10 L48 14");
    d.line(shade(c, 0.4), 3.5, "M8 -4 L20 -4");
    d.oval([255.0, 240.0, 170.0], 1.0, [90.0, 10.0, 7.0, 8.0]);
    d.oval([200.0, 40.0, 30.0], 1.0, [-93.0, 8.0, 5.0, 8.0]);
    d.oval(BLACK, 1.0, [-56.0, 38.0, 27.0, 26.0]);
    d.oval(BLACK, 1.0, [56.0, 38.0, 27.0, 26.0]);
    wheel(d, -56.0, 42.0, 23.0);
    wheel(d, 56.0, 42.0, 23.0);
}

pub(super) fn bus(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.block(c, [-98.0, -62.0, 196.0, 112.0], 12.0);
    d.texture(Texture::Paint, 0.12, dice.seed());
    d.pane(mix(c, WHITE, 0.5), [-94.0, -58.0, 188.0, 8.0], 4.0);
    d.pane(shade(c, 0.55), [-97.0, 38.0, 194.0, 12.0], 3.0);
    let stripe = if c[0] > 200.0 && c[1] > 150.0 { [60.0, 60.0, 60.0] } else { WHITE };
    d.pane(stripe, [-97.0, 6.0, 194.0, 7.0], 0.0);
    for i in 0..5 {
        d.pane(shade(GLASS, dice.range(0.75, 1.05)), [-90.0 + 30.0 * i as f32, -42.0, 25.0, 36.0], 4.0);
        let x = -86.0 + 30.0 * i as f32;
        d.tint(WHITE, 0.4, &format!("M{x} -10 L{} -40 L{} -40 L{} -10 Z", x + 9.0, x + 15.0, x + 6.0));
    }
    d.pane(shade(GLASS, 0.8), [63.0, -42.0, 30.0, 84.0], 3.0);
    d.line(shade(c, 0.5), 3.0, "M78 -42 L78 40 M63 -6 L93 -6");
    d.oval([255.0, 240.0, 170.0], 1.0, [94.0, 26.0, 5.0, 7.0]);
    wheel(d, -58.0, 50.0, 21.0);
    wheel(d, 36.0, 50.0, 21.0);
}

pub(super) fn sailboat(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.body(c, "M6 -94 C44 -44 66 -4 78 34 L6 34 Z");
    d.body(mix(c, WHITE, 0.15), "M-6 -78 L-6 34 L-72 34 C-44 0 -22 -38 -6 -78 Z");
    d.texture(Texture::Weave, 0.1, dice.seed());
    d.line(shade(c, 0.72), 2.5, "M6 -56 L34 -50 M6 -20 L54 -14 M6 10 L68 14 M-6 -40 L-26 -36 M-6 -4 L-46 2");
    d.line(TWIG, 6.0, "M0 48 L0 -100");
    d.body([150.0, 92.0, 50.0], "M-90 46 L92 46 C80 76 62 90 40 92 L-48 92 C-68 88 -82 72 -90 46 Z");
    d.line([96.0, 56.0, 30.0], 2.5, "M-82 60 L86 60 M-72 75 L76 75");
    d.pane(WHITE, [-91.0, 43.0, 184.0, 7.0], 3.0);
    d.fill([215.0, 60.0, 50.0], "M0 -100 L-26 -93 L0 -86 Z");
}

pub(super) fn airplane(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    let wing = mix(c, STEEL, 0.3);
    for s in [1.0, -1.0] {
        d.block([120.0, 124.0, 132.0], [s * 42.0 - 7.0, -20.0, 14.0, 30.0], 6.0);
        d.body(wing, &format!("M{} -28 L{} 32 L{} 48 L{} 22 Z", s * 10.0, s * 98.0, s * 98.0, s * 10.0));
        d.body(wing, &format!("M{} 64 L{} 88 L{} 99 L{} 88 Z", s * 6.0, s * 42.0, s * 42.0, s * 6.0));
    }
    d.body(c, "M0 -100 C12 -96 16 -78 16 -60 L16 50 C14 75 8 95 0 100 C-8 95 -14 75 -16 50 L-16 -60 C-16 -78 -12 -96 0 -100 Z");
    d.texture(Texture::Brushed, 0.12, dice.seed());
    d.line(shade(wing, 0.6), 2.0, "M22 18 L92 42 M-22 18 L-92 42 M40 -4 L42 20 M-40 -4 L-42 20");
    d.fill(shade(GLASS, 0.55), "M-11 -78 Q0 -92 11 -78 L9 -70 Q0 -76 -9 -70 Z");
    let windows: Vec<_> =
        (0..9).flat_map(|i| [-10.5, 10.5].map(|x| [x, -52.0 + 11.0 * i as f32, 2.4, 3.0])).collect();
    d.dots([60.0, 80.0, 105.0], 1.0, &windows);
    d.fill(shade(c, 0.6), "M-3 60 L3 60 L2 100 L-2 100 Z");
    d.oval(WHITE, 0.4, [-4.0, -20.0, 3.5, 40.0]);
}

pub(super) fn cat(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    let dark = if c[0] < 90.0 { shade(c, 1.6) } else { shade(c, 0.62) };
    d.tube(c, 14.0, "M38 84 C92 92 98 46 76 24");
    d.body(c, "M-46 98 C-66 44 -40 -4 0 -4 C40 -4 66 44 46 98 Z");
    d.body(c, "M-45 -50 L-44 -100 L-12 -76 Z");
    d.body(c, "M45 -50 L44 -100 L12 -76 Z");
    d.ball(c, [0.0, -42.0, 50.0, 40.0]);
    d.oval(mix(c, WHITE, 0.45), 0.8, [0.0, 44.0, 20.0, 38.0]);
    d.texture(Texture::Fur, 0.3, dice.seed());
    d.fill([226.0, 150.0, 150.0], "M-38 -64 L-38 -88 L-20 -75 Z M38 -64 L38 -88 L20 -75 Z");
    if dice.chance(0.7) {
        d.line(dark, 5.0, "M0 -80 L0 -62 M-13 -78 L-10 -64 M13 -78 L10 -64 M-50 30 L-34 34 M-54 52 L-36 54 M50 30 L34 34 M54 52 L36 54");
    }
    d.oval(mix(c, WHITE, 0.65), 0.9, [0.0, -25.0, 19.0, 13.0]);
    let eyes = *dice.pick(&[[150.0, 205.0, 70.0], [240.0, 205.0, 60.0], [110.0, 190.0, 225.0]]);
    for x in [-21.0, 21.0] {
        d.oval(BLACK, 1.0, [x, -46.0, 12.5, 11.0]);
        d.oval(eyes, 1.0, [x, -46.0, 10.5, 9.0]);
        d.oval(BLACK, 1.0, [x, -46.0, 3.6, 8.5]);
    }
    d.fill([225.0, 110.0, 120.0], "M-7 -34 L7 -34 L0 -26 Z");
    d.line(BLACK, 2.2, "M0 -26 Q-4 -17 -12 -19 M0 -26 Q4 -17 12 -19");
    let hair = if c[0] > 170.0 { [70.0, 60.0, 60.0] } else { WHITE };
    d.line(hair, 1.6, "M-20 -28 L-66 -36 M-20 -24 L-66 -22 M20 -28 L66 -36 M20 -24 L66 -22");
    for x in [-19.0, 19.0] {
        d.ball(mix(c, WHITE, 0.35), [x, 91.0, 17.0, 10.0]);
    }
}

pub(super) fn fish(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    let fin = mix(shade(c, 0.85), [255.0, 200.0, 80.0], 0.25);
    d.body(fin, "M-30 -40 C-12 -78 30 -70 42 -28 Z");
    d.body(fin, "M-10 42 C0 66 26 66 34 28 Z");
    d.body(fin, "M50 0 L98 -48 C88 -16 88 16 98 48 Z");
    d.body(c, "M-96 2 C-66 -52 14 -62 66 -6 L66 6 C14 62 -66 52 -96 2 Z");
    d.texture(Texture::Scales, 0.3, dice.seed());
    if dice.chance(0.5) {
        d.fill(WHITE, "M-34 -42 C-24 -20 -24 20 -34 40 L-20 43 C-10 20 -10 -20 -20 -45 Z M16 -39 C24 -18 24 18 16 37 L29 30 C35 12 35 -12 29 -32 Z");
    }
    d.line(shade(c, 0.55), 3.0, "M-52 -32 C-40 -12 -40 12 -52 30");
    d.line(
        shade(fin, 0.6),
        2.2,
        "M62 -2 L90 -30 M62 0 L88 0 M62 2 L90 30 M-10 -54 L0 -42 M12 -60 L18 -44 M28 -52 L32 -38",
    );
    d.body(fin, "M-26 6 C-8 4 6 16 8 28 C-8 30 -22 22 -26 6 Z");
    d.oval(WHITE, 1.0, [-66.0, -10.0, 11.0, 11.0]);
    d.oval(BLACK, 1.0, [-67.0, -10.0, 6.0, 6.5]);
    d.line(shade(c, 0.4), 3.0, "M-93 8 Q-84 14 -76 10");
    d.oval(WHITE, 0.35, [-20.0, -26.0, 26.0, 6.0]);
}

pub(super) fn butterfly(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    let edge = [44.0, 34.0, 40.0];
    for s in [1.0, -1.0] {
        d.body(
            edge,
            &format!(
                "M{} -14 C{} -90 {} -100 {} -78 C{} -40 {} 4 {} 6 Z",
                s * 4.0,
                s * 30.0,
                s * 84.0,
                s * 98.0,
                s * 100.0,
                s * 66.0,
                s * 4.0
            ),
        );
        d.body(
            edge,
            &format!(
                "M{} 2 C{} -8 {} 24 {} 52 C{} 96 {} 92 {} 22 Z",
                s * 4.0,
                s * 54.0,
                s * 88.0,
                s * 74.0,
                s * 58.0,
                s * 20.0,
                s * 4.0
            ),
        );
        d.fill(
            c,
            &format!(
                "M{} -12 C{} -74 {} -86 {} -68 C{} -40 {} -6 {} 0 Z",
                s * 8.0,
                s * 34.0,
                s * 76.0,
                s * 86.0,
                s * 86.0,
                s * 58.0,
                s * 8.0
            ),
        );
        d.fill(
            mix(c, WHITE, 0.18),
            &format!(
                "M{} 6 C{} 0 {} 26 {} 50 C{} 80 {} 78 {} 20 Z",
                s * 8.0,
                s * 48.0,
                s * 76.0,
                s * 64.0,
                s * 50.0,
                s * 24.0,
                s * 8.0
            ),
        );
    }
    d.texture(Texture::Veins, 0.28, dice.seed());
    let spots: Vec<_> = [1.0, -1.0]
        .iter()
        .flat_map(|s| {
            [
                [s * 90.0, -66.0, 4.0, 4.0],
                [s * 84.0, -40.0, 4.0, 4.0],
                [s * 70.0, -18.0, 4.0, 4.0],
                [s * 68.0, 58.0, 4.0, 4.0],
                [s * 52.0, 74.0, 4.0, 4.0],
            ]
        })
        .collect();
    d.dots(WHITE, 1.0, &spots);
    for s in [1.0, -1.0] {
        d.line(
            edge,
            3.0,
            &format!(
                "M{} -8 L{} -66 M{} -8 L{} -40 M{} 8 L{} 58",
                s * 8.0,
                s * 52.0,
                s * 8.0,
                s * 72.0,
                s * 8.0,
                s * 46.0
            ),
        );
        d.oval(edge, 1.0, [s * 46.0, 42.0, 10.0, 10.0]);
        d.oval(GOLD, 1.0, [s * 46.0, 42.0, 5.0, 5.0]);
        d.line(edge, 3.0, &format!("M0 -40 Q{} -70 {} -88", s * 6.0, s * 24.0));
        d.oval(edge, 1.0, [s * 24.0, -88.0, 4.0, 4.0]);
    }
    d.oval(edge, 1.0, [0.0, 8.0, 8.0, 46.0]);
    d.oval(edge, 1.0, [0.0, -38.0, 9.0, 10.0]);
    d.line([120.0, 100.0, 80.0], 2.5, "M-5 8 L5 8 M-5 20 L5 20 M-5 32 L5 32");
}

pub(super) fn owl(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    let pale = mix(c, [250.0, 236.0, 208.0], 0.6);
    d.body(c, "M-50 -46 L-56 -100 L-14 -74 L14 -74 L56 -100 L50 -46 Z");
    d.body(c, "M0 -80 C60 -80 64 -20 62 20 C60 66 40 92 0 92 C-40 92 -60 66 -62 20 C-64 -20 -60 -80 0 -80 Z");
    d.oval(pale, 1.0, [0.0, 42.0, 38.0, 44.0]);
    d.texture(Texture::Feathers, 0.26, dice.seed());
    for s in [1.0, -1.0] {
        d.body(
            shade(c, 0.72),
            &format!(
                "M{} -6 C{} 10 {} 60 {} 84 C{} 60 {} 20 {} -6 Z",
                s * 54.0,
                s * 84.0,
                s * 80.0,
                s * 44.0,
                s * 40.0,
                s * 36.0,
                s * 54.0
            ),
        );
    }
    d.texture(Texture::Feathers, 0.1, dice.seed());
    d.line(shade(c, 0.6), 3.5, "M-20 22 L-14 29 L-8 22 M8 22 L14 29 L20 22 M-6 38 L0 45 L6 38 M-24 44 L-18 51 L-12 44 M12 44 L18 51 L24 44 M-12 62 L-6 69 L0 62 M4 62 L10 69 L16 62");
    for x in [-25.0, 25.0] {
        d.ball(pale, [x, -38.0, 28.0, 28.0]);
        d.oval(BLACK, 1.0, [x, -38.0, 19.0, 19.0]);
        d.oval([250.0, 190.0, 40.0], 1.0, [x, -38.0, 17.0, 17.0]);
        d.oval(BLACK, 1.0, [x, -38.0, 10.0, 10.0]);
        d.oval(WHITE, 1.0, [x - 4.0, -42.0, 3.5, 3.5]);
    }
    d.body([235.0, 150.0, 40.0], "M-9 -30 L9 -30 L0 -6 Z");
    d.line(
        [225.0, 140.0, 40.0],
        6.0,
        "M-24 88 L-30 98 M-18 90 L-18 99 M-12 90 L-7 98 M24 88 L30 98 M18 90 L18 99 M12 90 L7 98",
    );
}

pub(super) fn hammer(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.body(c, "M-24 -60 L0 -60 L4 20 Q10 60 6 92 Q-12 102 -30 92 Q-34 60 -28 20 Z");
    d.texture(Texture::Wood, 0.24, dice.seed());
    d.line(shade(c, 0.6), 3.0, "M-29 40 L5 40 M-30 52 L7 52 M-31 64 L7 64 M-30 76 L7 76");
    d.body(STEEL, "M-80 -98 L-50 -98 L-46 -86 L0 -90 C40 -92 74 -74 92 -38 C66 -58 40 -56 4 -46 L-46 -48 L-50 -38 L-80 -38 Z");
    d.texture(Texture::Brushed, 0.14, dice.seed());
    d.line(shade(STEEL, 0.6), 3.0, "M-50 -98 L-46 -86 L-46 -48 L-50 -38 M30 -80 Q66 -72 84 -50");
    d.line(WHITE, 4.0, "M-40 -80 L4 -83 M-74 -90 L-74 -46");
}

pub(super) fn scissors(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.body(STEEL, "M-16 22 L4 26 L46 -98 C22 -86 -6 -40 -16 22 Z");
    d.body(mix(STEEL, WHITE, 0.35), "M16 22 L-4 26 L-46 -98 C-22 -86 6 -40 16 22 Z");
    d.texture(Texture::Brushed, 0.15, dice.seed());
    d.line(WHITE, 2.5, "M2 20 L-38 -80");
    for s in [1.0, -1.0] {
        d.tube(c, 13.0, &format!("M{} 20 L{} 44", s * -4.0, s * 18.0));
        d.ring(shade(c, 0.5), 19.0, [s * 36.0, 66.0, 24.0, 28.0]);
    }
    for s in [1.0, -1.0] {
        d.line(c, 13.0, &format!("M{} 20 L{} 44", s * -4.0, s * 18.0));
        d.ring(c, 14.5, [s * 36.0, 66.0, 24.0, 28.0]);
        d.ring(mix(c, WHITE, 0.4), 2.5, [s * 36.0 - 1.0, 65.0, 26.0, 30.0]);
    }
    d.ball([110.0, 112.0, 120.0], [0.0, 10.0, 7.0, 7.0]);
}

pub(super) fn key(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.block(c, [-30.0, -10.0, 128.0, 20.0], 6.0);
    d.body(c, "M50 8 L50 36 L62 36 L62 26 L70 26 L70 40 L84 40 L84 28 L92 28 L92 8 Z");
    if dice.chance(0.5) {
        d.ring(shade(c, 0.5), 24.0, [-60.0, 0.0, 30.0, 34.0]);
        d.ring(c, 19.0, [-60.0, 0.0, 30.0, 34.0]);
    } else {
        for [x, y] in [[-74.0, 0.0], [-50.0, -26.0], [-50.0, 26.0]] {
            d.ring(shade(c, 0.5), 20.0, [x, y, 17.0, 17.0]);
        }
        for [x, y] in [[-74.0, 0.0], [-50.0, -26.0], [-50.0, 26.0]] {
            d.ring(c, 15.0, [x, y, 17.0, 17.0]);
        }
        d.oval(c, 1.0, [-50.0, 0.0, 14.0, 16.0]);
    }
    d.texture(Texture::Brushed, 0.2, dice.seed());
    d.block(c, [-32.0, -15.0, 13.0, 30.0], 3.0);
    d.line(mix(c, WHITE, 0.65), 3.5, "M-14 -4 L92 -4");
}

pub(super) fn saw(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    let mut blade = String::from("M36 -36 L-98 -14 L-98 6");
    for i in 0..14 {
        let t = i as f32 / 14.0;
        let (x, y) = (-98.0 + 134.0 * t, 8.0 + 30.0 * t);
        blade += &format!(" L{} {} L{} {}", x + 4.8, y + 13.0, x + 9.6, y + 2.0);
    }
    d.body(mix(STEEL, WHITE, 0.3), &(blade + " L36 38 Z"));
    d.texture(Texture::Brushed, 0.16, dice.seed());
    d.line(shade(STEEL, 0.75), 2.5, "M-88 -4 L30 -20");
    let mut handle = Draft::default();
    handle.body(c, "M26 -42 C50 -52 80 -54 94 -42 C100 -36 92 -26 90 -16 C88 8 92 24 100 44 C94 56 78 52 66 46 C54 50 40 48 28 44 C36 14 36 -14 26 -42 Z M52 -26 C48 -6 50 12 56 26 C66 32 74 28 74 18 C70 2 70 -12 74 -26 C68 -34 58 -34 52 -26 Z");
    handle.texture(Texture::Wood, 0.22, dice.seed());
    d.append(handle);
    d.dots(GOLD, 1.0, &[[40.0, -32.0, 3.5, 3.5], [42.0, 34.0, 3.5, 3.5]]);
}

pub(super) fn mug(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.tube(shade(c, 0.92), 17.0, "M50 -34 C104 -46 104 58 44 44");
    d.body(c, "M-76 -70 L56 -70 L50 78 Q48 94 30 94 L-50 94 Q-68 94 -70 78 Z");
    let band = if c.iter().all(|&v| v > 200.0) { [70.0, 110.0, 180.0] } else { mix(c, WHITE, 0.7) };
    let y = dice.range(-10.0, 24.0);
    d.fill(
        band,
        &format!("M-73 {y} Q-10 {} 53 {y} L52 {} Q-10 {} -72 {} Z", y + 14.0, y + 20.0, y + 34.0, y + 20.0),
    );
    d.texture(Texture::Glaze, 0.12, dice.seed());
    d.ball(mix(c, WHITE, 0.25), [-10.0, -70.0, 66.0, 19.0]);
    d.oval([70.0, 42.0, 24.0], 1.0, [-10.0, -67.0, 55.0, 13.0]);
    d.oval([130.0, 88.0, 54.0], 0.8, [-22.0, -66.0, 26.0, 5.0]);
    d.tint(WHITE, 0.45, "M-58 -44 Q-60 20 -54 70 L-44 70 Q-50 20 -48 -44 Z");
}

pub(super) fn teapot(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.tube(shade(c, 0.92), 13.0, "M50 -6 C104 -40 112 62 50 56");
    d.body(c, "M-44 48 C-86 40 -76 -10 -100 -24 L-82 -38 C-62 -26 -62 -2 -36 4 Z");
    d.block(shade(c, 0.8), [-36.0, 70.0, 72.0, 15.0], 6.0);
    d.ball(c, [0.0, 26.0, 66.0, 53.0]);
    d.body(mix(c, WHITE, 0.12), "M-40 -16 C-34 -48 34 -48 40 -16 Q0 -8 -40 -16 Z");
    d.texture(Texture::Glaze, 0.14, dice.seed());
    d.ball(shade(c, 0.85), [0.0, -50.0, 10.0, 10.0]);
    d.line(shade(c, 0.6), 3.0, "M-46 -12 Q0 -2 46 -12");
    let paint = if c.iter().all(|&v| v > 190.0) { [70.0, 110.0, 190.0] } else { mix(c, WHITE, 0.75) };
    let petals: Vec<_> = [[0.0, -11.0], [10.0, -3.0], [6.0, 9.0], [-6.0, 9.0], [-10.0, -3.0]]
        .iter()
        .map(|[x, y]| [x + 4.0, y + 30.0, 6.5, 6.5])
        .collect();
    d.dots(paint, 1.0, &petals);
    d.oval(GOLD, 1.0, [4.0, 30.0, 5.0, 5.0]);
    shine(d, [-34.0, 4.0, 10.0, 14.0]);
}

pub(super) fn lamp(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    let foot = *dice.pick(&[[120.0, 82.0, 50.0], [90.0, 92.0, 100.0], [190.0, 160.0, 80.0]]);
    d.block(foot, [-7.0, -20.0, 14.0, 100.0], 4.0);
    d.ball(foot, [0.0, 40.0, 17.0, 24.0]);
    d.body(foot, "M-46 98 Q-44 76 0 74 Q44 76 46 98 Z");
    d.texture(Texture::Brushed, 0.14, dice.seed());
    d.body(c, "M-42 -98 L42 -98 L80 -6 Q0 8 -80 -6 Z");
    d.tint([255.0, 246.0, 190.0], 0.4, "M-20 -80 L20 -80 L44 -4 Q0 4 -44 -4 Z");
    d.texture(Texture::Weave, 0.12, dice.seed());
    d.line(shade(c, 0.75), 2.0, "M-26 -98 L-50 -3 M-9 -98 L-17 0 M9 -98 L17 0 M26 -98 L50 -3");
    d.line(shade(c, 0.65), 5.0, "M-79 -8 Q0 6 79 -8 M-42 -96 L42 -96");
    d.line(GOLD, 2.5, "M34 0 L34 28");
    d.oval(GOLD, 1.0, [34.0, 31.0, 4.5, 4.5]);
}

pub(super) fn clock(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.line(shade(c, 0.55), 13.0, "M-42 70 L-56 94 M42 70 L56 94");
    d.line(STEEL, 6.0, "M-46 -62 Q0 -106 46 -62 M0 -84 L0 -60");
    d.body(c, "M-76 -44 C-88 -84 -46 -100 -22 -74 Z");
    d.body(c, "M76 -44 C88 -84 46 -100 22 -74 Z");
    d.ball(c, [0.0, 14.0, 78.0, 76.0]);
    d.texture(Texture::Brushed, 0.14, dice.seed());
    d.ball(WHITE, [0.0, 14.0, 62.0, 60.0]);
    let mut ticks = String::new();
    for i in 0..12 {
        let (s, k) = (i as f32 * std::f32::consts::TAU / 12.0).sin_cos();
        let inner = if i % 3 == 0 { 42.0 } else { 48.0 };
        ticks += &format!("M{} {} L{} {} ", inner * s, 14.0 - inner * k, 55.0 * s, 14.0 - 55.0 * k);
    }
    d.line(BLACK, 5.0, &ticks);
    let minute = dice.below(12) as f32;
    let hour = dice.below(12) as f32 + minute / 12.0;
    for (at, long, width) in [(minute, 40.0, 5.0), (hour, 27.0, 7.5)] {
        let (s, k) = (at * std::f32::consts::TAU / 12.0).sin_cos();
        d.line(BLACK, width, &format!("M0 14 L{} {}", long * s, 14.0 - long * k));
    }
    d.oval([200.0, 50.0, 40.0], 1.0, [0.0, 14.0, 6.0, 6.0]);
    d.oval(WHITE, 0.45, [-50.0, -72.0, 10.0, 6.0]);
}

pub(super) fn cactus(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    let arms = if dice.chance(0.5) {
        ["M-20 22 L-60 22 L-60 -30", "M20 2 L60 2 L60 -54"]
    } else {
        ["M-20 0 L-58 0 L-58 -52", "M20 24 L62 24 L62 -22"]
    };
    for arm in arms {
        d.tube(c, 25.0, arm);
    }
    d.block(c, [-27.0, -96.0, 54.0, 150.0], 27.0);
    d.texture(Texture::Ribs, 0.24, dice.seed());
    let mut spines = String::new();
    for i in 0..8 {
        let y = -78.0 + 16.0 * i as f32;
        for x in [-17.0, 0.0, 17.0] {
            spines += &format!("M{} {} L{x} {y} L{} {} ", x - 4.0, y - 4.0, x + 4.0, y - 4.0);
        }
    }
    for arm in [-60.0, 60.0] {
        for i in 0..3 {
            let y = -22.0 + 14.0 * i as f32;
            spines += &format!("M{} {} L{arm} {y} L{} {} ", arm - 4.0, y - 4.0, arm + 4.0, y - 4.0);
        }
    }
    d.line([240.0, 236.0, 190.0], 1.8, &spines);
    if dice.chance(0.6) {
        d.dots(
            [238.0, 100.0, 150.0],
            1.0,
            &[[-8.0, -97.0, 8.0, 7.0], [8.0, -97.0, 8.0, 7.0], [0.0, -102.0, 7.0, 8.0]],
        );
        d.oval(GOLD, 1.0, [0.0, -97.0, 4.0, 4.0]);
    }
    let pot = [190.0, 100.0, 62.0];
    d.body(pot, "M-42 56 L42 56 L34 100 L-34 100 Z");
    d.block(shade(pot, 1.1), [-48.0, 46.0, 96.0, 17.0], 3.0);
}

pub(super) fn sunflower(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.tube(LEAF, 9.0, "M0 0 Q6 50 0 98");
    d.body(LEAF, "M2 74 C20 38 60 36 76 44 C66 74 30 84 2 74 Z");
    d.body(LEAF, "M2 86 C-14 54 -52 50 -70 58 C-60 86 -26 96 2 86 Z");
    d.line(shade(LEAF, 0.6), 2.2, "M4 74 Q40 56 72 46 M0 86 Q-34 70 -66 60");
    let turn = dice.range(0.0, 1.0);
    for (count, long, color, phase) in [(14, 68.0, shade(c, 0.86), 0.5), (14, 64.0, c, 0.0)] {
        let mut petals = String::new();
        for i in 0..count {
            let angle = (i as f32 + phase + turn) * std::f32::consts::TAU / count as f32;
            let (s, k) = angle.sin_cos();
            let at = |along: f32, side: f32| (along * k - side * s, -32.0 + along * s + side * k);
            let ((ax, ay), (bx, by), (tx, ty), (ex, ey), (fx, fy)) =
                (at(20.0, -7.0), at(46.0, -14.0), at(long, 0.0), at(46.0, 14.0), at(20.0, 7.0));
            petals += &format!("M{ax} {ay} Q{bx} {by} {tx} {ty} Q{ex} {ey} {fx} {fy} Z ");
        }
        d.body(color, &petals);
    }
    d.texture(Texture::Veins, 0.12, dice.seed());
    d.ball([92.0, 56.0, 26.0], [0.0, -32.0, 30.0, 30.0]);
    let (mut dark, mut light) = (Vec::new(), Vec::new());
    for i in 0..60 {
        let (s, k) = (i as f32 * 2.399_963).sin_cos();
        let r = 3.6 * (i as f32).sqrt();
        if i % 2 == 0 { &mut dark } else { &mut light }.push([r * k, -32.0 + r * s, 2.2, 2.2]);
    }
    d.dots([48.0, 28.0, 14.0], 1.0, &dark);
    d.dots([168.0, 112.0, 48.0], 1.0, &light);
}

pub(super) fn tree(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    let bark = [112.0, 76.0, 46.0];
    d.body(bark, "M-26 100 Q-10 88 -11 60 L-12 10 L12 10 L11 60 Q10 88 26 100 Z");
    d.line(bark, 8.0, "M0 40 L-34 4 M2 34 L32 0");
    d.texture(Texture::Wood, 0.35, dice.seed());
    let mut crown = Draft::default();
    for [x, y, r] in [
        [-46.0, -8.0, 34.0],
        [46.0, -8.0, 34.0],
        [0.0, 2.0, 32.0],
        [-34.0, -48.0, 36.0],
        [36.0, -46.0, 36.0],
        [0.0, -66.0, 36.0],
        [0.0, -30.0, 40.0],
    ] {
        let (x, y, r) = (x + dice.range(-5.0, 5.0), y + dice.range(-5.0, 5.0), r + dice.range(-3.0, 4.0));
        crown.oval(shade(c, 0.5), 1.0, [x, y, r + 2.0, r + 2.0]);
        crown.oval(shade(c, dice.range(0.88, 1.08)), 1.0, [x, y - 2.0, r, r]);
    }
    crown.texture(Texture::Foliage, 0.28, dice.seed());
    d.append(crown);
}

pub(super) fn stop_sign(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.block(STEEL, [-5.0, 30.0, 10.0, 70.0], 2.0);
    d.body(WHITE, "M-29 -100 L29 -100 L70 -59 L70 -1 L29 40 L-29 40 L-70 -1 L-70 -59 Z");
    d.fill(c, "M-26 -93 L26 -93 L63 -56 L63 -4 L26 33 L-26 33 L-63 -4 L-63 -56 Z");
    d.texture(Texture::Cast, 0.1, dice.seed());
    d.line(WHITE, 7.5, "M-33 -44 Q-42 -52 -50 -44 Q-54 -34 -42 -31 Q-30 -28 -34 -17 Q-42 -8 -51 -17 M-27 -47 L-7 -47 M-17 -47 L-17 -13 M29 -13 L29 -47 L38 -47 Q48 -46 48 -38 Q48 -29 38 -29 L29 -29");
    d.ring(WHITE, 7.5, [9.0, -30.0, 9.0, 17.0]);
}

pub(super) fn traffic_light(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.block([110.0, 112.0, 116.0], [-7.0, 50.0, 14.0, 50.0], 2.0);
    d.block(c, [-38.0, -100.0, 76.0, 164.0], 14.0);
    d.texture(Texture::Cast, 0.2, dice.seed());
    let lit = dice.below(3);
    let lamps = [[238.0, 48.0, 40.0], [250.0, 196.0, 40.0], [60.0, 205.0, 95.0]];
    for (i, lamp) in lamps.into_iter().enumerate() {
        let y = -72.0 + 52.0 * i as f32;
        d.oval(BLACK, 1.0, [0.0, y, 25.0, 25.0]);
        d.oval(shade(lamp, if i == lit { 1.0 } else { 0.72 }), 1.0, [0.0, y + 1.0, 21.0, 21.0]);
        if i == lit {
            d.oval(WHITE, 0.65, [0.0, y, 10.0, 10.0]);
        }
        d.line(
            shade(c, 0.45),
            6.0,
            &format!("M-27 {} Q-22 {} 0 {} Q22 {} 27 {}", y + 2.0, y - 27.0, y - 27.0, y - 27.0, y + 2.0),
        );
        d.oval(WHITE, 0.5, [-8.0, y - 7.0, 4.0, 5.0]);
    }
}

pub(super) fn hydrant(d: &mut Draft, dice: &mut Dice, c: Rgb) {
    d.block(c, [-66.0, -22.0, 36.0, 40.0], 5.0);
    d.block(c, [30.0, -22.0, 36.0, 40.0], 5.0);
    d.block(shade(c, 0.75), [-74.0, -12.0, 14.0, 20.0], 3.0);
    d.block(shade(c, 0.75), [60.0, -12.0, 14.0, 20.0], 3.0);
    d.block(c, [-35.0, -46.0, 70.0, 128.0], 4.0);
    d.body(c, "M-38 -48 C-36 -88 36 -88 38 -48 Z");
    d.block(shade(c, 0.85), [-10.0, -99.0, 20.0, 20.0], 3.0);
    d.texture(Texture::Cast, 0.2, dice.seed());
    d.block(shade(c, 1.08), [-46.0, -54.0, 92.0, 14.0], 4.0);
    d.block(shade(c, 1.08), [-42.0, 50.0, 84.0, 11.0], 4.0);
    d.block(shade(c, 0.9), [-52.0, 80.0, 104.0, 20.0], 4.0);
    d.ball(shade(c, 0.8), [0.0, 4.0, 25.0, 25.0]);
    d.ball(c, [0.0, 4.0, 17.0, 17.0]);
    d.ball(STEEL, [0.0, 4.0, 7.0, 7.0]);
    d.dots(
        STEEL,
        1.0,
        &[[-38.0, 90.0, 4.0, 4.0], [-13.0, 90.0, 4.0, 4.0], [13.0, 90.0, 4.0, 4.0], [38.0, 90.0, 4.0, 4.0]],
    );
    d.line(mix(c, WHITE, 0.55), 5.0, "M-24 -34 L-24 44 M-22 -60 Q-16 -72 -8 -74");
}
