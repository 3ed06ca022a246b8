"""Checks Dockerfile and compose.yaml without a container engine: hadolint, the compose specification, flags, health checks.

usage: images.py TOOLS [TANDEM]   with the binary also: its flags, and compose's health check against a real router
"""

import json
import pathlib
import shlex
import socket
import subprocess
import sys
import time

TOOLS = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(TOOLS / "python"))

import compose_spec  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
failures = []


def check(ok, what):
    if not ok:
        failures.append(what)
        print(f"FAIL {what}")


def dockerfile():
    done = subprocess.run([TOOLS / "python/bin/hadolint", "Dockerfile"], capture_output=True, text=True, cwd=ROOT, check=False)
    check(done.returncode == 0, f"hadolint: {done.stdout}{done.stderr}")
    print("ok   hadolint on the Dockerfile")


def specified(text):
    """The file with its YAML merges applied, as the compose specification's model sees it."""
    options = compose_spec.PyOptions()
    options.apply_merge = True
    whole = json.loads(options.from_yaml(text).to_json())
    compose_spec.ComposeSpecification.model_validate(whole)
    return whole


def compose():
    text = (ROOT / "compose.yaml").read_text()
    services = specified(text)["services"]
    check(set(services) == {"etcd", "router", "prefill", "decode"}, f"services {sorted(services)}")
    for name, service in services.items():
        check(service.get("read_only") and service.get("cap_drop") == ["ALL"], f"{name}: writable root or capabilities")
        check("healthcheck" in service, f"{name}: no health check")
    try:
        specified(text.replace("healthcheck:", "healthchek:", 1))
        check(False, "a misspelt key was not refused, so this check sees nothing")
    except ValueError as error:
        check("healthchek" in str(error), f"refused for another reason: {error}")
    print("ok   compose.yaml follows the compose specification")
    return services


def tandem_arguments(service):
    """The arguments of `tandem` in a service's command."""
    command = service["command"]
    if service.get("entrypoint"):
        return shlex.split(command[0].replace("$$", "$"))[2:]
    return command


def flags(services, tandem):
    for name in ("router", "prefill", "decode"):
        arguments = tandem_arguments(services[name])
        text = subprocess.run([tandem, arguments[0], "--help"], capture_output=True, text=True, check=True).stdout
        for argument in arguments[1:]:
            check(f"{argument.split('=')[0]} " in text, f"compose {name}: tandem {arguments[0]} has no {argument}")
    print("ok   the binary has every flag of compose.yaml")


def health(services, tandem, model):
    """Compose's health check says no without a router and yes with one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    test = [part.replace("50051", port) for part in services["router"]["healthcheck"]["test"][1:]]
    ask = lambda: subprocess.run(test, capture_output=True, check=False, timeout=10).returncode
    check(ask() != 0, "the health check says yes without a router")
    router = subprocess.Popen([tandem, "router", "--model", model, "--listen", f"127.0.0.1:{port}"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while ask() != 0 and time.monotonic() < deadline:
            time.sleep(0.1)
        check(ask() == 0, "the health check says no to a ready router")
    finally:
        router.terminate()
        router.wait(timeout=60)
    print("ok   compose's health check against a real router")


def main():
    dockerfile()
    services = compose()
    if len(sys.argv) > 3:
        flags(services, sys.argv[2])
        health(services, sys.argv[2], sys.argv[3])
    print(f"images: {len(failures)} failures")
    sys.exit(1 if failures else 0)


main()
