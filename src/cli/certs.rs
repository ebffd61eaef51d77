//! `dindpool certs`: certificates to begin with.

use std::path::PathBuf;

use clap::Args;
use time::OffsetDateTime;

use crate::app::say;
use crate::tls::make::{Order, context_line, example, make, url};

#[derive(Debug, Clone, Args)]
pub struct Certs {
    /// Where they are made: DIR/ca, DIR/server and DIR/client. What is there is renewed by the same CA
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// A name or address under which clients reach the pool; repeats [default: those of the certificate that is there]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    host: Vec<String>,
    /// The client's name, which is its certificate's common name; its files are in DIR/NAME
    #[arg(long, default_value = "client", value_name = "NAME")]
    client: String,
    /// How long the certificates last; the CA lasts ten years
    #[arg(long, default_value_t = 365, value_name = "N")]
    days: u32,
}

impl Certs {
    pub fn run(self) -> anyhow::Result<()> {
        let directory = std::path::absolute(&self.directory)?;
        let order = Order { directory, hosts: self.host, client: self.client, days: self.days };
        let made = make(&order, OffsetDateTime::now_utc()).map_err(anyhow::Error::msg)?;
        let ca = order.directory.join("ca");
        say(&format!(
            "CA        {}{}",
            ca.display(),
            if made.new_ca { ", new: keep its key.pem safe" } else { "" }
        ));
        say(&format!("server    {} for {}", made.server.display(), made.hosts.join(", ")));
        say(&format!("client    {} for {}", made.client.display(), order.client));
        say(&format!("\nServe with\n    dindpool serve --tls-dir {} …", made.server.display()));
        say("and on the clients' machines, with a copy of the client's directory");
        say(&format!("    {}", context_line("dindpool", &url(example(&made.hosts), 2375), &made.client)));
        say("    docker context use dindpool");
        Ok(())
    }
}
