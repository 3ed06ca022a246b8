//! The registry that a router serves when there is no etcd: workers join over a stream, which is their lease.

use std::time::Duration;

use cluster::{Load, Member, MemoryRegistry};
use proto::v1;
use tls::{Certified, Part};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status, Streaming};

/// A member silent for this long is gone.
const LEASE: Duration = Duration::from_secs(5);
const MAX_JSON_BYTES: usize = 64 << 10;

/// The gRPC face of a [`MemoryRegistry`].
pub struct RegistryService {
    /// Whether members must come over the cluster's TLS, each with its own certificate.
    pub is_secure: bool,
    /// Where members are kept.
    pub registry: MemoryRegistry,
    /// Ends every stream: the router stops.
    pub close: CancellationToken,
}

#[tonic::async_trait]
impl v1::registry_server::Registry for RegistryService {
    type JoinStream = ReceiverStream<Result<v1::JoinReply, Status>>;

    async fn join(
        &self,
        call: tonic::Request<Streaming<v1::JoinRequest>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let certified = call.extensions().get::<Certified>().cloned();
        let mut beats = call.into_inner();
        let first = tokio::time::timeout(LEASE, beats.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no first message"))??
            .ok_or_else(|| Status::invalid_argument("the first message must name the member"))?;
        let member: Member = parse("member_json", &first.member_json)?;
        let load: Load = parse("load_json", &first.load_json)?;
        if self.is_secure {
            check_identity(&member, certified)?;
        }
        self.registry.put(member.clone(), load).map_err(|e| Status::failed_precondition(e.to_string()))?;

        let (replies, stream) = mpsc::channel(1);
        let lease_ms = u32::try_from(LEASE.as_millis()).unwrap_or(u32::MAX);
        let _ = replies.try_send(Ok(v1::JoinReply { lease_ms }));
        let registry = self.registry.clone();
        let close = self.close.clone();
        tokio::spawn(async move {
            let listen = async {
                while let Ok(Ok(Some(beat))) = tokio::time::timeout(LEASE, beats.message()).await {
                    if let Ok(load) = parse("load_json", &beat.load_json) {
                        registry.set_load(&member.worker, member.incarnation, load);
                    }
                }
            };
            tokio::select! {
                () = listen => {}
                () = close.cancelled() => return,
            }
            registry.remove(&member.worker, member.incarnation);
            drop(replies);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// A worker joins as itself, or as one that its certificate speaks for.
fn check_identity(member: &Member, certified: Option<Certified>) -> Result<(), Status> {
    let part = Part::Worker(member.worker.clone());
    let certified = certified.filter(|certified| certified.is_cluster && certified.has_certificate);
    let certified = certified.ok_or_else(|| {
        Status::unauthenticated("joining wants --cluster-cert, --cluster-key and --cluster-ca on the worker")
    })?;
    if certified.names.cover(&part) && member.tls {
        return Ok(());
    }
    Err(Status::permission_denied(format!(
        "the worker's certificate speaks for {}, not for {part}",
        certified.names
    )))
}

fn parse<T: serde::de::DeserializeOwned>(field: &str, json: &str) -> Result<T, Status> {
    if json.len() > MAX_JSON_BYTES {
        return Err(Status::invalid_argument(format!("{field}: {} bytes", json.len())));
    }
    serde_json::from_str(json).map_err(|e| Status::invalid_argument(format!("{field}: {e}")))
}
