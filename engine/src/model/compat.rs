//! The hash that two workers must share before one may write into the other's KV.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

use super::config::ModelConfig;
use super::weights::weight_files;
use crate::EngineError;

/// Slices of tensor data that enter the hash, evenly spread: fine-tunes of one base differ everywhere.
const SAMPLES: u64 = 64;
const SAMPLE_BYTES: usize = 64;

impl ModelConfig {
    /// 32 hex digits over the parsed configuration, each `*.safetensors` file's header and size with small
    /// samples of its data, and `suffix` (KV dtype, block size, version: what else must agree). File names
    /// and formatting of config.json do not enter.
    pub fn compat_hash(&self, dir: &Path, suffix: &str) -> Result<String, EngineError> {
        let mut hasher = Xxh3::new();
        hasher.update(format!("{self:?}").as_bytes());
        for path in weight_files(dir)? {
            hash_file(&path, &mut hasher)
                .map_err(|e| EngineError::model(&path, format!("cannot be read: {e}")))?;
        }
        hasher.update(suffix.as_bytes());
        Ok(format!("{:032x}", hasher.digest128()))
    }
}

fn hash_file(path: &Path, hasher: &mut Xxh3) -> std::io::Result<()> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    hasher.update(&size.to_le_bytes());
    let mut length = [0u8; 8];
    file.read_exact_at(&mut length, 0)?;
    // A hostile length is bounded by the file, and by what safetensors itself allows.
    let header = u64::from_le_bytes(length).min(size.saturating_sub(8)).min(100 << 20);
    let mut bytes = vec![0u8; header as usize];
    file.read_exact_at(&mut bytes, 8)?;
    hasher.update(&bytes);
    let data = size.saturating_sub(8 + header);
    let mut sample = [0u8; SAMPLE_BYTES];
    for i in 0..SAMPLES {
        let at = 8 + header + data / SAMPLES * i;
        let read = file.read_at(&mut sample, at)?;
        hasher.update(&sample[..read]);
    }
    Ok(())
}
