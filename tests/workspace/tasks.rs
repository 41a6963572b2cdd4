//! Tasks that are no classification of whole texts, against what is worked out by hand one text at a time.

use std::path::{Path, PathBuf};

use mabert_graph::proto::ValueInfoProto;
use mabert_graph::{Builder, Model, Tensor, attribute};
use mabert_passes::inputs::EncoderInputs;
use mabert_runtime::{LoadOptions, Model as Runnable, borrowed};
use mabert_tests::fixture;
use mabert_transfer::compare::argmax;
use mabert_transfer::data::{BatchShape, Columns, Data, DataFile, Overlong, Sequence, TextEncoder, batches};
use mabert_transfer::evaluate::{Answered, Labelled, Metric, Spread, TaskRun};
use mabert_transfer::job::{Dev, Job, rewrite};
use mabert_transfer::progress::Silent;
use serde_json::json;

pub(super) const TAGS: [&str; 5] = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"];
pub(super) const HIDDEN: &str = "/m/bert/encoder/layer.2/output/LayerNorm/LayerNormalization_output_0";
pub(super) const POOLED: &str = "/m/bert/pooler/activation/Tanh_output_0";

/// The fixture's encoder with a head of so many columns, over tokens or pooled; each of `outputs` has its share of them.
pub(super) fn model(from: &str, columns: usize, outputs: &[&str]) -> Model {
    let mut model = Model::load(fixture("bert-mini-sst2/model.onnx")).unwrap();
    let b = Builder::new(model.opset(), "head");
    let values = (0..128 * columns).map(|at| ((at * 37 + at / 128 * 11) % 19) as f32 / 19.0 - 0.45).collect();
    let all = b.value(from).matmul(b.constant("weight", &Tensor::new(&[128, columns], values)));
    let named: Vec<String> = match outputs {
        [one] => vec![all.named(one).name()],
        several => {
            let column = |at: usize| {
                let at = b.constant(&format!("column/{at}"), &Tensor::scalar(at as i64));
                b.op("Gather", &[all, at], vec![attribute::int("axis", -1)])
            };
            several.iter().enumerate().map(|(at, name)| column(at).named(name).name()).collect()
        }
    };
    model.graph_mut().output =
        named.into_iter().map(|name| ValueInfoProto { name, ..ValueInfoProto::default() }).collect();
    b.patch().apply(&mut model).unwrap();
    model.remove_dead();
    model
}

/// A model ready to run, and what its inputs ask for.
struct Ready {
    runnable: Runnable,
    shape: BatchShape,
}

impl Ready {
    fn new(model: &Model) -> Self {
        let shape = BatchShape::new(&EncoderInputs::new(model, &[]).unwrap());
        Self { runnable: LoadOptions::default().prepare(model).unwrap(), shape }
    }

    fn answers(&self, labelled: &Labelled, metric: Option<Metric>) -> mabert_transfer::Result<Answered> {
        let (engine, shape, channels) = (&self.runnable, &self.shape, Some(128));
        let run = TaskRun { engine, shape, channels, features: None, spread: Spread::Batches };
        labelled.answers(&run, metric)
    }

    /// The outputs for one text.
    fn alone(&self, sequence: &Sequence) -> Vec<ndarray::ArrayD<f32>> {
        let batch = batches(std::slice::from_ref(sequence), 4096, 1, &self.shape).remove(0);
        let inputs = batch.inputs(self.runnable.inputs()).unwrap();
        self.runnable.run(&borrowed(&inputs)).unwrap().into_iter().map(|(_, value)| value.to_f32()).collect()
    }
}

fn encoder(longest: usize) -> TextEncoder {
    TextEncoder::new(Some(&fixture("bert-mini-sst2/tokenizer.json")), longest, Overlong::Truncate).unwrap()
}

/// Some sentences of reviews, in words.
pub(super) fn sentences() -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(fixture("reviews/reviews.tsv")).unwrap();
    let words = |line: &str| line.split('\t').next().unwrap().split_whitespace().map(str::to_owned).collect();
    text.lines().skip(1).take(60).map(words).collect()
}

pub(super) fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn read(path: &Path, columns: Columns, longest: usize) -> mabert_transfer::Result<Labelled> {
    Labelled::read(DataFile::open(&Data::new(path).columns(columns))?, &encoder(longest), Some(4096))
}

pub(super) fn named(classes: &[&str]) -> Columns {
    Columns { classes: classes.iter().map(|c| (*c).to_owned()).collect(), ..Columns::default() }
}

#[test]
fn a_word_is_tagged_by_its_first_token() {
    let folder = tempfile::tempdir().unwrap();
    let ready = Ready::new(&model(HIDDEN, TAGS.len(), &["scores"]));
    for longest in [16, 64] {
        // What the model says of each word that it reads, one sentence at a time.
        let mut own: Vec<(Vec<String>, Vec<&str>)> = Vec::new();
        let mut cut = 0;
        for words in sentences() {
            let (sequence, places) = encoder(longest).encode_words(Path::new("x"), &words, None, 1).unwrap();
            let logits = ready.alone(&sequence).remove(0);
            let tag = |place: &Option<usize>| {
                cut += usize::from(place.is_none());
                let row: Vec<f32> = (0..TAGS.len()).map(|class| logits[[0, place.unwrap_or(0), class]]).collect();
                TAGS[argmax(&row)]
            };
            let tags = places.iter().map(tag).collect();
            own.push((words, tags));
        }
        let read_words = own.iter().map(|(words, _)| words.len()).sum::<usize>() - cut;
        assert_eq!(cut > 0, longest == 16);
        let line = |(word, tag): (&String, &&str)| format!("{word}\t{tag}\n");
        let block = |(words, tags): &(Vec<String>, Vec<&str>)| words.iter().zip(tags).map(line).collect::<String>();
        let conll = own.iter().map(block).collect::<Vec<_>>().join("\n");
        let numbers =
            |tags: &[&str]| tags.iter().map(|t| TAGS.iter().position(|o| o == t).unwrap()).collect::<Vec<_>>();
        let object =
            |(words, tags): &(Vec<String>, Vec<&str>)| json!({ "tokens": words, "ner_tags": tags }).to_string();
        let numbered = |(words, tags): &(Vec<String>, Vec<&str>)| {
            json!({ "tokens": words, "ner_tags": numbers(tags) }).to_string()
        };
        let files = [
            write(folder.path(), "a.tsv", &conll),
            write(folder.path(), "a.conll", &conll),
            write(folder.path(), "a.jsonl", &own.iter().map(object).collect::<Vec<_>>().join("\n")),
            write(folder.path(), "b.jsonl", &own.iter().map(numbered).collect::<Vec<_>>().join("\n")),
        ];
        for file in &files {
            let labelled = read(file, named(&TAGS), longest).unwrap();
            let answered = ready.answers(&labelled, None).unwrap();
            assert_eq!((answered.metric, answered.unusable, labelled.examples()), (Metric::EntityF1, 0, 60));
            for metric in labelled.metrics(&answered) {
                assert_eq!(labelled.score(metric, &answered).unwrap(), 1.0, "{metric:?}");
            }
            assert_eq!(labelled.notes().iter().any(|note| note.contains(&format!("{cut} words"))), cut > 0);
        }
        // One word's tag is another's: accuracy misses one word of all that are read.
        let wrong = conll.replacen("\tI-PER\n", "\tB-LOC\n", 1).replacen("\tI-LOC\n", "\tB-PER\n", 0);
        assert_ne!(wrong, conll);
        let labelled = read(&write(folder.path(), "w.conll", &wrong), named(&TAGS), longest).unwrap();
        let answered = ready.answers(&labelled, Some(Metric::Accuracy)).unwrap();
        let accuracy = labelled.score(Metric::Accuracy, &answered).unwrap();
        approx::assert_abs_diff_eq!(accuracy, 1.0 - 1.0 / read_words as f64, epsilon = 1e-12);
        assert!(labelled.score(Metric::EntityF1, &answered).unwrap() < 1.0);
    }
}

#[test]
fn tags_need_the_names_of_classes() {
    let folder = tempfile::tempdir().unwrap();
    let ready = Ready::new(&model(HIDDEN, TAGS.len(), &["scores"]));
    let numbers = write(folder.path(), "n.jsonl", "{\"tokens\": [\"a\", \"film\"], \"ner_tags\": [1, -100]}\n");
    let labelled = read(&numbers, Columns::default(), 64).unwrap();
    let answered = ready.answers(&labelled, Some(Metric::Accuracy)).unwrap();
    assert_eq!(labelled.metrics(&answered), [Metric::Accuracy]);
    let reason = labelled.score(Metric::EntityF1, &answered).unwrap_err().to_string();
    assert!(reason.contains("names of the classes"), "{reason}");
    let words = write(folder.path(), "w.conll", "a\tO\nfilm\tB-MISC\n");
    let refused = |columns| read(&words, columns, 64).unwrap_err().to_string();
    assert!(refused(Columns::default()).contains("line 1: tag `O`"));
    assert!(refused(named(&TAGS)).contains("`B-MISC` is none of the model's classes O, B-PER"));
    // Names are those of the model's config.json, where it lies beside the tokenizer.
    let tokenizer = folder.path().join("tokenizer.json");
    std::fs::copy(fixture("bert-mini-sst2/tokenizer.json"), &tokenizer).unwrap();
    let classes = json!({ "id2label": { "0": "O", "1": "B-MISC", "2": "I-MISC", "3": "B-LOC", "4": "I-LOC" } });
    write(folder.path(), "config.json", &classes.to_string());
    let encoder = TextEncoder::new(Some(&tokenizer), 64, Overlong::Truncate).unwrap();
    let file = DataFile::open(&Data::new(&words)).unwrap();
    let labelled = Labelled::read(file, &encoder, None).unwrap();
    assert_eq!(ready.answers(&labelled, None).unwrap().metric, Metric::EntityF1);
    let pooled = Ready::new(&model(POOLED, TAGS.len(), &["scores"]));
    let reason = pooled.answers(&labelled, None).unwrap_err().to_string();
    assert!(reason.contains("row of classes a token"), "{reason}");
    let three = Ready::new(&model(HIDDEN, 3, &["scores"]));
    let reason = three.answers(&labelled, None).unwrap_err().to_string();
    assert!(reason.contains("3 classes a token, but 5 are named"), "{reason}");
}

/// The best span of a question's windows, by trying all, and the least score of no answer.
fn best_answer(ready: &Ready, question: &str, context: &str, longest: usize) -> (String, f32, f32) {
    let (mut best, mut none) = ((f32::NEG_INFINITY, String::new()), f32::INFINITY);
    for window in encoder(longest).windows(Path::new("x"), question, context, 1).unwrap() {
        let outputs = ready.alone(&window.sequence);
        let logit = |at: usize, place: usize| match outputs.as_slice() {
            [both] => both[[0, place, at]],
            [starts, ends] => [starts, ends][at][[0, place]],
            _ => panic!("one or two outputs"),
        };
        none = none.min(logit(0, 0) + logit(1, 0));
        let places = &window.places;
        // As others do it, the 20 best starts and ends are tried.
        let is_tried = |at: usize, place: usize| {
            (0..places.len()).filter(|other| logit(at, *other) > logit(at, place)).count() < 20
        };
        for start in 0..places.len() {
            for end in start..places.len().min(start + 30) {
                let (Some((first, _)), Some((_, last))) = (places[start], places[end]) else { continue };
                let score = logit(0, start) + logit(1, end);
                if score > best.0 && is_tried(0, start) && is_tried(1, end) {
                    best = (score, context[first..last].to_owned());
                }
            }
        }
    }
    (best.1, best.0, none)
}

/// Whether more than articles and punctuation are left of an answer.
fn says_something(answer: &str) -> bool {
    answer.split(|c: char| !c.is_alphanumeric()).any(|word| !["", "a", "an", "the"].contains(&word))
}

#[test]
fn the_best_span_of_all_windows_answers() {
    let folder = tempfile::tempdir().unwrap();
    let sentences = sentences();
    let contexts: Vec<String> =
        (0..20).map(|at| sentences[at * 3..][..1 + at % 3].concat().join(" ")).map(|c| c.replace('e', "é")).collect();
    for outputs in [&["start_logits", "end_logits"][..], &["scores"]] {
        let ready = Ready::new(&model(HIDDEN, 2, outputs));
        for longest in [24, 64] {
            let own: Vec<_> = contexts.iter().map(|c| best_answer(&ready, "what is it ?", c, longest)).collect();
            // Every other question has another answer.
            let right = |at: usize| if at.is_multiple_of(2) { own[at].0.clone() } else { "nothing of it".to_owned() };
            let answers = |at: usize| json!({ "text": [right(at), "no"], "answer_start": [0, 0] });
            let object = |at: usize| json!({ "id": at, "question": "what is it ?", "context": contexts[at], "answers": answers(at) });
            let lines: Vec<String> = (0..20).map(|at| object(at).to_string()).collect();
            let labelled =
                read(&write(folder.path(), "q.jsonl", &lines.join("\n")), Columns::default(), longest).unwrap();
            let answered = ready.answers(&labelled, None).unwrap();
            assert_eq!((answered.metric, labelled.examples()), (Metric::AnswerF1, 20));
            let exact = (0..20).step_by(2).filter(|at| says_something(&own[*at].0)).count() as f64 / 20.0;
            assert!(exact > 0.2, "{exact}");
            let [found, f1] =
                [Metric::ExactMatch, Metric::AnswerF1].map(|metric| labelled.score(metric, &answered).unwrap());
            approx::assert_abs_diff_eq!(found, exact, epsilon = 1e-12);
            assert!(f1 >= exact && f1 < exact + 0.3, "{f1} {exact}");
            assert_eq!(labelled.sequences().len() > 20, longest == 24);

            // As SQuAD 2 has it: a third of the questions has no answer, and then the model may say so too.
            let question = |at: usize| {
                let list =
                    if at.is_multiple_of(3) { json!([]) } else { json!([{ "text": own[at].0, "answer_start": 0 }]) };
                json!({ "id": "a", "question": "what is it ?", "answers": list, "is_impossible": at.is_multiple_of(3) })
            };
            let paragraphs: Vec<_> =
                (0..20).map(|at| json!({ "context": contexts[at], "qas": [question(at)] })).collect();
            let squad = json!({ "version": "v2.0", "data": [{ "title": "a", "paragraphs": paragraphs }] });
            let path = write(folder.path(), "squad.json", &squad.to_string());
            let labelled = read(&path, Columns::default(), longest).unwrap();
            let says_none = |at: usize| own[at].1 < own[at].2;
            // What is nothing but an article is as good as no answer.
            let is_right = |at: &usize| says_none(*at) == (at.is_multiple_of(3)) || !says_something(&own[*at].0);
            let right = (0..20).filter(is_right).count();
            let answered = ready.answers(&labelled, Some(Metric::ExactMatch)).unwrap();
            assert_eq!(labelled.score(Metric::ExactMatch, &answered).unwrap(), right as f64 / 20.0);
        }
    }
}

#[test]
fn classes_are_there_where_their_logits_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let ready = Ready::new(&model(POOLED, 6, &["scores"]));
    let texts: Vec<String> = sentences().into_iter().map(|words| words.join(" ")).collect();
    let mut lines = [String::new(), String::new()];
    let mut table = "text\ta\tb\tc\td\te\tf\n".to_owned();
    for (at, text) in texts.iter().enumerate() {
        let content = mabert_transfer::data::Content::Text { text: text.clone(), pair: None };
        let example = mabert_transfer::data::Example { content, label: None, line: 1 };
        let logits = ready.alone(&encoder(64).encode(Path::new("x"), example).unwrap()).remove(0);
        let mut marks: Vec<u8> = logits.iter().map(|v| u8::from(*v > 0.0)).collect();
        // Of every tenth text, the last class is wrong.
        marks[5] ^= u8::from(at % 10 == 0);
        let classes: Vec<usize> = (0..6).filter(|class| marks[*class] == 1).collect();
        lines[0] += &format!("{}\n", json!({ "text": text, "labels": classes }));
        lines[1] += &format!("{}\n", json!({ "text": text, "labels": marks }));
        table += &format!("{text}\t{}\n", marks.iter().map(u8::to_string).collect::<Vec<_>>().join("\t"));
    }
    let columns = |label: &str| Columns { label: Some(label.to_owned()), ..Columns::default() };
    let files = [
        (write(folder.path(), "a.jsonl", &lines[0]), columns("labels")),
        (write(folder.path(), "b.jsonl", &lines[1]), columns("labels")),
        (write(folder.path(), "c.tsv", &table), columns("a,b,c, d,e,f")),
    ];
    let scores: Vec<Vec<f64>> = files
        .iter()
        .map(|(path, columns)| {
            let labelled = read(path, columns.clone(), 64).unwrap();
            let answered = ready.answers(&labelled, None).unwrap();
            assert_eq!(answered.metric, Metric::MicroF1);
            labelled.metrics(&answered).into_iter().map(|m| labelled.score(m, &answered).unwrap()).collect()
        })
        .collect();
    // Subset accuracy stands last.
    assert!(scores.iter().all(|s| s == &scores[0] && s[2] == 0.9 && s[0] > 0.9 && s[0] < 1.0), "{scores:?}");
    let labelled = read(&files[0].0, files[0].1.clone(), 64).unwrap();
    let reason = ready.answers(&labelled, Some(Metric::EntityF1)).unwrap_err().to_string();
    assert!(reason.contains("entity-f1 is no metric of several classes a text: take micro-f1"), "{reason}");
}

/// Students of such models are made, on the same files, and measured by the same metric.
#[test]
fn students_are_measured_on_tagged_words() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = model(HIDDEN, TAGS.len(), &["scores"]);
    let block = |words: &Vec<String>| {
        words.iter().enumerate().map(|(at, word)| format!("{word}\t{}\n", TAGS[at % 5])).collect::<String>()
    };
    let text = sentences().iter().map(block).collect::<Vec<_>>().join("\n");
    let file = Data::new(write(folder.path(), "a.conll", &text)).columns(named(&TAGS));
    let job = Job::default()
        .max_seq(32)
        .calibration_tokens(2000)
        .tokenizer(fixture("bert-mini-sst2/tokenizer.json"))
        .data(file.clone())
        .dev(Dev { data: file, metric: None });
    let (_, report) = rewrite(teacher.clone(), &job, &Silent).unwrap();
    let dev = report.dev.unwrap();
    assert_eq!((dev.metric, dev.examples, dev.scores.len()), (Metric::EntityF1, 60, 4));
    assert!(dev.agreement > 0.6 && dev.student > 0.0 && dev.teacher > 0.0, "{dev:?}");
    // 60 sentences are little: more was made of them.
    let augmented = report.source.unwrap().augmented;
    assert!(augmented.calibration > 10 && augmented.training == 0, "{augmented:?}");
    let (_, report) = rewrite(teacher, &job.augmentation(false), &Silent).unwrap();
    assert_eq!(report.source.unwrap().augmented.calibration, 0);
}
