//! All connections to one peer, and the pushes that take turns on them.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::error::{PushError, Refusal};
use crate::job::Job;
use crate::push::{PushShared, ROUNDS};
use crate::stats::SenderCounters;
use crate::transport::Transport;

/// Warm connections to one incarnation of one receiver. Each is served by a task of its own; all take frames from
/// the same pushes in turn, so an idle connection helps a busy push. Losing one connection ends the link.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) counters: Arc<SenderCounters>,
    /// Wakes one connection that may take frames.
    pub(crate) work: Notify,
    /// Ends every connection.
    pub(crate) stop: CancellationToken,
    /// Connections whose queue pair is up, or about to be: while there is one, cells wait for it.
    lanes: watch::Sender<usize>,
    /// Why the peer is used over TCP although RDMA was wanted.
    why_tcp: Mutex<String>,
    /// How the peer reads our memory, if it does.
    pub(crate) lent: Option<Transport>,
    /// Whether a push to it was packed.
    pub(crate) packs: AtomicBool,
    /// Pushes so far.
    rounds: AtomicU32,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    pushes: HashMap<u128, Arc<PushShared>>,
    ready: VecDeque<Arc<PushShared>>,
    dead: bool,
}

impl Link {
    pub(crate) fn new(counters: Arc<SenderCounters>, lanes: usize, lent: Option<Transport>) -> Self {
        Self {
            counters,
            work: Notify::new(),
            stop: CancellationToken::new(),
            lanes: watch::Sender::new(lanes),
            why_tcp: Mutex::default(),
            lent,
            packs: AtomicBool::new(false),
            rounds: AtomicU32::new(0),
            inner: Mutex::default(),
        }
    }

    /// What tells the frames of a push from those of an earlier one; never 0.
    pub(crate) fn next_round(&self) -> u32 {
        self.rounds.fetch_add(1, Ordering::Relaxed) % ROUNDS + 1
    }

    /// Whether cells go by RDMA, or soon will.
    pub(crate) fn has_lanes(&self) -> bool {
        *self.lanes.borrow() > 0
    }

    /// Waits until cells go over TCP.
    pub(crate) async fn lanes_gone(&self) {
        // The sender is `self`: it cannot be dropped meanwhile.
        let _ = self.lanes.subscribe().wait_for(|lanes| *lanes == 0).await;
    }

    /// A lane comes or goes. Without any, every connection takes part again.
    pub(crate) fn count_lane(&self, comes: bool) {
        self.lanes.send_modify(|lanes| *lanes = if comes { *lanes + 1 } else { lanes.saturating_sub(1) });
    }

    /// Keeps the reason of a fallback; true when it is another than the last one.
    pub(crate) fn falls_back(&self, reason: &str) -> bool {
        let mut why = self.why_tcp.lock();
        let new = *why != reason;
        reason.clone_into(&mut why);
        new
    }

    /// Why the peer is used over TCP.
    pub(crate) fn why_tcp(&self) -> String {
        self.why_tcp.lock().clone()
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.inner.lock().dead
    }

    pub(crate) fn pushes(&self) -> usize {
        self.inner.lock().pushes.len()
    }

    /// Takes part from now on, unless the link is dead or another push uses the same ticket.
    pub(crate) fn add(&self, push: &Arc<PushShared>) -> Result<(), PushError> {
        let mut inner = self.inner.lock();
        if inner.dead {
            return Err(PushError::PeerGone);
        }
        match inner.pushes.entry(push.ticket.transfer) {
            Entry::Occupied(_) => Err(PushError::Refused(Refusal::Taken)),
            Entry::Vacant(place) => {
                place.insert(push.clone());
                Ok(())
            }
        }
    }

    /// The push is over. What it still has to say (an abort) is said.
    pub(crate) fn remove(&self, push: &Arc<PushShared>) {
        let mut inner = self.inner.lock();
        let known = inner.pushes.get(&push.ticket.transfer).is_some_and(|known| Arc::ptr_eq(known, push));
        let removed = if known { inner.pushes.remove(&push.ticket.transfer) } else { None };
        drop(inner);
        drop(removed);
        // A connection with a queue pair says when nothing of it is in flight any more.
        self.work.notify_waiters();
    }

    pub(crate) fn push(&self, transfer: u128) -> Option<Arc<PushShared>> {
        self.inner.lock().pushes.get(&transfer).cloned()
    }

    /// Whether a transfer is still under way here.
    pub(crate) fn knows(&self, transfer: u128) -> bool {
        self.inner.lock().pushes.contains_key(&transfer)
    }

    /// The push has something to send.
    pub(crate) fn list(&self, push: &Arc<PushShared>) {
        if push.listed.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut inner = self.inner.lock();
        if inner.dead {
            return;
        }
        inner.ready.push_back(push.clone());
        drop(inner);
        self.work.notify_one();
    }

    /// The next frame of the next push in turn, with its commit if `along` and there is nothing between.
    pub(crate) fn take(&self, along: bool) -> Option<(Arc<PushShared>, Job)> {
        loop {
            let push = self.inner.lock().ready.pop_front()?;
            // Cleared before the look inside, so that whoever adds something meanwhile lists it again.
            push.listed.store(false, Ordering::Release);
            let (job, more) = push.next(along);
            if more {
                self.list(&push);
            }
            if let Some(job) = job {
                return Some((push, job));
            }
        }
    }

    /// Closes the link when nobody uses it; true when it is closed now.
    pub(crate) fn close_if_idle(&self) -> bool {
        let mut inner = self.inner.lock();
        let idle = inner.pushes.is_empty() && inner.ready.is_empty();
        inner.dead |= idle;
        let dead = inner.dead;
        drop(inner);
        if dead {
            self.stop.cancel();
        }
        dead
    }

    /// No push goes on, but the link does.
    pub(crate) fn fail_pushes(&self, why: &PushError) {
        let pushes: Vec<_> = self.inner.lock().pushes.values().cloned().collect();
        for push in pushes {
            push.fail(why.clone());
        }
    }

    /// A connection is lost: the link and everything on it is over.
    pub(crate) fn die(&self, why: &PushError) {
        let mut inner = self.inner.lock();
        inner.dead = true;
        let pushes = std::mem::take(&mut inner.pushes);
        let ready = std::mem::take(&mut inner.ready);
        drop(inner);
        self.stop.cancel();
        drop(ready);
        for push in pushes.into_values() {
            push.fail(why.clone());
        }
    }
}
