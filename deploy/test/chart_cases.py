"""What chart.py renders and what must be seen in it. Names are those of release `llm`, so llm-tandem-PART."""

import json


def sets(*values):
    return [x for v in values for x in ("--set", v)]


def container(objects, part):
    return objects["Deployment", f"llm-tandem-{part}"]["spec"]["template"]["spec"]["containers"][0]


def pod(objects, part):
    return objects["Deployment", f"llm-tandem-{part}"]["spec"]["template"]["spec"]


def defaults(o):
    assert o["Deployment", "llm-tandem-prefill"]["spec"]["replicas"] == 1
    for role in ("prefill", "decode"):
        template = o["Deployment", f"llm-tandem-{role}"]["spec"]["template"]
        assert template["metadata"]["labels"]["llm-d.ai/role"] == role
        assert "add" not in container(o, role)["securityContext"]["capabilities"]
        assert "--etcd=http://llm-tandem-etcd:2379" in container(o, role)["args"]
        assert "--cluster=serving-llm" in container(o, role)["args"]
    assert o["PodDisruptionBudget", "llm-tandem-decode"]["apiVersion"] == "policy/v1"
    assert container(o, "router")["lifecycle"]["preStop"] == {"sleep": {"seconds": 5}}
    assert pod(o, "router")["terminationGracePeriodSeconds"] == 5 + 120 + 10
    decode = o["NetworkPolicy", "llm-tandem-decode"]["spec"]["ingress"][0]["from"]
    callers = [p["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for p in decode]
    assert callers == ["router", "prefill", "decode"], callers


def hpa(o):
    for role, metric in (("prefill", "tandem_queued_tokens"), ("decode", "tandem_sequences")):
        scaler = o["HorizontalPodAutoscaler", f"llm-tandem-{role}"]
        assert scaler["apiVersion"] == "autoscaling/v2"
        assert scaler["spec"]["metrics"][0]["pods"]["metric"]["name"] == metric
        assert "replicas" not in o["Deployment", f"llm-tandem-{role}"]["spec"], "helm upgrade would undo the autoscaler"


def old(o):
    assert o["HorizontalPodAutoscaler", "llm-tandem-prefill"]["apiVersion"] == "autoscaling/v2beta2"
    assert o["HorizontalPodAutoscaler", "llm-tandem-router"]["apiVersion"] == "autoscaling/v2beta2"
    assert o["PodDisruptionBudget", "llm-tandem-router"]["apiVersion"] == "policy/v1beta1"
    assert container(o, "router")["lifecycle"]["preStop"] == {"exec": {"command": ["sleep", "5"]}}


def keda(o):
    scaled = o["ScaledObject", "llm-tandem-decode"]
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    assert scaled["spec"]["scaleTargetRef"]["name"] == "llm-tandem-decode"
    trigger = scaled["spec"]["triggers"][0]
    assert trigger["type"] == "prometheus" and trigger["metadata"]["threshold"] == "32"
    assert trigger["metadata"]["query"] == 'sum(tandem_sequences{namespace="serving", pod=~"llm-tandem-decode-.*"})'
    assert "replicas" not in o["Deployment", "llm-tandem-decode"]["spec"]
    assert ("ScaledObject", "llm-tandem-prefill") not in o


def roles(o):
    args = container(o, "decode")["args"]
    assert args[:3] == ["worker", "--role=auto", "--start-as=decode"], args
    assert container(o, "prefill")["args"][0] == "prefill"
    assert "--switch-roles" in container(o, "planner")["args"]
    for role in ("prefill", "decode"):
        callers = o["NetworkPolicy", f"llm-tandem-{role}"]["spec"]["ingress"][0]["from"]
        callers = [p["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for p in callers]
        assert callers == ["router", "prefill", "decode", "planner"], callers


def planned(mode):
    def assertion(o):
        args = container(o, "planner")["args"]
        assert {"--slo-ttft=2", "--min-prefill=1", "--max-decode=4", "--routers=llm-tandem-routers:50051"} <= set(args), args
        assert o["Service", "llm-tandem-routers"]["spec"]["clusterIP"] == "None"
        callers = o["NetworkPolicy", "llm-tandem-prefill"]["spec"]["ingress"][0]["from"]
        assert callers[-1]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "planner"
        assert o["PodMonitor", "llm-tandem-planner"]
        if mode == "keda":
            assert o["ScaledObject", "llm-tandem-prefill"]["spec"]["triggers"] == [{
                "type": "external", "metadata": {"scalerAddress": "llm-tandem-planner.serving:50081", "pool": "prefill"}}]
            assert json.loads(o["ConfigMap", "llm-tandem-planner"]["data"]["profile.json"]) == {
                "kv_tokens": 1000, "step_base_seconds": 0.5}
        else:
            external = o["HorizontalPodAutoscaler", "llm-tandem-decode"]["spec"]["metrics"][0]["external"]
            assert external["metric"] == {"name": "tandem_planner_workers", "selector": {"matchLabels": {"pool": "decode"}}}
            assert external["target"] == {"type": "AverageValue", "averageValue": "1"}
    return assertion


def int8(o):
    for role in ("prefill", "decode"):
        assert "--quantize=int8" in container(o, role)["args"], role


def kv_wire(kind):
    def assertion(o):
        for role in ("prefill", "decode"):
            assert f"--kv-wire={kind}" in container(o, role)["args"], role
    return assertion


def gpu(o):
    for role in ("prefill", "decode"):
        limits = container(o, role)["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == 1 and limits["memory"] == "64Gi", limits
        assert "--device=cuda" in container(o, role)["args"] and "--quantize=fp8" in container(o, role)["args"]


def rdma(o):
    limits = container(o, "prefill")["resources"]["limits"]
    assert limits == {"rdma/hca_shared_devices_a": 1, "hugepages-2Mi": "2Gi", "memory": "8Gi"}, limits
    assert container(o, "prefill")["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert {"--transport=rdma", "--rdma-device=mlx5_0,mlx5_1:1:3", "--require-rdma", "--gpudirect=require"} <= set(container(o, "prefill")["args"])
    assert "add" not in container(o, "decode")["securityContext"]["capabilities"]
    assert "--transport=tcp" in container(o, "decode")["args"]


def model_from(source):
    def assertion(o):
        for part in ("router", "prefill", "decode"):
            mounts = {m["name"]: m for m in container(o, part)["volumeMounts"]}
            volumes = {v["name"]: v for v in pod(o, part)["volumes"]}
            assert mounts["model"]["readOnly"] is True
            assert source in volumes["model"], volumes["model"]
            assert ("initContainers" in pod(o, part)) == (source == "emptyDir")
    return assertion


def monitors(o):
    assert o["ServiceMonitor", "llm-tandem-router"]["spec"]["endpoints"][0] == {
        "port": "tandem", "path": "/metrics", "interval": "15s"}
    assert o["PodMonitor", "llm-tandem-decode"]["metadata"]["labels"]["release"] == "kps"
    assert o["Service", "llm-tandem"]["spec"]["ports"][0]["name"] == "tandem"


def alarms(o):
    rules = o["PrometheusRule", "llm-tandem"]
    assert rules["metadata"]["labels"]["release"] == "kps"
    assert rules["spec"]["groups"][0]["rules"][0]["alert"] == "TandemRouterGone"
    board = o["ConfigMap", "llm-tandem-dashboard"]
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(board["data"]["tandem.json"])["title"] == "Tandem"


def egress(o):
    policy = o["NetworkPolicy", "llm-tandem-prefill"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    ports = [r["ports"][0]["port"] for r in policy["egress"]]
    assert ports == [53, 2379, 50071], ports
    assert [r["ports"][0]["port"] for r in o["NetworkPolicy", "llm-tandem-router"]["spec"]["egress"]] == [53, 2379, 50071, 50061]
    router = o["NetworkPolicy", "llm-tandem-router"]["spec"]["ingress"][0]["from"]
    assert router == [{"namespaceSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}]


def tracing(o):
    for part in ("router", "prefill", "decode"):
        args = container(o, part)["args"]
        assert "--otlp-endpoint=http://otel:4317" in args and "--trace-ratio=0.1" in args, args
    assert 4317 in [r["ports"][0]["port"] for r in o["NetworkPolicy", "llm-tandem-decode"]["spec"]["egress"]]


def external(o):
    assert ("StatefulSet", "llm-tandem-etcd") not in o and ("NetworkPolicy", "llm-tandem-etcd") not in o
    assert "--etcd=http://a:2379,http://b:2379" in container(o, "router")["args"]


def secured_etcd(o):
    files = {"--etcd=https://a:2379", "--etcd-ca=/etc/tandem/etcd-tls/ca.crt", "--etcd-cert=/etc/tandem/etcd-tls/tls.crt",
             "--etcd-key=/etc/tandem/etcd-tls/tls.key", "--etcd-user=tandem",
             "--etcd-password-file=/etc/tandem/etcd-auth/password"}
    for part in ("router", "prefill", "decode"):
        assert files <= set(container(o, part)["args"]), container(o, part)["args"]
        mounts = {m["name"]: m for m in container(o, part)["volumeMounts"]}
        volumes = {v["name"]: v for v in pod(o, part)["volumes"]}
        for name, secret in (("etcd-tls", "certs"), ("etcd-auth", "users")):
            assert mounts[name]["readOnly"] is True and mounts[name]["mountPath"] == f"/etc/tandem/{name}"
            assert volumes[name]["secret"]["secretName"] == secret


def router_tls(o):
    router, planner = container(o, "router"), container(o, "planner")
    assert {"--tls-cert=/etc/tandem/router-tls/tls.crt", "--tls-client-ca=/etc/tandem/router-tls/ca.crt"} <= set(router["args"])
    assert {"--ca=/etc/tandem/router-tls/ca.crt", "--key=/etc/tandem/router-tls/tls.key"} <= set(planner["args"])
    for part in ("router", "planner"):
        mounts = {m["name"]: m for m in container(o, part)["volumeMounts"]}
        volumes = {v["name"]: v for v in pod(o, part)["volumes"]}
        assert mounts["router-tls"]["readOnly"] and volumes["router-tls"]["secret"]["secretName"] == "front"
    assert "router-tls" not in {v["name"] for v in pod(o, "prefill")["volumes"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert router[probe]["httpGet"]["scheme"] == "HTTPS"
        assert container(o, "decode")[probe]["httpGet"]["scheme"] == "HTTP"
    endpoint = o["ServiceMonitor", "llm-tandem-router"]["spec"]["endpoints"][0]
    assert endpoint["scheme"] == "https" and endpoint["tlsConfig"]["keySecret"] == {"name": "front", "key": "tls.key"}


CLUSTER_FLAGS = {f"--cluster-{flag}=/etc/tandem/cluster-tls/{file}" for flag, file in (("cert", "tls.crt"), ("key", "tls.key"), ("ca", "ca.crt"))}


def cluster_tls(secrets):
    """Secrets by part: every part has its own and nobody has another's."""
    def assertion(o):
        for part in ("router", "prefill", "decode", "planner"):
            assert CLUSTER_FLAGS <= set(container(o, part)["args"]), container(o, part)["args"]
            mounts = {m["name"]: m for m in container(o, part)["volumeMounts"]}
            volumes = {v["name"]: v for v in pod(o, part)["volumes"]}
            assert mounts["cluster-tls"]["readOnly"] and volumes["cluster-tls"]["secret"]["secretName"] == secrets[part]
        for role in ("prefill", "decode"):
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert container(o, role)[probe]["httpGet"]["scheme"] == "HTTPS"
            endpoint = o["PodMonitor", f"llm-tandem-{role}"]["spec"]["podMetricsEndpoints"][0]
            assert endpoint["scheme"] == "https" and endpoint["tlsConfig"]["serverName"] == f"llm-tandem-{role}"
            assert endpoint["tlsConfig"]["keySecret"] == {"name": secrets["planner"], "key": "tls.key"}
        assert "scheme" not in o["PodMonitor", "llm-tandem-planner"]["spec"]["podMetricsEndpoints"][0]
        made = {name for kind, name in o if kind == "Certificate"}
        if secrets["prefill"] != "llm-tandem-prefill-cluster":
            assert not made, made
            return
        assert made == {f"llm-tandem-{part}-cluster" for part in ("router", "prefill", "decode", "reader")}, made
        spec = o["Certificate", "llm-tandem-prefill-cluster"]["spec"]
        assert spec["uris"] == ["tandem://worker/llm-tandem-prefill-*"] and spec["dnsNames"] == ["llm-tandem-prefill"]
        assert spec["issuerRef"] == {"group": "cert-manager.io", "kind": "ClusterIssuer", "name": "inside"}
        assert o["Certificate", "llm-tandem-router-cluster"]["spec"]["uris"] == ["tandem://router"]
    return assertion


def plain_rdma(o):
    assert {"--transport=rdma", "--allow-plain-rdma"} | CLUSTER_FLAGS <= set(container(o, "prefill")["args"])
    assert "--allow-plain-rdma" not in container(o, "decode")["args"]


def api_keys(o):
    assert "--api-keys=/etc/tandem/api-keys/keys" in container(o, "router")["args"]
    assert "--api-key-file=/etc/tandem/api-key/key" in container(o, "planner")["args"]
    for part, name, secret in (("router", "api-keys", "keys"), ("planner", "api-key", "planner-key")):
        volumes = {v["name"]: v for v in pod(o, part)["volumes"]}
        assert volumes[name]["secret"]["secretName"] == secret
    for part in ("prefill", "decode"):
        assert not {"api-keys", "api-key"} & {v["name"] for v in pod(o, part)["volumes"]}


def images(o):
    assert container(o, "prefill")["image"] == "tandem:2.0.0"
    assert container(o, "decode")["image"] == "tandem:1.9.0"
    assert container(o, "router")["image"].startswith("reg/tandem@sha256:")


def placed(o):
    spec = pod(o, "decode")
    assert spec["nodeSelector"] == {"gpu": "h100"} and spec["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert spec["hostNetwork"] and spec["dnsPolicy"] == "ClusterFirstWithHostNet" and spec["runtimeClassName"] == "nvidia"
    spread = spec["topologySpreadConstraints"][0]
    assert spread["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "decode"
    assert "--zone=b" in container(o, "decode")["args"] and "--no-graphs" in container(o, "decode")["args"]
    assert {"name": "LD_LIBRARY_PATH", "value": "/x"} in container(o, "decode")["env"]


def bare(o):
    kinds = {kind for kind, _ in o}
    assert kinds == {"Deployment", "Service", "StatefulSet"}, kinds


FEATURES = [
    ("workers that change their pool", sets("planner.enabled=true", "planner.switchRoles=true", "decode.roleSwitch=true"), roles),
    ("defaults", [], defaults),
    ("hpa", sets("prefill.autoscaling.mode=hpa", "decode.autoscaling.mode=hpa"), hpa),
    ("hpa, own metrics", sets("prefill.autoscaling.mode=hpa", "prefill.autoscaling.metrics[0].type=External",
                              "prefill.autoscaling.metrics[0].external.metric.name=m",
                              "prefill.autoscaling.metrics[0].external.target.type=Value",
                              "prefill.autoscaling.metrics[0].external.target.value=3"), None),
    ("keda", sets("decode.autoscaling.mode=keda", "decode.autoscaling.target=32"), keda),
    ("planner, keda", sets("planner.enabled=true", "prefill.autoscaling.mode=keda", "decode.autoscaling.mode=keda",
                           "monitoring.enabled=true", "planner.profile.kv_tokens=1000", "planner.profile.step_base_seconds=0.5"), planned("keda")),
    ("planner, hpa", sets("planner.enabled=true", "prefill.autoscaling.mode=hpa", "decode.autoscaling.mode=hpa",
                          "monitoring.enabled=true"), planned("hpa")),
    ("Kubernetes 1.20", [*sets("prefill.autoscaling.mode=hpa", "router.autoscaling.enabled=true"), "--kube-version", "1.20.2"], old),
    ("gpu, fp8", sets("prefill.device=cuda", "decode.device=cuda", "engine.quantize=fp8",
                      "prefill.resources.limits.memory=64Gi", "decode.resources.limits.memory=64Gi"), gpu),
    ("int8 on CPUs", sets("engine.quantize=int8"), int8),
    ("KV as int8 on its way", sets("engine.kvWire=int8"), kv_wire("int8")),
    ("KV as fp8 on its way", sets("engine.kvWire=fp8"), kv_wire("fp8")),
    ("rdma, hugepages", sets("prefill.rdma.enabled=true", "prefill.rdma.devices={mlx5_0,mlx5_1:1:3}", "prefill.rdma.require=true", "prefill.rdma.gpudirect=require", "prefill.resources.limits.rdma/hca_shared_devices_a=1",
                             "prefill.resources.limits.hugepages-2Mi=2Gi", "prefill.resources.limits.memory=8Gi"), rdma),
    ("model on a claim", sets("model.source=pvc", "model.pvc.claimName=models", "model.pvc.subPath=m"),
     model_from("persistentVolumeClaim")),
    ("model on the node", sets("model.source=hostPath", "model.hostPath.path=/mnt/m"), model_from("hostPath")),
    ("model by an init container", sets("model.source=init", "model.init.image=fetch:1", "model.init.args[0]=x",
                                        "model.init.env[0].name=A", "model.init.env[0].value=b"), model_from("emptyDir")),
    ("monitors", sets("monitoring.enabled=true", "monitoring.labels.release=kps"), monitors),
    ("alarms and dashboard", sets("monitoring.rules=true", "monitoring.dashboard=true", "monitoring.labels.release=kps"), alarms),
    ("egress", [*sets("networkPolicy.egress=true", "networkPolicy.monitoring[0].ipBlock.cidr=10.0.0.0/8"),
                "--set-json", 'networkPolicy.clients=[{"namespaceSelector":{}}]'], egress),
    ("tracing", sets("tracing.endpoint=http://otel:4317", "networkPolicy.egress=true", "tracing.ratio=0.1"), tracing),
    ("external etcd", sets("etcd.bundled.enabled=false", "etcd.endpoints={http://a:2379,http://b:2379}"), external),
    ("etcd with TLS and users", sets("etcd.bundled.enabled=false", "etcd.endpoints={https://a:2379}", "etcd.tls.secretName=certs",
                                     "etcd.auth.user=tandem", "etcd.auth.secretName=users"), secured_etcd),
    ("router with TLS and clients' certificates", sets("router.tls.secretName=front", "router.tls.clients=true", "planner.enabled=true",
                                                       "monitoring.enabled=true"), router_tls),
    ("cluster TLS by cert-manager", sets("clusterTls.enabled=true", "clusterTls.certManager.enabled=true", "planner.enabled=true",
                                         "clusterTls.certManager.issuerRef.name=inside", "monitoring.enabled=true",
                                         "clusterTls.certManager.issuerRef.kind=ClusterIssuer"),
     cluster_tls({"router": "llm-tandem-router-cluster", "prefill": "llm-tandem-prefill-cluster",
                  "decode": "llm-tandem-decode-cluster", "planner": "llm-tandem-reader-cluster"})),
    ("cluster TLS from Secrets", sets("clusterTls.enabled=true", "clusterTls.secrets.router=r", "clusterTls.secrets.prefill=p",
                                      "clusterTls.secrets.decode=d", "clusterTls.secrets.reader=x", "planner.enabled=true",
                                      "monitoring.enabled=true"),
     cluster_tls({"router": "r", "prefill": "p", "decode": "d", "planner": "x"})),
    ("cluster TLS beside RDMA", sets("clusterTls.enabled=true", "clusterTls.certManager.enabled=true",
                                     "clusterTls.certManager.issuerRef.name=inside", "prefill.rdma.enabled=true",
                                     "prefill.rdma.allowPlain=true"), plain_rdma),
    ("API keys", sets("apiKeys.secretName=keys", "apiKeys.plannerSecretName=planner-key", "planner.enabled=true"), api_keys),
    ("an image for each part", sets("image.tag=2.0.0", "decode.image.tag=1.9.0", "router.image.repository=reg/tandem",
                                    "router.image.digest=sha256:" + "a" * 64), images),
    ("placed on nodes", sets("decode.nodeSelector.gpu=h100", "decode.tolerations[0].key=nvidia.com/gpu", "decode.zone=b",
                             "decode.tolerations[0].operator=Exists", "decode.hostNetwork=true", "decode.runtimeClassName=nvidia",
                             "decode.extraArgs={--no-graphs}", "decode.extraEnv[0].name=LD_LIBRARY_PATH",
                             "decode.extraEnv[0].value=/x"), placed),
    ("bare", sets("networkPolicy.enabled=false", "serviceAccount.create=false", "router.pdb.enabled=false",
                  "prefill.pdb.enabled=false", "decode.pdb.enabled=false"), bare),
]

# One misspelt value at each level and part of the tree.
MISSPELT = [
    "prefill.switchRole=true", "planner.switchRole=true",
    "clusterTls.enable=true", "clusterTls.secrets.workers=x", "clusterTls.certManager.issuer=x", "clusterTls.certManager.issuerRef.names=x",
    "apiKeys.secret=x", "prefill.rdma.allow=true",
    "replica=2", "Prefill.replicas=2", "prefill.replica=2", "prefill.autoscaling.minReplica=1", "prefill.pdb.minAvailble=1",
    "prefill.resources.limit.cpu=1", "prefill.image.tags=x", "decode.kvMiB=1", "decode.tolerations[0].keys=x",
    "decode.topologySpread[0].topologyKeys=x", "decode.affinity.nodeAfinity.x=y", "router.service.ports=1", "router.rdma=true", "prefill.rdma.device=x",
    "router.autoscaling.mode=hpa", "etcd.endpoint=http://a:1", "etcd.bundled.enable=false", "etcd.tls.secret=x", "router.tls.secret=x", "etcd.auth.password=x", "engine.kvDtypes=bf16",
    "model.sources=pvc", "model.pvc.claim=x", "model.init.img=x", "log.level=info", "image.pullPolice=Always",
    "security.users=1", "serviceAccount.creates=true", "networkPolicy.egres=true", "networkPolicy.clients[0].pods=x",
    "monitoring.enable=true", "tracing.endpiont=http://a:1", "planner.sloTtft=1", "planner.profile.kvTokens=1", "prefill.extraEnv[0].nam=x",
]
OUT_OF_RANGE = [
    "router.maxConnections=0",
    "decode.roleSwitch=auto", "planner.cooldownSeconds=-1",
    "clusterTls.certManager.duration=90d", "clusterTls.certManager.issuerRef.kind=Vault",
    "prefill.replicas=-1", "prefill.replicas=two", "prefill.device=gpu", "prefill.autoscaling.mode=on", "prefill.kvMib=0",
    "prefill.progressSeconds=0", "decode.port=70000", "decode.pdb.maxUnavailable=101%", "decode.resources.limits.memory=lots",
    "decode.extraArgs={zone}", "engine.quantize=int4", "engine.kvDtype=fp16", "model.source=s3", "model.path=models/m",
    "security.user=0", "strategy=never", "router.service.type=Ingress", "etcd.endpoints={ftp://a:2379}",
    "etcd.endpoints={a:2379}", "image.digest=sha256:12", "prefill.gpuResource=gpu", "cluster=a/b", "tracing.ratio=2", "planner.sloItlSeconds=fast",
    "tracing.endpoint=otel:4317",
]
CONFLICTS = [
    (["planner.switchRoles=true", "decode.roleSwitch=true"], "needs planner.enabled"),
    (["planner.switchRoles=true", "planner.enabled=true"], "needs a pool whose workers may change"),
    (["planner.switchRoles=true", "planner.enabled=true", "decode.roleSwitch=true", "prefill.autoscaling.mode=hpa"], "fixed sizes"),
    (["etcd.endpoints={http://a:2379}"], "choose one"),
    (["etcd.bundled.enabled=false"], "no etcd"),
    (["etcd.bundled.enabled=false", "etcd.endpoints={https://a:2379}"], "needs etcd.tls.secretName"),
    (["etcd.bundled.enabled=false", "etcd.endpoints={http://a:2379}", "etcd.tls.secretName=x"], "is not https://"),
    (["router.tls.clients=true"], "needs router.tls.secretName"),
    (["clusterTls.enabled=true"], "clusterTls.secrets.router: name a Secret"),
    (["clusterTls.certManager.enabled=true"], "needs clusterTls.enabled"),
    (["clusterTls.enabled=true", "clusterTls.certManager.enabled=true"], "needs issuerRef.name"),
    (["clusterTls.enabled=true", "clusterTls.secrets.router=a", "clusterTls.secrets.prefill=b", "clusterTls.secrets.decode=c",
      "planner.enabled=true"], "clusterTls.secrets.reader"),
    (["clusterTls.enabled=true", "clusterTls.certManager.enabled=true", "clusterTls.certManager.issuerRef.name=x",
      "decode.rdma.enabled=true"], "what RDMA writes is not encrypted"),
    (["apiKeys.secretName=x", "planner.enabled=true"], "apiKeys.plannerSecretName"),
    (["apiKeys.plannerSecretName=x"], "needs apiKeys.secretName"),
    (["etcd.tls.secretName=x"], "are for an etcd of yours"),
    (["etcd.bundled.enabled=false", "etcd.endpoints={http://a:2379}", "etcd.auth.user=x"], "belong together"),
    (["model.source=pvc"], "model.pvc.claimName"),
    (["model.source=hostPath"], "model.hostPath.path"),
    (["model.source=init"], "model.init.image"),
    (["model.source=init", "model.init.image=x", "networkPolicy.egress=true"], "cut off the download"),
    (["model.source=init", "model.init.image=x", "model.path=/m"], "needs a folder above it"),
    (["prefill.autoscaling.minReplicas=9"], "minReplicas is above maxReplicas"),
    (["router.autoscaling.enabled=true", "router.autoscaling.minReplicas=9"], "minReplicas is above maxReplicas"),
    (["prefill.autoscaling.mode=hpa", "prefill.autoscaling.minReplicas=0"], "cannot count from 0"),
    (["prefill.autoscaling.mode=keda", "prefill.autoscaling.minReplicas=0"], "would never wake it"),
    (["planner.enabled=true", "decode.autoscaling.minReplicas=0"], "at least 1 with the planner"),
    (["decode.rdma.require=true"], "rdma.require needs"),
    (["decode.maxSurge=0"], "cannot both be 0"),
    (["engine.quantize=fp8"], "needs device cuda"),
    (["prefill.device=cuda", "prefill.threads=4"], "is for device cpu"),
]
