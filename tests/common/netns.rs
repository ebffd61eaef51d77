//! Clients with source addresses of their own: a bridge, and a network namespace per client on it.

use std::process::Command;

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
        let pid = std::process::id();
        let name = format!("dpb{}", pid % 1_000_000);
        let net = format!("10.{}.{}", 216 + (pid >> 8) % 3, pid % 256);
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
