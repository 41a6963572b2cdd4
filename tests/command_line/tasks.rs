//! `eval` on several classes, and what it says where labels, metric and model do not fit.

use std::process::Output;

use super::{fails, fixture, json, run, teacher, tokenizer};

#[test]
fn the_metric_is_what_fits_labels_and_outputs() {
    let reviews = fixture("reviews/reviews.tsv");
    let eval = ["eval", &teacher(), "--tokenizer", &tokenizer(), "--data", &reviews, "--label-column", "label"];
    let measured = json(&eval);
    assert_eq!(measured["metric"], "accuracy");
    let scores = measured["models"][0]["scores"].as_array().unwrap();
    let names: Vec<&str> = scores.iter().map(|s| s["metric"].as_str().unwrap()).collect();
    assert_eq!(names, ["accuracy", "f1", "macro-f1", "mcc"]);
    assert_eq!(scores[0]["value"], measured["models"][0]["value"]);
    let micro = json(&[&eval[..], &["--metric", "micro-f1"]].concat());
    assert_eq!(micro["models"][0]["value"], measured["models"][0]["value"]);
    fails(&[&eval[..], &["--metric", "entity-f1"]].concat(), 3, &["entity-f1 is no metric of one class"]);
    fails(&eval[..6], 2, &["--label-column"]);
}

#[test]
fn what_does_not_fit_a_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name).display().to_string();
        std::fs::write(&path, text).unwrap();
        path
    };
    let with = |path: &str, more: &[&str], code: i32, part: &str| {
        fails(&[&["eval", &teacher(), "--tokenizer", &tokenizer(), "--data", path], more].concat(), code, &[part]);
    };
    let words = write("words.tsv", "a\tO\nfilm\tB-X\n\nfine\tO\n");
    with(&words, &["--classes", "O,B-X"], 3, "no output has a row of classes a token");
    with(&words, &[], 3, "which of the model's classes is it? Name them");
    with(&words, &["--text-column", "a"], 2, "--label-column");
    let question = "{\"question\": \"what ?\", \"context\": \"a film\", \"answers\": {\"text\": [\"film\"]}}\n";
    with(&write("q.jsonl", question), &[], 3, "where an answer starts and ends");
    let several =
        write("several.jsonl", "{\"text\": \"a film\", \"label\": [0, 1]}\n{\"text\": \"b\", \"label\": [2]}\n");
    with(&several, &["--label-column", "label"], 3, "label 2 is none of the model's 2 classes");
    let table = write("table.csv", "text,a,b\na film,1,0\na good film,0,2\n");
    with(&table, &["--label-column", "a,b"], 3, "`2` is neither 0 nor 1");
    with(&table, &["--label-column", "a,c"], 3, "no column `c`");
}

/// The summary says what was made of little text, and an option does without.
#[test]
fn what_is_made_of_little_text_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let text = std::fs::read_to_string(fixture("reviews/reviews.tsv")).unwrap();
    std::fs::write(at("few.tsv"), text.lines().take(80).map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    let rewrite = |more: &[&str]| -> Output {
        let (data, student) = (at("few.tsv"), at("student.onnx"));
        let base = ["rewrite", &teacher(), "-o", &student, "--data", &data, "--tokenizer", &tokenizer()];
        run(&[&base[..], &["--transfer", "closed-form", "--calibration-tokens", "4000"], more].concat())
    };
    let printed = |output: Output| {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let with = printed(rewrite(&[]));
    assert!(with.contains("of them made of others"), "{with}");
    assert!(!printed(rewrite(&["--no-augmentation"])).contains("made of others"));
}
