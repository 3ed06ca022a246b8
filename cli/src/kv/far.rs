//! The far side of a measurement: reserves what it is asked for, on one port, by a protocol of lines.
//!
//! `setup CELL_BYTES SLOTS tcp|rdma|int8|fp8` → `ok` · `reserve N` → `ticket HEX` · `cpu` → `cpu SECONDS` · else `error TEXT`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use kv_transport::mux::{self, MuxConfig};
use kv_transport::verbs::DeviceSelector;
use kv_transport::{Grid, Identity, Receiver, ReceiverConfig, Region, Reserve};
use tls::ClusterFiles;
use tls::server::{Faces, Secured};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use worker::secure::{PROTOCOLS, kv_socket};

use super::{MAX_BYTES, cpu_seconds, fabric, packing};

/// The first byte of a TLS connection.
const TLS: u8 = 0x16;
const TIME: Duration = Duration::from_secs(300);

struct Far {
    now: Mutex<Option<(Receiver, u32)>>,
    endpoint: SocketAddr,
    devices: Vec<DeviceSelector>,
    is_secure: bool,
}

/// Serves until killed, or until standard input ends when `with_parent`.
pub async fn serve(
    address: SocketAddr,
    devices: Vec<DeviceSelector>,
    tls: Option<ClusterFiles>,
    with_parent: bool,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).await?;
    let endpoint = listener.local_addr()?;
    println!("listening {endpoint}");
    let is_secure = tls.is_some();
    let far = Arc::new(Far { now: Mutex::default(), endpoint, devices, is_secure });
    let (to_shake, shaking) = mpsc::channel(16);
    let mut shaken = match tls {
        Some(files) => {
            let faces = Faces { clients: None, cluster: Some((files, PROTOCOLS)) };
            Some(tls::server::accept(ReceiverStream::new(shaking), faces)?)
        }
        None => None,
    };
    let (mut kv, mut lines) = mux::split(listener, MuxConfig::default());
    let (ended, mut parent_ended) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || {
        // Until the end of the input, whatever comes.
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        drop(ended);
    });
    loop {
        tokio::select! {
            Some(stream) = kv.next() => {
                let receiver = far.now.lock().await.as_ref().map(|(receiver, _)| receiver.clone());
                if let Some(receiver) = receiver {
                    tokio::spawn(async move { receiver.serve(stream).await });
                }
            }
            Some(Ok(secured)) = next(shaken.as_mut()) => {
                let receiver = far.now.lock().await.as_ref().map(|(receiver, _)| receiver.clone());
                if let Some(receiver) = receiver {
                    tokio::spawn(async move { receiver.serve(kv_socket(secured)).await });
                }
            }
            Some(Ok(stream)) = lines.next() => {
                let mut first = [0];
                if is_secure && stream.peek(&mut first).await.is_ok() && first == [TLS] {
                    let _ = to_shake.send(Ok(stream)).await;
                    continue;
                }
                let far = far.clone();
                tokio::spawn(async move { far.answer(stream).await });
            }
            _ = &mut parent_ended, if with_parent => return Ok(()),
        }
    }
}

/// The next connection that has shaken hands, if any do.
async fn next(
    shaken: Option<&mut ReceiverStream<std::io::Result<Secured>>>,
) -> Option<std::io::Result<Secured>> {
    match shaken {
        Some(shaken) => shaken.next().await,
        None => std::future::pending().await,
    }
}

impl Far {
    async fn answer(&self, stream: TcpStream) {
        let local = stream.local_addr().map_or(self.endpoint, |local| local);
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let words: Vec<&str> = line.split(' ').collect();
            let reply = match self.obey(&words, local).await {
                Ok(reply) => reply,
                Err(error) => format!("error {error:#}"),
            };
            if write.write_all(format!("{reply}\n").as_bytes()).await.is_err() {
                return;
            }
        }
    }

    async fn obey(&self, words: &[&str], local: SocketAddr) -> anyhow::Result<String> {
        let mut now = self.now.lock().await;
        match words {
            ["setup", cell, slots, way] => {
                let (cell_bytes, slots): (u32, u32) = (cell.parse()?, slots.parse()?);
                let bytes = u64::from(cell_bytes) * u64::from(slots);
                anyhow::ensure!(
                    (1..=MAX_BYTES).contains(&bytes),
                    "{bytes} bytes are not between 1 and {MAX_BYTES}"
                );
                // The former pool goes first: two would not fit.
                if let Some((old, _)) = now.take() {
                    old.shutdown();
                }
                let region = Region::zeroed(usize::try_from(bytes)?);
                let rdma = *way == "rdma";
                let config = ReceiverConfig {
                    endpoints: vec![local.to_string()],
                    fabric: fabric(rdma, &self.devices, &region)?,
                    require_rdma: rdma,
                    secure: self.is_secure,
                    packing: packing(way),
                    ..ReceiverConfig::default()
                };
                let grid = Grid { planes: 1, plane_stride: bytes, cell_bytes };
                let identity = Identity { worker: "far".into(), incarnation: rand::random() };
                *now = Some((Receiver::new(identity, region, grid, config), slots));
                Ok("ok".into())
            }
            ["reserve", count] => {
                let count: u32 = count.parse()?;
                let Some((receiver, slots)) = now.as_ref() else { anyhow::bail!("setup comes first") };
                anyhow::ensure!(count <= *slots, "{count} of {slots} slots");
                let reserve = Reserve {
                    slots: (0..count).collect(),
                    meta: Bytes::new(),
                    attempt: 1,
                    sender: None,
                    deadline: Instant::now() + TIME,
                    hold: (),
                };
                let mut landing = receiver.reserve(reserve)?;
                let ticket = landing.ticket().iter().map(|b| format!("{b:02x}")).collect::<String>();
                tokio::spawn(async move { landing.committed().await });
                Ok(format!("ticket {ticket}"))
            }
            ["cpu"] => Ok(format!("cpu {}", cpu_seconds())),
            _ => anyhow::bail!("unknown command"),
        }
    }
}
