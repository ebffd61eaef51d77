//! Six sessions at once, ten builds and runs each, BuildKit and classic: 120 of 120.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::common::client::{self, Flavour};
use super::common::scenarios::Scenarios;
use super::common::{say, unique};
use super::{Lab, build};

/// Adds it for each builder.
pub fn add<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    all.at_last("6 sessions × 10 BuildKit builds and runs in parallel: 60 of 60", || {
        load(lab, client::BUILDX_29)
    });
    all.at_last("6 sessions × 10 classic builds and runs in parallel: 60 of 60", || {
        load(lab, client::CLI_28)
    });
}

fn load(lab: &Lab, flavour: Flavour) {
    let (start, done) = (Instant::now(), AtomicUsize::new(0));
    let failures: Vec<String> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..6).map(|_| scope.spawn(|| ten(lab, flavour, &done))).collect();
        workers.into_iter().flat_map(|w| w.join().expect("a session")).collect()
    });
    let done = done.into_inner();
    say(format!("          {}: {done} of 60 in {:.0} s", flavour.name, start.elapsed().as_secs_f64()));
    assert_eq!(done, 60, "{}", failures.join("\n"));
}

fn ten(lab: &Lab, flavour: Flavour, done: &AtomicUsize) -> Vec<String> {
    let t = lab.terminal(flavour);
    t.context("ctx", build::APP);
    let mut failures = Vec::new();
    for _ in 0..10 {
        let mark = unique();
        let out = t.run(&format!(
            "docker build -q --network none --build-arg MARK={mark} -t load:{mark} ctx >&2 && \
             docker run --rm --network none load:{mark}"
        ));
        if out.code == 0 && out.stdout == format!("{mark}\n") {
            done.fetch_add(1, Ordering::Relaxed);
        } else {
            failures.push(format!("exit {}: {}", out.code, out.all()));
        }
    }
    failures
}
