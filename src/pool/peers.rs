//! How the other proxies ask the one that admits: a connection to its admin listener, on which lines of JSON go both
//! ways. Here is the side of the one that admits; [`super::remote`] is the other.
//!
//! ```text
//! POST /peer, Upgrade: dindpool           with the token that is in the Lease
//!   ▶ Hello: who, and what it relays      ◀ Welcome
//!   ▶ Acquire                             ◀ Waits …, Granted or Refused
//!   ▶ Abandon, Said, Beat                 ◀ Cut, Beat
//! ```
//!
//! A connection that breaks ends nothing but what waits on it, and that is asked again: the next Hello tells what is
//! still relayed, and what is not in it has ended.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::shared::Said;
use super::{Pool, Want};
use crate::engine::handover::OpenExport;
use crate::engine::model::*;

/// Between two signs of life, and two lines about a place in the queue.
pub(super) const BEAT: Duration = Duration::from_secs(1);
/// Without a sign of life for so long, the other one has gone.
pub(super) const SILENCE: Duration = Duration::from_secs(10);

/// To the one that admits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Up {
    /// The first line.
    Hello { proxy: String, streams: Vec<(u64, OpenExport)> },
    /// A request wants a daemon.
    Acquire { stream: u64, want: Arc<Want> },
    /// Its client has left.
    Abandon { stream: u64 },
    /// A request that is open has something to say.
    Said { stream: u64, said: Said },
    /// It lives, and so many clients wait there for the first daemon.
    Beat { newcomers: u32 },
}

/// From the one that admits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Down {
    /// It admits.
    Welcome,
    /// A request has its daemon.
    Granted { stream: u64, daemon: DaemonId, lease: Option<LeaseId>, fresh: bool },
    /// It has none.
    Refused { stream: u64, refusal: Refusal },
    /// It waits, at this place among so many.
    Waits { stream: u64, position: usize, of: usize },
    /// Streams to this daemon are to be broken.
    Cut { daemon: DaemonId },
    /// It lives.
    Beat,
}

/// A line of JSON.
pub(super) async fn write<T: Serialize>(to: &mut (impl AsyncWrite + Unpin), line: &T) -> std::io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    to.write_all(&text).await
}

/// The next line. Cancel-safe, because what was read of it stays in `begun`.
pub(super) async fn read<T: serde::de::DeserializeOwned>(
    from: &mut (impl AsyncBufReadExt + Unpin),
    begun: &mut Vec<u8>,
) -> std::io::Result<T> {
    if from.read_until(b'\n', begun).await? == 0 || !begun.ends_with(b"\n") {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let line = serde_json::from_slice(begun)?;
    begun.clear();
    Ok(line)
}

/// The clients of another proxy that wait for the first daemon.
struct Newcomers<'a>(&'a Pool, u32);

impl Newcomers<'_> {
    fn are(&mut self, number: u32) {
        self.0.newcomers.fetch_add(number, Ordering::Relaxed);
        self.0.newcomers.fetch_sub(std::mem::replace(&mut self.1, number), Ordering::Relaxed);
    }
}

impl Drop for Newcomers<'_> {
    fn drop(&mut self) {
        self.are(0);
    }
}

/// Serves another proxy until its connection ends, or this one admits no more.
pub async fn serve(pool: Arc<Pool>, stream: impl AsyncRead + AsyncWrite + Send + 'static) {
    let (from, mut to) = tokio::io::split(stream);
    let (mut from, mut begun) = (BufReader::new(from), Vec::new());
    let mut tenures = pool.tenures.subscribe();
    tenures.mark_unchanged();
    let Ok(Ok(Up::Hello { proxy, streams })) = timeout(SILENCE, read(&mut from, &mut begun)).await else {
        return;
    };
    let proxy: Arc<str> = proxy.as_str().into();
    if !pool.greet(&proxy, &streams) {
        return;
    }
    tracing::info!(%proxy, streams = streams.len(), "another proxy is connected");
    pool.metrics.lease_peers.inc();
    let (down, mut lines) = mpsc::channel::<Down>(256);
    let writer = tokio::spawn(async move {
        if write(&mut to, &Down::Welcome).await.is_err() {
            return;
        }
        loop {
            let line = timeout(BEAT, lines.recv()).await;
            let line = match line {
                Ok(Some(line)) => line,
                Ok(None) => return,
                Err(_) => Down::Beat,
            };
            if !matches!(timeout(SILENCE, write(&mut to, &line)).await, Ok(Ok(()))) {
                return;
            }
        }
    });
    let mut cuts = pool.cuts.subscribe();
    let (mut tasks, mut waiting) = (JoinSet::new(), HashMap::new());
    let mut newcomers = Newcomers(&pool, 0);
    loop {
        let line = tokio::select! {
            line = timeout(SILENCE, read::<Up>(&mut from, &mut begun)) => line,
            _ = tenures.changed() => break,
            cut = cuts.recv() => {
                if let Ok(daemon) = cut {
                    let _ = down.send(Down::Cut { daemon }).await;
                }
                continue;
            }
            Some(ended) = tasks.join_next() => {
                if let Ok(stream) = ended {
                    waiting.remove(&stream);
                }
                continue;
            }
        };
        match line {
            Ok(Ok(Up::Acquire { stream, want })) => {
                let task = admit(pool.clone(), proxy.clone(), stream, want, down.clone());
                waiting.insert(stream, tasks.spawn(task));
            }
            Ok(Ok(Up::Abandon { stream })) => {
                if let Some(task) = waiting.remove(&stream) {
                    task.abort();
                }
                // Its grant may be on its way.
                pool.said_by(&proxy, stream, Said::Released(Outcome::ClientGone));
            }
            Ok(Ok(Up::Said { stream, said })) => pool.said_by(&proxy, stream, said),
            Ok(Ok(Up::Beat { newcomers: number })) => newcomers.are(number),
            Ok(Ok(Up::Hello { .. }) | Err(_)) | Err(_) => break,
        }
    }
    drop(newcomers);
    // In this order: what waited is out of the queue, and nothing is granted any more.
    tasks.shutdown().await;
    writer.abort();
    pool.miss(&proxy);
    pool.metrics.lease_peers.dec();
    tracing::info!(%proxy, "another proxy is not connected any more");
}

/// Finds a daemon for a request that another proxy relays. Returns its number there.
async fn admit(
    pool: Arc<Pool>,
    proxy: Arc<str>,
    stream: u64,
    want: Arc<Want>,
    down: mpsc::Sender<Down>,
) -> u64 {
    let mut ticket = pool.acquire(&want).await;
    let answer = loop {
        tokio::select! {
            answer = ticket.settled() => break answer,
            () = sleep(BEAT) => {
                if let Some((position, of)) = ticket.position() {
                    let _ = down.send(Down::Waits { stream, position, of }).await;
                }
            }
        }
    };
    let line = match answer {
        None => return stream,
        Some(Ok(granted)) => {
            let (daemon, lease, fresh) = (granted.daemon.id.clone(), granted.lease, granted.fresh);
            if !pool.lend(granted.hold, &proxy, stream) {
                return stream;
            }
            Down::Granted { stream, daemon, lease, fresh }
        }
        Some(Err(refusal)) => Down::Refused { stream, refusal },
    };
    let _ = down.send(line).await;
    stream
}
