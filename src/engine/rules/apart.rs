//! Sessions that use the same names: each is kept apart from what the others have made.

use std::collections::BTreeSet;

use super::*;

impl Acquire {
    fn apart(mut self, kind: Kind, reference: &str) -> Self {
        self.requirements.apart.push(ObjectRef { kind, reference: reference.into() });
        self
    }
}

/// `docker compose up` of a job: it looks for its project, and makes a network of it.
fn compose_up(pool: &mut Pool, key: &str, id: &str) -> DaemonId {
    let listed = pool.call(ask(key, Class::Read).job().target(Kind::Project, "app"));
    assert!(!pool.engine.objects.has_named(&listed, Kind::Network, "app_default"), "{key} saw another's");
    let listed = pool.call(ask(key, Class::Read).job().target(Kind::Network, "app_default"));
    assert!(
        !pool.engine.objects.has_named(&listed, Kind::Network, "app_default"),
        "{key} saw another's network"
    );
    let up = ask(key, Class::Work(Work::Resource)).job();
    let grant = pool.grant(up.apart(Kind::Network, "app_default").apart(Kind::Project, "app"));
    let (daemon, name) = (grant.daemon.clone(), Some("app_default".into()));
    pool.learn(&daemon, Some(&grant), Fact::Created { kind: Kind::Network, id: id.into(), name });
    pool.learn(&daemon, None, Fact::Labelled { kind: Kind::Network, id: id.into(), project: "app".into() });
    pool.done(&grant);
    daemon
}

#[test]
fn jobs_with_one_project_name_are_kept_apart_while_there_are_daemons() {
    for seed in 0..20 {
        let mut pool = Pool::seeded(3, seed);
        // Load draws the other two to where the project is.
        let first = compose_up(&mut pool, "job:1", "n1");
        let others: Vec<DaemonId> =
            ["a", "b", "c"].into_iter().map(DaemonId::from).filter(|d| *d != first).collect();
        for (n, _) in others.iter().enumerate() {
            pool.grant(build(&format!("load{n}")));
            pool.grant(build(&format!("load{n}")));
        }
        let second = compose_up(&mut pool, "job:2", "n2");
        let third = compose_up(&mut pool, "job:3", "n3");
        assert_eq!(BTreeSet::from([first.clone(), second, third]).len(), 3);
        let list = |key: &str| ask(key, Class::Read).job().target(Kind::Project, "app");
        let said = pool.refuse(list("job:4"));
        assert!(
            said.starts_with(
                "compose project app is another session's on every daemon of the pool (a, b, c)"
            )
        );
        // Its own it finds, and a terminal finds what is on one daemon only.
        assert_eq!(pool.call(list("job:1")), first);
        for id in ["n2", "n3"] {
            ["a", "b", "c"].iter().for_each(|d| {
                pool.learn(&(*d).into(), None, Fact::Removed { kind: Kind::Network, id: id.into() });
            });
        }
        assert_eq!(pool.call(ask("posix:1@1", Class::Read).target(Kind::Project, "app")), first);
        assert_ne!(pool.call(list("job:4")), first);
    }
}

#[test]
fn a_project_of_nobody_known_is_found_by_a_job() {
    let mut pool = Pool::of(3);
    let b = DaemonId::from("b");
    pool.learn(
        &b,
        None,
        Fact::Created { kind: Kind::Network, id: "n".into(), name: Some("app_default".into()) },
    );
    pool.learn(&b, None, Fact::Labelled { kind: Kind::Network, id: "n".into(), project: "app".into() });
    for key in ["job:1", "job:2", "job:3", "job:4"] {
        assert_eq!(pool.call(ask(key, Class::Read).job().target(Kind::Project, "app")), b);
    }
}

#[test]
fn a_container_is_made_where_its_name_is_free() {
    for seed in 0..20 {
        let mut pool = Pool::seeded(2, seed);
        let taken = pool.run(create("k", "alpine"), "1111", Some("db"));
        let other = if taken.as_str() == "a" { "b" } else { "a" };
        pool.grant(build("load1"));
        pool.grant(build("load2"));
        assert_eq!(pool.call(create("l", "alpine").apart(Kind::Container, "db")).as_str(), other);
        pool.run(create("m", "alpine").apart(Kind::Container, "db"), "2222", Some("db"));
        pool.grant(create("n", "alpine").apart(Kind::Container, "db")); // It is everywhere: the daemon says so.
    }
}

#[test]
fn an_image_of_another_job_that_works_is_not_removed_by_its_name() {
    let mut pool = Pool::of(2);
    let remove = |key: &str, image: &str| ask(key, Class::Remove).job().image(image);
    let home = pool.makes("job:1", "app", "sha256:11");
    let said = "No such image: app:latest (one of this name is of another session, which works)";
    assert_eq!(pool.refuse(remove("job:2", "app")), said);
    assert_eq!(pool.call(remove("job:2", "sha256:11")), home, "an id is a fact");
    assert_eq!(pool.call(remove("job:1", "app")), home);
    assert_eq!(pool.call(ask("posix:1@1", Class::Remove).image("app")), home, "a terminal is a person's");
    assert_eq!(pool.call(follow("job:2").image("app")), home, "to push it and to run it are other matters");
    // What builds beside an explicit session carries its source's key only: both are one client.
    assert_eq!(pool.call(remove("name:x", "app").from("job:1")), home);
    // It has made one of that name itself: that is the one it means.
    let own = pool.makes("job:3", "app", "sha256:33");
    assert_ne!(own, home);
    assert_eq!(pool.call(remove("job:3", "app")), own);
    pool.pass(10);
    assert_eq!(pool.call(remove("job:2", "app")), own, "who works no longer is cleared up after");
}
