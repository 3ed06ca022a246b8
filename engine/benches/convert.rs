//! What KV for a pool of another layout costs: its blocks made, and both checksums, as a prefill worker makes them.
//! `cargo bench -p engine --bench convert`

#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine::kv::convert::Conversion;
use engine::{KvDtype, KvLayout};

/// More than caches hold: one layer of an 8B model.
const TOKENS: usize = 16 << 10;

fn layout(block_tokens: usize, dtype: KvDtype) -> KvLayout {
    KvLayout { layers: 1, blocks: TOKENS / block_tokens, kv_heads: 8, block_tokens, head_dim: 128, dtype }
}

fn convert(c: &mut Criterion) {
    let bf16 = layout(16, KvDtype::Bf16);
    let mut group = c.benchmark_group("convert");
    for (name, from, to) in [
        ("bf16 16 to 32 tokens", bf16, layout(32, KvDtype::Bf16)),
        ("bf16 16 to 64 tokens", bf16, layout(64, KvDtype::Bf16)),
        ("bf16 to f32", bf16, layout(16, KvDtype::F32)),
        ("f32 to bf16", layout(16, KvDtype::F32), bf16),
    ] {
        let Ok(conversion) = Conversion::between(from, to) else { continue };
        let source = vec![0x3e_u8; from.block_bytes() * from.blocks];
        let block = |at: usize| source.chunks_exact(from.block_bytes()).nth(at).unwrap_or_default();
        let mut made = vec![0_u8; to.block_bytes() * to.blocks];
        group.throughput(Throughput::Bytes(source.len() as u64));
        for sums in [false, true] {
            let what = if sums { "with checksums" } else { "alone" };
            group.bench_function(BenchmarkId::new(name, what), |b| {
                b.iter(|| {
                    let mut sum = 0;
                    for (at, made) in made.chunks_exact_mut(to.block_bytes()).enumerate() {
                        if sums {
                            sum ^= conversion
                                .sources(at, TOKENS)
                                .fold(0, |sum, at| sum ^ crc32c::crc32c(block(at)));
                        }
                        conversion.fill(at, TOKENS, block, made);
                        if sums {
                            sum ^= crc32c::crc32c(made);
                        }
                    }
                    sum
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, convert);
criterion_main!(benches);
