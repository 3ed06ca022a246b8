//! `tandem.v1.Operator`: what an operator tells workers, over the router.

use std::time::Duration;

use cluster::Role;
use proto::v1;
use proto::v1::worker_control_client::WorkerControlClient;
use tonic::{Code, Request, Response, Status};

use crate::fleet::{Fleet, Worker};
use crate::probing;
use crate::status::Board;

const PATIENCE: Duration = Duration::from_secs(5);

/// The gRPC face for operators.
pub struct OperatorService {
    /// The workers.
    pub fleet: Fleet,
    /// What was seen.
    pub board: Board,
}

impl OperatorService {
    fn worker(&self, name: &str) -> Result<Worker, Status> {
        self.fleet.get(name).ok_or_else(|| {
            let known: Vec<String> = self.fleet.statuses().into_iter().map(|w| w.worker).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            Status::not_found(format!("worker {name} is not known; known: {known}"))
        })
    }

    /// A pool without a worker serves nobody, or makes every decode worker prefill.
    fn check_not_last(&self, worker: &Worker) -> Result<(), Status> {
        let (name, role) = (&worker.member.worker, worker.member.role);
        let others = self.fleet.statuses().into_iter();
        let mut others = others.filter(|w| w.role == role.name() && w.state == "ready" && w.worker != *name);
        match others.next() {
            Some(_) => Ok(()),
            None => Err(Status::failed_precondition(format!(
                "{name} is the last {} worker that takes requests; start another one first, or use --force",
                role.name()
            ))),
        }
    }
}

/// A worker's answer, or why there is none.
pub(crate) async fn told<T>(
    worker: &str,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<Response<T>, Status> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(Err(status))
            if matches!(
                status.code(),
                Code::FailedPrecondition | Code::InvalidArgument | Code::ResourceExhausted
            ) =>
        {
            Err(Status::new(status.code(), format!("worker {worker}: {}", status.message())))
        }
        Ok(Err(status)) => {
            Err(Status::unavailable(format!("worker {worker} cannot be told: {}", status.message())))
        }
        Ok(reply) => reply,
        Err(_) => Err(Status::unavailable(format!("worker {worker} does not answer"))),
    }
}

#[tonic::async_trait]
impl v1::operator_server::Operator for OperatorService {
    async fn get_status(
        &self,
        _call: Request<v1::GetStatusRequest>,
    ) -> Result<Response<v1::ClusterStatus>, Status> {
        Ok(Response::new(self.board.status()))
    }

    async fn set_draining(
        &self,
        call: Request<v1::SetDrainingRequest>,
    ) -> Result<Response<v1::SetDrainingReply>, Status> {
        let call = call.into_inner();
        let mut client = WorkerControlClient::new(self.worker(&call.worker)?.channel);
        let reply = told(&call.worker, client.set_draining(call.clone())).await?;
        self.fleet.note_draining(&call.worker, call.draining);
        Ok(reply)
    }

    async fn probe(&self, call: Request<v1::ProbeRequest>) -> Result<Response<v1::ProbeReply>, Status> {
        let call = call.into_inner();
        let (from, to) = (self.worker(&call.from)?, self.worker(&call.to)?);
        probing::probe(&from, &to, call.bytes).await.map(Response::new)
    }

    async fn set_role(
        &self,
        call: Request<v1::SetRoleRequest>,
    ) -> Result<Response<v1::SetRoleReply>, Status> {
        let call = call.into_inner();
        let role = call.role.parse::<Role>();
        let role = role.map_err(|why| Status::invalid_argument(format!("role: {why}")))?;
        let worker = self.worker(&call.worker)?;
        if role != worker.member.role && !call.force {
            self.check_not_last(&worker)?;
        }
        let mut client = WorkerControlClient::new(worker.channel);
        let reply = told(&call.worker, client.set_role(call.clone())).await?;
        if reply.get_ref().switching {
            self.fleet.note_draining(&call.worker, true);
        }
        Ok(reply)
    }
}
