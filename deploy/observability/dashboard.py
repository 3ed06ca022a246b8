"""Writes dashboard.json, the Grafana dashboard: `python3 dashboard.py > dashboard.json`. Panels are rows of a table here.

A test compares the file with this program's output, and every metric in it with docs/METRICS.md.
"""

import json

# Columns of a row of panels: 24 units of Grafana's grid.
WIDTH, HEIGHT = 8, 7
SCOPE = 'namespace=~"$namespace"'


def rate(metric, labels="", by=None):
    by = f" by ({by})" if by else ""
    inner = f'{{{SCOPE}{"," + labels if labels else ""}}}'
    return f"sum{by} (rate({metric}{inner}[$__rate_interval]))"


def gauge(metric, labels="", by=None):
    by = f" by ({by})" if by else ""
    return f'sum{by} ({metric}{{{SCOPE}{"," + labels if labels else ""}}})'


def quantiles(metric, by=None):
    more = f", {by}" if by else ""
    legend = f" {{{{{by}}}}}" if by else ""
    return [(f"histogram_quantile({q}, sum by (le{more}) (rate({metric}_bucket{{{SCOPE}}}[$__rate_interval])))", f"p{round(q * 100)}{legend}")
            for q in (0.5, 0.99)]


# (section, [(title, unit, what it says, [(expression, legend)])])
SECTIONS = [
    ("What clients see", [
        ("Requests by outcome", "reqps", "Generate calls by how they ended.", [(rate("tandem_requests_total", by="outcome"), "{{outcome}}")]),
        ("Time to first token", "s", "Received to first text, queueing included.", quantiles("tandem_time_to_first_token_seconds")),
        ("Gaps between tokens", "s", "Inter-token latency.", quantiles("tandem_inter_token_latency_seconds")),
        ("Request duration", "s", "Received to last message.", quantiles("tandem_request_duration_seconds")),
        ("Tokens", "short", "Prompt and output tokens per second of requests that ended well.",
         [(rate("tandem_prompt_tokens_total"), "prompt"), (rate("tandem_output_tokens_total"), "output")]),
        ("Within the promise", "percentunit", "Share of requests that ended well within the router's limits for TTFT and mean ITL.",
         [(rate("tandem_requests_within_slo_total") + " / " + rate("tandem_requests_total"), "within")]),
        ("Time per output token", "s", "(Duration - TTFT) / (output tokens - 1).", quantiles("tandem_time_per_output_token_seconds")),
        ("Cached prompt tokens", "percentunit", "Share of prompt tokens whose KV the decode worker held already.",
         [(rate("tandem_cached_prompt_tokens_total") + " / " + rate("tandem_prompt_tokens_total"), "cached")]),
        ("Shed", "reqps", "Requests refused because there was no room, and duplicates.",
         [(rate("tandem_shed_total", by="reason"), "{{reason}}"), (rate("tandem_duplicate_requests_total"), "duplicate id")]),
    ]),
    ("Where the time of a request goes", [
        ("Queue", "s", "Waiting in the router and in the prefilling worker.", quantiles("tandem_queue_seconds")),
        ("Prefill", "s", "Computing the prompt, first chunk to last.", quantiles("tandem_prefill_seconds")),
        ("Exposed transfer", "s", "Prefill computed to sequence runnable.", quantiles("tandem_exposed_transfer_seconds")),
        ("Decode", "s", "First token to last.", quantiles("tandem_decode_seconds")),
        ("What runs", "short", "Processes by version and model.", [(gauge("tandem_build_info", by="role, version, model"), "{{role}} {{version}} {{model}}")]),
    ]),
    ("Router", [
        ("Requests in the router", "short", "Running, and waiting for room.",
         [(gauge("tandem_requests_running"), "running"), (gauge("tandem_requests_queued"), "queued")]),
        ("Where prompts are prefilled, and why", "reqps", "remote: on the prefill pool; local: on the decode worker.",
         [(rate("tandem_placements_total", by="reason"), "{{reason}}")]),
        ("Workers by state", "short", "As each router knows them.", [(gauge("tandem_workers", by="state, pod"), "{{state}} ({{pod}})")]),
        ("Attempts that were followed by another", "reqps", "Survived losses: retries by reason, and those that went on from tokens already sent.",
         [(rate("tandem_retries_total", by="reason"), "retry: {{reason}}"), (rate("tandem_resumes_total"), "resume")]),
        ("Moved sequences", "ops", "Running sequences that a draining worker moved, KV and all.",
         [(rate("tandem_migrations_total", by="outcome"), "{{outcome}}")]),
        ("Placement: expected and measured", "s", "Means from choosing workers to the first token, and how far they are apart, by where the prompt was prefilled.",
         [(f"{rate(f'tandem_placement_{what}_seconds_sum', by='way')} / {rate(f'tandem_placement_{what}_seconds_count', by='way')}", f"{what}, {{{{way}}}}")
          for what in ("expected", "measured", "error")]),
        ("Prefix index", "bytes", "Memory of which worker holds which prompt's beginning, and what it may use (--prefix-index-mib).",
         [(gauge("tandem_prefix_index_bytes", by="pod"), "{{pod}}"), (gauge("tandem_prefix_index_max_bytes", by="pod"), "most {{pod}}")]),
        ("Registry", "short", "1 while etcd answers this router.", [(gauge("tandem_registry_connected", by="pod"), "{{pod}}")]),
    ]),
    ("Pools", [
        ("Running sequences per worker", "short", "Of both pools.", [(gauge("tandem_sequences", 'state="running"', by="pod"), "{{pod}}")]),
        ("Waiting sequences per worker", "short", "Accepted and not yet in a step.", [(gauge("tandem_sequences", 'state="waiting"', by="pod"), "{{pod}}")]),
        ("Queued prompt tokens per worker", "short", "What the prefill pool's autoscaler goes by.", [(gauge("tandem_queued_tokens", by="pod"), "{{pod}}")]),
        ("Computed tokens per worker", "short", "Tokens per second in engine steps.", [(rate("tandem_step_tokens_total", by="pod"), "{{pod}}")]),
        ("Duration of an engine step", "s", "Per worker.", quantiles("tandem_step_duration_seconds", by="pod")),
        ("Steps per worker", "ops", "Engine steps per second.", [(rate("tandem_steps_total", by="pod"), "{{pod}}")]),
        ("Error of the learned step time", "s", "Per worker; compare with the duration of a step.", quantiles("tandem_step_prediction_error_seconds", by="pod")),
        ("Room on decode workers", "short", "Sequences that the ITL limit allows (0: not bounded) and that wait for it; blocks that running ones are expected to want.",
         [(gauge("tandem_most_sequences", by="pod"), "most {{pod}}"), (gauge("tandem_held_back_sequences", by="pod"), "held back {{pod}}"),
          (gauge("tandem_expected_growth_blocks", by="pod"), "growth, blocks {{pod}}")]),
        ("Refused for lack of room, and work lost to preemption", "short", "Requests and tokens per second.",
         [(rate("tandem_no_room_total", by="reason"), "no room: {{reason}}"), (rate("tandem_preempted_tokens_total"), "tokens lost")]),
        ("Prefill: giving way, expiry", "ops", "Prompts that gave way between two chunks, and those dropped after their deadline.",
         [(rate("tandem_chunk_preemptions_total"), "gave way"), (rate("tandem_expired_prompts_total"), "expired")]),
        ("Prefill: tokens that a step may have", "short", "The compute knee while several prompts wait.",
         [(gauge("tandem_step_budget_tokens", by="pod"), "{{pod}}")]),
        ("Stuck or draining", "short", "1 while a worker has work and makes no steps, or takes nothing new.",
         [(gauge("tandem_stuck", by="pod"), "stuck {{pod}}"), (gauge("tandem_draining", by="pod"), "draining {{pod}}")]),
        ("Refused connections", "ops", "One address has too many.", [(rate("tandem_connections_refused_total"), "refused")]),
        ("Refused calls", "ops", "Calls of a router that a worker refused.", [(rate("tandem_calls_refused_total", by="reason"), "{{reason}}")]),
        ("Preemptions and local prefills", "ops", "Work that the decode pool does again, or for the prefill pool.",
         [(rate("tandem_preemptions_total"), "preemptions"), (rate("tandem_local_prefills_total"), "local prefills")]),
    ]),
    ("Security", [
        ("Certificates", "s", "Until the first one of a plane ends; 0 when it cannot be read.",
         [("min by (plane, pod) (tandem_certificate_expiry_seconds{" + SCOPE + "} < 1e12)", "{{plane}} {{pod}}")]),
        ("Tokens by API key", "short", "Prompt and output tokens per second.", [(rate("tandem_key_tokens_total", by="key"), "{{key}}")]),
        ("Calls by API key, and refused ones", "reqps", "Generate calls by whose key they show; refused for a key that is missing or unknown, or a limit.",
         [(rate("tandem_key_calls_total", by="key"), "{{key}}"), (rate("tandem_key_refused_total", by="reason"), "refused: {{reason}}")]),
        ("Refused KV connections and tickets", "ops", "misused: in another worker's hands; identity: no TLS or another's certificate; forged: a wrong secret.",
         [(rate("tandem_kv_refused_total", by="reason, pod"), "{{reason}} {{pod}}")]),
    ]),
    ("Planner", [
        ("Workers that each pool should have", "short", "Planned, and what the load of the moment needs.",
         [("max by (pool) (tandem_planner_workers{" + SCOPE + "})", "planned {{pool}}"),
          ("max by (pool) (tandem_planner_need_workers{" + SCOPE + "})", "needed {{pool}}")]),
        ("Decisions by reason", "short", "In the last hour.",
         [("sum by (reason) (increase(tandem_planner_decisions_total{" + SCOPE + "}[1h]))", "{{reason}}")]),
        ("Workers that change their pool", "short", "In the last hour.",
         [("sum by (outcome) (increase(tandem_planner_switches_total{" + SCOPE + "}[1h]))", "{{outcome}}")]),
        ("Looks", "ops", "Failed ones: the cluster cannot be seen, the last sizes stand.",
         [(rate("tandem_planner_looks_total", by="outcome"), "{{outcome}}")]),
    ]),
    ("KV", [
        ("KV blocks by state", "short", "They add up to the pools.", [(gauge("tandem_kv_blocks", by="state"), "{{state}}")]),
        ("KV pool in use per worker", "percentunit", "What inference gateways call KV cache utilisation.",
         [(gauge("tandem_kv_usage_ratio", by="pod"), "{{pod}}")]),
        ("RDMA, shared memory, device to device", "Bps", "Of the KV bytes, those written by RDMA, and those copied from the memory or the device of a peer on the same host.",
         [(rate("tandem_kv_rdma_sent_bytes_total"), "sent by RDMA"), (rate("tandem_kv_rdma_received_bytes_total"), "received by RDMA"),
          (rate("tandem_kv_shm_sent_bytes_total"), "lent"), (rate("tandem_kv_shm_received_bytes_total"), "copied"),
          (rate("tandem_kv_cuda_ipc_sent_bytes_total"), "lent on a device"), (rate("tandem_kv_cuda_ipc_received_bytes_total"), "copied between devices")]),
        ("Peers by transport, and fallbacks to TCP", "short", "Fallbacks and lost queue pairs in the last hour.",
         [(gauge("tandem_kv_peers", by="transport"), "peers over {{transport}}"),
          (gauge("tandem_kv_rdma_rails", by="memory"), "RDMA ports on {{memory}} memory"),
          ("sum by (reason) (increase(tandem_kv_fallbacks_total{" + SCOPE + "}[1h]))", "fallback: {{reason}}"),
          ("sum (increase(tandem_kv_queue_pairs_lost_total{" + SCOPE + "}[1h]))", "queue pairs lost")]),
        ("KV on the wire", "Bps", "Sent by the pushing side, received and discarded by the other.",
         [(rate("tandem_kv_sent_bytes_total"), "sent"), (rate("tandem_kv_received_bytes_total"), "received"),
          (rate("tandem_kv_packed_sent_bytes_total"), "of it packed, sent"), (rate("tandem_kv_packed_received_bytes_total"), "of it packed, received"),
          (rate("tandem_kv_discarded_bytes_total"), "discarded"), (rate("tandem_kv_verified_bytes_total"), "verified before the first step")]),
        ("Pushes and landings", "ops", "How they ended.",
         [(rate("tandem_kv_converted_blocks_total"), "blocks converted"), (rate("tandem_kv_pushes_total", by="outcome"), "push {{outcome}}"), (rate("tandem_kv_landings_total", by="outcome"), "landing {{outcome}}")]),
        ("Damage", "ops", "Wrong checksums on arrival, cells sent again, blocks that changed in memory, duplicates.",
         [(rate("tandem_kv_checksum_failures_total"), "checksum failures"), (rate("tandem_kv_refetched_cells_total"), "sent again"),
          (rate("tandem_kv_corrupt_blocks_total"), "changed in memory"), (rate("tandem_kv_duplicate_cells_total"), "duplicates")]),
        ("KV connections", "short", "Open, made per second, closed or refused for nonsense, staleness or forgery.",
         [(gauge("tandem_kv_connections"), "open"), (rate("tandem_kv_connects_total"), "made/s"),
          (rate("tandem_kv_protocol_errors_total"), "protocol errors/s"), (rate("tandem_kv_refused_total", by="reason"), "refused {{reason}}/s")]),
        ("Verification before the first step", "s", "How long one piece takes.", quantiles("tandem_kv_verify_duration_seconds")),
    ]),
]


def panel(number, title, unit, says, targets, x, y):
    return {
        "id": number, "type": "timeseries", "title": title, "description": says,
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 8, "showPoints": "never"}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [{"refId": chr(65 + i), "expr": expr, "legendFormat": legend} for i, (expr, legend) in enumerate(targets)],
    }


def panels():
    made, y, number = [], 0, 1
    for section, rows in SECTIONS:
        made.append({"id": number, "type": "row", "title": section, "collapsed": False, "panels": [], "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        y, number = y + 1, number + 1
        for index, (title, unit, says, targets) in enumerate(rows):
            made.append(panel(number, title, unit, says, targets, index % 3 * WIDTH, y + index // 3 * HEIGHT))
            number += 1
        y += (len(rows) + 2) // 3 * HEIGHT
    return made


def dashboard():
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    namespace = {
        "name": "namespace", "label": "Namespace", "type": "query", "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": {"query": "label_values(tandem_requests_total, namespace)", "refId": "namespace"}, "refresh": 2,
        "includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"},
    }
    return {
        "uid": "tandem", "title": "Tandem", "tags": ["llm", "tandem"], "schemaVersion": 39, "version": 1, "editable": True,
        "graphTooltip": 1, "refresh": "10s", "time": {"from": "now-30m", "to": "now"}, "timezone": "browser",
        "templating": {"list": [source, namespace]}, "annotations": {"list": []}, "links": [], "panels": panels(),
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
