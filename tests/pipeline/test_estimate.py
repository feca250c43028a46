"""Estimates of a build: from a probe of some records, or from figures of the recipe."""

import json
import math

import pytest
from fake_host import serve_folder
from hypothesis import given
from hypothesis import strategies as st
from toy import QUIET, toy_recipe, write_pictures, write_rows

from pmd_pipeline import cli
from pmd_pipeline.cli.plan import _format_bytes, _format_hours, _format_time_range
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.dataset import probe as probe_module
from pmd_pipeline.dataset.estimate import (
    estimate_from_probe,
    estimate_from_recorded,
    total_estimate,
)
from pmd_pipeline.dataset.probe import Interval, proportion
from pmd_pipeline.recipe import load_recipe
from pmd_pipeline.shards.shard import fetch_into_shard

NUM_LIVE, NUM_DEAD = 30, 10


@pytest.fixture
def probe(tmp_path):
    """A recipe that fetches from this machine, and rows of which three in four have an image."""
    names = [f"{number}.jpg" for number in range(NUM_LIVE + NUM_DEAD)]
    write_pictures(tmp_path / "web", names[:NUM_LIVE])
    write_rows(tmp_path / "raw", [("two dogs", f"http://a.example/{name}") for name in names])
    with serve_folder(tmp_path / "web") as origin:
        recipe = toy_recipe(fetch={"connect_to": {"*": origin}, "retries": 0})
        yield recipe, str(tmp_path / "raw"), str(tmp_path / "data")


def test_a_probe_measures_the_success_rate_and_the_reasons_of_failures(probe):
    recipe, raw, data = probe

    estimate = estimate_from_probe(recipe, raw, data, NUM_LIVE + NUM_DEAD, 4, QUIET)

    assert estimate.alive == proportion(NUM_LIVE, NUM_LIVE + NUM_DEAD)
    assert estimate.lost == {"http_404": NUM_DEAD / (NUM_LIVE + NUM_DEAD)}
    assert estimate.records == recipe.expected.records
    assert estimate.images.value == pytest.approx(estimate.records * 0.75)
    assert "probe of 40 records of its annotation files" in estimate.basis


def test_a_probe_keeps_the_request_rate_of_one_of_many_tasks(probe, monkeypatch):
    recipe, raw, data = probe
    workers = []

    def recording_fetch(build, records, report_progress):
        workers.append(build.workers)
        return fetch_into_shard(build, records, report_progress)

    monkeypatch.setattr(probe_module, "fetch_into_shard", recording_fetch)
    estimate_from_probe(recipe, raw, data, NUM_LIVE + NUM_DEAD, 16, QUIET)

    assert set(workers) == {16}


def test_a_probe_extrapolates_the_bytes_that_it_fetched(probe, tmp_path):
    recipe, raw, data = probe
    num_bytes = sum(path.stat().st_size for path in (tmp_path / "web").iterdir())

    estimate = estimate_from_probe(recipe, raw, data, NUM_LIVE + NUM_DEAD, 4, QUIET)

    per_record = estimate.bytes_down.value / estimate.records
    assert per_record == pytest.approx(num_bytes / (NUM_LIVE + NUM_DEAD))
    assert estimate.bytes_down.low <= estimate.bytes_down.value <= estimate.bytes_down.high
    assert estimate.cpu_hours.value / 4 == pytest.approx(estimate.hours.low)


def test_a_probe_deletes_its_files(probe, tmp_path):
    recipe, raw, data = probe
    before = sorted(tmp_path.rglob("*"))

    estimate_from_probe(recipe, raw, data, 8, 1, QUIET)

    assert sorted(tmp_path.rglob("*")) == before


def test_a_probe_without_annotation_files_names_them(tmp_path):
    with pytest.raises(PmdError, match="GCC-training"):
        estimate_from_probe(toy_recipe(), str(tmp_path), str(tmp_path), 8, 1, QUIET)


def test_a_probe_of_too_few_rows_is_refused(tmp_path):
    write_rows(tmp_path, [("two dogs", "http://a.example/1.jpg")])

    with pytest.raises(PmdError, match="1 records of cc3m tell nothing"):
        estimate_from_probe(toy_recipe(), str(tmp_path), str(tmp_path), 8, 1, QUIET)


def test_a_recipe_without_recorded_figures_needs_a_probe():
    recipe = toy_recipe().model_copy(update={"expected": None})

    with pytest.raises(PmdError, match="--probe"):
        estimate_from_recorded(recipe, "nowhere", 1)


def test_a_source_of_local_files_has_no_estimate():
    [recipe] = load_recipe("ccnews")

    with pytest.raises(PmdError, match="nothing to plan"):
        estimate_from_recorded(recipe, "nowhere", 1)


def test_recorded_figures_come_from_the_recipe_and_more_workers_take_less_time(tmp_path):
    recipe = toy_recipe(expected={"pixels": 40_000, "image_bytes": 10_000})

    one, eight = (estimate_from_recorded(recipe, str(tmp_path), workers) for workers in (1, 8))

    expected = recipe.expected
    assert one.alive == Interval(expected.alive)
    assert one.bytes_down.value == pytest.approx(expected.records * 10_000 * expected.alive)
    assert one.shards == math.ceil(expected.records / recipe.part_records)
    assert expected.seen in one.basis
    assert one.hours.value == pytest.approx(8 * eight.hours.value)
    assert one.hours.high is None, "only a probe measures how slow the hosts are"
    assert total_estimate([one, one]).cpu_hours.value == pytest.approx(2 * one.cpu_hours.value)


def test_all_nine_recipes_have_recorded_figures():
    recipes = load_recipe("pmd")

    assert all(recipe.expected for recipe in recipes)
    assert sum(recipe.expected.pairs for recipe in recipes) == pytest.approx(70e6, rel=0.1)


def test_recorded_figures_are_no_part_of_the_rules():
    one, two = toy_recipe(), toy_recipe(expected={"alive": 0.5})

    assert one.rules() == two.rules()


@given(st.integers(0, 500), st.integers(1, 500))
def test_the_interval_of_a_proportion_contains_it_and_stays_within_0_and_1(part, more):
    interval = proportion(part, part + more)

    assert 0 <= interval.low <= interval.value <= interval.high + 1e-4
    assert interval.high <= 1


def test_sizes_and_times_are_printed_in_fitting_units():
    assert _format_bytes(Interval(2.5e12)) == "2.5 TB"
    assert _format_bytes(Interval(2e9, 1.5e9, 2.5e9)) == "2.0 ± 0.5 GB"
    assert _format_hours(0.01, 0.015) == "36.0 ± 18.0 s"
    assert _format_hours(0.5) == "30.0 min"
    assert _format_hours(1000, 1100) == "41.7 ± 4.2 d"
    assert _format_time_range(Interval(3, 3)) == "over 3.0 h"
    assert _format_time_range(Interval(50, 0.05, 50)) == "3.0 min to 2.1 d"


def test_the_command_prints_json_on_demand(probe, tmp_path, monkeypatch, capsys):
    recipe, raw, data = probe
    text = f'source = "cc3m"\n[fetch]\nconnect_to = {{"*" = "{recipe.fetch.connect_to["*"]}"}}\n'
    (tmp_path / "mine.toml").write_text(text)
    command = ["--recipe", str(tmp_path / "mine.toml"), "--probe", "16", "--json", "--raw", raw]

    cli.app(["plan", *command, "--out", data, "-q"], standalone_mode=False)

    [estimate] = json.loads(capsys.readouterr().out)
    assert estimate["source"] == "cc3m"
    assert estimate["records"] == 3_318_333, "without recorded figures, upstream's rows"
    assert 0 < estimate["alive"]["value"] <= 1
