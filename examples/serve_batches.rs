//! One model, many threads: answers the texts of a file, a line each, in batches of like length.
//!
//! `cargo run --release --example serve_batches -- MODEL TOKENIZER TEXTS [THREADS]`

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use anyhow::{Context as _, Result, anyhow};
use mabert::{Runnable, Tensor};
use tokenizers::Tokenizer;

/// Texts in one run.
const BATCH: usize = 8;

/// A text's place in the file, and its token ids.
type Text = (usize, Vec<i64>);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, tokenizer, texts, threads @ ..] = arguments.as_slice() else {
        return Err(anyhow!("give MODEL TOKENIZER TEXTS [THREADS]"));
    };
    let threads = threads.first().map_or(Ok(2), |n| n.parse())?;
    let model = Runnable::load(model)?;
    let texts = tokenize(tokenizer, texts)?;
    let batches: Vec<&[Text]> = texts.chunks(BATCH).collect();

    // Each thread takes the next batch until there is none; the model is shared by reference.
    let next = AtomicUsize::new(0);
    let (sender, answers) = mpsc::channel::<Result<Vec<(usize, usize)>>>();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let sender = sender.clone();
            scope.spawn(|| {
                let sender = sender;
                while let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if sender.send(answer(&model, batch)).is_err() {
                        break;
                    }
                }
            });
        }
    });
    drop(sender);

    let mut classes = Vec::new();
    for batch in answers {
        classes.extend(batch?);
    }
    classes.sort_unstable();
    for (line, class) in classes {
        println!("{}\t{class}", line + 1);
    }
    Ok(())
}

/// The texts of a file as token ids, shortest first: a batch is padded to its longest text.
fn tokenize(tokenizer: &str, texts: &str) -> Result<Vec<Text>> {
    let mut tokenizer = Tokenizer::from_file(tokenizer).map_err(|e| anyhow!("{tokenizer}: {e}"))?;
    tokenizer.with_padding(None);
    let contents = std::fs::read_to_string(texts).with_context(|| texts.to_owned())?;
    let encode = |(line, text): (usize, &str)| {
        let encoding = tokenizer.encode(text, true).map_err(|e| anyhow!("line {}: {e}", line + 1))?;
        Ok((line, encoding.get_ids().iter().map(|&id| i64::from(id)).collect()))
    };
    let mut texts = contents.lines().enumerate().map(encode).collect::<Result<Vec<Text>>>()?;
    texts.sort_by_key(|(_, ids)| ids.len());
    Ok(texts)
}

/// The class with the largest logit for each text of a batch.
fn answer(model: &Runnable, batch: &[Text]) -> Result<Vec<(usize, usize)>> {
    let length = batch.iter().map(|(_, ids)| ids.len()).max().unwrap_or(0);
    let matrix = |value: &dyn Fn(&[i64], usize) -> i64| {
        let values = batch.iter().flat_map(|(_, ids)| (0..length).map(|at| value(ids, at))).collect();
        Tensor::new(&[batch.len(), length], values)
    };
    let ids = matrix(&|ids, at| ids.get(at).copied().unwrap_or(0));
    let mask = matrix(&|ids, at| i64::from(at < ids.len()));
    let types = matrix(&|_, _| 0);
    let inputs = [("input_ids", &ids), ("attention_mask", &mask), ("token_type_ids", &types)];
    // Not every model takes token types.
    let wanted = |name: &str| model.inputs().iter().any(|input| input.name == name);
    let inputs: Vec<_> = inputs.into_iter().filter(|(name, _)| wanted(name)).collect();
    let outputs = model.run(&inputs)?;
    let logits = outputs.get("logits").context("the model has no output called `logits`")?.to_f32();
    let classes = logits
        .rows()
        .into_iter()
        .map(|row| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(class, _)| class));
    Ok(batch.iter().map(|(line, _)| *line).zip(classes).collect())
}
