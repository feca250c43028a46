"""Time a training step of this package and of transformers' `FlavaForPreTraining`, in one run.

    python benchmarks/train_step.py

On a CUDA GPU: FLAVA at full size in bfloat16, compiled; pairs per second and model FLOPs
utilisation (torch counts the operations; what gradient caching computes twice counts once). On a
CPU: a small FLAVA, not compiled, without utilisation. Our step needs only torch and numpy; without
transformers there is no comparison. Captions have 12 words, about 17 tokens, as in PMD; images and
weights are random.

transformers is timed in two ways: with the codes of masked patches as labels, as ours, and as
published, with its codebook (DALL-E's encoder, always of full size) run on every image in every
step. Ours gets the codes from `pmd codes`, which computes them once.
"""

import argparse
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from flava_train.data.batches import (
    ImageBatch,
    PairBatch,
    TextBatch,
    micro_batches,
    select_rows,
    to_device,
)
from flava_train.data.masking import (
    IGNORE,
    PatchMasking,
    TokenMasking,
    draw_uniforms,
    gather_masked,
    mask_patches,
    mask_tokens,
    max_masked_tokens,
)
from flava_train.model.flava import Flava, FlavaConfig, TowerConfig
from flava_train.objective.objective import Objective
from flava_train.objective.step import train_step
from flava_train.run.flops import peak_of

GOAL = 2.5
"""Goal: this many times the pairs per second of transformers, on a CPU."""

LONGEST = 77
"""Tokens to which the published recipe pads every caption."""


@dataclass(frozen=True)
class RandomBatch:
    """A random batch, with what either model needs."""

    pairs: PairBatch
    token_mask: np.ndarray
    patch_mask: np.ndarray
    codes: np.ndarray


def main() -> None:
    """Print the measurements and the machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, help="in one step; 2048 on a GPU, 16 on a CPU")
    parser.add_argument("--micro-batch", type=int, default=256, help="pairs at once, on a GPU")
    parser.add_argument("--full-size", action="store_true", help="the paper's FLAVA, on a CPU too")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--peak", type=float, help="dense bfloat16 TFLOP/s of the card")
    options = parser.parse_args()
    print(_machine(options.device))
    _time_masking()
    if options.device == "cpu":
        tower = TowerConfig() if options.full_size else TowerConfig(4, 256, 4, 1024)
        _compare_on_cpu(options.pairs or 16, tower, options.rounds)
        print("no CUDA GPU used: its speed and utilisation were not measured")
    else:
        # `synchronize` waits for this card
        torch.cuda.set_device(torch.device(options.device).index or 0)
        peak = options.peak or peak_of(torch.device(options.device))
        _measure_on_gpu(
            options.device, options.pairs or 2048, options.micro_batch, options.rounds, peak
        )


def draw_batch(count: int, config: FlavaConfig) -> RandomBatch:
    """Random pairs with captions of 12 words: about 15 WordPieces and two specials."""
    rng = np.random.default_rng(0)
    numbers = np.arange(count)
    lengths = rng.poisson(15.3, count).clip(3, LONGEST - 2) + 2
    tokens = rng.integers(1000, config.text_vocab, (count, 80))
    tokens[:, 0], tokens[numbers, lengths - 1] = 101, 102
    tokens[np.arange(80) >= lengths[:, None]] = 0
    masked, token_mask = mask_tokens(0, numbers, tokens, TokenMasking())
    texts = gather_masked(token_mask, tokens, max_masked_tokens(80))
    patch_mask = mask_patches(0, numbers, PatchMasking(grid=config.grid))
    codes = rng.integers(0, config.image_vocab, patch_mask.shape)
    images = gather_masked(patch_mask, codes, 75)
    side = config.image_size
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    of = torch.from_numpy
    pairs = PairBatch(
        ImageBatch(pixels, of(images[0]), of(images[1])),
        TextBatch(of(tokens), of(masked), of(lengths), of(texts[0]), of(texts[1])),
        torch.ones(count, dtype=torch.bool),
        of(numbers),
        of(draw_uniforms(0, numbers)),
    )
    return RandomBatch(pairs, token_mask, patch_mask, codes)


def _compare_on_cpu(count: int, tower: TowerConfig, rounds: int) -> None:
    fused = replace(tower, layers=tower.layers // 2)
    config = FlavaConfig(image=tower, text=tower, multimodal=fused, projection_dim=tower.width)
    batch = draw_batch(count, config)
    longest = int(batch.pairs.texts.lengths.max())
    print(
        f"{count} pairs in one micro-batch, image 224, captions of "
        f"{batch.pairs.texts.lengths.float().mean():.1f} tokens (longest {longest}); "
        f"encoders of {tower.layers}/{tower.layers}/{fused.layers} layers, width {tower.width}; "
        f"step = forward, backward, AdamW; "
        f"best of {rounds} rounds, alternating"
    )
    steps = _our_steps(Flava(config), batch)
    if find_spec("transformers"):
        steps |= _their_steps(_their_model(config), batch, longest)
        steps |= _their_steps_with_codebook(_their_model(config, codebook=True), batch)
    gflop = {name: _count_flops(step) / count / 1e9 for name, step in steps.items()}
    seconds = _best_seconds(steps, rounds)
    for name, best in seconds.items():
        print(f"  {name:<69} {count / best:7.2f} per second, {gflop[name]:6.2f} GFLOP each")
    if not find_spec("transformers"):
        print("transformers is not installed: no comparison")
        return
    for name, theirs in seconds.items():
        if name.startswith("transformers"):
            _, kind, precision, padding = name.split(maxsplit=3)
            ratio = theirs / seconds[f"ours {kind} {precision}"]
            goal = f" (goal {GOAL})" if kind == "pairs" else ""
            print(f"{kind}, {precision}, transformers {padding}: ours x {ratio:.2f}{goal}")


def _our_steps(model: Flava, batch: RandomBatch) -> dict[str, Callable[[], object]]:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batches: dict[str, Sequence[PairBatch | ImageBatch | TextBatch]] = {
        "pairs": micro_batches(batch.pairs, len(batch.pairs)),
        "images": [batch.pairs.images],
        "texts": [micro_batches(batch.pairs, len(batch.pairs))[0].texts],
    }

    def step(kind: str, autocast: torch.dtype | None) -> None:
        train_step(model, batches[kind], Objective(), autocast=autocast)
        optimizer.step()

    return {f"ours {kind} float32": partial(step, kind, None) for kind in batches} | {
        "ours pairs bfloat16": partial(step, "pairs", torch.bfloat16)
    }


def _their_model(config: FlavaConfig, *, codebook: bool = False) -> nn.Module:
    from transformers import FlavaConfig as Theirs  # noqa: PLC0415  # only for the comparison
    from transformers import FlavaForPreTraining  # noqa: PLC0415  # the same

    def tower(ours: TowerConfig) -> dict[str, int]:
        return {
            "num_hidden_layers": ours.layers,
            "hidden_size": ours.width,
            "num_attention_heads": ours.heads,
            "intermediate_size": ours.hidden,
        }

    model: nn.Module = FlavaForPreTraining(
        Theirs(
            image_config=tower(config.image),
            text_config=tower(config.text),
            multimodal_config=tower(config.multimodal),
            hidden_size=config.multimodal.width,
            projection_dim=config.projection_dim,
            init_codebook=codebook,
        )
    )
    return model.train()


def _their_steps(
    model: nn.Module, batch: RandomBatch, longest: int, device: str = "cpu"
) -> dict[str, Callable[[], object]]:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    kind_of_device = torch.device(device).type
    has_codebook = getattr(model, "image_codebook", None) is not None
    pairs = to_device(batch.pairs, device)
    pixels = (pairs.images.pixels.float() / 255 - 0.45) / 0.27  # about as its processor normalises
    patch_mask = torch.from_numpy(batch.patch_mask).to(device)
    codes = torch.from_numpy(np.where(batch.patch_mask, batch.codes, IGNORE)).to(device)
    token_mask = torch.from_numpy(batch.token_mask).to(device)
    smaller = nn.functional.interpolate(pairs.images.pixels / 255, (112, 112))  # for the codebook

    def step(kind: str, width: int, autocast: torch.dtype | None) -> None:
        texts: dict[str, Tensor] = {
            "input_ids": pairs.texts.tokens[:, :width],
            "input_ids_masked": pairs.texts.masked_tokens[:, :width],
            "attention_mask": (pairs.texts.tokens[:, :width] != 0).long(),
            "mlm_labels": torch.where(token_mask, pairs.texts.tokens, IGNORE)[:, :width],
        }
        images = {
            "pixel_values": pixels,
            "bool_masked_pos": patch_mask,
        }
        if has_codebook:
            images["codebook_pixel_values"] = smaller
        else:
            images["mim_labels"] = codes.clone()  # its forward pass changes them
        inputs = (texts if kind != "images" else {}) | (images if kind != "texts" else {})
        if kind == "pairs":
            inputs["itm_labels"] = pairs.matched.long()
        optimizer.zero_grad()
        with torch.autocast(kind_of_device, autocast or torch.bfloat16, enabled=bool(autocast)):
            loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()

    pair_steps = {
        f"transformers pairs {precision} padded to {width}": partial(step, "pairs", width, dtype)
        for width in (LONGEST, longest)
        for precision, dtype in (("float32", None), ("bfloat16", torch.bfloat16))
    }
    return pair_steps | {
        f"transformers {kind} float32 padded to {longest}": partial(step, kind, longest, None)
        for kind in ("images", "texts")
    }


def _their_steps_with_codebook(
    model: nn.Module, batch: RandomBatch, device: str = "cpu"
) -> dict[str, Callable[[], object]]:
    steps = _their_steps(model, batch, LONGEST, device)
    return {
        f"{name}, codebook in the step": step
        for name, step in steps.items()
        if "pairs" in name and str(LONGEST) in name
    }


def _measure_on_gpu(device: str, count: int, size: int, rounds: int, peak: float | None) -> None:
    torch.manual_seed(0)
    config = FlavaConfig()
    pairs = draw_batch(count, config).pairs
    batch = [to_device(piece, device) for piece in micro_batches(pairs, size)]
    model = Flava(config).to(device)
    flops = [_flops(model, piece) for piece in batch]  # the counter does not see compiled code
    print(
        f"{count} pairs in {len(batch)} micro-batches of widths "
        f"{[piece.texts.tokens.shape[1] for piece in batch]}; ViT-B/16, bfloat16, compiled, "
        f"AdamW; {sum(flops) / count / 1e9:.1f} GFLOP a pair, counted; median of {rounds} steps"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.compile_regions()

    def step(pieces: Sequence[PairBatch]) -> None:
        train_step(model, pieces, Objective(), autocast=torch.bfloat16)
        optimizer.step()

    def report(name: str, pieces: Sequence[PairBatch], flop: float) -> float:
        torch.cuda.reset_peak_memory_stats()
        seconds = _median_seconds(lambda: step(pieces), rounds)
        memory = torch.cuda.max_memory_allocated() / 2**30
        pairs_per_second = sum(map(len, pieces)) / seconds
        share = f"{flop / seconds / peak / 1e12:.1%} of {peak:.0f}" if peak else "unknown share of"
        print(
            f"  {name}: {pairs_per_second:.0f} pairs/s, {flop / seconds / 1e12:.0f} TFLOP/s, "
            f"{share} peak, {memory:.1f} GiB"
        )
        return pairs_per_second

    start = time.perf_counter()
    step(batch)
    step(batch[:1])
    torch.cuda.synchronize()
    print(f"  compilation, with the first steps: {time.perf_counter() - start:.0f} s")
    print(f"  waits for the device in a step: {_count_waits(lambda: step(batch))}")
    report("whole batch, cached gradients", batch, sum(flops))
    ours = report("one micro-batch", batch[:1], flops[0])
    if peak is None:
        print("  this card's peak is not in the table: give it with --peak")
    if find_spec("transformers"):
        del optimizer, model
        _compare_on_gpu(device, config, ours, rounds)


def _compare_on_gpu(device: str, config: FlavaConfig, ours: float, rounds: int) -> None:
    count = 64  # its attention stores all weights, so fewer pairs fit
    batch = draw_batch(count, config)
    longest = int(batch.pairs.texts.lengths.max())
    steps = _their_steps(_their_model(config).to(device), batch, longest, device)
    with_codebook = _their_model(config, codebook=True).to(device)
    steps |= _their_steps_with_codebook(with_codebook, batch, device)
    for name in (f"{LONGEST}, codebook in the step", f"{LONGEST}", f"{longest}"):
        theirs = steps[f"transformers pairs bfloat16 padded to {name}"]
        theirs()
        pairs_per_second = count / _median_seconds(theirs, rounds)
        print(
            f"  transformers, padded to {name}, {count} pairs: {pairs_per_second:.0f} pairs/s, "
            f"ours x {ours / pairs_per_second:.2f}"
        )


def _flops(model: Flava, piece: PairBatch) -> float:
    """Operations of a step with this micro-batch alone, so without gradient caching."""
    some = select_rows(piece, torch.arange(min(8, len(piece)), device=piece.matched.device))
    flop = _count_flops(lambda: train_step(model, [some], Objective(), autocast=torch.bfloat16))
    return flop * len(piece) / len(some)


def _count_flops(step: Callable[[], object]) -> float:
    # the counter counts what fused attention computes twice, or does not count it at all
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def _count_waits(step: Callable[[], object]) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def _median_seconds(step: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _best_seconds(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of each step; alternating, so that other load on the machine affects all."""
    best = dict.fromkeys(steps, float("inf"))
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number:  # the first round allocates buffers and moments
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def _time_masking() -> None:
    """Print microseconds of one core per sample, at the batch size of a loader."""
    numbers = np.arange(256)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1000, 30_000, (256, 80))
    tokens[:, 18:] = 0
    texts = rng.integers(1000, 30_000, (256, 512))
    starts = rng.random(30_522) < 0.8
    rule = TokenMasking()
    jobs = {
        "patches": lambda: mask_patches(0, numbers, PatchMasking()),
        "caption, whole words": lambda: mask_tokens(0, numbers, tokens, rule, starts=starts),
        "512 tokens": lambda: mask_tokens(0, numbers, texts, rule),
    }
    seconds = _best_seconds(jobs, 10)
    per_sample = ", ".join(f"{name} {best / 256 * 1e6:.1f}" for name, best in seconds.items())
    print(f"masking, microseconds a sample in batches of 256: {per_sample}")


def _machine(device: str) -> str:
    names = ("torch", "numpy", "transformers")
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    where = f"{_processor()}, {torch.get_num_threads()} threads"
    if device != "cpu":
        where += f", {torch.cuda.get_device_name(device)}"
    return f"{where}; Python {platform.python_version()}, {versions}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    lines: Iterable[str] = cpus.read_text().splitlines() if cpus.is_file() else ()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
