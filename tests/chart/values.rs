//! The values: each is documented by its default, known to the schema, and wrong ones are refused.

use std::collections::BTreeSet;

use dindpool::config::{Faults, Raw};
use dindpool::tls::{Clients, Plain};
use serde_json::Value;

use crate::common::helm;
use crate::{needs, object, objects, read, require, sets, template};

fn schema() -> Value {
    serde_json::from_str(&read("helm/dindpool/values.schema.json")).unwrap()
}

/// Follows a reference of the schema.
fn resolved<'a>(schema: &'a Value, of: &'a Value) -> &'a Value {
    match of["$ref"].as_str() {
        Some(to) => &schema["$defs"][to.trim_start_matches("#/$defs/")],
        None => of,
    }
}

/// All names with a default of their own, and all that the schema lists, as paths.
fn compare(schema: &Value, at: &str, of: &Value, defaults: &Value) {
    let of = resolved(schema, of);
    let Some(properties) = of["properties"].as_object() else { return };
    assert_eq!(of["additionalProperties"], false, "{at}: another name is not refused");
    let Some(defaults) = defaults.as_object() else { return };
    for (name, of) in properties {
        // These are told by their names: dindpool's own settings, and what Helm itself hands on.
        let known =
            at == ".config" || at.ends_with("resources") || name == "global" || name == "rollingUpdate";
        assert!(known || defaults.contains_key(name), "values.yaml does not tell of {at}.{name}");
        if let Some(default) = defaults.get(name) {
            compare(schema, &format!("{at}.{name}"), of, default);
        }
    }
    for name in defaults.keys() {
        assert!(properties.contains_key(name), "the schema does not know {at}.{name}");
    }
}

#[test]
fn every_value_has_its_default_and_no_other_is_taken() {
    let defaults = helm::documents(&read("helm/dindpool/values.yaml")).unwrap().remove(0);
    let schema = schema();
    compare(&schema, "", &schema, &defaults);
}

/// The settings of dindpool's file.
fn keys() -> BTreeSet<String> {
    let Faults(faults) = Raw::from_toml("no_such_key = 1").unwrap_err();
    let list = faults[0].split("known are ").nth(1).unwrap();
    list.split(", ").map(str::to_owned).collect()
}

#[test]
fn the_settings_that_have_no_value_of_their_own_are_those_of_config() {
    let own = |key: &String| {
        let named = [
            "listen",
            "tls",
            "identify",
            "admin",
            "admin_token_file",
            "daemons",
            "daemon_tls",
            "kubernetes",
            "scaler",
            "lease",
            "prestop",
            "prestop_token_file",
        ];
        named.contains(&key.as_str()) || key.starts_with("scale_")
    };
    let expected: BTreeSet<String> = keys().into_iter().filter(|key| !own(key)).collect();
    let schema = schema();
    let found = schema["properties"]["config"]["properties"].as_object().unwrap();
    assert_eq!(found.keys().cloned().collect::<BTreeSet<_>>(), expected);
}

#[test]
fn dindpool_understands_the_file_that_values_make() {
    require!(needs());
    for set in sets() {
        let objects = objects(set.as_deref());
        let toml = object(&objects, "ConfigMap", "proxy")["data"]["dindpool.toml"].as_str().unwrap();
        // Files of tokens and certificates are in the pod alone.
        let there = |line: &&str| !line.starts_with("admin_token_file") && !line.starts_with("prestop");
        let lines: Vec<&str> = toml.lines().filter(there).collect();
        let mut raw = Raw::from_toml(&lines.join("\n")).unwrap_or_else(|faults| panic!("{set:?}: {faults}"));
        let rules = raw.identify.take().unwrap_or_default().len();
        let tls = raw.tls.take().map(|tls| tls.validate().unwrap().unwrap());
        let everything = set.as_ref().is_some_and(|path| path.ends_with("everything.yaml"));
        let known = tls.map(|tls| (tls.clients, tls.plain));
        let expected = everything.then_some((Clients::Optional, Plain::Refused));
        assert_eq!((known, rules), (expected, if everything { 2 } else { 0 }), "{set:?}");
        let settings = raw.validate(true).unwrap_or_else(|faults| panic!("{set:?}: {faults}"));
        let deployment = object(&objects, "Deployment", "dind");
        let name = deployment["metadata"]["name"].as_str().unwrap();
        let target = settings.kubernetes.unwrap();
        assert_eq!((target.namespace.as_deref(), target.deployment.as_str()), (Some("ci"), name));
        // Two who scale would work against each other.
        assert!(!settings.pool.scaler || deployment["spec"]["replicas"].is_null(), "{set:?}");

        let pod = &object(&objects, "Deployment", "proxy")["spec"]["template"]["spec"];
        let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
        // One of several first waits for its successor.
        let succeeded = settings.lease.map(|lease| lease.duration).unwrap_or_default();
        let needed = (succeeded + settings.shutdown_delay + settings.shutdown_grace).as_secs();
        let said = set.is_some_and(|path| path.ends_with("fixed.yaml"));
        assert!(said || (needed + 15..needed + 17).contains(&grace), "{grace} s for {needed} s");
    }
}

#[test]
fn wrong_values_are_refused_by_their_names() {
    require!(needs());
    for (set, told) in [
        ("replicas=3", "additional properties 'replicas' not allowed"),
        ("dind.storage.typ=ephemeral", "additional properties 'typ' not allowed"),
        ("dind.storage.type=hostPath", "/dind/storage/type': value must be one of 'emptyDir', 'ephemeral'"),
        ("dind.storage.emptyDir.sizeLimit=lots", "/dind/storage/emptyDir/sizeLimit'"),
        ("dind.storage.ephemeral.accessModes={ReadWriteMany}", "'ReadWriteOnce', 'ReadWriteOncePod'"),
        ("dind.image.tag=a b", "/dind/image/tag'"),
        ("dind.mtu=9", "/dind/mtu': minimum: got 9, want 576"),
        ("dind.registryMirrors={mirror:5000}", "/dind/registryMirrors/0'"),
        ("tls.clients=some", "/tls/clients': value must be one of 'required', 'optional', 'off'"),
        ("tls.plain=refused", "tls: identify and plain=refused need a certificate"),
        ("tls.certManager.enabled=true", "name the Issuer"),
        ("image.digest=latest", "/image/digest'"),
        ("image.pullPolicy=Sometimes", "'Always', 'IfNotPresent', 'Never'"),
        ("scaler.max=0", "/scaler/max': minimum: got 0, want 1"),
        ("scaler.spare=some", "/scaler/spare'"),
        ("scaler.stabilisation=5", "/scaler/stabilisation'"),
        ("config.session_grace=soon", "/config/session_grace'"),
        ("config.queue_limit=-1", "/config/queue_limit': minimum: got -1, want 0"),
        ("config.log_format=xml", "/config/log_format': value must be one of 'text', 'json'"),
        ("config.listen=tcp://0.0.0.0:1", "additional properties 'listen' not allowed"),
        ("service.type=ExternalName", "'ClusterIP', 'NodePort', 'LoadBalancer'"),
        ("service.port=70000", "/service/port': maximum: got 70,000, want 65,535"),
        ("proxy.tenant=team a", "/proxy/tenant'"),
        ("proxy.resources.cpu=1", "additional properties 'cpu' not allowed"),
        ("proxy.extraListeners[0].port=2376", "missing properties 'name', 'tenant'"),
        ("monitoring.serviceMonitor.interval=often", "/monitoring/serviceMonitor/interval'"),
        // What contradicts itself is told by the templates.
        ("dind.replicas=2", "dind.replicas: dindpool itself decides how many daemons there are"),
        ("scaler.min=11", "scaler.min, scaler.max: 11 to 10 daemons are no pool"),
        ("service.nodePort=32375", "service.nodePort: a ClusterIP has none"),
        ("dind.extraArgs={--data-root=/cache}", "dind.extraArgs: --data-root=/cache: a daemon's data are in"),
        (
            "dind.extraVolumeMounts[0].name=a,dind.extraVolumeMounts[0].mountPath=/var/lib/docker/",
            "dind.extraVolumeMounts: /var/lib/docker/ is each daemon's own",
        ),
        (
            "proxy.extraListeners[0].name=a,proxy.extraListeners[0].port=2375,proxy.extraListeners[0].tenant=a",
            "proxy.extraListeners: port 2375 of a is in use already",
        ),
        (
            "monitoring.serviceMonitor.enabled=true,monitoring.podMonitor.enabled=true",
            "monitoring: with both serviceMonitor and podMonitor everything would be scraped twice",
        ),
    ] {
        let fault = template(&["--set", set]).err().unwrap_or_else(|| panic!("{set} is taken"));
        assert!(fault.contains(told), "{set}: {fault}");
    }
}
