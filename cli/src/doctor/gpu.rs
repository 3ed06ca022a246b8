//! Whether network cards reach this machine's GPU by themselves (GPUDirect RDMA), by which way, and what is missing.

use std::path::Path;

use engine::cuda::gpudirect::{self, GpuDirect, Writes};
use kv_transport::verbs;

use super::{Finding, Verdict, finding, read};

/// The kernel since which cards take dmabufs.
const KERNEL: (u32, u32) = (5, 12);

/// What was seen.
#[derive(Debug, Clone)]
pub(super) struct GpuFacts {
    /// The GPU, and what its driver says; or why it cannot be asked.
    gpu: Result<(String, GpuDirect), String>,
    /// Whether libibverbs registers dmabufs.
    library: bool,
    kernel: (u32, u32),
    peermem: bool,
}

impl GpuFacts {
    /// Nothing where there is no GPU.
    pub(super) fn here() -> Option<Self> {
        Path::new("/dev/nvidia0").exists().then(|| Self {
            gpu: GpuDirect::ask(0).map_err(|error| error.to_string()),
            library: verbs::takes_dmabufs(),
            kernel: version(&read("/proc/sys/kernel/osrelease")).unwrap_or_default(),
            peermem: gpudirect::has_peermem(),
        })
    }

    pub(super) fn judge(&self) -> Finding {
        let note = |seen: String, fix: &str| {
            let seen = format!("{seen}; KV over RDMA goes through host memory");
            finding("GPUDirect", Verdict::Note, seen, fix)
        };
        let (name, driver) = match &self.gpu {
            Ok(gpu) => gpu,
            Err(why) => return note(format!("the driver cannot be asked: {why}"), "what the text names"),
        };
        if let Some(why) = driver.refusal() {
            return note(
                format!("{name}: {why}"),
                "a GPU and a driver with GPUDirect RDMA: data-centre cards",
            );
        }
        let order = match driver.writes {
            Writes::Ordered => "writes are seen in order",
            _ => "writes are flushed before they are verified",
        };
        let (major, minor) = self.kernel;
        let missing: Vec<(String, &str)> = [
            (!driver.has_dmabuf).then(|| {
                ("the driver makes no dmabufs".to_owned(), "the driver's open kernel modules (nvidia-open)")
            }),
            (!self.library).then(|| ("libibverbs takes none".to_owned(), "rdma-core 34 or later")),
            (self.kernel < KERNEL)
                .then(|| (format!("Linux {major}.{minor} passes none"), "Linux 5.12 or later")),
        ]
        .into_iter()
        .flatten()
        .collect();
        if missing.is_empty() {
            let seen = format!("{name}, by dmabuf if the card's driver takes it; {order}");
            return finding("GPUDirect", Verdict::Good, seen, "");
        }
        if self.peermem {
            let seen = format!("{name}, by nvidia_peermem; {order}");
            return finding("GPUDirect", Verdict::Good, seen, "");
        }
        let (seen, fixes): (Vec<_>, Vec<_>) = missing.into_iter().unzip();
        let seen = format!("{name}: {}, and nvidia_peermem is not loaded", seen.join(", "));
        note(seen, &format!("{}; or `modprobe nvidia_peermem`", fixes.join(" and ")))
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Change = fn(&mut GpuFacts, &mut GpuDirect);

    fn good() -> GpuFacts {
        let driver = GpuDirect { is_capable: true, has_dmabuf: true, writes: Writes::Ordered };
        GpuFacts { gpu: Ok(("H100".into(), driver)), library: true, kernel: (6, 8), peermem: false }
    }

    #[test]
    fn each_thing_that_is_missing_is_named_with_its_fix() {
        let told = |change: Change| {
            let mut facts = good();
            let (name, mut driver) = facts.gpu.clone().unwrap();
            change(&mut facts, &mut driver);
            facts.gpu = facts.gpu.map(|_| (name, driver));
            let Finding { verdict, seen, fix, .. } = facts.judge();
            assert_eq!(verdict == Verdict::Note, !fix.is_empty());
            (verdict, format!("{seen} | {fix}"))
        };
        assert_eq!(told(|_, _| ()).0, Verdict::Good);
        let changes: [(Change, &str); 6] = [
            (|_, driver| driver.has_dmabuf = false, "nvidia-open"),
            (|facts, _| facts.library = false, "rdma-core 34"),
            (|facts, _| facts.kernel = (5, 4), "Linux 5.4"),
            (|_, driver| driver.is_capable = false, "data-centre"),
            (|_, driver| driver.writes = Writes::Unordered, "in order"),
            (|facts, _| facts.gpu = Err("libcuda.so.1 is not here".into()), "libcuda"),
        ];
        for (change, word) in changes {
            let (verdict, text) = told(change);
            assert!(verdict == Verdict::Note && text.contains(word), "{text}");
        }
        let (verdict, text) = told(|facts, driver| (facts.peermem, driver.has_dmabuf) = (true, false));
        assert!(verdict == Verdict::Good && text.contains("nvidia_peermem"), "{text}");
        assert_eq!(version("6.1.0-31-amd64"), Some((6, 1)));
        assert_eq!(version("5.10-rc1"), Some((5, 10)));
    }
}
