//! What daemons and clients say in JSON: events, lists, answers, bodies.

use serde_json::Value;

use super::cut;
use crate::engine::model::{Fact, Kind};
use crate::pool::about::{self, DaemonEvent};
use crate::pool::watch::Lines;
use crate::proxy::body;
use crate::proxy::classify::Learn;
use crate::proxy::learn::{FAILURE, FailureLine, Named, Reader};

/// However a stream is cut, it has the same lines, says that it failed or does not, and an answer tells the same fact, once. Whatever JSON comes, what
/// is made of it names something, and Go's spelling of a create body's names (any case) changes nothing.
pub fn stream(data: &[u8]) {
    lines(data);
    let fails = data.windows(FAILURE.len()).any(|key| key == FAILURE);
    let mut failure = FailureLine::default();
    assert_eq!(cut(data).into_iter().any(|piece| failure.is_in(piece)), fails);
    for line in data.split(|b| *b == b'\n').take(64) {
        let Ok(event) = serde_json::from_slice::<DaemonEvent>(line) else { continue };
        let project = event.project();
        let told = event.told();
        assert!(project.is_none() || !matches!(told, Some(about::Told::ImagesChanged)));
    }
    // It is parsed anew with each piece.
    answers(&data[..data.len().min(256)]);
    let Ok(value) = serde_json::from_slice::<Value>(data) else {
        assert_eq!(body::container(data), body::ContainerBody::default());
        assert_eq!(body::resource(data), (None, None));
        return;
    };
    let read = body::container(data);
    assert!(read.beside.iter().all(|object| !object.reference.is_empty()));
    if value.as_object().is_some_and(|names| names.len() == 1) {
        let lower = Value::Object(
            value
                .as_object()
                .into_iter()
                .flatten()
                .map(|(k, v)| (k.to_ascii_lowercase(), v.clone()))
                .collect(),
        );
        assert_eq!(body::container(lower.to_string().as_bytes()), read, "in lower case");
    }
    let listed = about::inventory(&value, &value, &value, &value);
    assert_eq!(listed.images, about::listed_images(&value));
    assert_eq!(listed.containers, about::containers(&value).0);
    assert!(listed.containers.iter().flat_map(|c| &c.names).all(|name| !name.contains('/')));
}

fn lines(data: &[u8]) {
    let mut expected: Vec<&[u8]> = data.split_inclusive(|b| *b == b'\n').collect();
    if expected.last().is_some_and(|last| !last.ends_with(b"\n")) {
        expected.pop();
    }
    let (mut lines, mut seen) = (Lines::default(), Vec::new());
    for piece in cut(data) {
        lines.feed(piece, |line| seen.push(line.to_vec()));
    }
    assert_eq!(seen, expected);
}

fn answers(data: &[u8]) {
    let named = Named { name: Some("name".into()), project: Some("project".into()) };
    for learn in [Learn::Created(Kind::Container), Learn::Volume, Learn::Image("app:1".into())] {
        let whole = Reader::new(Some(&learn), &named).feed(data);
        assert!(whole.len() <= 2);
        if let [Fact::Created { id, .. }, Fact::Labelled { id: labelled, .. }] = &whole[..] {
            assert_eq!(id, labelled);
        }
        let mut reader = Reader::new(Some(&learn), &named);
        let told: Vec<Fact> = cut(data).into_iter().flat_map(|piece| reader.feed(piece)).collect();
        // What follows an answer is not waited for.
        assert!(whole.is_empty() || told == whole, "{told:?} where it is {whole:?}");
        assert!(told.len() <= 2);
        let mut refused = Reader::new(Some(&learn), &named);
        assert_eq!(refused.status(409), None);
        assert!(refused.feed(data).is_empty(), "a refusal tells nothing");
    }
}
