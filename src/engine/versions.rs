//! Which API versions a pool of different daemons can promise (design, decision 11).

use std::collections::{BTreeMap, BTreeSet};

use super::model::{ApiVersion, DaemonId};

/// The API range that a pool advertises, and the daemons that do not fit into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Range {
    /// The highest minimum of the daemons that fit.
    pub min: ApiVersion,
    /// The lowest maximum of the daemons that fit.
    pub max: ApiVersion,
    /// Daemons whose range does not meet the others'.
    pub misfits: BTreeSet<DaemonId>,
}

/// The range that most daemons share; on a tie the newer one. `None` without daemons.
///
/// Intervals have a common point exactly when the highest minimum does not exceed the lowest maximum, and some
/// interval's minimum is such a point, so only minima need to be tried: as many as there are kinds of daemon.
pub(super) fn common(daemons: &BTreeMap<DaemonId, (ApiVersion, ApiVersion)>) -> Option<Range> {
    let fits =
        |point: ApiVersion| daemons.values().filter(|(min, max)| (*min..=*max).contains(&point)).count();
    let minima: BTreeSet<ApiVersion> = daemons.values().map(|(min, _)| *min).collect();
    let point = minima.into_iter().max_by_key(|point| (fits(*point), *point))?;
    let inside = || daemons.values().filter(|(min, max)| (*min..=*max).contains(&point));
    Some(Range {
        min: inside().map(|(min, _)| *min).max()?,
        max: inside().map(|(_, max)| *max).min()?,
        misfits: daemons
            .iter()
            .filter(|(_, (min, max))| !(*min..=*max).contains(&point))
            .map(|(id, _)| id.clone())
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool(ranges: &[(&str, u16, u16)]) -> BTreeMap<DaemonId, (ApiVersion, ApiVersion)> {
        ranges.iter().map(|(id, min, max)| (DaemonId::from(*id), ((1, *min), (1, *max)))).collect()
    }

    #[test]
    fn a_mixed_pool_promises_what_all_serve() {
        let range =
            common(&pool(&[("20", 12, 41), ("26", 24, 45), ("28", 24, 51), ("29.7", 40, 55)])).unwrap();
        assert_eq!((range.min, range.max, range.misfits), ((1, 40), (1, 41), BTreeSet::new()));
    }

    #[test]
    fn a_daemon_that_meets_nobody_is_refused() {
        let range = common(&pool(&[("20", 12, 41), ("28", 24, 51), ("29.0", 44, 52)])).unwrap();
        assert_eq!((range.min, range.max, range.misfits), ((1, 44), (1, 51), [DaemonId::from("20")].into()));
    }

    #[test]
    fn no_daemons_no_range() {
        assert_eq!(common(&pool(&[])), None);
    }

    proptest! {
        #[test]
        fn the_range_is_what_the_largest_group_shares(
            ranges in proptest::collection::vec((0u16..12, 0u16..6), 1..12),
        ) {
            let pool: BTreeMap<DaemonId, (ApiVersion, ApiVersion)> = (ranges.iter().enumerate())
                .map(|(i, (min, more))| (format!("d{i}").into(), ((1, *min), (1, min + more))))
                .collect();
            let range = common(&pool).unwrap();
            prop_assert!(range.min <= range.max);
            for (id, (min, max)) in &pool {
                let serves_all = *min <= range.min && range.max <= *max;
                prop_assert_eq!(serves_all, !range.misfits.contains(id), "{}", id);
            }
            // No version is served by more daemons than those that were kept.
            for minor in 0..20 {
                let served = pool.values().filter(|(min, max)| (*min..=*max).contains(&(1, minor))).count();
                prop_assert!(served <= pool.len() - range.misfits.len());
            }
        }
    }
}
