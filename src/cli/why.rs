//! `dindpool why`: how a session was recognised, why it is on its daemon, and what it waited for.

use anyhow::Context;
use clap::Args;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::admin::Where;
use super::status::{align, plain};
use crate::engine::reason::{Because, Compared};
use crate::pool::advice::span;
use crate::pool::why::Why as Told;

#[derive(Debug, Args)]
pub struct Why {
    /// The session's key, as dindpool status shows it, or a part that only it has
    session: String,
    #[command(flatten)]
    at: Where,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

impl Why {
    pub async fn run(self) -> anyhow::Result<()> {
        let path = format!("/sessions/{}", utf8_percent_encode(&self.session, NON_ALPHANUMERIC));
        let body = self.at.ask(&path).await?;
        if self.json {
            print!("{body}");
            return Ok(());
        }
        let told: Told = serde_json::from_str(&body).context("what answers there is no dindpool")?;
        print!("{}", plain(&text(&told)));
        Ok(())
    }
}

fn text(told: &Told) -> String {
    let mut out = format!("session     {}\n", told.key);
    let mut row = |name: &str, text: &str| out.push_str(&format!("{name:12}{text}\n"));
    row("tenant", &told.tenant);
    row("recognised", &told.recognised);
    match (&told.daemon, &told.session) {
        (Some(daemon), Some(session)) => {
            row("daemon", &format!("{daemon}, for {}", span(session.since)));
            row(
                "holds",
                &format!(
                    "{} slots: {} builds, {} open requests, {} containers",
                    session.slots, session.builds, session.open, session.containers
                ),
            );
        }
        (Some(daemon), None) => row("daemon", &format!("{daemon}; it has no lease now")),
        (None, _) => row("daemon", "none"),
    }
    row("because", &told.reason);
    match &told.awaited {
        Some(awaited) => row("waited", &format!("{} for {awaited}", span(told.waited))),
        None if told.why.is_some() => row("waited", "not at all"),
        None => {}
    }
    for ticket in &told.waiting {
        let expected = ticket.expected.map_or_else(String::new, |e| format!(", about {} more", span(e)));
        let waited = span(ticket.waited);
        row("waits", &format!("position {}, for {waited}{expected}: {}", ticket.position, ticket.awaits));
    }
    if let Some(Because::DoneFirst { compared, .. } | Because::LeastWait { compared, .. }) = &told.why
        && !compared.is_empty()
    {
        out.push('\n');
        out.push_str(&align(&compare(compared)));
    }
    out
}

/// What was compared, the chosen one first.
fn compare(compared: &[Compared]) -> Vec<[String; 7]> {
    let head = ["COMPARED", "SLOTS", "SESSIONS", "AGAINST", "WARM", "WAITING", "COST"].map(String::from);
    let row = |c: &Compared| {
        [
            c.daemon.to_string(),
            format!("{}/{}", c.used, c.slots),
            c.sessions.to_string(),
            if c.against > 0.0 { format!("{:.2}", c.against) } else { String::new() },
            if c.warm { "yes".into() } else { String::new() },
            c.waiting.to_string(),
            c.cost.map_or_else(String::new, |cost| format!("{cost:.3}")),
        ]
    };
    std::iter::once(head).chain(compared.iter().map(row)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_story_fits_a_screen() {
        let told: Told = serde_json::from_value(serde_json::json!({
            "key": "name:release", "tenant": "default", "recognised": "by its name", "daemon": "dind-1",
            "session": null, "reason": "the expected wait is the least there", "waited": 12.0,
            "awaited": "a free slot on any daemon", "waiting": [], "events": [],
            "why": { "because": "least-wait", "equals": 1, "image": false, "compared": [
                { "daemon": "dind-1", "used": 0, "slots": 2, "sessions": 0, "against": 0.0 },
                { "daemon": "dind-0", "used": 2, "slots": 2, "sessions": 2, "against": 8.0 },
            ] },
        }))
        .unwrap();
        let text = text(&told);
        assert!(text.contains("waited      12s for a free slot on any daemon"), "{text}");
        assert!(text.contains("dind-0    2/2    2         8.00"), "{text}");
    }
}
