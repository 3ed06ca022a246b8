//! The one mapping from what goes wrong here to gRPC status.

use kv_transport::{LandingError, ReserveError};
use tonic::Status;
use worker::serve;

/// A reservation that was not made.
pub(crate) fn reserve(error: ReserveError) -> Status {
    match error {
        ReserveError::Full { .. } => serve::shed(&error.to_string()),
        ReserveError::Expired => Status::deadline_exceeded(error.to_string()),
        ReserveError::Shutdown => Status::unavailable(error.to_string()),
        ReserveError::BadSlot { .. } | ReserveError::Ticket(_) => Status::internal(error.to_string()),
    }
}

/// A landing that did not commit. The code tells the router whether another try can help.
pub(crate) fn landing(error: LandingError) -> Status {
    let text = format!("KV landing: {error}");
    match error {
        LandingError::Expired => Status::deadline_exceeded(text),
        LandingError::Corrupt => Status::data_loss(text),
        LandingError::Stalled | LandingError::PeerGone | LandingError::Shutdown => Status::unavailable(text),
        LandingError::Aborted { .. } | LandingError::Revoked => Status::aborted(text),
    }
}
