//! What the HTML pages share: the document, its look, escaping, and words for what both explain.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

/// The look of every page.
const LOOK: &str = include_str!("page.css");

/// One HTML file that needs nothing else: no script, no font, no request.
///
/// Its content security policy allows pictures from `data:` URLs and the one style sheet, by its
/// hash; so nothing in `body` may have a `style` attribute. `title` and `made_by` are text, `css` has
/// the page's own rules, `skip` is the id and the name of what a keyboard may jump to, `body` is HTML.
pub(crate) fn document(title: &str, made_by: &str, css: &str, skip: (&str, &str), body: &str) -> String {
    let policy = policy(css);
    let css = [LOOK, css].concat();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"generator\" content=\"{made_by}\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta name=\"referrer\" content=\"no-referrer\">\n\
         <title>{title}</title>\n<style>{css}</style>\n</head>\n<body>\n\
         <a class=\"skip\" href=\"#{to}\">Skip to {name}</a>\n{body}\
         <footer><p>Made by radapt {version}. Nothing on this page is loaded from anywhere else.</p></footer>\n\
         </body>\n</html>\n",
        made_by = escape(made_by),
        title = escape(title),
        to = skip.0,
        name = escape(skip.1),
        version = env!("CARGO_PKG_VERSION"),
    )
}

/// The content security policy of a page with these rules of its own.
pub(crate) fn policy(css: &str) -> String {
    format!(
        "default-src 'none'; img-src data:; style-src 'sha256-{}'; base-uri 'none'; form-action 'none'",
        STANDARD.encode(Sha256::digest([LOOK, css].concat()))
    )
}

/// The threat model's name as code.
pub(crate) fn threat_code(kind: &str) -> String {
    format!("<code class=\"threat\">{}</code>", escape(kind))
}

/// The two parts of the defence, as a list.
pub(crate) const DEFENSE: &str = "<ul>\n\
    <li><b>GIF</b> softens the picture before the model sees it. Fine grain, where much of the nudging \
    sits, is taken out; shapes and colours stay.</li>\n\
    <li><b>FRA</b> mixes a fixed pattern, the anchor, into the model’s first attention step. It is the same \
    for every picture, so no attacker can move it, and what the picture contributes counts for less.</li>\n\
    </ul>\n";

/// Why a figure is nothing without its threat model, as a heading and a paragraph.
pub(crate) fn two_threats() -> String {
    format!(
        "<h3>Why two threat models?</h3>\n\
         <p>A defence nobody knows of is easily good. Against {transfer} pictures, crafted on the undefended \
         model, it is enough that the defended model is different. Against {adaptive} pictures the attacker has \
         everything: the model, the defence and its anchor. Both cases are real, a change made for one model and \
         spread to many, or an attacker with your very model in hand; but a figure of the one kind says nothing \
         about the other. So no figure here goes without its kind.</p>\n",
        transfer = threat_code("transfer"),
        adaptive = threat_code("adaptive"),
    )
}

/// The defence as a reader knows it.
pub(crate) fn undefended_or(defense: &str) -> &str {
    if defense == "none" { "undefended" } else { defense }
}

/// The text with an ellipsis for what is beyond `most` characters.
pub(crate) fn shorten(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

/// The text on one line, without characters that steer a terminal or turn the direction of writing.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\r' | '\t' => ' ',
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect()
}

/// The text as HTML, for contents and quoted attributes.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in printable(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// The text as HTML with the name of the defence on one line.
pub(crate) fn prose(text: &str) -> String {
    escape(text).replace("R-Adapt", "<span class=\"nowrap\">R-Adapt</span>")
}
