//! API keys: the real binary, curl and gRPC; limits, a file that changes, and no key where it must not be.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use tandem_tests::process::{Process, free_port};
use tandem_tests::secured::{Secured, run};

const TANDEM: &str = env!("CARGO_BIN_EXE_tandem");

/// Makes a key as an operator does: the line for the router, and the file with the key.
fn new_key(cluster: &Secured, name: &str, limits: &str) -> (String, PathBuf) {
    let file = cluster.file(&format!("{name}.api-key"));
    let (code, said) = run(Command::new(TANDEM).args(["key", "new", name, "--out"]).arg(&file));
    assert_eq!(code, Some(0), "{said}");
    let line = said.lines().last().unwrap();
    assert!(line.starts_with(&format!("{name} sha256:")), "{said}");
    (format!("{line} {limits}\n"), file)
}

struct Keyed {
    cluster: Secured,
    lines: String,
    files: Vec<PathBuf>,
}

impl Keyed {
    async fn start() -> Self {
        let mut cluster = Secured::prepare(TANDEM, false, false).await;
        let (mut lines, mut files) = ("# who may call\n".to_owned(), Vec::new());
        for (name, limits) in [
            ("alice", "operator"),
            ("bob", "requests_per_minute=2"),
            ("carol", "concurrent=1"),
            ("dave", "tokens_per_minute=40 weight=2"),
        ] {
            let (line, file) = new_key(&cluster, name, limits);
            lines.push_str(&line);
            files.push(file);
        }
        let path = cluster.file("api-keys");
        std::fs::write(&path, &lines).unwrap();
        cluster.api_key = Some(files[0].clone());
        cluster.up(&["--api-keys", path.to_str().unwrap()]).await;
        Self { cluster, lines, files }
    }

    fn key(&self, at: usize) -> String {
        std::fs::read_to_string(&self.files[at]).unwrap().trim().to_owned()
    }

    /// curl with a key: the answer with its head.
    fn curl(&self, path: &str, key: Option<&str>, body: Option<&str>) -> String {
        let mut command = Command::new("curl");
        command.args(["-sS", "-i", "--max-time", "20", "-K", "-"]).stdin(Stdio::piped());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(body) = body {
            command.args(["-H", "content-type: application/json", "-d", body]);
        }
        let mut child = command.arg(format!("http://{}{path}", self.cluster.address)).spawn().unwrap();
        let header = key.map(|key| format!("header = \"Authorization: Bearer {key}\"\n")).unwrap_or_default();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), header.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }

    fn complete(&self, at: usize, tokens: u32) -> String {
        let body = format!("{{\"prompt\":\"hello\",\"max_tokens\":{tokens},\"ignore_eos\":true}}");
        self.curl("/v1/completions", Some(&self.key(at)), Some(&body))
    }

    /// `tandem generate` with a key.
    fn generate(&self, key: Option<&PathBuf>) -> (Option<i32>, String) {
        let mut command = Command::new(TANDEM);
        command.args(["generate", "hello", "--max-tokens", "2", "-q", "--addr", &self.cluster.address]);
        if let Some(file) = key {
            command.arg("--api-key-file").arg(file);
        }
        run(&mut command)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_shows_no_key_gets_nothing_and_limits_hold() {
    let keyed = Keyed::start().await;
    let (alice, bob, carol, dave) = (0, 1, 2, 3);

    // Without a key, and with one that nobody has.
    for key in [None, Some("tdm-nobody")] {
        let said = keyed.curl("/v1/models", key, None);
        assert!(said.contains(" 401") && said.contains("\"code\":\"invalid_api_key\""), "{said}");
        assert!(said.to_lowercase().contains("www-authenticate: bearer"), "{said}");
    }
    let (code, said) = keyed.generate(None);
    assert!(code == Some(1) && said.contains("wants an API key"), "{code:?} {said}");
    for path in ["/health", "/live", "/metrics"] {
        assert!(keyed.curl(path, None, None).contains(" 200"), "{path} needs no key");
    }
    assert!(keyed.curl("/v1/models", Some(&keyed.key(bob)), None).contains("\"tiny\""));
    let (code, said) = keyed.generate(Some(&keyed.files[alice]));
    assert_eq!(code, Some(0), "{said}");
    let mut by_variable = Command::new(TANDEM);
    by_variable.args(["status", "--addr", &keyed.cluster.address]).env("TANDEM_API_KEY", keyed.key(carol));
    assert_eq!(run(&mut by_variable).0, Some(0));

    let (_, said) = keyed.cluster.call(&["doctor"]);
    assert!(said.contains("decode") && said.contains("to connect"), "{said}");
    assert!(said.contains("GB/s over") || said.contains("operator's API key"), "{said}");
    for arguments in [&["status"][..], &["top", "--json"]] {
        let (code, said) = keyed.cluster.call(arguments);
        assert!(code == Some(0) && said.contains("tiny"), "{arguments:?}: {said}");
    }

    // Requests per minute, over HTTP and gRPC.
    assert!(keyed.complete(bob, 2).contains(" 200"));
    assert!(keyed.complete(bob, 2).contains(" 200"));
    let said = keyed.complete(bob, 2);
    assert!(said.contains(" 429") && said.contains("\"code\":\"rate_limit_exceeded\""), "{said}");
    assert!(said.contains("requests_per_minute"), "{said}");
    let wait =
        said.lines().find_map(|line| line.to_lowercase().strip_prefix("retry-after: ").map(str::to_owned));
    let wait: u64 = wait.unwrap().trim().parse().unwrap();
    assert!((1..=30).contains(&wait), "{wait}");
    let (code, said) = keyed.generate(Some(&keyed.files[bob]));
    assert!(
        code == Some(5) && said.contains("requests_per_minute") && said.contains("try again in"),
        "{said}"
    );

    // Tokens per minute: the answer that overdraws is given, the next one is not.
    assert!(keyed.complete(dave, 100).contains(" 200"));
    let said = keyed.complete(dave, 1);
    assert!(said.contains(" 429") && said.contains("tokens_per_minute"), "{said}");

    // One at a time.
    let key = keyed.key(carol);
    let long = format!(
        "curl -sN --max-time 60 -H @- -H 'content-type: application/json' -d '{}' http://{}/v1/completions",
        "{\"prompt\":\"hello\",\"max_tokens\":6000,\"ignore_eos\":true,\"stream\":true}",
        keyed.cluster.address
    );
    let mut running =
        Command::new("sh").args(["-c", &long]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(
        &mut running.stdin.take().unwrap(),
        format!("Authorization: Bearer {key}\n").as_bytes(),
    )
    .unwrap();
    let mut first = [0; 16];
    std::io::Read::read_exact(running.stdout.as_mut().unwrap(), &mut first).unwrap();
    let said = keyed.complete(carol, 1);
    assert!(said.contains(" 429") && said.contains("concurrent"), "{said}");
    running.kill().unwrap();
    running.wait().unwrap();
    keyed.cluster.until("the place is free again", |_| keyed.complete(carol, 1).contains(" 200")).await;

    // Telling workers what to do is for operators.
    let drain = |file: &PathBuf| {
        let mut command = Command::new(TANDEM);
        command.args(["drain", "nobody", "--addr", &keyed.cluster.address, "--api-key-file"]).arg(file);
        run(&mut command)
    };
    let (code, said) = drain(&keyed.files[bob]);
    assert!(code == Some(1) && said.contains("no operator's"), "{code:?} {said}");
    let (code, said) = drain(&keyed.files[alice]);
    assert!(code == Some(4) && said.contains("is not known"), "{code:?} {said}");

    // Counted by names; no key anywhere.
    let page = keyed.curl("/metrics", None, None);
    for line in [
        "tandem_key_refused_total{reason=\"requests_per_minute\"} 2",
        "tandem_key_refused_total{reason=\"tokens_per_minute\"} 1",
        "tandem_key_refused_total{reason=\"not_operator\"} 1",
        "tandem_key_calls_total{key=\"dave\"} 2",
        "tandem_key_tokens_total{key=\"dave\"} 1",
    ] {
        assert!(page.contains(line), "{line} is not in\n{page}");
    }
    for text in [page, keyed.cluster.log("router"), keyed.curl("/status.json", None, None)] {
        for at in [alice, bob, carol, dave] {
            assert!(!text.contains(&keyed.key(at)), "a key is shown: {text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_counts_at_once_and_a_broken_one_not() {
    let mut keyed = Keyed::start().await;
    let path = keyed.cluster.file("api-keys");
    let (line, erin) = new_key(&keyed.cluster, "erin", "");
    assert!(keyed.generate(Some(&erin)).1.contains("not known"));
    // Rubbish first: everybody who could call still can.
    std::fs::write(&path, "alice hunter2\n").unwrap();
    keyed.cluster.until("it is said", |c| c.log("router").contains("the old ones stay")).await;
    assert!(!keyed.cluster.log("router").contains("hunter2"), "what may be a key is not repeated");
    assert_eq!(keyed.generate(Some(&keyed.files[0])).0, Some(0));
    // Without bob, with erin.
    let lines: String =
        keyed.lines.lines().filter(|l| !l.starts_with("bob")).map(|l| format!("{l}\n")).collect();
    std::fs::write(&path, lines + &line).unwrap();
    keyed.files.push(erin.clone());
    keyed.cluster.until("erin may call", |_| keyed.generate(Some(&erin)).0 == Some(0)).await;
    let (code, said) = keyed.generate(Some(&keyed.files[1]));
    assert!(code == Some(1) && said.contains("not known (any more)"), "{code:?} {said}");

    // The planner shows a key, or sees nothing.
    let planner = |key: Option<&PathBuf>| {
        let listen = format!("127.0.0.1:{}", free_port());
        let mut planner = Command::new(TANDEM);
        planner.args(["planner", "--routers", &keyed.cluster.address, "--listen", &listen]);
        planner.args(["--look-seconds", "1", "--slo-ttft", "2", "--slo-itl", "0.1"]);
        if let Some(file) = key {
            planner.arg("--api-key-file").arg(file);
        }
        (Process(planner.stdin(Stdio::null()).spawn().unwrap()), format!("http://{listen}/health"))
    };
    let ready = |health: &str| run(Command::new("curl").args(["-sf", health])).0 == Some(0);
    let (_with, health) = planner(Some(&erin));
    keyed.cluster.until("the planner sees the cluster", |_| ready(&health)).await;
    let (_without, health) = planner(None);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!ready(&health), "a planner without a key sees the cluster");
}

#[test]
fn files_that_cannot_work_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    let refused = |text: &str, words: &str| {
        std::fs::write(&file, text).unwrap();
        let mut router = Command::new(TANDEM);
        router.args(["router", "--listen", "127.0.0.1:0", "--etcd", "http://127.0.0.1:1", "--api-keys"]);
        let (code, said) = run(router.arg(&file));
        assert!(code == Some(1) && said.contains(words), "{code:?}: {said}");
    };
    refused("", "holds no key");
    refused("alice tdm-secret", "line 1: the second word is not sha256:");
    let (code, said) = run(Command::new(TANDEM).args(["key", "new", "a/b"]));
    assert!(code == Some(1) && said.contains("letters, digits"), "{said}");
    let (code, said) = run(Command::new(TANDEM).args(["key", "new", "a", "--out"]).arg(&file));
    assert!(code == Some(1) && said.contains("--out"), "a file that is there is not overwritten: {said}");
}
