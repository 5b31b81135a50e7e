//! From tokens to text: whole characters, up to a stop text, and thoughts apart from the answer.

use std::collections::VecDeque;

use super::choose::Token;

/// Tokens on their way to a reader.
pub(super) struct Text {
    stops: Vec<Vec<u8>>,
    /// Bytes not yet handed out: part of a character, or of what may become a stop text.
    pending: Vec<u8>,
    /// How many bytes were handed out.
    out: usize,
    /// Tokens not yet handed out, with where each begins and ends.
    tokens: VecDeque<(Token, usize, usize)>,
}

/// What may be shown.
#[derive(Default)]
pub(super) struct Shown {
    pub text: String,
    pub tokens: Vec<Token>,
    /// Whether a stop text came.
    pub stopped: bool,
}

impl Text {
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().map(|stop| stop.clone().into_bytes()).collect();
        Self { stops, pending: Vec::new(), out: 0, tokens: VecDeque::new() }
    }

    pub fn push(&mut self, token: Token) -> Shown {
        let begin = self.out + self.pending.len();
        self.pending.extend(&token.bytes);
        self.tokens.push_back((token, begin, self.out + self.pending.len()));
        let found = self.stops.iter().filter_map(|stop| find(&self.pending, stop)).min();
        if let Some(at) = found {
            self.pending.truncate(at);
            let end = self.out + at;
            self.tokens.retain(|(_, begin, _)| *begin < end);
            return Shown { stopped: true, ..self.end() };
        }
        let stop = self.stops.iter().map(|stop| overlap(&self.pending, stop)).max().unwrap_or(0);
        self.take(stop.max(unfinished(&self.pending)))
    }

    /// What is left.
    pub fn end(&mut self) -> Shown {
        let mut shown = self.take(0);
        shown.tokens.extend(self.tokens.drain(..).map(|(token, ..)| token));
        shown
    }

    fn take(&mut self, held: usize) -> Shown {
        let bytes: Vec<u8> = self.pending.drain(..self.pending.len() - held).collect();
        self.out += bytes.len();
        let ready = self.tokens.iter().take_while(|(.., end)| *end <= self.out).count();
        let tokens = self.tokens.drain(..ready).map(|(token, ..)| token).collect();
        Shown { text: String::from_utf8_lossy(&bytes).into_owned(), tokens, stopped: false }
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len().max(1)).position(|window| window == what)
}

/// How long the longest end of `bytes` is that `what` begins with, short of all of it.
pub(super) fn overlap(bytes: &[u8], what: &[u8]) -> usize {
    let most = bytes.len().min(what.len().saturating_sub(1));
    (1..=most).rev().find(|&n| bytes.ends_with(&what[..n])).unwrap_or(0)
}

/// How many bytes at the end are the beginning of a character.
fn unfinished(bytes: &[u8]) -> usize {
    let tail = &bytes[bytes.len().saturating_sub(4)..];
    let lead = tail.iter().rposition(|byte| byte & 0b1100_0000 != 0b1000_0000);
    let Some(lead) = lead else { return 0 };
    let rest = &tail[lead..];
    match std::str::from_utf8(rest) {
        Err(error) if error.error_len().is_none() => rest.len(),
        _ => 0,
    }
}

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Parts an answer from the thoughts before it, and drops the white space each begins with.
pub(super) struct Thoughts {
    /// Whether this model thinks at all.
    watching: bool,
    inside: bool,
    pending: String,
    /// Whether something other than white space has come, of the answer and of the thoughts.
    begun: [bool; 2],
}

impl Thoughts {
    pub fn new(watching: bool, inside: bool) -> Self {
        Self { watching, inside: watching && inside, pending: String::new(), begun: [false; 2] }
    }

    /// The answer's text and the thoughts'.
    pub fn push(&mut self, text: &str, last: bool) -> (String, String) {
        let mut out = [String::new(), String::new()];
        self.pending.push_str(text);
        while self.watching {
            let tag = if self.inside { CLOSE } else { OPEN };
            let Some(at) = self.pending.find(tag) else { break };
            out[usize::from(self.inside)].push_str(&self.pending[..at]);
            self.pending.drain(..at + tag.len());
            self.inside = !self.inside;
        }
        let tag = if self.inside { CLOSE } else { OPEN };
        let held = if last || !self.watching { 0 } else { overlap(self.pending.as_bytes(), tag.as_bytes()) };
        let now: String = self.pending.drain(..self.pending.len() - held).collect();
        out[usize::from(self.inside)].push_str(&now);
        for (text, begun) in out.iter_mut().zip(&mut self.begun) {
            if !*begun {
                *text = text.trim_start().to_string();
                *begun = !text.is_empty();
            }
        }
        let [answer, thoughts] = out;
        (answer, thoughts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(bytes: &[u8]) -> Token {
        Token { id: 0, bytes: bytes.to_vec(), logprob: 0.0, top: Vec::new(), ends: false }
    }

    /// Pushes the parts; the text, the tokens' bytes and whether it stopped.
    fn run(stops: &[&str], parts: &[&[u8]]) -> (Vec<String>, usize, bool) {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let mut text = Text::new(&stops);
        let (mut shown, mut tokens) = (Vec::new(), 0);
        for part in parts {
            let step = text.push(token(part));
            tokens += step.tokens.len();
            shown.push(step.text);
            if step.stopped {
                return (shown, tokens, true);
            }
        }
        let rest = text.end();
        shown.push(rest.text);
        (shown, tokens + rest.tokens.len(), false)
    }

    #[test]
    fn characters_come_whole() {
        let (shown, tokens, _) =
            run(&[], &["a".as_bytes(), &[0xe2], &[0x82, 0xac], b"b", &[0xff], &[0xe2, 0x82]]);
        assert_eq!(shown, ["a", "", "€", "b", "\u{fffd}", "", "\u{fffd}"]);
        assert_eq!(tokens, 6);
    }

    #[test]
    fn a_stop_text_is_never_shown_in_part() {
        assert_eq!(
            run(&["END"], &[b"one E", b"N", b"X E", b"ND", b"more"]),
            (vec!["one ".into(), String::new(), "ENX ".into(), String::new()], 3, true)
        );
        // The earliest of several, and what only looked like one is given back at the end.
        assert_eq!(run(&["zz", "b"], &[b"abzz"]), (vec!["a".into()], 1, true));
        assert_eq!(run(&["abc"], &[b"ab"]), (vec![String::new(), "ab".into()], 1, false));
        // A token that lies wholly in the stop text is none of the answer's.
        assert_eq!(run(&["END"], &[b"a", b"E", b"ND"]).1, 1);
    }

    #[test]
    fn thoughts_are_told_apart() {
        let mut thoughts = Thoughts::new(true, false);
        let mut all = (String::new(), String::new());
        for (text, last) in [(" <th", false), ("ink>\n a", false), ("b</thi", false), ("nk>\n\nyes <", true)]
        {
            let (answer, thought) = thoughts.push(text, last);
            all.0.push_str(&answer);
            all.1.push_str(&thought);
        }
        assert_eq!(all, ("yes <".to_string(), "ab".to_string()));
        assert_eq!(Thoughts::new(true, true).push("so</think> no", true), ("no".into(), "so".into()));
        assert_eq!(Thoughts::new(false, true).push(" <think> no", true).0, "<think> no");
    }
}
