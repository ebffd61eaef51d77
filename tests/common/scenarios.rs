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
    list: Vec<Scenario<'a>>,
}

impl<'a> Scenarios<'a> {
    /// An empty list for a pool.
    pub fn new(title: &str) -> Self {
        Scenarios { title: title.into(), list: Vec::new() }
    }

    /// One more. `DINDPOOL_SCENARIO=WORD` leaves out those without the word.
    pub fn add(&mut self, name: impl Into<String>, run: impl Fn() + Send + Sync + 'a) {
        let name = name.into();
        let wanted = std::env::var("DINDPOOL_SCENARIO").unwrap_or_default();
        if name.contains(&wanted) || self.title.contains(&wanted) {
            self.list.push((name, Box::new(run)));
        }
    }

    /// Runs all of them, `threads` at a time, and fails with the names of those that failed.
    #[track_caller]
    pub fn run(self, threads: usize) {
        let failed = self.outcome(threads);
        assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
    }

    fn outcome(&self, threads: usize) -> Vec<String> {
        let next = AtomicUsize::new(0);
        let failed = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..threads.min(self.list.len()) {
                scope.spawn(|| {
                    while let Some((name, run)) = self.list.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let start = Instant::now();
                        let outcome = catch_unwind(AssertUnwindSafe(run));
                        let time = start.elapsed().as_secs_f64();
                        match outcome {
                            Ok(()) => say(format!("  ok      {}: {name} ({time:.1} s)", self.title)),
                            Err(why) => {
                                let why = why
                                    .downcast_ref::<String>()
                                    .map(String::as_str)
                                    .or_else(|| why.downcast_ref::<&str>().copied())
                                    .unwrap_or("it panicked");
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
