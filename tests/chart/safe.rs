//! What must hold of everything that is rendered, whatever the values.

use serde_json::{Value, json};

use crate::{needs, object, objects, read, require, sets, template};

fn pod<'a>(objects: &'a [Value], component: &str) -> &'a Value {
    &object(objects, "Deployment", component)["spec"]["template"]["spec"]
}

#[test]
fn the_proxy_is_a_restricted_pod_and_a_daemon_has_no_token() {
    require!(needs());
    for set in sets() {
        let objects = objects(set.as_deref());
        let proxy = pod(&objects, "proxy");
        let context = &proxy["securityContext"];
        assert_eq!(context["runAsNonRoot"], true);
        assert_eq!(context["seccompProfile"]["type"], "RuntimeDefault");
        let container = &proxy["containers"][0]["securityContext"];
        assert_eq!(container["readOnlyRootFilesystem"], true);
        assert_eq!(container["allowPrivilegeEscalation"], false);
        assert_eq!(container["capabilities"], json!({ "drop": ["ALL"] }));
        for probe in ["livenessProbe", "readinessProbe"] {
            let probe = &proxy["containers"][0][probe];
            assert!(probe.is_null() || probe["httpGet"]["port"] == "admin", "{set:?}: {probe}");
        }
        assert_eq!(pod(&objects, "dind")["automountServiceAccountToken"], false);
        for o in &objects {
            let kind = o["kind"].as_str().unwrap();
            assert!(!["ClusterRole", "ClusterRoleBinding"].contains(&kind), "{set:?} makes a {kind}");
            let hooks = o["metadata"]["name"].as_str().is_some_and(|name| name.ends_with("-prestop"));
            assert!(kind != "Secret" || hooks, "{set:?} makes a {kind}");
        }
    }
}

#[test]
fn each_daemon_has_a_volume_of_its_own() {
    require!(needs());
    for set in sets() {
        let objects = objects(set.as_deref());
        let dind = pod(&objects, "dind");
        let mounts = dind["containers"][0]["volumeMounts"].as_array().unwrap();
        let data: Vec<&Value> = mounts.iter().filter(|m| m["mountPath"] == "/var/lib/docker").collect();
        assert_eq!(data.len(), 1);
        let volumes = dind["volumes"].as_array().unwrap();
        let volume = volumes.iter().find(|v| v["name"] == data[0]["name"]).unwrap();
        let own = volume["emptyDir"]["sizeLimit"].is_string() || volume["ephemeral"].is_object();
        assert!(own, "{set:?}: {volume}");
        assert!(volumes.iter().all(|v| v["hostPath"].is_null()));
        let args = dind["containers"][0]["args"].as_array().unwrap();
        assert!(args.contains(&json!("--tls=false")), "dockerd would wait 15 s: {args:?}");
    }
}

/// The rights in a document: its only block of YAML that begins with `rules:`.
fn documented() -> Value {
    let document = read("docs/kubernetes.md");
    let block = document.split("```yaml\nrules:").nth(1).expect("rules").split("```").next().unwrap();
    crate::helm::documents(&format!("rules:{block}")).unwrap().remove(0)["rules"].clone()
}

#[test]
fn the_rights_are_those_that_are_documented() {
    require!(needs());
    let objects = objects(None);
    let rules = |objects: &[Value]| {
        let mut rules = object(objects, "Role", "proxy")["rules"].clone();
        rules[0]["resourceNames"] = json!(["dind"]);
        rules
    };
    let several = template(&["--set", "proxy.replicas=2"]).unwrap();
    assert_eq!(rules(&crate::helm::documents(&several).unwrap()), documented());
    // One alone needs no Lease.
    let mut without = documented();
    without.as_array_mut().unwrap().retain(|rule| rule["resources"] != json!(["leases"]));
    assert_eq!(rules(&objects), without);
    let bound = &object(&objects, "RoleBinding", "proxy")["subjects"][0]["name"];
    assert_eq!(bound, &pod(&objects, "proxy")["serviceAccountName"]);
    // Who only looks may only look.
    let yaml = template(&["--set", "scaler.enabled=false"]).unwrap();
    let objects = crate::helm::documents(&yaml).unwrap();
    assert_eq!(object(&objects, "Role", "proxy")["rules"][0]["verbs"], json!(["get"]));
}

/// A map without one of its keys.
fn without(map: &Value, key: &str) -> Value {
    let mut map = map.clone();
    map.as_object_mut().unwrap().remove(key);
    map
}

/// Whether labels have all that a selector wants.
fn selects(selector: &Value, labels: &Value) -> bool {
    selector.as_object().is_some_and(|all| all.iter().all(|(name, value)| labels[name] == *value))
}

#[test]
fn selectors_select_their_pods_and_no_others() {
    require!(needs());
    for set in sets() {
        let objects = objects(set.as_deref());
        let labels =
            |component| &object(&objects, "Deployment", component)["spec"]["template"]["metadata"]["labels"];
        let of = |component: &str| if component == "dind" { "dind" } else { "proxy" };
        let mut seen = 0;
        for o in &objects {
            let spec = &o["spec"];
            let selector = match o["kind"].as_str().unwrap() {
                // The proxy that decides puts this on its own pod.
                "Service" => &without(&spec["selector"], "dindpool.io/admits"),
                "NetworkPolicy" => &spec["podSelector"]["matchLabels"],
                "Deployment" | "PodDisruptionBudget" | "PodMonitor" => &spec["selector"]["matchLabels"],
                "ServiceMonitor" => {
                    let monitored = |o: &&Value| {
                        o["kind"] == "Service"
                            && selects(&spec["selector"]["matchLabels"], &o["metadata"]["labels"])
                    };
                    let services: Vec<_> = objects.iter().filter(monitored).collect();
                    assert_eq!(services.len(), 1, "{set:?}: a pod would be counted twice, or never");
                    // Each proxy counts what it relays, also those that do not decide.
                    assert!(services[0]["spec"]["selector"]["dindpool.io/admits"].is_null(), "{set:?}");
                    continue;
                }
                _ => continue,
            };
            seen += 1;
            let component = of(o["metadata"]["labels"]["app.kubernetes.io/component"].as_str().unwrap());
            let other = if component == "dind" { "proxy" } else { "dind" };
            assert!(selects(selector, labels(component)), "{set:?}: {o}");
            assert!(!selects(selector, labels(other)), "{set:?}: {o}");
        }
        assert!(seen >= 4);
    }
}

#[test]
fn of_several_proxies_the_one_that_decides_is_asked_and_nodes_are_drained_of_one_after_the_other() {
    require!(needs());
    let objects = |set: &str| crate::helm::documents(&template(&["--set", set]).unwrap()).unwrap();
    let (one, two) = (objects("proxy.replicas=1"), objects("proxy.replicas=2"));
    let of = |objects: &[Value], kind: &str, component: &str| {
        let is = |o: &&Value| {
            o["kind"] == kind && o["metadata"]["labels"]["app.kubernetes.io/component"] == component
        };
        objects.iter().find(is).map(|o| o["spec"].clone())
    };
    for component in ["proxy", "admin"] {
        let admits =
            |objects| of(objects, "Service", component).unwrap()["selector"]["dindpool.io/admits"].clone();
        assert!(admits(&one).is_null(), "nobody labels a proxy that is alone");
        assert!(admits(&two).is_string(), "{component}");
    }
    assert!(of(&one, "Service", "metrics").is_none());
    assert_eq!(of(&two, "Service", "metrics").unwrap()["clusterIP"], "None");
    // With one proxy it would keep its node from being drained.
    assert!(of(&one, "PodDisruptionBudget", "proxy").is_none());
    assert_eq!(of(&two, "PodDisruptionBudget", "proxy").unwrap()["maxUnavailable"], 1);
    let without = objects("proxy.replicas=2,podDisruptionBudget.proxy.enabled=false");
    assert!(of(&without, "PodDisruptionBudget", "proxy").is_none());
}

#[test]
fn only_the_proxy_reaches_the_daemons_and_who_is_named_the_admin_port() {
    require!(needs());
    let sets = sets();
    let everything = sets.iter().flatten().find(|path| path.ends_with("everything.yaml")).unwrap();
    for (set, clients, admin) in [(None, 0, 1), (Some(everything.as_path()), 1, 2)] {
        let objects = objects(set);
        let policy = &object(&objects, "NetworkPolicy", "dind")["spec"];
        assert_eq!(policy["policyTypes"][0], "Ingress");
        let from = policy["ingress"][0]["from"].as_array().unwrap();
        assert_eq!(from.len(), 1);
        let proxy = &object(&objects, "Deployment", "proxy")["spec"]["selector"]["matchLabels"];
        assert_eq!(&from[0], &json!({ "podSelector": { "matchLabels": proxy } }));
        assert_eq!(policy["ingress"][0]["ports"], json!([{ "port": "docker", "protocol": "TCP" }]));

        let rules = object(&objects, "NetworkPolicy", "proxy")["spec"]["ingress"].as_array().unwrap().clone();
        let who = |rule: &Value| rule["from"].as_array().map_or(0, Vec::len);
        assert_eq!((who(&rules[0]), who(&rules[1])), (clients, admin));
        assert_eq!(rules[1]["ports"], json!([{ "port": "admin", "protocol": "TCP" }]));
        assert_eq!(rules[1]["from"][0], json!({ "podSelector": {} }));
    }
}

/// A chart with another number changes the proxy, and must not end the builds of the daemons.
#[test]
fn another_version_of_the_chart_does_not_replace_the_daemons() {
    require!(needs());
    let dir = tempfile::tempdir().unwrap();
    let chart = dir.path().join("dindpool");
    let copied = std::process::Command::new("cp").args(["-a"]).arg(crate::helm::chart()).arg(&chart).status();
    assert!(copied.unwrap().success());
    let about = read("helm/dindpool/Chart.yaml").replace("0.1.0", "0.2.0");
    std::fs::write(chart.join("Chart.yaml"), about).unwrap();
    let home = tempfile::tempdir().unwrap();
    let mut helm = require!(crate::helm::command(home.path()));
    let output = helm.args(["template", "ci", "--namespace", "ci"]).arg(&chart).output().unwrap();
    let next = crate::helm::documents(&crate::helm::said(output).unwrap()).unwrap();
    let now = objects(None);
    let template = |objects: &[Value], component| object(objects, "Deployment", component)["spec"].clone();
    assert_eq!(template(&now, "dind"), template(&next, "dind"));
    assert_ne!(template(&now, "proxy"), template(&next, "proxy"), "its image is another one");
}

/// The token of hooks and proxy is one Secret; the address is a Service of the proxy's; the script is that of deploy.
#[test]
fn the_hooks_of_the_daemons_reach_the_proxy() {
    require!(needs());
    let objects = objects(None);
    let dind = pod(&objects, "dind");
    let script = object(&objects, "ConfigMap", "dind");
    assert_eq!(script["data"]["prestop.sh"].as_str().unwrap().trim(), read("deploy/prestop.sh").trim());
    assert_eq!(read("helm/dindpool/files/prestop.sh"), read("deploy/prestop.sh"));
    let secret = object(&objects, "Secret", "dind")["metadata"]["name"].clone();
    let sources = dind["volumes"][0]["projected"]["sources"].as_array().unwrap();
    assert_eq!(sources[0]["configMap"]["name"], script["metadata"]["name"]);
    assert_eq!(sources[1]["secret"]["name"], secret);
    let volumes = pod(&objects, "proxy")["volumes"].as_array().unwrap();
    assert!(volumes.iter().any(|volume| volume["secret"]["secretName"] == secret));

    let service = object(&objects, "Service", "prestop");
    let port = service["spec"]["ports"][0]["port"].as_u64().unwrap();
    let url = format!("http://{}.ci.svc:{port}", service["metadata"]["name"].as_str().unwrap());
    let env = dind["containers"][0]["env"].as_array().unwrap();
    assert!(env.contains(&json!({ "name": "DINDPOOL_PRESTOP_URL", "value": url })), "{env:?}");
    let toml = object(&objects, "ConfigMap", "proxy")["data"]["dindpool.toml"].as_str().unwrap();
    assert!(toml.contains(&format!("\nprestop = \"0.0.0.0:{port}\"\n")), "{toml}");
    let hook = json!({ "exec": { "command": ["sh", "/etc/dindpool/prestop.sh"] } });
    assert_eq!(dind["containers"][0]["lifecycle"]["preStop"], hook);

    let yaml = template(&["--set", "dind.prestop.enabled=false"]).unwrap();
    assert!(!yaml.to_lowercase().contains("prestop"), "{yaml}");
}

#[test]
fn a_certificate_of_cert_manager_is_for_the_service_and_is_mounted() {
    require!(needs());
    let manifests = template(&[
        "--set",
        "tls.certManager.enabled=true,tls.certManager.issuerRef.name=ci,tls.certManager.dnsNames={dind.example.com}",
    ]);
    let objects = crate::helm::documents(&manifests.unwrap()).unwrap();
    let certificate = object(&objects, "Certificate", "proxy");
    let names: Vec<&str> = certificate["spec"]["dnsNames"]
        .as_array()
        .unwrap()
        .iter()
        .map(|name| name.as_str().unwrap())
        .collect();
    let service = object(&objects, "Service", "proxy")["metadata"]["name"].as_str().unwrap();
    assert!(names.contains(&service) && names.contains(&"dind.example.com"), "{names:?}");
    assert!(names.iter().any(|name| name.ends_with(".svc.cluster.local")), "{names:?}");
    let secret = &certificate["spec"]["secretName"];
    let volumes = pod(&objects, "proxy")["volumes"].as_array().unwrap();
    assert!(volumes.iter().any(|volume| volume["secret"]["secretName"] == *secret), "{volumes:?}");
}
