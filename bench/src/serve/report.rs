//! The report as a table.

use std::fmt;

use super::Report;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} · seed {} · good: TTFT within {} ms and {} ms a token",
            self.target, self.seed, self.slo.ttft_ms, self.slo.tpot_ms
        )?;
        let width = self.loads.iter().map(|l| l.load.chars().count()).max().unwrap_or(4).max(4);
        writeln!(
            f,
            "\n{:width$}  {:>6} {:>6} {:>8} {:>7} {:>9}  {:>25}  {:>23}  {:>17}",
            "load",
            "ok",
            "not ok",
            "req/s",
            "good",
            "tok/s out",
            "TTFT p50/p90/p99 ms",
            "ITL p50/p99/p99.9 ms",
            "E2E p50/p99 ms"
        )?;
        for l in &self.loads {
            writeln!(
                f,
                "{:width$}  {:>6} {:>6} {:>8.2} {:>6.1}% {:>9.0}  {:>25}  {:>23}  {:>17}",
                l.load,
                l.ok,
                l.shed + l.failed,
                l.requests_per_second,
                l.within_slo * 100.0,
                l.output_tokens_per_second,
                format!("{:.1}/{:.1}/{:.1}", l.ttft_ms.p50, l.ttft_ms.p90, l.ttft_ms.p99),
                format!("{:.2}/{:.2}/{:.2}", l.itl_ms.p50, l.itl_ms.p99, l.itl_ms.p999),
                format!("{:.0}/{:.0}", l.e2e_ms.p50, l.e2e_ms.p99),
            )?;
            for (way, seen) in &l.placement {
                writeln!(
                    f,
                    "{:width$}  placement, {way}: {} answers, first token expected after p50 {:.0} ms, came after {:.0}; off by p50 {:.0}, p99 {:.0}",
                    "",
                    seen.answers,
                    seen.expected_ms.p50,
                    seen.measured_ms.p50,
                    seen.error_ms.p50,
                    seen.error_ms.p99
                )?;
            }
            if l.shed > 0 {
                writeln!(f, "{:width$}  {} were shed", "", l.shed)?;
            }
            if let Some(why) = &l.first_failure {
                writeln!(f, "{:width$}  {} failed, the first: {why}", "", l.failed)?;
            }
            if l.behind_ms.p99 > 5.0 {
                writeln!(
                    f,
                    "{:width$}  sent late: p99 {:.0} ms after it was due; it counts",
                    "", l.behind_ms.p99
                )?;
            }
        }
        Ok(())
    }
}
