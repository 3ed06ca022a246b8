//! The words on the wire: `tandem.v1`, generated from the .proto files beside this crate, and ids.

/// Messages, clients and servers of `tandem.v1`. The .proto files document every field.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]
pub mod v1 {
    tonic::include_proto!("tandem.v1");
    include!(concat!(env!("OUT_DIR"), "/sealed/tandem.v1.rs"));
}

/// KEDA's external scaler protocol.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]
pub mod keda {
    tonic::include_proto!("externalscaler");
}

pub mod sealed;
pub mod server;

/// The encoded file descriptors, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Largest gRPC message that any Tandem process accepts, in bytes: a prompt of a million tokens fits.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// `local_prefill_max_tokens` that means: always prefill on the decode worker.
pub const ALWAYS_LOCAL: u32 = u32::MAX;

/// A fresh request id: time-ordered, unique.
pub fn new_request_id() -> String {
    uuid::Uuid::now_v7().to_string()
}
