//! What the figures are drawn with: standalone SVG on white, whose text is text and which loads
//! nothing.

use crate::page::escape;

/// The colours of series, told apart by those who see few colours too.
pub(super) const COLOURS: [&str; 3] = ["#222222", "#0067a5", "#c04a00"];
const DASHES: [&str; 3] = ["none", "7 3", "2 3"];
/// Colour of axes and their numbers.
const GREY: &str = "#444444";

/// A figure while it is drawn; lengths are in user units of about a pixel.
pub(super) struct Figure {
    width: f64,
    height: f64,
    body: String,
}

/// Where a text is fixed to its point.
#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

impl Anchor {
    fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Middle => "middle",
            Self::End => "end",
        }
    }
}

impl Figure {
    /// A figure with its title and, below it, what the reader has to know; a line each.
    pub(super) fn new(width: f64, height: f64, title: &str, lines: &[String]) -> Self {
        let mut figure = Self { width, height, body: String::new() };
        figure.body += &format!("<title>{}</title>\n", escape(title));
        figure.body += &format!("<desc>{}</desc>\n", escape(&lines.join(" ")));
        figure.body += &format!("<rect width=\"{width:.0}\" height=\"{height:.0}\" fill=\"#ffffff\"/>\n");
        figure.body += &format!(
            "<text x=\"20\" y=\"28\" font-size=\"17\" font-weight=\"600\" fill=\"#111111\">{}</text>\n",
            escape(title)
        );
        for (i, line) in lines.iter().enumerate() {
            figure.text((20.0, 48.0 + 16.0 * i as f64), Anchor::Start, line);
        }
        figure
    }

    /// Where the drawing begins below a title with so many lines.
    pub(super) fn top(lines: usize) -> f64 {
        50.0 + 16.0 * lines as f64
    }

    /// Lines broken at blanks so that they fit into a figure of this width.
    pub(super) fn wrap(width: f64, lines: &[String]) -> Vec<String> {
        // What a character of common fonts takes at most on average.
        let most = ((width - 40.0) / 6.4).max(20.0) as usize;
        let mut wrapped = Vec::new();
        for line in lines {
            let mut now = String::new();
            for word in line.split(' ') {
                if !now.is_empty() && now.chars().count() + 1 + word.chars().count() > most {
                    wrapped.push(std::mem::take(&mut now));
                }
                if !now.is_empty() {
                    now.push(' ');
                }
                now += word;
            }
            wrapped.push(now);
        }
        wrapped
    }

    pub(super) fn text(&mut self, (x, y): (f64, f64), anchor: Anchor, text: &str) {
        self.body += &format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{}\" fill=\"{GREY}\">{}</text>\n",
            anchor.name(),
            escape(text)
        );
    }

    pub(super) fn bold(&mut self, (x, y): (f64, f64), anchor: Anchor, text: &str) {
        self.body += &format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{}\" font-weight=\"600\" fill=\"#111111\">{}</text>\n",
            anchor.name(),
            escape(text)
        );
    }

    /// Text turned by `degrees` around its point.
    pub(super) fn turned(&mut self, (x, y): (f64, f64), degrees: f64, anchor: Anchor, text: &str) {
        self.body += &format!(
            "<text transform=\"translate({x:.1} {y:.1}) rotate({degrees})\" text-anchor=\"{}\" \
             fill=\"{GREY}\">{}</text>\n",
            anchor.name(),
            escape(text)
        );
    }

    /// Small text that can be read on the colour of `value`.
    pub(super) fn inked(&mut self, (x, y): (f64, f64), anchor: Anchor, scale: Scale, value: f64, text: &str) {
        self.body += &format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{}\" font-size=\"10\" fill=\"{}\">{}</text>\n",
            anchor.name(),
            scale.ink(Some(value)),
            escape(text)
        );
    }

    pub(super) fn rect(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), fill: &str, label: &str) {
        self.body += &format!(
            "<rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" fill=\"{fill}\">"
        );
        self.body += &format!("<title>{}</title></rect>\n", escape(label));
    }

    /// What has no function of its own here.
    pub(super) fn raw(&mut self, svg: &str) {
        self.body += svg;
    }

    pub(super) fn finish(self) -> String {
        let (width, height) = (self.width, self.height);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" \
             width=\"{width:.0}\" height=\"{height:.0}\" role=\"img\" \
             font-family=\"system-ui, sans-serif\" font-size=\"12\">\n{}</svg>\n",
            self.body
        )
    }
}

/// How numbers become colours.
#[derive(Clone, Copy)]
pub(super) enum Scale {
    /// From dark to bright between two numbers.
    Sequential(f64, f64),
    /// Blue below zero, red above, white between; to so far on either side.
    Diverging(f64),
}

/// A map of evenly rising lightness, dark blue to yellow.
const DARK_TO_BRIGHT: [[f64; 3]; 5] =
    [[68.0, 1.0, 84.0], [59.0, 82.0, 139.0], [33.0, 145.0, 140.0], [94.0, 201.0, 98.0], [253.0, 231.0, 37.0]];
const BLUE_TO_RED: [[f64; 3]; 5] = [
    [33.0, 102.0, 172.0],
    [146.0, 197.0, 222.0],
    [247.0, 247.0, 247.0],
    [244.0, 165.0, 130.0],
    [178.0, 24.0, 43.0],
];
/// Where there is no number.
const NOTHING: &str = "#e4e4e4";

impl Scale {
    fn ends(self) -> (f64, f64) {
        match self {
            Self::Sequential(low, high) => (low, high),
            Self::Diverging(most) => (-most, most),
        }
    }

    fn rgb(self, value: f64) -> [f64; 3] {
        let anchors = match self {
            Self::Sequential(..) => &DARK_TO_BRIGHT,
            Self::Diverging(_) => &BLUE_TO_RED,
        };
        let (low, high) = self.ends();
        let share = if high > low { ((value - low) / (high - low)).clamp(0.0, 1.0) } else { 0.5 };
        let place = share * (anchors.len() - 1) as f64;
        let first = (place as usize).min(anchors.len() - 2);
        let rest = place - first as f64;
        std::array::from_fn(|i| anchors[first][i] + rest * (anchors[first + 1][i] - anchors[first][i]))
    }

    pub(super) fn colour(self, value: Option<f64>) -> String {
        let Some(value) = value.filter(|value| value.is_finite()) else { return NOTHING.into() };
        let [r, g, b] = self.rgb(value).map(|c| c.round() as u8);
        format!("#{r:02x}{g:02x}{b:02x}")
    }

    /// A colour that can be read on that of `value`.
    fn ink(self, value: Option<f64>) -> &'static str {
        let light = value.is_none_or(|value| {
            let [r, g, b] = self.rgb(value);
            0.299 * r + 0.587 * g + 0.114 * b > 140.0
        });
        if light { "#111111" } else { "#ffffff" }
    }
}

/// A matrix as coloured cells.
pub(super) struct HeatMap<'a> {
    pub title: &'a str,
    /// What goes down and what goes across.
    pub axes: [&'a str; 2],
    pub rows: &'a [String],
    pub columns: &'a [String],
    /// Row by row; `None` is drawn grey.
    pub values: &'a [Vec<Option<f64>>],
    pub scale: Scale,
    /// Side of a cell.
    pub cell: f64,
    /// Digits behind the point of the numbers in cells and tips.
    pub digits: usize,
}

/// Room that a heat map needs beside its cells: left, and above.
pub(super) const MARGIN: [f64; 2] = [96.0, 26.0];

/// How far turned labels below an axis reach down.
fn drop(labels: &[String]) -> f64 {
    let longest = labels.iter().map(|label| label.chars().count()).max().unwrap_or(0);
    14.0 + 4.8 * longest as f64
}

/// Room that a heat map or a chart needs below, for its labels and the name of the axis.
pub(super) fn below(labels: &[String]) -> f64 {
    drop(labels) + 40.0
}

impl HeatMap<'_> {
    /// Draws it with the upper left corner of its cells at a point, and returns the lower right one.
    pub(super) fn draw(&self, figure: &mut Figure, (x, y): (f64, f64)) -> (f64, f64) {
        let cell = self.cell;
        let (width, height) = (cell * self.columns.len() as f64, cell * self.rows.len() as f64);
        figure.bold((x, y - 10.0), Anchor::Start, self.title);
        // As many labels as can be read.
        let every = (15.0 / cell).ceil().max(1.0) as usize;
        for (i, (name, row)) in self.rows.iter().zip(self.values).enumerate() {
            let at = y + cell * i as f64;
            if i % every == 0 {
                figure.text((x - 6.0, at + cell / 2.0 + 4.0), Anchor::End, name);
            }
            for (j, value) in row.iter().enumerate() {
                let corner = (x + cell * j as f64, at);
                let number = value.map_or("undefined".into(), |value| format!("{value:.*}", self.digits));
                let column = self.columns.get(j).map_or("", String::as_str);
                let label = format!("{name}, {column}: {number}");
                figure.rect(corner, (cell, cell), &self.scale.colour(*value), &label);
                if cell >= 2.0 + 6.5 * number.len() as f64 && value.is_some() {
                    figure.raw(&format!(
                        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"11\" fill=\"{}\">\
                         {number}</text>\n",
                        corner.0 + cell / 2.0,
                        corner.1 + cell / 2.0 + 4.0,
                        self.scale.ink(*value),
                    ));
                }
            }
        }
        for (j, name) in self.columns.iter().enumerate().filter(|(j, _)| j % every == 0) {
            let at = (x + cell * (j as f64 + 0.5) + 4.0, y + height + 10.0);
            figure.turned(at, -45.0, Anchor::End, name);
        }
        figure.turned((x - 82.0, y + height / 2.0), -90.0, Anchor::Middle, self.axes[0]);
        figure.text((x + width / 2.0, y + height + drop(self.columns) + 20.0), Anchor::Middle, self.axes[1]);
        (x + width, y + height)
    }
}

/// A legend of colours: a bar from one end of the scale to the other, upwards, with its numbers.
pub(super) fn colour_bar(
    figure: &mut Figure,
    (x, y): (f64, f64),
    height: f64,
    scale: Scale,
    digits: usize,
    meaning: &str,
) {
    const STEPS: usize = 64;
    let (low, high) = scale.ends();
    figure.raw("<g shape-rendering=\"crispEdges\">\n");
    for i in 0..STEPS {
        let value = high - (high - low) * (i as f64 + 0.5) / STEPS as f64;
        let top = y + height * i as f64 / STEPS as f64;
        // A little over the next, so that no seams are seen.
        figure.raw(&format!(
            "<rect x=\"{x:.1}\" y=\"{top:.2}\" width=\"14\" height=\"{:.2}\" fill=\"{}\"/>\n",
            height / STEPS as f64 + 0.3,
            scale.colour(Some(value))
        ));
    }
    figure.raw("</g>\n");
    let mut longest = 0;
    for i in 0..=4 {
        let share = f64::from(i) / 4.0;
        let number = format!("{:.digits$}", high - (high - low) * share);
        longest = longest.max(number.len());
        figure.text((x + 20.0, y + height * share + 4.0), Anchor::Start, &number);
    }
    figure.turned((x + 42.0 + 6.8 * longest as f64, y + height / 2.0), -90.0, Anchor::Middle, meaning);
}

/// A number with its interval.
#[derive(Clone, Copy)]
pub(super) struct Point {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

/// One thing measured at every place of an axis.
pub(super) struct Series<'a> {
    pub name: &'a str,
    /// By place; `None` where it was not measured.
    pub points: Vec<Option<Point>>,
}

/// Lines or bars of percentages over named places.
pub(super) struct Chart<'a> {
    pub title: &'a str,
    pub places: &'a [String],
    pub series: &'a [Series<'a>],
    /// Ends of the upright axis.
    pub range: (f64, f64),
    /// What it measures.
    pub measure: &'a str,
    /// What the places are.
    pub across: &'a str,
    /// Bars from zero instead of lines.
    pub bars: bool,
}

/// Size of a chart's drawing area for so many places.
pub(super) fn chart_size(places: usize, bars: bool) -> (f64, f64) {
    let each = if bars { 72.0 } else { 34.0 };
    ((places as f64 * each).clamp(260.0, 1400.0), 240.0)
}

impl Chart<'_> {
    /// Draws it with the upper left corner of its area at a point.
    pub(super) fn draw(&self, figure: &mut Figure, (x, y): (f64, f64)) {
        let (width, height) = chart_size(self.places.len(), self.bars);
        let (low, high, step_up) = rounded(self.range);
        let span = high - low;
        let up = |value: f64| y + height * (1.0 - (value.clamp(low, high) - low) / span);
        let step = width / self.places.len().max(1) as f64;
        let at = |place: usize| x + step * (place as f64 + 0.5);
        figure.bold((x, y - 34.0), Anchor::Start, self.title);
        for i in 0..=(span / step_up).round() as usize {
            let value = low + step_up * i as f64;
            let line = up(value);
            figure.raw(&format!("<path d=\"M{x:.1} {line:.1}h{width:.1}\" stroke=\"#dddddd\"/>\n"));
            let digits = if step_up.fract() == 0.0 { 0 } else { 1 };
            figure.text((x - 6.0, line + 4.0), Anchor::End, &format!("{value:.digits$}"));
        }
        if low < 0.0 && high > 0.0 {
            figure.raw(&format!("<path d=\"M{x:.1} {:.1}h{width:.1}\" stroke=\"{GREY}\"/>\n", up(0.0)));
        }
        figure.turned((x - 44.0, y + height / 2.0), -90.0, Anchor::Middle, self.measure);
        for (i, name) in self.places.iter().enumerate() {
            let middle = at(i);
            figure.raw(&format!("<path d=\"M{middle:.1} {:.1}v5\" stroke=\"{GREY}\"/>\n", y + height));
            figure.turned((middle + 4.0, y + height + 16.0), -45.0, Anchor::End, name);
        }
        figure.text((x + width / 2.0, y + height + drop(self.places) + 26.0), Anchor::Middle, self.across);
        let mut key = x;
        for (s, series) in self.series.iter().enumerate() {
            let (colour, dash) = (COLOURS[s % COLOURS.len()], DASHES[s % DASHES.len()]);
            figure.raw(&if self.bars {
                format!(
                    "<rect x=\"{key:.1}\" y=\"{:.1}\" width=\"22\" height=\"10\" fill=\"{colour}\"/>\n",
                    y - 24.0
                )
            } else {
                format!(
                    "<path d=\"M{key:.1} {:.1}h26\" stroke=\"{colour}\" stroke-width=\"2\" \
                     stroke-dasharray=\"{dash}\"/>\n",
                    y - 18.0
                )
            });
            figure.text((key + 32.0, y - 14.0), Anchor::Start, series.name);
            key += 46.0 + 6.6 * series.name.chars().count() as f64;
            let label = |place: usize, point: &Point| {
                format!(
                    "{}, {}: {:.2}, 95 % interval {:.2} to {:.2}",
                    series.name, self.places[place], point.value, point.low, point.high
                )
            };
            let points = series.points.iter().enumerate().filter_map(|(i, point)| Some((i, point.as_ref()?)));
            if self.bars {
                let bar = (step * 0.8 / self.series.len() as f64).min(26.0);
                let first = -bar * (self.series.len() as f64 - 1.0) / 2.0;
                for (i, point) in points {
                    let middle = at(i) + first + bar * s as f64;
                    let (a, b) = (up(point.value.max(0.0)), up(point.value.min(0.0)));
                    let corner = (middle - bar * 0.45, a);
                    figure.rect(corner, (bar * 0.9, (b - a).max(0.5)), colour, &label(i, point));
                    figure.raw(&whisker(middle, up(point.low), up(point.high), "#888888"));
                }
                continue;
            }
            let path: Vec<String> =
                points.clone().map(|(i, point)| format!("{:.1} {:.1}", at(i), up(point.value))).collect();
            if path.len() > 1 {
                figure.raw(&format!(
                    "<path d=\"M{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" \
                     stroke-dasharray=\"{dash}\"/>\n",
                    path.join("L")
                ));
            }
            // Intervals side by side, so that none hides another.
            let shift = 3.0 * (s as f64 - (self.series.len() as f64 - 1.0) / 2.0);
            for (i, point) in points {
                figure.raw(&format!("<g><title>{}</title>", escape(&label(i, point))));
                figure.raw(&whisker(at(i) + shift, up(point.low), up(point.high), colour));
                figure.raw(&format!(
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.2\" fill=\"{colour}\"/></g>\n",
                    at(i),
                    up(point.value)
                ));
            }
        }
    }
}

/// Ends of an axis that hold a range, and the step of its numbers, which are round.
fn rounded((low, high): (f64, f64)) -> (f64, f64, f64) {
    let span = if high > low { high - low } else { 1.0 };
    let power = 10f64.powf((span / 4.0).log10().floor());
    let step =
        [1.0, 2.0, 2.5, 5.0, 10.0].iter().map(|s| s * power).find(|s| 5.0 * s >= span).unwrap_or(power);
    // Numbers have at most one digit behind the point.
    let step = step.max(0.1);
    let (first, last) = ((low / step).floor() * step, (high / step).ceil() * step);
    (first, if last > first { last } else { first + step }, step)
}

fn whisker(x: f64, low: f64, high: f64, colour: &str) -> String {
    format!(
        "<path d=\"M{x:.1} {low:.1}V{high:.1}M{a:.1} {low:.1}h4M{a:.1} {high:.1}h4\" stroke=\"{colour}\"/>",
        a = x - 2.0
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_end_at_their_colours_and_numbers_that_are_none_are_grey() {
        let scale = Scale::Sequential(0.0, 1.0);
        assert_eq!(scale.colour(Some(0.0)), "#440154");
        assert_eq!(scale.colour(Some(2.0)), "#fde725");
        assert_eq!(scale.colour(None), NOTHING);
        assert_eq!(scale.colour(Some(f64::NAN)), NOTHING);
        assert_eq!(Scale::Diverging(3.0).colour(Some(0.0)), "#f7f7f7");
        // A map that is the same everywhere.
        assert_eq!(Scale::Diverging(0.0).colour(Some(0.0)), "#f7f7f7");
    }

    #[test]
    fn axes_have_round_numbers_and_hold_their_range() {
        assert_eq!(rounded((0.0, 100.0)), (0.0, 100.0, 20.0));
        assert_eq!(rounded((-12.2, 9.6)), (-15.0, 10.0, 5.0));
        let (low, high, step) = rounded((0.0, 0.0));
        assert!(low < high && step > 0.0);
    }

    #[test]
    fn lines_are_broken_at_blanks() {
        let lines = Figure::wrap(200.0, &["one two three four five six seven".into()]);
        assert!(lines.len() > 1 && lines.iter().all(|line| line.len() <= 25), "{lines:?}");
        assert_eq!(lines.join(" "), "one two three four five six seven");
    }

    #[test]
    fn what_others_named_cannot_leave_its_text() {
        let mut figure = Figure::new(100.0, 100.0, "<script>", &["a & b".into()]);
        figure.text((0.0, 0.0), Anchor::Start, "\"</text>");
        let svg = figure.finish();
        assert!(!svg.contains("<script>") && svg.contains("&lt;script&gt;"));
        assert!(svg.contains("a &amp; b") && svg.contains("&quot;&lt;/text&gt;"));
    }
}
