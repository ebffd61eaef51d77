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
        let address = format!("{}:2375", self.address(i));
        listen_inside(&format!("/run/netns/{}", self.namespaces[i]), &address, socket);
        address
    }

    /// The address of the i-th namespace.
    pub fn address(&self, i: usize) -> String {
        format!("{}.{}", self.net, i + 10)
    }

    /// From now on no packet passes between the i-th namespace and the j-th; both go on with all others.
    pub fn part(&self, i: usize, j: usize) {
        self.between(i, j, "-A");
    }

    /// Takes back what [`Bridge::part`] did.
    pub fn mend(&self, i: usize, j: usize) {
        self.between(i, j, "-D");
    }

    fn between(&self, i: usize, j: usize, verb: &str) {
        let other = self.address(j);
        self.inside(i, &["iptables", "-w", verb, "INPUT", "-s", &other, "-j", "DROP"]);
        self.inside(i, &["iptables", "-w", verb, "OUTPUT", "-d", &other, "-j", "DROP"]);
    }

    /// From now on the i-th namespace's cable loses this part of the packets, and carries this much (as tc(8) says it),
    /// in each direction. There are kernels without netem, and even without the shaper: whether there is a limit of speed.
    pub fn worsen(&self, i: usize, loss: f64, rate: &str) -> bool {
        let lose = ["-m", "statistic", "--mode", "random", "--probability", &loss.to_string(), "-j", "DROP"];
        for chain in ["INPUT", "OUTPUT"] {
            self.inside(i, &[&["iptables", "-w", "-A", chain][..], &lose].concat());
        }
        let (outer, inner) = self.cable(i);
        let slow = ["root", "tbf", "rate", rate, "burst", "32kb", "latency", "50ms"];
        let mut here = Command::new("tc");
        let mut there = self.enter(i);
        there.arg("tc");
        let shaped = |tc: &mut Command, end: &str| {
            let done = tc.args(["qdisc", "add", "dev", end]).args(slow).output();
            done.is_ok_and(|done| done.status.success())
        };
        shaped(&mut here, &outer) && shaped(&mut there, &inner)
    }

    /// From now on no packet reaches the i-th namespace or leaves it, and nobody is told: its machine has gone.
    pub fn lose(&self, i: usize) {
        for chain in ["INPUT", "OUTPUT"] {
            self.inside(i, &["iptables", "-w", "-A", chain, "-j", "DROP"]);
        }
    }

    /// Ends the i-th namespace, and puts another one with the same address in its place: a pod has gone, and the next
    /// one got its address. Whoever is still in the old one reaches nobody any more.
    pub fn replace(&self, i: usize) {
        ip_command(&["link", "del", &self.cable(i).0]);
        ip_command(&["netns", "del", &self.namespaces[i]]);
        self.connect(i);
    }

    /// Runs a command, which must succeed, in the network of the i-th namespace.
    fn inside(&self, i: usize, command: &[&str]) {
        let done = self.enter(i).args(command).output().expect("nsenter");
        assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    }

    fn enter(&self, i: usize) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespaces[i]));
        command
    }

    /// Both ends of the i-th namespace's cable: at the bridge, and inside.
    fn cable(&self, i: usize) -> (String, String) {
        (format!("{}n{i}o", self.name), format!("{}n{i}i", self.name))
    }

    fn add(&mut self, i: usize) {
        self.namespaces.push(format!("{}n{i}", self.name));
        self.connect(i);
    }

    fn connect(&self, i: usize) {
        let ns = &self.namespaces[i];
        let (outer, inner) = self.cable(i);
        ip_command(&["netns", "add", ns]);
        ip_command(&["link", "add", &outer, "type", "veth", "peer", "name", &inner]);
        ip_command(&["link", "set", &inner, "netns", ns]);
        ip_command(&["link", "set", &outer, "master", &self.name]);
        ip_command(&["link", "set", &outer, "up"]);
        let address = format!("{}/24", self.address(i));
        ip_command(&["-n", ns, "addr", "add", &address, "dev", &inner]);
        ip_command(&["-n", ns, "link", "set", &inner, "up"]);
        ip_command(&["-n", ns, "link", "set", "lo", "up"]);
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
