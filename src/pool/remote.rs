//! The side of a proxy that does not admit: it asks the one that does ([`super::peers`]), and tells it what it relays.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{interval, sleep, timeout};

use super::peers::{BEAT, Down, SILENCE, Up, read, write};
use super::shared::Said;
use super::ticket::Answer;
use super::{Granted, Handle, Pool};
use crate::admin::token::Token;
use crate::engine::handover::OpenExport;
use crate::engine::model::*;

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(2);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(200);
/// How long a daemon may be known to the one that admits before it is known here.
const NEWS: Duration = Duration::from_secs(5);

/// Who admits, as the Lease says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its name.
    pub name: String,
    /// Its admin listener.
    pub address: SocketAddr,
    /// What opens it.
    pub token: Token,
}

/// Asks whoever admits, as long as it is another one, until it is dropped.
pub async fn follow(pool: Arc<Pool>, mut holder: watch::Receiver<Option<Holder>>) {
    let mut tenures = pool.tenures.subscribe();
    loop {
        let known = holder.borrow_and_update().clone();
        let own = tenures.borrow_and_update().is_some();
        pool.welcomed.send_replace(false);
        pool.end_vain_waits(false, known.as_ref().map(|holder| holder.name.as_str()));
        let session = async {
            match &known {
                Some(holder) if !own => {
                    let ended = session(&pool, holder).await;
                    pool.welcomed.send_replace(false);
                    if let Err(error) = ended {
                        tracing::debug!(holder = %holder.name, "the one that admits: {error}");
                    }
                    sleep(PAUSE).await;
                }
                _ => sleep(BEAT).await,
            }
        };
        tokio::select! {
            () = session => {}
            changed = holder.changed() => if changed.is_err() { return },
            _ = tenures.changed() => {}
        }
    }
}

/// One connection, to its end.
async fn session(pool: &Arc<Pool>, holder: &Holder) -> std::io::Result<()> {
    let stream = timeout(CONNECT, TcpStream::connect(holder.address)).await??;
    stream.set_nodelay(true)?;
    let (from, mut to) = stream.into_split();
    let (mut from, mut begun) = (BufReader::new(from), Vec::new());
    let head = format!(
        "POST /peer HTTP/1.1\r\nHost: dindpool\r\nAuthorization: {}\r\nConnection: Upgrade\r\nUpgrade: \
         dindpool\r\nContent-Length: 0\r\n\r\n",
        holder.token.bearer()
    );
    to.write_all(head.as_bytes()).await?;
    timeout(CONNECT, upgraded(&mut from)).await??;
    // All that it relays, and all that waits here, is told anew.
    let (hello, asking, said) = {
        let mut state = pool.lock();
        let Some(shared) = state.shared.as_mut().filter(|shared| !shared.admits()) else { return Ok(()) };
        let hello = Up::Hello { proxy: shared.me.to_string(), streams: shared.relayed() };
        let asking = shared.asking.iter();
        let asking: Vec<Up> = asking
            .map(|(stream, asking)| Up::Acquire { stream: *stream, want: asking.want.clone() })
            .collect();
        let said = std::mem::take(&mut shared.outbox).into_iter();
        // What has ended is not in the Hello.
        let said: Vec<Up> = said
            .filter(|line| matches!(line, Up::Said { said, .. } if !matches!(said, Said::Released(_))))
            .collect();
        (hello, asking, said)
    };
    write(&mut to, &hello).await?;
    for line in said.iter().chain(&asking) {
        write(&mut to, line).await?;
    }
    let Down::Welcome = timeout(SILENCE, read::<Down>(&mut from, &mut begun)).await?? else {
        return Err(std::io::ErrorKind::InvalidData.into());
    };
    tracing::info!(holder = %holder.name, waiting = asking.len(), "connected to the proxy that admits");
    pool.welcomed.send_replace(true);
    let mut beat = interval(BEAT);
    let mut heard = Instant::now();
    loop {
        let lines: Vec<Up> = match pool.lock().shared.as_mut() {
            Some(shared) => std::mem::take(&mut shared.outbox).into(),
            None => return Ok(()),
        };
        for line in &lines {
            timeout(SILENCE, write(&mut to, line)).await??;
        }
        tokio::select! {
            line = read::<Down>(&mut from, &mut begun) => {
                heard = Instant::now();
                take(pool, line?);
            }
            () = pool.outgoing.notified() => {}
            _ = beat.tick() => {
                if heard.elapsed() > SILENCE {
                    return Err(std::io::ErrorKind::TimedOut.into());
                }
                let newcomers = pool.newcomers.load(Ordering::Relaxed);
                timeout(SILENCE, write(&mut to, &Up::Beat { newcomers })).await??;
                pool.end_vain_waits(true, Some(&holder.name));
            }
        }
    }
}

/// Reads the answer to the upgrade.
async fn upgraded(from: &mut (impl AsyncBufReadExt + Unpin)) -> std::io::Result<()> {
    let mut line = String::new();
    from.read_line(&mut line).await?;
    if !line.starts_with("HTTP/1.1 101") {
        return Err(std::io::Error::other(format!("it answered {}", line.trim())));
    }
    while line.trim() != "" {
        line.clear();
        from.read_line(&mut line).await?;
    }
    Ok(())
}

fn take(pool: &Arc<Pool>, line: Down) {
    match line {
        Down::Welcome | Down::Beat => {}
        Down::Waits { stream, position, of } => {
            if let Some(asking) = pool.lock().shared.as_mut().and_then(|s| s.asking.get_mut(&stream)) {
                asking.place = Some((position, of));
            }
        }
        Down::Refused { stream, refusal } => {
            let asking = pool.lock().shared.as_mut().and_then(|shared| shared.asking.remove(&stream));
            if let Some(asking) = asking {
                let _ = asking.answer.send(Answer::Refused(refusal));
            }
        }
        Down::Granted { stream, daemon, lease, fresh } => {
            if !granted(pool, stream, &daemon, lease, fresh) {
                // It was made a moment ago, and is not known here yet.
                let pool = pool.clone();
                tokio::spawn(async move {
                    let until = Instant::now() + NEWS;
                    while Instant::now() < until {
                        sleep(Duration::from_millis(50)).await;
                        if granted(&pool, stream, &daemon, lease, fresh) {
                            return;
                        }
                    }
                    let asking = pool.lock().shared.as_mut().and_then(|s| s.asking.remove(&stream));
                    pool.said(super::shared::Hold::Stream(stream), Said::Released(Outcome::Unreached));
                    if let Some(asking) = asking {
                        let message = format!("daemon {daemon} is not known to this proxy yet; try again");
                        let _ = asking.answer.send(Answer::Refused(Refusal::NoDaemon(message)));
                    }
                });
            }
        }
        Down::Cut { daemon } => {
            let handle = pool.lock().daemons.get(&daemon).map(|member| member.handle.clone());
            if let Some(handle) = handle {
                handle.break_streams();
            }
        }
    }
}

/// False if the daemon is not known here.
fn granted(pool: &Arc<Pool>, stream: u64, daemon: &DaemonId, lease: Option<LeaseId>, fresh: bool) -> bool {
    let mut guard = pool.lock();
    let state = &mut *guard;
    let handle: Option<Arc<Handle>> = state.daemons.get(daemon).map(|member| member.handle.clone());
    let Some(shared) = state.shared.as_mut() else { return true };
    let Some(handle) = handle else { return !shared.asking.contains_key(&stream) };
    let Some(asking) = shared.asking.remove(&stream) else {
        // Its client has left, which the other one has been told, or is told again.
        shared.post(Up::Abandon { stream });
        pool.outgoing.notify_one();
        return true;
    };
    let acquire = asking.want.acquire(RequestId(0));
    let about = OpenExport::of(&acquire, OpenId(stream), daemon.clone(), lease.is_some());
    let hold = shared.grant(stream, None, about);
    let cut = handle.cut();
    // A ticket that is dropped now gives it back.
    let sent = asking.answer.send(Answer::Granted(Granted { hold, lease, fresh, daemon: handle, cut }));
    if sent.is_err() {
        drop(guard);
        pool.said(hold, Said::Released(Outcome::ClientGone));
    }
    true
}
