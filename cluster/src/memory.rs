//! The registry in memory: one process, or the one that a router serves to [`crate::remote`] members.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::{BoxFuture, FutureExt};
use tokio::sync::watch;

use crate::{Entry, Join, Load, Member, Membership, Picture, RegistryError, Watch};

/// Members of this process's cluster. Clones share the same picture.
#[derive(Clone)]
pub struct MemoryRegistry {
    picture: Arc<Mutex<watch::Sender<Picture>>>,
}

impl Default for MemoryRegistry {
    fn default() -> Self {
        let picture = Picture { connected: true, ..Picture::default() };
        Self { picture: Arc::new(Mutex::new(watch::channel(picture).0)) }
    }
}

impl MemoryRegistry {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, watch::Sender<Picture>> {
        self.picture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn edit(&self, change: impl FnOnce(&mut BTreeMap<String, Entry>)) {
        self.lock().send_modify(|picture| change(Arc::make_mut(&mut picture.members)));
    }

    /// Adds or replaces a member; an older incarnation of the same name is refused.
    pub fn put(&self, member: Member, load: Load) -> Result<(), RegistryError> {
        let mut refused = None;
        self.edit(|members| match members.get(&member.worker) {
            Some(old) if old.member.incarnation > member.incarnation => {
                refused = Some(old.member.incarnation);
            }
            _ => {
                members.insert(member.worker.clone(), Entry { member: member.clone(), load });
            }
        });
        match refused {
            None => Ok(()),
            Some(newer) => Err(RegistryError::Refused(format!(
                "worker {} is registered with a later incarnation {newer}",
                member.worker
            ))),
        }
    }

    /// Updates the load of that incarnation, if it is still the member.
    pub fn set_load(&self, worker: &str, incarnation: u64, load: Load) {
        self.edit(|members| {
            if let Some(entry) = members.get_mut(worker)
                && entry.member.incarnation == incarnation
            {
                entry.load = load;
            }
        });
    }

    /// Removes that incarnation, if it is still the member.
    pub fn remove(&self, worker: &str, incarnation: u64) {
        self.edit(|members| {
            if members.get(worker).is_some_and(|e| e.member.incarnation == incarnation) {
                members.remove(worker);
            }
        });
    }
}

impl Join for MemoryRegistry {
    fn join(
        &self,
        member: Member,
        mut load: watch::Receiver<Load>,
    ) -> BoxFuture<'_, Result<Membership, RegistryError>> {
        async move {
            let first = load.borrow_and_update().clone();
            self.put(member.clone(), first)?;
            let guard = RemoveOnDrop { registry: self.clone(), member };
            Ok(Membership::spawn(|mut left| async move {
                loop {
                    tokio::select! {
                        _ = &mut left => return,
                        changed = load.changed() => match changed {
                            Ok(()) => {
                                let now = load.borrow_and_update().clone();
                                let member = &guard.member;
                                guard.registry.set_load(&member.worker, member.incarnation, now);
                            }
                            Err(_) => { let _ = left.await; return; }
                        }
                    }
                }
            }))
        }
        .boxed()
    }
}

struct RemoveOnDrop {
    registry: MemoryRegistry,
    member: Member,
}

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        self.registry.remove(&self.member.worker, self.member.incarnation);
    }
}

impl Watch for MemoryRegistry {
    fn watch(&self) -> BoxFuture<'_, Result<watch::Receiver<Picture>, RegistryError>> {
        async move { Ok(self.lock().subscribe()) }.boxed()
    }
}
