//! `dindpool status`: the pool as a table, or as JSON.

use anyhow::Context;
use clap::Args;

use super::admin::Where;
use crate::metrics::{health_word, state_word};
use crate::pool::status::{Role, Status as Pool};

#[derive(Debug, Args)]
pub struct Status {
    #[command(flatten)]
    at: Where,
    /// Print /status as it is
    #[arg(long)]
    json: bool,
}

impl Status {
    pub async fn run(self) -> anyhow::Result<()> {
        let body = self.at.get("/status").await?;
        if self.json {
            println!("{body}");
            return Ok(());
        }
        let pool: Pool = serde_json::from_str(&body).context("what answers there is no dindpool")?;
        print!("{}", table(&pool));
        Ok(())
    }
}

/// The pool as a person reads it.
fn table(pool: &Pool) -> String {
    let mut rows = vec![["DAEMON", "STATE", "SLOTS", "SESSIONS", "VERSION", "ADDRESS", ""].map(String::from)];
    for d in &pool.daemons {
        let health = health_word(d.health);
        let state = state_word(d.state);
        rows.push([
            d.id.clone(),
            match d.cordon_word() {
                _ if state == "ready" && health == "ejected" => health.into(),
                Some(word) if state == "ready" => word.into(),
                _ => state.into(),
            },
            match d.strangers {
                0 => format!("{}/{}", d.used, d.slots),
                n => format!("{}/{} +{n}", d.used, d.slots),
            },
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
        let mut rows = vec![["WAITING", "SESSION", "SINCE", "TENANT"].map(String::from)];
        for t in &pool.queue.tickets {
            rows.push([t.position.to_string(), t.key.clone(), span(t.waited), t.tenant.clone()]);
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

fn align<const N: usize>(rows: &[[String; N]]) -> String {
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

/// `42s`, `7m`, `3h12m`.
fn span(seconds: f64) -> String {
    let seconds = seconds as u64;
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_spans_are_short() {
        let rows = [["a".to_string(), "bb".into()], ["ccc".into(), "d".into()]];
        assert_eq!(align(&rows), "a    bb\nccc  d\n");
        assert_eq!([span(5.0), span(300.0), span(11_520.0)], ["5s", "5m", "3h12m"]);
    }
}
