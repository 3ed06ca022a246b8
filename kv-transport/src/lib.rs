//! Bytes from one registered memory to another, over RDMA, memory that processes of a host share, or TCP, with proof of arrival.
//!
//! A [`Receiver`] owns a [`Region`] laid out as a [`Grid`] of *cells*. It reserves slots for a transfer and issues
//! a ticket: the right to write them. A [`Sender`] opens the ticket, pushes the cells with the checksums their
//! producer made, and commits with a payload of the caller's. The receiver verifies every cell in place; when all
//! are verified and the commit is there, the [`Landing`] is committed and its memory is the caller's.
//!
//! Whatever happens in between, memory is released only when nothing can write (or read) it any more, a stale or
//! forged ticket writes nothing, and a bad cell is fetched again or fails the transfer. Nothing here knows what
//! the cells mean, but for [`Packing`], which takes them for rows of bf16 numbers where both sides want that.
//!
//! * Decisions are plain synchronous values: [`landing_state`], [`push_state`], [`ticket`], [`wire`].
//! * Waiting happens at the edge, always with a deadline: [`Landing`], [`Push`], one task per connection.
//! * [`mux`] lets the transport share one port with an HTTP/2 server.

#[cfg(all(
    any(feature = "sabotage-fencing", feature = "sabotage-checksum", feature = "sabotage-quarantine"),
    not(debug_assertions)
))]
compile_error!("a sabotaged transport is for showing that the checks catch it, never for a release build");

mod bits;
mod borrow;
mod control;
mod device;
mod dial;
pub mod error;
pub mod fence;
pub mod grid;
mod incoming;
mod job;
mod landing;
mod landing_shared;
pub mod landing_state;
mod lend;
mod link;
pub mod mux;
mod outgoing;
mod packed;
mod packing;
mod push;
pub mod push_state;
mod receiver;
mod region;
mod sender;
mod serve;
mod serve_rdma;
mod session;
mod shards;
mod socket;
mod stats;
mod stream;
mod stream_rdma;
mod summed;
pub mod ticket;
mod transport;
pub mod verbs;
pub mod wire;

pub use device::{DeviceMemory, Exposed, PeerMemory};
pub use error::{LandingError, PushError, Refusal, ReserveError, TicketError};
pub use grid::Grid;
pub use landing::{Landed, Landing, Revoking};
pub use landing_state::LandingEnd;
pub use packing::Packing;
pub use push::{Cell, CellQueue, Push, PushReport};
pub use receiver::{Receiver, ReceiverConfig, Reserve};
pub use region::Region;
pub use sender::{Sender, SenderConfig};
pub use shards::{Route, Shard};
pub use socket::{Secure, Socket, SpeaksFor};
pub use stats::{Fallback, ReceiverStats, SenderStats};
pub use ticket::Ticket;
pub use transport::Transport;
pub use verbs::{Fabric, FabricConfig, FabricError, GpuDirect};

/// Who a worker is: its name, and which life of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Name, at most 255 bytes.
    pub worker: String,
    /// Differs after every restart.
    pub incarnation: u64,
}
