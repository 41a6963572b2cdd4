//! How alike an answer and the right one are: SQuAD's own exact match and F1.

use std::collections::HashMap;

use crate::data::Answers;

/// An answer in lower case, without punctuation and articles, its words with one blank between them.
pub(super) fn normalised(answer: &str) -> String {
    let plain: String = answer.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let mut kept = String::new();
    let mut word = String::new();
    // An article is a whole word, between what are no letters or digits.
    for letter in plain.chars().chain([' ']) {
        if letter.is_alphanumeric() {
            word.push(letter);
            continue;
        }
        kept.push_str(if matches!(word.as_str(), "a" | "an" | "the") { " " } else { &word });
        word.clear();
        kept.push(letter);
    }
    kept.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// F1 of the words of two normalised answers; where one of them has none, whether both have none.
fn word_f1(answer: &str, right: &str) -> f64 {
    let (answer, right): (Vec<&str>, Vec<&str>) = (answer.split(' ').collect(), right.split(' ').collect());
    if answer == [""] || right == [""] {
        return f64::from(u8::from(answer == right));
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    right.iter().for_each(|word| *left.entry(word).or_default() += 1);
    let mut same = 0usize;
    for word in &answer {
        if let Some(count) = left.get_mut(word).filter(|count| **count > 0) {
            *count -= 1;
            same += 1;
        }
    }
    2.0 * same as f64 / (answer.len() + right.len()) as f64
}

/// Exact match and F1 of an answer: the best of those with any right one. Where there is none, no answer is right.
pub(super) fn scores(answer: &str, truth: &Answers) -> (f64, f64) {
    let answer = normalised(answer);
    let mut right: Vec<String> = truth.texts.iter().map(|text| normalised(text)).collect();
    right.retain(|text| !text.is_empty());
    if right.is_empty() {
        right.push(String::new());
    }
    let best = |score: &dyn Fn(&String) -> f64| right.iter().map(score).fold(0.0, f64::max);
    (best(&|right| f64::from(u8::from(*right == answer))), best(&|right| word_f1(&answer, right)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn truth(texts: &[&str]) -> Answers {
        Answers { texts: texts.iter().map(|t| (*t).to_owned()).collect(), ..Answers::default() }
    }

    /// What SQuAD's `normalize_answer` gives.
    #[test]
    fn answers_are_normalised_as_squads_are() {
        for (answer, expected) in [
            ("The  Norman's.", "normans"),
            ("a an the", ""),
            ("An Apple, a day", "apple day"),
            ("theatre and a-b", "theatre and ab"),
            ("in the\u{a0}10th\tand 11th", "in 10th and 11th"),
            ("U.S.–the law", "us– law"),
            ("Ünïcode THE", "ünïcode"),
            ("", ""),
        ] {
            assert_eq!(normalised(answer), expected, "{answer:?}");
        }
    }

    #[test]
    fn scores_are_the_best_of_all_right_answers() {
        assert_eq!(scores("the Denver Broncos", &truth(&["Carolina Panthers", "Denver Broncos"])), (1.0, 1.0));
        let (exact, f1) = scores("Denver Broncos won", &truth(&["Denver Broncos"]));
        assert_eq!(exact, 0.0);
        approx::assert_abs_diff_eq!(f1, 0.8, epsilon = 1e-12);
        // A word counts as often as both have it.
        approx::assert_abs_diff_eq!(scores("no no no", &truth(&["no yes"])).1, 0.4, epsilon = 1e-12);
        assert_eq!(scores("Denver", &truth(&["Carolina"])), (0.0, 0.0));
        for none in [truth(&[]), truth(&["the"])] {
            assert_eq!(scores("", &none), (1.0, 1.0));
            assert_eq!(scores("Denver", &none), (0.0, 0.0));
        }
        assert_eq!(scores("", &truth(&["Denver"])), (0.0, 0.0));
    }
}
