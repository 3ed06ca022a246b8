//! A connection between sender and receiver that damages, cuts or counts frames on purpose.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use kv_transport::wire::{HEADER_BYTES, Header, MAGIC};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What happens to a frame of the sender.
pub enum Fate {
    Pass,
    /// Half of its payload goes through, then both connections close.
    Cut,
}

/// Decides about a frame; may damage the payload.
pub type Judge = Arc<Mutex<dyn FnMut(&Header, &mut [u8]) -> Fate + Send>>;

pub fn judge(judge: impl FnMut(&Header, &mut [u8]) -> Fate + Send + 'static) -> Judge {
    Arc::new(Mutex::new(judge))
}

/// Forwards connections of `listener` to `target`.
pub async fn run(listener: TcpListener, target: SocketAddr, judge: Judge) {
    while let Ok((client, _)) = listener.accept().await {
        let judge = judge.clone();
        tokio::spawn(async move {
            let _ = forward(client, target, judge).await;
        });
    }
}

async fn forward(mut client: TcpStream, target: SocketAddr, judge: Judge) -> std::io::Result<()> {
    let mut server = TcpStream::connect(target).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (mut from, mut back) = client.split();
    let (mut replies, mut to) = server.split();
    let forth = async {
        let mut prefix = [0; MAGIC.len() + 2];
        from.read_exact(&mut prefix).await?;
        let len = usize::from(u16::from_le_bytes([prefix[MAGIC.len()], prefix[MAGIC.len() + 1]]));
        let mut hello = vec![0; len + 4];
        from.read_exact(&mut hello).await?;
        to.write_all(&prefix).await?;
        to.write_all(&hello).await?;
        loop {
            let mut head = [0; HEADER_BYTES];
            from.read_exact(&mut head).await?;
            let header = Header::parse(&head).unwrap();
            let mut body = vec![0; header.body_bytes as usize];
            let mut payload = vec![0; header.payload_bytes as usize];
            from.read_exact(&mut body).await?;
            from.read_exact(&mut payload).await?;
            let fate = (judge.lock().unwrap())(&header, &mut payload);
            to.write_all(&head).await?;
            to.write_all(&body).await?;
            match fate {
                Fate::Pass => to.write_all(&payload).await?,
                Fate::Cut => {
                    to.write_all(&payload[..payload.len() / 2]).await?;
                    return std::io::Result::Ok(());
                }
            }
        }
    };
    tokio::select! {
        done = forth => done,
        done = tokio::io::copy(&mut replies, &mut back) => done.map(drop),
    }
}
