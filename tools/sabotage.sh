#!/usr/bin/env bash
# Breaks one protection of the transport at a time and shows that the model check catches it.
# A broken build that passes, or that fails for another reason, is an error here.
set -uo pipefail
cd "$(dirname "$0")/.."
status=0
for protection in fencing checksum quarantine; do
    output=$(cargo test -q -p kv-transport --features "sabotage-$protection" --test model invariant 2>&1)
    found=$(grep -m1 -oE 'Unexpected ".*" counterexample' <<<"$output")
    if [ -n "$found" ]; then
        echo "$protection off: caught: $found"
    else
        echo "$protection off: NOT caught"
        tail -20 <<<"$output"
        status=1
    fi
done
exit $status
