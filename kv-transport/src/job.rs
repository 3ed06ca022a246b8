//! What a push hands to a connection that has nothing to send.

use bytes::Bytes;

/// One cell to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct QueuedCell {
    /// Its plane.
    pub plane: u32,
    /// Index into the ticket's slots.
    pub index: u32,
    /// Slot in the sender's own grid.
    pub src_slot: u32,
    /// CRC-32C made by the producer.
    pub checksum: u32,
}

/// What a connection with nothing to do sends next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Nothing now.
    Nothing,
    /// Only the attach, which precedes a transfer's first frame on every connection.
    Attach,
    /// Cells, as frame `seq`.
    Write {
        /// Number of the frame; the reply repeats it.
        seq: u32,
        /// The cells.
        cells: Vec<QueuedCell>,
    },
    /// The commit.
    Commit,
    /// The abort.
    Abort,
}

/// Bounds of the frames a push hands out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FrameBounds {
    /// Most cells in a frame.
    pub cells: usize,
    /// Most bytes in a frame of several cells.
    pub bytes: usize,
    /// Most bytes sent and not acknowledged; one frame may always be in flight.
    pub window_bytes: usize,
}

/// What a connection needs to send a frame.
pub(crate) enum Job {
    Attach,
    /// Cells, and the commit when they are the last.
    Write {
        seq: u32,
        cells: Vec<QueuedCell>,
        commit: Option<Bytes>,
    },
    Commit(Bytes),
    Abort(String),
}
