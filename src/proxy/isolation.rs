//! A panic in one connection is that connection's end only. What panics is a failpoint of the tests' build: a request
//! with [`PANIC`] in its target.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::identify::ListenerIdentity;
use super::limits::{Gate, Limits};
use super::listener::{self, Address, Bound, Entry};
use super::peer::Peers;
use super::relay::testing::{Ending, read_to_end, read_until, say, soon};
use super::{Proxy, Sweeper, WaitingBuilds};
use crate::drain::Drain;
use crate::metrics::Metrics;
use crate::pool::{Config, Pool};
use crate::provision::{DaemonSpec, Endpoint, Observation};

const PANIC: &str = "failpoint";

/// Panics in the midst of the exchange that a test has marked.
pub(super) fn failpoint(target: &str) {
    assert!(!target.contains(PANIC), "a failpoint");
}

/// A daemon that is ready, has one stream that never ends, and creates containers.
/// When the task is aborted, new connections are refused, and those that are open go on.
pub(super) async fn daemon(id: &'static str) -> (Endpoint, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accepting = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(id, stream));
        }
    });
    (Endpoint::Tcp(address), accepting)
}

async fn serve(id: &str, mut stream: TcpStream) {
    let info = format!(r#"{{"ID":"{id}","NCPU":2,"MemTotal":8000000000,"Architecture":"x86_64"}}"#);
    let mut seen = Vec::new();
    while stream.read_buf(&mut seen).await.is_ok_and(|n| n > 0) {
        let Some(end) = seen.windows(4).position(|w| w == b"\r\n\r\n") else { continue };
        let line = String::from_utf8_lossy(&seen[..end]).lines().next().unwrap_or_default().to_string();
        let body = match line.split(' ').nth(1).unwrap_or_default().split('?').next().unwrap_or_default() {
            "/info" => info.as_str(),
            "/version" => r#"{"ApiVersion":"1.51","MinAPIVersion":"1.24","Version":"28.5.2"}"#,
            "/volumes" => r#"{"Volumes":[]}"#,
            "/events" | "/containers/long/logs" => {
                let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
                let _ = stream.write_all(head.as_bytes()).await;
                seen.clear();
                continue;
            }
            path if path.ends_with("/json") || path == "/networks" => "[]",
            _ => "{}",
        };
        let head = format!("HTTP/1.1 200 OK\r\nApi-Version: 1.51\r\nContent-Length: {}\r\n\r\n", body.len());
        let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
        seen.clear();
    }
}

/// A whole proxy in front of these daemons, and its address.
pub(super) async fn proxy(daemons: Vec<(&str, Endpoint)>) -> (Arc<Proxy>, String) {
    proxy_at(daemons, ListenerIdentity { tenant: "default".into(), session: None }.into()).await
}

/// The same behind a listener of the test's own.
pub(super) async fn proxy_at(daemons: Vec<(&str, Endpoint)>, entry: Entry) -> (Arc<Proxy>, String) {
    let metrics = Metrics::new(prometheus::Registry::new()).unwrap();
    let config = Config { slots: Some(3), probe_interval: Duration::from_secs(600), ..Config::default() };
    let pool = Pool::new(config, metrics.clone(), 1);
    let (observe, observations) = tokio::sync::mpsc::channel(1);
    tokio::spawn(pool.clone().run(observations));
    let many = daemons.len();
    let spec = |(id, endpoint): (&str, Endpoint)| DaemonSpec {
        id: id.into(),
        endpoint: Some(endpoint),
        source_ips: Vec::new(),
        cgroup: None,
        draining: false,
        pending: None,
        faulty: false,
        removal: Default::default(),
        slots: None,
    };
    let daemons = daemons.into_iter().map(spec).collect();
    observe.send(Observation { daemons, ..Observation::default() }).await.unwrap();
    let proxy = Arc::new(Proxy {
        pool: pool.clone(),
        peers: Arc::new(Peers::new(&[])),
        waiting: WaitingBuilds::default(),
        drain: Drain::new(),
        gate: Gate::new(Limits::default(), 1024),
        sweeper: Sweeper::default(),
        head_deadline: Duration::from_secs(30),
        metrics,
    });
    let bound = Bound::new(&Address::Tcp("127.0.0.1:0".into())).await.unwrap();
    let address = bound.address().replace("tcp://", "");
    tokio::spawn(listener::run(proxy.clone(), Arc::new(entry), bound));
    soon(async {
        while pool.status().daemons.iter().filter(|d| d.takes_sessions()).count() < many {
            tokio::task::yield_now().await;
        }
    })
    .await;
    (proxy, address)
}

#[tokio::test]
async fn row_47_a_panic_in_one_connection_ends_that_connection_only() {
    let (endpoint, _) = daemon("a").await;
    let (proxy, address) = proxy(vec![("d", endpoint)]).await;
    let mut bystander = TcpStream::connect(&address).await.unwrap();
    say(&mut bystander, "GET /s/other/containers/long/logs HTTP/1.1\r\nHost: d\r\n\r\n").await;
    read_until(&mut bystander, "hello\r\n").await;
    let before = proxy.pool.status().daemons[0].used;
    for _ in 0..10 {
        // Work, so that it holds a slot when it panics.
        let mut victim = TcpStream::connect(&address).await.unwrap();
        say(&mut victim, "POST /s/one/build?t=failpoint HTTP/1.1\r\nHost: d\r\nContent-Length: 0\r\n\r\n")
            .await;
        assert_eq!(read_to_end(&mut victim).await, (Vec::new(), Ending::Rst), "no clean end");
    }
    let (status, drain) = (|| proxy.pool.status(), &proxy.drain);
    soon(async {
        while drain.open() > 1 || status().sessions.iter().any(|s| s.open > 0) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // What lingers is one slot of one session, not one for each panic.
    assert!(status().daemons[0].used <= before + 1);
    assert_eq!(proxy.metrics.connections.with_label_values(&["tcp"]).get(), 1, "the bystander is left");
    let mut next = TcpStream::connect(&address).await.unwrap();
    say(&mut next, "POST /s/one/build?t=a HTTP/1.1\r\nHost: d\r\nContent-Length: 0\r\n\r\n").await;
    read_until(&mut next, "{}").await;
    let silent = tokio::time::timeout(Duration::from_millis(50), bystander.read_u8());
    assert!(silent.await.is_err(), "the bystander's stream goes on");
    proxy.pool.stop();
}
