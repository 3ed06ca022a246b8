//! The registry on etcd.
//!
//! `/tandem/v1/{cluster}/members/{worker}` and `/tandem/v1/{cluster}/load/{worker}`, both on one lease.
//! Unreachable is not gone: with etcd down the watcher keeps its last picture, and members come back
//! under the same name and incarnation once it answers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, EventType, GetOptions, PutOptions, WatchOptions};
use futures::future::{BoxFuture, FutureExt};
use tokio::sync::{oneshot, watch};

use crate::patience::{FirstContact, jittered};
use crate::remote::to_json;
use crate::{Entry, EtcdAccess, Join, Load, Member, Membership, Picture, RegistryError, Watch};

/// How long a silent member stays listed.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(500);
const TIMEOUT: Duration = Duration::from_secs(3);
/// Between pings on an idle connection. etcd closes connections that ping more often than every 5 s
/// (--grpc-keepalive-min-time) as soon as nothing else is said on them.
const PING: Duration = Duration::from_secs(10);

/// An etcd cluster and the name of ours in it.
#[derive(Clone)]
pub struct EtcdRegistry {
    endpoints: Vec<String>,
    access: EtcdAccess,
    prefix: String,
    lease: Duration,
    patience: Duration,
}

impl EtcdRegistry {
    /// Uses the etcd at `endpoints` (host:port or URLs) for the cluster called `cluster`.
    pub fn new(endpoints: &[String], cluster: &str, lease: Duration) -> Self {
        Self {
            endpoints: endpoints.to_vec(),
            access: EtcdAccess::default(),
            prefix: format!("/tandem/v1/{cluster}/"),
            lease: lease.max(Duration::from_secs(1)),
            patience: Duration::ZERO,
        }
    }

    /// With certificates, or as a user.
    pub fn with_access(self, access: EtcdAccess) -> Self {
        Self { access, ..self }
    }

    /// How long the first contact may take (default: one try).
    pub fn patient(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    async fn connect(&self) -> Result<Client, RegistryError> {
        let options = ConnectOptions::new()
            .with_connect_timeout(TIMEOUT)
            .with_timeout(TIMEOUT)
            .with_keep_alive(PING, TIMEOUT);
        let options = self.access.apply(options).map_err(|e| RegistryError::Refused(e.to_string()))?;
        Client::connect(&self.endpoints, Some(options)).await.map_err(|e| self.trouble(e))
    }

    fn trouble(&self, error: etcd_client::Error) -> RegistryError {
        use std::error::Error as _;
        let away = |reason: String| RegistryError::Unreachable {
            address: self.endpoints.join(","),
            reason: format!("{reason}{}", self.access.hint(&reason)),
        };
        match error {
            // Said by our own connection, such as a refused certificate: the useful part is the cause.
            etcd_client::Error::GRpcStatus(s) if s.source().is_some() => {
                away(s.source().map(crate::remote::chain).unwrap_or_default())
            }
            etcd_client::Error::GRpcStatus(s)
                if !matches!(s.code() as i32, 1 | 4 | 14 /* cancelled, deadline, unavailable */) =>
            {
                RegistryError::Refused(format!("etcd {:?}: {}", s.code(), s.message()))
            }
            other => away(crate::remote::chain(&other)),
        }
    }

    fn member_key(&self, worker: &str) -> String {
        format!("{}members/{worker}", self.prefix)
    }

    fn load_key(&self, worker: &str) -> String {
        format!("{}load/{worker}", self.prefix)
    }

    /// Grants a lease and writes both keys under it.
    async fn register(&self, member: &Member, load: Load) -> Result<Registered, RegistryError> {
        let mut client = self.connect().await?;
        let ttl = i64::try_from(self.lease.as_secs()).unwrap_or(10);
        let lease = client.lease_grant(ttl, None).await.map_err(|e| self.trouble(e))?.id();
        let on_lease = || Some(PutOptions::new().with_lease(lease));
        let worker = &member.worker;
        client.put(self.load_key(worker), to_json(&load), on_lease()).await.map_err(|e| self.trouble(e))?;
        client
            .put(self.member_key(worker), to_json(member), on_lease())
            .await
            .map_err(|e| self.trouble(e))?;
        Ok(Registered { client, lease, published: load })
    }

    /// Keeps the lease and publishes load until something fails.
    async fn keep(
        &self,
        held: &mut Registered,
        member: &Member,
        load: &mut watch::Receiver<Load>,
    ) -> Result<(), RegistryError> {
        let Registered { client, lease, published } = held;
        let lease = *lease;
        let (mut keeper, mut answers) = client.lease_keep_alive(lease).await.map_err(|e| self.trouble(e))?;
        let mut beat = tokio::time::interval(self.lease / 3);
        let mut publish = tokio::time::interval(Duration::from_secs(1));
        publish.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = beat.tick() => {
                    keeper.keep_alive().await.map_err(|e| self.trouble(e))?;
                    let answer = tokio::time::timeout(self.lease / 3, answers.message()).await;
                    match answer {
                        Ok(Ok(Some(answer))) if answer.ttl() > 0 => {}
                        Ok(Ok(_)) => return Err(RegistryError::Refused("the lease has expired".into())),
                        Ok(Err(e)) => return Err(self.trouble(e)),
                        Err(_) => return Err(RegistryError::Unreachable {
                            address: self.endpoints.join(","),
                            reason: "no answer to a keep-alive".into(),
                        }),
                    }
                }
                _ = publish.tick() => {
                    let now = load.borrow_and_update().clone();
                    if now != *published {
                        let options = Some(PutOptions::new().with_lease(lease));
                        client.put(self.load_key(&member.worker), to_json(&now), options)
                            .await.map_err(|e| self.trouble(e))?;
                        *published = now;
                    }
                }
            }
        }
    }

    /// A member's whole life after its first registration.
    async fn stay(
        self,
        mut held: Registered,
        member: Member,
        mut load: watch::Receiver<Load>,
        mut left: oneshot::Receiver<()>,
    ) {
        loop {
            tokio::select! {
                _ = &mut left => {
                    let _ = held.client.lease_revoke(held.lease).await;
                    return;
                }
                Err(why) = self.keep(&mut held, &member, &mut load) => {
                    tracing::warn!(%why, worker = %member.worker, "registration lost, registering again");
                }
            }
            let mut told = String::new();
            held = loop {
                tokio::select! {
                    _ = &mut left => return,
                    _ = tokio::time::sleep(jittered(RETRY)) => {}
                }
                let now = load.borrow_and_update().clone();
                match self.register(&member, now).await {
                    Ok(registered) => break registered,
                    Err(error) if told != error.to_string() => {
                        tracing::warn!(%error, worker = %member.worker, "not registered; trying again");
                        told = error.to_string();
                    }
                    Err(_) => {}
                }
            };
            tracing::info!(worker = %member.worker, incarnation = member.incarnation, "registered again");
        }
    }

    /// Reads everything, then follows changes from that revision until something fails.
    async fn follow(&self, out: &watch::Sender<Picture>) -> Result<(), RegistryError> {
        let mut client = self.connect().await?;
        let prefix = self.prefix.as_str();
        let all =
            client.get(prefix, Some(GetOptions::new().with_prefix())).await.map_err(|e| self.trouble(e))?;
        let revision = all.header().map_or(0, |h| h.revision());
        let mut keys = Keys::default();
        for kv in all.kvs() {
            keys.put(prefix, kv.key(), kv.value());
        }
        out.send_replace(keys.picture());
        let options =
            WatchOptions::new().with_prefix().with_start_revision(revision + 1).with_progress_notify();
        let mut changes = client.watch(prefix, Some(options)).await.map_err(|e| self.trouble(e))?;
        while let Some(change) = changes.message().await.map_err(|e| self.trouble(e))? {
            if change.canceled() {
                return Err(RegistryError::Refused(change.cancel_reason().to_owned()));
            }
            for event in change.events() {
                let Some(kv) = event.kv() else { continue };
                match event.event_type() {
                    EventType::Put => keys.put(prefix, kv.key(), kv.value()),
                    EventType::Delete => keys.delete(prefix, kv.key()),
                }
            }
            out.send_replace(keys.picture());
        }
        Err(RegistryError::Refused("the watch ended".into()))
    }
}

impl Join for EtcdRegistry {
    fn join(
        &self,
        member: Member,
        load: watch::Receiver<Load>,
    ) -> BoxFuture<'_, Result<Membership, RegistryError>> {
        async move {
            let mut contact = FirstContact::new(self.patience);
            let held = loop {
                let now = load.borrow().clone();
                match self.register(&member, now).await {
                    Ok(registered) => break registered,
                    Err(error) if contact.try_again(&error).await => {}
                    Err(error) => return Err(error),
                }
            };
            let registry = self.clone();
            Ok(Membership::spawn(|left| registry.stay(held, member, load, left)))
        }
        .boxed()
    }
}

impl Watch for EtcdRegistry {
    fn watch(&self) -> BoxFuture<'_, Result<watch::Receiver<Picture>, RegistryError>> {
        async move {
            let (out, mut seen) = watch::channel(Picture::default());
            let registry = self.clone();
            let (first_error, failed) = oneshot::channel();
            tokio::spawn(async move {
                let mut first_error = Some(first_error);
                let mut contact = FirstContact::new(registry.patience);
                loop {
                    let Err(error) = registry.follow(&out).await else { return };
                    let known = out.borrow().connected || !out.borrow().members.is_empty();
                    if !known && first_error.is_some() && contact.try_again(&error).await {
                        continue;
                    }
                    if !known && let Some(report) = first_error.take() {
                        let _ = report.send(error);
                        return;
                    }
                    first_error = None;
                    if out.borrow().connected {
                        tracing::warn!(%error, "etcd is away; keeping the last picture of the fleet");
                    }
                    out.send_modify(|picture| picture.connected = false);
                    tokio::select! {
                        _ = tokio::time::sleep(jittered(RETRY)) => {}
                        _ = out.closed() => return,
                    }
                }
            });
            tokio::select! {
                Ok(error) = failed => Err(error),
                Ok(()) = seen.changed() => Ok(seen),
                else => Err(RegistryError::Refused("the watch ended".into())),
            }
        }
        .boxed()
    }
}

/// A lease, and the load that was last written under it: what changed while it was granted is still to be said.
struct Registered {
    client: Client,
    lease: i64,
    published: Load,
}

/// The two key families, which may arrive in either order.
#[derive(Default)]
struct Keys {
    members: BTreeMap<String, Member>,
    loads: BTreeMap<String, Load>,
}

impl Keys {
    fn put(&mut self, prefix: &str, key: &[u8], value: &[u8]) {
        match split(prefix, key) {
            Some(("members", worker)) => match serde_json::from_slice(value) {
                Ok(member) => drop(self.members.insert(worker.to_owned(), member)),
                Err(error) => tracing::warn!(worker, %error, "unreadable member ignored"),
            },
            Some(("load", worker)) => {
                if let Ok(load) = serde_json::from_slice(value) {
                    self.loads.insert(worker.to_owned(), load);
                }
            }
            _ => {}
        }
    }

    fn delete(&mut self, prefix: &str, key: &[u8]) {
        match split(prefix, key) {
            Some(("members", worker)) => drop(self.members.remove(worker)),
            Some(("load", worker)) => drop(self.loads.remove(worker)),
            _ => {}
        }
    }

    fn picture(&self) -> Picture {
        let entry = |member: &Member| Entry {
            member: member.clone(),
            load: self.loads.get(&member.worker).cloned().unwrap_or_default(),
        };
        let members = self.members.iter().map(|(w, m)| (w.clone(), entry(m))).collect();
        Picture { members: Arc::new(members), connected: true }
    }
}

fn split<'a>(prefix: &str, key: &'a [u8]) -> Option<(&'a str, &'a str)> {
    std::str::from_utf8(key).ok()?.strip_prefix(prefix)?.split_once('/')
}
