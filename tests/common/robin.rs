//! The control of the experiment: what a Service or a round-robin balancer does to the same clients and daemons.

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::daemon::Daemon;
use super::http::Addr;

/// Starts a TCP proxy that gives each connection to the next daemon; it ends with the test process.
pub fn start(daemons: &[Daemon]) -> Addr {
    let sockets: Vec<_> = daemons
        .iter()
        .map(|d| match &d.addr {
            Addr::Unix(path) => path.clone(),
            Addr::Tcp(host) => panic!("{host} is no Unix socket"),
        })
        .collect();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let addr = Addr::Tcp(listener.local_addr().expect("an address").to_string());
    let next = AtomicUsize::new(0);
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let socket = &sockets[next.fetch_add(1, Ordering::Relaxed) % sockets.len()];
            if let Ok(daemon) = UnixStream::connect(socket) {
                relay(client, daemon);
            }
        }
    });
    addr
}

fn relay(client: TcpStream, daemon: UnixStream) {
    let (Ok(mut client2), Ok(mut daemon2)) = (client.try_clone(), daemon.try_clone()) else { return };
    let (mut client, mut daemon) = (client, daemon);
    std::thread::spawn(move || {
        let _ = io::copy(&mut client2, &mut daemon2);
        let _ = daemon2.shutdown(Shutdown::Write);
    });
    std::thread::spawn(move || {
        let _ = io::copy(&mut daemon, &mut client);
        let _ = client.shutdown(Shutdown::Both);
    });
}
