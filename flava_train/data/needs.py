"""What an objective needs of the data: streams, image codes, masks, mismatched captions."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StreamShares:
    """Probability that the batch of a step is of pairs, images or texts; they add up to 1."""

    pairs: float = 0.70
    images: float = 0.15
    texts: float = 0.15


@dataclass(frozen=True)
class DataNeeds:
    """What to read and to draw for a batch.

    Args:
        shares: probability of each stream.
        codes: streams (`pairs`, `images`) whose image codes the model predicts.
        masks_pairs: mask patches and tokens of pairs.
        mismatch_rate: share of pairs that get a caption of another image.
    """

    shares: StreamShares = field(default_factory=StreamShares)
    codes: frozenset[str] = frozenset()
    masks_pairs: bool = False
    mismatch_rate: float = 0.0
