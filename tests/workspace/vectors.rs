//! Feature models: fitted to and measured by the vectors of texts that their users compare.

use std::path::Path;

use mabert_graph::Model;
use mabert_passes::inputs::EncoderInputs;
use mabert_runtime::{Engine, Model as Runnable, OrtModel, Tensor};
use mabert_tests::{fixture, sentence_model};
use mabert_transfer::compare::VectorDistance;
use mabert_transfer::data::{BatchShape, Columns, DataFile, Overlong, TextEncoder};
use mabert_transfer::evaluate::{Answered, Labelled, Metric, Spread, TaskRun};
use mabert_transfer::full::FullOptions;
use mabert_transfer::job::{Data, Dev, Job, Pooling, Report, Transfer, rewrite};
use mabert_transfer::pooling::Features;
use mabert_transfer::progress::Silent;

fn job() -> Job {
    Job::default()
        .data(Data::new(fixture("reviews/reviews.tsv")))
        .tokenizer(fixture("bert-mini-sst2/tokenizer.json"))
        .max_seq(32)
        .calibration_tokens(6_000)
}

fn report(pools: bool, job: &Job) -> Report {
    rewrite(sentence_model(pools), job, &Silent).unwrap().1
}

fn vectors<'r>(report: &'r Report, output: &str) -> &'r VectorDistance {
    report.outputs.iter().find(|o| o.output == output).unwrap().vectors.as_ref().unwrap()
}

#[test]
fn the_report_has_cosines_and_neighbours_of_vectors() {
    let both = report(true, &job());
    let (by_the_model, by_us) = (vectors(&both, "sentence_embedding"), vectors(&both, "last_hidden_state"));
    assert_eq!((by_the_model.pooling, by_us.pooling), (Pooling::Output, Pooling::Mean));
    // The model's own pooling is the same mean.
    approx::assert_abs_diff_eq!(by_the_model.mean_cosine, by_us.mean_cosine, epsilon = 1e-5);
    approx::assert_abs_diff_eq!(by_the_model.least_cosine, by_us.least_cosine, epsilon = 1e-5);
    assert_eq!((by_us.texts, by_us.same_neighbour), (240, by_the_model.same_neighbour));
    assert!(by_us.mean_cosine > 0.9 && by_us.least_cosine < by_us.mean_cosine, "{by_us:?}");
    let neighbours = by_us.same_neighbour.unwrap();
    // By chance it would be one in 239; this teacher's texts lie close to each other, in two heaps.
    assert!((0.03..1.0).contains(&neighbours), "{neighbours}");
    assert!(both.outputs.iter().all(|o| o.agreement.is_none()), "vectors name no class: {:?}", both.outputs);

    let first = report(false, &job().pooling(Pooling::First));
    let of_first = vectors(&first, "last_hidden_state");
    assert_eq!(of_first.pooling, Pooling::First);
    assert!((of_first.mean_cosine - by_us.mean_cosine).abs() > 1e-4, "{of_first:?}");
    let none = report(false, &job().pooling(Pooling::None));
    assert!(none.outputs[0].vectors.is_none() && none.outputs[0].mean_cosine.is_some());
    let refused = rewrite(sentence_model(false), &job().pooling(Pooling::Output), &Silent).unwrap_err().to_string();
    assert!(refused.contains("`[batch, channels]`") && refused.contains("last_hidden_state"), "{refused}");
}

/// As sentence-transformers leaves it: the model under `onnx/`, the tokenizer and the pooling above.
#[test]
fn the_folder_says_how_hidden_states_are_pooled() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    ["onnx", "1_Pooling"].iter().for_each(|name| std::fs::create_dir(at(name)).unwrap());
    let rewrite_file = |config: &str| {
        std::fs::write(at("1_Pooling/config.json"), config).unwrap();
        sentence_model(false).save(at("onnx/model.onnx")).unwrap();
        rewrite(Model::load(at("onnx/model.onnx")).unwrap(), &job().calibration_tokens(1_000), &Silent)
    };
    let cls = r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}"#;
    assert_eq!(vectors(&rewrite_file(cls).unwrap().1, "last_hidden_state").pooling, Pooling::First);
    let refused = rewrite_file(r#"{"pooling_mode_max_tokens": true}"#).unwrap_err().to_string();
    assert!(refused.contains("config.json") && refused.contains("max_tokens"), "{refused}");
}

#[test]
fn training_brings_the_angles_of_vectors_down() {
    for (pools, pooling) in [(false, Pooling::Mean), (false, Pooling::First), (true, Pooling::Output)] {
        let mut full = FullOptions::default().with_steps(120, 16);
        full.vector_weight = 10.0;
        let report =
            report(pools, &job().calibration_tokens(3_000).pooling(pooling).transfer(Transfer::Full(full.into())));
        let trained = report.full.as_ref().unwrap();
        assert!(trained.kept && trained.after.vectors < 0.97 * trained.before.vectors, "{pooling:?}: {trained:?}");
    }
}

/// Pairs of neighbouring reviews, scored by how many letters the longer one has more, blurred so that some are equal.
fn pairs(folder: &Path) -> Data {
    let reviews = std::fs::read_to_string(fixture("reviews/reviews.tsv")).unwrap();
    let texts: Vec<&str> = reviews.lines().skip(1).filter_map(|line| line.split('\t').next()).take(60).collect();
    let lines = texts
        .chunks_exact(2)
        .map(|pair| format!("{}\t{}\t{}\n", pair[0], pair[1], pair[0].len().abs_diff(pair[1].len()) / 20));
    let path = folder.join("pairs.tsv");
    std::fs::write(&path, format!("first\tsecond\tscore\n{}", lines.collect::<String>())).unwrap();
    let [text, pair, label] = ["first", "second", "score"].map(|name| Some(name.to_owned()));
    Data::new(path).columns(Columns { text, pair, label, classes: Vec::new() })
}

#[test]
fn scored_pairs_are_read_text_by_text_on_both_engines() {
    let folder = tempfile::tempdir().unwrap();
    let data = pairs(folder.path());
    let file = DataFile::open(&data).unwrap();
    let encoder = TextEncoder::new(Some(&fixture("bert-mini-sst2/tokenizer.json")), 32, Overlong::Truncate).unwrap();
    let scored = Labelled::read_pairs(file, &encoder, None).unwrap();
    let sequences = scored.sequences();
    let score = |line: &str| line.rsplit('\t').next().unwrap().parse().unwrap();
    let scores: Vec<f64> = std::fs::read_to_string(scored.file()).unwrap().lines().skip(1).map(score).collect();
    assert_eq!((sequences.len(), scored.examples(), scores.len()), (60, 30, 30));
    let path = folder.path().join("model.onnx");
    sentence_model(true).save(&path).unwrap();
    let model = Model::load(&path).unwrap();
    let shape = BatchShape::new(&EncoderInputs::new(&model, &[]).unwrap());
    let onnxruntime = OrtModel::load(&path, 1).unwrap();

    // Each text alone, without padding.
    let embed = |ids: &[i64]| {
        let row = |values: Vec<i64>| Tensor::new(&[1, ids.len()], values);
        let (ids, ones, zeros) = (row(ids.to_vec()), row(vec![1; ids.len()]), row(vec![0; ids.len()]));
        let inputs = [("input_ids", &ids), ("attention_mask", &ones), ("token_type_ids", &zeros)];
        let outputs = onnxruntime.run(&inputs).unwrap();
        let value = outputs.into_iter().find(|(name, _)| name == "sentence_embedding").unwrap().1;
        value.to_f32().iter().copied().map(f64::from).collect::<Vec<f64>>()
    };
    let expected: Vec<f64> = sequences
        .chunks_exact(2)
        .map(|pair| {
            let [a, b] = [embed(&pair[0].ids), embed(&pair[1].ids)];
            let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
            dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()
        })
        .collect();
    let engines: [&dyn Engine; 2] = [&onnxruntime, &Runnable::load(&path).unwrap()];
    let wanted = Metric::Sts.score(&expected, &scores);
    let mut first: Option<Answered> = None;
    for engine in engines {
        let answers = |asked| {
            let features = Features::new(asked);
            let (shape, features) = (&shape, Some(&features));
            scored.answers(&TaskRun { engine, shape, channels: None, features, spread: Spread::Inside }, None)
        };
        // The model's own pooling, and ours of its hidden states.
        for asked in [None, Some(Pooling::Mean)] {
            let answered = answers(asked).unwrap();
            assert_eq!((answered.metric, answered.unusable), (Metric::Sts, 0));
            approx::assert_abs_diff_eq!(scored.score(Metric::Sts, &answered).unwrap(), wanted, epsilon = 0.02);
            let first = first.get_or_insert(answered.clone());
            assert!(answered.agreement(first) > 0.999_999, "{asked:?}");
        }
        let of_first_tokens = answers(Some(Pooling::First)).unwrap();
        assert!(of_first_tokens.agreement(first.as_ref().unwrap()) < 0.999);
        assert!(answers(Some(Pooling::None)).unwrap_err().to_string().contains("vectors of texts"));
    }

    let dev = Dev { data, metric: Some(Metric::Sts) };
    let report = rewrite(model, &job().calibration_tokens(1_000).dev(dev), &Silent).unwrap().1.dev.unwrap();
    assert_eq!(report.examples, 30);
    approx::assert_abs_diff_eq!(report.teacher, wanted, epsilon = 0.02);
    assert!(report.agreement > 0.5 && report.student.is_finite(), "{report:?}");
}
