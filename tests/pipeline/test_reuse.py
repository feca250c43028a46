"""What is left out later, or asked again, touches only its own parts, and ends as a fresh build."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from fake_host import FakeHost, response, serve_folder
from toy import QUIET, toy_build, toy_order, toy_recipe, write_pictures, write_rows

from pmd_pipeline import cli
from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.base.record import key_of, url_id
from pmd_pipeline.build import shard as build
from pmd_pipeline.build.optout import LIST, REASON, add_to_list
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.dataset import build as dataset
from pmd_pipeline.dataset.build import BuildRequest, build_all, parse_reasons
from pmd_pipeline.inspect.trace import find_traces
from pmd_pipeline.inspect.trace_text import trace_lines

NUM = 60
LATE = range(0, NUM, 10)
"""Pictures that are not there when they are asked for first."""


class Web:
    """A folder over HTTP; `asked` counts what is asked for by path."""

    def __init__(self, folder):
        self.folder, self.asked = folder, Counter()

    def __call__(self):
        return serve_folder(self.folder, self.asked)

    def pictures(self):
        """What was asked for but for robots.txt; from now on counted anew."""
        found = {path for path in self.asked if path.endswith(".jpg")}
        self.asked.clear()
        return found


@pytest.fixture
def web(tmp_path):
    names = [f"{number}.jpg" for number in range(NUM)]
    write_pictures(tmp_path / "web", names)
    write_rows(tmp_path / "raw", [(f"picture {n}", f"http://a.test/{n}") for n in names])
    return Web(tmp_path / "web")


@pytest.fixture
def origin(web):
    with web() as origin:
        yield origin


def order_in(tmp_path, name, origin, **changes):
    """An order of its own folder, for six parts from the same rows."""
    fetch = {"connect_to": {"*": origin}, "retries": 0}
    recipe = toy_recipe(part_records=10, fetch=fetch, **changes)
    (tmp_path / name).mkdir(exist_ok=True)
    raw = tmp_path / name / "raw"
    if not raw.exists():
        raw.symlink_to(tmp_path / "raw")
    order = toy_order(tmp_path / name, recipe, pictures=tmp_path)
    return replace(order, images=("web",))


def contents(order):
    """The bytes of shards and ledgers."""
    folder = Path(order.shards)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}


def hide(web, numbers):
    for number in numbers:
        (web.folder / f"{number}.jpg").rename(web.folder / f"{number}.gone")


def show(web, numbers):
    for number in numbers:
        (web.folder / f"{number}.gone").rename(web.folder / f"{number}.jpg")


def test_asking_again_asks_only_for_what_failed_and_ends_as_a_fresh_build(tmp_path, web, origin):
    order = order_in(tmp_path, "again", origin)
    hide(web, LATE)
    before = toy_build(order)
    assert before.sources["cc3m"].counts.failed == {"http_404": len(LATE)}
    show(web, LATE)
    web.pictures()

    now = toy_build(replace(order, retry_reasons=frozenset({"http_404"})))

    assert web.pictures() == {f"/{number}.jpg" for number in LATE}
    assert now.sources["cc3m"].counts.failed == {}
    fresh = order_in(tmp_path, "fresh", origin)
    assert toy_build(fresh).digest == now.digest
    assert contents(fresh) == contents(order)


def test_attempts_are_told_and_carried_over_and_no_digest_covers_them(tmp_path):
    body = (write_pictures(tmp_path / "web", ["1.jpg"]) / "1.jpg").read_bytes()
    write_rows(tmp_path / "raw", [(f"picture {n}", f"http://a.test/{n}.jpg") for n in (1, 2, 3)])
    answers = {
        "1": [response(503), response(body=body)],
        "2": [response(500)] * 2,
        "3": [response(404)],
    }

    def talk(head):
        path = head.split(" ")[1]
        return response(404) if path == "/robots.txt" else answers[path[1]].pop(0)

    with FakeHost(talk) as host:
        order = order_in(tmp_path, "once", host.origin)
        order = replace(order, recipe=with_retries(order.recipe, 1))
        toy_build(order)
        assert asked_again(order) == {"1": 2, "2": 2}
        key = key_of("cc3m", "http://a.test/1.jpg")
        with open_pool("local", 1, None) as pool:
            [trace] = find_traces(str(tmp_path / "once" / "data"), key, pool)
        assert "fetched: http://a.test/1.jpg, 2 requests" in list(trace_lines(trace))

        answers["2"] = [response(body=body)]
        again = toy_build(replace(order, retry_reasons=frozenset({"http_5xx"})))
        assert asked_again(order) == {"1": 2}

        answers.update(
            {"1": [response(body=body)], "2": [response(body=body)], "3": [response(404)]}
        )
        fresh = order_in(tmp_path, "fresh", host.origin)
        assert toy_build(fresh).digest == again.digest


def with_retries(recipe, retries):
    return recipe.model_copy(update={"fetch": recipe.fetch.model_copy(update={"retries": retries})})


def asked_again(order):
    """Attempts by the number in the address."""
    number = {key_of("cc3m", f"http://a.test/{n}.jpg"): str(n) for n in range(NUM)}
    reports = [json.loads(path.read_bytes()) for path in Path(order.shards).glob("*.json")]
    found = {key: n for report in reports for key, n in report["timing"]["attempts"].items()}
    return {number[key]: attempts for key, attempts in found.items()}


def test_asking_again_for_another_reason_asks_for_nothing(tmp_path, web, origin):
    order = order_in(tmp_path, "again", origin)
    hide(web, LATE)
    before = toy_build(order)
    web.pictures()

    now = toy_build(replace(order, retry_reasons=frozenset({"timeout"})))

    assert web.pictures() == set()
    assert now.digest == before.digest


def test_asking_again_by_another_recipe_is_refused_before_anything_is_lost(tmp_path, web, origin):
    order = order_in(tmp_path, "again", origin)
    toy_build(order)
    before = contents(order)
    other = order_in(tmp_path, "again", origin, images={"size": 32})

    with pytest.raises(PmdError, match="nothing of cc3m is built by this recipe"):
        toy_build(replace(other, retry_reasons=frozenset({"http_404"})))

    assert contents(order) == before


def test_an_earlier_shard_that_was_damaged_is_not_taken_over(tmp_path, web, origin):
    order = order_in(tmp_path, "again", origin)
    hide(web, LATE)
    toy_build(order)
    show(web, LATE)
    for tar in Path(order.shards).glob("*.tar"):
        content = bytearray(tar.read_bytes())
        content[700] ^= 1
        tar.write_bytes(content)

    now = toy_build(replace(order, retry_reasons=frozenset({"http_404"})))

    touched = [shard for shard in now.shards if shard.part in _parts(order, LATE)]
    fresh = toy_build(order_in(tmp_path, "fresh", origin))
    assert touched
    for shard in touched:
        assert shard.sha256 == fresh.shards[shard.part].sha256


@pytest.mark.parametrize("spoilt", [slice(-20, None), slice(4, 500)])
def test_a_part_whose_ledger_is_damaged_is_built_again_to_leave_out(tmp_path, web, origin, spoilt):
    order = order_in(tmp_path, "later", origin)
    before = toy_build(order)
    for ledger in Path(order.shards).glob("*.parquet"):
        content = bytearray(ledger.read_bytes())
        content[spoilt] = bytes(len(content[spoilt]))
        ledger.write_bytes(content)
    (tmp_path / "list.txt").write_text("host:nowhere.test\n")
    add_to_list(order.data, str(tmp_path / "list.txt"))

    assert toy_build(order).shards == before.shards


def _parts(order, numbers):
    """The parts that hold the pictures of these numbers."""
    keys = {key_of("cc3m", url_id(f"http://a.test/{number}.jpg")) for number in numbers}
    return {int(key, 16) * 6 >> 64 for key in keys}


def sha256_of_picture(order, number):
    ledgers = sorted(Path(order.shards).glob("*.parquet"))
    rows = pl.concat([pl.read_parquet(path) for path in ledgers])
    return rows.filter(pl.col("url") == f"http://a.test/{number}.jpg")["sha256"][0]


@pytest.mark.parametrize("name", ["address", "sha256"])
def test_who_opts_out_is_taken_from_their_shard_alone_and_it_ends_as_a_fresh_build(
    tmp_path, web, origin, name
):
    order = order_in(tmp_path, "later", origin)
    before = toy_build(order)
    old = contents(order)
    entry = "http://a.test/7.jpg" if name == "address" else sha256_of_picture(order, 7)
    (tmp_path / "list.txt").write_text(f"{entry}\n")
    web.pictures()

    add_to_list(order.data, str(tmp_path / "list.txt"))
    now = toy_build(order)

    [part] = _parts(order, [7])
    changed = {file for file, content in contents(order).items() if old[file] != content}
    assert changed == {f"{part:05d}.tar", f"{part:05d}.parquet"}
    assert web.pictures() == set(), "the rest of the shard is taken over"
    counts = now.sources["cc3m"].counts
    assert counts.dropped == {REASON: 1}
    assert counts.kept == before.sources["cc3m"].counts.kept - 1
    assert counts.unaccounted() == 0
    assert now.sources["cc3m"].optout is not None
    fresh = order_in(tmp_path, "fresh", origin)
    add_to_list(fresh.data, str(tmp_path / "list.txt"))
    assert toy_build(fresh).digest == now.digest
    assert contents(fresh) == contents(order)


@pytest.mark.parametrize("moment", ["the tar", "after the report went"])
def test_a_part_that_could_not_be_made_anew_is_still_taken_over(
    tmp_path, web, origin, monkeypatch, moment
):
    order = order_in(tmp_path, "later", origin)
    before = toy_build(order)
    (tmp_path / "list.txt").write_text("http://a.test/7.jpg\n")
    add_to_list(order.data, str(tmp_path / "list.txt"))
    hide(web, range(NUM))  # nothing can be had again
    removed = build.remove

    def cut_off(address):
        if moment == "the tar" or not address.endswith("before.json"):
            removed(address)
        raise PmdError("the network went")

    with monkeypatch.context() as patch:
        patch.setattr(build, "remove", cut_off)
        with pytest.raises(PmdError, match="the network went"):
            toy_build(order)

    now = toy_build(order)

    assert now.sources["cc3m"].counts.kept == before.sources["cc3m"].counts.kept - 1
    assert not list(Path(order.shards).glob("*.before.json"))


def test_what_the_driver_holds_of_a_part_does_not_grow_with_its_records(tmp_path):
    answers = iter([response(503)] * 6)
    with FakeHost(lambda head: response(404) if "robots" in head else next(answers)) as host:
        write_rows(tmp_path / "raw", [(f"picture {n}", f"http://a.test/{n}.jpg") for n in range(3)])
        order = order_in(tmp_path, "once", host.origin)
        order = replace(order, recipe=with_retries(order.recipe, 1))
        held = []
        with open_pool("local", 1, None) as pool:
            manifest_of = dataset.source_manifest

            def noted(recipe, index, reports, *rest):
                held.extend(reports)
                return manifest_of(recipe, index, reports, *rest)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dataset, "source_manifest", noted)
                dataset.build_source(order, pool, QUIET)
                dataset.build_source(order, pool, QUIET)  # from the reports on disk

    assert len(asked_again(order)) == 3
    assert len(held) >= 2
    assert all(report.timing.attempts == {} for report in held)


def test_an_image_that_is_listed_is_not_even_asked_for(tmp_path, web, origin):
    order = order_in(tmp_path, "listed", origin)
    (tmp_path / "list.txt").write_text("host:a.test\n")
    add_to_list(order.data, str(tmp_path / "list.txt"))

    manifest = toy_build(order)

    assert web.pictures() == set()
    assert manifest.sources["cc3m"].counts.dropped == {REASON: NUM}


def test_who_is_taken_from_the_list_by_hand_comes_back(tmp_path, web, origin):
    order = order_in(tmp_path, "back", origin)
    before = toy_build(order)
    (tmp_path / "list.txt").write_text("http://a.test/7.jpg\n")
    add_to_list(order.data, str(tmp_path / "list.txt"))
    toy_build(order)
    web.pictures()

    Path(order.data, LIST).unlink()
    now = toy_build(order)

    assert now.digest == before.digest
    assert web.pictures() == {"/7.jpg"}


def test_a_choice_of_licences_is_a_choice_of_records_and_may_be_changed(tmp_path, web, origin):
    order = order_in(tmp_path, "licences", origin)
    before = toy_build(order)
    web.pictures()

    strict = order_in(tmp_path, "licences", origin, images={"licences": ["CC BY*"]})
    none = toy_build(strict)

    assert none.sources["cc3m"].counts.dropped == {"licence": NUM}
    assert none.sources["cc3m"].rules["images"]["licences"] == ["CC BY*"]
    assert web.pictures() == set()
    assert toy_build(order).digest == before.digest


def test_a_list_given_once_is_obeyed_by_builds_that_do_not_name_it(tmp_path, web, origin):
    (tmp_path / "list.txt").write_text("http://a.test/7.jpg\n")
    request = BuildRequest(
        recipes=("cc3m",),
        out=str(tmp_path / "data"),
        manifests=str(tmp_path / "manifests"),
        raw=str(tmp_path / "raw"),
        changes={"fetch": {"connect_to": {"*": origin}, "retries": 0}},
        optout=str(tmp_path / "list.txt"),
        runner="local",
        workers=1,
    )
    first = build_all(request, QUIET).manifests[-1][1]

    second = build_all(replace(request, optout=None), QUIET).manifests[-1][1]

    assert first.digest == second.digest
    assert first.sources["cc3m"].counts.dropped == {REASON: 1}


def test_reasons_are_those_that_are_counted():
    assert parse_reasons(["timeout,dns", "http_5xx"]) == {"timeout", "dns", "http_5xx"}
    with pytest.raises(PmdError, match="did you mean 'timeout'"):
        parse_reasons(["timeouts"])


def test_retry_on_the_command_line_mends_what_failed(tmp_path, web, origin, capsys):
    text = f'[fetch]\nretries = 0\nconnect_to = {{"*" = "{origin}"}}\n[images]\nsize = 64\n'
    (tmp_path / "mine.toml").write_text(f'source = "cc3m"\n{text}')
    options = ["--recipe", str(tmp_path / "mine.toml"), "--raw", str(tmp_path / "raw"), "-q"]
    options += ["--runner", "local", "--workers", "1", "--out", str(tmp_path / "data")]
    options += ["--manifests", str(tmp_path / "manifests")]
    hide(web, LATE)
    cli.app(["build", *options], standalone_mode=False)
    show(web, LATE)

    cli.app(["retry", "--reason", "http_404", *options], standalone_mode=False)

    path, digest = capsys.readouterr().out.splitlines()[-1].split()
    manifest = load_manifest(path)
    assert manifest.digest == digest
    assert manifest.sources["cc3m"].counts.kept == NUM
    assert json.loads(Path(path).read_text())["sources"]["cc3m"]["counts"]["failed"] == {}
