//! What provisioners that make their daemons one by one have in common: one task for each daemon, their news gathered
//! into observations, and the autoscaler's changes.
//!
//! A daemon is known by its number. The lowest free one is taken first, so that names (and labels of metrics) stay few;
//! one that has gone is free again only after its end was told, or two daemons would look like one.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::{Change, DaemonSpec, Observation, Running};
use crate::engine::autoscaler::{Removal, Step};

/// How often the picture is told again although nothing has changed: the autoscaler takes nobody away by an old one.
const CONFIRM: Duration = Duration::from_secs(5);

/// What is wanted of a daemon's task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Keep it alive.
    Live,
    /// The pool stops: end it.
    Stop,
    /// The pool gets smaller, and nothing is on it: end it for good.
    Remove,
}

/// News of one daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct News {
    /// The daemon as it is now.
    pub spec: DaemonSpec,
    /// What the operator should know about it.
    pub problem: Option<String>,
}

/// How a daemon's task hears of orders and tells its news.
pub(super) struct Post {
    index: usize,
    news: mpsc::UnboundedSender<(usize, News)>,
    orders: watch::Receiver<Order>,
}

impl Post {
    /// Tells how the daemon is.
    pub fn tell(&self, news: News) {
        let _ = self.news.send((self.index, news));
    }

    /// Completes when it is to end.
    pub fn ending(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut orders = self.orders.clone();
        async move { drop(orders.wait_for(|order| *order != Order::Live).await) }
    }

    /// The latest order.
    pub fn order(&self) -> Order {
        *self.orders.borrow()
    }
}

/// How daemons of one kind are made.
pub(super) trait Maker: Send + Sync + 'static {
    /// What is decided about a daemon before it exists.
    type Plan: Send + 'static;

    /// Decides about further daemons.
    ///
    /// # Errors
    /// Why there cannot be any, in words.
    fn plan(&self, indices: &[usize]) -> impl Future<Output = Result<Vec<Self::Plan>, String>> + Send;

    /// A daemon that has just been planned.
    fn spec(&self, plan: &Self::Plan) -> DaemonSpec;

    /// Keeps a daemon alive until it is to end. Whether nothing is left of it that should not be.
    fn live(self: Arc<Self>, plan: Self::Plan, post: Post) -> impl Future<Output = bool> + Send;

    /// A daemon was removed.
    fn removed(&self, index: usize) -> impl Future<Output = ()> + Send;

    /// The pool has stopped, and `gone` tells whether nothing is left of any daemon.
    fn end(&self, gone: bool) -> impl Future<Output = ()> + Send;

    /// Why nothing can be seen now, if that is so: then what was known last stays.
    fn blind(&self) -> Option<String> {
        None
    }
}

/// Starts a task for each of the daemons that there are at first. `scales`: there may be more and fewer.
pub(super) fn run<M: Maker>(
    maker: Arc<M>,
    first: Vec<(usize, M::Plan)>,
    scales: bool,
    problems: Vec<String>,
) -> Running {
    let (tx, observations) = mpsc::channel(1);
    let (stop, stopping) = oneshot::channel();
    let (changes, asked) = mpsc::channel(1);
    let (post, news) = mpsc::unbounded_channel();
    let members = BTreeMap::new();
    let mut crew =
        Crew { maker, members, resting: BTreeSet::new(), tasks: JoinSet::new(), post, problems, scales };
    for (index, plan) in first {
        crew.enlist(index, plan);
    }
    let stopped = tokio::spawn(crew.run(tx, news, asked, stopping));
    Running { observations, stopped, stop, changes: scales.then_some(changes), notes: None }
}

struct Member {
    news: News,
    order: watch::Sender<Order>,
    /// It has been up: what is on it may have been listed.
    been_up: bool,
}

impl Member {
    fn is_leaving(&self) -> bool {
        *self.order.borrow() == Order::Remove
    }
}

struct Crew<M: Maker> {
    maker: Arc<M>,
    members: BTreeMap<usize, Member>,
    /// Gone, and not told yet.
    resting: BTreeSet<usize>,
    tasks: JoinSet<(usize, bool)>,
    post: mpsc::UnboundedSender<(usize, News)>,
    problems: Vec<String>,
    scales: bool,
}

impl<M: Maker> Crew<M> {
    async fn run(
        mut self,
        tx: mpsc::Sender<Observation>,
        mut news: mpsc::UnboundedReceiver<(usize, News)>,
        mut asked: mpsc::Receiver<Change>,
        mut stopping: oneshot::Receiver<()>,
    ) {
        let mut confirm = tokio::time::interval(CONFIRM);
        confirm.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut told = false;
        loop {
            tokio::select! {
                // A dropped sender means the same.
                _ = &mut stopping => break,
                () = tx.closed() => break,
                Some((index, latest)) = news.recv() => told &= !self.take(index, latest),
                Some(ended) = self.tasks.join_next() => {
                    // One that panicked has been told of; its daemon stays as it was last seen.
                    if let Ok((index, _)) = ended {
                        self.maker.removed(index).await;
                        self.members.remove(&index);
                        self.resting.insert(index);
                        told = false;
                    }
                }
                Some(Change { step, done }) = asked.recv() => {
                    // Whoever has given it up decides anew.
                    if !done.is_closed() {
                        let _ = done.send(self.change(&step).await);
                        told = false;
                    }
                }
                _ = confirm.tick() => told = false,
                permit = tx.reserve(), if !told => {
                    let Ok(permit) = permit else { break };
                    permit.send(self.observe(false));
                    self.resting.clear();
                    told = true;
                }
            }
        }
        let _ = tx.try_send(self.observe(true));
        for member in self.members.values() {
            // Who is being removed goes on with that.
            member.order.send_if_modified(|order| {
                let lives = *order == Order::Live;
                *order = if lives { Order::Stop } else { *order };
                lives
            });
        }
        let mut gone = true;
        while let Some(end) = self.tasks.join_next().await {
            gone &= end.is_ok_and(|(_, gone)| gone);
        }
        self.maker.end(gone).await;
    }

    fn enlist(&mut self, index: usize, plan: M::Plan) {
        let (order, orders) = watch::channel(Order::Live);
        let news = News { spec: self.maker.spec(&plan), problem: None };
        self.members.insert(index, Member { news, order, been_up: false });
        let post = Post { index, news: self.post.clone(), orders };
        let life = self.maker.clone().live(plan, post);
        self.tasks.spawn(async move { (index, life.await) });
    }

    /// Whether that is new.
    fn take(&mut self, index: usize, news: News) -> bool {
        let Some(member) = self.members.get_mut(&index) else { return false };
        member.been_up |= news.spec.pending.is_none();
        let new = member.news != news;
        member.news = news;
        new
    }

    fn replicas(&self) -> u32 {
        let staying = self.members.values().filter(|member| !member.is_leaving()).count();
        u32::try_from(staying).unwrap_or(u32::MAX)
    }

    async fn change(&mut self, step: &Step) -> Result<(), String> {
        if let Some(why) = self.maker.blind() {
            return Err(why);
        }
        let (Step::Grow { from, .. } | Step::Remove { from, .. }) = step else { return Ok(()) };
        let there = self.replicas();
        if *from != there {
            return Err(format!("there are {there} daemons, not {from}"));
        }
        match step {
            Step::Grow { to, .. } => {
                let free = (0..).filter(|i| !self.members.contains_key(i) && !self.resting.contains(i));
                let indices: Vec<usize> = free.take(to.saturating_sub(there) as usize).collect();
                let plans = self.maker.plan(&indices).await?;
                indices.into_iter().zip(plans).for_each(|(index, plan)| self.enlist(index, plan));
            }
            Step::Remove { daemon, .. } => {
                let mut staying = self.members.values().filter(|member| !member.is_leaving());
                let victim = staying.find(|member| member.news.spec.id == daemon.as_str());
                victim.ok_or_else(|| format!("there is no {daemon}"))?.order.send_replace(Order::Remove);
            }
            Step::Cordon(_) | Step::Uncordon(_) => {}
        }
        Ok(())
    }

    fn observe(&self, stopping: bool) -> Observation {
        let troubles = self.members.values().filter_map(|member| member.news.problem.clone());
        let mut problems: Vec<String> = self.problems.iter().cloned().chain(troubles).collect();
        if let Some(why) = self.maker.blind() {
            problems.insert(0, why);
            return Observation { blind: true, problems, ..Observation::default() };
        }
        let daemon = |member: &Member| DaemonSpec {
            draining: stopping || member.is_leaving(),
            // What never ran has nothing on it that anybody of this pool knows of.
            removal: if member.been_up { Removal::Ready } else { Removal::Pending },
            ..member.news.spec.clone()
        };
        Observation {
            daemons: self.members.values().map(daemon).collect(),
            problems,
            replicas: self.scales.then(|| self.replicas()),
            ..Observation::default()
        }
    }
}

/// How long to wait before the next start: doubling from 0.5 s to 30 s, so that a daemon that cannot start
/// does not keep the machine busy, and from the beginning again once one has recovered.
#[derive(Debug, Default)]
pub(super) struct Pause {
    last: Option<Duration>,
}

/// A daemon that has lived for so long has recovered.
const RECOVERED: Duration = Duration::from_secs(60);

impl Pause {
    /// The pause after a life of this length.
    pub fn after(&mut self, lived: Duration) -> Duration {
        let next = match self.last {
            Some(last) if lived < RECOVERED => (last * 2).min(Duration::from_secs(30)),
            _ => Duration::from_millis(500),
        };
        *self.last.insert(next)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::engine::model::DaemonId;

    #[test]
    fn restarts_slow_down_and_a_recovered_daemon_starts_anew() {
        let mut pause = Pause::default();
        let short = Duration::from_secs(1);
        let seconds: Vec<f32> = (0..8).map(|_| pause.after(short).as_secs_f32()).collect();
        assert_eq!(seconds, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]);
        assert_eq!(pause.after(RECOVERED), Duration::from_millis(500));
    }

    /// Daemons that are up as soon as they are planned; what became of them is written down.
    #[derive(Default)]
    struct Paper {
        removed: Mutex<Vec<usize>>,
        blind: Mutex<Option<String>>,
        full: Mutex<bool>,
        ended: Mutex<bool>,
    }

    fn spec(index: usize, pending: Option<&str>) -> DaemonSpec {
        DaemonSpec {
            id: format!("d-{index}"),
            endpoint: None,
            source_ips: Vec::new(),
            cgroup: None,
            draining: false,
            pending: pending.map(str::to_string),
            faulty: false,
            removal: Removal::Ready,
            slots: None,
        }
    }

    impl Maker for Paper {
        type Plan = usize;

        async fn plan(&self, indices: &[usize]) -> Result<Vec<usize>, String> {
            if *self.full.lock().unwrap() { Err("no room".into()) } else { Ok(indices.to_vec()) }
        }

        fn spec(&self, plan: &usize) -> DaemonSpec {
            spec(*plan, Some("planned"))
        }

        async fn live(self: Arc<Self>, plan: usize, post: Post) -> bool {
            post.tell(News { spec: spec(plan, None), problem: None });
            post.ending().await;
            true
        }

        async fn removed(&self, index: usize) {
            self.removed.lock().unwrap().push(index);
        }

        async fn end(&self, gone: bool) {
            *self.ended.lock().unwrap() = gone;
        }

        fn blind(&self) -> Option<String> {
            self.blind.lock().unwrap().clone()
        }
    }

    async fn until(running: &mut Running, wanted: impl Fn(&Observation) -> bool) -> Observation {
        let seen = async {
            loop {
                let seen = running.observations.recv().await.expect("it runs");
                if wanted(&seen) {
                    return seen;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), seen).await.expect("what was wanted")
    }

    async fn ask(running: &Running, step: Step) -> Result<(), String> {
        let (done, answer) = oneshot::channel();
        let change = Change { step, done };
        running.changes.as_ref().unwrap().send(change).await.unwrap();
        answer.await.unwrap()
    }

    fn ids(seen: &Observation) -> Vec<&str> {
        seen.daemons.iter().map(|d| d.id.as_str()).collect()
    }

    fn is_up(n: usize) -> impl Fn(&Observation) -> bool {
        move |seen| seen.daemons.len() == n && seen.daemons.iter().all(|d| d.pending.is_none())
    }

    #[tokio::test(start_paused = true)]
    async fn a_crew_grows_by_the_lowest_numbers_and_loses_the_one_that_was_chosen() {
        let maker = Arc::new(Paper::default());
        let mut running = run(maker.clone(), vec![(0, 0), (2, 2)], true, Vec::new());
        let seen = until(&mut running, is_up(2)).await;
        assert_eq!((ids(&seen), seen.replicas), (vec!["d-0", "d-2"], Some(2)));
        assert!(seen.daemons.iter().all(|d| d.removal == Removal::Ready));
        ask(&running, Step::Grow { from: 2, to: 4 }).await.unwrap();
        let seen = until(&mut running, is_up(4)).await;
        assert_eq!(ids(&seen), ["d-0", "d-1", "d-2", "d-3"]);
        let victim = DaemonId::from("d-1");
        ask(&running, Step::Remove { daemon: victim.clone(), from: 4 }).await.unwrap();
        let seen = until(&mut running, is_up(3)).await;
        assert_eq!((ids(&seen), seen.replicas), (vec!["d-0", "d-2", "d-3"], Some(3)));
        assert_eq!(*maker.removed.lock().unwrap(), [1]);
        let again = ask(&running, Step::Remove { daemon: victim, from: 3 }).await.unwrap_err();
        assert!(again.contains("there is no d-1"), "{again}");
        running.stop.send(()).unwrap();
        running.stopped.await.unwrap();
        assert!(*maker.ended.lock().unwrap() && *maker.removed.lock().unwrap() == [1], "only stopped");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_decided_on_another_number_or_cannot_be_done_is_refused() {
        let maker = Arc::new(Paper::default());
        let mut running = run(maker.clone(), vec![(0, 0)], true, Vec::new());
        until(&mut running, is_up(1)).await;
        let wrong = ask(&running, Step::Grow { from: 2, to: 3 }).await.unwrap_err();
        assert_eq!(wrong, "there are 1 daemons, not 2");
        *maker.full.lock().unwrap() = true;
        assert_eq!(ask(&running, Step::Grow { from: 1, to: 3 }).await.unwrap_err(), "no room");
        // What cannot be seen is not told, and nothing is changed meanwhile.
        *maker.blind.lock().unwrap() = Some("away".into());
        let seen = until(&mut running, |seen| seen.blind).await;
        assert_eq!((seen.problems, seen.daemons.len()), (vec!["away".to_string()], 0));
        let refused = ask(&running, Step::Remove { daemon: "d-0".into(), from: 1 }).await;
        assert_eq!(refused.unwrap_err(), "away");
    }

    #[tokio::test(start_paused = true)]
    async fn a_picture_that_does_not_change_is_confirmed_and_a_fixed_crew_takes_no_changes() {
        let mut running = run(Arc::new(Paper::default()), vec![(0, 0)], true, Vec::new());
        let first = until(&mut running, is_up(1)).await;
        assert_eq!(running.observations.recv().await.unwrap(), first);
        let mut fixed = run(Arc::new(Paper::default()), vec![(0, 0)], false, vec!["a word".into()]);
        let seen = until(&mut fixed, is_up(1)).await;
        assert!(fixed.changes.is_none() && seen.replicas.is_none());
        assert_eq!(seen.problems, ["a word"]);
    }
}
