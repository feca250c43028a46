"""Objectives of the paper's ablation (table 4), in its order."""

from flava_train.data.needs import StreamShares
from flava_train.objective.objective import Objective

PAIRS_ALONE = StreamShares(pairs=1.0, images=0.0, texts=0.0)

ABLATIONS = {
    "mim": Objective(streams=StreamShares(0.0, 1.0, 0.0), unimodal_init=False),
    "mlm": Objective(streams=StreamShares(0.0, 0.0, 1.0), unimodal_init=False),
    "flava_c": Objective(
        mmm_image=0.0, mmm_text=0.0, itm=0.0, streams=PAIRS_ALONE, unimodal_init=False
    ),
    "flava_mm": Objective(streams=PAIRS_ALONE, unimodal_init=False),
    "flava_without_init": Objective(unimodal_init=False),
    "flava": Objective(),
}
