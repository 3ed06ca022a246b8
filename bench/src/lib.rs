//! Measurements behind `tandem bench`. Results and their commands are kept beside this crate.

pub mod engine;
pub mod roofline;
pub mod serve;
