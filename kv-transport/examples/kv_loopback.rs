//! How fast cells move over loopback, next to memcpy and to bare sockets doing the same scattered copies.
//!
//! `cargo run --release -p kv-transport --example kv_loopback [MiB per push] [rounds]`
//!
//! Every column moves the same cells from random source slots to random target slots and takes the best and the
//! median of the rounds. The bare socket checks nothing and acknowledges nothing; the transport verifies every
//! cell and ends with the receiver's commit.
#![allow(clippy::unwrap_used)]

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_transport::mux::{MuxConfig, split};
use kv_transport::{Cell, Grid, Identity, Receiver, ReceiverConfig, Region, Reserve, Sender, SenderConfig};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngCore, SeedableRng};

const PLANES: usize = 4;

/// GB/s of the best and of the median round, and CPU seconds per GB of all rounds (both ends together).
struct Rate(f64, f64, f64);

/// CPU seconds this process has used, in the kernel's ticks of 10 ms.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|ticks| ticks.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

impl Rate {
    fn of(bytes: usize, cpu_before: f64, mut seconds: Vec<f64>) -> Self {
        let cpu = (cpu_seconds() - cpu_before) / (bytes * seconds.len()) as f64 * 1e9;
        seconds.sort_by(f64::total_cmp);
        Self(bytes as f64 / seconds[0] / 1e9, bytes as f64 / seconds[seconds.len() / 2] / 1e9, cpu)
    }
}

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&format!("{:.2} ({:.2}) {:.2}", self.0, self.1, self.2))
    }
}

struct Case {
    bytes: usize,
    cell: usize,
    rounds: usize,
    src: Vec<u32>,
    dst: Vec<u32>,
}

fn permutation(len: usize, seed: u64) -> Vec<u32> {
    let mut slots: Vec<u32> = (0..len as u32).collect();
    slots.shuffle(&mut StdRng::seed_from_u64(seed));
    slots
}

/// Scattered copies within one thread.
fn memcpy(case: &Case, from: &[u8], to: &mut [u8]) -> Rate {
    let round = |_| {
        let start = Instant::now();
        let per_plane = case.bytes / PLANES / case.cell;
        for plane in 0..PLANES {
            for (&src, &dst) in case.src.iter().zip(&case.dst) {
                let (src, dst) = (plane * per_plane + src as usize, plane * per_plane + dst as usize);
                let source = &from[src * case.cell..(src + 1) * case.cell];
                to[dst * case.cell..(dst + 1) * case.cell].copy_from_slice(source);
            }
        }
        start.elapsed().as_secs_f64()
    };
    Rate::of(case.bytes, cpu_seconds(), (0..case.rounds).map(round).collect())
}

/// Blocking sockets, `writev` from scattered cells and `readv` into scattered cells, nothing else.
fn bare(case: &Case, from: &[u8], to: &mut [u8], streams: usize) -> Rate {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let tune = |socket: TcpStream| {
        socket.set_nodelay(true).unwrap();
        let _ = socket2::SockRef::from(&socket).set_send_buffer_size(4 << 20);
        let _ = socket2::SockRef::from(&socket).set_recv_buffer_size(4 << 20);
        socket
    };
    let mut pairs: Vec<_> = (0..streams)
        .map(|_| (tune(TcpStream::connect(address).unwrap()), tune(listener.accept().unwrap().0)))
        .collect();
    let batch = (1 << 20) / case.cell;
    let batch = batch.clamp(1, 64);
    let share = case.bytes / streams;
    let round = |_| {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for ((pair, to), from) in pairs.iter_mut().zip(to.chunks_mut(share)).zip(from.chunks(share)) {
                let (write, read) = (&mut pair.0, &mut pair.1);
                scope.spawn(move || {
                    let mut cells: Vec<&[u8]> = from.chunks(case.cell).collect();
                    cells.shuffle(&mut StdRng::seed_from_u64(1));
                    for cells in cells.chunks(batch) {
                        let mut slices: Vec<_> = cells.iter().map(|cell| IoSlice::new(cell)).collect();
                        let mut slices = &mut slices[..];
                        while !slices.is_empty() {
                            let n = write.write_vectored(slices).unwrap();
                            IoSlice::advance_slices(&mut slices, n);
                        }
                    }
                });
                scope.spawn(move || {
                    let mut cells: Vec<&mut [u8]> = to.chunks_mut(case.cell).collect();
                    cells.shuffle(&mut StdRng::seed_from_u64(2));
                    for cells in cells.chunks_mut(batch) {
                        let mut slices: Vec<_> = cells.iter_mut().map(|cell| IoSliceMut::new(cell)).collect();
                        let mut slices = &mut slices[..];
                        while !slices.is_empty() {
                            let n = read.read_vectored(slices).unwrap();
                            IoSliceMut::advance_slices(&mut slices, n);
                        }
                    }
                });
            }
        });
        start.elapsed().as_secs_f64()
    };
    Rate::of(case.bytes, cpu_seconds(), (0..case.rounds).map(round).collect())
}

/// The transport, from the first cell queued to the commit acknowledged, on warm connections.
async fn transport(case: &Case, regions: (&Region, &Region), streams: usize) -> Rate {
    let identity = |worker: &str| Identity { worker: worker.to_owned(), incarnation: 1 };
    let grid = Grid {
        planes: PLANES as u32,
        plane_stride: (case.bytes / PLANES) as u64,
        cell_bytes: case.cell as u32,
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoints = vec![listener.local_addr().unwrap().to_string()];
    let config = ReceiverConfig { endpoints, ..ReceiverConfig::default() };
    let receiver = Receiver::new(identity("decode"), regions.1.clone(), grid, config);
    let (kv, rpc) = split(listener, MuxConfig::default());
    let serving = receiver.clone();
    tokio::spawn(async move { serving.serve_all(kv).await });
    let config = SenderConfig { streams, ..SenderConfig::default() };
    let sender = Sender::new(identity("prefill"), regions.0.clone(), grid, config);
    let planes: Vec<Vec<Cell>> = (0..grid.planes)
        .map(|plane| {
            let cell = |(index, &src_slot): (usize, &u32)| {
                let place = grid.cell(plane, src_slot).unwrap();
                Cell { index: index as u32, src_slot, checksum: regions.0.checksum(0, place).unwrap() }
            };
            case.src.iter().enumerate().map(cell).collect()
        })
        .collect();
    let (mut seconds, mut cpu) = (Vec::new(), 0.0);
    for round in 0..=case.rounds {
        if round == 1 {
            // The first one connected and faulted pages in.
            cpu = cpu_seconds();
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        let reserve = Reserve {
            slots: case.dst.clone(),
            meta: Bytes::new(),
            attempt: 0,
            sender: None,
            deadline,
            hold: (),
        };
        let mut landing = receiver.reserve(reserve).unwrap();
        let push = sender.open(landing.ticket().clone(), Arc::new(())).await.unwrap();
        let start = Instant::now();
        for (plane, cells) in planes.iter().enumerate() {
            push.cells(plane as u32, cells).await.unwrap();
        }
        push.commit(Bytes::new()).await.unwrap();
        seconds.push(start.elapsed().as_secs_f64());
        landing.committed().await.unwrap();
    }
    receiver.shutdown();
    drop(rpc);
    seconds.remove(0);
    Rate::of(case.bytes, cpu, seconds)
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter_map(|argument| argument.parse::<usize>().ok());
    let bytes = arguments.next().unwrap_or(256) << 20;
    let rounds = arguments.next().unwrap_or(7);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (mut from, mut to) = (vec![0; bytes], vec![1; bytes]);
    StdRng::seed_from_u64(1).fill_bytes(&mut from);
    let regions = (Region::zeroed(bytes), Region::zeroed(bytes));
    regions.0.copy_in(0, &from).unwrap();
    regions.1.copy_in(0, &to).unwrap();
    println!("GB/s, best (median) of {rounds} rounds of {} MiB, CPU seconds per GB", bytes >> 20);
    println!(
        "{:>6} {:>18} {:>18} {:>18} {:>18} {:>18} {:>18} {:>18}",
        "cell", "memcpy", "bare x1", "bare x2", "bare x4", "kv x1", "kv x2", "kv x4"
    );
    for cell in [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20] {
        let slots = bytes / PLANES / cell;
        let case = Case { bytes, cell, rounds, src: permutation(slots, 3), dst: permutation(slots, 4) };
        print!("{:>5}K {:>18}", cell >> 10, memcpy(&case, &from, &mut to));
        for streams in [1, 2, 4] {
            print!(" {:>18}", bare(&case, &from, &mut to, streams));
        }
        for streams in [1, 2, 4] {
            print!(" {:>18}", runtime.block_on(transport(&case, (&regions.0, &regions.1), streams)));
        }
        println!();
    }
}
