//! One port for two protocols: connections of the transport on one side, everything else on the other.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::wire::MAGIC;

/// The knobs of a mux.
#[derive(Debug, Clone)]
pub struct MuxConfig {
    /// A connection that sends nothing for this long is dropped (default 10 s).
    pub first_byte_timeout: Duration,
    /// Connections that have not sent anything yet (default 512); beyond it the oldest is dropped.
    pub max_pending: usize,
    /// Connections waiting for either side to take them (default 128).
    pub backlog: usize,
}

impl Default for MuxConfig {
    fn default() -> Self {
        Self { first_byte_timeout: Duration::from_secs(10), max_pending: 512, backlog: 128 }
    }
}

/// The connections that speak the transport's protocol; nothing was read from them yet.
#[derive(Debug)]
pub struct KvIncoming {
    streams: mpsc::Receiver<TcpStream>,
}

impl KvIncoming {
    /// The next connection; nothing when the mux has ended.
    pub async fn next(&mut self) -> Option<TcpStream> {
        self.streams.recv().await
    }
}

/// All other connections, as the stream an HTTP/2 server wants; nothing was read from them yet.
#[derive(Debug)]
pub struct RpcIncoming {
    streams: mpsc::Receiver<TcpStream>,
}

impl futures::Stream for RpcIncoming {
    type Item = io::Result<TcpStream>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.streams.poll_recv(context).map(|stream| stream.map(Ok))
    }
}

/// Splits a listener's connections by their first byte, which decides: the magic's is none that HTTP or TLS
/// begins with. Runs on a task that ends when both sides are dropped.
pub fn split(listener: TcpListener, config: MuxConfig) -> (KvIncoming, RpcIncoming) {
    let (kv, kv_streams) = mpsc::channel(config.backlog.max(1));
    let (rpc, rpc_streams) = mpsc::channel(config.backlog.max(1));
    tokio::spawn(accept(listener, config, Sides { kv, rpc }));
    (KvIncoming { streams: kv_streams }, RpcIncoming { streams: rpc_streams })
}

#[derive(Clone)]
struct Sides {
    kv: mpsc::Sender<TcpStream>,
    rpc: mpsc::Sender<TcpStream>,
}

async fn accept(listener: TcpListener, config: MuxConfig, sides: Sides) {
    let mut peeks: JoinSet<()> = JoinSet::new();
    let mut oldest: VecDeque<AbortHandle> = VecDeque::new();
    let closed = async |sides: &Sides| {
        sides.kv.closed().await;
        sides.rpc.closed().await;
    };
    loop {
        tokio::select! {
            () = closed(&sides) => return,
            Some(_) = peeks.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    oldest.retain(|peek| !peek.is_finished());
                    if oldest.len() >= config.max_pending.max(1)
                        && let Some(peek) = oldest.pop_front()
                    {
                        peek.abort();
                    }
                    let limit = config.first_byte_timeout;
                    let sides = sides.clone();
                    oldest.push_back(peeks.spawn(async move {
                        // Silent, gone, or nobody takes it: dropping the stream closes it.
                        let _ = timeout(limit, assign(stream, sides)).await;
                    }));
                }
                Err(error) => {
                    // Out of descriptors, most likely: others must close some first.
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(Duration::from_millis(50)).await;
                }
            },
        }
    }
}

/// Waits for the first byte and hands the connection to its side.
async fn assign(stream: TcpStream, sides: Sides) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut first = [0];
    if stream.peek(&mut first).await? == 0 {
        return Ok(());
    }
    let side = if MAGIC.starts_with(&first) { &sides.kv } else { &sides.rpc };
    // A closed side drops the connection, which tells the peer.
    let _ = side.send(stream).await;
    Ok(())
}
