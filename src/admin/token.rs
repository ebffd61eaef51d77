//! Who may change the pool: whoever knows the token, or opens the admin socket, which only its owner can.

use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Shorter ones can be guessed.
const SHORTEST: usize = 16;
/// Bytes of a token that dindpool makes, before they become hexadecimal digits.
const MADE: usize = 32;

/// A secret of which only comparisons come out.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Token {
    /// The first line of a file.
    ///
    /// # Errors
    /// When it cannot be read, or what it holds is too short for a secret.
    pub fn read(path: &Path) -> Result<Token, String> {
        let text = fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        let token = text.lines().next().unwrap_or_default().trim();
        if token.len() < SHORTEST || !token.bytes().all(|b| b.is_ascii_graphic()) {
            let path = path.display();
            return Err(format!("{path} must begin with a line of at least {SHORTEST} visible characters"));
        }
        Ok(Token(token.to_string()))
    }

    /// The token of this file, which is made if it is not there; only its owner can read it then.
    ///
    /// # Errors
    /// What the file system says.
    pub fn read_or_make(path: &Path) -> Result<Token, String> {
        let fault = |e: io::Error| format!("cannot make {}: {e}", path.display());
        match path.try_exists() {
            Ok(true) => {}
            Ok(false) => make(path).map_err(fault)?,
            Err(error) => return Err(fault(error)),
        }
        Token::read(path)
    }

    /// A new one, that is kept nowhere.
    ///
    /// # Errors
    /// What the file system says of `/dev/urandom`.
    pub fn random() -> io::Result<Token> {
        Ok(Token(digits()?))
    }

    /// From what another process says it is; `None` if that could be guessed.
    pub fn of(text: &str) -> Option<Token> {
        (text.len() >= SHORTEST && text.bytes().all(|b| b.is_ascii_graphic())).then(|| Token(text.into()))
    }

    /// Itself, for whoever keeps it. Never for the log.
    pub fn secret(&self) -> &str {
        &self.0
    }

    /// For the header of a request.
    pub fn bearer(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// Whether an Authorization field proves its knowledge. It takes as long for a wrong one as for the right
    /// one of the same length.
    pub fn is_proved_by(&self, authorization: &[u8]) -> bool {
        let expected = self.bearer();
        let differences =
            expected.bytes().zip(authorization).fold(0, |differences, (a, b)| differences | (a ^ b));
        authorization.len() == expected.len() && differences == 0
    }
}

fn digits() -> io::Result<String> {
    let mut bytes = [0; MADE];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// Whoever looks for the file finds it whole or not at all, also when two make it at once.
fn make(path: &Path) -> io::Result<()> {
    let digits = digits()?;
    let own = path.with_extension(format!("{}.{}", std::process::id(), &digits[..8]));
    // The name says nothing that the digits behind it do not keep.
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&own)?;
    let linked = writeln!(file, "{}", &digits[8..]).and_then(|()| fs::hard_link(&own, path));
    fs::remove_file(&own)?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_token_is_made_once_and_its_owner_alone_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin-token");
        let token = Token::read_or_make(&path).unwrap();
        assert_eq!(Token::read_or_make(&path).unwrap(), token);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!format!("{token:?}").contains(&token.0));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn only_the_whole_token_proves_anything() {
        let token = Token("0123456789abcdef".into());
        assert!(token.is_proved_by(b"Bearer 0123456789abcdef"));
        for wrong in
            ["", "Bearer ", "0123456789abcdef", "Bearer 0123456789abcdeX", "Bearer 0123456789abcdef0"]
        {
            assert!(!token.is_proved_by(wrong.as_bytes()), "{wrong}");
        }
    }

    #[test]
    fn a_short_token_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        fs::write(&path, "secret\n").unwrap();
        assert!(Token::read(&path).unwrap_err().contains("at least 16"));
    }
}
