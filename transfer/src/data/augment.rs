//! More text out of little: the teacher answers whatever it is given, so what is made of texts teaches as they do.
//!
//! Pairs are joined anew, swapped and cropped; texts that stand alone are cut and joined, and cropped; and tokens give way
//! to their neighbours in the model's own table of words. What is made has no label.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::path::Path;

use ndarray::Array2;
use rand::{Rng as _, rngs::StdRng};

use super::neighbours::Neighbours;
use super::reader::{Content, Example};
use super::tokens::{Sequence, TextEncoder};
use crate::Result;

/// Of little text, so many times its tokens are made at most.
const MOST_TIMES: usize = 4;
/// The share of tokens that are replaced, in a sequence in which some are.
const REPLACED: f64 = 0.15;
/// The share of the sequences that were joined or cropped in which some are.
const WITH_REPLACED: f64 = 0.5;
/// What is left of a cropped text, at least.
const LEFT: f64 = 0.5;
/// A text without blanks is cut between letters where it has so many.
const LETTERS: usize = 16;

/// A way to read a model's table of words, `[vocabulary, channels]`, where it has one.
type WordTable<'a> = Box<dyn Fn() -> Result<Option<Array2<f32>>> + 'a>;

/// What more text is made with.
pub struct Augmentation<'a> {
    table: WordTable<'a>,
    /// Read once text is made; `None` within where the model has no such table.
    neighbours: RefCell<Option<Option<Neighbours>>>,
}

impl fmt::Debug for Augmentation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Augmentation").finish_non_exhaustive()
    }
}

/// How much there is, or is to be made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Amount {
    pub(super) sequences: usize,
    pub(super) tokens: usize,
}

impl Amount {
    pub(super) fn counted(sequences: &[Sequence]) -> Self {
        Self { sequences: sequences.len(), tokens: sequences.iter().map(|s| s.ids.len()).sum() }
    }

    /// What is made of so much where so much is `wanted`: what lacks, up to a number of times what there is.
    pub(super) fn to_make(self, wanted: Self) -> Self {
        let lacking = |there: usize, wanted: usize| wanted.saturating_sub(there).min(MOST_TIMES * there);
        Self { sequences: lacking(self.sequences, wanted.sequences), tokens: lacking(self.tokens, wanted.tokens) }
    }
}

/// What becomes of a text or a pair.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// The first of one and the second of another pair; the beginning of one text and the end of another.
    Joined,
    /// The second of a pair, then the first.
    Swapped,
    /// Some words that follow each other.
    Cropped,
    /// Only tokens are replaced.
    Whole,
}

impl<'a> Augmentation<'a> {
    /// With a model's table of words, which is read where text is made at all.
    pub fn new(table: impl Fn() -> Result<Option<Array2<f32>>> + 'a) -> Self {
        Self { table: Box::new(table), neighbours: RefCell::new(None) }
    }

    /// Makes sequences of `sources`, which are of `file`.
    pub(super) fn make(
        &self,
        file: &Path,
        sources: &[Example],
        encoder: &TextEncoder,
        amount: Amount,
        rng: &mut StdRng,
    ) -> Result<Vec<Sequence>> {
        if sources.is_empty() || amount.sequences == 0 || amount.tokens == 0 {
            return Ok(Vec::new());
        }
        let special = special(encoder, sources);
        if self.neighbours.borrow().is_none() {
            *self.neighbours.borrow_mut() = Some((self.table)()?.map(|table| Neighbours::new(table, &special)));
        }
        let mut neighbours = self.neighbours.borrow_mut();
        let neighbours = neighbours.as_mut().and_then(Option::as_mut);
        let (mut made, mut kinds, mut tokens) = (Vec::new(), Vec::new(), 0);
        // What nothing can be made of is passed over, but not for ever.
        for _ in 0..amount.sequences.saturating_mul(2) {
            if made.len() >= amount.sequences || tokens >= amount.tokens {
                break;
            }
            let source = &sources[rng.random_range(0..sources.len())];
            let other = &sources[rng.random_range(0..sources.len())];
            let Some((kind, content)) = changed(&source.content, &other.content, neighbours.is_some(), rng) else {
                continue;
            };
            let example = Example { content, label: None, line: source.line };
            let sequence = Sequence { truncated: false, ..encoder.encode(file, example)? };
            tokens += sequence.ids.len();
            made.push(sequence);
            kinds.push(kind);
        }
        if let Some(neighbours) = neighbours {
            replace(&mut made, &kinds, neighbours, &special, rng);
        }
        Ok(made)
    }
}

/// The tokens that are never replaced: those that the tokenizer calls special; of ready ids, those that most texts begin
/// or end with.
fn special(encoder: &TextEncoder, sources: &[Example]) -> HashSet<i64> {
    let mut special = encoder.special();
    let ids: Vec<&[i64]> = sources
        .iter()
        .filter_map(|source| if let Content::Ids { ids, .. } = &source.content { Some(ids.as_slice()) } else { None })
        .collect();
    let ends = |ids: &&[i64]| [ids.first().copied(), ids.last().copied()];
    let mut times = std::collections::HashMap::new();
    ids.iter().flat_map(ends).flatten().for_each(|id| *times.entry(id).or_insert(0usize) += 1);
    special.extend(times.into_iter().filter(|(_, times)| times * 2 > ids.len()).map(|(id, _)| id));
    special
}

/// What becomes of a text with another beside it; `None` where there is nothing that can be done to it.
fn changed(source: &Content, other: &Content, replaces: bool, rng: &mut StdRng) -> Option<(Kind, Content)> {
    let kinds: &[Kind] = match source {
        Content::Text { pair: Some(_), .. } => &[Kind::Whole, Kind::Joined, Kind::Swapped, Kind::Cropped],
        Content::Text { pair: None, .. } => &[Kind::Whole, Kind::Joined, Kind::Cropped],
        Content::Words(_) => &[Kind::Whole, Kind::Joined, Kind::Cropped],
        Content::Ids { .. } => &[Kind::Whole],
    };
    // Without replacements the whole is what there is already.
    let kinds = if replaces { kinds } else { &kinds[1..] };
    let kind = *kinds.get(rng.random_range(0..kinds.len().max(1)))?;
    let content = match (kind, source, other) {
        (Kind::Joined, Content::Text { text, pair: Some(_) }, Content::Text { pair: Some(pair), .. }) => {
            Content::Text { text: text.clone(), pair: Some(pair.clone()) }
        }
        (Kind::Joined, Content::Text { text, pair: None }, Content::Text { text: other, .. }) => {
            Content::Text { text: joined(text, other, rng), pair: None }
        }
        (Kind::Swapped, Content::Text { text, pair: Some(pair) }, _) => {
            Content::Text { text: pair.clone(), pair: Some(text.clone()) }
        }
        (Kind::Joined, Content::Words(words), Content::Words(other)) => Content::Words(two_parts(words, other, rng)),
        (Kind::Cropped, Content::Words(words), _) => Content::Words(part(words, rng).to_vec()),
        (Kind::Cropped, Content::Text { text, pair }, _) => {
            Content::Text { text: cropped(text, rng), pair: pair.as_ref().map(|pair| cropped(pair, rng)) }
        }
        _ => source.clone(),
    };
    Some((kind, content))
}

/// The words of a text, and what stands between them; its letters, where it is long and has no blanks.
fn pieces(text: &str) -> (Vec<&str>, &'static str) {
    let words: Vec<&str> = text.split_whitespace().collect();
    if words.len() > 1 || text.chars().count() < LETTERS {
        return (words, " ");
    }
    (text.char_indices().map(|(at, letter)| &text[at..at + letter.len_utf8()]).collect(), "")
}

/// Some words in a row.
fn part<'p, T>(words: &'p [T], rng: &mut StdRng) -> &'p [T] {
    let left = (words.len() as f64 * rng.random_range(LEFT..1.0)).ceil() as usize;
    let start = rng.random_range(0..=words.len() - left);
    &words[start..start + left]
}

/// The first words of some and the last of others.
fn two_parts<T: Clone>(words: &[T], others: &[T], rng: &mut StdRng) -> Vec<T> {
    let first = &words[..rng.random_range(1..=words.len().max(1)).min(words.len())];
    let second = &others[rng.random_range(0..others.len().max(1)).min(others.len())..];
    [first, second].concat()
}

/// Some of a text's words, in a row.
fn cropped(text: &str, rng: &mut StdRng) -> String {
    let (pieces, between) = pieces(text);
    part(&pieces, rng).join(between)
}

/// The beginning of one text and the end of another.
fn joined(text: &str, other: &str, rng: &mut StdRng) -> String {
    let (first, between) = pieces(text);
    two_parts(&first, &pieces(other).0, rng).join(between)
}

/// Puts neighbours in the place of some tokens.
fn replace(
    made: &mut [Sequence],
    kinds: &[Kind],
    neighbours: &mut Neighbours,
    special: &HashSet<i64>,
    rng: &mut StdRng,
) {
    let mut places: Vec<(usize, usize)> = Vec::new();
    for (at, (sequence, kind)) in made.iter().zip(kinds).enumerate() {
        if *kind != Kind::Whole && !rng.random_bool(WITH_REPLACED) {
            continue;
        }
        let words: Vec<usize> =
            (0..sequence.ids.len()).filter(|place| !special.contains(&sequence.ids[*place])).collect();
        let drawn = words.iter().copied().filter(|_| rng.random_bool(REPLACED)).collect::<Vec<_>>();
        let one = words.get(rng.random_range(0..words.len().max(1))).copied();
        let drawn = if drawn.is_empty() { one.into_iter().collect() } else { drawn };
        places.extend(drawn.into_iter().map(|place| (at, place)));
    }
    neighbours.look_up(&places.iter().map(|(at, place)| made[*at].ids[*place]).collect::<BTreeSet<_>>());
    for (at, place) in places {
        let id = &mut made[at].ids[place];
        let nearest = neighbours.nearest(*id);
        if !nearest.is_empty() {
            *id = nearest[rng.random_range(0..nearest.len())];
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;
    use crate::data::{Label, Overlong};

    fn text(text: &str, pair: Option<&str>) -> Content {
        Content::Text { text: text.to_owned(), pair: pair.map(str::to_owned) }
    }

    fn example(content: Content, line: usize) -> Example {
        Example { content, label: Some(Label::One("1".to_owned())), line }
    }

    /// Neighbours are the next few ids.
    fn table() -> Array2<f32> {
        Array2::from_shape_fn((4096, 2), |(row, column)| {
            let angle = row as f32 * 5e-4;
            if column == 0 { angle.cos() } else { angle.sin() }
        })
    }

    fn tokenizer() -> TextEncoder {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/bert-mini-sst2/tokenizer.json");
        TextEncoder::new(Some(&path), 32, Overlong::Truncate).unwrap()
    }

    #[test]
    fn what_lacks_is_made_up_to_some_times_what_there_is() {
        let there = Amount { sequences: 10, tokens: 100 };
        let made = |sequences, tokens| there.to_make(Amount { sequences, tokens });
        assert_eq!(made(usize::MAX, 250), Amount { sequences: 40, tokens: 150 });
        assert_eq!(made(15, 10_000), Amount { sequences: 5, tokens: 400 });
        assert_eq!(made(10, 10_000).sequences, 0);
        assert_eq!(made(usize::MAX, 100).tokens, 0);
    }

    #[test]
    fn pairs_are_joined_anew_swapped_and_cropped() {
        let mut rng = StdRng::seed_from_u64(3);
        let (source, other) = (text("a b c d", Some("e f g h")), text("k l", Some("m n")));
        let mut kinds = HashSet::new();
        for _ in 0..200 {
            let (kind, content) = changed(&source, &other, true, &mut rng).unwrap();
            let Content::Text { text: first, pair: Some(second) } = &content else { panic!("a pair") };
            kinds.insert(format!("{kind:?}"));
            match kind {
                Kind::Joined => assert_eq!(content, text("a b c d", Some("m n"))),
                Kind::Swapped => assert_eq!(content, text("e f g h", Some("a b c d"))),
                Kind::Cropped => {
                    assert!("a b c d".contains(first) && "e f g h".contains(second));
                    assert!(first.len() >= 3 && second.len() >= 3);
                }
                Kind::Whole => assert_eq!(content, source),
            }
        }
        assert_eq!(kinds.len(), 4);
    }

    #[test]
    fn lone_texts_are_cut_and_joined_whatever_their_script() {
        let mut rng = StdRng::seed_from_u64(4);
        let long = "今天天气很好我们一起去公园散步吧好不好";
        for (first, second) in [("a b c", "x y z"), ("one", "two"), (long, long), ("a b", "")] {
            for _ in 0..50 {
                let both = joined(first, second, &mut rng);
                let head = both.chars().next().unwrap();
                assert!(first.starts_with(head), "{both}");
                assert!(both.len() <= first.len() + second.len() + 1, "{both}");
                let part = cropped(first, &mut rng);
                assert!(!part.is_empty() && first.contains(&part), "{part}");
            }
        }
        assert_eq!(cropped("", &mut rng), "");
    }

    #[test]
    fn only_words_are_replaced_and_by_their_neighbours() {
        let encoder = tokenizer();
        let sources: Vec<Example> =
            (0..20).map(|at| example(text("a good film that is as good as it is long", None), at)).collect();
        let augmentation = Augmentation::new(|| Ok(Some(table())));
        let amount = Amount { sequences: 60, tokens: usize::MAX };
        let make = |seed| {
            let mut rng = StdRng::seed_from_u64(seed);
            augmentation.make(Path::new("a.tsv"), &sources, &encoder, amount, &mut rng).unwrap()
        };
        let made = make(1);
        assert_eq!((made.len(), make(1) == made, make(2) == made), (60, true, false));
        let natural = encoder.encode(Path::new("a.tsv"), sources[0].clone()).unwrap();
        let words: HashSet<i64> = natural.ids.iter().copied().collect();
        let special = encoder.special();
        let mut replaced = 0;
        for sequence in &made {
            assert!(sequence.label.is_none() && !sequence.made_up);
            assert_eq!(
                [sequence.ids[0], *sequence.ids.last().unwrap()],
                [natural.ids[0], *natural.ids.last().unwrap()]
            );
            for id in sequence.ids.iter().filter(|id| !words.contains(*id)) {
                replaced += 1;
                assert!(!special.contains(id));
                assert!(words.iter().any(|word| (word - id).abs() <= 10), "{id}");
            }
        }
        assert!(replaced > 60, "{replaced}");
    }

    /// Without a table, texts are still joined and cropped; of ready ids nothing can be made.
    #[test]
    fn without_a_table_of_words_nothing_is_replaced() {
        let augmentation = Augmentation::new(|| Ok(None));
        let amount = Amount { sequences: 30, tokens: usize::MAX };
        let mut rng = StdRng::seed_from_u64(1);
        let texts: Vec<Example> = ["a good film", "a bad one"].map(|t| example(text(t, None), 1)).to_vec();
        let made = augmentation.make(Path::new("a"), &texts, &tokenizer(), amount, &mut rng).unwrap();
        let words: HashSet<i64> =
            texts.iter().flat_map(|e| tokenizer().encode(Path::new("a"), e.clone()).unwrap().ids).collect();
        assert_eq!(made.len(), 30);
        assert!(made.iter().flat_map(|s| &s.ids).all(|id| words.contains(id)));
        let ids = [example(Content::Ids { ids: vec![2, 9, 9, 3], types: vec![0; 4] }, 1)];
        let encoder = TextEncoder::new(None, 32, Overlong::Truncate).unwrap();
        assert!(augmentation.make(Path::new("a"), &ids, &encoder, amount, &mut rng).unwrap().is_empty());
        // With one, the first and the last id of ready ids stay what they are.
        let augmentation = Augmentation::new(|| Ok(Some(table())));
        let made = augmentation.make(Path::new("a"), &ids, &encoder, amount, &mut rng).unwrap();
        assert!(made.iter().all(|s| s.ids[0] == 2 && s.ids[3] == 3 && s.ids[1..3] != [9, 9]));
    }
}
