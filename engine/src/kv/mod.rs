//! Paged KV: layout of the pool, blocks and who owns them, and the prefix cache.

mod block;
pub mod convert;
pub mod fp8;
pub mod hash;
pub mod layout;
pub mod pool;
