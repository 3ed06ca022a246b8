//! A connection, plain or encrypted, and what both ends do to it: tuning, a small inbox for headers, an outbox for replies.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::io::{Interest, Ready};
use tokio::net::TcpStream;

use crate::Region;
use crate::session::Session;

/// Requested size of the kernel's socket buffers. The kernel caps it at its own limit.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Bytes moved by a connection before it lets other tasks of its thread run.
const YIELD_BYTES: usize = 4 << 20;
/// Bytes of the inbox: the longest item read through it is a hello.
pub(crate) const INBOX_BYTES: usize = 4096;

/// Sets no-delay, large buffers and keep-alive. Only no-delay must succeed.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    let alive =
        socket2::TcpKeepalive::new().with_time(Duration::from_secs(15)).with_interval(Duration::from_secs(5));
    for result in [
        socket.set_send_buffer_size(SOCKET_BUFFER_BYTES),
        socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES),
        socket.set_tcp_keepalive(&alive),
    ] {
        if let Err(error) = result {
            tracing::debug!(%error, "socket option refused");
        }
    }
    Ok(())
}

/// Whether the other side's certificate speaks for a worker of that name.
pub type SpeaksFor = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// A connection to a peer: plain, or encrypted after a handshake that showed who the other side is.
pub struct Socket {
    stream: TcpStream,
    session: Option<Session>,
    speaks_for: Option<SpeaksFor>,
}

/// How connections to receivers are encrypted: the caller's business, since it knows the certificates.
pub trait Secure: Send + Sync + std::fmt::Debug {
    /// Shakes hands with the receiver of that name; whoever answers as somebody else is an error.
    fn secure<'a>(&'a self, stream: TcpStream, receiver: &'a str) -> BoxFuture<'a, io::Result<Socket>>;
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Self {
        Self { stream, session: None, speaks_for: None }
    }
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket").field("encrypted", &self.is_encrypted()).finish_non_exhaustive()
    }
}

impl Socket {
    /// Encrypted: the handshake is done, and `speaks_for` tells which workers the peer's certificate is for; none when it
    /// showed no certificate.
    pub fn encrypted(stream: TcpStream, session: rustls::Connection, speaks_for: Option<SpeaksFor>) -> Self {
        Self { stream, session: Some(Session::new(session)), speaks_for }
    }

    /// Whether it is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.session.is_some()
    }

    /// Whether both ends have the same address, so that the peer runs on this host.
    pub(crate) fn is_local(&self) -> bool {
        let ends = (self.stream.local_addr(), self.stream.peer_addr());
        matches!(ends, (Ok(ours), Ok(theirs)) if ours.ip() == theirs.ip())
    }

    /// Whether the peer showed a certificate.
    pub(crate) fn has_certificate(&self) -> bool {
        self.speaks_for.is_some()
    }

    /// Whether the peer may say that it is that worker; anybody may without encryption.
    pub(crate) fn may_be(&self, worker: &str) -> bool {
        !self.is_encrypted() || self.speaks_for.as_ref().is_some_and(|speaks_for| speaks_for(worker))
    }

    /// Sets no-delay, large buffers and keep-alive. Only no-delay must succeed.
    pub(crate) fn tune(&self) -> io::Result<()> {
        tune(&self.stream)
    }

    /// Waits for readiness; what the session holds already counts, and so do encrypted bytes that wait to be sent.
    pub(crate) async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        let Some(session) = &self.session else { return self.stream.ready(interest).await };
        if session.has_ready() && interest.is_readable() {
            return Ok(Ready::READABLE);
        }
        let interest = if session.has_unsent() { interest | Interest::WRITABLE } else { interest };
        self.stream.ready(interest).await
    }

    /// Whether written bytes still wait here.
    pub(crate) fn has_unsent(&self) -> bool {
        self.session.as_ref().is_some_and(Session::has_unsent)
    }

    /// Sends encrypted bytes that wait here, as far as the socket takes them.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        match &mut self.session {
            Some(session) => session.flush(&self.stream),
            None => Ok(()),
        }
    }

    /// What is there now, `WouldBlock` when nothing is; 0 is the end.
    pub(crate) fn try_read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match &mut self.session {
            Some(session) => session.read(&self.stream, bytes),
            None => self.stream.try_read(bytes),
        }
    }

    /// Fills `places` of the region in order, then `tail`; nothing when nothing is there, 0 at the end.
    pub(crate) fn read_into(
        &mut self,
        region: &Region,
        places: impl Iterator<Item = Range<usize>> + Clone,
        tail: &mut [u8],
    ) -> io::Result<Option<usize>> {
        match &mut self.session {
            Some(session) => match session.read_into(&self.stream, region, places, tail) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                other => other.map(Some),
            },
            None => {
                attempt(&self.stream, Interest::READABLE, |fd| region.read_from(fd, places.clone(), tail))
            }
        }
    }

    /// Sends `head`, then `places` of the region, as far as there is room; nothing when there is none.
    pub(crate) fn write(
        &mut self,
        region: &Region,
        head: &[u8],
        places: impl Iterator<Item = Range<usize>> + Clone,
    ) -> io::Result<Option<usize>> {
        match &mut self.session {
            Some(session) => session.write(&self.stream, region, head, places),
            None => attempt(&self.stream, Interest::WRITABLE, |fd| region.write_to(fd, head, places.clone())),
        }
    }

    /// Sends bytes, as far as there is room; `WouldBlock` when there is none.
    fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.session {
            Some(session) => match session.write_bytes(&self.stream, bytes)? {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                taken => Ok(taken),
            },
            None => self.stream.try_write(bytes),
        }
    }

    /// Sends all of it.
    pub(crate) async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut out = Outbox { bytes: bytes.to_vec(), at: 0 };
        loop {
            out.flush(self)?;
            if out.is_empty() && !self.has_unsent() {
                return Ok(());
            }
            self.ready(Interest::WRITABLE).await?;
        }
    }

    /// Fills all of it.
    pub(crate) async fn read_exact(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let mut at = 0;
        while at < bytes.len() {
            match self.try_read(bytes.get_mut(at..).unwrap_or_default()) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => at += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.ready(Interest::READABLE).await?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Bytes received and not looked at yet.
#[derive(Debug)]
pub(crate) struct Inbox {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self { buffer: vec![0; INBOX_BYTES].into_boxed_slice(), start: 0, end: 0 }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    pub(crate) fn consume(&mut self, n: usize) {
        self.start = (self.start + n).min(self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Free space at the end, at most `most` bytes; moves what is there to the front when space runs out.
    pub(crate) fn space(&mut self, most: usize) -> &mut [u8] {
        if self.start > 0 && self.buffer.len() - self.end < most {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let end = self.end.saturating_add(most).min(self.buffer.len());
        self.buffer.get_mut(self.end..end).unwrap_or_default()
    }

    /// `n` bytes of the space were filled.
    pub(crate) fn filled(&mut self, n: usize) {
        self.end = (self.end + n).min(self.buffer.len());
    }
}

/// Bytes to be sent, in order.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    pub(crate) bytes: Vec<u8>,
    at: usize,
}

impl Outbox {
    pub(crate) fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// Sends what the socket takes now.
    pub(crate) fn flush(&mut self, stream: &mut Socket) -> io::Result<()> {
        stream.flush()?;
        while !self.is_empty() {
            match stream.try_write(self.bytes.get(self.at..).unwrap_or_default()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.at += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.bytes.clear();
        self.at = 0;
        Ok(())
    }
}

/// A non-blocking call that `None`s instead of blocking; 0 bytes read is an end of file for the caller to judge.
fn attempt(
    stream: &TcpStream,
    interest: Interest,
    mut call: impl FnMut(std::os::fd::BorrowedFd<'_>) -> io::Result<usize>,
) -> io::Result<Option<usize>> {
    loop {
        match stream.try_io(interest, || call(stream.as_fd())) {
            Ok(n) => return Ok(Some(n)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Lets other tasks of the thread run once in a while.
#[derive(Debug, Default)]
pub(crate) struct Fairness(usize);

impl Fairness {
    pub(crate) async fn moved(&mut self, bytes: usize) {
        self.0 += bytes;
        if self.0 >= YIELD_BYTES {
            self.0 = 0;
            tokio::task::yield_now().await;
        }
    }
}
