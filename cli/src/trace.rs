//! Where the spans of requests go.

use clap::Args;
use telemetry::trace::Tracer;

/// Settings of tracing.
#[derive(Debug, Clone, Default, Args)]
pub struct TraceArgs {
    /// OpenTelemetry collector that gets a trace of each request (OTLP over gRPC), e.g. http://collector:4317 [default: none]
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<String>,
    /// Share of requests that are traced, 0 to 1; those that come with a trace follow its own sampling
    #[arg(long, default_value_t = 1.0, value_parser = ratio)]
    pub trace_ratio: f64,
}

fn ratio(text: &str) -> Result<f64, String> {
    let ratio: f64 = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    if (0.0..=1.0).contains(&ratio) { Ok(ratio) } else { Err(format!("{ratio} is not between 0 and 1")) }
}

impl TraceArgs {
    /// The tracer of a process. `instance` is its name among its kind.
    pub fn tracer(&self, service: &'static str, instance: &str) -> anyhow::Result<Tracer> {
        match self.otlp_endpoint.as_deref() {
            None | Some("") => Ok(Tracer::default()),
            Some(endpoint) => Tracer::otlp(endpoint, service, instance, self.trace_ratio)
                .map_err(|e| anyhow::anyhow!("--otlp-endpoint: {e}")),
        }
    }

    /// The same, for a child process.
    pub fn flags(&self) -> Vec<String> {
        match &self.otlp_endpoint {
            None => Vec::new(),
            Some(endpoint) => {
                vec![format!("--otlp-endpoint={endpoint}"), format!("--trace-ratio={}", self.trace_ratio)]
            }
        }
    }
}

/// Sends what is left before the process ends. Blocks on the collector, so not on an async thread.
pub async fn shutdown(tracer: Tracer) {
    let _ = tokio::task::spawn_blocking(move || tracer.shutdown()).await;
}
