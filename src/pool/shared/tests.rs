//! Two proxies in one process, each with its pool, on daemons that nobody is.

use std::net::SocketAddr;

use tokio::task::JoinHandle;

use super::*;
use crate::admin::token::Token;
use crate::admin::{self, Admin};
use crate::drain::Drain;
use crate::engine;
use crate::metrics::Metrics;
use crate::pool::remote::{Holder, follow};
use crate::pool::{Config, Lease, Ticket};
use crate::provision::{DaemonSpec, Endpoint, Observation};
use crate::proxy::listener::{Address, Bound};

/// A proxy whose admin listener the other one reaches.
struct Proxy {
    pool: Arc<Pool>,
    own: Holder,
    holder: tokio::sync::watch::Sender<Option<Holder>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Proxy {
    async fn start(name: &str) -> Proxy {
        let linger = Time::ZERO;
        let engine = engine::Config { linger, deep_probe_interval: Time::ZERO, ..engine::Config::default() };
        let config = Config { engine, ..Config::default() };
        let pool = Pool::new(config, Metrics::new(prometheus::Registry::new()).unwrap(), 1);
        pool.share(name);
        let mut admin = Admin::new(pool.clone(), Drain::new(), None);
        let token = Token::random().unwrap();
        admin.peers = Some(token.clone());
        let bound = Bound::admin(&Address::Tcp("127.0.0.1:0".into())).await.unwrap();
        let address: SocketAddr = bound.address().trim_start_matches("tcp://").parse().unwrap();
        let (holder, holders) = tokio::sync::watch::channel(None);
        let tasks = vec![
            tokio::spawn(admin::run(bound, Arc::new(admin))),
            tokio::spawn(follow(pool.clone(), holders)),
        ];
        let proxy = Proxy { pool, own: Holder { name: name.into(), address, token }, holder, tasks };
        proxy.observe(&["d"]);
        proxy
    }

    /// Daemons of one slot each, that are well.
    fn observe(&self, ids: &[&str]) {
        let spec = |id: &&str| DaemonSpec {
            id: id.to_string(),
            endpoint: Some(Endpoint::Unix(format!("/nonexistent/{id}").into())),
            source_ips: Vec::new(),
            cgroup: None,
            draining: false,
            pending: None,
            faulty: false,
            removal: Default::default(),
            slots: Some(1),
        };
        let daemons = ids.iter().map(spec).collect();
        self.pool.observe(Observation { daemons, ..Observation::default() });
        // Nobody is to find out that nobody is there.
        self.pool.stop();
        for id in ids {
            let facts = Facts { api_min: (1, 24), api_max: (1, 51), ..Facts::default() };
            self.pool.event(Event::Probed { daemon: (*id).into(), probe: Probe::Answered(facts) });
        }
    }

    fn admit(&self, number: u64, handover: Handover) -> Imported {
        self.holder.send_replace(None);
        self.pool.take_over(number, handover, Instant::now() + Duration::from_secs(60), Duration::ZERO)
    }

    fn follows(&self, other: &Proxy) {
        self.holder.send_replace(Some(other.own.clone()));
    }

    async fn build(&self, key: &str) -> Ticket {
        self.pool.acquire(&want(key)).await
    }

    fn used(&self) -> u32 {
        self.pool.status().daemons.iter().map(|d| d.used).sum()
    }

    fn waiting(&self) -> u32 {
        self.pool.status().queue.waiting
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn want(key: &str) -> Want {
    Want {
        key: key.into(),
        tenant: "default".into(),
        source: None,
        inside: None,
        shares_names: true,
        class: Class::Work(Work::Build),
        target: None,
        requirements: Requirements::default(),
    }
}

async fn until(what: &str, cond: impl Fn() -> bool) {
    let wait = async {
        while !cond() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap_or_else(|_| panic!("{what}"));
}

async fn granted(ticket: &mut Ticket) -> Lease {
    let granted = tokio::time::timeout(Duration::from_secs(20), ticket.granted()).await;
    granted.expect("an answer").expect("a lease")
}

/// `a` admits, `b` follows it.
async fn two() -> (Proxy, Proxy) {
    let (a, b) = (Proxy::start("a").await, Proxy::start("b").await);
    a.admit(1, Handover::default());
    b.follows(&a);
    (a, b)
}

#[tokio::test]
async fn what_a_follower_relays_counts_at_the_one_that_admits_and_is_given_back() {
    let (a, b) = two().await;
    let mut ticket = b.build("ip:1").await;
    assert!(ticket.now().is_none(), "it must be asked first");
    let lease = granted(&mut ticket).await;
    assert_eq!((a.used(), b.used()), (1, 0));
    let mut next = b.build("ip:2").await;
    until("it waits", || a.waiting() == 1).await;
    until("its place is known here", || next.position() == Some((1, 1))).await;
    // Its client leaves, and comes back.
    drop(next);
    until("it has left the queue", || a.waiting() == 0).await;
    next = b.build("ip:2").await;
    drop(lease);
    drop(granted(&mut next).await);
    until("nothing is open", || a.used() == 0).await;
}

#[tokio::test]
async fn one_that_does_not_admit_says_nothing_of_work_on_daemons() {
    let (a, b) = two().await;
    let mut ticket = b.build("ip:1").await;
    let _lease = granted(&mut ticket).await;
    let drain = |proxy: &Proxy| {
        let address = Endpoint::Tcp(proxy.own.address);
        async move {
            crate::pool::client::answer(&address, "/daemons/d/drain", Duration::from_secs(5)).await.unwrap()
        }
    };
    b.pool.lease_seen(Some("a".into()), 1);
    assert_eq!(drain(&a).await.0, 200);
    let (status, body) = drain(&b).await;
    let said = String::from_utf8_lossy(&body).into_owned();
    assert!(status == 503 && said.contains("does not admit") && said.contains("(a)"), "{said}");
}

#[tokio::test]
async fn nobody_is_lost_when_another_one_admits() {
    let (a, b) = two().await;
    let mut far = b.build("ip:1").await;
    let far = granted(&mut far).await;
    let mut waits = a.build("ip:2").await;
    let mut waits_there = b.build("ip:3").await;
    until("both wait", || a.waiting() == 2).await;

    a.pool.retire();
    assert!(!a.pool.admits() && a.waiting() == 0);
    let handover = a.pool.handover().expect("what it knew");
    // Through JSON, as the two processes do it.
    let handover: Handover = serde_json::from_slice(&serde_json::to_vec(&handover).unwrap()).unwrap();
    assert_eq!(b.admit(2, handover), Imported { sessions: 1, streams: 1, ..Imported::default() });
    a.follows(&b);
    // Their tasks find out when they look.
    assert!(waits.now().is_none() && waits_there.now().is_none());
    until("both wait at the other one", || b.waiting() == 2).await;
    assert_eq!((a.used(), b.used()), (0, 1));
    drop(far);
    // Whoever asked first: both get their turn.
    let (first, second) = tokio::select! {
        lease = granted(&mut waits) => (lease, &mut waits_there),
        lease = granted(&mut waits_there) => (lease, &mut waits),
    };
    assert_eq!(b.used(), 1);
    drop(first);
    drop(granted(second).await);
    until("nothing is open", || b.used() == 0).await;
    assert_eq!(b.pool.status().queue.waiting, 0);
}

#[tokio::test]
async fn what_the_former_one_relays_stays_counted_until_it_ends_or_its_proxy_has_gone() {
    let (a, b) = two().await;
    let mut ticket = a.build("ip:1").await;
    let lease = granted(&mut ticket).await;
    a.pool.retire();
    b.admit(2, a.pool.handover().expect("what it knew"));
    a.follows(&b);
    until("it is connected", || b.pool.status().lease.unwrap().peers == 1).await;
    assert_eq!(b.used(), 1);
    // What its stream tells is known there.
    lease.learn(Fact::Created { kind: Kind::Container, id: "c1".into(), name: Some("db".into()) });
    until("it is known there", || b.pool.lock().engine.knows(Kind::Container, "c1")).await;
    let owner = b.pool.status().sessions.remove(0);
    assert_eq!((owner.key.as_str(), owner.containers), ("ip:1", 1));
    b.pool.event(Event::Learned {
        daemon: "d".into(),
        open: None,
        fact: Fact::Removed { kind: Kind::Container, id: "c1".into() },
    });
    b.pool.forget_absent(Duration::ZERO);
    assert_eq!(b.used(), 1, "it is connected");
    drop(a);
    until("its connection has ended", || b.pool.status().lease.unwrap().peers == 0).await;
    assert_eq!(b.used(), 1, "it may come back");
    until("it has gone", || {
        b.pool.forget_absent(Duration::from_millis(100));
        b.used() == 0
    })
    .await;
    drop(lease);
}

#[tokio::test]
async fn after_a_crash_those_that_relay_tell_what_is_open() {
    let (a, b) = two().await;
    let mut ticket = b.build("ip:1").await;
    let lease = granted(&mut ticket).await;
    drop(a);
    let c = Proxy::start("c").await;
    // Nobody knows what the first one knew.
    assert_eq!(c.admit(2, Handover::default()), Imported::default());
    b.follows(&c);
    until("its build is known", || c.used() == 1).await;
    assert_eq!(c.pool.status().sessions[0].key, "ip:1");
    drop(lease);
    until("and its end", || c.used() == 0).await;
}

#[tokio::test]
async fn one_that_takes_over_itself_counts_what_it_relays_for_another() {
    let (a, b) = two().await;
    let mut ticket = b.build("ip:1").await;
    let lease = granted(&mut ticket).await;
    drop(a);
    assert_eq!(b.admit(2, Handover::default()).streams, 1);
    assert_eq!(b.used(), 1);
    drop(lease);
    assert_eq!(b.used(), 0);
}

#[tokio::test]
async fn a_tenure_ends_by_the_clock_whoever_looks() {
    let a = Proxy::start("a").await;
    let until = Instant::now() + Duration::from_millis(30);
    a.pool.take_over(1, Handover::default(), until, Duration::ZERO);
    let mut ticket = a.build("ip:1").await;
    let lease = granted(&mut ticket).await;
    assert_eq!(a.used(), 1);
    tokio::time::sleep_until(until.into()).await;
    // Nobody has told it.
    let mut late = a.build("ip:2").await;
    assert!(late.now().is_none() && a.waiting() == 0 && !a.pool.admits());
    // What starts nothing is answered from what it knew, as long as no other one is known to admit.
    let read = Want { class: Class::Read, ..want("ip:1") };
    let read = a.pool.acquire(&read).await.now().expect("an answer").expect("a lease");
    assert_eq!(a.pool.status().sessions[0].open, 2);
    drop(read);
    assert_eq!(a.pool.status().sessions[0].open, 1);
    // It is its own successor: the build still runs.
    let own = a.pool.handover().expect("what it knew");
    assert_eq!(a.used(), 0, "whoever took that decides from now on");
    assert_eq!(a.admit(2, own).streams, 1);
    assert_eq!((a.used(), a.waiting()), (1, 0), "the other one asks when it is looked at");
    assert!(late.now().is_none());
    assert_eq!(a.waiting(), 1);
    drop(lease);
    drop(granted(&mut late).await);
    assert_eq!(a.used(), 0);
}

#[tokio::test]
async fn nobody_without_the_token_is_a_peer() {
    let (a, b) = two().await;
    let stranger = Holder { token: Token::random().unwrap(), ..a.own.clone() };
    b.holder.send_replace(Some(stranger));
    let mut ticket = b.build("ip:1").await;
    let answer = tokio::time::timeout(Duration::from_millis(700), ticket.granted()).await;
    assert!(answer.is_err() && a.waiting() == 0 && a.used() == 0);
    b.follows(&a);
    drop(granted(&mut ticket).await);
}

#[tokio::test(start_paused = true)]
async fn what_is_no_work_does_not_wait_for_ever_for_one_that_admits() {
    let pool = Pool::new(Config::default(), Metrics::new(prometheus::Registry::new()).unwrap(), 1);
    pool.share("a");
    let want = |class| Want { class, ..want("ip:1") };
    let mut read = pool.acquire(&want(Class::Read)).await;
    let mut work = pool.acquire(&want(Class::Work(Work::Build))).await;
    let age = |by: Duration| {
        let mut state = pool.lock();
        for asking in state.shared.as_mut().unwrap().asking.values_mut() {
            asking.since = asking.since.checked_sub(by).unwrap();
        }
    };
    pool.end_vain_waits(false, None);
    assert!(read.now().is_none());
    age(PATIENCE);
    pool.end_vain_waits(false, Some("proxy-0"));
    let refused = read.now().expect("an answer").err().expect("a refusal");
    assert!(refused.message.contains("proxy-0") && refused.message.contains("try again"), "{refused:?}");
    assert!(work.now().is_none());
    // One that is about to end keeps nobody.
    pool.leave();
    pool.lock().shared.as_mut().unwrap().alone -= 2 * PATIENCE;
    pool.end_vain_waits(false, None);
    assert!(work.now().expect("an answer").is_err());
}
