//! The sender's side of shared memory: its region lies in a file, and its device's memory in another, which a peer on this
//! host may fetch and read from.
//!
//! They are handed out over a socket in the kernel's abstract namespace, to processes of the same user that show
//! a key told over the KV connection. Reaching it proves that both run on one host (and in one network namespace).

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener as StdListener};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::socket::Socket;
use crate::transport::Transport;
use crate::wire::{HEADER_BYTES, Header, Kind, Lend};

/// The key must be shown by then.
const PATIENCE: Duration = Duration::from_secs(1);

/// Hands out the files of a region, of its device's memory last, for as long as it lives.
#[derive(Debug)]
pub(crate) struct Lender {
    lend: Lend,
    task: AbortHandle,
}

impl Lender {
    pub(crate) fn start(files: Vec<Arc<OwnedFd>>, bytes: usize) -> io::Result<Self> {
        let lend = Lend {
            key: rand::random(),
            bytes: bytes as u64,
            name: format!("tandem-kv-{:032x}", rand::random::<u128>()),
        };
        let listener = StdListener::bind_addr(&SocketAddr::from_abstract_name(&lend.name)?)?;
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let key = lend.key;
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Err(error) = hand_out(stream, &key, &files).await {
                    tracing::debug!(%error, "the KV pool was not lent");
                }
            }
        });
        Ok(Self { lend, task: task.abort_handle() })
    }

    /// Offers the region on a fresh connection; how the receiver reads from it from now on, if it does.
    pub(crate) async fn offer(&self, socket: &mut Socket) -> io::Result<Option<Transport>> {
        let mut frame = Vec::new();
        let body = self.lend.encode().ok_or(io::ErrorKind::InvalidInput)?;
        Header::bare(Kind::Lend, 0, 0, 0).put_with_body(&body, &mut frame);
        socket.write_all(&frame).await?;
        let mut answer = [0; HEADER_BYTES];
        socket.read_exact(&mut answer).await?;
        match Header::parse(&answer) {
            Some(Header { kind: Kind::Borrowed, arg, .. }) => Ok(way_of(arg)),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

impl Drop for Lender {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a receiver answers that reads what it was offered this way ([`Kind::Borrowed`]).
pub(crate) fn answer(way: Option<Transport>) -> u64 {
    match way {
        Some(Transport::Shm) => 0,
        Some(Transport::CudaIpc) => 2,
        _ => 1,
    }
}

fn way_of(arg: u64) -> Option<Transport> {
    [Transport::Shm, Transport::CudaIpc].into_iter().find(|way| answer(Some(*way)) == arg)
}

async fn hand_out(mut stream: UnixStream, key: &[u8; 16], files: &[Arc<OwnedFd>]) -> io::Result<()> {
    let peer = stream.peer_cred()?.uid();
    if peer != rustix::process::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {peer} asked for it")));
    }
    let mut shown = [0; 16];
    timeout(PATIENCE, stream.read_exact(&mut shown)).await??;
    if shown != *key {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "with a wrong key"));
    }
    let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&files));
    let send = || Ok(sendmsg(&stream, &[IoSlice::new(&[1])], &mut ancillary, SendFlags::DONTWAIT)?);
    // One byte into an empty buffer: there is room.
    stream.try_io(Interest::WRITABLE, send).map(|_| ())
}
