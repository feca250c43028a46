"""Images per CPU-second from URL to shard, for this package and for img2dataset 1.47.

A server on loopback, pinned to one core, has photographs of five sizes, 20 kB to 3 MB. Each program
builds one shard of the same URLs on the other core in one process: shorter side 256, quality 95.
CPU time is compared, since the machine may be shared, and only within one run. The startup time of
img2dataset is measured with a few URLs and subtracted. Needs `make bench-env` for img2dataset, and
openssl for certificates. The number of certificates in the bundle is printed, because a client that
reads them for each connection takes longer with more.

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
IMG2DATASET_PYTHON = HERE.parent / ".bench-venv" / "bin" / "python"
PHOTOGRAPHS = HERE.parents[1] / "shared" / "samples" / "coco" / "mini" / "train2017"
SIZES = {(320, 240): 15, (640, 480): 35, (1024, 768): 40, (2450, 1800): 8, (4000, 3000): 2}
"""Sizes of photographs, and their share in percent."""

POLITENESS = {"per_host": 64, "concurrency": 256}
NUM_STARTUP_URLS = 20


@dataclass(frozen=True)
class Server:
    """The origin of a server, and the bundle of certificates to verify it with."""

    origin: str
    certificates: Path

    def urls(self, names: Sequence[str]) -> list[str]:
        """A URL for each name, all different."""
        return [f"{self.origin}/{number}/{name}" for number, name in enumerate(names)]


def write_photographs(source: Path, folder: Path) -> dict[str, int]:
    """Write photographs of every size into `folder`; the weight of each, by name."""
    folder.mkdir()
    originals = sorted(source.glob("*.jpg"))[:40] or [None] * 40
    weights = {}
    for number, original in enumerate(originals):
        image = Image.open(original).convert("RGB") if original else smooth_noise(number)
        for size, weight in SIZES.items():
            name = f"{size[0]}-{number}.jpg"
            image.resize(size, Image.Resampling.LANCZOS).save(folder / name, quality=88)
            weights[name] = weight
    return weights


def smooth_noise(number: int) -> Image.Image:
    """Coloured noise, as smooth as a photograph."""
    noise = np.random.default_rng(number).integers(0, 255, (60, 80, 3), np.uint8)
    return Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)


@contextmanager
def serve(folder: Path, core: int, work: Path, *, tls: bool, latency: float) -> Iterator[Server]:
    """A server of the photographs."""
    options = ["--latency", str(latency)]
    bundle = work / "certificates.pem"
    if tls:
        options += ["--certificate", str(work / "cert.pem"), "--key", str(work / "key.pem")]
    command = [*pinned(core), sys.executable, HERE / "fetch_server.py", folder, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        port = process.stdout.readline().strip()
        try:
            yield Server(f"http{'s' if tls else ''}://localhost:{port}", bundle)
        finally:
            process.kill()


def write_certificates(work: Path) -> int:
    """Write a certificate for localhost into a bundle with Mozilla's; their number."""
    openssl = shutil.which("openssl")
    if not openssl:
        sys.exit("no openssl here to make a certificate with")
    request = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    about = ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", work / "key.pem", "-out", work / "cert.pem"]
    subprocess.run([openssl, *request, *about, *files], check=True, capture_output=True)
    mozilla = Path(certifi.where()).read_bytes()
    content = mozilla + (work / "cert.pem").read_bytes()
    (work / "certificates.pem").write_bytes(content)
    return content.count(b"BEGIN CERTIFICATE")


def pinned(core: int) -> list[str]:
    """The prefix of a command that pins it to one core."""
    return ["taskset", "-c", str(core)] if shutil.which("taskset") else []


def run(
    python: Path | str, script: str, core: int, server: Server, request: object
) -> dict[str, Any]:
    """The result that a worker prints for a request."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "SSL_CERT_FILE": str(server.certificates),
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }
    command = [*pinned(core), python, HERE / script]
    process = subprocess.run(
        command,
        input=json.dumps(request) + "\n",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        sys.exit(f"{script} failed:\n{process.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def run_ours(core: int, server: Server, urls: list[str], **more: object) -> dict[str, Any]:
    """The result of a build by this package."""
    origin = server.origin.replace("localhost", "127.0.0.1")
    request = {
        "urls": urls,
        "connect_to": {"localhost": origin},
        "politeness": POLITENESS,
        "photographs": [],
        **more,
    }
    return run(sys.executable, "fetch_worker.py", core, server, request)


def run_img2dataset(core: int, server: Server, urls: list[str]) -> dict[str, Any]:
    """The result of a build by img2dataset, without its startup."""
    script = "img2dataset_worker.py"
    startup = run(IMG2DATASET_PYTHON, script, core, server, {"urls": urls[:NUM_STARTUP_URLS]})
    total = run(IMG2DATASET_PYTHON, script, core, server, {"urls": urls})
    return {name: total[name] - startup[name] for name in startup}


def print_rate(name: str, result: dict[str, Any]) -> float:
    """Print one line of results; images per CPU-second."""
    rate = float(result["images"] / result["cpu"])
    line = f"{name:28} {rate:7.1f} images/CPU-s  {result['images'] / result['clock']:7.1f} images/s"
    if "mebibytes" in result:
        line += f"  {result['mebibytes']:5} MiB"
    print(line, flush=True)
    return rate


def compare(work: Path, weights: dict[str, int], num_urls: int, *, tls: bool) -> None:
    """Compare both programs over HTTP or HTTPS."""
    names = random.Random(0).choices(list(weights), list(weights.values()), k=num_urls)
    counts = Counter(names)
    photographs = [str(work / "photographs" / name) for name in counts]
    with serve(work / "photographs", 1, work, tls=tls, latency=0) as server:
        urls = server.urls(names)
        result = run_ours(0, server, urls, photographs=photographs, weights=list(counts.values()))
        scheme = "https" if tls else "http"
        rate = print_rate(f"{scheme}, ours", result)
        print(
            f"{'':28} {result['fetched'] / result['images'] / 1000:.0f} kB an image; "
            f"without fetching {num_urls / result['pure']:.1f} images/CPU-s; "
            f"with fetching {100 * result['pure'] / result['cpu']:.0f} % of that"
        )
        if IMG2DATASET_PYTHON.exists():
            theirs = print_rate(f"{scheme}, img2dataset", run_img2dataset(0, server, urls))
            print(f"{'':28} ratio {rate / theirs:.2f}")


def measure_latency(work: Path, weights: dict[str, int], num_urls: int) -> None:
    """Print the rate of this package with 0 and 200 ms before each response."""
    names = random.Random(1).choices(list(weights), list(weights.values()), k=num_urls)
    for latency in (0.0, 0.2):
        with serve(work / "photographs", 1, work, tls=False, latency=latency) as server:
            politeness = {"per_host": 256, "concurrency": 256}
            result = run_ours(0, server, server.urls(names), politeness=politeness)
            print_rate(f"latency {1000 * latency:.0f} ms", result)


def measure_memory(work: Path, weights: dict[str, int], num_urls: int) -> None:
    """Print the peak memory of a worker for growing numbers of URLs, and for large images."""
    Image.new("1", (14_000, 14_000)).save(work / "photographs" / "bomb.png")
    with serve(work / "photographs", 1, work, tls=False, latency=0) as server:
        for count in (num_urls // 4, num_urls, 2 * num_urls):
            names = random.Random(2).choices(list(weights), list(weights.values()), k=count)
            result = run_ours(0, server, server.urls(names))
            print(f"{count:6} URLs: {result['mebibytes']} MiB", flush=True)
        for name, path in {"300 MB body": "endless/300", "14,000 x 14,000 PNG": "bomb.png"}.items():
            result = run_ours(0, server, server.urls([path]))
            print(f"{name}: {result['mebibytes']} MiB, {result['failed']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=Path, default=PHOTOGRAPHS)
    parser.add_argument("--urls", type=int, default=1500)
    parser.add_argument("--only", choices=["http", "https", "latency", "memory"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        num_certificates = write_certificates(work)
        processor = platform.processor() or platform.machine()
        print(
            f"Python {platform.python_version()}, {ssl.OPENSSL_VERSION}, {processor}, "
            f"{os.cpu_count()} cores, {num_certificates} certificates, {options.urls} URLs"
        )
        weights = write_photographs(options.photographs, work / "photographs")
        for scheme in ("http", "https"):
            if options.only in {None, scheme}:
                compare(work, weights, options.urls, tls=scheme == "https")
        if options.only in {None, "latency"}:
            measure_latency(work, weights, options.urls)
        if options.only in {None, "memory"}:
            measure_memory(work, weights, options.urls)


if __name__ == "__main__":
    main()
