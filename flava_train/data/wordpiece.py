"""Text to tokens: BERT's uncased WordPiece, from a vocabulary that is the user's or ours.

Special tokens are put in by number and never read out of a text, so a caption that says `[SEP]`
is three pieces like any other.
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

_FILES = ("tokenizer.json", "vocab.txt")


class WordPiece:
    """A tokenizer; two of the same vocabulary give the same tokens.

    Args:
        vocabulary: every piece, by its number; `[PAD]` is the first.

    Attributes:
        sha256: of the vocabulary as a `vocab.txt`.
        mask: number of `[MASK]`.
        specials: numbers that no text contains, except `[UNK]`.

    Raises:
        ValueError: a piece stands twice, or a special token is missing or out of its place.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        numbers = {piece: number for number, piece in enumerate(vocabulary)}
        if len(numbers) < len(vocabulary):
            raise ValueError("a piece stands twice in it")
        if missing := [name for name in SPECIAL_TOKENS if name not in numbers]:
            raise ValueError(f"it has no {missing[0]}")
        if numbers[PAD]:
            raise ValueError(f"{PAD} is not its first piece")
        self.vocabulary = list(vocabulary)
        content = "".join(f"{piece}\n" for piece in vocabulary)
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()
        self.mask = numbers[MASK]
        self.specials = tuple(sorted(numbers[name] for name in SPECIAL_TOKENS))
        self._cls, self._sep = numbers[CLS], numbers[SEP]
        self._tokenizer = Tokenizer(WordPieceModel(numbers, unk_token=UNK))
        self._tokenizer.normalizer = BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()

    def __reduce__(self) -> tuple[type["WordPiece"], tuple[list[str]]]:
        return WordPiece, (self.vocabulary,)

    def pieces(self, text: str) -> list[int]:
        """Numbers of the pieces of a text, without special tokens."""
        sound = text.encode(errors="replace").decode()  # JSON may hold half a surrogate pair
        numbers: list[int] = self._tokenizer.encode(sound, add_special_tokens=False).ids
        return numbers

    def encode(
        self, texts: Sequence[str], most: int
    ) -> tuple[Int[Array, "b {most}"], Int[Array, " b"]]:
        """Rows of `[CLS]`, pieces, `[SEP]` and padding; and how many of each are not padding.

        What does not fit is cut off, the last `[SEP]` never.
        """
        return self._rows([[self.pieces(text)] for text in texts], most)

    def encode_documents(
        self, texts: Sequence[str], most: int
    ) -> tuple[Int[Array, "b {most}"], Int[Array, " b"]]:
        """The same for texts of several documents, with a `[SEP]` after each."""
        return self._rows(
            [[self.pieces(one) for one in text.split(DOCUMENT_SEPARATOR)] for text in texts], most
        )

    def _rows(
        self, texts: Sequence[Sequence[Sequence[int]]], most: int
    ) -> tuple[Int[Array, "b {most}"], Int[Array, " b"]]:
        tokens = np.zeros((len(texts), most), np.int64)
        lengths = np.empty(len(texts), np.int64)
        for row, documents in enumerate(texts):
            line = [self._cls]
            for document in documents:
                line += document
                line.append(self._sep)
            if len(line) > most:
                line[most - 1 :] = [self._sep]
            tokens[row, : len(line)] = line
            lengths[row] = len(line)
        return tokens, lengths


def load_wordpiece(source: str, revision: str | None = None) -> WordPiece:
    """The tokenizer in a `vocab.txt`, a `tokenizer.json`, a folder with either, or on the hub.

    Args:
        source: a path, or an id on the hub.
        revision: the commit on the hub, 40 hex digits; branches move.

    Raises:
        PmdError: there is none, or it is not an uncased WordPiece as BERT has it.
    """
    path = Path(source)
    if not path.exists():
        path = _downloaded(source, revision)
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise PmdError(f"{source} has no {' and no '.join(_FILES)}")
        path = found[0]
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PmdError(f"cannot read the tokenizer {path}: {error}") from error
    try:
        is_json = path.suffix == ".json"
        return WordPiece(_of_json(content) if is_json else _of_lines(content))
    except ValueError as error:
        raise PmdError(f"{path} is no vocabulary for BERT's uncased WordPiece: {error}") from error


def _of_lines(content: str) -> list[str]:
    lines = content.replace("\r\n", "\n").split("\n")  # other line ends may be pieces
    return lines[:-1] if not lines[-1] else lines


def _of_json(content: str) -> list[str]:
    tokenizer = json.loads(content)
    match tokenizer:
        case {"model": {"type": "WordPiece", "vocab": dict(numbers)}}:
            pass
        case _:
            raise ValueError("its model is not a WordPiece")
    match tokenizer:
        case {"normalizer": {"type": "BertNormalizer", "lowercase": True}}:
            pass
        case _:
            raise ValueError("its normalizer is not that of uncased BERT")
    if set(map(str, numbers.values())) != set(map(str, range(len(numbers)))):
        raise ValueError("its numbers have holes")
    return sorted(numbers, key=numbers.__getitem__)


def _downloaded(name: str, revision: str | None) -> Path:
    if revision is None or not re.fullmatch("[0-9a-f]{40}", revision):
        raise PmdError(
            f"{name or 'data.tokenizer'}: no such file; `pmd tokenizer` makes one, and for one of "
            "the hub also give its commit as data.revision"
        )
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # only the hub needs it
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise PmdError(f"cannot load the tokenizer {name} from the hub: {reason}") from error
