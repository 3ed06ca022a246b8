//! What every Tandem server offers besides its own services: health and reflection.

use tonic::service::{Routes, RoutesBuilder};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// Adds `grpc.health.v1` and server reflection (v1 and v1alpha, so that every grpcurl works).
pub async fn with_health_and_reflection(
    mut builder: RoutesBuilder,
) -> Result<(Routes, HealthReporter), tonic_reflection::server::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", ServingStatus::Serving).await;
    let describe = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(crate::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    builder.add_service(health).add_service(describe().build_v1()?).add_service(describe().build_v1alpha()?);
    Ok((builder.routes(), reporter))
}
