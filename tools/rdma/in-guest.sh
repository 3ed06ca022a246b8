#!/usr/bin/env bash
# Runs a command inside a small kernel of its own with soft-RoCE devices; the host's files are seen read-only, its
# network not at all. A cargo runner too: CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=tools/rdma/in-guest.sh
# GUEST_MEM (2G) and GUEST_SECONDS (300) bound it. Variables RUST*, CARGO*, TANDEM* and NEXTEST* are passed on.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
kernel=$("$here/build-guest.sh") || exit 125
job=$(mktemp -d /var/tmp/tandem-guest.XXXXXX)
trap 'rm -rf "$job"' EXIT
head -c 256 /dev/urandom >"$job/seed"
{
  echo "cd $(printf %q "$PWD")"
  export -p | grep -E '^declare -x (RUST|CARGO|TANDEM|NEXTEST)'
  printf 'exec'; printf ' %q' "$@"; echo
} >"$job/command"
TMPDIR=/dev/shm timeout "${GUEST_SECONDS:-300}" "$kernel" rootfstype=hostfs rootflags=/ ro mem="${GUEST_MEM:-2G}" \
  con0=null,fd:1 con=null init="$here/guest-init.sh" job="$job" quiet loglevel=1 panic=-1 </dev/null >"$job/console" 2>&1
cat "$job/output" 2>/dev/null
if [ -f "$job/status" ]; then exit "$(<"$job/status")"; fi
echo "the guest died or ran out of time; its console:" >&2
tail -20 "$job/console" >&2
exit 125
