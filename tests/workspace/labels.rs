//! Training end to end on the labels of every task.

use mabert_graph::Model;
use mabert_tests::fixture;
use mabert_transfer::data::{Columns, Data};
use mabert_transfer::full::FullOptions;
use mabert_transfer::job::{Job, Report, Transfer, rewrite};
use mabert_transfer::progress::Silent;
use serde_json::{Value, json};

use super::tasks::{HIDDEN, POOLED, TAGS, model, named, sentences, write};

fn trained(teacher: &Model, data: Data, steps: usize) -> mabert_transfer::Result<Report> {
    let mut options = FullOptions::default().with_steps(steps, 8);
    (options.alpha, options.hidden_weight, options.rate) = (0.2, 0.1, Some(3e-4));
    let job = Job::default()
        .data(data)
        .transfer(Transfer::Full(options.into()))
        .tokenizer(fixture("bert-mini-sst2/tokenizer.json"))
        .max_seq(48)
        .calibration_tokens(1_000);
    Ok(rewrite(teacher.clone(), &job, &Silent)?.1)
}

/// Labels that the teacher does not know are learnt.
fn learns(teacher: &Model, data: Data) {
    let full = trained(teacher, data, 80).unwrap().full.unwrap();
    let (before, after) = (&full.before, &full.after);
    assert!(full.kept && full.skipped == 0, "{full:?}");
    assert!(before.labels > 0.0 && after.labels < 0.9 * before.labels, "{before:?} {after:?}");
    assert!([after.labels, after.outputs, after.hidden].iter().all(|part| part.is_finite()), "{after:?}");
}

fn lines(objects: impl Iterator<Item = Value>) -> String {
    objects.map(|object| format!("{object}\n")).collect()
}

/// A word has the tag that its length says.
fn tag(word: &str) -> usize {
    word.len().min(9) / 2
}

#[test]
fn tags_of_words_are_learnt() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = model(HIDDEN, TAGS.len(), &["scores"]);
    let block = |words: &Vec<String>| words.iter().map(|word| format!("{word}\t{}\n", TAGS[tag(word)])).collect();
    let conll = sentences().iter().map(block).collect::<Vec<String>>().join("\n");
    learns(&teacher, Data::new(write(folder.path(), "a.conll", &conll)).columns(named(&TAGS)));
    // Numbers need no names; what is not scored is no label.
    let object = |words: Vec<String>| {
        let tags: Vec<i64> =
            words.iter().enumerate().map(|(at, word)| if at % 5 == 0 { -100 } else { tag(word) as i64 }).collect();
        json!({ "tokens": words, "ner_tags": tags })
    };
    let numbered = lines(sentences().into_iter().map(object));
    learns(&teacher, Data::new(write(folder.path(), "a.jsonl", &numbered)));
}

/// The answer is always the context's third word.
fn question(words: &[String]) -> Value {
    let context = words.join(" ");
    let start = words[..2].iter().map(|word| word.chars().count() + 1).sum::<usize>();
    let answers = json!({ "text": [words[2]], "answer_start": [start] });
    json!({ "question": "what is it ?", "context": context, "answers": answers })
}

#[test]
fn answers_are_learnt() {
    let folder = tempfile::tempdir().unwrap();
    let objects = lines(sentences().iter().filter(|words| words.len() > 2).map(|words| question(words)));
    let data = Data::new(write(folder.path(), "a.jsonl", &objects));
    for outputs in [&["start_logits", "end_logits"][..], &["logits"]] {
        learns(&model(HIDDEN, 2, outputs), data.clone());
    }
}

#[test]
fn several_classes_are_learnt() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = model(POOLED, 3, &["scores"]);
    // Whether it is long, and whether it has a full stop; the second class is never there.
    let object = |words: Vec<String>| {
        let text = words.join(" ");
        let classes: Vec<usize> = [(0, words.len() > 12), (2, text.contains('.'))]
            .into_iter()
            .filter_map(|(class, is_there)| is_there.then_some(class))
            .collect();
        json!({ "text": text, "labels": classes })
    };
    let columns = Columns { label: Some("labels".to_owned()), ..Columns::default() };
    let objects = lines(sentences().into_iter().map(object));
    learns(&teacher, Data::new(write(folder.path(), "a.jsonl", &objects)).columns(columns));
}

#[test]
fn labels_that_the_model_does_not_know_are_refused_with_file_and_line() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |teacher: &Model, data: Data, parts: &[&str]| {
        let reason = trained(teacher, data, 1).unwrap_err().to_string();
        assert!(parts.iter().all(|part| reason.contains(part)), "{reason}");
    };
    let labelled = |columns: Columns| Columns { label: Some("labels".to_owned()), ..columns };
    let file = |name: &str, objects: &dyn Fn(usize) -> Value| {
        Data::new(write(folder.path(), name, &lines((0..30).map(objects))))
    };
    let tags = |at: usize| json!({ "tokens": ["a", "film"], "ner_tags": [0, if at == 20 { 5 } else { 4 }] });
    let tokens = model(HIDDEN, TAGS.len(), &["scores"]);
    refused(&tokens, file("tags.jsonl", &tags), &["tags.jsonl", "line 21", "label 5", "5 classes"]);
    let names =
        |at: usize| json!({ "tokens": ["a", "film"], "ner_tags": ["O", if at == 20 { "B-MISC" } else { "O" }] });
    let data = file("names.jsonl", &names).columns(named(&TAGS));
    refused(&tokens, data, &["names.jsonl", "line 21", "`B-MISC` is none of the model's classes"]);
    let sets = |at: usize| json!({ "text": format!("a film {at}"), "labels": [if at == 20 { 3 } else { 2 }, 0, 1, 1] });
    let data = file("sets.jsonl", &sets).columns(labelled(Columns::default()));
    refused(&model(POOLED, 3, &["scores"]), data, &["sets.jsonl", "line 21", "label 3", "3 classes"]);
    let answers = |at: usize| {
        let context = if at == 20 { "a book" } else { "a long film" };
        json!({ "question": "what ?", "context": context, "answers": { "text": ["film"], "answer_start": [7] } })
    };
    let spans = model(HIDDEN, 2, &["start_logits", "end_logits"]);
    refused(&spans, file("answers.jsonl", &answers), &["answers.jsonl", "line 21", "`film` is not in its context"]);
    // Such labels are for other outputs than the model has.
    let answers =
        |at: usize| json!({ "question": format!("what {at} ?"), "context": "a film", "answers": { "text": ["film"] } });
    let pooled = model(POOLED, 3, &["scores"]);
    refused(&pooled, file("others.jsonl", &answers), &["the labels are answers", "labels cannot be used"]);
}
