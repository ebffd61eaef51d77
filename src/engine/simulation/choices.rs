//! Where a simulation's choices come from.

use super::super::balancer::Random;

/// A sequence of choices.
#[derive(Debug)]
pub(super) struct Choices {
    /// What a fuzzer chose, and how much of it has been taken.
    given: Option<(Vec<u8>, usize)>,
    random: Random,
}

impl Choices {
    /// All from a seed.
    #[cfg(test)]
    pub fn seeded(seed: u64) -> Self {
        Choices { given: None, random: Random::new(seed) }
    }

    /// From these bytes: one for a choice among up to 256, four for others. When they are used up, the simulation
    /// should come to its end, for which the choices are from a fixed seed.
    pub fn given(bytes: &[u8]) -> Self {
        Choices { given: Some((bytes.to_vec(), 0)), random: Random::new(0) }
    }

    /// Whether there were bytes, and they are used up.
    pub fn is_over(&self) -> bool {
        self.given.as_ref().is_some_and(|(bytes, at)| *at >= bytes.len())
    }

    /// A number below `n`, which is at least 1.
    pub fn below(&mut self, n: u64) -> u64 {
        if let Some((bytes, at)) = &mut self.given {
            let wanted = if n <= 256 { 1 } else { 4 };
            if let Some(taken) = bytes.get(*at..*at + wanted) {
                *at += wanted;
                return taken.iter().fold(0, |all, b| all << 8 | u64::from(*b)) % n;
            }
            *at = bytes.len();
        }
        self.random.below(n)
    }
}
