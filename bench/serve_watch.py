"""What the processes of a cluster did during a load: their counters' rates, their gauges' means, their busiest threads. Linux only."""

import os
import pathlib
import re
import threading
import time
import urllib.request

GAUGES = ("tandem_sequences", "tandem_kv_usage_ratio", "tandem_queued_tokens", "tandem_requests_running", "tandem_requests_queued")
COUNTERS = ("_total", "_sum", "_count")
OK = 'tandem_requests_total{outcome="ok"}'
TICKS = os.sysconf("SC_CLK_TCK")


def page(port):
    """Every sample of a /metrics page, histogram buckets apart."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    samples = (re.match(r"(\S+) (\S+)$", line) for line in lines if not line.startswith("#") and "_bucket" not in line)
    return {found[1]: float(found[2]) for found in samples if found}


def threads(pid):
    """CPU seconds of every thread, by name and id."""
    seen = {}
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        try:
            stat = (task / "stat").read_text()
        except OSError:
            continue
        name, rest = stat[stat.index("(") + 1:stat.rindex(")")], stat[stat.rindex(")") + 2:].split()
        seen[f"{name} {task.name}"] = (int(rest[11]) + int(rest[12])) / TICKS
    return seen


class Watch(threading.Thread):
    """Looks from `after` seconds on until `until`; `processes`: name → (pid, port)."""

    def __init__(self, processes, after, until):
        super().__init__(daemon=True)
        self.processes, self.after, self.until, self.seen = processes, after, until, {}
        self.start()

    def look(self):
        return {name: (page(port), threads(pid)) for name, (pid, port) in self.processes.items()}

    def run(self):
        time.sleep(self.after)
        began, first, gauges = time.monotonic(), self.look(), []
        while (left := began + self.until - self.after - time.monotonic()) > 0:
            time.sleep(min(0.5, left))
            last = self.look()
            gauges.append({name: pages for name, (pages, _) in last.items()})
        seconds = time.monotonic() - began
        for name in self.processes:
            (old, old_cpu), (new, new_cpu) = first[name], last[name]
            rates = {k: (v - old.get(k, 0)) / seconds for k, v in new.items() if k.split("{")[0].endswith(COUNTERS)}
            busy = sorted(((cpu - old_cpu.get(k, 0)) / seconds, k.split()[0]) for k, cpu in new_cpu.items())[::-1]
            wanted = [k for k in new if k.split("{")[0] in GAUGES]
            means = {k: (sum(g[name].get(k, 0) for g in gauges) / len(gauges), max(g[name].get(k, 0) for g in gauges)) for k in wanted}
            self.seen[name] = {
                "per_second": {k: round(v, 6) for k, v in rates.items() if v}, "mean_and_most": means,
                "cpu_cores": sum(share for share, _ in busy), "busiest_threads": [(n, round(share, 2)) for share, n in busy[:6] if share > 0.02]}

    def told(self):
        """What was seen, once the time is over."""
        self.join(timeout=self.until + 30)
        return self.seen


def mean_ms(seen, name):
    """Mean of a histogram of seconds over the time watched, in ms."""
    count = seen["per_second"].get(name + "_count", 0)
    return seen["per_second"].get(name + "_sum", 0) / count * 1e3 if count else None


def words(seen):
    """The short of it, a line for each process."""
    for name, s in seen.items():
        rate, gauge = s["per_second"], s["mean_and_most"]
        parts = [f"{s['cpu_cores']:.1f} cores", " ".join(f"{n} {share:.2f}" for n, share in s["busiest_threads"][:4])]
        if rate.get(OK):
            cached = rate.get("tandem_cached_prompt_tokens_total", 0) / rate["tandem_prompt_tokens_total"]
            parts.append(f"{rate[OK]:.1f} answers/s, {cached:.0%} of their prompts' tokens cached")
        for label, metric in (("sent", "tandem_kv_sent_bytes_total"), ("received", "tandem_kv_received_bytes_total"),
                              ("verified", "tandem_kv_verified_bytes_total")):
            if rate.get(metric):
                parts.append(f"{label} {rate[metric] / 1e9:.2f} GB/s")
        if rate.get("tandem_kv_verify_duration_seconds_sum"):
            parts.append(f"verifying {rate['tandem_kv_verify_duration_seconds_sum']:.2f} of the time")
        if rate.get("tandem_steps_total"):
            parts.append(f"{rate['tandem_steps_total']:.1f} steps/s of {mean_ms(s, 'tandem_step_duration_seconds'):.1f} ms, "
                         f"{rate['tandem_step_tokens_total'] / rate['tandem_steps_total']:.0f} tokens")
        for label, metric in (("queue", "tandem_queue_seconds"), ("prefill", "tandem_prefill_seconds"), ("exposed", "tandem_exposed_transfer_seconds"),
                              ("decode", "tandem_decode_seconds")):
            if (mean := mean_ms(s, metric)) is not None:
                parts.append(f"{label} {mean:.1f} ms")
        parts += [f"{k.removeprefix('tandem_')} {mean:.2f} (most {most:.2f})" for k, (mean, most) in gauge.items() if most]
        parts += [f"{k.removeprefix('tandem_')} {v:.1f}/s" for k, v in rate.items() if "placements" in k or "preempt" in k or "retries" in k or "refused" in k]
        yield f"    {name}: " + "; ".join(parts)
