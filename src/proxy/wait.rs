//! Waiting for a slot, as each client can bear it (measured; see docs/queueing.md).
//!
//! | client | what it sees |
//! |---|---|
//! | classic build, load, pull | after 2 s a line in its own output, again when it changes; an empty line each second, or more often while its upload stands still |
//! | BuildKit | an empty HTTP/2 SETTINGS frame: without it gRPC gives up after 20 s |
//! | create and other JSON calls | nothing: their answer has no place for it |
//!
//! The empty line is not for the user: a client that was killed behind an upload that nobody reads sends
//! no FIN, but a write to it fails.

use std::io;
use std::time::Duration;

use tokio::time::Instant;

use super::relay::{Peer, Side, h2};
use super::solve::is_traces;
use crate::engine::model::ApiVersion;
use crate::error::{Error, Kind};
use crate::pool::{Lease, Ticket};

/// A build that gets its slot within this time looks as always.
const QUIET: Duration = Duration::from_secs(2);
/// Between two signs of life.
const BEAT: Duration = Duration::from_secs(1);
/// The same while the client's upload stands still because nobody reads it: only a write finds out that such a
/// client was killed, and its ticket is to be gone within 100 ms. Eight bytes each.
const STALLED_BEAT: Duration = Duration::from_millis(50);
/// What is read ahead of a client that waits, to notice its end. Beyond it the kernel is asked.
const AHEAD: usize = 16 << 10;
/// How often the kernel is asked: a ticket whose client left is gone within 100 ms.
const LOOK: Duration = Duration::from_millis(40);

/// How a client can be told that it waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Not at all.
    Silent,
    /// By lines in a JSON stream, behind an early 200 that names this API version.
    Lines(Option<ApiVersion>),
    /// By an empty SETTINGS frame.
    Http2,
}

/// What a client has been sent while it waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Told {
    /// A chunked 200 and perhaps lines: the daemon's own head is swallowed, a failure goes into the stream.
    pub answered: bool,
    /// An empty SETTINGS frame, whose ACK must not reach the daemon.
    pub settings: bool,
    /// How long it has waited for a slot.
    pub waited: Duration,
}

/// Waits for a ticket's lease while it keeps an eye on the client.
///
/// # Errors
/// When the client has left, or the ticket is refused.
pub async fn wait(
    client: &mut Side,
    mut ticket: Ticket,
    manner: Manner,
    told: &mut Told,
) -> Result<Lease, Error> {
    if let Some(answer) = ticket.now() {
        return answer;
    }
    let began = Instant::now();
    let answer = wait_on(client, ticket, manner, told).await;
    told.waited += began.elapsed();
    answer
}

async fn wait_on(
    client: &mut Side,
    mut ticket: Ticket,
    manner: Manner,
    told: &mut Told,
) -> Result<Lease, Error> {
    if manner == Manner::Http2 && !told.settings {
        told.settings = true;
        client.offer(&h2::empty_settings()).await.map_err(gone)?;
    }
    let mut next = Instant::now() + QUIET;
    let mut shown = None;
    loop {
        tokio::select! {
            biased;
            lease = ticket.granted() => return lease,
            end = left(client, manner) => return Err(end),
            () = tokio::time::sleep_until(next), if matches!(manner, Manner::Lines(_)) => {
                // A client that has not read the last sign of life needs no further one, and must not be waited for:
                // its lease may come at any moment.
                if client.is_flushed().await.map_err(gone)? {
                    let bytes = beat(manner, told, ticket.position(), ticket.why(), &mut shown);
                    client.offer(&bytes).await.map_err(gone)?;
                }
                let stalled = client.buffered().len() >= AHEAD;
                next = Instant::now() + if stalled { STALLED_BEAT } else { BEAT };
            }
        }
    }
}

/// What goes to a client that reads lines, this second.
fn beat(
    manner: Manner,
    told: &mut Told,
    place: Option<(usize, usize)>,
    why: Option<String>,
    shown: &mut Option<String>,
) -> Vec<u8> {
    let mut out = String::new();
    if let (false, Manner::Lines(api)) = (told.answered, manner) {
        told.answered = true;
        out.push_str("HTTP/1.1 200 OK\r\n");
        if let Some((major, minor)) = api {
            out.push_str(&format!("Api-Version: {major}.{minor}\r\n"));
        }
        out.push_str("Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n");
    }
    let text = place.map(|(position, of)| {
        let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
        format!("Waiting for a free daemon: position {position} of {of}{why}\n")
    });
    let line = match text {
        Some(text) if shown.as_ref() != Some(&text) => {
            let line = format!("{}\r\n", serde_json::json!({ "stream": text }));
            *shown = Some(text);
            line
        }
        _ => "\r\n".to_string(),
    };
    out.push_str(&chunk(&line));
    out.into_bytes()
}

/// One chunk of a chunked body.
pub fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

/// Completes when the client has left, or its user has given up. What it sends meanwhile stays for the daemon.
async fn left(client: &mut Side, manner: Manner) -> Error {
    while client.buffered().len() < AHEAD {
        if manner == Manner::Http2 && h2::has_given_up(client.buffered(), is_traces) {
            return gone(io::ErrorKind::ConnectionReset.into());
        }
        match client.fill().await {
            Ok(0) => return gone(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) => return gone(error),
        }
    }
    while client.peer() == Peer::Open {
        tokio::time::sleep(LOOK).await;
    }
    gone(io::ErrorKind::ConnectionReset.into())
}

fn gone(_: io::Error) -> Error {
    Error::new(Kind::ClientGone, "the client left while it waited")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_shown_once_and_life_every_second() {
        let (mut told, mut shown) = (Told::default(), None);
        let manner = Manner::Lines(Some((1, 45)));
        let mut next = |place, why: Option<&str>| {
            let why = why.map(str::to_string);
            String::from_utf8(beat(manner, &mut told, place, why, &mut shown)).unwrap()
        };
        let first = next(Some((3, 7)), None);
        assert!(
            first.starts_with("HTTP/1.1 200 OK\r\nApi-Version: 1.45\r\nContent-Type: application/json\r\n")
        );
        assert!(first.ends_with("Waiting for a free daemon: position 3 of 7\\n\"}\r\n\r\n"));
        assert_eq!(next(Some((3, 7)), None), "2\r\n\r\n\r\n");
        assert!(next(Some((2, 7)), None).contains("position 2 of 7"));
        assert!(next(Some((2, 7)), Some("no space")).contains("position 2 of 7 (no space)"));
        assert_eq!(next(Some((2, 7)), Some("no space")), "2\r\n\r\n\r\n");
    }
}
