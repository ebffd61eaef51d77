//! `eval "$(dindpool session)"` towards a pool that takes TLS only: whatever the shell has for its docker client, the
//! session has as well.

use super::common::client::{self, Flavour, Session};
use super::common::pool::Pool;
use super::common::scenarios::Scenarios;
use super::common::unique;
use super::{Lab, make_certs};

const DINDPOOL: &str = env!("CARGO_BIN_EXE_dindpool");

pub fn add<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    for flavour in [client::BUILDX_29, client::CLI_28, client::CLI_20] {
        all.add(
            format!("{}: a session by DOCKER_TLS_VERIFY and DOCKER_CERT_PATH", flavour.name),
            move || by_environment(lab, flavour),
        );
    }
    all.add("a session by the context in use, and one within it", || by_context(lab));
    all.add("a session that the pool does not let in says what to do", || refused(lab));
}

/// Builds, runs, and ends each direction by itself, in the session whose name is in the shell.
fn work(image: &str) -> String {
    let run = format!("docker run --rm -i --network none {image}");
    format!(
        "docker build -q --network none -t {image} ctx >/dev/null && {run} cat /mark && \
         echo x | {run} sh -c 'cat; usleep 300000; echo after' && \
         head -c 3M /dev/urandom >blob && md5sum <blob && {run} md5sum <blob && {run} cat <blob | md5sum && \
         echo $DINDPOOL_SESSION $DOCKER_HOST"
    )
}

/// What it says; the key of the session.
fn check(pool: &Pool, said: &str) -> String {
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..3], ["m", "x", "after"], "{said}");
    assert!(lines[3] == lines[4] && lines[3] == lines[5], "3 MiB both ways: {said}");
    let (name, host) = lines[6].split_once(' ').unwrap();
    assert!(host.starts_with("unix://"), "{said}");
    let key = format!("name:{name}");
    let keys: Vec<String> = pool.sessions().iter().map(|s| s["key"].as_str().unwrap().to_owned()).collect();
    assert!(keys.contains(&key), "{key} of {keys:?}");
    key
}

fn by_environment(lab: &Lab, flavour: Flavour) {
    let guarded = lab.guarded(&lab.certs());
    let files = lab.client_files().display().to_string();
    let host = guarded.host();
    let t =
        Session::with(&host, flavour).env("DOCKER_TLS_VERIFY", "1").env("DOCKER_CERT_PATH", &files).open();
    t.context("ctx", "FROM scratch\nADD rootfs.tar /\nRUN echo m >/mark\n");
    let said = t.ok(&format!(
        "eval \"$({DINDPOOL} session)\" && {} && eval \"$({DINDPOOL} session end)\" && \
         echo \"$DOCKER_HOST $DOCKER_TLS_VERIFY $DOCKER_CERT_PATH\" && docker ps -q >&2 && env",
        work(&format!("session:{}", unique()))
    ));
    check(&guarded, &said);
    let rest: Vec<&str> = said.lines().skip(7).collect();
    assert_eq!(rest[0], format!("{host} 1 {files}"), "the end gives back what was there before");
    assert!(!rest.iter().any(|line| line.starts_with("DINDPOOL_SESSION")), "{said}");
}

fn by_context(lab: &Lab) {
    let guarded = lab.guarded(&lab.certs());
    let t = lab.without_context(client::BUILDX_29);
    t.context("ctx", "FROM scratch\nADD rootfs.tar /\nRUN echo m >/mark\n");
    t.write("compose.yaml", "services:\n  a: {image: 'made:1', command: cat /mark, network_mode: none}\n");
    let file = |name: &str| lab.client_files().join(name).display().to_string();
    t.ok(&format!(
        "unset DOCKER_HOST; docker context create dind --docker \"host={},ca={},cert={},key={}\" && docker context use dind",
        guarded.host(),
        file("ca.pem"),
        file("cert.pem"),
        file("key.pem")
    ));
    let image = format!("session:{}", unique());
    let said = t.ok(&format!("unset DOCKER_HOST; eval \"$({DINDPOOL} session)\" && {}", work(&image)));
    let outer = check(&guarded, &said);
    // The shell's context is no more the shell's; the session within it is another one of the same pool.
    let said = t.ok(&format!(
        "unset DOCKER_HOST; eval \"$({DINDPOOL} session)\" && eval \"$({DINDPOOL} session)\" && {} && \
         docker tag {image} made:1 && docker compose -p p{} run --rm a",
        work(&image),
        unique()
    ));
    assert_ne!(check(&guarded, &said), outer);
    assert_eq!(said.lines().last(), Some("m"), "{said}");
}

fn refused(lab: &Lab) {
    let guarded = lab.guarded(&lab.certs());
    let (t, other) = (Session::new(&guarded.host(), client::CLI_28), tempfile::tempdir().unwrap());
    make_certs(other.path(), &["--host", "x"]);
    let (own, others) = (lab.client_files().display().to_string(), other.path().join("client"));
    let mixed = |ca: &std::path::Path, pair: Option<&std::path::Path>, name: &str| {
        for (file, from) in [("ca.pem", Some(ca)), ("cert.pem", pair), ("key.pem", pair)] {
            if let Some(from) = from {
                t.write(&format!("{name}/{file}"), std::fs::read(from.join(file)).unwrap());
            }
        }
        t.path(name).display().to_string()
    };
    let ours = lab.client_files();
    for (tls, words) in [
        (String::new(), "this listener takes TLS only"),
        (mixed(&others, Some(&ours), "ca"), "its certificate is not from the CA in ca.pem"),
        (mixed(&ours, None, "none"), "this listener needs a client certificate"),
        (mixed(&ours, Some(&others), "pair"), "your client certificate is not from a CA that is known here"),
        (t.path("nothing").display().to_string(), "cannot read"),
    ] {
        let flag = if tls.is_empty() { tls } else { format!("--pool-tls-dir {tls}") };
        let out = t.fails(&format!("{DINDPOOL} session {flag}"));
        assert!(out.stderr.contains(words) && out.stdout.is_empty(), "{words}: {}", out.all());
    }
    let plain = Pool::serve(lab.pool.daemons().iter().map(|d| &d.addr)).start();
    let out = t.fails(&format!("{DINDPOOL} session --pool {} --pool-tls-dir {own}", plain.host()));
    assert!(out.stderr.contains("it does not speak TLS: unset DOCKER_TLS_VERIFY"), "{}", out.all());
}
