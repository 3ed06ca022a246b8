//! One port: the transport's connections to one side, HTTP to the other, the silent to nobody.
#![allow(clippy::unwrap_used)]

mod pair;

use std::time::Duration;

use futures::StreamExt;
use kv_transport::mux::{MuxConfig, split};
use kv_transport::wire::MAGIC;
use pair::soon;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

async fn start(
    config: MuxConfig,
) -> (std::net::SocketAddr, kv_transport::mux::KvIncoming, kv_transport::mux::RpcIncoming) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (kv, rpc) = split(listener, config);
    (address, kv, rpc)
}

#[tokio::test]
async fn the_first_byte_decides_and_stays_unread() {
    let (address, mut kv, mut rpc) = start(MuxConfig::default()).await;
    for opening in [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01"] {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(opening).await.unwrap();
        let mut stream = soon(rpc.next()).await.unwrap().unwrap();
        assert!(stream.nodelay().unwrap());
        let mut got = vec![0; opening.len()];
        stream.read_exact(&mut got).await.unwrap();
        assert_eq!(got, opening);
    }
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(&MAGIC).await.unwrap();
    let mut stream = soon(kv.next()).await.unwrap();
    let mut got = [0; 8];
    stream.read_exact(&mut got).await.unwrap();
    assert_eq!(got, MAGIC);
}

#[tokio::test]
async fn the_silent_are_dropped_and_block_nobody() {
    let config = MuxConfig { first_byte_timeout: Duration::from_secs(60), max_pending: 4, backlog: 4 };
    let (address, _kv, mut rpc) = start(config).await;
    let mut silent = Vec::new();
    for _ in 0..6 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"GET").await.unwrap();
    soon(rpc.next()).await.unwrap().unwrap();
    // The oldest gave way long before its time.
    assert_eq!(soon(silent[0].read(&mut [0])).await.unwrap_or(0), 0);
    let short = MuxConfig { first_byte_timeout: Duration::from_millis(20), ..MuxConfig::default() };
    let (address, _kv, _rpc) = start(short).await;
    let mut client = TcpStream::connect(address).await.unwrap();
    assert_eq!(soon(client.read(&mut [0])).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn it_ends_when_nobody_listens() {
    let (address, kv, rpc) = start(MuxConfig::default()).await;
    drop(rpc);
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"GET").await.unwrap();
    assert_eq!(soon(client.read(&mut [0])).await.unwrap_or(0), 0, "a side nobody takes from closes");
    drop(kv);
    soon(async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
