//! Drafts: lists of vector shapes in an object's own coordinates, painted at any resolution.

use tiny_skia::{
    Color, FillRule, LineCap, LineJoin, Paint, Path, PathBuilder, Pixmap, PixmapPaint, Point, Rect, Stroke,
    Transform,
};

use super::texture::Texture;

/// A colour, each channel in `[0, 255]`.
pub(super) type Rgb = [f32; 3];

/// `color` made darker (`by < 1`) or brighter.
pub(super) fn shade(color: Rgb, by: f32) -> Rgb {
    color.map(|c| (c * by).clamp(0.0, 255.0))
}

/// The colour `t` of the way from `a` to `b`.
pub(super) fn mix(a: Rgb, b: Rgb, t: f32) -> Rgb {
    std::array::from_fn(|i| a[i] + (b[i] - a[i]) * t)
}

enum Op {
    Fill { path: Path, color: Rgb, alpha: f32 },
    Stroke { path: Path, color: Rgb, alpha: f32, width: f32 },
    Texture { texture: Texture, strength: f32, seed: u32 },
    Group(Draft),
}

/// A list of shapes; objects are drawn on `[-100, 100]` on both axes, y down.
#[derive(Default)]
pub(super) struct Draft {
    ops: Vec<Op>,
}

impl Draft {
    /// Fills an outline such as `M0 0 L10 0 Q20 5 10 10 Z` (absolute M, L, Q, C and Z; non-zero).
    pub(super) fn fill(&mut self, color: Rgb, outline: &str) {
        self.tint(color, 1.0, outline);
    }

    /// As [`Self::fill`], translucent.
    pub(super) fn tint(&mut self, color: Rgb, alpha: f32, outline: &str) {
        if let Some(path) = path(outline) {
            self.ops.push(Op::Fill { path, color, alpha });
        }
    }

    /// Fills an outline and draws its edge in a darker shade.
    pub(super) fn body(&mut self, color: Rgb, outline: &str) {
        if let Some(path) = path(outline) {
            self.edged(path, color);
        }
    }

    fn edged(&mut self, path: Path, color: Rgb) {
        self.ops.push(Op::Fill { path: path.clone(), color, alpha: 1.0 });
        self.ops.push(Op::Stroke { path, color: shade(color, 0.5), alpha: 0.8, width: 3.5 });
    }

    /// Draws a line along a path.
    pub(super) fn line(&mut self, color: Rgb, width: f32, outline: &str) {
        if let Some(path) = path(outline) {
            self.ops.push(Op::Stroke { path, color, alpha: 1.0, width });
        }
    }

    /// A thick line with a darker edge, such as a handle.
    pub(super) fn tube(&mut self, color: Rgb, width: f32, outline: &str) {
        self.line(shade(color, 0.5), width + 4.0, outline);
        self.line(color, width, outline);
    }

    /// An ellipse of a centre and two radii.
    pub(super) fn oval(&mut self, color: Rgb, alpha: f32, [x, y, rx, ry]: [f32; 4]) {
        if let Some(path) = ellipse(x, y, rx, ry) {
            self.ops.push(Op::Fill { path, color, alpha });
        }
    }

    /// An ellipse with a darker edge.
    pub(super) fn ball(&mut self, color: Rgb, [x, y, rx, ry]: [f32; 4]) {
        if let Some(path) = ellipse(x, y, rx, ry) {
            self.edged(path, color);
        }
    }

    /// The ring of a stroked ellipse.
    pub(super) fn ring(&mut self, color: Rgb, width: f32, [x, y, rx, ry]: [f32; 4]) {
        if let Some(path) = ellipse(x, y, rx, ry) {
            self.ops.push(Op::Stroke { path, color, alpha: 1.0, width });
        }
    }

    /// A rectangle with rounded corners and a darker edge.
    pub(super) fn block(&mut self, color: Rgb, [x, y, w, h]: [f32; 4], round: f32) {
        if let Some(path) = rounded(x, y, w, h, round) {
            self.edged(path, color);
        }
    }

    /// A rectangle without an edge.
    pub(super) fn pane(&mut self, color: Rgb, [x, y, w, h]: [f32; 4], round: f32) {
        if let Some(path) = rounded(x, y, w, h, round) {
            self.ops.push(Op::Fill { path, color, alpha: 1.0 });
        }
    }

    /// Many ellipses of one colour, painted at once, each a centre and two radii.
    pub(super) fn dots(&mut self, color: Rgb, alpha: f32, dots: &[[f32; 4]]) {
        let mut builder = PathBuilder::new();
        for &[x, y, rx, ry] in dots {
            if let Some(rect) = Rect::from_xywh(x - rx, y - ry, 2.0 * rx, 2.0 * ry) {
                builder.push_oval(rect);
            }
        }
        if let Some(path) = builder.finish() {
            self.ops.push(Op::Fill { path, color, alpha });
        }
    }

    /// Gives everything drawn so far a surface; `strength` is the relative change of brightness.
    pub(super) fn texture(&mut self, texture: Texture, strength: f32, seed: u32) {
        self.ops.push(Op::Texture { texture, strength, seed });
    }

    /// Puts another draft, with a surface of its own, on top of this one.
    pub(super) fn append(&mut self, other: Self) {
        self.ops.push(Op::Group(other));
    }

    /// The box (left, top, right, bottom) around the draft under `transform`.
    pub(super) fn bounds(&self, transform: Transform) -> [f32; 4] {
        let mut all = [f32::MAX, f32::MAX, f32::MIN, f32::MIN];
        for op in &self.ops {
            let (path, margin) = match op {
                Op::Fill { path, .. } => (path, 0.0),
                Op::Stroke { path, width, .. } => (path, width / 2.0),
                Op::Texture { .. } => continue,
                Op::Group(draft) => {
                    let b = draft.bounds(transform);
                    all = [all[0].min(b[0]), all[1].min(b[1]), all[2].max(b[2]), all[3].max(b[3])];
                    continue;
                }
            };
            let margin = margin * (transform.sx.abs() + transform.kx.abs()).min(1.0);
            let Some(b) = path.clone().transform(transform).and_then(|p| p.compute_tight_bounds()) else {
                continue;
            };
            all = [
                all[0].min(b.left() - margin),
                all[1].min(b.top() - margin),
                all[2].max(b.right() + margin),
                all[3].max(b.bottom() + margin),
            ];
        }
        all
    }

    /// Paints the draft; `transform` takes its coordinates to pixels.
    pub(super) fn paint(&self, map: &mut Pixmap, transform: Transform) {
        let mut paint = Paint { anti_alias: true, ..Paint::default() };
        for op in &self.ops {
            match op {
                Op::Group(draft) => {
                    if let Some(mut layer) = Pixmap::new(map.width(), map.height()) {
                        draft.paint(&mut layer, transform);
                        let over = PixmapPaint::default();
                        map.draw_pixmap(0, 0, layer.as_ref(), &over, Transform::identity(), None);
                    }
                }
                Op::Fill { path, color, alpha } => {
                    paint.set_color(ink(*color, *alpha));
                    map.fill_path(path, &paint, FillRule::Winding, transform, None);
                }
                Op::Stroke { path, color, alpha, width } => {
                    paint.set_color(ink(*color, *alpha));
                    let stroke = Stroke {
                        width: *width,
                        line_cap: LineCap::Round,
                        line_join: LineJoin::Round,
                        ..Stroke::default()
                    };
                    map.stroke_path(path, &paint, &stroke, transform, None);
                }
                Op::Texture { texture, strength, seed } => {
                    surface(map, transform, *texture, *strength, *seed);
                }
            }
        }
    }
}

fn ink([r, g, b]: Rgb, alpha: f32) -> Color {
    let unit = |c: f32| (c / 255.0).clamp(0.0, 1.0);
    Color::from_rgba(unit(r), unit(g), unit(b), alpha.clamp(0.0, 1.0)).unwrap_or(Color::BLACK)
}

/// Multiplies what is painted by a texture.
fn surface(map: &mut Pixmap, transform: Transform, texture: Texture, strength: f32, seed: u32) {
    let Some(back) = transform.invert() else { return };
    let width = map.width() as usize;
    for (i, pixel) in map.data_mut().chunks_exact_mut(4).enumerate() {
        if pixel[3] == 0 {
            continue;
        }
        let mut at = Point::from_xy((i % width) as f32 + 0.5, (i / width) as f32 + 0.5);
        back.map_point(&mut at);
        let by = 1.0 + strength * texture.at(at.x * 0.01, at.y * 0.01, seed);
        let alpha = pixel[3];
        for c in &mut pixel[..3] {
            *c = ((f32::from(*c) * by + 0.5) as u8).min(alpha);
        }
    }
}

fn path(outline: &str) -> Option<Path> {
    let mut builder = PathBuilder::new();
    let is_command = |c: char| c.is_ascii_uppercase();
    let mut rest = outline;
    while let Some(at) = rest.find(is_command) {
        let command = rest.as_bytes()[at];
        let tail = &rest[at + 1..];
        let end = tail.find(is_command).unwrap_or(tail.len());
        let mut n = [0f32; 16];
        let mut count = 0;
        for (slot, word) in n.iter_mut().zip(tail[..end].split_ascii_whitespace()) {
            *slot = word.parse().ok()?;
            count += 1;
        }
        match command {
            b'M' => builder.move_to(n[0], n[1]),
            b'L' => n[..count].chunks_exact(2).for_each(|p| builder.line_to(p[0], p[1])),
            b'Q' => n[..count].chunks_exact(4).for_each(|p| builder.quad_to(p[0], p[1], p[2], p[3])),
            b'C' => {
                n[..count].chunks_exact(6).for_each(|p| builder.cubic_to(p[0], p[1], p[2], p[3], p[4], p[5]));
            }
            _ => builder.close(),
        }
        rest = &tail[end..];
    }
    builder.finish()
}

fn ellipse(x: f32, y: f32, rx: f32, ry: f32) -> Option<Path> {
    PathBuilder::from_oval(Rect::from_xywh(x - rx, y - ry, 2.0 * rx, 2.0 * ry)?)
}

fn rounded(x: f32, y: f32, w: f32, h: f32, r: f32) -> Option<Path> {
    let r = r.min(w / 2.0).min(h / 2.0);
    if r <= 0.0 {
        return Some(PathBuilder::from_rect(Rect::from_xywh(x, y, w, h)?));
    }
    let (right, bottom) = (x + w, y + h);
    let mut b = PathBuilder::new();
    b.move_to(x + r, y);
    b.line_to(right - r, y);
    b.quad_to(right, y, right, y + r);
    b.line_to(right, bottom - r);
    b.quad_to(right, bottom, right - r, bottom);
    b.line_to(x + r, bottom);
    b.quad_to(x, bottom, x, bottom - r);
    b.line_to(x, y + r);
    b.quad_to(x, y, x + r, y);
    b.close();
    b.finish()
}
