//! The commands' way to a running pool: its admin listener, over TCP or a Unix socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};

use crate::admin::token::Token;
use crate::config::DEFAULT_ADMIN;
use crate::provision::Stream;

/// Where `dindpool up` keeps its data unless it is told otherwise.
pub const DATA: &str = "/var/lib/dindpool";
/// Its token's file there.
pub const TOKEN_FILE: &str = "admin-token";

/// How long the pool may take to begin its answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Which pool.
#[derive(Debug, Args)]
pub struct Where {
    /// The pool's admin listener: host:port or unix:///path
    #[arg(long, env = "DINDPOOL_ADMIN", default_value = DEFAULT_ADMIN, value_name = "ADDR")]
    admin: String,
}

/// Which pool, and the right to change it.
#[derive(Debug, Args)]
pub struct Change {
    #[command(flatten)]
    at: Where,
    /// File of the pool's token; a Unix admin socket needs none [default: that of dindpool up]
    #[arg(long, env = "DINDPOOL_ADMIN_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl Where {
    /// The first address, as a person writes it.
    fn address(&self) -> &str {
        let first = self.admin.split(',').next().unwrap_or_default();
        first.trim_start_matches("http://").trim_end_matches('/')
    }

    /// Whether what is sent there stays on this machine.
    fn is_local(&self) -> bool {
        let address = self.address();
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        address.starts_with("unix://")
            || host == "localhost"
            || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
    }

    async fn connect(&self) -> std::io::Result<Stream> {
        match self.address().strip_prefix("unix://") {
            Some(path) => Ok(Stream::Unix(UnixStream::connect(path).await?)),
            None => Ok(Stream::Tcp(TcpStream::connect(self.address()).await?)),
        }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        token: Option<&Token>,
    ) -> anyhow::Result<Response<Incoming>> {
        let sent = async {
            let stream = self.connect().await?;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            let mut request = Request::builder().method(method).uri(path).header(HOST, "dindpool");
            if let Some(token) = token {
                request = request.header(AUTHORIZATION, token.bearer());
            }
            anyhow::Ok(sender.send_request(request.body(Empty::<Bytes>::new())?).await?)
        };
        tokio::time::timeout(PATIENCE, sent)
            .await
            .context("no answer within 10 s")
            .flatten()
            .with_context(|| format!("no dindpool answers at {} (is it running? see --admin)", self.admin))
    }

    /// The text of a page.
    ///
    /// # Errors
    /// When nothing answers there, or not with that page.
    pub async fn get(&self, path: &str) -> anyhow::Result<String> {
        let response = self.send(Method::GET, path, None).await?;
        anyhow::ensure!(response.status().is_success(), "{} answered {}", self.admin, response.status());
        Ok(String::from_utf8(response.into_body().collect().await?.to_bytes().to_vec())?)
    }
}

impl Where {
    /// A page that goes on: its body is still to be read, line by line.
    ///
    /// # Errors
    /// When nothing answers there, and what the pool says against it.
    pub async fn follow(&self, path: &str) -> anyhow::Result<Lines> {
        let response = self.accepted(Method::GET, path, None).await?;
        Ok(Lines { body: response.into_body(), read: Vec::new() })
    }

    /// The text of a page, or what the pool says instead of it.
    ///
    /// # Errors
    /// When nothing answers there, and what the pool says.
    pub async fn ask(&self, path: &str) -> anyhow::Result<String> {
        let response = self.accepted(Method::GET, path, None).await?;
        Ok(String::from_utf8(response.into_body().collect().await?.to_bytes().to_vec())?)
    }

    async fn accepted(
        &self,
        method: Method,
        path: &str,
        token: Option<&Token>,
    ) -> anyhow::Result<Response<Incoming>> {
        let response = self.send(method, path, token).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.into_body().collect().await?.to_bytes();
        let said: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        match said["message"].as_str() {
            Some(message) => anyhow::bail!("{message}"),
            None => anyhow::bail!("{} answered {status}", self.admin),
        }
    }
}

/// A body of lines.
pub struct Lines {
    body: Incoming,
    read: Vec<u8>,
}

impl Lines {
    /// The next line; `None` at the end.
    ///
    /// # Errors
    /// When the pool has gone.
    pub async fn next(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.read.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return Ok(Some(line[..end].to_vec()));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    let frame = frame.context("the pool has gone")?;
                    self.read.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
                }
            }
        }
    }
}

impl Change {
    /// Asks for a change; the answer's body is still to be read.
    ///
    /// # Errors
    /// When nothing answers there, and what the pool says against it.
    pub async fn post(&self, path: &str) -> anyhow::Result<Response<Incoming>> {
        let token = match &self.token_file {
            Some(path) => Some(Token::read(path).map_err(anyhow::Error::msg)?),
            // Nobody asked for it: a pool that needs none is none the worse. But it is this machine's secret.
            None if self.at.is_local() => Token::read(&Path::new(DATA).join(TOKEN_FILE)).ok(),
            None => None,
        };
        self.at.accepted(Method::POST, path, token.as_ref()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_of_this_machine_is_sent_to_this_machine_only() {
        let local = |admin: &str| Where { admin: admin.to_string() }.is_local();
        for address in ["127.0.0.1:9375", "http://localhost:9375/", "[::1]:9375", "unix:///run/admin.sock"] {
            assert!(local(address), "{address}");
        }
        for address in ["10.0.0.5:9375", "pool.example:9375", "localhost.example:9375", "127.0.0.1.example:1"]
        {
            assert!(!local(address), "{address}");
        }
    }
}
