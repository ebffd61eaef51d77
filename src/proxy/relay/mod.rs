//! The HTTP/1.1 relay: one client connection, one daemon connection, and every byte between them as it came.
//!
//! It is our own because a byte-transparent proxy is what this project exists for, and no HTTP library is one:
//! they upgrade on 101 only (the daemon also hijacks with a bare 200), end URIs at 64 KiB (build args travel in
//! the query), take bare LF, join or hold chunks, and either break half-close or leak the daemon connections of
//! dead clients. Here every head is validated strictly and then forwarded as it came, and so is every chunk.
//!
//! The module knows nothing of pools, sessions or metrics: it is given two sockets and a head. Everything is
//! polled in the caller's task; there is no task, channel or buffer per connection.
//!
//! # The life of an exchange
//! ```text
//!  client                      relay                               daemon
//!    │── head ───────────────▶ read_head: scan, validate              │
//!    │                         (the caller classifies, acquires,      │
//!    │                          connects)                             │
//!    │                         exchange: head, body ────────────────▶ │
//!    │── body, by its framing ─────────────────────────────────────▶ │   both directions
//!    │ ◀────────────────────────────────────────── 1xx heads ─────── │   at once; a side is
//!    │ ◀────────────────────────────────────────── final head ────── │   not read while the
//!    │ ◀────────────────────────── body, by its framing, at once ─── │   other has not taken
//!    │                              │                                 │   what came before
//!    │        101, or a bare 200 to a hijack │ complete               │
//!    │                              ▼        ▼                        │
//!    │ ◀═══════ tunnel ═════════════╝     Done: keep or close         │
//! ```
//! # How things end
//! | what happens | what the other side sees |
//! |---|---|
//! | the client's FIN while a response streams | FIN; if the daemon then says nothing for 900 ms, RST |
//! | the client's RST | RST at once |
//! | the daemon's end within a response | what came, a last error line if the caller has one, and FIN without the end that the framing promised; RST where a FIN would look like the end |
//! | the daemon's end before a response | nothing: the caller answers with [`refuse`] |
//! | the daemon's answer while the client still uploads | the answer, FIN, bounded drain: a RST would eat it |
//! | a bad chunk of the client | RST; the caller answers 400 |
//! | FIN in a raw tunnel | FIN, the other direction stays open |
//! | FIN in an HTTP/2 tunnel | what was sent before, then a full close |
//! | RST in a tunnel | RST |
//!
//! # Words
//! - **side** ([`Side`]): one socket with its unread input and unwritten output, both normally empty.
//! - **head**: request or status line and fields, up to the empty line. **framing**: how a body's end is found.
//! - **exchange**: one request and its final response. **interim**: a 1xx response before it.
//! - **hijack**: a request whose response may end HTTP on its connection. **tunnel**: what follows then.
//! - **up** is from the client to the daemon, **down** from the daemon to the client.
//! - **held**: bytes behind a hijack's request that nobody may interpret before the daemon has answered.
//!   **pipelined**: bytes of the next request.
//! - **guard** ([`Guard`]): what a task outside sees of a side's socket. **fate**: why it ended that.
//! - **refuse**: answer, FIN, bounded drain. **abort**: close with RST.
//!
//! Large bodies are copied through a scratch buffer of the thread. splice(2) would go into [`Side`], as another
//! way to move a known number of body bytes.

pub mod exchange;
pub mod framing;
pub mod guard;
pub mod h2;
pub mod head;
pub mod io;
pub mod refusal;
pub mod tunnel;

#[cfg(test)]
pub(crate) mod testing;

pub use exchange::{DaemonFailure, Exchange, Observer, Options, Outcome, exchange, refuse};
pub use framing::Body;
pub use guard::{Asked, Fate, Guard, Pace};
pub use head::{Framing, MAX_HEAD, RequestHead, ResponseHead, Version};
pub use io::{HeadError, Peer, Side};
pub use refusal::Refusal;
pub use tunnel::{Tap, TunnelCause, TunnelEnd, TunnelKind, Verdict, tunnel};
