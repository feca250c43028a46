import base64
import hashlib
import io
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, open_browser
from hypothesis import given
from hypothesis import strategies as st
from toy import QUIET, toy_build, toy_recipe, toy_source_build, write_pictures, write_rows

from pmd_pipeline import cli
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import write_whole
from pmd_pipeline.contract.manifest import load_manifest, save_manifest
from pmd_pipeline.contract.models import Counts, Manifest, ShardEntry, SourceEntry
from pmd_pipeline.demo import quickstart
from pmd_pipeline.filters import caption as caption_filters
from pmd_pipeline.inspect.report import charts, duplicates, gallery, ledgers
from pmd_pipeline.inspect.report.funnel import meaning
from pmd_pipeline.inspect.report.hosts import host_stats
from pmd_pipeline.inspect.report.page import (
    link,
    page,
    percent,
    short_bytes,
    source_section,
    visible,
)
from pmd_pipeline.inspect.stats import lengths

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)> {{ 7 * 7 }} {% raw %}",
    "turned \u202e around and \u2066 not closed",
    "nothing \0 at all \x1b[31m",
    "a" * 10_000,
    "👩‍👩‍👧‍👦 a family, 🇫🇷 a flag, שלום and سلام",
    "</style></title><base href=//evil.test><meta http-equiv=refresh content=0>",
]
ADDRESSES = [
    "javascript:alert(1)",
    'http://a.test/"onmouseover="alert(1)',
    "data:text/html,<script>alert(2)</script>",
]


class ParsedPage(HTMLParser):
    """Elements with their attributes, and all text, as an HTML parser finds them."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.words = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The manifest of a build with hostile captions, and hostile addresses without images."""
    folder = tmp_path_factory.mktemp("report")
    rows = [(caption, f"http://a.test/{n}.jpg") for n, caption in enumerate(HOSTILE)]
    rows += [("a caption of nothing", address) for address in ADDRESSES]
    write_rows(folder / "raw", [*rows, ("a bad row", "nowhere")])
    pictures = write_pictures(folder / "pictures", [f"{n}.jpg" for n in range(len(HOSTILE))])
    order = toy_source_build(folder, toy_recipe(part_records=4), pictures=pictures)
    toy_build(order)
    return order.manifest


def section_of(path):
    manifest = load_manifest(path)
    return source_section(path, manifest, lengths(manifest)[0], ledgers.data_folder(path, manifest))


def test_kept_pairs_and_loss_reasons_add_up(built):
    section = section_of(built)

    counts = section.entry.counts
    assert counts.kept > 0
    assert counts.kept + sum(reason.pairs for reason in section.reasons) == counts.pairs_in
    assert [step.count for step in section.steps][1:] == [
        counts.pairs_in,
        counts.pairs_in - sum(counts.dropped.values()),
        counts.kept,
    ]


def test_every_reason_has_a_meaning_and_an_example(built):
    section = section_of(built)

    assert {reason.name for reason in section.reasons} == section.lost.keys()
    assert all(reason.meaning for reason in section.reasons)


def test_hostile_captions_and_addresses_are_text(built):
    parsed = ParsedPage(page(built, None))

    tags = {tag for tag, _ in parsed.elements}
    assert tags.isdisjoint({"script", "base", "iframe", "object", "form", "link"})
    names = {name for _, attributes in parsed.elements for name in attributes}
    assert not [name for name in names if name.startswith("on") or name == "style"]
    links = [attributes["href"] for tag, attributes in parsed.elements if tag == "a"]
    assert all(one.startswith(("http://", "https://", "#")) for one in links)
    for shown in (*HOSTILE[:3], *ADDRESSES, "turned [U+202E] around", "nothing [U+0000] at all"):
        assert shown in parsed.text


def test_external_links_send_no_referrer(built):
    parsed = ParsedPage(page(built, None))

    strangers = [a for tag, a in parsed.elements if tag == "a" and "//a.test" in a["href"]]
    assert strangers
    assert all({"noreferrer", "nofollow"} <= set(one["rel"].split()) for one in strangers)


def test_the_page_makes_no_requests(built):
    html = page(built, None)

    parsed = ParsedPage(html)
    policy = next(a["content"] for tag, a in parsed.elements if "http-equiv" in a)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"style-src 'sha256-{digest}'" in policy
    assert "url(" not in style
    assert "@import" not in style
    pictures = [attributes["src"] for tag, attributes in parsed.elements if tag == "img"]
    assert pictures
    assert all(one.startswith("data:image/jpeg;base64,") for one in pictures)


def test_the_page_has_no_control_or_direction_characters(built):
    html = page(built, None)

    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)


def test_the_same_build_gives_the_same_page(built, monkeypatch, tmp_path):
    first = page(built, None)

    monkeypatch.chdir(tmp_path)
    assert page(built, None) == first


def test_the_page_states_how_much_of_a_source_was_sampled(built, monkeypatch):
    assert "Sizes, hosts, languages" not in page(built, None)
    monkeypatch.setattr(ledgers, "MAX_RECORDS", 5)

    section, html = section_of(built), page(built, None)

    sampled, records = section.records
    assert 0 < sampled < records
    assert f"are from {sampled} of {records} records" in ParsedPage(html).text


def test_a_page_without_an_index_states_that(built, tmp_path):
    html = page(built, str(tmp_path))

    assert "The index of this build was not found" in html
    assert "rows upstream" not in html


def test_the_index_of_another_recipe_is_not_used(built):
    manifest = load_manifest(built)
    entry = manifest.sources["cc3m"]
    data = ledgers.data_folder(built, manifest)
    other = entry.model_copy(update={"rules": {**entry.rules, "part_records": 1}})

    assert ledgers.matching_index(data, "cc3m", entry)
    assert ledgers.matching_index(data, "cc3m", other) is None


def test_a_ledger_that_the_manifest_does_not_name_is_refused(built, tmp_path):
    manifest = load_manifest(built)
    first = manifest.shards[0].model_copy(update={"ledger_sha256": "0" * 64})
    changed = manifest.model_copy(update={"shards": [first, *manifest.shards[1:]]})
    changed = changed.model_copy(update={"digest": changed.computed_digest()})
    path = str(Path(built).with_name("other.json"))
    save_manifest(path, changed)

    with pytest.raises(PmdError, match="is not the ledger that"):
        page(path, None)


def test_a_ledger_that_is_no_parquet_is_one_sentence(tmp_path):
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 nothing PAR1")

    with pytest.raises(PmdError, match="is no readable Parquet file"):
        ledgers.read_columns(str(tmp_path / "00000.parquet"), ["key"])


def test_an_unreadable_stored_image_is_a_sentence_on_the_page(built):
    manifest = load_manifest(built)
    sample = ledgers.sample_ledgers(built, manifest, "cc3m")
    broken = replace(sample, rows=sample.rows.with_columns(image_offset=pl.col("json_offset")))

    images = gallery.gallery_images(broken)

    assert images
    assert all(one.image is None and "cannot be read" in one.problem for one in images)


def manifest_of(folder, **changes):
    """A manifest of one shard at `folder`; its path."""
    path = str(folder / "manifest.json")
    stated = {"licence": "x", "citation": "y", "images": 0, "unique_images": 0, "upstream": []}
    entry = SourceEntry(
        **stated,
        counts=Counts(pairs_in=3, kept=2, dropped={"no_text": 1}),
        words={3: 1, 4: 1},
        rules={},
        rules_sha256="0" * 64,
        leakage="none",
    )
    made = Manifest(name="toy", sources={"ccnews": entry}, versions={}, **changes)
    save_manifest(path, made.model_copy(update={"digest": made.computed_digest()}))
    return path


def test_texts_are_shown_without_images(tmp_path):
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["one <b>text</b> here", "and another text there"]}), out)
    (tmp_path / "00000.parquet").write_bytes(out.getvalue())
    sha256 = hashlib.sha256(out.getvalue()).hexdigest()
    stated = {"source": "ccnews", "part": 0, "num_bytes": 1, "records": 2, "images": 0, "pairs": 2}
    shard = ShardEntry(path="00000.parquet", sha256=sha256, ledger_sha256=sha256, **stated)

    parsed = ParsedPage(page(manifest_of(tmp_path, kind="text", shards=[shard]), None))

    assert "one <b>text</b> here" in parsed.text
    assert "texts kept" in parsed.text
    assert (
        "caption" not in parsed.text.partition("How it was made")[0].partition("To the content")[2]
    )
    assert "Duplicates" not in parsed.text


def test_a_manifest_without_shards_has_a_page(tmp_path):
    parsed = ParsedPage(page(manifest_of(tmp_path, shards=[]), None))

    assert "toy" in parsed.text
    assert not [tag for tag, _ in parsed.elements if tag == "img"]


def test_shards_at_another_address_give_the_same_page(built):
    data, manifest = Path(built).parents[1] / "data", load_manifest(built)
    for path in data.rglob("*"):
        if path.is_file():
            address = f"memory://report/data/{path.relative_to(data).as_posix()}"
            write_whole(address, path.read_bytes())
    far = [
        shard.model_copy(update={"path": shard.path.replace("../", "memory://report/")})
        for shard in manifest.shards
    ]
    save_manifest("memory://report/cc3m.json", manifest.model_copy(update={"shards": far}))

    assert page("memory://report/cc3m.json", None) == page(built, None)


def test_captions_of_one_box_share_a_region():
    box, other = (0.1, 0.2, 0.5, 0.6), (0.0, 0.0, 1.0, 1.0)

    regions = gallery._caption_regions([box, None, other, box])

    assert [(one.numbers, one.x, one.y, one.width, one.height) for one in regions] == [
        ("1, 4", 10, 20, 40, 40),
        ("3", 0, 0, 100, 100),
    ]


hashes = st.lists(st.integers(0, duplicates._NUM_HASHES - 1), max_size=30)


@given(
    shards=st.lists(st.tuples(st.integers(0, 2), hashes), max_size=6),
    max_hashes=st.sampled_from([4, 1000]),
)
def test_an_image_is_counted_with_all_its_copies_or_left_out(shards, max_hashes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "MAX_HASHES", max_hashes)
        copies, limit = duplicates.count_copies(
            (source, pl.Series(of_shard, dtype=pl.Int64)) for source, of_shard in shards
        )

    expected = Counter(
        (one, source) for source, of_shard in shards for one in of_shard if one < limit
    )
    assert {(one, source): n for one, source, n in copies.iter_rows()} == expected
    assert limit == duplicates._NUM_HASHES or max_hashes == 4


def test_duplicates_across_sources_are_counted_by_pairs_of_sources():
    copies, limit = duplicates.count_copies(
        [(0, pl.Series([1, 2, 3, 3])), (1, pl.Series([2, 3])), (2, pl.Series([3]))]
    )

    stats = duplicates._duplicate_stats(copies, limit, ["a", "b", "c"])

    assert stats.distinct == 3
    assert stats.repeated == 2
    assert stats.shared == {("a", "b"): 2, ("a", "c"): 1, ("b", "c"): 1}
    assert stats.most == ("000000000000003", 4)


@given(
    words=st.dictionaries(st.integers(0, 400), st.integers(1, 50), min_size=1),
    paper=st.none() | st.floats(1, 20),
)
def test_the_bars_of_a_histogram_add_up_to_all_captions(words, paper):
    chart = charts.lengths_chart(words, paper)

    scale = chart.y_ticks[-1].position  # of the highest tick
    percent_there = int(chart.y_ticks[-1].text.removesuffix("%"))
    unit = (charts.BOTTOM - scale) / percent_there if percent_there else 0
    assert sum(bar.height for bar in chart.bars) == pytest.approx(100 * unit, rel=0.01)
    for bar in chart.bars:
        assert bar.x >= charts.LEFT
        assert bar.x + bar.width <= charts.RIGHT + 0.1
        assert bar.y >= charts.TOP - 0.1
    assert all(charts.LEFT <= marker.position <= charts.RIGHT for marker in chart.markers)
    assert len(chart.bars) <= charts.MAX_BARS + 1


def test_square_images_are_in_the_middle_of_the_aspect_ratios():
    chart = charts.aspect_ratios_chart(np.array([1.0, 1.0, 1.0]))

    middle = next(tick.position for tick in chart.x_ticks if tick.text == "1:1")
    assert [bar.x <= middle <= bar.x + bar.width for bar in chart.bars] == [True]
    assert "0% wider than high" in chart.summary


def test_the_outer_bars_include_extreme_sides():
    chart = charts.sides_chart(np.array([1, 60_000]))

    assert len(chart.bars) == 2
    assert charts.sides_chart(np.array([], dtype=np.int64)) is None


def test_a_filter_is_described_by_its_docstring():
    rules = {"captions": {"filters": {"has_words": {"least": 3}}}}

    description = meaning("has_words", rules)

    assert "least = 3" in description
    assert caption_filters.has_words.__doc__.partition(" ")[0] in description
    assert meaning("http_404", rules) == "not found"


def test_a_reason_from_outside_the_package_is_described_without_importing_it():
    rules = {"images": {"filters": {"nowhere:is_wide": {"least": 2.0}}}}

    assert meaning("nowhere:is_wide", rules) == (
        "a filter of the recipe, from outside the package, least = 2.0"
    )
    assert meaning("no_species", rules) == "the source's own reason"


def test_hosts_are_counted_with_their_success_rates():
    rows = pl.DataFrame(
        {
            "url": ["http://A.test/1", "https://u:p@a.test:80/2", "http://b.test/", None, "x"],
            "status": ["success", "failed_to_download", "dropped", "success", "success"],
            "reason": [None, "dns", "is_large", None, None],
        }
    )

    found = host_stats(ledgers.LedgerSample(rows, (0,), 5))

    assert [(one.name, one.records, one.share, one.failure) for one in found] == [
        ("a.test", 2, 0.5, "dns"),
        ("b.test", 1, 1.0, None),
    ]


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "http://", "http://[::1", "http://a b/", "//a.test", "", None]
)
def test_only_web_addresses_become_links(url):
    assert link(url) is None


def test_cut_text_states_its_length():
    assert visible("a" * 10_000, 5) == "aaaaa … (10,000 characters)"
    assert visible("left\u202eright\0") == "left[U+202E]right[U+0000]"
    assert visible("👩‍👩‍👧 שלום") == "👩‍👩‍👧 שלום"


def test_shares_close_to_0_or_1_are_not_rounded_to_them():
    assert [percent(share) for share in (0, 1e-9, 0.5, 1 - 1e-9, 1)] == [
        "0%",
        "< 0.1%",
        "50.0%",
        "> 99.9%",
        "100%",
    ]
    assert [short_bytes(n) for n in (0, 999, 1000, 2_500_000, 10**15)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "2.5 MB",
        "1,000.0 TB",
    ]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_marks_have_enough_contrast(built, theme):
    style = re.search(r"<style>(.*?)</style>", page(built, None), re.DOTALL)[1]
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", blocks[theme]))

    def light(name):
        channels = [int(colours[name][at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        low, high = sorted((light(one), light(other)))
        return (high + 0.05) / (low + 0.05)

    for ground in ("paper", "card", "wash"):
        for text, least in (("ink", 7), ("soft", 4.5), ("kept", 3), ("dropped", 3), ("failed", 3)):
            assert contrast(text, ground) >= least, (text, ground)


def test_the_command_writes_the_page(built, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "page.html"
    monkeypatch.setattr(sys, "argv", ["pmd", "report", built, "--out", str(out)])

    with pytest.raises(SystemExit) as left:
        cli.main()

    assert left.value.code == 0
    assert out.read_text(encoding="utf-8") == page(built, None)
    assert str(out) in capsys.readouterr().err


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    """The page on the sample world of all nine sources."""
    folder = tmp_path_factory.mktemp("nine")
    quickstart.run(folder, 60, "local", 1, QUIET)
    out = folder / "report.html"
    out.write_text(page(str(folder / "manifests" / "pmd.json"), None), encoding="utf-8")
    return out


@pytest.mark.slow
def test_the_page_about_nine_sources_has_less_than_3_mb(nine):
    assert nine.stat().st_size < 3_000_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; PMD_BROWSER names one")
def test_the_page_fits_and_loads_in_a_browser(nine, built, tmp_path):
    hostile = tmp_path / "hostile.html"
    hostile.write_text(page(built, None), encoding="utf-8")
    with open_browser(tmp_path / "profile") as browser:
        for path in (nine, hostile):
            for width, dark in ((1280, False), (1280, True), (390, False), (390, True)):
                browser.show(path, width=width, dark=dark)
                browser.evaluate(
                    "document.querySelectorAll('details').forEach(one => one.open = true)"
                )

                wide = "[document.documentElement.scrollWidth, window.innerWidth]"
                inside, window = browser.evaluate(wide)
                assert inside <= window == width
                hidden = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 0))"
                assert browser.evaluate("document.images.length") > 0
                assert browser.evaluate(f"{hidden}.length") == 0
                ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
                assert ground == ("rgb(19, 21, 25)" if dark else "rgb(250, 249, 246)")
    assert browser.console == []
    assert {one.partition(":")[0] for one in browser.requested} == {"file", "data"}
