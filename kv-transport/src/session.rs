//! An encrypted connection: a TLS session over a socket, whose handshake others have done. What is read and written has the
//! shape of the plain socket's calls, so that frames do not know the difference.

use std::io::{self, BufRead, Read, Write};
use std::ops::Range;

use rustls::Connection;
use tokio::net::TcpStream;

use crate::Region;

/// Bytes read from the socket at once.
const READ_BYTES: usize = 256 << 10;
/// Encrypted bytes that wait for the socket, at most.
const WRITE_BYTES: usize = 512 << 10;

/// A session, and encrypted bytes that it has not looked at.
pub(crate) struct Session {
    tls: Connection,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Decrypted bytes that nobody has taken.
    ready: usize,
    is_closed: bool,
}

impl Session {
    pub(crate) fn new(mut tls: Connection) -> Self {
        tls.set_buffer_limit(Some(WRITE_BYTES));
        let ready = tls.process_new_packets().map_or(0, |state| state.plaintext_bytes_to_read());
        let buffer = vec![0; READ_BYTES].into_boxed_slice();
        Self { tls, buffer, start: 0, end: 0, ready, is_closed: false }
    }

    /// Whether something can be read without the socket.
    pub(crate) fn has_ready(&self) -> bool {
        self.ready > 0 || self.start < self.end
    }

    /// Whether encrypted bytes wait for the socket.
    pub(crate) fn has_unsent(&self) -> bool {
        self.tls.wants_write()
    }

    /// Sends what the socket takes now.
    pub(crate) fn flush(&mut self, socket: &TcpStream) -> io::Result<()> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut NonBlocking(socket)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Decrypts until there is something to read: false at the end of the stream, WouldBlock when nothing came.
    fn fill(&mut self, socket: &TcpStream) -> io::Result<bool> {
        while self.ready == 0 {
            if self.start == self.end {
                if self.is_closed {
                    return Ok(false);
                }
                (self.start, self.end) = (0, NonBlocking(socket).read(&mut self.buffer)?);
                if self.end == 0 {
                    self.is_closed = true;
                    return Ok(false);
                }
            }
            let mut unread = self.buffer.get(self.start..self.end).unwrap_or_default();
            let before = unread.len();
            self.tls.read_tls(&mut unread)?;
            self.start += before - unread.len();
            let state = match self.tls.process_new_packets() {
                Ok(state) => state,
                Err(error) => {
                    // The alert tells the peer why.
                    let _ = self.flush(socket);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                }
            };
            self.ready = state.plaintext_bytes_to_read();
            if self.ready == 0 && state.peer_has_closed() {
                self.is_closed = true;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Hands decrypted bytes to `take`, which says how many it took; 0 is the end of the stream, or of what was wanted.
    fn take(
        &mut self,
        socket: &TcpStream,
        mut take: impl FnMut(&[u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        if !self.fill(socket)? {
            return Ok(0);
        }
        let mut total = 0;
        while self.ready > 0 {
            let mut reader = self.tls.reader();
            let taken = take(reader.fill_buf()?)?;
            reader.consume(taken);
            self.ready -= taken.min(self.ready);
            total += taken;
            if taken == 0 {
                break;
            }
        }
        Ok(total)
    }

    pub(crate) fn read(&mut self, socket: &TcpStream, out: &mut [u8]) -> io::Result<usize> {
        let mut at = 0;
        self.take(socket, |bytes| {
            let rest = out.get_mut(at..).unwrap_or_default();
            let n = bytes.len().min(rest.len());
            if let (Some(to), Some(from)) = (rest.get_mut(..n), bytes.get(..n)) {
                to.copy_from_slice(from);
            }
            at += n;
            Ok(n)
        })
    }

    /// Fills `places` of the region in order, then `tail`.
    pub(crate) fn read_into(
        &mut self,
        socket: &TcpStream,
        region: &Region,
        places: impl Iterator<Item = Range<usize>>,
        tail: &mut [u8],
    ) -> io::Result<usize> {
        let mut places = places.peekable();
        let (mut done, mut at) = (0, 0);
        self.take(socket, |bytes| {
            let Some(place) = places.peek() else {
                let rest = tail.get_mut(at..).unwrap_or_default();
                let n = bytes.len().min(rest.len());
                if let (Some(to), Some(from)) = (rest.get_mut(..n), bytes.get(..n)) {
                    to.copy_from_slice(from);
                }
                at += n;
                return Ok(n);
            };
            let start = place.start + done;
            let n = bytes.len().min(place.end - start);
            region.copy_in(start, bytes.get(..n).unwrap_or_default())?;
            done += n;
            if start + n == place.end {
                places.next();
                done = 0;
            }
            Ok(n)
        })
    }

    /// Encrypts `head`, then `places`, as far as there is room, and sends what the socket takes. Nothing when there was no room.
    pub(crate) fn write(
        &mut self,
        socket: &TcpStream,
        region: &Region,
        head: &[u8],
        places: impl Iterator<Item = Range<usize>>,
    ) -> io::Result<Option<usize>> {
        let mut total = self.encrypt(socket, head)?;
        if total == head.len() {
            for place in places {
                let wanted = place.len();
                let writer = &mut self.tls.writer();
                let taken = region.with_bytes(place, |bytes| writer.write(bytes))??;
                total += taken;
                if taken < wanted {
                    break;
                }
            }
        }
        self.flush(socket)?;
        Ok((total > 0).then_some(total))
    }

    fn encrypt(&mut self, socket: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
        self.flush(socket)?;
        self.tls.writer().write(bytes)
    }

    /// The same for bytes that lie elsewhere; 0 when there was no room.
    pub(crate) fn write_bytes(&mut self, socket: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.encrypt(socket, bytes)?;
        self.flush(socket)?;
        Ok(taken)
    }
}

/// The socket as blocking code wants it, but for `WouldBlock`.
struct NonBlocking<'a>(&'a TcpStream);

impl Read for NonBlocking<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.try_read(buf) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }
}

impl Write for NonBlocking<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[io::IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[io::IoSlice<'_>]) -> io::Result<usize> {
        loop {
            match self.0.try_write_vectored(bufs) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
