//! What the requests of a lease have come to, for the line that the log has at its end.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use super::lock;
use crate::engine::model::LeaseId;

/// A request's share, or the sum of many.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// How many requests.
    pub requests: u64,
    /// How long they waited for a slot, together.
    pub waited: Duration,
    /// Bytes to the daemon.
    pub up: u64,
    /// Bytes to the clients.
    pub down: u64,
}

/// The sums of the leases that this proxy has seen begin. What went through another proxy is not among them.
#[derive(Debug, Default)]
pub(super) struct Tallies(Mutex<HashMap<LeaseId, Tally>>);

impl Tallies {
    pub fn begin(&self, lease: LeaseId) {
        lock(&self.0).insert(lease, Tally::default());
    }

    /// One that has ended, or began elsewhere, is not begun by it.
    pub fn add(&self, lease: LeaseId, request: Tally) {
        if let Some(sum) = lock(&self.0).get_mut(&lease) {
            sum.requests += request.requests;
            sum.waited += request.waited;
            sum.up += request.up;
            sum.down += request.down;
        }
    }

    pub fn end(&self, lease: LeaseId) -> Tally {
        lock(&self.0).remove(&lease).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_has_the_sum_of_its_own_requests_and_leaves_nothing() {
        let tallies = Tallies::default();
        let lease = |number| LeaseId { epoch: 1, number };
        let request = |up| Tally { requests: 1, waited: Duration::from_secs(2), up, down: 7 };
        tallies.begin(lease(1));
        tallies.begin(lease(2));
        tallies.add(lease(1), request(3));
        tallies.add(lease(2), request(100));
        tallies.add(lease(1), request(4));
        let sum = Tally { requests: 2, waited: Duration::from_secs(4), up: 7, down: 14 };
        assert_eq!(tallies.end(lease(1)), sum);
        tallies.add(lease(1), request(5));
        assert_eq!(tallies.end(lease(1)), Tally::default(), "it has ended");
        tallies.end(lease(2));
        assert!(lock(&tallies.0).is_empty());
    }
}
