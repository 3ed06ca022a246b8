//! Certificates, keys and secrets from files, for every link that is encrypted.
//!
//! Files are read again whenever a connection is made, so a renewed certificate needs no restart. What is wrong with
//! one is said in words that name the flag, the file and what to do, before a handshake fails without them.

pub mod client;
pub mod cluster;
pub mod dial;
pub mod expiry;
pub mod identity;
pub mod pem;
pub mod secret;
pub mod server;

pub use client::ClientFiles;
pub use cluster::ClusterFiles;
pub use expiry::Expiry;
pub use identity::{Names, Part};
pub use pem::{Identity, TlsError};
pub use server::{Certified, ServerFiles};
