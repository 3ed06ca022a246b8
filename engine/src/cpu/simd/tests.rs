//! Kernels against plain definitions.
