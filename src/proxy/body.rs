//! What the body of a create call says about where it belongs. Read with Go's eyes: its decoder folds the case
//! of names, so `"image"` is `Image`.

use serde_json::{Map, Value};

use crate::engine::images::normalise;
use crate::engine::model::{Kind, ObjectRef};
use crate::pool::about::PROJECT;

/// What matters of a `containers/create` body.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ContainerBody {
    /// Its image, normalised.
    pub image: Option<String>,
    /// Containers whose network, volumes or names it uses; its networks; its named volumes.
    pub beside: Vec<ObjectRef>,
    /// The compose project in its labels.
    pub project: Option<String>,
}

/// Reads a `containers/create` body; what it does not understand it leaves to the daemon.
pub fn container(body: &[u8]) -> ContainerBody {
    let Ok(Value::Object(body)) = serde_json::from_slice(body) else { return ContainerBody::default() };
    let image = get(&body, "Image").and_then(Value::as_str).filter(|i| !i.is_empty()).map(normalise);
    let mut beside = Vec::new();
    let mut add = |kind: Kind, reference: &str| {
        if !reference.is_empty() {
            beside.push(ObjectRef { kind, reference: reference.to_string() });
        }
    };
    let empty = Map::new();
    let host = get(&body, "HostConfig").and_then(Value::as_object).unwrap_or(&empty);
    for mode in ["NetworkMode", "PidMode", "IpcMode"] {
        let mode_value = get(host, mode).and_then(Value::as_str).unwrap_or_default();
        match mode_value.strip_prefix("container:") {
            Some(container) => add(Kind::Container, container),
            None if mode == "NetworkMode" && !built_in(mode_value) => add(Kind::Network, mode_value),
            None => {}
        }
    }
    for volumes_from in strings(get(host, "VolumesFrom")) {
        add(Kind::Container, volumes_from.split(':').next().unwrap_or_default());
    }
    for link in strings(get(host, "Links")) {
        add(Kind::Container, link.split(':').next().unwrap_or_default().trim_start_matches('/'));
    }
    let endpoints = get(&body, "NetworkingConfig")
        .and_then(Value::as_object)
        .and_then(|n| get(n, "EndpointsConfig"))
        .and_then(Value::as_object);
    for network in endpoints.into_iter().flat_map(|e| e.keys()).filter(|n| !built_in(n)) {
        add(Kind::Network, network);
    }
    for bind in strings(get(host, "Binds")) {
        let source = bind.split(':').next().unwrap_or_default();
        if !source.starts_with(['/', '.', '~']) {
            add(Kind::Volume, source);
        }
    }
    for mount in get(host, "Mounts").and_then(Value::as_array).into_iter().flatten() {
        let Some(mount) = mount.as_object() else { continue };
        if get(mount, "Type").and_then(Value::as_str) == Some("volume") {
            add(Kind::Volume, get(mount, "Source").and_then(Value::as_str).unwrap_or_default());
        }
    }
    ContainerBody { image, beside, project: project(&body) }
}

/// The `Name` in a `networks/create` or `volumes/create` body, and its compose project.
pub fn resource(body: &[u8]) -> (Option<String>, Option<String>) {
    let Ok(Value::Object(body)) = serde_json::from_slice(body) else { return (None, None) };
    let name = get(&body, "Name").and_then(Value::as_str).map(str::to_string);
    (name, project(&body))
}

fn project(body: &Map<String, Value>) -> Option<String> {
    get(body, "Labels")?.get(PROJECT)?.as_str().map(str::to_string)
}

/// Networks that every daemon has, and modes that are no network.
fn built_in(mode: &str) -> bool {
    matches!(mode, "" | "default" | "bridge" | "host" | "none" | "nat")
}

fn get<'a>(map: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    map.get(name).or_else(|| map.iter().find(|(k, _)| k.eq_ignore_ascii_case(name)).map(|(_, v)| v))
}

fn strings(value: Option<&Value>) -> impl Iterator<Item = &str> {
    value.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_create_says_what_it_belongs_beside() {
        let body = serde_json::json!({
            "image": "app:1",
            "HostConfig": {
                "NetworkMode": "container:web", "VolumesFrom": ["data:ro"], "Links": ["/db:alias"],
                "Binds": ["cache:/cache", "/host:/h"],
                "Mounts": [{"Type": "volume", "Source": "v"}, {"Type": "bind", "Source": "/x"}]
            },
            "NetworkingConfig": {"EndpointsConfig": {"app_default": {}, "bridge": {}}}
        });
        let read = container(body.to_string().as_bytes());
        assert_eq!(read.image.as_deref(), Some("docker.io/library/app:1"));
        let beside: Vec<_> = read.beside.iter().map(|o| (o.kind, o.reference.as_str())).collect();
        assert_eq!(
            beside,
            [
                (Kind::Container, "web"),
                (Kind::Container, "data"),
                (Kind::Container, "db"),
                (Kind::Network, "app_default"),
                (Kind::Volume, "cache"),
                (Kind::Volume, "v")
            ]
        );
    }

    #[test]
    fn nonsense_is_left_to_the_daemon() {
        assert_eq!(container(b"{"), ContainerBody::default());
        assert_eq!(container(b"[1]"), ContainerBody::default());
        assert_eq!(container(br#"{"Image": 7, "HostConfig": []}"#), ContainerBody::default());
    }
}
