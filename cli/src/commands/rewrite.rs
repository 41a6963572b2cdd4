//! `rewrite`: the main job.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use mabert_passes::lower::{Form, Sharing};
use mabert_passes::pipeline::{Keep, Order, Pass, PassKind};
use mabert_transfer::job::{DEFAULT_SOFTMAX_ERROR, Job, Target, TransferKind};

use super::student::{Destination, make_student};
use crate::arguments::{
    DataArguments, DevArguments, EndToEndArguments, Global, Softmax, VectorArguments, on_or_off, one_of, positive,
};
use crate::failure::Usage;

#[derive(Debug, Args)]
pub(crate) struct RewriteArguments {
    /// The model to rewrite
    model: PathBuf,
    /// Where to write the student
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Keep large constants in a file of their own, OUTPUT.data, as a model does that came so
    #[arg(long)]
    external_data: bool,
    /// The longest sequence that the student is fitted to; networks take no longer ones [default: the model's limit, at
    /// most 128]
    #[arg(long, value_name = "N")]
    max_seq: Option<usize>,
    /// Hidden size of networks [default: the longest sequence, at most 128]
    #[arg(long, value_name = "H")]
    hidden: Option<usize>,
    /// What stands in the place of softmax
    #[arg(long, default_value = Softmax::DEFAULT, value_parser = one_of(Softmax::all()))]
    softmax: Softmax,
    /// What the student will run on, for which --softmax auto counts costs [default: tract]
    #[arg(long = "for", value_name = "ENGINE", value_parser = one_of(Target::ALL))]
    target: Option<Target>,
    /// The squared error of a layer's contexts, relative to their variance, up to which --softmax auto takes the cheaper
    /// form [default: 0.1]
    #[arg(long, value_name = "X", value_parser = positive)]
    softmax_error: Option<f64>,
    /// Which heads share a network [default: head]
    #[arg(long, value_parser = one_of(Sharing::ALL))]
    share: Option<Sharing>,
    /// Whether networks depend on the number of real tokens
    #[arg(long, action = clap::ArgAction::Set, default_value = "on", value_parser = on_or_off())]
    length_tables: bool,
    /// The order of attention's products
    #[arg(long, default_value = Order::Auto.name(), value_parser = one_of(Order::ALL))]
    attention: Order,
    #[command(flatten)]
    data: DataArguments,
    #[command(flatten)]
    vectors: VectorArguments,
    /// How the student's parameters are found [default: blockwise with data, closed-form without]
    #[arg(long, value_parser = one_of(TransferKind::ALL))]
    transfer: Option<TransferKind>,
    /// Tokens that go through the student to calibrate it [default: 40000 of text, 160000 for a
    /// feature model, 12000 made up]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(100..=MOST_TOKENS))]
    calibration_tokens: Option<u64>,
    /// More text to calibrate and train on, not to measure on; half of all sequences come from it
    #[arg(long, value_name = "FILE", requires = "data")]
    extra_data: Vec<PathBuf>,
    /// Where the data is little, do without text made of it (texts cut and joined, words replaced by neighbours)
    #[arg(long, requires = "data")]
    no_augmentation: bool,
    #[command(flatten)]
    dev: DevArguments,
    /// Sites to leave as they are
    #[arg(long, value_delimiter = ',', value_name = "KIND", value_parser = one_of(approximating_passes()))]
    keep: Vec<Pass>,
    /// Leave parameters as they are, with the affine maps that replace norms, for `transfer`
    #[arg(long)]
    no_fold: bool,
    /// Do not hold the student's values: tokens unlike all that it was fitted to may make it overflow
    #[arg(long)]
    no_bounds: bool,
    /// The last pass to run
    #[arg(long, value_name = "PASS", hide_possible_values = true, value_parser = one_of(Pass::ALL))]
    until: Option<Pass>,
    /// Accept sites that are not recognised
    #[arg(long)]
    partial: bool,
    /// Write the whole report to a file as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    #[command(flatten)]
    end_to_end: EndToEndArguments,
}

/// More than are seen in a day.
const MOST_TOKENS: u64 = 1 << 30;

fn approximating_passes() -> impl Iterator<Item = Pass> {
    Pass::ALL.into_iter().filter(|pass| pass.kind() == PassKind::Approximating)
}

pub(super) fn rewrite(arguments: &RewriteArguments, global: &Global) -> Result<()> {
    arguments.data.check("")?;
    let files = arguments.end_to_end.files(&arguments.data, &arguments.dev, global);
    files
        .models([&arguments.model])
        .reads(&arguments.extra_data)
        .writes_model(&arguments.output)
        .writes(arguments.report.as_ref())
        .check()?;
    let destination = Destination {
        model: &arguments.output,
        external_data: arguments.external_data,
        report: arguments.report.as_deref(),
    };
    make_student(&arguments.model, &job(arguments, global)?, &destination, global)
}

fn job(arguments: &RewriteArguments, global: &Global) -> Result<Job> {
    let default = if arguments.data.data.is_some() { TransferKind::Blockwise } else { TransferKind::ClosedForm };
    let transfer = arguments.transfer.unwrap_or(default);
    if transfer != TransferKind::Full
        && let Some(option) = arguments.end_to_end.first_given()
    {
        return Err(Usage(format!("--{option} is of the end-to-end stage: add --transfer full")).into());
    }
    let softmax = arguments.softmax;
    if softmax.form.is_some() && (arguments.target.is_some() || arguments.softmax_error.is_some()) {
        return Err(Usage("--for and --softmax-error are of --softmax auto: a form is asked for".to_owned()).into());
    }
    let sharing = sharing(arguments)?;
    let is_kept = |pass| arguments.keep.contains(&pass);
    let keep =
        Keep { softmax: is_kept(Pass::Softmax), activation: is_kept(Pass::Activation), norm: is_kept(Pass::Norm) };
    let job = arguments.end_to_end.job(&arguments.data, &arguments.dev, global)?;
    Ok(job
        .max_seq(arguments.max_seq)
        .hidden(arguments.hidden)
        .softmax(softmax.form)
        .target(arguments.target.unwrap_or_default())
        .softmax_error(arguments.softmax_error.unwrap_or(DEFAULT_SOFTMAX_ERROR))
        .sharing(sharing)
        .length_tables(arguments.length_tables)
        .order(arguments.attention)
        .keep(keep)
        .fold(!arguments.no_fold)
        .bounds(!arguments.no_bounds)
        .until(arguments.until)
        .partial(arguments.partial)
        .transfer(transfer.with(arguments.end_to_end.stage(global)))
        .pooling(arguments.vectors.pooling)
        .calibration_tokens(arguments.calibration_tokens.map(|n| n as usize))
        .extra_data(arguments.extra_data.clone())
        .augmentation(!arguments.no_augmentation))
}

/// Which heads share a network; hinges are each head's own.
fn sharing(arguments: &RewriteArguments) -> Result<Sharing> {
    let Softmax { form, sharing } = arguments.softmax;
    let usage = |reason: &str| Err(Usage(reason.to_owned()).into());
    match (form, arguments.share) {
        (Some(Form::Hinges), Some(_)) => {
            usage("--share is of networks, since each head has its own hinges: add --softmax network")
        }
        (_, Some(share)) if sharing.is_some_and(|named| named != share) => {
            usage("--softmax and --share name different heads: give --softmax network and one of the shares")
        }
        (_, share) => Ok(share.or(sharing).unwrap_or(Sharing::PerHead)),
    }
}
