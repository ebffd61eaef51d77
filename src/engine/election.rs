//! Who of several proxies admits: the holder of one Lease. Every contender runs this machine against the same API
//! server; what it is to ask there comes out of [`Election::step`], and the answer goes into [`Election::answered`].
//!
//! ```text
//!             empty, or unchanged for its duration
//! Follower ───────────────────────────────────────▶ (claims it) ──▶ Holder ──released──▶ Leaving
//!    ▲                                                                 │
//!    └──────────── not renewed in time, or another's ──────────────────┘
//! ```
//!
//! Times are of the contender's own monotonic clock, and the times in the Lease are never compared with it: another's
//! Lease has expired when *here* no change of it was seen for as long as it lasts. A holder counts from the moment in
//! which it *asked* for what was then written, and stops at [`Policy::deadline`], which is shorter than what others
//! wait. So there are never two, as long as clocks run at rates within a fifth of each other.
//!
//! Every write names the version that was read, so of several at once one is taken. What became of a write without an
//! answer is not known: the Lease is read again before anything else is written.

#[cfg(test)]
mod simulation;

use super::model::Time;

/// How long things take, all derived from the Lease's duration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// How long others wait for a sign of the holder.
    pub duration: Time,
    /// For how long a holder acts on a renewal, from when it asked for it.
    pub deadline: Time,
    /// Between two renewals.
    pub renew: Time,
    /// Between two looks of one that does not hold it, and after a call that failed.
    pub retry: Time,
    /// How long a call may take.
    pub patience: Time,
}

impl Policy {
    /// The shares are those of client-go (15 s, 10 s, 2 s), but looks are more frequent: after a release, work waits
    /// for the next one.
    pub fn of(duration: Time) -> Self {
        Policy {
            duration,
            deadline: duration * 2 / 3,
            renew: duration / 5,
            retry: duration / 20,
            patience: duration / 4,
        }
    }
}

/// The Lease as the API server gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Who holds it; `None` after a release.
    pub holder: Option<String>,
    /// How long it lasts without a change.
    pub duration: Time,
    /// How often it was claimed. No two tenures have the same number.
    pub transitions: u64,
    /// Another one after each change.
    pub version: String,
}

/// What is asked of the API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// The Lease as it is.
    Read,
    /// There is none: a first one.
    Create(Claim),
    /// This instead, if its version is still that one.
    Replace(String, Claim),
}

/// What is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Who holds it then; `None` releases it.
    pub holder: Option<String>,
    /// The number of the tenure.
    pub transitions: u64,
    /// Whether a tenure begins with it.
    pub begins: bool,
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The Lease; `None`: there is none.
    Read(Option<Record>),
    /// It was written, and is this now.
    Wrote(Record),
    /// It was not written: another was quicker.
    Conflict,
    /// Nobody knows whether it was written.
    Failed,
}

/// What the contender is to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Ask this, for at most [`Policy::patience`].
    Ask(Call),
    /// Nothing before this time.
    Wait(Time),
}

/// A time of holding the Lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tenure {
    /// Its number, higher than those of all before it.
    pub number: u64,
    /// When it ends if the Lease is not renewed.
    pub until: Time,
}

/// One contender.
#[derive(Debug)]
pub struct Election {
    me: String,
    policy: Policy,
    /// The Lease as it was seen last, and since when it has not changed.
    seen: Option<(Record, Time)>,
    tenure: Option<Tenure>,
    /// It was read, and there was none.
    absent: bool,
    /// What was seen may have changed: it is read before anything is written.
    stale: bool,
    next: Time,
    leaving: bool,
    /// The release is to be written still.
    release: bool,
}

impl Election {
    /// A contender of this name, which must be no other's, ever.
    pub fn new(me: String, policy: Policy) -> Self {
        Election {
            me,
            policy,
            seen: None,
            tenure: None,
            absent: false,
            stale: true,
            next: Time::ZERO,
            leaving: false,
            release: false,
        }
    }

    /// The tenure, as long as it lasts.
    pub fn tenure(&self, now: Time) -> Option<Tenure> {
        self.tenure.filter(|tenure| now < tenure.until)
    }

    /// The Lease as it was seen last.
    pub fn seen(&self) -> Option<&Record> {
        self.seen.as_ref().map(|(record, _)| record)
    }

    /// It never claims the Lease again, and releases it if it holds it: from this call on it does not act as its
    /// holder.
    pub fn leave(&mut self, now: Time) {
        if !self.leaving {
            self.release = self.tenure(now).is_some();
            (self.leaving, self.tenure, self.next) = (true, None, now);
        }
    }

    /// Whoever acts for the tenure has stopped: it began to renew too late. It is claimed anew.
    pub fn forfeit(&mut self, now: Time) {
        (self.tenure, self.next) = (None, now);
    }

    /// What to do now.
    pub fn step(&mut self, now: Time) -> Next {
        self.tenure = self.tenure(now);
        if now < self.next {
            let ends = self.tenure.map_or(Time::MAX, |tenure| tenure.until);
            return Next::Wait(self.next.min(ends));
        }
        match self.claim(now) {
            Some(call) => Next::Ask(call),
            None => Next::Ask(Call::Read),
        }
    }

    /// What is to be written now, if anything is.
    fn claim(&self, now: Time) -> Option<Call> {
        if self.stale {
            return None;
        }
        let mine = |transitions, begins| Claim { holder: Some(self.me.clone()), transitions, begins };
        let Some((record, since)) = &self.seen else {
            let create = self.absent && !self.leaving;
            return create.then(|| Call::Create(mine(1, true)));
        };
        let replace = |claim| Some(Call::Replace(record.version.clone(), claim));
        let is_mine = record.holder.as_ref() == Some(&self.me);
        if self.leaving {
            let released = Claim { holder: None, transitions: record.transitions, begins: false };
            return if self.release && is_mine { replace(released) } else { None };
        }
        if let Some(tenure) = self.tenure {
            return replace(mine(tenure.number, false));
        }
        // Its own, of a tenure that is over or of a write that had no answer: others wait for it in vain.
        let free = record.holder.is_none() || is_mine || now.saturating_sub(*since) >= record.duration;
        if free { replace(mine(record.transitions + 1, true)) } else { None }
    }

    /// The answer to a call that was made at `asked`.
    pub fn answered(&mut self, call: &Call, answer: Answer, asked: Time, now: Time) {
        self.next = now + self.policy.retry;
        match (call, answer) {
            (Call::Read, Answer::Read(None)) => {
                (self.seen, self.tenure, self.absent, self.stale) = (None, None, true, false);
                self.release = false;
                self.act(now);
            }
            (_, Answer::Read(Some(record))) => {
                (self.absent, self.stale) = (false, false);
                if record.holder.as_ref() != Some(&self.me) {
                    (self.tenure, self.release) = (None, false);
                }
                self.see(record, now);
                self.act(now);
            }
            (Call::Create(claim) | Call::Replace(_, claim), Answer::Wrote(record)) => {
                (self.absent, self.stale, self.release) = (false, false, false);
                let lasts = claim.begins || self.tenure(now).is_some();
                self.tenure = match &claim.holder {
                    // A renewal that comes too late renews nothing: what was given up is claimed anew.
                    Some(_) if !self.leaving && !lasts => {
                        self.next = now;
                        None
                    }
                    // It may have left while it asked.
                    Some(_) if !self.leaving => {
                        self.next = asked + self.policy.renew;
                        Some(Tenure { number: claim.transitions, until: asked + self.policy.deadline })
                    }
                    Some(_) => {
                        self.release = true;
                        self.next = now;
                        None
                    }
                    None => None,
                };
                self.tenure = self.tenure(now);
                self.see(record, now);
            }
            (_, Answer::Conflict) => (self.stale, self.next) = (true, now),
            _ => self.stale = true,
        }
    }

    fn see(&mut self, record: Record, now: Time) {
        match &mut self.seen {
            Some((known, _)) if known.version == record.version => *known = record,
            seen => *seen = Some((record, now)),
        }
    }

    /// What was just read is acted on at once; or looked at again in time.
    fn act(&mut self, now: Time) {
        if self.claim(now).is_some() {
            self.next = now;
        } else if let Some((record, since)) = &self.seen
            && !self.leaving
            && record.holder.is_some()
        {
            self.next = self.next.min((*since + record.duration).max(now));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Time = Time::from_secs(1);

    fn record(holder: Option<&str>, version: &str) -> Record {
        let holder = holder.map(str::to_string);
        Record { holder, duration: 15 * S, transitions: 4, version: version.into() }
    }

    fn contender() -> Election {
        Election::new("me".into(), Policy::of(15 * S))
    }

    /// Answers its reads with this until it writes, or `until` is reached.
    fn look(election: &mut Election, record: &Record, from: Time, until: Time) -> Option<(Call, Time)> {
        let mut now = from;
        while now <= until {
            match election.step(now) {
                Next::Wait(at) => now = at.max(now + Time::from_millis(1)),
                Next::Ask(Call::Read) => {
                    election.answered(&Call::Read, Answer::Read(Some(record.clone())), now, now);
                }
                Next::Ask(call) => return Some((call, now)),
            }
        }
        None
    }

    /// Holds the Lease from `now` on.
    fn holder(now: Time) -> Election {
        let mut election = contender();
        let free = record(None, "1");
        let (call, at) = look(&mut election, &free, now, now).expect("a claim");
        let written = Record { transitions: 5, ..record(Some("me"), "2") };
        election.answered(&call, Answer::Wrote(written), at, at);
        election
    }

    #[test]
    fn where_there_is_no_lease_one_is_made() {
        let mut election = contender();
        assert_eq!(election.step(S), Next::Ask(Call::Read));
        election.answered(&Call::Read, Answer::Read(None), S, S);
        let claim = Claim { holder: Some("me".into()), transitions: 1, begins: true };
        assert_eq!(election.step(S), Next::Ask(Call::Create(claim)));
    }

    #[test]
    fn a_released_lease_is_claimed_at_once_and_one_that_changes_never() {
        let mut election = contender();
        let (call, at) = look(&mut election, &record(None, "1"), S, S).expect("a claim");
        let claim = Claim { holder: Some("me".into()), transitions: 5, begins: true };
        assert_eq!((call, at), (Call::Replace("1".into(), claim), S));

        let mut election = contender();
        for i in 0..100_u32 {
            let from = i * 14 * S;
            let claimed = look(&mut election, &record(Some("other"), &i.to_string()), from, from + 13 * S);
            assert_eq!(claimed, None);
        }
    }

    #[test]
    fn one_that_does_not_change_is_claimed_when_it_has_lasted_by_this_clock() {
        let mut election = contender();
        let (_, at) = look(&mut election, &record(Some("other"), "7"), 100 * S, 200 * S).expect("a claim");
        assert_eq!(at, 115 * S);
    }

    #[test]
    fn a_tenure_counts_from_when_it_was_asked_for_and_ends_before_others_may_begin() {
        let mut election = contender();
        let (call, _) = look(&mut election, &record(None, "1"), S, S).expect("a claim");
        election.answered(&call, Answer::Wrote(record(Some("me"), "2")), S, 4 * S);
        assert_eq!(election.tenure(4 * S), Some(Tenure { number: 5, until: 11 * S }));
        assert_eq!(election.tenure(11 * S), None);
        // An answer that comes later than that is no tenure.
        let mut election = contender();
        let (call, _) = look(&mut election, &record(None, "1"), S, S).expect("a claim");
        election.answered(&call, Answer::Wrote(record(Some("me"), "2")), S, 12 * S);
        assert_eq!(election.tenure(12 * S), None);
    }

    #[test]
    fn a_write_without_an_answer_is_read_before_anything_is_written() {
        let mut election = holder(S);
        let Next::Wait(at) = election.step(S) else { panic!("nothing is due") };
        let Next::Ask(renewal) = election.step(at) else { panic!("a renewal is due") };
        election.answered(&renewal, Answer::Failed, at, at);
        assert!(election.tenure(at).is_some(), "it still has its time");
        let Next::Wait(at) = election.step(at) else { panic!("not at once") };
        assert_eq!(election.step(at), Next::Ask(Call::Read));
        // Another one has it: the rest of the time is not used.
        election.answered(&Call::Read, Answer::Read(Some(record(Some("other"), "9"))), at, at);
        assert_eq!(election.tenure(at), None);
    }

    #[test]
    fn who_leaves_acts_no_more_releases_once_and_claims_nothing() {
        let mut election = holder(S);
        election.leave(2 * S);
        assert_eq!(election.tenure(2 * S), None);
        let Next::Ask(call) = election.step(2 * S) else { panic!("the release") };
        let released = Claim { holder: None, transitions: 5, begins: false };
        assert_eq!(call, Call::Replace("2".into(), released));
        election.answered(&call, Answer::Wrote(record(None, "3")), 2 * S, 2 * S);
        assert_eq!(look(&mut election, &record(None, "3"), 2 * S, 100 * S), None);
    }

    #[test]
    fn who_leaves_while_its_claim_is_under_way_releases_what_comes_of_it() {
        let mut election = contender();
        let (claim, _) = look(&mut election, &record(None, "1"), S, S).expect("a claim");
        election.leave(S);
        election.answered(&claim, Answer::Wrote(record(Some("me"), "2")), S, 2 * S);
        assert_eq!(election.tenure(2 * S), None);
        assert!(
            matches!(election.step(2 * S), Next::Ask(Call::Replace(version, Claim { holder: None, .. })) if version == "2")
        );
    }

    #[test]
    fn a_tenure_that_was_lost_begins_anew_under_another_number() {
        let mut election = holder(S);
        let own = Record { transitions: 5, ..record(Some("me"), "2") };
        // Renewals fail until it is over.
        let mut now = S;
        while election.tenure(now).is_some() {
            match election.step(now) {
                Next::Wait(at) => now = at.max(now + Time::from_millis(1)),
                Next::Ask(call) => election.answered(&call, Answer::Failed, now, now),
            }
        }
        let (call, _) = look(&mut election, &own, now, now + S).expect("a claim");
        let Call::Replace(_, claim) = call else { panic!("{call:?}") };
        assert_eq!((claim.transitions, claim.begins), (6, true));
    }
}
