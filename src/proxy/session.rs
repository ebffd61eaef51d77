//! A connection that says once whose it is, for all that follows on it. `dindpool session` opens such ones for clients that
//! cannot say it themselves: after the answer the connection is as new, whatever is spoken on it, and belongs to the session
//! as if it came to a listener of the session's own.
//!
//! ```text
//! POST /dindpool/session HTTP/1.1        101 Switching Protocols
//! X-Dindpool-Session: KEY           →    Connection: Upgrade
//! Connection: Upgrade                    Upgrade: dindpool-session
//! Upgrade: dindpool-session
//! ```

/// Where it is asked for. dockerd has nothing there, and says so.
pub const PATH: &str = "/dindpool/session";

/// The answer that accepts it.
pub const ACCEPTED: &str =
    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: dindpool-session\r\n\r\n";

/// What asks for it. `prefix` stands before the path and says of which tenant all that follows is (`/t/team-a`).
pub fn hello(prefix: &str, name: &str) -> String {
    format!(
        "POST {prefix}{PATH} HTTP/1.1\r\nHost: dindpool\r\nX-Dindpool-Session: {name}\r\nConnection: Upgrade\r\nUpgrade: \
         dindpool-session\r\n\r\n"
    )
}
