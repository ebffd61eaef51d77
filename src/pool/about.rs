//! What a daemon says of itself and of what is on it, in the shapes of `/info`, `/version`, `/_ping`, the lists
//! and `/events`, read with tolerance: unknown values and missing fields are no fault (bollard's closed enums
//! fail on them, and a parse error is not a dead daemon).

use serde::Deserialize;
use serde_json::Value;

use crate::engine::images::normalise;
use crate::engine::model::{ApiVersion, Fact, Facts, Inventory, Kind, ListedContainer, ListedImage, Written};

/// The label that compose puts on everything it makes.
pub const PROJECT: &str = "com.docker.compose.project";

/// What deep probes make, an image and sometimes a volume, begins with this. It is nobody's, and unknown to the
/// engine.
pub const PROBE: &str = "dindpool-probe";

/// The parts of `/info` that are used.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Info {
    /// The engine's id.
    #[serde(rename = "ID")]
    pub id: String,
    /// Processors.
    #[serde(rename = "NCPU")]
    pub cpus: u32,
    /// Bytes of memory.
    #[serde(rename = "MemTotal")]
    pub memory: u64,
    /// `28.5.2`
    #[serde(rename = "ServerVersion")]
    pub version: String,
    /// How many images there are.
    #[serde(rename = "Images")]
    pub images: Option<u64>,
    /// Where its data is.
    #[serde(rename = "DockerRootDir")]
    pub root: String,
}

/// What the proxy answers in the daemons' stead.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct About {
    /// `/version`, as the daemon gave it.
    pub version: Value,
    /// `Builder-Version` of `/_ping`.
    pub builder: String,
    /// `Ostype` of `/_ping`.
    pub os: String,
    /// `Docker-Experimental` of `/_ping`.
    pub experimental: String,
    /// `Server` of `/_ping`.
    pub server: String,
    /// `Swarm` of `/_ping`; 20.10 has none.
    pub swarm: String,
}

impl About {
    /// From the answers to `/_ping` and `/version`.
    pub fn new(ping: &hyper::HeaderMap, version: Value) -> Self {
        let header =
            |name: &str| ping.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_string();
        About {
            version,
            builder: header("builder-version"),
            os: header("ostype"),
            experimental: header("docker-experimental"),
            server: header("server"),
            swarm: header("swarm"),
        }
    }
}

/// `1.51` → `(1, 51)`.
pub fn api_version(text: &str) -> Option<ApiVersion> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The engine's view of `/info` and `/version`.
pub fn facts(info: &Info, version: &Value) -> Facts {
    let text = |name: &str| version[name].as_str().unwrap_or_default();
    let api_max = api_version(text("ApiVersion")).unwrap_or((1, 24));
    Facts {
        engine_id: info.id.clone(),
        version: if info.version.is_empty() { text("Version").to_string() } else { info.version.clone() },
        api_max,
        api_min: api_version(text("MinAPIVersion")).unwrap_or((1, 12)).min(api_max),
        arch: text("Arch").to_string(),
        cpus: info.cpus,
        memory: info.memory,
    }
}

/// The four lists as one inventory.
pub fn inventory(containers: &Value, networks: &Value, volumes: &Value, images: &Value) -> Inventory {
    let built_in = |name: &str| matches!(name, "bridge" | "host" | "none");
    let (listed, of_containers) = self::containers(containers);
    Inventory {
        containers: listed,
        networks: array(networks)
            .iter()
            .filter_map(|n| Some((n["Id"].as_str()?.to_string(), n["Name"].as_str()?.to_string())))
            .filter(|(_, name)| !built_in(name))
            .collect(),
        volumes: array(&volumes["Volumes"])
            .iter()
            .filter_map(|v| v["Name"].as_str().map(str::to_string))
            .filter(|name| !name.starts_with(PROBE))
            .collect(),
        images: listed_images(images),
        projects: [
            of_containers,
            projects(networks, Kind::Network, "Id"),
            projects(&volumes["Volumes"], Kind::Volume, "Name"),
        ]
        .concat(),
    }
}

/// `/containers/json`: the containers, and the compose projects of those that have one.
pub fn containers(list: &Value) -> (Vec<ListedContainer>, Vec<(Kind, String, String)>) {
    let listed = array(list)
        .iter()
        .filter_map(|c| {
            Some(ListedContainer {
                id: c["Id"].as_str()?.to_string(),
                // A link gives a container further names of the form /other/alias.
                names: array(&c["Names"])
                    .iter()
                    .filter_map(Value::as_str)
                    .map(|n| n.trim_start_matches('/').to_string())
                    .filter(|n| !n.contains('/'))
                    .collect(),
                running: matches!(c["State"].as_str(), Some("running" | "paused" | "restarting")),
            })
        })
        .collect();
    (listed, projects(list, Kind::Container, "Id"))
}

fn projects(list: &Value, kind: Kind, id: &str) -> Vec<(Kind, String, String)> {
    let project = |o: &Value| {
        let project = o["Labels"][PROJECT].as_str()?;
        Some((kind, o[id].as_str()?.to_string(), project.to_string()))
    };
    array(list).iter().filter_map(project).collect()
}

/// `/images/json`.
pub fn listed_images(images: &Value) -> Vec<ListedImage> {
    array(images)
        .iter()
        .filter(|i| !array(&i["RepoTags"]).iter().filter_map(Value::as_str).any(is_probe))
        .filter_map(|i| {
            Some(ListedImage {
                id: i["Id"].as_str()?.to_string(),
                references: array(&i["RepoTags"])
                    .iter()
                    .filter_map(Value::as_str)
                    .filter(|r| !r.starts_with("<none>"))
                    .map(normalise)
                    .collect(),
                in_registry: array(&i["RepoDigests"])
                    .iter()
                    .filter_map(Value::as_str)
                    .any(|r| !r.starts_with("<none>")),
            })
        })
        .collect()
}

fn is_probe(reference: &str) -> bool {
    reference.strip_prefix(PROBE).is_some_and(|rest| rest.starts_with(':'))
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// One line of `/events`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct DaemonEvent {
    #[serde(rename = "Type")]
    kind: String,
    #[serde(rename = "Action")]
    action: String,
    #[serde(rename = "Actor")]
    actor: Actor,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Actor {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Attributes")]
    attributes: Attributes,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Attributes {
    name: Option<String>,
    #[serde(rename = "execID")]
    exec: Option<String>,
    /// A container's labels are among its events' attributes.
    #[serde(rename = "com.docker.compose.project")]
    project: Option<String>,
}

/// What an event tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// A fact for the engine.
    Fact(Fact),
    /// Images changed in a way that only their list tells: `untag` carries no reference (20.10 to 28.5), `load`
    /// and `import` depend on the version and the image store.
    ImagesChanged,
}

impl DaemonEvent {
    /// The compose project of the container that it is about.
    pub fn project(&self) -> Option<Fact> {
        let project = self.actor.attributes.project.clone()?;
        let (kind, id) = (Kind::Container, self.actor.id.clone());
        (self.kind == "container" && self.action == "create").then_some(Fact::Labelled { kind, id, project })
    }

    /// What it tells; `None` for the many that change nothing here (attach, resize, health checks, builder …).
    pub fn told(self) -> Option<Told> {
        let id = self.actor.id;
        let name = self.actor.attributes.name;
        let probe = |name: &str| is_probe(name) || (self.kind == "volume" && name.starts_with(PROBE));
        if probe(&id) || name.as_deref().is_some_and(probe) {
            return None;
        }
        let created =
            |kind: Kind, id: String, name: Option<String>| Some(Told::Fact(Fact::Created { kind, id, name }));
        let removed = |kind: Kind, id: String| Some(Told::Fact(Fact::Removed { kind, id }));
        match (self.kind.as_str(), self.action.as_str()) {
            ("container", "create") => created(Kind::Container, id, name),
            ("container", "start") => Some(Told::Fact(Fact::Started { id })),
            ("container", "die") => Some(Told::Fact(Fact::Stopped { id })),
            ("container", "destroy") => removed(Kind::Container, id),
            ("container", "rename") => {
                let name = name?.trim_start_matches('/').to_string();
                Some(Told::Fact(Fact::Renamed { id, name }))
            }
            ("container", action) if action.starts_with("exec_create") => {
                created(Kind::Exec, self.actor.attributes.exec?, None)
            }
            ("network", "create") => created(Kind::Network, id, name),
            ("network", "destroy") => removed(Kind::Network, id),
            ("volume", "create") => created(Kind::Volume, id.clone(), Some(id)),
            ("volume", "destroy") => removed(Kind::Volume, id),
            ("image", "tag") => {
                let image = Some(id).filter(|id| id.starts_with("sha256:"));
                let reference = name.filter(|n| !n.starts_with("sha256:"))?;
                Some(Told::Fact(Fact::ImageWritten {
                    reference: normalise(&reference),
                    id: image,
                    written: Written::Made,
                }))
            }
            ("image", "pull") => Some(Told::Fact(Fact::ImageWritten {
                reference: normalise(&id),
                id: None,
                written: Written::Pulled,
            })),
            ("image", "push") => Some(Told::Fact(Fact::ImagePushed { reference: normalise(&id) })),
            ("image", "delete" | "untag" | "load" | "import" | "create") => Some(Told::ImagesChanged),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(line: &str) -> Option<Told> {
        serde_json::from_str::<DaemonEvent>(line).unwrap().told()
    }

    #[test]
    fn events_of_real_daemons_are_understood() {
        let line = r#"{"status":"create","id":"ab","from":"app:1","Type":"container","Action":"create","Actor":{"ID":"ab","Attributes":{"image":"app:1","name":"web"}},"scope":"local","time":1,"timeNano":1}"#;
        let fact = Fact::Created { kind: Kind::Container, id: "ab".into(), name: Some("web".into()) };
        assert_eq!(told(line), Some(Told::Fact(fact)));
        let line =
            r#"{"Type":"image","Action":"tag","Actor":{"ID":"sha256:12","Attributes":{"name":"app:2"}}}"#;
        let fact = Fact::ImageWritten {
            reference: "docker.io/library/app:2".into(),
            id: Some("sha256:12".into()),
            written: Written::Made,
        };
        assert_eq!(told(line), Some(Told::Fact(fact)));
        let line = r#"{"Type":"container","Action":"exec_create: sh","Actor":{"ID":"ab","Attributes":{"execID":"ee"}}}"#;
        let fact = Fact::Created { kind: Kind::Exec, id: "ee".into(), name: None };
        assert_eq!(told(line), Some(Told::Fact(fact)));
        assert_eq!(
            told(r#"{"Type":"image","Action":"untag","Actor":{"ID":"sha256:12"}}"#),
            Some(Told::ImagesChanged)
        );
        assert_eq!(told(r#"{"Type":"builder","Action":"prune"}"#), None);
    }

    #[test]
    fn lists_leave_out_what_every_daemon_has() {
        let inventory = inventory(
            &serde_json::json!([{"Id":"aa","Names":["/web","/other/alias"],"State":"running"}]),
            &serde_json::json!([{"Id":"n1","Name":"bridge"},{"Id":"n2","Name":"app_default"}]),
            &serde_json::json!({"Volumes":[{"Name":"v"}]}),
            &serde_json::json!([{"Id":"sha256:1","RepoTags":["app:1","<none>:<none>"],"RepoDigests":null}]),
        );
        assert_eq!(inventory.containers[0].names, ["web"]);
        assert_eq!(inventory.networks, [("n2".to_string(), "app_default".to_string())]);
        assert_eq!(inventory.volumes, ["v"]);
        assert_eq!(inventory.images[0].references, ["docker.io/library/app:1"]);
        assert!(!inventory.images[0].in_registry);
    }

    #[test]
    fn a_daemon_without_a_minimum_serves_old_clients() {
        let facts = facts(&Info::default(), &serde_json::json!({"ApiVersion":"1.41","Arch":"amd64"}));
        assert_eq!((facts.api_min, facts.api_max), ((1, 12), (1, 41)));
    }
}
