//! Why a session has the daemon that it has, and what it waited for: said by the decision itself, at the moment when it
//! was made, and kept with the binding. A few hundred bytes for each session that has a home.

use std::cmp::Ordering;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Engine;
use super::daemon::Daemon;
use super::model::*;
use super::placement::Placement;

/// How many daemons of a comparison are kept: the best ones.
pub(super) const COMPARED: usize = 6;
/// How much of a name that a client chose is kept.
const LONGEST: usize = 120;

/// Why a daemon was chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "because", rename_all = "kebab-case")]
pub enum Because {
    /// It is the session's own already.
    Own,
    /// Another session of the same client is there, and not all of the client's connections can say whose they are.
    Client {
        /// That session.
        session: SessionKey,
    },
    /// What the request needs is there, and nowhere else.
    Needs {
        /// What it is.
        what: String,
    },
    /// It was the session's daemon before, and has a free slot.
    Former,
    /// The build of a known project is expected to be done first there.
    DoneFirst {
        /// What is built.
        project: String,
        /// Whether it has built that before.
        warm: bool,
        /// What was compared, the best in front.
        compared: Vec<Compared>,
    },
    /// The wait there is the least.
    LeastWait {
        /// How many are as good; one of them was drawn.
        equals: usize,
        /// The image that the request needs is there already.
        image: bool,
        /// What was compared, the best in front.
        compared: Vec<Compared>,
    },
}

/// One daemon of a comparison, as it was then.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    /// Which.
    pub daemon: DaemonId,
    /// Slots in use, strangers' included.
    pub used: u32,
    /// Slots that were open.
    pub slots: u32,
    /// Sessions with a lease.
    pub sessions: usize,
    /// What counted against its health, in slots.
    pub against: f64,
    /// Whether it had built the project.
    #[serde(default)]
    pub warm: bool,
    /// Builds of known projects that waited for it.
    #[serde(default)]
    pub waiting: u32,
    /// Of a known project: when the build would be done there, in builds with a cache; the least wins.
    #[serde(default)]
    pub cost: Option<f64>,
}

/// What a ticket waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "for", rename_all = "kebab-case")]
pub enum Awaited {
    /// A free slot on any daemon.
    Slot,
    /// A free slot on this one: the session belongs there, or what it needs is there.
    Daemon {
        /// Which.
        daemon: DaemonId,
    },
    /// The same, because it has built the project; after `warm_wait` any other will do.
    Warm {
        /// Which.
        daemon: DaemonId,
    },
    /// Its tenant holds as many slots as it may.
    Quota,
    /// Others came before it.
    Turn,
    /// No daemon takes sessions yet.
    Start,
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Awaited::Slot => f.write_str("a free slot on any daemon"),
            Awaited::Daemon { daemon } => write!(f, "a free slot on {daemon}, where what it needs is"),
            Awaited::Warm { daemon } => {
                write!(f, "a free slot on {daemon}, which has built its project before")
            }
            Awaited::Quota => f.write_str("its tenant's own slots: it holds as many as it may"),
            Awaited::Turn => f.write_str("its turn: others came before it"),
            Awaited::Start => f.write_str("a daemon to start or to recover"),
        }
    }
}

/// Why a session is where it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Why {
    /// Why that daemon.
    pub because: Because,
    /// How long the request that bound it waited.
    pub waited: Time,
    /// For what, if it did.
    pub awaited: Option<Awaited>,
}

impl fmt::Display for Because {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Because::Own => f.write_str("it was the session's own: what it made is there"),
            Because::Client { session } => {
                write!(
                    f,
                    "session {session} of the same client is there, and they cannot be told apart always"
                )
            }
            Because::Needs { what } => write!(f, "{what} is there"),
            Because::Former => f.write_str("it was there before, and a slot was free"),
            Because::DoneFirst { project, warm: true, .. } => {
                write!(f, "it has built {project} before, and the build is done first there")
            }
            Because::DoneFirst { project, warm: false, .. } => {
                write!(f, "the build of {project} is done first there, although it has not built it before")
            }
            Because::LeastWait { equals, image, .. } => {
                f.write_str("the expected wait is the least there")?;
                if *image {
                    f.write_str(", and it has the image")?;
                }
                match equals {
                    0 | 1 => Ok(()),
                    n => write!(f, " ({n} daemons were equal)"),
                }
            }
        }
    }
}

impl Compared {
    /// A daemon as the least expected wait sees it.
    pub(super) fn of(daemon: &Daemon) -> Self {
        let taken = daemon.taken();
        Compared {
            daemon: daemon.id.clone(),
            used: taken,
            slots: daemon.capacity(),
            sessions: daemon.sessions.len(),
            against: (daemon.expected_load() - 4 * u64::from(taken)) as f64 / 4.0,
            warm: false,
            waiting: 0,
            cost: None,
        }
    }
}

/// The best of `daemons`, in order. Looks at each once, however many there are.
pub(super) fn best<'a, T>(
    mut daemons: Vec<T>,
    order: impl Fn(&T, &T) -> Ordering,
    tell: impl Fn(&T) -> Compared + 'a,
) -> Vec<Compared> {
    if daemons.len() > COMPARED {
        daemons.select_nth_unstable_by(COMPARED - 1, &order);
        daemons.truncate(COMPARED);
    }
    daemons.sort_unstable_by(&order);
    daemons.iter().map(tell).collect()
}

/// A name that a client chose, short enough to keep.
pub(super) fn short(name: &str) -> String {
    match name.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_string(),
    }
}

impl Engine {
    /// What a request that has to wait waits for.
    pub(super) fn awaited(&self, acquire: &Acquire, placement: &Placement) -> Awaited {
        let Placement::Bind(daemon, because) = placement else { return Awaited::Start };
        if self.tenant_is_full(&acquire.tenant) {
            return Awaited::Quota;
        }
        if self.has_room(daemon) {
            return Awaited::Turn;
        }
        let daemon = daemon.clone();
        match because {
            Because::DoneFirst { warm: true, .. } => Awaited::Warm { daemon },
            Because::DoneFirst { .. } | Because::LeastWait { .. } => Awaited::Slot,
            _ => Awaited::Daemon { daemon },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_the_best_are_told_in_order() {
        let daemons: Vec<Daemon> = (0..50)
            .map(|i| {
                let mut daemon = Daemon::new(format!("d{i}").into(), Some(100));
                daemon.used = (i * 37) % 50;
                daemon
            })
            .collect();
        let told = best(daemons.iter().collect(), |a, b| a.used.cmp(&b.used), |d| Compared::of(d));
        assert_eq!(told.iter().map(|c| c.used).collect::<Vec<_>>(), (0..COMPARED as u32).collect::<Vec<_>>());
    }

    #[test]
    fn a_long_name_is_cut_between_characters() {
        assert_eq!(short("ü"), "ü");
        assert_eq!(short(&"ü".repeat(500)).chars().count(), LONGEST + 1);
    }
}
