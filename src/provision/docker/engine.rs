//! The engine's API, as far as it is needed here.
//!
//! bollard knows the words of the API versions of its day. An answer with another word does not parse; that says
//! nothing about the daemon it is about, and is told apart from an engine that says no.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bollard::Docker;
use bollard::errors::Error;
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, NetworkCreateRequest, VolumeCreateRequest,
};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, CreateImageOptionsBuilder, EventsOptionsBuilder, InspectContainerOptions,
    InspectNetworkOptions, ListContainersOptionsBuilder, ListVolumesOptionsBuilder, LogsOptionsBuilder,
    RemoveContainerOptionsBuilder, RemoveVolumeOptionsBuilder, StartContainerOptions,
    StopContainerOptionsBuilder,
};
use futures_util::StreamExt as _;
use tokio::sync::watch;
use tokio::time::timeout;

use super::plan::{self, NUMBER, POOL};

/// How long the engine may take to say that it is there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is asked.
const PING: Duration = Duration::from_secs(3);

/// Why something did not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// There is no such thing.
    Gone,
    /// The engine says no, or does not answer.
    Refused(String),
    /// It has answered, in words that are not known here: nothing is known.
    Unclear(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Gone => f.write_str("it is not there"),
            Fault::Refused(why) => f.write_str(why),
            Fault::Unclear(what) => write!(f, "the engine's answer is not understood: {what}"),
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        match error {
            Error::DockerResponseServerError { status_code: 404, .. } => Fault::Gone,
            Error::DockerResponseServerError { message, .. } => Fault::Refused(message),
            Error::DockerStreamError { error } => Fault::Refused(error),
            error @ (Error::JsonDataError { .. }
            | Error::JsonSerdeError { .. }
            | Error::StrParseError { .. }) => Fault::Unclear(error.to_string()),
            error => Fault::Refused(in_full(&error)),
        }
    }
}

/// An error with its causes: `client error (Connect): connection refused`.
fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// An engine that has answered once.
pub(super) struct Engine {
    docker: Docker,
    host: String,
    /// Why it cannot be seen, while that is so.
    blind: Mutex<Option<String>>,
    /// Counts what it tells of the pool's containers.
    happened: watch::Sender<u64>,
}

impl Engine {
    /// Connects, and agrees on a version.
    pub async fn connect(host: &str) -> Result<Engine, String> {
        if std::env::var_os("DOCKER_TLS_VERIFY").is_some_and(|v| !v.is_empty()) && host.starts_with("tcp://")
        {
            return Err(format!(
                "{host}: TLS to an engine is not supported: run dindpool beside it, on its socket"
            ));
        }
        let fault = |error: Error| format!("no Docker engine answers at {host}: {}", in_full(&error));
        let docker = Docker::connect_with_host(host).map_err(fault)?;
        let agreed = timeout(PATIENCE, docker.negotiate_version()).await;
        let docker = agreed.map_err(|_| format!("no Docker engine answers at {host} within {PATIENCE:?}"))?;
        Ok(Engine {
            docker: docker.map_err(fault)?,
            host: host.to_string(),
            blind: Mutex::new(None),
            happened: watch::channel(0).0,
        })
    }

    /// Why it cannot be seen now.
    pub fn blind(&self) -> Option<String> {
        self.blind.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes when something has happened.
    pub fn happened(&self) -> watch::Receiver<u64> {
        self.happened.subscribe()
    }

    /// Follows what the engine tells of a pool's containers, and whether it answers at all.
    pub async fn follow(self: Arc<Self>, pool: String) {
        let filters = HashMap::from([
            ("type", vec!["container".to_string()]),
            ("label", vec![format!("{POOL}={pool}")]),
        ]);
        loop {
            let mut events =
                Box::pin(self.docker.events(Some(EventsOptionsBuilder::new().filters(&filters).build())));
            let mut pings = tokio::time::interval(PING);
            loop {
                tokio::select! {
                    event = events.next() => match event.map(|event| event.map_err(Fault::from)) {
                        // Also one that is not understood is one.
                        Some(Ok(_) | Err(Fault::Unclear(_))) => self.happened.send_modify(|n| *n += 1),
                        Some(Err(_)) | None => break,
                    },
                    _ = pings.tick() => self.look().await,
                }
            }
            self.look().await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    async fn look(&self) {
        let answer = timeout(PATIENCE, self.docker.ping()).await;
        let blind = match answer.map(|answer| answer.map_err(Fault::from)) {
            Ok(Ok(_) | Err(Fault::Unclear(_))) => None,
            Ok(Err(why)) => Some(format!("the Docker engine at {} does not answer: {why}", self.host)),
            Err(_) => Some(format!("the Docker engine at {} does not answer within {PATIENCE:?}", self.host)),
        };
        let before =
            std::mem::replace(&mut *self.blind.lock().unwrap_or_else(PoisonError::into_inner), blind);
        if before.is_some() && self.blind().is_none() {
            // What its containers have done meanwhile was not told.
            self.happened.send_modify(|n| *n += 1);
        }
    }

    /// The numbers of a pool's daemons that have a container or a volume.
    pub async fn numbers(&self, pool: &str) -> Result<BTreeSet<usize>, Fault> {
        let filters = HashMap::from([("label", vec![format!("{POOL}={pool}")])]);
        let all = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
        let containers = self.docker.list_containers(Some(all)).await?;
        let some = ListVolumesOptionsBuilder::new().filters(&filters).build();
        let volumes = self.docker.list_volumes(Some(some)).await?.volumes.unwrap_or_default();
        let labels = containers.into_iter().filter_map(|container| container.labels);
        let labels = labels.chain(volumes.into_iter().map(|volume| volume.labels));
        Ok(labels.filter_map(|labels| labels.get(NUMBER)?.parse().ok()).collect())
    }

    /// A container as it is.
    pub async fn inspect(&self, name: &str) -> Result<ContainerInspectResponse, Fault> {
        let asked = self.docker.inspect_container(name, None::<InspectContainerOptions>);
        match timeout(PATIENCE, asked).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(Fault::Refused(format!("no answer within {PATIENCE:?}"))),
        }
    }

    /// Whether an image is there.
    pub async fn has_image(&self, image: &str) -> Result<bool, Fault> {
        match self.docker.inspect_image(image).await.map_err(Fault::from) {
            // It is there, whatever is said about it.
            Ok(_) | Err(Fault::Unclear(_)) => Ok(true),
            Err(Fault::Gone) => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// Pulls an image.
    pub async fn pull(&self, image: &str) -> Result<(), Fault> {
        let mut options = CreateImageOptionsBuilder::new().from_image(image);
        let last = image.rsplit('/').next().unwrap_or(image);
        if !last.contains(':') && !image.contains('@') {
            // Without a tag all of them would come.
            options = options.tag("latest");
        }
        let mut lines = Box::pin(self.docker.create_image(Some(options.build()), None, None));
        while let Some(line) = lines.next().await {
            match line.map_err(Fault::from) {
                Ok(_) | Err(Fault::Unclear(_)) => {}
                Err(Fault::Gone) => return Err(Fault::Refused("there is no such image".into())),
                Err(fault) => return Err(fault),
            }
        }
        Ok(())
    }

    /// Makes a network of a pool, unless it is there.
    pub async fn make_network(&self, name: &str, pool: &str) -> Result<(), Fault> {
        match self.docker.inspect_network(name, None::<InspectNetworkOptions>).await.map_err(Fault::from) {
            Ok(_) | Err(Fault::Unclear(_)) => return Ok(()),
            Err(Fault::Gone) => {}
            Err(fault) => return Err(fault),
        }
        let labels = HashMap::from([(POOL.to_string(), pool.to_string())]);
        let request = NetworkCreateRequest {
            name: name.to_string(),
            driver: Some("bridge".to_string()),
            labels: Some(labels),
            ..NetworkCreateRequest::default()
        };
        done(self.docker.create_network(request).await)
    }

    /// Removes a network, if it is the pool's own.
    pub async fn remove_network(&self, name: &str, pool: &str) -> Result<(), Fault> {
        let found =
            self.docker.inspect_network(name, None::<InspectNetworkOptions>).await.map_err(Fault::from);
        let own = match found {
            Ok(network) => network.labels.is_some_and(|labels| labels.get(POOL).is_some_and(|of| of == pool)),
            Err(Fault::Gone) => return Ok(()),
            Err(fault) => return Err(fault),
        };
        if own { unless_gone(done(self.docker.remove_network(name).await)) } else { Ok(()) }
    }

    /// Makes a daemon's volume, unless it is there, and its container, and starts that.
    pub async fn create(
        &self,
        pool: &str,
        index: usize,
        container: ContainerCreateBody,
    ) -> Result<(), Fault> {
        let name = plan::name(pool, index);
        let volume = VolumeCreateRequest {
            name: Some(name.clone()),
            labels: Some(plan::labels(pool, index)),
            ..VolumeCreateRequest::default()
        };
        match self.docker.create_volume(volume).await.map_err(Fault::from) {
            // One of this name that was there already is given as it is.
            Ok(volume) if volume.labels.get(POOL).is_none_or(|of| of != pool) => {
                return Err(Fault::Refused(format!("there is a volume {name} that is not this pool's")));
            }
            Ok(_) | Err(Fault::Unclear(_)) => {}
            Err(fault) => return Err(fault),
        }
        let options = CreateContainerOptionsBuilder::new().name(&name).build();
        done(self.docker.create_container(Some(options), container).await)?;
        done(self.docker.start_container(&name, None::<StartContainerOptions>).await)
    }

    /// Lets a container end by itself within a grace.
    pub async fn stop(&self, name: &str, grace: Duration) -> Result<(), Fault> {
        let seconds = i32::try_from(grace.as_secs()).unwrap_or(i32::MAX);
        let options = StopContainerOptionsBuilder::new().t(seconds).build();
        unless_gone(done(self.docker.stop_container(name, Some(options)).await))
    }

    /// Removes a container, whatever it does, with the volumes that its image has made for it.
    pub async fn remove_container(&self, name: &str) -> Result<(), Fault> {
        let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
        unless_gone(done(self.docker.remove_container(name, Some(options)).await))
    }

    /// Removes a volume, if it is the pool's own.
    pub async fn remove_volume(&self, name: &str, pool: &str) -> Result<(), Fault> {
        match self.docker.inspect_volume(name).await.map_err(Fault::from) {
            Ok(volume) if volume.labels.get(POOL).is_some_and(|of| of == pool) => {}
            Ok(_) | Err(Fault::Gone) => return Ok(()),
            Err(fault) => return Err(fault),
        }
        let options = RemoveVolumeOptionsBuilder::new().build();
        unless_gone(done(self.docker.remove_volume(name, Some(options)).await))
    }

    /// The last lines of a container's log.
    pub async fn log(&self, name: &str) -> String {
        let options = LogsOptionsBuilder::new().stdout(true).stderr(true).tail("40").build();
        let mut lines = Box::pin(self.docker.logs(name, Some(options)));
        let mut text = String::new();
        let read = async {
            while let Some(Ok(line)) = lines.next().await {
                text.push_str(&String::from_utf8_lossy(&line.into_bytes()));
            }
        };
        let _ = timeout(PATIENCE, read).await;
        text
    }
}

/// What an answer says beyond yes is of no interest here, so it may say it in any words.
fn done<T>(result: Result<T, Error>) -> Result<(), Fault> {
    match result.map_err(Fault::from) {
        Ok(_) | Err(Fault::Unclear(_)) => Ok(()),
        Err(fault) => Err(fault),
    }
}

fn unless_gone(result: Result<(), Fault>) -> Result<(), Fault> {
    if result == Err(Fault::Gone) { Ok(()) } else { result }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_does_not_parse_is_no_verdict() {
        let unknown: Result<bollard::models::ContainerState, _> =
            serde_json::from_str(r#"{"Status": "hibernating"}"#);
        let fault = Fault::from(Error::from(unknown.unwrap_err()));
        assert!(matches!(&fault, Fault::Unclear(what) if what.contains("hibernating")), "{fault:?}");
        assert_eq!(done::<()>(Err(Error::JsonDataError { message: "x".into(), column: 1 })), Ok(()));
        let server = |status_code| Error::DockerResponseServerError { status_code, message: "no".into() };
        assert_eq!(Fault::from(server(404)), Fault::Gone);
        assert_eq!(Fault::from(server(409)), Fault::Refused("no".into()));
    }
}
