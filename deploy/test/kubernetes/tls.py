"""The step of verify.py with certificates: an authority of our own, Secrets, an upgrade from plain to TLS, and what
is refused then."""

import pathlib
import subprocess
import tempfile

NAMES = {
    "router": "URI:tandem://router",
    "prefill": "URI:tandem://worker/demo-tandem-prefill-*",
    "decode": "URI:tandem://worker/demo-tandem-decode-*",
    "reader": "DNS:reader",
}


def openssl(folder, *args):
    subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)


def authority(folder):
    openssl(folder, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
            "-subj", "/CN=tandem-ca", "-keyout", "ca.key", "-out", "ca.pem")


def certificate(folder, name, subject_names):
    openssl(folder, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
            "-keyout", f"{name}.key", "-out", f"{name}.csr")
    (folder / f"{name}.ext").write_text(f"subjectAltName={subject_names}")
    openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30",
            "-extfile", f"{name}.ext", "-out", f"{name}.pem")


def secrets(v, folder):
    authority(folder)
    host = v.address().split(":")[0]
    certificate(folder, "clients", f"IP:{host},DNS:demo-tandem,DNS:demo-tandem-routers")
    for part, names in NAMES.items():
        certificate(folder, part, names)
    for name in ("clients", *NAMES):
        v.kubectl("delete", "secret", f"tls-{name}", show=False, check=False)
        v.kubectl("create", "secret", "generic", f"tls-{name}", f"--from-file=tls.crt={folder}/{name}.pem",
                  f"--from-file=tls.key={folder}/{name}.key", f"--from-file=ca.crt={folder}/ca.pem", show=False)


def verify(v):
    v.say("\n## TLS on every link\n\n```")
    folder = pathlib.Path(tempfile.mkdtemp())
    secrets(v, folder)
    v.say("$ kubectl -n serving create secret generic tls-clients|tls-router|tls-prefill|tls-decode|tls-reader --from-file=...")
    sets = ["router.tls.secretName=tls-clients", "clusterTls.enabled=true"]
    sets += [f"clusterTls.secrets.{part}=tls-{part}" for part in NAMES]
    v.helm("upgrade", "demo", v.CHART, "--reset-then-reuse-values", *[x for s in sets for x in ("--set", s)], "--wait", "--timeout", "240s",
           keep=lambda _: "")
    for part in ("router", "prefill", "decode"):
        v.expect(v.pods(part) and all(ready for _, _, ready in v.pods(part).values()), f"{part} is ready over TLS")
    question = ["--max-tokens", "24", "What is the capital of France?"]
    done = call(v, f"https://{v.address()}", ["--ca", folder / "ca.pem"], question)
    v.say('$ tandem generate --addr https://SERVICE:50051 --ca ca.pem "What is the capital of France?"\n' + done.stdout.strip())
    v.expect(done.returncode == 0 and "Paris" in done.stdout, "answered over TLS")
    v.expect("over tcp" in done.stderr, "the KV went from pod to pod")
    plain = call(v, v.address(), [], question)
    v.say("$ tandem generate --addr SERVICE:50051 ...\n" + plain.stderr.strip()[-300:])
    v.expect(plain.returncode != 0, "plain text is refused")
    authority(folder)
    stranger = call(v, f"https://{v.address()}", ["--ca", folder / "ca.pem"], question)
    v.say("$ tandem generate --addr https://SERVICE:50051 --ca another.pem ...\n" + stranger.stderr.strip()[-300:])
    v.expect(stranger.returncode != 0, "a router of another authority is refused")
    v.say("```")


def call(v, address, flags, question):
    command = [*v.INSIDE, v.TANDEM, "generate", "--addr", address, *flags, *question]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=60)
