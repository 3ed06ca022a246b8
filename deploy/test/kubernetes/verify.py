"""Runs the chart on the real Kubernetes of node.sh and writes down what was done and seen.

usage: verify.py HOME TOOLS TANDEM REPORT.md [STEP...]
  HOME     as given to node.sh, which is up and has the images of image.py
  TOOLS    the folder with helm3 and kubectl (deploy/test/tools.sh prints it)
  TANDEM   the binary, as a client
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import hpa
import tls

HOME, TOOLS, TANDEM, REPORT = (pathlib.Path(a).resolve() for a in sys.argv[1:5])
CHART = pathlib.Path(__file__).parents[2] / "helm" / "tandem"
INSIDE = ["nsenter", "--net=/run/netns/tandem-k8s", "env", f"KUBECONFIG={HOME}/kubeconfig"]
IMAGES = ["--set", "image.pullPolicy=Never", "--set", "etcd.bundled.image=localhost/etcd:3.4",
          "--set", "etcd.bundled.pullPolicy=Never"]
LONG = "Write a long story about a lighthouse keeper who finds a message in a bottle."

report = []
failures = []


def say(text=""):
    print(text, flush=True)
    report.append(text)


def run(*command, show=None, keep=lambda out: out, check=True):
    """Runs a command inside the namespace; what it was and what it said go into the report."""
    done = subprocess.run([*INSIDE, *map(str, command)], capture_output=True, text=True, check=False)
    if show is not None:
        say(f"$ {show}")
        said = keep(done.stdout).rstrip()
        if said:
            say(said)
    if check and done.returncode != 0:
        say(f"exit {done.returncode}: {done.stderr.strip()}")
        failures.append(show or " ".join(map(str, command)))
    return done.stdout


def kubectl(*args, show=True, **more):
    return run(TOOLS / "kubectl", "-n", "serving", *args, show="kubectl -n serving " + " ".join(args) if show else None, **more)


def helm(*args, **more):
    shown = " ".join(str(a).replace(str(CHART), "deploy/helm/tandem") for a in args if a not in IMAGES)
    return run(TOOLS / "helm3", "-n", "serving", *args, show="helm -n serving " + shown, **more)


def expect(holds, what):
    say(f"{'ok  ' if holds else 'FAIL'} {what}")
    if not holds:
        failures.append(what)


def pods(part):
    """Names, unique ids and restarts of a part's pods that are not on their way out."""
    out = kubectl("get", "pods", "-l", f"app.kubernetes.io/component={part}", "-o", "json", show=False)
    items = [i for i in json.loads(out)["items"] if "deletionTimestamp" not in i["metadata"]]
    status = lambda i: i["status"].get("containerStatuses", [{"ready": False, "restartCount": 0}])[0]
    return {i["metadata"]["name"]: (i["metadata"]["uid"], status(i)["restartCount"], status(i)["ready"]) for i in items}


def until(holds, what, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.5)
    expect(False, f"waited {seconds} s for: {what}")
    return False


def address():
    return kubectl("get", "service", "demo-tandem", "-o", "jsonpath={.spec.clusterIP}", show=False) + ":50051"


def ask(*args, prompt=LONG, tokens=160):
    """A greedy answer as JSON, through the Service."""
    command = [*INSIDE, TANDEM, "generate", "--addr", address(), "--json", "--max-tokens", str(tokens), *args, prompt]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Load:
    """Prompts through the Service on one long-lived connection per client, until told to stop; then counts."""

    def __init__(self, clients=2, prompts=100000, tokens=24, words=0):
        self.file = tempfile.NamedTemporaryFile("w", suffix=".json")
        json.dump([{"id": i, "text": f"{i} " * words + f"Number {i % 17} is a"} for i in range(prompts)], self.file)
        self.file.flush()
        command = [*INSIDE, TANDEM, "generate", "--addr", address(), "--json", "--prompts", self.file.name,
                   "--concurrency", "2", "--max-tokens", str(tokens)]
        self.answers, self.errors, self.workers = 0, [], set()
        self.clients = [subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) for _ in range(clients)]
        self.readers = [threading.Thread(target=self.read, args=(c,)) for c in self.clients]
        for reader in self.readers:
            reader.start()

    def read(self, client):
        for line in client.stdout:
            answer = json.loads(line)
            if "error" in answer:
                self.errors.append(answer["error"])
            else:
                self.answers += 1
                self.workers.add(answer["timeline"]["decode_worker"])

    def stop(self):
        for client in self.clients:
            client.terminate()
        for reader in self.readers:
            reader.join()


def install():
    say("\n## Install\n\n```")
    kubectl("create", "namespace", "serving", show=False, check=False)
    began = time.monotonic()
    helm("install", "demo", CHART, "-f", CHART / "values" / "cpu-demo.yaml", *IMAGES, "--wait", "--timeout", "180s",
         keep=lambda out: "\n".join(out.splitlines()[:6]))
    say(f"({time.monotonic() - began:.0f} s)")
    kubectl("get", "pods,deployments,statefulsets,poddisruptionbudgets,networkpolicies")
    for part in ("router", "prefill", "decode", "etcd"):
        expect(all(ready for _, _, ready in pods(part).values()) and pods(part), f"{part} is ready")
    restarts = sum(r for part in ("router", "prefill", "decode") for _, r, _ in pods(part).values())
    expect(restarts == 0, f"{restarts} restarts while everything started at once")
    user = kubectl("get", "pods", "-l", "app.kubernetes.io/component=decode", "-o",
                   "jsonpath={.items[0].spec.securityContext.runAsUser} {.items[0].metadata.labels}")
    expect(user.startswith("65532") and '"llm-d.ai/role":"decode"' in user, "not root, and labelled with its role")
    say("```")


def answer():
    say("\n## A prompt through the Service\n\n```")
    command = [TANDEM, "generate", "--addr", address(), "What is the capital of France?"]
    done = subprocess.run([*INSIDE, *map(str, command)], capture_output=True, text=True, check=False)
    say('$ tandem generate --addr SERVICE:50051 "What is the capital of France?"')
    say(done.stdout.strip() + "\n" + done.stderr.rstrip())
    expect(done.stdout.strip() == "The capital of France is Paris.", "answered over gRPC")
    expect("over tcp" in done.stderr, "the KV went from the prefill pod to the decode pod")
    http()
    run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}\n", f"http://{address()}/health", show="curl http://SERVICE:50051/health")
    say("```")


def http():
    body = {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0}
    out = run("curl", "-s", f"http://{address()}/v1/chat/completions", "-H", "content-type: application/json", "-d",
              json.dumps(body), show="curl http://SERVICE:50051/v1/chat/completions -d '{\"messages\": ...}'", keep=lambda out: out[:300])
    try:
        text = json.loads(out)["choices"][0]["message"]["content"]
        expect("Paris" in text, "answered over HTTP")
    except (ValueError, KeyError):
        say("(this build has no HTTP API)")


def scale():
    say("\n## Scaling one pool leaves the other as it is\n\n```")
    for pool, count, other in (("prefill", 3, "decode"), ("decode", 2, "prefill")):
        before, router = pods(other), pods("router")
        helm("upgrade", "demo", CHART, "--reuse-values", "--set", f"{pool}.replicas={count}", "--wait", "--timeout", "180s",
             keep=lambda out: "")
        kubectl("get", "pods", "-o", "custom-columns=NAME:.metadata.name,UID:.metadata.uid,READY:.status.containerStatuses[0].ready")
        expect(len(pods(pool)) == count, f"{count} {pool} pods")
        expect(pods(other) == before and pods("router") == router, f"the same {other} and router pods: same ids, no restart")
    say("```")


def upgrade():
    say("\n## Rolling upgrade under load\n\n```")
    subprocess.run(["ctr", "-a", HOME / "ctd/c.sock", "-n", "k8s.io", "images", "tag", "--force", "docker.io/library/tandem-demo:0.1.0",
                    "docker.io/library/tandem-demo:0.1.1"], check=True, capture_output=True)
    before = {part: set(pods(part)) for part in ("router", "prefill", "decode")}
    load = Load()
    until(lambda: load.answers > 10, "answers before the upgrade")
    began, first = time.monotonic(), load.answers
    helm("upgrade", "demo", CHART, "--reuse-values", "--set", "image.tag=0.1.1", "--wait", "--timeout", "300s", keep=lambda out: "")
    parts = ("router", "prefill", "decode")
    until(lambda: all(len(all_pods(p)) == len(pods(p)) for p in parts), "the old pods' end", 120)
    during = load.answers - first
    seconds = time.monotonic() - began
    until(lambda: load.answers > first + during + 10, "answers after the upgrade")
    load.stop()
    for part in parts:
        expect(not before[part] & set(pods(part)), f"every {part} pod is a new one")
    say(f"{during} answers during the {seconds:.0f} s of the upgrade, {len(load.errors)} failed")
    for error in sorted(set(load.errors)):
        say(f"  {load.errors.count(error)} x {error}")
    expect(not load.errors, "no request failed")
    say("```")


def all_pods(part):
    out = kubectl("get", "pods", "-l", f"app.kubernetes.io/component={part}", "-o", "name", show=False)
    return out.split()


def delete():
    say("\n## A pod deleted in the middle of a stream\n\n```")
    whole = json.loads(ask().communicate()[0])
    for how in ("delete", "kill"):
        stream = ask()
        victim = {}

        def found():
            victim.update({n: r for n in pods("decode") for r in [running(n)] if r})
            return victim
        until(found, "the worker that runs it", 30)
        name = next(iter(victim))
        if how == "delete":
            kubectl("delete", "pod", name, "--wait=false")
        else:
            kill(name)
        out, err = stream.communicate()
        expect(stream.returncode == 0, f"the stream ended well {err.strip()}")
        got = json.loads(out)
        expect(got["text"] == whole["text"], f"the same {got['usage']['output_tokens']} tokens as undisturbed")
        time_line = got["timeline"]
        say(f"attempts {time_line['attempts']}, moves {time_line['moves']}, ended on {time_line['decode_worker']}")
        expect(time_line["decode_worker"] != name, "it went on elsewhere")
        until(lambda: len(all_pods("decode")) == 2 and all(r for _, _, r in pods("decode").values()), "two decode pods")
    say("```")


def kill(pod):
    """SIGKILL, without a word before."""
    ctr = ["ctr", "-a", HOME / "ctd/c.sock", "-n", "k8s.io"]
    of_pod = f'labels."io.kubernetes.pod.name"=={pod},labels."io.cri-containerd.kind"==container'
    container = subprocess.run([*ctr, "containers", "ls", "-q", of_pod], capture_output=True, text=True, check=True).stdout.split()[-1]
    say(f"$ ctr task kill --signal SIGKILL CONTAINER    # of {pod}")
    subprocess.run([*ctr, "task", "kill", "--signal", "SIGKILL", container], check=True, capture_output=True)


def running(pod):
    ip = kubectl("get", "pod", pod, "-o", "jsonpath={.status.podIP}", show=False)
    page = run("curl", "-s", f"http://{ip}:50071/metrics", check=False)
    line = next((x for x in page.splitlines() if x.startswith('tandem_sequences{state="running"}')), "x 0")
    return float(line.split()[-1])


def main():
    say("# Seen on a real Kubernetes\n")
    say("Written by `deploy/test/kubernetes/verify.py` on Kubernetes 1.20.2 (API server, controllers, scheduler, kubelet, kube-proxy,")
    say("containerd, runc) built from Debian's source package, one node, images made of local files; how to repeat it is at the end.")
    say("This node enforces no NetworkPolicies, has no GPUs, no RDMA and no KEDA: those are only rendered and checked against schemas.")
    steps = {"answer": answer, "scale": scale, "upgrade": upgrade, "delete": delete, "hpa": lambda: hpa.verify(sys.modules[__name__]),
             "tls": lambda: tls.verify(sys.modules[__name__])}
    install()
    for name in sys.argv[5:] or steps:
        steps[name]()
    say("\n## Repeat it\n\n```")
    say("cargo build --release --bin tandem && target/release/tandem model fetch")
    say("deploy/test/kubernetes/build.sh                 # once, about 6 minutes on two cores; root, Debian 12, a deb-src entry")
    say("python3 deploy/test/kubernetes/image.py target/release/tandem ~/.cache/tandem/models/smollm2-135m-instruct ~/.cache/tandem/kubernetes/images")
    say("deploy/test/kubernetes/node.sh up")
    say('python3 deploy/test/kubernetes/verify.py ~/.cache/tandem/kubernetes "$(deploy/test/tools.sh)" target/release/tandem deploy/VERIFIED.md')
    say("deploy/test/kubernetes/node.sh down\n```")
    if failures:
        say(f"\n{len(failures)} failures")
    REPORT.write_text("\n".join(report) + "\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
