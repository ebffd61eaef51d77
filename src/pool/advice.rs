//! What is wrong with the pool and what to do about it, in plain words, worst first (pure): what the page and
//! `dindpool status --watch` say before anything else.

use serde::{Deserialize, Serialize};

use super::status::{DaemonStatus, Role, Status};
use crate::engine::model::{CordonedBy, Health, State};

/// How many sentences of one kind there are, before the rest is counted only.
const EACH: usize = 5;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// Builds fail, or nobody gets in.
    Bad,
    /// Builds wait, or less of the pool works than should.
    Warn,
    /// It is as somebody wanted it, and that may have been forgotten.
    Note,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advice {
    /// How bad it is.
    pub grade: Grade,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub todo: String,
}

impl Advice {
    fn new(grade: Grade, what: impl Into<String>, todo: impl Into<String>) -> Self {
        Advice { grade, what: what.into(), todo: todo.into() }
    }
}

/// All that is wrong, the worst first.
pub fn advice(pool: &Status) -> Vec<Advice> {
    let mut advice = Vec::new();
    if let Some(lease) = pool.lease.as_ref().filter(|lease| lease.role != Role::Holder) {
        let (grade, what, todo) = match &lease.holder {
            Some(holder) => (
                Grade::Note,
                format!("This proxy does not admit: {holder} does. Sessions and queue are not shown here."),
                format!("Look there: kubectl port-forward pod/{holder} 9375"),
            ),
            None => (
                Grade::Bad,
                "No proxy admits: builds wait.".to_string(),
                "One takes over within the lease's duration; if not, look at the proxies' logs.".to_string(),
            ),
        };
        return vec![Advice::new(grade, what, todo)];
    }
    capacity(pool, &mut advice);
    daemons(pool, &mut advice);
    queue(pool, &mut advice);
    let known = |problem: &str| pool.daemons.iter().any(|d| problem.starts_with(&format!("{}:", d.id)));
    for problem in pool.problems.iter().filter(|problem| !known(problem)).take(EACH) {
        advice.push(Advice::new(
            Grade::Warn,
            sentence(problem),
            "See the troubleshooting guide for these words.",
        ));
    }
    let overdue: Vec<&str> = pool.sessions.iter().filter(|s| s.overdue).map(|s| s.key.as_str()).collect();
    if let Some(first) = overdue.first() {
        let more = overdue.len() - 1;
        let others = if more > 0 { format!(" and {more} more") } else { String::new() };
        advice.push(Advice::new(
            Grade::Note,
            format!("Nobody attends the containers of {first}{others}; they hold their slots."),
            "Stop the containers, or set overdue_containers = \"stop\".",
        ));
    }
    advice.sort_by_key(|a| a.grade);
    advice
}

/// Whether anybody gets in at all.
fn capacity(pool: &Status, advice: &mut Vec<Advice>) {
    if pool.daemons.iter().any(DaemonStatus::takes_sessions) {
        return;
    }
    let faults = pool.scaler.as_ref().map(|s| s.faults.as_slice()).unwrap_or_default();
    let replicas = pool.scaler.as_ref().and_then(|s| s.replicas);
    match (pool.daemons.is_empty(), faults.first(), replicas) {
        (_, Some(fault), _) => advice.push(Advice::new(
            Grade::Bad,
            format!("No daemon takes sessions, and none comes up: {fault}"),
            "Read the daemon's own log for the cause; builds wait or are refused until one is up.",
        )),
        (true, None, Some(0)) if pool.queue.waiting == 0 => advice.push(Advice::new(
            Grade::Note,
            "There are no daemons: the pool is scaled to zero, and nobody asks for one.",
            "The next build starts one.",
        )),
        (true, None, _) => advice.push(Advice::new(
            Grade::Bad,
            "There are no daemons.",
            "Check what makes them: --daemon addresses, the Deployment, or --daemons of dindpool up.",
        )),
        (false, None, _) if pool.daemons.iter().all(|d| d.state == State::Starting) => {
            advice.push(Advice::new(
                Grade::Warn,
                "All daemons are still starting: builds wait.",
                "If that lasts longer than a minute or two, read a daemon's log.",
            ))
        }
        (false, None, _) => advice.push(Advice::new(
            Grade::Bad,
            "No daemon takes sessions: new builds are refused or wait.",
            "Mend one of the daemons below, or uncordon one.",
        )),
    }
}

fn daemons(pool: &Status, advice: &mut Vec<Advice>) {
    let mut told = 0;
    for d in &pool.daemons {
        let of_scaler = |d: &DaemonStatus| d.cordon.as_ref().is_some_and(|c| c.by == CordonedBy::Scaler);
        let one = if d.refused {
            Some(Advice::new(
                Grade::Bad,
                format!("{} is refused: {}", d.id, d.reason),
                "It does not belong into this pool as it is: change it or take it out. Two daemons must never share \
                 a data root.",
            ))
        } else if d.health == Health::Ejected {
            let held = match d.sessions {
                0 => String::new(),
                1 => " 1 session is bound to it, and waits or fails until it is back.".to_string(),
                n => format!(" {n} sessions are bound to it, and wait or fail until it is back."),
            };
            Some(Advice::new(
                Grade::Bad,
                format!("{} is ejected: {}.{held}", d.id, d.reason),
                remedy(&d.reason),
            ))
        } else if d.cordoned && d.state == State::Ready && !of_scaler(d) {
            let word = d.cordon_word().unwrap_or("cordoned");
            Some(Advice::new(
                Grade::Note,
                format!("{} is {word}: an operator did that. It takes no new sessions.", d.id),
                format!("When its maintenance is over: dindpool uncordon {}", d.id),
            ))
        } else {
            None
        };
        if let Some(one) = one {
            told += 1;
            if told <= EACH {
                advice.push(one);
            }
        }
    }
    if told > EACH {
        let grade = Grade::Bad;
        advice.push(Advice::new(
            grade,
            format!("And {} more daemons need attention.", told - EACH),
            "See the daemons below.",
        ));
    }
    if let Some(scaler) = &pool.scaler
        && pool.daemons.iter().any(DaemonStatus::takes_sessions)
    {
        for fault in scaler.faults.iter().take(EACH) {
            let what = format!("A daemon does not come up: {fault}");
            advice.push(Advice::new(
                Grade::Warn,
                what,
                "Read that daemon's own log; the pool works with fewer until then.",
            ));
        }
    }
}

/// What to do about an ejected daemon, by the words of its reason.
fn remedy(reason: &str) -> &'static str {
    let has = |words: &[&str]| words.iter().any(|word| reason.to_lowercase().contains(word));
    if has(&["no space", "cannot write", "write", "disk", "read-only"]) {
        "Most likely its disk is full: free space there (docker system prune) or give it a new one. It comes back by \
         itself once it can write."
    } else if has(&["refused", "no such file", "reset"]) {
        "Nobody listens there: dockerd has stopped or is starting again. Read its log; it comes back by itself."
    } else if has(&["within", "no answer", "timed out", "not answer"]) {
        "It is there and says nothing: it hangs, or its machine is overloaded. Restart it if that lasts."
    } else {
        "Read the daemon's own log. It comes back by itself when it answers again."
    }
}

fn queue(pool: &Status, advice: &mut Vec<Advice>) {
    let Some(next) = pool.queue.tickets.first() else { return };
    let waiting = pool.queue.tickets.len();
    let longest = pool.queue.tickets.iter().map(|t| t.waited).fold(0.0, f64::max);
    let open: u32 =
        pool.daemons.iter().filter(|d| d.takes_sessions()).map(|d| d.slots.saturating_sub(d.used)).sum();
    if pool.queue.limit > 0 && waiting >= pool.queue.limit {
        advice.push(Advice::new(
            Grade::Bad,
            format!("The queue is full: {waiting} wait, and further builds are refused."),
            "Add daemons or slots; or let more wait with queue_limit.",
        ));
    }
    let scaler = pool.scaler.as_ref().filter(|s| s.active);
    let grows = scaler.is_some_and(|s| s.replicas.is_some_and(|n| s.desired > n));
    let todo = if next.awaits.contains("tenant") {
        "It is held back by tenant_slots, which is as somebody set it."
    } else if open > 0 {
        "Slots are free, but not where these belong: dindpool why SESSION tells what each waits for."
    } else if grows {
        "More daemons are on their way."
    } else if scaler.is_some() {
        "The pool is as large as it may be: raise the most daemons that there may be (scale-max), or wait."
    } else {
        "All slots are in use: add daemons or slots, or wait."
    };
    let what = format!(
        "{} for a slot, the longest for {}. Next: {} of tenant {}.",
        if waiting == 1 { "1 build waits".into() } else { format!("{waiting} builds wait") },
        span(longest),
        next.key,
        next.tenant
    );
    advice.push(Advice::new(Grade::Warn, what, todo));
    crowd(pool, advice);
}

/// One tenant that fills the queue, while others wait as well.
fn crowd(pool: &Status, advice: &mut Vec<Advice>) {
    let mut tenants: Vec<(&str, usize)> = Vec::new();
    for ticket in &pool.queue.tickets {
        match tenants.iter_mut().find(|(tenant, _)| *tenant == ticket.tenant) {
            Some((_, n)) => *n += 1,
            None => tenants.push((&ticket.tenant, 1)),
        }
    }
    let waiting = pool.queue.tickets.len();
    if let Some((tenant, n)) = tenants.iter().max_by_key(|(_, n)| *n)
        && tenants.len() > 1
        && waiting >= 5
        && n * 10 >= waiting * 6
    {
        advice.push(Advice::new(
            Grade::Warn,
            format!("Tenant {tenant} fills the queue: {n} of {waiting} are its builds."),
            "Tenants take turns, so the others pass; tenant_slots and tenant_waiting limit it.",
        ));
    }
}

/// With a capital letter and a full stop.
fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
    format!("{first}{}{}", chars.as_str(), if text.ends_with('.') { "" } else { "." })
}

/// `42s`, `7m`, `3h12m`.
pub fn span(seconds: f64) -> String {
    let seconds = seconds as u64;
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pool(daemons: serde_json::Value, tickets: serde_json::Value) -> Status {
        let waiting = tickets.as_array().map_or(0, Vec::len);
        serde_json::from_value(json!({
            "version": "0", "api": null, "daemons": daemons, "sessions": [], "problems": [], "images": 0,
            "queue": { "waiting": waiting, "limit": 10, "tickets": tickets },
        }))
        .unwrap()
    }

    fn daemon(id: &str, health: &str, reason: &str, used: u32) -> serde_json::Value {
        json!({
            "id": id, "address": "", "state": "ready", "health": health, "reason": reason, "version": "",
            "slots": 2, "used": used, "sessions": used,
        })
    }

    fn ticket(position: usize, tenant: &str) -> serde_json::Value {
        json!({ "position": position, "key": format!("k{position}"), "tenant": tenant, "waited": 60.0 })
    }

    #[test]
    fn a_pool_that_is_well_has_nothing_to_say() {
        assert_eq!(advice(&pool(json!([daemon("a", "healthy", "", 1)]), json!([]))), []);
    }

    #[test]
    fn an_ejected_daemon_is_the_first_word_with_its_remedy() {
        let all = advice(&pool(
            json!([
                daemon("a", "healthy", "", 2),
                daemon("b", "ejected", "cannot write: no space left on device", 1)
            ]),
            json!([ticket(1, "t")]),
        ));
        assert!(all[0].grade == Grade::Bad && all[0].what.contains("b is ejected"), "{all:?}");
        assert!(all[0].what.contains("1 session") && all[0].todo.contains("disk is full"), "{all:?}");
        assert!(all[1].what.contains("1 build waits") && all[1].what.contains("k1"), "{all:?}");
    }

    #[test]
    fn nobody_left_is_said_as_such() {
        let all = advice(&pool(json!([daemon("a", "ejected", "connection refused", 0)]), json!([])));
        assert!(all[0].what.contains("No daemon takes sessions"), "{all:?}");
        assert!(all[1].todo.contains("Nobody listens"), "{all:?}");
        assert!(advice(&pool(json!([]), json!([])))[0].what.contains("no daemons"));
    }

    #[test]
    fn a_tenant_that_floods_the_queue_is_named() {
        let tickets: Vec<_> = (1..=10).map(|i| ticket(i, if i == 2 { "small" } else { "big" })).collect();
        let all = advice(&pool(json!([daemon("a", "healthy", "", 2)]), json!(tickets)));
        assert!(all.iter().any(|a| a.what.contains("Tenant big fills the queue: 9 of 10")), "{all:?}");
        assert!(all[0].what.contains("The queue is full"), "{all:?}");
    }

    #[test]
    fn one_of_several_proxies_points_to_the_one_that_admits() {
        let mut pool = pool(json!([]), json!([]));
        let lease =
            json!({ "role": "follower", "holder": "dindpool-1", "tenure": 2, "peers": 0, "streams": 0 });
        pool.lease = Some(serde_json::from_value(lease).unwrap());
        let all = advice(&pool);
        assert!(all.len() == 1 && all[0].todo.contains("pod/dindpool-1"), "{all:?}");
    }

    #[test]
    fn spans_are_short() {
        assert_eq!([span(5.0), span(300.0), span(11_520.0)], ["5s", "5m", "3h12m"]);
    }
}
