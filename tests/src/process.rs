//! The real binary and others as child processes that go with the test.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Child;

/// A child that is killed when the test ends.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The folder of the real model, when `make test` has set it.
pub fn real_model() -> Option<PathBuf> {
    let dir = std::env::var_os("TANDEM_TEST_MODEL").map(PathBuf::from);
    if dir.is_none() {
        eprintln!("TANDEM_TEST_MODEL is not set: the real model's tests did not run; use `make test`");
    }
    dir
}

/// A port that is free now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
