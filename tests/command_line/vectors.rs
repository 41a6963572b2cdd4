//! Feature models on the command line: vectors of texts in place of classes.

use mabert_tests::sentence_model;

use super::{fails, fixture, json, run, tokenizer};

#[test]
fn vectors_are_printed_where_there_are_no_classes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (model, student, data) = (at("model.onnx"), at("student.onnx"), fixture("reviews/reviews.tsv"));
    sentence_model(false).save(&model).unwrap();
    let text = ["--data", &data, "--tokenizer", &tokenizer()];
    let rewrite = ["rewrite", &model, "-o", &student, "--transfer", "closed-form", "--calibration-tokens", "2000"];
    let output = run(&[&rewrite[..], &text].concat());
    let printed = String::from_utf8_lossy(&output.stdout);
    for part in ["Least cosine  Same neighbour", "last_hidden_state (the mean over its tokens)"] {
        assert!(printed.contains(part), "{part} is missing in:\n{printed}");
    }
    assert!(!printed.contains("argmax"), "{printed}");
    let report = json(&[&rewrite[..], &text, &["--pooling", "first"]].concat());
    assert_eq!(report["outputs"][0]["vectors"]["pooling"], "first");
    assert!(report["outputs"][0]["agreement"].is_null(), "{report}");

    let verify = ["verify", &model, &student];
    let verified = json(&[&verify[..], &text, &["--cosine", "0.1"]].concat());
    let vectors = &verified["outputs"][0]["vectors"];
    let figure = |name: &str| vectors[name].as_f64().unwrap();
    assert_eq!((vectors["pooling"].as_str(), vectors["texts"].as_u64()), (Some("mean"), Some(64)));
    assert!(figure("mean_cosine") > figure("least_cosine") && figure("same_neighbour") > 0.05, "{verified}");
    // What is asked of the cosine is asked of vectors, of tokens where there are none.
    let least = format!("{}", figure("least_cosine") - 1e-6);
    assert_eq!(json(&[&verify[..], &text, &["--cosine", &least]].concat())["holds"], true);
    fails(&[&verify[..], &text, &["--cosine", &least, "--pooling", "none"]].concat(), 1, &["tolerance"]);
    let printed = run(&[&verify[..], &text, &["--cosine", "0.1"]].concat());
    let printed = String::from_utf8_lossy(&printed.stdout).into_owned();
    assert!(printed.contains("Same neighbour") && !printed.contains("argmax"), "{printed}");

    fails(&[&verify[..], &text, &["--pooling", "output"]].concat(), 2, &["`[batch, channels]`", "--pooling"]);
    std::fs::create_dir(folder.path().join("1_Pooling")).unwrap();
    std::fs::write(at("1_Pooling/config.json"), r#"{"pooling_mode_max_tokens": true}"#).unwrap();
    let refused = ["config.json", "max_tokens", "--pooling"];
    fails(&[&verify[..], &text].concat(), 3, &refused);
    fails(&[&rewrite[..], &text].concat(), 3, &refused);
    json(&[&verify[..], &text, &["--pooling", "mean", "--cosine", "0.1"]].concat());
}

#[test]
fn scored_pairs_are_evaluated_on_both_engines() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let model = at("model.onnx");
    sentence_model(true).save(&model).unwrap();
    let write = |name: &str, text: &str| {
        std::fs::write(at(name), text).unwrap();
        at(name)
    };
    let rows = [
        ("a fine film", "a fine film", "5"),
        ("a fine film", "a good film", "4"),
        ("a dull mess", "a fine film", "1"),
        ("the plot is thin", "i loved every minute", "1"),
    ];
    let table = |separator: &str| {
        let lines = rows.map(|(a, b, score)| format!("{}\n", [a, b, score].join(separator)));
        format!("{}\n{}", ["sentence1", "sentence2", "score"].join(separator), lines.concat())
    };
    let lines =
        rows.map(|(a, b, score)| format!("{{\"sentence1\":\"{a}\",\"sentence2\":\"{b}\",\"score\":{score}}}\n"));
    let files = [write("a.tsv", &table("\t")), write("a.csv", &table(",")), write("a.jsonl", &lines.concat())];
    let eval = |data: &str, more: &[&str]| {
        let sts =
            ["eval", &model, "--tokenizer", &tokenizer(), "--metric", "sts", "--label-column", "score", "--data", data];
        json(&[&sts[..], more].concat())
    };
    let first = eval(&files[0], &[]);
    assert_eq!((first["metric"].as_str(), first["examples"].as_u64()), (Some("sts"), Some(4)));
    let value = first["models"][0]["value"].as_f64().unwrap();
    assert!(value.is_finite() && value > 0.5, "the same text twice is nearest: {first}");
    for file in &files {
        for engine in ["tract", "onnxruntime"] {
            let other = eval(file, &["--engine", engine])["models"][0]["value"].as_f64().unwrap();
            assert!((other - value).abs() < 1e-9, "{file} {engine}: {other} {value}");
        }
    }
    let sts = ["eval", &model, "--tokenizer", &tokenizer(), "--metric", "sts", "--label-column", "score"];
    let lone = write("lone.tsv", "sentence\tscore\na fine film\t5\n");
    fails(&[&sts[..], &["--data", &lone]].concat(), 3, &["lone.tsv, line 2", "--pair-column"]);
    let ids = write("ids.jsonl", "{\"input_ids\": [2, 7, 3], \"score\": 1}\n");
    fails(&[&sts[..], &["--data", &ids]].concat(), 3, &["ids.jsonl, line 1"]);
    let accuracy = ["eval", &model, "--tokenizer", &tokenizer(), "--label-column", "score", "--data", &files[0]];
    fails(&[&accuracy[..], &["--pooling", "mean"]].concat(), 2, &["--metric sts"]);
    let classifier = ["eval", &fixture("bert-mini-sst2/model.onnx"), sts[2], sts[3]];
    fails(&[&classifier[..], &sts[4..], &["--data", &files[0]]].concat(), 2, &["`logits`", "--pooling"]);
}
