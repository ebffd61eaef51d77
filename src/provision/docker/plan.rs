//! What a daemon's container is to be, and what an engine's words about one mean. Pure.

use std::collections::HashMap;
use std::net::IpAddr;

use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, HealthStatusEnum, HostConfig, Mount, MountType,
};

use super::Options;

/// The label with the pool's name, on all that is the pool's.
pub(super) const POOL: &str = "dindpool.pool";
/// The label with the daemon's number.
pub(super) const NUMBER: &str = "dindpool.daemon";
/// The label with what the container was made from: another one is not adopted.
const SHAPE: &str = "dindpool.shape";

/// Whether Docker takes it as the beginning of a container's name.
pub fn is_name(text: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    (1..=64).contains(&text.len()) && text.bytes().all(good) && text.as_bytes()[0].is_ascii_alphanumeric()
}

/// A size: `512m`, `8g`, `8GiB`, or bytes. A unit is a power of 1024, as of `docker run --memory`.
pub fn bytes(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = unit.to_ascii_lowercase();
    let power = match unit.trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        _ => return None,
    };
    let value = number.parse::<f64>().ok()? * 1024_f64.powi(power);
    // Docker's least; and what a u64 holds.
    ((6_291_456.0..1e18).contains(&value)).then_some(value as u64)
}

/// The name of a daemon, its container and its volume.
pub(super) fn name(pool: &str, index: usize) -> String {
    format!("{pool}-{index}")
}

/// The labels of what is a daemon's.
pub(super) fn labels(pool: &str, index: usize) -> HashMap<String, String> {
    HashMap::from([(POOL.to_string(), pool.to_string()), (NUMBER.to_string(), index.to_string())])
}

/// The network that the pool's daemons are on.
pub(super) fn network(options: &Options) -> &str {
    options.network.as_deref().unwrap_or(&options.name)
}

/// All that decides whether a container is the one that is wanted.
fn shape(options: &Options) -> String {
    let Options { image, cpus, memory, extra_args, port, .. } = options;
    serde_json::json!({
        "image": image, "cpus": cpus, "memory": memory, "args": extra_args, "network": network(options), "port": port,
    })
    .to_string()
}

/// The container of a daemon.
pub(super) fn container(options: &Options, index: usize) -> ContainerCreateBody {
    let name = name(&options.name, index);
    let mut labels = labels(&options.name, index);
    labels.insert(SHAPE.to_string(), shape(options));
    // Without the first, `docker:dind` makes certificates and listens on 2376; without the second it waits for 15 s.
    let mut args = vec!["--tls=false".to_string()];
    if options.port != crate::provision::fixed::DEFAULT_PORT {
        args.push(format!("--host=tcp://0.0.0.0:{}", options.port));
    }
    args.extend(options.extra_args.iter().cloned());
    ContainerCreateBody {
        hostname: Some(name.clone()),
        image: Some(options.image.clone()),
        cmd: Some(args),
        env: Some(vec!["DOCKER_TLS_CERTDIR=".to_string()]),
        labels: Some(labels),
        host_config: Some(HostConfig {
            privileged: Some(true),
            network_mode: Some(network(options).to_string()),
            nano_cpus: options.cpus.map(|cpus| (cpus * 1e9) as i64),
            memory: options.memory.and_then(|bytes| i64::try_from(bytes).ok()),
            mounts: Some(vec![Mount {
                target: Some("/var/lib/docker".to_string()),
                source: Some(name),
                typ: Some(MountType::VOLUME),
                ..Mount::default()
            }]),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}

/// A container as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    /// Its id.
    pub id: String,
    /// It is this pool's.
    pub ours: bool,
    /// It was made from what is wanted now.
    pub fits: bool,
    /// Where it is on the pool's network, if it runs.
    pub ip: Option<IpAddr>,
    /// Why it does not run, if it does not.
    pub ended: Option<String>,
    /// What its health check complains about.
    pub unwell: Option<String>,
}

/// What an engine's answer means.
pub(super) fn judge(options: &Options, answer: ContainerInspectResponse) -> Seen {
    let state = answer.state.unwrap_or_default();
    let labels = answer.config.and_then(|config| config.labels).unwrap_or_default();
    let label = |name: &str| labels.get(name).map(String::as_str);
    let runs = state.running.unwrap_or(false) && !state.restarting.unwrap_or(false);
    let networks = answer.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    let on = networks.get(network(options));
    let text = on
        .and_then(|at| at.ip_address.clone().filter(|ip| !ip.is_empty()).or(at.global_ipv6_address.clone()));
    let ended = (!runs).then(|| match (&state.error, state.exit_code) {
        (Some(error), _) if !error.is_empty() => format!("its container did not start: {error}"),
        _ if state.oom_killed == Some(true) => "its container ran out of memory".to_string(),
        (_, Some(137)) => "its container was killed".to_string(),
        (_, Some(code)) => format!("its container ended with status {code}"),
        (_, None) => "its container does not run".to_string(),
    });
    let unwell =
        state.health.filter(|health| health.status == Some(HealthStatusEnum::UNHEALTHY)).map(|health| {
            let last =
                health.log.and_then(|mut log| log.pop()).and_then(|check| check.output).unwrap_or_default();
            format!("its health check fails: {}", last.trim().lines().next_back().unwrap_or_default())
        });
    Seen {
        id: answer.id.unwrap_or_default(),
        ours: label(POOL) == Some(&options.name),
        fits: label(SHAPE) == Some(&shape(options)),
        ip: text.filter(|_| runs).and_then(|ip| ip.parse().ok()),
        ended,
        unwell,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(value: serde_json::Value) -> ContainerInspectResponse {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn sizes_are_dockers() {
        for (text, value) in
            [("512m", 512 << 20), ("8g", 8 << 30), ("8GiB", 8 << 30), ("1.5G", 3 << 29), ("8388608", 8 << 20)]
        {
            assert_eq!(bytes(text), Some(value), "{text}");
        }
        for bad in ["", "g", "8x", "1m", "-8g", "1e30g"] {
            assert_eq!(bytes(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_daemon_is_privileged_within_its_limits_on_a_volume_of_its_own() {
        let options = Options {
            cpus: Some(1.5),
            memory: Some(1 << 30),
            extra_args: vec!["--mtu=1400".into()],
            port: 2400,
            ..Options::new(super::super::DEFAULT_HOST)
        };
        let body = container(&options, 3);
        let host = body.host_config.unwrap();
        assert_eq!(
            (host.privileged, host.nano_cpus, host.memory),
            (Some(true), Some(1_500_000_000), Some(1 << 30))
        );
        assert_eq!(host.network_mode.as_deref(), Some("dindpool"));
        assert_eq!(host.mounts.unwrap()[0].source.as_deref(), Some("dindpool-3"));
        assert_eq!(body.cmd.unwrap(), ["--tls=false", "--host=tcp://0.0.0.0:2400", "--mtu=1400"]);
    }

    #[test]
    fn what_a_container_is_is_read_from_what_the_engine_says() {
        let options = Options::new(super::super::DEFAULT_HOST);
        let made = container(&options, 0).labels.unwrap();
        let running = answer(serde_json::json!({
            "Id": "c0", "State": { "Status": "running", "Running": true }, "Config": { "Labels": made },
            "NetworkSettings": { "Networks": { "dindpool": { "IPAddress": "172.18.0.2" } } },
        }));
        let seen = judge(&options, running.clone());
        assert_eq!((seen.ours, seen.fits, seen.ended.clone()), (true, true, None));
        assert_eq!(seen.ip, Some("172.18.0.2".parse().unwrap()));
        let other = Options { image: "docker:29-dind".into(), ..options.clone() };
        assert!(!judge(&other, running.clone()).fits && judge(&other, running.clone()).ours);
        assert!(!judge(&Options { name: "p".into(), ..options.clone() }, running).ours);
        for (state, word) in [
            (serde_json::json!({ "Running": false, "ExitCode": 1 }), "ended with status 1"),
            (serde_json::json!({ "Running": false, "ExitCode": 137, "OOMKilled": true }), "out of memory"),
            (serde_json::json!({ "Running": false, "ExitCode": 137 }), "was killed"),
            (
                serde_json::json!({ "Running": false, "ExitCode": 128, "Error": "no such runtime" }),
                "no such runtime",
            ),
        ] {
            let seen = judge(&options, answer(serde_json::json!({ "Id": "c0", "State": state })));
            assert!(
                seen.ended.clone().is_some_and(|why| why.contains(word)) && seen.ip.is_none(),
                "{seen:?}"
            );
        }
        let unwell = serde_json::json!({ "Running": true, "Health": { "Status": "unhealthy", "Log": [
            { "ExitCode": 1, "Output": "a\nCannot connect\n" }] } });
        let seen = judge(&options, answer(serde_json::json!({ "Id": "c0", "State": unwell })));
        assert_eq!(seen.unwell.as_deref(), Some("its health check fails: Cannot connect"));
    }

    #[test]
    fn names_are_dockers() {
        assert!(is_name("dindpool") && is_name("a.b_c-1"));
        for bad in ["", "-a", "a/b", "a b", &"x".repeat(65)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
