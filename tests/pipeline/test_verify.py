"""Mutation tests of `pmd verify`: it reports every damage with its file, and nothing else."""

import io
import json
import random
import shutil
import sys
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load, save
from toy import QUIET, toy_build, toy_recipe, toy_rows, toy_source_build, write_pictures, write_rows

from pmd_pipeline import cli
from pmd_pipeline.base.parallel import WorkerDied, open_pool
from pmd_pipeline.base.storage import sizes
from pmd_pipeline.codes.crops import crop_boxes
from pmd_pipeline.codes.tensors import code_faults
from pmd_pipeline.contract.digests import canonical_json, digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import read_bytes, write_whole
from pmd_pipeline.contract.image_format import WEBP
from pmd_pipeline.contract.manifest import load_manifest, save_manifest
from pmd_pipeline.contract.models import CodeRules, CodesReport, FileDigest, Report
from pmd_pipeline.contract.schemas import LEDGER_SCHEMA, LedgerRow, ledger_bytes
from pmd_pipeline.inspect.verify.dataset import verify
from pmd_pipeline.inspect.verify.image_headers import image_size
from pmd_pipeline.inspect.verify.samples import SampleChecker
from pmd_pipeline.shards.tar_reader import TarMember

RULES = CodeRules(tokenizer="kmeans", sha256="0" * 64, vocabulary=16, size=16, grid=2, views=2)
FILES = ("tar", "parquet", "codes.safetensors")


def findings(manifest, *, fast=False):
    with open_pool("local", 1, None) as pool:
        return [str(one) for one in verify(str(manifest), pool, QUIET, fast=fast)]


def write_codes(base, images):
    """Codes of so many images beside the shard `base`, and their report."""
    rows = pq.read_table(f"{base}.parquet").to_pylist()
    views = [
        crop_boxes(row["key"], (row["width"], row["height"]), [], RULES.views, RULES.seed)
        for row in rows
        if row["status"] == "success"
    ]
    dice = np.random.default_rng(images)
    tensors = {
        "boxes": np.concatenate(views),
        "codes": dice.integers(0, 16, (2 * images, 2, 2)).astype(np.uint16),
        "first": np.arange(0, 2 * images + 1, 2),
    }
    content = save(tensors, metadata={"tokenizer": "kmeans"})
    write_whole(f"{base}.codes.safetensors", content)
    report = Report.model_validate_json(read_bytes(f"{base}.json"))
    made = CodesReport(
        source=report.source,
        part=report.part,
        dependency="",
        rules=RULES,
        images=images,
        views=2 * images,
        file=FileDigest.of(f"{base.rpartition('/')[2]}.codes.safetensors", content),
        versions={},
    )
    write_whole(f"{base}.codes.json", made.model_dump_json().encode())


def seal(manifest_path):
    """Write the digests of the files as they are now into reports and manifest."""
    folder = str(manifest_path).rpartition("/manifests/")[0] + "/data/shards/cc3m"
    manifest, shards = load_manifest(str(manifest_path)), []
    for shard in manifest.shards:
        base = f"{folder}/{shard.part:05d}"
        report = Report.model_validate_json(read_bytes(f"{base}.json"))
        codes = CodesReport.model_validate_json(read_bytes(f"{base}.codes.json"))
        tar, ledger, coded = (
            FileDigest.of(f"{shard.part:05d}.{kind}", read_bytes(f"{base}.{kind}"))
            for kind in FILES
        )
        report = report.model_copy(update={"tar": tar, "ledger": ledger})
        write_whole(f"{base}.json", report.model_dump_json().encode())
        codes = codes.model_copy(update={"file": coded})
        write_whole(f"{base}.codes.json", codes.model_dump_json().encode())
        changes = {"sha256": tar.sha256, "num_bytes": tar.num_bytes, "views": codes.views}
        changes |= {"ledger_sha256": ledger.sha256, "codes_sha256": coded.sha256}
        shards.append(shard.model_copy(update=changes))
    seal_manifest(manifest_path, {"shards": shards, "codes": RULES})


def seal_manifest(path, changes):
    manifest = load_manifest(str(path)).model_copy(update=changes)
    save_manifest(str(path), manifest.model_copy(update={"digest": manifest.computed_digest()}))


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    """The manifest of 30 pictures in about five shards with codes; three pictures are absent."""
    folder = tmp_path_factory.mktemp("undamaged")
    write_rows(folder / "raw", [*toy_rows(30), ("no address here", "nowhere")])
    write_pictures(folder / "pictures", [f"{number}.jpg" for number in range(27)])
    order = toy_source_build(folder, toy_recipe(part_records=6), pictures=folder / "pictures")
    for shard in toy_build(order).shards:
        write_codes(f"{order.shards}/{shard.part:05d}", shard.images)
    seal(order.manifest)
    shutil.rmtree(folder / "data" / "index")
    return Path(order.manifest)


@dataclass
class Copy:
    """A copy of the undamaged dataset, of which a test damages the shard `part`."""

    manifest: Path
    dice: random.Random

    def __post_init__(self):
        shards = load_manifest(str(self.manifest)).shards
        self.part = self.dice.choice(shards).part
        self.other = self.dice.choice([one.part for one in shards if one.part != self.part])

    def path(self, kind, part=None):
        folder = self.manifest.resolve().parents[1] / "data" / "shards" / "cc3m"
        return folder / f"{self.part if part is None else part:05d}.{kind}"

    def members(self):
        with tarfile.open(self.path("tar")) as tar:
            return [(one, tar.extractfile(one).read()) for one in tar]

    def write_members(self, members):
        with tarfile.open(self.path("tar"), "w", format=tarfile.USTAR_FORMAT) as tar:
            for member, content in members:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    def some_member(self, kind=""):
        members = self.members()
        wanted = [n for n, (member, _) in enumerate(members) if member.name.endswith(kind)]
        return members, self.dice.choice(wanted)

    def change_ledger(self, change):
        rows = pq.read_table(self.path("parquet")).to_pylist()
        change(rows)
        self.path("parquet").write_bytes(ledger_bytes([LedgerRow(**row) for row in rows]))

    def change_row(self, name, value, *, status="success"):
        def change(rows):
            row = self.dice.choice([row for row in rows if row["status"] == status])
            row[name] = value(row[name]) if callable(value) else value

        self.change_ledger(change)

    def change_sample(self, name, value):
        """Change the JSON of a sample to something of the same length in another place."""
        members, number = self.some_member(".json")
        sample = json.loads(members[number][1])
        sample[name] = value(sample[name]) if callable(value) else value
        members[number] = members[number][0], canonical_json(sample).encode()
        self.write_members(members)

    def change_report(self, **changes):
        path = self.path("json")
        report = json.loads(path.read_text())
        for name, value in changes.items():
            report[name] = value(report[name])
        path.write_text(json.dumps(report))

    def change_codes(self, name, change):
        tensors = load(self.path("codes.safetensors").read_bytes())
        tensors[name] = change(tensors[name].copy())
        self.path("codes.safetensors").write_bytes(save(tensors))


@pytest.fixture
def copy_of(undamaged, tmp_path):
    def make(seed):
        shutil.copytree(undamaged.parents[1] / "manifests", tmp_path / "manifests")
        shutil.copytree(undamaged.parents[1] / "data", tmp_path / "data")
        return Copy(tmp_path / "manifests" / undamaged.name, random.Random(seed))

    return make


def test_an_undamaged_dataset_has_no_faults(undamaged):
    assert findings(undamaged) == findings(undamaged, fast=True) == []


def test_an_undamaged_dataset_has_no_faults_at_any_address(undamaged, monkeypatch):
    files = fsspec.filesystem("memory")
    for path in undamaged.parents[1].rglob("*"):
        if path.is_file() and "pictures" not in path.parts:
            files.pipe(f"/undamaged/{path.relative_to(undamaged.parents[1])}", path.read_bytes())
    tar = "memory://undamaged/data/shards/cc3m/00001.tar"

    assert findings("memory://undamaged/manifests/cc3m.json") == []
    manifest = load_manifest("memory://undamaged/manifests/cc3m.json")
    shards = [
        one.model_copy(update={"path": f"memory://undamaged/data/shards/cc3m/{one.part:05d}.tar"})
        for one in manifest.shards
    ]
    save_manifest("memory://undamaged/there.json", manifest.model_copy(update={"shards": shards}))
    assert findings("memory://undamaged/there.json") == []
    content = read_bytes(tar)
    write_whole(tar, content[:700] + bytes([content[700] ^ 1]) + content[701:])
    assert all(one.startswith(tar) for one in findings("memory://undamaged/there.json"))
    assert sizes("memory://undamaged/data/shards/cc3m")
    files.rm("/undamaged", recursive=True)


@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.randoms())
def test_every_flipped_bit_is_a_fault_of_its_file(
    undamaged, tmp_path_factory, kind, place, bit, dice
):
    folder = tmp_path_factory.mktemp("flipped")
    shutil.copytree(undamaged.parents[1], folder / "set", ignore=shutil.ignore_patterns("pictures"))
    copy = Copy(folder / "set" / "manifests" / undamaged.name, dice)
    content = bytearray(copy.path(kind).read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    copy.path(kind).write_bytes(content)

    found = findings(copy.manifest)

    assert all(one.startswith(str(copy.path(kind))) or "codes" not in kind for one in found)
    assert any(
        one.startswith(str(copy.path(kind))) and "has changed: its SHA-256 is" in one
        for one in found
    )
    shutil.rmtree(folder)


def without(members, number):
    return members[:number] + members[number + 1 :]


def remove_member(copy):
    members, number = copy.some_member()
    copy.write_members(without(members, number))
    return f"{members[number][0].name} is missing"


def remove_sample(copy):
    members, number = copy.some_member(".jpg")
    copy.write_members(members[:number] + members[number + 3 :])
    return f"{members[number][0].name} is missing"


def add_member(copy):
    members, number = copy.some_member()
    name = copy.dice.choice(["0" * 16 + ".jpg", members[number][0].name + "2", "../../etc/passwd"])
    members.insert(copy.dice.randrange(len(members) + 1), (tarfile.TarInfo(name), b"x"))
    copy.write_members(members)
    return f"{name} is not in the ledger"


def repeat_member(copy):
    members, number = copy.some_member()
    copy.write_members([*members, members[number]])
    return f"{members[number][0].name} is in the tar more than once"


def reorder_members(copy):
    members, number = copy.some_member(".jpg")
    members[number], members[number + 1] = members[number + 1], members[number]
    copy.write_members(members)
    return f"{members[number][0].name} is at the place of {members[number + 1][0].name}"


def swap_pictures(copy):
    members, number = copy.some_member(".jpg")
    other = copy.dice.choice([n for n in range(0, len(members), 3) if n != number])
    one, two = members[number], members[other]
    members[number], members[other] = (one[0], two[1] + b"..."), (two[0], one[1])
    copy.write_members(members)
    return f"{one[0].name} is at byte"


def truncate_tar(copy):
    content = copy.path("tar").read_bytes()
    copy.path("tar").write_bytes(content[: copy.dice.randrange(len(content))])
    return "the tar ends at byte|is not in the ledger|members could not be read"


def damage_header(copy):
    content = bytearray(copy.path("tar").read_bytes())
    content[512 * copy.dice.choice([0]) + copy.dice.randrange(148)] ^= 4
    copy.path("tar").write_bytes(content)
    return "the header at byte 0 is broken"


def set_time(copy):
    members, number = copy.some_member()
    name, value = copy.dice.choice([("mtime", 7), ("uid", 1000), ("gid", 5), ("mode", 0o755)])
    setattr(members[number][0], name, value)
    copy.write_members(members)
    return f"the header of {members[number][0].name} has {name} {value}"


def set_owner(copy):
    members, number = copy.some_member()
    members[number][0].uname = "somebody"
    copy.write_members(members)
    return f"the header of {members[number][0].name} has uname 'somebody'"


def fill_padding(copy):
    with tarfile.open(copy.path("tar")) as tar:
        padded = [one for one in tar if one.size % 512]
    member = copy.dice.choice(padded)
    content = bytearray(copy.path("tar").read_bytes())
    content[member.offset_data + member.size] = 1
    copy.path("tar").write_bytes(content)
    return f"there are bytes between {member.name} and what comes after it"


def append_bytes(copy):
    with copy.path("tar").open("ab") as file:
        file.write(bytes(copy.dice.randrange(1, 2000)))
    return "there are bytes behind the end of the tar"


def append_tar(copy):
    with copy.path("tar").open("ab") as file:
        file.write(copy.path("tar", copy.other).read_bytes())
    return "there are bytes behind the end of the tar"


def shorten_end(copy):
    content = copy.path("tar").read_bytes()
    copy.path("tar").write_bytes(content[: -copy.dice.choice([1, 512])])
    return "inside its end mark of zeros"


def swap_ledger(copy):
    copy.path("parquet").write_bytes(copy.path("parquet", copy.other).read_bytes())
    return "is missing"


def swap_shards(copy):
    """Whole shards change places: every file of one is sound in itself."""
    one, two = copy.part, copy.other
    for kind in (*FILES, "json", "codes.json"):
        first, second = (copy.path(kind, part).read_bytes() for part in (one, two))
        copy.path(kind, one).write_bytes(second)
        copy.path(kind, two).write_bytes(first)
    for part in (one, two):
        path = copy.path("json", part)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"part": part}))
    return "it is the ledger of another part"


def share_key(copy):
    """The first record of a part gets the key of the last one before it."""
    copy.part = copy.dice.randrange(1, len(load_manifest(str(copy.manifest)).shards))
    last = pq.read_table(copy.path("parquet", copy.part - 1))["key"][-1].as_py()
    copy.change_ledger(lambda rows: rows[0].update(key=last))
    return "it is the ledger of another part"


def give_failure_the_reason_of_a_filter(copy):
    """The damaged part is the first that has one of the three absent images."""
    for shard in load_manifest(str(copy.manifest)).shards:
        copy.part = shard.part
        statuses = set(pq.read_table(copy.path("parquet"))["status"].to_pylist()) - {"success"}
        if statuses:
            break
    copy.change_row("reason", "is_large", status=min(statuses))
    return f"is {min(statuses)} for the reason 'is_large'"


def reorder_ledger(copy):
    copy.change_ledger(lambda rows: rows.reverse())
    return "has rows in another order than that of keys"


def drop_row(copy):
    copy.change_ledger(lambda rows: rows.pop(copy.dice.randrange(len(rows))))
    return "the ledger has"


def rename_column(copy):
    table = pq.read_table(copy.path("parquet"))
    pq.write_table(table.rename_columns(["kee", *table.schema.names[1:]]), copy.path("parquet"))
    return "has other columns: kee, key"


def empty_ledger(copy):
    copy.path("parquet").write_bytes(b"PAR1")
    return "is no whole Parquet file"


def row(name, value, sentence, **where):
    return lambda copy: copy.change_row(name, value, **where) or sentence


def sample(name, value, sentence):
    return lambda copy: copy.change_sample(name, value) or sentence


def report(sentence, **changes):
    return lambda copy: copy.change_report(**changes) or sentence


def codes(name, change, sentence):
    return lambda copy: copy.change_codes(name, change) or sentence


def set_at(place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


def other_text(copy):
    members, number = copy.some_member(".txt")
    members[number] = members[number][0], members[number][1].upper()
    copy.write_members(members)
    return f"{members[number][0].name} is not the caption in the ledger"


def no_jpeg(copy):
    members, number = copy.some_member(".jpg")
    members[number] = members[number][0], b"\x89PNG" + members[number][1][4:]
    copy.write_members(members)
    return f"{members[number][0].name} is no JPEG"


def no_json(copy):
    members, number = copy.some_member(".json")
    members[number] = members[number][0], b"[" + members[number][1][1:]
    copy.write_members(members)
    return f"{members[number][0].name} is no JSON"


def blank_in_json(copy):
    members, number = copy.some_member(".json")
    members[number] = members[number][0], members[number][1].replace(b",", b", ", 1)
    copy.write_members(members)
    return f"{members[number][0].name} is no canonical JSON"


def other_codes(copy):
    copy.path("codes.safetensors").write_bytes(b"\x10" + bytes(7) + b"{}")
    return "is not a file of image codes"


def more_codes(copy):
    with copy.path("codes.safetensors").open("ab") as file:
        file.write(b"..")
    return "has 2 bytes after its tensors"


def rotated(captions):
    return [*captions[1:], "a caption from nowhere"]


DAMAGE = {
    "remove_member": remove_member,
    "remove_sample": remove_sample,
    "add_member": add_member,
    "repeat_member": repeat_member,
    "reorder_members": reorder_members,
    "swap_pictures": swap_pictures,
    "truncate_tar": truncate_tar,
    "damage_header": damage_header,
    "set_time": set_time,
    "set_owner": set_owner,
    "fill_padding": fill_padding,
    "append_bytes": append_bytes,
    "append_tar": append_tar,
    "shorten_end": shorten_end,
    "swap_ledger": swap_ledger,
    "swap_shards": swap_shards,
    "reorder_ledger": reorder_ledger,
    "drop_row": drop_row,
    "rename_column": rename_column,
    "empty_ledger": empty_ledger,
    "row_key": row("key", "00000000000000ff", "does not have the key of the image"),
    "row_id": row("id", "http://a.test/another.jpg", "does not have the key of the image"),
    "row_url": row("url", "http://b.test/", "has url = 'http://a.test"),
    "row_caption": row("caption", "another", "is not the caption in the ledger"),
    "row_no_caption": row("caption", None, "has no caption"),
    "row_pairs": row("num_pairs", lambda count: count + 1, "has other captions than the ledger"),
    "row_no_pairs": row("num_pairs", 0, "counts 0 pairs"),
    "row_sha256": row("sha256", "0" * 64, "has sha256 = "),
    "row_width": row("width", 7, "has 48 x 40 pixels, by the ledger 7 x 40"),
    "row_no_width": row("original_width", None, "is a success, but has no original_width"),
    "row_offset": row("image_offset", lambda at: at + 1, "by the ledger at"),
    "row_size": row("json_size", lambda size: size - 1, "by the ledger at"),
    "row_reason": row("reason", "timeout", "is a success, but has the reason timeout"),
    "row_status": row("status", "dropped", "but has a place in the tar"),
    "row_failed": give_failure_the_reason_of_a_filter,
    "share_key": share_key,
    "row_unknown": row("status", "lost", "has the unknown status 'lost'"),
    "json_caption": sample("captions", rotated, "has other captions|is not the caption|has other"),
    "json_source": sample("source", "coco", "has source = 'coco'"),
    "json_width": sample("width", 47, "has width = 47"),
    "json_boxes": sample("meta", {"boxes": 1}, "by the ledger at"),
    "json_captions": sample("captions", "none", "has no list of captions"),
    "other_text": other_text,
    "no_jpeg": no_jpeg,
    "no_json": no_json,
    "blank_in_json": blank_in_json,
    "report_words": report("caption lengths", words=lambda _: {"4": 1}),
    "report_counts": report(
        "are neither kept|neither kept, dropped nor failed",
        counts=lambda counts: counts | {"pairs_in": counts["pairs_in"] + 1},
    ),
    "report_failed": report(
        "states failed|dns",
        counts=lambda counts: (
            counts | {"pairs_in": counts["pairs_in"] + 2, "failed": {**counts["failed"], "dns": 2}}
        ),
    ),
    "report_records": report("records is|records", records=lambda count: count + 1),
    "report_part": report("part is 77, in the manifest", part=lambda _: 77),
    "report_version": report(
        "made with pyarrow 0.0, which the manifest does not list",
        versions=lambda versions: versions | {"pyarrow": "0.0"},
    ),
    "codes_high": codes("codes", set_at((0, 0, 0), 16), "has the code 16, and the largest is 15"),
    "codes_few": codes("codes", lambda codes: codes[1:], "has codes of the shape"),
    "codes_first": codes("first", set_at(1, 1), "other numbers of crops"),
    "codes_start": codes("first", set_at(0, 1), "other numbers of crops"),
    "codes_whole": codes("boxes", set_at((0, 2), 0.5), "neither whole images"),
    "codes_boxes": codes("boxes", set_at((1, 2), 0.0), "nor random boxes"),
    "codes_nan": codes("boxes", set_at((1, 2), np.nan), "nor random boxes"),
    "codes_type": codes("codes", lambda codes: codes.astype(np.int16), "holds codes as I16"),
    "codes_moved": codes("boxes", lambda boxes: boxes[[0, 3, *range(2, len(boxes))]], "nor random"),
    "other_codes": other_codes,
    "more_codes": more_codes,
}
"""Every kind of damage; each function returns a part of the sentence that reports it."""


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_a_fault_even_if_all_digests_are_adjusted(copy_of, kind):
    copy = copy_of(kind)
    sentence = DAMAGE[kind](copy)
    seal(copy.manifest)

    found = findings(copy.manifest)

    assert any(word in one for one in found for word in sentence.split("|")), found
    names = [f"/{copy.part:05d}.", "/cc3m.json"]
    if kind not in {"swap_ledger", "swap_shards"}:  # the neighbour has a fault too
        assert all(any(name in one for name in names) for one in found), found


@pytest.mark.parametrize("kind", ["remove_member", "truncate_tar", "swap_ledger", "swap_shards"])
def test_changed_bytes_are_a_fault_beside_the_damage(copy_of, kind):
    copy = copy_of(kind)
    sentence = DAMAGE[kind](copy)

    found = findings(copy.manifest)

    assert any(word in one for one in found for word in sentence.split("|")), found
    assert any("has changed: its SHA-256 is" in one or " bytes instead of " in one for one in found)


def test_the_fault_of_a_truncated_tar_names_the_member(copy_of):
    copy = copy_of(0)
    with tarfile.open(copy.path("tar")) as tar:
        member = copy.dice.choice(tar.getmembers())
    content = copy.path("tar").read_bytes()
    copy.path("tar").write_bytes(content[: member.offset_data + member.size - 1])

    assert any(f", inside {member.name}" in one for one in findings(copy.manifest))


def test_a_report_of_another_version_is_a_fault(copy_of):
    copy = copy_of(0)
    copy.change_report(format=lambda _: "one")

    [found] = findings(copy.manifest)

    assert found.startswith(f"{copy.path('json')}: is no report of this version (format: ")


@pytest.mark.parametrize("kind", [*FILES, "json", "codes.json"])
def test_a_missing_file_is_a_fault(copy_of, kind):
    copy = copy_of(kind)
    copy.path(kind).unlink()

    expected = f"{copy.path(kind)}: there is no such file"

    assert expected in findings(copy.manifest)
    assert expected in findings(copy.manifest, fast=True)


@pytest.mark.parametrize("kind", FILES)
def test_the_fast_check_finds_a_truncated_file(copy_of, kind):
    copy = copy_of(kind)
    copy.path(kind).write_bytes(copy.path(kind).read_bytes()[:-5])

    [found] = findings(copy.manifest, fast=True)

    assert found.startswith(f"{copy.path(kind)}: has ")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": 3}, "the manifest states 3 images, the shards have"),
        ({"unique_images": 3}, "the manifest states 3 unique images, the shards have"),
        ({"words": {3: 1}}, "other caption lengths than the reports"),
        ({"rules": {}}, "rules_sha256 is not that of the rules"),
    ],
)
def test_a_manifest_with_other_numbers_than_its_shards_is_a_fault(copy_of, changes, sentence):
    copy = copy_of(0)
    entry = load_manifest(str(copy.manifest)).sources["cc3m"].model_copy(update=changes)
    seal_manifest(copy.manifest, {"sources": {"cc3m": entry}})

    found = findings(copy.manifest)

    assert any(sentence in one for one in found)
    assert all(one.startswith(f"{copy.manifest}: cc3m: ") for one in found)


def test_counts_of_a_manifest_that_do_not_add_up_are_faults(copy_of):
    copy = copy_of(0)
    entry = load_manifest(str(copy.manifest)).sources["cc3m"]
    lost = entry.counts.model_copy(update={"failed": {}})
    seal_manifest(copy.manifest, {"sources": {"cc3m": entry.model_copy(update={"counts": lost})}})

    [adds, failed] = findings(copy.manifest)

    assert "neither kept, dropped nor failed" in adds
    assert "the manifest states the failures {}, the reports {'not_in_archive'" in failed


def test_shards_without_a_source_or_listed_as_missing_are_faults(copy_of):
    copy = copy_of(0)
    manifest = load_manifest(str(copy.manifest))
    stray = manifest.shards[0].model_copy(update={"source": "coco"})
    seal_manifest(copy.manifest, {"shards": [*manifest.shards, stray], "missing": {"cc3m": [0, 9]}})

    found = findings(copy.manifest)

    assert [one.partition(": ")[2] for one in found] == [
        "has shards of coco, but no entry of this source",
        "cc3m: part 0 is listed as missing, but has a shard",
    ]


def test_a_manifest_with_another_digest_is_refused(copy_of):
    copy = copy_of(0)
    copy.manifest.write_text(copy.manifest.read_text().replace('"images": 27', '"images": 28'))

    with pytest.raises(PmdError, match="was changed"):
        findings(copy.manifest)


class DyingPool:
    """A pool whose worker dies when it checks the part `culprit`."""

    workers = 1

    def __init__(self, culprit):
        self.culprit = culprit

    def run(self, function, tasks, watch):
        for task in tasks:
            if task.entry.part == self.culprit:
                yield task, WorkerDied(f"a worker process died 3 times of {task}")
            else:
                yield task, function(task, partial(watch, str(task)))


def test_a_shard_that_kills_its_worker_is_one_fault(undamaged):
    found = [str(one) for one in verify(str(undamaged), DyingPool(2), QUIET)]

    assert len(found) == 1
    assert "/00002.tar: a worker process died 3 times of part 2 of cc3m" in found[0]


def test_the_command_prints_a_line_for_each_fault_and_exits_with_1(copy_of, monkeypatch, capsys):
    def pmd(*arguments):
        monkeypatch.setattr(sys, "argv", ["pmd", "verify", *map(str, arguments), "--workers", "1"])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, capsys.readouterr()

    copy = copy_of(0)
    shards = len(load_manifest(str(copy.manifest)).shards)
    undamaged, checked = pmd(copy.manifest)
    sizes, checked_fast = pmd(copy.manifest, "--fast")
    copy.path("codes.json").unlink()
    damaged, listed = pmd(copy.manifest, "--quiet")
    as_json, found = pmd(copy.manifest, "--json", "--fast")
    copy.manifest.write_text("{}")
    wrong, refused = pmd(copy.manifest)

    assert (undamaged, checked.out) == (sizes, checked_fast.out) == (0, "")
    assert checked.err.splitlines()[-1] == f"OK: {shards} shards, 27 images"
    assert checked_fast.err.splitlines()[-1] == (
        f"OK: sizes and reports of {shards} shards, 27 images"
    )
    assert (damaged, listed.out) == (1, f"{copy.path('codes.json')}: there is no such file\n")
    assert "1 fault in 1 shard; delete the .json beside each" in listed.err
    assert as_json == 1
    assert [one["part"] for one in json.loads(found.out)["findings"]] == [copy.part]
    assert (wrong, refused.out, refused.err.count("\n")) == (2, "", 1)


def test_crops_are_compared_with_the_boxes_of_captions():
    own = [[0.0, 0.25, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]]
    expected = [
        crop_boxes("0" * 16, (40, 30), boxes, RULES.views, RULES.seed) for boxes in (own, [])
    ]
    boxes = np.concatenate(expected)

    def faults(boxes, first):
        tensors = {"boxes": boxes, "codes": np.zeros((5, 2, 2), np.uint16)}
        content = save(tensors | {"first": np.array(first)})
        return list(code_faults(content, RULES, 5, expected))

    assert faults(boxes, [0, 3, 5]) == []
    assert "other numbers of crops" in faults(boxes, [0, 2, 5])[0]
    assert "nor their captions' boxes" in faults(boxes[[0, 2, 1, 3, 4]], [0, 3, 5])[0]


@given(st.binary(max_size=300))
def test_bytes_that_are_no_codes_are_one_sentence(content):
    [sentence] = code_faults(content, RULES, 2, [])

    assert "\n" not in sentence


def test_the_ledger_has_the_columns_that_are_damaged_here():
    assert {"key", "id", "url", "caption", "num_pairs", "status", "reason", "sha256"} <= set(
        LEDGER_SCHEMA.names
    )


def encoded(form, size, **options):
    out = io.BytesIO()
    Image.new("RGBA" if options.get("alpha") else "RGB", size).save(out, form, **options)
    return out.getvalue()


@given(
    st.sampled_from(
        [("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("WEBP", {"lossless": True}),
         ("WEBP", {"alpha": True}), ("WEBP", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"})]
    ),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.integers(0, 60),
)  # fmt: skip
def test_the_size_of_an_image_is_read_from_its_header_or_is_unknown(form, size, cut):
    content = encoded(form[0], size, **form[1])

    assert image_size(content) == size
    assert image_size(content[:cut]) in {None, size}
    assert image_size(content[4:]) is None


def test_images_of_another_format_than_the_recipe_states_are_a_fault(copy_of):
    copy = copy_of(0)
    entry = load_manifest(str(copy.manifest)).sources["cc3m"]
    rules = {**entry.rules, "images": {**entry.rules["images"], "format": "webp"}}
    changes = {"rules": rules, "rules_sha256": digest(rules)}
    seal_manifest(copy.manifest, {"sources": {"cc3m": entry.model_copy(update=changes)}})

    faults = findings(copy.manifest)

    assert any(one.endswith(".jpg is not in the ledger") for one in faults)
    assert any(one.endswith(".webp is missing") for one in faults)


def test_an_unknown_image_format_is_a_fault_of_the_manifest(copy_of):
    copy = copy_of(0)
    entry = load_manifest(str(copy.manifest)).sources["cc3m"]
    rules = {**entry.rules, "images": {**entry.rules["images"], "format": ["png"]}}
    changes = {"rules": rules, "rules_sha256": digest(rules)}
    seal_manifest(copy.manifest, {"sources": {"cc3m": entry.model_copy(update=changes)}})

    [fault] = findings(copy.manifest)

    assert fault.startswith(f"{copy.manifest}: cc3m: there is no image format ['png']; there are")


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_a_stored_webp_image_must_be_webp_and_of_its_size(form):
    row = LedgerRow(key="0" * 16, id="1", num_pairs=0, status="success", width=9, height=8,
                    image_offset=512, image_size=0)  # fmt: skip
    faults = []
    samples = SampleChecker("cc3m", "images", WEBP, [row], faults.append)
    content = encoded(form, (9, 8))

    samples.check(TarMember(f"{row.key}.webp", 512, 0), content)
    samples.check(TarMember(f"{row.key}.webp", 512, 0), encoded("WEBP", (9, 7)))

    expected = [f"{row.key}.webp has 9 x 7 pixels, by the ledger 9 x 8"]
    assert faults == ([f"{row.key}.webp is no WEBP"] if form == "JPEG" else []) + expected


def test_a_sample_without_captions_is_a_fault_and_does_not_end_the_check(copy_of):
    copy = copy_of(0)
    members, number = copy.some_member(".json")
    key = members[number][0].name.partition(".")[0]

    def remove_pairs(rows):
        next(row for row in rows if row["key"] == key)["num_pairs"] = 0

    copy.change_ledger(remove_pairs)
    description = json.loads(members[number][1]) | {"captions": []}
    members[number] = members[number][0], canonical_json(description).encode()
    copy.write_members(members)
    seal(copy.manifest)

    assert any(f"{key}.json has other captions" in one for one in findings(copy.manifest))
