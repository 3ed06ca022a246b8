//! The one mapping from what goes wrong here to gRPC status.

use kv_transport::{PushError, Refusal};
use tonic::Status;

/// A push that did not commit. The code tells the router whether another try can help.
pub(crate) fn push(error: PushError) -> Status {
    let text = format!("KV push: {error}");
    match error {
        PushError::Ticket(_) | PushError::Layout { .. } => Status::invalid_argument(text),
        PushError::Connect { .. }
        | PushError::PeerGone
        | PushError::Stalled
        | PushError::Busy { .. }
        | PushError::Refused(Refusal::Downgrade)
        | PushError::Downgrade { .. } => Status::unavailable(text),
        PushError::Refused(Refusal::Corrupt) | PushError::Corrupt => Status::data_loss(text),
        PushError::Refused(_) | PushError::Closed => Status::aborted(text),
        PushError::Expired => Status::deadline_exceeded(text),
        PushError::Incomplete { .. } | PushError::BadCell { .. } | PushError::PayloadTooLarge { .. } => {
            Status::internal(text)
        }
    }
}
