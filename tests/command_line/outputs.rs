//! What is written, and what must not be: nothing that is read is written over, and names reach no terminal as they are.

use std::path::Path;
use std::process::{Command, Stdio};

use mabert_graph::{Model, is_printable};

use super::{fails, fixture, json, run, teacher, tokenizer};

fn tiny() -> String {
    fixture("coverage/bert-classification-torchscript-17.onnx")
}

fn bytes(path: &str) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn nothing_that_is_read_is_written_over() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let inputs = ["model.onnx", "data.tsv", "extra.tsv", "dev.tsv", "tokenizer.json", "arrays.npz"];
    for (name, from) in inputs.iter().zip([teacher(), fixture("reviews/reviews.tsv")].iter().cycle()) {
        std::fs::copy(from, at(name)).unwrap();
    }
    std::fs::copy(tokenizer(), at("tokenizer.json")).unwrap();
    std::fs::hard_link(at("model.onnx"), at("hard.onnx")).unwrap();
    let before = inputs.map(|name| bytes(&at(name)));
    let [model, data, extra, dev, tokenizer] =
        [at("model.onnx"), at("data.tsv"), at("extra.tsv"), at("dev.tsv"), at("tokenizer.json")];
    let rewrite = ["rewrite", &model, "--data", &data, "--extra-data", &extra, "--dev", &dev];
    let rewrite = [&rewrite[..], &["--label-column", "label", "--tokenizer", &tokenizer]].concat();
    let hard = at("hard.onnx");
    let transfer = [&["transfer", &hard, &model], &rewrite[2..]].concat();
    let refused = |command: &[&str], more: &[&str], part: &str| fails(&[command, more].concat(), 2, &[part]);
    for input in [&model, &data, &extra, &dev, &tokenizer, &hard] {
        for command in [&rewrite, &transfer] {
            refused(command, &["-o", input], "would be overwritten");
            refused(command, &["-o", &at("new.onnx"), "--report", input], "would be overwritten");
        }
    }
    for command in [&rewrite, &transfer] {
        refused(command, &["-o", &at("new.onnx"), "--report", &at("./new.onnx")], "is the same file");
        refused(command, &["-o", &at("new.onnx"), "--report", &at("new.onnx.data")], "data of");
    }
    for input in [&model, &hard, &at("arrays.npz")] {
        refused(&["run", &model, "--npz", &at("arrays.npz")], &["-o", input], "would be overwritten");
    }
    for input in [&model, &data, &tokenizer] {
        let run = ["run", &model, "--data", &data, "--tokenizer", &tokenizer];
        refused(&run, &["-o", input], "would be overwritten");
    }
    // A folder whose files are called as a checkpoint's, but are none.
    std::fs::create_dir(at("state")).unwrap();
    std::fs::copy(teacher(), at("state/start.onnx")).unwrap();
    let full = ["--transfer", "full", "-o", &at("new.onnx"), "--checkpoint", &at("state")];
    fails(&[&rewrite[..], &full].concat(), 3, &["start.onnx", "start.json"]);
    refused(&["rewrite", &at("state/start.onnx")], &full, "would be overwritten");
    assert!(bytes(&at("state/start.onnx")) == bytes(&teacher()));
    assert!(inputs.map(|name| bytes(&at(name))) == before && !Path::new(&at("new.onnx")).exists());
}

#[cfg(unix)]
#[test]
fn outputs_are_files_links_stay_and_modes_are_kept() {
    use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _, symlink};
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    assert!(Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
    symlink("/dev/null", at("to a device")).unwrap();
    for output in ["/dev/null", "/dev/stdout", "/dev/fd/1", &at("pipe"), &at("to a device"), &at("")] {
        fails(&["rewrite", &tiny(), "-o", output], 3, &["cannot be written", "name a file"]);
        fails(&["rewrite", &tiny(), "-o", &at("new.onnx"), "--report", output], 3, &["name a file"]);
        let text = ["run", &teacher(), "--tokenizer", &tokenizer(), "--text", "fine", "-o", output];
        fails(&text, 3, &["name a file"]);
    }
    assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());

    for name in ["store.onnx", "store.json", "store.npz"] {
        std::fs::write(at(name), "old").unwrap();
        std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(0o640)).unwrap();
        symlink(name, at(&name.replace("store", "link"))).unwrap();
    }
    let rewrite = ["rewrite", &tiny(), "-o", &at("link.onnx"), "--report", &at("link.json"), "--transfer", "none"];
    assert!(run(&rewrite).status.success());
    let text = ["run", &teacher(), "--tokenizer", &tokenizer(), "--text", "fine", "-o", &at("link.npz")];
    assert!(run(&text).status.success());
    for name in ["store.onnx", "store.json", "store.npz"] {
        let link = at(&name.replace("store", "link"));
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink(), "{name}");
        assert!(bytes(&at(name)).len() > 100, "{name}");
        assert_eq!(std::fs::metadata(at(name)).unwrap().permissions().mode() & 0o777, 0o640, "{name}");
    }
    assert!(run(&["inspect", &at("link.onnx")]).status.success());
}

/// Who may not read a model may not read its data; and what comes out of a pipe comes once.
#[cfg(unix)]
#[test]
fn data_has_the_mode_of_its_model_and_a_pipe_is_read_once() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let student = at("student.onnx");
    std::fs::write(&student, "old").unwrap();
    std::fs::set_permissions(&student, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert!(Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
    let (pipe, model) = (at("pipe"), bytes(&tiny()));
    let writer = std::thread::spawn(move || std::fs::write(pipe, model).unwrap());
    json(&["rewrite", &at("pipe"), "-o", &student, "--external-data", "--transfer", "none"]);
    writer.join().unwrap();
    for name in [&student, &at("student.onnx.data")] {
        assert_eq!(std::fs::metadata(name).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
    }
}

/// A small model whose names move cursors, turn text and end lines.
fn with_odd_names(path: &str) {
    const ODD: &str = "\n\u{1b}[2J\u{9b}31m\u{202e}";
    let mut model = Model::load(tiny()).unwrap();
    let odd = |name: &str| format!("{name}{ODD}");
    model.proto_mut().producer_name = odd("producer");
    let graph = model.graph_mut();
    let renamed: Vec<String> = graph.input.iter().chain(&graph.output).map(|value| value.name.clone()).collect();
    let rename = |name: &mut String| {
        if renamed.contains(name) {
            *name = odd(name);
        }
    };
    graph.input.iter_mut().chain(&mut graph.output).for_each(|value| rename(&mut value.name));
    for node in &mut graph.node {
        node.input.iter_mut().chain(&mut node.output).for_each(rename);
        node.name = odd(&node.name);
    }
    model.save(path).unwrap();
}

#[test]
fn names_are_printed_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (model, student) = (at("odd.onnx"), at("student.onnx"));
    with_odd_names(&model);
    let arrays = at("none.npz");
    mabert_runtime::npz::write(&arrays, &[("x".to_owned(), mabert_runtime::Tensor::scalar(1i64))]).unwrap();
    let commands: [&[&str]; 9] = [
        &["inspect", &model, "--graph"],
        &["inspect", &model, "--json"],
        &["explain", &model],
        &["explain", &model, "--json"],
        &["rewrite", &model, "-o", &student],
        &["rewrite", &model, "-o", &student, "--json"],
        &["verify", &model, &model],
        &["bench", &model, "--seq", "8", "--runs", "1", "--profile"],
        // A message that lists the inputs.
        &["run", &model, "--npz", &arrays],
    ];
    for command in commands {
        let output = run(command);
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        let raw = text.chars().find(|c| *c != '\n' && !is_printable(*c));
        assert_eq!(raw, None, "{command:?} prints {raw:?}: {text}");
        let is_shown = text.contains("\\u{9b}31m") || text.contains("\\u009b31m");
        assert!(is_shown || command[0] == "bench", "{command:?}: {text}");
        assert!(!text.contains("\n\\u{1b}[2J"), "{command:?}: a name goes over two lines: {text}");
    }
    let inspected = json(&["inspect", &model]);
    assert!(inspected["outputs"][0].as_str().unwrap().contains("\n\u{1b}[2J\u{9b}31m\u{202e}"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_under_what_is_printed_is_told() {
    let full = || Stdio::from(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    let program = || Command::new(env!("CARGO_BIN_EXE_onnx-mabert"));
    let text = ["run", &teacher(), "--tokenizer", &tokenizer(), "--text", "fine"];
    let json = [&text[..], &["--json"]].concat();
    let wrong = ["inspect", "nowhere.onnx", "--json"];
    for command in [&["inspect", &tiny()], &text[..], &json, &wrong] {
        let output = program().args(command).stdout(full()).stderr(Stdio::piped()).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{command:?}: {errors}");
        let told = errors.contains("standard output cannot be written") || errors.contains("nowhere.onnx");
        assert!(told && !errors.contains("internal error"), "{command:?}: {errors}");
        // Nobody hears of it, but the exit code stays.
        let deaf = program().args(command).stdout(full()).stderr(full()).status().unwrap();
        assert_eq!(deaf.code(), Some(3), "{command:?}");
    }
}
