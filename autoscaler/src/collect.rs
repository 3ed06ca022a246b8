//! Fetches what a look needs: every router's page, one router's list of workers, the prefill workers' pages.

use std::collections::HashMap;
use std::time::Duration;

use futures::future::join_all;
use http_body_util::{BodyExt, Limited};
use planner::{Observation, Profile};
use proto::v1::inference_client::InferenceClient;
use proto::v1::operator_client::OperatorClient;
use proto::v1::{ListWorkersRequest, SetRoleRequest, WorkerStatus};
use tls::{ClientFiles, ClusterFiles, Part};
use tonic::client::GrpcService;
use tonic::codegen::http;
use tonic::transport::{Channel, Endpoint};

use crate::look::{Memory, Page, Seen};

const PATIENCE: Duration = Duration::from_secs(3);
/// Larger pages are refused.
const MOST_BYTES: usize = 4 << 20;

/// Why the cluster could not be seen.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// The name has no address.
    #[error("--routers {0}: {1}")]
    Name(String, std::io::Error),
    /// No address answered.
    #[error("no router answers at {0}")]
    Silent(String),
}

/// Looks at one cluster.
pub struct Collector {
    routers: String,
    /// How routers are reached.
    pub tls: Option<ClientFiles>,
    /// Shown to routers.
    pub api_key: Option<String>,
    /// How workers are reached.
    pub cluster_tls: Option<ClusterFiles>,
    profile: Profile,
    channels: HashMap<String, Channel>,
    memory: Memory,
    /// The router that answered last, and the workers that it knew.
    last: Option<(Channel, Vec<WorkerStatus>)>,
}

impl Collector {
    /// Of the cluster whose routers are behind this name.
    pub fn new(routers: String, profile: Profile) -> Self {
        let (channels, memory) = (HashMap::new(), Memory::default());
        Self { routers, tls: None, api_key: None, cluster_tls: None, profile, channels, memory, last: None }
    }

    /// Connections are made anew at the next look, with certificates as they are then.
    pub fn forget_channels(&mut self) {
        self.channels.clear();
    }

    /// One look.
    pub async fn look(&mut self, now: f64) -> Result<Observation, LookError> {
        let found = tokio::net::lookup_host(&self.routers).await;
        let found = found.map_err(|error| LookError::Name(self.routers.clone(), error))?;
        let mut addresses: Vec<String> = found.map(|address| address.to_string()).collect();
        addresses.sort();
        addresses.dedup();
        let routers = self.pages(addresses.iter().map(|a| (a.clone(), a.clone())), true).await;
        let name = self.routers.clone();
        let silent = || LookError::Silent(name.clone());
        let first = addresses.iter().find(|a| routers.contains_key(*a)).ok_or_else(silent)?;
        let channel = self.channel(first, None).ok_or_else(silent)?;
        let listed = tokio::time::timeout(PATIENCE, async {
            InferenceClient::new(channel.clone()).list_workers(self.keyed(ListWorkersRequest {})).await
        });
        let workers = listed.await.ok().and_then(Result::ok).ok_or_else(silent)?.into_inner().workers;
        let prefill = workers.iter().filter(|w| w.role == "prefill");
        let prefill = self.pages(prefill.map(|w| (w.worker.clone(), w.address.clone())), false).await;
        self.channels.retain(|address, _| {
            addresses.contains(address) || workers.iter().any(|w| w.address == *address)
        });
        let seen = Seen { now, routers: &routers, workers: &workers, prefill: &prefill };
        let seen = self.memory.observe(&seen, &self.profile);
        self.last = Some((channel, workers));
        Ok(seen)
    }

    /// The workers of the last look.
    pub fn workers(&self) -> &[WorkerStatus] {
        self.last.as_ref().map_or(&[], |(_, workers)| workers)
    }

    /// Tells a worker to change its pool, over the router that answered last.
    pub async fn set_role(&self, worker: &str, role: &str) -> Result<(), String> {
        let Some((channel, _)) = &self.last else { return Err("no router has answered yet".into()) };
        let request = SetRoleRequest { worker: worker.into(), role: role.into(), force: false };
        let mut operator = OperatorClient::new(channel.clone());
        match tokio::time::timeout(PATIENCE, operator.set_role(self.keyed(request))).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(status.message().to_owned()),
            Err(_) => Err("the router does not answer".into()),
        }
    }

    /// A call that shows our API key, if we have one.
    fn keyed<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        let value = self.api_key.as_ref().and_then(|key| format!("Bearer {key}").parse().ok());
        if let Some(value) = value {
            request.metadata_mut().insert("authorization", value);
        }
        request
    }

    /// Pages by name, of those that answer.
    async fn pages(
        &mut self,
        of: impl Iterator<Item = (String, String)>,
        of_routers: bool,
    ) -> HashMap<String, Page> {
        let fetches = of.filter_map(|(name, address)| {
            let worker = (!of_routers).then_some(name.as_str());
            let channel = self.channel(&address, worker)?;
            Some((name, channel))
        });
        let fetches = fetches.map(|(name, channel)| async move {
            let text = tokio::time::timeout(PATIENCE, fetch(channel)).await.ok().flatten()?;
            Some((name, Page::parse(&text)))
        });
        join_all(fetches.collect::<Vec<_>>()).await.into_iter().flatten().collect()
    }

    /// To a router, or to the worker of that name.
    fn channel(&mut self, address: &str, worker: Option<&str>) -> Option<Channel> {
        if let Some(channel) = self.channels.get(address) {
            return Some(channel.clone());
        }
        if let (Some(worker), Some(files)) = (worker, self.cluster_tls.clone()) {
            let endpoint = Endpoint::from_shared(format!("http://{address}")).ok()?.connect_timeout(PATIENCE);
            let channel = tls::dial::lazy(&endpoint, files, Part::Worker(worker.to_owned()));
            self.channels.insert(address.to_owned(), channel.clone());
            return Some(channel);
        }
        let endpoint = match self.tls.as_ref().filter(|_| worker.is_none()) {
            None => Endpoint::from_shared(format!("http://{address}")).ok()?,
            Some(files) => {
                // The certificate names the router, and we go by its address.
                let name = self.routers.rsplit_once(':').map_or(self.routers.as_str(), |(name, _)| name);
                let config = files.read().inspect_err(|error| tracing::warn!(%error)).ok()?;
                let endpoint = Endpoint::from_shared(format!("https://{address}")).ok()?;
                endpoint.tls_config(config.domain_name(name)).ok()?
            }
        };
        let channel = endpoint.connect_timeout(PATIENCE).connect_lazy();
        self.channels.insert(address.to_owned(), channel.clone());
        Some(channel)
    }
}

/// GET /metrics on the connection that gRPC uses.
async fn fetch(mut channel: Channel) -> Option<String> {
    let request = http::Request::get("/metrics").body(tonic::body::Body::empty()).ok()?;
    std::future::poll_fn(|context| GrpcService::poll_ready(&mut channel, context)).await.ok()?;
    let response = GrpcService::call(&mut channel, request).await.ok()?;
    if response.status() != http::StatusCode::OK {
        return None;
    }
    let body = Limited::new(response.into_body(), MOST_BYTES).collect().await.ok()?;
    String::from_utf8(body.to_bytes().into()).ok()
}
