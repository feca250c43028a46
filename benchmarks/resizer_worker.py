"""img2dataset's Resizer behind a pipe; runs in the environment of `make bench-env`.

Reads requests as lines of JSON, `{"size": ..., "folder": ...}`. For each it resizes every `*.jpg`
of the folder, writes the result beside it as `*.theirs`, and prints the CPU seconds of the Resizer.
"""

import io
import json
import sys
import time
from pathlib import Path

from img2dataset.resizer import Resizer


def main() -> None:
    results, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=results, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        bodies = {path: path.read_bytes() for path in sorted(Path(request["folder"]).glob("*.jpg"))}
        resizer = Resizer(request["size"], "keep_ratio", resize_only_if_bigger=True)
        started = time.process_time()
        made = {path: resizer(io.BytesIO(body)) for path, body in bodies.items()}
        seconds = time.process_time() - started
        for path, (image, *_, error) in made.items():
            if error:
                raise SystemExit(f"{path}: {error}")
            path.with_suffix(".theirs").write_bytes(image)
        print(json.dumps({"seconds": seconds}), file=results, flush=True)


if __name__ == "__main__":
    main()
