//! tract and onnxruntime on real exports, and what both refuse.

use mabert_passes::inputs::EncoderInputs;
use mabert_passes::recording::longest_sequence;
use mabert_runtime::{Error, LoadOptions, Model, OrtModel, Tensor, borrowed, npz};
use mabert_tests::{distance, exports, fixture};

#[test]
fn tract_gives_what_onnxruntime_gave_on_every_export() {
    for folder in exports() {
        let model = Model::load(folder.join("model.onnx")).unwrap();
        let inputs = npz::read(folder.join("inputs.npz")).unwrap();
        let expected = npz::read(folder.join("expected.npz")).unwrap();
        let found = model.run(&borrowed(&inputs)).unwrap();
        let far = distance(&found[0].1, &expected[0].1);
        assert!(far < 1e-5, "{}: {far}", folder.display());
    }
}

#[test]
fn onnxruntime_is_driven_correctly() {
    let folder = fixture("exports/bert-eager-torchscript-17");
    let model = OrtModel::load(folder.join("model.onnx"), 1).unwrap();
    let inputs = npz::read(folder.join("inputs.npz")).unwrap();
    let expected = npz::read(folder.join("expected.npz")).unwrap();
    assert!(distance(&model.run(&borrowed(&inputs)).unwrap()[0].1, &expected[0].1) < 1e-6);
}

fn mini(ids: Vec<i64>, mask: Vec<i64>) -> Result<Tensor, Error> {
    let model = Model::load(fixture("bert-mini-sst2/model.onnx"))?;
    let n = ids.len();
    let types = Tensor::new(&[1, n], vec![0i64; n]);
    let (ids, mask) = (Tensor::new(&[1, n], ids), Tensor::new(&[1, mask.len()], mask));
    let outputs = model.run(&[("input_ids", &ids), ("attention_mask", &mask), ("token_type_ids", &types)])?;
    Ok(outputs[0].1.clone())
}

#[test]
fn bad_inputs_are_refused_before_tract_sees_them() {
    assert!(mini(vec![2, 5, 3], vec![1; 3]).is_ok());
    let beyond = mini(vec![2, 4096, 3], vec![1; 3]).unwrap_err().to_string();
    assert!(beyond.contains("`input_ids`") && beyond.contains("4096"), "{beyond}");
    let long = mini(vec![2; 65], vec![1; 65]).unwrap_err();
    assert!(matches!(long, Error::TooLong { length: 65, limit: 64, .. }), "{long}");
    let unequal = mini(vec![2, 5, 3], vec![1; 4]).unwrap_err().to_string();
    assert!(unequal.contains("length is 4") && unequal.contains("is 3"), "{unequal}");
    let model = Model::load(fixture("bert-mini-sst2/model.onnx")).unwrap();
    let missing = model.run(&[("input_ids", &Tensor::new(&[1, 1], vec![2i64]))]).unwrap_err().to_string();
    assert!(missing.contains("`attention_mask` is missing"), "{missing}");
    let unknown = model.run(&[("ids", &Tensor::new(&[1, 1], vec![2i64]))]).unwrap_err().to_string();
    assert!(unknown.contains("no input `ids`"), "{unknown}");
}

/// RoBERTa numbers positions from 2: of 34 rows, 32 are for tokens.
#[test]
fn a_table_may_have_more_rows_than_there_are_positions() {
    let path = fixture("coverage/roberta-classification-torchscript-17.onnx");
    let model = Model::load(&path).unwrap();
    let run = |n: usize| {
        let (ids, mask) = (Tensor::new(&[1, n], vec![5i64; n]), Tensor::new(&[1, n], vec![1i64; n]));
        model.run(&[("input_ids", &ids), ("attention_mask", &mask)])
    };
    assert!(run(32).is_ok());
    for n in [33, 34, 40] {
        let long = run(n).unwrap_err();
        assert!(matches!(long, Error::TooLong { limit: 32, .. }), "{n}: {long}");
    }
    let graph = mabert_graph::Model::load(&path).unwrap();
    let inputs = EncoderInputs::new(&graph, &[]).unwrap();
    let (longest, limited_by) = longest_sequence(&inputs, &model, 128).unwrap();
    assert_eq!(longest, 32);
    assert!(limited_by.is_some());
}

/// Positions may be cut out of their table by an operator that fails beyond its end.
#[test]
fn a_limit_that_only_shows_in_the_run_is_found() {
    use mabert_graph::{Builder, ElementType};
    let b = Builder::new(17, "test");
    let ids = b.input("input_ids", ElementType::I64, &["batch", "n"]);
    let words = b.parameter("words", &Tensor::new(&[9, 4], vec![0.5f32; 36]));
    let positions = b.parameter("positions", &Tensor::new(&[24, 4], vec![0.25f32; 96]));
    let embedded = words.gather(ids) + positions.slice(0, 0, ids.shape().slice(0, 1, 2));
    let graph = b.model(&[embedded.named("y")]);
    let model = LoadOptions::default().prepare(&graph).unwrap();
    let inputs = EncoderInputs::new(&graph, &[]).unwrap();
    let (longest, limited_by) = longest_sequence(&inputs, &model, 60).unwrap();
    assert_eq!(longest, 24, "{limited_by:?}");
    assert!(limited_by.is_some());
}

/// Each kind of `Einsum` that is spelled as a product, against onnxruntime's own.
#[test]
fn einsums_are_products() {
    use mabert_graph::{Builder, Dependence, ElementType, Index, attribute, decompose_fused};
    let noise = |count: usize, by: f32| (0..count).map(|i| (i as f32 * by).sin()).collect::<Vec<f32>>();
    // The equation, dimensions of the input, and of the other operand: a constant, unless it is another input.
    let cases: [(&str, &[usize], &[usize], bool); 7] = [
        ("bnc,cd->bnd", &[2, 3, 4], &[4, 5], true),
        ("bnc,chd->bnhd", &[2, 3, 4], &[4, 2, 3], true),
        ("bnhd,hdc->bnc", &[2, 3, 2, 4], &[2, 4, 5], true),
        ("bfnd,ndh->bfh", &[2, 3, 2, 4], &[2, 4, 5], true),
        ("bqhd,bkhd->bhqk", &[2, 3, 2, 4], &[2, 5, 2, 4], false),
        ("acbe,aecd->abcd", &[2, 3, 5, 4], &[2, 4, 3, 6], false),
        ("bnc , cd -> dbn", &[2, 3, 4], &[4, 5], true),
    ];
    for (equation, of_x, of_w, constant) in cases {
        for swapped in [false, true] {
            let b = Builder::new(17, "test");
            let names = |dims: &[usize]| dims.iter().map(usize::to_string).collect::<Vec<_>>();
            let input = |name: &str, dims: &[usize]| {
                let names = names(dims);
                b.input(name, ElementType::F32, &names.iter().map(String::as_str).collect::<Vec<_>>())
            };
            let values = Tensor::new(of_w, noise(of_w.iter().product(), 0.7));
            let x = input("x", of_x);
            let w = if constant { b.constant("w", &values) } else { input("w", of_w) };
            let (terms, result) = equation.split_once("->").unwrap();
            let (first, second) = terms.split_once(',').unwrap();
            let (operands, equation) = match swapped {
                true => ([w, x], format!("{second},{first}->{result}")),
                false => ([x, w], equation.to_owned()),
            };
            let mut model =
                b.model(&[b.op("Einsum", &operands, vec![attribute::text("equation", &equation)]).named("y")]);
            let given = [("x", Tensor::new(of_x, noise(of_x.iter().product(), 1.3))), ("w", values)];
            let given = &given[..if constant { 1 } else { 2 }];
            let run = |model: &mabert_graph::Model| {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().join("m.onnx");
                model.save(&path).unwrap();
                OrtModel::load(&path, 1).unwrap().run(&borrowed(given)).unwrap().remove(0).1
            };
            let expected = run(&model);
            assert_eq!(decompose_fused(&mut model).unwrap(), 1, "{equation}");
            assert!(!model.operators().contains_key("Einsum"));
            assert!(Index::new(&model).unwrap().dependence("y") == Dependence::Data);
            let found = run(&model);
            assert_eq!(found.shape(), expected.shape(), "{equation}");
            assert!(distance(&found, &expected) < 1e-5, "{equation}");
        }
    }
    for equation in ["bnc,bnc->bn", "bii,id->bd", "bnc,cd->bd", "bnc,hd->bnchd"] {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["b", "n", "4"]);
        let w = b.constant("w", &Tensor::new(&[4, 4], vec![1f32; 16]));
        let mut model = b.model(&[b.op("Einsum", &[x, w], vec![attribute::text("equation", equation)]).named("y")]);
        assert_eq!(decompose_fused(&mut model).unwrap(), 0, "{equation}");
    }
}

/// A model is shared by reference, and what a thread gets does not depend on the others.
#[test]
fn threads_share_a_model() {
    fn shared<T: Send + Sync>(value: &T) -> &T {
        value
    }
    let model = Model::load(fixture("exports/bert-eager-torchscript-17/model.onnx")).unwrap();
    let model = shared(&model);
    let inputs = |seed: u64| mabert_tests::padded_inputs(model.inputs(), 1 + seed as usize % 3, 5, 64, seed);
    let alone: Vec<Tensor> = (0..12).map(|seed| model.run(&borrowed(&inputs(seed))).unwrap().remove(0).1).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for (seed, expected) in alone.iter().enumerate() {
                    let value = model.run(&borrowed(&inputs(seed as u64))).unwrap().remove(0).1;
                    assert_eq!(value, *expected);
                }
            });
        }
    });
}
