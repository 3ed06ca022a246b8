//! A real etcd on loopback: plain, or with TLS that demands client certificates.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::certs::{Ca, Pair};
use crate::process::{Process, free_port};

/// Files and names of an etcd with TLS.
pub struct Secured {
    /// Its authority; clients need certificates of the same one.
    pub ca: Ca,
    /// A certificate for clients.
    pub client: Pair,
    server: Pair,
}

/// A single etcd on loopback.
pub struct Etcd {
    /// Its client address.
    pub url: String,
    /// How to reach it, when it is encrypted.
    pub secured: Option<Secured>,
    peer: String,
    more: Vec<String>,
    process: Process,
    dir: tempfile::TempDir,
}

impl Etcd {
    /// Starts one and waits until it answers.
    pub async fn start() -> Self {
        Self::start_with(false, &[]).await
    }

    /// The same with TLS and client certificates if `secure`, and further flags of etcd.
    pub async fn start_with(secure: bool, more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let scheme = if secure { "https" } else { "http" };
        let url = format!("{scheme}://127.0.0.1:{}", free_port());
        let peer = format!("http://127.0.0.1:{}", free_port());
        let mut more: Vec<String> = more.iter().map(|flag| (*flag).to_owned()).collect();
        let secured = secure.then(|| {
            let ca = Ca::new(dir.path(), "etcd");
            let server = ca.issue(dir.path(), "etcd-server", 1);
            let client = ca.issue(dir.path(), "tandem", 1);
            Secured { ca, client, server }
        });
        if let Some(s) = &secured {
            let file = |flag: &str, path: &Path| format!("--{flag}={}", path.display());
            more.push("--client-cert-auth".to_owned());
            more.push(file("trusted-ca-file", &s.ca.cert));
            more.push(file("cert-file", &s.server.cert));
            more.push(file("key-file", &s.server.key));
        }
        // A subfolder: etcd wants its data's folder for itself.
        let process = Self::spawn(&dir.path().join("data"), &url, &peer, &more);
        let etcd = Self { url, secured, peer, more, process, dir };
        for _ in 0..300 {
            if etcd.keys("/").is_some() {
                return etcd;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("etcd does not answer at {}", etcd.url);
    }

    fn spawn(dir: &Path, url: &str, peer: &str, more: &[String]) -> Process {
        let process = Command::new("etcd")
            .arg("--data-dir")
            .arg(dir)
            .args(["--listen-client-urls", url, "--advertise-client-urls", url])
            .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"])
            .args(more)
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
        self.process = Self::spawn(&self.dir.path().join("data"), &self.url, &self.peer, &self.more);
    }

    /// Its folder, which goes with it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What `etcdctl get --prefix` prints; None when etcd does not answer.
    pub fn keys(&self, prefix: &str) -> Option<String> {
        self.ctl(&["get", "--prefix", prefix])
    }

    /// Runs `etcdctl`; None when it fails.
    pub fn ctl(&self, arguments: &[&str]) -> Option<String> {
        let mut command = Command::new("etcdctl");
        command.args(["--endpoints", &self.url, "--dial-timeout=1s"]);
        if let Some(s) = &self.secured {
            command.arg("--cacert").arg(&s.ca.cert);
            command.arg("--cert").arg(&s.client.cert).arg("--key").arg(&s.client.key);
        }
        let output = command
            .args(arguments)
            .env("ETCDCTL_API", "3")
            .stderr(Stdio::null())
            .output()
            .expect("etcdctl must be on the PATH: run `make setup`");
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
