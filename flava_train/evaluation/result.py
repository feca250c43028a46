"""The result of an evaluation."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics by name, between 0 and 1, and what random guessing gives for the same names."""

    metrics: dict[str, float]
    chance: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """The fields of a line in `metrics.jsonl`."""
        return {**self.metrics, "chance": self.chance}

    def __or__(self, other: "EvaluationResult") -> "EvaluationResult":
        return EvaluationResult(self.metrics | other.metrics, self.chance | other.chance)
