//! The places: textured grounds with small clutter, on `[0, 1]` on both axes, y down.

use tiny_skia::{Pixmap, Transform};

use super::Dice;
use super::draft::{Draft, Rgb, mix, shade};
use super::texture::{cell, floor, noise, pebble, wave};

/// A ground an object may be on.
pub(super) struct Place {
    /// The phrase that ends a caption.
    pub phrase: &'static str,
    /// Colours that would not stand out.
    pub avoid: &'static [&'static str],
    ground: Ground,
}

#[derive(Clone, Copy)]
enum Ground {
    Grass,
    Table,
    Sand,
    Bricks,
    Cloth,
    Pebbles,
    Sky,
    Leaves,
    Tiles,
    Snow,
}

/// Every place.
pub(super) static PLACES: [Place; 10] = [
    Place { phrase: "on the grass", avoid: &["green"], ground: Ground::Grass },
    Place { phrase: "on a wooden table", avoid: &["brown", "orange"], ground: Ground::Table },
    Place { phrase: "on the sand", avoid: &["yellow", "brown"], ground: Ground::Sand },
    Place { phrase: "in front of a brick wall", avoid: &["red", "brown", "orange"], ground: Ground::Bricks },
    Place { phrase: "on a checkered cloth", avoid: &["white", "pink"], ground: Ground::Cloth },
    Place { phrase: "among pebbles", avoid: &["gray", "black"], ground: Ground::Pebbles },
    Place { phrase: "in front of a cloudy sky", avoid: &["blue", "white"], ground: Ground::Sky },
    Place { phrase: "among green leaves", avoid: &["green", "black"], ground: Ground::Leaves },
    Place { phrase: "on a tiled floor", avoid: &["white", "gray"], ground: Ground::Tiles },
    Place { phrase: "on the snow", avoid: &["white"], ground: Ground::Snow },
];

impl Place {
    /// Paints the ground; `color` is the object's colour, which a cloth must not have.
    pub(super) fn paint(&self, map: &mut Pixmap, dice: &mut Dice, color: &str) {
        let seed = dice.seed();
        let zoom = dice.range(0.85, 1.25);
        let (sin, cos) = dice.range(-0.14, 0.14).sin_cos();
        let (ox, oy) = (dice.range(0.0, 9.0), dice.range(0.0, 9.0));
        let tone = dice.range(-1.0, 1.0);
        let side = map.width() as f32;
        let step = zoom / side;
        let n = move |x: f32, y: f32, salt: u32| noise(x, y, seed ^ salt);
        let mut each = |f: &dyn Fn(f32, f32) -> Rgb| rows(map, step, [sin, cos, ox, oy], f);
        match self.ground {
            Ground::Grass => each(&|x, y| {
                let bend = 2.0 * n(x * 5.0, y * 5.0, 1);
                let blade = n(x * 55.0 + bend, y * 13.0 + bend, 2);
                let patch = n(x * 3.0, y * 3.0, 3);
                let base = mix([58.0, 112.0, 38.0], [116.0, 160.0, 62.0 + 12.0 * tone], patch);
                shade(base, 0.62 + 0.7 * blade)
            }),
            Ground::Table => each(&|x, y| {
                let plank = floor(y * 3.4);
                let part = y * 3.4 - plank as f32;
                let bend = 1.6 * n(x * 1.4, y * 4.0 + plank as f32 * 7.0, 1);
                let grain = n(x * 2.2, y * 34.0 + bend * 3.0, 2) + 0.5 * n(x * 9.0, y * 75.0, 3);
                let base =
                    mix([150.0, 104.0, 62.0], [196.0, 150.0 + 8.0 * tone, 100.0], cell(plank, 3, seed));
                let edge = if part < 0.035 { 0.5 } else { 1.0 };
                shade(base, edge * (0.72 + 0.38 * grain))
            }),
            Ground::Sand => each(&|x, y| {
                let bend = n(x * 2.5, y * 2.5, 1);
                let ripple = wave(y * 5.0 + bend * 2.2 + x * 0.8);
                let grain = n(x * 110.0, y * 110.0, 2);
                shade([216.0, 190.0, 146.0 + 10.0 * tone], 0.76 + 0.14 * ripple + 0.28 * grain)
            }),
            Ground::Bricks => each(&|x, y| {
                let row = floor(y * 8.0);
                let x4 = x * 4.0 + 0.5 * (row & 1) as f32;
                let (px, py) = (x4 - floor(x4) as f32, y * 8.0 - row as f32);
                let rough = n(x * 60.0, y * 60.0, 1);
                if px < 0.05 || py < 0.1 {
                    return shade([190.0, 184.0, 174.0], 0.75 + 0.35 * rough);
                }
                let tint = cell(floor(x4), row, seed);
                let base = mix([146.0, 70.0, 54.0], [184.0, 104.0 + 8.0 * tone, 78.0], tint);
                shade(base, 0.72 + 0.3 * rough + 0.22 * n(x * 16.0, y * 16.0, 2))
            }),
            Ground::Cloth => {
                let inks: [(&str, Rgb); 3] = [
                    ("red", [196.0, 62.0, 62.0]),
                    ("blue", [72.0, 112.0, 186.0]),
                    ("green", [86.0, 150.0, 96.0]),
                ];
                let start = dice.below(3);
                let ink = (0..3).map(|i| inks[(start + i) % 3]).find(|(name, _)| *name != color);
                let ink = ink.unwrap_or(inks[0]).1;
                each(&|x, y| {
                    let (a, b) = (floor(x * 8.0) & 1, floor(y * 8.0) & 1);
                    let share = [0.08, 0.5, 0.9][(a + b) as usize];
                    let weave = 0.05 * (wave(x * 48.0) + wave(y * 48.0)) + 0.14 * n(x * 80.0, y * 80.0, 1);
                    let fold = 0.16 * n(x * 2.5, y * 2.5, 2);
                    shade(mix([242.0, 240.0, 234.0], ink, share), 0.76 + weave + fold)
                });
            }
            Ground::Pebbles => each(&|x, y| {
                let (near, gap, id) = pebble(x * 11.0, y * 11.0, seed);
                let warm = cell((id * 4096.0) as i32, 5, seed);
                let base = mix([138.0, 136.0, 134.0], [186.0, 174.0, 158.0], warm);
                let lit = (0.72 + 0.4 * id - 0.35 * near) * (0.35 + (gap * 3.2).min(0.65));
                shade(base, lit * (0.88 + 0.24 * n(x * 70.0, y * 70.0, 1)))
            }),
            Ground::Sky => each(&|x, y| {
                let low = n(x * 2.2, y * 3.2, 1) * 0.55
                    + n(x * 5.0, y * 7.0, 2) * 0.3
                    + n(x * 13.0, y * 16.0, 3) * 0.15;
                let cloud = ((low - 0.42 - 0.04 * tone) * 4.5).clamp(0.0, 1.0);
                let blue = mix([92.0, 146.0, 208.0], [158.0, 196.0, 230.0], (y - oy).clamp(0.0, 1.0));
                let grain = 0.97 + 0.06 * n(x * 60.0, y * 60.0, 4);
                shade(
                    mix(blue, shade([240.0, 242.0, 246.0], 0.84 + 0.16 * n(x * 7.0, y * 9.0, 5)), cloud),
                    grain,
                )
            }),
            Ground::Leaves => each(&|x, y| {
                let dim = n(x * 6.0, y * 6.0, 1);
                shade([34.0, 66.0, 30.0], 0.6 + 0.8 * dim)
            }),
            Ground::Tiles => each(&|x, y| {
                let (tx, ty) = (floor(x * 4.5), floor(y * 4.5));
                let (px, py) = (x * 4.5 - tx as f32, y * 4.5 - ty as f32);
                if px < 0.05 || py < 0.05 {
                    return shade([112.0, 108.0, 104.0], 0.85 + 0.3 * n(x * 60.0, y * 60.0, 1));
                }
                let vein = (n(x * 9.0 + cell(tx, ty, seed) * 9.0, y * 9.0, 2) - 0.5).abs();
                let base = mix([196.0, 188.0, 178.0], [212.0, 208.0 + 6.0 * tone, 204.0], cell(tx, ty, seed));
                let line = if vein < 0.025 { 0.92 } else { 1.0 };
                shade(base, line * (0.9 + 0.12 * n(x * 50.0, y * 50.0, 3)))
            }),
            Ground::Snow => each(&|x, y| {
                let drift = n(x * 2.6, y * 4.2, 1) * 0.7 + n(x * 9.0, y * 12.0, 2) * 0.3;
                let spark = if n(x * 80.0, y * 80.0, 3) > 0.86 { 1.08 } else { 1.0 };
                let fine = 0.93 + 0.1 * n(x * 70.0, y * 70.0, 4);
                shade(mix([196.0, 210.0, 230.0], [246.0, 249.0, 252.0], drift), spark * fine)
            }),
        }
        let mut litter = Draft::default();
        self.litter(&mut litter, dice);
        litter.paint(map, Transform::from_scale(side / 100.0, side / 100.0));
    }

    /// Small things lying about, on `[0, 100]`.
    fn litter(&self, d: &mut Draft, dice: &mut Dice) {
        let spots = |d: &mut Draft, dice: &mut Dice, colors: &[Rgb], count: usize, size: f32| {
            for color in colors {
                let dots: Vec<_> = (0..count)
                    .map(|_| {
                        let r = size * dice.range(0.5, 1.2);
                        [dice.range(0.0, 100.0), dice.range(0.0, 100.0), r, r * dice.range(0.6, 1.0)]
                    })
                    .collect();
                let shadows: Vec<_> =
                    dots.iter().map(|&[x, y, a, b]| [x + 0.5, y + 0.7, a * 1.1, b * 1.1]).collect();
                d.dots([20.0, 20.0, 24.0], 0.3, &shadows);
                d.dots(*color, 1.0, &dots);
            }
        };
        match self.ground {
            Ground::Grass => {
                spots(d, dice, &[[235.0, 235.0, 225.0], [222.0, 196.0, 90.0]], 4, 1.1);
                for color in [[44.0, 92.0, 30.0], [134.0, 176.0, 72.0], [88.0, 140.0, 48.0]] {
                    d.fill(color, &blades(dice, 16));
                }
            }
            Ground::Table => {
                spots(d, dice, &[[226.0, 196.0, 150.0], [120.0, 78.0, 44.0]], 7, 0.9);
                d.line([118.0, 78.0, 46.0], 0.6, &strokes(dice, 4, 12.0));
            }
            Ground::Sand => {
                spots(d, dice, &[[160.0, 146.0, 128.0], [238.0, 226.0, 206.0]], 6, 1.3);
                d.line([126.0, 96.0, 66.0], 0.9, &strokes(dice, 4, 9.0));
            }
            Ground::Bricks => {
                d.line([96.0, 50.0, 42.0], 0.6, &strokes(dice, 6, 7.0));
                d.fill([92.0, 126.0, 66.0], &leaves(dice, 4, 3.0));
            }
            Ground::Cloth => spots(d, dice, &[[214.0, 176.0, 116.0], [168.0, 122.0, 74.0]], 9, 0.9),
            Ground::Pebbles => {
                d.line([108.0, 82.0, 56.0], 1.0, &strokes(dice, 5, 10.0));
                d.fill([146.0, 122.0, 66.0], &leaves(dice, 3, 3.0));
            }
            Ground::Sky => {
                d.line([70.0, 82.0, 104.0], 0.5, &strokes(dice, 3, 3.0));
            }
            Ground::Leaves => {
                for color in
                    [[52.0, 98.0, 40.0], [70.0, 124.0, 50.0], [92.0, 146.0, 62.0], [62.0, 112.0, 58.0]]
                {
                    let some = leaves(dice, 17, 9.5);
                    d.fill(color, &some);
                    d.line(shade(color, 0.62), 0.5, &some);
                }
            }
            Ground::Tiles => {
                let all = [
                    [214.0, 130.0, 140.0],
                    [120.0, 160.0, 200.0],
                    [226.0, 200.0, 110.0],
                    [150.0, 180.0, 130.0],
                ];
                let start = dice.below(4);
                spots(d, dice, &[all[start], all[(start + 1) % 4]], 5, 1.2);
            }
            Ground::Snow => {
                d.line([112.0, 88.0, 70.0], 0.9, &strokes(dice, 6, 9.0));
                spots(d, dice, &[[150.0, 156.0, 168.0]], 5, 1.2);
            }
        }
    }
}

fn rows(map: &mut Pixmap, step: f32, [sin, cos, ox, oy]: [f32; 4], f: &dyn Fn(f32, f32) -> Rgb) {
    let width = map.width() as usize;
    for (i, pixel) in map.data_mut().chunks_exact_mut(4).enumerate() {
        let (x, y) = (((i % width) as f32 + 0.5) * step, ((i / width) as f32 + 0.5) * step);
        let [r, g, b] = f(ox + x * cos - y * sin, oy + x * sin + y * cos);
        pixel.copy_from_slice(&[r as u8, g as u8, b as u8, 255]);
    }
}

fn blades(dice: &mut Dice, count: usize) -> String {
    (0..count)
        .map(|_| {
            let (x, y) = (dice.range(0.0, 100.0), dice.range(4.0, 104.0));
            let (lean, tall) = (dice.range(-4.0, 4.0), dice.range(5.0, 11.0));
            format!(
                "M{} {y} Q{} {} {} {} Q{} {} {} {y} Z ",
                x - 0.8,
                x - 0.6,
                y - tall * 0.6,
                x + lean,
                y - tall,
                x + 0.8,
                y - tall * 0.5,
                x + 0.8
            )
        })
        .collect()
}

fn strokes(dice: &mut Dice, count: usize, long: f32) -> String {
    (0..count)
        .map(|_| {
            let (x, y) = (dice.range(0.0, 100.0), dice.range(0.0, 100.0));
            let (dx, dy) = (dice.range(-long, long), dice.range(-long, long) * 0.7);
            format!("M{x} {y} Q{} {} {} {} ", x + dx * 0.5 + 1.2, y + dy * 0.5 - 1.2, x + dx, y + dy)
        })
        .collect()
}

/// Pointed leaves at any angle.
pub(super) fn leaf(x: f32, y: f32, angle: f32, long: f32, wide: f32) -> String {
    let (s, k) = angle.sin_cos();
    let at = |along: f32, side: f32| (x + along * k - side * s, y + along * s + side * k);
    let ((ax, ay), (bx, by), (cx, cy), (dx, dy)) =
        (at(-long, 0.0), at(0.0, -wide), at(long, 0.0), at(0.0, wide));
    format!("M{ax} {ay} Q{bx} {by} {cx} {cy} Q{dx} {dy} {ax} {ay} Z M{ax} {ay} L{cx} {cy} ")
}

fn leaves(dice: &mut Dice, count: usize, long: f32) -> String {
    (0..count)
        .map(|_| {
            let long = long * dice.range(0.7, 1.2);
            leaf(
                dice.range(0.0, 100.0),
                dice.range(0.0, 100.0),
                dice.range(0.0, std::f32::consts::TAU),
                long,
                long * 0.75,
            )
        })
        .collect()
}
