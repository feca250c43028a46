import base64
import csv
import email
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import warnings
import zipfile
from pathlib import Path

import pytest
import tomli_w
from fake_host import serve_folder
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from toy import QUIET, toy_recipe, toy_rows, write_pictures, write_rows

from pmd_pipeline import cli, sources
from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import load_manifest, save_manifest
from pmd_pipeline.contract.models import CodeRules, Manifest, ShardEntry, SourceEntry
from pmd_pipeline.dataset.build import build_source
from pmd_pipeline.dataset.manifest import merge_manifests
from pmd_pipeline.dataset.source_build import SourceBuild
from pmd_pipeline.publish.bundle import project as projects
from pmd_pipeline.publish.bundle.contents import (
    BundleRequest,
    build_commands,
    codes_command,
    contents,
    with_relative_paths,
)
from pmd_pipeline.publish.bundle.croissant import croissant
from pmd_pipeline.publish.bundle.pack import SUMS, pack
from pmd_pipeline.publish.bundle.project import Project, this_project
from pmd_pipeline.publish.bundle.provenance import provenance
from pmd_pipeline.publish.bundle.recipes import _without_none, recipe_toml
from pmd_pipeline.publish.bundle.requirements import pins, requirements_text, with_hashes
from pmd_pipeline.publish.bundle.wheel import wheel
from pmd_pipeline.publish.lockfile.format import load_lockfile
from pmd_pipeline.publish.lockfile.lock import lock
from pmd_pipeline.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PICTURES = 12


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """Twelve pictures, two of them gone, on a host of this machine; its address and port."""
    folder = tmp_path_factory.mktemp("web")
    write_pictures(folder, [f"{number}.jpg" for number in range(PICTURES - 2)])

    with serve_folder(folder) as origin:
        yield origin.removeprefix("http://")


@pytest.fixture(scope="module")
def built(web, tmp_path_factory):
    """A toy build from that host in three parts or so; the folder it lies in."""
    folder = tmp_path_factory.mktemp("bundle")
    write_rows(folder / "raw", toy_rows(PICTURES))
    recipe = toy_recipe(part_records=4, fetch={"connect_to": {"a.test": web}, "retries": 0})
    source_build = SourceBuild(
        recipe=recipe,
        raw=str(folder / "raw"),
        data=str(folder / "data"),
        manifest=str(folder / "manifests" / "cc3m.json"),
    )
    with open_pool("local", 1, None) as pool:
        _, failures = build_source(source_build, pool, QUIET)
    assert failures == []
    return folder


@pytest.fixture(scope="module")
def manifest(built):
    return load_manifest(str(built / "manifests" / "cc3m.json"))


@pytest.fixture(scope="module")
def members(built):
    return contents(BundleRequest(str(built / "manifests" / "cc3m.json")))


def entry(rules, **known):
    stated = {"licence": "x", "citation": "y", "counts": {}, "images": 0, "unique_images": 0}
    stated |= {"words": {}, "upstream": [], "leakage": "none"}
    return SourceEntry(**stated | {"rules": rules, "rules_sha256": digest(rules)} | known)


def digests_agree(folder):
    lines = (folder / SUMS).read_text().splitlines()
    named = dict(reversed(line.split("  ", 1)) for line in lines)
    there = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != SUMS
    }
    assert there == named
    return there


def test_a_bundle_has_all_that_rebuilds_describes_and_trains(members):
    names = set(members)

    assert {
        "README.md", "DATA_CARD.md", "manifest.json", "croissant.json", "provenance.json",
        "requirements.txt", "recipes/cc3m.toml", "configs/flava_pmd.toml",
    } <= names  # fmt: skip
    assert any(re.fullmatch(r"wheel/pmd_flava-.*\.whl", name) for name in names)


def test_a_folder_and_a_tar_hold_the_same_files_whose_digests_agree(members, tmp_path):
    pack(members, str(tmp_path / "folder"))
    pack(members, str(tmp_path / "one.tar"))
    with tarfile.open(tmp_path / "one.tar") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
        infos = tar.getmembers()

    assert digests_agree(tmp_path / "folder") == digests_agree(tmp_path / "unpacked")
    assert {(one.mtime, one.uid, one.gid, one.mode) for one in infos} == {(0, 0, 0, 0o644)}


def test_the_same_dataset_gives_the_same_tar(built, tmp_path):
    request = BundleRequest(str(built / "manifests" / "cc3m.json"))

    for name in ("one.tar", "two.tar"):
        pack(contents(request), str(tmp_path / name))

    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_a_folder_with_other_files_is_not_written(members, tmp_path):
    pack(members, str(tmp_path / "folder"))
    assert pack(members, str(tmp_path / "folder")) == len(members) + 1
    (tmp_path / "folder" / "mine.txt").write_text("mine")

    with pytest.raises(PmdError, match="holds other files"):
        pack(members, str(tmp_path / "folder"))


def test_the_manifest_keeps_its_version_and_finds_shards_built_beside_it(
    members, manifest, tmp_path
):
    (tmp_path / "manifest.json").write_bytes(members["manifest.json"])

    again = load_manifest(str(tmp_path / "manifest.json"))

    assert again.digest == manifest.digest
    assert [shard.path for shard in again.shards] == [
        f"data/shards/cc3m/{shard.part:05d}.tar" for shard in manifest.shards
    ]


def test_shards_at_an_address_stay_there(manifest):
    far = [
        shard.model_copy(update={"path": f"s3://b/{shard.part}.tar"}) for shard in manifest.shards
    ]

    again = with_relative_paths(manifest.model_copy(update={"shards": far}))

    assert again.shards == far


@pytest.mark.parametrize("name", ["../../evil", "a b", "", "-rf"])
def test_a_name_that_leads_elsewhere_is_refused(manifest, name):
    with pytest.raises(PmdError, match="cannot name a file"):
        with_relative_paths(manifest.model_copy(update={"name": name}))


@pytest.mark.parametrize("name", sources.names())
def test_a_recipe_in_a_bundle_has_the_rules_of_the_recipe(name, tmp_path):
    rules = load_recipe(name)[0].rules()
    path = tmp_path / f"{name}.toml"

    path.write_text(recipe_toml(name, entry(rules)), encoding="utf-8")

    assert load_recipe(str(path))[0].rules() == rules


names = st.text(min_size=1, max_size=6)
plain = st.one_of(
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False, allow_infinity=False),
    names,
)
values = st.one_of(plain, st.lists(plain, max_size=3))
tables = st.recursive(
    st.dictionaries(names, values, max_size=4),
    lambda inner: st.dictionaries(names, st.one_of(values, inner), max_size=4),
)


@given(rules=tables)
def test_any_rules_survive_toml(rules):
    assert tomllib.loads(tomli_w.dumps(_without_none(rules))) == rules


def test_a_rule_that_is_none_is_left_out_of_toml():
    assert _without_none({"a": None, "b": {"c": None, "d": [1]}}) == {"b": {"d": [1]}}


def test_rules_of_another_version_are_refused():
    rules = load_recipe("cc3m")[0].rules()

    with pytest.raises(PmdError, match="bundle with the version"):
        recipe_toml("cc3m", entry({**rules, "unheard_of": 1}))


def test_a_manifest_of_many_has_one_recipe_that_includes_theirs(manifest, tmp_path):
    rules = load_recipe("sbu")[0].rules()
    other = Manifest(name="sbu", sources={"sbu": entry(rules)}, shards=[], versions={})
    path = str(tmp_path / "manifests" / "both.json")
    both = merge_manifests("both", path, [(path, manifest), (path, other)])
    save_manifest(path, both)

    made = contents(BundleRequest(path))
    pack(made, str(tmp_path / "bundle"))

    recipes = load_recipe(str(tmp_path / "bundle" / "recipes" / "both.toml"))
    assert {one.source: one.rules() for one in recipes} == {
        name: one.rules for name, one in both.sources.items()
    }
    assert list(build_commands(both)) == ["pmd build --recipe recipes/both.toml"]


def test_sources_of_different_limits_are_built_one_by_one(manifest):
    rules = load_recipe("sbu")[0].rules()
    both = {**manifest.sources, "sbu": entry(rules, limit=7)}

    commands = list(build_commands(manifest.model_copy(update={"sources": both})))

    assert commands[:2] == [
        "pmd build --recipe recipes/sources/cc3m.toml",
        "pmd build --recipe recipes/sources/sbu.toml --limit 7",
    ]
    assert commands[2].startswith("pmd merge ")


def test_image_codes_have_their_command(manifest, built, tmp_path):
    assert codes_command(manifest) is None
    rules = CodeRules(
        tokenizer="kmeans", sha256="0" * 64, vocabulary=64, size=64, grid=8, views=2, seed=3
    )
    coded = manifest.model_copy(update={"codes": rules})
    coded = coded.model_copy(update={"digest": coded.computed_digest()})
    save_manifest(str(tmp_path / "coded.json"), coded)

    readme = contents(BundleRequest(str(tmp_path / "coded.json")))["README.md"].decode()

    command = codes_command(coded)
    assert command.endswith("--vocabulary 64 --grid 8 --views 2 --seed 3")
    assert command in readme
    assert "0" * 64 in readme


def validated(path):
    """The dataset that mlcroissant reads from `path`; it may complain of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlcroissant  # noqa: PLC0415 - slow

        dataset = mlcroissant.Dataset(path)
        from mlcroissant._src.core.rdf import make_context  # noqa: PLC0415 - slow

        context = json.loads(Path(path).read_text())["@context"]
        assert context == make_context(dataset.metadata.ctx)  # of another it warns in its log only
        issues = dataset.metadata.ctx.issues
        assert not issues.errors
        assert not issues.warnings
        return dataset


@pytest.fixture(scope="module")
def described(built, tmp_path_factory):
    """A bundle with its shards rebuilt, and its Croissant description read."""
    folder = tmp_path_factory.mktemp("described")
    path = str(built / "manifests" / "cc3m.json")
    pack(contents(BundleRequest(path, url="https://a.test/", published="2026-11-21")), str(folder))
    shutil.copytree(built / "data" / "shards", folder / "data" / "shards")
    dataset = validated(folder / "croissant.json")
    extract = sys.modules["mlcroissant._src.operation_graph.operations.extract"]
    with pytest.MonkeyPatch.context() as patch:
        # its cache knows tars by their relative path alone, so it would hand out another build's
        patch.setattr(extract, "EXTRACT_PATH", extract.epath.Path(folder / "extracted"))
        yield folder, dataset


def test_croissant_is_valid_and_names_every_file_by_its_digest(described, manifest):
    folder, dataset = described

    files = {
        node.uuid: node.sha256
        for node in dataset.metadata.distribution
        if type(node).__name__ == "FileObject"
    }

    assert dataset.metadata.ctx.is_v1_1()
    assert len(files) == 2 * len(manifest.shards)
    for path, sha256 in files.items():
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == sha256


def test_records_are_read_through_croissant(described, manifest):
    _, dataset = described

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = list(dataset.records("cc3m/records"))
        pictures = list(dataset.records("cc3m/pictures-by-key"))
        texts = list(dataset.records("cc3m/descriptions-by-key"))

    kept = {row["cc3m/records/key"] for row in rows if row["cc3m/records/status"] == b"success"}
    assert len(rows) == PICTURES
    assert {one["cc3m/pictures-by-key/key"] for one in pictures} == kept
    captions = [json.loads(one["cc3m/descriptions-by-key/content"])["captions"] for one in texts]
    assert sum(map(len, captions)) == manifest.sources["cc3m"].counts.kept


def with_format(manifest, name):
    """The manifest with rules that store images in this format; JPEG is the format of none."""
    [(source, stated)] = manifest.sources.items()
    images = {**stated.rules["images"], "format": name}
    changed = stated.model_copy(update={"rules": {**stated.rules, "images": images}})
    return manifest.model_copy(update={"sources": {source: changed}})


def test_croissant_describes_images_in_their_format(manifest):
    described = croissant(with_format(manifest, "webp"), None, None)

    [images] = [one for one in described["distribution"] if one["@id"] == "cc3m/pictures"]
    assert (images["encodingFormat"], images["includes"]) == ("image/webp", ["*.webp"])
    [by_key] = [one for one in described["recordSet"] if one["@id"] == "cc3m/pictures-by-key"]
    assert by_key["field"][0]["source"]["transform"] == {"regex": r"^(.*)\.webp$"}
    assert croissant(with_format(manifest, "jpeg"), None, None) == croissant(manifest, None, None)


def test_a_stored_format_of_another_version_is_one_sentence(manifest):
    with pytest.raises(PmdError, match="the rules of cc3m store images as avif"):
        croissant(with_format(manifest, "avif"), None, None)


@pytest.mark.parametrize("far", [False, True], ids=["here", "at an address"])
@pytest.mark.parametrize("kind", ["pairs", "images", "text"])
def test_croissant_is_valid_for_every_kind_of_dataset(manifest, kind, far, tmp_path):
    base = "https://a.test" if far else "data/shards/cc3m"
    path = f"{base}/00000.{'parquet' if kind == 'text' else 'tar'}"
    shard = ShardEntry(**{**manifest.shards[0].model_dump(), "path": path, "views": 1})
    if kind != "text":
        shard = shard.model_copy(update={"codes_sha256": "1" * 64})
    changed = manifest.model_copy(update={"kind": kind, "shards": [shard]})

    described = croissant(changed, "https://a.test/", "2026-11-21")
    (tmp_path / "croissant.json").write_text(json.dumps(described))

    validated(tmp_path / "croissant.json")
    patterns = [one for node in described["distribution"] for one in node.get("includes", ())]
    assert not [one for one in patterns if "://" in one]  # a pattern is one of files here


def test_provenance_names_every_output_and_every_input_by_digest(manifest):
    statement = provenance(
        with_relative_paths(manifest), ("pmd_flava-0.1.0-py3-none-any.whl", "2" * 64)
    )

    made = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    used = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert made.pop("dataset cc3m") == manifest.digest
    assert list(made.values()) == [shard.sha256 for shard in manifest.shards]
    upstream = manifest.sources["cc3m"].upstream
    assert [one["digest"]["sha256"] for one in used] == [*(u.sha256 for u in upstream), "2" * 64]
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert "time" not in json.dumps(statement).lower()


def test_the_data_card_has_counts_failures_and_licences(members, manifest):
    card = members["DATA_CARD.md"].decode()

    counts = manifest.sources["cc3m"].counts
    assert counts.failed
    assert f"| cc3m | {counts.pairs_in} | {counts.kept} |" in card
    for reason, number in counts.failed.items():
        assert f"{reason} {number}" in card
    assert manifest.sources["cc3m"].licence in card
    assert manifest.digest in card


def test_pins_are_what_is_installed_and_all_that_it_needs():
    pinned = {pin.name: pin.version for pin in pins(this_project().requires)}

    assert {"numpy", "jinja2", "markupsafe", "pydantic-core", "torch"} <= pinned.keys()
    assert "pytest" not in pinned
    assert not [version for version in pinned.values() if "+" in version]


def test_what_is_not_installed_cannot_be_pinned():
    with pytest.raises(PmdError, match="needs no-such-thing, which is not installed"):
        pins(["no-such-thing>=1"])


def test_an_extra_that_is_not_installed_is_left_out():
    requires = ["packaging", 'no-such-thing>=1 ; extra == "train"']

    assert [pin.name for pin in pins(requires)] == ["packaging"]


def pip_report(*known):
    return json.dumps(
        {
            "version": "1",
            "install": [
                {
                    "metadata": {"name": name, "version": version},
                    "download_info": {"archive_info": {"hashes": {"sha256": sha256}}},
                }
                for name, version, sha256 in known
            ],
        }
    )


def test_hashes_of_pips_report_stand_beside_the_versions(tmp_path):
    pinned = pins(["packaging"])
    report = tmp_path / "report.json"
    report.write_text(pip_report(("Packaging", f"{pinned[0].version}+cpu", "3" * 64)))

    text = requirements_text(with_hashes(pinned, str(report)))

    line = f"packaging=={pinned[0].version} \\\n    --hash=sha256:{'3' * 64}\n"
    assert text.endswith(line)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pip_report(("packaging", "0.0", "3" * 64)), "has no sha256 of packaging"),
        ("[]", "not a report"),
    ],
)
def test_a_report_without_the_hashes_is_refused(content, words, tmp_path):
    report = tmp_path / "report.json"
    report.write_text(content)

    with pytest.raises(PmdError, match=words):
        with_hashes(pins(["packaging"]), str(report))


def test_metadata_of_a_checkout_is_that_of_pyproject():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    metadata = email.message_from_string(this_project().metadata["METADATA"])

    always = {one for one in metadata.get_all("Requires-Dist") if "extra" not in one}
    assert set(map(Requirement, always)) == set(map(Requirement, stated["dependencies"]))
    assert set(metadata.get_all("Provides-Extra")) == set(stated["optional-dependencies"])


def test_metadata_is_that_of_the_installation_without_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(projects, "CHECKOUT", tmp_path)

    installed = this_project()

    assert "Name: pmd-flava" in installed.metadata["METADATA"]
    assert "pmd = pmd_pipeline.cli:main" in installed.metadata["entry_points.txt"]


def test_every_file_of_a_wheel_is_in_its_record():
    name, content = wheel(Project("1.2.3", [], {"METADATA": "Name: pmd-flava\n"}))

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        there = {one: archive.read(one) for one in archive.namelist()}
    record = "pmd_flava-1.2.3.dist-info/RECORD"
    rows = list(csv.reader(there[record].decode().splitlines()))
    assert name == "pmd_flava-1.2.3-py3-none-any.whl"
    assert {row[0] for row in rows} == there.keys()
    for path, sha256, size in rows:
        if path != record:
            found = hashlib.sha256(there[path]).digest()
            assert sha256 == f"sha256={base64.urlsafe_b64encode(found).decode().rstrip('=')}"
            assert int(size) == len(there[path])
    assert {
        "pmd_pipeline/_recipes/pmd.toml",
        "pmd_pipeline/inspect/report/templates/page.html",
        "pmd_pipeline/py.typed",
        "flava_train/__init__.py",
    } <= there.keys()
    assert not [path for path in there if "__pycache__" in path]


@pytest.fixture(scope="module")
def lock_folder(built, tmp_path_factory):
    """The lock file of that build."""
    folder = tmp_path_factory.mktemp("kit") / "kit"
    with open_pool("local", 1, None) as pool:
        lock(str(built / "manifests" / "cc3m.json"), str(folder), pool, QUIET)
    return folder


def test_a_lock_file_is_packed_as_it_is(built, lock_folder, tmp_path):
    (lock_folder / ".00000.parquet.1234.tmp").write_bytes(b"left by a killed process")
    path = str(built / "manifests" / "cc3m.json")

    made = contents(BundleRequest(path, lockfile=str(lock_folder)))
    pack(made, str(tmp_path / "bundle"))

    assert load_lockfile(str(tmp_path / "bundle" / "kit")) == load_lockfile(str(lock_folder))
    assert "pmd rebuild kit --out data\n" in made["README.md"].decode()
    assert not [name for name in made if name.endswith(".tmp")]
    digests_agree(tmp_path / "bundle")


def test_a_lock_file_of_another_version_is_refused(manifest, lock_folder, tmp_path):
    other = manifest.model_copy(update={"name": "other"})
    other = other.model_copy(update={"digest": other.computed_digest()})
    save_manifest(str(tmp_path / "other.json"), other)

    with pytest.raises(PmdError, match="not of other"):
        contents(BundleRequest(str(tmp_path / "other.json"), lockfile=str(lock_folder)))


def test_a_damaged_lock_file_is_refused(built, lock_folder, tmp_path):
    shutil.copytree(lock_folder, tmp_path / "kit")
    rows = next((tmp_path / "kit" / "cc3m").glob("*.parquet"))
    rows.write_bytes(rows.read_bytes()[:-1])

    with pytest.raises(PmdError, match="is not the file in its lock file"):
        contents(
            BundleRequest(str(built / "manifests" / "cc3m.json"), lockfile=str(tmp_path / "kit"))
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--published", "yesterday"], "YYYY-MM-DD"),
        (["--wheel", "other-1.0.whl"], "pmd_flava"),
        (["--config", "nothing.toml"], "nothing.toml"),
        (["--kit", "nowhere"], "nowhere"),
        (["--hashes", "nothing.json"], "nothing.json"),
    ],
)
def test_a_mistake_is_one_sentence(built, tmp_path, monkeypatch, capsys, arguments, words):
    manifest = str(built / "manifests" / "cc3m.json")
    out = tmp_path / "bundle"
    monkeypatch.setattr(sys, "argv", ["pmd", "bundle", manifest, "--out", str(out), *arguments])

    with pytest.raises(SystemExit) as left:
        cli.main()

    output = capsys.readouterr().err
    assert left.value.code == 2
    assert words in output
    assert output.count("\n") == 1
    assert not out.exists()


CONFIG = """
base = "flava_tiny"
steps = 2
batch = 2
micro_batch_size = 2
[data]
tokenizer = "vocab.txt"
workers = 0
[optimizer]
warmup = 1
[objective]
mmm_image = 0.0
mmm_text = 0.0
itm = 0.0
[objective.streams]
pairs = 1.0
images = 0.0
texts = 0.0
"""


def test_the_lock_file_in_a_bundle_rebuilds_the_dataset(
    built, lock_folder, manifest, tmp_path, monkeypatch
):
    made = contents(
        BundleRequest(str(built / "manifests" / "cc3m.json"), lockfile=str(lock_folder))
    )
    pack(made, str(tmp_path / "bundle"))
    command = re.search(r"^pmd rebuild .*$", made["README.md"].decode(), re.MULTILINE)[0].split()
    pictures = write_pictures(tmp_path / "p", [f"{number}.jpg" for number in range(PICTURES - 2)])
    here = ["--images", str(pictures), "--runner", "local", "--workers", "1"]
    monkeypatch.chdir(tmp_path / "bundle")
    monkeypatch.setattr(sys, "argv", [*command, *here])

    with pytest.raises(SystemExit) as left:
        cli.main()

    assert left.value.code == 0
    assert load_manifest("manifests/cc3m.json").digest == manifest.digest


@pytest.mark.slow
def test_the_commands_of_the_readme_rebuild_the_same_dataset_and_train(
    built, web, manifest, tmp_path
):
    (tmp_path / "mine.toml").write_text(CONFIG)
    request = BundleRequest(
        str(built / "manifests" / "cc3m.json"), configs=(str(tmp_path / "mine.toml"),)
    )
    folder = tmp_path / "bundle"
    pack(contents(request), str(folder))
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site]
    subprocess.run([sys.executable, *install, *(folder / "wheel").glob("*.whl")], check=True)
    shutil.copytree(built / "raw", folder / "data" / "raw" / "cc3m")
    with (folder / "recipes" / "cc3m.toml").open("a") as recipe:
        recipe.write(f'\n[fetch]\nconnect_to = {{"a.test" = "{web}"}}\n')  # no digest covers it
    path = f"{site / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(site)}

    def run(script):
        command = ["/bin/bash", "-euo", "pipefail", "-c", script]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )

    where = run('python -c "import pmd_pipeline; print(pmd_pipeline.__file__)"')
    assert where.stdout.startswith(str(site))
    readme = (folder / "README.md").read_text()
    blocks = dict(re.findall(r"## (\w+)\n\n```bash\n(.*?)```", readme, re.DOTALL))
    rebuilt = run(blocks["Rebuild"])
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert load_manifest(str(folder / "manifests" / "cc3m.json")).digest == manifest.digest
    verified = run("pmd verify manifest.json --runner local --workers 1")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    vocabulary = run("pmd tokenizer manifest.json --size 120 --out vocab.txt")
    assert vocabulary.returncode == 0, vocabulary.stderr
    trained = run(blocks["Train"])
    assert trained.returncode == 0, trained.stderr
    again = run("pmd bundle manifest.json --config configs/mine.toml --out ../again")
    assert again.returncode == 0, again.stderr
    wheels = [next((one / "wheel").glob("*.whl")) for one in (folder, tmp_path / "again")]
    assert wheels[0].read_bytes() == wheels[1].read_bytes()
