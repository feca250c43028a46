"""Summaries of training runs."""

import io
import json

import pytest
from rich.console import Console

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.demo.training_summary import (
    DIRECTIONS,
    LOSSES,
    RANKS,
    read_summary,
    summary_tables,
)

CHANCE = {1: 0.01, 5: 0.05, 10: 0.1}


def evaluation(after, r1):
    metrics = {
        f"{direction}_r{rank}": min(1.0, r1 * rank) for direction in DIRECTIONS for rank in RANKS
    }
    chance = {f"{direction}_r{rank}": CHANCE[rank] for direction in DIRECTIONS for rank in RANKS}
    return {"after": after, **metrics, "chance": chance}


def write_metrics(folder, *, last_loss=1.0, r1=0.3, losses=tuple(LOSSES), evaluated=True):
    """Sixty steps in which all losses go from 4 to `last_loss`."""
    lines = [
        {"step": step, "losses": dict.fromkeys(losses, 4 + (last_loss - 4) * step / 59)}
        for step in range(60)
    ]
    if evaluated:
        lines += [evaluation(30, r1 / 2), evaluation(60, r1)]
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_metrics_are_those_of_the_last_evaluation(tmp_path):
    summary = read_summary(write_metrics(tmp_path))

    assert summary.steps == 60
    assert summary.last_evaluation("text_to_image_r1") == (0.3, 0.01)
    assert sorted(summary.recall) == [30, 60]


def test_a_loss_is_averaged_over_both_ends_of_the_run(tmp_path):
    summary = read_summary(write_metrics(tmp_path, last_loss=4 - 59))  # 4 - step

    assert summary.first_and_last("itm") == (pytest.approx(4 - 9.5), pytest.approx(4 - 49.5))


def test_a_run_that_has_learned_has_no_shortfalls(tmp_path):
    assert read_summary(write_metrics(tmp_path)).shortfalls(10) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"r1": 0.09}, "R@1 text to image is 9.0 times chance, not 10"),
        ({"last_loss": 4.0}, "the loss mim went from 4.00 to 4.00"),
        ({"losses": tuple(LOSSES)[:-1]}, "no step had the loss mlm"),
    ],
)
def test_each_shortfall_is_one_sentence(tmp_path, change, sentence):
    assert sentence in read_summary(write_metrics(tmp_path, **change)).shortfalls(10)


def test_a_run_without_evaluation_is_refused(tmp_path):
    with pytest.raises(PmdError, match="no evaluation"):
        read_summary(write_metrics(tmp_path, evaluated=False))


def test_missing_or_damaged_metrics_are_refused(tmp_path):
    with pytest.raises(PmdError, match=r"metrics\.jsonl cannot be read"):
        read_summary(tmp_path / "metrics.jsonl")

    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "los')
    with pytest.raises(PmdError, match=r"metrics\.jsonl cannot be read"):
        read_summary(tmp_path / "metrics.jsonl")


def test_tables_show_recall_beside_chance_and_every_loss(tmp_path):
    console = Console(width=120, record=True, file=io.StringIO())

    for table in summary_tables(read_summary(write_metrics(tmp_path))):
        console.print(table)
    text = console.export_text()

    assert "text to image   30.0%     1.0%             30" in text
    for words in LOSSES.values():
        assert words in text
