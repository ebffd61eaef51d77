//! Which addresses the daemons' cables get: networks of four, chosen so that they touch nothing. Pure.

use std::fmt;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// An IPv4 network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Subnet {
    /// Its first address.
    pub base: Ipv4Addr,
    /// The length of its prefix.
    pub prefix: u8,
}

impl Subnet {
    /// The network of `prefix` bits that `address` is in.
    pub fn around(address: Ipv4Addr, prefix: u8) -> Subnet {
        let prefix = prefix.min(32);
        Subnet { base: Ipv4Addr::from_bits(address.to_bits() & mask(prefix)), prefix }
    }

    /// Understands `10.0.0.0/8` and a bare address.
    pub fn parse(text: &str) -> Option<Subnet> {
        let (address, prefix) = text.split_once('/').unwrap_or((text, "32"));
        let prefix = prefix.parse().ok().filter(|bits| *bits <= 32)?;
        Some(Subnet::around(address.parse().ok()?, prefix))
    }

    fn overlaps(self, other: Subnet) -> bool {
        let common = mask(self.prefix.min(other.prefix));
        self.base.to_bits() & common == other.base.to_bits() & common
    }

    /// The address so many behind the first.
    pub fn address(self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base.to_bits().wrapping_add(offset))
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

/// Where the /30s come from when the user names no network: the first is rarely used by anybody, the others
/// serve where it is (a VPN that routes all of 10.0.0.0/8).
pub(super) const NETWORKS: [Subnet; 4] = [
    Subnet { base: Ipv4Addr::new(10, 231, 0, 0), prefix: 16 },
    Subnet { base: Ipv4Addr::new(192, 168, 231, 0), prefix: 24 },
    Subnet { base: Ipv4Addr::new(172, 29, 231, 0), prefix: 24 },
    Subnet { base: Ipv4Addr::new(198, 18, 231, 0), prefix: 24 },
];

/// `count` networks of four addresses inside one of `networks`, none of which touches anything `taken`. The
/// search begins at a place that depends on `seed`, so that two pools that start at once rarely want the same.
pub(super) fn choose(networks: &[Subnet], taken: &[Subnet], seed: u32, count: usize) -> Option<Vec<Subnet>> {
    networks.iter().find_map(|network| {
        let places = 1u32 << 30u8.checked_sub(network.prefix)?.min(16);
        let free = (0..places)
            .map(|step| network.address(4 * (seed.wrapping_add(step) % places)))
            .map(|base| Subnet { base, prefix: 30 })
            .filter(|candidate| !taken.iter().any(|used| used.overlaps(*candidate)));
        let chosen: Vec<Subnet> = free.take(count).collect();
        (chosen.len() == count).then_some(chosen)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> Subnet {
        Subnet::parse(text).unwrap()
    }

    #[test]
    fn subnets_are_understood() {
        assert_eq!(net("10.1.2.3/8"), Subnet { base: Ipv4Addr::new(10, 0, 0, 0), prefix: 8 });
        assert_eq!(net("10.1.2.3").to_string(), "10.1.2.3/32");
        assert_eq!(net("1.2.3.4/0").to_string(), "0.0.0.0/0");
        assert!(Subnet::parse("default").is_none() && Subnet::parse("10.0.0.0/33").is_none());
        assert!(net("10.0.0.0/8").overlaps(net("10.231.0.4/30")));
        assert!(net("10.231.0.4/30").overlaps(net("10.0.0.0/8")));
        assert!(!net("10.231.0.4/30").overlaps(net("10.231.0.8/30")));
    }

    #[test]
    fn a_vpn_that_routes_the_whole_network_moves_the_pool_to_the_next() {
        let chosen = choose(&NETWORKS, &[net("10.0.0.0/8")], 0, 2).unwrap();
        assert_eq!(chosen, [net("192.168.231.0/30"), net("192.168.231.4/30")]);
    }

    #[test]
    fn a_full_network_gives_nothing() {
        let small = [net("10.9.0.0/29")];
        assert_eq!(choose(&small, &[], 7, 2).unwrap().len(), 2);
        assert_eq!(choose(&small, &[], 7, 3), None);
        assert_eq!(choose(&small, &[net("10.9.0.5")], 0, 2), None);
        assert_eq!(choose(&[net("10.9.0.0/31")], &[], 0, 1), None, "too small for one");
    }

    proptest! {
        #[test]
        fn chosen_networks_touch_nothing_and_not_each_other(
            seed: u32, count in 1usize..40,
            used in proptest::collection::vec((0u32..1 << 16, 16u8..=32), 0..40),
        ) {
            let base = NETWORKS[0].base.to_bits();
            let taken: Vec<Subnet> =
                used.iter().map(|(host, bits)| Subnet::around((base | host).into(), (*bits).max(20))).collect();
            let Some(chosen) = choose(&NETWORKS, &taken, seed, count) else { return Ok(()) };
            prop_assert_eq!(chosen.len(), count);
            for (index, one) in chosen.iter().enumerate() {
                prop_assert_eq!(one.prefix, 30);
                prop_assert!(!taken.iter().any(|used| used.overlaps(*one)));
                prop_assert!(!chosen[..index].iter().any(|other| other.overlaps(*one)));
            }
        }
    }
}
