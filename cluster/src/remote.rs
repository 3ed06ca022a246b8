//! Joining the registry that a router serves (`--registry`): one gRPC stream is the lease.

use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use proto::v1::{JoinRequest, registry_client::RegistryClient};
use tls::{ClusterFiles, Part};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;

use crate::patience::{FirstContact, jittered};
use crate::{Join, Load, Member, Membership, RegistryError};

/// A heartbeat at least this often, whether the load changed or not.
pub const HEARTBEAT: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_millis(500);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A client of a router's registry.
#[derive(Clone)]
pub struct RemoteRegistry {
    address: String,
    patience: Duration,
    tls: Option<ClusterFiles>,
}

impl RemoteRegistry {
    /// The router at `address`, host:port or http://host:port.
    pub fn new(address: &str) -> Self {
        let address = address.trim_end_matches('/');
        let address = match address.contains("://") {
            true => address.to_owned(),
            false => format!("http://{address}"),
        };
        Self { address, patience: Duration::ZERO, tls: None }
    }

    /// How long the first contact may take (default: one try).
    pub fn patient(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Over TLS: the router must have a certificate of the cluster's, and sees ours.
    pub fn with_tls(self, tls: Option<ClusterFiles>) -> Self {
        let address = self.address.replacen("https://", "http://", 1);
        Self { address, tls, ..self }
    }

    /// What a call that failed means.
    fn refusal(&self, status: tonic::Status) -> RegistryError {
        use std::error::Error as _;
        match status.source() {
            // Said by our own connection: what answers there does not speak as we do.
            Some(source) if self.tls.is_none() => RegistryError::Unreachable {
                address: self.address.clone(),
                reason: format!(
                    "{}; if it is encrypted, start this worker with --cluster-cert, --cluster-key and --cluster-ca",
                    chain(source)
                ),
            },
            _ => refusal(status),
        }
    }
}

impl Join for RemoteRegistry {
    fn join(
        &self,
        member: Member,
        load: watch::Receiver<Load>,
    ) -> BoxFuture<'_, Result<Membership, RegistryError>> {
        async move {
            let mut contact = FirstContact::new(self.patience);
            let mut session = loop {
                match Session::open(self, &member, load.clone()).await {
                    Ok(session) => break session,
                    Err(error) if contact.try_again(&error).await => {}
                    Err(error) => return Err(error),
                }
            };
            let (registry, address) = (self.clone(), self.address.clone());
            Ok(Membership::spawn(|mut left| async move {
                loop {
                    tokio::select! {
                        _ = &mut left => return,
                        why = session.run() => tracing::warn!(%why, registry = %address, "left the registry, joining again"),
                    }
                    session = loop {
                        tokio::select! {
                            _ = &mut left => return,
                            _ = tokio::time::sleep(jittered(RETRY)) => {}
                        }
                        match Session::open(&registry, &member, load.clone()).await {
                            Ok(session) => break session,
                            Err(error) => tracing::debug!(%error, "registry still away"),
                        }
                    };
                    tracing::info!(registry = %address, "joined again");
                }
            }))
        }
        .boxed()
    }
}

struct Session {
    load: watch::Receiver<Load>,
    requests: mpsc::Sender<JoinRequest>,
    replies: tonic::Streaming<proto::v1::JoinReply>,
}

impl Session {
    async fn open(
        registry: &RemoteRegistry,
        member: &Member,
        mut load: watch::Receiver<Load>,
    ) -> Result<Self, RegistryError> {
        let address = registry.address.as_str();
        let unreachable = |reason: String| RegistryError::Unreachable { address: address.to_owned(), reason };
        let endpoint = Endpoint::from_shared(address.to_owned())
            .map_err(|e| RegistryError::Refused(format!("{address} is not an address: {e}")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(5));
        let connected = match registry.tls.clone() {
            None => endpoint.connect().await,
            Some(files) => tls::dial::now(&endpoint, files, Part::Router).await,
        };
        let channel = connected.map_err(|e| match chain(&e) {
            // A certificate does not become right by waiting.
            why if why.contains("TLS: ") => RegistryError::Refused(why),
            why => unreachable(why),
        })?;
        let (requests, receiver) = mpsc::channel(4);
        let now = load.borrow_and_update().clone();
        let first = JoinRequest { member_json: to_json(member), load_json: to_json(&now) };
        let _ = requests.send(first).await;
        let replies = RegistryClient::new(channel)
            .join(ReceiverStream::new(receiver))
            .await
            .map_err(|status| registry.refusal(status))?
            .into_inner();
        let mut session = Self { load, requests, replies };
        match session.replies.message().await.map_err(refusal)? {
            Some(_) => Ok(session),
            None => Err(RegistryError::Refused("the registry closed the stream at once".into())),
        }
    }

    /// Reports load until the stream breaks; says why it broke.
    async fn run(&mut self) -> String {
        let mut tick = tokio::time::interval(HEARTBEAT);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {
                    let now = self.load.borrow_and_update().clone();
                    let beat = JoinRequest { member_json: String::new(), load_json: to_json(&now) };
                    if self.requests.send(beat).await.is_err() {
                        return "stream closed".into();
                    }
                }
                reply = self.replies.message() => match reply {
                    Ok(Some(_)) => {}
                    Ok(None) => return "the registry closed the stream".into(),
                    Err(status) => return status.message().to_owned(),
                },
            }
        }
    }
}

fn refusal(status: tonic::Status) -> RegistryError {
    RegistryError::Refused(format!("{:?}: {}", status.code(), status.message()))
}

/// Serialises what is plain data and so cannot fail.
pub(crate) fn to_json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// An error with all its causes; transport errors say the useful part last.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
