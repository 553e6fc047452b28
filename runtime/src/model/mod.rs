//! The model file: what travels in it and how it becomes an execution plan.

pub mod card;
