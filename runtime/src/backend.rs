//! This crate as a backend of tract.

use std::borrow::Cow;

use tract_core::internal::{StaticName, TractResult, TypedModel, TypedSimplePlan};
use tract_core::runtime::{RunOptions, Runnable, Runtime};

/// The name under which tract finds [`MabertRuntime`].
pub const TRACT_RUNTIME: &str = "mabert";

/// The backend that tract finds under the name `mabert`. It prepares any typed model, for fixed sizes or symbols; linear
/// layers and the linear attention of rewritten models run as fused operators, everything else as tract runs it.
#[derive(Debug)]
pub struct MabertRuntime;

impl Runtime for MabertRuntime {
    fn name(&self) -> StaticName {
        Cow::Borrowed(TRACT_RUNTIME)
    }

    fn check(&self) -> TractResult<()> {
        Ok(())
    }

    fn prepare_with_options(&self, mut model: TypedModel, options: &RunOptions) -> TractResult<Box<dyn Runnable>> {
        crate::plan::declutter(&mut model)?;
        crate::plan::generate(&mut model, true)?;
        Ok(Box::new(TypedSimplePlan::new_with_options(model, options)?))
    }
}

tract_core::register_runtime!(MabertRuntime = MabertRuntime);
