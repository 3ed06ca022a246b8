//! The bytes on a connection: magic, hello, then frames with checksummed headers.
//!
//! Little-endian throughout. The sender opens with [`MAGIC`] and a hello, the receiver answers with a hello-ack;
//! after that the sender sends [`Kind::Attach`], [`Kind::Write`], [`Kind::Commit`], [`Kind::Abort`] and the
//! receiver [`Kind::Attached`], [`Kind::Ack`], [`Kind::CommitAck`], [`Kind::Refused`]. A frame is a header, a
//! body (guarded by the header's `body_crc`) and, for writes only, the payload of the cells its body describes.
//!
//! A connection may carry a queue pair beside it ([`Kind::Offer`], [`Kind::Answer`]). Then a transfer that is
//! attached gets a key ([`Kind::Granted`]), its cells are written by RDMA, and [`Kind::Placed`], sent behind them on
//! the same queue pair, stands in for the write; everything else stays on the connection.
//!
//! A sender whose memory the receiver can map, being on the same host, says so once ([`Kind::Lend`], [`Kind::Borrowed`]); then
//! [`Kind::Lent`] says where cells lie, and the receiver copies them.
//!
//! A ticket whose receiver said so elsewhere lets cells travel packed ([`crate::Packing`]): the attach names the packing, and
//! [`Kind::Packed`] is a write of packed cells. Their checksums are of the packed bytes.

use bytes::{Buf, BufMut};

use crate::Identity;
use crate::error::Refusal;

/// First bytes of every connection. No HTTP or TLS client begins with the first one.
pub const MAGIC: [u8; 8] = *b"\xF7TDMKV\r\n";
/// Version of everything in this file.
pub const VERSION: u16 = 3;
/// Bytes of a frame header.
pub const HEADER_BYTES: usize = 48;
/// Bytes of one cell descriptor in the body of a write.
pub const CELL_BYTES: usize = 12;
/// Bytes of one cell of lent memory in the body of a [`Kind::Lent`].
pub const LENT_CELL_BYTES: usize = CELL_BYTES + 8;
/// Most cells in one write.
pub const MAX_FRAME_CELLS: usize = 64;
/// Most payload bytes in one write of more than one cell.
pub const MAX_FRAME_BYTES: usize = 4 << 20;
/// Most bytes of a commit's payload.
pub const MAX_COMMIT_BYTES: usize = 1 << 20;
/// Most bytes of the reason in an abort.
pub const MAX_REASON_BYTES: usize = 256;
/// Most bytes of an offer or an answer to one.
pub const MAX_OFFER_BYTES: usize = 512;
/// Most bytes of a worker's name.
pub const MAX_NAME_BYTES: usize = 255;
/// Most bytes of a hello or hello-ack.
pub const MAX_HELLO_BYTES: usize = 1024;
/// Bytes of the body of an attach: secret, generation, attempt.
pub const ATTACH_BYTES: usize = 16 + 8 + 4;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Sender: shows the secret of a transfer, once per connection.
    Attach = 1,
    /// Sender: cells.
    Write = 2,
    /// Sender: everything is acknowledged; the body is the caller's payload.
    Commit = 3,
    /// Sender: gives up; the body is a reason in UTF-8.
    Abort = 4,
    /// Sender: offers a queue pair; the body is its address. Answered by [`Kind::Answer`].
    Offer = 5,
    /// Sender: nothing of this transfer is in flight on the queue pair, nor will be.
    Quiet = 6,
    /// Sender: its queue pair is gone. Answered by [`Kind::Down`] once the receiver's is too.
    Fallen = 7,
    /// Sender, on the queue pair: the cells the body describes were written before this.
    Placed = 8,
    /// Sender: its memory may be read; the body says how to get at it. Answered by [`Kind::Borrowed`].
    Lend = 9,
    /// Sender: cells that lie in the memory it lent, which must not be read once the transfer is over.
    Lent = 10,
    /// Sender: cells, packed as `arg` says, which is what the attach said.
    Packed = 11,
    /// Receiver: the attach was accepted.
    Attached = 17,
    /// Receiver: write `seq` was taken; bit `i` of `arg` set means its cell `i` must be sent again.
    Ack = 18,
    /// Receiver: the landing is committed.
    CommitAck = 19,
    /// Receiver: the transfer is refused; `arg` is the [`Refusal`].
    Refused = 20,
    /// Receiver: its queue pair's address when `arg` is 0, else why there is none, in UTF-8.
    Answer = 21,
    /// Receiver: `arg` is the key for this transfer's writes on this connection's queue pair.
    Granted = 22,
    /// Receiver: its queue pair is gone, and everything that arrived before was answered; nothing of it can be
    /// written any more.
    Down = 23,
    /// Receiver: lent memory will be read when `arg` is 0, the device's when it is 2, else it cannot be.
    Borrowed = 24,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Attach,
            2 => Self::Write,
            3 => Self::Commit,
            4 => Self::Abort,
            5 => Self::Offer,
            6 => Self::Quiet,
            7 => Self::Fallen,
            8 => Self::Placed,
            9 => Self::Lend,
            10 => Self::Lent,
            11 => Self::Packed,
            17 => Self::Attached,
            18 => Self::Ack,
            19 => Self::CommitAck,
            20 => Self::Refused,
            21 => Self::Answer,
            22 => Self::Granted,
            23 => Self::Down,
            24 => Self::Borrowed,
            _ => return None,
        })
    }
}

/// The fixed part of every frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// Cells in a write, 0 otherwise.
    pub count: u16,
    /// Bytes of the body.
    pub body_bytes: u32,
    /// Bytes of payload after the body.
    pub payload_bytes: u32,
    /// CRC-32C of the body.
    pub body_crc: u32,
    /// The transfer this is about.
    pub transfer: u128,
    /// Mask of bad cells in an ack, code in a refusal, packing in an attach.
    pub arg: u64,
    /// Number of the frame within its push; replies repeat it.
    pub seq: u32,
}

impl Header {
    /// A header without body.
    pub fn bare(kind: Kind, transfer: u128, seq: u32, arg: u64) -> Self {
        Self { kind, count: 0, body_bytes: 0, payload_bytes: 0, body_crc: 0, transfer, arg, seq }
    }

    /// Appends the header and its checksum.
    pub fn put(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.put_u8(self.kind as u8);
        out.put_u8(0);
        out.put_u16_le(self.count);
        out.put_u32_le(self.body_bytes);
        out.put_u32_le(self.payload_bytes);
        out.put_u32_le(self.body_crc);
        out.put_u128_le(self.transfer);
        out.put_u64_le(self.arg);
        out.put_u32_le(self.seq);
        let crc = crc32c::crc32c(out.get(start..).unwrap_or_default());
        out.put_u32_le(crc);
    }

    /// Appends a frame without payload; `body` must be short enough for its kind.
    pub fn put_with_body(mut self, body: &[u8], out: &mut Vec<u8>) {
        self.body_bytes = u32::try_from(body.len()).unwrap_or(u32::MAX);
        self.body_crc = crc32c::crc32c(body);
        self.put(out);
        out.put_slice(body);
    }

    /// Reads a header. Nothing when the checksum or the kind is wrong: framing is lost, close the connection.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let (guarded, mut crc) = bytes.split_at(HEADER_BYTES - 4);
        if crc.get_u32_le() != crc32c::crc32c(guarded) {
            return None;
        }
        let mut b = guarded;
        let kind = Kind::from_byte(b.get_u8())?;
        let _flags = b.get_u8();
        Some(Self {
            kind,
            count: b.get_u16_le(),
            body_bytes: b.get_u32_le(),
            payload_bytes: b.get_u32_le(),
            body_crc: b.get_u32_le(),
            transfer: b.get_u128_le(),
            arg: b.get_u64_le(),
            seq: b.get_u32_le(),
        })
    }

    /// Whether the lengths are within the bounds of the kind. Says nothing about the transfer.
    pub fn is_bounded(&self) -> bool {
        let body = self.body_bytes as usize;
        let payload = self.payload_bytes as usize;
        match self.kind {
            Kind::Attach => body == ATTACH_BYTES && payload == 0,
            Kind::Write | Kind::Packed => {
                let count = usize::from(self.count);
                (1..=MAX_FRAME_CELLS).contains(&count)
                    && body == count * CELL_BYTES
                    && payload.is_multiple_of(count)
                    && payload > 0
                    && payload
                        <= if count == 1 { crate::grid::MAX_CELL_BYTES as usize } else { MAX_FRAME_BYTES }
            }
            Kind::Commit => body <= MAX_COMMIT_BYTES && payload == 0,
            Kind::Abort => body <= MAX_REASON_BYTES && payload == 0,
            Kind::Offer | Kind::Lend => body <= MAX_OFFER_BYTES && payload == 0,
            Kind::Lent => {
                let count = usize::from(self.count);
                (1..=MAX_FRAME_CELLS).contains(&count) && body == count * LENT_CELL_BYTES && payload == 0
            }
            Kind::Placed => {
                let count = usize::from(self.count);
                (1..=MAX_FRAME_CELLS).contains(&count) && body == count * CELL_BYTES && payload == 0
            }
            Kind::Answer => body <= MAX_OFFER_BYTES && payload == 0,
            Kind::Quiet
            | Kind::Fallen
            | Kind::Attached
            | Kind::Ack
            | Kind::CommitAck
            | Kind::Refused
            | Kind::Granted
            | Kind::Borrowed
            | Kind::Down => body == 0 && payload == 0,
        }
    }
}

/// One cell in the body of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CellDescriptor {
    /// Plane of the cell.
    pub plane: u32,
    /// Index into the ticket's slots.
    pub index: u32,
    /// CRC-32C of its bytes.
    pub checksum: u32,
}

impl CellDescriptor {
    /// Appends it.
    pub fn put(&self, out: &mut Vec<u8>) {
        out.put_u32_le(self.plane);
        out.put_u32_le(self.index);
        out.put_u32_le(self.checksum);
    }

    /// Reads all descriptors of a body.
    pub fn parse_all(mut body: &[u8]) -> impl Iterator<Item = Self> {
        std::iter::from_fn(move || {
            (body.len() >= CELL_BYTES).then(|| Self {
                plane: body.get_u32_le(),
                index: body.get_u32_le(),
                checksum: body.get_u32_le(),
            })
        })
    }
}

/// A cell and where it lies in lent memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LentCell {
    /// The cell.
    pub cell: CellDescriptor,
    /// Byte of the lent memory at which it begins.
    pub offset: u64,
}

impl LentCell {
    /// Appends it.
    pub fn put(&self, out: &mut Vec<u8>) {
        self.cell.put(out);
        out.put_u64_le(self.offset);
    }

    /// Reads all of a body.
    pub fn parse_all(body: &[u8]) -> impl Iterator<Item = Self> {
        body.chunks_exact(LENT_CELL_BYTES).filter_map(|mut bytes| {
            let cell = CellDescriptor::parse_all(bytes.get(..CELL_BYTES)?).next()?;
            bytes.advance(CELL_BYTES);
            Some(Self { cell, offset: bytes.get_u64_le() })
        })
    }
}

/// How to get at memory that is lent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lend {
    /// To be shown when fetching it.
    pub key: [u8; 16],
    /// Its size.
    pub bytes: u64,
    /// Of the socket, in the abstract namespace, where it is fetched.
    pub name: String,
}

impl Lend {
    /// Its body; nothing when the name is too long.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let mut out = self.key.to_vec();
        out.put_u64_le(self.bytes);
        put_name(&self.name, &mut out)?;
        Some(out)
    }

    /// Reads a body.
    pub fn parse(mut body: &[u8]) -> Option<Self> {
        let (key, rest) = body.split_first_chunk::<16>()?;
        body = rest;
        let bytes = body.try_get_u64_le().ok()?;
        let name = take_name(&mut body)?;
        body.is_empty().then_some(Self { key: *key, bytes, name })
    }
}

pub(crate) fn put_name(name: &str, out: &mut Vec<u8>) -> Option<()> {
    if name.len() > MAX_NAME_BYTES {
        return None;
    }
    out.put_u8(u8::try_from(name.len()).ok()?);
    out.put_slice(name.as_bytes());
    Some(())
}

pub(crate) fn take_name(from: &mut &[u8]) -> Option<String> {
    let len = usize::from(from.try_get_u8().ok()?);
    let (name, rest) = from.split_at_checked(len)?;
    *from = rest;
    String::from_utf8(name.to_vec()).ok()
}

/// The sender's first words: who it is and whom it wants to reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The sender.
    pub from: Identity,
    /// The receiver the ticket named.
    pub to: Identity,
}

/// The receiver's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HelloAck {
    /// The receiver as it is now.
    pub from: Identity,
    /// Why it will not talk, if so.
    pub refused: Option<Refusal>,
}

fn guarded(prefix: &[u8], body: &[u8]) -> Vec<u8> {
    let mut out = prefix.to_vec();
    out.put_u16_le(u16::try_from(body.len()).unwrap_or(u16::MAX));
    out.put_slice(body);
    let crc = crc32c::crc32c(out.get(prefix.len()..).unwrap_or_default());
    out.put_u32_le(crc);
    out
}

impl Hello {
    /// Magic and hello; nothing when a name is too long.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let mut body = Vec::new();
        body.put_u16_le(VERSION);
        for side in [&self.from, &self.to] {
            put_name(&side.worker, &mut body)?;
            body.put_u64_le(side.incarnation);
        }
        Some(guarded(&MAGIC, &body))
    }

    /// Reads the body of a hello: its version, and what it says if that version is ours.
    pub fn parse(mut body: &[u8]) -> Option<(u16, Option<Self>)> {
        let version = body.try_get_u16_le().ok()?;
        if version != VERSION {
            return Some((version, None));
        }
        let from = take_identity(&mut body)?;
        let to = take_identity(&mut body)?;
        Some((version, Some(Self { from, to })))
    }
}

impl HelloAck {
    /// The answer's bytes.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let mut body = Vec::new();
        body.put_u16_le(VERSION);
        body.put_u8(self.refused.map_or(0, |r| r as u8));
        put_name(&self.from.worker, &mut body)?;
        body.put_u64_le(self.from.incarnation);
        Some(guarded(&[], &body))
    }

    /// Reads the body of a hello-ack.
    pub fn parse(mut body: &[u8]) -> Option<Self> {
        let _version = body.try_get_u16_le().ok()?;
        let code = body.try_get_u8().ok()?;
        let from = take_identity(&mut body)?;
        let refused = if code == 0 { None } else { Some(Refusal::from_code(u64::from(code))) };
        Some(Self { from, refused })
    }
}

fn take_identity(from: &mut &[u8]) -> Option<Identity> {
    Some(Identity { worker: take_name(from)?, incarnation: from.try_get_u64_le().ok()? })
}
