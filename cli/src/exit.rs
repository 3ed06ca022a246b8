//! Exit codes that mean something to scripts.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | failed; the message says why |
//! | 2 | the command line is wrong (from the argument parser) |
//! | 3 | the cluster cannot be reached, or a pool is empty: try later |
//! | 4 | the request is refused as it is: change it |
//! | 5 | the cluster is full: try again after the hint |
//! | 6 | a deadline passed |
//! | 130 | interrupted |

use std::process::ExitCode;

use tonic::{Code, Status};

/// Ctrl-C ended the work.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Prints an error and gives its code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {}", describe(error));
    ExitCode::from(code(error))
}

/// An error in words; a gRPC status by its message, with the hint when to retry.
pub fn describe(error: &anyhow::Error) -> String {
    let Some(status) = error.downcast_ref::<Status>() else { return format!("{error:#}") };
    use tonic_types::StatusExt;
    let retry = status.get_details_retry_info().and_then(|r| r.retry_delay);
    let hint = retry.map(|d| format!(" (try again in {} ms)", d.as_millis())).unwrap_or_default();
    let hint = if died_at_once(status) {
        " (if the router has TLS: --addr https://HOST:PORT --ca FILE)"
    } else {
        &hint
    };
    format!("{}: {}{hint}", status.code().description(), status.message())
}

/// A port with TLS that is spoken to in plain text closes the connection: seen as any of these, whichever comes first.
fn died_at_once(status: &Status) -> bool {
    use std::error::Error;
    let signs = [
        "h2 protocol error",
        "operation was canceled",
        "broken pipe",
        "connection reset",
        "connection closed",
    ];
    let said = status.message().to_lowercase();
    status.source().is_some() && signs.iter().any(|sign| said.contains(sign))
}

fn code(error: &anyhow::Error) -> u8 {
    if error.is::<Interrupted>() {
        return 130;
    }
    if error.is::<tonic::transport::Error>() {
        return 3;
    }
    match error.downcast_ref::<Status>().map(Status::code) {
        Some(Code::Unavailable) => 3,
        Some(Code::InvalidArgument | Code::NotFound | Code::AlreadyExists | Code::FailedPrecondition) => 4,
        Some(Code::ResourceExhausted) => 5,
        Some(Code::DeadlineExceeded) => 6,
        _ => 1,
    }
}
