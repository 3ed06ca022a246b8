//! Who is alive, willing and how loaded.
//!
//! Workers [`Join`], the router [`Watch`]es. Three ways to meet: [`etcd`] for deployments, [`memory`] for
//! one process, and [`remote`], which joins the memory registry of a router over gRPC. Knows nothing of
//! models or tokens beyond what a member says of itself.

pub mod etcd;
pub mod etcd_access;
pub mod member;
pub mod memory;
mod patience;
pub mod remote;

pub use etcd::EtcdRegistry;
pub use etcd_access::EtcdAccess;
pub use member::{Load, Member, Role};
pub use memory::MemoryRegistry;
pub use remote::RemoteRegistry;

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::BoxFuture;
use tokio::sync::watch;

/// The fleet as the registry last told it.
#[derive(Debug, Clone, Default)]
pub struct Picture {
    /// Members by worker name.
    pub members: Arc<BTreeMap<String, Entry>>,
    /// Whether the registry answers now. When it does not, `members` is the last picture, and stays:
    /// unreachable is not gone.
    pub connected: bool,
}

/// One member and its load.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// What it is.
    pub member: Member,
    /// How busy it said it was.
    pub load: Load,
}

/// What can go wrong; each variant is something someone does.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The registry cannot be reached: check its address and that it runs.
    #[error("registry {address} cannot be reached: {reason}")]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// What the connection said.
        reason: String,
    },
    /// It answered with a refusal: fix the configuration (authentication, cluster name, version).
    #[error("registry refused: {0}")]
    Refused(String),
}

/// The side of a worker.
pub trait Join: Send + Sync {
    /// Becomes a member. Returns once the member is visible, or with the first error; after that the
    /// membership heals itself (same name, same incarnation) until the guard goes.
    ///
    /// `load` is published on change, at most about once a second.
    fn join(
        &self,
        member: Member,
        load: watch::Receiver<Load>,
    ) -> BoxFuture<'_, Result<Membership, RegistryError>>;
}

/// The side of a router.
pub trait Watch: Send + Sync {
    /// A live picture of the fleet. The first value is complete.
    fn watch(&self) -> BoxFuture<'_, Result<watch::Receiver<Picture>, RegistryError>>;
}

/// Being a member. Dropping it leaves without waiting for the registry to hear of it.
#[must_use = "dropping a membership leaves the cluster"]
pub struct Membership {
    leave: Option<tokio::sync::oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
}

impl Membership {
    /// Runs `keep` until told to leave; `keep` gets a receiver that resolves then.
    pub(crate) fn spawn<F>(keep: impl FnOnce(tokio::sync::oneshot::Receiver<()>) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (leave, left) = tokio::sync::oneshot::channel();
        Self { leave: Some(leave), task: tokio::spawn(keep(left)) }
    }

    /// Leaves and waits (at most `patience`) until the registry knows.
    pub async fn leave(mut self, patience: std::time::Duration) {
        self.leave.take();
        let _ = tokio::time::timeout(patience, &mut self.task).await;
    }

    /// Stops without a word, as a killed process would; for tests of what the others see.
    pub fn vanish(mut self) {
        self.task.abort();
        if let Some(leave) = self.leave.take() {
            std::mem::forget(leave);
        }
    }
}
