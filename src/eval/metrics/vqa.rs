//! VQAv2's accuracy, as the official vqaEval computes it.

/// The official's contractions that are not the word with its apostrophes left out.
const CONTRACTIONS: &[(&str, &str)] = &[
    ("couldn'tve", "couldn't've"),
    ("couldnt've", "couldn't've"),
    ("hadnt've", "hadn't've"),
    ("hadn'tve", "hadn't've"),
    ("hed've", "he'd've"),
    ("he'dve", "he'd've"),
    ("itd've", "it'd've"),
    ("it'dve", "it'd've"),
    ("mightnt've", "mightn't've"),
    ("mightn'tve", "mightn't've"),
    ("ow's'at", "'ow's'at"),
    ("'ows'at", "'ow's'at"),
    ("'ow'sat", "'ow's'at"),
    ("shed've", "she'd've"),
    ("she'dve", "she'd've"),
    ("shouldnt've", "shouldn't've"),
    ("shouldn'tve", "shouldn't've"),
    ("somebody'd", "somebodyd"),
    ("somebodyd've", "somebody'd've"),
    ("somebody'dve", "somebody'd've"),
    ("someoned've", "someone'd've"),
    ("someone'dve", "someone'd've"),
    ("somethingd've", "something'd've"),
    ("something'dve", "something'd've"),
    ("thered've", "there'd've"),
    ("there'dve", "there'd've"),
    ("theyd've", "they'd've"),
    ("they'dve", "they'd've"),
    ("wed've", "we'd've"),
    ("we'dve", "we'd've"),
    ("whod've", "who'd've"),
    ("who'dve", "who'd've"),
    ("wouldnt've", "wouldn't've"),
    ("wouldn'tve", "wouldn't've"),
    ("yall'll", "y'all'll"),
    ("y'allll", "y'all'll"),
    ("yall'd've", "y'all'd've"),
    ("y'alld've", "y'all'd've"),
    ("y'all'dve", "y'all'd've"),
    ("youd've", "you'd've"),
    ("you'dve", "you'd've"),
];

/// Those that are; `id've`, `im` and `ive` are not among them, for the official has them with a capital
/// letter and lowers the answer first.
const PLAIN: &[&str] = &[
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hasn't",
    "haven't",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'll",
    "ma'am",
    "mightn't",
    "might've",
    "mustn't",
    "must've",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "shan't",
    "should've",
    "shouldn't",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'll",
    "someone's",
    "something'd",
    "something'll",
    "that's",
    "there'd",
    "there're",
    "there's",
    "they'd",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "y'all",
    "you'd",
    "you'll",
    "you're",
    "you've",
    "he'd",
];

const NUMBERS: [(&str, &str); 11] = [
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
];

const PUNCTUATION: [char; 21] = [
    ';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',', '?', '!',
];

/// Without line breaks and tabs.
fn trimmed(answer: &str) -> String {
    answer.replace(['\n', '\t'], " ").trim().to_string()
}

fn without_punctuation(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    // A comma between two digits has every mark taken out, not only itself; so does the official.
    let grouped = chars.windows(3).any(|w| w[0].is_numeric() && w[1] == ',' && w[2].is_numeric());
    let mut out = text.to_string();
    for mark in PUNCTUATION {
        let at_space = text.contains(&format!("{mark} ")) || text.contains(&format!(" {mark}"));
        out = out.replace(mark, if at_space || grouped { "" } else { " " });
    }
    // A full stop stays before a digit alone.
    let chars: Vec<char> = out.chars().collect();
    let stays = |i: usize| chars[i] != '.' || chars.get(i + 1).is_some_and(|c| c.is_numeric());
    (0..chars.len()).filter(|&i| stays(i)).map(|i| chars[i]).collect()
}

fn without_articles(text: &str) -> String {
    let words = text.to_lowercase();
    let words = words.split_whitespace().map(|word| {
        let number = NUMBERS.iter().chain(&[("ten", "10")]).find(|(name, _)| *name == word);
        number.map_or(word, |(_, digits)| digits)
    });
    let words = words.filter(|word| !matches!(*word, "a" | "an" | "the")).map(|word| {
        let odd = CONTRACTIONS.iter().find(|(without, _)| *without == word).map(|(_, with)| *with);
        let plain = || PLAIN.iter().find(|with| with.replace('\'', "") == word).copied();
        odd.or_else(plain).unwrap_or(word)
    });
    words.collect::<Vec<_>>().join(" ")
}

/// An answer as it is compared: without punctuation and articles, numbers to ten as digits,
/// contractions with their apostrophes, in lower case.
pub fn normalised(answer: &str) -> String {
    without_articles(&without_punctuation(&trimmed(answer)))
}

/// The accuracy of one answer in [0, 1]: the mean, over the humans' answers left out one at a time,
/// of a third of those that match among the others, 1 at most. As in the official script, whose human
/// answers come normalised, these lose their punctuation alone, and only where they differ among
/// themselves. 0 where there are no answers to compare with.
pub fn accuracy(answer: &str, humans: &[impl AsRef<str>]) -> f64 {
    let mut humans: Vec<String> = humans.iter().map(|human| human.as_ref().to_string()).collect();
    let answer = normalised(answer);
    if humans.windows(2).any(|pair| pair[0] != pair[1]) {
        for human in &mut humans {
            *human = without_punctuation(human);
        }
    }
    if humans.is_empty() {
        return 0.0;
    }
    let matches = humans.iter().filter(|human| **human == answer).count();
    let left = |human: &String| matches - usize::from(*human == answer);
    let sum: f64 = humans.iter().map(|human| (left(human) as f64 / 3.0).min(1.0)).sum();
    sum / humans.len() as f64
}

/// The part of a model's answer that FARE's script compares: up to `Question`, `Answer` or `Short`,
/// and up to the first comma with a space after it.
pub fn cut(answer: &str) -> &str {
    let end = ["Question", "Answer", "Short"].iter().filter_map(|word| answer.find(word)).min();
    let answer = &answer[..end.unwrap_or(answer.len())];
    answer.split(", ").next().unwrap_or(answer)
}
