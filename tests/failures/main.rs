//! The failure catalogue (docs/reliability.md): one test for each row, named after it (`row_01_…`), on real daemons
//! wherever the row can be made to happen to one.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

mod bomb;
mod builds;
mod drain;
mod edge;
mod health;
mod links;
mod memory;
mod network;
mod queueing;
mod records;
mod recovery;
mod restart;
mod streams;
mod versions;

#[path = "../common/mod.rs"]
mod common;
