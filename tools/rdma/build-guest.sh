#!/usr/bin/env bash
# Builds a User-Mode-Linux kernel with soft-RoCE from Debian's kernel source and prints its path. Once: about 9
# CPU-minutes and 1.7 GB of scratch space; afterwards it is found in the cache. TANDEM_RDMA_KERNEL names one to use.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ -n "${TANDEM_RDMA_KERNEL:-}" ]; then echo "$TANDEM_RDMA_KERNEL"; exit 0; fi

# The recipe is part of the name: another configuration is another kernel.
recipe=$(cat "$here/guest.config" "$here/build-guest.sh" | sha256sum | cut -c1-12)
cache=${CACHE:-$HOME/.cache/tandem}/rdma-guest
kernel=$cache/linux-$recipe
if [ -x "$kernel" ]; then echo "$kernel"; exit 0; fi

mkdir -p "$cache"
if ! dpkg -s linux-source-6.1 flex bison bc libelf-dev >/dev/null 2>&1; then
  sudo=""; [ "$(id -u)" -eq 0 ] || sudo=sudo
  $sudo apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends \
    linux-source-6.1 flex bison bc libelf-dev gcc make xz-utils >&2
fi
scratch=$(mktemp -d "$cache/build.XXXX")
trap 'rm -rf "$scratch"' EXIT
echo "building a guest kernel with soft-RoCE, once; log: $cache/build.log" >&2
tar -C "$scratch" -xf /usr/src/linux-source-6.1.tar.xz
cd "$scratch/linux-source-6.1"
kmake() { make ARCH=um SUBARCH=x86_64 O="$scratch/out" "$@"; }
{
  kmake tinyconfig
  scripts/kconfig/merge_config.sh -m -O "$scratch/out" "$scratch/out/.config" "$here/guest.config"
  kmake olddefconfig
  # What tinyconfig left says 32 bits and would make the first build fail.
  rm -f "$scratch/out/include/config/auto.conf"
  kmake syncconfig
  for option in RDMA_RXE INFINIBAND_USER_ACCESS HOSTFS 64BIT; do
    grep -q "^CONFIG_$option=y" "$scratch/out/.config" || { echo "missing CONFIG_$option"; exit 1; }
  done
  kmake -j"${JOBS:-$(nproc)}" linux
} >"$cache/build.log" 2>&1 || { tail -20 "$cache/build.log" >&2; exit 1; }
strip -o "$kernel.new" "$scratch/out/linux"
mv "$kernel.new" "$kernel"
echo "$kernel"
