import base64
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from toy import toy_rows, write_pictures, write_rows

from pmd_pipeline import cli, sources
from pmd_pipeline.base.record import key_of
from pmd_pipeline.filters.caption import LID_MODEL_VARIABLE
from pmd_pipeline.inspect.source_listing import describe_source, list_sources

COMMANDS = [command.callback.__name__ for command in cli.app.registered_commands]
PMD = [sys.executable, "-c", "from pmd_pipeline.cli import main; main()"]


@pytest.fixture
def pmd(monkeypatch, capsys, tmp_path):
    """Runs `pmd` in an empty folder; its exit code, and what it printed on stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pmd", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capsys.readouterr()
        return left.value.code, printed.out, printed.err

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv(LID_MODEL_VARIABLE, "")  # so that what a command sets is undone
    return run


@pytest.fixture
def toy(tmp_path):
    """Arguments that build twelve pictures, two of them absent, from files on this machine."""
    write_rows(tmp_path / "raw", [*toy_rows(12), ("no address here", "nowhere")])
    write_pictures(tmp_path / "pictures", [f"{number}.jpg" for number in range(10)])
    where = ["--raw", tmp_path / "raw", "--images", tmp_path / "pictures", "--runner", "local"]
    return ["build", "--source", "cc3m", *where, "--workers", 1]


def is_refused(outcome, *words):
    """Whether a command exited with 2, one line on stderr that has all `words`, and no files."""
    code, out, err = outcome
    assert code == 2
    assert out == ""
    assert err.startswith("pmd: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    for word in words:
        assert word in err
    assert list(Path().iterdir()) == []
    return True


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_one_sentence_and_one_example(command, pmd):
    code, out, err = pmd(*command.split(), "--help")

    assert (code, err) == (0, "")
    usage, sentence, example, *_ = (" ".join(block.split()) for block in out.split("\n\n"))
    assert usage.startswith("Usage: pmd")
    assert re.fullmatch(r"[A-Z][^.]*\.", sentence)
    assert example.startswith("Example: pmd ")
    assert (command or "quickstart") in example


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["sources"]])
def test_help_and_sources_load_neither_torch_nor_ray(arguments):
    code = (
        "import sys; from pmd_pipeline import cli; sys.argv[0] = 'pmd'\n"
        "try: cli.main()\n"
        "except SystemExit as left: assert left.code == 0, left\n"
        "heavy = {'torch', 'ray', 'polars', 'pyarrow', 'fasttext', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )

    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to build", "--source NAME"]),
        (["--source", "coca"], ["'coca'", "did you mean 'coco'?"]),
        (["--recipe", "none.toml"], ["none.toml", "there is no such recipe file"]),
        (["--source", "cc3m", "--raw", "none"], ["--raw none", "there is no such folder"]),
        (["--source", "cc3m", "--lid-model", "none"], ["/none", "there is no such language model"]),
    ],
)
def test_an_impossible_build_is_one_line_and_writes_nothing(arguments, words, pmd):
    assert is_refused(pmd("build", *arguments, "--runner", "local", "--workers", 1), *words)


def test_an_unknown_recipe_key_is_one_line_with_the_file_and_a_suggestion(pmd, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('source = "cc3m"\n[image]\nsize = 5')

    assert is_refused(
        pmd("build", "--recipe", recipe), f"{recipe}: unknown key 'image'; did you mean 'images'?"
    )


def test_two_recipes_for_one_source_are_one_line(pmd, tmp_path):
    (tmp_path / "mine.toml").write_text('source = "cc3m"\n[images]\nsize = 64')

    assert is_refused(
        pmd("build", "--source", "cc3m", "--recipe", tmp_path / "mine.toml"),
        "two recipes for cc3m are asked for",
    )


def test_missing_annotation_files_are_one_line_with_instructions(pmd, tmp_path):
    assert is_refused(
        pmd("build", "--source", "yfcc100m", "--raw", tmp_path / "here", "--runner", "local"),
        "has no yfcc100m_dataset",
        "put yfcc100m_dataset (Webscope)",
    )


def test_missing_images_are_one_line(pmd, toy, tmp_path):
    arguments = [*toy, "--images", tmp_path / "none.zip"]

    assert is_refused(
        pmd(*arguments), f"--images {tmp_path}/none.zip", "no such folder, zip or tar"
    )


def test_an_out_that_is_a_file_is_one_line(pmd, toy, tmp_path):
    (tmp_path / "file").write_bytes(b"")

    assert is_refused(
        pmd(*toy, "--out", tmp_path / "file"), f"{tmp_path}/file/index/cc3m", "a file"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stats"], ["manifests/pmd.json", "there is no such file"]),
        (["stats", "none.json"], ["none.json", "there is no such file"]),
        (["merge", "none.json"], ["none.json", "there is no such file"]),
        (["show", "0" * 16], ["there is no index under data", "--out"]),
        (["why", "0" * 16], ["there is no index under data", "--out"]),
        (["show", "none.tar"], ["none.json", "there is no such file"]),
        (["sources", "coca"], ["'coca'", "coco"]),
    ],
)
def test_a_missing_file_or_record_is_one_line(arguments, words, pmd):
    assert is_refused(pmd(*arguments), *words)


def test_a_file_that_is_no_manifest_is_one_line(pmd, tmp_path):
    for content in ("", "[]", '{"format": 1}', "<html>"):
        (tmp_path / "a.json").write_text(content)

        assert is_refused(pmd("stats", tmp_path / "a.json"), "a.json is no manifest")


@pytest.mark.parametrize(
    "arguments",
    [["build", "--limit", "0"], ["build", "--source"], ["stats", "--format", "pdf"], ["bild"], []],
)
def test_wrong_arguments_exit_with_2(arguments, pmd):
    code, _, _ = pmd(*arguments)

    assert code == 2


def test_a_build_prints_manifests_on_stdout_and_messages_on_stderr(pmd, toy):
    code, out, err = pmd(*toy)

    manifest = json.loads(Path("manifests/cc3m.json").read_text())
    assert (code, out) == (0, f"manifests/cc3m.json  {manifest['digest']}\n")
    assert err.splitlines() == [
        "cc3m index: 17 rows",
        "cc3m build: 12 of 12 records, 2 pairs failed",
    ]
    assert pmd(*toy, "--quiet") == (0, out, "")


def test_only_statistics_are_on_stdout(pmd, toy):
    pmd(*toy, "--limit", 5)

    code, out, err = pmd("stats", "manifests/cc3m.json", "--format", "json", "--plot", "a/b.png")

    [row] = json.loads(out)["datasets"]
    assert (code, row["dataset"], row["dropped_by"]["limit"] > 0) == (0, "cc3m", True)
    assert err.splitlines() == ["wrote a/b.png", "cc3m was built with --limit 5"]
    with Image.open("a/b.png") as image:
        assert image.format == "PNG"
    for form, start in (("table", "cc3m: words"), ("csv", "dataset,"), ("md", "| dataset")):
        assert pmd("stats", "manifests/cc3m.json", "--format", form)[1].startswith(start)


def test_manifests_are_merged_and_no_source_twice(pmd, toy):
    pmd(*toy)

    code, out, _ = pmd("merge", "manifests/cc3m.json", "--out", "manifests/one.json")
    again, _, err = pmd("merge", "manifests/cc3m.json", "manifests/cc3m.json")

    assert (code, out[:20]) == (0, "manifests/one.json  ")
    assert (again, err.count("\n")) == (2, 1)
    assert "cc3m is already in another manifest" in err


def test_why_prints_traces_of_kept_dropped_and_failed_records(pmd, toy):
    pmd(*toy)
    bad = key_of("cc3m", "GCC-training.tsv:0:16")

    queries = ("http://a.test/0.jpg", key_of("cc3m", "http://a.test/11.jpg"), bad)
    printed = [pmd("why", query)[1] for query in queries]

    for part in ("kept: 2 pairs in data/shards/cc3m/00000.tar", "read: row 0 of", "also: row 12 of",
                 "'a caption of picture 0': passes", "stored: "):  # fmt: skip
        assert part in printed[0]
    assert "not fetched: not_in_archive, no local image has this name" in printed[1]
    assert "stored: " not in printed[1]
    assert "dropped by the index: bad_row, the upstream row cannot be parsed" in printed[2]
    assert "column 2 is no http address: 'nowhere'" in printed[2]
    assert "the file has changed" not in "".join(printed)
    assert json.loads(pmd("why", bad, "--json")[1])[0]["rows"][0]["reason"] == "bad_row"
    assert pmd("why", "http://a.test/none.jpg")[0] == 2


def test_show_prints_json_and_writes_the_image(pmd, toy):
    pmd(*toy)
    kept, failed = (key_of("cc3m", f"http://a.test/{number}.jpg") for number in (0, 11))

    code, out, err = pmd("show", kept, "--json", "--image", "a/0.jpg")
    refused, _, message = pmd("show", failed, "--image", "a/11.jpg")

    assert code == 0
    assert json.loads(out)["sample"]["captions"] == [
        "a caption of picture 0", "picture 0 once more"
    ]  # fmt: skip
    assert err == "wrote a/0.jpg, JPEG\n"
    with Image.open("a/0.jpg") as image:
        assert image.size == (48, 40)
    assert (refused, message.count("\n")) == (2, 1)
    assert f"run pmd why {failed} for the reason" in message


def test_stored_webp_images_are_verified_shown_and_on_the_report_page(pmd, toy, tmp_path):
    recipe = tmp_path / "webp.toml"
    recipe.write_text('source = "cc3m"\n[images]\nformat = "webp"\nquality = 80\n')
    pmd("build", "--recipe", recipe, *toy[3:])
    key = key_of("cc3m", "http://a.test/0.jpg")

    assert pmd("verify", "manifests/cc3m.json", "--workers", 1)[2].endswith(
        "OK: 1 shard, 10 images\n"
    )
    assert pmd("show", key, "--image", "0.webp")[2] == "wrote 0.webp, WEBP\n"
    with Image.open("0.webp") as image:
        assert (image.format, image.size) == ("WEBP", (48, 40))
    assert "stored: data/shards/cc3m/00000.tar\n  48 x 40 pixels" in pmd("why", key)[1]
    assert pmd("report", "manifests/cc3m.json", "--out", "page.html")[0] == 0
    thumbnails = re.findall(r'src="data:(.*?);base64,(.*?)"', Path("page.html").read_text())
    assert len(thumbnails) == 8
    for mime, content in thumbnails:
        with Image.open(BytesIO(base64.b64decode(content))) as image:
            assert image.get_format_mimetype() == mime


def test_show_prints_the_contents_of_a_shard(pmd, toy):
    pmd(*toy)

    code, out, _ = pmd("show", "data/shards/cc3m/00000.tar")

    assert code == 0
    assert out.startswith("report\n")
    assert "records: 12" in out
    assert out.count("caption: ") == 5
    Path("data/shards/cc3m/00000.json").write_text("{}")
    assert pmd("show", "data/shards/cc3m/00000.tar")[0] == 2


@pytest.mark.parametrize("width", [80, 160])
def test_sources_are_listed_within_the_width_of_the_screen(width):
    paragraphs = list(list_sources(width))

    pmd = sources.names("pmd")
    others = [name for name in sources.names() if name not in pmd]
    assert [text.split(",")[0] for text in paragraphs] == pmd + others
    for line in "\n".join(paragraphs).splitlines():
        assert len(line) <= width or "http" in line
    for name in sources.names():
        info = sources.load(name).info
        description = " ".join(describe_source(name, width).split())
        for fact in (info.licence, info.citation, info.homepage, info.by_hand):
            assert " ".join(fact.split()) in description
        assert all(entry.pattern in description for entry in info.files)


class _SilentHandler(http.server.BaseHTTPRequestHandler):
    """Never sends a response; sets an event when a request arrives."""

    def __init__(self, requested, *arguments):
        self.requested = requested
        super().__init__(*arguments)

    def do_GET(self):
        self.requested.set()
        self.rfile.read(1)  # until the other side hangs up

    def log_message(self, *_):
        pass


@pytest.fixture
def silent_host():
    """`address:port` of a host that never responds, and the event of its first request."""
    requested = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_SilentHandler, requested))
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=partial(server.serve_forever, 0.01))
    thread.start()
    yield f"127.0.0.1:{server.server_port}", requested
    server.shutdown()
    thread.join()
    server.server_close()


def marked_processes(mark):
    """Commands of the processes that have `mark` in their environment."""
    commands = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                commands.append((folder / "cmdline").read_bytes().replace(b"\0", b" ")[:100])
        except OSError:  # it has ended meanwhile
            continue
    return commands


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("runner", ["local", "ray"])
def test_ctrl_c_ends_a_build_with_all_its_processes(runner, silent_host, tmp_path):
    address, requested = silent_host
    write_rows(tmp_path / "raw", toy_rows(40))
    recipe = tmp_path / "slow.toml"
    recipe.write_text(
        f'source = "cc3m"\npart_records = 10\n[fetch.connect_to]\n"*" = "{address}"\n'
    )
    mark = f"PMD_TEST_{uuid.uuid4().hex}"
    arguments = ["build", "--recipe", recipe, "--raw", tmp_path / "raw", "--runner", runner]

    with subprocess.Popen(
        [*PMD, *map(str, arguments), "--workers", "2"],
        cwd=tmp_path,
        env={**os.environ, mark: "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as build:
        assert requested.wait(60)
        os.killpg(build.pid, signal.SIGINT)  # as a terminal does: to all in the foreground
        out, err = build.communicate(timeout=30)

    deadline = time.monotonic() + 20
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert build.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "interrupted; run the same command to resume"
    assert "Traceback" not in err
    assert list(tmp_path.rglob("*.tar")) == []


@pytest.mark.parametrize("command", ["verify", "report"])
def test_an_interrupted_command_that_cannot_resume_only_stops(pmd, monkeypatch, command):
    def interrupted(*_args, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("pmd_pipeline.inspect.verify.dataset.verify", interrupted)
    monkeypatch.setattr("pmd_pipeline.inspect.report.page.page", interrupted)

    assert pmd(command, "manifests/pmd.json") == (130, "", "interrupted\n")
