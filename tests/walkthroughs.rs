//! Whole stories, as users live them: what a CI system, a compose project, a machine behind NAT or a container does
//! with a pool from beginning to end. docs/sessions.md has the list. Real daemons and real clients, and the evidence
//! is what each daemon itself has.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

mod common;

use std::path::Path;

use common::client::{self, Session};
use common::daemon::{Daemon, where_is};
use common::http::Addr;
use common::netns::{Bridge, listen_inside};
use common::pool::{Pool, PoolBuilder};
use common::registry::Registry;
use common::scenarios::Scenarios;
use common::{holds_for, parts, poll, secs, unique, wait_until};
use serde_json::Value;

/// A terminal that speaks with one daemon, past every pool.
fn direct(daemon: &Daemon) -> Session {
    Session::new(&daemon.addr.url(), client::CLI_28)
}

/// Gives a daemon the image `base:1`, past every pool.
fn import_base(daemon: &Daemon) {
    direct(daemon).ok(&format!("docker import {} base:1", parts::busybox("rootfs.tar").display()));
}

fn tickets(pool: &Pool) -> Vec<Value> {
    pool.status()["queue"]["tickets"].as_array().unwrap().clone()
}

#[track_caller]
fn wait_tickets(pool: &Pool, n: usize) {
    if poll(secs(30), || (tickets(pool).len() == n).then_some(())).is_none() {
        panic!("not {n} tickets within 30 s: {:?}", tickets(pool));
    }
}

/// What a container is given to be a client: the CLI, buildx, and the libraries that they are linked with.
fn client_mounts() -> String {
    let parts = parts::dir();
    let part = |name: &str, to: &str| format!("-v {}:{to}:ro", parts.join(name).display());
    let mut mounts = vec![part("cli-28", "/cli"), part("buildx-0.29", "/root/.docker/cli-plugins")];
    let libraries = ["/lib", "/lib64"].into_iter().filter(|dir| Path::new(dir).exists());
    mounts.extend(libraries.map(|dir| format!("-v {dir}:{dir}:ro")));
    mounts.join(" ")
}

/// One daemon with one slot, and the session that has it is a container that itself builds and runs through the
/// pool. If that queued, it would wait for its own end. The queue is not only there but full: nobody else gets past.
#[test]
fn a_client_in_a_container_never_waits_for_the_slot_of_its_own_parent() {
    require!(parts::all(&["busybox/rootfs.tar", "cli-28/docker", "buildx-0.29/docker-buildx"]));
    let dockerd = require!(parts::dockerd("28.5"));
    let bridge = Bridge::new(1);
    let listen = format!("tcp://{}:0", bridge.ip);
    let settings = [("SLOTS", "1"), ("QUEUE_LIMIT", "1"), ("SESSION_GRACE", "2s"), ("SLOT_LINGER", "100ms")];
    let with = |pool: PoolBuilder| {
        settings.iter().fold(pool, |pool, (name, value)| pool.env(&format!("DINDPOOL_{name}"), value))
    };
    let up = with(Pool::up(&[dockerd], 1).listen(&listen)).start();
    up.wait_healthy(1, secs(60));
    let daemon = up.daemons().remove(0);
    import_base(&daemon);
    let address = |pool: &Pool| pool.listener(&bridge.ip).url();
    inside_a_container(&up, &daemon, &bridge, &address(&up), "");
    // The pool's own socket, mounted into the container.
    let Addr::Unix(pools) = &up.unix else { panic!("a Unix listener") };
    let mount = format!("-v {}:/run/pool.sock", pools.display());
    inside_a_container(&up, &daemon, &bridge, "unix:///run/pool.sock", &mount);

    // The same daemon, known by nothing but its address.
    let Addr::Unix(socket) = &daemon.addr else { panic!("a local pool has Unix sockets") };
    let namespace = format!("/proc/{}/ns/net", daemon.pid());
    let inner = format!("{}:2375", ip_inside(&namespace));
    listen_inside(&namespace, &inner, socket);
    let serve = with(Pool::serve(&[Addr::Tcp(inner)]).listen(&listen)).start();
    serve.wait_healthy(1, secs(20));
    inside_a_container(&serve, &daemon, &bridge, &address(&serve), "");
}

/// A daemon's address on its cable.
fn ip_inside(namespace: &str) -> String {
    let out = std::process::Command::new("nsenter")
        .arg(format!("--net={namespace}"))
        .args(["ip", "-j", "-4", "addr", "show", "eth0"])
        .output()
        .unwrap();
    let links: Value = serde_json::from_slice(&out.stdout).unwrap();
    links[0]["addr_info"][0]["local"].as_str().unwrap().to_owned()
}

/// `host` and `mount` are how the container reaches the pool.
fn inside_a_container(pool: &Pool, daemon: &Daemon, bridge: &Bridge, host: &str, mount: &str) {
    let mark = unique();
    let parent = Session::new(&pool.host(), client::CLI_28);
    parent.write("Dockerfile", format!("FROM base:1\nRUN echo {mark} >/mark\n"));
    parent.write("says", client::SAYS);
    parent.write(
        "story",
        format!(
            "set -e\n\
             until test -e go; do usleep 50000; done\n\
             for kit in 0 1; do\n\
             export DOCKER_BUILDKIT=$kit\n\
             docker build --no-cache --network none -t inside{kit}:{mark} .\n\
             sh says docker run --rm --network none inside{kit}:{mark} cat /mark\n\
             done >built\n\
             docker run -d --name left-{mark} --network none base:1 sleep 600 >left\n\
             touch done\n\
             until test -e end; do usleep 50000; done\n",
            kit = "$kit"
        ),
    );
    let work = parent.path("").display().to_string();
    let run = parent.start(&format!(
        "docker run --rm --name parent-{mark} {mount} -v {work}:/w -w /w -e HOME=/root -e DOCKER_HOST={host} \
         -e PATH=/cli:/bin:/usr/bin {} base:1 sh /w/story",
        client_mounts()
    ));
    wait_until("the parent has the slot", secs(30), || daemon.has_container(&format!("parent-{mark}")));

    // The control: a client from any other address waits, and one more is refused.
    let stranger =
        Session::with(&pool.listener(&bridge.ip).url(), client::CLI_28).netns(&bridge.namespaces[0]).open();
    let waiting =
        stranger.start(&format!("docker run --rm --name stranger-{mark} --network none base:1 true"));
    wait_tickets(pool, 1);
    let refused = stranger.fails("docker create --network none base:1 true");
    assert!(refused.stderr.contains("the queue is full"), "{}", refused.all());

    parent.write("go", "");
    let ended = || parent.path("done").exists() || run.code().is_some();
    wait_until("the client inside is done", secs(60), ended);
    assert!(parent.path("done").exists(), "{}", run.wait(secs(1)).all());
    for kit in 0..2 {
        assert!(daemon.has_image(&format!("inside{kit}:{mark}")), "built on the parent's daemon");
    }
    let built = std::fs::read_to_string(parent.path("built")).unwrap();
    assert_eq!(built.lines().filter(|line| *line == mark).count(), 2, "both ran: {built}");
    assert!(daemon.has_container(&format!("left-{mark}")));
    assert_eq!(tickets(pool).len(), 1, "the stranger has waited all the time");
    assert!(!daemon.has_container(&format!("stranger-{mark}")));
    assert_eq!(pool.sessions().len(), 1, "the client inside is no session: {:?}", pool.sessions());

    parent.write("end", "");
    run.wait_ok(secs(30));
    waiting.wait_ok(secs(30));
    parent.ok(&format!("docker rm -f left-{mark}"));
}

/// An image that prints its mark, and carries it as a label.
const APP: &str =
    "FROM base:1\nARG MARK\nLABEL mark=$MARK\nRUN echo $MARK >/mark\nCMD [\"cat\", \"/mark\"]\n";

/// Two daemons that have `base:1`, and a registry. Each story puts a proxy of its own in front of them.
struct Lab {
    registry: Registry,
    daemons: Vec<Daemon>,
    _up: Pool,
}

impl Lab {
    fn start() -> Result<Lab, String> {
        parts::all(&[
            "busybox/rootfs.tar",
            "registry/docker-registry",
            "cli-28/docker",
            "buildx-0.29/docker-buildx",
            "compose-2.26/docker-compose",
        ])?;
        let dockerd = parts::dockerd("28.5")?;
        let registry = Registry::start();
        let up = Pool::up(&[dockerd], 2).arg(registry.dockerd_arg()).start();
        up.wait_healthy(2, secs(60));
        let daemons = up.daemons();
        daemons.iter().for_each(import_base);
        Ok(Lab { registry, daemons, _up: up })
    }

    /// A proxy in front of both. Minutes are a second here: a session's grace and what it keeps its slot for.
    fn pool(&self) -> PoolBuilder {
        Pool::serve(self.daemons.iter().map(|d| &d.addr))
            .env("DINDPOOL_SESSION_GRACE", "1s")
            .env("DINDPOOL_SLOT_LINGER", "100ms")
    }

    fn serve(&self, pool: PoolBuilder) -> Pool {
        let pool = pool.start();
        pool.wait_healthy(self.daemons.len(), secs(20));
        pool
    }
}

/// A job of a CI system on the proxy's machine.
fn ci_job(pool: &Pool, id: &str) -> Session {
    let job = Session::with(&pool.host(), client::BUILDX_29).env("CI_JOB_ID", id).open();
    job.context("ctx", APP);
    job
}

#[test]
fn the_walk_throughs_of_the_design_hold() {
    let lab = &require!(Lab::start());
    let mut all = Scenarios::new("walk-through");
    all.alone("four concurrent jobs of one CI agent use equal tags, and none sees another's", || {
        one_agent(lab);
    });
    all.alone(
        "a compose project that was quiet for longer than any grace goes down where it went up",
        || {
            quiet_project(lab);
        },
    );
    all.alone("twenty jobs behind one address build and run, and nothing crosses", || behind_nat(lab));
    all.alone("one job builds, another pushes, and what is pushed is the latest", || {
        build_then_push(lab);
    });
    all.alone("who gets a former client's address works at once, also when its daemon has gone", || {
        reused_address(lab);
    });
    all.run(1);
}

/// The jobs are children of one shell, so of one POSIX session: only their environment tells them apart. They come
/// from one repository, so their tags are equal, and each begins by clearing away what an earlier run has left: all but
/// the first do so when that has built, and has not used its image yet.
fn one_agent(lab: &Lab) {
    // A slot each, which a job keeps by a container, however long the others take, and between its commands: so two of
    // them are never on a daemon at the same time.
    let pool = lab.pool().env("DINDPOOL_SLOTS", "1").env("DINDPOOL_SLOT_LINGER", "5s");
    let pool = lab.serve(pool);
    let agent = Session::new(&pool.host(), client::BUILDX_29);
    agent.context("ctx", APP);
    let tag = format!("app{}:latest", unique());
    let wait = |what: &str| format!("until test -e {what}; do sleep 0.05; done\n");
    let jobs: Vec<_> = (0..4)
        .map(|n| {
            let mark = unique();
            let first = n == 0;
            let script = format!(
                "export CI_JOB_ID={mark} DOCKER_BUILDKIT={kit}\n\
                 {after}docker rmi -f {tag} >/dev/null 2>&1; touch cleared-{n}\n\
                 docker build -q --no-cache --network none --build-arg MARK={mark} -t {tag} ctx >/dev/null || exit 1\n\
                 docker run -d --name held{mark} --network none {tag} sleep 600 >/dev/null || exit 5\n\
                 touch built-{n}\n{before}\
                 says docker run --rm --network none {tag} || exit 2\n\
                 docker image inspect -f '{{{{.Config.Labels.mark}}}}' {tag} || exit 3\n\
                 docker rm -f held{mark} >/dev/null && docker rmi {tag} >/dev/null || exit 4\n",
                kit = n % 2,
                after = if first { String::new() } else { wait("built-0") },
                before = if first { [1, 2, 3].map(|n| wait(&format!("cleared-{n}"))).concat() } else { String::new() },
            );
            (agent.start(&script), mark)
        })
        .collect();
    for (job, mark) in &jobs {
        let out = job.wait(secs(60));
        assert_eq!((out.code, out.stdout), (0, format!("{mark}\n{mark}\n")), "{}", out.stderr);
    }
    assert_eq!(where_is(&lab.daemons, |d| d.has_image(&tag)), Vec::<String>::new(), "all have cleared up");

    // The control, and the limit of it: on one daemon at the same time equal tags are one image.
    let one = Pool::serve([&lab.daemons[0].addr]).start();
    one.wait_healthy(1, secs(20));
    let (first, second) = (ci_job(&one, &unique()), ci_job(&one, &unique()));
    first.ok(&format!("docker build -q --network none --build-arg MARK=first -t {tag} ctx"));
    second.ok(&format!("docker build -q --network none --build-arg MARK=second -t {tag} ctx"));
    assert_eq!(first.ok(&format!("says docker run --rm --network none {tag}")), "second\n");
    second.ok(&format!("docker rmi {tag}"));
}

const PROJECT: &str = "services:\n  \
     web: { image: 'base:1', command: 'sleep 600', stop_signal: SIGKILL, volumes: [ 'data:/data' ] }\n  \
     db: { image: 'base:1', command: 'sleep 600', stop_signal: SIGKILL }\n\
     volumes: { data: {} }\n";

/// Twenty quiet minutes are four times the grace of a session (5 min). Here the grace is 1 s and the quiet lasts for
/// more than four of it, so the same decisions are made. Two jobs have a project of the same name, on a daemon each.
fn quiet_project(lab: &Lab) {
    let pool = lab.serve(lab.pool());
    let name = format!("p{}", unique());
    let whole = |d: &Daemon| {
        d.labelled(&format!("com.docker.compose.project={name}")).len() == 2
            && d.has_network(&format!("{name}_default"))
            && d.has_volume(&format!("{name}_data"))
    };
    let jobs: Vec<Session> = (0..2)
        .map(|n| {
            let job = ci_job(&pool, &unique());
            job.write("compose.yaml", PROJECT);
            job.write(".env", format!("COMPOSE_PROJECT_NAME={name}\n"));
            job.ok("docker compose up -d");
            assert_eq!(where_is(&lab.daemons, whole).len(), n + 1, "on a daemon of its own");
            job
        })
        .collect();
    assert!(lab.daemons.iter().all(whole), "a project on each daemon");
    let running = || lab.daemons.iter().all(whole) && pool.sessions().len() == 2;
    holds_for("leases live while containers run, however quiet", secs(5), running);
    down(lab, &name, &jobs[0], whole);

    // The other one's containers end, and with them its lease: what is left is what it owns.
    let home = lab.daemons.iter().find(|d| whole(d)).unwrap();
    direct(home).ok(&format!("docker kill {name}-web-1 {name}-db-1"));
    pool.wait_no_sessions(secs(20));
    assert!(whole(home));
    down(lab, &name, &jobs[1], whole);
}

/// Takes a job's project down: that is gone, whole, and whatever else is there stays.
fn down(lab: &Lab, name: &str, job: &Session, whole: impl Fn(&Daemon) -> bool) {
    let before = where_is(&lab.daemons, &whole);
    let out = job.run("docker compose down -v");
    assert_eq!(out.code, 0, "{}", out.all());
    let after = where_is(&lab.daemons, &whole);
    assert_eq!(after.len() + 1, before.len(), "one project went: {}", out.all());
    for daemon in lab.daemons.iter().filter(|d| !after.contains(&d.id)) {
        assert!(daemon.labelled(&format!("com.docker.compose.project={name}")).is_empty(), "{}", daemon.id);
        assert!(!daemon.has_network(&format!("{name}_default")), "{}: a network stayed", daemon.id);
        assert!(!daemon.has_volume(&format!("{name}_data")), "{}: a volume stayed", daemon.id);
    }
}

/// Whoever comes through one address is one session, so one daemon has them all, and each further build of theirs takes
/// a slot there. Half of them name their session in the path, which BuildKit's connections do not carry.
fn behind_nat(lab: &Lab) {
    let bridge = Bridge::new(1);
    let pool = lab.pool().env("DINDPOOL_SLOTS", "4").listen(&format!("tcp://{}:0", bridge.ip));
    let pool = lab.serve(pool);
    let host = pool.listener(&bridge.ip).url();
    let jobs: Vec<_> = (0..20)
        .map(|n| {
            let (flavour, mark) = ([client::BUILDX_29, client::CLI_28][n % 2], unique());
            let host = if n % 4 < 2 { host.clone() } else { format!("{host}/s/job-{mark}") };
            let job = Session::with(&host, flavour).netns(&bridge.namespaces[0]).open();
            job.context("ctx", APP);
            let run = job.start(&format!(
                "docker build -q --network none --build-arg MARK={mark} -t nat{mark} ctx >/dev/null &&\n\
                 docker run --name nat{mark} --network none nat{mark} true &&\n\
                 says docker run --rm --network none nat{mark}"
            ));
            (job, run, mark)
        })
        .collect();
    for (_, run, mark) in &jobs {
        assert_eq!(run.wait_ok(secs(120)), format!("{mark}\n"));
    }
    let mut homes = Vec::new();
    for (job, _, mark) in &jobs {
        let images = where_is(&lab.daemons, |d| d.has_image(&format!("nat{mark}")));
        let containers = where_is(&lab.daemons, |d| d.has_container(&format!("nat{mark}")));
        assert_eq!((images.len(), &images), (1, &containers), "split: {images:?} {containers:?}");
        homes.extend(images);
        job.ok(&format!("docker rm nat{mark}"));
    }
    homes.sort();
    homes.dedup();
    assert_eq!(homes.len(), 1, "one address is one session");
}

/// Two jobs build the same tag on a daemon each. The third job pushes: what the second one built.
fn build_then_push(lab: &Lab) {
    let pool = lab.serve(lab.pool().env("DINDPOOL_SESSION_GRACE", "5s"));
    let image = format!("{}/app{}:1", lab.registry.name, unique());
    let repository = image.split_once('/').unwrap().1.split_once(':').unwrap().0;
    let (mut builders, held) = (Vec::new(), unique());
    for mark in ["older", "newer"] {
        let job = ci_job(&pool, &unique());
        job.ok(&format!("docker build --network none --build-arg MARK={mark} -t {image} ctx"));
        // Its work keeps the next one away.
        job.ok(&format!("docker run -d --name {mark}{held} --network none {image} sleep 600"));
        builders.push((job, mark));
    }
    let mark = |d: &Daemon| d.get(&format!("/images/{image}/json"))["Config"]["Labels"]["mark"].clone();
    let mut marks: Vec<Value> = lab.daemons.iter().map(mark).collect();
    marks.sort_by_key(Value::to_string);
    assert_eq!(marks, ["newer", "older"], "an image of that name on each daemon");
    builders.iter().for_each(|(job, mark)| drop(job.ok(&format!("docker rm -f {mark}{held}"))));
    drop(builders);
    pool.wait_no_sessions(secs(20));

    let pusher = ci_job(&pool, &unique());
    pusher.ok(&format!("docker push {image}"));
    assert_eq!(lab.registry.tags(repository), ["1"]);
    for daemon in &lab.daemons {
        let terminal = direct(daemon);
        terminal.ok(&format!("docker rmi {image}"));
        // The control: where it is not, it cannot be pushed.
        let refused = terminal.fails(&format!("docker push {image}"));
        assert!(refused.stderr.contains("does not exist"), "{}", refused.all());
        terminal.ok(&format!("docker pull {image}"));
        assert_eq!(mark(daemon), "newer");
    }
}

/// A pod goes and leaves a container and an image that nobody pushed; the next one gets its address. Until pods are
/// watched, the proxy cannot tell the two apart: the new one is put where the old one's things are.
fn reused_address(lab: &Lab) {
    let bridge = Bridge::new(1);
    let list = |daemons: &[&Daemon]| {
        let urls: Vec<String> = daemons.iter().map(|d| format!("\"{}\"", d.addr.url())).collect();
        format!("daemons = [{}]\n", urls.join(", "))
    };
    let files = common::short_dir();
    let file = files.path().join("dindpool.toml");
    std::fs::write(&file, list(&lab.daemons.iter().collect::<Vec<_>>())).unwrap();
    let pool = Pool::serve([])
        .env("DINDPOOL_SESSION_GRACE", "1s")
        .env("DINDPOOL_SLOT_LINGER", "100ms")
        .arg("--config")
        .arg(file.display().to_string())
        .listen(&format!("tcp://{}:0", bridge.ip));
    let pool = lab.serve(pool);
    let host = pool.listener(&bridge.ip).url();
    let pod = || {
        let pod = Session::with(&host, client::BUILDX_29).netns(&bridge.namespaces[0]).open();
        pod.context("ctx", APP);
        pod
    };
    // What a job does first, without a thought of anybody before it.
    let works = |pod: &Session, mark: &str| {
        let script = format!(
            "docker version && docker info && docker ps && docker images || exit 1\n\
             docker build --network none --build-arg MARK={mark} -t pod{mark} ctx || exit 2\n\
             docker run --name pod{mark} --network none pod{mark} true || exit 3\n\
             says docker run --rm --network none pod{mark} >ran || exit 4"
        );
        let out = pod.run(&script);
        assert_eq!(out.code, 0, "{}", out.all());
        assert_eq!(std::fs::read_to_string(pod.path("ran")).unwrap(), format!("{mark}\n"));
        let homes = where_is(&lab.daemons, |d| d.has_container(&format!("pod{mark}")));
        assert_eq!(homes, where_is(&lab.daemons, |d| d.has_image(&format!("pod{mark}"))));
        assert_eq!(homes.len(), 1);
        homes[0].clone()
    };
    let marks = [unique(), unique(), unique()];
    let first = pod();
    let home = works(&first, &marks[0]);
    drop(first);
    bridge.replace(0);
    pool.wait_no_sessions(secs(20)); // the grace; after it nothing of the first pod is left but what it owns

    let second = pod();
    assert_eq!(works(&second, &marks[1]), home, "today: where the former one's things are");
    let seen = second.ok("docker ps -a --format '{{.Names}}'");
    assert!(seen.contains(&format!("pod{}", marks[0])), "today: it sees them, {seen}");
    drop(second);
    bridge.replace(0);
    pool.wait_no_sessions(secs(20));

    // Their daemon goes for good.
    let left = lab.daemons.iter().find(|d| d.id != home).unwrap();
    std::fs::write(&file, list(&[left])).unwrap();
    pool.reload();
    wait_until("one daemon is left", secs(20), || pool.daemons().len() == 1);
    let third = pod();
    assert_eq!(works(&third, &marks[2]), left.id, "and no word of what was lost");
    lab.daemons.iter().for_each(Daemon::remove_containers);
}
