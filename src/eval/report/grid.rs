//! A table of any content, the same in Markdown, HTML and JSON.

use serde_json::{Map, Value, json};

use super::markdown::text;
use crate::page::{escape, threat_code};

/// A table with what is to be known of it, and drawings.
#[derive(Debug, Default)]
pub(super) struct Grid {
    /// Its heading, as text.
    pub title: String,
    /// Paragraphs before it.
    pub lead: Vec<String>,
    /// Its columns: a name, and whether it holds numbers.
    pub heads: Vec<(String, bool)>,
    pub groups: Vec<Group>,
    /// Paragraphs after it.
    pub foot: Vec<String>,
    pub drawings: Vec<Drawing>,
}

/// Lines under one heading, or under none.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub title: Option<String>,
    pub lines: Vec<GridLine>,
}

/// A line of a table.
#[derive(Debug, Default)]
pub(super) struct GridLine {
    /// Whether these are the paper's figures, which look different from ours.
    pub is_paper: bool,
    pub cells: Vec<Cell>,
}

/// A cell: a line of text and a smaller one below it.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Cell {
    pub text: String,
    pub under: String,
    /// The number in it, where it is one.
    pub value: Option<f64>,
    /// Whether the text is a threat model's name.
    pub is_threat: bool,
}

/// A picture that was drawn by another command.
#[derive(Debug, Clone)]
pub(super) struct Drawing {
    /// What is on it, for readers who do not see it.
    pub title: String,
    /// Its file.
    pub path: std::path::PathBuf,
    /// SVG, shown as a picture: nothing in it can run or load.
    pub svg: Vec<u8>,
}

impl Cell {
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::default() }
    }

    pub fn dash() -> Self {
        Self::new("–")
    }

    pub fn under(mut self, under: impl Into<String>) -> Self {
        self.under = under.into();
        self
    }

    /// A number with so many digits behind the point.
    pub fn number(value: f64, digits: usize) -> Self {
        if !value.is_finite() {
            return Self::dash();
        }
        Self { value: Some(value), ..Self::new(format!("{value:.digits$}")) }
    }

    /// A number with its interval.
    pub fn interval(value: f64, (low, high): (f64, f64), digits: usize) -> Self {
        Self::number(value, digits).under(format!("({low:.digits$} to {high:.digits$})"))
    }

    /// A threat model's name; a dash for none.
    pub fn threat(name: Option<&str>) -> Self {
        name.map_or_else(Self::dash, |name| Self { is_threat: true, ..Self::new(name) })
    }
}

impl GridLine {
    pub fn new(cells: Vec<Cell>) -> Self {
        Self { is_paper: false, cells }
    }
}

impl Grid {
    /// One group without a heading.
    pub fn simple(title: impl Into<String>, heads: &[(&str, bool)], lines: Vec<Vec<Cell>>) -> Self {
        let lines = lines.into_iter().map(GridLine::new).collect();
        Self {
            title: title.into(),
            heads: heads.iter().map(|(name, number)| ((*name).to_owned(), *number)).collect(),
            groups: vec![Group { title: None, lines }],
            ..Self::default()
        }
    }

    pub fn markdown(&self, level: &str) -> String {
        let mut out = format!("\n{level} {}\n\n", text(&self.title));
        self.lead.iter().for_each(|words| out += &format!("{}\n\n", text(words)));
        let heads: Vec<String> = self.heads.iter().map(|(name, _)| text(name)).collect();
        let rules: Vec<&str> =
            self.heads.iter().map(|(_, number)| if *number { "---:" } else { "---" }).collect();
        if !self.groups.is_empty() {
            out += &format!("| {} |\n| {} |\n", heads.join(" | "), rules.join(" | "));
        }
        for group in &self.groups {
            if let Some(title) = &group.title {
                let rest = " |".repeat(self.heads.len().saturating_sub(1));
                out += &format!("| **{}** |{rest}\n", text(title));
            }
            for line in &group.lines {
                let cells: Vec<String> = line.cells.iter().map(Cell::markdown).collect();
                out += &format!("| {} |\n", cells.join(" | "));
            }
        }
        self.foot.iter().for_each(|words| out += &format!("\n{}\n", text(words)));
        for drawing in &self.drawings {
            out += &format!("\n{}: {}\n", text(&drawing.title), text(&drawing.path.display().to_string()));
        }
        out
    }

    /// A section with this id. `tag` is the heading's.
    pub fn html(&self, id: &str, tag: &str) -> String {
        let number = " class=\"number\"";
        let head: String = self
            .heads
            .iter()
            .map(|(name, is)| {
                format!("<th scope=\"col\"{}>{}</th>", if *is { number } else { "" }, escape(name))
            })
            .collect();
        let mut body = String::new();
        for group in &self.groups {
            body += "<tbody>\n";
            if let Some(title) = &group.title {
                body += &format!(
                    "<tr><th class=\"task\" colspan=\"{}\" scope=\"rowgroup\"><span>{}</span></th></tr>\n",
                    self.heads.len(),
                    escape(title)
                );
            }
            for line in &group.lines {
                body += if line.is_paper { "<tr class=\"paper\">" } else { "<tr>" };
                for (i, (cell, (_, is))) in line.cells.iter().zip(&self.heads).enumerate() {
                    let inner = cell.html();
                    body += &match (i, is) {
                        (0, _) => format!("<th scope=\"row\">{inner}</th>"),
                        (_, true) => format!("<td{number}>{inner}</td>"),
                        _ => format!("<td>{inner}</td>"),
                    };
                }
                body += "</tr>\n";
            }
            body += "</tbody>\n";
        }
        let words = |all: &[String]| -> String {
            all.iter().map(|words| format!("<p class=\"soft\">{}</p>\n", escape(words))).collect()
        };
        let title = escape(&self.title);
        let table = if self.groups.is_empty() {
            String::new()
        } else {
            format!(
                "<div class=\"scroll figures grid\" role=\"region\" aria-label=\"{title}\" tabindex=\"0\">\n<table>\n\
                 <thead><tr>{head}</tr></thead>\n{body}</table>\n</div>\n"
            )
        };
        let drawings: String = self.drawings.iter().map(Drawing::html).collect();
        let drawings = match self.drawings.len() {
            0 | 1 => drawings,
            _ => format!("<div class=\"plots\">\n{drawings}</div>\n"),
        };
        format!(
            "<section aria-labelledby=\"{id}\">\n<{tag} id=\"{id}\">{title}</{tag}>\n{}{drawings}{table}{}</section>\n",
            words(&self.lead),
            words(&self.foot),
        )
    }

    /// `{title, notes, columns, lines}`; of each line `group`, `source` and `cells`, a number where
    /// a cell is one and has nothing below it, else `{text, under, value}`.
    pub fn json(&self) -> Value {
        let mut lines = Vec::new();
        for group in &self.groups {
            for line in &group.lines {
                let cells: Map<String, Value> = self
                    .heads
                    .iter()
                    .zip(&line.cells)
                    .map(|((name, _), cell)| (name.clone(), cell.json()))
                    .collect();
                let source = if line.is_paper { "paper" } else { "ours" };
                lines.push(json!({ "group": group.title, "source": source, "cells": cells }));
            }
        }
        let notes: Vec<&String> = self.lead.iter().chain(&self.foot).collect();
        let columns: Vec<&String> = self.heads.iter().map(|(name, _)| name).collect();
        json!({ "title": self.title, "notes": notes, "columns": columns, "lines": lines })
    }
}

impl Cell {
    fn markdown(&self) -> String {
        match (self.text.is_empty(), self.under.is_empty()) {
            (_, true) => text(&self.text),
            (true, false) => text(&self.under),
            _ if self.under.starts_with('(') => format!("{} {}", text(&self.text), text(&self.under)),
            _ => format!("{}; {}", text(&self.text), text(&self.under)),
        }
    }

    fn html(&self) -> String {
        let inner = if self.is_threat {
            threat_code(&self.text)
        } else if self.text == "–" {
            "<span class=\"soft\">–</span>".into()
        } else {
            escape(&self.text)
        };
        if self.under.is_empty() {
            return inner;
        }
        format!("{inner}<span class=\"under\">{}</span>", escape(&self.under))
    }

    fn json(&self) -> Value {
        match (self.value, self.under.is_empty()) {
            (Some(value), true) => value.into(),
            (None, true) => self.text.clone().into(),
            (value, false) => json!({ "text": self.text, "under": self.under, "value": value }),
        }
    }
}

impl Drawing {
    fn html(&self) -> String {
        use base64::Engine;
        let data = base64::engine::general_purpose::STANDARD.encode(&self.svg);
        // Without a width of its own a drawing would be as wide as the page.
        let tag = self.svg.split(|&byte| byte == b'>').next().unwrap_or_default();
        let small = if tag.windows(7).any(|part| part == b" width=") { "" } else { " small" };
        format!(
            "<figure class=\"card drawing{small}\">\n<div class=\"scroll\" role=\"region\" aria-label=\"{title}\" tabindex=\"0\">\
             <img alt=\"{title}\" src=\"data:image/svg+xml;base64,{data}\"></div>\n\
             <figcaption>{title}</figcaption>\n</figure>\n",
            title = escape(&self.title),
        )
    }
}
