//! `WorkerControl`: out of placement and back, told by an operator over the router.

use std::sync::Arc;

use cluster::Load;
use proto::v1;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

/// On every worker.
pub(crate) struct Control {
    /// What the engine's loop, the registry and health follow.
    pub load: Arc<watch::Sender<Load>>,
    /// Set once the process is told to end.
    pub stop: CancellationToken,
}

#[tonic::async_trait]
impl v1::worker_control_server::WorkerControl for Control {
    async fn set_draining(
        &self,
        call: Request<v1::SetDrainingRequest>,
    ) -> Result<Response<v1::SetDrainingReply>, Status> {
        let draining = call.into_inner().draining;
        if !draining && self.stop.is_cancelled() {
            return Err(Status::failed_precondition("the worker is stopping and cannot come back"));
        }
        self.load.send_modify(|load| load.draining = draining);
        tracing::info!(draining, "told by an operator");
        let load = self.load.borrow();
        Ok(Response::new(v1::SetDrainingReply { sequences: load.running + load.waiting }))
    }
}

/// Keeps `ready` true while the worker takes requests.
pub(crate) async fn follow_readiness(mut load: watch::Receiver<Load>, ready: watch::Sender<bool>) {
    loop {
        let is_ready = load.borrow_and_update().is_open();
        ready.send_if_modified(|old| std::mem::replace(old, is_ready) != is_ready);
        if load.changed().await.is_err() {
            return;
        }
    }
}
