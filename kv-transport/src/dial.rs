//! Reaching a receiver: one connection, with hello and answer.

use bytes::Buf;
use tokio::net::TcpStream;

use crate::Identity;
use crate::error::Refusal;
use crate::socket::{Secure, Socket};
use crate::wire::{self, Hello, HelloAck};

/// Connects, encrypted if there is a way to, and says hello; the answer must come from the very incarnation that is wanted.
pub(crate) async fn dial(
    endpoint: &str,
    from: &Identity,
    to: &Identity,
    secure: Option<&dyn Secure>,
) -> Result<Socket, Unreached> {
    let stream = TcpStream::connect(endpoint).await?;
    let mut socket = match secure {
        Some(secure) => secure.secure(stream, &to.worker).await?,
        None => Socket::from(stream),
    };
    socket.tune()?;
    let hello = Hello { from: from.clone(), to: to.clone() };
    socket.write_all(&hello.encode().ok_or(Unreached::Refused(Refusal::Protocol))?).await?;
    let mut ack = vec![0; 2];
    socket.read_exact(&mut ack).await?;
    let len = usize::from(ack.as_slice().get_u16_le());
    if len > wire::MAX_HELLO_BYTES {
        return Err(Unreached::Refused(Refusal::Protocol));
    }
    ack.resize(2 + len + 4, 0);
    socket.read_exact(ack.get_mut(2..).unwrap_or_default()).await?;
    let (guarded, mut crc) = ack.split_at(2 + len);
    let intact = crc.get_u32_le() == crc32c::crc32c(guarded);
    let parsed = guarded.get(2..).and_then(HelloAck::parse).filter(|_| intact);
    match parsed {
        None => Err(Unreached::Refused(Refusal::Protocol)),
        Some(HelloAck { refused: Some(refusal), .. }) => Err(Unreached::Refused(refusal)),
        Some(ack) if ack.from != *to => Err(Unreached::Refused(Refusal::Stale)),
        Some(_) => Ok(socket),
    }
}

/// Why a receiver was not reached.
pub(crate) enum Unreached {
    /// It answered, and will not talk.
    Refused(Refusal),
    /// It did not answer.
    Io(std::io::Error),
}

impl From<std::io::Error> for Unreached {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}
