import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from toy import toy_rows, write_pictures, write_rows

import pmd_pipeline
from pmd_pipeline.api import Dataset, build, open_manifest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.models import ShardEntry

GOLDEN = Path(__file__).parents[1] / "golden" / "api_pmd_pipeline.txt"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    write_rows(folder / "raw", toy_rows(30))
    write_pictures(folder / "pictures", [f"{n}.jpg" for n in range(28)])
    result = build(
        "cc3m",
        out=str(folder / "data"),
        manifests=str(folder / "manifests"),
        raw=str(folder / "raw"),
        images=[str(folder / "pictures")],
        changes={"part_records": 8},
        workers=1,
    )
    assert result.failures == []
    return result.manifests[-1][0]


@pytest.fixture
def dataset(path):
    return open_manifest(path)


def test_iteration_gives_every_sample_once_in_order_of_key(dataset):
    samples = list(dataset)

    keys = [sample.key for sample in samples]
    assert len(samples) == len(dataset) == dataset.num_images == 28
    assert keys == sorted(set(keys))
    assert sum(len(sample.captions) for sample in samples) == dataset.num_pairs
    assert len(dataset.manifest.shards) > 1


def test_a_sample_has_its_image_its_captions_and_what_upstream_states(dataset):
    sample = next(iter(dataset))

    assert sample.image().size == sample.size
    assert sample.content.startswith(b"\xff\xd8\xff")
    assert sample.metadata["url"].startswith("http://a.test/")
    assert sample.source == "cc3m"
    assert sample.boxes is None


def test_every_sample_is_found_by_its_key(dataset):
    for sample in dataset:
        assert dataset.sample(sample.key) == sample


@pytest.mark.parametrize("key", ["0" * 16, "f" * 16, "8" * 16, ""])
def test_a_key_that_no_shard_has_is_a_key_error(dataset, key):
    with pytest.raises(KeyError):
        dataset.sample(key)


def test_the_ledgers_as_a_frame_have_a_row_for_every_record(dataset):
    frame = dataset.ledger(["key", "status", "num_pairs"])

    assert len(frame) == 30
    assert frame.columns == ["key", "status", "num_pairs", "source", "part"]
    kept = frame.filter(frame["status"] == "success")
    assert kept["num_pairs"].sum() == dataset.num_pairs
    assert sum(map(len, dataset.ledgers())) == 30


def test_a_source_that_is_not_there_is_one_sentence(dataset):
    with pytest.raises(PmdError, match="has no source 'coco'; there are cc3m"):
        next(dataset.samples(source="coco"))


def test_a_changed_ledger_is_one_sentence(path):
    dataset = open_manifest(path)
    entry = dataset.manifest.shards[0]
    other = ShardEntry.model_validate(entry.model_dump() | {"ledger_sha256": "0" * 64})
    changed = dataset.manifest.model_copy(update={"shards": [other]})
    dataset.manifest = changed

    with pytest.raises(PmdError, match="is not the ledger that the manifest names"):
        list(dataset)


def test_importing_the_package_loads_no_stage():
    script = "import sys, pmd_pipeline; print(len([m for m in sys.modules if 'pmd_pipeline' in m]))"

    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)

    assert done.stdout == b"1\n"


def test_a_name_that_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        _ = pmd_pipeline.biuld


def surface():
    """The public names with their signatures, a line each."""
    for name in sorted(pmd_pipeline.__all__):
        item = getattr(pmd_pipeline, name)
        shape = "" if item is PmdError else inspect.signature(item)
        yield f"{name}{shape}"
        if item is Dataset:
            for method, function in vars(item).items():
                if not method.startswith("_"):
                    shape = inspect.signature(function) if inspect.isfunction(function) else ""
                    yield f"{name}.{method}{shape}"


def test_the_public_names_and_signatures_are_these(pytestconfig):
    text = "".join(f"{line}\n" for line in surface())
    if pytestconfig.getoption("--golden-rewrite", default=False):
        GOLDEN.write_text(text, encoding="utf-8")

    assert text == GOLDEN.read_text(encoding="utf-8")


def test_building_twice_calls_the_same_function(path):
    assert pmd_pipeline.build is build
    assert pmd_pipeline.open_manifest(path).num_images == 28
