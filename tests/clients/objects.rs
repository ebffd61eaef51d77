//! Images, files, networks, volumes and the daemon's own streams.

use nix::sys::signal::Signal;

use super::common::client::Flavour;
use super::common::{secs, unique, wait_until};
use super::{Lab, Rule};

/// All rules about objects.
pub const RULES: &[Rule] = &[
    ("cp carries files, folders and tars both ways", cp),
    ("save and load carry an image whole", save_and_load),
    ("export and import carry a file system", export_and_import),
    ("commit makes an image of a container", commit),
    ("tag, inspect, history and rmi find the image", tag),
    ("stats shows the container", stats),
    ("events tells what happens to the container", events),
    ("containers find each other by name in a network", network),
    ("a volume keeps what one container wrote for the next", volume),
    ("info, ps, images, version and system df answer", reads),
];

fn cp(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let c = format!("cp{}", unique());
    t.ok(&format!("docker run -d --name {c} --network none {image} sleep 600"));
    t.ok("mkdir -p dir/sub; echo one >dir/one; head -c 2M /dev/urandom >dir/sub/two");
    t.ok(&format!("docker cp dir/one {c}:/renamed && docker cp dir {c}:/"));
    assert_eq!(t.ok(&format!("docker exec {c} cat /renamed /dir/one")), "one\none\n");
    t.ok(&format!("docker cp {c}:/dir back && diff -r dir back"));
    t.ok(&format!(
        "tar -C dir -c one | docker cp - {c}:/tmp && docker cp {c}:/tmp/one - | tar -xO | cmp - dir/one"
    ));
    let missing = t.fails(&format!("docker cp {c}:/not/there ."));
    assert!(missing.stderr.contains("/not/there"), "{}", missing.stderr);
    t.ok(&format!("docker rm -f {c}"));
}

fn save_and_load(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    // Not its id: Engine 29 names an image by its manifest, older ones by its configuration.
    let layers = t.ok(&format!("docker inspect -f '{{{{json .RootFS.Layers}}}}' {image}"));
    t.ok(&format!(
        "docker save -o saved.tar {image} && docker save {image} | tar -t >list && docker rmi {image}"
    ));
    assert!(t.ok("cat list").contains("manifest.json"));
    t.fails(&format!("docker inspect {image}"));
    // Another terminal, so perhaps another daemon.
    let other = lab.terminal(flavour);
    let loaded = other.ok(&format!("docker load <{}", t.path("saved.tar").display()));
    assert!(loaded.contains(&format!("Loaded image: {image}")), "{loaded}");
    assert_eq!(other.ok(&format!("docker inspect -f '{{{{json .RootFS.Layers}}}}' {image}")), layers);
    assert_eq!(other.ok(&format!("docker run --rm --network none {image}")), format!("{image}\n"));
    let broken = other.fails("head -c 100000 /dev/urandom | docker load");
    assert!(!broken.stderr.is_empty());
}

fn export_and_import(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let c = format!("x{}", unique());
    t.ok(&format!("docker create --name {c} --network none {image}"));
    let id = t.ok(&format!("docker export {c} | docker import - imported:{c}"));
    assert!(id.starts_with("sha256:"), "{id}");
    assert_eq!(t.ok(&format!("docker run --rm --network none imported:{c} cat /mark")), format!("{image}\n"));
    t.ok(&format!("docker rm {c}"));
}

fn commit(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let c = format!("k{}", unique());
    t.ok(&format!("docker run --name {c} --network none {image} sh -c 'echo changed >/mark'"));
    assert!(t.ok(&format!("docker diff {c}")).contains("C /mark"));
    let id = t.ok(&format!("docker commit -m why {c} committed:{c}"));
    assert!(id.starts_with("sha256:"), "{id}");
    assert_eq!(t.ok(&format!("docker run --rm --network none committed:{c}  cat /mark")), "changed\n");
    t.ok(&format!("docker rm {c}"));
}

fn tag(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let alias = format!("alias/{}:t", unique());
    t.ok(&format!("docker tag {image} {alias}"));
    let ids = t.ok(&format!("docker inspect -f '{{{{.Id}}}}' {image} {alias}"));
    let ids: Vec<&str> = ids.lines().collect();
    assert_eq!(ids[0], ids[1]);
    assert!(t.ok(&format!("docker history --no-trunc {alias}")).contains("/mark"));
    assert!(t.ok("docker images --format '{{.Repository}}:{{.Tag}}'").contains(&alias));
    assert!(t.ok(&format!("docker rmi {alias}")).contains(&format!("Untagged: {alias}")));
    assert_eq!(t.ok(&format!("docker run --rm --network none {image}")), format!("{image}\n"));
}

fn stats(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let c = format!("st{}", unique());
    t.ok(&format!("docker run -d --name {c} --network none {image} sleep 600"));
    let once = t.ok(&format!("docker stats --no-stream --format '{{{{.Name}}}} {{{{.CPUPerc}}}}' {c}"));
    assert!(once.starts_with(&c) && once.trim().ends_with('%'), "{once}");
    let stream = t.start(&format!("exec docker stats --format '{{{{.Name}}}}' {c}"));
    wait_until("three readings", secs(30), || stream.stdout().matches(&c).count() >= 3);
    stream.signal(Signal::SIGKILL); // the CLI wants three Ctrl-C, also of a daemon without a pool
    t.ok(&format!("docker rm -f {c}"));
}

fn events(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let c = format!("ev{}", unique());
    t.ok(&format!("docker create --name {c} --network none {image}"));
    let events =
        t.start(&format!("exec docker events --since 10m --format '{{{{.Action}}}}' --filter container={c}"));
    wait_until("what has happened before", secs(20), || events.stdout().contains("create\n"));
    t.ok(&format!("docker start -a {c} && docker rm {c}"));
    wait_until("what happens now", secs(20), || {
        let seen = events.stdout();
        ["start\n", "die\n", "destroy\n"].iter().all(|e| seen.contains(e))
    });
    events.signal(Signal::SIGINT);
    events.wait(secs(10));
}

fn network(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let n = unique();
    t.ok(&format!("docker network create net{n}"));
    let server = "mkdir /www; echo served >/www/index.html; exec httpd -f -p 80 -h /www";
    t.ok(&format!("docker run -d --name srv{n} --network net{n} {image} sh -c '{server}'"));
    let get = format!("until wget -qO- http://srv{n}/; do usleep 100000; done");
    assert_eq!(
        t.ok(&format!("docker run --rm --network net{n} {image} timeout 20 sh -c '{get}'")),
        "served\n"
    );
    assert!(t.ok("docker network ls --format '{{.Name}}'").contains(&format!("net{n}\n")));
    t.ok(&format!("docker network create two{n} && docker network connect two{n} srv{n}"));
    let joined = t
        .ok(&format!("docker network inspect -f '{{{{range .Containers}}}}{{{{.Name}}}}{{{{end}}}}' two{n}"));
    assert_eq!(joined.trim(), format!("srv{n}"));
    t.ok(&format!("docker network disconnect two{n} srv{n} && docker rm -f srv{n}"));
    t.ok(&format!("docker network rm net{n} two{n}"));
    t.fails(&format!("docker network inspect net{n}"));
}

fn volume(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let v = format!("vol{}", unique());
    assert_eq!(t.ok(&format!("docker volume create {v}")), format!("{v}\n"));
    t.ok(&format!("docker run --rm --network none -v {v}:/data {image} sh -c 'echo kept >/data/file'"));
    assert_eq!(t.ok(&format!("docker run --rm --network none -v {v}:/d {image} cat /d/file")), "kept\n");
    assert!(t.ok("docker volume ls -q").contains(&v));
    t.ok(&format!("docker volume rm {v}"));
    t.fails(&format!("docker volume inspect {v}"));
}

fn reads(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let (repository, _) = image.split_once(':').unwrap();
    assert!(
        t.ok("docker images --format '{{.Repository}}'").contains(repository),
        "the session's own daemon is shown"
    );
    t.ok("docker info && docker ps && docker system df && docker version");
    assert!(t.ok("docker version -f '{{.Server.APIVersion}}'").starts_with("1."));
    let wrong = t.fails("docker inspect no-such-thing-at-all");
    assert!(wrong.stderr.contains("no-such-thing-at-all"), "{}", wrong.stderr);
}
