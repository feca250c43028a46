"""The two kinds of expected errors; every other exception is a bug and propagates."""


class PmdError(Exception):
    """A user's mistake or a broken environment, in one sentence: where, what, what to do."""


class RecordError(PmdError):
    """One record is unusable.

    Args:
        kind: the reason under which it is counted.
        detail: free text for people.
        attempts: number of requests for its image.
    """

    def __init__(self, kind: str, detail: str, attempts: int = 0) -> None:
        super().__init__(kind, detail, attempts)  # all, or the error does not survive pickling
        self.kind = kind
        self.detail = detail
        self.attempts = attempts

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"
