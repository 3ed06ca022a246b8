"""Custom and external metrics for verify.py: reads the pods' own /metrics, as prometheus-adapter does through Prometheus.

usage: metrics_api.py HOME     serves {custom,external}.metrics.k8s.io/v1beta1 on 10.79.0.1:6443, inside the node's network namespace
"""

import datetime
import http.server
import json
import pathlib
import ssl
import subprocess
import sys
import urllib.parse
import urllib.request

HOME = pathlib.Path(sys.argv[1])
KUBERNETES = "https://127.0.0.1:26443"
GROUP = "custom.metrics.k8s.io/v1beta1"
EXTERNAL = "external.metrics.k8s.io/v1beta1"
NAMES = ("tandem_queued_tokens", "tandem_sequences")
PLANNED = "tandem_planner_workers"


def kubernetes(path):
    request = urllib.request.Request(KUBERNETES + path, headers={"Authorization": "Bearer admin-token"})
    context = ssl._create_unverified_context()
    with urllib.request.urlopen(request, context=context, timeout=5) as answer:
        return json.load(answer)


def value(pod, metric, label=""):
    """A pod's sum over a metric's series that contain a label; None when it does not answer."""
    port = pod["spec"]["containers"][0]["ports"][0]["containerPort"]
    try:
        with urllib.request.urlopen(f"http://{pod['status']['podIP']}:{port}/metrics", timeout=2) as answer:
            lines = answer.read().decode().splitlines()
    except (OSError, KeyError):
        return None
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == metric and label in line)


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def external(namespace, selector):
    """The planner's gauge for the pool that the selector names."""
    pool = selector.partition("pool=")[2]
    pods = kubernetes(f"/api/v1/namespaces/{namespace}/pods?labelSelector=app.kubernetes.io/component%3Dplanner")["items"]
    seen = [v for v in (value(pod, PLANNED, f'pool="{pool}"') for pod in pods) if v]
    items = [{"metricName": PLANNED, "metricLabels": {"pool": pool}, "timestamp": now(), "value": f"{max(seen):.0f}"}] if seen else []
    return {"kind": "ExternalMetricValueList", "apiVersion": EXTERNAL, "metadata": {}, "items": items}


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, body, code=200):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        parts = url.path.strip("/").split("/")
        selector = urllib.parse.parse_qs(url.query).get("labelSelector", [""])[0]
        if parts == ["apis", *EXTERNAL.split("/")]:
            resource = {"name": PLANNED, "singularName": "", "namespaced": True, "kind": "ExternalMetricValueList", "verbs": ["get"]}
            return self.answer({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": EXTERNAL, "resources": [resource]})
        if parts[1:2] == [EXTERNAL.split("/")[0]] and len(parts) == 6:
            return self.answer(external(parts[4], selector))
        if parts == ["apis", *GROUP.split("/")]:
            resources = [{"name": f"pods/{n}", "singularName": "", "namespaced": True, "kind": "MetricValueList", "verbs": ["get"]}
                         for n in NAMES]
            return self.answer({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": GROUP, "resources": resources})
        if len(parts) != 8 or parts[7] not in NAMES:
            return self.answer({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404}, 404)
        namespace, metric = parts[4], parts[7]
        pods = kubernetes(f"/api/v1/namespaces/{namespace}/pods?" + urllib.parse.urlencode({"labelSelector": selector}))
        items = []
        for pod in pods["items"]:
            seen = value(pod, metric)
            if seen is not None:
                items.append({"describedObject": {"kind": "Pod", "namespace": namespace, "name": pod["metadata"]["name"], "apiVersion": "v1"},
                              "metric": {"name": metric, "selector": None}, "timestamp": now(), "value": f"{round(seen * 1000)}m"})
        self.answer({"kind": "MetricValueList", "apiVersion": GROUP, "metadata": {}, "items": items})


def main():
    certificate = HOME / "pki" / "metrics.pem"
    if not certificate.exists():
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", certificate, "-out", HOME / "pki/metrics.crt",
                        "-days", "365", "-subj", "/CN=metrics"], check=True, capture_output=True)
    server = http.server.ThreadingHTTPServer(("10.79.0.1", 6443), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(HOME / "pki/metrics.crt", certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()


main()
