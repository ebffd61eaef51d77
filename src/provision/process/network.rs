//! The cable between a daemon's network namespace and the machine, and the machine's rules for it.
//!
//! All of it is found again by the name of the cable's end, so that it can be removed by somebody who knows
//! nothing but that name. The namespace itself has no name: it lives as long as a process in it, so nothing is
//! left of it when these are gone, however they went.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::address::Subnet;
use super::plan::{Link, nameservers};

/// Where programs of the administrator are, also when PATH is that of a user or of a cron job.
const SBIN: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// PATH with `first` before it and the administrator's directories behind it.
pub(super) fn search_path(first: Option<&Path>) -> String {
    let first = first.map(|dir| format!("{}:", dir.display())).unwrap_or_default();
    let inherited = std::env::var("PATH").map(|path| format!("{path}:")).unwrap_or_default();
    format!("{first}{inherited}{SBIN}")
}

/// Finds a program.
pub(super) fn find(program: &Path, path: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let runs = |file: &PathBuf| {
        fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    if program.components().count() > 1 {
        let absolute = std::path::absolute(program).ok()?;
        return runs(&absolute).then_some(absolute);
    }
    path.split(':').filter(|dir| !dir.is_empty()).map(|dir| Path::new(dir).join(program)).find(runs)
}

/// Runs a program of the machine and gives its output, or what it complained about.
fn run(program: &str, args: &[&str], input: Option<&str>) -> Result<String, String> {
    let fault = |what: &str| format!("{program} {}: {what}", args.join(" "));
    let path = find(Path::new(program), &search_path(None)).ok_or_else(|| fault("not found"))?;
    let mut child = Command::new(path)
        .args(args)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| fault(&error.to_string()))?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(input.as_bytes()).map_err(|error| fault(&error.to_string()))?;
    }
    let output = child.wait_with_output().map_err(|error| fault(&error.to_string()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let words = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(fault(if words.is_empty() { "it failed without a word" } else { &words }))
}

/// The machine's rules for a cable: table, and rule without its first option.
///
/// Inserted, not appended: on a machine with a Docker of its own the policy of FORWARD is DROP, and firewalls
/// put a REJECT at the end. What comes in for the daemon must be an answer, so that nobody outside reaches
/// what it publishes.
fn rules(link: &Link) -> [(&'static str, String); 3] {
    let (veth, subnet) = (&link.veth, link.subnet);
    [
        ("nat", format!("POSTROUTING -s {subnet} ! -o {veth} -j MASQUERADE")),
        ("filter", format!("FORWARD -o {veth} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT")),
        ("filter", format!("FORWARD -i {veth} -j ACCEPT")),
    ]
}

/// Runs iptables on a rule. `-w` waits for whoever holds its lock.
fn iptables(table: &str, action: &str, rule: &str) -> Result<String, String> {
    let mut args = vec!["-w", "-t", table, action];
    args.extend(rule.split(' '));
    run("iptables", &args, None)
}

/// Puts the rules in place, those that are missing.
pub(super) fn ensure_rules(link: &Link) -> Result<(), String> {
    for (table, rule) in rules(link) {
        if iptables(table, "-C", &rule).is_err() {
            iptables(table, "-I", &rule)?;
        }
    }
    Ok(())
}

/// Lays the cable from the machine (where this must run) to the namespace of process `inside`.
pub(super) fn connect(link: &Link, inside: i32) -> Result<(), String> {
    disconnect(&link.veth);
    // Off by default on a machine without Docker. It stays on: others may rely on it by the time we stop.
    let forward = "/proc/sys/net/ipv4/ip_forward";
    if fs::read_to_string(forward).is_ok_and(|value| value.trim() == "0") {
        fs::write(forward, "1").map_err(|error| format!("{forward}: {error}"))?;
    }
    let Link { veth, mtu, .. } = link;
    let batch = format!(
        "link add {veth} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {inside}\n\
         addr add {}/30 dev {veth}\n\
         link set {veth} up\n",
        link.host()
    );
    run("ip", &["-batch", "-"], Some(&batch))?;
    ensure_rules(link)
}

/// Sets up the daemon's end; runs inside.
pub(super) fn configure_inside(link: &Link) -> Result<(), String> {
    let batch = format!(
        "link set lo up\n\
         addr add {}/30 dev eth0\n\
         link set eth0 up\n\
         route add default via {}\n",
        link.inner(),
        link.host()
    );
    run("ip", &["-batch", "-"], Some(&batch)).map(drop)
}

/// Removes the cable and the rules, as far as they exist. The cable would go with the namespace, but some time
/// later, and the next one of that name would find it in its way.
pub(super) fn disconnect(veth: &str) {
    if exists(veth) {
        let _ = run("ip", &["link", "delete", veth], None);
    }
    for (table, chain) in [("nat", "POSTROUTING"), ("filter", "FORWARD")] {
        let Ok(listing) = run("iptables", &["-w", "-t", table, "-S", chain], None) else { continue };
        for rule in rules_of(&listing, veth) {
            let _ = iptables(table, "-D", &rule);
        }
    }
}

/// Whether an interface exists. /proc is asked, because /sys shows the namespace in which it was mounted.
fn exists(interface: &str) -> bool {
    let listing = fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
    listing.lines().any(|line| line.trim().split(':').next() == Some(interface))
}

/// The rules in `iptables -S`'s output that are about `veth`.
fn rules_of(listing: &str, veth: &str) -> Vec<String> {
    let ours = |line: &&str| line.split(' ').any(|word| word == veth);
    let rules = listing.lines().filter(ours).filter_map(|line| line.strip_prefix("-A "));
    rules.map(|rule| rule.trim().to_string()).collect()
}

/// Every network that this machine knows a way to, or asks for names in.
pub(super) fn taken() -> Result<Vec<Subnet>, String> {
    let addresses = run("ip", &["-j", "-4", "addr"], None)?;
    let routes = run("ip", &["-j", "-4", "route", "show", "table", "all"], None)?;
    let mut taken = parse_addresses(&addresses);
    taken.extend(parse_routes(&routes));
    let conf = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    taken.extend(nameservers(&conf).into_iter().filter_map(Subnet::parse));
    Ok(taken)
}

fn parse_addresses(json: &str) -> Vec<Subnet> {
    let links: Vec<serde_json::Value> = serde_json::from_str(json).unwrap_or_default();
    let infos = links.iter().filter_map(|link| link["addr_info"].as_array()).flatten();
    infos
        .filter_map(|info| {
            let prefix = u8::try_from(info["prefixlen"].as_u64()?).ok()?;
            Some(Subnet::around(info["local"].as_str()?.parse().ok()?, prefix))
        })
        .collect()
}

fn parse_routes(json: &str) -> Vec<Subnet> {
    let routes: Vec<serde_json::Value> = serde_json::from_str(json).unwrap_or_default();
    let targets = routes.iter().filter_map(|route| route["dst"].as_str());
    // A VPN may spell the default route as two halves.
    targets.filter_map(Subnet::parse).filter(|net| net.prefix > 1).collect()
}

/// The MTU of the machine's way out.
pub(super) fn uplink_mtu() -> u32 {
    let mtu = || {
        let json = run("ip", &["-j", "-4", "route", "show", "default"], None).ok()?;
        let routes: Vec<serde_json::Value> = serde_json::from_str(&json).ok()?;
        let dev = routes.first()?["dev"].as_str()?;
        let json = run("ip", &["-j", "link", "show", "dev", dev], None).ok()?;
        let links: Vec<serde_json::Value> = serde_json::from_str(&json).ok()?;
        u32::try_from(links.first()?["mtu"].as_u64()?).ok()
    };
    mtu().unwrap_or(1500).clamp(576, 1500)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_found_by_the_whole_name_of_the_cable() {
        let listing = "-P FORWARD DROP\n-A FORWARD -i dpaa-1 -j ACCEPT\n-A FORWARD -i dpaa-10 -j ACCEPT\n\
            -A FORWARD -o dpaa-1 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n";
        let found = rules_of(listing, "dpaa-1");
        assert_eq!(found.len(), 2);
        assert_eq!(found[0], "FORWARD -i dpaa-1 -j ACCEPT");
    }

    #[test]
    fn what_the_machine_uses_is_read_from_its_tables() {
        let addresses = r#"[{"ifname":"lo","addr_info":[{"local":"127.0.0.1","prefixlen":8}]},
            {"ifname":"eth0","addr_info":[{"local":"192.0.2.2","prefixlen":24}]},{}]"#;
        let shown = |nets: Vec<Subnet>| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(shown(parse_addresses(addresses)), ["127.0.0.0/8", "192.0.2.0/24"]);
        let routes = r#"[{"dst":"default","gateway":"192.0.2.1"},{"dst":"10.0.0.0/8"},{"dst":"0.0.0.0/1"},
            {"type":"local","dst":"192.0.2.2"}]"#;
        assert_eq!(shown(parse_routes(routes)), ["10.0.0.0/8", "192.0.2.2/32"]);
        assert!(parse_routes("").is_empty());
    }

    #[test]
    fn interfaces_are_found() {
        assert!(exists("lo") && !exists("lo0"));
    }

    #[test]
    fn programs_are_found_as_a_shell_would() {
        let path = search_path(Some(Path::new("/first")));
        assert!(path.starts_with("/first:") && path.ends_with(SBIN));
        assert!(find(Path::new("sh"), &path).is_some());
        assert!(find(Path::new("/bin/sh"), "").is_some(), "a path is not searched for");
        assert!(find(Path::new("no-such-program"), &path).is_none());
        assert!(find(Path::new("/etc/passwd"), &path).is_none(), "not executable");
    }
}
