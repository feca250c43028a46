"""What a build will take, told before it: from a probe that does it small, or from records."""

import json
import math

import pytest
from fake_host import serve_folder
from hypothesis import given
from hypothesis import strategies as st
from toy import QUIET, toy_recipe, write_pictures, write_rows

from pmd_pipeline import cli
from pmd_pipeline.build.shard import fetch_into_shard
from pmd_pipeline.cli.plan import _format_bytes, _format_hours, _format_time_range
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.dataset import probe as trial
from pmd_pipeline.dataset.estimate import probed, recorded, total
from pmd_pipeline.dataset.probe import Range, share_of
from pmd_pipeline.recipe import load_recipe

LIVE, DEAD = 30, 10


@pytest.fixture
def probe(tmp_path):
    """Rows of which three in four live, and the recipe that asks for them on this machine."""
    names = [f"{number}.jpg" for number in range(LIVE + DEAD)]
    write_pictures(tmp_path / "web", names[:LIVE])
    write_rows(tmp_path / "raw", [("two dogs", f"http://a.example/{name}") for name in names])
    with serve_folder(tmp_path / "web") as origin:
        recipe = toy_recipe(fetch={"connect_to": {"*": origin}, "retries": 0})
        yield recipe, str(tmp_path / "raw"), str(tmp_path / "data")


def test_a_probe_finds_what_lives_and_why_the_rest_does_not(probe):
    recipe, raw, data = probe

    plan = probed(recipe, raw, data, LIVE + DEAD, 4, QUIET)

    assert plan.alive == share_of(LIVE, LIVE + DEAD)
    assert plan.lost == {"http_404": DEAD / (LIVE + DEAD)}
    assert plan.records == recipe.expected.records
    assert plan.images.value == pytest.approx(plan.records * 0.75)
    assert "probe of 40 records of its annotation files" in plan.basis


def test_a_probe_asks_hosts_as_one_of_many_tasks_would(probe, monkeypatch):
    recipe, raw, data = probe
    told = []

    def noted(build, records, tick):
        told.append(build.workers)
        return fetch_into_shard(build, records, tick)

    monkeypatch.setattr(trial, "fetch_into_shard", noted)
    probed(recipe, raw, data, LIVE + DEAD, 16, QUIET)

    assert set(told) == {16}


def test_what_a_probe_extrapolates_is_what_it_fetched(probe, tmp_path):
    recipe, raw, data = probe
    web = sum(path.stat().st_size for path in (tmp_path / "web").iterdir())

    plan = probed(recipe, raw, data, LIVE + DEAD, 4, QUIET)

    per_record = plan.bytes_down.value / plan.records
    assert per_record == pytest.approx(web / (LIVE + DEAD))
    assert plan.bytes_down.low <= plan.bytes_down.value <= plan.bytes_down.high
    assert plan.cpu_hours.value / 4 == pytest.approx(plan.hours.low)


def test_a_probe_leaves_nothing_behind(probe, tmp_path):
    recipe, raw, data = probe
    before = sorted(tmp_path.rglob("*"))

    probed(recipe, raw, data, 8, 1, QUIET)

    assert sorted(tmp_path.rglob("*")) == before


def test_a_probe_without_rows_says_what_to_do(tmp_path):
    with pytest.raises(PmdError, match="GCC-training"):
        probed(toy_recipe(), str(tmp_path), str(tmp_path), 8, 1, QUIET)


def test_a_probe_of_too_few_rows_is_refused(tmp_path):
    write_rows(tmp_path, [("two dogs", "http://a.example/1.jpg")])

    with pytest.raises(PmdError, match="1 records of cc3m tell nothing"):
        probed(toy_recipe(), str(tmp_path), str(tmp_path), 8, 1, QUIET)


def test_a_source_that_nobody_has_recorded_asks_for_a_probe():
    recipe = toy_recipe().model_copy(update={"expected": None})

    with pytest.raises(PmdError, match="--probe"):
        recorded(recipe, "nowhere", 1)


def test_what_is_read_from_files_at_hand_has_no_plan():
    [recipe] = load_recipe("ccnews")

    with pytest.raises(PmdError, match="nothing to plan"):
        recorded(recipe, "nowhere", 1)


def test_recorded_figures_are_those_of_the_recipe_and_more_workers_take_less_time(tmp_path):
    recipe = toy_recipe(expected={"pixels": 40_000, "image_bytes": 10_000})

    one, eight = (recorded(recipe, str(tmp_path), workers) for workers in (1, 8))

    expected = recipe.expected
    assert one.alive == Range(expected.alive)
    assert one.bytes_down.value == pytest.approx(expected.records * 10_000 * expected.alive)
    assert one.shards == math.ceil(expected.records / recipe.part_records)
    assert expected.seen in one.basis
    assert one.hours.value == pytest.approx(8 * eight.hours.value)
    assert one.hours.high is None, "without a probe nobody knows how slow the hosts are"
    assert total([one, one]).cpu_hours.value == pytest.approx(2 * one.cpu_hours.value)


def test_all_nine_recipes_record_what_others_found():
    recipes = load_recipe("pmd")

    assert all(recipe.expected for recipe in recipes)
    assert sum(recipe.expected.pairs for recipe in recipes) == pytest.approx(70e6, rel=0.1)


def test_what_is_recorded_for_plans_shapes_no_data():
    one, two = toy_recipe(), toy_recipe(expected={"alive": 0.5})

    assert one.rules() == two.rules()


@given(st.integers(0, 500), st.integers(1, 500))
def test_the_interval_of_a_share_holds_it_and_stays_within_0_and_1(part, more):
    found = share_of(part, part + more)

    assert 0 <= found.low <= found.value <= found.high + 1e-4
    assert found.high <= 1


def test_sizes_and_hours_read_well():
    assert _format_bytes(Range(2.5e12)) == "2.5 TB"
    assert _format_bytes(Range(2e9, 1.5e9, 2.5e9)) == "2.0 ± 0.5 GB"
    assert _format_hours(0.01, 0.015) == "36.0 ± 18.0 s"
    assert _format_hours(0.5) == "30.0 min"
    assert _format_hours(1000, 1100) == "41.7 ± 4.2 d"
    assert _format_time_range(Range(3, 3)) == "over 3.0 h"
    assert _format_time_range(Range(50, 0.05, 50)) == "3.0 min to 2.1 d"


def test_the_command_prints_json_for_programs(probe, tmp_path, monkeypatch, capsys):
    recipe, raw, data = probe
    text = f'source = "cc3m"\n[fetch]\nconnect_to = {{"*" = "{recipe.fetch.connect_to["*"]}"}}\n'
    (tmp_path / "mine.toml").write_text(text)
    command = ["--recipe", str(tmp_path / "mine.toml"), "--probe", "16", "--json", "--raw", raw]

    cli.app(["plan", *command, "--out", data, "-q"], standalone_mode=False)

    [found] = json.loads(capsys.readouterr().out)
    assert found["source"] == "cc3m"
    assert found["records"] == 3_318_333, "where a recipe records nothing, upstream's rows"
    assert 0 < found["alive"]["value"] <= 1
