//! KEDA's external scaler: one replica is worth 1, the metric is the number of workers that the pool should have.

use std::pin::Pin;

use futures::Stream;
use planner::Pool;
use proto::keda::external_scaler_server::ExternalScaler;
use proto::keda::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, MetricSpec, MetricValue,
    ScaledObjectRef,
};
use tokio::sync::watch;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};

use crate::Sizes;

/// The service.
pub struct Scaler {
    sizes: watch::Receiver<Sizes>,
}

impl Scaler {
    /// Offers what is planned.
    pub fn new(sizes: watch::Receiver<Sizes>) -> Self {
        Self { sizes }
    }

    fn size(&self, pool: Pool) -> Result<usize, Status> {
        let unknown = || Status::unavailable("the cluster was not seen yet");
        self.sizes.borrow().map(|sizes| sizes[pool as usize]).ok_or_else(unknown)
    }
}

fn pool(of: &ScaledObjectRef) -> Result<Pool, Status> {
    match of.scaler_metadata.get("pool").map(String::as_str) {
        Some("prefill") => Ok(Pool::Prefill),
        Some("decode") => Ok(Pool::Decode),
        other => Err(Status::invalid_argument(format!(
            "the trigger's metadata `pool` is {}, and must be prefill or decode",
            other.map_or("missing".to_owned(), |o| format!("{o:?}"))
        ))),
    }
}

fn metric(pool: Pool) -> &'static str {
    match pool {
        Pool::Prefill => "tandem-prefill-workers",
        Pool::Decode => "tandem-decode-workers",
    }
}

#[tonic::async_trait]
impl ExternalScaler for Scaler {
    async fn is_active(&self, of: Request<ScaledObjectRef>) -> Result<Response<IsActiveResponse>, Status> {
        let result = self.size(pool(of.get_ref())?)? > 0;
        Ok(Response::new(IsActiveResponse { result }))
    }

    type StreamIsActiveStream = Pin<Box<dyn Stream<Item = Result<IsActiveResponse, Status>> + Send>>;

    async fn stream_is_active(
        &self,
        of: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamIsActiveStream>, Status> {
        let pool = pool(of.get_ref())?;
        let mut last = None;
        let changes = WatchStream::new(self.sizes.clone()).filter_map(move |sizes| {
            let result = sizes?[pool as usize] > 0;
            (last.replace(result) != Some(result)).then_some(Ok(IsActiveResponse { result }))
        });
        Ok(Response::new(Box::pin(changes)))
    }

    async fn get_metric_spec(
        &self,
        of: Request<ScaledObjectRef>,
    ) -> Result<Response<GetMetricSpecResponse>, Status> {
        let metric_name = metric(pool(of.get_ref())?).to_owned();
        let spec = MetricSpec { metric_name, target_size: 1, target_size_float: 1.0 };
        Ok(Response::new(GetMetricSpecResponse { metric_specs: vec![spec] }))
    }

    async fn get_metrics(
        &self,
        asked: Request<GetMetricsRequest>,
    ) -> Result<Response<GetMetricsResponse>, Status> {
        let missing = || Status::invalid_argument("scaledObjectRef is missing");
        let pool = pool(asked.get_ref().scaled_object_ref.as_ref().ok_or_else(missing)?)?;
        let size = self.size(pool)?;
        // Both fields: KEDA reads the float, and the integer where the float is 0.
        let value = MetricValue {
            metric_name: metric(pool).to_owned(),
            metric_value: size as i64,
            metric_value_float: size as f64,
        };
        Ok(Response::new(GetMetricsResponse { metric_values: vec![value] }))
    }
}
