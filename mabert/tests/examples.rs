//! The examples run as a user would run them.

use std::path::{Path, PathBuf};
use std::process::Command;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
}

/// What an example prints; `cargo test` builds examples before it runs tests.
fn run(example: &str, arguments: &[&Path]) -> String {
    let tests = std::env::current_exe().expect("a test knows its own program");
    let program = tests.ancestors().nth(2).expect("tests lie in target/PROFILE/deps").join("examples").join(example);
    let output = Command::new(&program).args(arguments).output();
    let output = output.unwrap_or_else(|e| panic!("{}: {e}; `cargo build --examples` makes it", program.display()));
    assert!(output.status.success(), "{example}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn a_model_is_rewritten_served_and_run_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let [student, texts] = ["ma.onnx", "texts.txt"].map(|name| folder.path().join(name));
    let (model, tokenizer) = (fixture("bert-mini-sst2/model.onnx"), fixture("bert-mini-sst2/tokenizer.json"));
    let said = run("rewrite", &[&model, &fixture("reviews/reviews.tsv"), &tokenizer, &student]);
    assert!(said.contains("logits: mean difference") && said.contains("takes up to 64 tokens"), "{said}");

    std::fs::write(&texts, "a charming and often affecting journey\ndull\na dull , empty and boring film\n").unwrap();
    for threads in ["1", "3"] {
        let answers = run("serve_batches", &[&student, &tokenizer, &texts, Path::new(threads)]);
        assert_eq!(answers, "1\t1\n2\t0\n3\t0\n");
    }

    // Two rows of logits, equal to some digits, from operators of two kinds.
    let logits = |runtime: &str| -> Vec<f32> {
        let said = run("pick_backend", &[&student, Path::new(runtime)]);
        let row = said.split("[[").nth(1).and_then(|rest| rest.split("]]").next()).expect("a matrix of one row");
        row.split(',').map(|value| value.trim().parse().expect("a number")).collect()
    };
    let (ours, plain) = (logits(mabert::TRACT_RUNTIME), logits("default"));
    assert_eq!(ours.len(), 2);
    for (a, b) in ours.iter().zip(&plain) {
        assert!((a - b).abs() < 1e-4, "{ours:?} {plain:?}");
    }
}

#[test]
fn an_example_says_what_it_needs() {
    let tests = std::env::current_exe().unwrap();
    let program = tests.ancestors().nth(2).unwrap().join("examples/serve_batches");
    let output = Command::new(program).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("give MODEL TOKENIZER TEXTS"));
}
