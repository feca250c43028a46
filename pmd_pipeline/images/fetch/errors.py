"""Why one attempt to fetch failed."""

from pmd_pipeline.images.fetch.retry import RETRYABLE


class FetchError(Exception):
    """One attempt to fetch failed.

    Args:
        kind: one of `FAILURE_REASONS`.
        retry_after: seconds that the server asks to wait.
        is_retryable: a later attempt may succeed; by default, if `kind` is in `RETRYABLE`.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        retry_after: float | None = None,
        *,
        is_retryable: bool | None = None,
    ) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail
        self.retry_after = retry_after
        self.is_retryable = kind in RETRYABLE if is_retryable is None else is_retryable


class ConnectError(FetchError):
    """No connection could be made; the cause may be this machine's network."""
