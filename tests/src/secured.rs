//! A cluster of real processes, with mutual TLS between all of them or without any, and what each of them has logged.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use proto::v1;
use proto::v1::inference_client::InferenceClient;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::certs::{Ca, Pair};
use crate::cluster::{Output, collect};
use crate::etcd::Etcd;
use crate::model;
use crate::process::{Process, free_port};

/// Its folder, authority, etcd and processes.
pub struct Secured {
    /// Everything that is written.
    pub dir: tempfile::TempDir,
    /// The authority of all certificates.
    pub ca: Ca,
    /// A certificate for clients.
    pub client: Pair,
    /// The router's address.
    pub address: String,
    /// File with the key that [`Secured::call`] shows.
    pub api_key: Option<PathBuf>,
    /// What its processes log (default info).
    pub log_level: &'static str,
    /// Members meet here, when workers do not join the router.
    pub etcd: Option<Etcd>,
    binary: PathBuf,
    tls: bool,
    processes: Vec<(String, Process)>,
}

/// The name that a part's certificate must have.
pub fn uri(name: &str) -> String {
    match name {
        "router" => "tandem://router".to_owned(),
        worker => format!("tandem://worker/{worker}"),
    }
}

impl Secured {
    /// Files, and an etcd if wanted; no process of ours yet.
    pub async fn prepare(binary: &str, tls: bool, with_etcd: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("model")).unwrap();
        model::write(&dir.path().join("model"), 3);
        let ca = Ca::new(dir.path(), "cluster");
        let client = ca.issue(dir.path(), "client", 1);
        for name in ["router", "prefill", "decode"] {
            ca.issue_for(dir.path(), name, 1, &[&uri(name)]);
        }
        let etcd = match with_etcd {
            true => Some(Etcd::start_with(tls, &[]).await),
            false => None,
        };
        let address = format!("127.0.0.1:{}", free_port());
        let binary = PathBuf::from(binary);
        let (api_key, processes, log_level) = (None, Vec::new(), "info");
        Self { dir, ca, client, address, api_key, log_level, etcd, binary, tls, processes }
    }

    /// The same with a router, a prefill and a decode worker that are ready.
    pub async fn start(binary: &str, tls: bool, with_etcd: bool, router: &[&str]) -> Self {
        let mut cluster = Self::prepare(binary, tls, with_etcd).await;
        cluster.up(router).await;
        cluster
    }

    /// Starts a router, with these flags too, a prefill and a decode worker.
    pub async fn up(&mut self, router: &[&str]) {
        self.spawn("router", "router", router);
        self.answers().await;
        self.spawn("prefill", "prefill", &[]);
        self.spawn("decode", "decode", &[]);
        self.wait_for(2).await;
    }

    /// A file in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The command line of a part, with the certificate of that name; listening anywhere, or at the router's address.
    pub fn command(&self, role: &str, name: &str) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(["--log", self.log_level, role, "--model-name", "tiny", "--model"])
            .arg(self.file("model"));
        match role {
            "router" => command.args(["--listen", &self.address]),
            _ => {
                command
                    .args(["--listen", "127.0.0.1:0", "--name", name, "--kv-mib", "32", "--threads", "1"])
                    // What is tested is what goes over a network.
                    .args(["--transport", "tcp"])
            }
        };
        match &self.etcd {
            Some(etcd) => {
                command.args(["--etcd", &etcd.url]);
                if let Some(s) = &etcd.secured {
                    command.arg("--etcd-ca").arg(&s.ca.cert);
                    command.arg("--etcd-cert").arg(&s.client.cert).arg("--etcd-key").arg(&s.client.key);
                }
            }
            None if role != "router" => drop(command.args(["--registry", &self.address])),
            None => {}
        }
        if self.tls {
            let (cert, key) = (self.file(&format!("{name}.pem")), self.file(&format!("{name}.key")));
            command.arg("--cluster-cert").arg(&cert).arg("--cluster-key").arg(&key);
            command.arg("--cluster-ca").arg(&self.ca.cert);
            if role == "router" {
                command.arg("--tls-cert").arg(&cert).arg("--tls-key").arg(&key);
            }
        }
        command
    }

    /// Starts a part; what it says goes to `NAME.log`.
    pub fn spawn(&mut self, role: &str, name: &str, more: &[&str]) {
        let mut command = self.command(role, name);
        command.args(more);
        self.run(name, command);
    }

    /// Starts a command as a part of that name.
    pub fn run(&mut self, name: &str, mut command: Command) {
        let log = File::options().create(true).append(true).open(self.file(&format!("{name}.log"))).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.processes.push((name.to_owned(), Process(command.spawn().unwrap())));
    }

    /// What it has said so far.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.file(&format!("{name}.log"))).unwrap_or_default()
    }

    /// Process ids by name.
    pub fn pids(&self) -> Vec<(String, u32)> {
        self.processes.iter().map(|(name, process)| (name.clone(), process.0.id())).collect()
    }

    /// Asks a part to end (SIGTERM) and waits until it has; true when it ended well.
    pub fn drain(&mut self, name: &str) -> bool {
        let at = self.processes.iter().position(|(n, _)| n == name).unwrap();
        let (_, mut process) = self.processes.remove(at);
        Command::new("kill").arg(process.0.id().to_string()).status().unwrap();
        process.0.wait().unwrap().success()
    }

    /// Ends a part at once.
    pub fn kill(&mut self, name: &str) {
        self.processes.retain(|(n, _)| n != name);
    }

    /// `tandem ARGUMENTS` as a client of the router: exit code, and everything that was printed.
    pub fn call(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let mut command = Command::new(&self.binary);
        command.args(arguments).args(["--addr", &self.address]);
        if self.tls {
            command.arg("--ca").arg(&self.ca.cert);
        }
        if let Some(file) = &self.api_key {
            command.arg("--api-key-file").arg(file);
        }
        run(&mut command)
    }

    /// A client of the router, which the load can take along.
    pub fn client(&self) -> Client {
        Client {
            address: self.address.clone(),
            ca: self.tls.then(|| self.ca.cert.clone()),
            api_key: self.api_key.clone(),
        }
    }

    /// The whole answer to a request, over a connection of its own.
    pub async fn generate(&self, request: v1::GenerateRequest) -> Result<Output, String> {
        self.client().generate(request).await
    }

    /// curl with an API key, which no command line shows: the answer with its head.
    pub fn curl(&self, path: &str, key: &str) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        let mut command = Command::new("curl");
        command.args(["-sS", "-i", "--http1.1", "--max-time", "20", "-H", "@-"]);
        if self.tls {
            command.arg("--cacert").arg(&self.ca.cert);
        }
        command.arg(format!("{scheme}://{}{path}", self.address));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let header = format!("Authorization: Bearer {key}\n");
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), header.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }

    /// Waits until the router answers.
    pub async fn answers(&self) {
        self.until("the router answers", |cluster| cluster.call(&["status", "--json"]).0 == Some(0)).await;
    }

    /// The router's status, without spaces behind colons.
    fn status(&self) -> String {
        self.call(&["status", "--json"]).1.replace(": ", ":")
    }

    /// Whether the router knows a worker of that name.
    pub fn lists(&self, worker: &str) -> bool {
        self.status().contains(&format!("\"worker\":\"{worker}\""))
    }

    /// Waits until so many workers are ready.
    pub async fn wait_for(&self, workers: usize) {
        let ready = |cluster: &Self| cluster.status().matches("\"state\":\"ready\"").count();
        self.until("the workers are ready", |cluster| ready(cluster) == workers).await;
    }

    /// Waits for something; its logs tell when it never comes.
    pub async fn until(&self, what: &str, happened: impl Fn(&Self) -> bool) {
        let since = Instant::now();
        while !happened(self) {
            if since.elapsed() > Duration::from_secs(60) {
                let logs = self.processes.iter().map(|(name, _)| format!("--- {name}\n{}", self.log(name)));
                panic!("never: {what}\n{}", logs.collect::<String>());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A worker's address, from its log.
    pub fn address_of(&self, worker: &str) -> String {
        let log = self.log(worker);
        let at = log.find("address=").unwrap_or_else(|| panic!("{worker}: {log}"));
        let rest = &log[at + "address=".len()..];
        rest.split_whitespace().next().unwrap().to_owned()
    }
}

/// How the router is reached; files are read at every connection.
#[derive(Debug, Clone)]
pub struct Client {
    address: String,
    ca: Option<PathBuf>,
    api_key: Option<PathBuf>,
}

impl Client {
    async fn connect(&self) -> Result<Channel, String> {
        let said = |e: &dyn std::error::Error| format!("{e}: {:?}", e.source());
        let scheme = if self.ca.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{}", self.address)).unwrap();
        if let Some(ca) = &self.ca {
            let ca = Certificate::from_pem(std::fs::read(ca).unwrap());
            endpoint = endpoint.tls_config(ClientTlsConfig::new().ca_certificate(ca)).unwrap();
        }
        endpoint.connect().await.map_err(|e| said(&e))
    }

    /// The whole answer to a request, over a connection of its own.
    pub async fn generate(&self, request: v1::GenerateRequest) -> Result<Output, String> {
        let key = self.api_key.as_ref().map(|file| std::fs::read_to_string(file).unwrap());
        let bearer = key.map(|key| format!("Bearer {}", key.trim()).parse().unwrap());
        let channel = self.connect().await?;
        let client = InferenceClient::new(InterceptedService::new(channel, Bearer(bearer)));
        collect(client, request).await.map_err(|status| format!("{status:?}"))
    }
}

/// Shows an API key.
#[derive(Clone)]
struct Bearer(Option<AsciiMetadataValue>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        if let Some(bearer) = &self.0 {
            request.metadata_mut().insert("authorization", bearer.clone());
        }
        Ok(request)
    }
}

/// Runs a command to its end: exit code, and everything that was printed.
pub fn run(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout) + &text(&output.stderr))
}

/// curl, with an authority and a certificate where given.
pub fn curl(url: &str, ca: Option<&Path>, pair: Option<&Pair>) -> (Option<i32>, String) {
    let mut command = Command::new("curl");
    command.args(["-sS", "-i", "--max-time", "10"]);
    if let Some(ca) = ca {
        command.arg("--cacert").arg(ca);
    }
    if let Some(pair) = pair {
        command.arg("--cert").arg(&pair.cert).arg("--key").arg(&pair.key);
    }
    run(command.arg(url))
}
