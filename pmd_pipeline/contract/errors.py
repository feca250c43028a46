"""The two kinds of trouble we expect; every other exception is a bug of ours and flies."""


class PmdError(Exception):
    """A user's mistake or a broken environment, in one sentence: where, what, what to do."""


class RecordError(PmdError):
    """One record is unusable.

    Args:
        kind: the name it is counted under.
        detail: what happened, for people.
        attempts: how often its address was asked.
    """

    def __init__(self, kind: str, detail: str, attempts: int = 0) -> None:
        super().__init__(kind, detail, attempts)  # all, or the error does not survive pickling
        self.kind = kind
        self.detail = detail
        self.attempts = attempts

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"
