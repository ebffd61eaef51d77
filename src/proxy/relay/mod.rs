//! The HTTP/1.1 relay.

pub mod exchange;
pub mod framing;
pub mod h2;
pub mod head;
pub mod io;
pub mod tunnel;

#[cfg(test)]
mod testing;

pub use exchange::{DaemonFailure, Exchange, Observer, Options, Outcome, exchange, refuse};
pub use framing::Body;
pub use head::{Framing, MAX_HEAD, RequestHead, ResponseHead, Version};
pub use io::{HeadError, Peer, Side};
pub use tunnel::{Tap, TunnelCause, TunnelEnd, TunnelKind, Verdict, tunnel};
