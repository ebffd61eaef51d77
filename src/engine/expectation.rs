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

impl Engine {
    /// How long a ticket at this position (from 1) can expect to wait; `None` until a slot has been given back once, or
    /// where no daemon takes sessions.
    pub fn expected_wait(&self, position: usize) -> Option<Time> {
        let mean = self.holds.mean?;
        let slots: u32 = self.daemons.values().filter(|d| d.takes_sessions()).map(|d| d.capacity()).sum();
        (slots > 0).then(|| Time::from_secs_f64(mean * position as f64 / f64::from(slots)))
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
}
