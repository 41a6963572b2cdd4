//! Texts as their writers wrote them: every kind of file, pipes, marks and missing texts; and data that says nothing.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use mabert_runtime::{Tensor, npz};
use serde_json::Value;

use super::{fails, fixture, json, run, teacher, tokenizer};

fn reviews() -> String {
    fixture("reviews/reviews.tsv")
}

/// Runs a command with something on its standard input.
fn piped(arguments: &[&str], input: &[u8]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_onnx-mabert"));
    let pipes = command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || _ = stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let [out, errors] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (output.status.code(), out, errors)
}

fn outputs(data: &str) -> Value {
    json(&["run", &teacher(), "--tokenizer", &tokenizer(), "--data", data])["outputs"].clone()
}

#[cfg(unix)]
#[test]
fn pipes_are_read_like_files() {
    let reviews = std::fs::read(reviews()).unwrap();
    let head: Vec<u8> = reviews.split_inclusive(|b| *b == b'\n').take(101).flatten().copied().collect();
    let eval = ["eval", &teacher(), "--tokenizer", &tokenizer(), "--label-column", "label", "--json"];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("head.tsv").display().to_string();
    std::fs::write(&file, &head).unwrap();
    let expected = json(&[&eval[..6], &["--data", &file]].concat())["models"][0]["value"].clone();
    let parsed = |more: &[&str], input: &[u8]| -> Value {
        let (code, out, errors) = piped(&[&eval[..], &["--data", "/dev/stdin"], more].concat(), input);
        assert_eq!(code, Some(0), "{errors}");
        serde_json::from_str(&out).unwrap()
    };
    assert_eq!(parsed(&[], &head)["models"][0]["value"], expected);
    let text = String::from_utf8(head).unwrap();
    let lines: Vec<String> = text
        .lines()
        .skip(1)
        .map(|line| line.split_once('\t').unwrap())
        .map(|(text, label)| serde_json::json!({ "sentence": text, "label": label == "1" }).to_string())
        .collect();
    assert_eq!(parsed(&["--data-format", "jsonl"], lines.join("\n").as_bytes())["models"][0]["value"], expected);
    let array = format!("\u{feff}[{}]", lines.join(",\n"));
    assert_eq!(parsed(&[], array.as_bytes())["models"][0]["value"], expected);

    // A rewrite reads its data more than once.
    let student = folder.path().join("student.onnx").display().to_string();
    let rewrite = ["rewrite", &teacher(), "-o", &student, "--tokenizer", &tokenizer(), "--transfer", "closed-form"];
    let rewrite = [&rewrite[..], &["--calibration-tokens", "400", "--data", "/dev/stdin"]].concat();
    let (code, out, errors) = piped(&rewrite, &reviews);
    assert!(code == Some(0) && out.contains("measured on 240 others"), "{out}{errors}");
    let state = folder.path().join("state").display().to_string();
    let (code, _, errors) =
        piped(&[&rewrite[..6], &rewrite[8..], &["--transfer", "full", "--checkpoint", &state]].concat(), &reviews);
    assert!(code == Some(2) && errors.contains("reads its files again"), "{code:?} {errors}");
    let (code, _, errors) = piped(&["run", &teacher(), "--data", "/dev/stdin"], b"PK\x03\x04");
    assert!(code == Some(3) && errors.contains("pipe"), "{errors}");
    fails(&["run", &teacher(), "--data", "/dev/null"], 3, &["device"]);
}

#[test]
fn one_frame_gives_the_same_texts_as_tsv_and_as_csv() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name).display().to_string();
        std::fs::write(&path, text).unwrap();
        path
    };
    // As `frame.to_csv(path, sep=...)` writes it.
    let texts = ["a \"fine\" film", "\"no\", he said", "plain"];
    let field = |text: &str| match text.contains('"') {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    };
    let table = |separator: &str| {
        let rows = texts.map(|text| format!("{}{separator}1\n", field(text)));
        format!("sentence{separator}label\n{}", rows.concat())
    };
    let csv = outputs(&write("a.csv", &table(",")));
    let lines = texts.map(|text| serde_json::json!({ "text": text }).to_string()).join("\n");
    assert_eq!(outputs(&write("a.jsonl", &lines)), csv);
    let tsv = table("\t");
    let path = write("a.tsv", &tsv);
    assert_eq!(outputs(&path), csv);
    let told = run(&["run", &teacher(), "--tokenizer", &tokenizer(), "--data", &path]);
    assert!(String::from_utf8_lossy(&told.stderr).contains("as pandas writes them"));
    // GLUE's: the marks are text.
    let glue = write("glue.tsv", "sentence\tlabel\n\"fine\" , he said\t1\n");
    let jsonl = write("glue.jsonl", &serde_json::json!({ "sentence": "\"fine\" , he said" }).to_string());
    assert_eq!(outputs(&glue), outputs(&jsonl));
}

#[test]
fn json_is_read_as_its_writers_wrote_it() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name).display().to_string();
        std::fs::write(&path, text).unwrap();
        path
    };
    let expected = outputs(&write("a.txt", "a fine film\na silly film\n"));
    for (at, text) in [
        "\u{feff}{\"text\": \"a fine film\"}\n{\"text\": \"a silly film\"}\n",
        "[{\"text\": \"a fine film\"}, {\"text\": \"a silly film\"}]",
        "{\n \"text\": \"a fine film\"\n}\n{\n \"text\": \"a silly film\"\n}\n",
        "{\"version\": 1, \"data\": [{\"text\": \"a fine film\"}, {\"text\": \"a silly film\"}]}",
        "{\"columns\": [\"label\", \"text\"], \"data\": [[1, \"a fine film\"], [0, \"a silly film\"]]}",
        "{\"text\": [\"a fine film\", \"a silly film\"], \"label\": [1, 0]}",
        "{\"text\": {\"0\": \"a fine film\", \"1\": \"a silly film\"}}",
    ]
    .iter()
    .enumerate()
    {
        assert_eq!(outputs(&write(&format!("{at}.json"), text)), expected, "{text}");
    }
    let missing = write(
        "missing.jsonl",
        "{\"text\": null}\n{\"text\": \"a fine film\"}\n{\"text\": \" \"}\n{\"text\": \"a silly film\"}",
    );
    let found = json(&["run", &teacher(), "--tokenizer", &tokenizer(), "--data", &missing]);
    assert_eq!(found["outputs"], expected);
    assert!(found["notes"][0].as_str().unwrap().contains("2 rows without a text were left out, the first in line 1"));
    for (text, parts) in [
        ("[{\"text\": \"a\"}", ["line 1", "does not end"]),
        ("[{\"text\": \"a\"} {\"text\": \"a\"}]", ["line 1", "comma"]),
        ("[\n{\"text\": \"a\"},\n3]", ["line 3", "not a JSON object"]),
        ("{\"text\": [\"a\", \"b\"], \"label\": [1]}", ["`text` holds 2", "`label` 1"]),
        ("[]", ["no examples", ".json"]),
        ("{\"text\": null}\n{\"text\": null}", ["none of its 2 rows", "no examples"]),
    ] {
        let path = write("wrong.json", text);
        fails(&["run", &teacher(), "--tokenizer", &tokenizer(), "--data", &path], 3, &parts);
    }
}

#[test]
fn ids_beyond_the_vocabulary_come_with_their_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ids.jsonl").display().to_string();
    for id in [-1i64, 4096, 1 << 40] {
        let lines =
            format!("{{\"input_ids\": [2, 7, 3], \"label\": 1}}\n{{\"input_ids\": [2, {id}, 3], \"label\": 0}}\n");
        std::fs::write(&path, lines).unwrap();
        let id = id.to_string();
        for command in
            [vec!["run"], vec!["verify", "--engine=plain-tract,tract"], vec!["eval", "--label-column", "label"]]
        {
            fails(&[&command[..], &[&teacher(), "--data", &path]].concat(), 3, &["ids.jsonl, line 2", &id, "4096"]);
        }
    }
    let arrays = folder.path().join("ids.npz").display().to_string();
    let matrix = |values: [i64; 2]| Tensor::new(&[1, 2], values.to_vec());
    let named =
        [("input_ids", matrix([2, -1])), ("attention_mask", matrix([1; 2])), ("token_type_ids", matrix([0; 2]))];
    npz::write(&arrays, &named.map(|(name, value)| (name.to_owned(), value))).unwrap();
    fails(&["run", &teacher(), "--npz", &arrays], 3, &["ids.npz", "input_ids", "-1"]);
    fails(&["verify", &teacher(), &teacher(), "--npz", &arrays], 3, &["ids.npz", "input_ids", "-1"]);
}

#[test]
fn data_that_says_nothing_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let out = at("student.onnx");
    let rewrite = |text: &str, parts: &[&str]| {
        std::fs::write(at("data.tsv"), text).unwrap();
        let command = ["rewrite", &teacher(), "-o", &out, "--tokenizer", &tokenizer(), "--data", &at("data.tsv")];
        fails(&command, 3, parts);
        assert!(!Path::new(&out).exists());
    };
    rewrite("sentence\na fine film\n", &["one text"]);
    rewrite(&format!("sentence\n{}", "a fine film\n".repeat(500)), &["500 texts are all the same"]);
    rewrite(&format!("sentence\tlabel\n{}", " \t1\n".repeat(500)), &["none of its 500 rows has a text"]);
    rewrite(
        &format!("sentence\n{}", (0..90).map(|n| format!("☃ ☂ ☁ {n}\n")).collect::<String>()),
        &["% ", "unknown"].map(|_| "does not know"),
    );
    rewrite("sentence\tsentence\na\tb\n", &["2 columns", "`sentence`"]);

    // What may be meant is doubted, with the number that shows it.
    std::fs::write(
        at("few.tsv"),
        (0..6).map(|n| format!("film number {n}\n")).fold("sentence\n".to_owned(), |a, b| a + &b),
    )
    .unwrap();
    let few = [
        "rewrite",
        &teacher(),
        "-o",
        &out,
        "--tokenizer",
        &tokenizer(),
        "--data",
        &at("few.tsv"),
        "--transfer",
        "closed-form",
    ];
    let report = json(&few);
    let notes = report["notes"].to_string();
    assert!(notes.contains("only 6 of its 6") && notes.contains("none is kept apart"), "{notes}");
    assert_eq!(report["source"]["kept_apart"], false);
    let printed = run(&few);
    assert!(String::from_utf8_lossy(&printed.stdout).contains("measured on the same"));
    std::fs::write(at("same.tsv"), format!("sentence\tlabel\n{}", "fine\t1\n".repeat(50))).unwrap();
    let eval = ["eval", &teacher(), "--tokenizer", &tokenizer(), "--data", &at("same.tsv"), "--label-column", "label"];
    let notes = json(&eval)["notes"].to_string();
    assert!(notes.contains("50 texts are all the same") && notes.contains("all 50 labels are 1"), "{notes}");
}

#[test]
fn another_models_tokenizer_is_doubted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json").display().to_string();
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(tokenizer()).unwrap()).unwrap();
        change(&mut tokenizer);
        std::fs::write(&path, tokenizer.to_string()).unwrap();
        let text = ["run", &teacher(), "--tokenizer", &path, "--text", "a charming journey"];
        json(&text)["notes"].to_string()
    };
    let bare = changed(&|tokenizer| tokenizer["post_processor"] = Value::Null);
    assert!(bare.contains("[CLS]") && bare.contains("save_pretrained"), "{bare}");
    // As many tokens, of which each has the id of another.
    changed(&|tokenizer| {
        let words = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        let moved = |id: u64| if id < 10 { id } else { 10 + (id - 10 + 777) % 4086 };
        words.values_mut().for_each(|id| *id = moved(id.as_u64().unwrap()).into());
    });
    let eval = ["eval", &teacher(), "--tokenizer", &path, "--data", &reviews(), "--label-column", "label"];
    let notes = json(&eval)["notes"].to_string();
    assert!(notes.contains("the most frequent label"), "{notes}");
    // Half of the words are gone.
    let fewer = changed(&|tokenizer| {
        let words = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        words.retain(|_, id| id.as_u64().unwrap() < 2000);
    });
    assert!(fewer.contains("2000 tokens") && fewer.contains("4096 rows"), "{fewer}");
}

#[test]
fn metrics_that_say_nothing_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ids.jsonl").display().to_string();
    let lines = (0..12).map(|n| format!("{{\"input_ids\": [2, {}, 3], \"label\": {}}}\n", 10 + n, n % 3));
    std::fs::write(&path, lines.collect::<String>()).unwrap();
    let eval = |model: &str| {
        let model = fixture(&format!("coverage/{model}-torchscript-17.onnx"));
        ["eval", &model, "--data", &path, "--label-column", "label"].map(str::to_owned).to_vec()
    };
    let with = |command: &[String], more: &[&str], code: i32, part: &str| {
        let all: Vec<&str> = command.iter().map(String::as_str).chain(more.iter().copied()).collect();
        fails(&all, code, &[part]);
    };
    with(&eval("bert-none"), &[], 3, "embeddings");
    let three = eval("bert-classification");
    with(&three, &["--metric", "f1"], 3, "macro-f1");
    let three: Vec<&str> = three.iter().map(String::as_str).chain(["--metric", "macro-f1"]).collect();
    let value = json(&three)["models"][0]["value"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&value), "{value}");
}
