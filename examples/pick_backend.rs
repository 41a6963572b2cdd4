//! In a program that embeds tract: the same model on tract's own operators and on this project's, picked by name.
//!
//! `cargo run --release --example pick_backend -- MODEL [RUNTIME]`

use anyhow::{Context as _, Result};
use tract_core::runtime::runtime_for_name;
use tract_onnx::prelude::*;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().context("give MODEL [RUNTIME]")?;
    let name = arguments.next().unwrap_or_else(|| mabert::TRACT_RUNTIME.to_owned());
    let runtime = runtime_for_name(&name)?.with_context(|| format!("tract knows no runtime `{name}`"))?;

    let model = tract_onnx::onnx().with_ignore_output_shapes(true).model_for_path(&path)?.into_typed()?;
    let model = runtime.prepare(model)?;
    let row = |values: [i64; 5]| tract_ndarray::arr2(&[values]).into_tensor().into_tvalue();
    // [CLS], three words, [SEP]; all real; one segment.
    let outputs = model.run(tvec![row([2, 40, 50, 60, 3]), row([1; 5]), row([0; 5])])?;
    println!("{name}: {:?}", outputs[0].to_plain_array_view::<f32>()?);
    Ok(())
}
