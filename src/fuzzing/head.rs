//! A connection's bytes as request heads and bodies, and as a response.

use super::{Dice, cut};
use crate::error::Error;
use crate::proxy::relay::head::Scanner;
use crate::proxy::relay::{Body, Framing, RequestHead, ResponseHead, Version};

/// What is read does not depend on how it is cut. A head that is taken is read alike by httparse and by a reader
/// that forgives everything, so nobody behind sees another message end; the same for chunks.
pub fn head(data: &[u8]) {
    let Some((raw, behind)) = scan(data) else { return };
    response(raw, behind, Dice::of(raw).below(4) == 0);
    let mut next = Some((raw, behind));
    // Pipelined requests, as a keep-alive connection has them.
    for _ in 0..4 {
        let Some((raw, behind)) = next else { return };
        let Some(end) = request(raw, behind) else { return };
        next = scan(&behind[end..]);
    }
}

/// Where the request ends in what is behind its head.
fn request(raw: &[u8], behind: &[u8]) -> Option<usize> {
    let head = RequestHead::parse(raw.to_vec()).ok()?;
    assert_eq!(head.raw(), raw);
    assert_ne!(head.framing, Framing::UntilClose);
    assert!(head.target().bytes().all(|b| b.is_ascii_graphic()), "{}", head.target());
    assert_eq!(head.path().len() + head.query().map_or(0, |q| 1 + q.len()), head.target().len());
    let mut fields = vec![httparse::EMPTY_HEADER; lines(raw)];
    let mut oracle = httparse::Request::new(&mut fields);
    assert_eq!(oracle.parse(raw), Ok(httparse::Status::Complete(raw.len())));
    assert_eq!(oracle.method, Some(head.method()));
    assert_eq!(oracle.path, Some(head.target()));
    assert_eq!(oracle.version, Some(minor(head.version)));
    same_fields(oracle.headers, head.headers());
    assert_eq!(forgiving_framing(raw), given(head.framing), "{:?}", String::from_utf8_lossy(raw));
    body(head.framing, behind)
}

fn response(raw: &[u8], behind: &[u8], to_head: bool) {
    let Ok(head) = ResponseHead::parse(raw, to_head) else { return };
    assert!((100..1000).contains(&head.status));
    let mut fields = vec![httparse::EMPTY_HEADER; lines(raw)];
    let mut oracle = httparse::Response::new(&mut fields);
    assert_eq!(oracle.parse(raw), Ok(httparse::Status::Complete(raw.len())));
    assert_eq!((oracle.code, oracle.version), (Some(head.status), Some(minor(head.version))));
    same_fields(oracle.headers, head.headers());
    let bodiless = to_head || matches!(head.status, 100..=199 | 204 | 304);
    assert!(!bodiless || head.framing == Framing::None);
    if !bodiless {
        assert_eq!(forgiving_framing(raw), given(head.framing));
    }
    body(head.framing, behind);
}

/// The first head, and what follows it, however the bytes come.
fn scan(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let whole = Scanner::default().scan(data);
    let (mut scanner, mut end, mut found) = (Scanner::default(), 0, Ok(None));
    for piece in cut(data) {
        end += piece.len();
        found = scanner.scan(&data[..end]);
        if !matches!(found, Ok(None)) {
            break;
        }
    }
    assert_eq!(found, whole, "cut into pieces");
    let (start, end) = whole.ok()??;
    assert!(start <= end && end <= data.len() && data[..end].ends_with(b"\r\n\r\n"));
    Some((&data[start..end], &data[end..]))
}

/// The length of a body in `data`, if it ends there.
fn body(framing: Framing, data: &[u8]) -> Option<usize> {
    let feed = |pieces: &[&[u8]]| {
        let (mut body, mut used, mut payload) = (Body::new(framing), 0, Vec::new());
        let mut error: Option<Error> = None;
        for piece in pieces {
            let (taken, fault) = body.feed_good(piece, |p| payload.extend_from_slice(p));
            assert!(taken <= piece.len());
            used += taken;
            error = fault;
            if error.is_some() || taken < piece.len() {
                break;
            }
        }
        (body, used, payload, error)
    };
    let (whole, used, payload, error) = feed(&[data]);
    let (state, cut_used, cut_payload, cut_error) = feed(&cut(data));
    assert_eq!((&cut_payload, &cut_error), (&payload, &error));
    if error.is_some() {
        // What is wrong with a chunk may show only after its beginning has been passed on.
        assert!(framing == Framing::Chunked && cut_used >= used);
        return None;
    }
    assert_eq!((state, cut_used), (whole, used));
    if framing == Framing::Chunked && whole.is_complete() {
        assert_eq!(forgiving_chunks(&data[..used]), Some((used, payload)));
    }
    whole.is_complete().then_some(used)
}

fn lines(raw: &[u8]) -> usize {
    raw.iter().filter(|b| **b == b'\n').count()
}

fn minor(version: Version) -> u8 {
    match version {
        Version::Http10 => 0,
        Version::Http11 => 1,
    }
}

fn same_fields<'a>(theirs: &[httparse::Header<'a>], ours: impl Iterator<Item = (&'a str, &'a [u8])>) {
    let theirs: Vec<_> = theirs.iter().map(|h| (h.name, h.value.trim_ascii())).collect();
    assert_eq!(theirs, ours.collect::<Vec<_>>());
}

/// What a head's fields themselves say.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    length: Option<u64>,
    chunked: bool,
}

fn given(framing: Framing) -> Said {
    match framing {
        Framing::None | Framing::UntilClose => Said { length: None, chunked: false },
        Framing::Length(n) => Said { length: Some(n), chunked: false },
        Framing::Chunked => Said { length: None, chunked: true },
    }
}

/// Framing as a reader sees it that takes bare LF, blanks anywhere and the last of several fields.
fn forgiving_framing(raw: &[u8]) -> Said {
    let mut said = Said { length: None, chunked: false };
    for line in raw.split(|b| matches!(b, b'\n' | b'\r')).skip(1) {
        let text = String::from_utf8_lossy(line).to_ascii_lowercase();
        let Some((name, value)) = text.split_once(':') else { continue };
        match name.trim() {
            "content-length" => said.length = value.trim().parse().ok(),
            "transfer-encoding" => said.chunked |= value.contains("chunked"),
            _ => {}
        }
    }
    said
}

/// Length and payload of a chunked body, as a reader sees it that takes bare LF and anything behind a size.
fn forgiving_chunks(data: &[u8]) -> Option<(usize, Vec<u8>)> {
    let (mut at, mut payload) = (0, Vec::new());
    let line = |at: &mut usize| {
        let rest = data.get(*at..)?;
        let end = rest.iter().position(|b| *b == b'\n')?;
        *at += end + 1;
        Some(rest[..end].strip_suffix(b"\r").unwrap_or(&rest[..end]))
    };
    loop {
        let head = line(&mut at)?;
        let digits = std::str::from_utf8(head.split(|b| *b == b';').next()?).ok()?;
        let size = usize::from_str_radix(digits.trim(), 16).ok()?;
        if size == 0 {
            while !line(&mut at)?.is_empty() {}
            return Some((at, payload));
        }
        payload.extend_from_slice(data.get(at..at.checked_add(size)?)?);
        at += size;
        line(&mut at)?;
    }
}
