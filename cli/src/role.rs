//! `tandem worker`, which may change its role while it runs, and `tandem role`, which tells it to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use cluster::Role;
use proto::v1::inference_client::InferenceClient;
use proto::v1::operator_client::OperatorClient;
use proto::v1::{ListWorkersRequest, SetRoleRequest};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::args::{RoleArgs, RoleChoice, RoleWorkerArgs};
use crate::{dial, serve, signal};

const POLL: Duration = Duration::from_millis(100);
/// Until the last role's listener is closed.
const REBIND: Duration = Duration::from_secs(10);

/// Runs a worker until it is told to stop.
pub async fn worker(args: RoleWorkerArgs) -> anyhow::Result<()> {
    match args.role {
        RoleChoice::Prefill => serve::worker(args.worker, Role::Prefill).await,
        RoleChoice::Decode => serve::worker(args.worker, Role::Decode).await,
        RoleChoice::Auto => auto(args).await,
    }
}

/// One role after another, at one address and under one name.
async fn auto(args: RoleWorkerArgs) -> anyhow::Result<()> {
    let stop = signal::stop_token();
    if args.worker.stop_with_parent {
        signal::stop_with_parent(stop.clone());
    }
    let next_role = Arc::new(watch::channel(args.start_as).0);
    let mut listener = serve::bind(args.worker.listen).await?;
    let address = listener.local_addr()?;
    loop {
        let role = *next_role.borrow();
        serve::turn(&args.worker, role, listener, stop.child_token(), Some(Arc::clone(&next_role))).await?;
        if stop.is_cancelled() || *next_role.borrow() == role {
            return Ok(());
        }
        listener = bind_again(address).await?;
    }
}

async fn bind_again(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let since = Instant::now();
    loop {
        match serve::bind(address).await {
            Err(_) if since.elapsed() < REBIND => tokio::time::sleep(POLL).await,
            bound => return bound,
        }
    }
}

/// Tells a worker; with `--wait`, returns once it takes requests in its new role.
pub async fn run(args: RoleArgs) -> anyhow::Result<()> {
    let channel = dial::router(&args.addr, &args.dial).await?;
    let role = args.role.name();
    let request = SetRoleRequest { worker: args.worker.clone(), role: role.into(), force: args.force };
    let reply = OperatorClient::new(channel.clone()).set_role(request).await?.into_inner();
    let ready = match args.wait {
        Some(seconds) => ready_as(channel, &args.worker, role, Duration::from_secs(seconds)).await?,
        None => !reply.switching,
    };
    let left = reply.sequences;
    match args.json {
        true => println!(
            "{}",
            json!({"worker": args.worker, "role": role, "switching": reply.switching, "ready": ready, "sequences": left})
        ),
        false if ready => println!("{} is a {role} worker", args.worker),
        false => println!("{} drains and becomes a {role} worker; sequences on it: {left}", args.worker),
    }
    if args.wait.is_some() && !ready {
        bail!("{} is not ready as a {role} worker after --wait", args.worker);
    }
    Ok(())
}

/// Waits until the worker takes requests in that role, or the patience is over.
async fn ready_as(
    channel: dial::Channel,
    worker: &str,
    role: &str,
    patience: Duration,
) -> anyhow::Result<bool> {
    let mut client = InferenceClient::new(channel);
    let started = Instant::now();
    loop {
        let workers = client.list_workers(ListWorkersRequest {}).await?.into_inner().workers;
        if workers.iter().any(|w| w.worker == worker && w.role == role && w.state == "ready") {
            return Ok(true);
        }
        if started.elapsed() >= patience {
            return Ok(false);
        }
        tokio::time::sleep(POLL).await;
    }
}
