//! Robust accuracy against eps, as SVG.

use super::super::Row;
use super::arrange::Line;
use super::figure;
use crate::attack::Eps;
use crate::page::escape;

const WIDTH: f64 = 440.0;
const HEIGHT: f64 = 288.0;
/// The drawing area: left, top, right, bottom.
const AREA: [f64; 4] = [56.0, 14.0, 430.0, 236.0];
/// How far apart the attacks are drawn at one radius, so that their intervals do not hide each other.
const APART: f64 = 6.0;
/// The least distance of two numbers under the axis.
const LEGIBLE: f64 = 24.0;

/// The markers, around (0, 0).
const MARKS: [&str; 7] = [
    "M-4.5 0A4.5 4.5 0 1 1 4.5 0A4.5 4.5 0 1 1 -4.5 0Z",
    "M-4 -4H4V4H-4Z",
    "M0 -5.5L5.2 4H-5.2Z",
    "M0 -5.8L5.8 0L0 5.8L-5.8 0Z",
    "M0 5.5L5.2 -4H-5.2Z",
    "M-5 -1.6H-1.6V-5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5Z",
    "M0 -5.6L5.3 -1.7L3.3 4.5H-3.3L-5.3 -1.7Z",
];
const DASHES: [&str; 5] = ["none", "8 4", "2 3.5", "9 3 2 3", "14 4"];
/// Colours of the style sheet: `.s0` to `.s5`.
const COLOURS: usize = 6;

/// The radii of a section on an axis, 0 first.
pub(super) struct Axis {
    radii: Vec<Eps>,
    most: f64,
}

impl Axis {
    pub fn new(radii: impl Iterator<Item = Eps>) -> Self {
        let radii: Vec<Eps> =
            std::iter::once(Eps::of_255(0)).chain(radii.filter(|eps| eps.value() > 0.0)).collect();
        let most = radii.iter().copied().map(steps).fold(0.0, f64::max);
        Self { radii, most: if most > 0.0 { most } else { 1.0 } }
    }

    /// Radii double from one to the next, so the logarithm spaces them evenly; with 1 added 0 has a
    /// place.
    fn x(&self, eps: Eps) -> f64 {
        let [left, _, right, _] = AREA;
        left + 12.0 + (right - left - 24.0) * steps(eps).ln_1p() / self.most.ln_1p()
    }
}

/// In steps of 1/255.
fn steps(eps: Eps) -> f64 {
    255.0 * eps.value()
}

fn y(percent: f64) -> f64 {
    let [_, top, _, bottom] = AREA;
    bottom - (bottom - top) * percent / 100.0
}

/// A line under one threat model, an attack after the other. `attacks` gives each its look, `title`
/// is text and has the defence and the threat model in it; `id` is unique on the page.
pub(super) fn plot(
    line: &Line,
    attacks: &[&str],
    axis: &Axis,
    title: &str,
    threat: &str,
    id: &str,
) -> String {
    let [left, top, right, bottom] = AREA;
    let mut out = format!(
        "<svg class=\"plot\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-labelledby=\"{id}-title {id}-text\">\n\
         <title id=\"{id}-title\">{title}</title>\n<desc id=\"{id}-text\">{desc}</desc>\n",
        title = escape(title),
        desc = escape(&description(line, attacks)),
    );
    for percent in [0, 25, 50, 75, 100] {
        let y = y(f64::from(percent));
        out += &format!(
            "<path class=\"grid\" d=\"M{left} {y:.1}H{right}\"/>\
             <text class=\"end\" x=\"{x}\" y=\"{text:.1}\">{percent} %</text>\n",
            x = left - 6.0,
            text = y + 4.0,
        );
    }
    let mut last = f64::INFINITY;
    for &eps in axis.radii.iter().rev() {
        let x = axis.x(eps);
        out += &format!("<path class=\"tick\" d=\"M{x:.1} {bottom}v5\"/>");
        // The largest radius and 0 always have their number.
        if last - x >= LEGIBLE && (steps(eps) == 0.0 || x - axis.x(Eps::of_255(0)) >= LEGIBLE) {
            out += &format!(
                "<text class=\"middle\" x=\"{x:.1}\" y=\"{:.1}\">{}</text>\n",
                bottom + 19.0,
                number(steps(eps))
            );
            last = x;
        }
    }
    out += &format!(
        "<path class=\"tick\" d=\"M{left} {bottom}H{right}\"/>\
         <text class=\"middle\" x=\"{:.1}\" y=\"{:.1}\">eps, the largest change per pixel, in 1/255</text>\n",
        (left + right) / 2.0,
        HEIGHT - 12.0,
    );
    let zero = axis.x(Eps::of_255(0));
    let clean = line.clean.filter(|row| row.n > 0);
    if let Some(row) = clean {
        out += &format!("<path class=\"reference\" d=\"M{zero:.1} {:.1}H{right}\"/>\n", y(row.value()));
    }
    let drawn: Vec<(usize, Vec<(Eps, &Row)>)> = series(line, attacks);
    for (place, (look, points)) in drawn.iter().enumerate() {
        let shift = APART * (place as f64 - (drawn.len() as f64 - 1.0) / 2.0);
        let at = |eps: Eps| axis.x(eps) + if steps(eps) > 0.0 { shift } else { 0.0 };
        let start = clean.map(|row| (zero, y(row.value())));
        let path: Vec<String> = start
            .into_iter()
            .chain(points.iter().map(|(eps, row)| (at(*eps), y(row.value()))))
            .map(|(x, y)| format!("{x:.1} {y:.1}"))
            .collect();
        out += &format!(
            "<g class=\"s{colour}\"><path class=\"line\" stroke-dasharray=\"{dash}\" d=\"M{path}\"/>\n",
            colour = look % COLOURS,
            dash = DASHES[look % DASHES.len()],
            path = path.join("L"),
        );
        for (eps, row) in points {
            let label =
                format!("{} at eps {eps}, {threat}: {} %, n = {}", attacks[*look], figure(row), row.n);
            out += &point(at(*eps), row, MARKS[look % MARKS.len()], &label);
        }
        out += "</g>\n";
    }
    if let Some(row) = clean {
        let label = format!("untouched pictures: {} %, n = {}", figure(row), row.n);
        out += &format!("<g class=\"clean\">{}</g>\n", point(zero, row, MARKS[0], &label));
    }
    debug_assert!(top < bottom);
    out + "</svg>\n"
}

/// A marker with its interval.
fn point(x: f64, row: &Row, mark: &str, label: &str) -> String {
    let (low, high) = row.interval();
    format!(
        "<g><title>{label}</title><path class=\"bar\" d=\"M{x:.1} {low:.1}V{high:.1}M{a:.1} {low:.1}h6M{a:.1} {high:.1}h6\"/>\
         <path class=\"mark\" transform=\"translate({x:.1} {y:.1})\" d=\"{mark}\"/></g>\n",
        label = escape(label),
        low = y(low),
        high = y(high),
        a = x - 3.0,
        y = y(row.value()),
    )
}

/// How the attack is drawn, for a legend.
pub(super) fn key(look: usize) -> String {
    format!(
        "<svg class=\"key s{colour}\" viewBox=\"0 0 40 14\" aria-hidden=\"true\" focusable=\"false\">\
         <path class=\"line\" stroke-dasharray=\"{dash}\" d=\"M1 7H39\"/>\
         <path class=\"mark\" transform=\"translate(20 7)\" d=\"{mark}\"/></svg>",
        colour = look % COLOURS,
        dash = DASHES[look % DASHES.len()],
        mark = MARKS[look % MARKS.len()],
    )
}

/// How the clean pictures are drawn, for a legend.
pub(super) fn clean_key() -> String {
    format!(
        "<svg class=\"key clean\" viewBox=\"0 0 40 14\" aria-hidden=\"true\" focusable=\"false\">\
         <path class=\"reference\" d=\"M1 7H39\"/><path class=\"mark\" transform=\"translate(20 7)\" d=\"{}\"/></svg>",
        MARKS[0],
    )
}

/// The attacks of a line that have a place on the axis: each one's place in `attacks` with its points.
pub(super) fn series<'a>(line: &Line<'a>, attacks: &[&str]) -> Vec<(usize, Vec<(Eps, &'a Row)>)> {
    let points = |attack: &str| {
        let of_attack = |row: &&Row| row.n > 0 && row.attacked.as_ref().is_some_and(|a| a.attack == attack);
        let rows = line.cells.iter().copied().flatten().filter(of_attack);
        rows.filter_map(|row| row.attacked.as_ref().and_then(|a| a.eps).map(|eps| (eps, row)))
            .collect::<Vec<_>>()
    };
    let all = attacks.iter().enumerate().map(|(i, attack)| (i, points(attack)));
    all.filter(|(_, points)| !points.is_empty()).collect()
}

/// What a reader who does not see the plot is told.
fn description(line: &Line, attacks: &[&str]) -> String {
    let clean =
        line.clean.filter(|row| row.n > 0).map(|row| format!("Untouched pictures: {} %.", figure(row)));
    let attacked = series(line, attacks).into_iter().map(|(look, points)| {
        let points: Vec<String> =
            points.iter().map(|(eps, row)| format!("{} % at eps {eps}", figure(row))).collect();
        format!("{}: {}.", attacks[look], points.join(", "))
    });
    clean.into_iter().chain(attacked).collect::<Vec<_>>().join(" ")
}

/// Without zeros that say nothing.
fn number(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
