//! Loading and saving changes nothing.

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};

use mabert_graph::proto::{
    FunctionProto, Message as _, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto,
};
use mabert_graph::{Builder, ElementType, Model, Tensor, data_files};
use mabert_tests::{exports, fixture, save_as_optimum};
use onnx_protobuf::tensor_proto::DataLocation;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn every_fixture_survives_a_save() {
    let folder = folder();
    for source in exports().into_iter().chain([fixture("bert-mini-sst2")]) {
        let model = Model::load(source.join("model.onnx")).unwrap();
        let path = folder.path().join("saved.onnx");
        model.save(&path).unwrap();
        assert!(Model::load(&path).unwrap().proto() == model.proto(), "{}", source.display());
    }
}

#[test]
fn external_data_stays_external_and_is_read_back() {
    let folder = folder();
    let source = fixture("exports/bert-sdpa-dynamo-20");
    let model = Model::load(source.join("model.onnx")).unwrap();
    let path = folder.path().join("other.onnx");
    model.save(&path).unwrap();
    let size = |p: &std::path::Path| std::fs::metadata(p).unwrap().len();
    assert!(size(&folder.path().join("other.onnx.data")) > 0);
    assert!(size(&path) < size(&source.join("model.onnx")) + 10_000);
    std::fs::remove_file(folder.path().join("other.onnx.data")).unwrap();
    let message = Model::load(&path).unwrap_err().to_string();
    assert!(message.contains("other.onnx.data") && message.contains("initializer"), "{message}");
}

#[test]
fn a_model_says_what_its_data_files_are_called() {
    let folder = folder();
    let plain = fixture("exports/bert-eager-torchscript-17/model.onnx");
    assert_eq!(data_files(&plain).unwrap(), [] as [std::path::PathBuf; 0]);
    let path = save_as_optimum(&Model::load(&plain).unwrap(), folder.path());
    assert_eq!(data_files(&path).unwrap(), [folder.path().join("model.onnx_data")]);
    assert!(Model::load(&path).unwrap().proto() == Model::load(&plain).unwrap().proto());
}

/// Beyond protobuf's 2 GiB; the file that is read is sparse, the one that is written is not.
#[test]
fn a_model_of_more_than_two_gigabytes_is_loaded_and_saved() {
    const ROWS: usize = 1_200_000;
    const CHANNELS: usize = 512;
    let bytes = (ROWS * CHANNELS * size_of::<f32>()) as u64;
    // Temporary folders may be in memory.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let b = Builder::new(17, "test");
    let ids = b.input("ids", ElementType::I64, &["batch", "n"]);
    let words = b.parameter("words", &Tensor::new(&[1, CHANNELS], vec![0f32; CHANNELS]));
    let mut proto = b.model(&[b.op("Gather", &[words, ids], vec![]).named("y")]).proto().clone();
    let table = &mut proto.graph.as_mut().unwrap().initializer[0];
    table.raw_data.clear();
    table.dims = vec![ROWS as i64, CHANNELS as i64];
    table.data_location = DataLocation::EXTERNAL.into();
    let entry =
        |key: &str, value: &str| StringStringEntryProto { key: key.into(), value: value.into(), ..Default::default() };
    table.external_data =
        vec![entry("location", "words.bin"), entry("offset", "0"), entry("length", &bytes.to_string())];
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, proto.write_to_bytes().unwrap()).unwrap();
    let mut data = std::fs::File::create(folder.path().join("words.bin")).unwrap();
    data.set_len(bytes).unwrap();
    data.seek(SeekFrom::End(-4)).unwrap();
    data.write_all(&1.5f32.to_le_bytes()).unwrap();
    drop(data);

    let mut model = Model::load(&path).unwrap();
    let table = model.initializer("words").unwrap();
    assert_eq!((table.dims.as_slice(), table.raw_data.len() as u64), (&[ROWS as i64, CHANNELS as i64][..], bytes));
    // As a model made in memory, it is not known to have had its data outside.
    let model = Model::from_proto(std::mem::take(model.proto_mut())).unwrap();
    let saved = folder.path().join("saved.onnx");
    model.save(&saved).unwrap();
    drop(model);
    let mut written = std::fs::File::open(folder.path().join("saved.onnx.data")).unwrap();
    assert_eq!(written.metadata().unwrap().len(), bytes);
    written.seek(SeekFrom::End(-4)).unwrap();
    let mut last = [0; 4];
    written.read_exact(&mut last).unwrap();
    assert_eq!(f32::from_le_bytes(last), 1.5);
    // In one file it would be no model that others can read.
    let reloaded = ModelProto::parse_from_bytes(&std::fs::read(&saved).unwrap()).unwrap();
    assert_eq!(reloaded.graph.initializer[0].data_location, DataLocation::EXTERNAL.into());
}

#[test]
fn versions_functions_metadata_and_unknown_fields_are_kept() {
    let folder = folder();
    let plain = Model::load(fixture("exports/bert-eager-torchscript-17/model.onnx")).unwrap();
    for ir_version in 7..=13 {
        let mut proto = plain.proto().clone();
        proto.ir_version = ir_version;
        proto.doc_string = "kept".to_owned();
        let entry =
            |key: &str| StringStringEntryProto { key: key.to_owned(), value: "v".to_owned(), ..Default::default() };
        proto.metadata_props.push(entry("author"));
        let identity = NodeProto {
            op_type: "Identity".to_owned(),
            input: vec!["x".to_owned()],
            output: vec!["y".to_owned()],
            ..NodeProto::default()
        };
        proto.functions.push(FunctionProto {
            name: "Same".to_owned(),
            domain: "local".to_owned(),
            input: vec!["x".to_owned()],
            output: vec!["y".to_owned()],
            node: vec![identity],
            opset_import: vec![OperatorSetIdProto { version: 17, ..Default::default() }],
            ..FunctionProto::default()
        });
        proto.opset_import.push(OperatorSetIdProto { domain: "local".to_owned(), version: 1, ..Default::default() });
        // Fields of versions to come: 12345 in the model and in its first node.
        proto.special_fields.mut_unknown_fields().add_varint(12345, 67);
        let node = &mut proto.graph.as_mut().unwrap().node[0];
        node.special_fields.mut_unknown_fields().add_length_delimited(12345, b"later".to_vec());
        let path = folder.path().join(format!("ir{ir_version}.onnx"));
        std::fs::write(&path, proto.write_to_bytes().unwrap()).unwrap();
        let saved = folder.path().join("saved.onnx");
        Model::load(&path).unwrap().save(&saved).unwrap();
        let read = ModelProto::parse_from_bytes(&std::fs::read(&saved).unwrap()).unwrap();
        assert!(read == proto, "IR version {ir_version}");
        assert_eq!(read.special_fields.unknown_fields().iter().count(), 1);
    }
}

#[test]
fn what_is_no_model_is_refused_by_name() {
    let folder = folder();
    let whole = std::fs::read(fixture("bert-mini-sst2/model.onnx")).unwrap();
    let cases: [(&str, &[u8]); 3] =
        [("empty.onnx", b""), ("cut.onnx", &whole[..whole.len() / 2]), ("text.onnx", b"this is not a model")];
    for (name, bytes) in cases {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let message = Model::load(&path).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains("ONNX model"), "{message}");
    }
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let folder = folder();
    let path = folder.path().join("old.txt");
    std::fs::write(&path, "old").unwrap();
    let failed = mabert_graph::write_atomically(&path, |file| {
        std::io::Write::write_all(file, b"half")?;
        Err(std::io::Error::other("interrupted"))
    });
    assert!(failed.unwrap_err().to_string().contains("interrupted"));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn constants_are_replaced_by_name() {
    let mut model = Model::load(fixture("exports/bert-eager-torchscript-17/model.onnx")).unwrap();
    let name = model.graph().initializer[0].name.clone();
    let count = model.graph().initializer.len();
    model.set_constant(&name, &Tensor::new(&[1], vec![4f32]));
    assert_eq!(model.constant(&name).unwrap(), Tensor::new(&[1], vec![4f32]));
    assert_eq!(model.graph().initializer.len(), count);
}
