//! What proof of arrival costs: CRC-32C of a cell beside a copy of it. `cargo bench -p kv-transport --bench checksum`

#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kv_transport::Region;

/// Far more than a cache holds, as a pool is.
const POOL_BYTES: usize = 256 << 20;

fn cells(c: &mut Criterion) {
    let pool = Region::zeroed(POOL_BYTES);
    let mut group = c.benchmark_group("cell");
    for cell_bytes in [16 << 10, 64 << 10, 256 << 10, 1 << 20] {
        let mut copy = vec![1_u8; cell_bytes];
        (0..POOL_BYTES / cell_bytes)
            .for_each(|cell| pool.copy_in(cell * cell_bytes, &copy).unwrap_or_default());
        let mut next = 0;
        let mut cell = move || {
            next = (next + 7 * cell_bytes) % POOL_BYTES;
            next
        };
        group.throughput(Throughput::Bytes(cell_bytes as u64));
        group.bench_function(BenchmarkId::new("checksum", cell_bytes), |b| {
            b.iter(|| cell_checksum(&pool, cell(), cell_bytes));
        });
        group.bench_function(BenchmarkId::new("copy", cell_bytes), |b| {
            b.iter(|| pool.copy_out(cell(), &mut copy));
        });
    }
}

fn cell_checksum(pool: &Region, at: usize, bytes: usize) -> u32 {
    pool.checksum(0, at..at + bytes).unwrap_or_default()
}

criterion_group!(benches, cells);
criterion_main!(benches);
