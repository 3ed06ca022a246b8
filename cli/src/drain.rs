//! `tandem drain` and `tandem undrain`: a worker out of placement and back, over the router.

use std::time::{Duration, Instant};

use anyhow::bail;
use proto::v1::inference_client::InferenceClient;
use proto::v1::operator_client::OperatorClient;
use proto::v1::{ListWorkersRequest, SetDrainingRequest};
use serde_json::json;

use crate::args::DrainArgs;
use crate::dial;

const POLL: Duration = Duration::from_millis(100);

/// Tells the worker; with `--wait`, returns once nothing runs on it.
pub async fn run(args: DrainArgs, draining: bool) -> anyhow::Result<()> {
    let channel = dial::router(&args.addr, &args.dial).await?;
    let request = SetDrainingRequest { worker: args.worker.clone(), draining };
    let mut left = OperatorClient::new(channel.clone()).set_draining(request).await?.into_inner().sequences;
    if let Some(seconds) = args.wait.filter(|_| draining) {
        left = empty(channel, &args.worker, Duration::from_secs(seconds)).await?;
    }
    match args.json {
        true => println!("{}", json!({"worker": args.worker, "draining": draining, "sequences": left})),
        false if draining => println!("{} drains; sequences on it: {left}", args.worker),
        false => println!("{} takes requests again", args.worker),
    }
    if args.wait.is_some() && left > 0 {
        bail!("{left} sequences are still on {} after --wait", args.worker);
    }
    Ok(())
}

/// Waits until nothing runs on the worker, or the patience is over; what is left.
async fn empty(channel: dial::Channel, worker: &str, patience: Duration) -> anyhow::Result<u32> {
    let mut client = InferenceClient::new(channel);
    let started = Instant::now();
    loop {
        let workers = client.list_workers(ListWorkersRequest {}).await?.into_inner().workers;
        let left = workers.iter().find(|w| w.worker == worker).map_or(0, |w| w.running + w.waiting);
        if left == 0 || started.elapsed() >= patience {
            return Ok(left);
        }
        tokio::time::sleep(POLL).await;
    }
}
