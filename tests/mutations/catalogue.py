"""The mutations that the unit suite must kill: each is a bug that a change could bring in.

A rewrite that moves or renames one of these places changes its entry too; `test_catalogue.py`
names the entries that no longer apply.
"""

from mutate import Mutation

_CHOOSE = ("tests/pipeline/test_choose.py",)
_SORT = ("tests/pipeline/test_external_sort.py", "tests/pipeline/test_index.py")
_RECORDS = ("tests/pipeline/test_index_records.py",)
_PIPELINE = ("tests/pipeline/test_fetch_pipeline.py", "tests/pipeline/test_reorder_buffer.py")
_HOSTS = ("tests/pipeline/test_rate_limiter.py",)
_ORDER = ("tests/train/test_order.py",)
_MASKING = ("tests/train/test_masking.py",)
_LOSSES = ("tests/train/test_losses.py", "tests/train/test_step.py", "tests/train/test_oracle.py")
_STATS = ("tests/pipeline/test_stats.py",)
_VERIFY = ("tests/pipeline/test_verify.py",)
_WRITER = ("tests/pipeline/test_shard_writer.py",)
_CONTRACT = ("tests/pipeline/test_contract.py",)

MUTATIONS = [
    # choosing of captions
    Mutation(
        "pmd_pipeline/index/choose.py",
        'not X or Y.reason != "no_text"',
        "True",
        _CHOOSE,
        "an empty last candidate hides the reason of the one that had text",
    ),
    Mutation(
        "pmd_pipeline/index/choose.py",
        "X[:1] if Y else X",
        "X",
        _CHOOSE,
        "a refused row of `first` counts a pair for each candidate",
    ),
    Mutation(
        "pmd_pipeline/index/choose.py",
        'X[Y.field, Z or "kept"] += 1',
        'X[Y.field, "kept"] += 1',
        _CHOOSE,
        "candidates by field are all counted as kept",
    ),
    Mutation(
        "pmd_pipeline/index/choose.py",
        "not W(text)",
        "W(text)",
        _CHOOSE,
        "a filter drops what passes",
    ),
    # external sort
    Mutation(
        "pmd_pipeline/index/external_sort.py",
        "bisect_right(X, Y)",
        "bisect_left(X, Y)",
        _SORT,
        "the last bucket of a key range is not read",
    ),
    Mutation(
        "pmd_pipeline/index/external_sort.py",
        "np.lexsort((X, Y, Z))",
        "np.lexsort((Y, X, Z))",
        _SORT,
        "rows of one key are ordered by row before span",
    ),
    Mutation(
        "pmd_pipeline/index/external_sort.py",
        'pc.greater_equal(X["key"], Y)',
        'pc.greater(X["key"], Y)',
        _SORT,
        "the first key of a range is lost",
    ),
    Mutation(
        "pmd_pipeline/index/external_sort.py",
        'np.argsort(X, kind="stable")',
        "np.argsort(X)",
        _SORT,
        "pairs of one row change their order",
    ),
    # index records
    Mutation(
        "pmd_pipeline/index/records.py",
        "(KEYS * X + Y - 1) // Y",
        "KEYS * X // Y",
        _RECORDS,
        "bounds of parts are rounded down, and differ from `part_of`",
    ),
    Mutation(
        "pmd_pipeline/index/records.py",
        'pl.struct("key", "text", "reason", "box")',
        'pl.struct("key", "text", "reason")',
        _RECORDS,
        "one caption of two regions counts as a repeat",
    ),
    Mutation(
        "pmd_pipeline/index/boxes.py",
        'pl.col(X).clip(0, pl.col("height"))',
        'pl.col(X).clip(0, pl.col("width"))',
        _RECORDS,
        "boxes are clamped to the wrong side",
    ),
    Mutation(
        "pmd_pipeline/index/records.py",
        'pl.col("heldout").any()',
        'pl.col("heldout").first()',
        _RECORDS,
        "a held-out image enters where its first row does not mark it",
    ),
    # scheduler and reorder buffer
    Mutation(
        "pmd_pipeline/shards/pipeline.py",
        "X.setdefault(Y, number)",
        "X.setdefault((Y, number), number)",
        _PIPELINE,
        "an image that two records name is fetched twice",
    ),
    Mutation(
        "pmd_pipeline/shards/pipeline.py",
        "X[Y.host] >= Z.max_per_host",
        "X[Y.host] > Z.max_per_host",
        _PIPELINE,
        "one request more than `max_per_host` is in flight",
    ),
    Mutation(
        "pmd_pipeline/shards/pipeline.py",
        "X - Y < Z.max_in_flight",
        "X - Y <= Z.max_in_flight",
        _PIPELINE,
        "one item more than `max_in_flight` is in flight",
    ),
    Mutation(
        "pmd_pipeline/shards/reorder_buffer.py",
        "self._file_size += len(X)",
        "self._file_size = len(X)",
        _PIPELINE,
        "the third spilled image overwrites the second",
    ),
    Mutation(
        "pmd_pipeline/shards/reorder_buffer.py",
        "self._num_bytes -= X",
        "self._num_bytes -= 0",
        _PIPELINE,
        "memory of images that left the buffer is never free again",
    ),
    # rate limiter
    Mutation(
        "pmd_pipeline/images/fetch/rate_limiter.py",
        "X.limit + 1 / X.limit",
        "X.limit + 1",
        _HOSTS,
        "a host's limit doubles with each round trip",
    ),
    Mutation(
        "pmd_pipeline/images/fetch/rate_limiter.py",
        "max(X.blocked_until, Y + seconds)",
        "Y + seconds",
        _HOSTS,
        "a short back-off ends a longer Retry-After",
    ),
    Mutation(
        "pmd_pipeline/images/fetch/rate_limiter.py",
        "X.started_at >= Y.reduced_at",
        "True",
        _HOSTS,
        "all requests in flight at one trouble slow the host, not the first alone",
    ),
    Mutation(
        "pmd_pipeline/images/fetch/rate_limiter.py",
        "X.in_flight >= Y or Z.queue[0] is not W",
        "X.in_flight >= Y",
        _HOSTS,
        "requests to a host overtake each other",
    ),
    Mutation(
        "pmd_pipeline/images/fetch/rate_limiter.py",
        "X.next_start = Y + Z",
        "X.next_start = Y",
        _HOSTS,
        "the delay between requests is ignored",
    ),
    # order of samples
    Mutation(
        "flava_train/data/order.py",
        "self.seed ^ self.stream << 62",
        "self.seed",
        _ORDER,
        "two streams are ordered alike",
    ),
    Mutation(
        "flava_train/data/order.py",
        'random_bits(X, "shards", Y, epoch)',
        'random_bits(X, "shards", Y, 0)',
        _ORDER,
        "every epoch has the shards of the first one's order",
    ),
    Mutation(
        "flava_train/data/order.py",
        "X + 1 < self.windows",
        "X < self.windows",
        _ORDER,
        "an epoch has one window too many",
    ),
    Mutation(
        "flava_train/data/order.py",
        "counter[1] = X >> Y",
        "counter[1] = 0",
        _ORDER,
        "numbers that differ in their upper half draw alike",
    ),
    # masking
    Mutation(
        "flava_train/data/masking.py",
        "X >= 0.9",
        "X >= 0.8",
        _MASKING,
        "a fifth of the chosen tokens is random, none stays",
    ),
    Mutation(
        "flava_train/data/masking.py",
        "X & (Y > 0) & (Y <= Z)",
        "X & (Y > 0)",
        _MASKING,
        "blocks mask more patches than the rule allows",
    ),
    Mutation(
        "flava_train/data/masking.py",
        "np.maximum(1, np.rint(X))",
        "np.rint(X)",
        _MASKING,
        "short captions are not masked",
    ),
    # losses
    Mutation(
        "flava_train/objective/losses.py",
        "(to_text + to_image) / 2",
        "to_text",
        _LOSSES,
        "the contrastive loss has one direction",
    ),
    Mutation(
        "flava_train/objective/losses.py",
        "(X == Y[:, None]) & matched[:, None]",
        "X == Y[:, None]",
        _LOSSES,
        "mismatched pairs count as true in SigLIP's loss",
    ),
    Mutation(
        "flava_train/objective/losses.py",
        "2 + X.masked_positions",
        "1 + X.masked_positions",
        _LOSSES,
        "MMM reads the states of the patches before the masked ones",
    ),
    Mutation(
        "flava_train/objective/losses.py",
        "torch.where(X[:, None], Y, IGNORE)",
        "Y",
        _LOSSES,
        "mismatched pairs count in masked modelling",
    ),
    # training step
    Mutation(
        "flava_train/objective/step.py",
        "same_text | Z",
        "same_text",
        _LOSSES,
        "another caption of the same image serves as a negative",
    ),
    Mutation(
        "flava_train/objective/step.py",
        "losses.get(X, 0) + Y",
        "Y",
        _LOSSES,
        "the reported loss is that of the last micro-batch",
    ),
    Mutation(
        "flava_train/objective/step.py",
        "weights[X] * Y",
        "Y",
        _LOSSES,
        "weights of losses are ignored",
    ),
    Mutation(
        "flava_train/objective/step.py",
        "X.logit_scale.clamp_(*Y)",
        "None",
        _LOSSES,
        "the temperature leaves its range",
    ),
    # stats
    Mutation(
        "pmd_pipeline/inspect/stats.py",
        "X * 100 >= Y * Z",
        "X * 100 > Y * Z",
        _STATS,
        "a percentile that is met exactly is passed over",
    ),
    Mutation(
        "pmd_pipeline/inspect/stats.py",
        "words.get(X, 0) + Y",
        "Y",
        _STATS,
        "the total has the lengths of its last source",
    ),
    Mutation(
        "pmd_pipeline/inspect/stats.py",
        "round(mean - paper_words, 3)",
        "round(paper_words - mean, 3)",
        _STATS,
        "the difference from the paper has the wrong sign",
    ),
    # verify
    Mutation(
        "pmd_pipeline/inspect/verify/dataset.py",
        "X[1] >= Y[0]",
        "X[1] > Y[0]",
        _VERIFY,
        "two shards may share a key",
    ),
    Mutation(
        "pmd_pipeline/inspect/verify/samples.py",
        "(X, Y) != (Z.offset, Z.size)",
        "X != Z.offset",
        _VERIFY,
        "the ledger's sizes are not checked",
    ),
    Mutation(
        "pmd_pipeline/inspect/verify/ledger.py",
        "(X in FAILURE_REASONS) != (Y in Z)",
        "False",
        _VERIFY,
        "a failure's reason passes under a dropped record",
    ),
    # shard writer, boxes, names
    Mutation(
        "pmd_pipeline/shards/shard_writer.py",
        "sorted(members)",
        "members",
        _WRITER,
        "members come in the order of the caller",
    ),
    Mutation(
        "pmd_pipeline/shards/shard_writer.py",
        "bytes(-len(X) % Y)",
        "bytes(Y - len(X) % Y)",
        _WRITER,
        "a member of whole blocks gets a block of zeros more",
    ),
    Mutation(
        "pmd_pipeline/contract/boxes.py",
        "0 <= y0 < y1 <= 1",
        "0 <= y0 <= y1 <= 1",
        _CONTRACT,
        "a box without area is valid",
    ),
    Mutation(
        "pmd_pipeline/contract/names.py",
        'not X or "/" in Y or "\\\\" in Y',
        'not X or "/" in Y',
        _CONTRACT,
        "a file name may hold a backslash",
    ),
    Mutation(
        "pmd_pipeline/contract/names.py",
        "_HEX.fullmatch(X)",
        "_HEX.match(X)",
        _CONTRACT,
        "a digest may have a tail",
    ),
]
