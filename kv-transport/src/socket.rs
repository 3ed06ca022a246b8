//! What both ends do to a socket: tuning, a small inbox for headers, an outbox for replies.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;

/// Requested size of the kernel's socket buffers. The kernel caps it at its own limit.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Bytes moved by a connection before it lets other tasks of its thread run.
const YIELD_BYTES: usize = 4 << 20;
/// Bytes of the inbox: the longest item read through it is a hello.
pub(crate) const INBOX_BYTES: usize = 4096;

/// Sets no-delay, large buffers and keep-alive. Only no-delay must succeed.
pub(crate) fn tune(stream: &TcpStream) -> io::Result<()> {
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
    pub(crate) fn flush(&mut self, stream: &TcpStream) -> io::Result<()> {
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
pub(crate) fn attempt(
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
