//! The rules of health. A test's name is the rule.

use super::*;
use crate::engine::Outcome;

struct Pool {
    engine: Engine,
    now: Time,
    requests: u64,
    told: Vec<Effect>,
}

const FULL: &str = "no space left on device";

impl Pool {
    /// Healthy daemons `a`, `b`, … with this many slots each.
    fn of(daemons: u8, slots: u32) -> Pool {
        let engine = Engine::new(Config { linger: Time::ZERO, ..Config::default() }, 1);
        let mut pool = Pool { engine, now: Time::from_secs(1), requests: 0, told: Vec::new() };
        let ids: Vec<String> = (0..daemons).map(|i| char::from(b'a' + i).to_string()).collect();
        let observed = ids.iter().map(|id| Observed {
            id: id.as_str().into(),
            draining: false,
            pending: None,
            slots: Some(slots),
        });
        pool.tell(Event::Observed(observed.collect()));
        ids.iter().for_each(|id| pool.answers(id));
        pool
    }

    fn tell(&mut self, event: Event) -> Vec<Effect> {
        let effects = self.engine.handle(event, self.now);
        self.told.extend(effects.iter().cloned());
        effects
    }

    fn pass(&mut self, by: Time) {
        let until = self.now + by;
        while let Some(at) = self.engine.next_tick().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            self.tell(Event::Tick);
        }
        self.now = until;
    }

    fn probe(&mut self, id: &str, probe: Probe) {
        self.tell(Event::Probed { daemon: id.into(), probe });
    }

    fn answers(&mut self, id: &str) {
        let facts = Facts { api_min: (1, 24), api_max: (1, 51), ..Facts::default() };
        self.probe(id, Probe::Answered(facts));
    }

    fn refuses(&mut self, id: &str) {
        self.probe(id, Probe::Refused("connection refused".into()));
    }

    /// A deep probe's result.
    fn wrote(&mut self, id: &str, result: DeepProbe) {
        self.tell(Event::Wrote { daemon: id.into(), result });
    }

    fn is_full(&mut self, id: &str) {
        self.wrote(id, DeepProbe::Failed(FULL.into()));
    }

    fn daemon(&self, id: &str) -> &Daemon {
        self.engine.daemons.get(&DaemonId::from(id)).unwrap()
    }

    fn takes(&self, id: &str) -> bool {
        self.daemon(id).takes_sessions()
    }

    /// How many deep probes have been asked for since the last look.
    fn deep_probes(&mut self) -> usize {
        let told = std::mem::take(&mut self.told);
        told.iter().filter(|e| matches!(e, Effect::ProbeDeeply { .. })).count()
    }

    /// A session starts a build.
    fn build(&mut self, key: &str) -> Option<(OpenId, DaemonId)> {
        self.work(key, Work::Build)
    }

    fn work(&mut self, key: &str, work: Work) -> Option<(OpenId, DaemonId)> {
        self.requests += 1;
        let acquire = Acquire {
            request: RequestId(self.requests),
            key: key.into(),
            tenant: "default".into(),
            source: None,
            inside: None,
            shares_names: true,
            class: Class::Work(work),
            target: None,
            requirements: Requirements::default(),
            deadline: None,
        };
        self.tell(Event::Acquire(acquire)).into_iter().find_map(|effect| match effect {
            Effect::Granted { open, daemon, .. } => Some((open, daemon)),
            _ => None,
        })
    }

    fn ends(&mut self, open: OpenId, outcome: Outcome) {
        self.tell(Event::Release { open, outcome });
    }

    /// A build that ends after `lasted`; where it ran.
    fn builds(&mut self, key: &str, lasted: Time, outcome: Outcome) -> DaemonId {
        let (open, daemon) = self.build(key).expect("a free slot");
        self.pass(lasted);
        self.ends(open, outcome);
        daemon
    }
}

const MOMENT: Time = Time::from_millis(50);

#[test]
fn one_that_is_out_is_probed_each_second_however_rarely_the_others_are() {
    let mut pool = Pool::of(2, 4);
    let (rarely, often) = (Time::from_secs(600), Time::from_millis(200));
    assert_eq!(pool.daemon("a").until_probe(rarely), rarely);
    pool.refuses("a");
    assert_eq!(pool.daemon("a").until_probe(rarely), Time::from_secs(1));
    assert_eq!(pool.daemon("a").until_probe(often), often);
    assert_eq!(pool.daemon("b").until_probe(rarely), rarely);
    pool.answers("a");
    while !pool.takes("a") {
        assert!(pool.now < Time::from_secs(5), "it does not come back");
        pool.pass(pool.daemon("a").until_probe(rarely));
        pool.answers("a");
    }
    assert_eq!(pool.daemon("a").until_probe(rarely), rarely);
}

#[test]
fn one_slow_answer_ejects_nobody_and_a_refusal_does_at_once() {
    let mut pool = Pool::of(1, 1);
    pool.probe("a", Probe::Failed("slow".into()));
    assert!(pool.takes("a"));
    pool.probe("a", Probe::Failed("slow".into()));
    assert!(!pool.takes("a"));
    pool.answers("a");
    pool.pass(PAUSE * 2);
    assert!(!pool.takes("a"), "one good answer is not a recovery");
    pool.answers("a");
    assert!(pool.takes("a"));
    pool.refuses("a");
    assert!(!pool.takes("a"));
    assert_eq!(pool.daemon("a").reason, "connection refused");
}

#[test]
fn a_starting_daemon_becomes_ready_with_its_first_answer() {
    let mut pool = Pool::of(1, 3);
    pool.tell(Event::Observed(Vec::new()));
    pool.tell(Event::Observed(vec![Observed {
        id: "s".into(),
        draining: false,
        pending: None,
        slots: Some(3),
    }]));
    pool.refuses("s");
    assert_eq!((pool.daemon("s").state, pool.daemon("s").health), (State::Starting, Health::Healthy));
    pool.answers("s");
    assert_eq!((pool.daemon("s").state, pool.daemon("s").slots), (State::Ready, 3));
}

#[test]
fn each_ejection_doubles_the_good_time_that_the_next_return_needs() {
    let mut pool = Pool::of(1, 1);
    for expected in [1, 2, 4, 8, 16, 32, 60, 60] {
        pool.refuses("a");
        assert_eq!(pool.daemon("a").back_off(), Time::from_secs(expected));
        pool.answers("a");
        pool.pass(Time::from_secs(expected) - Time::from_millis(1));
        pool.answers("a");
        assert!(!pool.takes("a"), "{expected} s are not over");
        pool.pass(Time::from_millis(1));
        pool.answers("a");
        assert!(pool.takes("a"));
    }
    pool.pass(FORGIVEN);
    pool.refuses("a");
    assert_eq!(pool.daemon("a").back_off(), PAUSE, "long good health is remembered");
}

#[test]
fn a_bad_answer_begins_the_good_time_anew() {
    let mut pool = Pool::of(1, 1);
    pool.refuses("a");
    pool.answers("a");
    pool.pass(Time::from_secs(5));
    pool.probe("a", Probe::Failed("slow".into()));
    pool.answers("a");
    pool.answers("a");
    assert!(!pool.takes("a"));
    pool.pass(PAUSE);
    pool.answers("a");
    assert!(pool.takes("a"));
}

#[test]
fn at_most_half_of_the_pool_is_out_because_it_cannot_write() {
    for (daemons, out) in [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)] {
        let mut pool = Pool::of(daemons, 1);
        let ids: Vec<String> = (0..daemons).map(|i| char::from(b'a' + i).to_string()).collect();
        ids.iter().for_each(|id| pool.is_full(id));
        let left = ids.iter().filter(|id| pool.takes(id)).count();
        assert_eq!(ids.len() - left, out, "of {daemons}");
        let alarms = pool.engine.alarms();
        assert_eq!(alarms.len(), left, "{alarms:?}");
        let last = pool.daemon(ids.last().unwrap());
        assert!(last.reason.contains(FULL) && last.reason.contains("it is not ejected"), "{}", last.reason);
    }
    // One that refuses connections is out whatever is left.
    let mut pool = Pool::of(2, 1);
    pool.is_full("a");
    pool.refuses("b");
    assert!(!pool.takes("a") && !pool.takes("b"));
    pool.pass(Time::from_secs(120));
    let mut pool = Pool::of(2, 1);
    pool.refuses("b");
    pool.is_full("a");
    assert!(pool.takes("a"), "the last one that answers stays");
}

#[test]
fn when_one_returns_another_that_cannot_write_goes() {
    let mut pool = Pool::of(2, 1);
    pool.is_full("a");
    pool.is_full("b");
    assert!(!pool.takes("a") && pool.takes("b"));
    pool.wrote("a", DeepProbe::Wrote);
    pool.pass(PAUSE);
    pool.wrote("a", DeepProbe::Wrote);
    assert!(pool.takes("a") && !pool.takes("b"));
}

#[test]
fn what_could_not_write_must_write_again_and_answers_alone_do_not_help() {
    let mut pool = Pool::of(2, 1);
    pool.is_full("a");
    assert_eq!(pool.daemon("a").reason, "cannot write: no space left on device");
    for _ in 0..10 {
        pool.pass(PAUSE);
        pool.answers("a");
    }
    assert!(!pool.takes("a"));
    pool.wrote("a", DeepProbe::Wrote);
    assert!(!pool.takes("a"), "once is not enough");
    pool.pass(PAUSE);
    assert!(pool.deep_probes() > 0, "the second one is asked for");
    pool.wrote("a", DeepProbe::Wrote);
    assert!(pool.takes("a"));
    assert_eq!(pool.daemon("a").reason, "");
}

#[test]
fn writes_that_take_long_must_do_so_twice_and_what_cannot_be_asked_is_well() {
    let mut pool = Pool::of(2, 1);
    pool.wrote("a", DeepProbe::Slow("no answer within 10 s".into()));
    assert!(pool.takes("a"));
    pool.wrote("a", DeepProbe::Wrote);
    pool.wrote("a", DeepProbe::Slow("no answer within 10 s".into()));
    assert!(pool.takes("a"), "not in a row");
    pool.wrote("a", DeepProbe::Slow("no answer within 10 s".into()));
    assert!(!pool.takes("a"));
    pool.wrote("b", DeepProbe::Unsupported);
    assert!(pool.takes("b"));
}

#[test]
fn deep_probes_come_each_interval_and_not_all_at_once() {
    let mut pool = Pool::of(8, 1);
    let mut times = Vec::new();
    for second in 0..120 {
        pool.told.clear();
        pool.pass(Time::from_secs(1));
        for effect in std::mem::take(&mut pool.told) {
            if let Effect::ProbeDeeply { daemon } = effect {
                times.push((second, daemon.to_string()));
                pool.wrote(daemon.as_str(), DeepProbe::Wrote);
            }
        }
    }
    assert_eq!(times.len(), 16, "twice each: {times:?}");
    let together = |second: i32| times.iter().filter(|(at, _)| *at == second).count();
    assert!((0..120).all(|second| together(second) <= 3), "{times:?}");
}

#[test]
fn without_an_interval_there_are_no_deep_probes() {
    let mut pool = Pool::of(1, 1);
    pool.engine =
        Engine::new(Config { deep_probe_interval: Time::ZERO, linger: Time::ZERO, ..Config::default() }, 1);
    pool.tell(Event::Observed(vec![Observed {
        id: "a".into(),
        draining: false,
        pending: None,
        slots: Some(1),
    }]));
    pool.answers("a");
    pool.deep_probes();
    for i in 0..10 {
        pool.builds(&format!("k{i}"), MOMENT, Outcome::Erred);
    }
    pool.pass(Time::from_secs(600));
    assert_eq!(pool.deep_probes(), 0);
}

#[test]
fn fast_failures_ask_for_a_deep_probe_and_eject_nobody() {
    let mut pool = Pool::of(1, 4);
    pool.builds("k1", MOMENT, Outcome::Failed);
    assert_eq!(pool.deep_probes(), 0, "one proves nothing");
    pool.builds("k2", MOMENT, Outcome::Failed);
    assert_eq!(pool.deep_probes(), 1);
    pool.wrote("a", DeepProbe::Wrote);
    let mut asked = 0;
    for i in 0..100 {
        // A broken Dockerfile each tenth of a second: a deep probe each five seconds.
        pool.builds(&format!("c{i}"), MOMENT * 2, Outcome::Failed);
        if pool.deep_probes() > 0 {
            asked += 1;
            pool.wrote("a", DeepProbe::Wrote);
        }
        assert!(pool.takes("a"));
    }
    assert!((1..=3).contains(&asked), "{asked} in 10 s");
    pool.pass(Time::from_secs(61));
    pool.wrote("a", DeepProbe::Wrote);
    pool.deep_probes();
    for i in 0..8 {
        pool.builds(&format!("l{i}"), FAST_FAILURE, Outcome::Failed);
    }
    assert_eq!(pool.deep_probes(), 0, "builds that last are fine");
}

#[test]
fn on_a_busy_machine_what_is_known_to_have_failed_need_not_have_done_so_within_a_second() {
    for (work, outcome, asks) in [
        (Work::Build, Outcome::Failed, 1),
        (Work::Load, Outcome::DaemonFailed, 1),
        (Work::Build, Outcome::Done, 0),
        (Work::BuildKit, Outcome::Done, 0),
    ] {
        let mut pool = Pool::of(1, 4);
        // Its turn in the interval is over.
        pool.pass(Time::from_secs(61));
        pool.wrote("a", DeepProbe::Wrote);
        pool.deep_probes();
        for i in 0..2 {
            let (open, _) = pool.work(&format!("k{i}"), work).expect("a free slot");
            if work == Work::BuildKit {
                pool.tell(Event::BuildSeen(open));
            }
            pool.pass(FAST * 3);
            pool.ends(open, outcome);
        }
        assert_eq!(pool.deep_probes(), asks, "{work:?} {outcome:?}");
    }
}

#[test]
fn what_succeeds_fast_is_no_reason_for_anything_and_of_buildkit_nobody_knows() {
    let mut pool = Pool::of(1, 4);
    for (i, work) in [Work::Build, Work::Pull, Work::Load].into_iter().cycle().take(9).enumerate() {
        let (open, _) = pool.work(&format!("k{i}"), work).expect("a free slot");
        pool.pass(MOMENT);
        pool.ends(open, Outcome::Done);
    }
    assert_eq!(pool.deep_probes(), 0, "from the cache, there already, small");
    assert_eq!(pool.daemon("a").expected_load(), 0);
    for i in 0..4 {
        let (open, _) = pool.work(&format!("b{i}"), Work::BuildKit).expect("a free slot");
        if i >= 2 {
            pool.tell(Event::BuildSeen(open));
        }
        pool.pass(MOMENT);
        pool.ends(open, Outcome::Done);
        assert_eq!(pool.deep_probes(), usize::from(i == 3), "one that does not build says nothing");
    }
}

#[test]
fn a_server_error_asks_at_once_and_new_sessions_go_elsewhere_until_it_is_known() {
    let mut pool = Pool::of(2, 4);
    let bad = pool.builds("k1", Time::from_secs(30), Outcome::Erred);
    assert!(pool.deep_probes() >= 1);
    let elsewhere =
        |pool: &mut Pool, n: u32| (0..n).filter(|i| pool.build(&format!("e{i}")).unwrap().1 != bad).count();
    assert_eq!(elsewhere(&mut pool, 4), 4, "although {bad} has less to do");
    pool.wrote(bad.as_str(), DeepProbe::Wrote);
    assert_eq!(pool.build("after").unwrap().1, bad, "cleared");
}

#[test]
fn a_suspect_with_the_only_free_slot_is_not_given_the_queue_until_it_is_cleared() {
    let mut pool = Pool::of(2, 1);
    let bad = pool.builds("k1", MOMENT, Outcome::Erred);
    assert_ne!(pool.build("k2").unwrap().1, bad);
    assert_eq!(pool.build("k3"), None, "it waits for the deep probe, a few milliseconds");
    let effects = pool.tell(Event::Wrote { daemon: bad.clone(), result: DeepProbe::Wrote });
    let granted = |e: &Effect| matches!(e, Effect::Granted { daemon, .. } if *daemon == bad);
    assert!(effects.iter().any(granted), "{effects:?}");
}

#[test]
fn a_suspect_is_given_the_queue_when_the_one_that_was_waited_for_is_cordoned() {
    let mut pool = Pool::of(2, 1);
    let bad = pool.builds("k1", MOMENT, Outcome::Erred);
    let good = pool.build("k2").unwrap().1;
    assert_eq!(pool.build("k3"), None);
    let effects = pool.tell(Event::Cordon { daemon: good, by: CordonedBy::Operator });
    let granted = |e: &Effect| matches!(e, Effect::Granted { daemon, .. } if *daemon == bad);
    assert!(effects.iter().any(granted), "{effects:?}");
}

#[test]
fn a_recovered_daemon_takes_one_more_session_a_second() {
    let mut pool = Pool::of(1, 8);
    pool.refuses("a");
    pool.answers("a");
    pool.pass(PAUSE);
    pool.answers("a");
    assert!(pool.build("k0").is_some());
    assert_eq!(pool.build("k1"), None);
    for i in 2..9 {
        pool.build(&format!("k{i}"));
    }
    for used in 1..=8 {
        assert_eq!(pool.daemon("a").used, used, "after {} s", used - 1);
        pool.pass(STEP);
    }
    assert_eq!(pool.daemon("a").capacity(), 8);
}

#[test]
fn a_slow_daemon_is_preferred_less_until_it_is_clearly_well_again() {
    let mut pool = Pool::of(3, 4);
    let timed = |pool: &mut Pool, id: &str, ms: u64, n: u32| {
        for _ in 0..n {
            pool.tell(Event::Timed { daemon: id.into(), took: Time::from_millis(ms) });
        }
    };
    for id in ["b", "c"] {
        timed(&mut pool, id, 50, 20);
    }
    timed(&mut pool, "a", 400, 20);
    let load = |pool: &Pool| pool.daemon("a").expected_load();
    assert_eq!(load(&pool), 8, "as if half of it were in use");
    // Between the bounds it stays what it is.
    timed(&mut pool, "a", 180, 30);
    assert_eq!(load(&pool), 8);
    timed(&mut pool, "a", 100, 30);
    assert_eq!(load(&pool), 0);
    timed(&mut pool, "a", 180, 30);
    assert_eq!(load(&pool), 0);
    // When all of them are slow, nobody is.
    for id in ["a", "b", "c", "a"] {
        timed(&mut pool, id, 900, 30);
    }
    assert!(["a", "b", "c"].iter().all(|id| pool.daemon(id).expected_load() == 0));
    assert!(["a", "b", "c"].iter().all(|id| pool.takes(id)), "and nobody is ejected for it");
}

#[test]
fn two_daemons_on_one_data_root_are_refused_until_one_is_gone_or_another() {
    let mut pool = Pool::of(3, 1);
    pool.tell(Event::Shared { one: "a".into(), other: "b".into() });
    assert!(!pool.takes("a") && !pool.takes("b") && pool.takes("c"));
    assert_eq!(pool.daemon("a").why(), "it shares its data root with b");
    assert_eq!(pool.engine.alarms().len(), 1);
    pool.answers("a");
    assert!(!pool.takes("a"));
    pool.tell(Event::Replaced { daemon: "b".into() });
    assert!(pool.takes("a") && pool.takes("b"));
    assert!(pool.engine.alarms().is_empty());
}

#[test]
fn a_daemon_of_which_nothing_is_left_has_lost_its_sessions() {
    let mut pool = Pool::of(1, 2);
    let (open, daemon) = pool.build("k").unwrap();
    let reference = crate::engine::images::normalise("app");
    let fact = Fact::ImageWritten { reference: reference.clone(), id: None, written: Written::Made };
    pool.tell(Event::Learned { daemon: daemon.clone(), open: Some(open), fact });
    pool.ends(open, Outcome::Done);
    pool.pass(PAUSE);
    let list = |images: Vec<ListedImage>, began| Event::Inventory {
        daemon: daemon.clone(),
        began,
        inventory: Inventory { images, ..Inventory::default() },
    };
    let image = ListedImage { id: "sha256:1".into(), references: vec![reference], in_registry: false };
    let began = pool.now;
    let lost =
        |effects: Vec<Effect>| effects.iter().any(|e| matches!(e, Effect::LeaseEnded { lost: true, .. }));
    assert!(!lost(pool.tell(list(vec![image], began))), "it is all there");
    assert!(!lost(pool.tell(list(Vec::new(), Time::ZERO))), "it is newer than the list");
    pool.pass(PAUSE);
    let began = pool.now;
    assert!(lost(pool.tell(list(Vec::new(), began))));
    assert!(pool.told.contains(&Effect::Emptied { daemon: daemon.clone() }));
    let began = pool.now;
    assert!(!pool.tell(list(Vec::new(), began)).contains(&Effect::Emptied { daemon }), "once");
}

#[test]
fn a_deep_probe_that_reaches_nobody_changes_nothing() {
    let mut pool = Pool::of(3, 1);
    pool.wrote("a", DeepProbe::Unreached);
    assert!(pool.takes("a"));
    pool.is_full("a");
    pool.is_full("b");
    assert!(!pool.takes("a") && pool.takes("b"));
    for _ in 0..3 {
        pool.pass(PAUSE * 2);
        assert!(pool.deep_probes() > 0, "it is asked again soon");
        pool.wrote("a", DeepProbe::Unreached);
        pool.wrote("b", DeepProbe::Unreached);
    }
    assert!(!pool.takes("a"), "it has not written since");
    assert_eq!(pool.engine.alarms().len(), 1, "of b, which has not either");
}

fn configure(pool: &mut Pool, deep_probe_interval: Time) {
    let config = Config { deep_probe_interval, ..pool.engine.config.clone() };
    pool.tell(Event::Configured(Box::new(config)));
}

#[test]
fn when_deep_probes_are_switched_off_what_they_said_counts_no_more() {
    let mut pool = Pool::of(3, 4);
    pool.is_full("a");
    pool.is_full("b");
    assert!(!pool.takes("a") && pool.daemon("b").expected_load() > 0);
    let c = (0..12).find_map(|i| {
        let (open, daemon) = pool.build(&format!("k{i}"))?;
        pool.ends(open, Outcome::Erred);
        (daemon.as_str() == "c").then_some(())
    });
    assert!(c.is_some() && pool.daemon("c").expected_load() > 0, "it has answered with errors");
    configure(&mut pool, Time::ZERO);
    assert_eq!([pool.daemon("b").expected_load(), pool.daemon("c").expected_load()], [0, 0]);
    assert!(pool.engine.alarms().is_empty() && pool.daemon("b").reason.is_empty());
    pool.deep_probes();
    // One that was under way says something still.
    pool.is_full("c");
    for _ in 0..3 {
        pool.pass(PAUSE);
        pool.answers("a");
    }
    assert!(pool.takes("a") && pool.takes("b") && pool.takes("c"));
    pool.pass(Time::from_secs(600));
    assert_eq!(pool.deep_probes(), 0);
}

#[test]
fn when_deep_probes_are_switched_on_or_come_more_often_each_daemon_is_asked_within_the_interval() {
    let mut pool = Pool::of(3, 1);
    configure(&mut pool, Time::ZERO);
    pool.pass(Time::from_secs(600));
    pool.deep_probes();
    configure(&mut pool, Time::from_secs(3600));
    configure(&mut pool, Time::from_secs(10));
    pool.pass(Time::from_secs(10));
    assert_eq!(pool.deep_probes(), 3);
}

#[test]
fn a_suspect_that_comes_back_is_looked_into_at_once() {
    let mut pool = Pool::of(2, 4);
    let bad = pool.builds("k1", Time::from_secs(30), Outcome::Erred);
    let bad = bad.as_str();
    pool.refuses(bad);
    pool.wrote(bad, DeepProbe::Unreached);
    pool.answers(bad);
    pool.pass(PAUSE);
    pool.deep_probes();
    pool.answers(bad);
    assert!(pool.takes(bad));
    assert_eq!(pool.deep_probes(), 1);
    pool.wrote(bad, DeepProbe::Wrote);
    assert_eq!(pool.daemon(bad).expected_load(), 0);
}

#[test]
fn what_a_suspect_wrote_clears_it_also_when_it_has_gone_out_meanwhile() {
    let mut pool = Pool::of(2, 4);
    let bad = pool.builds("k1", Time::from_secs(30), Outcome::Erred);
    pool.refuses(bad.as_str());
    pool.wrote(bad.as_str(), DeepProbe::Wrote);
    assert!(!pool.daemon(bad.as_str()).is_doubted());
}

#[test]
fn one_that_stays_although_it_cannot_write_is_avoided_and_one_that_writes_late_takes_its_part() {
    let late = DeepProbe::Slow("no answer within 10 s".into());
    for (result, waits) in [(DeepProbe::Failed(FULL.into()), true), (late, false)] {
        let mut pool = Pool::of(3, 1);
        for id in ["a", "b", "a", "b"] {
            pool.wrote(id, result.clone());
        }
        assert!(!pool.takes("a") && pool.takes("b"), "half of the pool is out");
        assert_eq!(pool.build("k1").unwrap().1, "c".into(), "the one that is well first");
        assert_eq!(pool.build("k2").is_none(), waits, "{result:?}");
    }
}

#[test]
fn daemons_that_turn_out_to_share_nothing_are_let_in_again() {
    let mut pool = Pool::of(3, 1);
    pool.tell(Event::Shared { one: "a".into(), other: "b".into() });
    pool.tell(Event::Shared { one: "a".into(), other: "c".into() });
    pool.tell(Event::Distinct { one: "b".into(), other: "a".into() });
    assert!(!pool.takes("a") && pool.takes("b") && !pool.takes("c"), "a still shares with c");
    let effects = pool.tell(Event::Distinct { one: "a".into(), other: "c".into() });
    assert!(pool.takes("a") && pool.takes("c"));
    let healthy = |e: &&Effect| matches!(e, Effect::DaemonChanged { health: Health::Healthy, .. });
    assert_eq!(effects.iter().filter(healthy).count(), 2);
}
