#!/usr/bin/env bash
# One Kubernetes node with real pods, in a network namespace of its own: API server, controllers, scheduler, containerd,
# kubelet, kube-proxy, and a name server that knows the Services.
#   node.sh up [DIR]      DIR as build.sh filled it; kubectl and helm: DIR/kubeconfig, inside `nsenter --net=/run/netns/tandem-k8s`
#   node.sh down [DIR]    ends everything that `up` started, by process id
set -euo pipefail
verb=${1:?up or down}
home=${2:-$HOME/.cache/tandem/kubernetes}
here=$(cd "$(dirname "$0")" && pwd)
netns=tandem-k8s
inside="nsenter --net=/run/netns/$netns"
address=10.79.0.1
mkdir -p "$home"/{run,log,pki,etcd,ctd/net.d,kubelet}
cd "$home"

start() { # start NAME COMMAND...: in the background, its process id kept
  local name=$1; shift
  setsid $inside "$@" > "log/$name" 2>&1 < /dev/null &
  echo $! > "run/$name"
}

network() {
  ip netns add $netns
  ip -n $netns link set lo up
  ip -n $netns link add node0 type bridge
  ip -n $netns addr add $address/24 dev node0
  ip -n $netns link set node0 up
  ip -n $netns route add default dev node0
  $inside sysctl -qw net.ipv4.ip_forward=1
}

certificates() {
  [ -f pki/proxy.crt ] && return
  openssl genrsa -out pki/sa.key 2048
  openssl req -x509 -newkey rsa:2048 -nodes -keyout pki/ca.key -out pki/ca.crt -days 365 -subj /CN=ca
  openssl req -newkey rsa:2048 -nodes -keyout pki/proxy.key -out pki/proxy.csr -subj /CN=agg
  openssl x509 -req -in pki/proxy.csr -CA pki/ca.crt -CAkey pki/ca.key -CAcreateserial -out pki/proxy.crt -days 365
} 2>/dev/null

settings() {
  echo 'admin-token,admin,admin,"system:masters"' > pki/tokens.csv
  cat > kubeconfig <<K
apiVersion: v1
kind: Config
clusters: [{name: l, cluster: {server: "https://127.0.0.1:26443", insecure-skip-tls-verify: true}}]
users: [{name: a, user: {token: admin-token}}]
contexts: [{name: c, context: {cluster: l, user: a}}]
current-context: c
K
  cat > kubelet.yaml <<K
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 0.0.0.0
readOnlyPort: 0
healthzBindAddress: 127.0.0.1
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failSwapOn: false
evictionHard: {nodefs.available: "1%", imagefs.available: "1%", memory.available: "50Mi"}
clusterDomain: cluster.local
clusterDNS: [$address]
imageGCHighThresholdPercent: 100
nodeStatusUpdateFrequency: 5s
syncFrequency: 5s
fileCheckFrequency: 5s
K
  cat > ctd/config.toml <<K
version = 2
root = "$home/ctd/root"
state = "$home/ctd/state"
disabled_plugins = ["io.containerd.internal.v1.opt","io.containerd.snapshotter.v1.aufs","io.containerd.snapshotter.v1.btrfs","io.containerd.snapshotter.v1.zfs","io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "$home/ctd/c.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$home/ctd/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
K
  cat > ctd/net.d/10-b.conflist <<K
{"cniVersion":"0.4.0","name":"pods","plugins":[{"type":"bridge","bridge":"cni0","isGateway":true,"ipMasq":false,"hairpinMode":true,
"ipam":{"type":"host-local","dataDir":"$home/ctd/ipam","ranges":[[{"subnet":"10.78.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
{"type":"portmap","capabilities":{"portMappings":true}}]}
K
}

control_plane() {
  rm -rf etcd
  start etcd etcd --name k --data-dir etcd --listen-client-urls http://127.0.0.1:25379 --advertise-client-urls http://127.0.0.1:25379 \
    --listen-peer-urls http://127.0.0.1:25380 --initial-advertise-peer-urls http://127.0.0.1:25380 \
    --initial-cluster k=http://127.0.0.1:25380 --unsafe-no-fsync --log-level warn
  start api bin/kube-apiserver --etcd-servers=http://127.0.0.1:25379 --bind-address=127.0.0.1 --advertise-address=127.0.0.1 \
    --secure-port=26443 --insecure-port=0 --cert-dir=pki --service-account-key-file=pki/sa.key \
    --service-account-signing-key-file=pki/sa.key --service-account-issuer=https://kubernetes.default.svc \
    --token-auth-file=pki/tokens.csv --authorization-mode=RBAC --service-cluster-ip-range=10.96.0.0/24 --allow-privileged=true \
    --endpoint-reconciler-type=none --kubelet-preferred-address-types=InternalIP --client-ca-file=pki/ca.crt \
    --requestheader-client-ca-file=pki/ca.crt --requestheader-allowed-names=agg --requestheader-username-headers=X-Remote-User \
    --requestheader-group-headers=X-Remote-Group --requestheader-extra-headers-prefix=X-Remote-Extra- \
    --proxy-client-cert-file=pki/proxy.crt --proxy-client-key-file=pki/proxy.key --disable-admission-plugins=ServiceAccount
  for _ in $(seq 240); do
    $inside curl -sk https://127.0.0.1:26443/readyz 2>/dev/null | grep -qx ok && break
    sleep 0.25
  done
  local common="--kubeconfig=kubeconfig --authentication-skip-lookup=true --bind-address=127.0.0.1 --port=0 --leader-elect=false --cert-dir=pki"
  start controllers bin/kube-controller-manager $common --secure-port=26257 --service-account-private-key-file=pki/sa.key \
    --use-service-account-credentials=false --controllers='*,-ttl,-cloud-node-lifecycle,-service,-route,-attachdetach,-persistentvolume-binder,-bootstrapsigner,-tokencleaner,-csrsigning' \
    --horizontal-pod-autoscaler-sync-period=2s --horizontal-pod-autoscaler-downscale-stabilization=5s --concurrent-deployment-syncs=2
  start scheduler bin/kube-scheduler $common --secure-port=26259
}

node() {
  start containerd containerd -c ctd/config.toml
  for _ in $(seq 100); do [ -S ctd/c.sock ] && break; sleep 0.1; done
  sleep 1
  for image in images/*.tar; do ctr -a ctd/c.sock -n k8s.io images import "$image"; done
  start kubelet bin/kubelet --config kubelet.yaml --kubeconfig kubeconfig --hostname-override=n1 --node-ip=$address \
    --root-dir="$home/kubelet" --cert-dir=pki --container-runtime=remote --container-runtime-endpoint="unix://$home/ctd/c.sock" \
    --network-plugin=cni
  start proxy bin/kube-proxy --kubeconfig=kubeconfig --hostname-override=n1 --cluster-cidr=10.78.0.0/24 --proxy-mode=iptables \
    --conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0
  mkdir -p hosts
  start dns dnsmasq --keep-in-foreground --no-resolv --no-hosts --hostsdir="$home/hosts" --listen-address=$address --bind-interfaces \
    --local=/cluster.local/ --log-facility=- --pid-file= --user=root
  start services "$here/services.sh" "$home"
}

down() {
  for name in services dns proxy kubelet; do [ -f run/$name ] && kill "$(cat run/$name)" 2>/dev/null; done
  sleep 1
  if [ -S ctd/c.sock ]; then
    for task in $(ctr -a ctd/c.sock -n k8s.io task ls -q 2>/dev/null); do ctr -a ctd/c.sock -n k8s.io task kill -s 9 "$task" 2>/dev/null; done
    sleep 2
  fi
  for name in containerd controllers scheduler api etcd; do [ -f run/$name ] && kill "$(cat run/$name)" 2>/dev/null; done
  sleep 1
  mount | grep -o "$home/\(ctd\|kubelet\)[^ ]*" | sort -r | while read -r at; do umount "$at" 2>/dev/null; done
  ip netns list | awk '/^cni-/{print $1}' | while read -r name; do ip netns del "$name"; done
  ip netns del $netns 2>/dev/null
  rm -rf run ctd/c.sock hosts
}

case $verb in
  up) network; certificates; settings; control_plane; node; echo "up: export KUBECONFIG=$home/kubeconfig; $inside kubectl get nodes" ;;
  down) set +e; down; true ;;
  *) echo "up or down" >&2; exit 2 ;;
esac
