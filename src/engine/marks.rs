//! Which daemons are to be marked as busy or idle where others look who may remove one (the autoscalers of a cluster's
//! nodes), and when: at once as busy, as idle only after a while, and never so many at a time that a pool of short builds
//! floods whoever keeps the marks.

use std::collections::{BTreeMap, BTreeSet};

use super::model::{DaemonId, Time};

/// How long a daemon must have been idle before it is marked so.
const QUIET: Time = Time::from_secs(30);
/// After a mark that failed, and before one that was taken is written once more, in case somebody else has changed it.
const AGAIN: Time = Time::from_secs(10);
const REFRESH: Time = Time::from_secs(900);
/// So many may be written at once, and then so many a second.
const BURST: f64 = 10.0;
const RATE: f64 = 2.0;

/// The marks of all daemons.
#[derive(Debug, Clone)]
pub struct Marks {
    known: BTreeMap<DaemonId, Mark>,
    /// How many may be written now.
    tokens: f64,
    refilled: Time,
}

#[derive(Debug, Clone, Default)]
struct Mark {
    /// Since when nothing is on it.
    idle: Option<Time>,
    /// What is written there.
    written: Option<(bool, Time)>,
    /// When the last attempt failed.
    failed: Option<Time>,
}

impl Default for Marks {
    fn default() -> Self {
        Marks { known: BTreeMap::new(), tokens: BURST, refilled: Time::ZERO }
    }
}

impl Marks {
    /// Who is to be marked now, as busy (`true`) or idle; those that became busy first. `daemons` are those that are
    /// known to be busy or not; what is not known keeps its mark.
    pub fn due(&mut self, daemons: &BTreeMap<DaemonId, bool>, now: Time) -> Vec<(DaemonId, bool)> {
        let there: BTreeSet<&DaemonId> = daemons.keys().collect();
        self.known.retain(|id, _| there.contains(id));
        let since = now.saturating_sub(self.refilled).as_secs_f64();
        (self.tokens, self.refilled) = ((self.tokens + since * RATE).min(BURST), now);
        let mut due = Vec::new();
        for (id, busy) in daemons {
            let mark = self.known.entry(id.clone()).or_default();
            mark.idle = if *busy { None } else { mark.idle.or(Some(now)) };
            if mark.failed.is_some_and(|at| now < at + AGAIN) {
                continue;
            }
            let stands = mark.written.map(|(is, _)| is);
            let old = mark.written.is_none_or(|(_, at)| at + REFRESH <= now);
            let quiet = mark.idle.is_some_and(|since| since + QUIET <= now);
            match (*busy, stands) {
                // Protection comes first, what has stood for long last.
                (true, Some(true)) | (false, Some(false)) if old => due.push((2, id.clone(), *busy)),
                (true, Some(true)) | (false, Some(false)) => {}
                (true, _) => due.push((0, id.clone(), true)),
                (false, _) if quiet => due.push((1, id.clone(), false)),
                (false, _) => {}
            }
        }
        due.sort();
        due.truncate(self.tokens as usize);
        self.tokens -= due.len() as f64;
        due.into_iter().map(|(_, id, busy)| (id, busy)).collect()
    }

    /// What came of one.
    pub fn wrote(&mut self, daemon: &DaemonId, busy: bool, done: bool, now: Time) {
        let Some(mark) = self.known.get_mut(daemon) else { return };
        if done {
            (mark.written, mark.failed) = (Some((busy, now)), None);
        } else {
            mark.failed = Some(now);
        }
    }
}

/// The same word about the pool is not said again for so long.
const SILENCE: Time = Time::from_secs(600);
/// So many words at once, and then one in so many seconds.
const WORDS: f64 = 20.0;
const PAUSE: f64 = 10.0;

/// What is told of the pool where its operators look (Kubernetes: Events): nothing twice within ten minutes, and not
/// more than a few a minute.
#[derive(Debug, Clone)]
pub struct Chronicle {
    told: BTreeMap<String, Time>,
    tokens: f64,
    refilled: Time,
}

impl Default for Chronicle {
    fn default() -> Self {
        Chronicle { told: BTreeMap::new(), tokens: WORDS, refilled: Time::ZERO }
    }
}

impl Chronicle {
    /// Whether this is to be told now.
    pub fn tells(&mut self, word: &str, now: Time) -> bool {
        self.told.retain(|_, at| now < *at + SILENCE);
        let since = now.saturating_sub(self.refilled).as_secs_f64();
        (self.tokens, self.refilled) = ((self.tokens + since / PAUSE).min(WORDS), now);
        if self.told.contains_key(word) || self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        self.told.insert(word.to_string(), now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Time {
        Time::from_secs(seconds)
    }

    fn pool(daemons: &[(&str, bool)]) -> BTreeMap<DaemonId, bool> {
        daemons.iter().map(|(id, busy)| ((*id).into(), *busy)).collect()
    }

    /// Writes what is due, and tells it.
    fn write(marks: &mut Marks, daemons: &[(&str, bool)], now: Time) -> Vec<(String, bool)> {
        let due = marks.due(&pool(daemons), now);
        due.iter().for_each(|(id, busy)| marks.wrote(id, *busy, true, now));
        due.into_iter().map(|(id, busy)| (id.to_string(), busy)).collect()
    }

    #[test]
    fn busy_is_marked_at_once_and_idle_after_a_while() {
        let mut marks = Marks::default();
        assert_eq!(write(&mut marks, &[("a", true), ("b", false)], at(0)), [("a".into(), true)]);
        assert!(write(&mut marks, &[("a", false), ("b", false)], at(29)).is_empty());
        assert_eq!(write(&mut marks, &[("a", false), ("b", false)], at(30)), [("b".into(), false)]);
        assert!(write(&mut marks, &[("a", true), ("b", false)], at(40)).is_empty(), "it has its mark");
        assert!(write(&mut marks, &[("a", false), ("b", false)], at(69)).is_empty(), "idle for a moment");
        assert_eq!(write(&mut marks, &[("a", false), ("b", false)], at(99)), [("a".into(), false)]);
        assert_eq!(write(&mut marks, &[("a", true)], at(100)), [("a".into(), true)]);
    }

    #[test]
    fn a_mark_that_failed_is_written_again_after_a_pause() {
        let mut marks = Marks::default();
        let busy = pool(&[("a", true)]);
        assert_eq!(marks.due(&busy, at(0)).len(), 1);
        marks.wrote(&"a".into(), true, false, at(0));
        assert!(marks.due(&busy, at(9)).is_empty());
        assert_eq!(marks.due(&busy, at(10)).len(), 1);
    }

    #[test]
    fn a_thousand_pods_are_marked_two_a_second_and_the_busy_ones_first() {
        let mut marks = Marks::default();
        let names: Vec<String> = (0..1000).map(|i| format!("d{i:04}")).collect();
        let all: Vec<(&str, bool)> = names.iter().enumerate().map(|(i, n)| (&n[..], i >= 990)).collect();
        let idle: Vec<(&str, bool)> = names.iter().map(|n| (&n[..], false)).collect();
        write(&mut marks, &idle, at(0));
        let first = write(&mut marks, &all, at(60));
        assert_eq!((first.len(), first.iter().filter(|(_, busy)| *busy).count()), (10, 10));
        let mut written = 0;
        for second in 61..161 {
            written += write(&mut marks, &all, at(second)).len();
        }
        assert_eq!(written, 200);
    }

    #[test]
    fn who_flaps_each_second_is_marked_once() {
        let mut marks = Marks::default();
        let written: usize =
            (0..600).map(|second| write(&mut marks, &[("a", second % 2 == 0)], at(second)).len()).sum();
        assert_eq!(written, 1);
    }

    #[test]
    fn a_mark_is_written_again_each_quarter_of_an_hour() {
        let mut marks = Marks::default();
        assert_eq!(write(&mut marks, &[("a", true)], at(0)).len(), 1);
        assert!(write(&mut marks, &[("a", true)], at(899)).is_empty());
        assert_eq!(write(&mut marks, &[("a", true)], at(900)).len(), 1);
    }

    #[test]
    fn nothing_is_told_twice_and_not_much_at_once() {
        let mut chronicle = Chronicle::default();
        assert!(chronicle.tells("full", at(0)));
        assert!(!chronicle.tells("full", at(599)));
        assert!(chronicle.tells("full", at(600)));
        let told = (0..100).filter(|i| chronicle.tells(&format!("{i}"), at(601))).count();
        assert_eq!(told, 19);
        assert!(!chronicle.tells("one more", at(605)));
        assert!(chronicle.tells("one more", at(612)));
    }
}
