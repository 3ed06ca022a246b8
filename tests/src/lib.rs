//! Whole clusters in one hand: a tiny real model, every real part, and the engine alone as the oracle.

#![allow(clippy::unwrap_used)]

pub mod certs;
pub mod cluster;
pub mod cutter;
pub mod etcd;
pub mod gate;
pub mod model;
pub mod oracle;
pub mod outside;
pub mod page;
pub mod process;
pub mod secured;

pub use cluster::{Cluster, Spec};
pub mod wire;
