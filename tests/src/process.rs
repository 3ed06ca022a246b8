//! The real binary and real etcd as child processes that go with the test.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

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

/// A single etcd on loopback.
pub struct Etcd {
    /// Its process.
    pub process: Process,
    /// Its client address.
    pub url: String,
    _dir: tempfile::TempDir,
}

impl Etcd {
    /// Starts one and waits until it answers.
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("http://127.0.0.1:{}", free_port());
        let peer = format!("http://127.0.0.1:{}", free_port());
        let process = Command::new("etcd")
            .arg("--data-dir")
            .arg(dir.path())
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd must be on the PATH: run `make setup`");
        let etcd = Self { process: Process(process), url, _dir: dir };
        for _ in 0..300 {
            if etcd.keys("/").is_some() {
                return etcd;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("etcd does not answer at {}", etcd.url);
    }

    /// What `etcdctl get --prefix` prints; None when etcd does not answer.
    pub fn keys(&self, prefix: &str) -> Option<String> {
        let output = Command::new("etcdctl")
            .args(["--endpoints", &self.url, "--dial-timeout=1s", "get", "--prefix", prefix])
            .env("ETCDCTL_API", "3")
            .stderr(Stdio::null())
            .output()
            .expect("etcdctl must be on the PATH: run `make setup`");
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
