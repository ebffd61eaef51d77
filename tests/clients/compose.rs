//! compose: several images, containers, a network and a volume that belong together.

use super::Lab;
use super::common::client;
use super::common::scenarios::Scenarios;
use super::common::{secs, unique, wait_until};

const PROJECT: &str = r#"
services:
  web:
    build: { context: ctx, network: none, args: { MARK: WEB } }
    stop_signal: SIGKILL
    command: sh -c 'mkdir -p /www && cp /mark /www/index.html && exec httpd -f -p 80 -h /www'
    volumes: [ "data:/data" ]
    healthcheck: { test: [ "CMD", "wget", "-qO-", "http://127.0.0.1/" ], interval: 1s, retries: 30 }
  job:
    build: { context: ctx, network: none, args: { MARK: job } }
    command: sh -c 'wget -qO- http://web/ | tee /data/seen; echo finished'
    volumes: [ "data:/data" ]
    depends_on: { web: { condition: service_healthy } }
volumes: { data: {} }
"#;

/// Adds the scenarios.
pub fn add<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    all.add("compose: build, up -d, run, exec, logs, ps and down share one daemon", || whole_life(lab));
    all.add("compose: up in the foreground ends with its job's exit code", || foreground(lab));
}

/// Adds what is shown over TLS as well.
pub fn add_over_tls<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    all.add("over TLS: compose: build, up -d, run, exec, logs, ps and down share one daemon", || {
        whole_life(lab)
    });
}

fn project(lab: &Lab) -> (client::Session, String) {
    let t = lab.terminal(client::BUILDX_29);
    t.context("ctx", super::build::APP);
    let name = format!("p{}", unique());
    configure(&t, &name, "web");
    (t, name)
}

fn configure(t: &client::Session, name: &str, mark: &str) {
    t.write("compose.yaml", PROJECT.replace("WEB", mark));
    t.write(".env", format!("COMPOSE_PROJECT_NAME={name}\n"));
}

fn whole_life(lab: &Lab) {
    let (t, name) = project(lab);
    t.ok("docker compose build");
    t.ok("docker compose up -d --wait web");
    let daemons = lab.pool.daemons();
    let holders = super::common::daemon::where_is(&daemons, |d| d.has_container(&format!("{name}-web-1")));
    assert_eq!(holders.len(), 1, "one daemon has the service");
    assert!(t.ok("docker compose run --rm job").starts_with("web\n"), "the service is reached by name");
    assert_eq!(t.ok("docker compose exec -T web cat /data/seen"), "web\n");
    assert_eq!(t.ok("docker compose ps --services --status running"), "web\n");
    t.ok("docker compose up -d");
    wait_until("the job's last word", secs(30), || {
        t.ok("docker compose logs --no-log-prefix job").contains("finished\n")
    });
    t.ok("docker compose down -v --rmi local");
    for daemon in &daemons {
        assert!(!daemon.has_container(&format!("{name}-web-1")), "{}: a container stayed", daemon.id);
        assert!(!daemon.has_volume(&format!("{name}_data")), "{}: a volume stayed", daemon.id);
        assert!(!daemon.has_network(&format!("{name}_default")), "{}: a network stayed", daemon.id);
    }
}

fn foreground(lab: &Lab) {
    let (t, _) = project(lab);
    let up = t.start("docker compose up --build --exit-code-from job");
    let out = up.wait(secs(120));
    assert_eq!(out.code, 0, "{}", out.all());
    assert!(out.stdout.contains("finished"), "{}", out.all());
    t.ok("docker compose down -v");
}

/// Runs alone, as the other rules about two sessions. Two terminals of one person share a project; two jobs of a CI
/// system, which check out the same repository and so use the same name, must not.
pub fn one_name_twice(lab: &Lab) {
    lab.quiet();
    let name = format!("p{}", unique());
    let jobs: Vec<_> = (0..2)
        .map(|n| {
            let job =
                client::Session::with(&lab.pool.host(), client::BUILDX_29).env("CI_JOB_ID", &unique()).open();
            job.context("ctx", super::build::APP);
            configure(&job, &name, &format!("web{n}"));
            job
        })
        .collect();
    let ups: Vec<_> = jobs.iter().map(|t| t.start("docker compose up -d --build --wait web")).collect();
    ups.iter().for_each(|up| drop(up.wait_ok(secs(120))));
    for (n, t) in jobs.iter().enumerate() {
        assert_eq!(t.ok("docker compose exec -T web cat /www/index.html"), format!("web{n}\n"));
    }
    jobs.iter().for_each(|t| drop(t.ok("docker compose down -v")));
}

/// Runs alone: what went up in one terminal goes down in another.
pub fn from_another_terminal(lab: &Lab) {
    lab.quiet();
    let (first, name) = project(lab);
    first.ok("docker compose up -d --build --wait web");
    let second = lab.terminal(client::BUILDX_29);
    second.write("compose.yaml", PROJECT.replace("WEB", "web"));
    second.write(".env", format!("COMPOSE_PROJECT_NAME={name}\n"));
    assert_eq!(second.ok("docker compose ps --services --status running"), "web\n");
    assert_eq!(second.ok("docker compose exec -T web cat /www/index.html"), "web\n");
    second.ok("docker compose down -v");
    for daemon in lab.pool.daemons() {
        assert!(!daemon.has_container(&format!("{name}-web-1")), "{}: a container stayed", daemon.id);
        assert!(!daemon.has_network(&format!("{name}_default")), "{}: a network stayed", daemon.id);
    }
}
