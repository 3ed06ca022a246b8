//! `tandem bench kv`: the transport between two processes, or two hosts: bandwidth, latency and CPU time by block size.

mod client;
mod far;

use std::net::SocketAddr;
use std::sync::Arc;

use kv_transport::verbs::DeviceSelector;
use kv_transport::{Fabric, FabricConfig, Packing, Region};
use serde::Serialize;
use tls::ClusterFiles;

pub use far::serve;

/// Most bytes that one side allocates for a measurement.
const MAX_BYTES: u64 = 4 << 30;

/// How cells are packed that go as this, for heads as many models have them.
pub fn packing(name: &str) -> Option<Packing> {
    Packing::named(name, 128)
}

/// What is measured.
#[derive(Debug, Clone)]
pub struct KvBench {
    /// The other side, started with `--serve`; a child process on loopback when not given.
    pub to: Option<String>,
    /// Bytes of a block.
    pub blocks: Vec<u32>,
    /// Connections to use.
    pub streams: usize,
    /// MiB of one push.
    pub mib: u64,
    /// Pushes of each block size.
    pub runs: usize,
    /// Whether RDMA is used; then it is required.
    pub rdma: bool,
    /// Whether memory is shared; then the far side must be on this host.
    pub shm: bool,
    /// Each block size is measured again with cells that travel packed so.
    pub packing: Option<Packing>,
    /// RDMA devices.
    pub devices: Vec<DeviceSelector>,
    /// Certificates, for encrypted connections; those of both sides speak for any worker.
    pub tls: Option<ClusterFiles>,
}

/// One block size.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Bytes of a block.
    pub block_bytes: u32,
    /// How it went.
    pub transport: String,
    /// Bytes on their way for each byte of a block: less than 1 when they were packed.
    pub on_the_wire: f64,
    /// GB/s of the push, open to committed: least, median, most.
    pub gb_per_s: [f64; 3],
    /// CPU seconds of both sides for 10⁹ bytes, median.
    pub cpu_s_per_gb: f64,
    /// One block, open to committed, microseconds: median and 99th percentile.
    pub p50_us: f64,
    /// See above.
    pub p99_us: f64,
}

/// Runs the measurement and prints it.
pub async fn run(bench: KvBench, json: bool) -> anyhow::Result<()> {
    // A task among tasks, as a worker's: what the main thread waits for would cost another change of thread for each block.
    let measuring = bench.clone();
    let rows = tokio::spawn(async move { client::run(&measuring).await }).await??;
    if json {
        let report = serde_json::json!({ "streams": bench.streams, "mib": bench.mib, "runs": bench.runs, "rows": rows });
        println!("{report}");
        return Ok(());
    }
    println!("{} MiB a push, {} streams, {} runs", bench.mib, bench.streams, bench.runs);
    println!("   block  way   wire  GB/s median (least to most)   CPU s/GB   one block p50     p99");
    for row in rows {
        let [least, median, most] = row.gb_per_s;
        println!(
            "{:>5} KiB  {:<5} {:.3} {median:>6.2} ({least:.2} to {most:.2}) {:>20.2} {:>12.0} µs {:>7.0} µs",
            row.block_bytes >> 10,
            row.transport,
            row.on_the_wire,
            row.cpu_s_per_gb,
            row.p50_us,
            row.p99_us,
        );
    }
    Ok(())
}

/// Where the far side listens when the near one starts it.
const CHILD_ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

fn fabric(rdma: bool, devices: &[DeviceSelector], region: &Region) -> anyhow::Result<Option<Arc<Fabric>>> {
    if !rdma {
        return Ok(None);
    }
    Ok(Some(Fabric::open(&FabricConfig { devices: devices.to_vec(), ..FabricConfig::default() }, region)?))
}

/// CPU seconds of this process, user and system.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks: f64 = fields.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<f64>().ok()).sum();
    // USER_HZ is 100 on every Linux that Rust runs on.
    ticks / 100.0
}
