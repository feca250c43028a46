"""BERT's uncased WordPiece tokenizer, from any vocabulary.

Special tokens are inserted by id and never parsed from a text: a caption that contains `[SEP]`
gives three ordinary tokens.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece as WordPieceModel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from flava_train.shapes import Array, Int
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.tokens import (
    CLS,
    DOCUMENT_SEPARATOR,
    MASK,
    PAD,
    SEP,
    SPECIAL_TOKENS,
    UNK,
)

_FILE_NAMES = ("tokenizer.json", "vocab.txt")


class WordPiece:
    """A tokenizer; its output depends on the vocabulary alone.

    Args:
        vocabulary: every token in the order of ids; `[PAD]` is the first.

    Attributes:
        sha256: SHA-256 of the vocabulary as a `vocab.txt`.
        mask_id: token id of `[MASK]`.
        special_ids: token ids of the special tokens; of these, a text gives at most `[UNK]`.

    Raises:
        ValueError: a token is there twice, a special token is missing, or `[PAD]` is not first.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        ids = {token: number for number, token in enumerate(vocabulary)}
        if len(ids) < len(vocabulary):
            raise ValueError("it has a token twice")
        if missing := [name for name in SPECIAL_TOKENS if name not in ids]:
            raise ValueError(f"it has no {missing[0]}")
        if ids[PAD]:
            raise ValueError(f"{PAD} is not its first token")
        self.vocabulary = list(vocabulary)
        content = "".join(f"{token}\n" for token in vocabulary)
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()
        self.mask_id = ids[MASK]
        self.special_ids = tuple(sorted(ids[name] for name in SPECIAL_TOKENS))
        self._cls, self._sep = ids[CLS], ids[SEP]
        self._tokenizer = Tokenizer(WordPieceModel(ids, unk_token=UNK))
        self._tokenizer.normalizer = BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()

    def __reduce__(self) -> tuple[type["WordPiece"], tuple[list[str]]]:
        return WordPiece, (self.vocabulary,)

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        valid = text.encode(errors="replace").decode()  # JSON may hold half a surrogate pair
        ids: list[int] = self._tokenizer.encode(valid, add_special_tokens=False).ids
        return ids

    def encode(
        self, texts: Sequence[str], max_tokens: int
    ) -> tuple[Int[Array, "b {max_tokens}"], Int[Array, " b"]]:
        """Rows of `[CLS]`, tokens, `[SEP]` and padding; and the length of each without padding.

        A longer text is truncated; its row still ends with `[SEP]`.
        """
        return self._padded([[self.token_ids(text)] for text in texts], max_tokens)

    def encode_documents(
        self, texts: Sequence[str], max_tokens: int
    ) -> tuple[Int[Array, "b {max_tokens}"], Int[Array, " b"]]:
        """The same for sequences of several documents, with a `[SEP]` after each document."""
        return self._padded(
            [[self.token_ids(one) for one in text.split(DOCUMENT_SEPARATOR)] for text in texts],
            max_tokens,
        )

    def _padded(
        self, texts: Sequence[Sequence[Sequence[int]]], max_tokens: int
    ) -> tuple[Int[Array, "b {max_tokens}"], Int[Array, " b"]]:
        tokens = np.zeros((len(texts), max_tokens), np.int64)
        lengths = np.empty(len(texts), np.int64)
        for row, documents in enumerate(texts):
            line = [self._cls]
            for document in documents:
                line += document
                line.append(self._sep)
            if len(line) > max_tokens:
                line[max_tokens - 1 :] = [self._sep]
            tokens[row, : len(line)] = line
            lengths[row] = len(line)
        return tokens, lengths


def load_wordpiece(source: str, revision: str | None = None) -> WordPiece:
    """Load a tokenizer from a `vocab.txt`, a `tokenizer.json`, a folder with either, or the hub.

    Args:
        source: a path, or an id on the hub.
        revision: commit on the hub, 40 hex digits, since branches change.

    Raises:
        PmdError: there is none, or it is not BERT's uncased WordPiece.
    """
    path = Path(source)
    if not path.exists():
        path = _download_from_hub(source, revision)
    if path.is_dir():
        paths = [path / name for name in _FILE_NAMES if (path / name).is_file()]
        if not paths:
            raise PmdError(f"{source} has no {' and no '.join(_FILE_NAMES)}")
        path = paths[0]
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PmdError(f"cannot read the tokenizer {path}: {error}") from error
    try:
        is_json = path.suffix == ".json"
        return WordPiece(_vocabulary_of_json(content) if is_json else _vocabulary_of_lines(content))
    except ValueError as error:
        raise PmdError(f"{path} is no vocabulary for BERT's uncased WordPiece: {error}") from error


def _vocabulary_of_lines(content: str) -> list[str]:
    lines = content.replace("\r\n", "\n").split("\n")  # other line ends may be tokens
    return lines[:-1] if not lines[-1] else lines


def _vocabulary_of_json(content: str) -> list[str]:
    tokenizer = json.loads(content)
    match tokenizer:
        case {"model": {"type": "WordPiece", "vocab": dict(ids)}}:
            pass
        case _:
            raise ValueError("its model is not a WordPiece")
    match tokenizer:
        case {"normalizer": {"type": "BertNormalizer", "lowercase": True}}:
            pass
        case _:
            raise ValueError("its normalizer is not that of uncased BERT")
    if set(map(str, ids.values())) != set(map(str, range(len(ids)))):
        raise ValueError("its token ids are not 0 to n - 1")
    return sorted(ids, key=ids.__getitem__)


def _download_from_hub(name: str, revision: str | None) -> Path:
    if revision is None or not re.fullmatch("[0-9a-f]{40}", revision):
        raise PmdError(
            f"{name or 'data.tokenizer'}: there is no such file; `pmd tokenizer` makes one, and "
            "for an id on the hub set data.revision to its commit"
        )
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # only the hub needs it
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILE_NAMES)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise PmdError(f"cannot load the tokenizer {name} from the hub: {reason}") from error
