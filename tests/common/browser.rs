//! Chromium without a window, by the WebDriver protocol (W3C): JSON over HTTP, so it needs no library.

use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::http::{Addr, Conn};
use super::{parts, poll, secs, short_dir, wait_until};

/// The key under which the protocol names an element.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A browser with one window.
pub struct Browser {
    driver: Child,
    addr: Addr,
    session: String,
    _dir: tempfile::TempDir,
}

/// What it prefers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    Light,
    Dark,
}

impl Browser {
    /// Starts one.
    ///
    /// # Errors
    /// When there is none on this machine.
    pub fn start(scheme: Scheme) -> Result<Browser, String> {
        let driver = parts::part("chromium/chromedriver")?;
        let dir = short_dir();
        let port = std::net::TcpListener::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
        let addr = Addr::Tcp(port.local_addr().map_err(|e| e.to_string())?.to_string());
        let number = addr.url().rsplit(':').next().unwrap_or_default().to_owned();
        drop(port);
        let driver = Command::new(driver)
            .arg(format!("--port={number}"))
            .env("HOME", dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("chromedriver: {e}"))?;
        let mut browser = Browser { driver, addr, session: String::new(), _dir: dir };
        wait_until("chromedriver answers", secs(30), || call(&browser.addr, "GET", "/status", None).is_ok());
        let profile = browser._dir.path().join("profile");
        let dark = format!("--blink-settings=preferredColorScheme={}", i32::from(scheme == Scheme::Light));
        let args = json!([
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-device-scale-factor=1",
            dark,
            format!("--user-data-dir={}", profile.display()),
        ]);
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": { "args": args }, "goog:loggingPrefs": { "browser": "ALL" },
        } } });
        let made = call(&browser.addr, "POST", "/session", Some(&wanted)).map_err(|e| e.to_string())?;
        browser.session = made["value"]["sessionId"].as_str().ok_or(made.to_string())?.to_owned();
        Ok(browser)
    }

    fn command(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let path = format!("/session/{}{path}", self.session);
        let answer = call(&self.addr, method, &path, body).expect("chromedriver answers");
        let value = answer["value"].clone();
        assert!(value["error"].is_null(), "{method} {path}: {value}");
        value
    }

    /// Goes to a page.
    pub fn go(&self, url: &str) {
        self.command("POST", "/url", Some(&json!({ "url": url })));
    }

    /// Gives the page this size, as a screen of that size does.
    pub fn size(&self, width: u32, height: u32) {
        let metrics =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        let call = json!({ "cmd": "Emulation.setDeviceMetricsOverride", "params": metrics });
        self.command("POST", "/goog/cdp/execute", Some(&call));
    }

    /// What a function body of JavaScript returns.
    pub fn run(&self, script: &str) -> Value {
        self.command("POST", "/execute/sync", Some(&json!({ "script": script, "args": [] })))
    }

    /// Presses the first element of this CSS selector as a mouse does, as soon as it is there.
    pub fn click(&self, selector: &str) {
        let there = format!("return document.querySelector({}) !== null", Value::from(selector));
        let _ = poll(Duration::from_secs(10), || (self.run(&there) == true).then_some(()));
        let id = self.find(selector);
        self.command("POST", &format!("/element/{id}/click"), Some(&json!({})));
    }

    /// Types into it.
    pub fn write(&self, selector: &str, text: &str) {
        let id = self.find(selector);
        self.command("POST", &format!("/element/{id}/value"), Some(&json!({ "text": text })));
    }

    /// Answers the question that the page asks.
    pub fn accept(&self) {
        self.command("POST", "/alert/accept", Some(&json!({})));
    }

    fn find(&self, selector: &str) -> String {
        let wanted = json!({ "using": "css selector", "value": selector });
        self.command("POST", "/element", Some(&wanted))[ELEMENT].as_str().expect("an element").to_owned()
    }

    /// What a person reads there; empty if it is not there or not shown.
    pub fn text(&self, selector: &str) -> String {
        let selector = Value::from(selector);
        let script = format!("const e = document.querySelector({selector}); return e ? e.innerText : ''");
        self.run(&script).as_str().unwrap_or_default().to_owned()
    }

    /// Waits until a person reads this there.
    #[track_caller]
    pub fn wait_for(&self, selector: &str, text: &str, deadline: Duration) {
        if poll(deadline, || self.text(selector).contains(text).then_some(())).is_none() {
            panic!("{selector} does not say {text:?}, but {:?}", self.text(selector));
        }
    }

    /// What the browser complained of since the last look: faults of scripts, and what the page's policy forbade.
    pub fn complaints(&self) -> Vec<String> {
        let log = self.command("POST", "/se/log", Some(&json!({ "type": "browser" })));
        let lines = log.as_array().cloned().unwrap_or_default();
        lines.iter().map(|line| line["message"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// The page as it looks, all of its length.
    pub fn picture(&self, to: &Path) {
        let call = json!({ "cmd": "Page.captureScreenshot", "params": { "captureBeyondViewport": true } });
        let shot = self.command("POST", "/goog/cdp/execute", Some(&call));
        let png = base64(shot["data"].as_str().expect("a picture"));
        std::fs::write(to, png).expect("the picture is written");
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            let _ = call(&self.addr, "DELETE", &format!("/session/{}", self.session), None);
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

/// chromedriver answers only whoever calls it localhost.
fn call(addr: &Addr, method: &str, path: &str, body: Option<&Value>) -> io::Result<Value> {
    let body = body.map(Value::to_string).unwrap_or_default();
    let mut conn = Conn::try_connect(addr)?;
    conn.patience(secs(60));
    conn.try_send(format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    ))?;
    let head = conn.try_head()?;
    let answer = conn.try_body(method, &head)?;
    serde_json::from_slice(&answer).map_err(io::Error::other)
}

fn base64(text: &str) -> Vec<u8> {
    let digit = |b: u8| match b {
        b'A'..=b'Z' => Some(u32::from(b - b'A')),
        b'a'..=b'z' => Some(u32::from(b - b'a') + 26),
        b'0'..=b'9' => Some(u32::from(b - b'0') + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits: Vec<u32> = text.bytes().filter_map(digit).collect();
    let bytes = digits.chunks(4).flat_map(|four| {
        let bits = four.iter().fold(0, |bits, d| bits << 6 | d) << (6 * (4 - four.len()));
        bits.to_be_bytes()[1..four.len()].to_vec()
    });
    bytes.collect()
}
