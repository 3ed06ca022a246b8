//! `WorkerControl`: out of placement and back, or to the other pool, told by an operator over the router.

use std::sync::Arc;

use cluster::{Load, Role};
use proto::v1;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::probe::{self, Probe};

/// On every worker.
pub(crate) struct Control {
    /// What the engine's loop, the registry and health follow.
    pub load: Arc<watch::Sender<Load>>,
    /// Set once the worker is told to end, or to go on in the other pool.
    pub stop: CancellationToken,
    /// Test pushes.
    pub probe: Arc<dyn Probe>,
    /// Its role.
    pub role: Role,
    /// Where the next one is told, when it may change.
    pub next_role: Option<Arc<watch::Sender<Role>>>,
}

impl Control {
    /// Running or waiting now.
    fn sequences(&self) -> u32 {
        let load = self.load.borrow();
        load.running + load.waiting
    }
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
        Ok(Response::new(v1::SetDrainingReply { sequences: self.sequences() }))
    }

    async fn set_role(
        &self,
        call: Request<v1::SetRoleRequest>,
    ) -> Result<Response<v1::SetRoleReply>, Status> {
        let role = call.into_inner().role.parse::<Role>();
        let role = role.map_err(|why| Status::invalid_argument(format!("role: {why}")))?;
        let Some(next_role) = &self.next_role else {
            let why = format!(
                "its role is fixed: it was started as a {0} worker; start it with `tandem worker --role auto --start-as {0}`",
                self.role.name()
            );
            return Err(Status::failed_precondition(why));
        };
        if self.stop.is_cancelled() {
            return Err(Status::failed_precondition("the worker is stopping or changes its role already"));
        }
        let switching = role != self.role;
        if switching {
            tracing::info!(from = self.role.name(), to = role.name(), "told to change its role");
            next_role.send_replace(role);
            self.stop.cancel();
        }
        Ok(Response::new(v1::SetRoleReply { switching, sequences: self.sequences() }))
    }

    async fn clock(&self, _call: Request<v1::ClockRequest>) -> Result<Response<v1::ClockReply>, Status> {
        Ok(Response::new(v1::ClockReply { unix_ms: probe::unix_ms() }))
    }

    async fn reserve_probe(
        &self,
        call: Request<v1::ReserveProbeRequest>,
    ) -> Result<Response<v1::ReserveProbeReply>, Status> {
        let call = call.into_inner();
        let ticket = self.probe.reserve(call.bytes, call.from)?;
        Ok(Response::new(v1::ReserveProbeReply { ticket }))
    }

    async fn push_probe(
        &self,
        call: Request<v1::PushProbeRequest>,
    ) -> Result<Response<v1::PushProbeReply>, Status> {
        self.probe.push(call.into_inner().ticket).await.map(Response::new)
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
