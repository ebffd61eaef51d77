//! `dindpool simulate`: the balancing, or the autoscaler, against other policies, on a simulated day.

use clap::{Args, Subcommand};

use crate::simulate::{self, Plan, Workload, scaling};

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Simulate {
    #[command(subcommand)]
    what: Option<What>,
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

#[derive(Debug, Subcommand)]
enum What {
    /// Compare the autoscaler with HPA, KEDA and fixed pools on a day of a CI system
    Scaling(Scaling),
}

#[derive(Debug, Args)]
struct Scaling {
    /// The greatest number of daemons
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1000))]
    max: u32,
    /// Builds at a time on one daemon
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    slots: u32,
    /// Builds of the day
    #[arg(long, default_value_t = 1500, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=20_000))]
    builds: u32,
    /// How long a build takes in the mean, in seconds
    #[arg(long, default_value_t = 240, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=7200))]
    build: u32,
    /// How long a daemon takes to start, at least, in seconds
    #[arg(long, default_value_t = 15, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(0..=3600))]
    start_min: u32,
    /// How long a daemon takes to start, at most, in seconds
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(0..=3600))]
    start_max: u32,
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

impl Scaling {
    fn run(self) -> anyhow::Result<()> {
        let start = (self.start_min, self.start_max);
        anyhow::ensure!(start.0 <= start.1, "--start-min {}: more than --start-max {}", start.0, start.1);
        let build = f64::from(self.build);
        let day = scaling::Day {
            max: self.max,
            slots: self.slots,
            builds: self.builds,
            build,
            start,
            ..scaling::Day::default()
        };
        // Builds that take longer than a day for all daemons together are never done.
        let work = f64::from(self.builds) * build / f64::from(self.max / 2 * self.slots);
        let half = self.max / 2;
        anyhow::ensure!(
            work < 86_400.0,
            "{} builds are more than {half} daemons can do in a day",
            self.builds
        );
        let lines = scaling::run(&scaling::Plan { day, seed: self.seed, seeds: self.seeds });
        if self.json {
            println!("{}", serde_json::to_string_pretty(&lines)?);
        } else {
            print!("{}", scaling::table(&lines));
        }
        Ok(())
    }
}

impl Simulate {
    pub fn run(self) -> anyhow::Result<()> {
        if let Some(What::Scaling(scaling)) = self.what {
            return scaling.run();
        }
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
