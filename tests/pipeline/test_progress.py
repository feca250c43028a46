import io

import pytest
from rich.console import Console

from pmd_pipeline.base.progress import Reporter


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


def show_on(clock, *, terminal=False, quiet=False):
    console = Console(force_terminal=terminal, file=io.StringIO(), width=100, emoji=False)
    return Reporter(console, quiet=quiet, clock=clock), console.file


def test_a_line_says_how_much_is_done_how_fast_what_failed_and_how_long_it_takes(clock):
    reporter, _ = show_on(clock)
    with reporter.stage("toy build", "records", 240) as stage:
        stage.advance("part 0", {"records": 100, "images": 90, "failed": 10})
        stage.update("part 1", {"records": 20, "images": 18, "failed": 2})
        clock.seconds += 4

        assert stage.line() == "120 of 240 records, 27 images/s, 12 pairs failed, 4 s left"


def test_a_line_says_that_the_network_is_cut_while_it_is(clock):
    reporter, _ = show_on(clock)
    with reporter.stage("coco build", "records", 10) as stage:
        stage.update("part 0", {"records": 2, "cut": 1})
        waiting = stage.line()
        stage.update("part 0", {"records": 3, "cut": 0})

    assert waiting == "2 of 10 records, nobody answers: waiting for the network"
    assert stage.line() == "3 of 10 records"


def test_no_speed_is_told_before_it_has_settled(clock):
    reporter, _ = show_on(clock)
    with reporter.stage("toy build", "records", 240) as stage:
        stage.advance("part 0", {"records": 100, "images": 90})
        clock.seconds += 1

        assert stage.line() == "100 of 240 records"


def test_what_an_earlier_run_has_done_is_progress_but_no_speed(clock):
    reporter, _ = show_on(clock)
    with reporter.stage("toy build", "records", 400) as stage:
        stage.resume_from({"records": 200, "images": 200, "failed": 3})
        clock.seconds += 10
        assert stage.line() == "200 of 400 records, 3 pairs failed"

        stage.advance("part 9", {"records": 100, "images": 50})

        assert stage.line() == "300 of 400 records, 5 images/s, 3 pairs failed, 10 s left"


def test_a_task_that_has_ended_is_not_counted_again_by_a_late_tick(clock):
    reporter, _ = show_on(clock)
    with reporter.stage("toy build", "records", 240) as stage:
        stage.update("part 0", {"records": 90})
        stage.advance("part 0", {"records": 100})
        stage.update("part 0", {"records": 95})

        assert stage.done == 100


def test_a_stage_that_is_settled_counts_once(clock):
    reporter, file = show_on(clock)
    with reporter.stage("toy index", "rows") as stage:
        stage.update("reading a.tsv", {"rows": 5000})
        stage.update("reading b.tsv", {"rows": 5000})
        stage.set_total({"rows": 12_345})
        stage.update("reading b.tsv", {"rows": 5000})

    assert file.getvalue() == "toy index: 12,345 rows\n"


def test_bytes_are_told_in_megabytes(clock):
    reporter, file = show_on(clock)
    with reporter.stage("toy annotations", "bytes") as stage:
        stage.update("http://a.test/a", {"bytes": 30_000_000})
        clock.seconds += 10

    assert file.getvalue() == "toy annotations: 30.0 MB, 3.0 MB/s\n"


def test_off_a_terminal_there_is_a_line_every_ten_seconds_and_one_at_the_end(clock):
    reporter, file = show_on(clock)
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


def test_a_stage_that_had_nothing_to_do_says_nothing(clock):
    reporter, file = show_on(clock)
    with reporter.stage("toy annotations", "bytes"):
        pass

    assert file.getvalue() == ""


def test_a_stage_that_fails_says_nothing_so_that_the_error_stands_alone(clock):
    reporter, file = show_on(clock)

    with pytest.raises(ZeroDivisionError), reporter.stage("toy build", "records", 3):
        _ = 1 / 0

    assert file.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_and_then_one_line(clock):
    reporter, file = show_on(clock, terminal=True)
    with reporter.stage("toy build", "records", 240) as stage:
        stage.update("part 0", {"records": 120, "failed": 2})
    screen = file.getvalue()

    assert "120 of 240 records, 2 pairs failed" in screen
    assert "━" in screen
    assert screen.endswith("toy build: 120 of 240 records, 2 pairs failed\n")


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_is_quiet(terminal, clock):
    reporter, file = show_on(clock, terminal=terminal, quiet=True)
    with reporter.stage("toy build", "records", 240) as stage:
        clock.seconds += 100
        stage.advance("part 0", {"records": 240})
        reporter.say("something")

    assert file.getvalue() == ""


def test_words_are_printed_as_they_are(clock):
    reporter, file = show_on(clock)

    reporter.say("[bold] :dog: /a/path " + "x" * 200)

    assert file.getvalue() == "[bold] :dog: /a/path " + "x" * 200 + "\n"
