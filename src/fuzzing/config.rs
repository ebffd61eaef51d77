//! A configuration file.

use std::time::Duration;

use toml::{Table, Value};

use crate::config::{Faults, MAX_DURATION, Raw, RawListener, duration};
use crate::provision::fixed;
use crate::proxy::listener::Address;
use crate::tls::identity::Rule;
use crate::tls::{DaemonTls, RawTls};

/// A file is taken or every fault of it is named with its key; what is taken can be written down and means the same
/// again; no setting is beyond its bounds.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some(value) = duration(text) {
        assert!(text.starts_with(|c: char| c.is_ascii_digit() || c == '.') && value >= Duration::ZERO);
    }
    if let Ok(address) = text.parse::<Address>() {
        assert_eq!(address.to_string().parse::<Address>().as_ref(), Ok(&address));
    }
    let _ = fixed::parse(text);
    let raw = match Raw::from_toml(text) {
        Ok(raw) => raw,
        Err(faults) => return named(&faults),
    };
    let written = written(&raw);
    assert_eq!(Raw::from_toml(&written).as_ref(), Ok(&raw), "written as {written}");
    assert_eq!(raw.clone().or(raw.clone()), raw);
    assert_eq!(Raw::default().or(raw.clone()), raw);
    // It would be read, whatever file it is.
    let raw = Raw { admin_token_file: None, prestop_token_file: None, prestop: None, ..raw };
    for needs_daemons in [false, true] {
        let settings = match raw.clone().validate(needs_daemons) {
            Ok(settings) => settings,
            Err(faults) => {
                named(&faults);
                continue;
            }
        };
        assert!(!settings.listen.is_empty() && !settings.admin.is_empty());
        assert!(!needs_daemons || !settings.daemons.is_empty());
        assert!(settings.pool.slots != Some(0) && settings.pool.engine.tenant_slots != Some(0));
        assert!(settings.limits.total != Some(0) && settings.limits.per_source != Some(0));
        let engine = &settings.pool.engine;
        let spans = [
            engine.grace,
            engine.linger,
            engine.warm_wait,
            engine.container_lease,
            engine.max_wait,
            engine.deep_probe_interval,
            settings.pool.probe_interval,
            settings.pool.probe_deadline,
            settings.pool.connect_deadline,
            settings.head_deadline,
            settings.shutdown_delay,
            settings.shutdown_grace,
        ];
        assert!(spans.iter().all(|span| *span <= MAX_DURATION), "{spans:?}");
        let never_zero = [
            engine.container_lease,
            engine.max_wait,
            settings.pool.probe_interval,
            settings.pool.probe_deadline,
        ];
        assert!(never_zero.iter().all(|span| *span >= Duration::from_millis(100)), "{never_zero:?}");
        for listener in &settings.listen {
            assert_eq!(listener.address.to_string().parse::<Address>().as_ref(), Ok(&listener.address));
            assert!(listener.identity.tenant.as_str().bytes().all(|b| b.is_ascii_graphic() && b != b'/'));
        }
    }
}

fn named(Faults(faults): &Faults) {
    assert!(!faults.is_empty() && faults.iter().all(|fault| !fault.is_empty()), "{faults:?}");
}

/// The file that says the same.
fn written(raw: &Raw) -> String {
    let mut table = Table::new();
    let mut put = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            table.insert(name.into(), value);
        }
    };
    let text = |text: &Option<String>| text.clone().map(Value::String);
    let texts = |texts: &Option<Vec<String>>| {
        texts.clone().map(|texts| Value::Array(texts.into_iter().map(Value::String).collect()))
    };
    let number = |number: Option<u32>| number.map(|n| Value::Integer(n.into()));
    let listener = |listener: &RawListener| {
        let mut table = Table::new();
        table.insert("address".into(), Value::String(listener.address.clone()));
        for (name, value) in [("tenant", &listener.tenant), ("session", &listener.session)] {
            if let Some(value) = value {
                table.insert(name.into(), Value::String(value.clone()));
            }
        }
        if let Some(tls) = &listener.tls {
            table.insert("tls".into(), tls.to_toml());
        }
        if let Some(networks) = texts(&listener.proxy_protocol) {
            table.insert("proxy_protocol".into(), networks);
        }
        Value::Table(table)
    };
    // Every setting is named, so that a new one is not forgotten here.
    let Raw {
        listen,
        tls,
        identify,
        proxy_protocol,
        daemon_tls,
        admin,
        admin_token_file,
        prestop,
        prestop_token_file,
        daemons,
        kubernetes,
        lease,
        lease_duration,
        scaler,
        scale_min,
        scale_max,
        scale_spare,
        scale_step,
        scale_stabilisation,
        scale_startup,
        slots,
        session_grace,
        slot_linger,
        container_lease,
        image_hold,
        warm_wait,
        overdue_containers,
        queue_limit,
        queue_wait,
        tenant_waiting,
        tenant_slots,
        max_connections,
        max_connections_per_source,
        head_deadline,
        session_env,
        probe_interval,
        probe_deadline,
        deep_probe_interval,
        connect_deadline,
        shutdown_delay,
        shutdown_grace,
        log_format,
        log_level,
    } = raw;
    put("listen", listen.as_ref().map(|all| Value::Array(all.iter().map(listener).collect())));
    for (name, path) in [("admin_token_file", admin_token_file), ("prestop_token_file", prestop_token_file)] {
        put(name, path.as_ref().map(|path| Value::String(path.display().to_string())));
    }
    put("daemon_tls", daemon_tls.as_ref().map(DaemonTls::to_toml));
    put("tls", tls.as_ref().map(RawTls::to_toml));
    put("identify", identify.as_ref().map(|rules| Value::Array(rules.iter().map(Rule::to_toml).collect())));
    for (name, value) in [
        ("proxy_protocol", proxy_protocol),
        ("admin", admin),
        ("daemons", daemons),
        ("session_env", session_env),
    ] {
        put(name, texts(value));
    }
    for (name, value) in [
        ("slots", slots),
        ("scale_min", scale_min),
        ("scale_max", scale_max),
        ("scale_step", scale_step),
        ("queue_limit", queue_limit),
        ("tenant_waiting", tenant_waiting),
        ("tenant_slots", tenant_slots),
        ("max_connections", max_connections),
        ("max_connections_per_source", max_connections_per_source),
    ] {
        put(name, number(*value));
    }
    for (name, value) in [
        ("session_grace", session_grace),
        ("slot_linger", slot_linger),
        ("container_lease", container_lease),
        ("prestop", prestop),
        ("kubernetes", kubernetes),
        ("lease", lease),
        ("lease_duration", lease_duration),
        ("scaler", scaler),
        ("scale_spare", scale_spare),
        ("scale_stabilisation", scale_stabilisation),
        ("scale_startup", scale_startup),
        ("image_hold", image_hold),
        ("warm_wait", warm_wait),
        ("overdue_containers", overdue_containers),
        ("queue_wait", queue_wait),
        ("head_deadline", head_deadline),
        ("probe_interval", probe_interval),
        ("probe_deadline", probe_deadline),
        ("deep_probe_interval", deep_probe_interval),
        ("connect_deadline", connect_deadline),
        ("shutdown_delay", shutdown_delay),
        ("shutdown_grace", shutdown_grace),
        ("log_format", log_format),
        ("log_level", log_level),
    ] {
        put(name, text(value));
    }
    table.to_string()
}
