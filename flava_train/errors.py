"""What a user of the trainer can put right; every other exception is a bug of ours and flies."""


class FlavaError(Exception):
    """A user's mistake, in one sentence: where, what, what to do."""
