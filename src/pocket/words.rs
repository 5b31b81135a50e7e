//! What is said about a scene.

use super::{Dice, KINDS, Kind, Question};

/// A scene's sentences.
pub(super) struct Words {
    pub caption: String,
    pub target_caption: String,
    pub questions: [Question; 3],
    pub more: Vec<Question>,
}

/// `a` or `an` before a word of this vocabulary.
pub(super) fn article(word: &str) -> &'static str {
    if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" }
}

fn sentence(words: &str) -> String {
    let mut chars = words.chars();
    chars.next().map(|c| c.to_uppercase().chain(chars).chain(['.']).collect()).unwrap_or_default()
}

fn caption(kind: usize, color: &str, place: &str) -> String {
    let Kind { article: own, name, .. } = KINDS[kind];
    // The colour comes last before the noun: "a pair of red scissors".
    let start = if own.len() > 2 { own } else { article(color) };
    sentence(&format!("{start} {color} {name} {place}"))
}

impl Words {
    pub(super) fn new(dice: &mut Dice, kind: usize, target: usize, color: &str, place: &str) -> Self {
        let own = &KINDS[kind];
        let category = own.category;
        let answer = sentence(&format!("{} {}", own.article, own.name));
        let ask = |question: String, answer: &str| Question { question, answer: answer.to_owned() };

        let what = *dice.pick(&[
            "What is the main object in the image?",
            "What is in the image?",
            "What is shown in the picture?",
            "What object do you see?",
        ]);
        let which = match dice.below(4) {
            0 => format!("What is the {color} thing {place}?"),
            1 => format!("Which item in the image is {color}?"),
            2 => format!("What is {place}?"),
            _ => format!("What is the {color} object?"),
        };
        let sort = match dice.below(3) {
            0 => format!("What kind of {category} is in the image?"),
            1 => format!("Which {category} is visible in the picture?"),
            _ => format!("Which {category} is it?"),
        };

        let colors = ["red", "orange", "yellow", "green", "blue", "white", "gray", "brown", "black"];
        let color_word = sentence(color);
        let mut more = vec![
            ask(
                (*dice.pick(&["What color is it?", "Which color does the object have?"])).to_owned(),
                &color_word,
            ),
            ask((*dice.pick(&["Where is it?", "Where is the object?"])).to_owned(), &sentence(place)),
        ];
        let present = dice.chance(0.5);
        let asked = if present {
            kind
        } else if dice.chance(0.5) {
            target
        } else {
            (kind + 1 + dice.below(KINDS.len() - 1)) % KINDS.len()
        };
        let yes = if present { "Yes." } else { "No." };
        let asked = &KINDS[asked];
        more.push(ask(format!("Is there {} {} in the image?", asked.article, asked.name), yes));

        let others: Vec<_> = KINDS.iter().map(|k| k.category).filter(|c| *c != category).collect();
        let other = *dice.pick(&others);
        let (a, b) = if dice.chance(0.5) { (category, other) } else { (other, category) };
        let answer_category = sentence(&format!("{} {category}", article(category)));
        more.push(ask(format!("Is it {} {a} or {} {b}?", article(a), article(b)), &answer_category));

        let mut second = *dice.pick(&colors);
        if second == color {
            second = "purple";
        }
        let (a, b) = if dice.chance(0.5) { (color, second) } else { (second, color) };
        more.push(ask(format!("Is it {a} or {b}?"), &color_word));
        let (a, b) = if dice.chance(0.5) { (kind, target) } else { (target, kind) };
        let (a, b) = (&KINDS[a], &KINDS[b]);
        more.push(ask(format!("Is it {} {} or {} {}?", a.article, a.name, b.article, b.name), &answer));

        Self {
            caption: caption(kind, color, place),
            target_caption: caption(target, color, place),
            questions: [ask(what.to_owned(), &answer), ask(which, &answer), ask(sort, &answer)],
            more,
        }
    }
}
