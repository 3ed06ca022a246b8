//! Workers that change their pool while answers run, as processes.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use proto::v1;
use proto::v1::inference_client::InferenceClient;
use serde_json::Value;
use tandem_tests::cluster::{collect, greedy, request};
use tandem_tests::model;
use tandem_tests::oracle::Oracle;
use tandem_tests::page::Metrics;
use tandem_tests::process::{Process, client, free_port, wait_for};
use tonic::transport::Channel;

fn start(arguments: &[&str], dir: &Path) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.args(arguments).arg("--model").arg(dir).stdin(Stdio::null());
    Process(command.spawn().unwrap())
}

/// A router that keeps the registry, and these workers: the model's folder, the router's address, the processes.
fn fleet(workers: &[&[&str]]) -> (tempfile::TempDir, String, Vec<Process>) {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 1);
    let router = format!("127.0.0.1:{}", free_port());
    let common = ["--listen", "127.0.0.1:0", "--registry", &router, "--kv-mib", "32", "--threads", "1"];
    let mut processes =
        vec![start(&["router", "--listen", &router, "--strategy", "disaggregated"], dir.path())];
    processes.extend(workers.iter().map(|worker| start(&[worker, &common[..]].concat(), dir.path())));
    (dir, router, processes)
}

/// `tandem role`, or another command of an operator: exit code, standard output, standard error.
fn tell(router: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    let output = command.args(arguments).args(["--addr", router]).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

async fn worker(client: &mut InferenceClient<Channel>, name: &str) -> v1::WorkerStatus {
    let listed = client.list_workers(v1::ListWorkersRequest {}).await.unwrap().into_inner();
    listed.workers.into_iter().find(|w| w.worker == name).unwrap()
}

/// Tokens that a worker has computed since it took its role.
async fn computed(address: &str) -> f64 {
    Metrics::of(address.parse().unwrap()).await.value("tandem_step_tokens_total")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_changes_its_pool_under_load_and_no_token_changes() {
    let (dir, router, _processes) = fleet(&[
        &["prefill", "--name", "p0"],
        &["worker", "--role", "decode", "--name", "d0"],
        &["worker", "--role", "auto", "--start-as", "decode", "--name", "w"],
    ]);
    let mut client = client(&router).await;
    wait_for(&mut client, &["d0", "p0", "w"]).await;
    let first = worker(&mut client, "w").await;
    assert!(first.role == "decode" && first.auto_role);

    let address = first.address.clone();
    // To the other pool in the middle of twelve answers, of which some run on it, and back in the middle of twelve more.
    let mut oracle = Oracle::new(dir.path(), 700);
    for (turn, role) in ["prefill", "decode"].into_iter().enumerate() {
        let prompts: Vec<Vec<u32>> = (0..12u32)
            .map(|i| (0..30 + i * 20).map(|t| (t * 31 + i + turn as u32 * 100) % 256).collect())
            .collect();
        let before = computed(&address).await;
        let running: Vec<_> =
            prompts.iter().map(|p| tokio::spawn(collect(client.clone(), request(p, greedy(300))))).collect();
        while computed(&address).await == before {
            assert!(running.iter().any(|r| !r.is_finished()), "no answer ever ran on it, to {role}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let (code, out, err) = tell(&router, &["role", "w", role, "--wait", "60", "--json"]);
        assert_eq!(code, Some(0), "{err}");
        let told: Value = serde_json::from_str(&out).unwrap();
        assert!(told["switching"] == true && told["ready"] == true && told["role"] == role, "{told}");
        for (prompt, output) in prompts.iter().zip(running) {
            let expected = oracle.generate(prompt, &engine::SamplingParams::default(), 0, 300, &[]);
            assert_eq!(output.await.unwrap().unwrap().tokens[0], expected);
        }
        wait_for(&mut client, &["d0", "p0", "w"]).await;
        let now = worker(&mut client, "w").await;
        assert_eq!((now.role.as_str(), now.address.as_str()), (role, address.as_str()));
        assert!(now.incarnation > first.incarnation);
    }

    // It has that role; others have a fixed one; a pool keeps its last worker.
    let (code, out, _) = tell(&router, &["role", "w", "decode"]);
    assert!(code == Some(0) && out.contains("is a decode worker"), "{out}");
    let refused = |arguments: &[&str], code: i32, words: &str| {
        let (ended, _, said) = tell(&router, arguments);
        assert!(ended == Some(code) && said.contains(words), "{ended:?}: {said}");
    };
    refused(&["role", "d0", "prefill"], 4, "--role auto");
    refused(&["role", "nobody", "prefill"], 4, "known: d0, p0, w");
    refused(&["role", "p0", "decode"], 4, "the last prefill worker");
    refused(&["role", "w", "both"], 2, "prefill or decode");
    let (code, _, err) = tell(&router, &["drain", "d0", "--wait", "30"]);
    assert_eq!(code, Some(0), "{err}");
    refused(&["role", "w", "prefill"], 4, "the last decode worker");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_planner_moves_workers_to_where_they_are_needed() {
    let (dir, router, _processes) = fleet(&[
        &["prefill", "--name", "p0"],
        &["worker", "--role", "auto", "--name", "w0"],
        &["worker", "--role", "auto", "--name", "w1"],
        &["worker", "--role", "auto", "--name", "w2"],
    ]);
    let mut client = client(&router).await;
    wait_for(&mut client, &["p0", "w0", "w1", "w2"]).await;

    // By this profile a prompt takes very long and decoding next to nothing: three prefill workers, one decode worker.
    let profile = dir.path().join("profile.json");
    std::fs::write(&profile, r#"{"prefill_token_seconds": 0.1}"#).unwrap();
    let mut planner = Command::new(env!("CARGO_BIN_EXE_tandem"));
    planner.args([
        "--log",
        "info",
        "planner",
        "--routers",
        &router,
        "--listen",
        "127.0.0.1:0",
        "--switch-roles",
    ]);
    planner.args(["--slo-ttft", "2", "--slo-itl", "0.05", "--look-seconds", "1", "--max-prefill", "3"]);
    planner.args(["--shrink-after-seconds", "2", "--cooldown-seconds", "0", "--profile"]).arg(&profile);
    let _planner = Process(planner.spawn().unwrap());

    let load = async {
        for i in 0u32.. {
            let prompt: Vec<u32> = (0..200).map(|t| (t * 7 + i) % 256).collect();
            collect(client.clone(), request(&prompt, greedy(2))).await.unwrap();
        }
    };
    let moved = async {
        let mut client = client.clone();
        loop {
            let listed = client.list_workers(v1::ListWorkersRequest {}).await.unwrap().into_inner().workers;
            let ready = |role: &str| listed.iter().filter(|w| w.role == role && w.state == "ready").count();
            if (ready("prefill"), ready("decode")) == (3, 1) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let moved = tokio::time::timeout(Duration::from_secs(90), moved);
    tokio::select! {
        () = load => {}
        moved = moved => assert!(moved.is_ok(), "the planner never moved two workers"),
    }
}
