"""WordPiece vocabularies in BERT's layout: learned from word counts, written and read.

The trainer of `tokenizers` gives another vocabulary on every run: it numbers tokens, and so breaks
ties, in the order of a hash table. This one merges the same pairs and breaks a tie by the smallest
numbers of tokens.
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
from pmd_pipeline.contract.tokens import PAD, SPECIAL_TOKENS, UNK

if TYPE_CHECKING:
    import tokenizers


MAX_WORDS = 1_000_000
"""Distinct words that are counted at a time; learning from as many takes about two GiB."""

_MAX_WORD_LENGTH = 100
"""BERT's WordPiece makes a longer word unknown, so nothing can be learned from it."""

_MIN_PAIR_COUNT = 2
"""A pair of tokens that occurs less often is not merged."""

_MAX_ALPHABET = 1000
"""Characters that become tokens; a word with any other is unknown."""

_CONTINUATION = "##"
"""Prefix of tokens inside a word."""

_SHIFT = 32


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a WordPiece, by number; `[PAD]` has number 0."""

    tokens: tuple[str, ...]

    @property
    def content(self) -> bytes:
        """The `vocab.txt` of these tokens, one per line."""
        return "".join(f"{token}\n" for token in self.tokens).encode()

    @property
    def sha256(self) -> str:
        """SHA-256 of `content`: equal for equal tokens, from whatever file they were read."""
        return hashlib.sha256(self.content).hexdigest()

    def tokenizer(self) -> "tokenizers.Tokenizer":
        """A tokenizer that splits texts into these tokens as BERT does, uncased.

        It does not recognise special tokens: "[SEP]" in a text is three words.

        Raises:
            PmdError: the library `tokenizers` is not installed.
        """
        library = _library()
        numbers = {token: number for number, token in enumerate(self.tokens)}
        model = library.models.WordPiece(
            numbers, unk_token=UNK, max_input_chars_per_word=_MAX_WORD_LENGTH
        )
        tokenizer: tokenizers.Tokenizer = library.Tokenizer(model)
        tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        return tokenizer


def load_vocabulary(path: str) -> Vocabulary:
    """The vocabulary in a `vocab.txt` of BERT, or in the `tokenizer.json` of an uncased WordPiece.

    Raises:
        PmdError: there is no such file, or it is neither of the two.
    """
    content = read_bytes(path)
    try:
        text = content.decode()
        tokens = _from_json(path, text) if path.endswith(".json") else _from_lines(text)
    except ValueError as error:
        raise PmdError(
            f"{path} is not a vocabulary: give the vocab.txt of BERT or the tokenizer.json of a "
            "WordPiece"
        ) from error
    absent = [token for token in SPECIAL_TOKENS if token not in tokens]
    if absent or tokens[0] != PAD or len(set(tokens)) < len(tokens):
        fault = (
            f"lacks {', '.join(absent)}"
            if absent
            else f"begins with {tokens[0]!r} instead of {PAD!r}"
            if tokens[0] != PAD
            else "has a token twice"
        )
        raise PmdError(f"{path} {fault}: it has not the layout of BERT's; see `pmd tokenizer`")
    return Vocabulary(tokens)


class WordCounts:
    """Counts of the words in texts, split as BERT splits them, uncased.

    Args:
        most: distinct words held at a time; where there are more, the rarest are removed.

    Attributes:
        max_error: a count may be short by at most so many, and a word of at most so many may be
            missing; 0 if all counts are exact.

    Raises:
        PmdError: the library `tokenizers` is not installed.
    """

    def __init__(self, most: int = MAX_WORDS) -> None:
        library = _library()
        self.max_error = 0
        self._most = most
        self._normalizer = library.normalizers.BertNormalizer(lowercase=True)
        self._pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        self._raw = Counter[str]()
        self._words = Counter[str]()

    def add(self, text: str) -> None:
        """Count the words of a text."""
        self._raw.update(text.split(" "))  # a space ends a word in any context
        if len(self._raw) >= self._most:
            self._fold()

    def words(self) -> dict[str, int]:
        """The counts so far."""
        self._fold()
        return dict(self._words)

    def _fold(self) -> None:
        for raw, count in self._raw.items():
            valid = raw.encode(errors="replace").decode()  # JSON can have lone surrogates
            normal = self._normalizer.normalize_str(valid)
            for word, _ in self._pre_tokenizer.pre_tokenize_str(normal):
                self._words[word] += count
        self._raw.clear()
        if len(self._words) > self._most:
            rare = sorted(self._words.values())[len(self._words) - self._most // 2]
            self._words = Counter({w: count for w, count in self._words.items() if count > rare})
            self.max_error += rare


def learn_wordpiece(words: Mapping[str, int], size: int) -> Vocabulary:
    """The vocabulary of at most `size` tokens, by merging the most frequent pairs of tokens.

    It has fewer tokens if no remaining pair occurs twice. The most frequent characters become
    tokens, at most a quarter of `size`.

    Args:
        words: counts of words.
    """
    alphabet = _alphabet(words, min(_MAX_ALPHABET, size // 4))
    usable = [
        (word, count)
        for word, count in words.items()
        if len(word) <= _MAX_WORD_LENGTH and alphabet.issuperset(word)
    ]
    inside = {char for word, _ in usable for char in word[1:]}
    trainer = _PairMerger(
        [*SPECIAL_TOKENS, *sorted(alphabet), *(_CONTINUATION + c for c in sorted(inside))]
    )
    for word, count in usable:
        trainer.add([word[0], *(_CONTINUATION + char for char in word[1:])], count)
    return Vocabulary(tuple(trainer.merge(size)))


class _PairMerger:
    """Words as lists of token numbers, in which the most frequent pair becomes one token.

    A pair is one number, so that pairs compare as their tokens do and take little memory.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = list(tokens)
        self._numbers = {token: number for number, token in enumerate(tokens)}
        self._words: list[list[int]] = []
        self._counts: list[int] = []
        self._pairs = Counter[int]()
        self._where: dict[int, list[int]] = {}

    def add(self, tokens: Sequence[str], count: int) -> None:
        """Add a word that occurs `count` times."""
        word, index = [self._numbers[token] for token in tokens], len(self._words)
        for first, second in pairwise(word):
            self._pairs[first << _SHIFT | second] += count
            self._where.setdefault(first << _SHIFT | second, []).append(index)
        self._words.append(word)
        self._counts.append(count)

    def merge(self, size: int) -> list[str]:
        """Merge pairs until there are `size` tokens, or no pair is frequent enough; all tokens."""
        queue = [(-count, pair) for pair, count in self._pairs.items()]
        heapq.heapify(queue)
        while queue and len(self._tokens) < size:
            count, pair = heapq.heappop(queue)
            now = self._pairs[pair]
            if now < _MIN_PAIR_COUNT:
                continue
            if -count != now:
                heapq.heappush(queue, (-now, pair))
                continue
            for new in self._merge_pair(pair):
                heapq.heappush(queue, (-self._pairs[new], new))
        return self._tokens

    def _merge_pair(self, pair: int) -> set[int]:
        """Replace a pair by one token everywhere; the pairs that have become more frequent."""
        first, second = pair >> _SHIFT, pair & (1 << _SHIFT) - 1
        token = self._tokens[first] + self._tokens[second].removeprefix(_CONTINUATION)
        number = self._numbers.setdefault(token, len(self._tokens))
        if number == len(self._tokens):
            self._tokens.append(token)
        more = set[int]()
        for index in set(self._where.pop(pair)):
            for changed, by in _replace_pair(self._words[index], first, second, number):
                self._pairs[changed] += by * self._counts[index]
                if by > 0:
                    self._where.setdefault(changed, []).append(index)
                    more.add(changed)
        return more


def _replace_pair(
    word: list[int], first: int, second: int, number: int
) -> Iterator[tuple[int, int]]:
    """Replace each pair in the word by `number`; the pairs that appear (1) and disappear (-1)."""
    index = 0
    while index + 1 < len(word):
        if word[index] == first and word[index + 1] == second:
            if index:
                yield word[index - 1] << _SHIFT | first, -1
                yield word[index - 1] << _SHIFT | number, 1
            word[index : index + 2] = [number]
            if index + 1 < len(word):
                yield second << _SHIFT | word[index + 1], -1
                yield number << _SHIFT | word[index + 1], 1
        index += 1


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
    if not isinstance(numbers, dict) or model.get("continuing_subword_prefix") != _CONTINUATION:
        raise ValueError("no WordPiece")
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise PmdError(f"{path} numbers its tokens with gaps: give the vocab.txt of the tokenizer")
    return tuple(sorted(numbers, key=numbers.__getitem__))


def _library() -> Any:  # noqa: ANN401 - the module, which may be absent
    try:
        import tokenizers  # noqa: PLC0415 - only texts need it
    except ImportError as error:
        raise PmdError(
            "texts need the library tokenizers: pip install 'pmd-flava[train]'"
        ) from error
    return tokenizers
