//! What packing costs beside a copy and a checksum, for a byte of bf16 KV in heads of 64 and 128.
//! `cargo bench -p kv-transport --bench packing`

#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kv_transport::Packing;

/// A layer of a block: 16 tokens, 8 heads of 128, K and V.
const CELL_BYTES: usize = 64 << 10;
const PAGE: usize = 4096;

/// bf16 numbers between -1 and 1.
fn cell() -> Vec<u8> {
    let mut state = 1_u32;
    let number = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let between = f32::from((state >> 16) as u16) / 32768.0 - 1.0;
        ((between.to_bits() >> 16) as u16).to_le_bytes()
    };
    (0..CELL_BYTES / 2).flat_map(number).collect()
}

fn packing(c: &mut Criterion) {
    let plain = cell();
    // Places that differ within a page by 1 to 31 bytes would make the copy 20 times slower on a Zen 3.
    let mut memory = vec![0; CELL_BYTES + PAGE];
    let at = plain.as_ptr().addr().wrapping_sub(memory.as_ptr().addr()) % PAGE;
    let Some(other) = memory.get_mut(at..at + CELL_BYTES) else { return };
    let mut group = c.benchmark_group("cell");
    group.throughput(Throughput::Bytes(CELL_BYTES as u64));
    group.bench_function("copy", |b| b.iter(|| other.copy_from_slice(&plain)));
    group.bench_function("checksum", |b| b.iter(|| crc32c::crc32c(&plain)));
    for (name, row) in [(Packing::INT8, 64), (Packing::INT8, 128), (Packing::FP8, 64), (Packing::FP8, 128)] {
        let Some(packing) = Packing::named(name, row) else { continue };
        let mut packed = vec![0; packing.packed_bytes(CELL_BYTES).unwrap_or_default()];
        group.bench_function(BenchmarkId::new(format!("pack {name}"), row), |b| {
            b.iter(|| packing.pack(&plain, &mut packed));
        });
        group.bench_function(BenchmarkId::new(format!("unpack {name}"), row), |b| {
            b.iter(|| packing.unpack(&packed, other));
        });
    }
}

criterion_group!(benches, packing);
criterion_main!(benches);
