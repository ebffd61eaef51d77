//! The heart of it, proved from the daemons' own records: sessions spread, and none is split.

use super::common::client::{self, Flavour, Session};
use super::common::daemon::where_is;
use super::common::netns::Bridge;
use super::common::pool::Pool;
use super::common::scenarios::Scenarios;
use super::common::{robin, say, secs, unique};
use super::{Lab, build};

/// Adds the scenarios.
pub fn add<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    all.alone("nine terminals spread over the daemons and none is split", || terminals(lab));
    all.alone("clients with source addresses of their own spread and none is split", || {
        source_addresses(lab)
    });
    all.alone("after a gap longer than the grace, run and push still find the image", || gap(lab));
    all.alone("a step in another POSIX session finds an image by its reference", || other_step(lab));
    all.alone("a pulled base image does not draw everybody to one daemon", || pulled_base(lab));
    all.alone("round robin over the same daemons gives 0 of 6", || round_robin(lab));
}

/// Everything that one session does; all of it carries `key`.
fn work(t: &Session, key: &str) {
    t.context("ctx", &format!("{}LABEL session={key}\n", build::APP));
    t.ok(&format!("docker build --network none --build-arg MARK={key} -t s-{key}:1 ctx"));
    t.ok(&format!("docker network create n-{key} && docker volume create v-{key}"));
    for n in 0..2 {
        t.ok(&format!(
            "docker run -d --name c{n}-{key} --label session={key} --network n-{key} -v v-{key}:/v s-{key}:1 \
             sleep 600"
        ));
    }
    assert_eq!(t.ok(&format!("docker exec c1-{key} cat /mark")), format!("{key}\n"));
    assert_eq!(t.ok(&format!("docker run --rm --network none s-{key}:1")), format!("{key}\n"));
}

fn tidy(t: &Session, key: &str) {
    t.ok(&format!("docker rm -f c0-{key} c1-{key} && docker network rm n-{key} && docker volume rm v-{key}"));
}

/// The daemon of a session, which must be one for all that it made.
fn home(pool: &Pool, key: &str) -> String {
    let daemons = pool.daemons();
    let images = where_is(&daemons, |d| d.has_image(&format!("s-{key}:1")));
    assert_eq!(images.len(), 1, "{key}: its image is on {images:?}");
    for (what, holders) in [
        ("first container", where_is(&daemons, |d| d.has_container(&format!("c0-{key}")))),
        ("second container", where_is(&daemons, |d| d.has_container(&format!("c1-{key}")))),
        ("network", where_is(&daemons, |d| d.has_network(&format!("n-{key}")))),
        ("volume", where_is(&daemons, |d| d.has_volume(&format!("v-{key}")))),
        ("every container", where_is(&daemons, |d| !d.labelled(&format!("session={key}")).is_empty())),
    ] {
        assert_eq!(holders, images, "{key}: split: its {what} and its image");
    }
    // A daemon remembers its last 256 events only, so none is proof of nothing, but one elsewhere is.
    let heard = where_is(&daemons, |d| d.events().iter().any(|e| e["Actor"]["Attributes"]["session"] == key));
    assert!(heard.iter().all(|id| *id == images[0]), "{key}: something of it happened on {heard:?}");
    assert!(daemons.iter().any(|d| !d.events().is_empty()), "no daemon remembers anything");
    images[0].clone()
}

fn spread(title: &str, homes: &[String]) {
    let mut used = homes.to_vec();
    used.sort();
    say(format!("          {title}: {used:?}"));
    used.dedup();
    assert!(used.len() >= 2, "all sessions are on {used:?}");
}

fn terminals(lab: &Lab) {
    let flavours = [client::BUILDX_29, client::CLI_28, client::CLI_20_BUILDKIT];
    let sessions: Vec<(Session, String)> =
        (0..9).map(|n| (lab.terminal(flavours[n % 3]), unique())).collect();
    std::thread::scope(|scope| {
        let workers: Vec<_> = sessions.iter().map(|(t, key)| scope.spawn(|| work(t, key))).collect();
        workers.into_iter().for_each(|w| w.join().expect("a session's work"));
    });
    let homes: Vec<String> = sessions.iter().map(|(_, key)| home(&lab.pool, key)).collect();
    spread("nine terminals", &homes);
    sessions.iter().for_each(|(t, key)| tidy(t, key));
}

fn source_addresses(lab: &Lab) {
    let bridge = Bridge::new(4);
    let daemons = lab.pool.daemons();
    let front =
        Pool::serve(daemons.iter().map(|d| &d.addr)).listen(&format!("tcp://{}:0", bridge.ip)).start();
    front.wait_healthy(3, secs(30));
    let host = front.listener(&bridge.ip).url();
    let sessions: Vec<(Vec<Session>, String)> = bridge
        .namespaces
        .iter()
        .map(|ns| {
            // Several terminals of one machine elsewhere are one source, so one session.
            let open = |f: Flavour| Session::with(&host, f).netns(ns).open();
            (vec![open(client::BUILDX_29), open(client::CLI_28)], unique())
        })
        .collect();
    std::thread::scope(|scope| {
        let workers: Vec<_> = sessions
            .iter()
            .map(|(terminals, key)| {
                scope.spawn(move || {
                    work(&terminals[0], key);
                    let run = format!("docker run --rm --network none s-{key}:1");
                    assert_eq!(
                        terminals[1].ok(&run),
                        format!("{key}\n"),
                        "the other terminal of the same source"
                    );
                })
            })
            .collect();
        workers.into_iter().for_each(|w| w.join().expect("a session's work"));
    });
    let homes: Vec<String> = sessions.iter().map(|(_, key)| home(&lab.pool, key)).collect();
    spread("four source addresses", &homes);
    sessions.iter().for_each(|(terminals, key)| tidy(&terminals[0], key));
}

fn gap(lab: &Lab) {
    let terminals: Vec<_> = [client::BUILDX_29, client::CLI_28, client::CLI_20_BUILDKIT]
        .into_iter()
        .map(|f| {
            let (t, key) = (lab.terminal(f), unique());
            t.context("ctx", build::APP);
            let image = format!("{}/gap-{key}:1", lab.registry.name);
            t.ok(&format!("docker build --network none --build-arg MARK={key} -t {image} ctx"));
            (t, key, image)
        })
        .collect();
    lab.pool.wait_no_sessions(secs(60));
    for (t, key, image) in &terminals {
        assert_eq!(t.ok(&format!("docker run --rm --network none {image}")), format!("{key}\n"));
        let holders = where_is(&lab.pool.daemons(), |d| d.has_image(image));
        assert_eq!(holders.len(), 1, "it ran where it was built, and was not fetched from anywhere");
    }
    lab.pool.wait_no_sessions(secs(60));
    for (t, key, image) in &terminals {
        t.ok(&format!("docker push {image}"));
        assert_eq!(lab.registry.tags(&format!("gap-{key}")), ["1"]);
    }
}

fn other_step(lab: &Lab) {
    for builder in [client::BUILDX_29, client::CLI_28] {
        let key = unique();
        let image = format!("{}/step-{key}:1", lab.registry.name);
        let first = lab.terminal(builder);
        first.context("ctx", build::APP);
        first.ok(&format!("docker build --network none --build-arg MARK={key} -t {image} ctx"));
        drop(first); // a CI step ends, and with it its POSIX session
        let second = lab.terminal(client::CLI_28);
        assert_eq!(second.ok(&format!("docker run --rm --network none {image}")), format!("{key}\n"));
        let third = lab.terminal(client::CLI_20);
        third.ok(&format!("docker tag {image} again-{key} && docker push {image}"));
        assert_eq!(lab.registry.tags(&format!("step-{key}")), ["1"]);
        let fourth = lab.terminal(client::CLI_28);
        assert_eq!(fourth.ok(&format!("docker run --rm --network none again-{key}")), format!("{key}\n"));
        // Nothing but the steps' own daemon has it: nobody pulled it elsewhere.
        assert_eq!(where_is(&lab.pool.daemons(), |d| d.has_image(&image)).len(), 1);
        // A later build of the same name elsewhere is the one that counts.
        let later = lab.terminal(client::CLI_28);
        later.context("ctx", build::APP);
        later.ok(&format!("docker build --network none --build-arg MARK=new-{key} -t {image} ctx"));
        let last = lab.terminal(client::CLI_28);
        assert_eq!(last.ok(&format!("docker run --rm --network none {image}")), format!("new-{key}\n"));
    }
}

fn pulled_base(lab: &Lab) {
    lab.quiet();
    let (base, key) = (lab.registry.busybox(), unique());
    let terminals: Vec<Session> = (0..6).map(|_| lab.terminal(client::CLI_28)).collect();
    for (n, t) in terminals.iter().enumerate() {
        t.ok(&format!(
            "docker run -d --name b{n}-{key} --label session={key} --network none {base} sleep 600"
        ));
    }
    let homes: Vec<String> = lab
        .pool
        .daemons()
        .iter()
        .flat_map(|d| vec![d.id.clone(); d.labelled(&format!("session={key}")).len()])
        .collect();
    assert_eq!(homes.len(), 6);
    terminals.iter().enumerate().for_each(|(n, t)| drop(t.ok(&format!("docker rm -f b{n}-{key}"))));
    spread("six users of one base image", &homes);
}

/// The control: if this passed, the rules above would prove nothing. Some of the clients hang for ever, which is
/// also a failure.
fn round_robin(lab: &Lab) {
    let host = robin::start(&lab.pool.daemons()).url();
    let attempts: Vec<(Session, Flavour)> = [client::BUILDX_29, client::CLI_28]
        .into_iter()
        .flat_map(|f| (0..3).map(move |_| f))
        .map(|f| (Session::new(&host, f), f))
        .collect();
    let jobs: Vec<_> = attempts
        .iter()
        .map(|(t, _)| {
            t.context("ctx", build::APP);
            let tag = format!("robin:{}", unique());
            t.start(&format!(
                "docker build --network none -t {tag} ctx && docker run --rm --network none {tag}"
            ))
        })
        .collect();
    // Together they take seconds where they work.
    let all_ended = || jobs.iter().all(|j| j.output().is_some()).then_some(());
    let _ = crate::common::poll(secs(60), all_ended);
    let codes: Vec<Option<i32>> = jobs.iter().map(|j| j.output().map(|o| o.code)).collect();
    assert!(
        codes.iter().all(|code| *code != Some(0)),
        "round robin works, so there is nothing to prove: {codes:?}"
    );
}
