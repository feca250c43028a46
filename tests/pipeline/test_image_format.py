"""The format of stored images: WebP as an option, and a default that changes no digest."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image
from toy import toy_build, toy_recipe, toy_rows, toy_source_build, write_pictures, write_rows

from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.contract.image_format import JPEG, WEBP, open_stored
from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.images.decode.decoder import open_image
from pmd_pipeline.images.decode.stored_image import make_stored_image
from pmd_pipeline.recipe import Images, RecipeError


def encoded(pixels, name="PNG"):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, name, quality=95)
    return out.getvalue()


def stored(body, **rules):
    rules = Images(**rules)
    return make_stored_image(body, open_image(body, rules), rules)


NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def test_a_webp_is_lossy_has_the_stored_size_and_no_metadata():
    result = stored(encoded(NOISE), format="webp", size=24)

    image = open_stored(result.content)
    assert (result.format, result.width, result.height) == (WEBP, 32, 24)
    assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (32, 24))
    assert not image.info.keys() & {"exif", "icc_profile", "xmp"}
    assert result.content[12:16] == b"VP8 "  # the lossy form


def test_quality_applies_to_webp():
    sizes = [len(stored(encoded(NOISE), format="webp", quality=q).content) for q in (20, 60, 95)]

    assert sizes == sorted(set(sizes))


def test_the_same_image_gives_the_same_webp():
    assert stored(encoded(NOISE), format="webp") == stored(encoded(NOISE), format="webp")


def test_a_small_jpeg_keeps_its_bytes_only_as_a_jpeg():
    body = encoded(NOISE, "JPEG")

    assert stored(body).content is body
    assert stored(body, format="webp").content != body
    assert stored(body, format="webp").format == WEBP


@pytest.mark.parametrize("image_format", [JPEG, WEBP], ids=lambda one: one.name)
def test_the_longest_side_is_that_of_the_format(image_format):
    largest = np.zeros((1, image_format.max_side, 3), np.uint8)
    larger = np.zeros((1, image_format.max_side + 1, 3), np.uint8)

    assert stored(encoded(largest), format=image_format.name).width == image_format.max_side
    with pytest.raises(RecordError, match=image_format.name.upper()) as caught:
        stored(encoded(larger), format=image_format.name)
    assert caught.value.kind == "bomb"


def test_an_unknown_format_is_a_mistake_of_the_recipe():
    with pytest.raises(RecipeError, match=r"images\.format = \"avif\": input should be 'jpeg'"):
        toy_recipe(images={"format": "avif"})


ADDED_KEYS = {"format": "webp", "pixel_filters": {"has_detail": {"least": 5.0}}}


@pytest.mark.parametrize("key", ADDED_KEYS)
def test_a_key_that_was_added_later_is_in_the_rules_only_where_it_is_set(key):
    default = Images.model_fields[key].get_default(call_default_factory=True)

    unset, explicit = toy_recipe(), toy_recipe(images={key: default})
    changed = toy_recipe(images={key: ADDED_KEYS[key]})

    assert key not in unset.rules()["images"]
    assert unset.shard_rules() == explicit.shard_rules()
    assert changed.rules()["images"][key] == ADDED_KEYS[key]


def test_the_default_rules_of_images_have_the_digest_of_the_first_release():
    """Known value, computed before any key was added; shards are reused by it."""
    assert digest(toy_recipe().shard_rules()) == (
        "58669e4d9f99c93ba795f7c8c6e97f53a357c2f08c976b73703f2378d78e628b"
    )


def build(folder, **images):
    write_rows(folder / "raw", toy_rows(12))
    pictures = write_pictures(folder / "pictures", [f"{n}.jpg" for n in range(12)])
    order = toy_source_build(folder, toy_recipe(images=images, part_records=6), pictures=pictures)
    return order, toy_build(order)


def members(manifest_path, shard):
    with tarfile.open(manifest_path.parent / shard.path) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}


def test_a_build_with_webp_stores_members_that_decode_and_a_ledger_that_finds_them(tmp_path):
    order, manifest = build(tmp_path, format="webp", quality=80)

    assert manifest.sources["cc3m"].images == 12
    assert manifest.versions["libwebp"]
    for shard in manifest.shards:
        contents = members(Path(order.manifest), shard)
        tar = (Path(order.manifest).parent / shard.path).read_bytes()
        rows = pl.read_parquet(Path(order.manifest).parent / ShardPaths.of(shard.path).ledger)
        extensions = {name.partition(".")[2] for name in contents}
        assert extensions == {"webp", "json", "txt"}
        for row in rows.iter_rows(named=True):
            content = contents[f"{row['key']}.webp"]
            assert tar[row["image_offset"] :][: row["image_size"]] == content
            image = open_stored(content)
            image.load()
            assert (image.format, image.size) == ("WEBP", (row["width"], row["height"]))
            assert json.loads(contents[f"{row['key']}.json"])["width"] == row["width"]


def test_shards_of_another_format_are_rebuilt_and_known_results_are_reused(tmp_path):
    _, jpeg = build(tmp_path)
    _, webp = build(tmp_path, format="webp")
    _, again = build(tmp_path, format="webp")

    assert {shard.sha256 for shard in jpeg.shards}.isdisjoint(s.sha256 for s in webp.shards)
    assert again.digest == webp.digest
