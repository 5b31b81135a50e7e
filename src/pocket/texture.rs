//! Noise: hashes, value noise and the surface textures made of them.

/// A well-mixed 32-bit hash of a lattice point.
#[inline]
pub(super) fn hash(x: i32, y: i32, seed: u32) -> u32 {
    let mut h = (x as u32).wrapping_mul(0x9e37_79b1) ^ (y as u32).wrapping_mul(0x85eb_ca77) ^ seed;
    h = (h ^ (h >> 15)).wrapping_mul(0x2c1b_3c6d);
    h = (h ^ (h >> 12)).wrapping_mul(0x297a_2d39);
    h ^ (h >> 15)
}

/// A lattice point's value in `[0, 1)`.
#[inline]
pub(super) fn cell(x: i32, y: i32, seed: u32) -> f32 {
    (hash(x, y, seed) >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// `floor` without a library call.
#[inline]
pub(super) fn floor(x: f32) -> i32 {
    let i = x as i32;
    i - i32::from(x < i as f32)
}

/// Smooth value noise in `[0, 1)`, one lattice point per unit.
#[inline]
pub(super) fn noise(x: f32, y: f32, seed: u32) -> f32 {
    let (ix, iy) = (floor(x), floor(y));
    let (fx, fy) = (x - ix as f32, y - iy as f32);
    let (sx, sy) = (fx * fx * (3.0 - 2.0 * fx), fy * fy * (3.0 - 2.0 * fy));
    let (a, b) = (cell(ix, iy, seed), cell(ix + 1, iy, seed));
    let (c, d) = (cell(ix, iy + 1, seed), cell(ix + 1, iy + 1, seed));
    let (top, bottom) = (a + (b - a) * sx, c + (d - c) * sx);
    top + (bottom - top) * sy
}

/// A triangle wave in `[0, 1]` of period 1.
#[inline]
pub(super) fn wave(x: f32) -> f32 {
    (2.0 * (x - floor(x) as f32) - 1.0).abs()
}

/// The nearest of the jittered points of a unit lattice: (its distance, the second distance less
/// it, the point's own hash value).
#[inline]
pub(super) fn pebble(x: f32, y: f32, seed: u32) -> (f32, f32, f32) {
    let (ix, iy) = (floor(x), floor(y));
    let (mut first, mut second, mut id) = (9f32, 9f32, 0u32);
    for cy in iy - 1..=iy + 1 {
        for cx in ix - 1..=ix + 1 {
            let h = hash(cx, cy, seed);
            let dx = cx as f32 + 0.15 + 0.7 * ((h & 0xffff) as f32 / 65536.0) - x;
            let dy = cy as f32 + 0.15 + 0.7 * ((h >> 16) as f32 / 65536.0) - y;
            let d = dx * dx + dy * dy;
            if d < first {
                second = first;
                first = d;
                id = h;
            } else if d < second {
                second = d;
            }
        }
    }
    let near = first.sqrt();
    (near, second.sqrt() - near, (id.wrapping_mul(0x9e37_79b1) >> 8) as f32 / 16_777_216.0)
}

/// What a surface is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Texture {
    /// Short hairs, running down.
    Fur,
    /// Overlapping round scales.
    Scales,
    /// Overlapping feathers: longer scales with barbs.
    Feathers,
    /// Fruit skin: streaks from top to bottom and light dots.
    Skin,
    /// Wood, grain running down.
    Wood,
    /// Brushed metal.
    Brushed,
    /// Cast, painted metal: fine grit.
    Cast,
    /// Car paint: faint flakes and a reflected horizon.
    Paint,
    /// Glazed pottery: cloudy, with crackle.
    Glaze,
    /// Cloth: a weave.
    Weave,
    /// Veins of leaves and wings.
    Veins,
    /// Leaves of a crown.
    Foliage,
    /// Vertical ribs.
    Ribs,
}

impl Texture {
    /// The texture's value, about `[-1, 1]`, at a place in units of half the object's side.
    #[inline]
    pub(super) fn at(self, u: f32, v: f32, seed: u32) -> f32 {
        match self {
            Self::Fur => {
                let bend = 2.5 * noise(u * 3.0, v * 3.0, seed ^ 1);
                1.5 * noise(u * 26.0 + bend, v * 7.0 + bend, seed) - 0.75
                    + 0.5 * noise(u * 50.0, v * 14.0, seed ^ 2)
                    - 0.25
            }
            Self::Scales => scale(u * 8.0, v * 8.0, seed),
            Self::Feathers => {
                0.7 * scale(v * 0.6 + u * 7.5, v * 5.0, seed) + 0.8 * noise(u * 32.0, v * 9.0, seed) - 0.4
            }
            Self::Skin => {
                let dot = noise(u * 17.0, v * 17.0, seed);
                1.2 * noise(u * 15.0, v * 3.0, seed ^ 1) - 0.6 + if dot > 0.74 { 0.8 } else { 0.0 }
            }
            Self::Wood => grain(u, v, seed),
            Self::Brushed => {
                1.2 * noise(u * 5.0, v * 45.0, seed) - 0.6 + 0.8 * noise(u * 40.0, v * 40.0, seed ^ 1) - 0.4
            }
            Self::Cast => {
                1.8 * noise(u * 34.0, v * 34.0, seed) - 0.9 + 0.6 * noise(u * 4.0, v * 4.0, seed ^ 1) - 0.3
            }
            Self::Paint => {
                0.9 * noise(u * 38.0, v * 38.0, seed) - 0.45 + 1.4 * noise(u * 2.5, v * 14.0, seed ^ 1) - 0.7
            }
            Self::Glaze => {
                let (_, gap, _) = pebble(u * 7.0, v * 7.0, seed);
                0.9 * noise(u * 5.0, v * 5.0, seed ^ 1) - 0.35 - if gap < 0.09 { 0.8 } else { 0.0 }
            }
            Self::Weave => {
                0.9 * (wave(u * 15.0) + wave(v * 15.0) - 1.0) + 0.8 * noise(u * 30.0, v * 30.0, seed) - 0.4
            }
            Self::Veins => {
                let ridge = (noise(u * 7.0 + v * 4.0, v * 7.0 - u * 4.0, seed) - 0.5).abs();
                if ridge < 0.05 { -1.0 } else { 0.3 + 0.8 * noise(u * 26.0, v * 26.0, seed ^ 1) - 0.4 }
            }
            Self::Foliage => {
                let (near, _, id) = pebble(u * 10.0, v * 10.0, seed);
                0.9 * id + 0.6 - 1.9 * near
            }
            Self::Ribs => 1.1 * wave(u * 7.0) - 0.55 + 0.8 * noise(u * 28.0, v * 28.0, seed) - 0.4,
        }
    }
}

#[inline]
fn scale(x: f32, y: f32, seed: u32) -> f32 {
    let row = floor(y);
    let x = x + 0.5 * (row & 1) as f32;
    let (dx, dy) = (x - floor(x) as f32 - 0.5, y - row as f32);
    let d = dx * dx * 3.2 + dy * dy * 0.9;
    0.6 * (cell(floor(x), row, seed) - 0.5) + if d > 0.75 { -1.0 } else { 0.6 - 0.8 * d }
}

#[inline]
fn grain(across: f32, along: f32, seed: u32) -> f32 {
    let bend = 2.0 * noise(across * 3.0, along * 1.5, seed ^ 1);
    1.3 * noise(across * 22.0 + bend, along * 2.0, seed) - 0.65
        + 0.8 * noise(across * 45.0, along * 9.0, seed ^ 2)
        - 0.4
}
