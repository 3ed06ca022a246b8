//! Bytes from one registered memory to another.
