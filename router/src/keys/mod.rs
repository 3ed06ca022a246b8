//! API keys: who calls, and how much they may use. The router knows hashes only; the file is read again when it changes.

mod entry;
mod guard;
mod usage;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use sha2::{Digest, Sha256};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use entry::Entry;
pub use entry::is_name;
pub use guard::{Guard, require};
use usage::Usage;

use crate::metrics::KeyMetrics;

/// Between two looks at the file.
const LOOK: Duration = Duration::from_secs(1);

/// All keys. Clones share.
#[derive(Clone)]
pub struct Keys {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    known: RwLock<Vec<Arc<Client>>>,
}

/// A key that was shown, and what its client has used.
pub struct Client {
    entry: Entry,
    usage: Arc<Mutex<Usage>>,
}

impl Keys {
    /// Reads the file of keys.
    pub fn read(path: &Path) -> Result<Self, String> {
        let known = RwLock::new(clients(load(path)?, &[]));
        Ok(Self { inner: Arc::new(Inner { path: path.to_owned(), known }) })
    }

    /// Whose key this is. Every key is compared, each in the same time wherever it differs.
    fn find(&self, key: &str) -> Option<Arc<Client>> {
        let shown: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        let known = self.inner.known.read();
        known.iter().fold(None, |found, client| {
            if is_equal(&client.entry.hash, &shown) { Some(client.clone()) } else { found }
        })
    }

    /// Reads the file again when it changes; what cannot be used leaves the old keys in place.
    pub async fn follow(self) {
        let mut seen = std::fs::read(&self.inner.path).ok();
        loop {
            tokio::time::sleep(LOOK).await;
            let path = self.inner.path.clone();
            let read = tokio::task::spawn_blocking(move || (std::fs::read(&path).ok(), load(&path))).await;
            let Ok((now, loaded)) = read else { continue };
            if now == seen {
                continue;
            }
            seen = now;
            match loaded {
                Ok(entries) => {
                    let mut known = self.inner.known.write();
                    *known = clients(entries, &known);
                    tracing::info!(keys = known.len(), "API keys changed");
                }
                Err(error) => tracing::warn!(%error, "changed API keys cannot be used; the old ones stay"),
            }
        }
    }
}

fn is_equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let difference = a.iter().zip(b).fold(0_u8, |sum, (a, b)| sum | (a ^ b));
    std::hint::black_box(difference) == 0
}

fn load(path: &Path) -> Result<Vec<Entry>, String> {
    let failed = |why: String| format!("--api-keys {}: {why}", path.display());
    let text = std::fs::read_to_string(path).map_err(|e| failed(format!("cannot be read: {e}")))?;
    entry::parse(&text).map_err(failed)
}

/// What a client has used stays with its name.
fn clients(entries: Vec<Entry>, before: &[Arc<Client>]) -> Vec<Arc<Client>> {
    let mut usages: HashMap<String, Arc<Mutex<Usage>>> =
        before.iter().map(|client| (client.entry.name.clone(), Arc::clone(&client.usage))).collect();
    let client = |entry: Entry| {
        let usage = Arc::clone(usages.entry(entry.name.clone()).or_default());
        Arc::new(Client { entry, usage })
    };
    entries.into_iter().map(client).collect()
}

impl Client {
    /// Who has the key.
    pub fn name(&self) -> &str {
        &self.entry.name
    }

    /// Counts a request in, or refuses it with the time to come back.
    pub fn begin(self: &Arc<Self>, metrics: &KeyMetrics) -> Result<Permit, Status> {
        let begun = self.usage.lock().begin(&self.entry.limits, Instant::now());
        begun.map_err(|over| {
            metrics.refused.of(over.limit).increment(1);
            let retry = ErrorDetails::with_retry_info(Some(over.after.max(Duration::from_millis(100))));
            let why = format!("the limit of this API key is reached: {}", over.limit);
            Status::with_error_details(Code::ResourceExhausted, why, retry)
        })?;
        Ok(Permit { client: Arc::clone(self) })
    }
}

/// A request of a client's that runs. Dropping it ends it.
pub struct Permit {
    client: Arc<Client>,
}

impl Permit {
    /// Whose it is.
    pub fn name(&self) -> &str {
        &self.client.entry.name
    }

    /// Turns in the queue.
    pub fn weight(&self) -> u32 {
        self.client.entry.weight
    }

    /// So many tokens were used.
    pub fn spend(&self, tokens: usize) {
        self.client.usage.lock().spend(&self.client.entry.limits, tokens, Instant::now());
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.client.usage.lock().end();
    }
}

/// A key, and the SHA-256 that the file of keys holds of it.
pub fn make(random: [u8; 32]) -> (String, String) {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let key = format!("tdm-{}", hex(&random));
    let hash = hex(&Sha256::digest(key.as_bytes()));
    (key, hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_key_is_found_and_its_usage_outlives_a_change_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        let (key, hash) = make([7; 32]);
        std::fs::write(&path, format!("alice sha256:{hash} concurrent=1\n")).unwrap();
        let keys = Keys::read(&path).unwrap();
        assert_eq!(keys.find(&key).unwrap().name(), "alice");
        assert!(keys.find("tdm-").is_none() && keys.find(&key.to_uppercase()).is_none());
        let metrics = KeyMetrics::new(&telemetry::Metrics::default());
        let permit = keys.find(&key).unwrap().begin(&metrics).unwrap();
        let changed = clients(load(&path).unwrap(), &keys.inner.known.read());
        let again = changed[0].begin(&metrics).err().unwrap();
        assert_eq!(again.code(), Code::ResourceExhausted);
        assert!(again.get_details_retry_info().is_some());
        drop(permit);
        assert!(changed[0].begin(&metrics).is_ok());
    }
}
