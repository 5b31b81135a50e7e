//! From a kind, a colour and a place to pixels.

use tiny_skia::{Pixmap, Transform};

use super::draft::{Draft, Rgb, mix, shade};
use super::places::{Place, leaf};
use super::texture::hash;
use super::{Dice, Kind, rgb};
use crate::{Error, Result};

/// A rendered scene.
pub(super) struct View {
    pub picture: image::RgbImage,
    pub bbox: [f32; 4],
    pub occluded: bool,
}

/// Where the light comes from, how strong it is and what the camera does.
struct Light {
    x: f32,
    round: f32,
    shadow: f32,
    slope: [f32; 2],
    gain: f32,
    contrast: f32,
    blur: f32,
    grain: f32,
    seed: u32,
}

pub(super) fn render(dice: &mut Dice, kind: &Kind, color: &str, place: &Place, size: u32) -> Result<View> {
    let side = size as f32;
    let mut object = Draft::default();
    let lift = dice.range(0.92, 1.08);
    // A black cat with much of a tint would be a green cat.
    let neutral = ["black", "gray", "white"].contains(&color);
    let spread = if neutral { 4.0 } else { 12.0 };
    let tint = rgb(color).map(|c| (c * lift + dice.range(-spread, spread)).clamp(18.0, 250.0));
    (kind.drawing)(&mut object, dice, tint);

    // Pose, in the unit square.
    let angle = dice.range(-20.0, 20.0) + dice.range(-1.0, 1.0) * kind.turn;
    let mirror = if kind.mirrors && dice.chance(0.5) { -1.0 } else { 1.0 };
    let (wide, tall) = (dice.range(0.9, 1.1), dice.range(0.9, 1.1));
    let pose = Transform::from_scale(mirror * wide * 0.01, tall * 0.01).post_rotate(angle);
    let [left, top, right, bottom] = object.bounds(pose);
    let (w, h) = (right - left, bottom - top);
    let slim = w.min(h) / w.max(h);
    let scale = dice.range(if slim < 0.75 { 0.66 } else { 0.58 }, 0.88) / w.max(h);
    let (w, h) = (w * scale, h * scale);
    let how = dice.below(10);
    let over = how == 0;
    let mut corner = [dice.range(0.02, 0.98 - w), dice.range(0.02, 0.98 - h)];
    if over {
        let cut = dice.range(0.03, 0.09);
        match dice.below(4) {
            0 => corner[0] = -cut * w,
            1 => corner[0] = 1.0 - (1.0 - cut) * w,
            2 => corner[1] = -cut * h,
            _ => corner[1] = 1.0 - (1.0 - cut) * h,
        }
    }
    let transform = pose
        .post_scale(scale, scale)
        .post_translate(corner[0] - left * scale, corner[1] - top * scale)
        .post_scale(side, side);
    let start = [corner[0].max(0.0), corner[1].max(0.0)];
    let end = [(corner[0] + w).min(1.0), (corner[1] + h).min(1.0)];

    let light = Light {
        x: if dice.chance(0.5) { 1.0 } else { -1.0 },
        round: dice.range(0.35, 0.6),
        shadow: dice.range(0.3, 0.6),
        slope: [dice.range(-0.16, 0.16), dice.range(-0.16, 0.16)],
        gain: dice.range(0.88, 1.1),
        contrast: dice.range(0.88, 1.1),
        blur: dice.range(0.0, 0.8) * side / 96.0,
        grain: dice.range(1.5, 5.0),
        seed: dice.seed(),
    };

    let map =
        || Pixmap::new(size, size).ok_or_else(|| Error::argument("size", "a size that fits in memory", size));
    let mut ground = map()?;
    place.paint(&mut ground, dice, color);
    let mut layer = map()?;
    object.paint(&mut layer, transform);
    compose(&mut ground, &layer, &light);

    let covered = (1..=2).contains(&how);
    if covered {
        let mut draft = Draft::default();
        cover(&mut draft, dice, [corner[0] * 100.0, corner[1] * 100.0, w * 100.0, h * 100.0]);
        draft.paint(&mut ground, Transform::from_scale(side / 100.0, side / 100.0));
    }
    Ok(View {
        picture: expose(&ground, &light)?,
        bbox: [start[0], start[1], end[0] - start[0], end[1] - start[1]].map(|v| v * side),
        occluded: over || covered,
    })
}

/// Something lying over a part of the object's edge, on `[0, 100]`.
fn cover(d: &mut Draft, dice: &mut Dice, [x, y, w, h]: [f32; 4]) {
    let around = dice.range(0.0, std::f32::consts::TAU);
    let (s, k) = around.sin_cos();
    let (cx, cy) = (x + w / 2.0 + 0.42 * w * k, y + h / 2.0 + 0.42 * h * s);
    let long = w.max(h);
    let dark = [18.0, 18.0, 22.0];
    match dice.below(4) {
        0 => {
            let color = *dice.pick(&[[92.0, 140.0, 60.0], [176.0, 132.0, 60.0], [160.0, 84.0, 50.0]]);
            let angle = dice.range(0.0, std::f32::consts::TAU);
            d.tint(dark, 0.3, &leaf(cx + 1.0, cy + 1.4, angle, long * 0.2, long * 0.15));
            let shape = leaf(cx, cy, angle, long * 0.2, long * 0.15);
            d.fill(color, &shape);
            d.line(shade(color, 0.6), 0.6, &shape);
        }
        1 => {
            let (ax, ay) = (cx - s * 0.5 * long, cy + k * 0.5 * long);
            let (bx, by) = (cx + s * 0.5 * long, cy - k * 0.5 * long);
            d.line([70.0, 48.0, 30.0], long * 0.06, &format!("M{ax} {ay} L{bx} {by}"));
            d.line([132.0, 96.0, 62.0], long * 0.035, &format!("M{ax} {ay} L{bx} {by}"));
        }
        2 => {
            for i in 0..4 {
                let foot = cx + (i as f32 - 1.5) * long * 0.06;
                let (lean, tall) = (dice.range(-0.1, 0.1) * long, dice.range(0.25, 0.4) * long);
                let base = cy + long * 0.22;
                let color = mix([62.0, 112.0, 40.0], [130.0, 170.0, 76.0], dice.unit());
                let thick = long * 0.017;
                d.fill(
                    color,
                    &format!(
                        "M{} {base} Q{} {} {} {} Q{} {} {} {base} Z",
                        foot - thick,
                        foot - thick,
                        base - tall * 0.6,
                        foot + lean,
                        base - tall,
                        foot + thick,
                        base - tall * 0.6,
                        foot + thick
                    ),
                );
            }
        }
        _ => {
            let color: Rgb = *dice.pick(&[[204.0, 92.0, 128.0], [96.0, 150.0, 196.0], [232.0, 214.0, 150.0]]);
            let r = long * dice.range(0.08, 0.12);
            d.oval(dark, 0.3, [cx + 0.9, cy + 1.3, r, r]);
            d.oval(shade(color, 0.72), 1.0, [cx, cy, r, r]);
            d.oval(color, 1.0, [cx - r * 0.12, cy - r * 0.14, r * 0.8, r * 0.8]);
            d.oval([250.0, 250.0, 250.0], 0.7, [cx - r * 0.35, cy - r * 0.4, r * 0.2, r * 0.16]);
        }
    }
}

/// Puts the object on the ground: shadow, a thin edge that stands out, rounded shading.
fn compose(ground: &mut Pixmap, layer: &Pixmap, light: &Light) {
    let side = ground.width() as usize;
    let alpha: Vec<f32> = layer.data().chunks_exact(4).map(|p| f32::from(p[3]) / 255.0).collect();
    let unit = side as f32 / 96.0;
    let soft = soften(&alpha, side, 1.9 * unit);
    let edge = soften(&alpha, side, 0.6 * unit);

    // The edge is dark around light objects on lighter ground, light where the ground is dark.
    let (mut own, mut under, mut weight) = (0f32, 0f32, 1e-3f32);
    for ((p, g), a) in layer.data().chunks_exact(4).zip(ground.data().chunks_exact(4)).zip(&alpha) {
        let luma = |p: &[u8]| 0.3 * f32::from(p[0]) + 0.59 * f32::from(p[1]) + 0.11 * f32::from(p[2]);
        own += luma(p);
        under += a * luma(g);
        weight += a;
    }
    let line: Rgb =
        if own < under || under > 95.0 * weight { [24.0, 22.0, 26.0] } else { [236.0, 234.0, 226.0] };

    let shift = (3.0 * unit) as isize;
    let near = (2.0 * unit) as isize;
    let at = |x: isize, y: isize| {
        let inside = |v: isize| v.clamp(0, side as isize - 1) as usize;
        soft[inside(y) * side + inside(x)]
    };
    let aside = light.x as isize;
    for (i, (g, p)) in ground.data_mut().chunks_exact_mut(4).zip(layer.data().chunks_exact(4)).enumerate() {
        let (x, y) = ((i % side) as isize, (i / side) as isize);
        let dark = 1.0 - light.shadow * at(x + aside * shift, y - shift);
        let rim = (1.6 * edge[i]).min(1.0) * 0.62;
        let a = alpha[i];
        let bend = at(x - aside * near, y + near) - at(x + aside * near, y - near);
        let lit = 1.0 + light.round * bend;
        for c in 0..3 {
            let below = f32::from(g[c]) * dark;
            let below = below + (line[c] - below) * rim;
            g[c] = (below * (1.0 - a) + (f32::from(p[c]) * lit).min(255.0 * a)) as u8;
        }
    }
}

/// A Gaussian blur of one channel, edges repeated.
fn soften(from: &[f32], side: usize, sigma: f32) -> Vec<f32> {
    let taps = taps(sigma);
    let middle = pass(from, side, &taps, true);
    pass(&middle, side, &taps, false)
}

fn taps(sigma: f32) -> Vec<f32> {
    let reach = (2.5 * sigma).ceil().max(1.0) as i32;
    let spread = 2.0 * sigma.max(0.05) * sigma.max(0.05);
    let raw: Vec<f32> = (-reach..=reach).map(|i| (-((i * i) as f32) / spread).exp()).collect();
    let sum: f32 = raw.iter().sum();
    raw.into_iter().map(|t| t / sum).collect()
}

fn pass(from: &[f32], side: usize, taps: &[f32], across: bool) -> Vec<f32> {
    let reach = taps.len() / 2;
    let mut out = vec![0f32; side * side];
    let mut padded = vec![0f32; side + 2 * reach];
    for (y, row) in out.chunks_exact_mut(side).enumerate() {
        if across {
            let line = &from[y * side..(y + 1) * side];
            padded[..reach].fill(line[0]);
            padded[reach..reach + side].copy_from_slice(line);
            padded[reach + side..].fill(line[side - 1]);
            for (k, t) in taps.iter().enumerate() {
                for (o, v) in row.iter_mut().zip(&padded[k..]) {
                    *o += t * v;
                }
            }
        } else {
            for (k, t) in taps.iter().enumerate() {
                let from_y = (y + k).saturating_sub(reach).min(side - 1);
                for (o, v) in row.iter_mut().zip(&from[from_y * side..]) {
                    *o += t * v;
                }
            }
        }
    }
    out
}

/// Lighting over the frame, focus, brightness, contrast and the sensor's noise.
fn expose(map: &Pixmap, light: &Light) -> Result<image::RgbImage> {
    let side = map.width() as usize;
    let mut bytes = vec![0u8; side * side * 3];
    let step = 1.0 / side as f32;
    for c in 0..3 {
        let mut plane: Vec<f32> = map.data().chunks_exact(4).map(|p| f32::from(p[c])).collect();
        if light.blur > 0.15 {
            plane = soften(&plane, side, light.blur);
        }
        for (i, value) in plane.into_iter().enumerate() {
            let (x, y) = ((i % side) as f32 * step - 0.5, (i / side) as f32 * step - 0.5);
            let gain = light.gain * (1.0 + light.slope[0] * x + light.slope[1] * y);
            let h = hash(i as i32, c as i32, light.seed);
            let grain = ((h & 0xffff) as f32 + (h >> 16) as f32) * (1.0 / 32768.0) - 2.0;
            let value = (value * gain - 122.0) * light.contrast + 122.0 + 1.22 * light.grain * grain;
            bytes[i * 3 + c] = (value + 0.5).clamp(0.0, 255.0) as u8;
        }
    }
    image::RgbImage::from_raw(side as u32, side as u32, bytes)
        .ok_or_else(|| Error::argument("size", "a square of bytes", side))
}
