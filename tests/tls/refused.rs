//! Who is refused, and what they and the operator read.

use std::fs;
use std::path::Path;

use dindpool::tls::make::{Order, make};
use time::OffsetDateTime;

use super::common::client::{self, Session};
use super::common::http;
use super::common::pool::Pool;
use super::common::scenarios::Scenarios;
use super::common::{secs, wait_until};
use super::{Lab, make_certs};

pub fn add<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    all.add("no certificate, or one of a wrong CA: each reads what to do", || certificates(lab));
    all.add("an expired certificate of a client: it reads what to do, and doing that helps", || expired(lab));
    all.add("an expired certificate of the pool: the client reads it, and the log what to do", || {
        expired_pool(lab)
    });
    all.add("a client that does not trust the pool's certificate", || untrusted(lab));
    all.add("where TLS is required, a plain client reads how to use it", || plain(lab));
    all.add("TLS to a listener without it", || no_tls(lab));
}

/// What a client of each kind reads.
fn reads(lab: &Lab, files: &Path, words: &str) {
    for flavour in [client::BUILDX_29, client::CLI_28, client::CLI_20] {
        let t = lab.without_context(flavour);
        t.ok(&lab.create_context("bad", files));
        let out = t.fails("unset DOCKER_HOST; docker --context bad ps");
        assert!(out.stderr.contains(words), "{}: ps: {}", flavour.name, out.stderr);
        t.context("ctx", "FROM scratch\nCOPY Dockerfile /\n");
        let out = t.fails("unset DOCKER_HOST; docker --context bad build ctx");
        assert!(out.stderr.contains(words), "{}: build: {}", flavour.name, out.stderr);
    }
}

fn certificates(lab: &Lab) {
    let other = tempfile::tempdir().unwrap();
    make_certs(other.path(), &["--host", "x"]);
    let files = other.path().join("client");
    fs::copy(lab.client_files().join("ca.pem"), files.join("ca.pem")).unwrap();
    reads(lab, &files, "your client certificate is not from a CA that is known here");
    let t = lab.without_context(client::CLI_28);
    let ca = files.join("ca.pem").display().to_string();
    t.ok(&format!(
        "unset DOCKER_HOST; docker context create none --docker \"host={},ca={ca}\"",
        lab.pool.host()
    ));
    let out = t.fails("unset DOCKER_HOST; docker --context none ps");
    assert!(out.stderr.contains("this listener needs a client certificate"), "{}", out.stderr);
    assert!(lab.pool.log().contains("not from a CA that is known here"));
    assert!(lab.pool.metric("dindpool_tls_refused_total{reason=\"certificate\"}") >= 7.0);
}

/// Certificates of the same CA that expired ten days ago.
fn old_certs(ca: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("ca")).unwrap();
    for file in ["ca/cert.pem", "ca/key.pem"] {
        fs::copy(ca.join(file), dir.path().join(file)).unwrap();
    }
    let (directory, hosts) = (dir.path().into(), vec!["127.0.0.1".into()]);
    let order = Order { directory, hosts, client: "client".into(), days: 20 };
    make(&order, OffsetDateTime::now_utc() - time::Duration::days(30)).unwrap();
    dir
}

fn expired(lab: &Lab) {
    let old = old_certs(&lab.certs());
    let files = old.path().join("client");
    reads(lab, &files, "your client certificate expired on");
    let host = lab.pool.host();
    let t = Session::with(&host, client::CLI_28)
        .env("DOCKER_TLS_VERIFY", "1")
        .env("DOCKER_CERT_PATH", files.to_str().unwrap())
        .open();
    let out = t.fails("docker ps");
    assert!(out.stderr.contains("renew it (`dindpool certs` renews what it made)"), "{}", out.stderr);
    make_certs(old.path(), &[]);
    t.ok("docker ps");
}

fn expired_pool(lab: &Lab) {
    let old = old_certs(&lab.certs());
    let guarded = lab.guarded(old.path());
    let file = old.path().join("server/cert.pem").display().to_string();
    wait_until("the log says so at once", secs(5), || {
        guarded.log().contains(&format!("{file} has expired, so no client takes it: renew it"))
    });
    let terminals = [client::BUILDX_29, client::CLI_20].map(|flavour| {
        Session::with(&guarded.host(), flavour)
            .env("DOCKER_TLS_VERIFY", "1")
            .env("DOCKER_CERT_PATH", lab.client_files().to_str().unwrap())
            .open()
    });
    for t in &terminals {
        t.context("ctx", "FROM scratch\nCOPY Dockerfile /\n");
        for command in ["docker ps", "docker build ctx"] {
            let out = t.fails(command);
            assert!(out.stderr.contains("certificate has expired"), "{command}: {}", out.stderr);
        }
    }
    wait_until("the log names the remedy", secs(5), || {
        guarded.log().contains(&format!("{file} has expired, and clients refuse it: renew it"))
    });
    // Which helps without a restart.
    make_certs(old.path(), &[]);
    guarded.reload();
    for t in &terminals {
        wait_until("it is trusted", secs(20), || t.run("docker ps").code == 0);
        t.ok("docker build ctx");
    }
}

fn untrusted(lab: &Lab) {
    let other = tempfile::tempdir().unwrap();
    make_certs(other.path(), &["--host", "x"]);
    let t = lab.without_context(client::CLI_28);
    t.ok(&lab.create_context("other", &other.path().join("client")));
    let before = lab.handshakes("failed");
    let out = t.fails("unset DOCKER_HOST; docker --context other ps");
    assert!(out.stderr.contains("certificate signed by unknown authority"), "{}", out.stderr);
    wait_until("it is counted", secs(5), || lab.handshakes("failed") > before);
}

fn plain(lab: &Lab) {
    let guarded = lab.guarded(&lab.certs());
    let words = "this listener takes TLS only: use `docker context create";
    for flavour in [client::BUILDX_29, client::CLI_28, client::CLI_20] {
        let t = Session::new(&guarded.host(), flavour);
        let out = t.fails("docker ps");
        assert!(out.stderr.contains(words), "{}: {}", flavour.name, out.stderr);
        t.context("ctx", "FROM scratch\nCOPY Dockerfile /\n");
        let out = t.fails("docker build ctx");
        assert!(out.stderr.contains(words), "{}: {}", flavour.name, out.stderr);
    }
    let answer = http::get(&guarded.tcp, "/containers/json");
    assert_eq!(answer.head.status(), 403);
    let files = lab.client_files().display().to_string();
    let t = Session::with(&guarded.host(), client::CLI_28)
        .env("DOCKER_TLS_VERIFY", "1")
        .env("DOCKER_CERT_PATH", &files)
        .open();
    t.ok("docker ps");
}

fn no_tls(lab: &Lab) {
    let behind = lab.pool.daemons();
    let without = Pool::serve(behind.iter().map(|d| &d.addr)).start();
    let files = lab.client_files().display().to_string();
    let t = Session::with(&without.host(), client::CLI_28)
        .env("DOCKER_TLS_VERIFY", "1")
        .env("DOCKER_CERT_PATH", &files)
        .open();
    let out = t.fails("docker ps");
    assert!(out.stderr.contains("server gave HTTP response to HTTPS client"), "{}", out.stderr);
    wait_until("the log names the remedy", secs(5), || {
        without.log().contains("this listener has no TLS: use tcp:// without it")
    });
}
