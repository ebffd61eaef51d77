//! The deep probe: gives a daemon something to write, and takes it away again.
//!
//! A full disk leaves `/info` as it is and makes builds fail in 20 to 120 ms. What shows it, without an image and
//! without leaving anything behind, is an import: `POST /images/create?fromSrc=-` of a tar of 1 MiB. It needs 6 ms
//! on dockerd 26.1 and 28.5, 45 ms on 20.10 and 60 ms on 29, and fails on each of them with "no space left on
//! device" when nothing is left. (`POST /volumes/create` makes a directory, which succeeds on a full disk.)
//!
//! While the image is there, it is also a marker: a daemon that has the same data root but is another process
//! finds it by its id. Graph drivers read the image's document from disk and then miss its layer in memory
//! ("layer does not exist", 20.10 to 28.5); with containerd's store (29) it is simply there.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::Method;
use serde_json::Value;
use tokio::time::Instant;

use super::client::{self, CallError};
use super::{Handle, Pool, about};
use crate::engine::model::{DeepProbe, Event};

/// How much is written. Less than this is left on a disk only for moments.
const SIZE: usize = 1 << 20;
/// How long it may take: a busy disk has hundreds of milliseconds of writes before it.
const DEADLINE: Duration = Duration::from_secs(10);

/// What a probe has made is removed at once. What is still there after this time was made by one that was cut off: a
/// marker is looked for within moments.
const ABANDONED: Duration = Duration::from_secs(10);

/// An image that was made to see whether it can be.
struct Marker {
    tag: String,
    /// `sha256:…`
    id: String,
}

/// Probes `handle` deeply, and tells the engine what came of it.
pub(super) async fn probe(pool: &Pool, handle: &Handle) {
    if !pool.admits() {
        // One proxy of several is enough to write everywhere.
        pool.event(Event::Wrote { daemon: handle.id.clone(), result: DeepProbe::Unreached });
        return;
    }
    sweep(handle).await;
    let result = match write(pool, handle).await {
        Ok(marker) => {
            remove(handle, &marker.tag).await;
            DeepProbe::Wrote
        }
        Err(result) => result,
    };
    let outcome = match &result {
        DeepProbe::Wrote => "answered",
        DeepProbe::Failed(_) => "failed",
        DeepProbe::Slow(_) => "slow",
        DeepProbe::Unsupported => "unsupported",
        DeepProbe::Unreached => "unreached",
    };
    if let DeepProbe::Failed(reason) | DeepProbe::Slow(reason) = &result {
        tracing::warn!(daemon = %handle.id, reason, "the deep probe failed: the daemon cannot write");
    }
    pool.metrics.probes.with_label_values(&["deep", outcome]).inc();
    pool.event(Event::Wrote { daemon: handle.id.clone(), result });
}

/// Whether two daemons that give the same engine id keep their data in one place.
pub(super) enum Kinship {
    /// They do not: 20.10 daemons of one host share `/etc/docker/key.json`.
    Strangers,
    /// They are one process, reached by two addresses.
    Same,
    /// They are two processes on one data root.
    Shared,
    /// One of them does not say.
    Unknown,
}

/// Finds out by a marker that is made through one of them and looked for through the other. Two that share a data
/// root may have damaged it so that only one of them can still write.
pub(super) async fn kinship(pool: &Pool, one: &Handle, other: &Handle) -> Kinship {
    match marked(pool, one, other).await {
        Kinship::Unknown => marked(pool, other, one).await,
        known => known,
    }
}

/// The marker is made through `one` and looked for through `other`.
async fn marked(pool: &Pool, one: &Handle, other: &Handle) -> Kinship {
    let Ok(marker) = write(pool, one).await else { return Kinship::Unknown };
    let seen = client::answer(&other.endpoint, &format!("/images/{}/json", marker.id), DEADLINE).await;
    let kinship = match seen {
        Ok((404, _)) => Kinship::Strangers,
        Ok((200, _)) => same_process(pool, one, other).await,
        Ok((500, body)) if body.windows(20).any(|w| w == b"layer does not exist") => Kinship::Shared,
        _ => Kinship::Unknown,
    };
    remove(one, &marker.tag).await;
    kinship
}

/// Of two daemons that see each other's images, whether they are the same process: the local driver keeps its
/// volumes in memory, so another process would not see a new one.
async fn same_process(pool: &Pool, one: &Handle, other: &Handle) -> Kinship {
    let marker = format!("{}-{}-{}", about::PROBE, std::process::id(), pool.next_log_id());
    let deadline = pool.config().probe_deadline;
    let body = serde_json::json!({ "Name": marker, "Labels": { "dindpool": "probe" } }).to_string();
    let made = client::call(&one.endpoint, Method::POST, "/volumes/create", Some(body));
    let made = tokio::time::timeout(deadline, made).await;
    if !matches!(&made, Ok(Ok(response)) if response.status().is_success()) {
        return Kinship::Unknown;
    }
    let path = format!("/volumes/{marker}");
    let seen = client::answer(&other.endpoint, &path, deadline).await;
    let removed = client::call(&one.endpoint, Method::DELETE, &path, None);
    let _ = tokio::time::timeout(deadline, removed).await;
    match seen {
        Ok((200, _)) => Kinship::Same,
        // dockerd 20.10 to 29 panics in this request when another process has written to its database.
        Ok((404, _)) | Err(CallError::Broken(_)) => Kinship::Shared,
        _ => Kinship::Unknown,
    }
}

/// Imports an image that nobody has.
async fn write(pool: &Pool, handle: &Handle) -> Result<Marker, DeepProbe> {
    // The standard library's only source of noise: each state has keys of its own.
    let seed = RandomState::new().build_hasher().finish();
    let tag = format!("{}-{}-{seed}", std::process::id(), pool.next_log_id());
    let path =
        format!("/images/create?fromSrc=-&repo={}&tag={tag}&changes=LABEL+dindpool%3Dprobe", about::PROBE);
    let answer = async {
        let response =
            client::send(&handle.endpoint, Method::POST, &path, "application/x-tar", tar(seed)).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.map_err(|e| CallError::Broken(e.to_string()))?;
        Ok::<_, CallError>((status, body.to_bytes()))
    };
    let failed = |why: String| Err(DeepProbe::Failed(why));
    match tokio::time::timeout(DEADLINE, answer).await {
        Err(_) => Err(DeepProbe::Slow(format!("no answer within {} s", DEADLINE.as_secs()))),
        // Nobody is there, or nobody can be reached, which the next `/info` finds out.
        Ok(Err(CallError::Refused(_) | CallError::Unconnected(_))) => {
            handle.wake.notify_one();
            Err(DeepProbe::Unreached)
        }
        Ok(Err(error)) => failed(error.to_string()),
        Ok(Ok((401 | 403 | 404 | 405 | 501, _))) => Err(DeepProbe::Unsupported),
        Ok(Ok((200, body))) => match imported(&body) {
            Ok(id) => Ok(Marker { tag, id }),
            Err(why) => failed(why),
        },
        Ok(Ok((status, body))) => {
            failed(message(&body).unwrap_or_else(|| format!("an import answered {status}")))
        }
    }
}

/// The id of the image that an import's stream ends with, or the error in it.
fn imported(body: &[u8]) -> Result<String, String> {
    let lines = serde_json::Deserializer::from_slice(body).into_iter::<Value>();
    let mut id = None;
    for line in lines.map_while(Result::ok) {
        if let Some(error) = line["error"].as_str() {
            return Err(error.to_string());
        }
        id = line["status"].as_str().filter(|s| s.starts_with("sha256:")).map(str::to_string).or(id);
    }
    id.ok_or_else(|| "an import answered without an image".into())
}

fn message(body: &[u8]) -> Option<String> {
    let body: Value = serde_json::from_slice(body).ok()?;
    body["message"].as_str().map(str::to_string)
}

async fn remove(handle: &Handle, tag: &str) {
    let path = format!("/images/{}:{tag}?force=1", about::PROBE);
    let removed = client::call(&handle.endpoint, Method::DELETE, &path, None);
    let _ = tokio::time::timeout(DEADLINE, removed).await;
}

/// What a probe has made.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Made {
    /// An image, by its tag.
    Image(String),
    /// A volume, by its name.
    Volume(String),
}

/// Removes what probes have left that were cut off half-way, by a proxy that was killed or a daemon that went: what has
/// been there for [`ABANDONED`]. What is newer may be another proxy's, which looks for it this very moment.
pub(super) async fn sweep(handle: &Handle) {
    let now = Instant::now();
    let Ok(found) = made(handle).await else {
        super::lock(&handle.leftovers).clear(); // The next one looks anew.
        return;
    };
    let since: BTreeMap<Made, Instant> = {
        let mut leftovers = super::lock(&handle.leftovers);
        let since = |made: Made| {
            let at = leftovers.get(&made).copied().unwrap_or(now);
            (made, at)
        };
        let since: BTreeMap<Made, Instant> = found.into_iter().map(since).collect();
        *leftovers = since.clone();
        since
    };
    for made in since.into_iter().filter(|(_, at)| now - *at >= ABANDONED).map(|(made, _)| made) {
        match &made {
            Made::Image(tag) => remove(handle, tag).await,
            Made::Volume(name) => {
                let path = format!("/volumes/{name}");
                let removed = client::call(&handle.endpoint, Method::DELETE, &path, None);
                let _ = tokio::time::timeout(DEADLINE, removed).await;
            }
        }
        super::lock(&handle.leftovers).remove(&made);
    }
}

/// Whether there is anything that may have to be swept, and when.
pub(super) fn next_sweep(handle: &Handle) -> Option<Instant> {
    super::lock(&handle.leftovers).values().min().map(|at| *at + ABANDONED)
}

/// What probes have made on a daemon and not removed (yet).
async fn made(handle: &Handle) -> Result<BTreeSet<Made>, CallError> {
    // {"reference":["dindpool-probe"]} and {"label":["dindpool=probe"]}
    let images = format!("/images/json?filters=%7B%22reference%22%3A%5B%22{}%22%5D%7D", about::PROBE);
    let volumes = "/volumes?filters=%7B%22label%22%3A%5B%22dindpool%3Dprobe%22%5D%7D";
    let images: Value = client::json(&handle.endpoint, &images, DEADLINE).await?;
    let volumes: Value = client::json(&handle.endpoint, volumes, DEADLINE).await?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    // A daemon that knows no such filter lists everything.
    let tag = |reference: &Value| {
        Some(Made::Image(reference.as_str()?.strip_prefix(about::PROBE)?.strip_prefix(':')?.to_string()))
    };
    let name = |volume: &Value| {
        let ours = volume["Labels"]["dindpool"] == "probe";
        let name = volume["Name"].as_str().filter(|n| ours && n.starts_with(about::PROBE))?;
        Some(Made::Volume(name.to_string()))
    };
    let tags =
        list(&images).iter().flat_map(|i| list(&i["RepoTags"])).filter_map(|t| tag(&t)).collect::<Vec<_>>();
    Ok(tags.into_iter().chain(list(&volumes["Volumes"]).iter().filter_map(name)).collect())
}

/// A tar with one file of noise: what compresses is not written (containerd's store compresses, as do some file
/// systems), and what is there already is not either.
fn tar(seed: u64) -> Bytes {
    let mut header = [0u8; 512];
    let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
    put(0, about::PROBE.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{SIZE:011o}\0").as_bytes());
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut tar = Vec::with_capacity(512 + SIZE + 1024);
    tar.extend_from_slice(&header);
    // Xorshift (Marsaglia 2003): noise enough for a compressor.
    let mut noise = seed | 1;
    for _ in 0..SIZE / 8 {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        tar.extend_from_slice(&noise.to_le_bytes());
    }
    tar.resize(tar.len() + 1024, 0);
    tar.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_import_is_told_by_its_last_line_and_an_error_by_any() {
        assert_eq!(imported(b"{\"status\":\"sha256:12\"}\r\n"), Ok("sha256:12".into()));
        let full =
            b"{\"status\":\"x\"}\n{\"errorDetail\":{\"message\":\"no space\"},\"error\":\"no space\"}\n";
        assert_eq!(imported(full), Err("no space".into()));
        assert!(imported(b"").is_err());
        assert_eq!(message(b"{\"message\":\"no space\"}"), Some("no space".into()));
    }

    #[test]
    fn no_two_tars_are_the_same_and_each_is_whole_blocks() {
        let (one, other) = (tar(1), tar(99));
        assert_ne!(one, other);
        assert_eq!(one.len() % 512, 0);
        assert_eq!(&one[257..262], b"ustar");
    }
}
