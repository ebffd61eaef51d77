//! What a client speaks, from its first bytes (pure): TLS, HTTP/2, HTTP/1, or the header of a load balancer in front
//! (PROXY protocol 1 and 2, <https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// How a PROXY header of version 2 begins.
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// The longest header of version 1 (2.1 there).
const MAX_V1: usize = 107;
/// The longest of version 2 that is taken: addresses, and what load balancers add to them.
const MAX_V2: usize = 4096;

/// What the first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    /// Nothing yet.
    More,
    /// A TLS handshake.
    Tls,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// A PROXY header, and behind it any of the others.
    Proxy,
    /// Anything else: it is read as HTTP/1.
    Http1,
}

/// Looks at the first bytes.
pub fn first(bytes: &[u8]) -> First {
    let marks: [(&[u8], First); 4] = [
        (&[0x16], First::Tls),
        (b"PRI ", First::Http2),
        (b"PROXY ", First::Proxy),
        (SIGNATURE, First::Proxy),
    ];
    for (mark, first) in marks {
        if bytes.starts_with(mark) {
            return first;
        }
    }
    if marks.iter().any(|(mark, _)| mark.starts_with(bytes)) { First::More } else { First::Http1 }
}

/// What a PROXY header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// The client's address, and the one that it connected to.
    From(SocketAddr, SocketAddr),
    /// The load balancer speaks for itself.
    Own,
}

/// Reads the PROXY header at the beginning of `bytes`, and says how long it is; None: more is needed.
///
/// # Errors
/// What is wrong with it.
pub fn header(bytes: &[u8]) -> Result<Option<(usize, Header)>, &'static str> {
    if bytes.starts_with(SIGNATURE) { version_2(bytes) } else { version_1(bytes) }
}

fn version_1(bytes: &[u8]) -> Result<Option<(usize, Header)>, &'static str> {
    let line = &bytes[..bytes.len().min(MAX_V1)];
    let Some(end) = line.windows(2).position(|w| w == b"\r\n") else {
        return if line.len() < MAX_V1 { Ok(None) } else { Err("its line does not end") };
    };
    let text = std::str::from_utf8(&line[..end]).map_err(|_| "it is no text")?;
    let words: Vec<&str> = text.split(' ').collect();
    let header = match words[..] {
        ["PROXY", "UNKNOWN", ..] => Header::Own,
        ["PROXY", family @ ("TCP4" | "TCP6"), from, to, from_port, to_port] => {
            let address = |ip: &str, port: &str| -> Option<SocketAddr> {
                let ip: IpAddr = ip.parse().ok()?;
                Some(SocketAddr::new(ip, port.parse().ok()?)).filter(|a| a.is_ipv4() == (family == "TCP4"))
            };
            let (from, to) = (address(from, from_port), address(to, to_port));
            Header::From(from.ok_or("its addresses are none")?, to.ok_or("its addresses are none")?)
        }
        _ => return Err("its line is not of the protocol"),
    };
    Ok(Some((end + 2, header)))
}

fn version_2(bytes: &[u8]) -> Result<Option<(usize, Header)>, &'static str> {
    let Some(&[command, family, high, low]) = bytes.get(SIGNATURE.len()..SIGNATURE.len() + 4) else {
        return Ok(None);
    };
    let start = SIGNATURE.len() + 4;
    let length = usize::from(u16::from_be_bytes([high, low]));
    if command >> 4 != 2 || command & 0xf > 1 {
        return Err("its version or command is not known");
    }
    if length > MAX_V2 {
        return Err("it is too long");
    }
    let Some(body) = bytes.get(start..start + length) else { return Ok(None) };
    let port = |at: usize| u16::from_be_bytes([body[at], body[at + 1]]);
    let header = match (command & 0xf, family) {
        (0, _) => Header::Own,
        (_, 0x11) if length >= 12 => {
            let ip = |at: usize| Ipv4Addr::new(body[at], body[at + 1], body[at + 2], body[at + 3]);
            Header::From((ip(0), port(8)).into(), (ip(4), port(10)).into())
        }
        (_, 0x21) if length >= 36 => {
            let ip = |at: usize| {
                let mut octets = [0; 16];
                octets.copy_from_slice(&body[at..at + 16]);
                Ipv6Addr::from(octets)
            };
            Header::From((ip(0), port(32)).into(), (ip(16), port(34)).into())
        }
        (_, 0x11 | 0x21) => return Err("it is shorter than its addresses"),
        // Datagrams and Unix sockets say nothing about a TCP client.
        _ => Header::Own,
    };
    Ok(Some((start + length, header)))
}

/// A network, `10.0.0.0/8`; an address alone is one of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: u128,
    prefix: u32,
}

/// IPv4 as IPv6 writes it: one kind of number for both.
fn number(ip: IpAddr) -> u128 {
    u128::from(match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    })
}

impl Network {
    /// Whether an address is in it.
    pub fn contains(self, ip: IpAddr) -> bool {
        let host_bits = 128 - self.prefix;
        (number(ip) ^ self.address).checked_shr(host_bits).unwrap_or(0) == 0
    }
}

impl std::str::FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault = || format!("{text} is no network; use 10.0.0.0/8 or fd00::/8");
        let (ip, prefix) = text.split_once('/').map_or((text, None), |(ip, prefix)| (ip, Some(prefix)));
        let ip: IpAddr = ip.parse().map_err(|_| fault())?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        let prefix: u32 = prefix.map_or(Ok(most), str::parse).map_err(|_| fault())?;
        if prefix > most {
            return Err(fault());
        }
        Ok(Network { address: number(ip), prefix: prefix + 128 - most })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_bytes_decide() {
        for (bytes, expected) in [
            (&b""[..], First::More),
            (b"\x16", First::Tls),
            (b"P", First::More),
            (b"PR", First::More),
            (b"PO", First::Http1),
            (b"PRI * HTTP/2.0", First::Http2),
            (b"PROXY TCP4", First::Proxy),
            (b"PROXYING / HTTP/1.1", First::Http1),
            (b"\r\n\r\n", First::More),
            (b"\r\n\r\nGET", First::Http1),
            (b"\r\nGET", First::Http1),
            (SIGNATURE, First::Proxy),
            (b"GET", First::Http1),
            (b"\x15", First::Http1),
        ] {
            assert_eq!(first(bytes), expected, "{bytes:?}");
        }
    }

    fn from(client: &str, server: &str) -> Header {
        Header::From(client.parse().unwrap(), server.parse().unwrap())
    }

    #[test]
    fn headers_of_version_1() {
        let line = b"PROXY TCP4 10.1.2.3 10.0.0.1 5000 2375\r\nGET";
        assert_eq!(header(line), Ok(Some((line.len() - 3, from("10.1.2.3:5000", "10.0.0.1:2375")))));
        let line = b"PROXY TCP6 fd00::2 fd00::1 5000 2375\r\n";
        assert_eq!(header(line), Ok(Some((line.len(), from("[fd00::2]:5000", "[fd00::1]:2375")))));
        assert_eq!(header(b"PROXY UNKNOWN whatever\r\n"), Ok(Some((24, Header::Own))));
        assert_eq!(header(b"PROXY TCP4 10.1.2.3 10"), Ok(None));
        for bad in [
            &b"PROXY TCP4 10.1.2.3 10.0.0.1 5000\r\n"[..],
            b"PROXY TCP6 10.1.2.3 10.0.0.1 5000 2375\r\n",
            b"PROXY TCP4 10.1.2.3 10.0.0.1 5000 99999\r\n",
            b"PROXY TCP4  10.1.2.3 10.0.0.1 5000 2375\r\n",
            &[b'P'; 107],
        ] {
            assert!(header(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn headers_of_version_2() {
        let v2 = |command: u8, family: u8, body: &[u8]| {
            [SIGNATURE, &[command, family, 0, u8::try_from(body.len()).unwrap()], body].concat()
        };
        let four = [10, 1, 2, 3, 10, 0, 0, 1, 0x13, 0x88, 0x09, 0x47];
        let bytes = v2(0x21, 0x11, &four);
        assert_eq!(header(&bytes), Ok(Some((28, from("10.1.2.3:5000", "10.0.0.1:2375")))));
        for cut in SIGNATURE.len()..bytes.len() {
            assert_eq!(header(&bytes[..cut]), Ok(None));
        }
        let with_more = v2(0x21, 0x11, &[&four[..], &[4, 0, 1, 0]].concat());
        assert_eq!(header(&with_more), Ok(Some((32, from("10.1.2.3:5000", "10.0.0.1:2375")))));
        let mut six = [0; 36];
        (six[15], six[31], six[33], six[35]) = (2, 1, 9, 8);
        assert_eq!(header(&v2(0x21, 0x21, &six)), Ok(Some((52, from("[::2]:9", "[::1]:8")))));
        assert_eq!(header(&v2(0x20, 0, &[])), Ok(Some((16, Header::Own))));
        assert_eq!(header(&v2(0x21, 0x31, &[0; 216])).map(|h| h.map(|h| h.1)), Ok(Some(Header::Own)));
        for bad in [v2(0x31, 0x11, &four), v2(0x22, 0x11, &four), v2(0x21, 0x11, &four[1..])] {
            assert!(header(&bad).is_err());
        }
        assert!(header(&[SIGNATURE, &[0x21, 0x11, 0xff, 0xff]].concat()).is_err(), "too long");
    }

    #[test]
    fn networks_hold_what_they_say() {
        let within =
            |network: &str, ip: &str| network.parse::<Network>().unwrap().contains(ip.parse().unwrap());
        assert!(within("10.0.0.0/8", "10.255.0.1") && within("10.0.0.0/8", "::ffff:10.1.1.1"));
        assert!(!within("10.0.0.0/8", "11.0.0.1") && !within("10.0.0.0/8", "fd00::1"));
        assert!(within("10.0.0.7", "10.0.0.7") && !within("10.0.0.7", "10.0.0.8"));
        assert!(within("fd00::/8", "fd12::1") && !within("fd00::/8", "fe00::1"));
        assert!(
            within("0.0.0.0/0", "9.9.9.9") && !within("0.0.0.0/0", "fe00::1") && within("::/0", "fe00::1")
        );
        for bad in ["10.0.0.0/33", "x", "10.0.0.0/", "fd00::/129", ""] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_is_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = header(&bytes);
            let signed = [SIGNATURE, &bytes].concat();
            if let Ok(Some((length, _))) = header(&signed) {
                prop_assert!(length <= signed.len());
            }
            let line = [b"PROXY ", &bytes[..]].concat();
            if let Ok(Some((length, _))) = header(&line) {
                prop_assert!(length <= MAX_V1);
            }
        }
    }
}
