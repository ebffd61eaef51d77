//! Several contenders with clocks of their own, an API server that is slow, away or loses messages, crashes and
//! orderly stops, from a seed. By the true time there are never two holders; and there is one soon after the last has
//! gone.

use std::collections::BTreeMap;

use super::super::balancer::Random;
use super::*;

const DURATION: Time = Time::from_secs(15);
const END: Time = Time::from_secs(600);

/// A contender and its clock.
struct Contender {
    election: Election,
    /// Its clock at the true time 0, and how fast it runs, in thousandths of the true time.
    offset: Time,
    rate: u64,
    /// What it has asked and has no answer to.
    asks: Option<Asked>,
    /// The tenure that it was seen in.
    holds: Option<u64>,
}

impl Contender {
    fn clock(&self, now: Time) -> Time {
        self.offset + Time::from_micros(now.as_micros() as u64 * self.rate / 1000)
    }

    fn holds(&self, now: Time) -> Option<u64> {
        self.election.tenure(self.clock(now)).map(|tenure| tenure.number)
    }
}

struct Asked {
    /// No two calls have the same number: an answer to one that was given up is not listened to.
    number: u64,
    call: Call,
    /// When, by its own clock.
    at: Time,
    /// When it is given up, by the true time.
    until: Time,
}

/// What happens at a true time.
enum Happens {
    /// A request of a contender reaches the API server.
    Arrives(usize, u64, Call),
    /// Its answer reaches the contender.
    Returns(usize, u64, Answer),
}

struct World {
    random: Random,
    contenders: BTreeMap<usize, Contender>,
    names: usize,
    record: Option<Record>,
    versions: u64,
    /// Orders what happens at the same time.
    events: BTreeMap<(Time, u64), Happens>,
    order: u64,
    /// Until when the API server does nothing.
    frozen: Time,
    /// Since when there has been no holder although the API server was well and somebody wanted it.
    vacant: Time,
    tenures: u64,
    longest: Time,
}

impl World {
    fn new(seed: u64) -> Self {
        World {
            random: Random::new(seed),
            contenders: BTreeMap::new(),
            names: 0,
            record: None,
            versions: 0,
            events: BTreeMap::new(),
            order: 0,
            frozen: Time::ZERO,
            vacant: Time::ZERO,
            tenures: 0,
            longest: Time::ZERO,
        }
    }

    fn below(&mut self, n: u64) -> u64 {
        self.random.below(n)
    }

    fn millis(&mut self, most: u64) -> Time {
        Time::from_millis(self.below(most))
    }

    fn join(&mut self) {
        self.names += 1;
        let (offset, rate) = (self.millis(1_000_000), 920 + self.below(160));
        let election = Election::new(format!("c{}", self.names), Policy::of(DURATION));
        let contender = Contender { election, offset, rate, asks: None, holds: None };
        self.contenders.insert(self.names, contender);
    }

    fn at(&mut self, at: Time, happens: Happens) {
        self.order += 1;
        self.events.insert((at, self.order), happens);
    }

    fn serve(&mut self, call: &Call) -> Answer {
        let (claim, fits) = match call {
            Call::Read => return Answer::Read(self.record.clone()),
            Call::Create(claim) => (claim, self.record.is_none()),
            Call::Replace(version, claim) => {
                (claim, self.record.as_ref().is_some_and(|record| record.version == *version))
            }
        };
        if !fits {
            return Answer::Conflict;
        }
        self.versions += 1;
        let record = Record {
            holder: claim.holder.clone(),
            duration: DURATION,
            transitions: claim.transitions,
            version: self.versions.to_string(),
        };
        self.record = Some(record.clone());
        Answer::Wrote(record)
    }

    fn happens(&mut self, happens: Happens, now: Time) {
        match happens {
            Happens::Arrives(who, number, call) if now < self.frozen => {
                // It is served when the server goes on, whether anybody waits for it or not.
                let at = self.frozen + self.millis(50);
                self.at(at, Happens::Arrives(who, number, call));
            }
            Happens::Arrives(who, number, call) => {
                let answer = self.serve(&call);
                if self.below(30) > 0 {
                    let at = now + self.delay();
                    self.at(at, Happens::Returns(who, number, answer));
                }
            }
            Happens::Returns(who, number, answer) => {
                let Some(contender) = self.contenders.get_mut(&who) else { return };
                let Some(asked) = contender.asks.take_if(|asked| asked.number == number) else { return };
                let clock = contender.clock(now);
                contender.election.answered(&asked.call, answer, asked.at, clock);
            }
        }
    }

    fn delay(&mut self) -> Time {
        match self.below(40) {
            0 => self.millis(6_000),
            1..4 => self.millis(900),
            _ => self.millis(40),
        }
    }

    /// Every contender does what it is to do.
    fn turn(&mut self, now: Time) {
        for who in self.contenders.keys().copied().collect::<Vec<_>>() {
            let Some(contender) = self.contenders.get_mut(&who) else { continue };
            let clock = contender.clock(now);
            if let Some(asked) = contender.asks.take_if(|asked| asked.until <= now) {
                contender.election.answered(&asked.call, Answer::Failed, asked.at, clock);
            }
            if contender.asks.is_some() {
                continue;
            }
            let Next::Ask(call) = contender.election.step(clock) else { continue };
            self.order += 1;
            let (number, until) = (self.order, now + Policy::of(DURATION).patience);
            contender.asks = Some(Asked { number, call: call.clone(), at: clock, until });
            if self.below(30) > 0 {
                let at = now + self.delay();
                self.at(at, Happens::Arrives(who, number, call));
            }
        }
    }

    fn churn(&mut self, now: Time) {
        let there: Vec<usize> = self.contenders.keys().copied().collect();
        let any = there[self.below(there.len() as u64) as usize];
        match self.below(6) {
            // A crash: what it has asked goes on.
            0 | 1 => drop(self.contenders.remove(&any)),
            2 => {
                if let Some(contender) = self.contenders.get_mut(&any) {
                    let clock = contender.clock(now);
                    contender.election.leave(clock);
                }
            }
            3 => self.frozen = now + self.millis(40_000),
            _ => self.join(),
        }
        if self.contenders.len() < 2 {
            self.join();
        }
    }

    fn check(&mut self, now: Time) {
        let mut holders = Vec::new();
        for (who, contender) in &mut self.contenders {
            let holds = contender.holds(now);
            if let Some(number) = holds {
                holders.push(*who);
                if contender.holds != holds {
                    assert!(number > self.tenures, "tenure {number} after {}", self.tenures);
                    self.tenures = number;
                }
            }
            contender.holds = holds;
        }
        assert!(holders.len() <= 1, "{holders:?} hold it at {now:?}");
        let wanted = self.contenders.values().any(|c| !c.election.leaving);
        if !holders.is_empty() || !wanted || now < self.frozen {
            self.vacant = now;
        }
        self.longest = self.longest.max(now - self.vacant);
    }

    fn run(&mut self) -> Time {
        (0..3).for_each(|_| self.join());
        let mut now = Time::ZERO;
        let mut churn = Time::from_secs(5);
        while now < END {
            now += Time::from_millis(20);
            while let Some((key, _)) = self.events.first_key_value().filter(|((at, _), _)| *at <= now) {
                let key = *key;
                if let Some(event) = self.events.remove(&key) {
                    self.happens(event, now);
                    self.check(now);
                }
            }
            self.turn(now);
            self.check(now);
            if now >= churn {
                self.churn(now);
                churn = now + self.millis(60_000);
                self.check(now);
            }
        }
        self.longest
    }
}

#[test]
fn by_the_true_time_there_are_never_two_holders_and_soon_one() {
    let mut longest = Time::ZERO;
    for seed in 0..60 {
        let vacant = World::new(seed).run();
        assert!(vacant < 4 * DURATION, "seed {seed}: nobody held it for {vacant:?}");
        longest = longest.max(vacant);
    }
    assert!(longest > DURATION, "no crash was simulated: {longest:?}");
}

/// A holder that crashes is followed within the duration and a look, when nothing else is wrong.
#[test]
fn a_crashed_holder_is_followed_within_the_duration_and_a_look() {
    for seed in 0..40 {
        let mut world = World::new(seed);
        (0..3).for_each(|_| world.join());
        world.contenders.values_mut().for_each(|c| c.rate = 1000);
        let mut now = Time::ZERO;
        let mut crashed = None;
        let holder = |world: &World, now| {
            world.contenders.iter().find(|(_, c)| c.holds(now).is_some()).map(|(who, _)| *who)
        };
        loop {
            now += Time::from_millis(5);
            // Each call takes 10 ms and is answered.
            while let Some(((at, order), _)) =
                world.events.first_key_value().filter(|((at, _), _)| *at <= now)
            {
                let key = (*at, *order);
                if let Some(Happens::Arrives(who, number, call)) = world.events.remove(&key) {
                    let answer = world.serve(&call);
                    world.happens(Happens::Returns(who, number, answer), now);
                }
            }
            for (who, contender) in &mut world.contenders {
                if contender.asks.is_none() {
                    let clock = contender.clock(now);
                    if let Next::Ask(call) = contender.election.step(clock) {
                        world.order += 1;
                        let (number, until) = (world.order, Time::MAX);
                        contender.asks = Some(Asked { number, call: call.clone(), at: clock, until });
                        let at = now + Time::from_millis(10);
                        world.events.insert((at, number), Happens::Arrives(*who, number, call));
                    }
                }
            }
            match (holder(&world, now), crashed) {
                (Some(who), None) if now > Time::from_secs(20) => {
                    world.contenders.remove(&who);
                    crashed = Some(now);
                }
                (Some(_), Some(at)) => {
                    let took = now - at;
                    let most = DURATION + Policy::of(DURATION).retry + Time::from_millis(100);
                    assert!(took <= most, "seed {seed}: {took:?}");
                    break;
                }
                _ => assert!(now < END, "nobody holds it"),
            }
        }
    }
}
