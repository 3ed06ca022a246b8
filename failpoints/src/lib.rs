//! Events of a request's life at which a test may hold, slow or kill a process. A release build has none of it.
//!
//! Development builds read `FAILPOINTS` in the way of the crate `fail`: `layer-pushed=sleep(100)`, `committed=3*off->panic`.
//! Its action `return(HOST:PORT)` asks whoever listens there: the event is told in a line, and the process goes on when
//! a line comes back. So one test sees the events of all processes in their order, and decides which of them dies now.

/// The events, in the order in which a request passes them.
pub const EVENTS: [&str; 8] =
    ["received", "admitted", "placed", "reserved", "prefill-started", "layer-pushed", "committed", "token"];

/// Reads `FAILPOINTS`, for the whole life of the process.
pub fn setup() {
    #[cfg(debug_assertions)]
    armed::setup();
}

/// The process is at `event`, for the `index`-th time in this request; `about` says what else a test wants to know.
#[inline(always)]
pub fn at(event: &'static str, index: usize, about: impl FnOnce() -> String) {
    #[cfg(debug_assertions)]
    armed::at(event, index, about);
    #[cfg(not(debug_assertions))]
    let _ = (event, index, about);
}

#[cfg(debug_assertions)]
mod armed {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpStream;
    use std::time::Duration;

    /// Who is asked must decide within this time; the process goes on then.
    const PATIENCE: Duration = Duration::from_secs(60);

    pub(super) fn setup() {
        if std::env::var_os("FAILPOINTS").is_some() {
            std::mem::forget(fail::FailScenario::setup());
        }
    }

    pub(super) fn at(event: &'static str, index: usize, about: impl FnOnce() -> String) {
        debug_assert!(super::EVENTS.contains(&event), "{event} is no event");
        fail::fail_point!(event, |address| {
            let _ = ask(&address.unwrap_or_default(), &format!("{event} {index} {}", about()));
        });
    }

    /// Blocks the thread on purpose: nothing else may happen on it before the answer.
    fn ask(address: &str, what: &str) -> std::io::Result<()> {
        let mut asked = TcpStream::connect(address)?;
        asked.set_read_timeout(Some(PATIENCE))?;
        writeln!(asked, "{} {what}", std::process::id())?;
        BufReader::new(asked).read_line(&mut String::new())?;
        Ok(())
    }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use std::io::{BufRead, BufReader, Write};

    #[test]
    fn an_event_waits_for_the_answer_and_says_what_it_is() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
        let action = format!("return({})", listener.local_addr().expect("bound"));
        fail::cfg("placed", &action).expect("an action");
        let passing = std::thread::spawn(|| super::at("placed", 2, || "prefill-0 decode-1".into()));
        let (mut asked, _) = listener.accept().expect("the event");
        let mut line = String::new();
        BufReader::new(&asked).read_line(&mut line).expect("a line");
        assert_eq!(line, format!("{} placed 2 prefill-0 decode-1\n", std::process::id()));
        assert!(!passing.is_finished());
        writeln!(asked, "go").expect("answered");
        passing.join().expect("it goes on");
        fail::remove("placed");
        super::at("placed", 0, || unreachable!("nobody listens"));
    }
}
