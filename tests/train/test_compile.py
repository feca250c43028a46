import subprocess
import sys
from shutil import which

import pytest

SCRIPT = """
import sys

sys.path.insert(0, {here!r})
import torch
from tiny import max_difference, flava, gradients, images, pairs, texts
from torch._dynamo.testing import CompileCounterWithBackend

from flava_train.data.batches import pad_to_width, select_rows
from flava_train.objective.losses import LOSSES, clip_loss_sum, predict
from flava_train.objective.objective import Objective
from flava_train.model.flava import Flava
from flava_train.objective.step import train_step
from dataclasses import replace
torch.set_num_threads(1)
{body}
"""

STREAMS = """
model = flava()

def embed(pairs):
    image = model.embed_images(pairs.images.pixels)
    text = model.embed_texts(pairs.texts.tokens, pairs.texts.lengths)
    return clip_loss_sum(image, text, pairs.matched, model.logit_scale.exp())

def losses_of(stream):
    entries = {name: loss for name, loss in LOSSES.items() if loss.stream == stream}

    def loss_sum(batch):
        predictions = predict(model, batch, entries)
        return sum(
            entry.loss_sum(predictions[name], entry.targets(batch))
            for name, entry in entries.items()
        )

    return loss_sum

for function, batch in (
    (embed, pairs(4)),
    (losses_of("pairs"), pairs(4)),
    (losses_of("images"), images(4)),
    (losses_of("texts"), texts(4)),
):
    plain = function(batch)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(batch)
    assert torch.allclose(plain, compiled, rtol=0, atol=1e-10), (plain, compiled)
    torch._dynamo.reset()

model.float()
single = torch.float32
for function, batch in (
    (embed, pairs(4, dtype=single)),
    (losses_of("pairs"), pairs(4, dtype=single)),
):
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(function, fullgraph=True, backend="eager")(batch)
"""

REGIONS = """
counter = CompileCounterWithBackend("aot_eager")
plain, model = flava(), flava()
model.compile_regions(backend=counter)
batch = pairs(8)
widths = (16, 18, 20)
counts = []
for repetition in range(2):
    for width in widths:
        wide = replace(batch, texts=pad_to_width(batch.texts, width))
        cut = [select_rows(wide, rows) for rows in torch.arange(8).split(4)]
        for other in (images(4), texts(4)):
            train_step(model, [other, other], Objective())
        losses = train_step(model, cut, Objective())
        expected = train_step(plain, cut, Objective())
        assert max_difference(losses, expected) < 1e-10
        assert max_difference(gradients(model), gradients(plain)) < 1e-10
    counts.append(counter.frame_count)
first, second = counts
image = 2 * 2 + 1  # with and without gradient, all positions and [CLS] alone; masked patches
text = 2 * 2 * len(widths) + 1  # the same for each width; masked tokens
both = len(widths)  # one block
heads = 1 + 2 + 1  # patches, two numbers of masked tokens, match
assert first == second == image + text + both + heads, counts
"""

EVALUATED = """
import tempfile
from pathlib import Path

from trials import write_datasets

from flava_train.config import EvaluationConfig
from flava_train.evaluation.evaluate import evaluate
from flava_train.data.file_cache import FileCache
from flava_train.data.wordpiece import load_wordpiece

counter = CompileCounterWithBackend("eager")
model = flava()
model.compile_regions(backend=counter)
train_step(model, [pairs(4)], Objective())
counts = [counter.frame_count]
with tempfile.TemporaryDirectory() as folder:
    datasets = write_datasets(Path(folder))
    config = EvaluationConfig(retrieval=str(datasets / "held-out.json"), batch=5)
    evaluate(
        model,
        load_wordpiece(str(datasets / "vocab.txt")),
        config,
        caption_tokens=16,
        files=FileCache(verify=False),
    )
counts.append(counter.frame_count)
train_step(model, [pairs(4)], Objective())
counts.append(counter.frame_count)
assert counts[0] > 0, counts
assert len(set(counts)) == 1, counts
"""


def run(body, pytestconfig):
    """Run without the type checks of this process, which would change what is compiled."""
    here = str(pytestconfig.rootpath / "tests" / "train")
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(here=here, body=body)],
        check=False,
        capture_output=True,
        text=True,
        cwd=pytestconfig.rootpath,
    )


def test_every_stream_is_one_graph(pytestconfig):
    done = run(STREAMS, pytestconfig)

    assert done.returncode == 0, done.stderr


def test_an_evaluation_compiles_nothing_and_causes_no_recompilation(pytestconfig):
    done = run(EVALUATED, pytestconfig)

    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_regions_are_compiled_once_for_each_width_and_change_no_gradient(pytestconfig):
    done = run(REGIONS, pytestconfig)

    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="the default compiler writes C++")
def test_the_default_compiler_changes_no_gradient(pytestconfig):
    body = REGIONS.replace('counter = CompileCounterWithBackend("aot_eager")', "").replace(
        "backend=counter", ""
    )
    body = body.replace("counts.append(counter.frame_count)", "counts.append(1)")
    body = body.replace("(16, 18, 20)", "(16,)").replace("range(2)", "range(1)")
    body = body.replace("first, second = counts", "sys.exit()")

    done = run(body, pytestconfig)

    assert done.returncode == 0, done.stderr
