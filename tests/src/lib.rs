//! Whole-product cases, reference data, benchmarks.

pub mod zoo;
