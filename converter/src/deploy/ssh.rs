//! The user's own ssh: one login for all commands.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;
use vedge_runtime::{Error, Result};

/// A board reached over ssh.
pub struct Ssh {
    program: Vec<String>,
    host: String,
    /// Holds the socket of the connection that all commands share.
    socket: TempDir,
}

/// A word for the board's shell.
pub fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

impl Ssh {
    /// `command` is `ssh` with options of the user's, blanks between them.
    ///
    /// # Errors
    /// [`Error::Usage`] for an empty command or a host that ssh would take for an option.
    pub fn new(command: &str, host: &str) -> Result<Ssh> {
        let program: Vec<String> = command.split_whitespace().map(String::from).collect();
        let usage = |what: String| Err(Error::Usage { what, hint: "as in: pi@raspberrypi.local".into() });
        if program.is_empty() {
            return usage("--ssh is empty".into());
        }
        if host.is_empty() || host.starts_with('-') || host.contains(char::is_whitespace) {
            return usage(format!("`{host}` is not USER@HOST"));
        }
        let socket = tempfile::Builder::new().prefix("vedge-").tempdir();
        let socket = socket.map_err(|source| Error::Write { path: std::env::temp_dir(), source })?;
        Ok(Ssh { program, host: host.into(), socket })
    }

    /// The host, for messages.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// ssh with all options, without the host.
    fn words(&self) -> Vec<String> {
        let path = format!("ControlPath={}/%C", self.socket.path().display());
        let mut words = self.program.clone();
        for option in ["ControlMaster=auto", &path, "ControlPersist=60", "ConnectTimeout=15", "ServerAliveInterval=5"] {
            words.extend(["-o".into(), option.into()]);
        }
        words
    }

    fn command(&self, script: &str) -> Command {
        let words = self.words();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg(&self.host).arg(script);
        command
    }

    /// Runs a command of the board's shell with `input` on its standard input; what it says on standard error is passed
    /// on at once.
    ///
    /// # Errors
    /// [`Error::Source`] when ssh cannot be started or cannot connect; a command that fails is no error here.
    pub fn run(&self, script: &str, input: &[u8]) -> Result<Output> {
        let mut command = self.command(script);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let failed = |e: std::io::Error| Error::Source {
            what: format!("cannot run {}: {e}", self.program[0]),
            hint: "install an ssh client, or name yours: --ssh \"ssh -p 22\"".into(),
        };
        let mut child = command.spawn().map_err(failed)?;
        let mut stdin = child.stdin.take().ok_or_else(|| failed(std::io::Error::other("no standard input")))?;
        // A board that ends early closes the pipe: its exit status says why.
        let _ = stdin.write_all(input);
        drop(stdin);
        let output = child.wait_with_output().map_err(failed)?;
        match output.status.code() {
            Some(255) | None => Err(self.broken()),
            Some(_) => Ok(output),
        }
    }

    /// Output of a command that must succeed.
    ///
    /// # Errors
    /// As [`Ssh::run`], and when it fails.
    pub fn text(&self, script: &str, input: &[u8], doing: &str) -> Result<String> {
        let output = self.run(script, input)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Error::Source {
            what: format!("{}: {doing} failed", self.host),
            hint: "the board's own words are above".into(),
        })
    }

    /// Copies a folder's files with rsync, which goes on where a broken link left off.
    ///
    /// # Errors
    /// [`Error::Source`] when rsync cannot be started or does not finish.
    pub fn rsync(&self, from: &Path, to: &str) -> Result<()> {
        let mut source = OsString::from(from);
        source.push("/");
        let shell: Vec<String> = self.words();
        let status = Command::new("rsync")
            .args(["--recursive", "--perms", "--partial", "--inplace", "--timeout=30", "--rsh"])
            .arg(shell.join(" "))
            .arg(source)
            .arg(format!("{}:{to}/", self.host))
            .stdin(Stdio::null())
            .status();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(_) => Err(self.broken()),
            Err(e) => Err(Error::Source { what: format!("cannot run rsync: {e}"), hint: String::new() }),
        }
    }

    fn broken(&self) -> Error {
        Error::Source {
            what: format!("the connection to {} failed or broke", self.host),
            hint: format!("try: ssh {}; nothing was switched, the same command goes on where it stopped", self.host),
        }
    }
}

impl Drop for Ssh {
    fn drop(&mut self) {
        let words = self.words();
        let mut close = Command::new(&words[0]);
        close.args(&words[1..]).args(["-O", "exit", &self.host]);
        let _ = close.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_the_boards_shell() {
        assert_eq!(quote("/opt/it's here"), r"'/opt/it'\''s here'");
        for bad in ["", "-oProxyCommand=x", "a b"] {
            assert!(Ssh::new("ssh", bad).is_err(), "{bad}");
        }
        assert!(Ssh::new(" ", "pi@board").is_err());
        let ssh = Ssh::new("ssh -p 2222", "pi@board").unwrap();
        assert_eq!(ssh.words()[..3], ["ssh", "-p", "2222"]);
    }
}
