"""WordPiece vocabularies in BERT's layout: learned from counted words, kept, and read.

The trainer of `tokenizers` gives another vocabulary on every run, since it numbers pieces, and so
breaks ties, in the order of a hash table. This one merges the same pairs, and a tie goes to the
pieces with the smallest numbers.
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import read_bytes
from pmd_pipeline.contract.tokens import SPECIAL_TOKENS

if TYPE_CHECKING:
    import tokenizers


MOST_WORDS = 1_000_000
"""Different words that are counted at a time; learning from as many takes about two GiB."""

_LONGEST_WORD = 100
"""BERT's WordPiece takes a longer word as unknown, so nothing can be learned from it."""

_LEAST = 2
"""A pair of pieces that occurs less often is not worth a number."""

_ALPHABET = 1000
"""Most characters that become pieces; a word with any other is unknown."""

_INSIDE = "##"
_UNKNOWN = "[UNK]"
_SHIFT = 32


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of a WordPiece, by number; `[PAD]` is number 0."""

    pieces: tuple[str, ...]

    @property
    def content(self) -> bytes:
        """The `vocab.txt` of these pieces, one a line."""
        return "".join(f"{piece}\n" for piece in self.pieces).encode()

    @property
    def sha256(self) -> str:
        """sha256 of `content`: equal for equal pieces, whatever file they were read from."""
        return hashlib.sha256(self.content).hexdigest()

    def wordpiece(self) -> "tokenizers.Tokenizer":
        """What cuts texts into these pieces, as BERT does, uncased.

        No special piece is known to it by name: "[SEP]" in a text is three words, whoever wrote it.

        Raises:
            PmdError: the library `tokenizers` is not there.
        """
        library = _library()
        numbers = {piece: number for number, piece in enumerate(self.pieces)}
        model = library.models.WordPiece(
            numbers, unk_token=_UNKNOWN, max_input_chars_per_word=_LONGEST_WORD
        )
        found: tokenizers.Tokenizer = library.Tokenizer(model)
        found.normalizer = library.normalizers.BertNormalizer(lowercase=True)
        found.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        return found


def load_vocabulary(path: str) -> Vocabulary:
    """The vocabulary in a `vocab.txt` of BERT, or in the `tokenizer.json` of an uncased WordPiece.

    Raises:
        PmdError: it is not there, or is neither of the two.
    """
    content = read_bytes(path)
    try:
        text = content.decode()
        pieces = _from_json(path, text) if path.endswith(".json") else _from_lines(text)
    except ValueError as error:
        raise PmdError(
            f"{path} is no vocabulary: give BERT's vocab.txt, or the tokenizer.json of a WordPiece"
        ) from error
    absent = [piece for piece in SPECIAL_TOKENS if piece not in pieces]
    if absent or pieces[0] != "[PAD]" or len(set(pieces)) < len(pieces):
        wrong = (
            f"lacks {', '.join(absent)}"
            if absent
            else f"begins with {pieces[0]!r} instead of '[PAD]'"
            if pieces[0] != "[PAD]"
            else "has a piece twice"
        )
        raise PmdError(f"{path} {wrong}: it is no vocabulary of BERT's; see `pmd tokenizer`")
    return Vocabulary(pieces)


class WordCounts:
    """How often words occur in texts, split as BERT splits them, uncased.

    Args:
        most: different words held at a time; where there are more, the rarest are forgotten.

    Attributes:
        forgotten: up to this count, a word may be missing or counted short; 0 where none is.

    Raises:
        PmdError: the library `tokenizers` is not there.
    """

    def __init__(self, most: int = MOST_WORDS) -> None:
        library = _library()
        self.forgotten = 0
        self._most = most
        self._normalizer = library.normalizers.BertNormalizer(lowercase=True)
        self._splitter = library.pre_tokenizers.BertPreTokenizer()
        self._raw = Counter[str]()
        self._words = Counter[str]()

    def add(self, text: str) -> None:
        """Count the words of a text."""
        self._raw.update(text.split(" "))  # a blank ends a word whatever stands around it
        if len(self._raw) >= self._most:
            self._fold()

    def words(self) -> dict[str, int]:
        """The counts so far."""
        self._fold()
        return dict(self._words)

    def _fold(self) -> None:
        for raw, count in self._raw.items():
            sound = raw.encode(errors="replace").decode()  # JSON can spell lone surrogates
            normal = self._normalizer.normalize_str(sound)
            for word, _ in self._splitter.pre_tokenize_str(normal):
                self._words[word] += count
        self._raw.clear()
        if len(self._words) > self._most:
            rare = sorted(self._words.values())[len(self._words) - self._most // 2]
            self._words = Counter({w: count for w, count in self._words.items() if count > rare})
            self.forgotten += rare


def learned(words: Mapping[str, int], size: int) -> Vocabulary:
    """The vocabulary of at most `size` pieces that the most frequent pairs of pieces give.

    Fewer pieces come out where no pair is left that occurs twice. Of the characters, the most
    frequent become pieces, at most a quarter of `size`.
    """
    alphabet = _alphabet(words, min(_ALPHABET, size // 4))
    usable = [
        (word, count)
        for word, count in words.items()
        if len(word) <= _LONGEST_WORD and alphabet.issuperset(word)
    ]
    inside = {char for word, _ in usable for char in word[1:]}
    merging = _Merging([*SPECIAL_TOKENS, *sorted(alphabet), *(_INSIDE + c for c in sorted(inside))])
    for word, count in usable:
        merging.add([word[0], *(_INSIDE + char for char in word[1:])], count)
    return Vocabulary(tuple(merging.merged(size)))


class _Merging:
    """Words as lists of piece numbers, in which the most frequent pair becomes one piece.

    A pair is one number, so that pairs compare as their pieces do and take little memory.
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces = list(pieces)
        self._numbers = {piece: number for number, piece in enumerate(pieces)}
        self._words: list[list[int]] = []
        self._counts: list[int] = []
        self._pairs = Counter[int]()
        self._where: dict[int, list[int]] = {}

    def add(self, pieces: Sequence[str], count: int) -> None:
        """Add a word that occurs `count` times."""
        word, index = [self._numbers[piece] for piece in pieces], len(self._words)
        for first, second in pairwise(word):
            self._pairs[first << _SHIFT | second] += count
            self._where.setdefault(first << _SHIFT | second, []).append(index)
        self._words.append(word)
        self._counts.append(count)

    def merged(self, size: int) -> list[str]:
        """Merge until there are `size` pieces, or no pair occurs often enough."""
        queue = [(-count, pair) for pair, count in self._pairs.items()]
        heapq.heapify(queue)
        while queue and len(self._pieces) < size:
            count, pair = heapq.heappop(queue)
            now = self._pairs[pair]
            if now < _LEAST:
                continue
            if -count != now:
                heapq.heappush(queue, (-now, pair))
                continue
            for new in self._merge(pair):
                heapq.heappush(queue, (-self._pairs[new], new))
        return self._pieces

    def _merge(self, pair: int) -> set[int]:
        """Make one piece of a pair wherever it occurs; the pairs that may be more frequent now."""
        first, second = pair >> _SHIFT, pair & (1 << _SHIFT) - 1
        piece = self._pieces[first] + self._pieces[second].removeprefix(_INSIDE)
        number = self._numbers.setdefault(piece, len(self._pieces))
        if number == len(self._pieces):
            self._pieces.append(piece)
        more = set[int]()
        for index in set(self._where.pop(pair)):
            for changed, by in _joined(self._words[index], first, second, number):
                self._pairs[changed] += by * self._counts[index]
                if by > 0:
                    self._where.setdefault(changed, []).append(index)
                    more.add(changed)
        return more


def _joined(word: list[int], first: int, second: int, number: int) -> Iterator[tuple[int, int]]:
    """Make `number` of each pair in the word; the pairs that come (1) and go (-1) by that."""
    at = 0
    while at + 1 < len(word):
        if word[at] == first and word[at + 1] == second:
            if at:
                yield word[at - 1] << _SHIFT | first, -1
                yield word[at - 1] << _SHIFT | number, 1
            word[at : at + 2] = [number]
            if at + 1 < len(word):
                yield second << _SHIFT | word[at + 1], -1
                yield number << _SHIFT | word[at + 1], 1
        at += 1


def _alphabet(words: Mapping[str, int], most: int) -> set[str]:
    chars = Counter[str]()
    for word, count in words.items():
        for char in word:
            chars[char] += count
    ranked = sorted(chars, key=lambda char: (-chars[char], char))
    return set(ranked[:most])


def _from_lines(text: str) -> tuple[str, ...]:
    return tuple(line.removesuffix("\r") for line in text.removesuffix("\n").split("\n"))


def _from_json(path: str, text: str) -> tuple[str, ...]:
    model: Any = json.loads(text)
    model = model.get("model") if isinstance(model, dict) else None
    numbers = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(numbers, dict) or model.get("continuing_subword_prefix") != _INSIDE:
        raise ValueError("no WordPiece")
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise PmdError(f"{path} numbers its pieces with gaps: give the vocab.txt of the tokenizer")
    return tuple(sorted(numbers, key=numbers.__getitem__))


def _library() -> Any:  # noqa: ANN401 - the module, which may be absent
    try:
        import tokenizers  # noqa: PLC0415 - only who works with texts must have it
    except ImportError as error:
        raise PmdError(
            "texts are cut into pieces by the library tokenizers: pip install pmd-flava[train]"
        ) from error
    return tokenizers
