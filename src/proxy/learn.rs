//! Learns from responses while they pass: the id of a new container must be known to the pool before the client
//! can use it on another connection, so the observer tells it before the bytes are forwarded.

use std::io;

use serde_json::Value;

use super::classify::Learn;
use super::relay::{Observer, ResponseHead};
use crate::engine::model::{Fact, Kind, Written};
use crate::error::{Error, Kind as ErrorKind};
use crate::pool::Lease;

/// Create responses are below 1 KiB; warnings may lengthen them.
const MAX_BODY: usize = 64 << 10;

/// What a client reads whose stream is broken because its daemon's drain did not end in time.
const CUT: &str = "it was drained, and this was still under way at the deadline";

/// Watches one exchange.
pub struct Watcher<'a> {
    lease: &'a Lease,
    reader: Reader<'a>,
    json_stream: bool,
    failure: FailureLine,
}

/// Reads what a response tells of the daemon's objects, however its bytes are cut.
pub struct Reader<'a> {
    learn: Option<&'a Learn>,
    named: &'a Named,
    body: Vec<u8>,
}

/// Finds the line of a stream that says that a build, pull or load has failed: the others have no such key, and within a
/// string its quotes would be escaped.
#[derive(Debug, Default)]
pub(crate) struct FailureLine {
    /// How much of the key has been seen, up to the last byte.
    seen: usize,
}

pub(crate) const FAILURE: &[u8] = b"\"errorDetail\"";

impl FailureLine {
    /// Takes in the next bytes. Whether the key ends among them.
    pub(crate) fn is_in(&mut self, payload: &[u8]) -> bool {
        for byte in payload {
            self.seen = match FAILURE[self.seen] {
                expected if expected == *byte => self.seen + 1,
                // The quote that ends another string, or begins the key.
                _ => usize::from(*byte == FAILURE[0]),
            };
            if self.seen == FAILURE.len() {
                self.seen = 0;
                return true;
            }
        }
        false
    }
}

/// What a create request itself says about the object that comes of it.
#[derive(Debug, Default)]
pub struct Named {
    /// Its name.
    pub name: Option<String>,
    /// Its compose project.
    pub project: Option<String>,
}

impl<'a> Watcher<'a> {
    /// `json_stream` says that the CLI prints an error that is put into the response.
    pub fn new(lease: &'a Lease, reader: Reader<'a>, json_stream: bool) -> Self {
        Watcher { lease, reader, json_stream, failure: FailureLine::default() }
    }
}

impl<'a> Reader<'a> {
    /// `named` is what the request calls the new object.
    pub fn new(learn: Option<&'a Learn>, named: &'a Named) -> Self {
        Reader { learn, named, body: Vec::new() }
    }

    /// The final status: what a head alone tells, and whether the body is worth reading.
    pub fn status(&mut self, status: u16) -> Option<Fact> {
        match self.learn {
            // A tag's answer has no body (201, length 0).
            Some(Learn::Image(reference)) if status == 201 => return Some(image(reference, None)),
            Some(_) if !(200..300).contains(&status) => self.learn = None,
            _ => {}
        }
        None
    }

    /// The next bytes of the body: what they tell together with those before, once.
    pub fn feed(&mut self, payload: &[u8]) -> Vec<Fact> {
        let Some(learn) = self.learn else { return Vec::new() };
        if self.body.len() + payload.len() > MAX_BODY {
            self.learn = None;
            return Vec::new();
        }
        self.body.extend_from_slice(payload);
        let Some(fact) = self.read(learn) else { return Vec::new() };
        self.learn = None;
        self.body = Vec::new();
        match (&fact, &self.named.project) {
            (Fact::Created { kind, id, .. }, Some(project)) => {
                let labelled = Fact::Labelled { kind: *kind, id: id.clone(), project: project.clone() };
                vec![fact, labelled]
            }
            _ => vec![fact],
        }
    }

    fn read(&self, learn: &Learn) -> Option<Fact> {
        let answer: Value = serde_json::from_slice(&self.body).ok()?;
        match learn {
            Learn::Created(kind) => Some(Fact::Created {
                kind: *kind,
                id: answer["Id"].as_str()?.to_string(),
                name: self.named.name.clone(),
            }),
            Learn::Volume => {
                let name = answer["Name"].as_str()?.to_string();
                Some(Fact::Created { kind: Kind::Volume, id: name.clone(), name: Some(name) })
            }
            Learn::Image(reference) => Some(image(reference, answer["Id"].as_str())),
        }
    }
}

fn image(reference: &str, id: Option<&str>) -> Fact {
    Fact::ImageWritten {
        reference: reference.to_string(),
        id: id.map(str::to_string),
        written: Written::Made,
    }
}

impl Observer for Watcher<'_> {
    fn response_head(&mut self, head: &ResponseHead<'_>) {
        if head.is_interim() {
            return;
        }
        self.lease.answered(head.status);
        self.reader.status(head.status).into_iter().for_each(|fact| self.lease.learn(fact));
    }

    fn response_body(&mut self, payload: &[u8]) {
        if self.json_stream && self.failure.is_in(payload) {
            self.lease.failed();
        }
        self.reader.feed(payload).into_iter().for_each(|fact| self.lease.learn(fact));
    }

    fn cut(&mut self) -> Option<io::Error> {
        self.lease.cut().is_given().then(|| io::Error::other(CUT))
    }

    fn broken_stream(&mut self, failure: &io::Error) -> Option<String> {
        let message = format!("lost the connection to daemon {}: {failure}", self.lease.daemon().id);
        self.json_stream.then(|| Error::new(ErrorKind::DaemonUnreachable, message).stream_line())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_has_failed_when_a_line_says_so_wherever_it_is_cut() {
        let failed = |parts: &[&[u8]]| {
            let mut line = FailureLine::default();
            parts.iter().filter(|part| line.is_in(part)).count() > 0
        };
        let stream = concat!(
            "{\"stream\":\"Step 1/2 : FROM scratch\\n\"}\r\n",
            "{\"errorDetail\":{\"code\":1,\"message\":\"no space left on device\"},\"error\":\"no space\"}\r\n"
        );
        for at in 0..stream.len() {
            let (one, other) = stream.as_bytes().split_at(at);
            assert!(failed(&[one, other]), "cut at {at}");
        }
        assert!(stream.bytes().scan(FailureLine::default(), |l, b| Some(l.is_in(&[b]))).any(|found| found));
        assert!(failed(&[b"{\"stream\":\"\"errorDetail\":{}}"]), "a quote may end another string");
        let printed =
            serde_json::json!({ "stream": "{\"errorDetail\":{\"message\":\"printed by a test\"}}" });
        assert!(!failed(&[printed.to_string().as_bytes()]), "what a build prints is no failure of it");
        assert!(!failed(&[b"{\"aux\":{\"ID\":\"sha256:12\"}}\r\n{\"stream\":\"Successfully built 12\\n\"}"]));
    }
}
