"""Progress lines: content, rate and frequency, on a terminal and elsewhere."""

import io

import pytest
from rich.console import Console

from pmd_pipeline.base.progress import Reporter


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


def reporter_and_output(clock, *, terminal=False, quiet=False):
    console = Console(force_terminal=terminal, file=io.StringIO(), width=100, emoji=False)
    return Reporter(console, quiet=quiet, clock=clock), console.file


def test_a_line_has_progress_rate_failures_and_the_time_left(clock):
    reporter, _ = reporter_and_output(clock)
    with reporter.stage("toy build", "records", 240) as stage:
        stage.advance("part 0", {"records": 100, "images": 90, "failed": 10})
        stage.update("part 1", {"records": 20, "images": 18, "failed": 2})
        clock.seconds += 4

        assert stage.line() == "120 of 240 records, 27 images/s, 12 pairs failed, 4 s left"


def test_a_line_mentions_a_network_without_answers_until_one_comes(clock):
    reporter, _ = reporter_and_output(clock)
    with reporter.stage("coco build", "records", 10) as stage:
        stage.update("part 0", {"records": 2, "cut": 1})
        waiting = stage.line()
        stage.update("part 0", {"records": 3, "cut": 0})

    assert waiting == "2 of 10 records, no host answers: waiting for the network"
    assert stage.line() == "3 of 10 records"


def test_a_line_has_no_rate_in_the_first_seconds(clock):
    reporter, _ = reporter_and_output(clock)
    with reporter.stage("toy build", "records", 240) as stage:
        stage.advance("part 0", {"records": 100, "images": 90})
        clock.seconds += 1

        assert stage.line() == "100 of 240 records"


def test_counts_of_an_earlier_run_are_progress_but_no_part_of_the_rate(clock):
    reporter, _ = reporter_and_output(clock)
    with reporter.stage("toy build", "records", 400) as stage:
        stage.resume_from({"records": 200, "images": 200, "failed": 3})
        clock.seconds += 10
        assert stage.line() == "200 of 400 records, 3 pairs failed"

        stage.advance("part 9", {"records": 100, "images": 50})

        assert stage.line() == "300 of 400 records, 5 images/s, 3 pairs failed, 10 s left"


def test_late_progress_of_a_finished_task_is_ignored(clock):
    reporter, _ = reporter_and_output(clock)
    with reporter.stage("toy build", "records", 240) as stage:
        stage.update("part 0", {"records": 90})
        stage.advance("part 0", {"records": 100})
        stage.update("part 0", {"records": 95})

        assert stage.done == 100


def test_the_final_counts_of_a_stage_replace_those_of_its_tasks(clock):
    reporter, file = reporter_and_output(clock)
    with reporter.stage("toy index", "rows") as stage:
        stage.update("reading a.tsv", {"rows": 5000})
        stage.update("reading b.tsv", {"rows": 5000})
        stage.set_total({"rows": 12_345})
        stage.update("reading b.tsv", {"rows": 5000})

    assert file.getvalue() == "toy index: 12,345 rows\n"


def test_bytes_are_printed_in_megabytes(clock):
    reporter, file = reporter_and_output(clock)
    with reporter.stage("toy annotations", "bytes") as stage:
        stage.update("http://a.test/a", {"bytes": 30_000_000})
        clock.seconds += 10

    assert file.getvalue() == "toy annotations: 30.0 MB, 3.0 MB/s\n"


def test_without_a_terminal_a_line_is_printed_every_ten_seconds_and_at_the_end(clock):
    reporter, file = reporter_and_output(clock)
    with reporter.stage("toy build", "records", 100) as stage:
        for count in range(25):
            stage.update("part 0", {"records": count})
            clock.seconds += 1
        stage.advance("part 0", {"records": 100})

    assert file.getvalue().splitlines() == [
        "toy build: 10 of 100 records, 1 records/s, 1 min 30 s left",
        "toy build: 20 of 100 records, 1 records/s, 1 min 20 s left",
        "toy build: 100 of 100 records, 4 records/s, 0 s left",
    ]


def test_a_stage_without_work_prints_nothing(clock):
    reporter, file = reporter_and_output(clock)
    with reporter.stage("toy annotations", "bytes"):
        pass

    assert file.getvalue() == ""


def test_a_stage_that_fails_prints_nothing(clock):
    reporter, file = reporter_and_output(clock)

    with pytest.raises(ZeroDivisionError), reporter.stage("toy build", "records", 3):
        _ = 1 / 0

    assert file.getvalue() == ""


def test_on_a_terminal_a_bar_is_shown_and_then_one_line(clock):
    reporter, file = reporter_and_output(clock, terminal=True)
    with reporter.stage("toy build", "records", 240) as stage:
        stage.update("part 0", {"records": 120, "failed": 2})
    screen = file.getvalue()

    assert "120 of 240 records, 2 pairs failed" in screen
    assert "━" in screen
    assert screen.endswith("toy build: 120 of 240 records, 2 pairs failed\n")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_quiet_reporter_prints_no_progress(terminal, clock):
    reporter, file = reporter_and_output(clock, terminal=terminal, quiet=True)
    with reporter.stage("toy build", "records", 240) as stage:
        clock.seconds += 100
        stage.advance("part 0", {"records": 240})
        reporter.say("something")

    assert file.getvalue() == ""


def test_text_is_printed_without_markup_or_wrapping(clock):
    reporter, file = reporter_and_output(clock)

    reporter.say("[bold] :dog: /a/path " + "x" * 200)

    assert file.getvalue() == "[bold] :dog: /a/path " + "x" * 200 + "\n"
