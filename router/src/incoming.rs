//! Connections to the router's port: so many from one address, and each must say something soon.
//!
//! HTTP/1 headers have 30 s (hyper), HTTP/2 connections answer pings; what says nothing at all, or opens connections
//! without end, is this file's. Bodies are `receiving.rs`'s.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;
use tonic::transport::server::Connected;

/// A connection that has said nothing by then is dropped.
const FIRST_BYTE: Duration = Duration::from_secs(10);

/// Who is connected. Clones share.
#[derive(Clone)]
pub struct Door {
    most: usize,
    guests: Arc<Mutex<HashMap<IpAddr, usize>>>,
    turned_away: metrics::Counter,
}

impl Door {
    /// At most `most` connections from one address; others are closed at once and counted.
    pub fn new(most: usize, turned_away: metrics::Counter) -> Self {
        Self { most: most.max(1), guests: Arc::default(), turned_away }
    }

    /// Lets connections in.
    pub fn watch<S, IO>(
        self,
        incoming: S,
        address: fn(&IO) -> Option<IpAddr>,
    ) -> impl Stream<Item = io::Result<Guest<IO>>>
    where
        S: Stream<Item = io::Result<IO>>,
    {
        incoming.filter_map(move |connection| {
            let let_in = match connection {
                Ok(io) => {
                    address(&io).and_then(|from| self.enter(from)).map(|place| Ok(Guest::new(io, place)))
                }
                Err(error) => Some(Err(error)),
            };
            std::future::ready(let_in)
        })
    }

    fn enter(&self, from: IpAddr) -> Option<Place> {
        let mut guests = self.guests.lock();
        let count = guests.entry(from).or_default();
        if *count >= self.most {
            self.turned_away.increment(1);
            return None;
        }
        *count += 1;
        Some(Place { guests: Arc::clone(&self.guests), from })
    }
}

struct Place {
    guests: Arc<Mutex<HashMap<IpAddr, usize>>>,
    from: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut guests = self.guests.lock();
        if let Some(count) = guests.get_mut(&self.from) {
            *count -= 1;
            if *count == 0 {
                guests.remove(&self.from);
            }
        }
    }
}

/// A connection that was let in.
pub struct Guest<IO> {
    io: IO,
    /// Until it has said something.
    patience: Option<Pin<Box<Sleep>>>,
    _place: Place,
}

impl<IO> Guest<IO> {
    fn new(io: IO, place: Place) -> Self {
        Self { io, patience: Some(Box::pin(tokio::time::sleep(FIRST_BYTE))), _place: place }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Guest<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.io).poll_read(context, into);
        if read.is_ready() {
            self.patience = None;
        } else if self.patience.as_mut().is_some_and(|wait| wait.as_mut().poll(context).is_ready()) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Guest<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

impl<IO: Connected> Connected for Guest<IO> {
    type ConnectInfo = IO::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.io.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    fn door(
        most: usize,
    ) -> (
        Door,
        tokio::sync::mpsc::UnboundedSender<DuplexStream>,
        impl Stream<Item = io::Result<Guest<DuplexStream>>>,
    ) {
        let door = Door::new(most, metrics::Counter::noop());
        let (send, receive) = tokio::sync::mpsc::unbounded_channel();
        let incoming = tokio_stream::wrappers::UnboundedReceiverStream::new(receive).map(Ok);
        (door.clone(), send, door.watch(incoming, |_| Some([127, 0, 0, 1].into())))
    }

    #[tokio::test(start_paused = true)]
    async fn so_many_from_one_address() {
        let (door, send, guests) = door(2);
        let mut guests = std::pin::pin!(guests);
        let (ours, theirs): (Vec<_>, Vec<_>) = (0..3).map(|_| tokio::io::duplex(64)).unzip();
        theirs.into_iter().for_each(|io| send.send(io).unwrap());
        let first = guests.next().await.unwrap().unwrap();
        let _second = guests.next().await.unwrap().unwrap();
        assert!(futures::poll!(guests.next()).is_pending());
        let mut third = ours.into_iter().nth(2).unwrap();
        assert_eq!(third.read(&mut [0]).await.unwrap(), 0);
        drop(first);
        send.send(tokio::io::duplex(64).1).unwrap();
        let again = guests.next().await.unwrap().unwrap();
        drop((again, _second));
        assert!(door.guests.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_is_dropped_and_who_spoke_may_think() {
        let (_, send, guests) = door(8);
        let mut guests = std::pin::pin!(guests);
        let (_silent, theirs) = tokio::io::duplex(64);
        send.send(theirs).unwrap();
        let mut guest = guests.next().await.unwrap().unwrap();
        assert_eq!(guest.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let (mut spoke, theirs) = tokio::io::duplex(64);
        send.send(theirs).unwrap();
        let mut guest = guests.next().await.unwrap().unwrap();
        spoke.write_all(b"P").await.unwrap();
        assert_eq!(guest.read(&mut [0]).await.unwrap(), 1);
        let hour = tokio::time::timeout(Duration::from_secs(3600), guest.read(&mut [0])).await;
        assert!(hour.is_err(), "it was dropped: {hour:?}");
    }
}
