//! `dindpool simulate scaling`: what the autoscaler is worth, against others on the same day.
//!
//! The day is one of a CI system: quiet at night but for a batch at two o'clock, busy from nine to six, with bursts.
//! Every second the daemons start, work and end; at their own pace the scalers look. The autoscaler is the very code that
//! runs in the pool. What the others do is what the manuals of the Horizontal Pod Autoscaler and of KEDA say, at its
//! best: they see the load without delay, and KEDA counts what runs, too. They choose nobody when they scale down, so
//! builds die with their daemons, and are begun anew.

mod day;
mod policies;

use serde::Serialize;

use super::median;
pub use day::Day;
use day::{Outcome, World};

/// What is simulated.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The day.
    pub day: Day,
    /// The first seed.
    pub seed: u64,
    /// How many seeds; figures are medians over them.
    pub seeds: u64,
}

/// What a policy did.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// Its name.
    pub policy: String,
    /// From a build's arrival to its start, the median, in seconds.
    pub median: f64,
    /// The same, for one build in a hundred it took longer.
    pub p99: f64,
    /// Hours of daemons that were there, or starting, and had no build.
    pub idle: f64,
    /// Hours of daemons in all.
    pub hours: f64,
    /// Builds that died with their daemon.
    pub killed: f64,
    /// How often the number of daemons was changed.
    pub changes: f64,
}

/// The autoscaler's line with its defaults.
pub const OURS: &str = "dindpool";

/// Runs every policy on the same days.
pub fn run(plan: &Plan) -> Vec<Line> {
    let seeds = plan.seed..plan.seed + plan.seeds.max(1);
    policies::all(&plan.day)
        .into_iter()
        .map(|(policy, make)| {
            let outcomes: Vec<Outcome> =
                seeds.clone().map(|seed| World::run(&plan.day, seed, &mut *make(seed))).collect();
            let figure = |of: fn(&Outcome) -> f64| median(outcomes.iter().map(of).collect());
            Line {
                policy,
                median: figure(|o| o.median),
                p99: figure(|o| o.p99),
                idle: figure(|o| o.idle),
                hours: figure(|o| o.hours),
                killed: figure(|o| f64::from(o.killed)),
                changes: figure(|o| f64::from(o.changes)),
            }
        })
        .collect()
}

/// The lines as a Markdown table.
pub fn table(lines: &[Line]) -> String {
    let mut out = String::from(
        "| policy | build waits, median s | p99 s | idle daemon-hours | daemon-hours | builds killed | changes |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for Line { policy, median, p99, idle, hours, killed, changes } in lines {
        out.push_str(&format!(
            "| {policy} | {median:.0} | {p99:.0} | {idle:.1} | {hours:.1} | {killed:.0} | {changes:.0} |\n"
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use policies::{Ours, Scaler};

    fn small() -> Day {
        Day { hours: 6, begins: 8, ..Day::default() }
    }

    #[test]
    fn the_autoscaler_is_quicker_than_the_others_and_costs_no_build() {
        let lines = run(&Plan { day: small(), seed: 1, seeds: 1 });
        let told = table(&lines);
        let of = |name: &str| {
            lines.iter().find(|line| line.policy.starts_with(name)).unwrap_or_else(|| panic!("{told}"))
        };
        let ours = of(OURS);
        // From zero, as KEDA; with as much in reserve as HPA's target leaves.
        for (ours, other) in [(ours, of("KEDA")), (of("dindpool, spare 25%"), of("HPA"))] {
            assert!(ours.p99 < other.p99 && other.killed > 0.0, "{told}");
        }
        assert!(of("dindpool, spare 25%").idle < of("HPA").idle, "{told}");
        assert!(lines.iter().filter(|l| l.policy.starts_with(OURS)).all(|l| l.killed == 0.0), "{told}");
        let fixed = of("fixed");
        assert!(ours.idle < fixed.idle / 2.0, "{told}");
        assert_eq!((fixed.changes, fixed.killed), (1.0, 0.0), "made once");
    }

    /// Looks over the autoscaler's shoulder.
    struct Watched {
        ours: Ours,
        day: Day,
        looks: u32,
    }

    impl Scaler for Watched {
        fn look(&mut self, world: &World) -> Vec<policies::Act> {
            assert!(world.there() <= self.day.max, "{} daemons", world.there());
            self.looks += 1;
            if self.looks.is_multiple_of(60) {
                // Whatever it remembers: more work asks for no fewer daemons.
                let mut before = 0;
                for more in [0, 1, 2, 5, 20] {
                    let desired = self.ours.clone().desired(world, more);
                    assert!((before..=self.day.max).contains(&desired), "{before} then {desired}");
                    before = desired;
                }
            }
            self.ours.look(world)
        }
    }

    #[test]
    fn on_any_day_it_stays_within_its_bounds_asks_for_more_for_more_and_kills_nobody() {
        for seed in 0..3 {
            let day =
                Day { hours: 5, begins: 7, max: 4 + u32::try_from(seed).unwrap() * 4, ..Day::default() };
            let mut watched = Watched { ours: Ours::new(&day, "0"), day: day.clone(), looks: 0 };
            let outcome = World::run(&day, seed, &mut watched);
            assert_eq!(outcome.killed, 0, "seed {seed}");
            assert!(outcome.changes > 4, "seed {seed}: it was put to the test");
        }
    }

    #[test]
    fn a_steady_load_does_not_make_it_flap() {
        let steady = Day { steady: Some(7), hours: 5, ..Day::default() };
        for seed in 0..3 {
            let outcome = World::run(&steady, seed, &mut Ours::new(&steady, "0"));
            assert!(outcome.changes <= 6, "seed {seed}: {} changes", outcome.changes);
            assert_eq!(outcome.late, 0, "seed {seed}: none after the first hour");
        }
    }

    #[test]
    fn a_day_depends_on_nothing_but_its_seed() {
        let day = Day { hours: 2, begins: 9, ..Day::default() };
        let once = |seed| World::run(&day, seed, &mut Ours::new(&day, "0"));
        assert_eq!((once(3), once(3) == once(4)), (once(3), false));
    }
}
