//! `dindpool status --watch`: the pool on a terminal, again and again, what is wrong first. On anything else a line
//! whenever something has changed.
//!
//! Each picture is one write over the former one, so nothing flickers; it is on the alternate screen, so that the
//! terminal is afterwards what it was before.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::Context;

use super::admin::Where;
use super::status::{align, plain, slots, standing};
use crate::pool::advice::{Grade, advice, span};
use crate::pool::status::{SessionStatus, Status as Pool};

/// Between two pictures.
const PERIOD: Duration = Duration::from_secs(1);
/// From this width on there is room for everything.
const WIDE: usize = 120;

/// Shows the pool until the process is told to end.
///
/// # Errors
/// When the pool does not answer at the beginning. Later that is shown instead.
pub async fn run(at: &Where) -> anyhow::Result<()> {
    let end = super::signals()?;
    // Whoever typed another address wants to hear of it, and no empty screen.
    let first = ask(at).await?;
    tokio::select! {
        () = end => Ok(()),
        result = async {
            if std::io::stdout().is_terminal() { draw(at, first).await } else { tell(at, first).await }
        } => result,
    }
}

async fn ask(at: &Where) -> anyhow::Result<Pool> {
    let body = at.get("/status").await?;
    serde_json::from_str(&body).context("what answers there is no dindpool")
}

/// The alternate screen, left when this is dropped.
struct Screen;

impl Screen {
    fn enter() -> std::io::Result<Self> {
        let mut out = std::io::stdout();
        out.write_all(b"\x1b[?1049h\x1b[?25l\x1b[2J")?;
        out.flush()?;
        Ok(Screen)
    }

    fn show(&self, lines: &[String]) -> std::io::Result<()> {
        // A terminal that knows the marks at both ends shows all of it at once.
        let mut picture = String::from("\x1b[?2026h\x1b[H");
        for (i, line) in lines.iter().enumerate() {
            if i > 0 {
                picture.push_str("\r\n");
            }
            picture.push_str(line);
            picture.push_str("\x1b[0m\x1b[K");
        }
        picture.push_str("\x1b[J\x1b[?2026l");
        let mut out = std::io::stdout();
        out.write_all(picture.as_bytes())?;
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let mut out = std::io::stdout();
        let _ = out.write_all(b"\x1b[0m\x1b[?25h\x1b[?1049l");
        let _ = out.flush();
    }
}

async fn draw(at: &Where, first: Pool) -> anyhow::Result<()> {
    let screen = Screen::enter()?;
    let (mut pool, mut fault) = (first, None);
    loop {
        let (width, height) = size();
        screen.show(&picture(&pool, fault.as_deref(), width, height))?;
        tokio::time::sleep(PERIOD).await;
        match ask(at).await {
            Ok(new) => (pool, fault) = (new, None),
            Err(error) => fault = Some(format!("{error:#}")),
        }
    }
}

/// Columns and rows of the terminal.
fn size() -> (usize, usize) {
    // SAFETY: the structure is plain data, for which zero is a value.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: `size` is valid for what TIOCGWINSZ writes.
    let asked = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    if asked == 0 && size.ws_col > 0 && size.ws_row > 0 {
        (size.ws_col.into(), size.ws_row.into())
    } else {
        (80, 24)
    }
}

/// What fits the terminal of the pool (pure).
fn picture(pool: &Pool, fault: Option<&str>, width: usize, height: usize) -> Vec<String> {
    let mut lines = vec![cut(&summary(pool), width)];
    if let Some(fault) = fault {
        lines.push(coloured(Grade::Bad, &cut(&format!("no answer, this is old: {fault}"), width)));
    }
    for advice in advice(pool) {
        lines.push(coloured(advice.grade, &cut(&plain(&advice.what), width)));
        lines.push(cut(&plain(&format!("  {}", advice.todo)), width));
    }
    lines.push(String::new());
    let sections = [daemons(pool, width), queue(pool, width), sessions(pool, width)];
    for section in sections.iter().filter(|section| !section.is_empty()) {
        lines.extend(plain(section).lines().map(|line| cut(line, width)));
        lines.push(String::new());
    }
    lines.pop();
    if lines.len() > height {
        let hidden = lines.len() - height + 1;
        lines.truncate(height - 1);
        lines.push(cut(&format!("… {hidden} more lines: dindpool status shows all"), width));
    }
    lines
}

fn coloured(grade: Grade, text: &str) -> String {
    let colour = match grade {
        Grade::Bad => "\x1b[1;31m",
        Grade::Warn => "\x1b[1;33m",
        Grade::Note => "\x1b[1m",
    };
    format!("{colour}{text}\x1b[0m")
}

/// As much of a line as fits.
fn cut(line: &str, width: usize) -> String {
    match line.char_indices().nth(width) {
        Some(_) => line.chars().take(width.saturating_sub(1)).chain(['…']).collect(),
        None => line.to_string(),
    }
}

/// `dindpool: 3/8 slots, 4 of 4 daemons take sessions, 2 wait, 5 sessions`
fn summary(pool: &Pool) -> String {
    let used: u32 = pool.daemons.iter().map(|d| d.used).sum();
    let slots: u32 = pool.daemons.iter().map(|d| d.slots).sum();
    let ready = pool.daemons.iter().filter(|d| d.takes_sessions()).count();
    format!(
        "dindpool: {used}/{slots} slots, {ready} of {} daemons take sessions, {} wait, {} sessions",
        pool.daemons.len(),
        pool.queue.waiting,
        pool.sessions.len()
    )
}

fn daemons(pool: &Pool, width: usize) -> String {
    if width >= WIDE {
        let head = ["DAEMON", "STATE", "SLOTS", "SESSIONS", "VERSION", "ADDRESS", ""].map(String::from);
        let rows = pool.daemons.iter().map(|d| {
            let (state, sessions) = (standing(d).to_string(), d.sessions.to_string());
            [d.id.clone(), state, slots(d), sessions, d.version.clone(), d.address.clone(), d.reason.clone()]
        });
        return align(&std::iter::once(head).chain(rows).collect::<Vec<_>>());
    }
    let head = ["DAEMON", "STATE", "SLOTS", "SESSIONS", ""].map(String::from);
    let rows = pool
        .daemons
        .iter()
        .map(|d| [d.id.clone(), standing(d).into(), slots(d), d.sessions.to_string(), d.reason.clone()]);
    align(&std::iter::once(head).chain(rows).collect::<Vec<_>>())
}

fn queue(pool: &Pool, width: usize) -> String {
    if pool.queue.tickets.is_empty() {
        return String::new();
    }
    let longest = if width >= WIDE { 80 } else { 30 };
    let head = ["WAITING", "SESSION", "TENANT", "SINCE", "EXPECTED", "FOR"].map(String::from);
    let rows = pool.queue.tickets.iter().map(|t| {
        let expected = t.expected.map_or_else(String::new, |e| format!("~{}", span(e)));
        let key = cut(&t.key, longest);
        [t.position.to_string(), key, cut(&t.tenant, 16), span(t.waited), expected, t.awaits.clone()]
    });
    align(&std::iter::once(head).chain(rows).collect::<Vec<_>>())
}

/// Those that hold slots first.
fn sessions(pool: &Pool, width: usize) -> String {
    if pool.sessions.is_empty() {
        return "no sessions\n".into();
    }
    let longest = if width >= WIDE { 80 } else { 30 };
    let head = ["SESSION", "DAEMON", "SLOTS", "SINCE", "TENANT", "DOES"].map(String::from);
    let mut all: Vec<&SessionStatus> = pool.sessions.iter().collect();
    all.sort_by_key(|s| s.slots == 0);
    let rows = all.into_iter().map(|s| {
        let (key, slots) = (cut(&s.key, longest), s.slots.to_string());
        [key, s.daemon.clone(), slots, span(s.since), cut(&s.tenant, 16), does(s)]
    });
    align(&std::iter::once(head).chain(rows).collect::<Vec<_>>())
}

fn does(s: &SessionStatus) -> String {
    let count = |n: u32, what: &str| match n {
        0 => None,
        1 => Some(format!("1 {what}")),
        n => Some(format!("{n} {what}s")),
    };
    let runs = (!s.names.is_empty()).then(|| format!("runs {}", s.names.join(", ")));
    let open = count(s.open.saturating_sub(s.builds), "open request");
    let all: Vec<String> = [count(s.builds, "build"), runs, open].into_iter().flatten().collect();
    if all.is_empty() { "idle".into() } else { all.join(", ") }
}

/// A line whenever something has changed.
async fn tell(at: &Where, first: Pool) -> anyhow::Result<()> {
    let (mut pool, mut told) = (Ok(first), String::new());
    loop {
        let line = match &pool {
            Ok(pool) => line(pool),
            Err(error) => format!("no answer: {error:#}"),
        };
        if line != told {
            let mut out = std::io::stdout();
            // A reader that has gone wants no more.
            if writeln!(out, "{}", plain(&line)).and_then(|()| out.flush()).is_err() {
                return Ok(());
            }
            told = line;
        }
        tokio::time::sleep(PERIOD).await;
        pool = ask(at).await;
    }
}

/// The summary, and what is wrong but for how long already.
fn line(pool: &Pool) -> String {
    let wrong: Vec<String> =
        advice(pool).into_iter().filter(|a| a.grade == Grade::Bad).map(|a| a.what).collect();
    let summary = summary(pool);
    if wrong.is_empty() { summary } else { format!("{summary}; {}", wrong.join(" ")) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pool(daemons: usize) -> Pool {
        let daemon = |i: usize| {
            json!({
                "id": format!("dind-{i}"), "address": "tcp://10.0.0.1:2375", "state": "ready", "health": "healthy",
                "reason": "", "version": "28.5.2", "slots": 2, "used": 1, "sessions": 1,
            })
        };
        let daemons: Vec<_> = (0..daemons).map(daemon).collect();
        serde_json::from_value(json!({
            "version": "0", "api": null, "daemons": daemons, "problems": [], "images": 0,
            "sessions": [{
                "key": "name:\u{1b}[31mred", "tenant": "t", "daemon": "dind-0", "slots": 1, "open": 3, "builds": 1,
                "containers": 1, "names": ["db"], "since": 61.0,
            }],
            "queue": { "waiting": 1, "limit": 10, "tickets": [
                { "position": 1, "key": "ip:10.0.0.9", "tenant": "t", "waited": 5.0, "awaits": "a free slot on any daemon" },
            ] },
        }))
        .unwrap()
    }

    /// What the terminal shows of a line.
    fn shown(line: &str) -> String {
        let mut out = String::new();
        let mut rest = line;
        while let Some((before, after)) = rest.split_once("\u{1b}[") {
            out.push_str(before);
            rest = after.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';').trim_start_matches('m');
        }
        out + rest
    }

    #[test]
    fn no_picture_is_wider_or_higher_than_its_terminal() {
        for (width, height) in [(80, 24), (200, 50), (20, 5), (1, 1)] {
            let lines = picture(&pool(40), Some("gone"), width, height);
            assert!(lines.len() <= height, "{width}x{height}");
            assert!(lines.iter().all(|line| shown(line).chars().count() <= width), "{lines:#?}");
        }
    }

    #[test]
    fn what_waits_is_said_first_and_nothing_steers_the_terminal() {
        let lines = picture(&pool(1), None, 80, 24);
        assert!(shown(&lines[1]).starts_with("1 build waits for a slot"), "{lines:#?}");
        let text = lines.join("\n");
        assert!(!text.contains("\u{1b}[31mred") && text.contains("name:\u{fffd}[31mred"), "{text}");
        assert!(text.contains("1 build, runs db, 2 open requests"), "{text}");
    }
}
