//! The proxy's listener, where systemd opened it (socket activation, as sd_listen_fds(3) describes it).
//!
//! systemd keeps the socket while the agent is restarted, so clients that connect meanwhile wait in the kernel's queue
//! instead of being refused; with `HTTPS_PROXY` a refused connection is a failed pull.
//!
//! Not here: opening the socket where none was passed, which the caller does.

use std::io;
use std::net::{SocketAddr, TcpListener};

use listenfd::ListenFd;
use rustix::net::sockopt::socket_acceptconn;

/// Sockets that are counted at the most. One is wanted, so more only have to be told from it.
const SOCKETS_MAX: usize = 64;

/// Why what was passed cannot be used. Nothing was started; the operator must mend the unit or the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// There is one listener to pass.
    #[error("{count} sockets were passed to this process, but only one is wanted, which listens on {listen}")]
    Count {
        /// How many there are.
        count: usize,
        /// `proxy.listen`.
        listen: SocketAddr,
    },
    /// It is no TCP socket, or it cannot be looked at.
    #[error("the socket that was passed to this process cannot be used for {listen}: {source}")]
    Unusable {
        /// `proxy.listen`.
        listen: SocketAddr,
        /// What is wrong with it.
        source: io::Error,
    },
    /// It is a connection, as with `Accept=yes`.
    #[error(
        "the socket that was passed to this process is a connection and no listener for {listen} (Accept=no is needed)"
    )]
    Connected {
        /// `proxy.listen`.
        listen: SocketAddr,
    },
    /// It is on another address.
    #[error(
        "the socket that was passed to this process listens on {passed}, but proxy.listen is {listen}: \
         ListenStream= of the socket unit and proxy.listen must be the same"
    )]
    Elsewhere {
        /// Where it listens.
        passed: SocketAddr,
        /// `proxy.listen`.
        listen: SocketAddr,
    },
}

/// Takes the listener that was passed to this process for `listen`; `None` if none was. To be called once, before there
/// are threads and before any file is opened: the sockets are known by their numbers, and the variables that tell of them
/// are removed.
///
/// # Errors
/// If sockets were passed and they are not exactly one TCP listener on that address.
pub fn take(listen: SocketAddr) -> Result<Option<TcpListener>, ActivationError> {
    let variable = |name| std::env::var(name).ok();
    let passed = count(variable("LISTEN_PID").as_deref(), variable("LISTEN_FDS").as_deref(), std::process::id());
    match passed {
        0 => Ok(None),
        1 => {
            let unusable = |source| ActivationError::Unusable { listen, source };
            let listener = ListenFd::from_env().take_tcp_listener(0).map_err(unusable)?;
            let listener = listener.ok_or_else(|| unusable(io::ErrorKind::NotFound.into()))?;
            judge(listener, listen).map(Some)
        }
        count => Err(ActivationError::Count { count, listen }),
    }
}

/// How many sockets the variables tell of. Those of another process say nothing: they were inherited by accident.
fn count(listen_pid: Option<&str>, listen_fds: Option<&str>, process: u32) -> usize {
    let ours = listen_pid.and_then(|pid| pid.parse().ok()) == Some(process);
    let count = listen_fds.and_then(|count| count.parse().ok()).unwrap_or(0);
    if ours { count.min(SOCKETS_MAX) } else { 0 }
}

/// Passes the listener on, ready for the runtime, if it is one and on this address.
fn judge(listener: TcpListener, listen: SocketAddr) -> Result<TcpListener, ActivationError> {
    let unusable = |source| ActivationError::Unusable { listen, source };
    if !socket_acceptconn(&listener).map_err(|error| unusable(error.into()))? {
        return Err(ActivationError::Connected { listen });
    }
    let passed = listener.local_addr().map_err(unusable)?;
    if (passed.ip(), passed.port()) != (listen.ip(), listen.port()) {
        return Err(ActivationError::Elsewhere { passed, listen });
    }
    listener.set_nonblocking(true).map_err(unusable)?;
    Ok(listener)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    #[test]
    fn sockets_of_other_processes_are_not_ours() {
        for (pid, fds, expected) in [
            (Some("7"), Some("1"), 1),
            (Some("7"), Some("3"), 3),
            (Some("7"), Some("99999999999"), SOCKETS_MAX),
            (Some("7"), Some("0"), 0),
            (Some("7"), Some("one"), 0),
            (Some("7"), None, 0),
            (Some("8"), Some("1"), 0),
            (Some(""), Some("1"), 0),
            (None, Some("1"), 0),
            (None, None, 0),
        ] {
            assert_eq!(count(pid, fds, 7), expected, "LISTEN_PID={pid:?} LISTEN_FDS={fds:?}");
        }
    }

    #[test]
    fn only_a_listener_on_the_configured_address_is_taken() {
        let listener = || TcpListener::bind("127.0.0.1:0").unwrap();
        let passed = listener();
        let listen = passed.local_addr().unwrap();
        assert_eq!(judge(passed, listen).unwrap().local_addr().unwrap(), listen);

        let passed = listener();
        let elsewhere = passed.local_addr().unwrap();
        let told = judge(passed, listen).unwrap_err().to_string();
        assert!(told.contains(&elsewhere.to_string()) && told.contains(&listen.to_string()), "{told}");

        let server = listener();
        let connection = TcpStream::connect(server.local_addr().unwrap()).unwrap();
        let local = connection.local_addr().unwrap();
        let connection = TcpListener::from(std::os::fd::OwnedFd::from(connection));
        assert!(matches!(judge(connection, local), Err(ActivationError::Connected { .. })));
    }
}
