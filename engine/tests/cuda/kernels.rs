//! The network of each kind against the CPU engine, and ways through it against each other.

use engine::cpu::{CpuEngine, CpuOptions};
use engine::cuda::{Attention, CudaEngine, CudaOptions};
use engine::model::RandomWeights;
use engine::{Batch, Engine, EngineError, KvDtype, Segment};

use crate::{BLOCKS, continuation, cpu, cuda, error, kinds, logits, options, prompt, prompts, shape};

#[test]
fn logits_agree_with_the_cpu_engine() {
    for (kind, config) in kinds() {
        let Some(mut gpu) = cuda(&config, options()) else { return };
        let expected = logits(&mut cpu(&config), &prompts(), 4096);
        let off = error(&logits(&mut gpu, &prompts(), 4096), &expected);
        println!("{kind}: relative error of logits against f32 activations {off:.4}");
        assert!(off < 0.02, "{kind}: {off}");
    }
}

#[test]
fn kernels_agree_with_each_other() {
    for (kind, config) in kinds() {
        let Some(mut plain) = cuda(&config, CudaOptions { attention: Attention::Plain, ..options() }) else {
            return;
        };
        let expected = logits(&mut plain, &prompts(), 4096);
        for attention in [Attention::Best, Attention::Portable] {
            let mut engine = cuda(&config, CudaOptions { attention, ..options() }).unwrap();
            for chunk in [4096, 200, 64, 17] {
                let off = error(&logits(&mut engine, &prompts(), chunk), &expected);
                println!("{kind}, {attention:?}, chunks of {chunk}: {off:.5}");
                assert!(off < 0.012, "{kind}, {attention:?}, chunks of {chunk}: {off}");
            }
        }
    }
}

/// KV in fp8: the same numbers whoever attends to them, and nearly the CPU engine's, which rounds what comes out of f32.
#[test]
fn kv_in_fp8_is_read_alike_by_all_kernels_and_the_cpu() {
    let kv_dtype = KvDtype::Fp8;
    for (kind, config) in kinds() {
        let fp8 = |attention| CudaOptions { attention, kv_dtype, ..options() };
        let Some(mut plain) = cuda(&config, fp8(Attention::Plain)) else { return };
        let of_cpu = CpuOptions { kv_blocks: BLOCKS, kv_dtype, ..CpuOptions::default() };
        let mut of_cpu = CpuEngine::from_random(config.clone(), 7, of_cpu).unwrap();
        let expected = logits(&mut plain, &prompts(), 4096);
        let off = error(&expected, &logits(&mut of_cpu, &prompts(), 4096));
        let rounding = error(&expected, &logits(&mut cpu(&config), &prompts(), 4096));
        println!("{kind}, KV in fp8: {off:.4} from the CPU engine's fp8, {rounding:.4} from its f32");
        assert!(off < 0.03, "{kind}: {off}");
        for attention in [Attention::Best, Attention::Portable] {
            let mut engine = cuda(&config, fp8(attention)).unwrap();
            for chunk in [4096, 64, 17, 1] {
                let prompts = if chunk == 1 { prompts()[..4].to_vec() } else { prompts() };
                let off = error(&logits(&mut engine, &prompts, chunk), &expected[..prompts.len()]);
                println!("{kind}, KV in fp8, {attention:?}, chunks of {chunk}: {off:.5}");
                assert!(off < 0.03, "{kind}, {attention:?}, chunks of {chunk}: {off}");
            }
        }
    }
}

#[test]
fn graphs_change_nothing() {
    for (kind, config) in kinds() {
        let Some(mut engine) = cuda(&config, CudaOptions { prepare: true, ..options() }) else { return };
        let with = continuation(&mut engine, &prompts(), 12);
        engine.set_graphs(false);
        assert_eq!(with, continuation(&mut engine, &prompts(), 12), "{kind}");
    }
}

/// What is prepared takes other kernels: thin products, measured algorithms.
#[test]
fn preparation_changes_rounding_only() {
    for (kind, config) in kinds() {
        let Some(mut plain) = cuda(&config, CudaOptions { graphs: false, ..options() }) else { return };
        let mut prepared = cuda(&config, CudaOptions { prepare: true, ..options() }).unwrap();
        for count in [1, 2, 8, 9, 17, 32, 40] {
            let prompts: Vec<_> = (0..count).map(|i| prompt(20 + i, i as u32)).collect();
            // The last token alone, as a decode step.
            let decoded = |engine: &mut CudaEngine| {
                let heads: Vec<_> = prompts.iter().map(|p| p[..p.len() - 1].to_vec()).collect();
                let blocks: Vec<_> = (0..count)
                    .map(|i| vec![i as u32 * 4, i as u32 * 4 + 1, i as u32 * 4 + 2, i as u32 * 4 + 3])
                    .collect();
                let run =
                    |engine: &mut CudaEngine, parts: Vec<(&[u32], usize)>| {
                        let segments = parts.iter().zip(&blocks).map(|(&(tokens, position), blocks)| {
                            Segment { tokens, position, blocks, samples: &[] }
                        });
                        engine.forward_logits(&Batch { segments: segments.collect() }).unwrap()
                    };
                run(engine, heads.iter().map(|head| (&head[..], 0)).collect());
                run(engine, prompts.iter().map(|p| (&p[p.len() - 1..], p.len() - 1)).collect())
            };
            let off = error(&decoded(&mut prepared), &decoded(&mut plain));
            println!("{kind}, {count} sequences: {off:.5}");
            assert!(off < 0.012, "{kind}, {count} sequences: {off}");
        }
    }
}

#[test]
fn device_and_host_draw_the_same_weights() {
    let config = shape(64, 4, 2);
    let Some(mut drawn) = cuda(&config, options()) else { return };
    let mut uploaded = CudaEngine::from_source(config, &RandomWeights { seed: 7 }, options()).unwrap();
    assert_eq!(logits(&mut drawn, &prompts(), 4096), logits(&mut uploaded, &prompts(), 4096));
}

#[test]
fn what_does_not_fit_is_refused_with_numbers() {
    let config = shape(64, 4, 2);
    if cuda(&config, options()).is_none() {
        return;
    }
    let huge = CudaOptions { kv_blocks: 1 << 30, ..options() };
    let refused = CudaEngine::from_random(config.clone(), 7, huge).err().unwrap();
    assert!(matches!(&refused, EngineError::OutOfMemory(why) if why.contains("are free")), "{refused}");
    let absent = CudaOptions { device: 99, ..options() };
    let refused = CudaEngine::from_random(config.clone(), 7, absent).err().unwrap();
    assert!(
        matches!(&refused, EngineError::Unsupported(why) if why.contains("no CUDA device 99")),
        "{refused}"
    );
    let wide = CudaOptions { kv_dtype: KvDtype::F32, ..options() };
    assert!(matches!(CudaEngine::from_random(config, 7, wide), Err(EngineError::Unsupported(_))));
}
