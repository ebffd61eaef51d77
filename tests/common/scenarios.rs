//! Many named scenarios on one pool: starting three daemons costs more than most scenarios do, so they share
//! them; each is still reported, timed and failed by its own name.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::say;

type Scenario<'a> = (String, Box<dyn Fn() + Send + Sync + 'a>);

/// A list of scenarios; a name reads as a rule.
pub struct Scenarios<'a> {
    title: String,
    first: Vec<Scenario<'a>>,
    list: Vec<Scenario<'a>>,
    last: Vec<Scenario<'a>>,
    /// How many may still be tried a second time.
    again: AtomicUsize,
}

impl<'a> Scenarios<'a> {
    /// An empty list for a pool.
    pub fn new(title: &str) -> Self {
        let (first, list, last) = (Vec::new(), Vec::new(), Vec::new());
        Scenarios { title: title.into(), first, list, last, again: AtomicUsize::new(0) }
    }

    /// Lets so many of them be tried a second time, each said loudly (`AGAIN`). For long lists of real clients on
    /// a machine that is short of processors, where dockerd loses what a short container has written
    /// ([`super::client::SAYS`]).
    pub fn second_tries(self, n: usize) -> Self {
        Scenarios { again: AtomicUsize::new(n), ..self }
    }

    /// One that may run beside others.
    pub fn add(&mut self, name: impl Into<String>, run: impl Fn() + Send + Sync + 'a) {
        self.list.extend(self.wanted(name.into(), run));
    }

    /// One that runs alone, before the others.
    pub fn alone(&mut self, name: impl Into<String>, run: impl Fn() + Send + Sync + 'a) {
        self.first.extend(self.wanted(name.into(), run));
    }

    /// One that runs alone, after the others.
    pub fn at_last(&mut self, name: impl Into<String>, run: impl Fn() + Send + Sync + 'a) {
        self.last.extend(self.wanted(name.into(), run));
    }

    /// `DINDPOOL_SCENARIO=WORD` leaves out those without the word.
    fn wanted(&self, name: String, run: impl Fn() + Send + Sync + 'a) -> Option<Scenario<'a>> {
        let word = std::env::var("DINDPOOL_SCENARIO").unwrap_or_default();
        (name.contains(&word) || self.title.contains(&word)).then(|| (name, Box::new(run) as _))
    }

    /// Runs all of them, those that may so `threads` at a time, and fails with the names of those that failed.
    #[track_caller]
    pub fn run(self, threads: usize) {
        let groups = [(&self.first, 1), (&self.list, threads), (&self.last, 1)];
        let failed: Vec<String> = groups.iter().flat_map(|(list, n)| self.outcome(list, *n)).collect();
        assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
    }

    fn outcome(&self, list: &[Scenario<'a>], threads: usize) -> Vec<String> {
        let next = AtomicUsize::new(0);
        let failed = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..threads.min(list.len()) {
                scope.spawn(|| {
                    while let Some((name, run)) = list.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let start = Instant::now();
                        let mut outcome = catch_unwind(AssertUnwindSafe(run));
                        let take = |n: usize| n.checked_sub(1);
                        if let Err(why) = &outcome
                            && self.again.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
                        {
                            say(format!("  AGAIN   {}: {name}\n{}", self.title, words(why.as_ref())));
                            outcome = catch_unwind(AssertUnwindSafe(run));
                        }
                        let time = start.elapsed().as_secs_f64();
                        match outcome {
                            Ok(()) => say(format!("  ok      {}: {name} ({time:.1} s)", self.title)),
                            Err(why) => {
                                let why = words(why.as_ref());
                                say(format!("  FAILED  {}: {name} ({time:.1} s)\n{why}", self.title));
                                failed.lock().unwrap().push(format!("{}: {name}: {why}", self.title));
                            }
                        }
                    }
                });
            }
        });
        failed.into_inner().unwrap()
    }
}

/// What a panic says.
fn words(why: &(dyn std::any::Any + Send)) -> &str {
    let text = why.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| why.downcast_ref::<&str>().copied()).unwrap_or("it panicked")
}
