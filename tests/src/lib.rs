//! Whole-product cases, reference data, benchmarks.
