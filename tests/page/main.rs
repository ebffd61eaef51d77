//! The status page as a person sees it: a real pool of real daemons, in real Chromium; and its siblings on a terminal.
//!
//! `DINDPOOL_PICTURES=DIR` keeps a picture of each situation.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

#[path = "../common/mod.rs"]
mod common;

use std::path::PathBuf;
use std::process::Command;

use common::browser::{Browser, Scheme};
use common::client::{self, Job, Session};
use common::http::{self, Addr, Conn};
use common::pool::Pool;
use common::{parts, say, secs, wait_until};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Markup where only text belongs; each would set `window.hit`.
const HOSTILE: &str = "<img src=x onerror=window.hit=1>";

struct Lab {
    pool: Pool,
    token: String,
}

impl Lab {
    /// Three daemons with one slot each.
    fn start() -> Result<Lab, String> {
        parts::all(&[
            "busybox/rootfs.tar",
            "cli-28/docker",
            "buildx-0.29/docker-buildx",
            "chromium/chromedriver",
        ])?;
        let dockerd = parts::dockerd("28.5")?;
        let file = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
        let token = format!("{}-0123456789abcdef", common::unique());
        std::fs::write(file.path(), &token).unwrap();
        let pool = Pool::up(&[dockerd], 3)
            .env("DINDPOOL_SLOTS", "1")
            .env("DINDPOOL_SLOT_LINGER", "100ms")
            .env("DINDPOOL_ADMIN_TOKEN_FILE", file.path().to_str().unwrap())
            .start();
        pool.wait_healthy(3, secs(90));
        for daemon in pool.daemons() {
            let rootfs = parts::busybox("rootfs.tar");
            let direct = Session::new(&daemon.addr.url(), client::CLI_28);
            direct.ok(&format!("docker import {} base:1", rootfs.display()));
        }
        Ok(Lab { pool, token })
    }

    fn url(&self) -> String {
        format!("http://{}/", self.pool.admin_url())
    }

    /// A session of this name with a container that runs until it is removed.
    fn hold(&self, name: &str) -> Session {
        let session =
            Session::with(&self.pool.host(), client::BUILDX_29).env("DINDPOOL_SESSION", name).open();
        // This binds it by load; the image would lead it.
        session.ok(&format!("docker volume create keep-{name}"));
        session.ok(&format!("docker run -d --name hold-{name} --network none base:1 sleep 3600"));
        session
    }

    /// One that waits for a slot to run something.
    fn queue(&self, name: &str) -> (Session, Job) {
        let session =
            Session::with(&self.pool.host(), client::BUILDX_29).env("DINDPOOL_SESSION", name).open();
        let job = session.start(&format!("docker run --name wait-{name} --network none base:1 sleep 3600"));
        let waits = || self.pool.status()["queue"]["tickets"].to_string().contains(name);
        wait_until("it waits", secs(20), waits);
        (session, job)
    }
}

fn keep(browser: &Browser, name: &str) {
    let Some(dir) = std::env::var_os("DINDPOOL_PICTURES").map(PathBuf::from) else { return };
    for (width, height) in [(1280, 900), (390, 844)] {
        browser.size(width, height);
        wait_until("it fits", secs(5), || browser.run("return innerWidth").as_u64() == Some(width.into()));
        browser.picture(&dir.join(format!("{name}-{width}.png")));
    }
}

/// Nothing may stand out of the screen sideways.
#[track_caller]
fn fits(browser: &Browser, width: u32) {
    browser.size(width, 844);
    wait_until("the page fits its screen", secs(5), || {
        let wide = browser.run("return document.documentElement.scrollWidth").as_u64();
        wide.is_some_and(|wide| wide <= width.into())
    });
}

#[test]
fn the_page_tells_what_is_wrong_and_whose_build_waits() {
    let lab = require!(Lab::start());
    let (light, dark) = (require!(Browser::start(Scheme::Light)), require!(Browser::start(Scheme::Dark)));
    let browser = &light;
    browser.size(1280, 900);
    browser.go(&lab.url());
    dark.go(&lab.url());
    browser.wait_for("#link", "live", secs(10));
    browser.wait_for("#advice", "All is well", secs(10));
    browser.wait_for("#daemons", "dind-2", secs(10));
    keep(browser, "idle");

    // Busy: a daemon says whose container it runs.
    let held: Vec<Session> = ["red", "green", "blue"].iter().map(|name| lab.hold(name)).collect();
    browser.wait_for("#totals", "3 / 3", secs(10));
    browser.wait_for("#daemons", "runs hold-green", secs(10));
    keep(browser, "busy");

    // Queueing: positions, read and seen to change without anybody touching the page.
    let (first, first_job) = lab.queue("first");
    let (_second, second_job) = lab.queue("second");
    browser.wait_for("#queue tbody tr:nth-child(2)", "name:second", secs(10));
    let position = |name: &str| {
        let row = format!(
            "const r = [...document.querySelectorAll('#queue tbody tr')].find((r) => r.innerText.includes('{name}')); \
             return r ? r.cells[0].innerText : null"
        );
        browser.run(&row)
    };
    assert_eq!(position("name:second"), "2");
    browser.wait_for("#advice", "2 builds wait for a slot", secs(10));
    keep(browser, "queueing");
    first_job.signal(Signal::SIGINT);
    drop((first, first_job));
    wait_until("its position changes", secs(10), || position("name:second") == "1");

    // Why: one press on the name.
    browser.click("#queue [data-why='name:second']");
    browser.wait_for("#why", "DINDPOOL_SESSION", secs(10));
    browser.wait_for("#why", "a free slot on dind-", secs(10));
    browser.click("#why-close");

    // Somebody leaves: the one that waits gets in, and that is an event.
    held[0].ok("docker rm -f hold-red");
    browser.wait_for("#queue-none", "Nobody waits", secs(20));
    browser.wait_for("#events", "name:second", secs(10));
    drop(second_job);

    // An ejected daemon comes first, with its reason and what to do.
    let victim = lab.pool.daemons().remove(0);
    let pid = nix::unistd::Pid::from_raw(victim.pid());
    nix::sys::signal::kill(pid, Signal::SIGSTOP).unwrap();
    browser.wait_for(".advice.bad .what", "is ejected", secs(20));
    browser.wait_for(".daemon.bad .state", "ejected", secs(10));
    for name in ["third", "fourth"] {
        std::mem::forget(lab.queue(name));
    }
    keep(browser, "ejected");
    keep(&dark, "ejected-dark");
    let paper = |b: &Browser| b.run("return getComputedStyle(document.body).backgroundColor").to_string();
    assert_ne!(paper(&light), paper(&dark), "it follows what its reader prefers");
    fits(browser, 390);
    fits(browser, 320);
    nix::sys::signal::kill(pid, Signal::SIGCONT).unwrap();
    lab.pool.wait_healthy(3, secs(60));
    assert_eq!(browser.complaints(), Vec::<String>::new(), "neither faults nor anything forbidden");
}

#[test]
fn only_an_operator_changes_the_pool_from_the_page() {
    let lab = require!(Lab::start());
    let browser = require!(Browser::start(Scheme::Light));
    browser.size(1280, 900);
    browser.go(&lab.url());
    browser.wait_for("#daemons", "dind-0", secs(10));
    let buttons = || browser.run("return document.querySelectorAll('#daemons button').length");
    assert_eq!(buttons(), 0, "nobody has signed on");
    // A wrong token, then the right one.
    browser.click("#operator");
    browser.write("#token", "0123456789abcdef");
    browser.click("#sign button");
    browser.wait_for("#signed", "not the pool's token", secs(10));
    assert_eq!(buttons(), 0);
    browser.run("document.querySelector('#token').value = ''");
    browser.write("#token", &lab.token);
    browser.click("#sign button");
    wait_until("the buttons are there", secs(10), || buttons() == 6);
    keep(&browser, "operator");
    browser.size(1280, 900);
    browser.click("[data-id='cordon dind-1']");
    browser.wait_for("#acted", "dind-1 takes no new sessions", secs(10));
    wait_until("it is cordoned", secs(10), || lab.pool.status()["daemons"][1]["cordoned"] == true);
    browser.click("[data-id='uncordon dind-1']");
    wait_until("it is not", secs(10), || lab.pool.status()["daemons"][1]["cordoned"] == false);
    browser.click("[data-id='drain dind-2']");
    browser.accept();
    wait_until("it is drained", secs(10), || !lab.pool.status()["daemons"][2]["cordon"]["drained"].is_null());
    // The token is nowhere that another page, or a later one, could read it.
    let kept = browser.run("return [document.cookie, JSON.stringify({...localStorage}), JSON.stringify({...sessionStorage})].join()");
    assert!(!kept.to_string().contains(&lab.token), "{kept}");
    browser.go(&lab.url());
    browser.wait_for("#daemons", "dind-0", secs(10));
    assert_eq!(buttons(), 0, "it is forgotten with the page");

    // A form of another site has no such header, and a script of another site may not send it.
    let admin = Addr::Tcp(lab.pool.admin_url());
    let mut conn = Conn::connect(&admin);
    conn.send("POST /daemons/dind-0/cordon HTTP/1.1\r\nHost: a\r\nOrigin: http://evil.example\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(conn.head().status(), 401);
    let mut conn = Conn::connect(&admin);
    conn.send("OPTIONS /daemons/dind-0/cordon HTTP/1.1\r\nHost: a\r\nOrigin: http://evil.example\r\n\r\n");
    assert!(conn.head().get("access-control-allow-origin").is_none());
}

#[test]
fn hostile_names_stay_text() {
    let lab = require!(Lab::start());
    let browser = require!(Browser::start(Scheme::Light));
    let addr = Addr::Tcp(lab.pool.host().trim_start_matches("tcp://").to_owned());
    // A build under a hostile tag, by a hostile user agent; a job whose id is markup; what is refused is told as well.
    let tag = "%3Cimg%20src%3Dx%20onerror%3Dwindow.hit%3D1%3E";
    let mut conn = Conn::connect(&addr);
    conn.send(format!(
        "POST /v1.44/build?t={tag} HTTP/1.1\r\nHost: {HOSTILE}\r\nUser-Agent: {HOSTILE}\r\nContent-Length: 0\r\n\r\n"
    ));
    conn.head();
    let session = Session::with(&lab.pool.host(), client::BUILDX_29).env("CI_JOB_ID", HOSTILE).open();
    session.ok("docker run -d --name ok --network none base:1 sleep 3600");
    browser.go(&lab.url());
    browser.wait_for("#sessions", "job:CI_JOB_ID", secs(10));
    // What no client can name so, a daemon or a provisioner might: the page is given all of it as it came.
    let mut view: Value = lab.pool.status();
    let hostile = |value: &mut Value, keys: &[&str]| keys.iter().for_each(|key| value[*key] = json!(HOSTILE));
    view["now"] = json!(0);
    view["totals"] = json!({ "daemons": 3, "sessions": 1, "waiting": 1, "slots": 3, "used": 1, "ready": 3 });
    view["version"] = json!(HOSTILE);
    hostile(&mut view["daemons"][0], &["id", "reason", "version", "state", "address"]);
    view["sessions"] =
        json!([{ "slots": 1, "open": 1, "builds": 0, "containers": 1, "since": 1.0, "names": [HOSTILE] }]);
    hostile(&mut view["sessions"][0], &["key", "tenant", "daemon"]);
    view["queue"]["tickets"] = json!([{ "position": 1, "waited": 1.0, "expected": null }]);
    hostile(&mut view["queue"]["tickets"][0], &["key", "tenant", "awaits"]);
    view["advice"] = json!([{ "grade": "bad", "what": HOSTILE, "todo": HOSTILE }]);
    view["events"] = json!([{ "number": 1, "at": 0, "kind": HOSTILE, "daemon": HOSTILE, "session": HOSTILE, "message": HOSTILE, "times": 2 }]);
    browser.run(&format!("source.close(); render({view})"));
    let text = browser.run("return document.body.innerText").as_str().unwrap().matches(HOSTILE).count();
    assert!(text >= 15, "all of it is shown as it is: {text}");
    assert_eq!(browser.run("return document.images.length + document.querySelectorAll('script').length"), 1);
    assert_eq!(browser.run("return window.hit ?? null"), Value::Null);
    // The control: the same, taken for markup, would have been seen by this test. The policy would still forbid it.
    browser.complaints();
    browser.run(
        "try { document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hit=1>') } catch { window.forbidden = 1 }",
    );
    assert_eq!(browser.run("return window.forbidden ?? null"), 1);
}

/// The commands beside the page, at the same pool.
#[test]
fn events_why_and_watch_tell_the_same_on_a_terminal() {
    let lab = require!(Lab::start());
    require!(which("tmux"));
    let admin = lab.pool.admin_url();
    let dindpool = env!("CARGO_BIN_EXE_dindpool");
    let run = |args: &[&str]| {
        let output = Command::new(dindpool).args(args).env("DINDPOOL_ADMIN", &admin).output().unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap(),
        )
    };
    let _held: Vec<Session> = ["red", "green", "blue"].iter().map(|name| lab.hold(name)).collect();
    let (_waits, _job) = lab.queue("late");
    let (_, why) = run(&["why", "red"]);
    assert!(
        why.contains("session     name:red") && why.contains("because     the expected wait is the least"),
        "{why}"
    );
    assert!(why.contains("COMPARED") && why.contains("waited      not at all"), "{why}");
    let (_, why) = run(&["why", "name:late"]);
    assert!(why.contains("waits       position 1") && why.contains("a free slot on dind-"), "{why}");
    let (fine, none) = run(&["why", "nobody"]);
    assert!(!fine && none.contains("no session of this key"), "{none}");
    let (_, events) = run(&["events"]);
    assert!(events.contains("bound      dind-") && events.contains("waits      name:late"), "{events}");
    let (_, json) = run(&["events", "--json"]);
    assert!(json.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{json}");

    // In a terminal: it is drawn over and over, and leaves nothing behind.
    let socket = lab.pool.dir().join("tmux");
    let tmux = |args: &[&str]| {
        let output = Command::new("tmux").arg("-S").arg(&socket).args(args).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    for (name, width, height) in [("narrow", "80", "24"), ("wide", "200", "50")] {
        tmux(&["-f", "/dev/null", "new-session", "-d", "-s", name, "-x", width, "-y", height, "sh"]);
        let target = format!("{name}:");
        tmux(&[
            "send-keys",
            "-t",
            &target,
            &format!("PS1='ready> '; clear; {dindpool} status --watch --admin {admin}"),
            "Enter",
        ]);
        let screen = || tmux(&["capture-pane", "-p", "-t", &target]);
        wait_until("it shows who waits", secs(20), || screen().contains("1 build waits for a slot"));
        assert!(screen().contains("name:late") && screen().contains("3/3 slots"), "{}", screen());
        say(format!("{width} columns:\n{}", screen()));
        tmux(&["send-keys", "-t", &target, "C-c"]);
        wait_until("the prompt is back", secs(10), || screen().trim_end().ends_with("ready>"));
        assert!(!screen().contains("1 build waits"), "the alternate screen is left: {}", screen());
        assert_eq!(
            tmux(&["display-message", "-p", "-t", &target, "#{cursor_flag}"]).trim(),
            "1",
            "the cursor is shown"
        );
    }
    tmux(&["kill-server"]);

    // Not in a terminal: lines, without anything that steers one.
    let mut watch = Command::new(dindpool)
        .args(["status", "--watch", "--admin", &admin])
        .stdout(std::fs::File::create(lab.pool.dir().join("watch")).unwrap())
        .spawn()
        .unwrap();
    let lines = || std::fs::read_to_string(lab.pool.dir().join("watch")).unwrap();
    wait_until("a line", secs(10), || lines().contains("3/3 slots"));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(watch.id() as i32), Signal::SIGINT).unwrap();
    assert!(watch.wait().unwrap().success());
    assert!(!lines().contains('\u{1b}'), "{}", lines());
}

fn which(program: &str) -> Result<(), String> {
    let found = Command::new(program).arg("-V").output().is_ok_and(|output| output.status.success());
    found.then_some(()).ok_or(format!("{program} is missing (apt-get install {program})"))
}

/// Watchers have places of their own.
#[test]
fn who_watches_keeps_no_probe_out() {
    let daemons: [&Addr; 0] = [];
    let pool = Pool::serve(daemons).arg("--daemon").arg("tcp://127.0.0.1:9").early().start();
    let admin = Addr::Tcp(pool.admin_url());
    let mut watching: Vec<Conn> = Vec::new();
    for _ in 0..24 {
        let mut conn = Conn::connect(&admin);
        conn.send("GET /live HTTP/1.1\r\nHost: a\r\n\r\n");
        assert_eq!(conn.head().status(), 200);
        watching.push(conn);
    }
    assert_eq!(http::get(&admin, "/livez").head.status(), 200);
    assert_eq!(http::get(&admin, "/").head.get("x-frame-options"), Some("DENY"));
    for conn in &mut watching {
        let text = String::from_utf8(conn.chunk().unwrap().unwrap()).unwrap();
        assert!(text.starts_with("retry: "), "{text}");
    }
    drop(watching);
}
