#!/usr/bin/env bash
# Builds the test binaries and runs those tests that need RDMA, each in a kernel of its own with soft-RoCE devices.
# Without arguments all of them; else only those whose name contains the argument.
set -euo pipefail
cd "$(dirname "$0")/../.."
need=()
for package in rdma-core ibverbs-providers libibverbs1 iproute2 busybox; do
  dpkg -s "$package" >/dev/null 2>&1 || need+=("$package")
done
if [ ${#need[@]} -gt 0 ]; then
  sudo=""; [ "$(id -u)" -eq 0 ] || sudo=sudo
  $sudo apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${need[@]}"
fi
TANDEM_RDMA_KERNEL=$(tools/rdma/build-guest.sh); export TANDEM_RDMA_KERNEL RUST_BACKTRACE=0

binaries=$(cargo test --no-run --message-format=json -p kv-transport --lib --test rdma --test gpudirect --test tls -p tandem-tests --test rdma |
  python3 -c 'import json, sys
for line in sys.stdin:
    built = json.loads(line)
    if built.get("executable") and built["profile"]["test"]: print(built["executable"])')
failed=0; ran=0
for binary in $binaries; do
  for test in $("$binary" --list --ignored 2>/dev/null | sed -n 's/: test$//p' | grep -v '^role_'); do
    [[ -z "${1:-}" || "$test" == *"$1"* ]] || continue
    ran=$((ran + 1)); started=$(date +%s)
    if output=$(tools/rdma/in-guest.sh "$binary" --ignored --exact "$test" --nocapture 2>&1); then
      echo "ok    $(($(date +%s) - started)) s  $test"
    else
      failed=$((failed + 1)); echo "FAILED      $test"; echo "$output"
    fi
  done
done
echo "$ran tests over RDMA, $failed failed"
[ "$ran" -gt 0 ] && [ "$failed" -eq 0 ]
