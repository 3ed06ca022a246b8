//! Weights of eight bits.

use engine::cuda::CudaEngine;
use engine::model::Quantisation;
use engine::{Batch, Engine, Segment};

use crate::{cpu_in, cuda, error, kinds, logits, options, prompt, prompts, quantised, shape};

/// Relative error of logits with FP8 weights and activations. e4m3 has three bits of mantissa: 2.6 % a number, and random
/// weights, unlike trained ones, have no signal that the noise of three layers averages out against.
#[test]
fn fp8_stays_close() {
    for (kind, config) in kinds() {
        let Some(mut plain) = cuda(&config, options()) else { return };
        let mut fp8 = cuda(&config, quantised(Quantisation::Fp8, true)).unwrap();
        let expected = logits(&mut plain, &prompts(), 4096);
        for chunk in [4096, 17] {
            let off = error(&logits(&mut fp8, &prompts(), chunk), &expected);
            println!("{kind}, FP8, chunks of {chunk}: {off:.4}");
            assert!(off < 0.15, "{kind}: {off}");
        }
    }
}

/// INT8 has the weights and scales that the CPU engine has when it rounds per token, bit for bit; activations differ by bf16, and by the numbers that rounding
/// then takes the other way.
#[test]
fn int8_agrees_with_the_cpu_engine_and_stays_close() {
    for (kind, config) in kinds() {
        let Some(mut plain) = cuda(&config, options()) else { return };
        let expected = logits(&mut cpu_in(&config, Some(Quantisation::Int8)), &prompts(), 4096);
        let unrounded = logits(&mut plain, &prompts(), 4096);
        for prepare in [false, true] {
            let mut int8 = cuda(&config, quantised(Quantisation::Int8, prepare)).unwrap();
            for chunk in [4096, 200, 17] {
                let found = logits(&mut int8, &prompts(), chunk);
                let (off, from_bf16) = (error(&found, &expected), error(&found, &unrounded));
                println!(
                    "{kind}, INT8, chunks of {chunk}, prepared {prepare}: {off:.4} from the CPU engine, {from_bf16:.4} from bf16"
                );
                assert!(off < 0.04 && from_bf16 < 0.05, "{kind}: {off} {from_bf16}");
            }
        }
    }
}

/// Thin products of eight-bit weights against those that take rows in eight bits too: a decode step of few sequences.
#[test]
fn thin_products_of_eight_bits_agree_with_the_others() {
    for kind in [Quantisation::Int8, Quantisation::Fp8] {
        let config = shape(128, 8, 2);
        let Some(mut plain) = cuda(&config, options()) else { return };
        let mut thin = cuda(&config, quantised(kind, true)).unwrap();
        let mut wide = cuda(&config, quantised(kind, false)).unwrap();
        for count in [1, 7, 8, 9, 16, 17, 32] {
            let prompts: Vec<_> = (0..count).map(|i| prompt(20 + i, i as u32)).collect();
            let step = |engine: &mut CudaEngine| {
                let tables: Vec<_> = prompts.iter().enumerate().map(|(i, p)| (i, p.len())).collect();
                let tables: Vec<Vec<u32>> = tables
                    .iter()
                    .map(|(i, _)| (0..4).map(|block| (i * 4 + block) as u32).collect())
                    .collect();
                let mut run = |from: fn(usize) -> usize, to: fn(usize) -> usize| {
                    let segments = prompts.iter().zip(&tables).map(|(p, blocks)| Segment {
                        tokens: &p[from(p.len())..to(p.len())],
                        position: from(p.len()),
                        blocks,
                        samples: &[],
                    });
                    engine.forward_logits(&Batch { segments: segments.collect() }).unwrap()
                };
                run(|_| 0, |length| length - 1);
                run(|length| length - 1, |length| length)
            };
            let (thin, wide, plain) = (step(&mut thin), step(&mut wide), step(&mut plain));
            let (off, thin_off, wide_off) = (error(&thin, &wide), error(&thin, &plain), error(&wide, &plain));
            println!(
                "{kind:?}, {count} sequences: {off:.4} apart; from bf16 {thin_off:.4} thin, {wide_off:.4} wide"
            );
            assert!(
                off < 0.15 && thin_off < wide_off * 1.1,
                "{kind:?}, {count} sequences: {off} {thin_off} {wide_off}"
            );
        }
    }
}
