//! The real binary: goldens through the command line, deployments on etcd, killed processes, bad start-ups.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tandem_tests::cluster::{collect, greedy, request};
use tandem_tests::etcd::Etcd;
use tandem_tests::model;
use tandem_tests::oracle::Oracle;
use tandem_tests::process::{Process, client, free_port, real_model, wait_for};

fn tandem() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tandem"))
}

fn run(command: &mut Command) -> (Option<i32>, String, String) {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn tiny() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 1);
    dir
}

/// The reference is Hugging Face transformers in float32. After a near tie another token is no error.
const CLEAR_MARGIN: f64 = 0.1;

#[test]
fn real_model_equals_the_reference() {
    let Some(dir) = real_model() else { return };
    let golden: Value = serde_json::from_str(include_str!("../../tests/golden/smollm2-public.json")).unwrap();
    let rows = golden["rows"].as_array().unwrap();
    let prompts: Vec<Value> = rows
        .iter()
        .map(|row| match row["messages"].is_null() {
            true => serde_json::json!({"id": row["id"], "text": row["prompt"]}),
            false => serde_json::json!({"id": row["id"], "messages": row["messages"]}),
        })
        .collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), Value::from(prompts).to_string()).unwrap();
    let longest = rows.iter().map(|r| r["output_ids"].as_array().unwrap().len()).max().unwrap();
    let (code, out, err) = run(tandem()
        .args(["generate", "--json", "--strategy", "disaggregated", "--concurrency", "4", "--kv-mib", "256"])
        .args(["--max-tokens", &longest.to_string(), "--prompts"])
        .arg(file.path())
        .arg("--model")
        .arg(dir));
    assert_eq!(code, Some(0), "{err}");
    let outputs: Vec<Value> = out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(outputs.len(), rows.len());
    for (row, output) in rows.iter().zip(&outputs) {
        let id = &row["id"];
        assert_eq!(output["id"], *id);
        assert_eq!(output["prompt_token_count"], row["prompt_ids"].as_array().unwrap().len(), "{id}");
        let ids = |v: &Value| v.as_array().unwrap().iter().map(|i| i.as_u64().unwrap()).collect::<Vec<_>>();
        let (expected, got) = (ids(&row["output_ids"]), ids(&output["output_token_ids"]));
        let margins: Vec<f64> =
            row["margins"].as_array().unwrap().iter().map(|m| m.as_f64().unwrap()).collect();
        let differs = expected.iter().zip(&got).position(|(e, g)| e != g);
        match differs {
            Some(at) => assert!(margins[at] < CLEAR_MARGIN, "{id} differs at {at}, margin {}", margins[at]),
            None => assert!(got.len() >= expected.len(), "{id} ended early"),
        }
        assert_eq!(output["kv"]["transport"], "shm", "{output}");
    }
    assert_eq!(outputs[0]["text"], "The capital of France is Paris.");
    assert_eq!(outputs[0]["finish_reason"], "stop");
}

#[test]
fn a_temporary_cluster_answers_from_standard_input_and_ends() {
    let dir = tiny();
    let (code, out, err) = run(Command::new("sh").arg("-c").arg(format!(
        "printf hello | '{}' generate --json --max-tokens 3 --prefill 2 --decode 2 --kv-mib 8 --model {}",
        tandem().get_program().to_string_lossy(),
        dir.path().display()
    )));
    assert_eq!(code, Some(0), "{err}");
    let object: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(object["usage"]["output_tokens"], 3);
    for key in ["ttft_ms", "queue_ms", "prefill_ms", "exposed_transfer_ms", "decode_ms", "itl_mean_ms"] {
        assert!(object["timeline"][key].is_number(), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn up_serves_until_it_is_told_to_stop() {
    let dir = tiny();
    let address = format!("127.0.0.1:{}", free_port());
    let mut up = tandem();
    up.args(["up", "--listen", &address, "--kv-mib", "8", "--decode", "2", "--model"]).arg(dir.path());
    let mut up = Process(up.stdout(Stdio::null()).spawn().unwrap());
    let mut client = client(&address).await;
    wait_for(&mut client, &["decode-0", "decode-1", "prefill-0"]).await;
    let generate =
        || run(tandem().args(["generate", "hi", "--addr", &address, "--max-tokens", "5", "--json"]));
    let (code, out, err) = generate();
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["finish_reason"], "length");

    // Another cluster on the same port is refused and does not disturb this one.
    let second = run(tandem().args(["up", "--listen", &address, "--model"]).arg(dir.path()));
    assert_eq!(second.0, Some(1), "{}", second.2);
    assert_eq!(generate().0, Some(0));

    let told = Command::new("kill").args(["-TERM", &up.0.id().to_string()]).status().unwrap();
    assert!(told.success() && up.0.wait().unwrap().success());
    assert_eq!(generate().0, Some(3));
}

/// Reads what a process says on standard error up to `words`; the rest is read and dropped.
fn until_it_says(process: &mut Process, words: &str) {
    let mut said = BufReader::new(process.0.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains(words) {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "ended before it said: {words}");
    }
    std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_may_start_before_their_router() {
    let dir = tiny();
    let address = format!("127.0.0.1:{}", free_port());
    let worker = |role: &str| {
        let mut command = tandem();
        command.args([role, "--listen", "127.0.0.1:0", "--registry", &address, "--name", role]);
        command.args(["--kv-mib", "8", "--threads", "1", "--model"]).arg(dir.path());
        Process(command.stderr(Stdio::piped()).spawn().unwrap())
    };
    let mut workers = ["decode", "prefill"].map(worker);
    workers.iter_mut().for_each(|worker| until_it_says(worker, "waiting for the registry"));
    let mut router = tandem();
    router.args(["router", "--listen", &address, "--model"]).arg(dir.path());
    let _router = Process(router.spawn().unwrap());
    wait_for(&mut client(&address).await, &["decode", "prefill"]).await;
    let (code, _, err) = run(tandem().args(["generate", "hi", "--addr", &address, "--max-tokens", "2"]));
    assert_eq!(code, Some(0), "{err}");
}

#[test]
fn bad_requests_and_start_ups_say_what_is_wrong() {
    let dir = tiny();
    let at = |d: &Path| d.display().to_string();
    let generate = |args: &[&str]| {
        run(tandem().args(["generate", "hi", "--kv-mib", "8", "--model", &at(dir.path())]).args(args))
    };
    let check = |got: (Option<i32>, String, String), code: i32, words: &str| {
        assert!(got.2.contains(words), "{words}: {}", got.2);
        assert_eq!(got.0, Some(code), "{}", got.2);
        assert!(!got.2.contains("panicked"), "{}", got.2);
    };
    check(generate(&["--temperature", "-1"]), 4, "temperature");
    check(generate(&["--max-tokens", "100000"]), 4, "max_tokens");
    check(generate(&["--addr", "127.0.0.1:1"]), 3, "no router answers");
    check(run(tandem().args(["generate", "--model", "/nowhere", "x"])), 1, "no model /nowhere");

    let bad_utf8 = run(Command::new("sh").arg("-c").arg(format!(
        "printf '\\377\\376' | '{}' generate --kv-mib 8 --model {}",
        tandem().get_program().to_string_lossy(),
        at(dir.path())
    )));
    check(bad_utf8, 1, "not UTF-8");

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    check(run(tandem().args(["up", "--listen", &address, "--model", &at(dir.path())])), 1, &address);

    let broken = tiny();
    let weights = broken.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    check(run(tandem().args(["generate", "x", "--model", &at(broken.path())])), 1, "model.safetensors");

    let mismatched = tiny();
    let config = mismatched.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap().replace("264", "200").replace("256", "100");
    std::fs::write(&config, text).unwrap();
    check(
        run(tandem().args(["generate", "x", "--model", &at(mismatched.path())])),
        1,
        "tokenizer.json does not match",
    );

    std::fs::write(&config, "{").unwrap();
    check(run(tandem().args(["generate", "x", "--model", &at(mismatched.path())])), 1, "config.json");
}

#[test]
fn a_settings_file_is_checked_without_starting_anything() {
    let dir = tiny();
    let file = tempfile::NamedTempFile::new().unwrap();
    let checked = |text: &str, command: &[&str]| {
        std::fs::write(file.path(), text).unwrap();
        let mut tandem = tandem();
        tandem.args(command).args(["--check-config", "--model", &at(dir.path())]);
        run(tandem.env("TANDEM_CONFIG", file.path()))
    };
    let good = "etcd = ['http://127.0.0.1:1']\n[decode]\nkv-mib = 9\nthreads = 1\n";
    let (code, out, err) = checked(good, &["decode", "--threads", "2"]);
    assert_eq!(code, Some(0), "{out}{err}");
    let line = |key: &str| out.lines().find(|l| l.starts_with(key)).unwrap_or_default().to_owned();
    assert!(line("kv-mib").ends_with(&format!("9  ({})", at(file.path()))), "{out}");
    assert!(line("threads").ends_with("2  (flag)") && out.ends_with("ok: can be started\n"), "{out}");
    refused(checked("[decode]\nkv-mb = 9\n", &["decode"]), 2, "no setting \"kv-mb\" for decode");
    refused(
        checked("[decode]\nlisten = 'nowhere'\n", &["decode", "--registry", "a:1"]),
        2,
        "says --listen=nowhere",
    );
    refused(checked("etcd = ['https://127.0.0.1:1']\n", &["router"]), 1, "--etcd-ca");
    refused(
        checked("kv-blocks = 1\n", &["worker", "--role", "auto", "--registry", "a:1"]),
        1,
        "raise --kv-mib",
    );
    refused(checked(good, &["generate", "x"]), 1, "--check-config: is for");
    let (code, script, _) = run(tandem().args(["completions", "bash"]));
    assert!(code == Some(0) && script.contains("--kv-mib"));
    let pages = tempfile::tempdir().unwrap();
    assert_eq!(run(tandem().arg("man").arg(pages.path())).0, Some(0));
    assert!(std::fs::read_to_string(pages.path().join("tandem-decode.1")).unwrap().contains("kv"));
}

fn at(path: &Path) -> String {
    path.display().to_string()
}

/// Ended with that code and these words on standard error.
fn refused(ended: (Option<i32>, String, String), code: i32, words: &str) {
    let (ended, _, said) = ended;
    assert!(ended == Some(code) && said.contains(words), "{ended:?}: {said}");
}

/// One process of a deployment on etcd.
fn start(role: &str, name: &str, dir: &Path, etcd: &Etcd, listen: &str) -> Process {
    start_with(role, name, dir, etcd, listen, &[])
}

fn start_with(role: &str, name: &str, dir: &Path, etcd: &Etcd, listen: &str, more: &[&str]) -> Process {
    let mut command = tandem();
    command
        .args([role, "--listen", listen, "--etcd", &etcd.url, "--cluster", "test", "--model"])
        .arg(dir)
        .args(["--model-name", "tiny"]);
    if role != "router" {
        command.args(["--name", name, "--kv-mib", "32", "--threads", "1", "--lease-seconds", "2"]);
    }
    if role == "router" {
        command.args(["--strategy", "disaggregated"]);
    }
    command.args(more);
    Process(command.stdin(Stdio::null()).spawn().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_on_etcd_join_leave_and_die() {
    let dir = tiny();
    let etcd = Etcd::start().await;
    let address = format!("127.0.0.1:{}", free_port());
    let any = "127.0.0.1:0";
    let _router = start("router", "", dir.path(), &etcd, &address);
    let mut client = client(&address).await;
    let _p0 = start("prefill", "p0", dir.path(), &etcd, any);
    let mut p1 = start("prefill", "p1", dir.path(), &etcd, any);
    let _d0 = start("decode", "d0", dir.path(), &etcd, any);
    let mut d1 = start("decode", "d1", dir.path(), &etcd, any);
    wait_for(&mut client, &["d0", "d1", "p0", "p1"]).await;
    let keys = etcd.keys("/tandem/").unwrap();
    for name in ["d0", "d1", "p0", "p1"] {
        assert!(keys.contains(&format!("/tandem/v1/test/members/{name}\n{{\"worker\":\"{name}\"")), "{keys}");
        assert!(keys.contains(&format!("/tandem/v1/test/load/{name}\n{{\"queued_tokens\":")), "{keys}");
    }

    // Killed in the middle of sixteen answers: every one goes on elsewhere, token for token.
    let mut oracle = Oracle::new(dir.path(), 700);
    let prompts: Vec<Vec<u32>> =
        (0..16u32).map(|i| (0..30 + i * 20).map(|t| (t * 31 + i) % 256).collect()).collect();
    let running: Vec<_> =
        prompts.iter().map(|p| tokio::spawn(collect(client.clone(), request(p, greedy(300))))).collect();
    tokio::time::sleep(Duration::from_millis(60)).await;
    p1.0.kill().unwrap();
    d1.0.kill().unwrap();
    for (prompt, output) in prompts.iter().zip(running) {
        let expected = oracle.generate(prompt, &engine::SamplingParams::default(), 0, 300, &[]);
        assert_eq!(output.await.unwrap().unwrap().tokens[0], expected);
    }
    wait_for(&mut client, &["d0", "p0"]).await;
    // Their keys go when their lease of two seconds has run out.
    let gone = |keys: &str| !keys.contains("p1") && !keys.contains("d1");
    for _ in 0..500 {
        if gone(&etcd.keys("/tandem/").unwrap()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(gone(&etcd.keys("/tandem/").unwrap()));

    // The same name joins again, as a later incarnation.
    let mut d1 = start("decode", "d1", dir.path(), &etcd, any);
    wait_for(&mut client, &["d0", "d1", "p0"]).await;
    // SIGTERM drains and leaves at once.
    let terminated = Command::new("kill").args(["-TERM", &d1.0.id().to_string()]).status().unwrap();
    assert!(terminated.success() && d1.0.wait().unwrap().success());
    wait_for(&mut client, &["d0", "p0"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_on_an_etcd_with_tls_and_a_user() {
    let dir = tiny();
    let etcd = Etcd::start_with(true, &[]).await;
    for command in [
        &["user", "add", "root:secret"][..],
        &["user", "add", "tandem:pass"],
        &["role", "add", "tandem"],
        &["role", "grant-permission", "tandem", "readwrite", "/tandem/v1/test/", "--prefix"],
        &["user", "grant-role", "root", "root"],
        &["user", "grant-role", "tandem", "tandem"],
        &["auth", "enable"],
    ] {
        assert!(etcd.ctl(command).is_some(), "{command:?}");
    }
    let password = etcd.dir().join("password");
    std::fs::write(&password, "pass\n").unwrap();
    let secured = etcd.secured.as_ref().unwrap();
    let ca = ["--etcd-ca", &at(&secured.ca.cert)].map(str::to_owned);
    let own =
        ["--etcd-cert", &at(&secured.client.cert), "--etcd-key", &at(&secured.client.key)].map(str::to_owned);
    let user = ["--etcd-user", "tandem", "--etcd-password-file", &at(&password)].map(str::to_owned);
    let flags: Vec<&str> = ca.iter().chain(&own).chain(&user).map(String::as_str).collect();

    let address = format!("127.0.0.1:{}", free_port());
    let _router = start_with("router", "", dir.path(), &etcd, &address, &flags);
    let mut client = client(&address).await;
    let _p0 = start_with("prefill", "p0", dir.path(), &etcd, "127.0.0.1:0", &flags);
    let _d0 = start_with("decode", "d0", dir.path(), &etcd, "127.0.0.1:0", &flags);
    wait_for(&mut client, &["d0", "p0"]).await;
    let answer = collect(client.clone(), request(&[1, 2, 3], greedy(5))).await.unwrap();
    assert_eq!(answer.tokens[0].len(), 5);

    // What could never work is said at once, by each role.
    let model = at(dir.path());
    for role in ["router", "prefill", "decode"] {
        let base = [role, "--model", &model, "--listen", "127.0.0.1:0", "--etcd", &etcd.url];
        refused(run(tandem().args(base)), 1, "needs --etcd-ca FILE");
        let swapped = ["--etcd-cert", &own[1], "--etcd-key", &own[1]];
        refused(run(tandem().args(base).args(&ca).args(swapped)), 1, "holds no private key");
        refused(run(tandem().args(base).args(&ca).args(&own[..2])), 2, "--etcd-key");
        std::fs::write(&password, "wrong\n").unwrap();
        refused(run(tandem().args(base).args(&flags)), 1, "authentication failed");
    }
}

/// A stopped process loses its lease and its requests; woken up it comes back, the same incarnation.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_worker_is_given_up_and_returns_clean() {
    let dir = tiny();
    let etcd = Etcd::start().await;
    let address = format!("127.0.0.1:{}", free_port());
    let any = "127.0.0.1:0";
    let _router = start("router", "", dir.path(), &etcd, &address);
    let mut client = client(&address).await;
    let _p0 = start("prefill", "p0", dir.path(), &etcd, any);
    let d0 = start("decode", "d0", dir.path(), &etcd, any);
    let _d1 = start("decode", "d1", dir.path(), &etcd, any);
    wait_for(&mut client, &["d0", "d1", "p0"]).await;
    let incarnation = |keys: String| {
        let member = keys.lines().find(|line| line.starts_with("{\"worker\":\"d0\"")).map(str::to_owned);
        serde_json::from_str::<Value>(&member.unwrap()).unwrap()["incarnation"].as_u64().unwrap()
    };
    let before = incarnation(etcd.keys("/tandem/v1/test/members/d0").unwrap());
    let signal = |name: &str| {
        let told = Command::new("kill").args([name, &d0.0.id().to_string()]).status().unwrap();
        assert!(told.success());
    };

    let mut oracle = Oracle::new(dir.path(), 800);
    let prompts: Vec<Vec<u32>> =
        (0..8u32).map(|i| (0..40 + i).map(|t| (t * 7 + i) % 256).collect()).collect();
    let running: Vec<_> =
        prompts.iter().map(|p| tokio::spawn(collect(client.clone(), request(p, greedy(600))))).collect();
    tokio::time::sleep(Duration::from_millis(60)).await;
    signal("-STOP");
    for (prompt, output) in prompts.iter().zip(running) {
        let expected = oracle.generate(prompt, &engine::SamplingParams::default(), 0, 600, &[]);
        assert_eq!(output.await.unwrap().unwrap().tokens[0], expected);
    }
    wait_for(&mut client, &["d1", "p0"]).await;
    signal("-CONT");
    wait_for(&mut client, &["d0", "d1", "p0"]).await;
    assert_eq!(incarnation(etcd.keys("/tandem/v1/test/members/d0").unwrap()), before);
    for prompt in &prompts {
        let expected = oracle.generate(prompt, &engine::SamplingParams::default(), 0, 20, &[]);
        let output = collect(client.clone(), request(prompt, greedy(20))).await.unwrap();
        assert_eq!(output.tokens[0], expected);
    }
}
