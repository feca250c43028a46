"""The two kinds of trouble we expect; every other exception is a bug of ours and flies."""


class PmdError(Exception):
    """A user's mistake or a broken environment, in one sentence: where, what, what to do."""


class RecordError(PmdError):
    """One record is unusable; `kind` is the name it is counted under."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)  # both, or the error does not survive pickling by Ray
        self.kind = kind
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"
