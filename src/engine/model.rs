//! The words of the engine: plain data that can be recorded, replayed and sent to another process.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Time since an origin of the shell's choosing, on a monotonic clock. The engine never reads a clock.
pub type Time = Duration;

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub Arc<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                $name(text.into())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                $name(text.into())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// A daemon of the pool, as its provisioner names it.
    DaemonId
);
name!(
    /// How the proxy recognises a session, with its kind in front (`ip:10.0.0.7`, `posix:812@44190`,
    /// `job:CI_JOB_ID=17`, `name:release`) and the tenant before that unless it is `default`.
    SessionKey
);
name!(
    /// Who a session belongs to. `default` unless the listener or the path says otherwise.
    Tenant
);

name!(
    /// What is built again and again, and leaves a cache behind: an image's repository, or what the client says.
    /// The tenant is part of it.
    ProjectKey
);

/// One request or stream that is open, or one that waits for its daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct OpenId(pub u64);

/// The shell's own number of an acquisition, so that it finds the answer among the effects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u64);

/// A session's binding to a daemon. The epoch is that of the engine that granted it: after a hand-over or a
/// restart an old lease can be told from a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeaseId {
    /// The engine's epoch, one higher after each restart or hand-over.
    pub epoch: u64,
    /// Counts the leases of this epoch.
    pub number: u64,
}

/// An API version, `(major, minor)`.
pub type ApiVersion = (u16, u16);

/// Work that is admitted: it takes a slot (design, decision 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Work {
    /// `POST /build`: a build until its stream ends.
    Build,
    /// A `/grpc` connection that sent an HTTP/2 preface. Whether it builds is seen only when it calls
    /// `Control/Solve` ([`Event::BuildSeen`]): a buildx build opens two, one of which only lists workers.
    BuildKit,
    /// `POST /images/create?fromImage=`: a unit until its stream ends, inside the session's one slot.
    Pull,
    /// `POST /images/load` and `/images/create?fromSrc=`: the same, but what it makes exists nowhere else.
    Load,
    /// `POST /containers/create`: the container is a unit until it exits, 60 s if it is never started.
    Container,
    /// `POST /networks/create`, `/volumes/create`: binds the session.
    Resource,
}

/// What a request needs of the session's binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Class {
    /// Starts work: binds the session, takes a slot.
    Work(Work),
    /// Belongs to work under way (`/session`, `/build/cancel`): binds the session, takes no slot.
    Join,
    /// Acts on what exists (exec, attach, start, push, delete): follows objects and the session, binds nothing.
    Follow,
    /// Removes an image: the same, but not by a name that another session has made for what it works with.
    Remove,
    /// Reads (lists, events): a preference only.
    Read,
    /// Any daemon will do (info, auth, search, distribution).
    Any,
}

/// A kind of named object on a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// A container, by id, id prefix or name.
    Container,
    /// A network, by id, id prefix or name.
    Network,
    /// A volume, by name.
    Volume,
    /// An exec, by full id.
    Exec,
    /// A BuildKit client session, by its uuid.
    BuildSession,
    /// A compose project: it is wherever a container, network or volume with its label is.
    Project,
}

/// An object that a request names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ObjectRef {
    /// What it is.
    pub kind: Kind,
    /// How the request names it.
    pub reference: String,
}

/// What the daemon must have or be able to do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requirements {
    /// The API version in the request's path.
    pub api: Option<ApiVersion>,
    /// The architecture asked for (`platform=`), a preference among daemons: one that emulates it may do.
    pub arch: Option<String>,
    /// The image that the request names, normalised by [`super::images::normalise`].
    pub image: Option<String>,
    /// Other objects that a new container refers to: containers whose network or volumes it shares,
    /// networks, named volumes.
    pub beside: Vec<ObjectRef>,
    /// What it is going to make, by name: daemons where another's of that name is in its way are left out, as long as
    /// others are there.
    pub apart: Vec<ObjectRef>,
    /// What is built, a preference for daemons that have built it before.
    pub project: Option<ProjectKey>,
}

/// Asks for a daemon: the only way from the proxy to the engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Acquire {
    /// Comes back in the answer.
    pub request: RequestId,
    /// Whose request it is.
    pub key: SessionKey,
    /// Who waits.
    pub tenant: Tenant,
    /// The key of the client's source, when `key` is an explicit one. Connections of the same client that
    /// cannot carry the explicit key (buildx's `/grpc` and `/session`) have this one, so both go to one daemon.
    pub source: Option<SessionKey>,
    /// The daemon that the client itself runs on, in a container: it goes there and needs no slot. Otherwise
    /// it would wait for its own parent.
    pub inside: Option<DaemonId>,
    /// Whether the names of what other sessions made mean anything to it. Terminals of one machine see each
    /// other's containers and compose projects; two CI jobs that both call theirs `db` must not.
    pub shares_names: bool,
    /// What kind of request it is.
    pub class: Class,
    /// The object in the request's path, if any.
    pub target: Option<ObjectRef>,
    /// What the daemon must have.
    pub requirements: Requirements,
    /// Until when the request may wait for a slot.
    pub deadline: Option<Time>,
}

impl Acquire {
    /// Whether what it names, or needs, may exist on some daemons only.
    pub(super) fn is_led(&self) -> bool {
        let Requirements { image, beside, .. } = &self.requirements;
        self.target.is_some() || image.is_some() || !beside.is_empty()
    }
}

/// Why a request gets no daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// No daemon is ready and healthy; the text says what was tried.
    NoDaemon(String),
    /// Daemons are well, but none serves this API version.
    ApiVersion(String),
    /// The name exists on several daemons and none of them is this session's.
    Ambiguous(String),
    /// The name means nothing to this session: only others have made something of that name.
    NotFound(String),
    /// The session's daemon has gone, and everything on it.
    SessionLost(String),
    /// The queue is full.
    QueueFull(String),
    /// As many of this tenant wait as may.
    TenantFull(String),
    /// The longest wait is over.
    LongestWait(String),
}

/// How a request or stream ended, as far as it matters to decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Outcome {
    /// Finished in order.
    Done,
    /// Finished in order, and what it was to do was not done: its answer, or its stream, says so.
    Failed,
    /// Finished in order, with a server error (500 or above) for an answer.
    Erred,
    /// The client went away.
    ClientGone,
    /// The daemon broke the connection, or answered nonsense.
    DaemonFailed,
    /// The daemon could not be connected to: no byte of the request reached it.
    Unreached,
    /// The proxy ended it (shutdown, a protocol error of the client).
    Aborted,
}

/// What a daemon says of itself (`/info`, `/version`, `/_ping`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// `/info` ID. Equal ids are a hint only: 20.10 daemons of one host share `/etc/docker/key.json`.
    pub engine_id: String,
    /// Engine version, `28.5.2`.
    pub version: String,
    /// Highest API version that it serves.
    pub api_max: ApiVersion,
    /// Lowest API version that it serves.
    pub api_min: ApiVersion,
    /// `amd64`, `arm64`: `/version` Arch.
    pub arch: String,
    /// Processors that the daemon sees.
    pub cpus: u32,
    /// Memory that the daemon sees, in bytes.
    pub memory: u64,
}

/// The result of one probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Probe {
    /// `/info` answered in time.
    Answered(Facts),
    /// It did not answer in time, or not with what a daemon says.
    Failed(String),
    /// The connection was refused or reset: nobody is there.
    Refused(String),
}

/// The result of one deep probe: the daemon was given something to write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeepProbe {
    /// It wrote it.
    Wrote,
    /// It said why not, or broke off.
    Failed(String),
    /// It did not answer in time, as one with a busy disk may.
    Slow(String),
    /// It does not take what it would have to write (an authorisation plugin): it is not judged by it.
    Unsupported,
    /// No connection came about: whether it can write is as known as before.
    Unreached,
}

/// Why a daemon is ejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Cause {
    /// Its connections are refused.
    Refused,
    /// It does not answer `/info`.
    Silent,
    /// It cannot write.
    Writes,
}

/// How an image reference came to point to what it points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Written {
    /// By work that exists only on this daemon: build, load, import, commit, tag.
    Made,
    /// From a registry: any daemon could do the same.
    Pulled,
    /// Found on the daemon; nobody in this pool is known to have written it.
    Found,
}

/// An image as `/images/json` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedImage {
    /// `sha256:…`
    pub id: String,
    /// RepoTags, normalised.
    pub references: Vec<String>,
    /// Whether it has a RepoDigest: then a registry has it too.
    pub in_registry: bool,
}

/// A container as `/containers/json?all=1` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedContainer {
    /// Full id.
    pub id: String,
    /// Its names, without the leading slash.
    pub names: Vec<String>,
    /// Whether it runs (or is paused or restarting).
    pub running: bool,
}

/// Everything on a daemon, as its lists gave it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// All containers.
    pub containers: Vec<ListedContainer>,
    /// Networks: id and name. The built-in ones (bridge, host, none) are left out.
    pub networks: Vec<(String, String)>,
    /// Volumes by name.
    pub volumes: Vec<String>,
    /// Images.
    pub images: Vec<ListedImage>,
    /// The compose projects of all these: kind, id, project.
    pub projects: Vec<(Kind, String, String)>,
}

/// Something learned about an object on a daemon, from a response or from `/events`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fact {
    /// A container, network, volume or exec exists. `names` may be empty (`/events` tells a generated name).
    Created {
        /// What it is.
        kind: Kind,
        /// Full id; for a volume its name.
        id: String,
        /// Its name, when known.
        name: Option<String>,
    },
    /// An object carries the label of a compose project.
    Labelled {
        /// What it is.
        kind: Kind,
        /// Full id; for a volume its name.
        id: String,
        /// The project.
        project: String,
    },
    /// A container runs.
    Started {
        /// Full id.
        id: String,
    },
    /// A container has exited.
    Stopped {
        /// Full id.
        id: String,
    },
    /// A container has another name.
    Renamed {
        /// Full id.
        id: String,
        /// The new name.
        name: String,
    },
    /// An object is gone.
    Removed {
        /// What it was.
        kind: Kind,
        /// Full id; for a volume its name.
        id: String,
    },
    /// An image reference was written.
    ImageWritten {
        /// Normalised reference.
        reference: String,
        /// `sha256:…` when known.
        id: Option<String>,
        /// How.
        written: Written,
    },
    /// An image reference (or an image by id, with all its references) is gone.
    ImageRemoved {
        /// Normalised reference, or `sha256:…`.
        reference: String,
    },
    /// An image reference was pushed: it no longer holds its maker to the daemon.
    ImagePushed {
        /// Normalised reference.
        reference: String,
    },
}

/// A daemon as the provisioner observes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// Its name.
    pub id: DaemonId,
    /// No new sessions: it is being deleted.
    pub draining: bool,
    /// Why it is not there yet.
    pub pending: Option<String>,
    /// Slots; `None` derives them from [`Facts`].
    pub slots: Option<u32>,
}

/// What happens to the engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// The whole pool, as the provisioner knows it.
    Observed(Vec<Observed>),
    /// A probe's result.
    Probed {
        /// Which daemon.
        daemon: DaemonId,
        /// What came of it.
        probe: Probe,
    },
    /// How long the answer to a probe took.
    Timed {
        /// Which daemon.
        daemon: DaemonId,
        /// The time from the request to its answer.
        took: Time,
    },
    /// A deep probe's result.
    Wrote {
        /// Which daemon.
        daemon: DaemonId,
        /// What came of it.
        result: DeepProbe,
    },
    /// What was written through one daemon was seen through another, and they are not the same process.
    Shared {
        /// One of them.
        one: DaemonId,
        /// The other.
        other: DaemonId,
    },
    /// What was written through one daemon was not seen through another: if they have been [`Event::Shared`], they are
    /// no longer.
    Distinct {
        /// One of them.
        one: DaemonId,
        /// The other.
        other: DaemonId,
    },
    /// The daemon at this name is not the one it was: what was known of it is lost.
    Replaced {
        /// Which daemon.
        daemon: DaemonId,
    },
    /// The lists of a daemon. Objects that were learned after `began` stay even if a list lacks them.
    Inventory {
        /// Which daemon.
        daemon: DaemonId,
        /// When the lists were asked for.
        began: Time,
        /// What they said.
        inventory: Inventory,
    },
    /// The containers of a daemon alone, listed again from time to time: an event may have been lost.
    Containers {
        /// Which daemon.
        daemon: DaemonId,
        /// When the list was asked for.
        began: Time,
        /// What it said.
        containers: Vec<ListedContainer>,
        /// Their compose projects: kind, id, project.
        projects: Vec<(Kind, String, String)>,
    },
    /// The images of a daemon alone, listed again after a BuildKit build.
    Images {
        /// Which daemon.
        daemon: DaemonId,
        /// When the list was asked for.
        began: Time,
        /// What it said.
        images: Vec<ListedImage>,
    },
    /// Something learned about an object.
    Learned {
        /// Where it is.
        daemon: DaemonId,
        /// Whose request told it; `None` from `/events`.
        open: Option<OpenId>,
        /// What.
        fact: Fact,
    },
    /// A request wants a daemon.
    Acquire(Acquire),
    /// An open BuildKit connection turned out to build.
    BuildSeen(OpenId),
    /// A request or stream ended.
    Release {
        /// Which.
        open: OpenId,
        /// How.
        outcome: Outcome,
    },
    /// The client of a request that waits has gone.
    Abandon(RequestId),
    /// Whether more daemons are on their way.
    Growth(super::scaling::Growth),
    /// Another proxy admits from now on: whose everything is, is its business.
    Retired,
    /// This proxy admits from now on, and goes on where another one has stopped.
    Import {
        /// The number of its tenure.
        epoch: u64,
        /// What the other one knew; empty after a crash.
        export: Box<super::handover::Export>,
    },
    /// Requests that are open at other proxies count here from now on.
    Attach(Vec<super::handover::OpenExport>),
    /// The configuration was read again.
    Configured(Box<super::Config>),
    /// A daemon is to take no new sessions.
    Cordon {
        /// Which daemon.
        daemon: DaemonId,
        /// Who wants it.
        by: CordonedBy,
    },
    /// It is to take new sessions again; ends a drain. The scaler lifts its own cordon only.
    Uncordon {
        /// Which daemon.
        daemon: DaemonId,
        /// Who wants it.
        by: CordonedBy,
    },
    /// Cordons a daemon and waits for the end of its work.
    Drain {
        /// Which daemon.
        daemon: DaemonId,
        /// When the work that is left is cut.
        deadline: Time,
    },
    /// Somebody is about to end a daemon, and asks whether he may: it takes no new sessions meanwhile.
    Leaving {
        /// Which daemon.
        daemon: DaemonId,
        /// When he would have asked again.
        until: Time,
    },
    /// He is told that he may, if nobody works there.
    LetGo {
        /// Which daemon.
        daemon: DaemonId,
    },
    /// Time has passed: leases, lingers and graces run out.
    Tick,
}

/// What the shell is to do, or to tell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Effect {
    /// The request goes to this daemon.
    Granted {
        /// Which request.
        request: RequestId,
        /// To be given back by [`Event::Release`].
        open: OpenId,
        /// Where it goes.
        daemon: DaemonId,
        /// The session's lease, if this class of request holds one.
        lease: Option<LeaseId>,
        /// Whether it may be tried elsewhere when not a byte of it reached the daemon: nothing of its
        /// session has been there yet, and no fact led there. To try, release it as
        /// [`Outcome::Unreached`] and acquire again.
        fresh: bool,
    },
    /// A request that is open at some proxy counts here from now on.
    Attached {
        /// Its number in [`super::handover::OpenExport`].
        theirs: OpenId,
        /// Its number here, to be given back by [`Event::Release`].
        open: OpenId,
        /// Where it goes.
        daemon: DaemonId,
        /// The session's lease, if it holds one.
        lease: Option<LeaseId>,
    },
    /// The request waits for a slot.
    Queued {
        /// Which request.
        request: RequestId,
        /// Whose.
        key: SessionKey,
        /// Who waits.
        tenant: Tenant,
        /// For what.
        awaited: super::reason::Awaited,
    },
    /// A request has waited and is granted next.
    Admitted {
        /// Which request.
        request: RequestId,
        /// Who waited.
        tenant: Tenant,
        /// How long.
        waited: Time,
    },
    /// The request gets no daemon.
    Refused {
        /// Which request.
        request: RequestId,
        /// Why.
        refusal: Refusal,
    },
    /// A session was bound.
    LeaseStarted {
        /// Whose.
        key: SessionKey,
        /// Which lease.
        lease: LeaseId,
        /// Where.
        daemon: DaemonId,
    },
    /// A session's lease ran out, or its daemon went.
    LeaseEnded {
        /// Whose.
        key: SessionKey,
        /// Who that belonged to.
        tenant: Tenant,
        /// Which lease.
        lease: LeaseId,
        /// Where it was.
        daemon: DaemonId,
        /// How long it lived.
        lasted: Time,
        /// Whether it was lost with its daemon.
        lost: bool,
    },
    /// A build has ended.
    Built {
        /// Whose.
        key: SessionKey,
        /// Who it belongs to.
        tenant: Tenant,
        /// Where.
        daemon: DaemonId,
        /// How.
        outcome: Outcome,
        /// How long it took.
        lasted: Time,
    },
    /// A session's containers have run for longer than they may while nothing else of it was under way.
    Overdue {
        /// Whose.
        key: SessionKey,
        /// Where they run, and their ids.
        containers: Vec<(DaemonId, String)>,
        /// Whether it was told before.
        again: bool,
    },
    /// A daemon takes no new sessions from now on.
    Cordoned {
        /// Which.
        daemon: DaemonId,
        /// Who wanted it.
        by: CordonedBy,
    },
    /// It takes new sessions again.
    Uncordoned {
        /// Which.
        daemon: DaemonId,
        /// Whether that ended a drain.
        draining: bool,
    },
    /// A drain has begun.
    Draining {
        /// Which daemon's.
        daemon: DaemonId,
    },
    /// A drain has ended. If anything was cut, the shell breaks every stream to the daemon.
    Drained {
        /// Which daemon's.
        daemon: DaemonId,
        /// How.
        drained: Drained,
    },
    /// A daemon is to be given something to write; [`Event::Wrote`] tells what came of it.
    ProbeDeeply {
        /// Which.
        daemon: DaemonId,
    },
    /// A daemon was ejected.
    Ejected {
        /// Which.
        daemon: DaemonId,
        /// Why.
        cause: Cause,
    },
    /// A daemon came back without anything of what was on it.
    Emptied {
        /// Which.
        daemon: DaemonId,
    },
    /// A daemon is refused because another one uses the same data root.
    SharesData {
        /// Which.
        daemon: DaemonId,
        /// The other.
        with: DaemonId,
    },
    /// A daemon's state or health changed.
    DaemonChanged {
        /// Which.
        daemon: DaemonId,
        /// Its state now.
        state: State,
        /// Its health now.
        health: Health,
        /// Why, in words.
        reason: String,
    },
}

/// Who cordoned a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CordonedBy {
    /// A person, or a script of theirs.
    Operator,
    /// The autoscaler, before it removes the daemon.
    Scaler,
}

/// What a session still does on a daemon that is drained, or did when it was cut.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remaining {
    /// Whose it is; `None` for containers that no session of this pool made.
    pub key: Option<SessionKey>,
    /// Requests and streams that are open.
    pub open: u32,
    /// How many of them build.
    pub builds: u32,
    /// Containers that run, by name or short id. A cut does not stop them.
    pub containers: Vec<String>,
    /// Requests that wait for a slot there.
    pub waiting: u32,
}

/// What a drained daemon still has that is no work, and goes with it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// Stopped containers, by name or short id.
    pub containers: Vec<String>,
    /// Images that were made there and not pushed.
    pub images: Vec<String>,
}

/// How a drain ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    /// What was still under way at the deadline; empty if the daemon became idle before.
    pub cut: Vec<Remaining>,
    /// What is left there.
    pub left: Left,
}

/// A daemon's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Made, but it has not answered yet.
    Starting,
    /// It takes sessions.
    Ready,
    /// It keeps its sessions and takes no new ones.
    Draining,
    /// It no longer exists.
    Gone,
}

/// A daemon's health, beside its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// It answers.
    Healthy,
    /// It does not answer, or was refused; no new sessions.
    Ejected,
}
