//! What somebody else sees of a [`Side`](super::Side)'s socket, and how they end it: the relay itself has no timers.
//! One task looks at all guards now and then, which costs a stream nothing while it is silent.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Why a socket was ended from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// The peer's machine has gone: nothing that was sent is acknowledged any more.
    Lost(Duration),
    /// The daemon answers neither probes nor this request.
    Silent(Duration),
}

impl Fate {
    fn error(&self) -> io::Error {
        match self {
            Fate::Lost(time) => io::Error::new(
                io::ErrorKind::HostUnreachable,
                format!("it has acknowledged nothing for {} s", time.as_secs()),
            ),
            Fate::Silent(time) => io::Error::new(
                io::ErrorKind::TimedOut,
                format!("it has answered neither probes nor this request for {} s", time.as_secs()),
            ),
        }
    }
}

/// A request that its daemon has not answered with a single byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// Since when.
    pub since: Instant,
    /// When the daemon's kernel has last taken something of it.
    pub sent: Instant,
    /// How long dockerd takes for such a request.
    pub pace: Pace,
}

/// How long dockerd takes to begin its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// It only reads or sets a value: at once, whatever it is about.
    AtOnce,
    /// It writes to the disk or starts a process: at once, or some seconds on a busy disk.
    Soon,
    /// A build, a stop with its grace, a wait, the logs of a silent container: any time.
    Long,
}

/// Beside one socket.
#[derive(Debug, Default)]
pub struct Guard {
    state: Mutex<State>,
    asking: AtomicBool,
    fate: OnceLock<Fate>,
}

#[derive(Debug, Default)]
struct State {
    /// Open as long as it is here.
    fd: Option<RawFd>,
    asked: Option<Asked>,
    /// Since when sent data is sent again and again.
    suspect: Option<Instant>,
}

impl Guard {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The socket is open from now on, or no longer.
    pub(super) fn set(&self, fd: Option<RawFd>) {
        self.state().fd = fd;
    }

    /// A request is on its way.
    pub fn ask(&self, pace: Pace) {
        let now = Instant::now();
        self.state().asked = Some(Asked { since: now, sent: now, pace });
        self.asking.store(true, Ordering::Relaxed);
    }

    /// The peer's kernel has taken more of it: an upload of minutes is not a wait of minutes.
    pub(super) fn sent(&self) {
        if self.asking.load(Ordering::Relaxed)
            && let Some(asked) = &mut self.state().asked
        {
            asked.sent = Instant::now();
        }
    }

    /// The peer has sent something, or nothing is expected of it any more.
    pub fn answered(&self) {
        if self.asking.load(Ordering::Relaxed) {
            self.asking.store(false, Ordering::Relaxed);
            self.state().asked = None;
        }
    }

    /// The request that is not answered yet.
    pub fn asked(&self) -> Option<Asked> {
        if self.asking.load(Ordering::Relaxed) { self.state().asked } else { None }
    }

    /// For how long the peer has acknowledged nothing of what was sent again and again, if that is more than
    /// `limit`. A closed window is no sign of that: its peer acknowledges the probes, so TCP_USER_TIMEOUT, which
    /// cannot tell, is not used.
    pub fn unacknowledged(&self, now: Instant, limit: Duration) -> Option<Duration> {
        let mut state = self.state();
        let info = tcp_info(state.fd?)?;
        let heard = Duration::from_millis(info.tcpi_last_ack_recv.into());
        // Probes of a closed window are not counted as unacknowledged.
        let sent_again = info.tcpi_unacked > 0 && info.tcpi_retransmits > 0 || info.tcpi_probes > 2;
        if !sent_again {
            state.suspect = None;
            return None;
        }
        let since = *state.suspect.get_or_insert(now);
        let silent = now.saturating_duration_since(since).min(heard);
        (silent >= limit).then_some(silent)
    }

    /// Ends the socket: whoever reads from it gets the fate as an error. False if it had ended already.
    pub fn end(&self, fate: Fate) -> bool {
        let state = self.state();
        let Some(fd) = state.fd else { return false };
        if self.fate.set(fate).is_err() {
            return false;
        }
        // SAFETY: the side takes `fd` out of the state before it closes it, and the state is locked.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        // It wakes the task that polls the socket. One that is not connected any more has woken it already.
        let _ = socket2::SockRef::from(&fd).shutdown(std::net::Shutdown::Both);
        true
    }

    /// The fate as the error that the relay sees.
    pub(super) fn error(&self) -> Option<io::Error> {
        self.fate.get().map(Fate::error)
    }
}

fn tcp_info(fd: RawFd) -> Option<libc::tcp_info> {
    // SAFETY: the structure is plain numbers, for which zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes of `info`.
    let result = unsafe {
        libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut length)
    };
    (result == 0).then_some(info)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::testing::{Ending, read_to_end, soon, tcp, unix};
    use super::*;

    #[tokio::test]
    async fn a_fate_wakes_its_reader_with_the_reason() {
        let (mut near, _far) = tcp().await;
        let guard = Arc::new(Guard::default());
        near.guard(guard.clone());
        let reader = tokio::spawn(async move { near.fill().await.map(drop) });
        assert!(guard.end(Fate::Silent(Duration::from_secs(7))));
        assert!(!guard.end(Fate::Lost(Duration::from_secs(8))), "the first one counts");
        let error = soon(reader).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("for 7 s"));
        let (mut near, _far) = unix();
        let guard = Arc::new(Guard::default());
        near.guard(guard.clone());
        guard.end(Fate::Silent(Duration::ZERO));
        assert_eq!(soon(near.fill()).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_guard_lets_go_of_a_socket_that_is_closed() {
        let (mut near, mut far) = tcp().await;
        let guard = Arc::new(Guard::default());
        near.guard(guard.clone());
        drop(near);
        assert!(!guard.end(Fate::Lost(Duration::ZERO)));
        assert_eq!(read_to_end(&mut far).await.1, Ending::Fin);
    }

    #[tokio::test]
    async fn a_byte_is_an_answer() {
        let (mut near, mut far) = tcp().await;
        let guard = Arc::new(Guard::default());
        near.guard(guard.clone());
        guard.ask(Pace::AtOnce);
        let asked = guard.asked().unwrap();
        near.write_all(b"GET").await.unwrap();
        assert!(
            guard.asked().is_some_and(|a| a.since == asked.since && a.sent > asked.sent),
            "it progresses"
        );
        super::super::testing::say(&mut far, "H").await;
        soon(near.fill()).await.unwrap();
        assert_eq!(guard.asked(), None);
    }

    #[tokio::test]
    async fn a_peer_that_does_not_read_is_alive() {
        let (mut near, _far) = tcp().await;
        let guard = Arc::new(Guard::default());
        near.guard(guard.clone());
        let much = vec![0; 64 << 20];
        let full = tokio::time::timeout(Duration::from_millis(300), near.write_all(&much));
        assert!(full.await.is_err(), "its window is closed");
        let later = Instant::now() + Duration::from_secs(3600);
        assert_eq!(guard.unacknowledged(later, Duration::ZERO), None);
    }
}
