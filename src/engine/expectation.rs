//! How long who waits will wait: what slots were held for lately, over the slots that there are. An estimate for
//! people; no decision rests on it.

use super::Engine;
use super::model::Time;

/// The weight of the latest hold: about the last eight count.
const WEIGHT: f64 = 0.125;

/// How long sessions hold a slot.
#[derive(Debug, Clone, Default)]
pub(super) struct Holds {
    mean: Option<f64>,
}

impl Holds {
    /// A session has given its slots back after this time.
    pub fn ended(&mut self, held: Time) {
        let held = held.as_secs_f64();
        self.mean = Some(self.mean.map_or(held, |mean| mean + WEIGHT * (held - mean)));
    }
}

/// What those who wait can expect.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Expectation {
    /// In seconds: for how long a slot is held, over the slots that there are.
    each: f64,
}

impl Expectation {
    /// How long a ticket at this position (from 1) can expect to wait.
    pub fn wait(&self, position: usize) -> Time {
        Time::try_from_secs_f64(self.each * position as f64).unwrap_or(Time::MAX)
    }
}

impl Engine {
    /// What those who wait can expect now; `None` until a slot has been given back once, or where no daemon takes
    /// sessions. Slots that are held for longer than others were lately will not come free sooner than that.
    pub fn expectation(&self, now: Time) -> Option<Expectation> {
        let ended = self.holds.mean?;
        let slots: u32 = self.daemons.values().filter(|d| d.takes_sessions()).map(|d| d.capacity()).sum();
        let held = self.sessions.values().filter(|s| s.slots > 0).map(|s| now.saturating_sub(s.held));
        let (n, sum) = held.fold((0_u32, 0.0), |(n, sum), age| (n + 1, sum + age.as_secs_f64()));
        let so_far = if n > 0 { sum / f64::from(n) } else { 0.0 };
        (slots > 0).then(|| Expectation { each: ended.max(so_far) / f64::from(slots) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_follows_what_is_held_now() {
        let mut holds = Holds::default();
        holds.ended(Time::from_secs(10));
        assert_eq!(holds.mean, Some(10.0));
        for _ in 0..40 {
            holds.ended(Time::from_secs(100));
        }
        assert!(holds.mean.is_some_and(|mean| (99.0..100.0).contains(&mean)), "{holds:?}");
    }

    #[test]
    fn the_second_waits_twice_as_long_as_the_first() {
        let expectation = Expectation { each: 30.0 };
        assert_eq!([1, 2].map(|n| expectation.wait(n).as_secs()), [30, 60]);
    }
}
