//! What a request is, from its method and path alone (pure). The classes of all endpoints come from dockerd's
//! own routes (moby 28.5.2 and 29.7.2, read) and from what real clients send (measured).

use std::borrow::Cow;

use percent_encoding::percent_decode_str;
use serde_json::Value;

use super::relay::Pace;
use crate::engine::images::normalise;
use crate::engine::model::{ApiVersion, Class, Kind, ObjectRef, Work};
use crate::pool::about::PROJECT;

/// Answered by the proxy itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Local {
    /// `/_ping`: never held, never forwarded; the CLI waits 2 s for it at start.
    Ping,
    /// `/version`, with the pool's API range.
    Version,
    /// `/grpc`: answered 101 at once; a daemon is acquired when the HTTP/2 preface arrives.
    Grpc,
}

/// What a successful response tells about the daemon's objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Learn {
    /// `Id` in the response is a new object of this kind; the name is in the query, or in the request's body.
    Created(Kind),
    /// `Name` in the response is a new volume.
    Volume,
    /// A success writes this image reference (tag, commit).
    Image(String),
}

/// The shape of a JSON body that has to be read before the request can be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peek {
    /// `POST /containers/create`: the image, and what the container is put beside.
    Container,
    /// `POST /networks/create`, `/volumes/create`: name and compose project.
    Resource,
}

/// A classified request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The endpoint in words that fit a metric label and a log line: never an id or a name.
    pub label: &'static str,
    /// What it needs of the session's binding.
    pub class: Class,
    /// Answered by the proxy itself.
    pub local: Option<Local>,
    /// Whether the response may end HTTP on the connection.
    pub hijack: bool,
    /// Whether that leads to HTTP/2, where a FIN from either side closes both.
    pub h2: bool,
    /// Whether the response is a stream of JSON messages whose errors the CLI prints.
    pub json_stream: bool,
    /// Not served by a pool: the sentence that says so.
    pub refuse: Option<&'static str>,
    /// The object in the path.
    pub target: Option<ObjectRef>,
    /// The image in path or query, normalised.
    pub image: Option<String>,
    /// What a success tells.
    pub learn: Option<Learn>,
    /// The body to be read first.
    pub peek: Option<Peek>,
    /// A build's own id, by which it can be cancelled: `buildid` of `/build`, `id` of `/build/cancel`.
    pub build_id: Option<String>,
    /// What a classic build builds: the repository of its first `t=`, normalised.
    pub project: Option<String>,
    /// The name that a created object gets, from the query.
    pub name: Option<String>,
    /// The API version in the path.
    pub api: Option<ApiVersion>,
    /// The architecture in `platform=`.
    pub arch: Option<String>,
}

impl Route {
    fn new(label: &'static str, class: Class) -> Self {
        Route {
            label,
            class,
            local: None,
            hijack: false,
            h2: false,
            json_stream: false,
            refuse: None,
            target: None,
            image: None,
            learn: None,
            peek: None,
            build_id: None,
            project: None,
            name: None,
            api: None,
            arch: None,
        }
    }

    /// How long dockerd takes to begin its answer.
    pub fn pace(&self) -> Pace {
        match self.label {
            "info" | "containers/list" | "containers/inspect" | "containers/kill" | "containers/rename"
            | "containers/resize" | "containers/top" | "exec/inspect" | "exec/resize" | "images/list"
            | "images/inspect" | "images/tag" | "networks/list" | "networks/inspect" | "volumes/list"
            | "volumes/inspect" => Pace::AtOnce,
            "containers/create" | "containers/start" | "containers/attach" | "containers/exec"
            | "exec/start" | "networks/create" | "volumes/create" => Pace::Soon,
            _ => Pace::Long,
        }
    }

    fn local(label: &'static str, local: Local) -> Self {
        Route { local: Some(local), ..Route::new(label, Class::Any) }
    }

    fn refuse(label: &'static str, why: &'static str) -> Self {
        Route { refuse: Some(why), ..Route::new(label, Class::Any) }
    }

    fn on(mut self, kind: Kind, reference: &str) -> Self {
        self.target = Some(ObjectRef { kind, reference: reference.to_string() });
        self
    }

    fn image(mut self, reference: &str) -> Self {
        self.image = Some(normalise(reference));
        self
    }

    /// A list that asks for one compose project is about that project (`filters={"label":{"…project=app":true}}`,
    /// or a list of labels, as older clients send it).
    fn of_project(mut self, query: &str) -> Self {
        let filters: Value = match parameter(query, "filters").map(|f| serde_json::from_str(&f)) {
            Some(Ok(filters)) => filters,
            _ => return self,
        };
        // compose looks for its networks by name.
        let names = filters["name"].as_object().map(|names| names.keys().collect::<Vec<_>>());
        if let ("networks/list", Some([name])) = (self.label, names.as_deref()) {
            self.target = Some(ObjectRef { kind: Kind::Network, reference: name.to_string() });
            return self;
        }
        let labels: Vec<&str> = match &filters["label"] {
            Value::Object(labels) => labels.keys().map(String::as_str).collect(),
            Value::Array(labels) => labels.iter().filter_map(Value::as_str).collect(),
            _ => return self,
        };
        let project = labels.iter().find_map(|l| l.strip_prefix(PROJECT)?.strip_prefix('='));
        self.target = project.map(|p| ObjectRef { kind: Kind::Project, reference: p.to_string() });
        self
    }

    fn hijack(mut self) -> Self {
        self.hijack = true;
        self
    }

    fn stream(mut self) -> Self {
        self.json_stream = true;
        self
    }

    fn learn(mut self, learn: Learn) -> Self {
        self.learn = Some(learn);
        self
    }
}

/// A request target without the parts that are dindpool's own.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prefix<'a> {
    /// `/t/<tenant>`
    pub tenant: Option<&'a str>,
    /// `/s/<key>`
    pub session: Option<&'a str>,
    /// `/p/<project>`
    pub project: Option<&'a str>,
    /// How many bytes of the target they take.
    pub length: usize,
}

/// `ghcr.io/team/app:17` → `ghcr.io/team/app`.
fn repository(tag: &str) -> String {
    let name = normalise(tag);
    let end = name.rfind('/').map_or(0, |slash| slash + 1);
    let repository = name[end..].find([':', '@']).map_or(name.as_str(), |at| &name[..end + at]);
    repository.to_string()
}

/// The prefixes of a target, in any order: `DOCKER_HOST=tcp://host:2375/t/team-a/s/release`. CLI and docker-py
/// keep them on everything except `/grpc` and `/session`. A query may hold slashes too; nothing there is a prefix.
pub fn prefix(target: &str) -> Prefix<'_> {
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    let mut prefix = Prefix::default();
    loop {
        let rest = &path[prefix.length..];
        let mut parts = rest.splitn(4, '/');
        let (Some(""), Some(kind), Some(value), Some(_)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return prefix;
        };
        match kind {
            "s" if prefix.session.is_none() && !value.is_empty() => prefix.session = Some(value),
            "p" if prefix.project.is_none() && !value.is_empty() => prefix.project = Some(value),
            "t" if prefix.tenant.is_none() && !value.is_empty() => prefix.tenant = Some(value),
            _ => return prefix,
        }
        prefix.length += kind.len() + value.len() + 2;
    }
}

/// `/v1.51/containers/json` → `(Some((1, 51)), "/containers/json")`. As dockerd's routes, it takes any digits and
/// dots for a version.
fn versioned(path: &str) -> (Option<ApiVersion>, &str) {
    let parsed = path.strip_prefix("/v").and_then(|rest| {
        let (version, _) = rest.split_once('/')?;
        let plausible = !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        plausible.then(|| (crate::pool::about::api_version(version), &rest[version.len()..]))
    });
    parsed.unwrap_or((None, path))
}

/// Classifies a request by its method, its path without dindpool's prefixes, and its query.
pub fn classify(method: &str, path: &str, query: Option<&str>) -> Route {
    // dockerd decodes the whole path before it looks for a route: `/%73warm/init` is `/swarm/init`.
    let path = decode(path);
    let (api, path) = versioned(&path);
    let query = query.unwrap_or_default();
    let mut route = route(method, path, query);
    route.api = api;
    if matches!(route.class, Class::Work(_)) {
        route.arch = parameter(query, "platform").and_then(|p| {
            let arch = p.split('/').nth(1)?.to_string();
            (!arch.is_empty()).then_some(arch)
        });
    }
    route
}

const SWARM: &str = "a pool is no swarm: swarm endpoints that change something are not served";
const PLUGINS: &str =
    "a pool has no plugins of its own: plugin endpoints that change something are not served";

fn route(method: &str, path: &str, query: &str) -> Route {
    use Class::{Any, Follow, Join, Read};
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    match (method, &segments[..]) {
        ("GET" | "HEAD", ["_ping"]) => Route::local("_ping", Local::Ping),
        ("GET", ["version"]) => Route::local("version", Local::Version),
        ("POST", ["grpc"]) => {
            let mut route = Route::local("grpc", Local::Grpc).hijack();
            route.class = Class::Work(Work::BuildKit);
            route.h2 = true;
            route
        }
        ("POST", ["session"]) => Route { h2: true, ..Route::new("session", Join).hijack() },
        ("POST", ["build"]) => {
            let mut route = Route::new("build", Class::Work(Work::Build)).stream();
            route.build_id = parameter(query, "buildid").filter(|id| !id.is_empty());
            route.project = parameter(query, "t").filter(|t| !t.is_empty()).map(|t| repository(&t));
            match parameter(query, "session") {
                Some(uuid) if !uuid.is_empty() => route.on(Kind::BuildSession, &uuid),
                _ => route,
            }
        }
        ("POST", ["build", "cancel"]) => {
            Route { build_id: parameter(query, "id"), ..Route::new("build/cancel", Join) }
        }
        ("POST", ["build", "prune"]) => Route::new("build/prune", Follow),
        ("GET", ["info"]) => Route::new("info", Read),
        ("POST", ["auth"]) => Route::new("auth", Any),
        ("GET", ["events"]) => Route::new("events", Read),
        ("GET", ["system", "df"]) => Route::new("system/df", Read),
        ("POST", ["commit"]) => commit(query),
        (_, ["containers", rest @ ..]) => container(method, rest, query),
        (_, ["exec", id, action]) => exec(method, id, action),
        (_, ["images", rest @ ..]) => image(method, rest, query),
        ("GET", ["distribution", ..]) => Route::new("distribution", Any),
        (_, ["networks", rest @ ..]) => network(method, rest, query),
        (_, ["volumes", rest @ ..]) => volume(method, rest, query),
        (
            "GET" | "HEAD" | "OPTIONS",
            ["swarm" | "nodes" | "services" | "tasks" | "secrets" | "configs", ..],
        ) => Route::new("swarm", Read),
        (_, ["swarm" | "nodes" | "services" | "tasks" | "secrets" | "configs", ..]) => {
            Route::refuse("swarm", SWARM)
        }
        ("GET" | "HEAD" | "OPTIONS", ["plugins", ..]) => Route::new("plugins", Read),
        (_, ["plugins", ..]) => Route::refuse("plugins", PLUGINS),
        ("GET" | "HEAD" | "OPTIONS", _) => Route::new("other", Read),
        _ => Route::new("other", Follow),
    }
}

fn container(method: &str, rest: &[&str], query: &str) -> Route {
    use Class::{Follow, Read};
    match (method, rest) {
        ("POST", ["create"]) => {
            let mut route = Route::new("containers/create", Class::Work(Work::Container));
            route.learn = Some(Learn::Created(Kind::Container));
            route.peek = Some(Peek::Container);
            route.name = parameter(query, "name").map(|n| n.trim_start_matches('/').to_string());
            route
        }
        ("GET", ["json"]) => Route::new("containers/list", Read).of_project(query),
        ("POST", ["prune"]) => Route::new("containers/prune", Follow),
        (_, [id]) => Route::new("containers/delete", Follow).on(Kind::Container, id),
        ("POST", [id, "attach"]) => Route::new("containers/attach", Follow).on(Kind::Container, id).hijack(),
        ("GET", [id, "attach", "ws"]) => {
            Route::new("containers/attach/ws", Follow).on(Kind::Container, id).hijack()
        }
        ("POST", [id, "exec"]) => {
            Route::new("containers/exec", Follow).on(Kind::Container, id).learn(Learn::Created(Kind::Exec))
        }
        (_, [id, action, ..]) => Route::new(container_action(action), Follow).on(Kind::Container, id),
        _ => Route::new("containers/other", Read),
    }
}

/// The label of a container's endpoint.
fn container_action(action: &str) -> &'static str {
    match action {
        "json" => "containers/inspect",
        "start" => "containers/start",
        "stop" => "containers/stop",
        "restart" => "containers/restart",
        "kill" => "containers/kill",
        "wait" => "containers/wait",
        "logs" => "containers/logs",
        "stats" => "containers/stats",
        "archive" => "containers/archive",
        "export" => "containers/export",
        "rename" => "containers/rename",
        "resize" => "containers/resize",
        "top" => "containers/top",
        _ => "containers/other",
    }
}

fn exec(method: &str, id: &str, action: &str) -> Route {
    let label = match action {
        "start" => "exec/start",
        "json" => "exec/inspect",
        "resize" => "exec/resize",
        _ => "exec/other",
    };
    let route = Route::new(label, Class::Follow).on(Kind::Exec, id);
    if (method, action) == ("POST", "start") { route.hijack() } else { route }
}

fn image(method: &str, rest: &[&str], query: &str) -> Route {
    use Class::{Any, Follow, Read, Remove};
    match (method, rest) {
        ("POST", ["create"]) => {
            let from = parameter(query, "fromImage").filter(|f| !f.is_empty());
            let work = if from.is_some() { Work::Pull } else { Work::Load };
            Route::new("images/create", Class::Work(work)).stream()
        }
        ("POST", ["load"]) => Route::new("images/load", Class::Work(Work::Load)).stream(),
        ("GET", ["json"]) => Route::new("images/list", Read),
        ("GET", ["search"]) => Route::new("images/search", Any),
        ("POST", ["prune"]) => Route::new("images/prune", Follow),
        ("GET", ["get"]) => {
            let route = Route::new("images/save", Follow);
            match parameter(query, "names") {
                Some(name) => route.image(&name),
                None => route,
            }
        }
        ("POST", [name @ .., "push"]) if !name.is_empty() => {
            // The tag travels in the query.
            let name = name.join("/");
            let reference = match parameter(query, "tag") {
                Some(tag) if !tag.is_empty() => format!("{name}:{tag}"),
                _ => name,
            };
            Route::new("images/push", Follow).image(&reference).stream()
        }
        ("POST", [name @ .., "tag"]) if !name.is_empty() => {
            let route = Route::new("images/tag", Follow).image(&name.join("/"));
            match repo_and_tag(query) {
                Some(reference) => route.learn(Learn::Image(reference)),
                None => route,
            }
        }
        ("GET", [name @ .., "get"]) if !name.is_empty() => {
            Route::new("images/save", Follow).image(&name.join("/"))
        }
        ("GET", [name @ .., "json" | "history" | "attestations"]) if !name.is_empty() => {
            Route::new("images/inspect", Follow).image(&name.join("/"))
        }
        ("DELETE", name) if !name.is_empty() => Route::new("images/delete", Remove).image(&name.join("/")),
        _ => Route::new("images/other", Read),
    }
}

fn network(method: &str, rest: &[&str], query: &str) -> Route {
    use Class::{Follow, Read};
    match (method, rest) {
        ("GET", [] | [""]) => Route::new("networks/list", Read).of_project(query),
        ("POST", ["create"]) => {
            let mut route = Route::new("networks/create", Class::Work(Work::Resource));
            route.learn = Some(Learn::Created(Kind::Network));
            route.peek = Some(Peek::Resource);
            route
        }
        ("POST", ["prune"]) => Route::new("networks/prune", Follow),
        ("GET", [id]) => Route::new("networks/inspect", Follow).on(Kind::Network, id),
        (_, [id, ..]) => Route::new("networks/change", Follow).on(Kind::Network, id),
        _ => Route::new("networks/other", Read),
    }
}

fn volume(method: &str, rest: &[&str], query: &str) -> Route {
    use Class::{Follow, Read};
    match (method, rest) {
        ("GET", [] | [""]) => Route::new("volumes/list", Read).of_project(query),
        ("POST", ["create"]) => {
            let route = Route::new("volumes/create", Class::Work(Work::Resource)).learn(Learn::Volume);
            Route { peek: Some(Peek::Resource), ..route }
        }
        ("POST", ["prune"]) => Route::new("volumes/prune", Follow),
        ("GET", [name]) => Route::new("volumes/inspect", Follow).on(Kind::Volume, name),
        (_, [name]) => Route::new("volumes/change", Follow).on(Kind::Volume, name),
        _ => Route::new("volumes/other", Read),
    }
}

fn commit(query: &str) -> Route {
    let mut route = Route::new("commit", Class::Follow);
    if let Some(container) = parameter(query, "container") {
        route = route.on(Kind::Container, &container);
    }
    match repo_and_tag(query) {
        Some(reference) => route.learn(Learn::Image(reference)),
        None => route,
    }
}

/// The reference that `repo=` and `tag=` make.
fn repo_and_tag(query: &str) -> Option<String> {
    let repo = parameter(query, "repo").filter(|r| !r.is_empty())?;
    match parameter(query, "tag").filter(|t| !t.is_empty()) {
        Some(tag) => Some(normalise(&format!("{repo}:{tag}"))),
        None => Some(normalise(&repo)),
    }
}

/// The first value of a query parameter, decoded (the first duplicate wins, as in dockerd).
pub fn parameter(query: &str, name: &str) -> Option<String> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(key) == name).then(|| decode(&value.replace('+', " ")).into_owned())
    })
}

fn decode(text: &str) -> Cow<'_, str> {
    percent_decode_str(text).decode_utf8_lossy()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(method: &str, target: &str) -> Route {
        let (path, query) = target.split_once('?').map_or((target, None), |(p, q)| (p, Some(q)));
        classify(method, path, query)
    }

    #[test]
    fn what_starts_work_is_admitted_and_nothing_else() {
        for (method, target, work) in [
            ("POST", "/v1.51/build?t=app", Work::Build),
            ("POST", "/grpc", Work::BuildKit),
            ("POST", "/v1.51/containers/create?name=web", Work::Container),
            ("POST", "/images/create?fromImage=alpine&tag=3", Work::Pull),
            ("POST", "/images/create?fromSrc=-&repo=base", Work::Load),
            ("POST", "/images/load?quiet=1", Work::Load),
            ("POST", "/networks/create", Work::Resource),
            ("POST", "/volumes/create", Work::Resource),
        ] {
            assert_eq!(of(method, target).class, Class::Work(work), "{method} {target}");
        }
        for (method, target, class) in [
            ("POST", "/session", Class::Join),
            ("POST", "/build/cancel?id=x", Class::Join),
            ("POST", "/containers/ab/start", Class::Follow),
            ("POST", "/containers/ab/exec", Class::Follow),
            ("POST", "/images/app/push?tag=1", Class::Follow),
            ("DELETE", "/images/app:1", Class::Remove),
            ("GET", "/containers/json?all=1", Class::Read),
            ("GET", "/events", Class::Read),
            ("GET", "/info", Class::Read),
            ("POST", "/auth", Class::Any),
            ("GET", "/distribution/app/json", Class::Any),
        ] {
            assert_eq!(of(method, target).class, class, "{method} {target}");
        }
    }

    #[test]
    fn images_are_named_by_path_and_query() {
        for (method, target, image) in [
            ("POST", "/v1.50/images/reg:5000/a/b/push?tag=1", "reg:5000/a/b:1"),
            ("GET", "/images/app:1/json", "docker.io/library/app:1"),
            ("GET", "/images/team%2Fapp:1/json", "docker.io/team/app:1"),
            ("DELETE", "/images/app", "docker.io/library/app:latest"),
            ("GET", "/images/get?names=app%3A2&names=b", "docker.io/library/app:2"),
            ("GET", "/images/json/json", "docker.io/library/json:latest"),
            ("GET", "/images/get?names=app%253A2", "docker.io/library/app%3A2:latest"),
        ] {
            assert_eq!(of(method, target).image.as_deref(), Some(image), "{method} {target}");
        }
        assert_eq!(of("GET", "/images/json").image, None);
        let tag = of("POST", "/images/app/tag?repo=reg:5000/app&tag=2");
        assert_eq!(tag.learn, Some(Learn::Image("reg:5000/app:2".into())));
    }

    #[test]
    fn objects_are_named_by_path() {
        let target = |m, t| of(m, t).target.map(|o| (o.kind, o.reference));
        assert_eq!(target("GET", "/v1.41/containers/web/json"), Some((Kind::Container, "web".into())));
        assert_eq!(target("POST", "/commit?container=web"), Some((Kind::Container, "web".into())));
        assert_eq!(target("POST", "/exec/ee/start"), Some((Kind::Exec, "ee".into())));
        assert_eq!(target("DELETE", "/networks/n"), Some((Kind::Network, "n".into())));
        assert_eq!(target("PUT", "/volumes/v"), Some((Kind::Volume, "v".into())));
        assert_eq!(target("POST", "/build?session=u1"), Some((Kind::BuildSession, "u1".into())));
    }

    #[test]
    fn a_list_of_a_compose_project_is_about_the_project() {
        for filters in [
            r#"{"label":{"com.docker.compose.project=app":true,"x":true}}"#,
            r#"{"label":["com.docker.compose.project=app"]}"#,
        ] {
            let filters = percent_encoding::utf8_percent_encode(filters, percent_encoding::NON_ALPHANUMERIC);
            for list in ["/containers/json", "/networks", "/volumes"] {
                let route = of("GET", &format!("/v1.44{list}?all=1&filters={filters}"));
                let target = route.target.unwrap();
                assert_eq!((target.kind, target.reference.as_str()), (Kind::Project, "app"));
            }
        }
        // compose asks for its networks by name.
        let named = |list: &str| {
            of("GET", &format!("{list}?filters=%7B%22name%22:%7B%22app_default%22:true%7D%7D")).target
        };
        let network = ObjectRef { kind: Kind::Network, reference: "app_default".into() };
        assert_eq!((named("/networks"), named("/containers/json")), (Some(network), None));
        assert_eq!(of("GET", "/containers/json?filters=%7B%7D").target, None);
    }

    #[test]
    fn only_what_dockerd_hijacks_is_of_the_hijack_class() {
        for (method, target) in [
            ("POST", "/containers/ab/attach?stream=1"),
            ("GET", "/containers/ab/attach/ws"),
            ("POST", "/exec/ab/start"),
            ("POST", "/session"),
            ("POST", "/grpc"),
        ] {
            assert!(of(method, target).hijack, "{target}");
        }
        for (method, target) in [
            ("GET", "/containers/ab/logs?follow=1"),
            ("POST", "/build"),
            ("POST", "/containers/ab/exec"),
            ("GET", "/exec/ab/json"),
        ] {
            assert!(!of(method, target).hijack, "{target}");
        }
    }

    #[test]
    fn versions_and_prefixes_are_taken_apart() {
        assert_eq!(of("GET", "/v1.51/info").api, Some((1, 51)));
        assert_eq!(of("GET", "/vim/info").label, "other");
        let p = prefix("/s/job-1/v1.51/info");
        assert_eq!((p.session, p.tenant, p.length), (Some("job-1"), None, 8));
        let target = "/t/team/s/job/_ping";
        let p = prefix(target);
        assert_eq!((p.session, p.tenant, &target[p.length..]), (Some("job"), Some("team"), "/_ping"));
        assert_eq!(prefix("/session"), Prefix::default());
        assert_eq!(prefix("/s/"), Prefix::default());
        assert_eq!(prefix("/s/x"), Prefix::default());
    }

    #[test]
    fn a_query_is_no_part_of_a_prefix() {
        assert_eq!(prefix("/p/app?remote=/info"), Prefix::default());
        assert_eq!(prefix("/s/job/build?t=/s/x/y").length, 6);
    }

    #[test]
    fn swarm_and_plugins_can_be_read_and_not_changed() {
        assert!(of("GET", "/nodes").refuse.is_none());
        assert!(of("HEAD", "/swarm").refuse.is_none() && of("OPTIONS", "/plugins").refuse.is_none());
        assert!(of("POST", "/swarm/init").refuse.is_some());
        for disguised in ["/%73warm/init", "/v1.41/%73warm%2finit", "/v1.41.0.0/swarm/init", "/v1/swarm/init"]
        {
            assert!(of("POST", disguised).refuse.is_some(), "{disguised}");
        }
        assert!(of("POST", "/plugins/pull?remote=x").refuse.is_some());
    }

    #[test]
    fn the_architecture_is_a_part_of_the_platform() {
        assert_eq!(of("POST", "/build?platform=linux%2Farm64").arch.as_deref(), Some("arm64"));
        assert_eq!(of("POST", "/build?platform=linux%2Farm64%2Fv8").arch.as_deref(), Some("arm64"));
        assert_eq!(of("POST", "/build").arch, None);
    }

    #[test]
    fn a_classic_build_tells_its_project_by_its_tag() {
        let project = |query: &str| classify("POST", "/v1.45/build", Some(query)).project;
        assert_eq!(project("t=ghcr.io%2Fteam%2Fapp%3A17&t=b").as_deref(), Some("ghcr.io/team/app"));
        assert_eq!(project("t=localhost:5000/app").as_deref(), Some("localhost:5000/app"));
        assert_eq!(project("t=app").as_deref(), Some("docker.io/library/app"));
        assert_eq!(project("t="), None);
        let prefix = prefix("/p/shop/t/team-a/v1.45/build");
        assert_eq!((prefix.project, prefix.tenant), (Some("shop"), Some("team-a")));
    }
}
