//! The calls to workers that make up an attempt.
//!
//! A stream that says nothing for [`crate::RouterConfig::worker_silence`] is lost, however alive its connection is: workers say something every
//! two seconds.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use proto::v1::decode_worker_client::DecodeWorkerClient;
use proto::v1::prefill_worker_client::PrefillWorkerClient;
use proto::v1::{self, decode_event::Event};
use telemetry::trace::TRACEPARENT;
use tonic::{Request, Status, Streaming};

use crate::fleet::{Fleet, Worker};

/// A prefill leg under way. Dropping it cancels it.
pub(crate) type Prefilling = BoxFuture<'static, Result<v1::PrefillReply, Status>>;

/// Where a decode worker gets a sequence's KV from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KvFrom {
    /// A prefill worker, or itself when at most so many tokens are not cached there.
    Prefill { worker: String, local_max_tokens: u32 },
    /// The decode worker that runs it now.
    Decode { worker: String },
}

/// The source of a status that no worker sent.
#[derive(Debug, thiserror::Error)]
#[error("silent")]
struct Silent;

/// What a worker says, unless it says nothing for that long.
pub(crate) async fn heard<T>(
    silence: Duration,
    word: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    tokio::time::timeout(silence, word).await.unwrap_or_else(|_| {
        let why = format!("the worker said nothing for {} ms: its stream is lost", silence.as_millis());
        let mut status = Status::unavailable(why);
        // As when the connection breaks: the other leg is not to blame.
        status.set_source(Arc::new(Silent));
        Err(status)
    })
}

/// A call with the span that it is made for.
fn traced<T>(message: T, trace: Option<String>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(parent) = trace.and_then(|trace| trace.parse().ok()) {
        request.metadata_mut().insert(TRACEPARENT, parent);
    }
    request
}

/// Opens the stream of a request on a decode worker: its first message is the reservation.
pub(crate) async fn reserve(
    (fleet, silence): (&Fleet, Duration),
    decode: &Worker,
    sequence: v1::Sequence,
    from: KvFrom,
    trace: Option<String>,
) -> Result<(v1::Reserved, Streaming<v1::DecodeEvent>), Status> {
    let (kv_from, local_prefill_max_tokens, moving) = match from {
        KvFrom::Prefill { worker, local_max_tokens } => (worker, local_max_tokens, false),
        KvFrom::Decode { worker } => (worker, 0, true),
    };
    let request = v1::DecodeRequest {
        sequence: Some(sequence),
        compat_hash: decode.member.compat_hash.clone(),
        incarnation: decode.member.incarnation,
        local_prefill_max_tokens,
        moving,
        kv_from,
    };
    let mut client =
        DecodeWorkerClient::new(decode.channel.clone()).max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
    let mut events = heard(silence, client.decode(traced(request, trace))).await?.into_inner();
    let first = heard(silence, events.message()).await?;
    fleet.note_load(&decode.member.worker, first.as_ref().and_then(|f| f.load));
    match first.and_then(|f| f.event) {
        Some(Event::Reserved(reserved)) => Ok((reserved, events)),
        _ => Err(Status::internal("the decode worker's first message is no reservation")),
    }
}

/// Has a prompt computed and pushed to the ticket's owner.
pub(crate) fn prefill(
    silence: Duration,
    worker: &Worker,
    sequence: v1::Sequence,
    ticket: Bytes,
    trace: Option<String>,
) -> Prefilling {
    let assignment = worker.assign(sequence.prompt.len());
    let request = v1::PrefillRequest {
        sequence: Some(sequence),
        compat_hash: worker.member.compat_hash.clone(),
        incarnation: worker.member.incarnation,
        ticket,
    };
    let channel = worker.channel.clone();
    async move {
        let _until_done = assignment;
        let mut client =
            PrefillWorkerClient::new(channel).max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
        let mut events = heard(silence, client.prefill(traced(request, trace))).await?.into_inner();
        while let Some(event) = heard(silence, events.message()).await? {
            if let Some(reply) = event.reply {
                return Ok(reply);
            }
        }
        Err(Status::internal("the prefill worker ended the call without a reply"))
    }
    .boxed()
}

/// Moves the sequence that runs as `attempt` on `from` to the ticket's owner.
pub(crate) async fn move_out(
    from: &Worker,
    (origin, request_id): (String, String),
    attempt: u32,
    ticket: Bytes,
) -> Result<v1::MoveReply, Status> {
    let request = v1::MoveRequest {
        request_id,
        origin,
        attempt,
        compat_hash: from.member.compat_hash.clone(),
        incarnation: from.member.incarnation,
        ticket,
    };
    Ok(DecodeWorkerClient::new(from.channel.clone()).r#move(request).await?.into_inner())
}
