//! The real binary and real etcd as child processes that go with the test.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
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
    /// Its client address.
    pub url: String,
    peer: String,
    process: Process,
    dir: tempfile::TempDir,
}

impl Etcd {
    /// Starts one and waits until it answers.
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("http://127.0.0.1:{}", free_port());
        let peer = format!("http://127.0.0.1:{}", free_port());
        let process = Self::spawn(dir.path(), &url, &peer);
        let etcd = Self { url, peer, process, dir };
        for _ in 0..300 {
            if etcd.keys("/").is_some() {
                return etcd;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("etcd does not answer at {}", etcd.url);
    }

    fn spawn(dir: &Path, url: &str, peer: &str) -> Process {
        let process = Command::new("etcd")
            .arg("--data-dir")
            .arg(dir)
            .args(["--listen-client-urls", url, "--advertise-client-urls", url])
            .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd must be on the PATH: run `make setup`");
        Process(process)
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.0.kill().unwrap();
        self.process.0.wait().unwrap();
    }

    /// Starts it again after a kill, with its data.
    pub fn restart(&mut self) {
        self.process = Self::spawn(self.dir.path(), &self.url, &self.peer);
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
