//! What must hold for any bytes: one function for each fuzz target, which panics where it does not.
//!
//! `fuzz/fuzz_targets/NAME.rs` calls `NAME` here with whatever a fuzzer makes up; the tests below call it with every
//! file of `fuzz/corpus/NAME`, so that what was once reached is reached again on each `cargo test`. Compiled for
//! these two only: the product carries nothing of it.
//!
//! The bytes are those of the wire, or of the file, without a format of the fuzzer's own. Where something must not
//! depend on how a stream is cut, the places to cut it at are drawn from the bytes themselves (`cut`).

mod classify;
mod config;
mod engine;
mod head;
mod identify;
mod stream;
mod tunnel;

pub use classify::classify;
pub use config::config;
pub use engine::engine;
pub use head::head;
pub use identify::identify;
pub use stream::stream;
pub use tunnel::tunnel;

/// Numbers that depend on the bytes alone (FNV-1a, then xorshift).
struct Dice(u64);

impl Dice {
    fn of(bytes: &[u8]) -> Self {
        let hash = bytes
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01B3));
        Dice(hash | 1)
    }

    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % n
    }
}

/// The bytes in pieces: single ones, or of any length.
fn cut(bytes: &[u8]) -> Vec<&[u8]> {
    let mut dice = Dice::of(bytes);
    let most = [1, 3, 16, 200][dice.below(4)];
    let (mut rest, mut pieces) = (bytes, Vec::new());
    while !rest.is_empty() {
        let (piece, tail) = rest.split_at((1 + dice.below(most)).min(rest.len()));
        pieces.push(piece);
        rest = tail;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use std::panic::{catch_unwind, resume_unwind};
    use std::path::Path;

    /// Runs a target over its corpus.
    fn replay(name: &str, target: fn(&[u8])) {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let entries =
            std::fs::read_dir(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty(), "{} is empty", directory.display());
        for file in &files {
            let bytes = std::fs::read(file).unwrap();
            if let Err(panic) = catch_unwind(|| target(&bytes)) {
                eprintln!("{} fails", file.display());
                resume_unwind(panic);
            }
        }
        println!("{name}: {} files", files.len());
    }

    #[test]
    fn corpus_of_head() {
        replay("head", super::head);
    }

    #[test]
    fn corpus_of_classify() {
        replay("classify", super::classify);
    }

    #[test]
    fn corpus_of_identify() {
        replay("identify", super::identify);
    }

    #[test]
    fn corpus_of_tunnel() {
        replay("tunnel", super::tunnel);
    }

    #[test]
    fn corpus_of_config() {
        replay("config", super::config);
    }

    #[test]
    fn corpus_of_stream() {
        replay("stream", super::stream);
    }

    #[test]
    fn corpus_of_engine() {
        replay("engine", super::engine);
    }
}
