//! The pool's own engine as one of the policies: the very code that serves requests.

use std::collections::HashMap;
use std::time::Duration;

use super::world::{Policy, World};
use crate::engine::model::*;
use crate::engine::{Config, Engine};

/// A mean warm build in the engine's time.
const UNIT: f64 = 60.0;

/// The engine with its defaults, as if every build were a session of its own.
pub struct Ours {
    engine: Engine,
    opens: HashMap<usize, OpenId>,
    now: Time,
}

impl Ours {
    /// An engine in front of healthy daemons.
    pub fn new(daemons: usize, slots: usize, seed: u64) -> Self {
        let config = Config {
            // What a session keeps between two builds is another story.
            grace: Duration::ZERO,
            linger: Duration::ZERO,
            memory: Duration::ZERO,
            // All builds of a batch wait, for as long as it takes.
            queue_limit: usize::MAX,
            max_wait: Duration::from_secs(1 << 30),
            deep_probe_interval: Duration::ZERO,
            ..Config::default()
        };
        let mut engine = Engine::new(config, seed);
        let observed = |d: usize| Observed {
            id: name(d),
            draining: false,
            pending: None,
            slots: u32::try_from(slots).ok(),
        };
        engine.handle(Event::Observed((0..daemons).map(observed).collect()), Duration::ZERO);
        for daemon in (0..daemons).map(name) {
            let facts = Facts { api_min: (1, 24), api_max: (1, 51), ..Facts::default() };
            engine.handle(Event::Probed { daemon, probe: Probe::Answered(facts) }, Duration::ZERO);
        }
        Ours { engine, opens: HashMap::new(), now: Time::ZERO }
    }

    fn tell(&mut self, world: &mut World, event: Event) {
        let now = Duration::from_secs_f64(world.now * UNIT);
        // What is due now must not be missed by a rounding.
        let due = self.engine.next_tick().filter(|_| event == Event::Tick);
        let now = now.max(due.unwrap_or_default()).max(self.now);
        self.now = now;
        for effect in self.engine.handle(event, now) {
            if let Effect::Granted { request, open, daemon, .. } = effect {
                let build = request.0 as usize;
                self.opens.insert(build, open);
                let daemon = daemon.as_str().parse().unwrap_or_default();
                world.start(build, daemon);
            }
        }
    }
}

fn name(daemon: usize) -> DaemonId {
    format!("{daemon:04}").into()
}

impl Policy for Ours {
    fn arrive(&mut self, world: &mut World, build: usize) {
        let project = world.builds[build].project;
        let acquire = Acquire {
            request: RequestId(build as u64),
            key: format!("name:{build}").into(),
            tenant: "default".into(),
            source: None,
            inside: None,
            shares_names: false,
            class: Class::Work(Work::Build),
            target: None,
            requirements: Requirements {
                project: Some(format!("default/{project}").into()),
                ..Requirements::default()
            },
            deadline: None,
        };
        self.tell(world, Event::Acquire(acquire));
    }

    fn end(&mut self, world: &mut World, build: usize, _daemon: usize) {
        if let Some(open) = self.opens.remove(&build) {
            self.tell(world, Event::Release { open, outcome: Outcome::Done });
        }
    }

    fn wakes(&self) -> Option<f64> {
        self.engine.next_tick().map(|at| at.as_secs_f64() / UNIT)
    }

    fn wake(&mut self, world: &mut World) {
        self.tell(world, Event::Tick);
    }
}
