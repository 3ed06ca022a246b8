//! What a process shows of itself: metrics as Prometheus text, readiness, life, and the spans of its requests. See docs/METRICS.md.
//!
//! Every process owns its [`Metrics`], no global: several processes' worth of Tandem can live in one test. Every
//! series exists from the start, at zero, and the values of a label are known when it is made: cardinality is
//! bounded by construction.

pub mod http;
pub mod trace;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use metrics::{Key, KeyName, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

pub use metrics::{Counter, Gauge, Histogram};

/// Bounds of every latency histogram: 1 ms to 60 s.
const SECONDS: [f64; 16] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0];
/// Histogram samples are folded into buckets at least this often, so that their memory stays bounded.
const UPKEEP: Duration = Duration::from_secs(5);
const METADATA: Metadata<'static> = Metadata::new("tandem", Level::INFO, None);

/// One process's metrics.
pub struct Metrics {
    recorder: Arc<PrometheusRecorder>,
    handle: PrometheusHandle,
}

impl Default for Metrics {
    fn default() -> Self {
        // Only an empty list of bounds is refused.
        let builder = PrometheusBuilder::new();
        let recorder = match builder.set_buckets(&SECONDS) {
            Ok(builder) => builder.build_recorder(),
            Err(_) => PrometheusBuilder::new().build_recorder(),
        };
        let handle = recorder.handle();
        Self { recorder: Arc::new(recorder), handle }
    }
}

impl Metrics {
    /// A counter without labels.
    pub fn counter(&self, name: &'static str, help: &'static str) -> Counter {
        self.recorder.describe_counter(KeyName::from_const_str(name), None, help.into());
        self.recorder.register_counter(&Key::from_static_name(name), &METADATA)
    }

    /// A counter for each value of a label.
    pub fn counters(
        &self,
        name: &'static str,
        help: &'static str,
        label: &'static str,
        values: &[&'static str],
    ) -> Family<Counter> {
        self.recorder.describe_counter(KeyName::from_const_str(name), None, help.into());
        Family::new(values, |value| {
            let key = Key::from_parts(name, vec![Label::from_static_parts(label, value)]);
            self.recorder.register_counter(&key, &METADATA)
        })
    }

    /// A counter for each value of a label, where the values are learned while the process runs: the caller bounds them.
    pub fn named_counters(
        &self,
        name: &'static str,
        help: &'static str,
        label: &'static str,
        first: &str,
    ) -> NamedCounters {
        self.recorder.describe_counter(KeyName::from_const_str(name), None, help.into());
        let counters =
            NamedCounters { recorder: Arc::clone(&self.recorder), name, label, known: Mutex::default() };
        counters.add(first, 0);
        counters
    }

    /// A gauge without labels.
    pub fn gauge(&self, name: &'static str, help: &'static str) -> Gauge {
        self.recorder.describe_gauge(KeyName::from_const_str(name), None, help.into());
        let gauge = self.recorder.register_gauge(&Key::from_static_name(name), &METADATA);
        gauge.set(0.0);
        gauge
    }

    /// A gauge for each value of a label.
    pub fn gauges(
        &self,
        name: &'static str,
        help: &'static str,
        label: &'static str,
        values: &[&'static str],
    ) -> Family<Gauge> {
        self.recorder.describe_gauge(KeyName::from_const_str(name), None, help.into());
        Family::new(values, |value| {
            let key = Key::from_parts(name, vec![Label::from_static_parts(label, value)]);
            let gauge = self.recorder.register_gauge(&key, &METADATA);
            gauge.set(0.0);
            gauge
        })
    }

    /// What this process is: a gauge that is always 1, for its labels.
    pub fn info(&self, labels: &[(&'static str, &str)]) {
        const NAME: &str = "tandem_build_info";
        self.recorder.describe_gauge(
            KeyName::from_const_str(NAME),
            None,
            "What this process is; always 1.".into(),
        );
        let labels: Vec<Label> =
            labels.iter().map(|(label, value)| Label::new(*label, (*value).to_owned())).collect();
        self.recorder.register_gauge(&Key::from_parts(NAME, labels), &METADATA).set(1.0);
    }

    /// A histogram of seconds.
    pub fn seconds(&self, name: &'static str, help: &'static str) -> Histogram {
        self.recorder.describe_histogram(KeyName::from_const_str(name), None, help.into());
        self.recorder.register_histogram(&Key::from_static_name(name), &METADATA)
    }

    /// A histogram of seconds for each value of a label.
    pub fn seconds_by(
        &self,
        name: &'static str,
        help: &'static str,
        label: &'static str,
        values: &[&'static str],
    ) -> Family<Histogram> {
        self.recorder.describe_histogram(KeyName::from_const_str(name), None, help.into());
        Family::new(values, |value| {
            let key = Key::from_parts(name, vec![Label::from_static_parts(label, value)]);
            self.recorder.register_histogram(&key, &METADATA)
        })
    }

    /// The page, and the task that keeps its memory bounded for as long as the page lives.
    pub fn page(self, collect: impl Fn() + Send + Sync + 'static) -> http::Page {
        let handle = self.handle.clone();
        let upkeep = tokio::spawn(async move {
            let mut tick = tokio::time::interval(UPKEEP);
            loop {
                tick.tick().await;
                handle.run_upkeep();
            }
        });
        http::Page::new(self.handle, Box::new(collect), upkeep)
    }
}

/// Counters by a label's values, made when first used.
pub struct NamedCounters {
    recorder: Arc<PrometheusRecorder>,
    name: &'static str,
    label: &'static str,
    known: Mutex<HashMap<String, Counter>>,
}

impl NamedCounters {
    /// Adds to the counter of that value.
    pub fn add(&self, value: &str, much: u64) {
        let Ok(mut known) = self.known.lock() else { return };
        if let Some(counter) = known.get(value) {
            return counter.increment(much);
        }
        let key = Key::from_parts(self.name, vec![Label::new(self.label, value.to_owned())]);
        let counter = self.recorder.register_counter(&key, &METADATA);
        counter.increment(much);
        known.insert(value.to_owned(), counter);
    }
}

/// One metric for each value of a label, all known from the start.
pub struct Family<M> {
    values: Vec<(&'static str, M)>,
    rest: M,
}

impl<M: Clone> Family<M> {
    /// The last value stands for all that are not listed.
    fn new(values: &[&'static str], make: impl Fn(&'static str) -> M) -> Self {
        let values: Vec<_> = values.iter().map(|value| (*value, make(value))).collect();
        let rest = match values.last() {
            Some((_, last)) => last.clone(),
            None => make("other"),
        };
        Self { values, rest }
    }

    /// The metric of that value; the last one's when it is not listed.
    pub fn of(&self, value: &str) -> &M {
        self.values.iter().find(|(known, _)| *known == value).map_or(&self.rest, |(_, metric)| metric)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_series_is_there_from_the_start() {
        let metrics = Metrics::default();
        let ends = metrics.counters("tandem_ends_total", "Ends.", "how", &["ok", "other"]);
        let wait = metrics.seconds("tandem_wait_seconds", "Wait.");
        let level = metrics.gauge("tandem_level", "Level.");
        ends.of("ok").increment(2);
        ends.of("never heard of").increment(1);
        wait.record(0.003);
        let page = metrics.page(move || level.set(7.0));
        let text = page.render();
        for line in [
            "# TYPE tandem_ends_total counter",
            "# HELP tandem_ends_total Ends.",
            "tandem_ends_total{how=\"ok\"} 2",
            "tandem_ends_total{how=\"other\"} 1",
            "tandem_wait_seconds_bucket{le=\"0.005\"} 1",
            "tandem_wait_seconds_bucket{le=\"0.002\"} 0",
            "tandem_level 7",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
