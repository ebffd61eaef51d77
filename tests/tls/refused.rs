//! Who is refused, and what they and the operator read.

use std::fs;

use super::common::client::{self, Session};
use super::common::http;
use super::common::pool::Pool;
use super::common::scenarios::Scenarios;
use super::common::{secs, wait_until};
use super::{Lab, make_certs};

pub fn add<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    all.add("no certificate, a wrong CA, an expired certificate: each reads what to do", || {
        certificates(lab)
    });
    all.add("a client that does not trust the pool's certificate", || untrusted(lab));
    all.add("where TLS is required, a plain client reads how to use it", || plain(lab));
    all.add("TLS to a listener without it", || no_tls(lab));
}

/// What a client of each kind reads.
fn reads(lab: &Lab, files: &std::path::Path, words: &str) {
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
    let dir = tempfile::tempdir().unwrap();
    let server = lab.certs().join("server");
    let file = |name: &str| server.join(name).display().to_string();
    let config = dir.path().join("config.toml");
    let toml = format!(
        "[tls]\ncertificates = [{{ cert = '{}', key = '{}' }}]\nclient_ca = '{}'\nplain = 'refused'\n",
        file("cert.pem"),
        file("key.pem"),
        file("ca.pem")
    );
    fs::write(&config, toml).unwrap();
    let behind = lab.pool.daemons();
    let guarded =
        Pool::serve(behind.iter().map(|d| &d.addr)).env("DINDPOOL_CONFIG", config.to_str().unwrap()).start();
    guarded.wait_healthy(2, secs(20));
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
