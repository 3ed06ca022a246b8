//! Prompt in, KV pushed.
