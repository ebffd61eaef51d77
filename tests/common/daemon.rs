//! A real daemon's own records, read from its own socket and not through the pool: the proof of where work went.

use serde_json::Value;

use super::http::{self, Addr, Conn};

/// One dockerd of a pool.
#[derive(Debug, Clone)]
pub struct Daemon {
    /// The pool's name for it.
    pub id: String,
    /// Its own socket.
    pub addr: Addr,
}

impl Daemon {
    /// `GET path`, which must succeed, as JSON.
    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        let answer = http::get(&self.addr, path);
        assert_eq!(answer.head.status(), 200, "{} {path}: {}", self.id, answer.text());
        answer.json()
    }

    /// All containers, the stopped ones too.
    pub fn containers(&self) -> Vec<Value> {
        self.get("/containers/json?all=1").as_array().cloned().unwrap_or_default()
    }

    /// Removes every container, running or not.
    pub fn remove_containers(&self) {
        for container in self.containers() {
            let id = container["Id"].as_str().unwrap_or_default();
            http::request(&self.addr, "DELETE", &format!("/containers/{id}?force=1&v=1"), None);
        }
    }

    /// Names of the containers that carry `key=value` as a label.
    pub fn labelled(&self, label: &str) -> Vec<String> {
        let all = self.containers();
        let (key, value) = label.split_once('=').expect("key=value");
        all.iter()
            .filter(|c| c["Labels"][key] == value)
            .map(|c| c["Names"][0].as_str().unwrap_or_default().trim_start_matches('/').to_owned())
            .collect()
    }

    /// Whether an image of this reference, id or name, is here.
    pub fn has_image(&self, reference: &str) -> bool {
        http::get(&self.addr, &format!("/images/{reference}/json")).head.status() == 200
    }

    /// Whether a container of this name or id is here.
    pub fn has_container(&self, name: &str) -> bool {
        http::get(&self.addr, &format!("/containers/{name}/json")).head.status() == 200
    }

    /// Whether a volume of this name is here.
    pub fn has_volume(&self, name: &str) -> bool {
        http::get(&self.addr, &format!("/volumes/{name}")).head.status() == 200
    }

    /// Whether a network of this name is here.
    pub fn has_network(&self, name: &str) -> bool {
        http::get(&self.addr, &format!("/networks/{name}")).head.status() == 200
    }

    /// Everything that happened here up to now, as the daemon remembers it.
    pub fn events(&self) -> Vec<Value> {
        let now = self.get("/info")["SystemTime"].as_str().expect("SystemTime").to_owned();
        let answer = http::get(&self.addr, &format!("/events?since=0&until={now}"));
        serde_json::Deserializer::from_slice(&answer.body).into_iter().filter_map(Result::ok).collect()
    }

    /// The dockerd's pid: whoever listens on its socket.
    pub fn pid(&self) -> i32 {
        Conn::connect(&self.addr).peer_pid()
    }
}

/// The daemons on which `here` holds.
pub fn where_is(daemons: &[Daemon], here: impl Fn(&Daemon) -> bool) -> Vec<String> {
    daemons.iter().filter(|d| here(d)).map(|d| d.id.clone()).collect()
}

/// Processes of this machine (also those inside containers) that have `marker` as one whole argument; a shell
/// that only carries it inside a script is not counted.
pub fn processes(marker: &str) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let Ok(cmdline) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let args: Vec<&[u8]> = cmdline.split(|b| *b == 0).collect();
        if args.contains(&marker.as_bytes()) {
            found.push(pid);
        }
    }
    found
}
