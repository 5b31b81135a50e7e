//! Figures along one parameter of the defence: the paper's Fig. 7 and Tables 7 and 8.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Row, Summary};
use crate::attack::{Threat, ThreatKind};
use crate::page::escape;
use crate::{Error, Result};

/// What a sweep varies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Parameter {
    /// The anchor's factor.
    Alpha,
    /// The attention output's factor.
    Beta,
    /// GIF's cutoff D0.
    Cutoff,
    /// Pictures the anchor is trained on.
    Pictures,
    /// Epochs it is trained for.
    Epochs,
}

impl Parameter {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Alpha, Self::Beta, Self::Cutoff, Self::Pictures, Self::Epochs];

    /// Whether each of its values needs a training of its own.
    pub fn trains(self) -> bool {
        matches!(self, Self::Pictures | Self::Epochs)
    }

    /// What is written along its axis.
    fn axis(self) -> &'static str {
        match self {
            Self::Alpha => "alpha, the anchor's factor",
            Self::Beta => "beta, the attention output's factor",
            Self::Cutoff => "cutoff D0, in frequency bins",
            Self::Pictures => "pictures the anchor is trained on",
            Self::Epochs => "epochs the anchor is trained for",
        }
    }
}

impl fmt::Display for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Alpha => "alpha",
            Self::Beta => "beta",
            Self::Cutoff => "cutoff",
            Self::Pictures => "pictures",
            Self::Epochs => "epochs",
        })
    }
}

/// A setting of the defence that is scored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The anchor's factor.
    pub alpha: f64,
    /// The attention output's factor.
    pub beta: f64,
    /// GIF's cutoff D0, in frequency bins.
    pub cutoff: f64,
    /// Pictures its anchor is trained on, where it is trained here.
    pub pictures: Option<u64>,
    /// Epochs its anchor is trained for, where it is trained here.
    pub epochs: Option<u64>,
}

impl Point {
    /// The value of a parameter; `None` where it has none.
    pub fn value(&self, parameter: Parameter) -> Option<f64> {
        match parameter {
            Parameter::Alpha => Some(self.alpha),
            Parameter::Beta => Some(self.beta),
            Parameter::Cutoff => Some(self.cutoff),
            Parameter::Pictures => self.pictures.map(|n| n as f64),
            Parameter::Epochs => self.epochs.map(|n| n as f64),
        }
    }

    /// The same with another value of a parameter. `follow` lets beta follow alpha: max(1 - alpha,
    /// 0).
    ///
    /// # Errors
    /// If the value is none that the parameter can have.
    pub fn with(&self, parameter: Parameter, value: f64, follow: bool) -> Result<Self> {
        let mut point = self.clone();
        let wrong = |expected: &str| Error::argument(format!("--{parameter}"), expected, value);
        let count = || match value {
            v if v >= 1.0 && v.fract() == 0.0 && v <= 1e9 => Ok(v as u64),
            _ => Err(wrong("a number from 1")),
        };
        match parameter {
            Parameter::Pictures => point.pictures = Some(count()?),
            Parameter::Epochs => point.epochs = Some(count()?),
            Parameter::Cutoff if !(value.is_finite() && value > 0.0) => {
                return Err(wrong("a positive number of bins"));
            }
            Parameter::Cutoff => point.cutoff = value,
            _ if !(value as f32).is_finite() => return Err(wrong("a finite number")),
            Parameter::Beta => point.beta = value,
            Parameter::Alpha => {
                point.alpha = value;
                if follow {
                    // 1 - 0.8 is 0.19999999999999996.
                    point.beta = ((1.0 - value).max(0.0) * 1e12).round() / 1e12;
                }
            }
        }
        Ok(point)
    }

    /// Its name in figures and files: `alpha 0.8, beta 0.2, cutoff 40, pictures 2000, epochs 10`.
    pub fn name(&self) -> String {
        let mut name = format!("alpha {}, beta {}, cutoff {}", self.alpha, self.beta, self.cutoff);
        if let Some(n) = self.pictures {
            name += &format!(", pictures {n}");
        }
        if let Some(n) = self.epochs {
            name += &format!(", epochs {n}");
        }
        name
    }
}

/// The values a parameter takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Axis {
    /// Which.
    pub parameter: Parameter,
    /// In the order they are drawn.
    pub values: Vec<f64>,
}

/// What is to be scored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sweep {
    /// Where every parameter stands that is not varied.
    pub base: Point,
    /// What is varied.
    pub axes: Vec<Axis>,
    /// Every combination instead of one axis at a time.
    pub grid: bool,
    /// Along alpha, beta is max(1 - alpha, 0), the paper's rule.
    pub follow: bool,
}

impl Sweep {
    /// Its settings, each once, the base first where it is one of them.
    ///
    /// # Errors
    /// If there is nothing to vary, a parameter comes twice, or a value is none it can have.
    pub fn points(&self) -> Result<Vec<Point>> {
        if self.axes.iter().all(|axis| axis.values.is_empty()) {
            return Err(Error::argument("sweep", "values of a parameter, such as --alphas 0.4,0.8", "none"));
        }
        let follow = self.follow;
        let mut points: Vec<Point> = Vec::new();
        if self.grid {
            points.push(self.base.clone());
            for axis in &self.axes {
                let mut next = Vec::new();
                for point in &points {
                    for &value in &axis.values {
                        next.push(point.with(axis.parameter, value, follow)?);
                    }
                }
                points = next;
            }
        } else {
            for axis in &self.axes {
                for &value in &axis.values {
                    points.push(self.base.with(axis.parameter, value, follow)?);
                }
            }
        }
        let mut unique: Vec<Point> = Vec::new();
        for point in points {
            if !unique.contains(&point) {
                unique.push(point);
            }
        }
        Ok(unique)
    }
}

/// A sweep that has been scored.
#[derive(Debug, Clone)]
pub struct Scored {
    /// What was varied.
    pub sweep: Sweep,
    /// The figures; a row's defence is [`Point::name`], or `none`.
    pub summary: Summary,
}

/// The figures of one setting under one attack.
struct Line<'a> {
    point: &'a Point,
    clean: Option<&'a Row>,
    transfer: Option<&'a Row>,
    adaptive: Option<&'a Row>,
}

impl Scored {
    /// The attacks by name and eps, in the rows' order.
    fn attacks(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for attacked in self.summary.rows.iter().filter_map(|row| row.attacked.as_ref()) {
            let eps = attacked.eps.map(|eps| eps.to_string()).unwrap_or_default();
            let attack = (attacked.attack.clone(), eps);
            if !found.contains(&attack) {
                found.push(attack);
            }
        }
        found
    }

    fn row(&self, defense: &str, attack: Option<(&(String, String), ThreatKind)>) -> Option<&Row> {
        self.summary.rows.iter().find(|row| {
            row.defense == defense
                && match (&row.attacked, attack) {
                    (None, None) => true,
                    (Some(a), Some(((name, eps), kind))) => {
                        a.attack == *name
                            && a.eps.map(|eps| eps.to_string()).unwrap_or_default() == *eps
                            && a.threat.kind() == kind
                    }
                    _ => false,
                }
        })
    }

    fn lines<'a>(&'a self, points: &'a [Point], attack: &(String, String)) -> Vec<Line<'a>> {
        let line = |point: &'a Point| {
            let name = point.name();
            Line {
                point,
                clean: self.row(&name, None),
                transfer: self.row(&name, Some((attack, ThreatKind::Transfer))),
                adaptive: self.row(&name, Some((attack, ThreatKind::Adaptive))),
            }
        };
        points.iter().map(line).collect()
    }

    /// The figures as CSV, one line per figure, each attacked one with its threat model.
    ///
    /// # Errors
    /// As [`Sweep::points`].
    pub fn csv(&self) -> Result<String> {
        let failed = |e: &dyn fmt::Display| Error::config("CSV", e.to_string());
        let mut out = csv::Writer::from_writer(Vec::new());
        out.write_record([
            "defense",
            "alpha",
            "beta",
            "cutoff",
            "pictures",
            "epochs",
            "attack",
            "eps",
            "threat",
            "surrogate",
            "n",
            "correct",
            "value",
            "low",
            "high",
        ])
        .map_err(|e| failed(&e))?;
        let points = self.sweep.points()?;
        for row in &self.summary.rows {
            let point = points.iter().find(|point| point.name() == row.defense);
            let of = |parameter| {
                point.and_then(|point| point.value(parameter)).map(|v| v.to_string()).unwrap_or_default()
            };
            let (low, high) = row.interval();
            let a = row.attacked.as_ref();
            let surrogate = a.and_then(|a| match &a.threat {
                Threat::Transfer { surrogate } => Some(surrogate.clone()),
                Threat::Adaptive => None,
            });
            out.write_record([
                row.defense.clone(),
                of(Parameter::Alpha),
                of(Parameter::Beta),
                of(Parameter::Cutoff),
                of(Parameter::Pictures),
                of(Parameter::Epochs),
                a.map(|a| a.attack.clone()).unwrap_or_default(),
                a.and_then(|a| a.eps).map(|eps| eps.to_string()).unwrap_or_default(),
                a.map(|a| a.threat.kind().to_string()).unwrap_or_default(),
                surrogate.unwrap_or_default(),
                row.n.to_string(),
                row.correct.to_string(),
                row.value().to_string(),
                low.to_string(),
                high.to_string(),
            ])
            .map_err(|e| failed(&e))?;
        }
        let bytes = out.into_inner().map_err(|e| failed(&e))?;
        String::from_utf8(bytes).map_err(|e| failed(&e))
    }

    /// A table per attack in Markdown, a line per setting.
    ///
    /// # Errors
    /// As [`Sweep::points`].
    pub fn markdown(&self) -> Result<String> {
        let points = self.sweep.points()?;
        let shown: Vec<Parameter> = Parameter::ALL
            .into_iter()
            .filter(|parameter| {
                self.base().value(*parameter).is_some()
                    || points.iter().any(|p| p.value(*parameter).is_some())
            })
            .collect();
        let figure = |row: Option<&Row>| {
            row.map_or("-".to_string(), |row| {
                let (low, high) = row.interval();
                format!("{:.1} ({low:.1} to {high:.1})", row.value())
            })
        };
        let mut text = String::new();
        for attack in self.attacks() {
            let (name, eps) = &attack;
            let n = self.summary.rows.iter().map(|row| row.n).max().unwrap_or(0);
            let model = self.summary.run.pointer("/model/name").and_then(|name| name.as_str()).unwrap_or("-");
            let surrogates = self.surrogates();
            text += &format!(
                "Percent of {} right, with 95 % intervals; {model}, {}, n = {n}; transfer pictures crafted on \
                 {surrogates}.\n\n|",
                self.summary.rows.first().map_or("-", |row| row.dataset.as_str()),
                at_eps(name, eps)
            );
            for parameter in &shown {
                text += &format!(" {parameter} |");
            }
            text += " clean | attacked (transfer) | attacked (adaptive) |\n|";
            text += &"---|".repeat(shown.len() + 3);
            text.push('\n');
            let none = self.row("none", None).is_some();
            if none {
                text.push('|');
                for (i, _) in shown.iter().enumerate() {
                    text += if i == 0 { " undefended |" } else { " |" };
                }
                let of = |kind| figure(self.row("none", Some((&attack, kind))));
                text += &format!(
                    " {} | {} | {} |\n",
                    figure(self.row("none", None)),
                    of(ThreatKind::Transfer),
                    of(ThreatKind::Adaptive)
                );
            }
            for line in self.lines(&points, &attack) {
                text.push('|');
                for parameter in &shown {
                    text +=
                        &line.point.value(*parameter).map_or(" - |".into(), |value| format!(" {value} |"));
                }
                let (clean, transfer, adaptive) =
                    (figure(line.clean), figure(line.transfer), figure(line.adaptive));
                text += &format!(" {clean} | {transfer} | {adaptive} |\n");
            }
            text.push('\n');
        }
        Ok(text)
    }

    /// The models that transfer pictures were crafted on.
    fn surrogates(&self) -> String {
        let mut found: Vec<&str> = Vec::new();
        for row in &self.summary.rows {
            if let Some(Threat::Transfer { surrogate }) = row.attacked.as_ref().map(|a| &a.threat)
                && !found.contains(&surrogate.as_str())
            {
                found.push(surrogate);
            }
        }
        if found.is_empty() { "nothing".into() } else { found.join(", ") }
    }

    fn base(&self) -> &Point {
        &self.sweep.base
    }

    /// A plot per varied parameter and attack: its file name and SVG. The other parameters stand at the
    /// base, or in a grid without it at their first value.
    ///
    /// # Errors
    /// As [`Sweep::points`].
    pub fn plots(&self) -> Result<Vec<(String, String)>> {
        let all = self.sweep.points()?;
        let follow = self.sweep.follow;
        // In a grid without the base the others stand at their first value.
        let mut base = self.base().clone();
        if self.sweep.grid {
            for axis in &self.sweep.axes {
                let value = base.value(axis.parameter);
                if let Some(&first) = axis.values.first()
                    && !axis.values.iter().any(|v| Some(*v) == value)
                {
                    base = base.with(axis.parameter, first, follow)?;
                }
            }
        }
        let mut found = Vec::new();
        for axis in &self.sweep.axes {
            let mut points = Vec::new();
            for &value in &axis.values {
                let point = base.with(axis.parameter, value, follow)?;
                if all.contains(&point) {
                    points.push(point);
                }
            }
            let at = |point: &Point| point.value(axis.parameter).unwrap_or(0.0);
            points.sort_by(|a, b| at(a).total_cmp(&at(b)));
            for attack in self.attacks() {
                let lines = self.lines(&points, &attack);
                let (name, eps) = &attack;
                let file = format!("{}-{name}-{}.svg", axis.parameter, eps.replace('/', "of"));
                let file = file.replace(|c: char| !c.is_ascii_alphanumeric() && !"-.".contains(c), "_");
                found.push((file, plot(axis.parameter, &lines, name, eps)));
            }
        }
        Ok(found)
    }
}

/// An attack with its radius, where it has one.
fn at_eps(attack: &str, eps: &str) -> String {
    if eps.is_empty() { attack.to_string() } else { format!("{attack} at eps {eps}") }
}

const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 320.0;
/// The drawing area: left, top, right, bottom.
const AREA: [f64; 4] = [56.0, 46.0, 464.0, 262.0];

/// Percent right along a parameter: clean, and under each threat model.
fn plot(parameter: Parameter, lines: &[Line], attack: &str, eps: &str) -> String {
    let [left, top, right, bottom] = AREA;
    let values: Vec<f64> = lines.iter().filter_map(|line| line.point.value(parameter)).collect();
    let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(a, b), &v| (a.min(v), b.max(v)));
    // Numbers of pictures and epochs multiply from one to the next, the others add.
    let scale = |value: f64| if parameter.trains() { value.max(1e-9).ln() } else { value };
    let span = if most > least { scale(most) - scale(least) } else { 1.0 };
    let x = |value: f64| left + 14.0 + (right - left - 28.0) * (scale(value) - scale(least)) / span;
    let y = |percent: f64| bottom - (bottom - top) * percent / 100.0;
    let title = format!("{}: percent right by {parameter}", at_eps(attack, eps));
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\">\n<title>{}</title>\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n",
        escape(&title)
    );
    for percent in [0, 25, 50, 75, 100] {
        let at = y(f64::from(percent));
        out += &format!(
            "<path d=\"M{left} {at:.1}H{right}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#444\">{percent} %</text>\n",
            left - 6.0,
            at + 4.0
        );
    }
    for &value in &values {
        out += &format!(
            "<path d=\"M{at:.1} {bottom}v5\" stroke=\"#444\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#444\">{value}</text>\n",
            bottom + 19.0,
            at = x(value)
        );
    }
    out += &format!(
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#444\">{}</text>\n",
        (left + right) / 2.0,
        HEIGHT - 14.0,
        escape(parameter.axis())
    );
    type Pick = for<'a, 'b> fn(&'a Line<'b>) -> Option<&'b Row>;
    let series: [(&str, &str, &str, Pick); 3] = [
        ("clean", "#222", "none", |line| line.clean),
        ("attacked (transfer)", "#0067a5", "7 3", |line| line.transfer),
        ("attacked (adaptive)", "#c04a00", "2 3", |line| line.adaptive),
    ];
    let mut key = left;
    for (label, colour, dash, pick) in series {
        let points: Vec<(f64, &Row)> =
            lines.iter().filter_map(|line| Some((line.point.value(parameter)?, pick(line)?))).collect();
        if points.is_empty() {
            continue;
        }
        out += &format!(
            "<path d=\"M{key:.1} 24h26\" stroke=\"{colour}\" stroke-width=\"2\" stroke-dasharray=\"{dash}\"/>\
             <text x=\"{:.1}\" y=\"28\" fill=\"#222\">{label}</text>\n",
            key + 32.0
        );
        key += 44.0 + 7.0 * label.len() as f64;
        let path: Vec<String> =
            points.iter().map(|(value, row)| format!("{:.1} {:.1}", x(*value), y(row.value()))).collect();
        out += &format!(
            "<path d=\"M{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" stroke-dasharray=\"{dash}\"/>\n",
            path.join("L")
        );
        for (value, row) in points {
            let (low, high) = row.interval();
            out += &format!(
                "<g stroke=\"{colour}\"><title>{label}, {parameter} {value}: {:.1} %, n = {}</title>\
                 <path d=\"M{at:.1} {:.1}V{:.1}\"/><circle cx=\"{at:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{colour}\"/></g>\n",
                row.value(),
                row.n,
                y(low),
                y(high),
                y(row.value()),
                at = x(value)
            );
        }
    }
    out + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Point {
        Point { alpha: 0.8, beta: 0.2, cutoff: 40.0, pictures: Some(2000), epochs: Some(10) }
    }

    fn sweep(axes: &[(Parameter, &[f64])], grid: bool) -> Sweep {
        let axes =
            axes.iter().map(|(parameter, values)| Axis { parameter: *parameter, values: values.to_vec() });
        let follow = !axes.clone().any(|axis| axis.parameter == Parameter::Beta);
        Sweep { base: base(), axes: axes.collect(), grid, follow }
    }

    #[test]
    fn beta_follows_alpha_by_the_papers_rule_unless_it_is_varied_itself() {
        let alone = sweep(&[(Parameter::Alpha, &[0.4, 0.8, 1.2])], false).points().unwrap();
        let mixes: Vec<(f64, f64)> = alone.iter().map(|p| (p.alpha, p.beta)).collect();
        assert_eq!(mixes, [(0.4, 0.6), (0.8, 0.2), (1.2, 0.0)]);
        let both = sweep(&[(Parameter::Alpha, &[0.4]), (Parameter::Beta, &[0.1])], false).points().unwrap();
        assert_eq!((both[0].alpha, both[0].beta), (0.4, 0.2));
    }

    #[test]
    fn one_axis_at_a_time_or_a_grid_each_setting_once() {
        let axes: [(Parameter, &[f64]); 2] =
            [(Parameter::Cutoff, &[20.0, 40.0]), (Parameter::Epochs, &[1.0, 10.0])];
        let cross = sweep(&axes, false).points().unwrap();
        assert_eq!(cross.len(), 3, "the base is in both axes");
        assert_eq!(sweep(&axes, true).points().unwrap().len(), 4);
        assert!(sweep(&[], false).points().is_err());
        for (parameter, value) in [
            (Parameter::Cutoff, 0.0),
            (Parameter::Epochs, 0.5),
            (Parameter::Pictures, 0.0),
            (Parameter::Alpha, f64::NAN),
        ] {
            assert!(sweep(&[(parameter, &[value])], false).points().is_err(), "{parameter} {value}");
        }
    }
}
