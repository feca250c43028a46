"""img2dataset on a benchmark's URLs; runs in the environment of `make bench-env`.

Reads a request as one line of JSON and prints one line of JSON with CPU seconds (of this process
and its children), wall-clock seconds, and the number of images.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import img2dataset


def cpu() -> float:
    """CPU seconds so far, of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    results, sys.stdout = sys.stdout, sys.stderr
    request = json.loads(sys.stdin.readline())
    with tempfile.TemporaryDirectory() as folder:
        url_list = Path(folder) / "urls.txt"
        url_list.write_text("\n".join(request["urls"]))
        started, clock = cpu(), time.monotonic()
        img2dataset.download(
            url_list=str(url_list),
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
    result = {
        "cpu": cpu() - started,
        "clock": time.monotonic() - clock,
        "images": sum(one["successes"] for one in stats),
    }
    print(json.dumps(result), file=results)


if __name__ == "__main__":
    main()
