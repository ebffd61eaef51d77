//! One error for everything a client can be told, and the one place where it becomes HTTP.
//!
//! Docker's CLI prints `Error response from daemon: MESSAGE` only when the body is `{"message": …}` and the
//! Content-Type is exactly `application/json` (CLI 28.2.2 and 20.10.24, measured); anything else reaches the
//! user as raw JSON or not at all.

use std::fmt;

/// What went wrong, as far as it decides the status code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request could not be understood: 400, and the connection is closed.
    BadRequest,
    /// The client did not send its request head in time: 408.
    RequestTimeout,
    /// The request head is larger than dockerd itself would take: 431.
    HeadTooLarge,
    /// The client may not come in as it does, without TLS or with this certificate: 403.
    Forbidden,
    /// The named object is not on any daemon that this session may use: 404.
    NotFound,
    /// The endpoint is not served by a pool (swarm, plugins): 501.
    NotImplemented,
    /// The bound daemon broke or refused the connection: 502.
    DaemonUnreachable,
    /// The session's daemon has gone, and its containers and images with it: 502.
    SessionLost,
    /// No daemon can take the request now: 503 with Retry-After.
    NoDaemon,
    /// More connections are open than there may be: 503 with Retry-After.
    Overloaded,
    /// The admission queue is full, or the longest wait is over: 503 with Retry-After.
    QueueFull,
    /// The bound daemon does not answer: 504.
    DaemonTimeout,
    /// The client cancelled what it waited for: 499.
    Cancelled,
    /// The client left before it had an answer; nobody reads this one.
    ClientGone,
    /// The proxy is shutting down: 503.
    ShuttingDown,
    /// A fault of dindpool's own: 500.
    Internal,
}

/// Whose fault an error is; the label of the metrics and of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The client sent something wrong, or went away.
    Client,
    /// A daemon failed.
    Daemon,
    /// The pool as a whole has no room or no healthy daemon.
    Pool,
    /// dindpool itself.
    Proxy,
}

impl Fault {
    /// The value of the metrics' `fault` label.
    pub fn as_str(self) -> &'static str {
        match self {
            Fault::Client => "client",
            Fault::Daemon => "daemon",
            Fault::Pool => "pool",
            Fault::Proxy => "proxy",
        }
    }
}

/// An error that a client is told about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// What went wrong.
    pub kind: Kind,
    /// One sentence for the user, without secrets: it names the daemon, the limit or the remedy.
    pub message: String,
}

impl Error {
    /// An error of `kind` with the sentence that the user reads.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into() }
    }

    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        match self.kind {
            Kind::BadRequest
            | Kind::RequestTimeout
            | Kind::HeadTooLarge
            | Kind::Forbidden
            | Kind::NotFound
            | Kind::Cancelled
            | Kind::ClientGone
            | Kind::NotImplemented => Fault::Client,
            Kind::DaemonUnreachable | Kind::SessionLost | Kind::DaemonTimeout => Fault::Daemon,
            Kind::NoDaemon | Kind::QueueFull | Kind::Overloaded => Fault::Pool,
            Kind::ShuttingDown | Kind::Internal => Fault::Proxy,
        }
    }

    /// The message as it may stand in the log: names that a client chose are in it, on one line.
    pub fn for_log(&self) -> String {
        let clean = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
        self.message.chars().map(clean).collect()
    }

    /// Whether the same request may succeed later without a change.
    pub fn retryable(&self) -> bool {
        matches!(
            self.kind,
            Kind::NoDaemon | Kind::QueueFull | Kind::Overloaded | Kind::ShuttingDown | Kind::DaemonTimeout
        )
    }

    /// Status code and reason phrase.
    pub fn status(&self) -> (u16, &'static str) {
        match self.kind {
            Kind::BadRequest => (400, "Bad Request"),
            // nginx's code for it.
            Kind::Cancelled | Kind::ClientGone => (499, "Client Closed Request"),
            Kind::RequestTimeout => (408, "Request Timeout"),
            Kind::HeadTooLarge => (431, "Request Header Fields Too Large"),
            Kind::Forbidden => (403, "Forbidden"),
            Kind::NotFound => (404, "Not Found"),
            Kind::NotImplemented => (501, "Not Implemented"),
            Kind::DaemonUnreachable | Kind::SessionLost => (502, "Bad Gateway"),
            Kind::NoDaemon | Kind::QueueFull | Kind::Overloaded | Kind::ShuttingDown => {
                (503, "Service Unavailable")
            }
            Kind::DaemonTimeout => (504, "Gateway Timeout"),
            Kind::Internal => (500, "Internal Server Error"),
        }
    }

    /// `{"message": …}`, as every Docker client parses it.
    pub fn body(&self) -> String {
        serde_json::json!({ "message": self.message }).to_string()
    }

    /// The whole HTTP/1.1 response, ready to be written. It closes the connection: after an error the proxy
    /// does not know where the client's next request would begin. `head_only` leaves the body out (HEAD).
    pub fn response(&self, head_only: bool) -> Vec<u8> {
        let (status, reason) = self.status();
        let body = self.body();
        let retry = if self.retryable() { "Retry-After: 5\r\n" } else { "" };
        let mut out = format!(
            "HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{retry}Connection: close\r\n\r\n",
            body.len()
        )
        .into_bytes();
        if !head_only {
            out.extend_from_slice(body.as_bytes());
        }
        out
    }

    /// A line of a Docker JSON stream that makes the CLI print the message and exit 1
    /// (`code & 255` is its exit status; CLI 28.2.2, measured).
    pub fn stream_line(&self) -> String {
        let line = serde_json::json!({
            "errorDetail": { "code": 1, "message": self.message }, "error": self.message
        });
        format!("{line}\r\n")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_content_type_is_exactly_what_the_cli_wants() {
        let raw = String::from_utf8(Error::new(Kind::NoDaemon, "a \"quoted\" word").response(false)).unwrap();
        assert!(raw.contains("\r\nContent-Type: application/json\r\n"));
        assert!(raw.contains("\r\nRetry-After: 5\r\n"));
        assert!(raw.ends_with(r#"{"message":"a \"quoted\" word"}"#));
    }

    #[test]
    fn a_response_to_head_has_no_body_but_its_length() {
        let raw = String::from_utf8(Error::new(Kind::NotFound, "x").response(true)).unwrap();
        assert!(raw.contains("Content-Length: 15\r\n"));
        assert!(raw.ends_with("\r\n\r\n"));
    }

    #[test]
    fn a_message_is_one_line_in_the_log() {
        let error = Error::new(Kind::NotFound, "No such container: a\nINFO b\u{1b}[31m");
        assert_eq!(error.for_log(), "No such container: a\\nINFO b\\u{1b}[31m");
    }

    #[test]
    fn a_stream_line_carries_the_message_twice_and_an_exit_code() {
        let line = Error::new(Kind::DaemonUnreachable, "gone").stream_line();
        assert_eq!(line, "{\"error\":\"gone\",\"errorDetail\":{\"code\":1,\"message\":\"gone\"}}\r\n");
    }
}
