"""What every source of PMD guarantees, tested on the sample world."""

import pytest
from toy import index_of

from pmd_pipeline import sources
from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.base.record import BadRow, Row
from pmd_pipeline.demo.world import write_world
from pmd_pipeline.index.choose import Chooser
from pmd_pipeline.inspect.stats import paper_order
from pmd_pipeline.recipe import load_recipe

NAMES = sources.names("pmd")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), scenes=240)


def rows_of(world, name):
    source = sources.load(name)
    recipe = load_recipe(name)[0]
    spans = sources.find_annotations(source, str(world.folder / "raw" / name)).spans
    return [row for span in spans for row in source.read(span, **recipe.options)]


def test_there_are_the_nine_sources_of_pmd():
    assert len(NAMES) == 9
    assert [sources.load(name).info.paper.number for name in paper_order()] == [*range(1, 10)]
    assert set(NAMES) == set(paper_order())


@pytest.mark.parametrize("name", NAMES)
def test_a_source_states_licence_citation_files_and_manual_steps(name):
    info = sources.load(name).info

    assert info.licence
    assert info.citation
    assert info.homepage.startswith("https://")
    assert info.paper.pairs > 0
    assert info.files
    needs_hand = all(
        any(entry.required and not entry.url for entry in info.files if entry.form == form)
        for form in {entry.form for entry in info.files}
    )
    assert bool(info.by_hand) or not needs_hand


@pytest.mark.parametrize("name", NAMES)
def test_reading_twice_gives_the_same_rows(world, name):
    assert rows_of(world, name) == rows_of(world, name)


@pytest.mark.parametrize("name", NAMES)
def test_bad_rows_are_counted_and_later_rows_are_read(world, name):
    rows = rows_of(world, name)

    bad = [row for row in rows if isinstance(row, BadRow)]
    assert len(bad) == world.expected[name].dropped.get("bad_row", 0) > 0
    assert all(row.detail for row in bad)
    assert any(isinstance(row, Row) for row in rows[rows.index(bad[-1]) :])


@pytest.mark.parametrize("name", NAMES)
def test_a_key_belongs_to_one_image_and_no_pair_is_lost(world, name, tmp_path):
    recipe = load_recipe(name)[0]
    chooser = Chooser(recipe.captions)
    pairs = sum(
        1 if isinstance(row, BadRow) else len(chooser.pairs(row)) for row in rows_of(world, name)
    )

    with open_pool("local", 1, None) as pool:  # raises where two images share a key
        index = index_of(recipe, world.folder / "raw" / name, tmp_path, pool)

    assert index.counts.unaccounted() == 0
    assert index.counts.pairs_in - sum(part.bare for part in index.parts) == pairs
    assert index.counts.dropped == world.expected[name].dropped


@pytest.mark.parametrize("name", NAMES)
def test_no_row_contains_a_users_name(world, name):
    for row in rows_of(world, name):
        if isinstance(row, Row):
            assert not {"author", "user", "uid", "unickname", "user_id"} & set(row.meta)
