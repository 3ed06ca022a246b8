//! The workers as the router knows them: the registry's picture, fresher loads, warm channels.
//!
//! A vanished key is a suspicion: the worker is probed, and goes when it does not answer or says that it
//! is leaving. With the registry away the last picture stays.

mod candidates;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cluster::{Load, Member, Picture};
use parking_lot::{Mutex, RwLock};
use proto::v1;
use tls::{ClusterFiles, Part};
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::prefix_index::{self, PrefixIndex, Slot};

pub use candidates::Chains;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// How long a worker rests after a failed connection.
const COOLING: Duration = Duration::from_secs(2);

/// A worker the router can use.
#[derive(Clone)]
pub struct Worker {
    /// What it said of itself.
    pub member: Member,
    /// Warm HTTP/2 connection; connects on first use and again when it breaks.
    pub channel: Channel,
    load: Load,
    /// Its key is gone from the registry but it answers.
    suspect: bool,
    /// A connection to it failed; it is a last resort until then.
    cooling_until: Option<Instant>,
    /// What it was told about draining, and when: loads on their way from before say otherwise.
    told: Option<(bool, Instant)>,
    /// Prompt tokens on their way to it, which its own load may not show yet.
    assigned: Arc<Mutex<Assigned>>,
    /// Its number in the prefix index.
    slot: Slot,
    name: Arc<str>,
    compat: Arc<str>,
}

#[derive(Default)]
struct Assigned {
    tokens: usize,
    sequences: usize,
}

/// A part of a worker's load that the router caused; ends when dropped.
pub struct Assignment {
    assigned: Arc<Mutex<Assigned>>,
    tokens: usize,
}

impl Drop for Assignment {
    fn drop(&mut self) {
        let mut assigned = self.assigned.lock();
        assigned.tokens -= self.tokens;
        assigned.sequences -= 1;
    }
}

/// How long a load may say what was true before the worker was told something.
const STALE: Duration = Duration::from_secs(2);

impl Worker {
    /// Whether it drains, when a load says `seen`.
    fn draining(&self, seen: bool) -> bool {
        match self.told {
            Some((told, at)) if at.elapsed() < STALE => told,
            _ => seen,
        }
    }

    /// Counts `tokens` of work and one sequence towards it until the guard goes.
    pub fn assign(&self, tokens: usize) -> Assignment {
        let mut assigned = self.assigned.lock();
        assigned.tokens += tokens;
        assigned.sequences += 1;
        Assignment { assigned: Arc::clone(&self.assigned), tokens }
    }

    /// Whether it takes nothing new.
    pub fn is_draining(&self) -> bool {
        self.load.draining
    }

    fn is_good(&self) -> bool {
        !self.suspect && self.cooling_until.is_none_or(|until| until < Instant::now())
    }

    fn state(&self) -> &'static str {
        match (self.load.stuck, self.load.draining, self.is_good()) {
            (true, _, _) => "stuck",
            (_, true, _) => "draining",
            (_, _, false) => "suspect",
            (false, false, true) => "ready",
        }
    }
}

/// All workers. Clones share.
#[derive(Clone, Default)]
pub struct Fleet {
    inner: Arc<Inner>,
}

struct Inner {
    /// Certificates, where workers are reached over TLS only.
    tls: Option<ClusterFiles>,
    workers: RwLock<BTreeMap<String, Worker>>,
    /// Members that cannot be used, by incarnation: said once.
    refused: Mutex<BTreeMap<String, u64>>,
    prefixes: RwLock<PrefixIndex>,
    changed: tokio::sync::Notify,
    connected: AtomicBool,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            tls: None,
            refused: Mutex::default(),
            workers: RwLock::default(),
            prefixes: RwLock::new(PrefixIndex::new(prefix_index::DEFAULT_BYTES)),
            changed: tokio::sync::Notify::new(),
            connected: AtomicBool::new(false),
        }
    }
}

impl Fleet {
    /// Reaches its workers over TLS if there are certificates; then those without are not used, nor the other way round.
    /// Its prefix index uses at most so many bytes.
    pub fn new(tls: Option<ClusterFiles>, index_bytes: usize) -> Self {
        let prefixes = RwLock::new(PrefixIndex::new(index_bytes));
        Self { inner: Arc::new(Inner { tls, prefixes, ..Inner::default() }) }
    }

    /// Why a member cannot be reached as we reach workers, if so.
    fn mismatch(&self, member: &Member) -> Option<&'static str> {
        match (self.inner.tls.is_some(), member.tls) {
            (true, false) => {
                Some("it is not encrypted: start it with --cluster-cert, --cluster-key and --cluster-ca")
            }
            (false, true) => {
                Some("it wants TLS: start this router with --cluster-cert, --cluster-key and --cluster-ca")
            }
            _ => None,
        }
    }

    /// Says once per start of a worker why it is not used.
    fn refuse(&self, member: &Member, why: &str) {
        let known = self.inner.refused.lock().insert(member.worker.clone(), member.incarnation);
        if known != Some(member.incarnation) {
            tracing::error!(worker = %member.worker, address = %member.address, why, "a worker is not used");
        }
    }

    /// Follows the registry until it is dropped.
    pub async fn follow(self, mut picture: watch::Receiver<Picture>) {
        let mut probe = tokio::time::interval(PROBE_EVERY);
        loop {
            let now = picture.borrow_and_update().clone();
            self.apply(&now);
            tokio::select! {
                changed = picture.changed() => if changed.is_err() { return },
                _ = probe.tick() => self.probe_suspects().await,
            }
        }
    }

    fn apply(&self, picture: &Picture) {
        self.inner.connected.store(picture.connected, Ordering::Relaxed);
        let mut workers = self.inner.workers.write();
        for (name, entry) in picture.members.iter() {
            match workers.get_mut(name) {
                Some(known) if known.member.incarnation == entry.member.incarnation => {
                    known.load = entry.load.clone();
                    known.load.draining = known.draining(entry.load.draining);
                    known.member = entry.member.clone();
                    known.suspect = false;
                }
                Some(known) if known.member.incarnation > entry.member.incarnation => {}
                _ if self.mismatch(&entry.member).is_some() => {
                    self.refuse(&entry.member, self.mismatch(&entry.member).unwrap_or_default());
                }
                _ => match connect(&entry.member, self.inner.tls.clone()) {
                    Ok(channel) => {
                        tracing::info!(worker = %name, role = entry.member.role.name(), address = %entry.member.address, "worker joined");
                        let mut prefixes = self.inner.prefixes.write();
                        if let Some(old) = workers.get(name) {
                            prefixes.leave(old.slot);
                        }
                        let worker = Worker {
                            slot: prefixes.join(entry.member.total_blocks as usize),
                            name: name.as_str().into(),
                            compat: entry.member.compat_hash.as_str().into(),
                            member: entry.member.clone(),
                            channel,
                            load: entry.load.clone(),
                            suspect: false,
                            cooling_until: None,
                            told: None,
                            assigned: Arc::default(),
                        };
                        workers.insert(name.clone(), worker);
                    }
                    Err(error) => tracing::warn!(worker = %name, %error, "unusable address"),
                },
            }
        }
        for (name, worker) in workers.iter_mut() {
            if !picture.members.contains_key(name) && !worker.suspect {
                tracing::info!(worker = %name, "gone from the registry; probing it");
                worker.suspect = true;
            }
        }
        drop(workers);
        self.inner.changed.notify_waiters();
    }

    async fn probe_suspects(&self) {
        let suspects: Vec<Worker> =
            self.inner.workers.read().values().filter(|w| w.suspect).cloned().collect();
        for worker in suspects {
            if !answers(worker.channel.clone()).await {
                self.remove(&worker.member.worker, worker.member.incarnation);
            }
        }
    }

    fn remove(&self, name: &str, incarnation: u64) {
        let mut workers = self.inner.workers.write();
        if workers.get(name).is_some_and(|w| w.member.incarnation == incarnation && w.suspect) {
            tracing::info!(worker = %name, "worker left");
            if let Some(worker) = workers.remove(name) {
                self.inner.prefixes.write().leave(worker.slot);
            }
        }
    }

    /// A worker by name.
    pub fn get(&self, name: &str) -> Option<Worker> {
        self.inner.workers.read().get(name).cloned()
    }

    /// A load that rode back on a reply, fresher than the registry's.
    pub fn note_load(&self, name: &str, load: Option<v1::Load>) {
        let Some(load) = load else { return };
        if let Some(worker) = self.inner.workers.write().get_mut(name) {
            worker.load.queued_tokens = load.queued_tokens;
            worker.load.running = load.running;
            worker.load.waiting = load.waiting;
            worker.load.free_blocks = load.free_blocks;
            worker.load.tokens_per_second = load.tokens_per_second;
            worker.load.draining = worker.draining(load.draining);
            worker.load.stuck = load.stuck;
        }
    }

    /// The worker was just told to drain, or to come back.
    pub fn note_draining(&self, name: &str, draining: bool) {
        if let Some(worker) = self.inner.workers.write().get_mut(name) {
            worker.load.draining = draining;
            worker.told = Some((draining, Instant::now()));
        }
        self.inner.changed.notify_waiters();
    }

    /// A connection to the worker failed.
    pub fn note_unreachable(&self, name: &str) {
        if let Some(worker) = self.inner.workers.write().get_mut(name) {
            worker.cooling_until = Some(Instant::now() + COOLING);
        }
    }

    /// Resolves when the fleet changed, or after `patience`.
    pub async fn changed(&self, patience: Duration) {
        let _ = tokio::time::timeout(patience, self.inner.changed.notified()).await;
    }

    /// Whether the registry answers now.
    pub fn is_connected(&self) -> bool {
        self.inner.connected.load(Ordering::Relaxed)
    }

    /// For `ListWorkers`.
    pub fn statuses(&self) -> Vec<v1::WorkerStatus> {
        self.inner
            .workers
            .read()
            .values()
            .map(|w| v1::WorkerStatus {
                worker: w.member.worker.clone(),
                role: w.member.role.name().into(),
                address: w.member.address.clone(),
                incarnation: w.member.incarnation,
                compat_hash: w.member.compat_hash.clone(),
                state: w.state().into(),
                transports: w.member.transports.clone(),
                block_tokens: w.member.block_tokens,
                total_blocks: w.member.total_blocks,
                free_blocks: w.load.free_blocks,
                running: w.load.running,
                waiting: w.load.waiting,
                queued_tokens: w.load.queued_tokens,
                tokens_per_second: w.load.tokens_per_second,
                auto_role: w.member.auto_role,
            })
            .collect()
    }
}

fn connect(member: &Member, tls: Option<ClusterFiles>) -> Result<Channel, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(format!("http://{}", member.address))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true);
    Ok(match tls {
        None => endpoint.connect_lazy(),
        Some(files) => tls::dial::lazy(&endpoint, files, Part::Worker(member.worker.clone())),
    })
}

async fn answers(channel: Channel) -> bool {
    let started = Instant::now();
    let check = async { HealthClient::new(channel).check(HealthCheckRequest::default()).await };
    match tokio::time::timeout(PROBE_TIMEOUT, check).await {
        Ok(Ok(reply)) => reply.into_inner().status == 1, // SERVING
        outcome => {
            tracing::debug!(?outcome, after = ?started.elapsed(), "probe failed");
            false
        }
    }
}
