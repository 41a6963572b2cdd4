//! The command line as a user meets it: what it prints, what it writes, how it exits.

mod faults;
mod options;
mod outputs;
mod tasks;
mod texts;
mod vectors;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn fixture(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name).display().to_string()
}

fn teacher() -> String {
    fixture("bert-mini-sst2/model.onnx")
}

fn tokenizer() -> String {
    fixture("bert-mini-sst2/tokenizer.json")
}

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_onnx-mabert")).args(arguments).output().expect("the program starts")
}

/// Runs a command that must succeed, and parses what it prints.
fn json(arguments: &[&str]) -> Value {
    let output = run(&[arguments, &["--json"]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    serde_json::from_slice(&output.stdout).expect("--json prints JSON")
}

/// Runs a command that must fail with `code` and one message that holds all of `parts`.
fn fails(arguments: &[&str], code: i32, parts: &[&str]) {
    let output = run(arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
    for part in parts {
        assert!(errors.contains(part), "{arguments:?} should mention {part}: {errors}");
    }
    assert!(!errors.contains("panicked") && !errors.contains("internal error"), "{arguments:?}: {errors}");
}

/// A folder with a student in it.
fn student() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("student.onnx").display().to_string();
    let data = fixture("reviews/reviews.tsv");
    let calibration = ["--data", &data, "--tokenizer", &tokenizer(), "--calibration-tokens", "4000"];
    let output = run(&[&["rewrite", &teacher(), "-o", &path], &calibration[..]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let printed = String::from_utf8_lossy(&output.stdout);
    for part in ["Operator", "Softmax", "layer.2", "affine, folded", "logits", "Tanh", "4.6 MB ->"] {
        assert!(printed.contains(part), "{part} is missing in:\n{printed}");
    }
    (folder, path)
}

#[test]
fn a_model_is_rewritten_inspected_run_verified_and_timed() {
    let (folder, student) = student();
    let before = json(&["inspect", &teacher()]);
    let counts = |v: &Value| ["attentions", "activations", "norms"].map(|k| v[k].as_u64().unwrap());
    assert_eq!(counts(&before), [3, 3, 7]);
    let after = json(&["inspect", &student]);
    assert_eq!(counts(&after), [0, 0, 0]);
    assert_eq!(after["rewritten"]["max_seq"], 64);
    assert_eq!(after["non_linear"].as_array().unwrap().len(), 1);

    let text = ["run", &student, "--tokenizer", &tokenizer(), "--text", "a charming and often affecting journey"];
    let outputs = json(&text);
    let logits: Vec<f64> =
        outputs["outputs"][0]["data"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    assert!(logits[1] > logits[0], "a positive review: {logits:?}");

    let npz = folder.path().join("out.npz").display().to_string();
    let data = fixture("reviews/reviews.tsv");
    let many = ["run", &student, "--tokenizer", &tokenizer(), "--data", &data, "-o", &npz];
    assert_eq!(json(&many)["outputs"][0]["shape"], serde_json::json!([2400, 2]));
    assert!(Path::new(&npz).is_file());

    // Both engines on real sentences, and the student against its teacher at a tolerance that cannot hold.
    let verified = json(&["verify", &student, "--data", &data, "--tokenizer", &tokenizer()]);
    assert_eq!(verified["holds"], true);
    assert_eq!(verified["engines"], serde_json::json!(["tract", "onnxruntime"]));
    let strict = ["verify", &teacher(), &student, "--data", &data, "--tokenizer", &tokenizer(), "--atol", "1e-6"];
    fails(&strict, 1, &["more than the tolerance"]);

    let timed = json(&["bench", &teacher(), &student, "--seq", "16", "--runs", "3", "--engine", "both"]);
    assert_eq!(timed["results"].as_array().unwrap().len(), 4);
    assert_eq!(timed["ratios"].as_array().unwrap().len(), 3);
    for key in ["model", "engine", "batch", "seq", "threads", "median_ms", "min_ms", "runs"] {
        assert!(!timed["results"][0][key].is_null(), "{key}");
    }
    fails(&["rewrite", &student, "-o", &npz], 3, &["already rewritten"]);
}

#[test]
fn sites_can_be_compared() {
    // No two answers of this teacher's are further apart: its logits lie within 3 of zero.
    const FURTHEST: &str = "6";
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (data, unfolded, folded, report) =
        (fixture("reviews/reviews.tsv"), at("unfolded.onnx"), at("folded.onnx"), at("report.json"));
    let text = ["--data", &data, "--tokenizer", &tokenizer()];
    let rewrite = |output: &str, more: &[&str]| {
        let calibration = ["--transfer", "closed-form", "--calibration-tokens", "1000"];
        json(&[&["rewrite", &teacher(), "-o", output], &calibration[..], &text, more].concat())
    };
    let compare =
        |student: &str| json(&[&["verify", &teacher(), student, "--sites", "--atol", FURTHEST], &text[..]].concat());
    let cosine = |row: &Value| row["mean_cosine"].as_f64().unwrap();

    rewrite(&unfolded, &["--no-fold", "--report", &report]);
    let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert_eq!(report["sites"].as_array().unwrap().len(), 13);
    let verified = compare(&unfolded);
    let sites = verified["sites"].as_array().unwrap();
    assert!(sites.len() >= 7, "{verified}");
    // A student that is not calibrated is below that at every site but the first two norms.
    assert!(sites.iter().all(|site| cosine(site) > 0.5), "{verified}");
    assert!(cosine(&verified["outputs"][0]) > 0.6, "{verified}");
    let strict = ["verify", &teacher(), &unfolded, "--sites", "--atol", "0.5"];
    fails(&[&strict[..], &text].concat(), 1, &["more than the tolerance"]);
    fails(&["verify", &teacher(), &unfolded, "--sites", "--engine", "onnxruntime"], 2, &["only tract"]);

    // Once folded fewer are left, and what the last layer has of first tokens alone goes by other names.
    rewrite(&folded, &[]);
    let left = compare(&folded)["sites"].as_array().unwrap().clone();
    assert!(!left.is_empty() && left.len() < sites.len(), "{left:?}");
    assert!(left.iter().all(|site| cosine(site) > 0.5), "{left:?}");
}

#[test]
fn sizes_count_the_data_beside_a_model_whatever_it_is_called() {
    let folder = tempfile::tempdir().unwrap();
    let model = mabert_graph::Model::load(teacher()).unwrap();
    let path = mabert_tests::save_as_optimum(&model, folder.path()).display().to_string();
    let output = folder.path().join("student.onnx").display().to_string();
    let report = json(&["rewrite", &path, "-o", &output, "--transfer", "none"]);
    let inside = std::fs::metadata(teacher()).unwrap().len() as f64;
    for size in ["bytes_before", "bytes_after"] {
        let size = report[size].as_f64().unwrap();
        assert!(size > 0.8 * inside && size < 1.5 * inside, "{size} of {inside} bytes");
    }
}

#[test]
fn passes_can_be_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("partly.onnx").display().to_string();
    let base = ["rewrite", &teacher(), "-o", &path, "--transfer", "none"];
    let with = |more: &[&str]| json(&[&base[..], more].concat());
    assert_eq!(with(&["--keep", "softmax,norm"])["operators_after"]["Softmax"], 3);
    assert_eq!(with(&["--until", "canonical"])["operators_after"]["LayerNormalization"], 7);
    assert_eq!(with(&["--attention", "paper"])["options"]["order"], "paper");
    fails(&[&base[..], &["--until", "everything"]].concat(), 2, &["decompose-fused"]);
}

#[test]
fn explain_says_what_was_found() {
    let explained = json(&["explain", &teacher()]);
    let anchors = explained["anchors"].as_array().unwrap();
    assert_eq!(anchors.iter().filter(|a| a["kind"] == "norm" && a["reason"].is_null()).count(), 7);
    fails(&["explain", &teacher(), "--node", "nowhere"], 2, &["no node `nowhere`"]);
    // Rotated queries are no linear map: what was probed, and that it is not one.
    let rotated = fixture("coverage/modernbert-classification-torchscript-17.onnx");
    let missed = &json(&["explain", &rotated])["misses"][0];
    assert!(missed["reason"].as_str().unwrap().contains("columns of weight"), "{missed}");
    let nodes = missed["tried"]["nodes"].as_array().unwrap();
    assert!(nodes.iter().any(|n| n.as_str().unwrap().starts_with("MatMul `")) && nodes.len() > 4, "{missed}");
}

#[test]
fn bad_input_gets_one_clear_message() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let out = at("out.onnx");
    let whole = std::fs::read(teacher()).unwrap();
    std::fs::write(at("cut.onnx"), &whole[..5000]).unwrap();
    std::fs::write(at("empty.onnx"), b"").unwrap();
    std::fs::write(at("groups.onnx"), [0xa3, 0x06].repeat(1 << 20)).unwrap();
    std::fs::write(
        at("noise.onnx"),
        (0..4000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect::<Vec<u8>>(),
    )
    .unwrap();
    for (name, part) in [
        ("cut.onnx", "truncated"),
        ("empty.onnx", "empty"),
        ("groups.onnx", "a group, which ONNX does not have"),
        ("noise.onnx", "not an ONNX model"),
        ("none.onnx", "cannot be read"),
    ] {
        for command in [vec!["rewrite", "-o", &out], vec!["inspect"], vec!["explain"], vec!["bench"], vec!["verify"]] {
            let path = at(name);
            fails(&[&command[..], &[&path]].concat(), 3, &[name, part]);
        }
    }
    fails(&["rewrite", &teacher(), "-o", &at("no/such/folder.onnx")], 3, &["folder does not exist"]);
    fails(&["rewrite", &teacher(), "-o", &folder.path().display().to_string()], 3, &["it is a folder"]);
    fails(&["rewrite", &teacher(), "-o", &teacher()], 2, &["would be overwritten"]);
    fails(&["rewrite", &teacher(), "-o", &out, "--max-seq", "0"], 2, &["--max-seq"]);
    fails(&["rewrite", &teacher(), "-o", &out, "--max-seq", "65"], 2, &["65", "64"]);
    let data = fixture("reviews/reviews.tsv");
    fails(&["rewrite", &teacher(), "-o", &out, "--data", &data], 3, &["--tokenizer"]);
    let wrong = ["rewrite", &teacher(), "-o", &out, "--data", &data, "--tokenizer", &data];
    fails(&wrong, 3, &["reviews.tsv", "not a tokenizer.json"]);
    std::fs::write(at("header.tsv"), "sentence\n").unwrap();
    let nothing = ["rewrite", &teacher(), "-o", &out, "--data", &at("header.tsv"), "--tokenizer", &tokenizer()];
    fails(&nothing, 3, &["no examples"]);
    let long = "good film ".repeat(60);
    fails(&["run", &teacher(), "--tokenizer", &tokenizer(), "--text", &long], 3, &["--truncate"]);
    fails(&["run", &teacher()], 2, &["--text"]);
    let biased = fixture("coverage/mpnet-classification-torchscript-17.onnx");
    let linear = ["rewrite", &biased, "-o", &out, "--attention", "linear"];
    let hinges = [&linear[..], &["--softmax", "hinges"]].concat();
    fails(&hinges, 2, &["hinges", "networks have one", "(--softmax network)"]);
    let network = [&linear[..], &["--softmax", "network"]].concat();
    fails(&network, 2, &["bias", "(--attention paper, --keep softmax)"]);
    fails(&["rewrite", &biased, "-o", &out, "--share", "all"], 2, &["--softmax network"]);
    let asked = ["rewrite", &biased, "-o", &out, "--softmax", "hinges", "--for", "any"];
    fails(&asked, 2, &["--softmax auto"]);
    let both = ["rewrite", &biased, "-o", &out, "--softmax", "per-layer", "--share", "head"];
    fails(&both, 2, &["different heads"]);
    assert!(!Path::new(&out).exists(), "nothing is written where nothing was made");
    let left: Vec<PathBuf> = std::fs::read_dir(folder.path()).unwrap().map(|f| f.unwrap().path()).collect();
    assert_eq!(left.len(), 5, "no temporary file is left: {left:?}");
}

#[test]
fn arrays_that_do_not_fit_are_refused() {
    use mabert_runtime::{Tensor, npz};
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, ids: Tensor| {
        let path = folder.path().join(name).display().to_string();
        let shape = ids.shape().to_vec();
        let ones = Tensor::new(&shape, vec![1i64; shape.iter().product()]);
        let zeros = Tensor::new(&shape, vec![0i64; shape.iter().product()]);
        let arrays = [("input_ids", ids), ("attention_mask", ones), ("token_type_ids", zeros)];
        npz::write(&path, &arrays.map(|(n, t)| (n.to_owned(), t))).unwrap();
        path
    };
    let run_on = |path: &str, parts: &[&str]| fails(&["run", &teacher(), "--npz", path], 3, parts);
    run_on(&write("type.npz", Tensor::new(&[1, 2], vec![1f32; 2])), &["input_ids", "f32", "i64"]);
    run_on(&write("rank.npz", Tensor::new(&[2], vec![1i64; 2])), &["input_ids", "rank 2"]);
    run_on(&write("range.npz", Tensor::new(&[1, 2], vec![1i64, 5000])), &["input_ids", "5000", "4096"]);
    run_on(&write("long.npz", Tensor::new(&[1, 65], vec![1i64; 65])), &["65", "64"]);
    let alone = folder.path().join("alone.npz").display().to_string();
    npz::write(&alone, &[("ids".to_owned(), Tensor::new(&[1, 2], vec![1i64; 2]))]).unwrap();
    run_on(&alone, &["no input `ids`", "input_ids"]);
    run_on(&fixture("reviews/reviews.tsv"), &["not an .npz file"]);
}

#[test]
fn a_machine_without_onnxruntime_is_told_how_to_get_it() {
    let command = || Command::new(env!("CARGO_BIN_EXE_onnx-mabert"));
    let output = command().args(["verify", &teacher()]).env_remove("ORT_DYLIB_PATH").output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3));
    assert!(errors.contains("pip install onnxruntime") && errors.contains("--ort-lib"), "{errors}");
}

#[test]
fn a_task_is_measured() {
    let data = fixture("reviews/reviews.tsv");
    let base = ["eval", &teacher(), "--data", &data, "--tokenizer", &tokenizer()];
    let labelled = [&base[..], &["--label-column", "label"]].concat();
    let measure = |more: &[&str]| json(&[&labelled[..], more].concat())["models"][0]["value"].as_f64().unwrap();
    let accuracy = measure(&[]);
    assert!((0.9..0.96).contains(&accuracy), "{accuracy}");
    assert!((accuracy - measure(&["--engine", "onnxruntime"])).abs() < 2e-3);
    assert!((0.8..0.95).contains(&measure(&["--metric", "mcc"])));
    assert!(measure(&["--metric", "f1", "--min", "0.9"]) > 0.9);
    fails(&[&labelled[..], &["--min", "0.99"]].concat(), 1, &["below 0.99"]);
    fails(&[&labelled[..], &["--metric", "pearson"]].concat(), 3, &["one value a text"]);
    fails(&[&base[..], &["--label-column", "sentiment"]].concat(), 3, &["no column `sentiment`", "sentence, label"]);
    fails(&[&base[..], &["--label-column", "sentence"]].concat(), 3, &["line 2", "not a number", "--classes"]);

    let folder = tempfile::tempdir().unwrap();
    let words = folder.path().join("words.tsv").display().to_string();
    let text = std::fs::read_to_string(&data).unwrap().replace("\t1\n", "\tgood\n").replace("\t0\n", "\tbad\n");
    std::fs::write(&words, text).unwrap();
    let in_words = ["eval", &teacher(), "--data", &words, "--tokenizer", &tokenizer(), "--label-column", "label"];
    let measured = json(&[&in_words[..], &["--classes", "bad,good"]].concat());
    assert_eq!(measured["models"][0]["value"].as_f64(), Some(accuracy));
    fails(&[&in_words[..], &["--classes", "bad"]].concat(), 3, &["label `good` is none of the classes bad"]);
    let stars = folder.path().join("stars.tsv").display().to_string();
    std::fs::write(&stars, "sentence\tlabel\na fine film\t1\na fine film\t5\n").unwrap();
    let in_stars = ["eval", &teacher(), "--data", &stars, "--tokenizer", &tokenizer(), "--label-column", "label"];
    fails(&in_stars, 3, &["line 3", "label 5 is none of the model's 2 classes"]);
}

/// Killed with no chance to clean up, wherever it is: what it goes on with gives the same file as an undisturbed run.
#[test]
fn a_killed_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (data, state) = (fixture("reviews/reviews.tsv"), at("state"));
    let base = |output: &str| {
        let options =
            ["--tokenizer", &tokenizer(), "--data", &data, "--transfer", "full", "--steps", "160", "--batch", "8"];
        let more = ["--calibration-tokens", "800", "--threads", "1", "--quiet", "-o", output];
        [&["rewrite", &teacher()], &options[..], &more].concat().iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()
    };
    let program = || Command::new(env!("CARGO_BIN_EXE_onnx-mabert"));
    assert!(program().args(base(&at("whole.onnx"))).output().unwrap().status.success());
    let with_state = |more: &[&str]| {
        let mut arguments = base(&at("resumed.onnx"));
        arguments.extend(["--checkpoint", &state].iter().chain(more).map(|s| (*s).to_owned()));
        arguments
    };
    let mut killed = 0;
    for round in 0..2 {
        let before = std::fs::read(at("state/state.safetensors")).ok();
        let mut child = program().args(with_state(if round == 0 { &[] } else { &["--resume"] })).spawn().unwrap();
        // Until it has written something new.
        while child.try_wait().unwrap().is_none() {
            if std::fs::read(at("state/state.safetensors")).ok() != before {
                child.kill().unwrap();
                killed += 1;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
    assert!(killed > 0 && !Path::new(&at("resumed.onnx")).exists());
    let refused: Vec<String> = with_state(&[]);
    fails(&refused.iter().map(String::as_str).collect::<Vec<_>>(), 2, &["--resume"]);
    assert!(program().args(with_state(&["--resume"])).output().unwrap().status.success());
    assert!(std::fs::read(at("resumed.onnx")).unwrap() == std::fs::read(at("whole.onnx")).unwrap());
}

#[test]
fn a_student_is_trained_further_by_transfer() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (data, unfolded, trained) = (fixture("reviews/reviews.tsv"), at("unfolded.onnx"), at("trained.onnx"));
    let text = ["--data", &data, "--tokenizer", &tokenizer()];
    let closed = [
        "rewrite",
        &teacher(),
        "-o",
        &unfolded,
        "--no-fold",
        "--transfer",
        "closed-form",
        "--calibration-tokens",
        "2000",
    ];
    json(&[&closed[..], &text].concat());
    let base = ["transfer", &teacher(), &unfolded, "-o", &trained, "--steps", "400", "--batch", "16"];
    let report = json(&[&base[..], &text, &["--label-column", "label", "--dev", &data]].concat());
    let loss =
        |when: &str| ["outputs", "hidden"].iter().map(|part| report["full"][when][part].as_f64().unwrap()).sum::<f64>();
    assert!(loss("after") < 0.97 * loss("before"), "{}", report["full"]);
    assert_eq!(report["dev"]["examples"], 2400);
    assert_eq!(json(&["inspect", &trained])["norms"], 0);
    fails(&[&base[..], &text, &["--alpha", "0.5"]].concat(), 2, &["--label-column"]);
    // Tagged words need no column; here they find no output.
    let words = folder.path().join("a.conll");
    std::fs::write(&words, "a\tO\nfilm\tO\n\nno\tO\nfilm\tO\n\n".repeat(20)).unwrap();
    let words = ["--data", words.to_str().unwrap(), "--tokenizer", &tokenizer(), "--classes", "O,B-LOC"];
    fails(&[&base[..], &words, &["--alpha", "0.5"]].concat(), 3, &["a tag a word", "labels cannot be used"]);
    fails(&[&base[..], &text, &["--dev", &data]].concat(), 2, &["--label-column"]);
    fails(&[&base[..], &text, &["--lr", "0"]].concat(), 2, &["above 0"]);
    let refused = |student: &str, output: &str, code: i32, part: &str| {
        fails(&[&["transfer", &teacher(), student, "-o", output], &text[..]].concat(), code, &[part]);
    };
    refused(&teacher(), &trained, 3, "no student");
    refused(&trained, &at("again.onnx"), 3, "--no-fold");
    refused(&unfolded, &unfolded, 2, "would be overwritten");
    fails(&base, 2, &["--data"]);
    fails(&["rewrite", &teacher(), "-o", &trained, "--steps", "5"], 2, &["--steps", "--transfer full"]);
}
