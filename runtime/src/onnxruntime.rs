//! The same models on onnxruntime, for cross-checks. Its library is loaded at run time.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use mabert_graph::{Dim, ElementType, Model as Graph, Tensor, TensorType};
use ort::environment::Environment;
use ort::session::{Session, SessionInputValue};
use ort::value::{DynValue, TensorElementType, ValueType};

use crate::{Error, Named, Result};

static ENVIRONMENT: OnceLock<std::result::Result<Environment, String>> = OnceLock::new();

/// Loads onnxruntime's library: `library` if given, else the one that `ORT_DYLIB_PATH` names. The first call decides.
///
/// # Errors
/// There is no such library, or it is not onnxruntime; the message says how to get it.
pub fn load_onnxruntime(library: Option<&Path>) -> Result<()> {
    environment(library).map(|_| ())
}

fn environment(library: Option<&Path>) -> Result<&'static Environment> {
    let load = || {
        let path = library.map(PathBuf::from).or_else(|| std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from));
        let path = path.ok_or_else(|| "no library was named".to_owned())?;
        if !path.is_file() {
            return Err(format!("{} is not a file", path.display()));
        }
        let builder = ort::init_from(&path).map_err(|e| e.to_string())?;
        builder.with_telemetry(false).build().map_err(|e| e.to_string())
    };
    ENVIRONMENT.get_or_init(load).as_ref().map_err(|e| Error::NoOnnxruntime(e.clone()))
}

/// A model on onnxruntime's CPU provider.
pub struct OrtModel {
    session: Mutex<Session>,
    inputs: Vec<TensorType>,
    outputs: Vec<String>,
    /// Its file, for messages.
    origin: String,
}

impl std::fmt::Debug for OrtModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OrtModel").field("inputs", &self.inputs).field("outputs", &self.outputs).finish_non_exhaustive()
    }
}

impl OrtModel {
    /// Reads a model from its file, for `threads` threads.
    ///
    /// # Errors
    /// onnxruntime cannot be loaded, or refuses the model.
    pub fn load(path: impl AsRef<Path>, threads: usize) -> Result<Self> {
        let path = path.as_ref();
        Self::open(&path.display().to_string(), threads, |builder| builder.commit_from_file(path))
    }

    /// Takes a model that is in memory.
    ///
    /// # Errors
    /// onnxruntime cannot be loaded, or refuses the model.
    pub fn prepare(graph: &Graph, threads: usize) -> Result<Self> {
        let bytes = graph.to_bytes()?;
        Self::open(graph.origin(), threads, |builder| builder.commit_from_memory(&bytes))
    }

    fn open(
        origin: &str,
        threads: usize,
        commit: impl FnOnce(&mut ort::session::builder::SessionBuilder) -> ort::Result<Session>,
    ) -> Result<Self> {
        let environment = environment(None)?;
        let fault = |e: &dyn std::fmt::Display| fault(e).in_model(origin);
        // Idle threads must not spin: other sessions and tract are measured in the same process.
        let builder = Session::builder(environment).map_err(|e| fault(&e))?;
        let builder = builder.with_intra_threads(threads).map_err(|e| fault(&e))?;
        let mut builder = builder.with_config_entry("session.intra_op.allow_spinning", "0").map_err(|e| fault(&e))?;
        let session = commit(&mut builder).map_err(|e| fault(&e))?;
        let inputs = session.inputs().iter().map(|i| tensor_type(i.name(), i.dtype())).collect();
        let outputs = session.outputs().iter().map(|o| o.name().to_owned()).collect();
        Ok(Self { session: Mutex::new(session), inputs, outputs, origin: origin.to_owned() })
    }

    /// The inputs that the model needs.
    pub fn inputs(&self) -> &[TensorType] {
        &self.inputs
    }

    /// Runs the model once.
    ///
    /// # Errors
    /// onnxruntime refuses the inputs or fails.
    pub fn run(&self, inputs: &[(&str, &Tensor)]) -> Result<Named> {
        let values: Vec<(String, SessionInputValue<'_>)> =
            inputs.iter().map(|(name, t)| Ok(((*name).to_owned(), to_ort(t)?.into()))).collect::<Result<_>>()?;
        let mut session = self.session.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let results = session.run(values).map_err(|e| fault(&e).in_model(&self.origin))?;
        self.outputs.iter().map(|name| Ok((name.clone(), from_ort(name, &results[name.as_str()])?))).collect()
    }
}

impl crate::Engine for OrtModel {
    fn inputs(&self) -> &[TensorType] {
        self.inputs()
    }

    fn run(&self, inputs: &[(&str, &Tensor)]) -> Result<Named> {
        self.run(inputs)
    }
}

fn tensor_type(name: &str, value: &ValueType) -> TensorType {
    let ValueType::Tensor { ty, shape, dimension_symbols } = value else {
        return TensorType { name: name.to_owned(), element: None, dims: None };
    };
    let element = match ty {
        TensorElementType::Float32 => Some(ElementType::F32),
        TensorElementType::Float16 => Some(ElementType::F16),
        TensorElementType::Float64 => Some(ElementType::F64),
        TensorElementType::Int64 => Some(ElementType::I64),
        TensorElementType::Int32 => Some(ElementType::I32),
        TensorElementType::Int8 => Some(ElementType::I8),
        TensorElementType::Uint8 => Some(ElementType::U8),
        TensorElementType::Bool => Some(ElementType::Bool),
        _ => None,
    };
    let dims = shape.iter().zip(dimension_symbols.iter()).map(|(&size, symbol)| match usize::try_from(size) {
        Ok(n) => Dim::Fixed(n),
        Err(_) if symbol.is_empty() => Dim::Unknown,
        Err(_) => Dim::Symbol(symbol.to_string()),
    });
    TensorType { name: name.to_owned(), element, dims: Some(dims.collect()) }
}

fn to_ort(tensor: &Tensor) -> Result<DynValue> {
    macro_rules! convert {
        ($($variant:ident),*) => {
            match tensor {
                $(Tensor::$variant(a) => {
                    let a = a.as_standard_layout().into_owned();
                    ort::value::Tensor::from_array(a).map(|t| t.into_dyn()).map_err(|e| fault(&e))
                })*
            }
        };
    }
    convert!(F32, F64, F16, I64, I32, I8, U8, Bool)
}

fn from_ort(name: &str, value: &DynValue) -> Result<Tensor> {
    macro_rules! attempt {
        ($($rust:ty),*) => {
            $(if let Ok(array) = value.try_extract_array::<$rust>() {
                return Ok(Tensor::from(array.to_owned()));
            })*
        };
    }
    attempt!(f32, half::f16, i64, bool, f64, i32, i8, u8);
    Err(fault(format!("output `{name}` is of a type that is not supported")))
}

fn fault(error: impl std::fmt::Display) -> Error {
    Error::engine("onnxruntime", error.to_string())
}
