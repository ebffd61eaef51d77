//! `dindpool simulate`: the balancing against other policies, on a simulated day.

use clap::Args;

use crate::simulate::{self, Plan, Workload};

#[derive(Debug, Args)]
pub struct Simulate {
    /// Daemons of the pool
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    daemons: u16,
    /// Slots of each
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    slots: u16,
    /// Projects that build
    #[arg(long, default_value_t = 200, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    projects: u16,
    /// Projects whose cache a daemon holds
    #[arg(long, default_value_t = 40, value_name = "N")]
    cache: u16,
    /// How much longer a build without its cache takes
    #[arg(long, default_value_t = 4.0, value_name = "FACTOR")]
    cold: f64,
    /// Loads, relative to what the pool can do when every cache is warm; repeats
    #[arg(long, default_values_t = [0.4, 0.6, 0.7], value_name = "LOAD", value_delimiter = ',')]
    load: Vec<f64>,
    /// Builds of a run
    #[arg(long, default_value_t = 25_000, value_name = "N", value_parser = clap::value_parser!(u32).range(10..))]
    builds: u32,
    /// Builds of the batch that arrives at once
    #[arg(long, default_value_t = 3_000, value_name = "N", value_parser = clap::value_parser!(u32).range(10..))]
    batch: u32,
    /// The first seed
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// How many seeds; figures are medians over them
    #[arg(long, default_value_t = 10, value_name = "N")]
    seeds: u64,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

impl Simulate {
    pub fn run(self) -> anyhow::Result<()> {
        if let Some(load) = self.load.iter().find(|load| !(**load > 0.0 && **load <= 2.0)) {
            anyhow::bail!("--load {load}: use a number above 0 and up to 2");
        }
        anyhow::ensure!(self.cold >= 1.0 && self.cold <= 1000.0, "--cold {}: use 1 to 1000", self.cold);
        let workload = Workload {
            daemons: self.daemons.into(),
            slots: self.slots.into(),
            projects: self.projects.into(),
            cache: self.cache.into(),
            cold: self.cold,
            builds: self.builds as usize,
            ..Workload::default()
        };
        let batch = self.batch as usize;
        let plan = Plan { workload, loads: self.load, batch, seed: self.seed, seeds: self.seeds };
        let lines = simulate::run(&plan);
        if self.json {
            println!("{}", serde_json::to_string_pretty(&lines)?);
        } else {
            print!("{}", simulate::table(&lines));
        }
        Ok(())
    }
}
