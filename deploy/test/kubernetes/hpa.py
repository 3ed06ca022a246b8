"""verify.py's step for the autoscaler: a HorizontalPodAutoscaler on a metric of the workers drives one pool only."""

import json
import pathlib
import subprocess
import time

OBJECTS = """
apiVersion: v1
kind: Service
metadata: {name: custom-metrics, namespace: kube-system}
spec: {ports: [{port: 443, targetPort: 6443, protocol: TCP}]}
---
apiVersion: v1
kind: Endpoints
metadata: {name: custom-metrics, namespace: kube-system}
subsets: [{addresses: [{ip: 10.79.0.1}], ports: [{port: 6443}]}]
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1beta1.custom.metrics.k8s.io}
spec: {service: {name: custom-metrics, namespace: kube-system, port: 443}, group: custom.metrics.k8s.io, version: v1beta1,
  insecureSkipTLSVerify: true, groupPriorityMinimum: 100, versionPriority: 100}
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1beta1.external.metrics.k8s.io}
spec: {service: {name: custom-metrics, namespace: kube-system, port: 443}, group: external.metrics.k8s.io, version: v1beta1,
  insecureSkipTLSVerify: true, groupPriorityMinimum: 100, versionPriority: 100}
"""

# Two sequences are enough for a worker of this trial, and it starts in seconds.
PLANNER = ["planner.enabled=true", "planner.lookSeconds=2", "planner.profile.max_sequences=2", "planner.profile.start_seconds=5",
           "planner.profile.prefill_token_seconds=0.003"]


def verify(v):
    v.say("\n## An HPA on the workers' own metric drives one pool\n\n```")
    api = subprocess.Popen([*map(str, v.INSIDE), "python3", str(pathlib.Path(__file__).with_name("metrics_api.py")), str(v.HOME)])
    try:
        subprocess.run([*v.INSIDE, v.TOOLS / "kubectl", "apply", "-f", "-"], input=OBJECTS, text=True, check=True, capture_output=True)
        v.until(lambda: "tandem_sequences" in v.run(v.TOOLS / "kubectl", "get", "--raw", "/apis/custom.metrics.k8s.io/v1beta1", check=False),
                "the custom metrics API", 60)
        drive(v)
        v.say("```\n\n## The planner drives each pool, through HPAs on its gauge\n\n```")
        planned(v)
    finally:
        api.terminate()
    v.say("```")


def planned(v):
    sets = [x for value in [*PLANNER, "prefill.autoscaling.mode=hpa", "prefill.autoscaling.maxReplicas=2"] for x in ("--set", value)]
    v.helm("upgrade", "demo", v.CHART, "--reset-then-reuse-values", *sets, "--wait", "--timeout", "180s", keep=lambda out: "")
    v.until(lambda: len(v.all_pods("prefill")) == 1 and len(v.all_pods("decode")) == 1, "one pod in each pool", 120)
    load = v.Load(clients=4, prompts=3000, tokens=60, words=120)
    v.until(lambda: replicas(v) == 3, "3 ready decode pods, as planned", 180)
    v.until(lambda: len(v.pods("prefill")) == 2, "2 prefill pods, as planned", 180)
    v.kubectl("get", "hpa")
    answers = load.answers
    v.until(lambda: load.answers > answers + 10, "answers from the grown pools", 180)
    load.stop()
    v.expect(not load.errors, f"{load.answers} answers, {len(load.errors)} failed while the pools grew")
    v.kubectl("logs", "deployment/demo-tandem-planner", keep=decisions)


def decisions(log):
    fields = [json.loads(line)["fields"] for line in log.splitlines() if line.startswith("{")]
    return "\n".join(f"{f['pool']}: {f['from']} -> {f['to']}, {f['reason']}" for f in fields if f["message"] == "decided")


def replicas(v):
    return len([1 for _, _, ready in v.pods("decode").values() if ready])


def drive(v):
    v.helm("upgrade", "demo", v.CHART, "--reuse-values", "--set", "prefill.replicas=1", "--set", "decode.autoscaling.mode=hpa",
           "--set", "decode.autoscaling.target=2", "--set", "decode.autoscaling.maxReplicas=3", "--set",
           "decode.autoscaling.scaleDownSeconds=10", "--wait", "--timeout", "180s", keep=lambda out: "")
    v.until(lambda: len(v.all_pods("prefill")) == 1 and len(v.all_pods("decode")) == 1, "one pod in each pool", 120)
    prefill = v.pods("prefill")
    load = v.Load(clients=4, tokens=200)
    v.until(lambda: replicas(v) == 3, "3 ready decode pods under load", 120)
    v.kubectl("get", "hpa")
    answers = load.answers
    v.until(lambda: load.answers > answers + 20, "answers from the grown pool", 120)
    load.stop()
    v.say(f"answers came from {len(load.workers)} decode workers")
    v.expect(not load.errors, f"{load.answers} answers, {len(load.errors)} failed while it grew")
    began = time.monotonic()
    v.until(lambda: len(v.all_pods("decode")) == 1, "back to one decode pod without load", 180)
    v.say(f"back to 1 decode pod {time.monotonic() - began:.0f} s after the load")
    v.kubectl("get", "hpa")
    v.expect(v.pods("prefill") == prefill, "the same prefill pod throughout: same id, no restart")
    events = json.loads(v.kubectl("get", "events", "--field-selector", "involvedObject.kind=HorizontalPodAutoscaler", "-o", "json", show=False))
    for event in events["items"]:
        if event["reason"] == "SuccessfulRescale":
            v.say(event["message"])
