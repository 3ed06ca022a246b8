//! What can go wrong, on each side; a variant is an action someone takes.

/// Why a receiver will not let a transfer (go on to) write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Refusal {
    /// The ticket is from another incarnation or generation of the receiver: ask for a new ticket.
    Stale = 1,
    /// The secret is wrong: the ticket was tampered with or guessed.
    Forged = 2,
    /// The receiver does not know the transfer (any more): ask for a new ticket.
    Unknown = 3,
    /// Another sender already uses the ticket: let it.
    Taken = 4,
    /// The reservation's deadline passed: ask for a new ticket.
    Expired = 5,
    /// No byte arrived for too long: ask for a new ticket, perhaps with another sender.
    Stalled = 6,
    /// A connection of the transfer was lost: ask for a new ticket.
    PeerGone = 7,
    /// The sender itself gave up.
    Aborted = 8,
    /// A cell kept failing its checksum: suspect memory or network of the pair.
    Corrupt = 9,
    /// The receiver is shutting down: use another one.
    Shutdown = 10,
    /// The receiving side cancelled: stop computing.
    Revoked = 11,
    /// A bound of the receiver is reached: try later.
    Busy = 12,
    /// The other side speaks another version or nonsense: a bug or a mixed roll-out.
    Protocol = 13,
    /// Only RDMA is wanted, and the cells came another way: repair RDMA between the two.
    Downgrade = 14,
    /// Only encrypted connections are taken: give the sender its certificate.
    Insecure = 15,
    /// The sender showed no certificate, or one that speaks for another worker.
    Identity = 16,
    /// The ticket was made for another worker: stolen, or passed to the wrong one.
    Misused = 17,
    /// The sender packs cells otherwise than this receiver unpacks them: another model, or a mixed roll-out.
    Packing = 18,
}

impl Refusal {
    /// The refusal a code on the wire stands for; codes of later versions read as [`Refusal::Protocol`].
    pub fn from_code(code: u64) -> Self {
        match code {
            1 => Self::Stale,
            2 => Self::Forged,
            3 => Self::Unknown,
            4 => Self::Taken,
            5 => Self::Expired,
            6 => Self::Stalled,
            7 => Self::PeerGone,
            8 => Self::Aborted,
            9 => Self::Corrupt,
            10 => Self::Shutdown,
            11 => Self::Revoked,
            12 => Self::Busy,
            14 => Self::Downgrade,
            15 => Self::Insecure,
            16 => Self::Identity,
            17 => Self::Misused,
            18 => Self::Packing,
            _ => Self::Protocol,
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stale => "the ticket belongs to an earlier incarnation of the receiver",
            Self::Forged => "the secret is wrong",
            Self::Unknown => "the receiver does not know the transfer",
            Self::Taken => "another sender uses the ticket",
            Self::Expired => "the reservation's deadline passed",
            Self::Stalled => "no byte arrived for too long",
            Self::PeerGone => "a connection of the transfer was lost",
            Self::Aborted => "the sender gave up",
            Self::Corrupt => "a cell kept failing its checksum",
            Self::Shutdown => "the receiver is shutting down",
            Self::Revoked => "the receiving side cancelled",
            Self::Busy => "a bound of the receiver is reached",
            Self::Downgrade => "only RDMA is wanted here, and the cells came over TCP",
            Self::Insecure => {
                "it takes only encrypted connections: start the sending worker with --cluster-cert, --cluster-key and --cluster-ca"
            }
            Self::Identity => {
                "the sending worker's certificate does not speak for it: issue one with URI:tandem://worker/NAME among its subject alternative names"
            }
            Self::Misused => "the ticket was made for another worker",
            Self::Packing => "cells that are packed so are not taken here: give both pools the same --kv-wire",
            Self::Protocol => "the peer speaks another version or nonsense",
        })
    }
}

/// A ticket that cannot be made or read.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum TicketError {
    /// Not a ticket, or damaged on the way: a bug or tampering between the workers.
    #[error("not a ticket, or damaged on its way")]
    Malformed,
    /// Made by another version: the workers must not be paired.
    #[error("ticket version {0} is not understood by this worker")]
    Version(u16),
    /// Too many slots, too much meta, or too long a name for a ticket: reserve less.
    #[error("slots, meta, endpoints or names exceed a ticket's bounds")]
    TooLarge,
}

/// A reservation that was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// The bound on transfers is reached: shed or queue the request.
    #[error("all {max} transfers are in use")]
    Full {
        /// The configured bound.
        max: usize,
    },
    /// A slot outside the region or named twice: a bug in the caller.
    #[error("slot {slot} is outside the region or named twice")]
    BadSlot {
        /// The slot.
        slot: u32,
    },
    /// The reservation does not fit into a ticket: reserve less.
    #[error(transparent)]
    Ticket(#[from] TicketError),
    /// The deadline already passed: fail the request.
    #[error("the deadline already passed")]
    Expired,
    /// The receiver is shutting down: use another worker.
    #[error("the receiver is shutting down")]
    Shutdown,
}

/// A landing that did not commit. Its memory is released once no write can be in flight.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LandingError {
    /// The deadline passed before the commit: fail the request.
    #[error("the reservation's deadline passed before the commit")]
    Expired,
    /// No byte arrived for the progress timeout: place the request again, elsewhere.
    #[error("no byte arrived for the progress timeout")]
    Stalled,
    /// A connection of the sender was lost: place the request again.
    #[error("a connection of the sender was lost")]
    PeerGone,
    /// The sender gave up: place the request again unless the reason says otherwise.
    #[error("the sender gave up: {reason}")]
    Aborted {
        /// The sender's words.
        reason: String,
    },
    /// A cell kept failing its checksum: recompute, and suspect memory or network of the pair.
    #[error("a cell kept failing its checksum")]
    Corrupt,
    /// This receiver is shutting down: place the request elsewhere.
    #[error("the receiver is shutting down")]
    Shutdown,
    /// This side revoked the landing, or already took what landed.
    #[error("the landing was revoked or already taken")]
    Revoked,
}

/// A push that did not commit. Its memory is not read any more.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum PushError {
    /// The ticket is unreadable: fail the request.
    #[error(transparent)]
    Ticket(#[from] TicketError),
    /// Planes or cell size differ from this worker's: the two must not be paired.
    #[error(
        "layouts differ: the ticket has {theirs_planes} planes of {theirs_bytes}-byte cells, this worker {ours_planes} of {ours_bytes}"
    )]
    Layout {
        /// Planes in the ticket.
        theirs_planes: u32,
        /// Cell size in the ticket.
        theirs_bytes: u32,
        /// Planes here.
        ours_planes: u32,
        /// Cell size here.
        ours_bytes: u32,
    },
    /// No endpoint of the ticket could be reached: place the request elsewhere.
    #[error("cannot reach {endpoints}: {reason}")]
    Connect {
        /// What was tried.
        endpoints: String,
        /// The last failure.
        reason: String,
    },
    /// The receiver refused; the refusal says what to do.
    #[error("refused by the receiver: {0}")]
    Refused(Refusal),
    /// A connection to the receiver was lost: place the request again.
    #[error("a connection to the receiver was lost")]
    PeerGone,
    /// The receiver took no byte and sent no reply for the progress timeout: place the request again.
    #[error("no progress for the progress timeout")]
    Stalled,
    /// The ticket's time ran out: fail the request.
    #[error("the ticket's time ran out")]
    Expired,
    /// A cell kept failing its checksum at the receiver: recompute, and suspect memory or network of the pair.
    #[error("a cell kept failing its checksum at the receiver")]
    Corrupt,
    /// Committed before all cells were queued: a bug in the caller.
    #[error("commit with {missing} cells never queued")]
    Incomplete {
        /// How many.
        missing: u64,
    },
    /// A cell outside the ticket or the local grid, or queued twice: a bug in the caller.
    #[error("cell (plane {plane}, index {index}) is outside the ticket or the grid, or queued twice")]
    BadCell {
        /// Its plane.
        plane: u32,
        /// Its index into the ticket's slots.
        index: u32,
    },
    /// The commit's payload is over its bound: a bug in the caller.
    #[error("commit payload of {bytes} bytes is over the bound")]
    PayloadTooLarge {
        /// Its size.
        bytes: usize,
    },
    /// Connections to the configured number of peers are all in use: try later.
    #[error("connections to {max} peers are all in use")]
    Busy {
        /// The configured bound.
        max: usize,
    },
    /// RDMA is required and cannot be had: repair it, or let the workers use TCP.
    #[error("RDMA is required and not available: {reason}")]
    Downgrade {
        /// What is missing.
        reason: String,
    },
    /// The push was dropped or aborted here.
    #[error("the push was closed on this side")]
    Closed,
}
