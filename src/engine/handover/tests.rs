//! What a successor decides after an import; that nothing of a whole account gets lost is in
//! [`super::super::simulation`], where a shadow model goes on across handovers.

use super::super::Config;
use super::*;

const S: Time = Time::from_secs(1);

fn pool(ids: &[&str]) -> Engine {
    let mut engine = Engine::new(Config::default(), 7);
    let one = |id: &&str| Observed { id: (*id).into(), draining: false, pending: None, slots: Some(2) };
    engine.handle(Event::Observed(ids.iter().map(one).collect()), 100 * S);
    for id in ids {
        let facts =
            Facts { engine_id: format!("id-{id}"), api_max: (1, 45), api_min: (1, 24), ..Facts::default() };
        engine.handle(Event::Probed { daemon: (*id).into(), probe: Probe::Answered(facts) }, 100 * S);
        let (began, inventory) = (100 * S, Inventory::default());
        engine.handle(Event::Inventory { daemon: (*id).into(), began, inventory }, 100 * S);
    }
    engine
}

fn ask(key: &str, class: Class) -> Acquire {
    Acquire {
        request: RequestId(1),
        key: key.into(),
        tenant: "t".into(),
        source: None,
        inside: None,
        shares_names: false,
        class,
        target: None,
        requirements: Requirements::default(),
        deadline: None,
    }
}

fn granted(effects: &[Effect]) -> (OpenId, DaemonId) {
    let granted = effects.iter().find_map(|effect| match effect {
        Effect::Granted { open, daemon, .. } => Some((*open, daemon.clone())),
        _ => None,
    });
    granted.unwrap_or_else(|| panic!("{effects:?}"))
}

/// A session builds, and another one has made a container that runs and an image.
fn at_work(engine: &mut Engine, now: Time) -> (DaemonId, DaemonId) {
    let (_, builds) = granted(&engine.handle(Event::Acquire(ask("ip:1", Class::Work(Work::Build))), now));
    let container = Event::Acquire(ask("ip:2", Class::Work(Work::Container)));
    let (open, runs) = granted(&engine.handle(container, now));
    let mut learn =
        |fact| engine.handle(Event::Learned { daemon: runs.clone(), open: Some(open), fact }, now);
    learn(Fact::Created { kind: Kind::Container, id: "c1".into(), name: Some("db".into()) });
    learn(Fact::Started { id: "c1".into() });
    let (reference, id) = ("docker.io/library/app:1".to_string(), Some("sha256:1".to_string()));
    learn(Fact::ImageWritten { reference, id, written: Written::Made });
    engine.handle(Event::Release { open, outcome: Outcome::Done }, now);
    (builds, runs)
}

/// What the other one's own watch shows of it.
fn shows(engine: &mut Engine, daemon: &DaemonId, now: Time) {
    let mut learn = |fact| engine.handle(Event::Learned { daemon: daemon.clone(), open: None, fact }, now);
    learn(Fact::Created { kind: Kind::Container, id: "c1".into(), name: Some("db".into()) });
    learn(Fact::Started { id: "c1".into() });
    let (reference, id) = ("docker.io/library/app:1".to_string(), Some("sha256:1".to_string()));
    learn(Fact::ImageWritten { reference, id, written: Written::Made });
}

fn import(engine: &mut Engine, export: &Export, now: Time) -> Vec<Effect> {
    engine.handle(Event::Import { epoch: 2, export: Box::new(export.clone()) }, now)
}

fn used(engine: &Engine) -> Vec<u32> {
    engine.daemons().map(|d| d.used).collect()
}

#[test]
fn a_successor_sends_each_session_where_it_was_whatever_its_clock_says() {
    for (own, theirs) in [(1000 * S, 101 * S), (101 * S, 1000 * S)] {
        let (mut old, mut new) = (pool(&["a", "b"]), pool(&["a", "b"]));
        let (builds, runs) = at_work(&mut old, own);
        shows(&mut new, &runs, theirs);
        assert_eq!(used(&new).iter().sum::<u32>(), 0);
        let effects = import(&mut new, &old.export(own), theirs);
        assert!(matches!(effects[..], [Effect::Attached { .. }]), "{effects:?}");
        assert_eq!(used(&new), used(&old));
        for (key, daemon) in [("ip:1", &builds), ("ip:2", &runs)] {
            assert_eq!(new.home(&key.into()), Some(daemon));
            let acquire = ask(key, Class::Work(Work::Container));
            assert_eq!(granted(&new.handle(Event::Acquire(acquire), theirs)).1, *daemon);
        }
        // Another session that names the image goes where it is.
        let mut acquire = ask("ip:3", Class::Work(Work::Container));
        acquire.requirements.image = Some("docker.io/library/app:1".into());
        assert_eq!(granted(&new.handle(Event::Acquire(acquire), theirs)).1, runs);
        // Leases run out as they would have.
        assert!(new.next_tick().is_some_and(|at| at <= theirs + Config::default().grace));
    }
}

#[test]
fn what_is_relayed_elsewhere_holds_its_slot_until_it_is_told_to_have_ended() {
    let (mut old, mut new) = (pool(&["a"]), pool(&["a"]));
    at_work(&mut old, 200 * S);
    let export = old.export(200 * S);
    let effects = import(&mut new, &export, 200 * S);
    let [Effect::Attached { theirs, open, .. }] = effects[..] else { panic!("{effects:?}") };
    assert_eq!(theirs, export.opens[0].open);
    assert_eq!(new.session(&"ip:1".into()).map(|s| (s.open, s.builds, s.slots)), Some((1, 1, 1)));
    new.handle(Event::Release { open, outcome: Outcome::Done }, 201 * S);
    assert_eq!(new.session(&"ip:1".into()).map(|s| (s.open, s.builds)), Some((0, 0)));
}

#[test]
fn a_container_that_the_successors_watch_does_not_show_is_taken_over_only_while_it_is_news() {
    for (age, known) in [(S, true), (60 * S, false)] {
        let (mut old, mut new) = (pool(&["a"]), pool(&["a"]));
        at_work(&mut old, 200 * S);
        import(&mut new, &old.export(200 * S + age), 300 * S);
        assert_eq!(new.knows(Kind::Container, "c1"), known);
        assert_eq!(new.image_count(), usize::from(known));
        let owns = new.session(&"ip:2".into()).is_some_and(|s| !s.owned.is_empty());
        assert_eq!(owns, known);
        // The next list corrects it.
        let (began, inventory) = (301 * S, Inventory::default());
        new.handle(Event::Inventory { daemon: "a".into(), began, inventory }, 301 * S);
        assert!(!new.daemons().any(|d| d.strangers() > 0));
    }
}

#[test]
fn a_daemon_that_has_gone_or_is_another_one_now_is_lost_to_its_sessions() {
    let mut old = pool(&["a"]);
    at_work(&mut old, 200 * S);
    let mut export = old.export(200 * S);
    let mut gone = pool(&["b"]);
    import(&mut gone, &export, 200 * S);
    export.daemons[0].engine_id = Some("another".into());
    let mut another = pool(&["a"]);
    import(&mut another, &export, 200 * S);
    for new in [&mut gone, &mut another] {
        assert_eq!(used(new), [0]);
        assert_eq!(new.session(&"ip:1".into()).and_then(|s| s.lost.clone()), Some("a".into()));
        let mut acquire = ask("ip:2", Class::Follow);
        acquire.target = Some(ObjectRef { kind: Kind::Container, reference: "c1".into() });
        let effects = new.handle(Event::Acquire(acquire), 200 * S);
        let lost = |e: &Effect| matches!(e, Effect::Refused { refusal: Refusal::SessionLost(_), .. });
        assert!(effects.iter().any(lost), "{effects:?}");
    }
}

#[test]
fn a_cordon_and_a_drain_go_on() {
    let mut old = pool(&["a", "b"]);
    let (busy, _) = at_work(&mut old, 200 * S);
    let other = if busy.as_str() == "a" { "b" } else { "a" };
    old.handle(Event::Cordon { daemon: other.into(), by: CordonedBy::Scaler }, 200 * S);
    old.handle(Event::Drain { daemon: busy.clone(), deadline: 260 * S }, 200 * S);
    let mut new = pool(&["a", "b"]);
    import(&mut new, &old.export(210 * S), 1000 * S);
    let cordon = |engine: &Engine, id: &str| {
        engine.daemons().find(|d| d.id.as_str() == id).and_then(|d| d.cordon.clone())
    };
    assert_eq!(cordon(&new, other).map(|c| c.by), Some(CordonedBy::Scaler));
    assert_eq!(cordon(&new, busy.as_str()).and_then(|c| c.deadline()), Some(1050 * S));
    let effects = new.handle(Event::Tick, 1050 * S);
    assert!(effects.iter().any(|e| matches!(e, Effect::Drained { .. })), "{effects:?}");
}

#[test]
fn an_account_in_another_form_is_not_taken_over() {
    let mut old = pool(&["a"]);
    at_work(&mut old, 200 * S);
    let export = Export { version: VERSION + 1, ..old.export(200 * S) };
    let mut new = pool(&["a"]);
    assert_eq!(import(&mut new, &export, 200 * S), []);
    assert_eq!(new.sessions().count(), 0);
}

#[test]
fn what_is_told_after_a_crash_binds_its_session() {
    let mut new = pool(&["a", "b"]);
    let acquire = ask("ip:1", Class::Work(Work::Build));
    let open = OpenExport::of(&acquire, OpenId(77), "b".into(), true);
    let effects = new.handle(Event::Attach(vec![open.clone()]), 200 * S);
    let attached = |e: &Effect| matches!(e, Effect::Attached { theirs: OpenId(77), .. });
    assert!(effects.iter().any(attached), "{effects:?}");
    assert_eq!((new.home(&"ip:1".into()), used(&new)), (Some(&"b".into()), vec![0, 1]));
    // What is on a daemon that is not there is nobody's.
    let elsewhere = OpenExport { daemon: "z".into(), ..open };
    assert_eq!(new.handle(Event::Attach(vec![elsewhere]), 200 * S), []);
}

#[test]
fn who_admits_no_more_knows_what_there_is_and_nothing_of_whose_it_is() {
    let mut engine = pool(&["a"]);
    at_work(&mut engine, 200 * S);
    engine.handle(Event::Acquire(ask("ip:9", Class::Work(Work::Build))), 200 * S);
    engine.handle(Event::Retired, 200 * S);
    assert_eq!((engine.sessions().count(), engine.tickets().len(), used(&engine)), (0, 0, vec![0]));
    assert!(engine.knows(Kind::Container, "c1") && engine.image_count() == 1);
    // It runs there, whoever's it is.
    assert_eq!(engine.daemons().map(super::super::Daemon::strangers).sum::<u32>(), 1);
}
