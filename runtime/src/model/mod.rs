//! The model file: what travels in it and how it becomes an execution plan.

pub mod card;
pub(crate) mod check;
pub(crate) mod lower;
mod ops;
pub mod plan;
pub mod qdq;
pub(crate) mod wire;
