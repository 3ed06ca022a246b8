//! Which CPUs a process may run on.

use std::str::FromStr;

use anyhow::{Context, bail, ensure};
use rustix::thread::{CpuSet, sched_setaffinity};

/// CPUs by number, as the kernel writes them: `0-3,8`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpus(Vec<usize>);

impl FromStr for Cpus {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let mut all = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number =
                |text: &str| text.trim().parse::<usize>().with_context(|| format!("{part:?}: not CPUs"));
            let (first, last) = (number(first)?, number(last)?);
            ensure!(first <= last, "{part:?} ends before it begins");
            ensure!(last < CpuSet::MAX_CPU, "{last}: the most is {}", CpuSet::MAX_CPU - 1);
            all.extend(first..=last);
        }
        Ok(Self(all))
    }
}

impl Cpus {
    /// Keeps this thread, and all that it starts from now on, to them. So before anything starts threads; compute threads are
    /// then as many as these CPUs, unless told otherwise.
    pub fn keep_to(&self) -> anyhow::Result<()> {
        let mut set = CpuSet::new();
        self.0.iter().for_each(|&cpu| set.set(cpu));
        if let Err(error) = sched_setaffinity(None, &set) {
            bail!("--cpus: this process may not run on any of {:?}: {error}", self.0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_ranges() {
        let cpus = |text: &str| text.parse::<Cpus>().map(|cpus| cpus.0).map_err(|e| format!("{e:#}"));
        assert_eq!(cpus("3"), Ok(vec![3]));
        assert_eq!(cpus("0-2,8, 10-10"), Ok(vec![0, 1, 2, 8, 10]));
        for bad in ["", "a", "3-1", "1-", "-1", "0,,1", "99999"] {
            assert!(cpus(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn threads_inherit_them() {
        // A thread of its own, since affinity outlives the test.
        std::thread::spawn(|| {
            let allowed = rustix::thread::sched_getaffinity(None).unwrap();
            let one = (0..CpuSet::MAX_CPU).find(|&cpu| allowed.is_set(cpu)).unwrap();
            Cpus(vec![one]).keep_to().unwrap();
            let seen = || std::thread::available_parallelism().unwrap().get();
            assert_eq!((seen(), std::thread::spawn(seen).join().unwrap()), (1, 1));
            assert!(Cpus(vec![CpuSet::MAX_CPU - 1]).keep_to().is_err(), "there is no such CPU");
        })
        .join()
        .unwrap();
    }
}
