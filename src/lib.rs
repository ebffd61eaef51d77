//! dindpool: a pool of Docker-in-Docker daemons that looks like one reliable Docker daemon of any size.
//!
//! The path of a request is in [`proxy`]; who decides what is in [`engine`]; where daemons come from is in
//! [`provision`].
//!
//! ```text
//! main → cli → app (composition root)
//! app → everything below
//! election → pool, admin::token, engine   which of several proxies admits
//! admin → pool, metrics        /metrics /livez /readyz /status, cordon and drain
//! proxy → pool, tls, error, metrics
//! pool  → engine, provision (the contract), error, metrics
//! provision → engine (what a scaler asks of it), tls, error
//! engine → nothing but std     pure decisions
//! simulate → engine            the balancing against other policies
//! ```
//!
//! # Words
//! - **daemon**: one dockerd of the pool. **session**: everything that must reach the same daemon; **session
//!   key**: how the proxy recognises it.
//! - **lease**: a session's binding to a daemon. **affinity**: what outlives it, while something of the session
//!   exists only there.
//! - **work**, in **units**: a build, a pull, a container that runs. **slot**: a daemon's capacity for one working
//!   session.
//! - **tenant**: who sessions belong to. **provisioner**: what makes daemons.

pub mod admin;
pub mod app;
pub mod cli;
pub mod config;
pub mod drain;
pub mod election;
pub mod engine;
pub mod error;
#[doc(hidden)]
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod metrics;
pub mod pool;
pub mod provision;
pub mod proxy;
pub mod reload;
pub mod simulate;
pub mod telemetry;
pub mod tls;
