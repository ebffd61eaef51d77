//! The data path.

pub mod relay;
