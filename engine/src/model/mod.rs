//! Models on disk: what a folder says about its network, and the network's weights.

pub mod compat;
pub mod config;
mod raw;
pub mod rope;

pub use config::{Architecture, ModelConfig};
pub use rope::{Rope, RopeScaling};
