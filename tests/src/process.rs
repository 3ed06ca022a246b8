//! The real binary and others as child processes that go with the test.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

use proto::v1;
use proto::v1::inference_client::InferenceClient;
use tonic::transport::Channel;

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

/// A client of the router there, once it answers.
pub async fn client(address: &str) -> InferenceClient<Channel> {
    for _ in 0..500 {
        let endpoint = Channel::from_shared(format!("http://{address}")).unwrap();
        if let Ok(channel) = endpoint.connect().await {
            return InferenceClient::new(channel);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("no router at {address}");
}

/// Waits until exactly these workers are ready; in the order of their names.
pub async fn wait_for(client: &mut InferenceClient<Channel>, names: &[&str]) {
    let mut known = Vec::new();
    for _ in 0..1500 {
        let reply = client.list_workers(v1::ListWorkersRequest {}).await.unwrap().into_inner();
        known = reply.workers.iter().filter(|w| w.state == "ready").map(|w| w.worker.clone()).collect();
        if known == names {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("wanted {names:?}, the fleet is {known:?}");
}
