//! How the router's model did: what placement expected until the first token, beside what came.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::record::{Course, Quantiles, Recorder};
use super::target::Forecast;

/// The answers of one way.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Forecasts {
    /// How many.
    pub answers: usize,
    /// What was expected.
    pub expected_ms: Quantiles,
    /// What came.
    pub measured_ms: Quantiles,
    /// How far apart the two were, either way.
    pub error_ms: Quantiles,
    /// Sum of what was expected over the sum of what came: above 1 the model is a pessimist.
    pub bias: f64,
}

impl Forecasts {
    fn of(forecasts: &[Forecast]) -> Self {
        let quantiles = |of: fn(&Forecast) -> f64| {
            let mut recorder = Recorder::new();
            forecasts.iter().for_each(|forecast| recorder.add(millis(of(forecast)), 1));
            recorder.quantiles()
        };
        let sum = |of: fn(&Forecast) -> f64| forecasts.iter().map(of).sum::<f64>();
        Self {
            answers: forecasts.len(),
            expected_ms: quantiles(|f| f.expected_ms),
            measured_ms: quantiles(|f| f.measured_ms),
            error_ms: quantiles(|f| (f.expected_ms - f.measured_ms).abs()),
            bias: sum(|f| f.expected_ms) / sum(|f| f.measured_ms).max(f64::MIN_POSITIVE),
        }
    }
}

/// A time that no clock could hold is 0.
fn millis(ms: f64) -> Duration {
    Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default()
}

/// `local`: prefilled on the decode worker; `remote`: on a prefill worker.
pub(super) fn by_way(courses: &[&Course]) -> BTreeMap<&'static str, Forecasts> {
    let mut ways: BTreeMap<&'static str, Vec<Forecast>> = BTreeMap::new();
    let told = courses.iter().filter_map(|course| course.outcome.as_ref().ok()?.forecast);
    told.for_each(|forecast| {
        ways.entry(if forecast.is_local { "local" } else { "remote" }).or_default().push(forecast)
    });
    ways.into_iter().map(|(way, forecasts)| (way, Forecasts::of(&forecasts))).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Instant;

    use super::*;
    use crate::serve::target::{Answered, Failure};

    #[test]
    fn ways_are_told_apart_and_silence_is_no_forecast() {
        let now = Instant::now();
        let course = |outcome| Course { due: now, sent: now, outcome, ended: now, prompt: 1 };
        let told = |is_local, expected_ms, measured_ms| {
            let forecast = Some(Forecast { is_local, expected_ms, measured_ms });
            course(Ok(Answered { times: Vec::new(), forecast }))
        };
        let courses = [
            told(true, 90.0, 100.0),
            told(true, 330.0, 300.0),
            told(false, 1e300, 50.0),
            course(Ok(Answered::default())),
            course(Err(Failure::Shed)),
        ];
        let ways = by_way(&courses.iter().collect::<Vec<_>>());
        assert_eq!(ways.keys().copied().collect::<Vec<_>>(), ["local", "remote"]);
        let local = &ways["local"];
        assert_eq!(local.answers, 2);
        assert!((local.bias - 1.05).abs() < 1e-9, "{local:?}");
        assert!(
            (local.error_ms.max - 30.0).abs() < 0.1 && (local.error_ms.p50 - 10.0).abs() < 0.1,
            "{local:?}"
        );
        assert_eq!(ways["remote"].expected_ms.max, 0.001);
    }
}
