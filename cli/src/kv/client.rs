//! The near side: pushes known bytes and takes the time.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use bytes::Bytes;
use engine::shared::SharedMemory;
use kv_transport::{Cell, Grid, Identity, Packing, Region, Secure, Sender, SenderConfig};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};
use worker::secure::KvSecure;

use super::{CHILD_ADDRESS, KvBench, MAX_BYTES, Row, cpu_seconds, fabric};

/// Pushes of one block, for the latency.
const LATENCIES: usize = 300;

/// The far side's lines.
struct Line {
    read: Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
}

impl Line {
    async fn ask(&mut self, question: &str) -> anyhow::Result<String> {
        self.write.write_all(format!("{question}\n").as_bytes()).await?;
        let answer = self.read.next_line().await?.context("the far side closed the connection")?;
        match answer.split_once(' ') {
            Some(("error", text)) => bail!("the far side: {text}"),
            Some((_, rest)) => Ok(rest.to_owned()),
            None => Ok(answer),
        }
    }

    async fn ticket(&mut self, count: u32) -> anyhow::Result<Bytes> {
        let hex = self.ask(&format!("reserve {count}")).await?;
        let byte = |at: usize| hex.get(2 * at..2 * at + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
        (0..hex.len() / 2).map(byte).collect::<Option<Vec<u8>>>().map(Bytes::from).context("not a ticket")
    }
}

pub(super) async fn run(bench: &KvBench) -> anyhow::Result<Vec<Row>> {
    let (_child, address) = match &bench.to {
        Some(address) => (None, address.clone()),
        None => {
            let (child, address) = child(bench).await?;
            (Some(child), address)
        }
    };
    let connect = TcpStream::connect(&address).await;
    let stream = connect
        .with_context(|| format!("--to: cannot reach {address}; start `tandem bench kv --serve` there"))?;
    stream.set_nodelay(true)?;
    let (read, write) = stream.into_split();
    let mut line = Line { read: BufReader::new(read).lines(), write };
    let mut rows = Vec::new();
    for &block in &bench.blocks {
        rows.push(measure(bench, block, None, &mut line).await?);
        if bench.packing.is_some() {
            rows.push(measure(bench, block, bench.packing, &mut line).await?);
        }
    }
    Ok(rows)
}

/// The pushed memory.
fn memory(bytes: usize, shared: bool) -> anyhow::Result<Region> {
    if !shared {
        return Ok(Region::zeroed(bytes));
    }
    let memory = SharedMemory::new(bytes).context("--shm")?;
    let (start, file) = (memory.as_ptr(), memory.file());
    // SAFETY: mapped for as long as the region keeps it; nobody else writes it.
    Ok(unsafe { Region::from_raw(start, bytes, Arc::new(memory)) }.backed_by(file))
}

/// Numbers as KV has them, bf16 between -1 and 1: no page is all zeros, and packing has something to do.
fn fill(region: &Region) -> anyhow::Result<()> {
    let mut state = 1_u32;
    let number = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let between = f32::from((state >> 16) as u16) / 32768.0 - 1.0;
        ((between.to_bits() >> 16) as u16).to_le_bytes()
    };
    let numbers: Vec<u8> = (0..1 << 19).flat_map(number).collect();
    for at in (0..region.len()).step_by(numbers.len()) {
        let some = numbers.get(..numbers.len().min(region.len() - at)).unwrap_or_default();
        region.copy_in(at, some)?;
    }
    Ok(())
}

async fn child(bench: &KvBench) -> anyhow::Result<(Child, String)> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["bench", "kv", "--with-parent", "--serve", &CHILD_ADDRESS.to_string()]);
    if let Some(files) = &bench.tls {
        command.arg("--cluster-cert").arg(&files.cert).arg("--cluster-key").arg(&files.key);
        command.arg("--cluster-ca").arg(&files.ca);
    }
    for device in &bench.devices {
        command.args(["--rdma-device", &device.to_string()]);
    }
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
    let first = lines.next_line().await?.unwrap_or_default();
    let address = first.strip_prefix("listening ").context("the child did not start")?.to_owned();
    Ok((child, address))
}

async fn measure(
    bench: &KvBench,
    block: u32,
    packing: Option<Packing>,
    line: &mut Line,
) -> anyhow::Result<Row> {
    let total = bench.mib << 20;
    if block == 0 || u64::from(block) > total || total > MAX_BYTES {
        bail!("--blocks, --mib: a block of {block} bytes in a push of {total}, at most {MAX_BYTES}");
    }
    let slots = u32::try_from(total / u64::from(block))?;
    let bytes = u64::from(slots) * u64::from(block);
    let region = memory(usize::try_from(bytes)?, bench.shm)?;
    fill(&region)?;
    if packing.is_some_and(|packing| packing.packed_bytes(block as usize).is_none()) {
        bail!("--kv-wire, --blocks: {block} bytes are not whole heads of 128 numbers");
    }
    let way = if bench.rdma { "rdma" } else { packing.map_or("tcp", Packing::name) };
    line.ask(&format!("setup {block} {slots} {way}")).await?;
    let grid = Grid { planes: 1, plane_stride: bytes, cell_bytes: block };
    let cells: Vec<Cell> = (0..slots)
        .map(|slot| {
            let checksum = grid.cell(0, slot).and_then(|place| region.checksum(0, place).ok()).unwrap_or(0);
            Cell { index: slot, src_slot: slot, checksum }
        })
        .collect();
    let config = SenderConfig {
        streams: bench.streams,
        fabric: fabric(bench.rdma, &bench.devices, &region)?,
        require_rdma: bench.rdma,
        secure: bench.tls.clone().map(|files| Arc::new(KvSecure(files)) as Arc<dyn Secure>),
        ..SenderConfig::default()
    };
    let identity = Identity { worker: "near".into(), incarnation: 1 };
    let sender = Sender::new(identity, region, grid, config);
    let push = async |ticket: Bytes, cells: &[Cell]| {
        let started = Instant::now();
        let push = sender.open_ahead(ticket, Arc::new(()), packing).await?;
        push.cells(0, cells).await?;
        let report = push.commit(Bytes::new()).await?;
        anyhow::Ok((started.elapsed().as_secs_f64(), report))
    };

    let (mut rates, mut cpu, mut transport, mut on_the_wire) = (Vec::new(), Vec::new(), "", 1.0);
    for run in 0..=bench.runs {
        let ticket = line.ticket(slots).await?;
        let before = cpu_seconds() + line.ask("cpu").await?.parse::<f64>()?;
        let (seconds, report) = push(ticket, &cells).await?;
        let after = cpu_seconds() + line.ask("cpu").await?.parse::<f64>()?;
        transport = report.transport;
        if report.packed_bytes > 0 {
            on_the_wire = report.packed_bytes as f64 / report.bytes as f64;
        }
        // The first one connects and touches the pages.
        if run > 0 {
            rates.push(bytes as f64 / seconds / 1e9);
            cpu.push((after - before) / (bytes as f64 / 1e9));
        }
    }
    if bench.shm && transport != "shm" {
        bail!("--shm: the far side did not map our memory; is it on this host, and of the same user?");
    }
    let mut times = Vec::new();
    for _ in 0..LATENCIES {
        let ticket = line.ticket(1).await?;
        let one = cells.get(..1).unwrap_or_default();
        times.push(push(ticket, one).await?.0 * 1e6);
    }
    rates.sort_by(f64::total_cmp);
    cpu.sort_by(f64::total_cmp);
    times.sort_by(f64::total_cmp);
    let at = |list: &[f64], share: f64| {
        list.get(((list.len() as f64 * share) as usize).min(list.len().saturating_sub(1)))
            .copied()
            .unwrap_or(0.0)
    };
    Ok(Row {
        block_bytes: block,
        transport: transport.to_owned(),
        on_the_wire,
        gb_per_s: [at(&rates, 0.0), at(&rates, 0.5), at(&rates, 1.0)],
        cpu_s_per_gb: at(&cpu, 0.5),
        p50_us: at(&times, 0.5),
        p99_us: at(&times, 0.99),
    })
}
