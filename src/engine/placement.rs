//! Where one request goes (design, decision 1): facts first, then the session's own daemon, then what its
//! client's other connections are bound to, then the balancer.

use std::collections::BTreeSet;

use super::balancer;
use super::images::Found;
use super::model::*;
use super::{Daemon, Engine};

/// The decision about one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Placement {
    /// It goes there and the session is bound there.
    Bind(DaemonId),
    /// It goes there and changes nothing about the session.
    Route(DaemonId),
    /// It goes nowhere.
    Refuse(Refusal),
}

/// Daemons that a request is limited to, or would do better on.
enum Limit {
    Only(Vec<DaemonId>),
    Better(Vec<DaemonId>),
}

impl Engine {
    pub(super) fn place(&mut self, acquire: &Acquire) -> Placement {
        if let Some(parent) = acquire.inside.as_ref().filter(|d| self.daemons.contains_key(*d)) {
            return Placement::Route(parent.clone());
        }
        if let Some(target) = &acquire.target
            && let Some(placement) = self.place_by_target(acquire, target)
        {
            return placement;
        }
        match self.limit(acquire) {
            Some(Limit::Only(daemons)) => self.place_within(acquire, &daemons),
            Some(Limit::Better(daemons)) => self.place_freely(acquire, &daemons),
            None => self.place_freely(acquire, &[]),
        }
    }

    /// The daemon of the object in the request's path.
    fn place_by_target(&mut self, acquire: &Acquire, target: &ObjectRef) -> Option<Placement> {
        let own = self.home_of(acquire);
        let daemons = self.objects.resolve(target.kind, &target.reference, &acquire.tenant);
        if own.as_ref().is_some_and(|own| daemons.contains(own)) {
            return None; // It is where the session is.
        }
        match &daemons[..] {
            [] => {
                let lost = self.objects.lost_with(&target.reference).cloned();
                let lost = lost.or_else(|| {
                    // A name on a daemon that went: the session that knew it is told, once it asks.
                    let session = self.sessions.get(&acquire.key)?;
                    session.lost.clone().filter(|_| target.kind != Kind::BuildSession)
                })?;
                Some(Placement::Refuse(Refusal::SessionLost(format!(
                    "session lost: its daemon {lost} has gone, and {} with it",
                    target.reference
                ))))
            }
            // `/session` came before its `/build`, under another key: the build follows it.
            [one] if target.kind == Kind::BuildSession => {
                Some(self.place_within(acquire, std::slice::from_ref(one)))
            }
            [one] => Some(Placement::Route(one.clone())),
            // Several, and the session has a daemon of its own: that one says "no such container".
            _ if own.is_some() => None,
            several => Some(Placement::Refuse(Refusal::Ambiguous(format!(
                "{} exists on {} daemons of the pool ({}) and on none of this session's: use its full id",
                target.reference,
                several.len(),
                names(several)
            )))),
        }
    }

    /// Where an image or the objects beside a new container are. The first that limits wins; the next ones
    /// narrow it as long as something is left.
    fn limit(&self, acquire: &Acquire) -> Option<Limit> {
        let own = self.home_of(acquire);
        let mut only: Option<BTreeSet<DaemonId>> = None;
        let mut narrow = |daemons: Vec<DaemonId>| {
            let set: BTreeSet<DaemonId> = daemons.into_iter().collect();
            only = match only.take() {
                Some(old) if old.is_disjoint(&set) => Some(old),
                Some(old) => Some(&old & &set),
                None => Some(set),
            };
        };
        let (containers, others): (Vec<_>, Vec<_>) =
            acquire.requirements.beside.iter().partition(|o| o.kind == Kind::Container);
        let resolve = |o: &&ObjectRef| {
            let daemons = self.objects.resolve(o.kind, &o.reference, &acquire.tenant);
            match &own {
                Some(own) if daemons.contains(own) => Some(vec![own.clone()]),
                _ if daemons.len() == 1 => Some(daemons),
                _ => None,
            }
        };
        containers.iter().filter_map(resolve).for_each(&mut narrow);
        let mut better = None;
        if let Some(image) = &acquire.requirements.image {
            let made_here = own.as_ref().filter(|own| self.images.made_by(&acquire.key, own, image)).cloned();
            match (made_here, self.images.find(image, &acquire.tenant)) {
                (Some(own), _) => narrow(vec![own]),
                (None, Found::Only(daemons)) => narrow(daemons),
                // Starting a container elsewhere pulls it there; anything else needs it where it is.
                (None, Found::Better(daemons)) if matches!(acquire.class, Class::Work(_)) => {
                    better = Some(daemons);
                }
                (None, Found::Better(daemons)) => narrow(daemons),
                (None, Found::Nowhere) => {}
            }
        }
        others.iter().filter_map(resolve).for_each(&mut narrow);
        match only {
            Some(only) => Some(Limit::Only(only.into_iter().collect())),
            None => better.map(Limit::Better),
        }
    }

    /// Only these daemons will do.
    fn place_within(&mut self, acquire: &Acquire, daemons: &[DaemonId]) -> Placement {
        let own = self.home_of(acquire);
        if let Some(own) = own.filter(|own| daemons.contains(own)) {
            return self.at_home(acquire, own);
        }
        let chosen = balancer::least_wait(
            self.daemons.values().filter(|d| daemons.contains(&d.id) && d.takes_sessions()),
            &mut self.random,
        )
        .cloned()
        // What exists on one daemon only is asked for there, also while it takes no new sessions.
        .or_else(|| daemons.iter().find(|d| self.daemons.contains_key(*d)).cloned());
        let Some(chosen) = chosen else { return self.place_freely(acquire, &[]) };
        let binds = matches!(acquire.class, Class::Work(_) | Class::Join)
            && self.sessions.get(&acquire.key).is_none_or(|s| s.movable());
        if binds { Placement::Bind(chosen) } else { Placement::Route(chosen) }
    }

    /// Any daemon will do; `better` ones at equal load.
    fn place_freely(&mut self, acquire: &Acquire, better: &[DaemonId]) -> Placement {
        if let Some(own) = self.home_of(acquire) {
            return self.at_home(acquire, own);
        }
        let binds = matches!(acquire.class, Class::Work(_) | Class::Join);
        if let Some(former) = self.former(acquire) {
            return if binds { Placement::Bind(former) } else { Placement::Route(former) };
        }
        let api = acquire.requirements.api;
        let serves = |d: &&Daemon| {
            d.takes_sessions()
                && d.facts.as_ref().is_none_or(|f| api.is_none_or(|v| f.api_min <= v && v <= f.api_max))
        };
        let arch = acquire.requirements.arch.as_deref();
        let fits = |d: &&Daemon| serves(d) && d.facts.as_ref().is_some_and(|f| Some(f.arch.as_str()) == arch);
        let narrowed = arch.is_some() && self.daemons.values().any(|d| fits(&d));
        let able = |d: &&Daemon| if narrowed { fits(d) } else { serves(d) };
        let chosen = if binds {
            let pick = balancer::least_wait(self.daemons.values().filter(able), &mut self.random);
            let load = |d: &Daemon| f64::from(d.used) / f64::from(d.slots.max(1));
            let least = pick.and_then(|id| self.daemons.get(id)).map(load);
            let warm = self
                .daemons
                .values()
                .filter(able)
                .filter(|d| better.contains(&d.id) && least.is_some_and(|least| load(d) <= least));
            balancer::least_wait(warm, &mut self.random).or(pick)
        } else {
            balancer::rendezvous(self.daemons.values().filter(able), acquire.key.as_str())
        };
        match chosen {
            Some(daemon) if binds => Placement::Bind(daemon.clone()),
            Some(daemon) => Placement::Route(daemon.clone()),
            None => Placement::Refuse(self.why_nobody(api)),
        }
    }

    /// The request goes to the daemon that its session is bound to, whatever the health of that: a bound
    /// session never silently moves.
    fn at_home(&self, acquire: &Acquire, own: DaemonId) -> Placement {
        match acquire.class {
            Class::Work(_) | Class::Join => Placement::Bind(own),
            _ => Placement::Route(own),
        }
    }

    /// The daemon that the session belongs to: its own binding, else that of its client's other connections.
    fn home_of(&self, acquire: &Acquire) -> Option<DaemonId> {
        if let Some(own) = self.home(&acquire.key) {
            return Some(own.clone());
        }
        let group = acquire.source.as_ref().unwrap_or(&acquire.key);
        let sibling = self.sources.get(group)?.first()?;
        self.home(sibling).cloned()
    }

    /// The daemon that the session was bound to last, while it would be taken anyway.
    fn former(&self, acquire: &Acquire) -> Option<DaemonId> {
        let home = self.sessions.get(&acquire.key)?.home.as_ref()?;
        let daemon = self.daemons.get(&home.daemon)?;
        (daemon.takes_sessions() && daemon.used < daemon.slots).then(|| daemon.id.clone())
    }

    /// The sentence that says what was tried.
    fn why_nobody(&self, api: Option<ApiVersion>) -> Refusal {
        if let Some((major, minor)) = api
            && self.daemons.values().any(Daemon::takes_sessions)
            && let Some((min, max)) = self.range
        {
            let (word, limit) = if (major, minor) > max { ("new", max) } else { ("old", min) };
            return Refusal::ApiVersion(format!(
                "client version {major}.{minor} is too {word}. {} supported API version of this pool is {}.{}",
                if word == "new" { "Maximum" } else { "Minimum" },
                limit.0,
                limit.1
            ));
        }
        if self.daemons.is_empty() {
            return Refusal::NoDaemon("no daemon: the pool is empty".into());
        }
        let mut tried: Vec<String> = self
            .daemons
            .values()
            .take(8)
            .map(|d| {
                let what = match (d.state, d.health, d.misfit) {
                    (State::Starting, _, _) => "starting",
                    (State::Draining, _, _) => "draining",
                    (_, Health::Ejected, _) => "ejected",
                    (_, _, true) => "refused",
                    _ => "ready",
                };
                if d.reason.is_empty() {
                    format!("{} {what}", d.id)
                } else {
                    format!("{} {what} ({})", d.id, d.reason)
                }
            })
            .collect();
        if self.daemons.len() > tried.len() {
            tried.push(format!("and {} more", self.daemons.len() - tried.len()));
        }
        Refusal::NoDaemon(format!("no healthy daemon in the pool: {}", tried.join(", ")))
    }
}

fn names(daemons: &[DaemonId]) -> String {
    daemons.iter().map(DaemonId::as_str).collect::<Vec<_>>().join(", ")
}
