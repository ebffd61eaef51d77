//! A daemon's health. Four signals, and what each of them may do:
//!
//! | signal | what it does |
//! |---|---|
//! | `/info` is refused, or does not answer [`Config::eject_after`] times | out, whatever is left |
//! | the deep probe, which writes, fails | out, as long as at most half of the pool is out for that |
//! | work fails fast (BuildKit's: ends fast), or with a server error | asks for a deep probe, and counts against the daemon until that is over |
//! | `/info` answers, but slowly | counts against the daemon |
//!
//! A daemon comes back when it has been well for a time that grows with each ejection, and then takes one more
//! session a second: everybody who waits would otherwise meet on the daemon that has just recovered.

use super::model::*;
use super::{Config, Daemon, Engine, Timer, balancer, members};

/// Work that ends within this time may have failed. Builds on a full disk end after 20 to 120 ms.
const FAST: Time = Time::from_secs(1);
/// The same where the stream has said that it failed: a busy machine takes seconds for what a full disk fails, and a
/// user's failure of that age costs a deep probe at most.
const FAST_FAILURE: Time = Time::from_secs(5);
/// Two fast ends within this time ask for a deep probe: a user's mistake fails fast, too, and of a BuildKit build it is
/// not seen whether it has failed or came from the cache.
const FAST_PAIR: Time = Time::from_secs(10);
/// The least time between the deep probes that work's ends ask for: one takes 6 to 130 ms of the daemon.
const GAP: Time = Time::from_secs(1);
/// Fast ends that turned out to be innocent double it up to this: cached builds would keep a daemon busy with probes.
const MAX_GAP: Time = Time::from_secs(8);
/// After so long without a fast end, the next ones are looked into at once.
const CALM: Time = Time::from_secs(60);
/// Deep probes without an answer in time, in a row, that count as a failure: a busy disk is slow too.
const SLOW_WRITES: u32 = 2;
/// The first pause; it doubles with each ejection.
const PAUSE: Time = Time::from_secs(1);
/// The longest pause.
const MAX_PAUSE: Time = Time::from_secs(60);
/// After so long in good health, the next ejection begins with the first pause again.
const FORGIVEN: Time = Time::from_secs(600);
/// Between two steps of the slow start.
const STEP: Time = Time::from_secs(1);
/// The slow start lasts about as many steps at most.
const STEPS: u32 = 16;
/// `/info` takes 3 to 20 ms on a daemon at rest. Below this nobody is slow.
const SLOW: Time = Time::from_millis(250);

/// What is remembered of a daemon's health.
#[derive(Debug, Clone, Default)]
pub(super) struct Vitals {
    /// Failed `/info` probes in a row.
    failures: u32,
    /// Good ones in a row.
    successes: u32,
    /// Since when it has been well without a break.
    well_since: Option<Time>,
    /// Why it is out.
    cause: Option<Cause>,
    /// Ejections without a long good time between them.
    strikes: u32,
    /// When it came back last.
    back: Option<Time>,
    /// What the last deep probe said, if it failed.
    pub(super) failing: Option<Failing>,
    unanswered: u32,
    /// Whether a deep probe is under way.
    under_way: bool,
    due: Option<Time>,
    ended: Option<Time>,
    /// When work last ended fast.
    fast: Option<Time>,
    /// Deep probes in a row that fast ends asked for in vain.
    innocent: u32,
    /// Whether the deep probe that is due was asked for by fast ends.
    asked: bool,
    suspicion: Suspicion,
    latency: Option<Time>,
    slow: bool,
    /// Slots that the slow start has opened so far; `None` when it is over.
    opened: Option<u32>,
}

/// Why a deep probe has failed.
#[derive(Debug, Clone)]
pub(super) struct Failing {
    why: String,
    /// It did not end in time: what writes there takes long, and need not fail.
    late: bool,
}

/// How much the way in which work has ended counts against a daemon, until a deep probe has cleared it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Suspicion {
    #[default]
    None,
    /// Work ended fast.
    Mild,
    /// The daemon has answered with server errors.
    Grave,
}

/// How work has ended that may say something of its daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The daemon has answered with a server error.
    Erred,
    /// Its stream says that it has failed, or broke off.
    Failed,
    /// Nobody but its client knows.
    Unknown,
}

impl Vitals {
    /// Nothing is known against it but what `/info` says.
    fn absolve(&mut self) {
        (self.failing, self.unanswered, self.suspicion) = (None, 0, Suspicion::None);
    }
}

fn pause(strikes: u32) -> Time {
    if strikes == 0 {
        return Time::ZERO;
    }
    (PAUSE * (1 << (strikes - 1).min(6))).min(MAX_PAUSE)
}

impl Daemon {
    /// Takes in a probe. One refused connection ejects at once (nobody listens); a slow or broken answer must
    /// repeat [`Config::eject_after`] times, and a recovery [`Config::recover_after`] times, so that a daemon
    /// under load does not flap.
    pub(super) fn probed(&mut self, probe: Probe, now: Time, config: &Config) {
        match probe {
            Probe::Answered(facts) => {
                self.meet(facts);
                self.vitals.failures = 0;
                self.vitals.successes += 1;
                if self.state == State::Starting {
                    self.state = State::Ready;
                    self.health = Health::Healthy;
                }
                if self.vitals.failing.is_none() {
                    self.vitals.well_since.get_or_insert(now);
                }
                if self.vitals.successes >= config.recover_after {
                    match self.vitals.failing {
                        // It answers again, and could not write before.
                        Some(_) if self.health == Health::Ejected => self.vitals.cause = Some(Cause::Writes),
                        _ if self.vitals.cause != Some(Cause::Writes) => self.come_back(now),
                        _ => {}
                    }
                }
                if self.health == Health::Healthy
                    && self.state == State::Ready
                    && self.vitals.failing.is_none()
                {
                    self.reason.clear();
                }
            }
            Probe::Failed(reason) => {
                self.vitals.failures += 1;
                let out = self.vitals.failures >= config.eject_after;
                self.failed(reason, out.then_some(Cause::Silent), now);
            }
            Probe::Refused(reason) => {
                self.vitals.failures += 1;
                self.failed(reason, Some(Cause::Refused), now);
            }
        }
    }

    fn failed(&mut self, reason: String, out: Option<Cause>, now: Time) {
        self.vitals.successes = 0;
        self.vitals.well_since = None;
        self.reason = reason;
        if let Some(cause) = out
            && self.state != State::Starting
        {
            self.eject(cause, now);
        }
    }

    fn eject(&mut self, cause: Cause, now: Time) {
        self.vitals.cause = Some(cause);
        self.vitals.opened = None;
        if self.health == Health::Ejected {
            return;
        }
        if self.vitals.back.is_none_or(|back| now.saturating_sub(back) >= FORGIVEN) {
            self.vitals.strikes = 0;
        }
        self.vitals.strikes += 1;
        self.vitals.well_since = None;
        self.health = Health::Ejected;
    }

    /// Ends the ejection, if it has been well for long enough.
    fn come_back(&mut self, now: Time) {
        let well = self.vitals.well_since.map_or(Time::ZERO, |since| now.saturating_sub(since));
        let pause = pause(self.vitals.strikes);
        let answers = self.vitals.failures == 0 && self.vitals.failing.is_none();
        if self.health == Health::Ejected && answers && well >= pause {
            self.health = Health::Healthy;
            self.vitals.cause = None;
            self.vitals.back = Some(now);
            self.reason.clear();
        }
    }

    /// What its state and health forget when another daemon answers in its place.
    pub(super) fn forget_writes(&mut self) {
        self.vitals.absolve();
        self.shares.clear();
    }

    /// The slots that are open now: fewer than it has during its slow start.
    pub fn capacity(&self) -> u32 {
        self.vitals.opened.map_or(self.slots, |opened| opened.min(self.slots))
    }

    /// Slots that nobody else gets: those in use, and those that strangers keep busy. They may have come for good:
    /// one slot is always the pool's.
    pub(super) fn taken(&self) -> u32 {
        self.used + self.strangers().min(self.slots.saturating_sub(1))
    }

    /// Whether one more session finds a slot.
    pub fn has_room(&self) -> bool {
        self.taken() < self.capacity()
    }

    /// Its work for the balancer, in quarters of a slot: what is under way, and what counts against it. With a
    /// mild reason a free slot here is still better than none elsewhere; with a grave one it is not.
    ///
    /// One that cannot write, and is not ejected because too few would be left, has a grave reason: its builds fail at
    /// once, so that with a mild one a queue would run through it and fail, where waiting for another daemon helps.
    /// (Where none of them can write, that counts against all of them alike.) One whose writes are only late has a mild
    /// reason: builds take longer there, and if nobody went there, the few others would have to do everything.
    pub(super) fn expected_load(&self) -> u64 {
        let taken = u64::from(self.taken());
        let capacity = u64::from(self.capacity().max(1));
        let vitals = &self.vitals;
        let late = vitals.failing.as_ref().is_some_and(|f| f.late);
        let mild = vitals.slow || late || vitals.suspicion == Suspicion::Mild;
        let against = match (self.is_doubted(), mild) {
            (true, _) => 8 * capacity,
            (false, true) => (2 * capacity).min((4 * capacity.saturating_sub(taken)).saturating_sub(1)),
            (false, false) => 0,
        };
        4 * taken + against
    }

    /// Whether there is a grave reason against it.
    pub(super) fn is_doubted(&self) -> bool {
        let vitals = &self.vitals;
        vitals.failing.as_ref().is_some_and(|f| !f.late)
            || vitals.suspicion == Suspicion::Grave
            || (vitals.suspicion == Suspicion::Mild && vitals.under_way)
    }

    /// How long it must be well before it comes back; zero unless it is out.
    pub fn back_off(&self) -> Time {
        if self.health == Health::Ejected { pause(self.vitals.strikes) } else { Time::ZERO }
    }

    /// How long after a good probe the next one is due. Who is out is asked at least as often as its shortest pause is
    /// long: it comes back by probes alone, however rare those of a daemon in good health are.
    pub fn until_probe(&self, interval: Time) -> Time {
        if self.health == Health::Ejected { interval.min(PAUSE) } else { interval }
    }

    /// How long `/info` takes, smoothed; `None` until it has answered.
    pub fn latency(&self) -> Option<Time> {
        self.vitals.latency
    }
}

impl Engine {
    pub(super) fn probed(&mut self, daemon: &DaemonId, probe: Probe, now: Time) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        let (before, range, slots) = (d.standing(), d.api_range(), d.slots);
        d.probed(probe, now, &self.config);
        self.queue.changed |= d.slots != slots;
        let range_changed = d.api_range() != range;
        let must_write = d.vitals.cause == Some(Cause::Writes);
        self.tell_change(daemon, before, now);
        if must_write {
            self.probe_deeply_at(daemon, now + MAX_PAUSE, now);
        }
        if range_changed {
            self.agree_on_versions();
        }
        self.eject_failing(now);
    }

    /// Tells that a daemon's standing has changed, if it has, and begins what goes with it.
    fn tell_change(&mut self, daemon: &DaemonId, before: (State, Health, bool), now: Time) {
        let Some(d) = self.daemons.get(daemon) else { return };
        let after = d.standing();
        if after == before {
            return;
        }
        self.effects.push(members::changed(d));
        self.queue.changed = true;
        match (before.1, after.1) {
            (Health::Healthy, Health::Ejected) => {
                if let Some(cause) = d.vitals.cause {
                    self.effects.push(Effect::Ejected { daemon: daemon.clone(), cause });
                }
            }
            (Health::Ejected, Health::Healthy) => {
                let suspect = d.vitals.suspicion != Suspicion::None;
                self.start_slowly(daemon, now);
                if suspect {
                    // It went out before the probe that was to clear it: the next one may be an interval away.
                    self.probe_deeply_at(daemon, now, now);
                }
            }
            _ => {}
        }
        if (before.0, after.0) == (State::Starting, State::Ready) {
            self.joins(daemon, now);
        }
    }

    /// A daemon has answered for the first time.
    fn joins(&mut self, daemon: &DaemonId, now: Time) {
        if self.daemons.values().any(|d| d.takes_sessions() && d.used > 0) {
            self.start_slowly(daemon, now);
        }
        self.begin_deep_probes(daemon, now);
    }

    /// Where in the interval each daemon's turn is, follows from its name: they do not write all at once.
    fn begin_deep_probes(&mut self, daemon: &DaemonId, now: Time) {
        let Some(d) = self.daemons.get(daemon) else { return };
        let share = (balancer::mix(d.hash) >> 48) as u32;
        self.probe_deeply_at(daemon, now + self.config.deep_probe_interval * share / (1 << 16), now);
    }

    /// The time between deep probes is another one. Without any, nothing counts that one has said, or would have to
    /// clear: nobody would ever take it back.
    pub(super) fn deep_probes_configured(&mut self, now: Time) {
        self.queue.changed = true;
        let met = self.daemons.values().filter(|d| d.state != State::Starting);
        for daemon in met.map(|d| d.id.clone()).collect::<Vec<_>>() {
            if self.config.deep_probe_interval.is_zero() {
                self.end_deep_probes(&daemon);
            } else {
                self.begin_deep_probes(&daemon, now);
            }
        }
    }

    fn end_deep_probes(&mut self, daemon: &DaemonId) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        if let Some(due) = d.vitals.due.take() {
            self.timers.remove(&(due, Timer::Deep(daemon.clone())));
        }
        if d.vitals.failing.is_some() && d.health == Health::Healthy {
            d.reason.clear();
        }
        d.vitals.absolve();
        if d.vitals.cause == Some(Cause::Writes) {
            d.vitals.cause = None; // It comes back as one that has answered again.
        }
    }

    /// `/info` has answered after this time.
    pub(super) fn timed(&mut self, daemon: &DaemonId, took: Time) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        let latency = d.vitals.latency.map_or(took, |old| (old * 3 + took) / 4);
        d.vitals.latency = Some(latency);
        if latency < SLOW / 2 {
            d.vitals.slow = false;
        } else {
            // Slow means: slower than the others. When the machine below all of them is slow, nobody is.
            let mut others: Vec<Time> = (self.daemons.values())
                .filter(|o| o.id != *daemon && o.takes_sessions())
                .filter_map(Daemon::latency)
                .collect();
            others.sort_unstable();
            let typical = others.get(others.len() / 2).copied();
            if let (Some(typical), Some(d)) = (typical, self.daemons.get_mut(daemon)) {
                // Between the two bounds it stays what it is: no flapping.
                d.vitals.slow = latency >= (typical * 4).max(SLOW)
                    || (d.vitals.slow && latency >= (typical * 2).max(SLOW / 2));
            }
        }
    }

    /// A request that started work has failed, or may have: on a daemon whose disk is full it does so fast. A user's
    /// broken Dockerfile fails fast as well, and a BuildKit build from the cache looks the same, so this ejects nobody.
    pub(super) fn ended(&mut self, daemon: &DaemonId, end: End, lasted: Time, now: Time) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        if d.state != State::Ready || d.health != Health::Healthy || self.config.deep_probe_interval.is_zero()
        {
            return;
        }
        let (suspicion, gap) = if end == End::Erred {
            (Suspicion::Grave, GAP)
        } else if lasted >= if end == End::Failed { FAST_FAILURE } else { FAST } {
            return;
        } else {
            let before = d.vitals.fast.replace(now).map(|last| now.saturating_sub(last));
            if before.is_none_or(|before| before >= CALM) {
                d.vitals.innocent = 0;
            }
            if before.is_none_or(|before| before >= FAST_PAIR) {
                return;
            }
            d.vitals.asked = true;
            (Suspicion::Mild, (GAP * (1 << d.vitals.innocent.min(3))).min(MAX_GAP))
        };
        let doubted = d.is_doubted();
        let at = d.vitals.ended.map_or(now, |ended| now.max(ended + gap));
        // An error that a user makes again and again is no reason to keep others away between two probes.
        d.vitals.suspicion = d.vitals.suspicion.max(if at > now { Suspicion::Mild } else { suspicion });
        // Where there is a grave reason against all, another one's free slot is as good as any.
        self.queue.changed |= d.is_doubted() != doubted;
        self.probe_deeply_at(daemon, at, now);
    }

    /// Sees to it that the daemon's next deep probe comes at `at` or before.
    fn probe_deeply_at(&mut self, daemon: &DaemonId, at: Time, now: Time) {
        if self.config.deep_probe_interval.is_zero() {
            return;
        }
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        if d.vitals.under_way || d.vitals.due.is_some_and(|due| due <= at) {
            return;
        }
        if let Some(due) = d.vitals.due.replace(at) {
            self.timers.remove(&(due, Timer::Deep(daemon.clone())));
        }
        if at <= now {
            self.deep_due(daemon, now);
        } else {
            self.timers.insert((at, Timer::Deep(daemon.clone())));
        }
    }

    /// It is time for a deep probe.
    pub(super) fn deep_due(&mut self, daemon: &DaemonId, now: Time) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        d.vitals.due = None;
        if d.state == State::Ready && !matches!(d.vitals.cause, Some(Cause::Refused | Cause::Silent)) {
            let doubted = d.is_doubted();
            d.vitals.under_way = true;
            self.queue.changed |= d.is_doubted() != doubted;
            self.effects.push(Effect::ProbeDeeply { daemon: daemon.clone() });
        } else {
            // One that does not answer would not answer this either.
            let again = now + self.config.deep_probe_interval.max(PAUSE);
            self.probe_deeply_at(daemon, again, now);
        }
    }

    /// A deep probe has ended.
    pub(super) fn wrote(&mut self, daemon: &DaemonId, result: DeepProbe, now: Time) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        let before = d.standing();
        let vitals = &mut d.vitals;
        (vitals.under_way, vitals.ended) = (false, Some(now));
        self.queue.changed = true; // It counts for less against the daemon that none is under way.
        if self.config.deep_probe_interval.is_zero() {
            return; // It had begun before there were to be none.
        }
        let mut next = now + self.config.deep_probe_interval;
        if matches!(vitals.cause, Some(Cause::Refused | Cause::Silent)) {
            // It has stopped answering since: that is what this says as well, unless it had written before.
            if result == DeepProbe::Wrote {
                vitals.suspicion = Suspicion::None;
            }
            self.probe_deeply_at(daemon, next, now);
            return;
        }
        let failed = match result {
            DeepProbe::Wrote | DeepProbe::Unsupported => None,
            DeepProbe::Unreached => {
                if vitals.failing.is_some() || vitals.suspicion != Suspicion::None {
                    next = now + pause(vitals.strikes).max(PAUSE);
                }
                self.probe_deeply_at(daemon, next, now);
                return;
            }
            DeepProbe::Failed(reason) => Some((reason, false)),
            DeepProbe::Slow(reason) => {
                vitals.unanswered += 1;
                if vitals.unanswered < SLOW_WRITES && vitals.failing.is_none() {
                    self.probe_deeply_at(daemon, now + PAUSE, now);
                    return;
                }
                Some((reason, true))
            }
        };
        if let Some((reason, late)) = failed {
            (vitals.innocent, vitals.asked) = (0, false);
            vitals.failing = Some(Failing { why: format!("cannot write: {reason}"), late });
            vitals.well_since = None;
            next = now + pause(vitals.strikes).max(PAUSE);
        } else {
            (vitals.failing, vitals.unanswered) = (None, 0);
            vitals.innocent += u32::from(std::mem::take(&mut vitals.asked));
            vitals.suspicion = Suspicion::None;
            if vitals.cause == Some(Cause::Writes) {
                let since = *vitals.well_since.get_or_insert(now);
                next = since + pause(vitals.strikes);
                d.come_back(now);
            }
            if d.health == Health::Healthy {
                next = now + self.config.deep_probe_interval;
                d.reason.clear();
            }
        }
        self.tell_change(daemon, before, now);
        self.probe_deeply_at(daemon, next, now);
        self.eject_failing(now);
    }

    /// Ejects daemons whose deep probe fails, as long as at most half of the pool is out for that and one is
    /// left: where every disk is full, a build that fails with the daemon's own words says more than no daemon.
    fn eject_failing(&mut self, now: Time) {
        let ready = || self.daemons.values().filter(|d| d.state == State::Ready && !d.is_refused());
        let failing: Vec<DaemonId> = ready()
            .filter(|d| d.vitals.failing.is_some() && d.health == Health::Healthy)
            .map(|d| d.id.clone())
            .collect();
        if failing.is_empty() {
            return;
        }
        let all = ready().count();
        let passive = |d: &&Daemon| d.vitals.cause == Some(Cause::Writes);
        let mut out = ready().filter(passive).count();
        for id in failing {
            let left = self.daemons.values().any(|d| d.id != id && d.takes_sessions());
            let Some(d) = self.daemons.get_mut(&id) else { continue };
            let before = d.standing();
            let why = d.vitals.failing.as_ref().map(|f| f.why.clone()).unwrap_or_default();
            if out < all / 2 && left {
                d.reason = why;
                d.eject(Cause::Writes, now);
                out += 1;
                self.tell_change(&id, before, now);
            } else {
                d.reason = format!("{why}; it is not ejected, because too few daemons are left");
            }
        }
    }

    /// One session more than there are, and then some more each second.
    fn start_slowly(&mut self, daemon: &DaemonId, now: Time) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        d.vitals.opened = Some(d.used + 1).filter(|opened| *opened < d.slots);
        if d.vitals.opened.is_some() {
            self.timers.insert((now + STEP, Timer::SlowStart(daemon.clone())));
        }
    }

    /// The next step of a slow start.
    pub(super) fn step(&mut self, daemon: &DaemonId, now: Time) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        let Some(opened) = d.vitals.opened else { return };
        let opened = opened + (d.slots / STEPS).max(1);
        d.vitals.opened = Some(opened).filter(|opened| *opened < d.slots);
        self.queue.changed = true;
        if d.vitals.opened.is_some() {
            self.timers.insert((now + STEP, Timer::SlowStart(daemon.clone())));
        }
    }

    /// Two daemons keep their data in the same place: neither gets new sessions as long as both are there.
    pub(super) fn share(&mut self, one: &DaemonId, other: &DaemonId) {
        for (daemon, with) in [(one, other), (other, one)] {
            let both = self.daemons.contains_key(one) && self.daemons.contains_key(other);
            let Some(d) = self.daemons.get_mut(daemon).filter(|_| both) else { continue };
            if d.shares.insert(with.clone()) {
                self.effects.push(members::changed(d));
                self.effects.push(Effect::SharesData { daemon: daemon.clone(), with: with.clone() });
                self.queue.changed = true;
            }
        }
    }

    /// They do not, or no longer: a data root was moved while neither was another daemon for it.
    pub(super) fn distinct(&mut self, one: &DaemonId, other: &DaemonId) {
        for (daemon, with) in [(one, other), (other, one)] {
            let Some(d) = self.daemons.get_mut(daemon) else { continue };
            if d.shares.remove(with) {
                self.effects.push(members::changed(d));
                self.queue.changed = true;
            }
        }
    }

    /// What somebody must do something about, a sentence each.
    pub fn alarms(&self) -> Vec<String> {
        let mut alarms = Vec::new();
        for d in self.daemons.values() {
            for with in d.shares.iter().filter(|with| d.id < **with) {
                alarms.push(format!(
                    "daemons {} and {with} share one data root, which destroys what is in it: give each its own",
                    d.id
                ));
            }
            if let Some(misfit) = &d.misfit {
                alarms.push(format!("daemon {} is refused: {misfit}", d.id));
            }
            if let Some(failing) = d.vitals.failing.as_ref().filter(|_| d.health == Health::Healthy) {
                let why = &failing.why;
                alarms.push(format!("daemon {} {why}; it serves on, because too few are left", d.id));
            }
        }
        alarms
    }
}

#[cfg(test)]
mod tests;
