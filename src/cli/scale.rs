//! How many daemons there are to be, for the commands that can make them.

use clap::Args;

use crate::config::Raw;

/// How many daemons there are to be.
#[derive(Debug, Clone, Args)]
pub struct Scale {
    /// on, or off: somebody else changes the number of daemons (HPA, KEDA), and dindpool only tells it [default: on]
    #[arg(long, env = "DINDPOOL_SCALER", value_name = "WORD")]
    scaler: Option<String>,
    /// The least number of daemons; with 0 an idle pool is empty. For up it is that of --daemons [default: 1]
    #[arg(long, env = "DINDPOOL_SCALE_MIN", value_name = "N")]
    scale_min: Option<u32>,
    /// The greatest number of daemons. For up it is that of --daemons [default: 10]
    #[arg(long, env = "DINDPOOL_SCALE_MAX", value_name = "N")]
    scale_max: Option<u32>,
    /// What is kept free for the next builds: a number of slots, or a share of those in use, 20% [default: 0]
    #[arg(long, env = "DINDPOOL_SCALE_SPARE", value_name = "SPARE")]
    scale_spare: Option<String>,
    /// How many daemons are added at a time [default: 4]
    #[arg(long, env = "DINDPOOL_SCALE_STEP", value_name = "N")]
    scale_step: Option<u32>,
    /// For how long fewer daemons must have been enough before one goes [default: 5m]
    #[arg(long, env = "DINDPOOL_SCALE_STABILISATION", value_name = "TIME")]
    scale_stabilisation: Option<String>,
    /// How long a daemon may take to start before nobody waits for it [default: 2m]
    #[arg(long, env = "DINDPOOL_SCALE_STARTUP", value_name = "TIME")]
    scale_startup: Option<String>,
}

impl Scale {
    /// What was typed.
    pub fn raw(self) -> Raw {
        let Scale {
            scaler,
            scale_min,
            scale_max,
            scale_spare,
            scale_step,
            scale_stabilisation,
            scale_startup,
        } = self;
        Raw {
            scaler,
            scale_min,
            scale_max,
            scale_spare,
            scale_step,
            scale_stabilisation,
            scale_startup,
            ..Raw::default()
        }
    }
}

/// The least and the greatest number of daemons of a local pool: `daemons` says both, and each of the others itself.
pub fn range(daemons: u32, min: Option<u32>, max: Option<u32>) -> (u32, u32) {
    let min = min.unwrap_or_else(|| max.map_or(daemons, |max| daemons.min(max)));
    (min, max.unwrap_or_else(|| daemons.max(min)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_daemons_is_both_ends_until_one_is_named() {
        assert_eq!(range(2, None, None), (2, 2));
        assert_eq!(range(2, Some(0), Some(4)), (0, 4));
        assert_eq!(range(2, Some(0), None), (0, 2));
        assert_eq!(range(2, None, Some(4)), (2, 4));
        assert_eq!((range(2, None, Some(1)), range(2, Some(3), None)), ((1, 1), (3, 3)));
        assert_eq!(range(2, Some(4), Some(3)), (4, 3), "what is typed wrong is told, not mended");
    }
}
