//! `tandem doctor`: what RDMA and fast KV need of this machine and its cluster, a verdict for each and the fix.
//!
//! Facts are gathered first ([`Facts::here`]), then judged by plain code ([`judge`]), so that every verdict has a test.

mod gpu;
mod pairs;

use std::path::Path;

use kv_transport::verbs::{PortInfo, ports};
use kv_transport::{Fabric, FabricConfig, Region};
use proto::v1::ListWorkersRequest;
use proto::v1::inference_client::InferenceClient;
use proto::v1::operator_client::OperatorClient;
use serde::Serialize;

use self::gpu::GpuFacts;
use crate::args::DoctorArgs;
use crate::dial;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Works; slower or less safe than it could be.
    Note,
    /// RDMA cannot be used because of it.
    Broken,
}

/// One line of the report.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was seen.
    pub seen: String,
    /// What to do; empty when nothing.
    pub fix: String,
}

/// What was seen on this machine.
#[derive(Debug, Default)]
struct Facts {
    /// Ports, or why there are none.
    ports: Option<Result<Vec<PortInfo>, String>>,
    /// Registering a pool of the asked size.
    register: Option<Result<String, String>>,
    memlock_bytes: Option<u64>,
    hugepages: String,
    gpu: Option<GpuFacts>,
    tcp_buffer_bytes: u64,
}

/// Runs the checks and prints them; an error when something is broken.
pub async fn run(args: DoctorArgs) -> anyhow::Result<()> {
    let mut findings = tokio::task::spawn_blocking({
        let (mib, devices) = (args.kv_mib, args.rdma_device.clone());
        move || judge(&Facts::here(mib, &FabricConfig { devices, ..FabricConfig::default() }), mib)
    })
    .await?;
    if let Some(addr) = &args.addr {
        findings.extend(members(addr, &args).await);
    }
    if args.json {
        println!("{}", serde_json::to_string(&findings)?);
    } else {
        for Finding { what, verdict, seen, fix } in &findings {
            println!("{:<7} {what}: {seen}", format!("{verdict:?}").to_lowercase());
            if !fix.is_empty() {
                println!("        fix: {fix}");
            }
        }
    }
    let broken = findings.iter().filter(|f| f.verdict == Verdict::Broken).count();
    anyhow::ensure!(broken == 0, "{broken} problems; KV goes over TCP until they are repaired");
    Ok(())
}

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(path)).unwrap_or_default().trim().to_owned()
}

impl Facts {
    fn here(kv_mib: usize, config: &FabricConfig) -> Self {
        let ports = ports();
        let register = ports.is_ok().then(|| {
            let region = Region::zeroed(kv_mib << 20);
            Fabric::open(config, &region).map(|fabric| fabric.describe()).map_err(|e| e.to_string())
        });
        let limits = read("/proc/self/limits");
        let memlock = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
        Self {
            ports: Some(ports),
            register,
            memlock_bytes: memlock.and_then(|m| m.split_whitespace().next()?.parse().ok()),
            hugepages: read("/sys/kernel/mm/transparent_hugepage/enabled"),
            gpu: GpuFacts::here(),
            tcp_buffer_bytes: read("/proc/sys/net/core/wmem_max").parse().unwrap_or(0),
        }
    }
}

fn finding(what: &str, verdict: Verdict, seen: impl Into<String>, fix: &str) -> Finding {
    Finding { what: what.to_owned(), verdict, seen: seen.into(), fix: fix.to_owned() }
}

/// A verdict on each fact.
fn judge(facts: &Facts, kv_mib: usize) -> Vec<Finding> {
    let mut all = Vec::new();
    match &facts.ports {
        Some(Ok(ports)) => all.extend(ports.iter().map(port)),
        Some(Err(why)) => all.push(finding(
            "RDMA devices",
            Verdict::Broken,
            why,
            "install rdma-core and ibverbs-providers, load the card's driver (mlx5_ib, ...), and let the container see /dev/infiniband",
        )),
        None => {}
    }
    let limit = facts.memlock_bytes.map_or("unlimited".to_owned(), |bytes| format!("{} KiB", bytes >> 10));
    let small = facts.memlock_bytes.is_some_and(|bytes| bytes < (kv_mib as u64) << 20);
    match &facts.register {
        Some(Ok(rails)) => all.push(finding(
            "registering the pool",
            Verdict::Good,
            format!("{kv_mib} MiB on {rails}; memlock limit {limit}"),
            "",
        )),
        Some(Err(why)) if small && why.contains("register") => all.push(finding(
            "memlock limit",
            Verdict::Broken,
            format!("{limit}, the pool has {kv_mib} MiB: {why}"),
            "LimitMEMLOCK=infinity in the unit, `ulimit -l unlimited`, or the capability IPC_LOCK for the container",
        )),
        Some(Err(why)) => all.push(finding(
            "registering the pool",
            Verdict::Broken,
            why,
            "repair the port above, or name a device with --rdma-device",
        )),
        None => {}
    }
    let huge = !facts.hugepages.contains("[never]") && !facts.hugepages.is_empty();
    let fix =
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: fewer page translations on the card";
    let verdict = if huge { Verdict::Good } else { Verdict::Note };
    let seen = if facts.hugepages.is_empty() { "not supported by this kernel" } else { &facts.hugepages };
    all.push(finding("transparent huge pages", verdict, seen, if huge { "" } else { fix }));
    all.extend(facts.gpu.as_ref().map(GpuFacts::judge));
    let large = facts.tcp_buffer_bytes >= 4 << 20;
    let fix =
        "sysctl net.core.wmem_max=4194304 net.core.rmem_max=4194304: a single TCP stream fills a fast link";
    let verdict = if large { Verdict::Good } else { Verdict::Note };
    let seen = format!("at most {} KiB a socket", facts.tcp_buffer_bytes >> 10);
    all.push(finding("TCP buffers", verdict, seen, if large { "" } else { fix }));
    all
}

fn port(port: &PortInfo) -> Finding {
    let what = format!("{} port {}", port.device, port.port);
    if !port.active {
        return finding(
            &what,
            Verdict::Broken,
            "the link is down",
            "check cable and switch port; `ip link set DEV up`",
        );
    }
    let Some(gid) = port.gids.first() else {
        let fix = "give the port's network interface an IP address: its RoCE v2 GID comes from it";
        return finding(&what, Verdict::Broken, "no usable GID", fix);
    };
    let windows = if port.windows { "memory windows" } else { "no memory windows" };
    let seen = format!(
        "{}, GID {} {} ({}), MTU {}, {windows}",
        port.rate, gid.index, gid.address, gid.kind, port.mtu_bytes
    );
    match (gid.is_routable(), port.mtu_bytes) {
        (false, _) => {
            let fix =
                "give the port's network interface a routable IP address, or name the GID with --rdma-device";
            finding(&what, Verdict::Broken, seen, fix)
        }
        (true, ..4096) if port.ethernet => {
            let fix = "an interface MTU of 4200 or more (switches too) gives RDMA packets of 4096 bytes";
            finding(&what, Verdict::Note, seen, fix)
        }
        _ => finding(&what, Verdict::Good, seen, ""),
    }
}

/// How the members of a cluster are reached from here.
async fn members(addr: &str, args: &DoctorArgs) -> Vec<Finding> {
    let workers = async {
        let channel = dial::router(addr, &args.dial).await?;
        let mut client = InferenceClient::new(channel.clone());
        anyhow::Ok((client.list_workers(ListWorkersRequest {}).await?.into_inner().workers, channel))
    };
    let (workers, channel) = match workers.await {
        Ok(found) => found,
        Err(error) => {
            let fix = "--addr is the router's host:port; is it running?";
            return vec![finding("router", Verdict::Broken, format!("{addr}: {error:#}"), fix)];
        }
    };
    let mut all = Vec::new();
    if workers.is_empty() {
        let fix =
            "start workers with its --registry or --etcd and --cluster; they join once their model is loaded";
        all.push(finding("members", Verdict::Note, "the router knows no worker", fix));
    }
    for worker in &workers {
        let mut times = Vec::new();
        for _ in 0..5 {
            let started = std::time::Instant::now();
            let connect = tokio::net::TcpStream::connect(&worker.address);
            if let Ok(Ok(_)) = tokio::time::timeout(std::time::Duration::from_secs(2), connect).await {
                times.push(started.elapsed().as_micros());
            }
        }
        let ways = worker.transports.join(", ");
        let what = format!("member {}", worker.worker);
        all.push(match times.iter().min() {
            Some(best) => {
                finding(&what, Verdict::Good, format!("{}, {best} µs to connect, {ways}", worker.address), "")
            }
            None => {
                let fix = "a firewall between the two, or a wrong --advertise on that worker";
                finding(&what, Verdict::Broken, format!("{} cannot be reached", worker.address), fix)
            }
        });
    }
    let rdma = workers.iter().filter(|w| w.transports.iter().any(|t| t == "rdma")).count();
    if rdma > 0 && rdma < workers.len() {
        let seen = format!("{rdma} of {} members", workers.len());
        all.push(finding(
            "RDMA in the fleet",
            Verdict::Note,
            seen,
            "run doctor on the others: their KV goes over TCP",
        ));
    }
    if args.probe_mib > 0 {
        all.extend(pairs::measure(OperatorClient::new(channel), &workers, args.probe_mib).await);
    }
    all
}

#[cfg(test)]
mod tests {
    use kv_transport::verbs::{Gid, GidKind};

    use super::*;

    fn good() -> Facts {
        let address = "::ffff:10.0.0.1".parse().unwrap();
        let gid = Gid { index: 3, address, kind: GidKind::RoceV2Ipv4, interface: "eth0".into() };
        let port = PortInfo {
            device: "mlx5_0".into(),
            port: 1,
            active: true,
            ethernet: true,
            mtu_bytes: 4096,
            lid: 0,
            gids: vec![gid],
            rate: "100 Gb/sec (4X EDR)".into(),
            windows: true,
        };
        Facts {
            ports: Some(Ok(vec![port])),
            register: Some(Ok("mlx5_0:1".into())),
            hugepages: "always [madvise] never".into(),
            tcp_buffer_bytes: 8 << 20,
            ..Facts::default()
        }
    }

    fn worst(facts: &Facts) -> (Verdict, String) {
        let all = judge(facts, 1024);
        let worst = all.iter().max_by_key(|f| f.verdict).unwrap();
        assert_eq!(worst.verdict > Verdict::Good, !worst.fix.is_empty(), "{worst:?}");
        (worst.verdict, format!("{} {} {}", worst.what, worst.seen, worst.fix))
    }

    #[test]
    fn a_good_set_up_is_told_from_broken_ones() {
        assert_eq!(worst(&good()).0, Verdict::Good);

        let with_port = |change: fn(&mut PortInfo)| {
            let mut facts = good();
            if let Some(Ok(ports)) = &mut facts.ports {
                ports.iter_mut().for_each(change);
            }
            worst(&facts)
        };
        let (verdict, text) = with_port(|port| port.active = false);
        assert!(verdict == Verdict::Broken && text.contains("link is down"), "{text}");
        let (verdict, text) = with_port(|port| port.gids.clear());
        assert!(verdict == Verdict::Broken && text.contains("IP address"), "{text}");
        let (verdict, text) = with_port(|port| port.mtu_bytes = 1024);
        assert!(verdict == Verdict::Note && text.contains("4200"), "{text}");

        let mut facts = good();
        facts.memlock_bytes = Some(64 << 10);
        facts.register = Some(Err("cannot register 1073741824 bytes".into()));
        let (verdict, text) = worst(&facts);
        assert!(verdict == Verdict::Broken && text.contains("LimitMEMLOCK"), "{text}");

        let mut facts = good();
        (facts.ports, facts.register) = (Some(Err("libibverbs.so.1 is not here".into())), None);
        let (verdict, text) = worst(&facts);
        assert!(verdict == Verdict::Broken && text.contains("rdma-core"), "{text}");
    }
}
