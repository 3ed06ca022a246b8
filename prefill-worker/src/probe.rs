//! A prefill worker's side of `tandem doctor`'s test pushes.

use std::sync::Arc;

use bytes::Bytes;
use engine::KvMemory;
use engine::kv::pool::BlockPool;
use futures::future::{BoxFuture, FutureExt};
use kv_transport::Sender;
use proto::v1;
use tonic::Status;
use worker::probe::{self, Probe};

/// It only sends.
pub(crate) struct PrefillProbe {
    pub pool: Arc<BlockPool>,
    pub kv: Arc<dyn KvMemory>,
    pub sender: Sender,
}

impl Probe for PrefillProbe {
    fn push(&self, ticket: Bytes) -> BoxFuture<'_, Result<v1::PushProbeReply, Status>> {
        probe::push(&self.sender, &self.pool, &self.kv, ticket).boxed()
    }
}
