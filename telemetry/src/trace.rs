//! Spans of requests, sent to an OpenTelemetry collector (OTLP over gRPC). One trace goes through router and workers:
//! the W3C `traceparent` header carries it over every call.
//!
//! A span is made by whoever knows when something began and ended; nothing is global and nothing is traced while no
//! collector is named.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span as _, SpanBuilder, SpanKind, Status, TraceContextExt, TracerProvider};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};

/// The header that names the span a call belongs to (<https://www.w3.org/TR/trace-context/>).
pub const TRACEPARENT: &str = "traceparent";
/// How long the last spans may take on their way out.
const FLUSH: Duration = Duration::from_secs(5);

/// Where a process's spans go. Clones share.
#[derive(Clone, Default)]
pub struct Tracer(Option<Sending>);

#[derive(Clone)]
struct Sending {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl std::fmt::Debug for Tracer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracer").field("on", &self.0.is_some()).finish()
    }
}

impl Tracer {
    /// Sends to a collector at `endpoint` (`http://host:4317`), as `service`, of this process `instance`. Requests that
    /// come with a trace follow its sampling; of the others, `ratio` (0 to 1) are traced. Needs a tokio runtime.
    pub fn otlp(endpoint: &str, service: &'static str, instance: &str, ratio: f64) -> Result<Self, String> {
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).build();
        let exporter = exporter.map_err(|e| format!("{endpoint}: {e}"))?;
        let resource = Resource::builder()
            .with_service_name(service)
            .with_attribute(KeyValue::new("service.namespace", "tandem"))
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .with_attribute(KeyValue::new("service.instance.id", instance.to_owned()))
            .build();
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio)));
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_sampler(sampler)
            .with_resource(resource)
            .build();
        Ok(Self(Some(Sending { tracer: provider.tracer("tandem"), provider })))
    }

    /// Begins a span that serves a call; `parent` is the call's `traceparent`.
    pub fn serve(&self, name: impl Into<String>, parent: Option<&str>) -> Span {
        let Some(sending) = &self.0 else { return Span::default() };
        let carrier: HashMap<String, String> =
            parent.map(|parent| (TRACEPARENT.to_owned(), parent.to_owned())).into_iter().collect();
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &carrier);
        let builder = SpanBuilder::from_name(name.into()).with_kind(SpanKind::Server);
        let span = builder.start_with_context(&sending.tracer, &parent);
        if !span.span_context().is_sampled() {
            return Span { context: Some(parent.with_span(span)), tracer: None };
        }
        Span { context: Some(Context::new().with_span(span)), tracer: Some(sending.tracer.clone()) }
    }

    /// Sends what is left; at most a few seconds. Blocks.
    pub fn shutdown(&self) {
        if let Some(sending) = &self.0 {
            let _ = sending.provider.shutdown_with_timeout(FLUSH);
        }
    }
}

/// A span under way; ends when dropped.
#[derive(Debug, Default)]
pub struct Span {
    context: Option<Context>,
    tracer: Option<SdkTracer>,
}

impl Span {
    /// What a call made on behalf of this span carries as `traceparent`.
    pub fn traceparent(&self) -> Option<String> {
        let context = self.context.as_ref()?;
        let mut carrier = HashMap::new();
        TraceContextPropagator::new().inject_context(context, &mut carrier);
        carrier.remove(TRACEPARENT)
    }

    /// Whether anybody will see it.
    pub fn is_on(&self) -> bool {
        self.tracer.is_some()
    }

    /// Notes a fact.
    pub fn set(&self, name: &'static str, value: impl Into<Value>) {
        if let Some(context) = self.context.as_ref().filter(|_| self.is_on()) {
            context.span().set_attribute(KeyValue::new(name, value.into()));
        }
    }

    /// Notes several facts of one kind.
    pub fn set_list(&self, name: &'static str, values: Vec<&'static str>) {
        let values: Vec<StringValue> = values.into_iter().map(StringValue::from).collect();
        self.set(name, Value::Array(Array::from(values)));
    }

    /// Notes that something happened now.
    pub fn event(&self, name: &'static str) {
        if let Some(context) = self.context.as_ref().filter(|_| self.is_on()) {
            context.span().add_event(name, Vec::new());
        }
    }

    /// It failed for this reason (a gRPC status code's name).
    pub fn fail(&self, kind: &'static str, message: &str) {
        if let Some(context) = self.context.as_ref().filter(|_| self.is_on()) {
            context.span().set_attribute(KeyValue::new("error.type", kind));
            context.span().set_status(Status::error(message.to_owned()));
        }
    }

    /// A part of it that began and ended at these instants.
    pub fn part(&self, name: &'static str, began: Instant, ended: Instant) {
        if let (Some(context), Some(tracer)) = (&self.context, &self.tracer) {
            let part = SpanBuilder::from_name(name).with_start_time(wall(began));
            let mut part = part.start_with_context(tracer, context);
            part.end_with_timestamp(wall(ended.max(began)));
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(context) = &self.context {
            context.span().end();
        }
    }
}

/// The wall clock at an instant of the recent past.
fn wall(at: Instant) -> SystemTime {
    SystemTime::now() - at.elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_collector_nothing_is_carried() {
        let span =
            Tracer::default().serve("x", Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"));
        assert!(!span.is_on() && span.traceparent().is_none());
        span.set("a", 1);
        span.part("b", Instant::now(), Instant::now());
    }

    #[tokio::test]
    async fn a_trace_goes_on_and_bad_headers_begin_a_new_one() {
        let tracer = Tracer::otlp("http://127.0.0.1:9", "test", "one", 1.0).unwrap();
        let trace = "0af7651916cd43dd8448eb211c80319c";
        let span = tracer.serve("x", Some(&format!("00-{trace}-b7ad6b7169203331-01")));
        let carried = span.traceparent().unwrap();
        assert!(carried.starts_with(&format!("00-{trace}-")) && !carried.contains("b7ad6b7169203331"));
        // The client's own sampling holds.
        let span = tracer.serve("x", Some(&format!("00-{trace}-b7ad6b7169203331-00")));
        assert!(!span.is_on());
        assert!(span.traceparent().unwrap().ends_with("-00"));
        for bad in ["", "nonsense", "00-0-0-01"] {
            let span = tracer.serve("x", Some(bad));
            assert!(span.is_on() && !span.traceparent().unwrap().contains(trace));
        }
    }
}
