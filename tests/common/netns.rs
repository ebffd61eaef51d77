//! Clients with source addresses of their own: a bridge, and a network namespace per client on it.

use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use super::registry::ip_command;

/// A bridge with an address of the host on it, and namespaces behind it; all gone when dropped.
pub struct Bridge {
    name: String,
    net: String,
    /// The host's address on it, for a listener.
    pub ip: String,
    /// Names of the namespaces.
    pub namespaces: Vec<String>,
}

impl Bridge {
    /// A bridge with `n` namespaces.
    pub fn new(n: usize) -> Bridge {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (pid, n_th) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let name = format!("dpb{}{}", pid % 100_000, n_th % 10);
        let net = format!("10.{}.{}", 216 + ((pid >> 8) + n_th) % 3, pid % 256);
        let ip = format!("{net}.1");
        ip_command(&["link", "add", &name, "type", "bridge"]);
        ip_command(&["addr", "add", &format!("{ip}/24"), "dev", &name]);
        ip_command(&["link", "set", &name, "up"]);
        let mut bridge = Bridge { name, net, ip, namespaces: Vec::new() };
        for i in 0..n {
            bridge.add(i);
        }
        bridge
    }

    /// A TCP port in the i-th namespace that leads to a Unix socket: a daemon on a machine of its own. Its address.
    pub fn node(&self, i: usize, socket: &Path) -> String {
        let address = format!("{}.{}:2375", self.net, i + 10);
        listen_inside(&format!("/run/netns/{}", self.namespaces[i]), &address, socket);
        address
    }

    /// From now on no packet reaches the i-th namespace or leaves it, and nobody is told: its machine has gone.
    pub fn lose(&self, i: usize) {
        for chain in ["INPUT", "OUTPUT"] {
            let net = format!("--net=/run/netns/{}", self.namespaces[i]);
            let drop = ["iptables", "-w", "-A", chain, "-j", "DROP"];
            let done = Command::new("nsenter").arg(net).args(drop).status().expect("nsenter");
            assert!(done.success());
        }
    }

    fn add(&mut self, i: usize) {
        let ns = format!("{}n{i}", self.name);
        let (outer, inner) = (format!("{ns}o"), format!("{ns}i"));
        ip_command(&["netns", "add", &ns]);
        self.namespaces.push(ns.clone());
        ip_command(&["link", "add", &outer, "type", "veth", "peer", "name", &inner]);
        ip_command(&["link", "set", &inner, "netns", &ns]);
        ip_command(&["link", "set", &outer, "master", &self.name]);
        ip_command(&["link", "set", &outer, "up"]);
        let address = format!("{}.{}/24", self.net, i + 10);
        ip_command(&["-n", &ns, "addr", "add", &address, "dev", &inner]);
        ip_command(&["-n", &ns, "link", "set", &inner, "up"]);
        ip_command(&["-n", &ns, "link", "set", "lo", "up"]);
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        for ns in &self.namespaces {
            let _ = Command::new("ip").args(["netns", "del", ns]).status();
        }
        let _ = Command::new("ip").args(["link", "del", &self.name]).status();
    }
}

/// A TCP port in a network namespace, given by its file, that leads to a Unix socket.
pub fn listen_inside(namespace: &str, address: &str, socket: &Path) {
    let namespace = std::fs::File::open(namespace).expect("a namespace");
    let (address, socket) = (address.to_owned(), socket.to_path_buf());
    let (ready, bound) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("setns");
        let listener = TcpListener::bind(address).expect("a listener");
        let _ = ready.send(());
        for stream in listener.incoming().flatten() {
            forward(stream, &socket);
        }
    });
    bound.recv().expect("it listens");
}

/// Both directions between a client and a Unix socket, each in a thread.
fn forward(client: TcpStream, socket: &PathBuf) {
    let Ok(daemon) = UnixStream::connect(socket) else { return };
    let (mut from, mut to) = (client.try_clone().expect("dup"), daemon.try_clone().expect("dup"));
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Write);
    });
    let (mut from, mut to) = (daemon, client);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Write);
    });
}
