"""img2dataset on a benchmark's addresses; runs in the environment that `make bench-env` makes.

Reads a line of JSON with addresses and prints a line of JSON with the seconds of CPU (its own and
its children's) and of the clock, and the images.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import img2dataset


def cpu() -> float:
    """Seconds of CPU so far, of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    order = json.loads(sys.stdin.readline())
    with tempfile.TemporaryDirectory() as folder:
        addresses = Path(folder) / "urls.txt"
        addresses.write_text("\n".join(order["urls"]))
        started, clock = cpu(), time.monotonic()
        img2dataset.download(
            url_list=str(addresses),
            output_folder=f"{folder}/out",
            output_format="webdataset",
            image_size=256,
            resize_mode="keep_ratio",
            resize_only_if_bigger=True,
            encode_quality=95,
            extract_exif=False,
            processes_count=1,
            thread_count=64,
            timeout=30,
        )
        stats = [json.loads(path.read_text()) for path in Path(folder).glob("out/*_stats.json")]
    found = {
        "cpu": cpu() - started,
        "clock": time.monotonic() - clock,
        "images": sum(one["successes"] for one in stats),
    }
    print(json.dumps(found), file=answers)


if __name__ == "__main__":
    main()
