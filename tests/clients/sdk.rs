//! Clients that are libraries: docker-py, dockerode and bollard.

use std::collections::HashMap;
use std::process::{Command, Stdio};

use bollard::container::LogOutput;
use bollard::exec::StartExecResults;
use bollard::models::{ContainerCreateBody, ExecConfig, HostConfig};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, BuildImageOptionsBuilder, CreateContainerOptionsBuilder,
    LogsOptionsBuilder,
};
use bollard::{Docker, body_full};
use futures_util::{Stream, StreamExt, TryStreamExt};
use tokio::io::AsyncWriteExt;

use super::Lab;
use super::common::http::Addr;
use super::common::scenarios::Scenarios;
use super::common::{parts, unique};

/// Adds the scenarios.
pub fn add<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    all.add("docker-py: builds, runs, execs, streams and copies", || docker_py(lab));
    all.add("dockerode: builds, runs, execs, streams and copies", || dockerode(lab));
    all.add("bollard: builds, runs, execs and streams", || bollard(lab));
}

/// Adds what is shown over TLS as well: both read the variables of the CLI, docker-py makes a `TLSConfig` of them.
pub fn add_over_tls<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    all.add("over TLS: docker-py: builds, runs, execs, streams and copies", || docker_py(lab));
    all.add("over TLS: dockerode: builds, runs, execs, streams and copies", || dockerode(lab));
}

/// Runs a script of ours with a library's interpreter; its last line must be `all well`.
fn script(lab: &Lab, command: &mut Command, file: &str, source: &str) {
    let dir = super::common::short_dir();
    let path = dir.path().join(file);
    std::fs::write(&path, source).unwrap();
    let out = command
        .arg(&path)
        .env("DOCKER_HOST", lab.pool.host())
        .envs(lab.tls_env())
        // requests takes these ones' word over that of its caller.
        .env_remove("REQUESTS_CA_BUNDLE")
        .env_remove("CURL_CA_BUNDLE")
        .env("ROOTFS", parts::busybox("rootfs.tar"))
        .env("REGISTRY", &lab.registry.name)
        .env("MARK", unique())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && text.contains("all well"), "{}: {text}", out.status);
}

fn docker_py(lab: &Lab) {
    let mut python = Command::new("setsid");
    python.arg("-w").arg(parts::dir().join("docker-py/bin/python"));
    script(lab, &mut python, "sdk.py", include_str!("sdk.py"));
}

fn dockerode(lab: &Lab) {
    let mut node = Command::new("setsid");
    node.args(["-w", "node"]).env("NODE_PATH", parts::dir().join("dockerode/node_modules"));
    script(lab, &mut node, "sdk.js", include_str!("sdk.js"));
}

fn bollard(lab: &Lab) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for addr in [&lab.pool.tcp, &lab.pool.unix] {
        runtime.block_on(with_bollard(addr));
    }
}

async fn with_bollard(addr: &Addr) {
    let version = bollard::API_DEFAULT_VERSION;
    let docker = match addr {
        Addr::Tcp(host) => Docker::connect_with_http(host, 120, version),
        Addr::Unix(path) => Docker::connect_with_unix(&path.display().to_string(), 120, version),
    };
    let docker = docker.unwrap().negotiate_version().await.unwrap();
    let mark = unique();
    let image = format!("bollard:{mark}");
    let options = BuildImageOptionsBuilder::default()
        .t(&image)
        .networkmode("none")
        .buildargs(&HashMap::from([("MARK", mark.as_str())]))
        .build();
    let built: Vec<_> =
        docker.build_image(options, None, Some(body_full(context().into()))).try_collect().await.unwrap();
    assert!(
        built.iter().any(|line| line.stream.as_deref().is_some_and(|s| s.contains("Successfully built")))
    );

    let name = format!("bollard{mark}");
    let config = ContainerCreateBody {
        image: Some(image.clone()),
        cmd: Some(words("sh -c").chain(["cat /mark; read x; echo got $x; exit 4".into()]).collect()),
        open_stdin: Some(true),
        stdin_once: Some(true),
        host_config: Some(HostConfig { network_mode: Some("none".into()), ..Default::default() }),
        ..Default::default()
    };
    let options = CreateContainerOptionsBuilder::default().name(&name).build();
    let id = docker.create_container(Some(options), config).await.unwrap().id;
    let options = AttachContainerOptionsBuilder::default().stdin(true).stdout(true).stderr(true).stream(true);
    let mut attached = docker.attach_container(&id, Some(options.build())).await.unwrap();
    docker.start_container(&id, None).await.unwrap();

    let exec = ExecConfig {
        attach_stdout: Some(true),
        cmd: Some(words("echo from exec").collect()),
        ..Default::default()
    };
    let exec = docker.create_exec(&name, exec).await.unwrap().id;
    let StartExecResults::Attached { output, .. } = docker.start_exec(&exec, None).await.unwrap() else {
        panic!("exec is attached")
    };
    assert_eq!(text(output).await, "from exec\n");
    assert_eq!(docker.inspect_exec(&exec).await.unwrap().exit_code, Some(0));

    attached.input.write_all(b"typed\n").await.unwrap();
    attached.input.shutdown().await.unwrap();
    assert_eq!(text(attached.output).await, format!("{mark}\ngot typed\n"));
    let waited: Vec<_> = docker.wait_container(&id, None).collect().await;
    assert!(
        matches!(waited[0], Err(bollard::errors::Error::DockerContainerWaitError { code: 4, .. })),
        "{waited:?}"
    );
    let options = LogsOptionsBuilder::default().follow(true).stdout(true).build();
    assert_eq!(text(docker.logs(&id, Some(options))).await, format!("{mark}\ngot typed\n"));
    docker.remove_container(&id, None).await.unwrap();
    let missing = docker.inspect_container(&id, None).await.unwrap_err();
    assert!(matches!(missing, bollard::errors::Error::DockerResponseServerError { status_code: 404, .. }));
}

fn words(line: &str) -> impl Iterator<Item = String> {
    line.split(' ').map(str::to_owned)
}

async fn text(stream: impl Stream<Item = Result<LogOutput, bollard::errors::Error>>) -> String {
    let parts: Vec<LogOutput> = stream.try_collect().await.unwrap();
    parts.iter().map(|part| String::from_utf8_lossy(part.as_ref()).into_owned()).collect()
}

/// A context as a tar.
fn context() -> Vec<u8> {
    let dir = super::common::short_dir();
    std::fs::write(dir.path().join("Dockerfile"), super::build::APP).unwrap();
    std::fs::copy(parts::busybox("rootfs.tar"), dir.path().join("rootfs.tar")).unwrap();
    Command::new("tar").arg("-C").arg(dir.path()).args(["-c", "."]).output().unwrap().stdout
}
