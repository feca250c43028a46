import subprocess
import sys

SCRIPT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is not installed here")

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, {here!r})
import torch
from tiny import flava, images, pairs, texts
from flava_train.data import batches, masking
from flava_train.model import flava as model
from flava_train.objective import objective, step
from flava_train.run import flops

for batch in (pairs(2), images(2), texts(2)):
    print(*step.train_step(flava(), [batch], objective.Objective()))
"""
BLOCKED = {
    "beartype",
    "jaxtyping",
    "pmd_pipeline",
    "pydantic",
    "safetensors",
    "tokenizers",
    "transformers",
}


def test_a_step_needs_only_torch_and_numpy(pytestconfig):
    here = str(pytestconfig.rootpath / "tests" / "train")
    script = SCRIPT.format(blocked=BLOCKED, here=here)

    done = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        capture_output=True,
        text=True,
        cwd=pytestconfig.rootpath,
    )

    assert done.stderr == ""
    assert done.stdout.split() == ["contrastive", "mmm_image", "mmm_text", "itm", "mim", "mlm"]
