//! dindpool: a pool of Docker-in-Docker daemons that looks like one reliable Docker daemon of any size.

pub mod drain;
pub mod engine;
pub mod error;
pub mod metrics;
pub mod pool;
pub mod provision;
pub mod proxy;
