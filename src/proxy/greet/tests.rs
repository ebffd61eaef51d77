use std::net::SocketAddr;
use std::path::Path;

use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use time::OffsetDateTime;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::super::isolation::{daemon, proxy_at};
use super::super::relay::testing::{Ending, read_to_end, read_until, say, soon};
use super::*;
use crate::proxy::Proxy;
use crate::tls::identity::Rule;
use crate::tls::make::{Made, Order, make};
use crate::tls::settings::{Clients, Pair, Settings};

/// A proxy that has certificates.
struct World {
    proxy: Arc<Proxy>,
    address: String,
    made: Made,
    _dir: tempfile::TempDir,
}

fn order(dir: &Path) -> Order {
    Order {
        directory: dir.into(),
        hosts: vec!["pool.ci".into(), "*.pool.ci".into()],
        client: "client".into(),
        days: 30,
    }
}

async fn world(clients: Clients, plain: Plain, change: impl FnOnce(&mut Entry)) -> World {
    let dir = tempfile::tempdir().unwrap();
    let made = make(&order(dir.path()), OffsetDateTime::now_utc()).unwrap();
    let file = |name: &str| made.server.join(name);
    let settings = Settings {
        certificates: vec![Pair { cert: file("cert.pem"), key: file("key.pem") }],
        client_ca: Some(file("ca.pem")),
        clients,
        plain,
    };
    let mut entry = Entry::from(ListenerIdentity { tenant: "default".into(), session: None });
    entry.tls = Some(Arc::new(Server::new(&settings).unwrap()));
    change(&mut entry);
    let (endpoint, _) = daemon("a").await;
    let (proxy, address) = proxy_at(vec![("d", endpoint)], entry).await;
    World { proxy, address, made, _dir: dir }
}

impl World {
    /// A client that trusts this pool, with the certificate in `files`, if any.
    async fn client(&self, host: &str, files: Option<&Path>) -> io::Result<TlsStream<TcpStream>> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.made.server.join("ca.pem")).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match files {
            Some(files) => {
                let cert = CertificateDer::from_pem_file(files.join("cert.pem")).unwrap();
                let key = PrivateKeyDer::from_pem_file(files.join("key.pem")).unwrap();
                config.with_client_auth_cert(vec![cert], key).unwrap()
            }
            None => config.with_no_client_auth(),
        };
        let stream = TcpStream::connect(&self.address).await.unwrap();
        let host = host.to_string().try_into().unwrap();
        soon(TlsConnector::from(Arc::new(config)).connect(host, stream)).await
    }

    fn sessions(&self) -> Vec<String> {
        self.proxy.pool.status().sessions.iter().map(|s| s.key.to_string()).collect()
    }

    fn counted(&self, metric: &prometheus::IntCounterVec, label: &str) -> u64 {
        metric.with_label_values(&[label]).get()
    }
}

const PING: &str = "GET /_ping HTTP/1.1\r\nHost: d\r\n\r\n";
const LIST: &str = "GET /containers/json HTTP/1.1\r\nHost: d\r\n\r\n";
const LOGS: &str = "GET /containers/long/logs HTTP/1.1\r\nHost: d\r\n\r\n";
const BUILD: &str = "POST /build?t=a HTTP/1.1\r\nHost: d\r\nContent-Length: 0\r\n\r\n";

async fn answer(far: &mut impl super::super::relay::testing::Far, request: &str) -> String {
    say(far, request).await;
    String::from_utf8(read_to_end(far).await.0).unwrap()
}

#[tokio::test]
async fn tls_and_plain_share_a_port() {
    let world = world(Clients::Required, Plain::Allowed, |_| {}).await;
    let mut tls = world.client("pool.ci", Some(&world.made.client)).await.unwrap();
    say(&mut tls, PING).await;
    read_until(&mut tls, "OK").await;
    let mut plain = TcpStream::connect(&world.address).await.unwrap();
    say(&mut plain, PING).await;
    read_until(&mut plain, "OK").await;
    assert_eq!(world.counted(&world.proxy.metrics.tls_handshakes, "done"), 1);
    // ClientHello byte by byte: no read is the whole of it.
    say(&mut tls, LIST).await;
    read_until(&mut tls, "[]").await;
    world.proxy.pool.stop();
}

/// Nothing but the refusal comes to who is not let in, and no daemon hears of it.
#[tokio::test]
async fn who_has_no_good_certificate_reads_why() {
    let world = world(Clients::Required, Plain::Allowed, |_| {}).await;
    let (other, late) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let now = OffsetDateTime::now_utc();
    let other = make(&order(other.path()), now).unwrap();
    // By the CA that is known here, a year ago.
    std::fs::create_dir(late.path().join("ca")).unwrap();
    for file in ["cert.pem", "key.pem"] {
        let ca = world.made.server.parent().unwrap().join("ca");
        std::fs::copy(ca.join(file), late.path().join("ca").join(file)).unwrap();
    }
    let late = make(&order(late.path()), now - std::time::Duration::from_secs(365 * 24 * 3600)).unwrap();
    for (files, words) in [
        (None, "this listener needs a client certificate"),
        (Some(&other.client), "not from a CA that is known here"),
        (Some(&late.client), "your client certificate expired on"),
        (Some(&world.made.server), "not one of a client"),
    ] {
        for request in [
            LIST,
            BUILD,
            "GET /_ping HTTP/1.1\r\nHost: d\r\n\r\n",
            "POST /containers/x/attach HTTP/1.1\r\nUpgrade: tcp\r\n\r\n",
        ] {
            let mut tls = world.client("pool.ci", files.map(|f| f.as_path())).await.unwrap();
            let got = answer(&mut tls, request).await;
            assert!(got.contains(words) && !got.contains(" 200 "), "{files:?}: {got}");
            assert!(!got.contains("OK\r\n") || got.contains("429"), "{got}");
        }
        let mut tls = world.client("pool.ci", files.map(|f| f.as_path())).await.unwrap();
        let got = answer(&mut tls, "POST /grpc HTTP/1.1\r\nUpgrade: h2c\r\n\r\n").await;
        assert_eq!(got, "", "buildx falls back to another driver for any answer but 101");
    }
    assert!(world.sessions().is_empty());
    world.proxy.pool.stop();
}

#[tokio::test]
async fn optional_means_none_or_a_good_one() {
    let world = world(Clients::Optional, Plain::Allowed, |_| {}).await;
    let mut tls = world.client("pool.ci", None).await.unwrap();
    say(&mut tls, PING).await;
    read_until(&mut tls, "OK").await;
    let other = tempfile::tempdir().unwrap();
    let other = make(&order(other.path()), OffsetDateTime::now_utc()).unwrap();
    let mut tls = world.client("pool.ci", Some(&other.client)).await.unwrap();
    assert!(answer(&mut tls, LIST).await.contains("not from a CA that is known here"));
    world.proxy.pool.stop();
}

#[tokio::test]
async fn plain_is_refused_where_it_is_to_be() {
    let world = world(Clients::Required, Plain::Refused, |_| {}).await;
    let mut plain = TcpStream::connect(&world.address).await.unwrap();
    let got = answer(&mut plain, LIST).await;
    assert!(got.starts_with("HTTP/1.1 403 ") && got.contains("takes TLS only"), "{got}");
    let mut tls = world.client("pool.ci", Some(&world.made.client)).await.unwrap();
    say(&mut tls, LIST).await;
    read_until(&mut tls, "[]").await;
    world.proxy.pool.stop();
}

#[tokio::test]
async fn a_handshake_that_does_not_come_is_not_waited_for() {
    let world = world(Clients::Required, Plain::Allowed, |_| {}).await;
    let mut slow = TcpStream::connect(&world.address).await.unwrap();
    say(&mut slow, b"\x16\x03\x01\x02\x00\x01").await;
    soon(async {
        while world.proxy.drain.open() == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    tokio::time::pause();
    tokio::time::advance(2 * world.proxy.head_deadline).await;
    assert_eq!(read_to_end(&mut slow).await, (Vec::new(), Ending::Fin));
    assert_eq!(world.counted(&world.proxy.metrics.tls_handshakes, "failed"), 1);
    world.proxy.pool.stop();
}

#[tokio::test]
async fn rules_make_a_tenant_of_a_host_and_a_session_of_a_certificate() {
    let rules: toml::Table = "identify = [{ cn = 'client', sni = 'x' }]".parse().unwrap();
    assert!(Rule::from_toml(rules["identify"].clone()).is_err());
    let rules: toml::Table =
        "identify = [{ sni = '*.pool.ci', tenant = '*' }, { cn = 'client', session = 'release' }]"
            .parse()
            .unwrap();
    let rules = Rule::from_toml(rules["identify"].clone()).unwrap();
    let world = world(Clients::Optional, Plain::Allowed, |entry| entry.rules = rules.into()).await;
    let mut team = world.client("team-a.pool.ci", None).await.unwrap();
    say(&mut team, LOGS).await;
    read_until(&mut team, "hello\r\n").await;
    let mut release = world.client("pool.ci", Some(&world.made.client)).await.unwrap();
    say(&mut release, BUILD).await;
    read_until(&mut release, "{}").await;
    let mut elsewhere = world.client("team-a.pool.ci", None).await.unwrap();
    let got = answer(&mut elsewhere, "GET /t/team-b/containers/json HTTP/1.1\r\nHost: d\r\n\r\n").await;
    assert!(got.contains("this client is of tenant team-a"), "{got}");
    let sessions = world.sessions();
    assert!(sessions.iter().any(|s| s == "tls:release"), "{sessions:?}");
    world.proxy.pool.stop();
}

#[tokio::test]
async fn a_proxy_header_counts_from_the_configured_networks_only() {
    let header = "PROXY TCP4 10.9.8.7 10.0.0.1 5000 2375\r\n";
    let world = world(Clients::Off, Plain::Allowed, |entry| {
        entry.load_balancers = vec!["127.0.0.0/8".parse().unwrap()];
    })
    .await;
    let mut through = TcpStream::connect(&world.address).await.unwrap();
    say(&mut through, format!("{header}{BUILD}")).await;
    read_until(&mut through, "{}").await;
    assert!(world.sessions().iter().any(|s| s == "ip:10.9.8.7"), "{:?}", world.sessions());
    let mut direct = TcpStream::connect(&world.address).await.unwrap();
    say(&mut direct, PING).await;
    read_until(&mut direct, "OK").await;
    let mut twice = TcpStream::connect(&world.address).await.unwrap();
    let got = answer(&mut twice, &format!("{header}{header}{PING}")).await;
    assert!(got.starts_with("HTTP/1.1 400 "), "{got}");
    world.proxy.pool.stop();

    let world = self::world(Clients::Off, Plain::Allowed, |_| {}).await;
    let mut forged = TcpStream::connect(&world.address).await.unwrap();
    let got = answer(&mut forged, &format!("{header}{BUILD}")).await;
    assert!(got.starts_with("HTTP/1.1 400 ") && got.contains("proxy_protocol"), "{got}");
    assert!(world.sessions().is_empty());
    assert_eq!(world.counted(&world.proxy.metrics.proxy_headers, "refused"), 1);
    world.proxy.pool.stop();
}

#[tokio::test]
async fn a_proxy_header_may_come_before_tls() {
    let world = world(Clients::Required, Plain::Refused, |entry| {
        entry.load_balancers = vec!["127.0.0.1".parse().unwrap()];
    })
    .await;
    let from: SocketAddr = "10.9.8.7:5000".parse().unwrap();
    let mut stream = TcpStream::connect(&world.address).await.unwrap();
    stream
        .write_all(format!("PROXY TCP4 {} 10.0.0.1 {} 2375\r\n", from.ip(), from.port()).as_bytes())
        .await
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(world.made.server.join("ca.pem")).unwrap()).unwrap();
    let cert = CertificateDer::from_pem_file(world.made.client.join("cert.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(world.made.client.join("key.pem")).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![cert], key)
        .unwrap();
    let connect = TlsConnector::from(Arc::new(config)).connect("pool.ci".try_into().unwrap(), stream);
    let mut tls = soon(connect).await.unwrap();
    say(&mut tls, BUILD).await;
    read_until(&mut tls, "{}").await;
    assert!(world.sessions().iter().any(|s| s == "ip:10.9.8.7"), "{:?}", world.sessions());
    world.proxy.pool.stop();
}
