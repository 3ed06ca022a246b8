#!/usr/bin/env bash
# A real single-node Kubernetes 1.20.2 for verify.py, built from Debian bookworm's source package: no registry, no
# download from elsewhere. About 10 CPU minutes and 2.3 GB, once. Needs root, a deb-src entry, and cgroups.
#   build.sh [DIR]     DIR: default ~/.cache/tandem/kubernetes
set -euo pipefail
home=${1:-$HOME/.cache/tandem/kubernetes}
mkdir -p "$home/src" "$home/bin" "$home/gohome"
[ -x "$home/bin/kube-proxy" ] && { echo "$home/bin is complete"; exit 0; }

apt-get install -y -qq --no-install-recommends rsync make gcc dpkg-dev golang-1.19-go golang-github-modern-go-reflect2-dev \
  containerd runc containernetworking-plugins busybox conntrack iptables etcd-server dnsmasq-base >&2

cd "$home/src"
apt-get source -qq --download-only kubernetes=1.20.5+really1.20.2-1.1+deb12u1
[ -d kubernetes-1.20.2 ] || { mkdir kubernetes-1.20.2; tar xzf kubernetes_1.20.5*orig.tar.gz -C kubernetes-1.20.2 --strip-components=1; }
cd kubernetes-1.20.2

# The vendored reflect2 corrupts memory with Go 1.18 and later; Debian's newer one does not.
vendored=vendor/github.com/modern-go/reflect2
rm -f $vendored/*.go $vendored/*.s
cp -L /usr/share/gocode/src/github.com/modern-go/reflect2/*.go $vendored/
cp -L /usr/share/gocode/src/github.com/modern-go/reflect2/*.s $vendored/ 2>/dev/null || true
rm -f $vendored/*_test.go

mkdir -p .go/src/k8s.io
[ -L .go/src/k8s.io/kubernetes ] || ln -s ../../.. .go/src/k8s.io/kubernetes
printf "KUBE_GIT_COMMIT='%040d'\nKUBE_GIT_TREE_STATE='archive'\nKUBE_GIT_VERSION='v1.20.2'\nKUBE_GIT_MAJOR='1'\nKUBE_GIT_MINOR='20'\n" 0 > "$home/version.sh"
export GOROOT=/usr/lib/go-1.19 PATH=/usr/lib/go-1.19/bin:$PATH HOME="$home/gohome" GOCACHE="$home/gocache" GOPATH=$PWD/.go
export CGO_ENABLED=0 GOPROXY=off GOFLAGS='' KUBE_GIT_VERSION_FILE="$home/version.sh" KUBE_BUILD_PLATFORMS=linux/amd64 GOLDFLAGS="-s -w"
make WHAT="cmd/kube-apiserver cmd/kube-controller-manager cmd/kube-scheduler cmd/kubelet cmd/kube-proxy"
cp _output/local/bin/linux/amd64/kube* "$home/bin/"
echo "$home/bin is complete"
