//! How long a first contact may take: a registry that starts beside us must not cost a worker its loaded weights,
//! an address that is wrong must still end in an error.

use std::time::{Duration, Instant};

use crate::RegistryError;

const RETRY: Duration = Duration::from_millis(500);

/// The first contact with one registry, from its first try on.
pub(crate) struct FirstContact {
    since: Instant,
    patience: Duration,
    told: bool,
}

impl FirstContact {
    pub(crate) fn new(patience: Duration) -> Self {
        Self { since: Instant::now(), patience, told: false }
    }

    /// Waits a moment and says whether to try again; only what cannot be reached is tried again. Logs once.
    pub(crate) async fn try_again(&mut self, error: &RegistryError) -> bool {
        if !matches!(error, RegistryError::Unreachable { .. }) || self.since.elapsed() >= self.patience {
            return false;
        }
        if !std::mem::replace(&mut self.told, true) {
            tracing::warn!(%error, "waiting for the registry, at most {} s", self.patience.as_secs());
        }
        tokio::time::sleep(jittered(RETRY)).await;
        true
    }
}

/// 0.75 to 1.25 of it, so that a fleet does not come back in one instant.
pub(crate) fn jittered(base: Duration) -> Duration {
    base.mul_f64(0.75 + rand::random::<f64>() / 2.0)
}
