"""Boxes of regions: from pixels of the upstream image to fractions, clipped to the image."""

import polars as pl

_MIN_SIDE = 1.0
"""Width and height, in pixels, that a box must have inside the image."""


def clip_boxes(pairs: pl.DataFrame) -> pl.DataFrame:
    """The pairs with `box`, clipped to the image as fractions or null, and `is_box_valid`.

    A box is valid if its sides inside the image have a pixel or more; the size of the image must be
    known.

    Args:
        pairs: with `x0, y0, x1, y1` in pixels of the upstream image, `width` and `height`.
    """
    across = [pl.col(side).clip(0, pl.col("width")).alias(side) for side in ("x0", "x1")]
    down = [pl.col(side).clip(0, pl.col("height")).alias(side) for side in ("y0", "y1")]
    has_box = pl.col("x0").is_not_null()
    sides = ((pl.col("x1") - pl.col("x0")), (pl.col("y1") - pl.col("y0")))
    fractions = [
        (pl.col("x0") / pl.col("width")),
        (pl.col("y0") / pl.col("height")),
        (pl.col("x1") / pl.col("width")),
        (pl.col("y1") / pl.col("height")),
    ]
    finite = pl.all_horizontal(pl.col(side).is_finite() for side in ("x0", "y0", "x1", "y1"))
    is_measurable = pl.col("width").is_not_null() & pl.col("height").is_not_null() & finite
    is_large = (sides[0] >= _MIN_SIDE) & (sides[1] >= _MIN_SIDE)
    return (
        pairs.with_columns(has_box=has_box, finite=is_measurable.fill_null(False))
        .with_columns(*across, *down)
        .with_columns(
            is_box_valid=~pl.col("has_box") | (pl.col("finite") & is_large.fill_null(False)),
            box=pl.when(pl.col("has_box")).then(
                pl.concat_list([one.cast(pl.Float32) for one in fractions])
            ),
        )
    )
