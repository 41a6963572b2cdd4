//! The main job on real models: rewritten, calibrated on text, saved, and run by both engines.

use std::path::{Path, PathBuf};

use mabert_graph::Model;
use mabert_passes::inputs::EncoderInputs;
use mabert_passes::lower::{Form, Sharing};
use mabert_passes::pipeline::{Keep, Order, VERSION_KEY};
use mabert_passes::sites::SiteKind;
use mabert_runtime::{Engine, Model as Runnable, OrtModel, borrowed};
use mabert_tests::{distance, fixture, outside};
use mabert_transfer::Setting;
use mabert_transfer::data::{BatchShape, DataFile, Overlong, TextEncoder, batches, read_sequences};
use mabert_transfer::full::{self, FullOptions};
use mabert_transfer::job::{Data, FullStage, Job, Reason, Report, Target, Transfer, rewrite};
use mabert_transfer::layerwise::BlockReport;
use mabert_transfer::progress::Silent;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

fn reviews() -> Data {
    Data::new(fixture("reviews/reviews.tsv"))
}

fn tokenizer() -> PathBuf {
    fixture("bert-mini-sst2/tokenizer.json")
}

fn job(data: Option<Data>) -> Job {
    let job = Job::default().calibration_tokens(8_000);
    match data {
        Some(data) => job.data(data).tokenizer(tokenizer()),
        None => job,
    }
}

fn teacher() -> Model {
    Model::load(fixture("bert-mini-sst2/model.onnx")).unwrap()
}

fn fixture_report(job: &Job) -> Report {
    rewrite(teacher(), job, &Silent).unwrap().1
}

/// What the teacher's batches are like.
fn shape() -> BatchShape {
    BatchShape::new(&EncoderInputs::new(&teacher(), &[]).unwrap())
}

/// The largest difference of the outputs over padded batches of real sentences.
fn furthest(a: &dyn Engine, b: &dyn Engine, (data, tokenizer): (&Data, &Path), longest: usize, count: usize) -> f32 {
    let encoder = TextEncoder::new(Some(tokenizer), longest, Overlong::Truncate).unwrap();
    let (mut sequences, _) = read_sequences(&DataFile::open(data).unwrap(), &encoder).unwrap();
    sequences.truncate(count);
    let mut worst = 0f32;
    for batch in batches(&sequences, 512, 8, &shape()) {
        let inputs = batch.inputs(a.inputs()).unwrap();
        let (x, y) = (a.run(&borrowed(&inputs)).unwrap(), b.run(&borrowed(&inputs)).unwrap());
        worst = worst.max(distance(&x[0].1, &y[0].1));
    }
    worst
}

/// No norm bounds a student: inputs of a few random tokens are those that would overflow first.
fn stays_finite(student: &Runnable, vocabulary: usize, report: &Report) {
    assert_eq!(report.odd_inputs.overflow, 0, "{:?}", report.odd_inputs);
    for length in 1..=4 {
        let mut rng = StdRng::seed_from_u64(length as u64);
        let ids: Vec<i64> = (0..100 * length).map(|_| rng.random_range(0..vocabulary as i64)).collect();
        let matrix = |values: Vec<i64>| mabert_runtime::Tensor::new(&[100, length], values);
        let inputs = [
            ("input_ids", matrix(ids)),
            ("attention_mask", matrix(vec![1; 100 * length])),
            ("token_type_ids", matrix(vec![0; 100 * length])),
        ];
        let logits = student.run(&borrowed(&inputs)).unwrap().remove(0).1.to_f32();
        let bad = logits.iter().filter(|v| !v.is_finite()).count();
        assert_eq!(bad, 0, "{bad} of {} logits at {length} tokens", logits.len());
    }
}

fn save(model: &Model, folder: &Path) -> PathBuf {
    let path = folder.join("student.onnx");
    model.save(&path).unwrap();
    path
}

#[test]
fn the_fixture_is_rewritten_calibrated_and_run_by_both_engines() {
    let folder = tempfile::tempdir().unwrap();
    let (student, report) = rewrite(teacher(), &job(Some(reviews())), &Silent).unwrap();
    assert!(report.misses.is_empty());
    assert_eq!(report.options.approximator.max_seq, 64);
    let operators: Vec<&str> = report.non_linear_after.iter().map(|n| n.operator.as_str()).collect();
    assert_eq!(operators, ["Tanh"], "only the pooler's");
    assert!(report.exact_passes_differ_by < 1e-4, "{}", report.exact_passes_differ_by);
    // The last stream explains most of the teacher's, and most answers are the teacher's.
    let last = report.sites.iter().rfind(|s| s.kind == SiteKind::Norm).unwrap();
    assert!(last.relative_error.unwrap() < 0.4, "{last:?}");
    assert!(report.outputs[0].agreement.unwrap() > 0.9, "{:?}", report.outputs);

    assert_eq!(student.metadata(VERSION_KEY), Some(env!("CARGO_PKG_VERSION")));
    let path = save(&student, folder.path());
    let tract = Runnable::load(&path).unwrap();
    let far = furthest(&tract, &OrtModel::load(&path, 1).unwrap(), (&reviews(), &tokenizer()), 64, 200);
    assert!(far < 1e-4, "{far}");
    stays_finite(&tract, 4_096, &report);
    let again = rewrite(Model::load(&path).unwrap(), &job(None), &Silent).unwrap_err().to_string();
    assert!(again.contains("already rewritten"), "{again}");
}

#[test]
fn plain_tract_loads_the_student() {
    use tract_onnx::prelude::{Framework as _, InferenceModelExt as _, IntoRunnable as _, IntoTensor as _, tvec};
    let folder = tempfile::tempdir().unwrap();
    let (student, _) = rewrite(teacher(), &job(Some(reviews())), &Silent).unwrap();
    let path = save(&student, folder.path());
    let mut model = tract_onnx::onnx().model_for_path(&path).unwrap();
    for input in 0..3 {
        let fact = tract_onnx::prelude::InferenceFact::dt_shape(tract_onnx::prelude::DatumType::I64, [1usize, 5]);
        model.set_input_fact(input, fact).unwrap();
    }
    let plan = model.into_optimized().unwrap().into_runnable().unwrap();
    let row = |values: [i64; 5]| tract_onnx::prelude::tract_ndarray::arr2(&[values]).into_tensor().into();
    let outputs = plan.run(tvec![row([2, 40, 50, 60, 3]), row([1; 5]), row([0; 5])]).unwrap();
    let ours = Runnable::load(&path).unwrap();
    let matrix = |values: [i64; 5]| mabert_runtime::Tensor::new(&[1, 5], values.to_vec());
    let inputs = [
        ("input_ids", matrix([2, 40, 50, 60, 3])),
        ("attention_mask", matrix([1; 5])),
        ("token_type_ids", matrix([0; 5])),
    ];
    let expected = ours.run(&borrowed(&inputs)).unwrap().remove(0).1.to_f32();
    let found = outputs[0].to_plain_array_view::<f32>().unwrap().to_owned();
    for (a, b) in found.iter().zip(&expected) {
        approx::assert_abs_diff_eq!(*a, *b, epsilon = 1e-4);
    }
}

#[test]
fn every_sharing_and_what_is_kept_can_be_calibrated() {
    let small = job(Some(reviews())).calibration_tokens(1_500);
    let error =
        |report: &Report| report.sites.iter().rfind(|s| s.kind == SiteKind::Norm).unwrap().relative_error.unwrap();
    for sharing in [Sharing::PerLayer, Sharing::Shared] {
        for length_tables in [true, false] {
            let network = small.clone().softmax(Form::Network).sharing(sharing).length_tables(length_tables);
            let report = fixture_report(&network);
            assert!(error(&report) < 0.8, "{sharing:?}, tables {length_tables}: {}", error(&report));
        }
    }
    let exact = Keep { softmax: true, activation: true, norm: true };
    let report = fixture_report(&small.clone().keep(exact));
    assert!(report.outputs[0].max_abs < 1e-3, "nothing was approximated: {:?}", report.outputs);
    let held_out = |job: Job| fixture_report(&job.calibration_tokens(6_000)).outputs[0].mean_abs;
    let kept = held_out(small.clone().keep(Keep { softmax: true, ..Keep::default() }));
    let [hinges, network] = Form::ALL.map(|form| held_out(small.clone().softmax(form)));
    assert!(kept < network && hinges < network, "exact {kept}, hinges {hinges}, networks {network}");
    assert!(hinges < 1.1 * kept, "exact {kept}, hinges {hinges}");
    let norms = fixture_report(&small.clone().keep(Keep { norm: true, ..Keep::default() }));
    assert!(norms.operators_after.contains_key("LayerNormalization") && error(&norms) < 0.8);
}

#[test]
fn blockwise_brings_both_halves_of_layers_closer() {
    let small = job(Some(reviews())).calibration_tokens(6_000);
    let closed = fixture_report(&small);
    let blockwise = fixture_report(&small.transfer(Transfer::Blockwise));
    let blocks = &blockwise.closed_form.as_ref().unwrap().blocks;
    assert_eq!((blocks.len(), closed.closed_form.as_ref().unwrap().blocks.len()), (6, 0));
    let gained = |b: &BlockReport| b.fitted.after <= b.fitted.before && b.fitted.skipped == 0;
    assert!(blocks.iter().all(gained), "{blocks:?}");
    let error = |report: &Report, site: &str| {
        report.sites.iter().find(|s| s.site.to_string() == site).and_then(|s| s.relative_error).unwrap()
    };
    for (site, share) in
        [("layer.1/attention/norm", 1.0), ("layer.2/attention/norm", 0.97), ("layer.2/output/norm", 0.97)]
    {
        assert!(error(&blockwise, site) < share * error(&closed, site), "{site}: {:?}", blockwise.sites);
    }
    assert!(blockwise.outputs[0].mean_abs < 1.1 * closed.outputs[0].mean_abs, "{:?}", blockwise.outputs);
    assert_eq!(blockwise.odd_inputs.overflow, 0);
}

/// Hinges take texts beyond what they are fitted to; how they fare there is told wherever there are such texts.
#[test]
fn texts_beyond_the_longest_that_was_fitted_are_measured() {
    let short = job(Some(reviews())).calibration_tokens(1_500).max_seq(12);
    let report = fixture_report(&short);
    let beyond = report.beyond.unwrap();
    assert!(beyond.shortest > 12 && beyond.longest > beyond.shortest && beyond.sequences > 10, "{beyond:?}");
    assert!(beyond.outputs[0].mean_cosine.unwrap() > 0.6 && beyond.outputs[0].mean_abs < 1.5, "{beyond:?}");
    // Networks take none, and where nothing was cut there are none.
    assert!(fixture_report(&short.clone().softmax(Form::Network)).beyond.is_none());
    assert!(fixture_report(&short.max_seq(64)).beyond.is_none());
}

#[test]
fn extra_text_is_calibrated_on_but_not_measured_on() {
    let folder = tempfile::tempdir().unwrap();
    let more = folder.path().join("more.txt");
    std::fs::write(&more, "another text , of no task at all\n".repeat(300)).unwrap();
    let small = job(Some(reviews())).calibration_tokens(1_500);
    let of = |extra_data: Vec<PathBuf>| fixture_report(&small.clone().extra_data(extra_data));
    let (without, with) = (of(vec![]), of(vec![more.clone()]));
    let tokens = |report: &Report| report.closed_form.as_ref().unwrap().tokens as f64;
    // As much again, but for the sequences that are made up.
    assert!((1.3..2.1).contains(&(tokens(&with) / tokens(&without))), "{} {}", tokens(&without), tokens(&with));
    let measured = |report: &Report| report.source.as_ref().map(|s| s.held_out);
    assert_eq!(measured(&with), measured(&without));
    let full = full::FullOptions::default().with_steps(2, 50);
    let small = small.transfer(Transfer::Full(full.into()));
    let trained = |times| {
        let extra_data = vec![more.clone(); times];
        fixture_report(&small.clone().extra_data(extra_data)).source.unwrap().training
    };
    let [none, one, two] = [0, 1, 2].map(trained);
    // Several files share what one would give.
    assert!(one > none && two.abs_diff(one) < one / 10, "{none} {one} {two}");
    std::fs::write(&more, "").unwrap();
    let empty = rewrite(teacher(), &small.extra_data(vec![more]), &Silent);
    assert!(empty.unwrap_err().to_string().contains("more.txt"));
}

#[test]
fn one_seed_gives_one_student() {
    let small = job(Some(reviews())).calibration_tokens(1_000);
    let make = |seed| rewrite(teacher(), &small.clone().seed(seed), &Silent).unwrap().0;
    assert!(make(3).graph().initializer == make(3).graph().initializer);
    assert!(make(3).graph().initializer != make(4).graph().initializer);
}

#[test]
fn every_length_and_the_shortest_limits_work() {
    for max_seq in [2, 3, 5] {
        let job = job(None).max_seq(max_seq).calibration_tokens(500);
        let report = fixture_report(&job);
        let logits = &report.outputs[0];
        // An uncalibrated student answers at random: cosine 0, half of the classes.
        assert!(logits.max_abs.is_finite(), "{max_seq}: {logits:?}");
        assert!(logits.mean_cosine.unwrap() > 0.6 && logits.agreement.unwrap() > 0.8, "{max_seq}: {logits:?}");
    }
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let refused = |job: Job| rewrite(teacher(), &job, &Silent).unwrap_err().to_string();
    let beyond = refused(job(None).max_seq(65));
    assert!(beyond.contains("65") && beyond.contains("64"), "{beyond}");
    assert!(refused(job(None).max_seq(0)).contains("of 2 to"));
    assert!(refused(job(None).max_seq(1)).contains("of 2 to"));
    assert!(refused(job(None).hidden(0)).contains("hidden size"));
    assert!(refused(Job::default().data(reviews())).contains("it holds text"));
}

/// An export whose input names were given out of order is told by what its graph does, and that is said.
#[test]
fn swapped_names_of_inputs_make_the_same_student() {
    let swapped = |mut model: Model| {
        let other = |name: &mut String| match name.as_str() {
            "attention_mask" => "token_type_ids".clone_into(name),
            "token_type_ids" => "attention_mask".clone_into(name),
            _ => {}
        };
        let graph = model.graph_mut();
        graph.input.iter_mut().for_each(|input| other(&mut input.name));
        graph.node.iter_mut().flat_map(|node| &mut node.input).for_each(other);
        model
    };
    let made = |model: Model| rewrite(model, &job(Some(reviews())).transfer(Transfer::ClosedForm), &Silent).unwrap();
    let ((student, report), (usual, usual_report)) = (made(swapped(teacher())), made(teacher()));
    let told = |report: &Report| report.notes.iter().any(|note| note.contains("their names say otherwise"));
    assert!(told(&report) && !told(&usual_report), "{:?}", report.notes);
    let inputs = mabert_tests::padded_inputs(&usual.inputs(), 3, 12, 64, 5);
    let renamed: Vec<_> = inputs
        .iter()
        .map(|(name, value)| match name.as_str() {
            "attention_mask" => ("token_type_ids", value),
            "token_type_ids" => ("attention_mask", value),
            name => (name, value),
        })
        .collect();
    let run = |model: &Model| mabert_runtime::LoadOptions::default().prepare(model).unwrap();
    let (found, expected) = (run(&student).run(&renamed).unwrap(), run(&usual).run(&borrowed(&inputs)).unwrap());
    assert!(distance(&found[0].1, &expected[0].1) < 1e-3);
}

#[test]
fn all_exports_are_calibrated_on_made_up_tokens() {
    for folder in mabert_tests::exports() {
        let full = full::FullOptions::default().with_steps(3, 4);
        let job = job(None).calibration_tokens(1_500).transfer(Transfer::Full(full.into()));
        let (student, report) = rewrite(Model::load(folder.join("model.onnx")).unwrap(), &job, &Silent).unwrap();
        assert!(report.exact_passes_differ_by < 1e-3, "{}: {}", folder.display(), report.exact_passes_differ_by);
        assert!(report.sites.iter().all(|s| s.relative_error.is_none_or(|e| e < 1.0)), "{}", folder.display());
        let tract = mabert_runtime::LoadOptions::default().prepare(&student).unwrap();
        let ort = OrtModel::prepare(&student, 1).unwrap();
        for (batch, length) in [(1, 1), (3, 12), (2, 32)] {
            let inputs = mabert_tests::padded_inputs(tract.inputs(), batch, length, 64, 9);
            let (x, y) = (tract.run(&borrowed(&inputs)).unwrap(), ort.run(&borrowed(&inputs)).unwrap());
            let largest = y[0].1.to_f32().iter().fold(1f32, |m, v| m.max(v.abs()));
            let far = distance(&x[0].1, &y[0].1) / largest;
            assert!(far < 1e-4, "{} at {batch} x {length}: {far}", folder.display());
        }
    }
}

/// MiniLM fine-tuned on SST-2.
#[test]
#[ignore = "needs a model and data that are not in the repository: tests/real-models runs it"]
fn minilm_is_rewritten_and_run_by_both_engines() {
    let (models, texts) = (outside("MABERT_MODELS", "models"), outside("MABERT_DATA", "data"));
    let data = Data::new(texts.join("sst2/dev.tsv"));
    let tokenizer = models.join("minilm-sst2/tokenizer.json");
    let job = job(Some(data.clone())).max_seq(64).calibration_tokens(4_000).tokenizer(tokenizer.clone());
    let teacher = Model::load(models.join("minilm-sst2/model.onnx")).unwrap();
    let (student, report) = rewrite(teacher, &job, &Silent).unwrap();
    let count = |kind: SiteKind| report.sites.iter().filter(|s| s.kind == kind).count();
    assert_eq!((count(SiteKind::Attention), count(SiteKind::Activation), count(SiteKind::Norm)), (6, 6, 13));
    assert_eq!(report.non_linear_after.iter().map(|n| n.operator.as_str()).collect::<Vec<_>>(), ["Tanh"]);
    let folder = tempfile::tempdir().unwrap();
    let path = save(&student, folder.path());
    let tract = mabert_runtime::LoadOptions::default().threads(2).load(&path).unwrap();
    let far = furthest(&tract, &OrtModel::load(&path, 2).unwrap(), (&data, &tokenizer), 64, 64);
    assert!(far < 1e-3, "{far}");
    stays_finite(&tract, 30_522, &report);
}

/// Forms of layers with the reasons.
fn forms(report: &Report) -> Vec<(Form, Reason)> {
    report.softmax.iter().map(|choice| (choice.form, choice.reason)).collect()
}

#[test]
fn each_layer_gets_the_cheaper_form_that_is_close_enough() {
    let text = || job(Some(reviews())).calibration_tokens(2_000).transfer(Transfer::ClosedForm);
    // Hinges are cheaper on tract, and the other form is not tried.
    let report = fixture_report(&text().softmax_error(10.0));
    assert_eq!(forms(&report), [(Form::Hinges, Reason::CheaperWithinBound); 3]);
    for choice in &report.softmax {
        assert!(choice.cost.hinges < choice.cost.network, "{choice:?}");
        assert!(choice.squared_error.hinges.is_some_and(|error| error < 10.0), "{choice:?}");
        assert_eq!(choice.squared_error.network, None);
    }
    assert_eq!(report.options.approximator.longest(), 64);

    // A narrow network is cheaper where nodes run one by one. Students of networks are bound to what they are fitted to.
    let narrow = || text().max_seq(32).hidden(4).target(Target::Onnxruntime).fold(false);
    let (model, report) = rewrite(teacher(), &narrow().softmax_error(1e6), &Silent).unwrap();
    assert_eq!(forms(&report), [(Form::Network, Reason::CheaperWithinBound); 3]);
    assert!(report.softmax.iter().all(|c| c.squared_error.network.is_some() && c.squared_error.hinges.is_none()));
    assert_eq!(report.options.approximator.longest(), 32);

    // Nothing is that close: both are tried, and hinges are closer than so narrow a network.
    let report = fixture_report(&narrow().softmax_error(1e-9));
    assert_eq!(forms(&report), [(Form::Hinges, Reason::LesserError); 3]);
    for choice in &report.softmax {
        let [hinges, network] = [Form::Hinges, Form::Network].map(|form| choice.squared_error.get(form).unwrap());
        assert!(hinges < network, "{choice:?}");
    }

    // Training goes on from the forms that were chosen.
    let folder = tempfile::tempdir().unwrap();
    let start = folder.path().join("unfolded.onnx");
    model.save(&start).unwrap();
    let stage = FullStage { start: Some(start), ..FullOptions::default().with_steps(1, 8).into() };
    let report = fixture_report(&text().transfer(Transfer::Full(stage)));
    assert_eq!(forms(&report), [(Form::Network, Reason::AsBefore); 3]);
}

#[test]
fn forms_are_not_weighed_where_something_else_decides() {
    let uncalibrated = || Job::default().max_seq(16).transfer(Transfer::None);
    for (job, expected) in [
        (uncalibrated(), (Form::Hinges, Reason::NoText)),
        (uncalibrated().softmax(Form::Network), (Form::Network, Reason::AskedFor)),
        (uncalibrated().softmax(Form::Hinges), (Form::Hinges, Reason::AskedFor)),
        (uncalibrated().order(Order::Linear), (Form::Network, Reason::AskedFor)),
        (uncalibrated().order(Order::Paper), (Form::Hinges, Reason::NoLinearOrder)),
    ] {
        let report = fixture_report(&job);
        assert_eq!(forms(&report), [expected; 3]);
    }
    let bias = Model::load(fixture("coverage/mpnet-classification-torchscript-17.onnx")).unwrap();
    let (_, report) = rewrite(bias, &uncalibrated(), &Silent).unwrap();
    assert!(forms(&report).iter().all(|choice| *choice == (Form::Hinges, Reason::NoLinearOrder)));
    let error = rewrite(teacher(), &uncalibrated().sharing(Sharing::Shared), &Silent).unwrap_err();
    assert_eq!(error.settings(), [Setting::Network]);
    assert!(error.to_string().contains("layer by layer"), "{error}");
}
