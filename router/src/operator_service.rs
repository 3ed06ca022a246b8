//! `tandem.v1.Operator`: what an operator tells workers, over the router.

use std::time::Duration;

use proto::v1;
use proto::v1::worker_control_client::WorkerControlClient;
use tonic::{Code, Request, Response, Status};

use crate::fleet::Fleet;
use crate::status::Board;

const PATIENCE: Duration = Duration::from_secs(5);

/// The gRPC face for operators.
pub struct OperatorService {
    /// The workers.
    pub fleet: Fleet,
    /// What was seen.
    pub board: Board,
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
        let Some(worker) = self.fleet.get(&call.worker) else {
            let known: Vec<String> = self.fleet.statuses().into_iter().map(|w| w.worker).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(Status::not_found(format!("worker {} is not known; known: {known}", call.worker)));
        };
        let mut client = WorkerControlClient::new(worker.channel);
        let reply = match tokio::time::timeout(PATIENCE, client.set_draining(call.clone())).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(status)) if status.code() == Code::FailedPrecondition => return Err(status),
            Ok(Err(status)) => {
                let why = format!("worker {} cannot be told: {}", call.worker, status.message());
                return Err(Status::unavailable(why));
            }
            Err(_) => return Err(Status::unavailable(format!("worker {} does not answer", call.worker))),
        };
        self.fleet.note_draining(&call.worker, call.draining);
        Ok(reply)
    }
}
