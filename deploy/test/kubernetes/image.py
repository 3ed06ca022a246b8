"""Image archives from local files, with the contents that the Dockerfile's stages have: no daemon, no registry.

usage: image.py TANDEM MODEL_DIR OUT_DIR    writes OUT_DIR/{pause,tandem-demo,etcd}.tar for `ctr images import`
"""

import hashlib
import io
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile


def libraries(binary):
    """The shared libraries that a program names, and its loader."""
    # A static program makes ldd fail, and names none.
    lines = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout.split()
    return [word for word in lines if word.startswith("/")]


class Layer:
    """One layer's tar, folders made as needed."""

    def __init__(self):
        self.bytes = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.bytes, mode="w")
        self.folders = set()

    def folder(self, path, mode=0o755):
        if path in self.folders or not path:
            return
        self.folder(path.rpartition("/")[0])
        self.folders.add(path)
        entry = tarfile.TarInfo(path)
        entry.type, entry.mode = tarfile.DIRTYPE, mode
        self.tar.addfile(entry)

    def file(self, source, target, mode=0o644):
        data = pathlib.Path(source).read_bytes()
        target = target.strip("/")
        self.folder(target.rpartition("/")[0])
        entry = tarfile.TarInfo(target)
        entry.size, entry.mode = len(data), mode
        self.tar.addfile(entry, io.BytesIO(data))

    def program(self, source, target):
        self.file(source, target, 0o755)
        for library in libraries(source):
            if library not in self.folders:
                self.folders.add(library)
                self.file(library, library, 0o755)

    def done(self):
        self.tar.close()
        return self.bytes.getvalue()


def archive(out, tag, layer, user, entrypoint):
    digest = hashlib.sha256(layer).hexdigest()
    config = json.dumps({
        "architecture": "amd64", "os": "linux",
        "config": {"Entrypoint": entrypoint, "User": user, "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/tmp"]},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + digest]}, "history": [{"created_by": "image.py"}],
    }).encode()
    name = hashlib.sha256(config).hexdigest()
    manifest = json.dumps([{"Config": f"{name}.json", "RepoTags": [tag], "Layers": [f"{digest}/layer.tar"]}]).encode()
    with tarfile.open(out, "w") as tar:
        for path, data in ((f"{name}.json", config), (f"{digest}/layer.tar", layer), ("manifest.json", manifest)):
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    print(f"{out}: {tag}, {len(layer) / 1e6:.0f} MB")


def main():
    tandem, model, out = (pathlib.Path(a) for a in sys.argv[1:4])
    out.mkdir(parents=True, exist_ok=True)
    busybox = "/bin/busybox"

    pause = Layer()
    pause.program(busybox, "bin/busybox")
    archive(out / "pause.tar", "localhost/pause:1", pause.done(), "65535", ["/bin/busybox", "sleep", "2147483647"])

    demo = Layer()
    demo.program(tandem, "usr/local/bin/tandem")
    demo.program(busybox, "bin/sleep")  # the image's own `sleep`, which preStop uses on old clusters
    for file in sorted(model.iterdir()):
        demo.file(file, f"models/{model.name}/{file.name}")
    demo.folder("tmp", 0o1777)
    archive(out / "tandem-demo.tar", "docker.io/library/tandem-demo:0.1.0", demo.done(), "65532:65532", ["tandem"])

    etcd = Layer()
    etcd.program(shutil.which("etcd"), "usr/bin/etcd")
    archive(out / "etcd.tar", "localhost/etcd:3.4", etcd.done(), "65532:65532", ["etcd"])


main()
