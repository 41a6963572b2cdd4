//! What a command reads and writes: nothing that it writes may be something that it reads.

use std::path::{Path, PathBuf};

use anyhow::Result;
use mabert_graph::{check_writable, data_files, is_own_data_name, is_same_file, own_data_files};
use mabert_transfer::full::CHECKPOINT_FILES;

use crate::failure::Usage;

/// The files of a command.
#[derive(Debug, Default)]
pub(crate) struct Files {
    models: Vec<PathBuf>,
    others: Vec<PathBuf>,
    outputs: Vec<PathBuf>,
    students: Vec<PathBuf>,
    checkpoints: Vec<PathBuf>,
}

impl Files {
    /// Reads these models, and the files that they keep their data in.
    pub(crate) fn models<'p>(mut self, models: impl IntoIterator<Item = &'p PathBuf>) -> Self {
        self.models.extend(models.into_iter().cloned());
        self
    }

    /// Reads these files.
    pub(crate) fn reads<'p>(mut self, files: impl IntoIterator<Item = &'p PathBuf>) -> Self {
        self.others.extend(files.into_iter().cloned());
        self
    }

    /// Writes this file.
    pub(crate) fn writes(mut self, file: Option<&PathBuf>) -> Self {
        self.outputs.extend(file.cloned());
        self
    }

    /// Writes a model to this file, and perhaps its data beside it.
    pub(crate) fn writes_model(mut self, file: &Path) -> Self {
        self.students.push(file.to_owned());
        self
    }

    /// Keeps the state of the end-to-end stage in this folder.
    pub(crate) fn keeps_state_in(mut self, folder: Option<&PathBuf>) -> Self {
        self.checkpoints.extend(folder.cloned());
        self
    }

    /// Refuses to write over what is read, twice to one file, or to what is no file. Asked before any work.
    pub(crate) fn check(&self) -> Result<()> {
        let outputs = || self.students.iter().chain(&self.outputs);
        for output in outputs() {
            check_writable(output)?;
        }
        for folder in &self.checkpoints {
            if let Some(output) = outputs().find(|output| is_same_file(output, folder)) {
                return Err(usage(output, "a checkpoint is to be a folder of that name; name two"));
            }
        }
        let state = self.checkpoints.iter().flat_map(|folder| CHECKPOINT_FILES.map(|name| folder.join(name)));
        let written: Vec<PathBuf> = outputs().cloned().chain(state).collect();
        for (at, output) in written.iter().enumerate() {
            self.refuse_second(output, &written[at + 1..])?;
            self.refuse_input(output)?;
        }
        self.keep_data()
    }

    /// Refuses to write to one file what goes to another too.
    fn refuse_second(&self, output: &Path, others: &[PathBuf]) -> Result<()> {
        if let Some(other) = others.iter().find(|other| is_same_file(other, output)) {
            return Err(usage(output, &format!("`{}` is the same file; name two", other.display())));
        }
        for (stream, name) in [(1, "standard output"), (2, "standard error")] {
            if is_stream(stream, output) {
                return Err(usage(output, &format!("{name} goes to the same file; name two")));
            }
        }
        Ok(())
    }

    fn refuse_input(&self, output: &Path) -> Result<()> {
        let read = self.models.iter().chain(&self.others);
        match read.into_iter().find(|input| is_same_file(input, output)) {
            Some(input) => Err(overwritten(output, input)),
            None => Ok(()),
        }
    }

    /// Refuses to write over a model's data, or where such data will be.
    fn keep_data(&self) -> Result<()> {
        let start = self.checkpoints.iter().map(|folder| folder.join(CHECKPOINT_FILES[0]));
        let students: Vec<PathBuf> = self.students.iter().cloned().chain(start).collect();
        for student in &students {
            let beside = |other: &&PathBuf| is_own_data_name(other, student) && has_folder(other, student.parent());
            if let Some(other) = self.outputs.iter().chain(&self.students).find(beside) {
                let reason = format!("the data of `{}` may have that name; choose another", student.display());
                return Err(usage(other, &reason));
            }
        }
        // What is not there yet is nobody's data: then no model need be read.
        let replaced: Vec<(&PathBuf, PathBuf)> = students
            .iter()
            .chain(&self.outputs)
            .filter(|output| output.exists())
            .flat_map(|output| {
                own_data_files(output).into_iter().chain([output.clone()]).map(move |file| (output, file))
            })
            .collect();
        if replaced.is_empty() {
            return Ok(());
        }
        let data = self.models.iter().flat_map(|model| data_files(model).unwrap_or_default());
        for input in data.chain(self.others.iter().cloned()) {
            if let Some((output, _)) = replaced.iter().find(|(_, file)| is_same_file(&input, file)) {
                return Err(overwritten(output, &input));
            }
        }
        Ok(())
    }
}

fn overwritten(output: &Path, input: &Path) -> anyhow::Error {
    usage(output, &format!("`{}` would be overwritten; choose another output", input.display()))
}

fn usage(output: &Path, reason: &str) -> anyhow::Error {
    Usage(format!("{}: {reason}", output.display())).into()
}

/// Whether a file lies in a folder, by any name.
fn has_folder(file: &Path, folder: Option<&Path>) -> bool {
    let named =
        |folder: Option<&Path>| folder.map(|f| if f.as_os_str().is_empty() { ".".into() } else { f.to_owned() });
    match (named(file.parent()), named(folder)) {
        (Some(a), Some(b)) => is_same_file(&a, &b),
        _ => false,
    }
}

/// Whether a standard stream was led to a file.
#[cfg(unix)]
fn is_stream(number: u8, file: &Path) -> bool {
    is_same_file(Path::new(&format!("/dev/fd/{number}")), file)
}

#[cfg(not(unix))]
fn is_stream(_: u8, _: &Path) -> bool {
    false
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/coverage/bert-classification-torchscript-17.onnx")
    }

    fn refused(files: Files) -> String {
        let error = files.check().expect_err("it would be overwritten");
        assert_eq!(crate::failure::exit_code(&error), 2, "{error}");
        error.to_string()
    }

    #[test]
    fn inputs_are_not_overwritten_by_any_name() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["model.onnx", "data.tsv", "tokenizer.json"] {
            std::fs::write(at(name), name).unwrap();
            std::fs::hard_link(at(name), at(&format!("hard {name}"))).unwrap();
            std::os::unix::fs::symlink(name, at(&format!("soft {name}"))).unwrap();
        }
        let files = || Files::default().models(&[at("model.onnx")]).reads(&[at("data.tsv"), at("tokenizer.json")]);
        for name in ["model.onnx", "data.tsv", "tokenizer.json"] {
            for output in [name.to_owned(), format!("hard {name}"), format!("soft {name}"), format!("./{name}")] {
                let reason = refused(files().writes_model(&at(&output)));
                assert!(reason.contains(name) && reason.contains("would be overwritten"), "{reason}");
                refused(files().writes_model(&at("new.onnx")).writes(Some(&at(&output))));
            }
        }
        files().writes_model(&at("new.onnx")).writes(Some(&at("new.json"))).check().unwrap();
        let twice = refused(files().writes_model(&at("new.onnx")).writes(Some(&at("./new.onnx"))));
        assert!(twice.contains("the same file"), "{twice}");
        std::fs::create_dir(at("state")).unwrap();
        std::fs::write(at("state/start.onnx"), "").unwrap();
        let state = at("state");
        refused(Files::default().models(&[at("state/start.onnx")]).keeps_state_in(Some(&state)));
        refused(files().writes_model(&at("state/start.onnx")).keeps_state_in(Some(&state)));
        refused(files().writes(Some(&at("state/start.onnx.data"))).keeps_state_in(Some(&state)));
        let named_as_output = refused(files().writes_model(&at("new.onnx")).keeps_state_in(Some(&at("./new.onnx"))));
        assert!(named_as_output.contains("folder of that name"), "{named_as_output}");
        files().writes_model(&at("state/student.onnx")).keeps_state_in(Some(&state)).check().unwrap();
    }

    #[test]
    fn the_data_of_models_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mut model = mabert_graph::Model::load(fixture()).unwrap();
        model.keep_data_outside();
        model.save(at("model.onnx")).unwrap();
        let data = at("model.onnx.data");
        assert!(data.exists());
        for files in [
            Files::default().models(&[at("model.onnx")]).writes(Some(&data)),
            Files::default().models(&[at("model.onnx")]).writes_model(&data),
            Files::default().writes_model(&at("new.onnx")).writes(Some(&at("new.onnx.data"))),
            Files::default().writes_model(&at("new.onnx")).writes(Some(&at("new.onnx.2.data"))),
        ] {
            refused(files);
        }
        // Another model that uses the same data, which would go with the model that is overwritten.
        std::fs::copy(at("model.onnx"), at("copy.onnx")).unwrap();
        let reason = refused(Files::default().models(&[at("copy.onnx")]).writes_model(&at("model.onnx")));
        assert!(reason.contains("model.onnx.data"), "{reason}");
        std::fs::remove_file(at("copy.onnx")).unwrap();
        Files::default().models(&[fixture()]).writes_model(&at("model.onnx")).check().unwrap();
    }
}
