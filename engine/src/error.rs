//! What can go wrong in an engine; each variant is an action someone takes.

/// An engine's refusal or failure.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The model folder or file is not usable: fix or re-import it.
    #[error("model {path}: {reason}")]
    Model {
        /// The file or folder.
        path: String,
        /// What is wrong with it and what was expected.
        reason: String,
    },
    /// The model needs something this build or device lacks: choose another device or model.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// Not enough memory on the device: the message has the numbers.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The batch breaks the engine's contract: a bug in the caller, the sequence must be failed.
    #[error("bad batch: {0}")]
    BadBatch(String),
    /// The device failed: restart the worker.
    #[error("device failure: {0}")]
    Device(String),
}

impl EngineError {
    /// The model at `path` is not usable, because.
    pub fn model(path: &std::path::Path, reason: impl Into<String>) -> Self {
        Self::Model { path: path.display().to_string(), reason: reason.into() }
    }
}
