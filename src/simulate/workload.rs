//! The builds that arrive: a day of a CI system in numbers, from a seed.

/// A small deterministic generator (SplitMix64).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Random(seed ^ 0x5DEE_CE66_D1CE_4E5B)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A number in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.unit() * n as f64) as usize
    }

    /// Exponentially distributed, of this mean.
    pub fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }
}

/// Stafford's mix 13, the finaliser of SplitMix64.
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The pool and its users. The defaults are a pool of 64 slots that many projects share.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// Daemons.
    pub daemons: usize,
    /// Slots of each.
    pub slots: usize,
    /// Projects.
    pub projects: usize,
    /// How unequally often they build: the k-th in proportion to k to the power of minus this.
    pub zipf: f64,
    /// How many projects a daemon's cache holds, the least recently built is dropped.
    pub cache: usize,
    /// How much longer a build without its cache takes.
    pub cold: f64,
    /// Builds in one run.
    pub builds: usize,
}

impl Default for Workload {
    fn default() -> Self {
        Workload { daemons: 16, slots: 4, projects: 200, zipf: 0.9, cache: 40, cold: 4.0, builds: 25_000 }
    }
}

/// One build.
#[derive(Debug, Clone, Copy)]
pub struct Build {
    /// When it arrives, in mean warm builds.
    pub at: f64,
    /// Whose it is.
    pub project: usize,
    /// How long it takes with a warm cache: 0.5 to 1.5.
    pub size: f64,
}

impl Workload {
    /// Builds that arrive one by one, at `load` of the capacity that the pool has when every cache is warm; all at
    /// once without one.
    pub fn builds(&self, load: Option<f64>, seed: u64) -> Vec<Build> {
        let mut random = Random::new(seed);
        let mut sum = 0.0;
        let shares: Vec<f64> = (1..=self.projects)
            .map(|k| {
                sum += (k as f64).powf(-self.zipf);
                sum
            })
            .collect();
        let mut at = 0.0;
        (0..self.builds)
            .map(|_| {
                if let Some(load) = load {
                    at += random.exponential(1.0 / (load * (self.daemons * self.slots) as f64));
                }
                let share = random.unit() * sum;
                let project = shares.partition_point(|s| *s <= share).min(self.projects - 1);
                Build { at, project, size: 0.5 + random.unit() }
            })
            .collect()
    }
}
