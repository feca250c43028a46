"""img2dataset's Resizer behind a pipe; runs in the environment that `make bench-env` makes.

Reads a line of JSON, `{"size": ..., "folder": ...}`, writes a picture of each `*.jpg` of the folder
beside it as `*.theirs`, and answers with the seconds of CPU that the Resizer took.
"""

import io
import json
import sys
import time
from pathlib import Path

from img2dataset.resizer import Resizer


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        bodies = {path: path.read_bytes() for path in sorted(Path(order["folder"]).glob("*.jpg"))}
        resizer = Resizer(order["size"], "keep_ratio", resize_only_if_bigger=True)
        started = time.process_time()
        made = {path: resizer(io.BytesIO(body)) for path, body in bodies.items()}
        seconds = time.process_time() - started
        for path, (picture, *_, error) in made.items():
            if error:
                raise SystemExit(f"{path}: {error}")
            path.with_suffix(".theirs").write_bytes(picture)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
