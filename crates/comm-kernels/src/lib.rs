//! CUDA kernels and, beside each, its typed launcher.

#![deny(missing_docs)]

pub mod manifest;
