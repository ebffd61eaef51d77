//! What a daemon's data amounts to: layers, build cache, the disk that they are on. For the metrics only; no
//! decision rests on it (a disk that is full is found by the deep probe).
//!
//! `/system/df` without a type walks all volumes and the writable layers of all containers, minutes of disk on a big
//! daemon. Images and build cache alone are sums that dockerd keeps, so these are asked for, never without a pause
//! of [`PAUSE`], nor for more than one part in [`SHARE`] of a daemon's time. The types exist since API 1.42;
//! of an older daemon nothing is known.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use tokio::time::Instant;

use super::{Handle, Pool, about, client, lock};
use crate::engine::model::ApiVersion;
use crate::provision::Endpoint;

/// Between two questions at least.
const PAUSE: Duration = Duration::from_secs(60);
/// A daemon that takes a second for its answer is asked again after 100.
const SHARE: u32 = 100;
/// How long an answer may take.
const DEADLINE: Duration = Duration::from_secs(60);
/// Between two looks at a disk of this machine, which cost next to nothing.
const LOOK: Duration = Duration::from_secs(10);
/// The first version that asks for some types only, and the last one whose answer is known.
const KNOWN: (ApiVersion, ApiVersion) = ((1, 42), (1, 51));

/// `/system/df`, as far as it is used.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct DiskUsage {
    layers_size: u64,
    build_cache: Option<Vec<CacheRecord>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct CacheRecord {
    size: u64,
    shared: bool,
}

impl DiskUsage {
    /// What the records take that are nobody else's, as `docker system df` counts it.
    fn build_cache(&self) -> u64 {
        self.build_cache.iter().flatten().filter(|record| !record.shared).map(|record| record.size).sum()
    }
}

/// Surveys a daemon from when it was met first, until it is dropped.
pub(super) async fn survey(pool: &Pool, handle: &Handle) {
    handle.survey.notified().await;
    let mut next = Instant::now();
    loop {
        // One proxy of several is enough.
        if pool.admits() {
            look(handle).await;
            if Instant::now() >= next {
                let asked = Instant::now();
                ask(handle).await;
                next = Instant::now() + PAUSE.max(asked.elapsed() * SHARE);
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn ask(handle: &Handle) {
    let api = lock(&handle.about)
        .as_ref()
        .and_then(|about| about::api_version(about.version["ApiVersion"].as_str()?));
    let Some(api) = api.filter(|api| *api >= KNOWN.0).map(|api| api.min(KNOWN.1)) else { return };
    let path = format!("/v{}.{}/system/df?type=image&type=build-cache", api.0, api.1);
    let usage = client::json::<DiskUsage>(&handle.endpoint, &path, DEADLINE).await;
    let mut holds = lock(&handle.holds);
    // Figures of long ago would look like those of now.
    holds.images_bytes = usage.as_ref().ok().map(|usage| usage.layers_size);
    holds.build_cache = usage.as_ref().ok().map(DiskUsage::build_cache);
}

/// The disk of a daemon of this machine. A path may be on a disk that hangs.
async fn look(handle: &Handle) {
    let root = lock(&handle.root).clone();
    let (Endpoint::Unix(_), Some(root)) = (&handle.endpoint, root) else { return };
    let disk = tokio::task::spawn_blocking(move || disk(&root)).await;
    lock(&handle.holds).disk = disk.ok().flatten();
}

/// Bytes used, and free to who is not root, on the file system that a directory is on.
#[allow(clippy::useless_conversion, reason = "the width of these fields differs between platforms")]
fn disk(root: &PathBuf) -> Option<(u64, u64)> {
    let stat = nix::sys::statvfs::statvfs(root).ok()?;
    let block = u64::from(stat.fragment_size());
    let used = u64::from(stat.blocks()).saturating_sub(stat.blocks_free().into());
    Some((used.saturating_mul(block), u64::from(stat.blocks_available()).saturating_mul(block)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_what_is_nobody_elses() {
        let usage: DiskUsage = serde_json::from_str(
            r#"{"LayersSize":7,"Images":[],"BuildCache":[{"Size":3,"Shared":false},{"Size":5,"Shared":true},{"Size":2}]}"#,
        )
        .unwrap();
        assert_eq!((usage.layers_size, usage.build_cache()), (7, 5));
        let none: DiskUsage = serde_json::from_str(r#"{"LayersSize":7,"BuildCache":null}"#).unwrap();
        assert_eq!(none.build_cache(), 0);
    }

    #[test]
    fn a_disk_is_as_large_as_what_is_on_it_and_what_is_free() {
        let (used, free) = disk(&"/".into()).unwrap();
        assert!(used > 0 && free > 0);
        assert_eq!(disk(&"/no/such/place".into()), None);
    }
}
