//! dindpool's own image, built through dindpool by real clients and a real dockerd.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

use std::fs;
use std::path::Path;

use common::client::{BUILDX_29, CLI_28, Session};
use common::pool::Pool;
use common::{parts, say, secs, unique};
use serde_json::Value;

#[path = "common/mod.rs"]
mod common;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn pool() -> Result<Pool, String> {
    parts::all(&["busybox/rootfs.tar", "cli-28/docker", "buildx-0.29/docker-buildx"])?;
    let pool = Pool::up(&[parts::dockerd("28.5")?], 1).short_grace().start();
    pool.wait_healthy(1, secs(60));
    Ok(pool)
}

#[test]
fn it_is_built_around_a_binary_and_runs_as_nobody_who_can_write_nothing() {
    let pool = require!(pool());
    for flavour in [BUILDX_29, CLI_28] {
        let t = Session::new(&pool.host(), flavour);
        let image = format!("dindpool:{}", unique());
        let make = format!(
            "make -s -C {} image IMAGE={image} BINARY={} ARGS='--network none'",
            root().display(),
            env!("CARGO_BIN_EXE_dindpool")
        );
        t.ok(&make);

        let run = format!("docker run --rm --network none --read-only {image}");
        let version = concat!("dindpool ", env!("CARGO_PKG_VERSION"), "\n");
        assert_eq!(t.ok(&format!("{run} --version")), version);
        // The whole of it: it serves, and is asked by itself.
        t.ok(&format!(
            "docker run -d --name proxy --network none --read-only --cap-drop ALL --security-opt no-new-privileges \
             {image} serve --daemon tcp://127.0.0.1:1"
        ));
        let status = t.ok(
            "for i in $(seq 50); do docker exec proxy dindpool status --json && exit; read -t .2 <> <(:); done; \
             docker logs proxy >&2; exit 1",
        );
        let status: Value = serde_json::from_str(&status).unwrap();
        assert_eq!(status["daemons"][0]["address"], "tcp://127.0.0.1:1");
        assert!(t.fails("docker exec proxy dindpool no-such-command").code != 127);

        let about: Value = serde_json::from_str(&t.ok(&format!("docker image inspect {image}"))).unwrap();
        let config = &about[0]["Config"];
        assert_eq!(config["User"], "65532:65532");
        let label = |name: &str| config["Labels"][format!("org.opencontainers.image.{name}")].clone();
        assert_eq!(label("version"), env!("CARGO_PKG_VERSION"));
        assert_eq!(label("licenses"), "Apache-2.0");
        for name in ["revision", "created", "title", "description"] {
            assert!(label(name).as_str().is_some_and(|text| text.len() > 3), "{name}");
        }
        let files = t.ok("docker export proxy | tar -t");
        let binaries: Vec<&str> =
            files.lines().filter(|file| file.contains("bin/") && !file.ends_with('/')).collect();
        assert_eq!(binaries, ["usr/local/bin/dindpool"], "nothing else can be run in it");
        t.ok("docker rm -f proxy");
        say(format!("{}: dindpool's image is built, and runs", flavour.name));
    }
}

/// Everything but the compiler and the network: what the build gets, and where its result goes.
#[test]
fn from_source_it_is_the_same_image() {
    let pool = require!(pool());
    let cargo = "#!/bin/sh -e\n[ \"$*\" = 'build --release --locked' ]\n\
                 ls Cargo.toml Cargo.lock src/main.rs benches/engine.rs benches/relay.rs\n[ ! -e tests ] && [ ! -e .git ]\n\
                 mkdir -p target/release && cp /bin/busybox target/release/dindpool\n";
    for flavour in [BUILDX_29, CLI_28] {
        let t = Session::new(&pool.host(), flavour);
        let (rust, image) = (format!("rust:{}", unique()), format!("source:{}", unique()));
        t.write("ctx/cargo", cargo);
        t.context("ctx", "FROM scratch\nADD rootfs.tar /\nCOPY cargo /bin/cargo\n");
        t.ok(&format!("chmod 755 ctx/cargo && docker build --network none -t {rust} ctx"));
        let make = format!(
            "make -C {} image IMAGE={image} RUST_IMAGE={rust} ARGS='--network none'",
            root().display()
        );
        t.ok(&make);
        let files = t.ok(&format!("docker export $(docker create {image}) | tar -t"));
        for file in ["usr/local/bin/dindpool", "etc/passwd"] {
            assert!(files.lines().any(|line| line == file), "{file} is not in\n{files}");
        }
        let about: Value = serde_json::from_str(&t.ok(&format!("docker image inspect {image}"))).unwrap();
        assert_eq!(about[0]["Config"]["User"], "65532:65532");
    }
}

#[test]
fn both_recipes_end_alike() {
    let end = |file: &str| {
        let text = fs::read_to_string(root().join("deploy").join(file)).unwrap();
        let end = text.split("FROM scratch\n").nth(1).unwrap().to_owned();
        end.replace("COPY --from=build /rootfs /\n", "COPY . /\n")
    };
    assert_eq!(end("Dockerfile"), end("Dockerfile.binary"));
}
