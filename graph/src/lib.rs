//! ONNX models as this project sees them.
//!
//! [`Model`] wraps the protobuf message without losing anything: what is loaded and saved unchanged is the same model,
//! unknown fields included. The other modules read and change it:
//!
//! * [`Tensor`]: constants and run-time values as typed arrays;
//! * [`Index`]: who produces and who consumes a value, and which values depend on data at all;
//! * [`Builder`] and [`Expr`]: graphs written as formulas;
//! * [`Patch`]: an edit, built aside and applied at once;
//! * [`Model::extract`]: a part of a model as a model of its own;
//! * [`text`]: the stable text form for snapshots and for people.

mod builder;
mod decode;
mod decompose;
mod encode;
mod error;
mod external;
mod extract;
mod files;
mod foreign;
mod functions;
mod half_precision;
mod index;
mod model;
mod node;
mod order;
mod patch;
mod printable;
mod quantised;
mod schema;
mod stored;
mod tensor;
mod tensor_type;
pub mod text;
mod wire;

pub use builder::{Builder, Expr, IntoExpr};
pub use decompose::decompose_fused;
pub use error::{Error, Result};
pub use external::{data_files, is_own_data_name, own_data_files};
pub use extract::Boundary;
pub use files::{Buffered, check_writable, is_same_file, write_atomically};
pub use functions::inline_functions;
pub use half_precision::{is_half, narrow_to_half, widen_half};
pub use index::{Dependence, Index};
pub use model::Model;
pub use node::{NodeExt, attribute, cast_node};
pub use patch::Patch;
pub use printable::{is_printable, printable};
pub use quantised::{Rounding, dequantise, is_quantised};
pub use schema::check_nodes;
pub use tensor::{ElementType, Tensor, largest_difference};
pub use tensor_type::{Dim, TensorType};

pub use onnx_protobuf as proto;
