//! A real registry, at an address that daemons in network namespaces of their own reach through the host.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::http::{self, Addr, Conn};
use super::{parts, secs, short_dir, unique, wait_until};

/// A running registry with `busybox:1` in it.
pub struct Registry {
    process: Child,
    link: String,
    /// host:port, the beginning of image references.
    pub name: String,
    dir: tempfile::TempDir,
}

impl Registry {
    /// Starts it. Its address sits on an empty bridge: there may be no network on this machine but loopback,
    /// which daemons in other namespaces do not share.
    pub fn start() -> Registry {
        let dir = short_dir();
        let pid = std::process::id();
        let link = format!("dpr{}", unique().replace('x', "-"));
        let link = link[link.len().saturating_sub(15)..].trim_start_matches('-').to_owned();
        let ip = format!("10.{}.{}.1", 213 + (pid >> 8) % 3, pid % 256);
        ip_command(&["link", "add", &link, "type", "bridge"]);
        ip_command(&["addr", "add", &format!("{ip}/32"), "dev", &link]);
        ip_command(&["link", "set", &link, "up"]);
        let port = free_port(&ip);
        let name = format!("{ip}:{port}");
        let config = dir.path().join("config.yml");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}, delete: \
                 {{enabled: true}}}}\nhttp: {{addr: \"{name}\"}}\n",
                dir.path().join("data").display()
            ),
        )
        .expect("a configuration");
        let process = Command::new(parts::dir().join("registry/docker-registry"))
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.path().join("log")).expect("a log"))
            .spawn()
            .expect("docker-registry starts");
        let registry = Registry { process, link, name, dir };
        wait_until("the registry answers", secs(20), || {
            http::try_request(&registry.addr(), "GET", "/v2/", None).is_ok_and(|a| a.head.status() == 200)
        });
        registry.put_busybox();
        registry
    }

    fn addr(&self) -> Addr {
        Addr::Tcp(self.name.clone())
    }

    /// What dockerd needs to use it without TLS. The scheme is for the BuildKit of 20.10, which takes a bare address
    /// for no configuration at all.
    pub fn dockerd_arg(&self) -> String {
        format!("--dockerd-arg=--insecure-registry=http://{}", self.name)
    }

    /// The base image that it always has.
    pub fn busybox(&self) -> String {
        format!("{}/busybox:1", self.name)
    }

    /// The tags of a repository as the registry itself tells them.
    pub fn tags(&self, repository: &str) -> Vec<String> {
        let answer = http::get(&self.addr(), &format!("/v2/{repository}/tags/list"));
        if answer.head.status() != 200 {
            return Vec::new();
        }
        let tags = answer.json()["tags"].as_array().cloned().unwrap_or_default();
        tags.iter().filter_map(|t| t.as_str().map(str::to_owned)).collect()
    }

    /// Puts the base image there without the help of any daemon, whose records would then tell of it.
    fn put_busybox(&self) {
        let tar = self.dir.path().join("layer.tar");
        fs::copy(parts::busybox("rootfs.tar"), &tar).expect("rootfs.tar");
        let diff = digest(&tar);
        let status = Command::new("gzip").args(["-n", "-1"]).arg(&tar).status().expect("gzip");
        assert!(status.success());
        let layer = self.put_blob(&self.dir.path().join("layer.tar.gz"));
        let config = self.dir.path().join("config.json");
        let image = json!({
            "architecture": std::env::consts::ARCH.replace("x86_64", "amd64").replace("aarch64", "arm64"),
            "os": "linux", "config": { "Cmd": ["sh"], "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] },
            "rootfs": { "type": "layers", "diff_ids": [diff] },
            "history": [{ "created": "2020-01-01T00:00:00Z", "created_by": "busybox" }]
        });
        fs::write(&config, image.to_string()).expect("a file");
        let config = self.put_blob(&config);
        let kind = "application/vnd.docker.distribution.manifest.v2+json";
        let manifest = json!({
            "schemaVersion": 2, "mediaType": kind,
            "config": blob("application/vnd.docker.container.image.v1+json", &config),
            "layers": [blob("application/vnd.docker.image.rootfs.diff.tar.gzip", &layer)],
        })
        .to_string();
        self.put("/v2/busybox/manifests/1", kind, manifest.as_bytes());
    }

    fn put_blob(&self, file: &Path) -> (String, usize) {
        let digest = digest(file);
        let data = fs::read(file).expect("a blob");
        let begun = http::request(&self.addr(), "POST", "/v2/busybox/blobs/uploads/", None);
        let location = begun.head.get("location").expect("an upload's location").to_owned();
        let path = location.split_once(&self.name).map_or(location.as_str(), |(_, path)| path);
        let path = format!("{path}&digest={digest}");
        self.put(&path, "application/octet-stream", &data);
        (digest, data.len())
    }

    fn put(&self, path: &str, kind: &str, data: &[u8]) {
        let mut conn = Conn::connect(&self.addr());
        conn.send(format!(
            "PUT {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            self.name,
            data.len()
        ));
        conn.send(data);
        let head = conn.head();
        let body = conn.body("PUT", &head);
        assert_eq!(head.status(), 201, "{path}: {}", String::from_utf8_lossy(&body));
    }
}

fn blob(kind: &str, (digest, size): &(String, usize)) -> Value {
    json!({ "mediaType": kind, "digest": digest, "size": size })
}

fn digest(file: &Path) -> String {
    let out = Command::new("sha256sum").arg(file).output().expect("sha256sum");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    format!("sha256:{}", text.split_whitespace().next().expect("a sum").trim_start_matches('\\'))
}

fn free_port(ip: &str) -> u16 {
    let listener = std::net::TcpListener::bind((ip, 0)).expect("a free port");
    listener.local_addr().expect("an address").port()
}

/// Runs `ip` of iproute2.
#[track_caller]
pub fn ip_command(args: &[&str]) {
    let out = Command::new("ip").args(args).output().expect("ip (package iproute2)");
    assert!(out.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr));
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = Command::new("ip").args(["link", "del", &self.link]).status();
    }
}
