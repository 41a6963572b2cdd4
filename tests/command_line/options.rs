//! Options that would be passed over in silence, ask for more than there can be, or say nothing; and what a student says of
//! itself.

use mabert_graph::Model;
use serde_json::Value;

use super::{fails, fixture, json, run, teacher, tokenizer};

#[test]
fn what_would_be_ignored_is_refused() {
    let text = ["run", &teacher(), "--tokenizer", &tokenizer(), "--text", "a film"];
    let with = |more: &[&str], part: &str| fails(&[&text[..], more].concat(), 2, &[part]);
    with(&["--pair-column", "second"], "--pair");
    with(&["--text-column", "first"], "--data");
    with(&["--classes", "bad,good"], "--data");
    with(&["--pair", " "], "--pair is empty");
    let arrays = ["run", &teacher(), "--npz", "a.npz"];
    fails(&[&arrays[..], &["--tokenizer", &tokenizer()]].concat(), 2, &["--tokenizer"]);
    fails(&[&arrays[..], &["--truncate"]].concat(), 2, &["--truncate"]);
    fails(&["bench", &teacher(), "--tokenizer", &tokenizer()], 2, &["--tokenizer"]);
    let eval = ["eval", &teacher(), "--data", &fixture("reviews/reviews.tsv"), "--tokenizer", &tokenizer()];
    let labelled = [&eval[..], &["--label-column", "label"]].concat();
    fails(&[&labelled[..], &["--classes", "bad,bad"]].concat(), 2, &["bad", "twice"]);
    fails(&[&labelled[..], &["--classes", "bad,,good"]].concat(), 2, &["a class has no name"]);
}

/// Of texts, of ready arrays, and of each model that is evaluated; and what the student says of itself.
#[test]
fn texts_that_leave_the_bounds_are_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (bounded, free, unfolded) = (at("bounded.onnx"), at("free.onnx"), at("unfolded.onnx"));
    let data = fixture("reviews/reviews.tsv");
    let text = ["--data", &data, "--tokenizer", &tokenizer()];
    for (path, more) in [(&bounded, vec![]), (&free, vec!["--no-bounds"]), (&unfolded, vec!["--no-fold"])] {
        let options = ["--transfer", "closed-form", "--calibration-tokens", "1000"];
        let report = json(&[&["rewrite", &teacher(), "-o", path], &text[..], &options, &more].concat());
        assert_eq!(report["bounds"]["norms"], if path == &free { Value::Null } else { 6.into() });
        let printed = run(&["inspect", path]);
        let printed = String::from_utf8_lossy(&printed.stdout).into_owned();
        let said = if path == &free { "bounds: none" } else { "bounds: behind 6 norms; no value" };
        assert!(printed.contains(said), "{printed}");
    }
    let sentence = ["--tokenizer", &tokenizer(), "--text", "a charming and often affecting journey"];
    let notes = |model: &str, more: &[&str]| {
        let told = json(&[&["run", model], &sentence[..], more].concat())["notes"].to_string();
        (told.contains("stays within the bounds"), told.contains("nothing holds"))
    };
    assert_eq!(notes(&bounded, &["-v"]), (true, false));
    assert_eq!(notes(&bounded, &["-v", "--engine", "onnxruntime"]), (true, false));
    assert_eq!(notes(&unfolded, &["-v"]), (true, false));
    assert_eq!(notes(&free, &["-v"]), (false, true));
    assert_eq!((notes(&bounded, &[]), notes(&teacher(), &["-v"])), ((false, false), (false, false)));
    let eval = ["eval", &teacher(), &bounded, "--label-column", "label", "-v"];
    let told = json(&[&eval[..], &text].concat())["notes"].to_string();
    assert!(told.contains("within the bounds") || told.contains("leave the bounds"), "{told}");
    // A student whose embeddings are a thousand times as large.
    let mut model = Model::load(&bounded).unwrap();
    let name = "m.bert.embeddings.word_embeddings.weight";
    let words = model.constant(name).unwrap().to_f32() * 1e3;
    model.set_constant(name, &words.into());
    let odd = at("odd.onnx");
    model.save(&odd).unwrap();
    let told = json(&[&["run", &odd, "-v"], &sentence[..]].concat())["notes"].to_string();
    assert!(told.contains("leaves the bounds, first behind `layer.0/attention/norm`"), "{told}");
}

#[test]
fn a_pair_may_be_given_beside_a_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pair.jsonl").display().to_string();
    std::fs::write(&path, "{\"text\": \"a film\", \"text_pair\": \"a fine one\"}").unwrap();
    let base = ["run", &teacher(), "--tokenizer", &tokenizer()];
    let given = json(&[&base[..], &["--text", "a film", "--pair", "a fine one"]].concat());
    assert_eq!(given["outputs"], json(&[&base[..], &["--data", &path]].concat())["outputs"]);
    assert_ne!(given["outputs"], json(&[&base[..], &["--text", "a film"]].concat())["outputs"]);
}

#[test]
fn classes_may_stand_between_blanks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("words.csv").display().to_string();
    std::fs::write(&path, "sentence,label\na fine film,good\na silly mess,bad\n").unwrap();
    let eval = ["eval", &teacher(), "--data", &path, "--tokenizer", &tokenizer(), "--label-column", "label"];
    json(&[&eval[..], &["--classes", "bad, good"]].concat());
    std::fs::write(&path, "sentence,label\na fine film,True\na silly mess,false\n").unwrap();
    json(&eval);
}

#[test]
fn more_than_there_can_be_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("student.onnx").display().to_string();
    let rewrite = |more: &[&str], part: &str| fails(&[&["rewrite", &teacher(), "-o", &out], more].concat(), 2, &[part]);
    rewrite(&["--hidden", "100000"], "--hidden");
    rewrite(&["--hidden", "18446744073709551615"], "--hidden");
    rewrite(&["--max-seq", "1000000000"], "--max-seq");
    rewrite(&["--max-seq", "1"], "--max-seq");
    rewrite(&["--calibration-tokens", "1000000000000"], "--calibration-tokens");
    for more in [["--batch", "1000000000"], ["--batch", "0"], ["--seq", "0"], ["--seq", "99999999999"]] {
        fails(&[&["bench", &teacher()], &more[..]].concat(), 2, &[more[0]]);
    }
    fails(&["bench", &teacher(), "--batch", "100000", "--seq", "64"], 2, &["--batch 100000 with --seq 64"]);
    for count in ["0", "many", "99999999999999"] {
        fails(&["verify", &teacher(), &teacher(), "--sequences", count], 2, &["--sequences"]);
    }
}

#[test]
fn quiet_commands_print_what_is_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let model = fixture("coverage/bert-classification-torchscript-17.onnx");
    let text = ["run", &teacher(), "--tokenizer", &tokenizer(), "--text", "fine", "-q"];
    let silent: [Vec<String>; 3] = [
        ["rewrite", &model, "-q", "-o", &at("student.onnx")].map(str::to_owned).to_vec(),
        ["verify", &model, &model, "-q"].map(str::to_owned).to_vec(),
        [&text[..], &["-o", &at("out.npz")]].concat().iter().map(ToString::to_string).collect(),
    ];
    for command in &silent {
        let output = run(&command.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(
            output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(),
            "{command:?}: {output:?}"
        );
    }
    assert!(!run(&text).stdout.is_empty());
    let wrong = run(&["inspect", "nowhere.onnx", "-q"]);
    assert!(!wrong.stderr.is_empty());
}

#[test]
fn bench_times_what_the_models_take() {
    let timed = json(&["bench", &teacher(), "--runs", "1"]);
    assert_eq!(timed["results"][0]["seq"], 64);
    fails(&["bench", &teacher(), "--seq", "128"], 3, &["128", "64"]);
}

#[test]
fn a_student_says_how_long_a_sequence_may_be() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let mut old = Model::load(fixture("coverage/bert-classification-torchscript-17.onnx")).unwrap();
    // As files of version 3 have it: every initializer is an input too.
    old.proto_mut().ir_version = 3;
    let graph = old.graph_mut();
    let inputs = graph
        .initializer
        .iter()
        .map(|tensor| mabert_graph::proto::ValueInfoProto { name: tensor.name.clone(), ..Default::default() });
    let inputs: Vec<_> = inputs.collect();
    graph.input.extend(inputs);
    old.save(at("old.onnx")).unwrap();
    // Hinges take what the model takes, whatever they are fitted to.
    for (softmax, limit) in [("hinges", 32), ("network", 16)] {
        json(&["rewrite", &at("old.onnx"), "-o", &at("student.onnx"), "--max-seq", "16", "--softmax", softmax]);
        let student = Model::load(at("student.onnx")).unwrap();
        assert!(student.proto().ir_version >= 4);
        assert_eq!(student.graph().input.len(), 3, "initializers alone");
        let said = &student.proto().doc_string;
        assert!(said.contains(&format!("at most {limit} tokens")), "{softmax}: {said}");
        let given = student.inputs();
        for input in student.graph().input.iter().filter(|i| given.iter().any(|given| given.name == i.name)) {
            assert!(input.doc_string.contains(&format!("n at most {limit}")), "{}", input.doc_string);
        }
    }
}
