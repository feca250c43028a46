"""An opt-out or a retry rebuilds only its own parts, and gives the shards of a fresh build."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from fake_host import FakeHost, response, serve_folder
from toy import QUIET, toy_build, toy_recipe, toy_source_build, write_pictures, write_rows

from pmd_pipeline import cli
from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.base.record import key_of, url_id
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.dataset import build as build_module
from pmd_pipeline.dataset.build import BuildRequest, build_all, parse_reasons
from pmd_pipeline.inspect.trace import find_traces
from pmd_pipeline.inspect.trace_text import trace_lines
from pmd_pipeline.shards import shard as shard_module
from pmd_pipeline.shards.optout import LIST, REASON, add_to_list

NUM = 60
LATE = range(0, NUM, 10)
"""Pictures that are missing in the first build."""


class Web:
    """A folder over HTTP; `requests` counts requests by path."""

    def __init__(self, folder):
        self.folder, self.requests = folder, Counter()

    def __call__(self):
        return serve_folder(self.folder, self.requests)

    def take_requests(self):
        """Paths of the pictures that were requested since the last call."""
        paths = {path for path in self.requests if path.endswith(".jpg")}
        self.requests.clear()
        return paths


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


def build_in(tmp_path, name, origin, **changes):
    """A build of six parts from the same rows, in its own folder."""
    fetch = {"connect_to": {"*": origin}, "retries": 0}
    recipe = toy_recipe(part_records=10, fetch=fetch, **changes)
    (tmp_path / name).mkdir(exist_ok=True)
    raw = tmp_path / name / "raw"
    if not raw.exists():
        raw.symlink_to(tmp_path / "raw")
    source_build = toy_source_build(tmp_path / name, recipe, pictures=tmp_path)
    return replace(source_build, images=("web",))


def contents(source_build):
    """The bytes of shards and ledgers."""
    folder = Path(source_build.shards)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}


def hide(web, numbers):
    for number in numbers:
        (web.folder / f"{number}.jpg").rename(web.folder / f"{number}.gone")


def restore(web, numbers):
    for number in numbers:
        (web.folder / f"{number}.gone").rename(web.folder / f"{number}.jpg")


def test_a_retry_requests_only_failures_and_gives_the_shards_of_a_fresh_build(
    tmp_path, web, origin
):
    source_build = build_in(tmp_path, "again", origin)
    hide(web, LATE)
    before = toy_build(source_build)
    assert before.sources["cc3m"].counts.failed == {"http_404": len(LATE)}
    restore(web, LATE)
    web.take_requests()

    now = toy_build(replace(source_build, retry_reasons=frozenset({"http_404"})))

    assert web.take_requests() == {f"/{number}.jpg" for number in LATE}
    assert now.sources["cc3m"].counts.failed == {}
    fresh = build_in(tmp_path, "fresh", origin)
    assert toy_build(fresh).digest == now.digest
    assert contents(fresh) == contents(source_build)


def test_attempts_are_reported_and_reused_and_no_digest_covers_them(tmp_path):
    body = (write_pictures(tmp_path / "web", ["1.jpg"]) / "1.jpg").read_bytes()
    write_rows(tmp_path / "raw", [(f"picture {n}", f"http://a.test/{n}.jpg") for n in (1, 2, 3)])
    answers = {
        "1": [response(503), response(body=body)],
        "2": [response(500)] * 2,
        "3": [response(404)],
    }

    def respond(head):
        path = head.split(" ")[1]
        return response(404) if path == "/robots.txt" else answers[path[1]].pop(0)

    with FakeHost(respond) as host:
        source_build = build_in(tmp_path, "once", host.origin)
        source_build = replace(source_build, recipe=with_retries(source_build.recipe, 1))
        toy_build(source_build)
        assert attempts_above_one(source_build) == {"1": 2, "2": 2}
        key = key_of("cc3m", "http://a.test/1.jpg")
        with open_pool("local", 1, None) as pool:
            [trace] = find_traces(str(tmp_path / "once" / "data"), key, pool)
        assert "fetched: http://a.test/1.jpg, 2 requests" in list(trace_lines(trace))

        answers["2"] = [response(body=body)]
        again = toy_build(replace(source_build, retry_reasons=frozenset({"http_5xx"})))
        assert attempts_above_one(source_build) == {"1": 2}

        answers.update(
            {"1": [response(body=body)], "2": [response(body=body)], "3": [response(404)]}
        )
        fresh = build_in(tmp_path, "fresh", host.origin)
        assert toy_build(fresh).digest == again.digest


def with_retries(recipe, retries):
    return recipe.model_copy(update={"fetch": recipe.fetch.model_copy(update={"retries": retries})})


def attempts_above_one(source_build):
    """Attempts by the number in the address, where there was more than one."""
    number = {key_of("cc3m", f"http://a.test/{n}.jpg"): str(n) for n in range(NUM)}
    reports = [json.loads(path.read_bytes()) for path in Path(source_build.shards).glob("*.json")]
    found = {key: n for report in reports for key, n in report["timing"]["attempts"].items()}
    return {number[key]: attempts for key, attempts in found.items()}


def test_a_retry_for_another_reason_requests_nothing(tmp_path, web, origin):
    source_build = build_in(tmp_path, "again", origin)
    hide(web, LATE)
    before = toy_build(source_build)
    web.take_requests()

    now = toy_build(replace(source_build, retry_reasons=frozenset({"timeout"})))

    assert web.take_requests() == set()
    assert now.digest == before.digest


def test_a_retry_with_another_recipe_is_refused_and_changes_nothing(tmp_path, web, origin):
    source_build = build_in(tmp_path, "again", origin)
    toy_build(source_build)
    before = contents(source_build)
    other = build_in(tmp_path, "again", origin, images={"size": 32})

    with pytest.raises(PmdError, match="nothing of cc3m is built by this recipe"):
        toy_build(replace(other, retry_reasons=frozenset({"http_404"})))

    assert contents(source_build) == before


def test_a_damaged_earlier_shard_is_not_reused(tmp_path, web, origin):
    source_build = build_in(tmp_path, "again", origin)
    hide(web, LATE)
    toy_build(source_build)
    restore(web, LATE)
    for tar in Path(source_build.shards).glob("*.tar"):
        content = bytearray(tar.read_bytes())
        content[700] ^= 1
        tar.write_bytes(content)

    now = toy_build(replace(source_build, retry_reasons=frozenset({"http_404"})))

    rebuilt = [shard for shard in now.shards if shard.part in _parts(source_build, LATE)]
    fresh = toy_build(build_in(tmp_path, "fresh", origin))
    assert rebuilt
    for shard in rebuilt:
        assert shard.sha256 == fresh.shards[shard.part].sha256


@pytest.mark.parametrize("damaged", [slice(-20, None), slice(4, 500)])
def test_a_part_with_a_damaged_ledger_is_built_again_after_an_opt_out(
    tmp_path, web, origin, damaged
):
    source_build = build_in(tmp_path, "later", origin)
    before = toy_build(source_build)
    for ledger in Path(source_build.shards).glob("*.parquet"):
        content = bytearray(ledger.read_bytes())
        content[damaged] = bytes(len(content[damaged]))
        ledger.write_bytes(content)
    (tmp_path / "list.txt").write_text("host:nowhere.test\n")
    add_to_list(source_build.data, str(tmp_path / "list.txt"))

    assert toy_build(source_build).shards == before.shards


def _parts(source_build, numbers):
    """The parts with the pictures of these numbers."""
    keys = {key_of("cc3m", url_id(f"http://a.test/{number}.jpg")) for number in numbers}
    return {int(key, 16) * 6 >> 64 for key in keys}


def sha256_of_picture(source_build, number):
    ledgers = sorted(Path(source_build.shards).glob("*.parquet"))
    rows = pl.concat([pl.read_parquet(path) for path in ledgers])
    return rows.filter(pl.col("url") == f"http://a.test/{number}.jpg")["sha256"][0]


@pytest.mark.parametrize("name", ["address", "sha256"])
def test_an_opt_out_changes_one_shard_and_gives_the_shards_of_a_fresh_build(
    tmp_path, web, origin, name
):
    source_build = build_in(tmp_path, "later", origin)
    before = toy_build(source_build)
    old = contents(source_build)
    entry = "http://a.test/7.jpg" if name == "address" else sha256_of_picture(source_build, 7)
    (tmp_path / "list.txt").write_text(f"{entry}\n")
    web.take_requests()

    add_to_list(source_build.data, str(tmp_path / "list.txt"))
    now = toy_build(source_build)

    [part] = _parts(source_build, [7])
    changed = {file for file, content in contents(source_build).items() if old[file] != content}
    assert changed == {f"{part:05d}.tar", f"{part:05d}.parquet"}
    assert web.take_requests() == set(), "the rest of the shard is reused"
    counts = now.sources["cc3m"].counts
    assert counts.dropped == {REASON: 1}
    assert counts.kept == before.sources["cc3m"].counts.kept - 1
    assert counts.unaccounted() == 0
    assert now.sources["cc3m"].optout is not None
    fresh = build_in(tmp_path, "fresh", origin)
    add_to_list(fresh.data, str(tmp_path / "list.txt"))
    assert toy_build(fresh).digest == now.digest
    assert contents(fresh) == contents(source_build)


@pytest.mark.parametrize("moment", ["before the report is deleted", "after the report is deleted"])
def test_an_earlier_shard_is_reused_after_a_rebuild_that_was_interrupted(
    tmp_path, web, origin, monkeypatch, moment
):
    source_build = build_in(tmp_path, "later", origin)
    before = toy_build(source_build)
    (tmp_path / "list.txt").write_text("http://a.test/7.jpg\n")
    add_to_list(source_build.data, str(tmp_path / "list.txt"))
    hide(web, range(NUM))  # no picture can be fetched again
    remove = shard_module.remove

    def failing_remove(address):
        if moment == "after the report is deleted":
            remove(address)
        raise PmdError("the network went")

    with monkeypatch.context() as patch:
        patch.setattr(shard_module, "remove", failing_remove)
        with pytest.raises(PmdError, match="the network went"):
            toy_build(source_build)

    now = toy_build(source_build)

    assert now.sources["cc3m"].counts.kept == before.sources["cc3m"].counts.kept - 1
    assert not list(Path(source_build.shards).glob("*.before.json"))


def test_reports_in_the_driver_do_not_grow_with_the_records_of_a_part(tmp_path):
    answers = iter([response(503)] * 6)
    with FakeHost(lambda head: response(404) if "robots" in head else next(answers)) as host:
        write_rows(tmp_path / "raw", [(f"picture {n}", f"http://a.test/{n}.jpg") for n in range(3)])
        source_build = build_in(tmp_path, "once", host.origin)
        source_build = replace(source_build, recipe=with_retries(source_build.recipe, 1))
        reports_held = []
        with open_pool("local", 1, None) as pool:
            manifest_of = build_module.source_manifest

            def recording_manifest(recipe, index, reports, *rest):
                reports_held.extend(reports)
                return manifest_of(recipe, index, reports, *rest)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(build_module, "source_manifest", recording_manifest)
                build_module.build_source(source_build, pool, QUIET)
                build_module.build_source(source_build, pool, QUIET)  # from the reports on disk

    assert len(attempts_above_one(source_build)) == 3
    assert len(reports_held) >= 2
    assert all(report.timing.attempts == {} for report in reports_held)


def test_an_image_in_the_opt_out_list_is_not_requested(tmp_path, web, origin):
    source_build = build_in(tmp_path, "listed", origin)
    (tmp_path / "list.txt").write_text("host:a.test\n")
    add_to_list(source_build.data, str(tmp_path / "list.txt"))

    manifest = toy_build(source_build)

    assert web.take_requests() == set()
    assert manifest.sources["cc3m"].counts.dropped == {REASON: NUM}


def test_an_image_removed_from_the_list_is_fetched_again(tmp_path, web, origin):
    source_build = build_in(tmp_path, "back", origin)
    before = toy_build(source_build)
    (tmp_path / "list.txt").write_text("http://a.test/7.jpg\n")
    add_to_list(source_build.data, str(tmp_path / "list.txt"))
    toy_build(source_build)
    web.take_requests()

    Path(source_build.data, LIST).unlink()
    now = toy_build(source_build)

    assert now.digest == before.digest
    assert web.take_requests() == {"/7.jpg"}


def test_licences_select_records_and_may_change_between_builds(tmp_path, web, origin):
    source_build = build_in(tmp_path, "licences", origin)
    before = toy_build(source_build)
    web.take_requests()

    strict = build_in(tmp_path, "licences", origin, images={"licences": ["CC BY*"]})
    none = toy_build(strict)

    assert none.sources["cc3m"].counts.dropped == {"licence": NUM}
    assert none.sources["cc3m"].rules["images"]["licences"] == ["CC BY*"]
    assert web.take_requests() == set()
    assert toy_build(source_build).digest == before.digest


def test_an_opt_out_list_holds_for_later_builds_too(tmp_path, web, origin):
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


def test_only_failure_reasons_can_be_retried():
    assert parse_reasons(["timeout,dns", "http_5xx"]) == {"timeout", "dns", "http_5xx"}
    with pytest.raises(PmdError, match="did you mean 'timeout'"):
        parse_reasons(["timeouts"])


def test_the_retry_command_repairs_failures(tmp_path, web, origin, capsys):
    text = f'[fetch]\nretries = 0\nconnect_to = {{"*" = "{origin}"}}\n[images]\nsize = 64\n'
    (tmp_path / "mine.toml").write_text(f'source = "cc3m"\n{text}')
    options = ["--recipe", str(tmp_path / "mine.toml"), "--raw", str(tmp_path / "raw"), "-q"]
    options += ["--runner", "local", "--workers", "1", "--out", str(tmp_path / "data")]
    options += ["--manifests", str(tmp_path / "manifests")]
    hide(web, LATE)
    cli.app(["build", *options], standalone_mode=False)
    restore(web, LATE)

    cli.app(["retry", "--reason", "http_404", *options], standalone_mode=False)

    path, digest = capsys.readouterr().out.splitlines()[-1].split()
    manifest = load_manifest(path)
    assert manifest.digest == digest
    assert manifest.sources["cc3m"].counts.kept == NUM
    assert json.loads(Path(path).read_text())["sources"]["cc3m"]["counts"]["failed"] == {}
