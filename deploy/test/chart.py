"""Checks the Helm chart: lint, rendering over values files and features, Kubernetes' schemas, refusals, isolation.

usage: chart.py TOOLS [TANDEM]   TOOLS as deploy/test/tools.sh prints it; with the binary also every flag is checked
"""

import pathlib
import subprocess
import sys

TOOLS = pathlib.Path(sys.argv[1])
TANDEM = sys.argv[2] if len(sys.argv) > 2 else None
sys.path.insert(0, str(TOOLS / "python"))

import kubernetes_validate  # noqa: E402
import yaml  # noqa: E402

from chart_cases import CONFLICTS, FEATURES, MISSPELT, OUT_OF_RANGE  # noqa: E402

KUBERNETES = "1.37"
CHART = pathlib.Path(__file__).parents[1] / "helm" / "tandem"
VALUES = sorted((CHART / "values").glob("*.yaml"))
BASE = ["--set", "model.source=image"]
# Kinds of others' operators: no schema here, their fields are asserted in chart_cases.
FOREIGN = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "ScaledObject", "Certificate"}

failures = []


def check(ok, what):
    if not ok:
        failures.append(what)
        print(f"FAIL {what}")


def helm(version, *args):
    done = subprocess.run([TOOLS / version, *args], capture_output=True, text=True, cwd=CHART, check=False)
    return done.returncode, done.stdout, done.stderr


def render(version, args, what):
    code, out, err = helm(version, "template", "llm", str(CHART), "-n", "serving", *args)
    check(code == 0, f"{what}: {version} template: {err.strip()}")
    return [d for d in yaml.safe_load_all(out) if d] if code == 0 else []


def validate(documents, what):
    """Kubernetes' own schemas, strict: a field that does not exist is an error."""
    for document in documents:
        if document["kind"] in FOREIGN:
            continue
        name = f"{what}: {document['kind']}/{document['metadata']['name']}"
        try:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        except Exception as error:  # an unknown version or kind is a failure too
            check(False, f"{name}: {error}")


def pods(documents):
    for document in documents:
        if document["kind"] in ("Deployment", "StatefulSet"):
            yield document, document["spec"]["template"]["spec"]


def secure(documents, what):
    """What every container must have, whatever the values."""
    for document, pod in pods(documents):
        name = f"{what}: {document['metadata']['name']}"
        check(pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0, f"{name}: root")
        check(pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", f"{name}: seccomp")
        check(pod["automountServiceAccountToken"] is False, f"{name}: API token in the pod")
        for container in pod["containers"] + pod.get("initContainers", []):
            own = container["securityContext"]
            check(own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"], f"{name}: root fs or escalation")
            check(own["capabilities"]["drop"] == ["ALL"], f"{name}: capabilities")
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            check(probe in pod["containers"][0], f"{name}: no {probe}")
        drain = [a for a in pod["containers"][0].get("args", []) if a.startswith("--drain-seconds=")]
        for argument in drain:
            check(pod["terminationGracePeriodSeconds"] > int(argument.split("=")[1]), f"{name}: killed while draining")


def flags(documents, what, known):
    """Every flag that the chart passes is one that the binary has."""
    for document, pod in pods(documents):
        args = pod["containers"][0].get("args")
        for argument in (args or [])[1:]:
            flag = argument.split("=")[0]
            check(flag in known[args[0]], f"{what}: {document['metadata']['name']}: tandem {args[0]} has no {flag}")


def binary_flags():
    known = {}
    for role in ("router", "prefill", "decode", "worker", "planner"):
        text = subprocess.run([TANDEM, role, "--help"], capture_output=True, text=True, check=True).stdout
        known[role] = {word.strip(",") for word in text.split() if word.startswith("--")}
    return known


def pool_of(documents, role):
    return [d for d in documents if d["metadata"]["name"].endswith(role)]


def isolation():
    """Scaling or upgrading one pool renders the other pool byte for byte as before."""
    before = render("helm3", BASE, "isolation")
    for role, other in (("prefill", "decode"), ("decode", "prefill")):
        for change in (f"{role}.replicas=3", f"{role}.image.tag=9.9.9", f"{role}.kvMib=77", f"{role}.autoscaling.mode=hpa"):
            after = render("helm3", [*BASE, "--set", change], change)
            check(pool_of(before, role) != pool_of(after, role), f"{change}: changed nothing")
            check(pool_of(before, other) == pool_of(after, other), f"{change}: touched the {other} pool")
    # A new version of the chart itself must not restart pods: nothing of it is in a pod's template.
    for document, _ in pods(before):
        labels = document["spec"]["template"]["metadata"]["labels"]
        check("helm.sh/chart" not in labels and "app.kubernetes.io/version" not in labels, "chart version in pod labels")
    print("ok   scaling and upgrading one pool leaves the other as it is (8 changes)")


def refusals():
    for value in MISSPELT:
        code, _, err = helm("helm3", "template", "llm", str(CHART), *BASE, "--set", value)
        check(code != 0 and "dditional propert" in err, f"misspelt {value} was not refused as unknown: {err.strip()}")
    for value in OUT_OF_RANGE:
        code, _, err = helm("helm3", "template", "llm", str(CHART), *BASE, "--set", value)
        check(code != 0 and "values don't meet the specifications" in err, f"{value} was not refused by the schema")
    for values, message in CONFLICTS:
        code, _, err = helm("helm3", "template", "llm", str(CHART), *BASE, *[x for v in values for x in ("--set", v)])
        check(code != 0 and message in err, f"{values} was not refused with '{message}': {err.strip()}")
    print(f"ok   refused: {len(MISSPELT)} misspelt, {len(OUT_OF_RANGE)} out of range, {len(CONFLICTS)} contradictions")


def one(name, args, assertion, known):
    """Renders one set of values with both helms and looks at what came out."""
    before, documents = len(failures), []
    for version in ("helm3", "helm4"):
        documents = render(version, args, name)
        # The schemas begin with 1.25: what is rendered for older ones is asserted, and was run on a real 1.20.
        if "--kube-version" not in args:
            validate(documents, name)
        secure(documents, name)
        if known:
            flags(documents, name, known)
    if assertion:
        try:
            assertion({(d["kind"], d["metadata"]["name"]): d for d in documents})
        except (AssertionError, KeyError, IndexError, TypeError) as error:
            check(False, f"{name}: {type(error).__name__} {error}")
    if len(failures) == before:
        print(f"ok   {name}: {len(documents)} objects")


def main():
    known = binary_flags() if TANDEM else None
    for version in ("helm3", "helm4"):
        code, out, err = helm(version, "lint", "--strict", str(CHART), *BASE)
        check(code == 0, f"{version} lint: {out}{err}")
        for file in VALUES:
            under = BASE if file.name == "h100-rdma.yaml" else []
            code, out, err = helm(version, "lint", "--strict", str(CHART), *under, "-f", str(file))
            check(code == 0, f"{version} lint {file.name}: {out}{err}")
    print(f"ok   helm 3 and 4 lint --strict, {len(VALUES)} values files")
    for file in VALUES:
        under = ["-f", str(CHART / "values" / "h100-tcp.yaml")] if file.name == "h100-rdma.yaml" else []
        one(file.name, [*under, "-f", str(file)], None, known)
    hardware = CHART / "values" / "h100-tcp.yaml"
    one("h100-tcp + production", ["-f", str(hardware), "-f", str(CHART / "values" / "production.yaml")], None, known)
    for name, args, assertion in FEATURES:
        one(name, [*BASE, *args], assertion, known)
    isolation()
    refusals()
    print(f"chart: {len(failures)} failures" + ("" if known else " (no binary given: flags not checked)"))
    sys.exit(1 if failures else 0)


main()
