//! Cordon and drain.

use super::*;
use crate::engine::Drain;

fn cordon(pool: &mut Pool, daemon: &DaemonId, by: CordonedBy) {
    pool.tell(Event::Cordon { daemon: daemon.clone(), by });
}

fn uncordon(pool: &mut Pool, daemon: &DaemonId, by: CordonedBy) {
    pool.tell(Event::Uncordon { daemon: daemon.clone(), by });
}

fn drain(pool: &mut Pool, daemon: &DaemonId, seconds: u64) {
    let deadline = pool.now + Time::from_secs(seconds);
    pool.tell(Event::Drain { daemon: daemon.clone(), deadline });
}

/// How the drain of a daemon ended, if it has.
fn ended(pool: &Pool, daemon: &DaemonId) -> Option<Drained> {
    let d = pool.engine.daemons().find(|d| d.id == *daemon)?;
    match d.cordon.as_ref()?.drain.as_ref()? {
        Drain::Done(drained) => Some(drained.clone()),
        Drain::Waiting { .. } => None,
    }
}

fn is_cordoned(pool: &Pool, daemon: &DaemonId) -> bool {
    pool.engine.daemons().any(|d| d.id == *daemon && d.cordon.is_some())
}

#[test]
fn a_cordoned_daemon_takes_no_new_session_and_keeps_its_own() {
    let mut pool = Pool::of(2);
    let bound = pool.grant(build("x"));
    let home = bound.daemon.clone();
    cordon(&mut pool, &home, CordonedBy::Operator);
    for key in ["p", "q", "r"] {
        assert_ne!(pool.call(build(key)), home);
    }
    assert_eq!(pool.call(build("x")), home);
    uncordon(&mut pool, &home, CordonedBy::Operator);
    assert_eq!(pool.call(build("s")), home, "it is the emptier one");
}

#[test]
fn what_exists_only_on_a_cordoned_daemon_is_asked_for_there() {
    let mut pool = Pool::of(2);
    let home = pool.makes("x", "app", "sha256:1");
    pool.pass(400);
    assert_eq!(pool.lease("x"), None);
    cordon(&mut pool, &home, CordonedBy::Operator);
    assert_eq!(pool.call(create("x", "app")), home, "its affinity");
    assert_eq!(pool.call(follow("y").image("app")), home, "the image");
}

#[test]
fn when_all_are_cordoned_nobody_new_gets_in_and_hears_why() {
    let mut pool = Pool::of(1);
    cordon(&mut pool, &"a".into(), CordonedBy::Operator);
    assert_eq!(pool.refuse(build("x")), "no open daemon in the pool: a cordoned");
}

#[test]
fn the_scaler_lifts_its_own_cordon_and_never_an_operators() {
    let mut pool = Pool::of(1);
    let a = DaemonId::from("a");
    cordon(&mut pool, &a, CordonedBy::Scaler);
    uncordon(&mut pool, &a, CordonedBy::Scaler);
    assert!(!is_cordoned(&pool, &a));
    cordon(&mut pool, &a, CordonedBy::Scaler);
    cordon(&mut pool, &a, CordonedBy::Operator);
    uncordon(&mut pool, &a, CordonedBy::Scaler);
    assert!(is_cordoned(&pool, &a), "it is the operator's now");
    cordon(&mut pool, &a, CordonedBy::Scaler);
    uncordon(&mut pool, &a, CordonedBy::Operator);
    assert!(!is_cordoned(&pool, &a));
}

#[test]
fn a_drain_ends_with_the_last_work_and_waits_for_no_grace() {
    let mut pool = Pool::of(1);
    let a = DaemonId::from("a");
    let (build, read) = (pool.grant(build("x")), pool.grant(ask("y", Class::Read)));
    pool.call(super::build("idle"));
    assert!(pool.lease("idle").is_some());
    pool.run(create("c", "alpine"), "c1", Some("db"));
    drain(&mut pool, &a, 600);
    assert!(pool.lease("idle").is_none(), "a lease without work ends at once");
    pool.writes(&build, "app", "sha256:1", Written::Made);
    pool.done(&build);
    pool.done(&read);
    assert_eq!(ended(&pool, &a), None, "a container runs");
    pool.exits(&a, "c1");
    let drained = ended(&pool, &a).expect("the end");
    assert!(drained.cut.is_empty());
    assert_eq!(drained.left.containers, ["db"]);
    assert_eq!(drained.left.images, [super::super::images::normalise("app")]);
    assert!(pool.engine.daemons().all(|d| d.sessions.is_empty() && d.used == 0));
    assert!(is_cordoned(&pool, &a), "it stays cordoned");
}

#[test]
fn an_idle_daemon_is_drained_at_once() {
    let mut pool = Pool::of(2);
    drain(&mut pool, &"a".into(), 600);
    assert_eq!(ended(&pool, &"a".into()), Some(Drained::default()));
}

#[test]
fn a_drain_cuts_what_is_left_at_its_deadline() {
    let mut pool = Pool::of(1);
    let a = DaemonId::from("a");
    pool.grant(build("x"));
    pool.run(create("c", "alpine"), "c1", Some("db"));
    drain(&mut pool, &a, 60);
    drain(&mut pool, &a, 6000); // Joins.
    pool.pass(59);
    assert_eq!(ended(&pool, &a), None);
    pool.pass(1);
    let cut = ended(&pool, &a).expect("the end").cut;
    let told: Vec<_> =
        cut.iter().map(|r| (r.key.as_ref().unwrap().as_str(), r.open, r.builds, &r.containers[..])).collect();
    assert_eq!(told, [("c", 0, 0, &["db".to_string()][..]), ("x", 1, 1, &[][..])]);
    let tells = pool.told.iter().filter(|e| matches!(e, Effect::Drained { .. })).count();
    assert_eq!(tells, 1);
}

#[test]
fn who_waits_for_a_daemon_that_drains_is_served_there_until_the_deadline() {
    let mut pool = Pool::of(2);
    pool.engine = Engine::new(Config::default(), 1);
    pool.observe(&["a".into()]);
    pool.answers(&"a".into());
    let first = pool.grant(build("x"));
    let second = pool.grant(build("x"));
    let wait = |pool: &mut Pool, key: &str| {
        pool.requests += 1;
        let request = RequestId(pool.requests);
        let effects = pool.tell(Event::Acquire(Acquire { request, ..build(key) }));
        assert!(matches!(effects[..], [Effect::Queued { .. }]), "{effects:?}");
        request
    };
    let (bound, unbound) = (wait(&mut pool, "x"), wait(&mut pool, "y"));
    let last = wait(&mut pool, "x");
    drain(&mut pool, &"a".into(), 60);
    pool.done(&first);
    let granted = |pool: &Pool, r| {
        pool.told.iter().any(|e| matches!(e, Effect::Granted { request, .. } if *request == r))
    };
    assert!(granted(&pool, bound) && !granted(&pool, unbound));
    pool.pass(60);
    let refused = |pool: &Pool, r| {
        pool.told.iter().any(|e| matches!(e, Effect::Refused { request, .. } if *request == r))
    };
    assert!(refused(&pool, last), "it would go nowhere else");
    assert!(!refused(&pool, unbound) && !granted(&pool, unbound), "another daemon may come");
    pool.done(&second);
}

#[test]
fn an_uncordon_ends_a_drain_and_its_deadline_means_nothing_more() {
    let mut pool = Pool::of(1);
    let a = DaemonId::from("a");
    pool.grant(build("x"));
    drain(&mut pool, &a, 60);
    uncordon(&mut pool, &a, CordonedBy::Operator);
    drain(&mut pool, &a, 600);
    pool.pass(100);
    assert_eq!(ended(&pool, &a), None, "the first deadline is not the second drain's");
    uncordon(&mut pool, &a, CordonedBy::Operator);
    pool.pass(1000);
    assert!(!pool.told.iter().any(|e| matches!(e, Effect::Drained { .. })));
}

#[test]
fn a_daemon_that_goes_while_it_drains_takes_its_drain_along() {
    let mut pool = Pool::of(2);
    pool.grant(build("x"));
    for id in ["a", "b"] {
        drain(&mut pool, &id.into(), 60);
    }
    pool.observe(&[]);
    pool.pass(100);
    assert_eq!(
        pool.told.iter().filter(|e| matches!(e, Effect::Drained { .. })).count(),
        1,
        "of the idle one"
    );
}
