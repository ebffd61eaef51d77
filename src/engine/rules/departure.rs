//! A daemon that is about to end.

use super::*;
use crate::engine::departure::Departure;

fn listed(pool: &mut Pool, daemon: &DaemonId) {
    let (daemon, began) = (daemon.clone(), pool.now);
    pool.tell(Event::Inventory { daemon, began, inventory: Inventory::default() });
}

/// Two daemons that have been listed.
fn pool() -> (Pool, DaemonId) {
    let mut pool = Pool::of(2);
    for id in ["a", "b"] {
        listed(&mut pool, &id.into());
    }
    (pool, "a".into())
}

fn leaves(pool: &mut Pool, daemon: &DaemonId) {
    let until = pool.now + Time::from_secs(3600);
    pool.tell(Event::Leaving { daemon: daemon.clone(), until });
}

fn let_go(pool: &mut Pool, daemon: &DaemonId) -> bool {
    pool.tell(Event::LetGo { daemon: daemon.clone() });
    pool.engine.departure(daemon) == Departure::LetGo
}

/// The daemon drains, by the provisioner's word.
fn drains(pool: &mut Pool, daemon: &DaemonId) {
    let observed = ["a", "b"].map(|id| Observed {
        id: id.into(),
        draining: id == daemon.as_str(),
        pending: None,
        slots: Some(2),
    });
    pool.tell(Event::Observed(observed.to_vec()));
}

#[test]
fn a_daemon_is_let_go_when_its_last_work_and_the_linger_after_it_are_over() {
    let (mut pool, _) = pool();
    let grant = pool.grant(build("k"));
    let a = grant.daemon.clone();
    leaves(&mut pool, &a);
    assert!(!let_go(&mut pool, &a));
    let Departure::Busy(work) = pool.engine.departure(&a) else { panic!("somebody builds") };
    assert_eq!((work.len(), work[0].builds), (1, 1));
    pool.done(&grant);
    assert!(!let_go(&mut pool, &a), "the next command of the script is on its way");
    pool.pass(10);
    assert!(pool.lease("k").is_some(), "a lease without work does not keep it");
    assert!(let_go(&mut pool, &a));
    assert_eq!(pool.lease("k"), None);
    assert_ne!(pool.call(build("k")), a);
}

#[test]
fn a_container_that_runs_and_a_stream_that_is_open_keep_a_daemon() {
    let (mut pool, _) = pool();
    let a = pool.run(create("k", "alpine"), "c1", Some("db"));
    pool.pass(3600);
    assert!(!let_go(&mut pool, &a));
    let logs = pool.grant(follow("k"));
    pool.exits(&a, "c1");
    pool.pass(60);
    assert!(!let_go(&mut pool, &a), "who reads the logs is not cut");
    pool.done(&logs);
    assert!(let_go(&mut pool, &a));
}

#[test]
fn a_daemon_that_was_never_listed_is_not_known_to_be_idle() {
    let mut pool = Pool::of(1);
    assert_eq!(pool.engine.departure(&"a".into()), Departure::Unlisted);
    assert!(!let_go(&mut pool, &"a".into()));
    assert_eq!(pool.engine.departure(&"nobody".into()), Departure::Unknown);
}

#[test]
fn whoever_asks_closes_the_daemon_for_as_long_as_he_asks() {
    let (mut pool, a) = pool();
    pool.tell(Event::Leaving { daemon: a.clone(), until: pool.now + Time::from_secs(10) });
    for i in 0..5 {
        assert_ne!(pool.call(build(&format!("k{i}"))), a);
    }
    pool.pass(30);
    assert_eq!(pool.call(build("later")), a, "it is the emptier one, and open again");
}

#[test]
fn who_owned_something_on_a_daemon_that_was_let_go_is_told_and_then_begins_anew() {
    let (mut pool, _) = pool();
    let a = pool.makes("k", "app", "sha256:1");
    pool.pass(10);
    drains(&mut pool, &a);
    assert!(let_go(&mut pool, &a));
    assert!(pool.refuse(follow("k").image("app")).contains("session lost"));
    assert_ne!(pool.call(build("k")), a);
    // What is still heard of it before it ends changes nothing.
    listed(&mut pool, &a);
    pool.learn(&a, None, Fact::Started { id: "c9".into() });
    assert_eq!(pool.engine.departure(&a), Departure::LetGo);
}

#[test]
fn a_container_that_was_only_restarted_is_back_when_it_is_met_anew() {
    let (mut pool, a) = pool();
    leaves(&mut pool, &a);
    assert!(let_go(&mut pool, &a));
    for i in 0..3 {
        assert_ne!(pool.call(build(&format!("k{i}"))), a);
    }
    listed(&mut pool, &a);
    assert_eq!(pool.engine.departure(&a), Departure::Idle);
    assert_eq!(pool.call(build("later")), a);
}
