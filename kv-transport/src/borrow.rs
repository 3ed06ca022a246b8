//! The receiver's side of shared memory: it maps what a peer on this host lends, and copies cells out of it.
//!
//! The lender may change or free what it lent at any time; so what counts is the checksum of the copy, and a
//! mapping is only read through raw copies.

use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::{Arc, Weak};
use std::time::Duration;

use memmap2::{Mmap, MmapOptions};
use parking_lot::Mutex;
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::Region;
use crate::device::{DeviceMemory, PeerMemory};
use crate::incoming::{Arriving, Plan};
use crate::landing_shared::Checked;
use crate::landing_state::LandingPhase;
use crate::lend;
use crate::serve::{Close, Connection};
use crate::transport::{Side, Transport};
use crate::wire::{Header, Kind, Lend, LentCell};

/// The lender must hand its memory out by then.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes copied under one claim of the landing.
const COPY_BYTES: usize = 256 << 10;

/// A peer's memory, to be read.
pub(crate) struct Borrowed {
    key: [u8; 16],
    map: Mmap,
    /// The device memory that stands behind it, as long as reading it works.
    device: Mutex<Option<Arc<dyn PeerMemory>>>,
}

impl std::fmt::Debug for Borrowed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Borrowed").field("bytes", &self.map.len()).finish_non_exhaustive()
    }
}

impl Borrowed {
    /// Fetches and maps what is lent, on our device too where there are both. Blocks for at most about [`PATIENCE`].
    fn fetch(lend: &Lend, device: Option<Arc<dyn DeviceMemory>>) -> io::Result<Self> {
        let mut stream = UnixStream::connect_addr(&SocketAddr::from_abstract_name(&lend.name)?)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(&lend.key)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        recvmsg(&stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let mut files: Vec<OwnedFd> = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        let mut files = files.into_iter();
        let file = files.next().ok_or(io::ErrorKind::InvalidData)?;
        // A file that could shrink would turn reads behind its end into a signal.
        let bytes = usize::try_from(lend.bytes).map_err(|_| io::ErrorKind::InvalidData)?;
        let is_fixed = fcntl_get_seals(&file)?.contains(SealFlags::SHRINK);
        if !is_fixed || bytes == 0 || u64::try_from(fstat(&file)?.st_size).unwrap_or(0) < lend.bytes {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the lent file is not what was promised"));
        }
        // SAFETY: the file is sealed against shrinking and at least this long; the mapping is read by raw copies only.
        let map = unsafe { MmapOptions::new().len(bytes).map(&file)? };
        let opened = device.zip(files.next()).map(|(device, file)| device.open(file, bytes));
        let device = opened.and_then(|opened| {
            opened.inspect_err(|error| tracing::info!(%error, "no way from the peer's device to ours")).ok()
        });
        Ok(Self { key: lend.key, map, device: Mutex::new(device) })
    }

    pub(crate) fn device(&self) -> Option<Arc<dyn PeerMemory>> {
        self.device.lock().clone()
    }

    fn way(&self) -> Transport {
        if self.device().is_some() { Transport::CudaIpc } else { Transport::Shm }
    }

    /// From now on cells are copied from the host's memory.
    pub(crate) fn give_up_device(&self) {
        *self.device.lock() = None;
    }

    /// Whether a cell lies within it.
    pub(crate) fn holds(&self, offset: u64, bytes: usize) -> bool {
        usize::try_from(offset).is_ok_and(|at| at.checked_add(bytes).is_some_and(|end| end <= self.map.len()))
    }

    /// Copies a range into a region, and yields the checksum of the copy; an error when it lies outside of either.
    fn copy(&self, from: Range<usize>, to: &Region, at: usize) -> io::Result<u32> {
        if from.start > from.end || from.end > self.map.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "range outside the lent memory"));
        }
        // SAFETY: inside the mapping, which `self` keeps; the other side is checked by the region. The lender may write
        // meanwhile: the copy's checksum tells.
        unsafe { to.copy_from(at, self.map.as_ptr().add(from.start), from.len()) }
    }
}

impl Connection {
    /// The sender lends its memory.
    pub(crate) async fn lend_frame(&mut self, header: Header) -> Result<(), Close> {
        let body = self.body(header, true).await?;
        let lend = Lend::parse(&body).ok_or(Close::Protocol("damaged lend"))?;
        let outcome = if self.receiver.config.borrow {
            self.borrow(lend).await
        } else {
            Err(io::ErrorKind::Unsupported.into())
        };
        if let Err(error) = &outcome {
            tracing::debug!(peer = %self.peer.worker, %error, "no shared memory");
        }
        self.reply(Kind::Borrowed, 0, header.seq, lend::answer(outcome.ok()));
        Ok(())
    }

    /// The way by which cells will be read.
    async fn borrow(&mut self, lend: Lend) -> io::Result<Transport> {
        let known =
            |list: &[Weak<Borrowed>]| list.iter().filter_map(Weak::upgrade).find(|b| b.key == lend.key);
        if let Some(borrowed) = known(&self.receiver.borrowed.lock()) {
            let way = borrowed.way();
            self.borrowed = Some(borrowed);
            return Ok(way);
        }
        let device = self.receiver.region.device();
        let fetch = move || Borrowed::fetch(&lend, device);
        let fetched = tokio::task::spawn_blocking(fetch).await.map_err(io::Error::other)??;
        let borrowed = Arc::new(fetched);
        let mut list = self.receiver.borrowed.lock();
        list.retain(|old| old.strong_count() > 0);
        list.push(Arc::downgrade(&borrowed));
        let way = borrowed.way();
        self.borrowed = Some(borrowed);
        Ok(way)
    }

    /// Cells that lie in lent memory: copies, verifies and acknowledges them, or says why not.
    pub(crate) async fn lent_frame(&mut self, header: Header) -> Result<(), Close> {
        let body_bytes = header.body_bytes as usize;
        let limit = self.receiver.config.progress_timeout;
        let body = self.need(body_bytes, limit).await?.get(..body_bytes).unwrap_or_default();
        let intact = crc32c::crc32c(body) == header.body_crc;
        let cells: Vec<_> = LentCell::parse_all(body).collect();
        self.inbox.consume(body_bytes);
        let borrowed = self.borrowed.clone().ok_or(Close::Protocol("cells in memory that was not lent"))?;
        let landing = match self.landing_of(&header, intact) {
            Ok(landing) => landing,
            Err((kind, arg)) => {
                self.reply(kind, header.transfer, header.seq, arg);
                return Ok(());
            }
        };
        let descriptors: Vec<_> = cells.iter().map(|lent| lent.cell).collect();
        let mut plan = self.plan(landing, &descriptors)?;
        let committed_before = plan.landing.phase() == LandingPhase::Committed;
        let mut at = if self.copy_on_device(&mut plan, &cells, &borrowed).await? { cells.len() } else { 0 };
        while at < cells.len() {
            let Some((next, bytes)) = self.copy_some(&mut plan, &cells, at, &borrowed)? else { break };
            at = next;
            self.fairness.moved(bytes).await;
        }
        self.answer_cells(&header, &plan, committed_before);
        Ok(())
    }

    /// Copies some cells from `at` on under one claim, each with its checksum. The next one and the
    /// bytes copied; nothing when the landing is over.
    fn copy_some(
        &self,
        plan: &mut Plan,
        cells: &[LentCell],
        start: usize,
        borrowed: &Borrowed,
    ) -> Result<Option<(usize, usize)>, Close> {
        let Some(write) = plan.landing.begin() else { return Ok(None) };
        let region = &self.receiver.region;
        let (mut checked, mut bytes, mut at) = (Vec::new(), 0, start);
        for (lent, arriving) in cells.iter().zip(&plan.cells).skip(start) {
            if bytes >= COPY_BYTES {
                break;
            }
            let Arriving { cell, place, checksum, take } = arriving;
            if *take {
                let from = usize::try_from(lent.offset).unwrap_or(usize::MAX);
                let from = from..from.saturating_add(plan.cell_bytes);
                let sum = borrowed
                    .copy(from, region, place.start)
                    .map_err(|_| Close::Protocol("a cell outside the lent memory"))?;
                let good = sum == *checksum;
                checked.push(Checked { at, cell: *cell, checksum: *checksum, good });
                bytes += plan.cell_bytes;
            }
            at += 1;
        }
        let bad = write.finish((bytes, Transport::Shm, Side::Host), &checked);
        plan.bad |= bad;
        let counters = &self.receiver.counters;
        counters.bytes.add(bytes as u64);
        counters.shm_bytes.add(bytes as u64);
        counters.checksum_failures.add(u64::from(bad.count_ones()));
        Ok(Some((at, bytes)))
    }
}
