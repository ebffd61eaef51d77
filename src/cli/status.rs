//! `dindpool status`: the pool as a table, or as JSON; with `--watch` again and again ([`super::watch`]).

use anyhow::Context;
use clap::Args;

use super::admin::Where;
use crate::metrics::{health_word, state_word};
use crate::pool::advice::span;
use crate::pool::status::{DaemonStatus, Role, Status as Pool};

#[derive(Debug, Args)]
pub struct Status {
    #[command(flatten)]
    at: Where,
    /// Print /status as it is
    #[arg(long)]
    json: bool,
    /// Show it live until Ctrl-C; to a file or a pipe, a line whenever something changes
    #[arg(long, short, conflicts_with = "json")]
    watch: bool,
}

impl Status {
    pub async fn run(self) -> anyhow::Result<()> {
        if self.watch {
            return super::watch::run(&self.at).await;
        }
        let body = self.at.get("/status").await?;
        if self.json {
            println!("{body}");
            return Ok(());
        }
        let pool: Pool = serde_json::from_str(&body).context("what answers there is no dindpool")?;
        print!("{}", plain(&table(&pool)));
        Ok(())
    }
}

/// A daemon's state in one word.
pub(super) fn standing(d: &DaemonStatus) -> &'static str {
    let (state, health) = (state_word(d.state), health_word(d.health));
    match d.cordon_word() {
        _ if state == "ready" && health == "ejected" => health,
        Some(word) if state == "ready" => word,
        _ => state,
    }
}

/// `2/4`, and what runs there without a session.
pub(super) fn slots(d: &DaemonStatus) -> String {
    match d.strangers {
        0 => format!("{}/{}", d.used, d.slots),
        n => format!("{}/{} +{n}", d.used, d.slots),
    }
}

/// Text that others chose, without what would steer the terminal.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// The pool as a person reads it.
fn table(pool: &Pool) -> String {
    let mut rows = vec![["DAEMON", "STATE", "SLOTS", "SESSIONS", "VERSION", "ADDRESS", ""].map(String::from)];
    for d in &pool.daemons {
        rows.push([
            d.id.clone(),
            standing(d).into(),
            slots(d),
            d.sessions.to_string(),
            d.version.clone(),
            d.address.clone(),
            d.reason.clone(),
        ]);
    }
    let mut out = align(&rows);
    let mut rows =
        vec![["SESSION", "DAEMON", "SLOTS", "OPEN", "CONTAINERS", "SINCE", "TENANT"].map(String::from)];
    for s in &pool.sessions {
        rows.push([
            s.key.clone(),
            s.daemon.clone(),
            s.slots.to_string(),
            s.open.to_string(),
            if s.overdue { format!("{} overdue", s.containers) } else { s.containers.to_string() },
            span(s.since),
            s.tenant.clone(),
        ]);
    }
    out.push('\n');
    if pool.sessions.is_empty() {
        out.push_str("no sessions\n");
    } else {
        out.push_str(&align(&rows));
    }
    if !pool.queue.tickets.is_empty() {
        let mut rows = vec![["WAITING", "SESSION", "SINCE", "EXPECTED", "TENANT", "FOR"].map(String::from)];
        for t in &pool.queue.tickets {
            let expected = t.expected.map_or_else(String::new, |e| format!("~{}", span(e)));
            let (key, tenant) = (t.key.clone(), t.tenant.clone());
            rows.push([t.position.to_string(), key, span(t.waited), expected, tenant, t.awaits.clone()]);
        }
        out.push('\n');
        out.push_str(&align(&rows));
    }
    if let Some((min, max)) = &pool.api {
        out.push_str(&format!("\nAPI {min} to {max}, {} waiting\n", pool.queue.waiting));
    }
    if let Some(lease) = &pool.lease {
        let role = match lease.role {
            Role::Holder => "this proxy admits",
            Role::Follower => "this proxy asks the one that admits",
            Role::Leaving => "this proxy is about to end",
        };
        let holder = lease.holder.as_deref().unwrap_or("nobody");
        out.push_str(&format!("lease of {holder}, number {}: {role}", lease.tenure));
        if lease.role == Role::Holder {
            out.push_str(&format!(", {} others are connected and relay {}", lease.peers, lease.streams));
        }
        out.push('\n');
    }
    for problem in &pool.problems {
        out.push_str(&format!("problem: {problem}\n"));
    }
    out
}

pub(super) fn align<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["a".to_string(), "bb".into()], ["ccc".into(), "d".into()]];
        assert_eq!(align(&rows), "a    bb\nccc  d\n");
    }
}
