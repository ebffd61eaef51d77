//! The rules of an exchange, over real sockets. The test plays the client and the daemon.

use std::time::Instant;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::super::testing::{
    Ending, Far, read_to_end, read_until, reset, say, soon, tcp, unix, write_until_stalled,
};
use super::*;

/// Records what it is shown.
#[derive(Debug, Default)]
struct Seen {
    statuses: Vec<u16>,
    request: Vec<u8>,
    response: Vec<u8>,
    error_line: bool,
}

impl Observer for Seen {
    fn response_head(&mut self, head: &ResponseHead<'_>) {
        self.statuses.push(head.status);
    }

    fn request_body(&mut self, payload: &[u8]) {
        self.request.extend_from_slice(payload);
    }

    fn response_body(&mut self, payload: &[u8]) {
        self.response.extend_from_slice(payload);
    }

    fn broken_stream(&mut self, _failure: &io::Error) -> Option<String> {
        self.error_line.then(|| Error::new(Kind::SessionLost, "gone").stream_line())
    }
}

struct Over {
    exchange: Exchange,
    client: Side,
    daemon: Side,
    seen: Seen,
}

impl Over {
    fn kept(&self) -> (bool, bool) {
        match self.exchange.outcome {
            Outcome::Done { keep_client, keep_daemon } => (keep_client, keep_daemon),
            ref other => panic!("{other:?}"),
        }
    }

    fn failure(&self) -> &DaemonFailure {
        match &self.exchange.outcome {
            Outcome::DaemonFailed(failure) => failure,
            other => panic!("{other:?}"),
        }
    }
}

const PLAIN: Options = Options { hijack: false, answered: false };
const HIJACK: Options = Options { hijack: true, answered: false };

/// Reads one head and relays that exchange.
fn relay(mut client: Side, mut daemon: Side, options: Options, error_line: bool) -> JoinHandle<Over> {
    tokio::spawn(async move {
        let mut seen = Seen { error_line, ..Seen::default() };
        let head = client.read_head().await.unwrap().unwrap();
        let exchange = exchange(&mut client, &mut daemon, &head, options, &mut seen).await;
        Over { exchange, client, daemon, seen }
    })
}

async fn over(task: JoinHandle<Over>) -> Over {
    soon(task).await.unwrap()
}

/// Client, daemon, and the relay between them.
async fn world(options: Options, error_line: bool) -> (TcpStream, TcpStream, JoinHandle<Over>) {
    let ((near_client, client), (near_daemon, daemon)) = (tcp().await, tcp().await);
    (client, daemon, relay(near_client, near_daemon, options, error_line))
}

/// One exchange with the whole request sent at once and the whole response too.
async fn whole(
    client: &mut impl Far,
    daemon: &mut impl Far,
    task: JoinHandle<Over>,
    up: &str,
    down: &str,
) -> Over {
    say(client, up).await;
    assert_eq!(read_until(daemon, up).await, up);
    say(daemon, down).await;
    assert_eq!(read_until(client, down).await, down);
    over(task).await
}

#[tokio::test]
async fn a_connection_carries_one_request_after_another() {
    let ((near_client, mut client), (near_daemon, mut daemon)) = (tcp().await, unix());
    let mut sides = (near_client, near_daemon);
    for i in 0..3 {
        let task = relay(sides.0, sides.1, PLAIN, false);
        let up =
            format!("POST /v1.50/containers/create?n={i} HTTP/1.1\r\nHost:\r\nContent-Length: 2\r\n\r\n{{}}");
        let down = "HTTP/1.1 201 Created\r\nApi-Version: 1.51\r\nContent-Length: 12\r\n\r\n{\"Id\":\"abc\"}";
        let done = whole(&mut client, &mut daemon, task, &up, down).await;
        assert_eq!(done.kept(), (true, true));
        assert_eq!(done.seen.response, b"{\"Id\":\"abc\"}");
        assert_eq!(done.seen.request, b"{}");
        assert_eq!((done.exchange.sent, done.exchange.received), (up.len() as u64, down.len() as u64));
        assert_eq!(done.exchange.status, Some(201));
        sides = (done.client, done.daemon);
        assert!(!sides.1.is_dead());
    }
}

#[tokio::test]
async fn a_response_without_body_ends_with_its_head() {
    for (up, down) in [
        ("HEAD /_ping HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"),
        ("HEAD /x HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ("POST /x HTTP/1.1\r\n\r\n", "HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET /x HTTP/1.1\r\n\r\n", "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n"),
        ("GET /x HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ] {
        let (mut client, mut daemon, task) = world(PLAIN, false).await;
        assert_eq!(whole(&mut client, &mut daemon, task, up, down).await.kept(), (true, true), "{down:?}");
    }
}

#[tokio::test]
async fn nothing_is_kept_when_either_side_says_close() {
    let length = "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx";
    for (up, down, keep) in [
        ("GET / HTTP/1.1\r\nConnection: close\r\n\r\n", length, false),
        (
            "GET / HTTP/1.1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx",
            false,
        ),
        ("GET / HTTP/1.0\r\n\r\n", length, false),
        ("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", length, true),
        (
            "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
            "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\nx",
            true,
        ),
        ("GET / HTTP/1.1\r\n\r\n", "HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", false),
    ] {
        let (mut client, mut daemon, task) = world(PLAIN, false).await;
        let done = whole(&mut client, &mut daemon, task, up, down).await;
        assert_eq!(done.kept(), (keep, keep), "{up:?} {down:?}");
    }
}

#[tokio::test]
async fn a_response_without_length_ends_with_the_daemons_fin() {
    let (mut client, mut daemon, task) = world(PLAIN, false).await;
    say(&mut client, "GET / HTTP/1.0\r\n\r\n").await;
    read_until(&mut daemon, "\r\n\r\n").await;
    say(&mut daemon, "HTTP/1.0 200 OK\r\n\r\nabc").await;
    drop(daemon);
    let done = over(task).await;
    assert_eq!(done.kept(), (false, false));
    drop(done);
    assert_eq!(read_to_end(&mut client).await, (b"HTTP/1.0 200 OK\r\n\r\nabc".to_vec(), Ending::Fin));
}

#[tokio::test]
async fn chunks_pass_as_they_come_and_at_once() {
    let (mut client, mut daemon, task) = world(PLAIN, false).await;
    say(&mut client, "POST /v1.50/build HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    read_until(&mut daemon, "\r\n\r\n").await;
    for piece in ["3", "\r\nab", "c\r", "\n0\r\nA: b\r\n", "\r\n"] {
        say(&mut client, piece).await;
        assert_eq!(read_until(&mut daemon, piece).await, piece);
    }
    for piece in [
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        "2;x\r\nhi\r\n",
        "1\r\n",
        "!\r\n0",
        "\r\n\r\n",
    ] {
        say(&mut daemon, piece).await;
        assert_eq!(read_until(&mut client, piece).await, piece);
    }
    let done = over(task).await;
    assert_eq!(done.kept(), (true, true));
    assert_eq!((&done.seen.request[..], &done.seen.response[..]), (&b"abc"[..], &b"hi!"[..]));
}

#[tokio::test]
async fn pipelined_requests_wait_for_their_turn() {
    let (mut client, mut daemon, task) = world(PLAIN, false).await;
    let (first, second) = ("POST /1 HTTP/1.1\r\nContent-Length: 1\r\n\r\na", "GET /2 HTTP/1.1\r\n\r\n");
    say(&mut client, format!("{first}{second}")).await;
    assert_eq!(read_until(&mut daemon, first).await, first);
    say(&mut client, "\r\nGET /3 HTTP/1.1\r\n\r\n").await;
    let ok = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
    say(&mut daemon, ok).await;
    read_until(&mut client, ok).await;
    let done = over(task).await;
    assert_eq!(done.kept(), (true, true));
    assert!(!done.daemon.is_dead());
    let task = relay(done.client, done.daemon, PLAIN, false);
    assert_eq!(read_until(&mut daemon, "\r\n\r\n").await, second);
    say(&mut daemon, ok).await;
    let mut done = over(task).await;
    let third = soon(done.client.read_head()).await.unwrap().unwrap();
    assert_eq!(third.target(), "/3");
}

#[tokio::test]
async fn expect_continue_works_by_passing_it_through() {
    let (mut client, mut daemon, task) = world(PLAIN, false).await;
    say(&mut client, "POST /x HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n").await;
    read_until(&mut daemon, "\r\n\r\n").await;
    say(&mut daemon, "HTTP/1.1 100 Continue\r\n\r\n").await;
    read_until(&mut client, "HTTP/1.1 100 Continue\r\n\r\n").await;
    say(&mut client, "body").await;
    read_until(&mut daemon, "body").await;
    say(&mut daemon, "HTTP/1.1 103 Early\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        .await;
    read_until(&mut client, "ok").await;
    let done = over(task).await;
    assert_eq!((done.kept(), done.exchange.status), ((true, true), Some(200)));
    assert_eq!(done.seen.statuses, [100, 103, 200]);
}

#[tokio::test]
async fn an_early_refusal_reaches_a_client_that_is_still_uploading() {
    let (client, mut daemon, task) = world(PLAIN, false).await;
    let (mut reading, mut writing) = client.into_split();
    let upload = tokio::spawn(async move {
        let _ = writing
            .write_all(b"POST /v1.50/images/load HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
            .await;
        let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
        for _ in 0..4000 {
            if writing.write_all(chunk.as_bytes()).await.is_err() {
                break;
            }
        }
        writing
    });
    read_until(&mut daemon, "\r\n\r\n").await;
    let answer = "HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 3\r\n\r\nno!";
    say(&mut daemon, answer).await;
    drop(daemon); // with unread bytes: the kernel sends RST
    let mut seen = Vec::new();
    while seen.len() < answer.len() {
        let mut buf = [0; 512];
        let n = soon(tokio::io::AsyncReadExt::read(&mut reading, &mut buf)).await.unwrap();
        assert_ne!(n, 0);
        seen.extend_from_slice(&buf[..n]);
    }
    assert_eq!(seen, answer.as_bytes());
    let done = over(task).await;
    assert_eq!((done.kept(), done.exchange.status), ((false, false), Some(404)));
    drop(done);
    soon(upload).await.unwrap();
}

#[tokio::test]
async fn an_upload_goes_on_behind_an_early_answer_if_the_daemon_reads_on() {
    let (mut client, mut daemon, task) = world(PLAIN, false).await;
    say(&mut client, "POST /x HTTP/1.1\r\nContent-Length: 6\r\n\r\nabc").await;
    read_until(&mut daemon, "abc").await;
    let answer = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
    say(&mut daemon, answer).await;
    read_until(&mut client, answer).await;
    say(&mut client, "def").await;
    read_until(&mut daemon, "def").await;
    assert_eq!(over(task).await.kept(), (true, true));
}

#[tokio::test]
async fn refuse_delivers_its_answer_to_a_client_that_is_still_uploading() {
    let (mut near, mut client) = tcp().await;
    say(&mut client, "POST / HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n").await;
    write_until_stalled(&mut client).await;
    let answer = Error::new(Kind::QueueFull, "full").response(false);
    let expected = answer.clone();
    let task = tokio::spawn(async move { refuse(&mut near, &answer).await });
    let mut seen = vec![0; expected.len()];
    soon(tokio::io::AsyncReadExt::read_exact(&mut client, &mut seen)).await.unwrap();
    assert_eq!(seen, expected);
    assert_eq!(read_to_end(&mut client).await.1, Ending::Fin);
    drop(client);
    soon(task).await.unwrap();
}

#[tokio::test]
async fn a_dead_client_frees_the_daemons_connection_within_a_second() {
    for (with_head, rst) in [(false, false), (true, false), (false, true), (true, true)] {
        let (mut client, mut daemon, task) = world(PLAIN, false).await;
        say(&mut client, "GET /events HTTP/1.1\r\n\r\n").await;
        read_until(&mut daemon, "\r\n\r\n").await;
        if with_head {
            say(&mut daemon, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n").await;
            read_until(&mut client, "a\r\n").await;
        }
        let died = Instant::now();
        if rst {
            reset(client)
        } else {
            drop(client)
        }
        let done = over(task).await;
        assert!(matches!(done.exchange.outcome, Outcome::ClientGone));
        assert!(died.elapsed() <= Duration::from_secs(1), "{:?}", died.elapsed());
        assert!(done.daemon.is_closed());
        // The FIN came first, so that dockerd can cancel by itself, and then the RST.
        let mut byte = [0];
        let read = soon(tokio::io::AsyncReadExt::read(&mut daemon, &mut byte)).await;
        if !rst {
            assert!(matches!(read, Ok(0)) || read.is_err());
        }
        let write = async { while daemon.write_all(b"x").await.is_ok() {} };
        soon(write).await;
    }
}

#[tokio::test]
async fn a_daemon_that_closes_on_the_clients_fin_ends_the_exchange_at_once() {
    let (mut client, mut daemon, task) = world(PLAIN, false).await;
    say(&mut client, "GET /wait HTTP/1.1\r\n\r\n").await;
    client.shutdown().await.unwrap();
    let (request, end) = read_to_end(&mut daemon).await;
    assert_eq!((&request[..], end), (&b"GET /wait HTTP/1.1\r\n\r\n"[..], Ending::Fin));
    say(&mut daemon, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    read_until(&mut client, "ok").await;
    assert_eq!(over(task).await.kept(), (false, false));
}

#[tokio::test]
async fn a_broken_stream_never_ends_cleanly() {
    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let length = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc";
    let line = Error::new(Kind::SessionLost, "gone").stream_line();
    let injected = format!("{head}1\r\na\r\n{:x}\r\n{line}\r\n", line.len());
    for (sent, error_line, expected) in [
        (format!("{head}5\r\nab"), true, format!("{head}5\r\nab")),
        (format!("{head}1\r\na\r\n"), true, injected),
        (format!("{head}1\r\na\r\n"), false, format!("{head}1\r\na\r\n")),
        (format!("{head}1\r\na\r\n0\r\n"), true, format!("{head}1\r\na\r\n0\r\n")),
        (length.to_string(), true, length.to_string()),
    ] {
        for rst in [false, true] {
            let (mut client, mut daemon, task) = world(PLAIN, error_line).await;
            say(&mut client, "POST /build HTTP/1.1\r\n\r\n").await;
            read_until(&mut daemon, "\r\n\r\n").await;
            say(&mut daemon, &sent).await;
            let mut got = read_until(&mut client, &sent).await;
            if rst {
                reset(daemon)
            } else {
                drop(daemon)
            }
            let (rest, end) = read_to_end(&mut client).await;
            got.push_str(&String::from_utf8(rest).unwrap());
            assert_eq!((got, end), (expected.clone(), Ending::Fin));
            drop(client);
            let done = over(task).await;
            assert!(!done.failure().before_response);
        }
    }
}

#[tokio::test]
async fn a_reset_of_a_response_without_length_stays_a_reset() {
    let (mut client, mut daemon, task) = world(PLAIN, false).await;
    say(&mut client, "GET / HTTP/1.0\r\n\r\n").await;
    read_until(&mut daemon, "\r\n\r\n").await;
    say(&mut daemon, "HTTP/1.0 200 OK\r\n\r\nabc").await;
    read_until(&mut client, "abc").await;
    reset(daemon);
    assert_eq!(read_to_end(&mut client).await.1, Ending::Rst);
    over(task).await.failure();
}

#[tokio::test]
async fn a_daemon_that_fails_before_its_response_is_reported() {
    for (answer, spoke) in
        [("", false), ("HTTP/1.1 20", true), ("SSH-2.0-x\r\n", true), ("HTTP/1.1 200 OK\nA: b\n\n", true)]
    {
        let (mut client, mut daemon, task) = world(PLAIN, true).await;
        say(&mut client, "POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi").await;
        read_until(&mut daemon, "hi").await;
        say(&mut daemon, answer).await;
        drop(daemon);
        let mut done = over(task).await;
        let failure = done.failure();
        assert!(failure.before_response, "{answer:?}");
        assert_eq!((failure.daemon_spoke, failure.body_taken), (spoke, 2));
        assert!(done.exchange.sent > 0 && done.exchange.received == 0);
        let error = Error::new(Kind::DaemonUnreachable, "dind-0 has closed the connection").response(false);
        let refusal = tokio::spawn(async move { refuse(&mut done.client, &error).await });
        assert!(read_until(&mut client, "connection\"}").await.starts_with("HTTP/1.1 502 "));
        drop(client);
        soon(refusal).await.unwrap();
    }
}

#[tokio::test]
async fn a_kept_connection_that_the_daemon_has_closed_is_known_to_be_dead() {
    let (near, daemon) = tcp().await;
    assert!(!near.is_dead());
    drop(daemon);
    soon(async {
        while !near.is_dead() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn nothing_was_sent_when_the_daemon_was_gone_before() {
    for _ in 0..20 {
        let ((near_client, mut client), (near_daemon, daemon)) = (tcp().await, tcp().await);
        reset(daemon);
        soon(async {
            while near_daemon.peer() != Peer::Reset {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let task = relay(near_client, near_daemon, PLAIN, false);
        say(&mut client, "GET / HTTP/1.1\r\n\r\n").await;
        let done = over(task).await;
        assert!(done.failure().before_response);
        assert_eq!((done.exchange.sent, done.failure().body_taken), (0, 0));
    }
}

#[tokio::test]
async fn a_bad_chunk_does_not_reach_the_daemon() {
    for (first, second) in [("", "zz\r\n"), ("3\r\nabc\r\n", "4;\u{1}\r\n")] {
        let (mut client, mut daemon, task) = world(PLAIN, false).await;
        let head = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        say(&mut client, format!("{head}{first}")).await;
        let good = format!("{head}{first}");
        assert_eq!(read_until(&mut daemon, &good).await, good);
        say(&mut client, second).await;
        assert_eq!(read_to_end(&mut daemon).await, (Vec::new(), Ending::Rst));
        match over(task).await.exchange.outcome {
            Outcome::BadRequest { error, answerable: true } => assert_eq!(error.kind, Kind::BadRequest),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_bad_chunk_that_comes_with_its_head_keeps_the_request_from_the_daemon() {
    let (mut client, mut daemon, task) = world(PLAIN, false).await;
    say(&mut client, "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n").await;
    assert_eq!(read_to_end(&mut daemon).await, (Vec::new(), Ending::Rst));
    assert_eq!(over(task).await.exchange.sent, 0);
}

#[tokio::test]
async fn a_bad_chunk_behind_a_100_continue_can_still_be_answered() {
    let (mut client, mut daemon, task) = world(PLAIN, false).await;
    say(&mut client, "POST / HTTP/1.1\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    read_until(&mut daemon, "\r\n\r\n").await;
    say(&mut daemon, "HTTP/1.1 100 Continue\r\n\r\n").await;
    read_until(&mut client, "\r\n\r\n").await;
    say(&mut client, "nonsense").await;
    assert!(matches!(over(task).await.exchange.outcome, Outcome::BadRequest { answerable: true, .. }));
}

#[tokio::test]
async fn a_bad_chunk_of_the_daemon_breaks_the_stream() {
    let line = Error::new(Kind::SessionLost, "gone").stream_line();
    let injected = format!("{:x}\r\n{line}\r\n", line.len());
    for (first, second, arrives) in [
        ("1\r\na\r\n", "0\n\n", injected.clone()),
        ("3\r\na", "bc\r\n2\r\nde\r\nzz", format!("bc\r\n2\r\nde\r\n{injected}")),
        ("3\r\na", "bcd\r\n", "bc".to_string()),
        ("1\r\na\r\n0", "\n\n", String::new()),
    ] {
        let (mut client, mut daemon, task) = world(PLAIN, true).await;
        say(&mut client, "GET / HTTP/1.1\r\n\r\n").await;
        let good = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{first}");
        say(&mut daemon, &good).await;
        read_until(&mut client, &good).await;
        say(&mut daemon, second).await;
        let (rest, end) = read_to_end(&mut client).await;
        assert_eq!((String::from_utf8(rest), end), (Ok(arrives), Ending::Fin));
        drop(client);
        assert_eq!(over(task).await.failure().error.kind(), io::ErrorKind::InvalidData);
    }
}

#[tokio::test]
async fn a_silent_daemon_is_left_when_a_unix_client_has_died() {
    let ((near_client, mut client), (near_daemon, mut daemon)) = (unix(), unix());
    let task = relay(near_client, near_daemon, PLAIN, false);
    say(&mut client, "GET /events HTTP/1.1\r\n\r\n").await;
    read_until(&mut daemon, "\r\n\r\n").await;
    let died = Instant::now();
    drop(client);
    assert_eq!(read_to_end(&mut daemon).await.1, Ending::Fin);
    assert!(matches!(over(task).await.exchange.outcome, Outcome::ClientGone));
    assert!(died.elapsed() <= Duration::from_secs(1), "{:?}", died.elapsed());
}

#[tokio::test]
async fn a_client_that_has_only_finished_gets_a_response_that_keeps_coming() {
    let (mut client, mut daemon, task) = world(PLAIN, false).await;
    say(&mut client, "GET /images/get HTTP/1.1\r\n\r\n").await;
    client.shutdown().await.unwrap();
    read_to_end(&mut daemon).await;
    say(&mut daemon, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n").await;
    for piece in ["a", "b", "c", "d", "e", "f"] {
        // Slower in all than a silent daemon would be given.
        sleep(AFTER_FIN / 4).await;
        say(&mut daemon, piece).await;
        read_until(&mut client, piece).await;
    }
    assert_eq!(over(task).await.kept(), (false, false));
}

/// Sends the pieces one by one, so that they mostly arrive one by one.
async fn in_pieces(far: &mut (impl AsyncWrite + Unpin), bytes: &[u8], seed: &mut u64) {
    let mut rest = bytes;
    while !rest.is_empty() {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let (piece, tail) = rest.split_at((1 + (*seed >> 33) as usize % 12).min(rest.len()));
        say(far, piece).await;
        for _ in 0..*seed >> 62 {
            tokio::task::yield_now().await;
        }
        rest = tail;
    }
}

#[tokio::test]
async fn however_a_conversation_is_cut_it_arrives_the_same() {
    let requests = [
        "POST /1 HTTP/1.1\r\nHost:\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nB;x=y\r\n0\r\n\r\n hello\r\n0\r\nT: v\r\n\r\n",
        "HEAD /2 HTTP/1.1\r\n\r\n",
        "PUT /3 HTTP/1.1\r\nContent-Length: 5\r\n\r\n\r\n\r\n!",
    ];
    let responses = [
        "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n\r\n\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n",
        "HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nno!",
    ];
    for mut seed in 0..60 {
        let ((mut near_client, client), (mut near_daemon, mut daemon)) = (tcp().await, unix());
        let task = tokio::spawn(async move {
            while let Some(head) = near_client.read_head().await.unwrap() {
                let end = exchange(&mut near_client, &mut near_daemon, &head, PLAIN, &mut ()).await;
                assert!(matches!(end.outcome, Outcome::Done { keep_daemon: true, .. }), "{end:?}");
            }
        });
        let (mut reading, mut writing) = tokio::io::split(client);
        let mut other_seed = seed ^ 77;
        let asking = async {
            in_pieces(&mut writing, requests.concat().as_bytes(), &mut seed).await;
        };
        let answering = async {
            for (request, response) in requests.iter().zip(responses) {
                let mut got = vec![0; request.len()];
                soon(tokio::io::AsyncReadExt::read_exact(&mut daemon, &mut got)).await.unwrap();
                assert_eq!(got, request.as_bytes());
                in_pieces(&mut daemon, response.as_bytes(), &mut other_seed).await;
            }
        };
        let expected = responses.concat();
        let mut got = vec![0; expected.len()];
        let reading = async {
            soon(tokio::io::AsyncReadExt::read_exact(&mut reading, &mut got)).await.unwrap();
        };
        tokio::join!(asking, answering, reading);
        assert_eq!(String::from_utf8(got), Ok(expected));
        soon(writing.shutdown()).await.unwrap();
        soon(task).await.unwrap();
    }
}

#[tokio::test]
async fn a_hijack_becomes_a_tunnel_on_101_and_on_a_bare_200() {
    for answer in [
        "HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\n",
    ] {
        for (request, body) in [
            ("POST /containers/a/attach HTTP/1.1\r\n\r\n", ""),
            ("POST /exec/a/start HTTP/1.1\r\nContent-Length: 2\r\n\r\n", "{}"),
            ("POST /exec/a/start HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", "2\r\n{}\r\n"),
            ("POST /exec/a/start HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", "2\r\n{}\r\n0\r\n\r\n"),
        ] {
            let (mut client, mut daemon, task) = world(HIJACK, false).await;
            say(&mut client, format!("{request}{body}")).await;
            read_until(&mut daemon, &format!("{request}{body}")).await;
            say(&mut client, "GET raw stdin").await;
            // Until the daemon has answered nobody knows that this is not HTTP, so it is held.
            say(&mut daemon, answer).await;
            read_until(&mut client, answer).await;
            let mut done = over(task).await;
            assert!(matches!(done.exchange.outcome, Outcome::Upgraded));
            assert_eq!(soon(done.client.peek(13)).await.unwrap(), b"GET raw stdin");
            say(&mut daemon, "raw output").await;
            assert_eq!(soon(done.daemon.peek(10)).await.unwrap(), b"raw output");
        }
    }
}

#[tokio::test]
async fn raw_stdin_in_one_segment_with_an_unterminated_body_is_held() {
    let (mut client, mut daemon, task) = world(HIJACK, false).await;
    let request = "POST /exec/a/start HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n";
    say(&mut client, format!("{request}ls -l\n")).await;
    assert_eq!(read_until(&mut daemon, "{}\r\n").await, request);
    say(&mut daemon, "HTTP/1.1 101 UPGRADED\r\n\r\n").await;
    let mut done = over(task).await;
    assert!(matches!(done.exchange.outcome, Outcome::Upgraded));
    assert_eq!(soon(done.client.peek(6)).await.unwrap(), b"ls -l\n");
}

#[tokio::test]
async fn output_right_behind_the_101_stays_for_the_tunnel() {
    let (mut client, mut daemon, task) = world(HIJACK, false).await;
    say(&mut client, "POST /a HTTP/1.1\r\n\r\n").await;
    say(&mut daemon, "HTTP/1.1 101 UPGRADED\r\n\r\n\x01\0\0\0\0\0\0\x01x").await;
    let done = over(task).await;
    assert!(matches!(done.exchange.outcome, Outcome::Upgraded));
    assert_eq!(done.daemon.buffered(), b"\x01\0\0\0\0\0\0\x01x");
}

#[tokio::test]
async fn the_fin_of_a_hijack_that_has_not_been_answered_is_passed_on() {
    let (mut client, mut daemon, task) = world(HIJACK, false).await;
    say(&mut client, "POST /a HTTP/1.1\r\n\r\n").await;
    client.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut daemon).await.1, Ending::Fin);
    say(&mut daemon, "HTTP/1.1 101 UPGRADED\r\n\r\n").await;
    let done = over(task).await;
    assert!(matches!(done.exchange.outcome, Outcome::Upgraded));
    assert!(done.client.is_eof() && done.daemon.is_shut());
}

#[tokio::test]
async fn a_refused_hijack_is_a_response_like_any_other() {
    let refusal = "HTTP/1.1 409 Conflict\r\nContent-Length: 16\r\n\r\n{\"message\":\"no\"}";
    let (mut client, mut daemon, task) = world(HIJACK, false).await;
    let done = whole(&mut client, &mut daemon, task, "POST /a HTTP/1.1\r\n\r\n", refusal).await;
    assert_eq!(done.kept(), (true, true));

    let (mut client, mut daemon, task) = world(HIJACK, false).await;
    say(&mut client, "POST /a HTTP/1.1\r\n\r\nGET /secret HTTP/1.1\r\n\r\n").await;
    assert_eq!(read_until(&mut daemon, "\r\n\r\n").await, "POST /a HTTP/1.1\r\n\r\n");
    say(&mut daemon, refusal).await;
    assert_eq!(read_to_end(&mut client).await, (refusal.as_bytes().to_vec(), Ending::Fin));
    drop(client);
    assert_eq!(over(task).await.kept(), (false, false));
    assert!(read_to_end(&mut daemon).await.0.is_empty(), "the stray bytes have reached the daemon");
}

#[tokio::test]
async fn an_upgrade_that_nobody_asked_for_is_the_daemons_fault() {
    let (mut client, mut daemon, task) = world(PLAIN, false).await;
    say(&mut client, "GET /a HTTP/1.1\r\n\r\n").await;
    say(&mut daemon, "HTTP/1.1 101 Switching Protocols\r\n\r\n").await;
    assert!(over(task).await.failure().before_response);
}

#[tokio::test]
async fn a_client_that_never_reads_holds_the_daemon_back() {
    let (mut client, mut daemon, task) = world(PLAIN, false).await;
    say(&mut client, "GET /images/get HTTP/1.1\r\n\r\n").await;
    say(&mut daemon, "HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n").await;
    let taken = write_until_stalled(&mut daemon).await;
    assert!(taken < 64 << 20, "{taken} bytes are somewhere");
    let died = Instant::now();
    drop(client); // with unread bytes: RST
    let done = over(task).await;
    assert!(died.elapsed() <= Duration::from_secs(1));
    assert!(matches!(done.exchange.outcome, Outcome::ClientGone));
}

#[tokio::test]
async fn a_stalled_daemon_holds_the_upload_back() {
    let (mut client, mut daemon, task) = world(PLAIN, false).await;
    say(&mut client, "POST /build HTTP/1.1\r\nContent-Length: 10000000000\r\n\r\n").await;
    read_until(&mut daemon, "\r\n\r\n").await;
    let taken = write_until_stalled(&mut client).await;
    assert!(taken < 64 << 20, "{taken} bytes are somewhere");
    reset(client);
    assert!(matches!(over(task).await.exchange.outcome, Outcome::ClientGone));
}

#[tokio::test]
async fn what_is_pipelined_is_bounded_and_the_clients_end_is_still_seen() {
    let (mut client, mut daemon, task) = world(PLAIN, false).await;
    say(&mut client, "GET /events HTTP/1.1\r\n\r\n").await;
    read_until(&mut daemon, "\r\n\r\n").await;
    say(&mut client, "x".repeat(3 * PIPELINED)).await;
    drop(client);
    assert_eq!(read_to_end(&mut daemon).await.1, Ending::Fin);
    say(&mut daemon, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    let done = over(task).await;
    assert!(done.client.buffered().len() <= PIPELINED);
}

#[tokio::test]
async fn big_bodies_arrive_whole_both_ways_at_once() {
    for tcp_daemon in [true, false] {
        let (near_client, client) = tcp().await;
        let (near_daemon, daemon): (Side, Box<dyn Far>) = if tcp_daemon {
            let (near, far) = tcp().await;
            (near, Box::new(far))
        } else {
            let (near, far) = unix();
            (near, Box::new(far))
        };
        let task = relay(near_client, near_daemon, PLAIN, false);
        const SIZE: usize = 20_000_000;
        let (mut client_in, mut client_out) = tokio::io::split(client);
        let (mut daemon_in, mut daemon_out) = tokio::io::split(daemon);
        let bytes: Vec<u8> = (0..SIZE).map(|i| (i / 7) as u8).collect();
        let send = |head: String| [head.as_bytes(), &bytes].concat();
        let up = send(format!("POST / HTTP/1.1\r\nContent-Length: {SIZE}\r\n\r\n"));
        let down = send(format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n"));
        let (mut got_up, mut got_down) = (vec![0; up.len()], vec![0; down.len()]);
        let all = async {
            tokio::join!(
                client_out.write_all(&up),
                daemon_out.write_all(&down),
                tokio::io::AsyncReadExt::read_exact(&mut daemon_in, &mut got_up),
                tokio::io::AsyncReadExt::read_exact(&mut client_in, &mut got_down),
            )
        };
        let (a, b, c, d) = soon(all).await;
        assert!(a.is_ok() && b.is_ok() && c.is_ok() && d.is_ok());
        assert!(got_up == up && got_down == down);
        let done = over(task).await;
        assert_eq!(done.kept(), (true, true));
        assert_eq!(done.exchange.received, down.len() as u64);
    }
}

#[test]
fn the_future_is_small() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _guard = runtime.enter();
    let ((mut client, _a), (mut daemon, _b)) = (unix(), unix());
    let head = RequestHead::parse(b"GET / HTTP/1.1\r\n\r\n".to_vec()).unwrap();
    let size = size_of_val(&exchange(&mut client, &mut daemon, &head, PLAIN, &mut ()));
    let side = size_of::<Side>();
    println!("exchange {size}, side {side}");
    assert!(size <= 640, "{size}");
    assert!(side <= 192, "{side}");
}
