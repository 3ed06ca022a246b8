//! One kernel for all layers of a decode step against the kernels apart.

use engine::cuda::{CudaEngine, CudaOptions};
use engine::model::{ModelConfig, Quantisation};
use engine::{Batch, Engine, KvDtype, Segment};

use crate::{cuda, error, kinds, options, prompt, shape, table};

/// Steps that are decoded one after the other: each reads the KV that those before it wrote.
const STEPS: usize = 3;

/// Logits of the last of some decode steps, of sequences of these lengths.
fn decoded(engine: &mut CudaEngine, lengths: &[usize]) -> Vec<Vec<f32>> {
    let prompts: Vec<_> =
        lengths.iter().zip(1..).map(|(&length, seed)| prompt(length + STEPS, seed)).collect();
    let tables: Vec<_> = prompts.iter().enumerate().map(|(i, p)| table(i, p.len())).collect();
    let mut run = |from: &dyn Fn(usize) -> std::ops::Range<usize>| {
        let segments = prompts.iter().zip(&tables).zip(lengths).map(|((prompt, blocks), &length)| {
            let range = from(length);
            Segment { tokens: &prompt[range.clone()], position: range.start, blocks, samples: &[] }
        });
        engine.forward_logits(&Batch { segments: segments.collect() }).unwrap()
    };
    run(&|length| 0..length);
    (0..STEPS).map(|step| run(&|length| length + step..length + step + 1)).last().unwrap()
}

fn agrees(kind: &str, config: &ModelConfig, options: CudaOptions, most: f64) -> bool {
    let Some(mut engine) = cuda(config, options.clone()) else { return false };
    for lengths in [&[300][..], &[1, 700], &[129, 16, 5], &[127, 15, 300, 64]] {
        let ways = [true, false].map(|on| {
            engine.set_megakernel(Some(on));
            decoded(&mut engine, lengths)
        });
        let off = error(&ways[0], &ways[1]);
        let (weights, kv, rows) = (options.quantise, options.kv_dtype, lengths.len());
        println!("{kind}, {weights:?}, KV {kv:?}, {rows} sequences: {off:.5}");
        assert!(off < most, "{kind}, {weights:?}, KV {kv:?}, {rows} sequences: {off}");
        // Sums are added up in another order: equal bits would mean that there was one way only.
        let same = ways[0] == ways[1];
        assert_eq!(same, !engine.has_megakernel(), "{kind}");
    }
    true
}

/// Weights of eight bits meet x in bf16 here and in eight bits there, unless measuring chose otherwise.
#[test]
fn the_megakernel_makes_the_same_step() {
    for (kind, config) in kinds() {
        for (quantise, most) in
            [(None, 0.012), (Some(Quantisation::Int8), 0.04), (Some(Quantisation::Fp8), 0.15)]
        {
            for kv_dtype in [KvDtype::Bf16, KvDtype::Fp8] {
                let most = if kv_dtype == KvDtype::Fp8 { most + 0.02 } else { most };
                if !agrees(kind, &config, CudaOptions { quantise, kv_dtype, ..options() }, most) {
                    return;
                }
            }
        }
    }
}

#[test]
fn flags_may_begin_anew_between_steps() {
    let Some(mut engine) = cuda(&shape(128, 8, 2), options()) else { return };
    engine.set_megakernel(Some(true));
    let before = decoded(&mut engine, &[64, 5]);
    engine.restart_flags().unwrap();
    assert_eq!(decoded(&mut engine, &[64, 5]), before);
}

/// It leaves no room for kernels that bring KV.
#[test]
fn kernels_apart_make_the_steps_while_kv_arrives() {
    let Some(mut engine) = cuda(&shape(128, 8, 2), options()) else { return };
    let kv = engine.kv();
    let bytes = kv.layout().block_bytes();
    let device = kv.on_device().expect("a pool on the device");
    let mut steps = |on| {
        engine.set_megakernel(on);
        decoded(&mut engine, &[64, 5])
    };
    let (together, apart) = (steps(Some(true)), steps(Some(false)));
    assert_eq!(steps(None), together);
    let began = std::time::Instant::now();
    device.sums(&[0], bytes).unwrap();
    let found = steps(None);
    let took = began.elapsed();
    println!("{took:?} after KV arrived");
    // Kernels apart are for 20 ms; a machine that stood still meanwhile says nothing.
    if took.as_millis() < 20 {
        assert_eq!(found, apart);
    }
}

/// Rows of x that do not fit in shared memory at once.
#[test]
fn the_megakernel_takes_long_rows_in_parts() {
    let config = ModelConfig { ffn: 15_424, ..shape(128, 8, 2) };
    // Products of eight bits, unmeasured, round x: the more numbers a row has, the more of them are small beside the largest.
    for (quantise, most) in [(None, 0.012), (Some(Quantisation::Int8), 0.07)] {
        if !agrees("long rows", &config, CudaOptions { quantise, ..options() }, most) {
            return;
        }
    }
}
