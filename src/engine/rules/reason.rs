//! Why a session is where it is: the decision says so itself.

use super::super::reason::{Because, Why};
use super::*;

fn why(pool: &Pool, key: &str) -> Why {
    let session = pool.engine.session(&key.into()).expect("a session");
    let home = session.home.as_ref().expect("a home");
    (**home.why.as_ref().expect("a reason")).clone()
}

#[test]
fn the_numbers_are_those_of_the_moment() {
    let mut pool = Pool::of(2);
    let first = pool.grant(build("x"));
    pool.grant(build("y"));
    let Because::LeastWait { equals, image, compared } = why(&pool, "y").because else { panic!("by load") };
    assert_eq!((equals, image), (1, false));
    let told: Vec<_> = compared.iter().map(|c| (c.daemon != first.daemon, c.used, c.sessions)).collect();
    assert_eq!(told, [(true, 0, 0), (false, 1, 1)], "the chosen one first, as they were before");
    // What happens later changes nothing about it.
    pool.grant(build("z"));
    assert!(matches!(why(&pool, "y").because, Because::LeastWait { compared: now, .. } if now == compared));
}

#[test]
fn what_led_there_is_told() {
    let mut pool = Pool::of(3);
    let made = pool.makes("maker", "app:1", "sha256:1");
    assert_eq!(pool.grant(create("runner", "app:1")).daemon, made);
    let Because::Needs { what } = why(&pool, "runner").because else { panic!("by image") };
    assert!(what.contains("app:1"), "{what}");
    pool.grant(build("name:a").from("ip:1"));
    pool.grant(build("name:b").from("ip:1"));
    assert_eq!(why(&pool, "name:b").because, Because::Client { session: "name:a".into() });
}

#[test]
fn a_session_that_comes_back_is_told_so() {
    let mut pool = Pool::of(3);
    let grant = pool.grant(build("k"));
    pool.done(&grant);
    pool.pass(400);
    assert!(pool.engine.session(&"k".into()).expect("remembered").lease().is_none());
    assert_eq!(pool.grant(build("k")).daemon, grant.daemon);
    assert_eq!(why(&pool, "k").because, Because::Former);
}

#[test]
fn a_build_of_a_known_project_tells_what_it_costs_where() {
    let mut pool = Pool::of(2);
    let of_project = |key: &str| {
        let mut acquire = build(key);
        acquire.requirements.project = Some("app".into());
        acquire
    };
    let first = pool.grant(of_project("x"));
    pool.done(&first);
    pool.pass(20);
    assert_eq!(pool.grant(of_project("y")).daemon, first.daemon);
    let Because::DoneFirst { project, warm, compared } = why(&pool, "y").because else {
        panic!("by project")
    };
    assert_eq!((project.as_str(), warm), ("app", true));
    let costs: Vec<_> = compared.iter().map(|c| (c.warm, c.cost.expect("a cost"))).collect();
    assert!(costs[0].0 && !costs[1].0 && costs[0].1 + 1.0 < costs[1].1, "{costs:?}");
}
