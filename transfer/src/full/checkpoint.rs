//! Interrupted runs of the full stage go on where they were.
//!
//! A folder holds the student as the stage found it (`start.onnx`, with `start.json` to say how it was made), and the
//! state of the optimizer after some step (`state.safetensors`). Each file is whole or not there.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use mabert_graph::{Model, write_atomically};
use safetensors::tensor::{Dtype, SafeTensors, View, serialize_to_file};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::course::{Course, WEIGHTS};
use crate::gradient::AdamW;
use crate::layerwise::LayerwiseReport;
use crate::stored::{from_bytes, to_bytes};
use crate::{Error, Result, Setting};

const START: &str = "start.onnx";
const STARTED: &str = "start.json";
const STATE: &str = "state.safetensors";
const UNFINISHED: &str = "state.unfinished";
/// The files in the folder of a checkpoint; the first is a model, whose data may lie beside it.
pub const CHECKPOINT_FILES: [&str; 4] = [START, STARTED, STATE, UNFINISHED];
/// A state is written each time so many steps were taken.
const EVERY: usize = 50;
const STEP: &str = "step";
const STEPS: &str = "steps";
const UPDATES: &str = "updates";
const SKIPPED: &str = "skipped";
const COURSE: &str = "course";

/// Where the full stage leaves its state, and takes it up.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    /// What made the student and trains it: a state made otherwise is not taken up.
    made_by: Value,
    resume: bool,
}

/// What there is to know of the student at the start.
#[derive(Debug, Serialize, Deserialize)]
struct Started {
    made_by: Value,
    closed_form: Option<LayerwiseReport>,
}

impl Checkpoint {
    /// A folder, made if it is not there. `made_by` is an object of all that the result depends on.
    ///
    /// # Errors
    /// The folder cannot be made; or it holds the state of another run, or of any run unless `resume`.
    pub fn new(folder: &Path, made_by: Value, resume: bool) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|e| Error::checkpoint(folder, format!("cannot be made: {e}")))?;
        let checkpoint = Self { folder: folder.to_owned(), made_by, resume };
        mabert_graph::check_writable(&checkpoint.file(STATE))?;
        let started = checkpoint.started()?;
        if started.is_none() {
            checkpoint.refuse_strangers()?;
        }
        if started.is_some() && !resume {
            let reason = "holds a checkpoint already: go on with it, or choose another folder";
            return Err(Error::setting(
                format!("{} {reason}", folder.display()),
                &[Setting::Resume, Setting::Checkpoint],
            ));
        }
        if let Some(started) = started
            && let Some(difference) = difference(&started.made_by, &as_read(&checkpoint.made_by))
        {
            let reason = format!("{}: its checkpoint is of another run: {difference}", folder.display());
            return Err(Error::setting(reason, &[Setting::Checkpoint]));
        }
        Ok(checkpoint)
    }

    /// Refuses files that are called as a checkpoint's, but are none: they would be written over. `start.json` is written
    /// before any state; a run that was killed before that may have left the student, which goes where it is to be resumed.
    fn refuse_strangers(&self) -> Result<()> {
        let strange = |name: &&&str| self.file(name).exists() && !(self.resume && **name == START);
        match [START, STATE].iter().find(strange) {
            None => Ok(()),
            Some(name) => {
                let reason = format!(
                    "there is no `{STARTED}` beside it, as in a checkpoint: remove it, or choose another folder"
                );
                Err(Error::checkpoint(&self.file(name), reason))
            }
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn started(&self) -> Result<Option<Started>> {
        let path = self.file(STARTED);
        if !path.exists() {
            return Ok(None);
        }
        let fault = |reason: String| Error::checkpoint(&path, reason);
        let text = std::fs::read(&path).map_err(|e| fault(format!("cannot be read: {e}")))?;
        Ok(Some(serde_json::from_slice(&text).map_err(|e| fault(format!("is no checkpoint: {e}")))?))
    }

    /// The student with which an interrupted run started, and what its closed form reported.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn start(&self) -> Result<Option<(Model, Option<LayerwiseReport>)>> {
        match self.started()? {
            Some(started) if self.resume => Ok(Some((Model::load(self.file(START))?, started.closed_form))),
            _ => Ok(None),
        }
    }

    /// Whether the student of the start is there.
    pub fn has_start(&self) -> bool {
        self.file(STARTED).exists()
    }

    /// Keeps the student with which the stage starts.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save_start(&self, student: &Model, closed_form: Option<&LayerwiseReport>) -> Result<()> {
        // The state of an earlier start would not fit this one.
        let state = self.file(STATE);
        if state.exists() {
            std::fs::remove_file(&state).map_err(|e| Error::checkpoint(&state, format!("cannot be removed: {e}")))?;
        }
        student.save(self.file(START))?;
        let started = Started { made_by: self.made_by.clone(), closed_form: closed_form.cloned() };
        let text = serde_json::to_vec(&started).expect("plain structures are valid JSON");
        write_atomically(&self.file(STARTED), |file| std::io::Write::write_all(file, &text))?;
        Ok(())
    }

    /// Writes the state after `step` of `steps`, where it is time for it.
    pub(super) fn save_sometimes(&self, adam: &AdamW, course: &Course, step: usize, steps: usize) -> Result<()> {
        if !step.is_multiple_of(EVERY) && step != steps {
            return Ok(());
        }
        let (text, weights) = course.state();
        let (moments, updates) = adam.state();
        let numbers = [(STEP, step), (STEPS, steps), (UPDATES, updates), (SKIPPED, adam.skipped)];
        let mut metadata: HashMap<String, String> =
            numbers.into_iter().map(|(name, value)| (name.to_owned(), value.to_string())).collect();
        metadata.insert(COURSE.to_owned(), text);
        let views = moments.iter().enumerate().flat_map(|(at, m)| {
            let of = [("value", m.value), ("first", m.first), ("second", m.second)];
            of.map(|(name, values)| (format!("{at}/{name}"), Floats { shape: [values.len()], values }))
        });
        let weights = weights.iter().flat_map(|(name, weights)| {
            let floats = |values| Floats { shape: [Vec::len(values)], values };
            weights.iter().enumerate().map(move |(at, values)| (format!("{at}/{name}"), floats(values)))
        });
        let views = views.chain(weights);
        let (path, unfinished) = (self.file(STATE), self.file(UNFINISHED));
        let fault = |reason: String| Error::checkpoint(&path, format!("cannot be written: {reason}"));
        serialize_to_file(views, Some(metadata), &unfinished).map_err(|e| fault(e.to_string()))?;
        let finish = || {
            // As readable as the rest: temporary files are private.
            std::fs::set_permissions(&unfinished, std::fs::metadata(self.file(START))?.permissions())?;
            std::fs::OpenOptions::new().write(true).open(&unfinished)?.sync_all()?;
            std::fs::rename(&unfinished, &path)
        };
        finish().map_err(|e| fault(e.to_string()))
    }

    /// The state that was written last, where there is one.
    pub(super) fn state(&self) -> Result<Option<State>> {
        let path = self.file(STATE);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = std::fs::read(&path).map_err(|e| Error::checkpoint(&path, format!("cannot be read: {e}")))?;
        let header = SafeTensors::read_metadata(&bytes).ok();
        let metadata = header.and_then(|(_, header)| header.metadata().clone()).unwrap_or_default();
        let state = State { path, bytes, metadata, step: 0, planned: 0 };
        let (step, planned) = (state.number(STEP)?, state.number(STEPS)?);
        if step > planned {
            return Err(state.broken());
        }
        Ok(Some(State { step, planned, ..state }))
    }
}

/// Where a training was.
pub(super) struct State {
    path: PathBuf,
    bytes: Vec<u8>,
    metadata: HashMap<String, String>,
    /// Steps that were taken.
    pub(super) step: usize,
    /// Of so many.
    pub(super) planned: usize,
}

impl State {
    fn number(&self, name: &str) -> Result<usize> {
        self.metadata.get(name).and_then(|text| text.parse().ok()).ok_or_else(|| self.broken())
    }

    /// Says that it is none of this training's.
    pub(super) fn broken(&self) -> Error {
        Error::checkpoint(&self.path, "is not a state of this run; delete it to start again".to_owned())
    }

    /// Takes it up.
    pub(super) fn restore(&self, adam: &mut AdamW, course: &mut Course) -> Result<()> {
        let broken = || self.broken();
        let tensors = SafeTensors::deserialize(&self.bytes).map_err(|_| broken())?;
        let values = |name: String| -> Result<Vec<f32>> {
            let tensor = tensors.tensor(&name).map_err(|_| broken())?;
            Ok(from_bytes(tensor.data()))
        };
        let moments = |at: usize| -> Result<[Vec<f32>; 3]> {
            let [value, first, second] = ["value", "first", "second"].map(|name| values(format!("{at}/{name}")));
            Ok([value?, first?, second?])
        };
        let (updates, skipped) = (self.number(UPDATES)?, self.number(SKIPPED)?);
        adam.restore(moments, updates, skipped)?.then_some(()).ok_or_else(broken)?;
        let variables = adam.values().count();
        let held = WEIGHTS.iter().filter(|name| tensors.tensor(&format!("0/{name}")).is_ok());
        let weights = held.map(|name| {
            let values = (0..variables).map(|at| values(format!("{at}/{name}"))).collect::<Result<Vec<_>>>();
            Ok((*name, values?))
        });
        let weights = weights.collect::<Result<HashMap<_, _>>>()?;
        let text = self.metadata.get(COURSE).ok_or_else(broken)?;
        course.restore(text, weights).ok_or_else(broken)
    }
}

/// Numbers as a file holds them, made when they are written.
struct Floats<'m> {
    shape: [usize; 1],
    values: &'m [f32],
}

impl View for Floats<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        to_bytes(self.values).into()
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

/// A value as it comes back from a file: numbers may differ in their last digit.
fn as_read(value: &Value) -> Value {
    serde_json::from_str(&value.to_string()).expect("JSON is valid JSON")
}

/// The first thing in which two objects differ.
fn difference(before: &Value, now: &Value) -> Option<String> {
    let fields = |v: &Value| v.as_object().cloned().unwrap_or_default();
    let (before, now) = (fields(before), fields(now));
    let differs = |name: &&String| before.get(*name) != now.get(*name);
    let name = before.keys().chain(now.keys()).find(differs)?;
    let text = |v: Option<&Value>| v.map_or_else(|| "not there".to_owned(), Value::to_string);
    Some(format!("`{name}` was {}, now {}", text(before.get(name)), text(now.get(name))))
}
