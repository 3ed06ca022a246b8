//! What a prefill and a decode worker have in common: the frame around the engine.
//!
//! Requests from the wire ([`request`]), the form of their output ([`form`]), refusal of stale attempts ([`attempts`]), the KV pool as a
//! registered region ([`pool`]), the ways it moves ([`transport`]), measured rates ([`rate`]), what is counted ([`metrics`]), and serving gRPC and KV on one address until
//! told to stop ([`serve`]).

pub mod attempts;
pub mod config;
mod control;
pub mod form;
pub mod metrics;
pub mod pool;
pub mod probe;
pub mod progress;
pub mod pulse;
pub mod rate;
pub mod request;
pub mod secure;
pub mod serve;
pub mod transport;

pub use config::{Deps, WorkerConfig};
pub use request::Request;
