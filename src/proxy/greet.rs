//! What happens between accept and the first request: the header of a load balancer, the TLS handshake, and who the
//! client is by them. A client that may not come in is told why as far as it can be: TLS has few words, so whoever has
//! got through its handshake reads a sentence instead, as an error of its daemon.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use tokio::time::timeout;

use super::identify::{ListenerIdentity, Source};
use super::limits::{self, Pass};
use super::listener::Entry;
use super::local;
use super::relay::Side;
use super::sniff::{self, First};
use super::{Connection, NEWCOMER, Next, Origin, too_slow};
use crate::error::{Error, Kind};
use crate::provision::Stream;
use crate::tls::identity::{Facts, named};
use crate::tls::{Plain, Server, Wire};

impl Connection {
    /// Takes in all that comes before HTTP.
    pub(super) async fn greet(&mut self, entry: &Entry, pass: &mut Pass) -> Next {
        let (mut proxied, mut secured) = (false, false);
        loop {
            match self.first().await {
                None => return Next::Close,
                Some(First::Proxy) if !proxied && !secured => {
                    proxied = true;
                    if self.take_header(entry, pass).await == Next::Close {
                        return Next::Close;
                    }
                }
                Some(First::Tls) if !secured => {
                    secured = true;
                    let Some(server) = &entry.tls else {
                        let message = "this listener has no TLS: use tcp:// without it (unset DOCKER_TLS_VERIFY and \
                                       DOCKER_CERT_PATH, or make a context without ca, cert and key)";
                        return self.refuse(&Error::new(Kind::BadRequest, message), false).await;
                    };
                    if self.handshake(entry, server).await == Next::Close {
                        return Next::Close;
                    }
                }
                Some(first) => {
                    if !secured
                        && entry.tls.as_ref().is_some_and(|tls| tls.settings().plain == Plain::Refused)
                    {
                        self.proxy.metrics.tls_refused.with_label_values(&["plain"]).inc();
                        let message = "this listener takes TLS only: use `docker context create NAME --docker \
                                       \"host=tcp://…,ca=ca.pem,cert=cert.pem,key=key.pem\"`, or \
                                       DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH";
                        return self.turn_away(message.into()).await;
                    }
                    if first == First::Http2 {
                        Box::pin(self.native_h2()).await;
                        return Next::Close;
                    }
                    return Next::Request;
                }
            }
        }
    }

    /// Looks at what the client speaks, without consuming it. None: the connection is to be closed.
    async fn first(&mut self) -> Option<First> {
        let deadline = 2 * self.proxy.head_deadline;
        let first = timeout(deadline, sniff(&mut self.client));
        let first = match self.proxy.drain.unless_stopping(first).await {
            Some(first) => first,
            // It has connected a moment ago, and its request is on its way.
            None => timeout(NEWCOMER, sniff(&mut self.client)).await,
        };
        match first {
            Ok(first) => first.ok(),
            // To one that has asked nothing, nothing is answered: it may be kept in reserve by its client, which
            // would take an answer for that to its next request.
            Err(_) if self.client.buffered().is_empty() => None,
            Err(_) => {
                self.refuse(&too_slow("head", deadline), false).await;
                None
            }
        }
    }

    /// A PROXY header: who the client is behind a load balancer. Anybody can write one, so it counts from the
    /// configured networks only.
    async fn take_header(&mut self, entry: &Entry, pass: &mut Pass) -> Next {
        let Origin::Tcp(peer, _) = self.origin else { return Next::Close };
        let counted = |result| self.proxy.metrics.proxy_headers.with_label_values(&[result]).inc();
        if !entry.trusts(peer.ip()) {
            counted("refused");
            tracing::warn!(
                source = %peer.ip(),
                "a PROXY header from an address that is in none of the networks of proxy_protocol: refused"
            );
            let message = "a PROXY header is not taken from this address: add the load balancer's network to \
                           proxy_protocol";
            return self.refuse(&Error::new(Kind::BadRequest, message), false).await;
        }
        let deadline = self.proxy.head_deadline;
        let header = match timeout(deadline, header(&mut self.client)).await {
            Ok(Ok(header)) => header,
            Ok(Err(fault)) => {
                counted("refused");
                tracing::warn!(source = %peer.ip(), "a PROXY header that cannot be read: {fault}");
                let message = format!("the load balancer's PROXY header cannot be read: {fault}");
                return self.refuse(&Error::new(Kind::BadRequest, message), false).await;
            }
            Err(_) => return self.refuse(&too_slow("PROXY header", deadline), false).await,
        };
        counted("taken");
        let sniff::Header::From(client, server) = header else { return Next::Request };
        self.origin = Origin::Tcp(client, server);
        match pass.claim(client.ip()) {
            Ok(()) => Next::Request,
            Err(why) => {
                self.proxy.gate.refused(why, &self.proxy.metrics);
                let error = self.proxy.gate.error(why);
                self.turn_away_with(error).await
            }
        }
    }

    /// The TLS handshake, and what it makes of the client.
    async fn handshake(&mut self, entry: &Entry, server: &Server) -> Next {
        let (stream, early) = self.client.take_parts();
        let Some(Stream::Tcp(stream)) = stream else { return Next::Close };
        let deadline = self.proxy.head_deadline;
        let mut accept = pin!(timeout(deadline, server.accept(Wire::new(stream, early))));
        let done = match self.proxy.drain.unless_stopping(accept.as_mut()).await {
            Some(done) => Some(done),
            None => timeout(NEWCOMER, accept).await.ok(),
        };
        let visitor = match done {
            Some(Ok(Ok(visitor))) => visitor,
            Some(Ok(Err(why))) => return self.failed(server, &why),
            Some(Err(_)) => {
                return self.failed(server, &format!("no handshake within {} s", deadline.as_secs_f64()));
            }
            None => return Next::Close,
        };
        self.client = Side::new(Stream::Tls(Box::new(visitor.stream)));
        self.client.guard(self.proxy.sweeper.watch(None));
        match visitor.facts {
            Ok(facts) => {
                self.proxy.metrics.tls_handshakes.with_label_values(&["done"]).inc();
                self.known_by(entry, &facts);
                Next::Request
            }
            Err(why) => {
                self.proxy.metrics.tls_refused.with_label_values(&["certificate"]).inc();
                self.log(server, &why);
                self.turn_away(why).await
            }
        }
    }

    fn failed(&self, server: &Server, why: &str) -> Next {
        self.proxy.metrics.tls_handshakes.with_label_values(&["failed"]).inc();
        self.log(server, why);
        Next::Close
    }

    fn log(&self, server: &Server, why: &str) {
        let Some(times) = server.may_log(Instant::now()) else { return };
        let source = match self.origin {
            Origin::Tcp(client, _) => client.ip().to_canonical().to_string(),
            Origin::Unix(..) => "unix".into(),
        };
        let why: String = why.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        tracing::warn!(source, times, "TLS client refused: {why}");
    }

    /// Tenant and session by the rules. A listener of one tenant, or of one session, has decided that already.
    fn known_by(&mut self, entry: &Entry, facts: &Facts) {
        let rules = named(&entry.rules, facts);
        if let Some(tenant) = rules.tenant.filter(|_| self.listener.tenant.as_str() == "default") {
            let session = self.listener.session.clone();
            self.listener = Arc::new(ListenerIdentity { tenant: tenant.as_str().into(), session });
        }
        self.source = rules.session.map(Source::Tls).or(self.source.take());
    }

    /// Answers the client's first request with this sentence, and closes.
    async fn turn_away(&mut self, why: String) -> Next {
        self.turn_away_with(Error::new(Kind::Forbidden, why)).await
    }

    async fn turn_away_with(&mut self, error: Error) -> Next {
        self.proxy.metrics.errors.with_label_values(&[error.fault().as_str()]).inc();
        limits::tell(local::known(&self.proxy.pool), &mut self.client, error).await;
        Next::Close
    }
}

/// What the client speaks, as soon as that is clear.
async fn sniff(client: &mut Side) -> io::Result<First> {
    let mut wanted = 1;
    loop {
        let bytes = client.peek(wanted).await?;
        match sniff::first(bytes) {
            First::More if bytes.len() >= wanted => wanted = bytes.len() + 1,
            // It has ended: whoever reads the head will see that.
            First::More => return Ok(First::Http1),
            first => return Ok(first),
        }
    }
}

/// Takes the PROXY header off what the client has sent.
async fn header(client: &mut Side) -> Result<sniff::Header, String> {
    let mut wanted = 1;
    loop {
        let bytes = client.peek(wanted).await.map_err(|e| e.to_string())?;
        let seen = bytes.len();
        match sniff::header(bytes)? {
            Some((length, header)) => {
                client.consume(length);
                return Ok(header);
            }
            None if seen < wanted => return Err("it ends before its end".into()),
            None => wanted = seen + 1,
        }
    }
}

#[cfg(test)]
mod tests;
