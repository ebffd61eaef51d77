//! deploy/prestop.sh in busybox's shell, against a listener that answers as the pool does.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{parts, poll, secs};

#[path = "common/mod.rs"]
mod common;

const TOKEN: &str = "0123456789abcdef";

/// busybox with a PATH in which there is nothing else.
fn busybox() -> Result<(tempfile::TempDir, std::path::PathBuf), String> {
    common::root()?;
    parts::all(&["busybox/rootfs.tar"])?;
    let dir = common::short_dir();
    let tar = parts::dir().join("busybox/rootfs.tar");
    let status = Command::new("tar").arg("-C").arg(dir.path()).arg("-xf").arg(tar).status();
    assert!(status.is_ok_and(|status| status.success()));
    let bin = dir.path().join("bin");
    Ok((dir, bin))
}

/// What answers the hooks: the status lines in turn, then the last one again and again.
fn pool(answers: &'static [&'static str]) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let heads = Arc::new(Mutex::new(Vec::new()));
    let seen = heads.clone();
    std::thread::spawn(move || {
        for (i, stream) in listener.incoming().enumerate() {
            let Ok(mut stream) = stream else { return };
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let head: Vec<String> = lines.map_while(Result::ok).take_while(|l| !l.is_empty()).collect();
            seen.lock().unwrap().push(head.join("\n"));
            let status = answers[i.min(answers.len() - 1)];
            let body = if status.starts_with("200") { "drained\n" } else { "something else\n" };
            let _ = write!(
                stream,
                "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
        }
    });
    (url, heads)
}

/// Starts the hook in a network and among processes of its own, after `before`.
fn hook(bin: &Path, url: &str, own: bool, before: &str) -> Child {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/prestop.sh");
    let token = bin.with_file_name("token");
    fs::write(&token, format!("{TOKEN}\n")).unwrap();
    let mut command = Command::new("/usr/bin/env");
    if own {
        // Not the one of the PATH below.
        command = Command::new("/usr/bin/unshare");
        command.args(["--net", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    }
    command
        .arg(bin.join("busybox"))
        .args(["sh", "-c", &format!("{before}\n. {}", script.display())])
        .env("PATH", bin)
        .env("DINDPOOL_PRESTOP_URL", url)
        .env("DINDPOOL_PRESTOP_TOKEN_FILE", token)
        .env("POD_NAME", "dind-1")
        .env("PRESTOP_QUIET", "2")
        .env("http_proxy", "http://127.0.0.1:9")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn ends(child: &mut Child, within: Duration) -> Duration {
    let start = Instant::now();
    let status = poll(within, || child.try_wait().unwrap());
    if status.is_none() {
        let _ = child.kill();
        panic!("the hook does not end");
    }
    assert!(status.unwrap().0.success());
    start.elapsed()
}

#[test]
fn the_hook_waits_for_the_pools_word() {
    let (_dir, bin) = require!(busybox());
    let (url, heads) = pool(&["409 Conflict", "409 Conflict", "200 OK"]);
    ends(&mut hook(&bin, &url, false, ""), secs(20));
    let heads = heads.lock().unwrap();
    assert_eq!(heads.len(), 3);
    assert!(heads[0].starts_with("GET /drained/dind-1 "), "{}", heads[0]);
    assert!(heads[0].contains(&format!("Authorization: Bearer {TOKEN}")), "{}", heads[0]);
}

#[test]
fn without_the_pools_word_the_hook_waits_for_connections_and_then_for_quiet() {
    let (_dir, bin) = require!(busybox());
    // A client is connected to port 2375 for 6 s.
    let before = "ip link set lo up; sleep 9 | nc -l -p 2375 >/dev/null & sleep 1; \
                  sleep 6 | nc 127.0.0.1 2375 >/dev/null & sleep 1";
    let took = ends(&mut hook(&bin, "http://127.0.0.1:9", true, before), secs(40));
    assert!(took >= secs(8), "it did not wait for the client: {took:?}");
}

#[test]
fn without_the_pools_word_the_hook_waits_for_containers_and_steps_of_builds() {
    let (_dir, bin) = require!(busybox());
    for name in ["containerd-shim-runc-v2", "runc"] {
        // A script's process is called as its file.
        let program = bin.join(name);
        fs::write(&program, format!("#!{} sh\nsleep 6\n:\n", bin.join("busybox").display())).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let before = format!("ip link set lo up; {} & sleep 1", program.display());
        let took = ends(&mut hook(&bin, "http://127.0.0.1:9", true, &before), secs(40));
        assert!(took >= secs(7), "it did not wait for {name}: {took:?}");
    }
}
