//! A sequence's numbers depend on nothing but its tokens: bit for bit.

#![allow(clippy::unwrap_used)]

use engine::cpu::{CpuEngine, CpuOptions};
use engine::model::{Architecture, ModelConfig, Quantisation, Rope, RopeScaling};

const KINDS: [Option<Quantisation>; 2] = [None, Some(Quantisation::Int8)];
use engine::{Batch, Engine, EngineError, KvDtype, SampleRequest, SamplingParams, Segment};

const BLOCK: usize = 16;

fn config(window: Option<usize>) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        layers: 3,
        hidden: 96,
        ffn: 200,
        heads: 6,
        kv_heads: 2,
        head_dim: 16,
        vocab: 333,
        max_context: 512,
        rms_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        qkv_bias: true,
        o_bias: false,
        qk_norm: true,
        windows: vec![window, None, window],
        tie_embeddings: true,
        quantised: None,
        bos: None,
        eos: vec![],
    }
}

fn engine(window: Option<usize>, threads: usize, kv_dtype: KvDtype, block_tokens: usize) -> CpuEngine {
    engine_in(None, window, threads, kv_dtype, block_tokens)
}

fn engine_in(
    quantise: Option<Quantisation>,
    window: Option<usize>,
    threads: usize,
    kv_dtype: KvDtype,
    block_tokens: usize,
) -> CpuEngine {
    let options = CpuOptions {
        kv_blocks: 256,
        block_tokens,
        kv_dtype,
        threads,
        max_batch_tokens: 512,
        quantise,
        ..CpuOptions::default()
    };
    CpuEngine::from_random(config(window), 7, options).unwrap()
}

fn prompt(length: usize, salt: u32) -> Vec<u32> {
    (0..length as u32).map(|i| (i * 7919 + salt * 104_729 + i * i) % 333).collect()
}

/// The last logits after the prompt in chunks of `chunk`, then of `more` single tokens.
fn logits(
    engine: &mut CpuEngine,
    tokens: &[u32],
    chunk: usize,
    more: usize,
    blocks: &[u32],
) -> Vec<Vec<f32>> {
    let (prompt, rest) = tokens.split_at(tokens.len() - more);
    let mut out = Vec::new();
    let mut position = 0;
    for piece in prompt.chunks(chunk).chain(rest.chunks(1)) {
        let segment = Segment { tokens: piece, position, blocks, samples: &[] };
        out = engine.forward_logits(&Batch { segments: vec![segment] }).unwrap();
        position += piece.len();
    }
    out
}

#[test]
fn chunks_of_any_size_give_the_same_bits() {
    let blocks: Vec<u32> = (0..32).rev().collect();
    for window in [None, Some(50)] {
        for (dtype, kind) in [KvDtype::Bf16, KvDtype::F32].into_iter().zip(KINDS) {
            let mut engine = engine_in(kind, window, 2, dtype, BLOCK);
            for length in [1, 5, 16, 64, 65, 203] {
                let tokens = prompt(length, 1);
                let whole = logits(&mut engine, &tokens, length, 0, &blocks);
                assert!(whole[0].iter().all(|x| x.is_finite()));
                for chunk in [1, 7, 16, 64, 100] {
                    assert_eq!(whole, logits(&mut engine, &tokens, chunk, 0, &blocks), "{length} by {chunk}");
                }
                let decoded = logits(&mut engine, &tokens, length, length / 2, &blocks);
                assert_eq!(whole, decoded, "prefill and decode of {length}");
            }
        }
    }
}

#[test]
fn a_batch_of_many_gives_the_same_bits_as_each_alone() {
    KINDS.into_iter().for_each(batches);
}

fn batches(kind: Option<Quantisation>) {
    let mut engine = engine_in(kind, Some(70), 2, KvDtype::Bf16, BLOCK);
    // Prompts, a chunk in the middle of one, and a decode step, all in one batch.
    let tables: Vec<Vec<u32>> = (0..12).map(|i| (i * 20..i * 20 + 20).collect()).collect();
    let sequences: Vec<Vec<u32>> = (0..12).map(|i| prompt(1 + i * 23, i as u32)).collect();
    let done = |i: usize| match i % 3 {
        0 => 0,
        1 => sequences[i].len() / 2,
        _ => sequences[i].len() - 1,
    };
    let alone: Vec<Vec<f32>> =
        (0..12).map(|i| logits(&mut engine, &sequences[i], 1000, 0, &tables[i]).remove(0)).collect();
    for (i, sequence) in sequences.iter().enumerate() {
        if done(i) > 0 {
            logits(&mut engine, &sequence[..done(i)], 1000, 0, &tables[i]);
        }
    }
    for size in [12, 5, 2] {
        for start in (0..12).step_by(size) {
            let members = start..(start + size).min(12);
            let total: usize = members.clone().map(|i| sequences[i].len() - done(i)).sum();
            if total > 512 {
                continue;
            }
            let segments = members.clone().map(|i| Segment {
                tokens: &sequences[i][done(i)..],
                position: done(i),
                blocks: &tables[i],
                samples: &[],
            });
            let together = engine.forward_logits(&Batch { segments: segments.collect() }).unwrap();
            for (i, found) in members.zip(together) {
                assert_eq!(alone[i], found, "sequence {i} in a batch of {size}");
            }
        }
    }
}

#[test]
fn threads_and_block_sizes_change_nothing() {
    let tokens = prompt(150, 3);
    let table: Vec<u32> = (0..100).collect();
    for kind in KINDS {
        let engine = |threads, block_tokens| engine_in(kind, None, threads, KvDtype::Bf16, block_tokens);
        let reference = logits(&mut engine(1, 16), &tokens, 150, 3, &table);
        for (threads, block_tokens) in [(2, 16), (4, 16), (1, 8), (2, 5), (1, 64)] {
            let other = logits(&mut engine(threads, block_tokens), &tokens, 40, 3, &table);
            assert_eq!(reference, other, "{kind:?}, {threads} threads, blocks of {block_tokens}");
        }
    }
}

#[test]
fn layers_are_announced_in_order_and_final() {
    let mut engine = engine(None, 2, KvDtype::Bf16, BLOCK);
    let (tokens, blocks) = (prompt(40, 1), [3u32, 9, 4]);
    let kv = engine.kv();
    let mut seen = Vec::new();
    let segment = Segment { tokens: &tokens, position: 0, blocks: &blocks, samples: &[] };
    let sampled = engine
        .forward(&Batch { segments: vec![segment] }, &mut |layer| {
            seen.push((layer, blocks.map(|block| kv.checksum(layer, block))));
        })
        .unwrap();
    assert_eq!(sampled, [vec![]]);
    assert_eq!(seen.iter().map(|s| s.0).collect::<Vec<_>>(), [0, 1, 2]);
    for (layer, sums) in seen {
        assert_eq!(
            sums,
            blocks.map(|block| kv.checksum(layer, block)),
            "layer {layer} changed after it was final"
        );
    }
}

#[test]
fn copied_blocks_continue_alike_and_samples_are_drawn_per_request() {
    let mut engine = engine(None, 2, KvDtype::Bf16, BLOCK);
    let tokens = prompt(40, 2);
    let whole = logits(&mut engine, &tokens, 40, 0, &[0, 1, 2]);
    logits(&mut engine, &tokens[..39], 39, 0, &[0, 1, 2]);
    engine.copy_blocks(&[(2, 7)]).unwrap();
    let segment = Segment { tokens: &tokens[39..], position: 39, blocks: &[0, 1, 7], samples: &[] };
    assert_eq!(whole, engine.forward_logits(&Batch { segments: vec![segment] }).unwrap());

    let greedy = SamplingParams::default();
    let random = SamplingParams { temperature: 1.0, seed: 4, logprobs: Some(2), ..SamplingParams::default() };
    let request = |params, choice| SampleRequest {
        params,
        prompt: &tokens,
        output: &[],
        banned: &[],
        constraint: None,
        choice,
    };
    let samples = [request(&greedy, 0), request(&random, 0), request(&random, 1)];
    let segment = Segment { samples: &samples, ..segment };
    let quiet = Segment { tokens: &tokens, position: 0, blocks: &[10, 11, 12], samples: &[] };
    let batch = Batch { segments: vec![quiet, segment] };
    let sampled = engine.forward(&batch, &mut |_| {}).unwrap();
    assert_eq!((sampled[0].len(), sampled[1].len()), (0, 3));
    assert_eq!(sampled[1][0].token, engine::sampling::argmax(&whole[0]));
    assert_eq!(sampled[1][1].top.len(), 2);
    assert_eq!(sampled[1][1], engine.forward(&batch, &mut |_| {}).unwrap()[1][1]);
}

#[test]
fn bad_batches_are_refused() {
    let mut engine = engine(None, 1, KvDtype::Bf16, BLOCK);
    let good = Segment { tokens: &[1, 2, 3], position: 15, blocks: &[0, 1], samples: &[] };
    for (segment, words) in [
        (Segment { tokens: &[], ..good }, "no tokens"),
        (Segment { tokens: &[1, 333], ..good }, "token 333"),
        (Segment { blocks: &[0], ..good }, "need 2 blocks"),
        (Segment { blocks: &[0, 256], ..good }, "block 256"),
        (Segment { position: 510, ..good }, "context of 512"),
        (Segment { position: usize::MAX, ..good }, "context of 512"),
    ] {
        let refused = engine.forward(&Batch { segments: vec![good, segment] }, &mut |_| {}).unwrap_err();
        assert!(matches!(&refused, EngineError::BadBatch(reason) if reason.contains(words)), "{refused}");
    }
    let long = [1u32; 300];
    let table: Vec<u32> = (0..40).collect();
    let big = Segment { tokens: &long, position: 0, blocks: &table, samples: &[] };
    let refused = engine.forward(&Batch { segments: vec![big, big] }, &mut |_| {}).unwrap_err();
    assert!(refused.to_string().contains("600 tokens"), "{refused}");
    assert!(engine.copy_blocks(&[(0, 256)]).is_err());
    assert_eq!(engine.forward(&Batch::default(), &mut |_| {}).unwrap(), Vec::<Vec<_>>::new());
}
