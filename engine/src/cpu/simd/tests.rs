//! Kernels against plain definitions in f64, and against each other bit by bit.

use half::bf16;
use proptest::prelude::*;

use super::attention::{AttentionLayer, AttentionTask};
use super::gemm::{Gemm, PANEL, Packed};
use super::lanes::LANES;
use super::rows::{NormRow, QkvRow, SwigluRow};
use super::*;
use crate::cpu::arena::Arena;
use crate::kv::fp8;
use crate::{KvDtype, KvLayout};

fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn brain(numbers: &[f32]) -> Vec<bf16> {
    numbers.iter().map(|&x| bf16::from_f32(x)).collect()
}

fn kv_dtype() -> impl Strategy<Value = KvDtype> {
    prop_oneof![Just(KvDtype::Bf16), Just(KvDtype::F32), Just(KvDtype::Fp8)]
}

/// Any even size; whole vectors are what V is read in place for.
fn head_dim() -> impl Strategy<Value = usize> {
    prop_oneof![(1usize..25).prop_map(|half| 2 * half), (1usize..9).prop_map(|vectors| LANES * vectors)]
}

/// Every instruction set's result; asserts that they are the same bits.
fn agreed(compute: impl Fn(&'static Kernels) -> Vec<f32>) -> Vec<f32> {
    let all: Vec<(&str, Vec<f32>)> = Kernels::up_to(Level::of_cpu()).map(|k| (k.name, compute(k))).collect();
    for (name, other) in &all[1..] {
        for (i, (a, b)) in all[0].1.iter().zip(other).enumerate() {
            assert!(a == b || a.is_nan() && b.is_nan(), "{} and {name} differ at {i}: {a} {b}", all[0].0);
        }
    }
    all.into_iter().next().unwrap().1
}

fn close(found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (i, (&a, &b)) in found.iter().zip(expected).enumerate() {
        assert!((f64::from(a) - b).abs() <= tolerance * (1.0 + b.abs()), "{i}: {a}, expected {b}");
    }
}

fn product(
    kernels: &Kernels,
    a: &[f32],
    weights: &Packed,
    bias: Option<&[f32]>,
    rows: usize,
    add: bool,
) -> Vec<f32> {
    let mut out = vec![0.5f32; rows * weights.n];
    let job =
        Gemm { a: a.as_ptr(), lda: weights.k, weights, bias, out: out.as_mut_ptr(), ldo: weights.n, add };
    // SAFETY: supported kernels; all buffers have the sizes.
    unsafe { job.run(kernels, 0..rows, 0..weights.panels()) };
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn products(rows in 1usize..40, n in 1usize..100, half_k in 1usize..60, seed in any::<u64>(), add in any::<bool>(), biased in any::<bool>()) {
        let k = 2 * half_k;
        let (a, w) = (noise(seed, rows * k), brain(&noise(seed + 1, n * k)));
        let bias = biased.then(|| noise(seed + 2, n.next_multiple_of(PANEL)));
        let mut weights = Packed::zeroed(&mut Arena::default(), n, k).unwrap();
        // In two parts, as q, k and v are.
        let cut = n / 3;
        weights.fill(0, &w[..cut * k]);
        weights.fill(cut, &w[cut * k..]);
        let found = agreed(|kernels| product(kernels, &a, &weights, bias.as_deref(), rows, add));
        let expected: Vec<f64> = (0..rows * n).map(|i| {
            let (row, column) = (i / n, i % n);
            let sum: f64 = (0..k).map(|j| f64::from(a[row * k + j]) * f64::from(w[column * k + j].to_f32())).sum();
            sum + bias.as_ref().map_or(0.0, |b| f64::from(b[column])) + if add { 0.5 } else { 0.0 }
        }).collect();
        close(&found, &expected, 1e-5);
        // Rows alone give the same bits as rows together.
        for row in [0, rows / 2, rows - 1] {
            let alone = product(Kernels::best(Level::of_cpu()), &a[row * k..][..k], &weights, bias.as_deref(), 1, add);
            prop_assert_eq!(&alone[..], &found[row * n..][..n]);
        }
    }

    #[test]
    fn norms_and_gates(n in 1usize..200, seed in any::<u64>()) {
        let (x, weight, up) = (noise(seed, n), noise(seed + 1, n), noise(seed + 2, n));
        let found = agreed(|kernels| {
            let mut out = vec![0.0; n];
            // SAFETY: supported kernels; buffers of n.
            unsafe { (kernels.norm)(&NormRow { x: x.as_ptr(), weight: &weight, eps: 1e-5, out: out.as_mut_ptr() }) };
            out
        });
        let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
        let scale = 1.0 / (mean + 1e-5).sqrt();
        let expected: Vec<f64> = x.iter().zip(&weight).map(|(&x, &w)| f64::from(x) * scale * f64::from(w)).collect();
        close(&found, &expected, 1e-5);

        let gate: Vec<f32> = x.iter().map(|x| x * 60.0).collect();
        let found = agreed(|kernels| {
            let mut out = vec![0.0; n];
            // SAFETY: supported kernels; buffers of n.
            unsafe { (kernels.swiglu)(&SwigluRow { gate: gate.as_ptr(), up: up.as_ptr(), out: out.as_mut_ptr(), n }) };
            out
        });
        let expected: Vec<f64> = gate.iter().zip(&up).map(|(&g, &u)| f64::from(g) / (1.0 + (-f64::from(g)).exp()) * f64::from(u)).collect();
        close(&found, &expected, 1e-5);
    }

    #[test]
    fn attention_is_softmax_of_dots(
        position in 0usize..150, count in prop_oneof![Just(1), 1usize..50], group in 1usize..9, dim in head_dim(),
        block_tokens in 1usize..20, window in proptest::option::of(1usize..100), dtype in kv_dtype(), seed in any::<u64>(),
    ) {
        let length = position + count;
        let blocks = length.div_ceil(block_tokens);
        let layout = KvLayout { layers: 1, blocks, kv_heads: 2, block_tokens, head_dim: dim, dtype };
        // Blocks in reverse order; numbers that all types hold exactly.
        let table: Vec<u32> = (0..blocks as u32).rev().collect();
        let numbers: Vec<f32> = noise(seed, layout.total_bytes() / dtype.bytes()).iter().map(|&x| fp8::TO_F32[fp8::from_f32(x) as usize]).collect();
        let bytes: Vec<u32> = match dtype {
            KvDtype::Fp8 => numbers.chunks(4).map(|four| four.iter().rev().fold(0, |word, &x| word << 8 | u32::from(fp8::from_f32(x)))).collect(),
            KvDtype::F32 => numbers.iter().map(|x| x.to_bits()).collect(),
            KvDtype::Bf16 => numbers.chunks(2).map(|p| p[0].to_bits() >> 16 | p.get(1).map_or(0, |x| x.to_bits() & 0xffff_0000)).collect(),
        };
        let q = noise(seed + 1, count * 2 * group * dim);
        let kv_head = 1;
        let run = |kernels: &Kernels, first: usize, count: usize| {
            let mut out = vec![0.0f32; count * 2 * group * dim];
            let layer = AttentionLayer {
                layout: &layout, kv: bytes.as_ptr().cast(), group, window,
                q: q[first * 2 * group * dim..].as_ptr(), ldq: 2 * group * dim, out: out.as_mut_ptr(), ldo: 2 * group * dim,
            };
            let task = AttentionTask { row: 0, count, position: position + first, kv_head, blocks: &table };
            // SAFETY: supported kernels; all buffers have the sizes.
            unsafe { (kernels.attention)(&layer, &task) };
            out
        };
        let found = agreed(|kernels| run(kernels, 0, count));
        let row = |position: usize, part: usize| {
            let at = ((table[position / block_tokens] as usize * 2 + part) * 2 + kv_head) * block_tokens + position % block_tokens;
            &numbers[at * dim..][..dim]
        };
        for query in [0, count / 2, count - 1] {
            let alone = run(Kernels::best(Level::of_cpu()), query, 1);
            prop_assert_eq!(&alone[..], &found[query * 2 * group * dim..][..2 * group * dim], "alone and among others");
            for head in 0..group {
                let at = (query * 2 * group + kv_head * group + head) * dim;
                let now = position + query;
                let seen = window.map_or(0, |w| (now + 1).saturating_sub(w))..now + 1;
                let scores: Vec<f64> = seen.clone().map(|p| q[at..at + dim].iter().zip(row(p, 0)).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let expected: Vec<f64> = (0..dim).map(|i| seen.clone().zip(&scores).map(|(p, s)| (s - max).exp() / total * f64::from(row(p, 1)[i])).sum()).collect();
                close(&found[at..at + dim], &expected, 2e-5);
            }
        }
    }

    #[test]
    fn rotation_and_kv(half_dim in 1usize..40, slot in 0usize..4, seed in any::<u64>(), dtype in kv_dtype(), normed in any::<bool>()) {
        let dim = 2 * half_dim;
        let (heads, kv_heads, block_tokens) = (4, 2, 4);
        let qkv = noise(seed, (heads + 2 * kv_heads) * dim);
        let (weight, angles) = (noise(seed + 1, dim), noise(seed + 2, half_dim));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let found = agreed(|kernels| {
            let mut work = qkv.clone();
            let mut block = vec![0u32; 2 * kv_heads * block_tokens * dim];
            let row = QkvRow {
                qkv: work.as_mut_ptr(), heads, kv_heads, head_dim: dim, cos: &cos, sin: &sin,
                head_norms: normed.then_some((&weight[..], &weight[..], 1e-6)), query_scale: 0.5,
                block: block.as_mut_ptr().cast(), block_tokens, slot, dtype,
            };
            // SAFETY: supported kernels; all buffers have the sizes.
            unsafe { (kernels.qkv)(&row) };
            let stored: Vec<f32> = match dtype {
                KvDtype::F32 => bytemuck::cast_slice(&block).to_vec(),
                KvDtype::Bf16 => bytemuck::cast_slice::<u32, bf16>(&block).iter().map(|x| x.to_f32()).collect(),
                KvDtype::Fp8 => bytemuck::cast_slice::<u32, u8>(&block).iter().map(|&x| fp8::TO_F32[x as usize]).collect(),
            };
            work.extend((0..2 * kv_heads).flat_map(|part| stored[(part * block_tokens + slot) * dim..][..dim].to_vec()));
            work
        });
        let (work, stored) = found.split_at(qkv.len());
        for head in 0..heads + kv_heads {
            let x: Vec<f64> = qkv[head * dim..][..dim].iter().map(|&x| f64::from(x)).collect();
            let scale = if normed { 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / dim as f64 + 1e-6).sqrt() } else { 1.0 };
            let x: Vec<f64> = x.iter().zip(&weight).map(|(x, &w)| x * scale * if normed { f64::from(w) } else { 1.0 }).collect();
            let query = if head < heads { 0.5 } else { 1.0 };
            let expected: Vec<f64> = (0..dim).map(|i| {
                let (pair, other) = (i % half_dim, if i < half_dim { -x[i + half_dim] } else { x[i - half_dim] });
                (x[i] * f64::from(cos[pair]) + other * f64::from(sin[pair])) * query
            }).collect();
            close(&work[head * dim..][..dim], &expected, 1e-5);
        }
        // What is stored is what was computed, rounded to the pool's type.
        for (i, (&stored, &x)) in stored.iter().zip(&work[heads * dim..]).enumerate() {
            let expected = match dtype {
                KvDtype::F32 => x,
                KvDtype::Bf16 => bf16::from_f32(x).to_f32(),
                KvDtype::Fp8 => fp8::TO_F32[fp8::from_f32(x) as usize],
            };
            prop_assert_eq!(stored, expected, "at {}", i);
        }
    }
}
