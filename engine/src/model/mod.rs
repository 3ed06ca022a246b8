//! Models on disk: what a folder says about its network, and the network's weights.

pub mod compat;
mod compressed;
pub mod config;
pub mod quantise;
mod random;
mod raw;
pub mod rope;
pub mod weights;

pub use config::{Architecture, ModelConfig};
pub use quantise::{Quantisation, Stored};
pub use random::RandomWeights;
pub use rope::{Rope, RopeScaling};
pub use weights::{Matrix, WeightSource, Weights};
