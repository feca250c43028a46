"""Samples per CPU-second of this loader and of webdataset's pipeline, with the same work.

Both read the same photographs and captions: decode, crop by a stored box to 224 pixels, tokenize
one of the captions to 77 tokens, mask 75 of 196 patches with their codes, mask whole words. Each
runs in one process, so transport costs nothing, and CPU time is measured, since other processes may
use the machine. Only the ratios are comparable between machines. The webdataset pipeline is written
as its users do: Pillow decodes, transformers' BertTokenizer takes a caption at a time, the masks of
BEiT and BERT are drawn sample by sample in Python. A second one uses this loader's tokenizer and
masks, a batch at a time. Last, the time to the first samples at step 100,000 of 70 million pairs.

    python benchmarks/loader.py --photos ../shared/samples/photos
    python benchmarks/loader.py --only-ours --images 600
"""

import argparse
import hashlib
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from safetensors.numpy import save_file
from transformers import BertTokenizer

from flava_train.data.config import DataConfig
from flava_train.data.loader import load_batches
from flava_train.data.masking import (
    PatchMasking,
    TokenMasking,
    gather_masked,
    mask_patches,
    mask_tokens,
    max_masked_tokens,
    word_starts,
)
from flava_train.data.needs import StreamShares
from flava_train.data.order import SampleOrder
from flava_train.data.training_data import TrainingData
from flava_train.data.wordpiece import load_wordpiece
from flava_train.model.flava import FlavaConfig
from flava_train.objective.objective import Objective
from pmd_pipeline.contract.digests import canonical_json
from pmd_pipeline.contract.manifest import save_manifest, sealed
from pmd_pipeline.contract.models import CodeRules, Manifest, ShardEntry
from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import LedgerRow, ledger_bytes
from pmd_pipeline.shards.shard_writer import ByteRange, DigestingFile, ShardWriter

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
RULES = CodeRules(tokenizer="kmeans", sha256="0" * 64, vocabulary=8192, size=112, grid=14, views=2)
SIZE, TOKENS, BATCH = 224, 77, 256
OBJECTIVE = Objective(itm_rate=0.0, streams=StreamShares(1.0, 0.0, 0.0))
SHARDS = 8


# Shards of this loader, and tars for webdataset with the codes among the members.


def read_photographs(folder: Path) -> list[tuple[bytes, list[str]]]:
    """Every photograph with its captions."""
    content = json.loads((folder / "captions.json").read_text())
    captions: dict[int, list[str]] = {}
    for one in content["annotations"]:
        captions.setdefault(one["image_id"], []).append(one["caption"])
    with zipfile.ZipFile(folder / "photos.zip") as archive:
        return [(archive.read(one["file_name"]), captions[one["id"]]) for one in content["images"]]


def write_shards(folder: Path, photos: list[tuple[bytes, list[str]]]) -> tuple[str, list[str]]:
    """Write both kinds of shards; a manifest, and the list of tars for webdataset."""
    rng = np.random.default_rng(0)
    entries, tars = [], []
    for part in range(SHARDS):
        rows, crops = [], []
        ours, theirs = (folder / f"{name}{part}.tar" for name in ("ours", "theirs"))
        with ours.open("wb") as our_file, theirs.open("wb") as their_file:
            writers = [ShardWriter(DigestingFile(file)) for file in (our_file, their_file)]
            for number, (jpeg, captions) in enumerate(photos[part::SHARDS]):
                key = f"{part:04x}{number:012x}"
                x, y = rng.uniform(0, 0.04, 2)
                boxes = np.array([[0, 0, 1, 1], [x, y, x + 0.95, y + 0.95]], np.float32)
                codes = rng.integers(0, RULES.vocabulary, (2, 14, 14), np.uint16)
                crops.append((boxes, codes))
                text = canonical_json({"captions": captions}).encode()
                members = {"jpg": jpeg, "json": text, "txt": captions[0].encode()}
                rows.append(ledger_row(key, jpeg, len(captions), writers[0].add(key, members)))
                arrays = {"boxes.npy": npy(boxes), "codes.npy": npy(codes)}
                writers[1].add(key, {"jpg": jpeg, "json": text} | arrays)
            for writer in writers:
                writer.close()
        entries.append(shard_entry(ours, part, rows))
        write_codes(ours, crops)
        tars.append(str(theirs))
    return write_manifest(folder / "photos.json", entries), tars


def ledger_row(key: str, jpeg: bytes, num_pairs: int, ranges: dict[str, ByteRange]) -> LedgerRow:
    image = Image.open(BytesIO(jpeg))
    return LedgerRow(
        key=key,
        id=key,
        num_pairs=num_pairs,
        status=Status.SUCCESS,
        width=image.width,
        height=image.height,
        sha256=hashlib.sha256(key.encode()).hexdigest(),
        image_offset=ranges["jpg"].offset,
        image_size=ranges["jpg"].size,
        json_offset=ranges["json"].offset,
        json_size=ranges["json"].size,
    )


def shard_entry(tar: Path, part: int, rows: list[LedgerRow]) -> ShardEntry:
    """Write the ledger beside the tar; the manifest's entry of both."""
    Path(ShardPaths.of(str(tar)).ledger).write_bytes(ledger_bytes(rows))
    return ShardEntry(
        source="photos",
        part=part,
        path=tar.name,
        sha256="0" * 64,
        num_bytes=tar.stat().st_size,
        ledger_sha256="0" * 64,
        records=len(rows),
        images=len(rows),
        pairs=sum(row.num_pairs for row in rows),
        codes_sha256="0" * 64,
        views=RULES.views * len(rows),
    )


def write_codes(tar: Path, crops: list[tuple[np.ndarray, np.ndarray]]) -> None:
    save_file(
        {
            "boxes": np.concatenate([boxes for boxes, _ in crops]),
            "codes": np.concatenate([codes for _, codes in crops]),
            "first": np.arange(0, RULES.views * len(crops) + 1, RULES.views),
        },
        ShardPaths.of(str(tar)).codes,
    )


def write_manifest(path: Path, entries: list[ShardEntry]) -> str:
    manifest = Manifest(name=path.stem, sources={}, shards=entries, versions={}, codes=RULES)
    save_manifest(str(path), sealed(manifest))
    return str(path)


def npy(array: np.ndarray) -> bytes:
    out = BytesIO()
    np.save(out, array)
    return out.getvalue()


# webdataset's pipeline.


def beit_mask(rng: random.Random, rule: PatchMasking) -> np.ndarray:
    """BEiT's algorithm 1, patch by patch, as its users implement it."""
    mask = np.zeros((rule.grid, rule.grid), bool)
    count = 0
    while count < rule.num_masked:
        gained = 0
        for _ in range(rule.attempts):
            area = rng.uniform(rule.min_block, rule.num_masked - count)
            ratio = math.exp(rng.uniform(math.log(rule.min_aspect), -math.log(rule.min_aspect)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height >= rule.grid or width >= rule.grid:
                continue
            top, left = rng.randint(0, rule.grid - height), rng.randint(0, rule.grid - width)
            block = mask[top : top + height, left : left + width]
            fresh = height * width - int(block.sum())
            if 0 < fresh <= rule.num_masked - count:
                block[:] = True
                gained = fresh
                break
        if not gained:
            break
        count += gained
    return mask


def word_mask(
    rng: random.Random, tokens: list[int], starts: list[bool], rule: TokenMasking
) -> tuple[list[int], list[int]]:
    """BERT's whole-word masking of one caption, word by word; and the masked positions."""
    words: list[list[int]] = []
    for position, token in enumerate(tokens):
        if token in rule.never:
            continue
        if starts[token] or not words:
            words.append([position])
        else:
            words[-1].append(position)
    most = max(1, round(0.15 * sum(map(len, words))))
    rng.shuffle(words)
    masked, positions = list(tokens), []
    for word in words:
        if len(positions) + len(word) > most:
            continue
        positions += word
        for position in word:
            action = rng.random()
            if action < 0.8:
                masked[position] = rule.mask_id
            elif action < 0.9:
                masked[position] = rng.randrange(rule.vocabulary_size)
    return masked, sorted(positions)


class WebDatasetPipeline:
    """Samples to batches, as a user of webdataset writes it."""

    def __init__(self, vocabulary: Path, *, vectorised: bool) -> None:
        wordpiece = load_wordpiece(str(vocabulary))
        self.wordpiece, self.vectorised = wordpiece, vectorised
        self.bert = BertTokenizer(vocab=str(vocabulary), do_lower_case=True)
        self.patches = PatchMasking()
        self.tokens = TokenMasking(
            len(wordpiece.vocabulary), wordpiece.mask_id, wordpiece.special_ids
        )
        self.starts = word_starts(wordpiece.vocabulary)
        self.starts_list = self.starts.tolist()
        self.rng = random.Random(0)
        self.drawn = 0

    def pipeline(self, tars: list[str]) -> Iterable[Any]:
        """One epoch of batches."""
        collate = self.collate_vectorised if self.vectorised else self.collate
        return (
            wds.WebDataset(tars, shardshuffle=SHARDS, seed=0)
            .shuffle(1000, initial=100)
            .decode("pil")
            .map(self.row)
            .batched(BATCH, collation_fn=collate, partial=False)
        )

    def row(self, sample: dict[str, Any]) -> dict[str, Any]:
        """One sample, with its masks unless they are drawn a batch at a time."""
        image, crop = sample["jpg"], 1
        x0, y0, x1, y1 = sample["boxes.npy"][crop].tolist()
        sides = (x0 * image.width, y0 * image.height, x1 * image.width, y1 * image.height)
        made = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=sides)
        row = {
            "pixels": torch.from_numpy(np.array(made)).permute(2, 0, 1).contiguous(),
            "codes": sample["codes.npy"][crop].reshape(-1).astype(np.int64),
        }
        caption = self.rng.choice(sample["json"]["captions"])
        if self.vectorised:
            return row | {"caption": caption}
        encoded = self.bert(caption, padding="max_length", truncation=True, max_length=TOKENS)
        tokens = np.array(encoded["input_ids"])
        row |= {"tokens": tokens, "length": np.array(sum(encoded["attention_mask"]))}
        mask = beit_mask(self.rng, self.patches).reshape(-1)
        row["masked_positions"], row["masked_codes"] = padded(
            np.flatnonzero(mask), row["codes"], self.patches.num_masked
        )
        short = tokens[: row["length"]].tolist()
        masked, positions = word_mask(self.rng, short, self.starts_list, self.tokens)
        row["masked_tokens"] = np.zeros(TOKENS, np.int64)
        row["masked_tokens"][: len(masked)] = masked
        row["words_at"], row["labels"] = padded(
            np.array(positions, np.int64), tokens, max_masked_tokens(TOKENS)
        )
        return row

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows."""
        batch: dict[str, Any] = {"keys": [row["__key__"] for row in rows]}
        batch["pixels"] = torch.stack([row["pixels"] for row in rows])
        for name, value in rows[0].items():
            if isinstance(value, np.ndarray):
                batch[name] = torch.from_numpy(np.stack([row[name] for row in rows]))
        return batch

    def collate_vectorised(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The same, with this loader's tokenizer and masks."""
        batch = self.collate(rows)
        tokens, batch["length"] = self.wordpiece.encode([row["caption"] for row in rows], TOKENS)
        numbers = self.drawn + np.arange(len(rows))
        self.drawn += len(rows)
        mask = mask_patches(0, numbers, self.patches)
        seen, hidden = mask_tokens(0, numbers, tokens, self.tokens, starts=self.starts)
        batch["masked_positions"] = gather_masked(
            mask, batch["codes"].numpy(), self.patches.num_masked
        )
        batch["labels"] = gather_masked(hidden, tokens, max_masked_tokens(TOKENS))
        batch["masked_tokens"] = torch.from_numpy(seen)
        return batch


def padded(positions: np.ndarray, labels: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    at, kept = np.zeros(width, np.int64), np.full(width, -100, np.int64)
    at[: len(positions)], kept[: len(positions)] = positions, labels[positions]
    return at, kept


# Measuring.


def cpu_seconds_per_sample(loaded: Iterator[Any], num_batches: int) -> float:
    """CPU seconds; the first batch warms up."""
    next(loaded)
    started = time.process_time()
    for _ in islice(loaded, num_batches):
        pass
    return (time.process_time() - started) / (num_batches * BATCH)


def repeat(make: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    while True:
        yield from make()


def compare_loaders(
    folder: Path,
    photos: list[tuple[bytes, list[str]]],
    vocabulary: Path,
    rounds: int,
    *,
    only_ours: bool,
) -> None:
    """Samples per CPU-second of each loader, in turn, and the ratios."""
    manifest, tars = write_shards(folder, photos)
    config = DataConfig(pairs=manifest, tokenizer=str(vocabulary), verify=False)
    data = TrainingData(config, OBJECTIVE.data_needs, FlavaConfig(), seed=0, batch=BATCH)
    plain, vectorised = (WebDatasetPipeline(vocabulary, vectorised=one) for one in (False, True))
    loaders = {
        "ours": load_batches(data, 0, 10**6),
        "webdataset": repeat(lambda: plain.pipeline(tars)),
        "webdataset, our masks": repeat(lambda: vectorised.pipeline(tars)),
    }
    if only_ours:
        loaders = {"ours": loaders["ours"]}
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, loaded in loaders.items():
            seconds[name].append(cpu_seconds_per_sample(loaded, 2))
    for name, taken in seconds.items():
        ratio = statistics.median(
            theirs / ours for theirs, ours in zip(taken, seconds["ours"], strict=True)
        )
        rate = 1 / statistics.median(taken)
        print(
            f"{name:21} {rate:6.0f} samples per CPU-second, ours is {ratio:.2f}x as fast",
            flush=True,
        )


def time_first_samples(
    folder: Path, photos: list[tuple[bytes, list[str]]], vocabulary: Path, *, step: int = 100_000
) -> None:
    """Time to the first samples of a late step of a run over 70 million pairs.

    Only the shards of the window exist: real ledgers and codes, and sparse tars that begin with a
    few photographs, to which all rows of the ledger point.
    """
    records, batch, shards = 10_000, 8192, 7_000
    head = folder / "head.tar"
    with head.open("wb") as file:
        writer = ShardWriter(DigestingFile(file))
        rows = []
        for number, (jpeg, captions) in enumerate(photos[:50]):
            text = canonical_json({"captions": captions[:1]}).encode()
            key = f"{number:016x}"
            rows.append(ledger_row(key, jpeg, 1, writer.add(key, {"jpg": jpeg, "json": text})))
        writer.close()
    num_bytes = 300 << 20
    rng = np.random.default_rng(0)
    boxes = np.tile(np.array([[0, 0, 1, 1]], np.float32), (2 * records, 1))
    codes = rng.integers(0, RULES.vocabulary, (2 * records, 14, 14), np.uint16)
    first = np.arange(0, 2 * records + 1, 2)
    save_file({"boxes": boxes, "codes": codes, "first": first}, ShardPaths.of(str(head)).codes)
    entries = [
        ShardEntry(
            source="photos", part=part, path=ShardPaths.in_folder("", part).tar, sha256="0" * 64,
            num_bytes=num_bytes, ledger_sha256="0" * 64, records=records, images=records,
            pairs=records, codes_sha256="0" * 64, views=2 * records,
        )
        for part in range(shards)
    ]  # fmt: skip
    manifest = write_manifest(folder / "far.json", entries)
    order = SampleOrder((records,) * shards, batch, 0)
    window = order.window(*order.position(step)[:2])
    for shard in {one.shard for one in window.ranges}:
        paths = ShardPaths.of(str(folder / entries[shard].path))
        ledger = [
            replace(rows[n % len(rows)], key=f"{shard:08x}{n:08x}", sha256=rng.bytes(32).hex())
            for n in range(records)
        ]
        Path(paths.ledger).write_bytes(ledger_bytes(ledger))
        Path(paths.tar).write_bytes(head.read_bytes())
        os.truncate(paths.tar, num_bytes)
        os.link(ShardPaths.of(str(head)).codes, paths.codes)

    began, cpu = time.perf_counter(), time.process_time()
    config = DataConfig(pairs=manifest, tokenizer=str(vocabulary), verify=False)
    data = TrainingData(config, OBJECTIVE.data_needs, FlavaConfig(), seed=0, batch=batch)
    opened = time.perf_counter()
    data.load(step, range(1))
    ready = time.perf_counter()
    ranks = batch // BATCH
    next(load_batches(data, step, step + 1, ranks=ranks))
    done = time.perf_counter()
    print(
        f"step {step:,} of {records * shards:,} pairs in batches of {batch:,}: manifest and "
        f"tokenizer {opened - began:.2f} s, window of {len(window.ranges)} shards "
        f"{ready - opened:.2f} s, {BATCH} samples {done - ready:.2f} s, in all "
        f"{done - began:.2f} s, {time.process_time() - cpu:.2f} s of them on the CPU"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, default=SAMPLES / "photos")
    parser.add_argument("--vocabulary", type=Path, default=SAMPLES / "bert_vocab" / "vocab.txt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, help="use only so many photographs")
    parser.add_argument("--only-ours", action="store_true", help="measure this loader alone")
    given = parser.parse_args()
    if not (given.photos / "photos.zip").exists():
        parser.error(f"{given.photos}: no photos.zip there; name its folder with --photos")
    torch.set_num_threads(1)
    versions = f"webdataset {wds.__version__}, torch {torch.__version__}"
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}")
    photos = read_photographs(given.photos)[: given.images]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not given.only_ours:
            time_first_samples(folder, photos, given.vocabulary)
        compare_loaders(folder, photos, given.vocabulary, given.rounds, only_ours=given.only_ours)


if __name__ == "__main__":
    main()
