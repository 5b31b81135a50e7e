//! A response as words.

/// What stands before a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gap {
    /// White space, quotes or nothing that parts: the word goes on with the phrase.
    Space,
    /// A hyphen without spaces.
    Hyphen,
    /// A comma, or another mark within a sentence.
    Comma,
    /// The end of a sentence, a line, a bracket, or the response's start.
    Stop,
}

impl Gap {
    pub(super) fn parts(self) -> bool {
        matches!(self, Self::Comma | Self::Stop)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Token {
    /// In lower case, without diacritics.
    pub text: String,
    /// What stands before it.
    pub gap: Gap,
}

/// The letter in lower case without its diacritic; full-width letters as plain ones.
fn fold(c: char) -> char {
    let c = match c as u32 {
        code @ 0xFF01..=0xFF5E => char::from_u32(code - 0xFEE0).unwrap_or(c),
        0x3000 => ' ',
        _ => c,
    };
    let c = c.to_lowercase().next().unwrap_or(c);
    match c {
        'à'..='å' | 'ā' | 'ă' | 'ą' => 'a',
        'ç' | 'ć' | 'č' => 'c',
        'è'..='ë' | 'ē' | 'ė' | 'ę' | 'ě' => 'e',
        'ì'..='ï' | 'ī' | 'į' => 'i',
        'ñ' | 'ń' | 'ň' => 'n',
        'ò'..='ö' | 'ø' | 'ō' => 'o',
        'ù'..='ü' | 'ū' => 'u',
        'ý' | 'ÿ' => 'y',
        'š' | 'ś' => 's',
        'ž' | 'ź' | 'ż' => 'z',
        '’' | '‘' | 'ʼ' | '`' | '´' => '\'',
        '‐' | '‑' => '-',
        c => c,
    }
}

/// What a reasoning model thinks before it answers is not its answer.
fn without_thoughts(text: &str) -> &str {
    text.rfind("</think>").map_or(text, |at| &text[at + "</think>".len()..])
}

/// The words of a text. `isn't` becomes `is not`, `cannot` becomes `can not`, `cat's` becomes `cat`.
/// Letters of other scripts than the Latin part words and are dropped.
pub(super) fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = without_thoughts(text).chars().map(fold).collect();
    let word = |c: char| c.is_ascii_alphanumeric();
    let (mut all, mut gap, mut i) = (Vec::new(), Gap::Stop, 0);
    while i < chars.len() {
        if !word(chars[i]) {
            let inner = |at: usize| chars.get(at).is_some_and(|c| word(*c));
            let found = match chars[i] {
                '-' if i > 0 && word(chars[i - 1]) && inner(i + 1) => Gap::Hyphen,
                // Between digits: 1,000 and 3.5.
                ',' | '.' if i > 0 && chars[i - 1].is_ascii_digit() && inner(i + 1) => Gap::Space,
                ',' | '、' | '/' | '-' | '–' | '—' | '،' | ':' => Gap::Comma,
                '\n' | '.' | '!' | '?' | ';' | '(' | ')' | '[' | ']' | '。' | '｡' | '؟' | '…' | '·' => {
                    Gap::Stop
                }
                c if c.is_alphanumeric() => Gap::Stop,
                // White space, quotes, Markdown's stars.
                _ => Gap::Space,
            };
            // The strongest of what stands between two words counts.
            gap = match (gap, found) {
                (Gap::Stop, _) | (_, Gap::Stop) => Gap::Stop,
                (Gap::Comma, _) | (_, Gap::Comma) => Gap::Comma,
                (_, Gap::Hyphen) => Gap::Hyphen,
                (gap, _) => gap,
            };
            i += 1;
            continue;
        }
        let start = i;
        while i < chars.len()
            && (word(chars[i]) || chars[i] == '\'' && chars.get(i + 1).is_some_and(|c| word(*c)))
        {
            i += 1;
        }
        let text: String = chars[start..i].iter().collect();
        let mut push = |text: &str, gap| all.push(Token { text: text.replace('\'', ""), gap });
        if text == "cannot" {
            push("can", gap);
            push("not", Gap::Space);
        } else if let Some(verb) = text.strip_suffix("n't") {
            push(verb, gap);
            push("not", Gap::Space);
        } else {
            push(text.strip_suffix("'s").unwrap_or(&text), gap);
        }
        gap = Gap::Space;
    }
    all
}

/// The words of a name, with a space between them.
pub(super) fn plain(name: &str) -> String {
    tokens(name).into_iter().map(|token| token.text).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        tokens(text).into_iter().map(|token| token.text).collect()
    }

    #[test]
    fn words_are_folded_and_contractions_opened() {
        assert_eq!(
            words("It’s the CAT's “crêpe”, isn't it?"),
            ["it", "the", "cat", "crepe", "is", "not", "it"]
        );
        assert_eq!(words("I cannot; cats' 1,000 **dogs**"), ["i", "can", "not", "cats", "1", "000", "dogs"]);
        assert_eq!(words("这是ＣＡＴ。"), ["cat"]);
        assert_eq!(words("<think>a dog?</think> cat"), ["cat"]);
        assert!(words(" ... ").is_empty());
    }

    #[test]
    fn the_strongest_mark_counts() {
        let gaps: Vec<Gap> =
            tokens("a teddy-bear, - (red) - \"x\" y").iter().map(|token| token.gap).collect();
        assert_eq!(gaps, [Gap::Stop, Gap::Space, Gap::Hyphen, Gap::Stop, Gap::Stop, Gap::Space]);
    }
}
