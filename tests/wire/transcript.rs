//! What a peer answers to given bytes, in a form in which two peers can be compared.

use super::common::http::{Addr, Conn, Head};
use super::common::millis;

/// Everything that came back, but for the date.
#[derive(Debug, PartialEq, Eq)]
pub struct Transcript {
    answers: Vec<(String, String)>,
    /// Whether the connection was ended behind the last answer.
    closed: bool,
}

/// Sends `raw`, which holds requests with these methods, and reads their answers.
#[track_caller]
pub fn exchange(addr: &Addr, raw: &[u8], methods: &[&str]) -> Transcript {
    let mut conn = Conn::connect(addr);
    conn.send(raw);
    let mut answers = Vec::new();
    for method in methods {
        let head = conn.try_head().unwrap_or_else(|e| {
            panic!("{}: no answer to {method}: {e}\n{:.400}", addr.url(), String::from_utf8_lossy(raw))
        });
        let body = conn.body(method, &head);
        answers.push((dateless(&head), String::from_utf8_lossy(&body).into_owned()));
    }
    Transcript { closed: conn.ends_within(millis(150)), answers }
}

/// A head as it came, without its date.
pub fn dateless(head: &Head) -> String {
    let text = String::from_utf8_lossy(&head.raw).into_owned();
    text.split_inclusive("\r\n").filter(|l| !l.starts_with("Date:")).collect()
}
