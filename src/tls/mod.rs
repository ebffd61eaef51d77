//! TLS, by rustls: what a listener says of itself (`settings`), its certificates and who presents one (`server`,
//! `verify`), what a certificate makes of its client (`identity`), TLS to the daemons (`client`), and certificates to
//! begin with (`make`).
//!
//! A connection that is cut without close_notify is a broken stream, never a clean end; close_notify ends one direction
//! and leaves the other open, as a FIN does without TLS. No ALPN is offered: Docker's clients speak HTTP/1.1, and
//! BuildKit's HTTP/2 comes inside an upgraded connection.
//!
//! No session is resumed, so no tickets are sent: Docker's clients keep none, and a ticket that nobody has read makes a
//! reset of a client's close.

pub mod client;
mod files;
pub mod identity;
pub mod make;
pub mod server;
pub mod settings;
mod stream;
mod verify;
pub mod watch;

use std::sync::Arc;

use rustls::crypto::CryptoProvider;

pub use client::{Client, DaemonTls};
pub use files::{Material, describe};
pub use server::{Server, Visitor};
pub use settings::{Clients, Plain, RawTls, Settings};
pub use stream::{TlsStream, Wire};

/// The one provider of algorithms. Never the process's default: which one that is depends on what else is linked.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
