//! What the relay's tests share: real sockets, and readers that tell a FIN from a RST.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::Side;
use crate::provision::Stream;
use crate::tls::Wire;

/// The far end of a side, held by a test.
pub trait Far: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Far for T {}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Fin,
    Rst,
}

/// A side and its far end over loopback TCP.
pub async fn tcp() -> (Side, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (near, _) = listener.accept().await.unwrap();
    near.set_nodelay(true).unwrap();
    far.set_nodelay(true).unwrap();
    (Side::new(Stream::Tcp(near)), far)
}

/// A side and its far end over a Unix socket.
pub fn unix() -> (Side, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    (Side::new(Stream::Unix(near)), far)
}

/// A side that serves TLS, and its far end.
pub async fn tls() -> (Side, TlsFar) {
    let key = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let der = rustls::pki_types::PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap();
    let server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![key.cert.der().clone()], der)
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(key.cert.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let (mut near, far) = tcp().await;
    let (Some(Stream::Tcp(near)), early) = near.take_parts() else { panic!("not TCP") };
    let accept = TlsAcceptor::from(Arc::new(server)).accept(Wire::new(near, early));
    let connect = TlsConnector::from(Arc::new(client)).connect("localhost".try_into().unwrap(), far);
    let (near, far) = soon(async { tokio::join!(accept, connect) }).await;
    (Side::new(Stream::Tls(Box::new(near.unwrap().into()))), far.unwrap())
}

/// The client's end of a TLS connection.
pub type TlsFar = tokio_rustls::client::TlsStream<TcpStream>;

/// A test that hangs has failed.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future).await.expect("this took more than 20 s")
}

/// Reads until what came ends with `tail`.
pub async fn read_until(far: &mut impl Far, tail: &str) -> String {
    let mut seen = Vec::new();
    while !seen.ends_with(tail.as_bytes()) {
        let mut byte = [0];
        let n = soon(far.read(&mut byte)).await.unwrap();
        assert_ne!(n, 0, "ended after {:?}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
    String::from_utf8(seen).unwrap()
}

/// Reads to the end and says what kind of end it was.
pub async fn read_to_end(far: &mut impl Far) -> (Vec<u8>, Ending) {
    let (mut seen, mut buf) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        match soon(far.read(&mut buf)).await {
            Ok(0) => return (seen, Ending::Fin),
            Ok(n) => seen.extend_from_slice(&buf[..n]),
            Err(error) => {
                // Of TLS also a FIN without a word.
                let broken = [io::ErrorKind::ConnectionReset, io::ErrorKind::UnexpectedEof];
                assert!(broken.contains(&error.kind()), "{error}");
                return (seen, Ending::Rst);
            }
        }
    }
}

pub async fn say(far: &mut (impl AsyncWrite + Unpin), text: impl AsRef<[u8]>) {
    soon(far.write_all(text.as_ref())).await.unwrap();
}

/// Closes a TCP connection with RST.
pub fn reset(far: TcpStream) {
    socket2::SockRef::from(&far).set_linger(Some(Duration::ZERO)).unwrap();
}

/// Writes until nobody has taken anything for a while; gives back how much was taken.
pub async fn write_until_stalled(far: &mut impl Far) -> usize {
    let (piece, mut taken) = (vec![b'x'; 1 << 16], 0);
    while let Ok(n) = timeout(Duration::from_millis(500), far.write(&piece)).await {
        taken += n.unwrap();
        assert!(taken < 1 << 30, "nothing holds it back");
    }
    taken
}
