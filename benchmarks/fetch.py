"""Images per CPU-second from address to shard, by us and by img2dataset 1.47, from one server.

A server on loopback, on a core of its own, has real photographs of five sizes, 20 kB to 3 MB. Each
side builds one shard of the same addresses on the other core with one process: shorter side 256,
quality 95. CPU time is compared, since others may be using the machine, and only within a run. What
img2dataset needs to start is measured with a few addresses and left out. Needs `make bench-env` for
the other side, and openssl for certificates; their number in the bundle is printed, since a client
that reads them for each connection pays for each.

    python benchmarks/fetch.py --photographs ../shared/samples/coco/mini/train2017
"""

import argparse
import json
import os
import platform
import random
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import certifi
import numpy as np
from PIL import Image

HERE = Path(__file__).parent
THEIR_PYTHON = HERE.parent / ".bench-venv" / "bin" / "python"
PHOTOGRAPHS = HERE.parents[1] / "shared" / "samples" / "coco" / "mini" / "train2017"
SIZES = {(320, 240): 15, (640, 480): 35, (1024, 768): 40, (2450, 1800): 8, (4000, 3000): 2}
"""Sizes of photographs, and how many in a hundred have them."""

MANNERS = {"per_host": 64, "concurrency": 256}
FEW = 20


@dataclass(frozen=True)
class Place:
    """Where a server is asked, and by which certificates."""

    origin: str
    certificates: Path

    def urls(self, names: Sequence[str]) -> list[str]:
        """An address for each name, no two alike."""
        return [f"{self.origin}/{number}/{name}" for number, name in enumerate(names)]


def write_photographs(source: Path, folder: Path) -> dict[str, int]:
    """Photographs of every size in `folder`; how often each should be asked for, by name."""
    folder.mkdir()
    originals = sorted(source.glob("*.jpg"))[:40] or [None] * 40
    weights = {}
    for number, original in enumerate(originals):
        image = Image.open(original).convert("RGB") if original else drawn(number)
        for size, weight in SIZES.items():
            name = f"{size[0]}-{number}.jpg"
            image.resize(size, Image.Resampling.LANCZOS).save(folder / name, quality=88)
            weights[name] = weight
    return weights


def drawn(number: int) -> Image.Image:
    """Coloured noise, smooth as photographs are."""
    noise = np.random.default_rng(number).integers(0, 255, (60, 80, 3), np.uint8)
    return Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)


@contextmanager
def served(folder: Path, core: int, work: Path, *, tls: bool, latency: float) -> Iterator[Place]:
    """A server of the photographs."""
    options = ["--latency", str(latency)]
    bundle = work / "certificates.pem"
    if tls:
        options += ["--certificate", str(work / "cert.pem"), "--key", str(work / "key.pem")]
    command = [*pinned(core), sys.executable, HERE / "fetch_server.py", folder, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        port = server.stdout.readline().strip()
        try:
            yield Place(f"http{'s' if tls else ''}://localhost:{port}", bundle)
        finally:
            server.kill()


def write_certificates(work: Path) -> int:
    """A certificate for localhost in a bundle with the usual ones; how many those are together."""
    openssl = shutil.which("openssl")
    if not openssl:
        sys.exit("no openssl here to make a certificate with")
    request = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    about = ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", work / "key.pem", "-out", work / "cert.pem"]
    subprocess.run([openssl, *request, *about, *files], check=True, capture_output=True)
    usual = Path(certifi.where()).read_bytes()
    content = usual + (work / "cert.pem").read_bytes()
    (work / "certificates.pem").write_bytes(content)
    return content.count(b"BEGIN CERTIFICATE")


def pinned(core: int) -> list[str]:
    """What goes before a command so that it runs on one core."""
    return ["taskset", "-c", str(core)] if shutil.which("taskset") else []


def run(python: Path | str, script: str, core: int, place: Place, order: object) -> dict[str, Any]:
    """What a worker prints of an order."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "SSL_CERT_FILE": str(place.certificates),
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }
    command = [*pinned(core), python, HERE / script]
    asked = json.dumps(order) + "\n"
    done = subprocess.run(
        command, input=asked, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ours(core: int, place: Place, urls: list[str], **more: object) -> dict[str, Any]:
    """A build by us."""
    origin = place.origin.replace("localhost", "127.0.0.1")
    order = {
        "urls": urls,
        "places": {"localhost": origin},
        "manners": MANNERS,
        "photographs": [],
        **more,
    }
    return run(sys.executable, "fetch_worker.py", core, place, order)


def theirs(core: int, place: Place, urls: list[str]) -> dict[str, Any]:
    """A build by img2dataset, without what it takes to start."""
    few = run(THEIR_PYTHON, "img2dataset_worker.py", core, place, {"urls": urls[:FEW]})
    all_of_them = run(THEIR_PYTHON, "img2dataset_worker.py", core, place, {"urls": urls})
    return {name: all_of_them[name] - few[name] for name in few}


def show(name: str, found: dict[str, Any]) -> float:
    """Print a line; images per CPU-second."""
    rate = float(found["images"] / found["cpu"])
    line = f"{name:28} {rate:7.1f} images/CPU-s  {found['images'] / found['clock']:7.1f} images/s"
    if "mebibytes" in found:
        line += f"  {found['mebibytes']:5} MiB"
    print(line, flush=True)
    return rate


def compare(work: Path, weights: dict[str, int], num_urls: int, *, tls: bool) -> None:
    """Both sides over HTTP or HTTPS."""
    names = random.Random(0).choices(list(weights), list(weights.values()), k=num_urls)
    counts = Counter(names)
    photographs = [str(work / "photographs" / name) for name in counts]
    with served(work / "photographs", 1, work, tls=tls, latency=0) as place:
        urls = place.urls(names)
        mine = ours(0, place, urls, photographs=photographs, weights=list(counts.values()))
        scheme = "https" if tls else "http"
        rate = show(f"{scheme}, ours", mine)
        print(
            f"{'':28} {mine['fetched'] / mine['images'] / 1000:.0f} kB an image; "
            f"pure pixels {num_urls / mine['pure']:.1f} images/CPU-s; "
            f"we reach {100 * mine['pure'] / mine['cpu']:.0f} % of that"
        )
        if THEIR_PYTHON.exists():
            print(
                f"{'':28} ratio {rate / show(f'{scheme}, img2dataset', theirs(0, place, urls)):.2f}"
            )


def show_latency(work: Path, weights: dict[str, int], num_urls: int) -> None:
    """What 200 ms before each answer cost us."""
    names = random.Random(1).choices(list(weights), list(weights.values()), k=num_urls)
    for latency in (0.0, 0.2):
        with served(work / "photographs", 1, work, tls=False, latency=latency) as place:
            manners = {"manners": {"per_host": 256, "concurrency": 256}}
            show(f"latency {1000 * latency:.0f} ms", ours(0, place, place.urls(names), **manners))


def show_memory(work: Path, weights: dict[str, int], num_urls: int) -> None:
    """The most memory of a worker, for more and more addresses and for what is too large."""
    Image.new("1", (14_000, 14_000)).save(work / "photographs" / "bomb.png")
    with served(work / "photographs", 1, work, tls=False, latency=0) as place:
        for count in (num_urls // 4, num_urls, 2 * num_urls):
            names = random.Random(2).choices(list(weights), list(weights.values()), k=count)
            found = ours(0, place, place.urls(names))
            print(f"{count:6} addresses: {found['mebibytes']} MiB", flush=True)
        for name, path in {"300 MB body": "endless/300", "14,000 x 14,000 PNG": "bomb.png"}.items():
            found = ours(0, place, place.urls([path]))
            print(f"{name}: {found['mebibytes']} MiB, {found['failed']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=Path, default=PHOTOGRAPHS)
    parser.add_argument("--urls", type=int, default=1500)
    parser.add_argument("--only", choices=["http", "https", "latency", "memory"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        num_certificates = write_certificates(work)
        processor = platform.processor() or platform.machine()
        print(
            f"Python {platform.python_version()}, {ssl.OPENSSL_VERSION}, {processor}, "
            f"{os.cpu_count()} cores, {num_certificates} certificates, {given.urls} addresses"
        )
        weights = write_photographs(given.photographs, work / "photographs")
        for scheme in ("http", "https"):
            if given.only in {None, scheme}:
                compare(work, weights, given.urls, tls=scheme == "https")
        if given.only in {None, "latency"}:
            show_latency(work, weights, given.urls)
        if given.only in {None, "memory"}:
            show_memory(work, weights, given.urls)


if __name__ == "__main__":
    main()
