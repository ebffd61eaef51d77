//! `dindpool events`: what happened in the pool, as lines or as JSON.

use anyhow::Context;
use clap::Args;

use super::admin::Where;
use super::status::plain;
use crate::app::say;
use crate::pool::journal::Entry;

#[derive(Debug, Args)]
pub struct Events {
    #[command(flatten)]
    at: Where,
    /// Go on with what happens from now on, until Ctrl-C
    #[arg(long, short)]
    follow: bool,
    /// Print each as a line of JSON
    #[arg(long)]
    json: bool,
}

impl Events {
    pub async fn run(self) -> anyhow::Result<()> {
        let mut lines = self.at.follow(if self.follow { "/events?follow=1" } else { "/events" }).await?;
        while let Some(line) = lines.next().await? {
            if self.json {
                say(&String::from_utf8_lossy(&line));
            } else {
                let entry: Entry =
                    serde_json::from_slice(&line).context("what answers there is no dindpool")?;
                say(&plain(&text(&entry)));
            }
        }
        anyhow::ensure!(!self.follow, "the pool has gone");
        Ok(())
    }
}

/// `2026-01-31T03:12:09Z ejected  dind-2  cannot write: no space left on device`
fn text(entry: &Entry) -> String {
    let times = if entry.times > 1 { format!(" ({} times)", entry.times) } else { String::new() };
    let whose: Vec<&str> =
        [&entry.daemon, &entry.session].into_iter().flatten().map(String::as_str).collect();
    let whose = if whose.is_empty() { String::new() } else { format!("{}  ", whose.join(" ")) };
    format!("{} {:10} {whose}{}{times}", utc(entry.at), entry.kind.word(), entry.message)
}

/// A time in milliseconds since 1970 as a person reads it, in UTC as the log has it.
fn utc(at: u64) -> String {
    let seconds = at / 1000;
    let (days, rest) = (i64::try_from(seconds / 86_400).unwrap_or_default(), seconds % 86_400);
    let (year, month, day) = civil(days);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest % 3600 / 60, rest % 60)
}

/// The date, by days since 1970 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_399_000), "2000-02-28T23:59:59Z");
        assert_eq!(utc(951_868_800_000), "2000-03-01T00:00:00Z");
        assert_eq!(utc(1_709_210_096_789), "2024-02-29T12:34:56Z");
    }

    #[test]
    fn an_event_is_a_line() {
        let entry = r#"{"number":1,"at":0,"kind":"ejected","daemon":"d","message":"no answer","times":3}"#;
        let text = text(&serde_json::from_str(entry).unwrap());
        assert_eq!(text, "1970-01-01T00:00:00Z ejected    d  no answer (3 times)");
        assert_eq!(plain("a\u{1b}[2Jb"), "a\u{fffd}[2Jb");
    }
}
