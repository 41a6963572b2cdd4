//! What goes wrong around the program: it is killed, the disk is full, two write at once, files change under it. The output is
//! always a whole model, the old one or the new one, and the exit code says which.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::{fixture, run};

fn tiny(name: &str) -> String {
    fixture(&format!("coverage/{name}.onnx"))
}

/// A rewrite of a second; its output has a data file.
fn rewriting(output: &Path, seed: u64) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_onnx-mabert"));
    command.args(["rewrite", &tiny("bert-classification-torchscript-17"), "--max-seq", "16", "--external-data", "-o"]);
    command.arg(output).args(["--seed", &seed.to_string()]);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn finished(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().expect("it ends");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn whole(model: &Path) -> bool {
    run(&["inspect", &model.display().to_string()]).status.success()
}

fn files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").file_name());
    let mut names: Vec<String> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn killed_at_any_moment_it_leaves_a_whole_model() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("student.onnx");
    assert_eq!(finished(rewriting(&output, 0).spawn().unwrap()).0, Some(0));
    for moment in 0..12 {
        let mut child = rewriting(&output, moment).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(60 + 110 * moment));
        _ = child.kill();
        finished(child);
        assert!(whole(&output), "killed at moment {moment}");
    }
    // And writes over all that.
    assert_eq!(finished(rewriting(&output, 99).spawn().unwrap()).0, Some(0));
    assert!(whole(&output));
}

#[test]
fn overwriting_leaves_one_data_file() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("student.onnx");
    let mut seen = Vec::new();
    for seed in 0..3 {
        assert_eq!(finished(rewriting(&output, seed).spawn().unwrap()).0, Some(0));
        assert!(whole(&output));
        seen.push(files(folder.path()));
    }
    let expected = [".data", ".2.data", ".data"].map(|data| {
        let mut names = vec!["student.onnx".to_owned(), format!("student.onnx{data}")];
        names.sort();
        names
    });
    assert_eq!(seen, expected);
}

#[test]
fn two_that_write_the_same_output_leave_one_of_the_two() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("student.onnx");
    for round in 0..3 {
        let both = [2 * round, 2 * round + 1].map(|seed| rewriting(&output, seed).spawn().unwrap());
        for (code, errors) in both.map(finished) {
            // What the other wrote over in between is told as a check that did not hold.
            assert!(
                code == Some(0) || (code == Some(1) && errors.contains("read back")) || code == Some(3),
                "{errors}"
            );
        }
        assert!(whole(&output), "round {round}");
    }
}

/// A limit on the size of files stands in for a full disk: both end a write with an error.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_old_model() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("student.onnx");
    assert_eq!(finished(rewriting(&output, 0).spawn().unwrap()).0, Some(0));
    let before = files(folder.path()).into_iter().map(|name| std::fs::read(folder.path().join(name)).unwrap());
    let before: Vec<Vec<u8>> = before.collect();
    let program = env!("CARGO_BIN_EXE_onnx-mabert");
    let command = format!(
        "trap '' XFSZ; ulimit -f 8; exec {program} rewrite {} --max-seq 16 --external-data -o {} --seed 7",
        tiny("bert-classification-torchscript-17"),
        output.display()
    );
    let limited =
        Command::new("sh").args(["-c", &command]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let (code, errors) = finished(limited);
    assert_eq!(code, Some(3), "{errors}");
    assert!(errors.contains("cannot be written") && errors.contains("student.onnx"), "{errors}");
    let after = files(folder.path()).into_iter().map(|name| std::fs::read(folder.path().join(name)).unwrap());
    assert!(after.eq(before), "{:?}", files(folder.path()));
}

#[test]
fn folders_that_cannot_be_written_to_are_refused_before_the_work() {
    for output in ["/proc/student.onnx", "/nowhere/student.onnx"] {
        let (code, errors) = finished(rewriting(&PathBuf::from(output), 0).spawn().unwrap());
        assert_eq!(code, Some(3), "{errors}");
        assert!(errors.contains(output), "{errors}");
    }
}

#[test]
fn the_output_may_lie_on_another_file_system() {
    let elsewhere = Path::new("/dev/shm");
    if !elsewhere.is_dir() {
        eprintln!("left out: there is no {}", elsewhere.display());
        return;
    }
    let folder = tempfile::tempdir_in(elsewhere).unwrap();
    let output = folder.path().join("student.onnx");
    assert_eq!(finished(rewriting(&output, 0).spawn().unwrap()).0, Some(0));
    assert!(whole(&output));
}

#[test]
fn data_that_changes_while_it_is_read_is_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data.tsv");
    let whole_text = std::fs::read_to_string(fixture("reviews/reviews.tsv")).unwrap();
    for (moment, text) in [(5, &whole_text[..whole_text.len() / 3]), (40, ""), (150, "sentence\nonly one line")] {
        std::fs::write(&data, &whole_text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_onnx-mabert"));
        let output = folder.path().join("student.onnx");
        command.args(["rewrite", &super::teacher(), "--tokenizer", &super::tokenizer(), "--transfer", "closed-form"]);
        command.args(["--calibration-tokens", "500", "--data"]).arg(&data).arg("-o").arg(&output);
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(moment));
        std::fs::write(&data, text).unwrap();
        let (code, errors) = finished(child);
        assert!(matches!(code, Some(0 | 1 | 3)), "{code:?}: {errors}");
        assert!(!errors.contains("panicked") && !errors.contains("internal error"), "{errors}");
    }
}
