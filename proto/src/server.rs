//! What every Tandem server offers besides its own services: health and reflection.

use tokio::sync::watch;
use tonic::service::{Routes, RoutesBuilder};
use tonic_health::ServingStatus;

/// Adds `grpc.health.v1`, which follows `ready`, and server reflection (v1 and v1alpha, so that every grpcurl
/// works).
pub async fn with_health_and_reflection(
    mut builder: RoutesBuilder,
    mut ready: watch::Receiver<bool>,
) -> Result<Routes, tonic_reflection::server::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let status = |ready| if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    let now = status(*ready.borrow_and_update());
    reporter.set_service_status("", now).await;
    tokio::spawn(async move {
        while ready.changed().await.is_ok() {
            let now = status(*ready.borrow_and_update());
            reporter.set_service_status("", now).await;
        }
    });
    let describe = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(crate::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    builder.add_service(health).add_service(describe().build_v1()?).add_service(describe().build_v1alpha()?);
    Ok(builder.routes())
}
