//! tract and onnxruntime on real exports, and what both refuse.

use mabert_runtime::{Error, Model, OrtModel, Tensor, npz};
use mabert_tests::{borrowed, distance, exports, fixture};

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
    let outputs = model.run(&[("input_ids", ids), ("attention_mask", mask), ("token_type_ids", types)])?;
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
    assert!(unequal.contains("length"), "{unequal}");
    let model = Model::load(fixture("bert-mini-sst2/model.onnx")).unwrap();
    let missing = model.run(&[("input_ids", Tensor::new(&[1, 1], vec![2i64]))]).unwrap_err().to_string();
    assert!(missing.contains("`attention_mask` is missing"), "{missing}");
    let unknown = model.run(&[("ids", Tensor::new(&[1, 1], vec![2i64]))]).unwrap_err().to_string();
    assert!(unknown.contains("no input `ids`"), "{unknown}");
}
