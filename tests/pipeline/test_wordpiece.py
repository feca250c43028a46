"""The vocabulary: the merges of the library with a rule for ties, the same on every run."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_helpers import SAMPLES, needs_samples
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.tokens import SPECIAL_TOKENS
from pmd_pipeline.text import wordpiece
from pmd_pipeline.text.wordpiece import Vocabulary, WordCounts, learn_wordpiece, load_vocabulary

LETTERS = "abcdeé中-!"


def counted(texts):
    counts = WordCounts()
    for text in texts:
        counts.add(text)
    return counts.words()


def some_texts(seed=0, count=300):
    generator = random.Random(seed)
    stems = ["".join(generator.choices("abcdefgh", k=generator.randint(1, 6))) for _ in range(60)]
    return [" ".join(generator.choices(stems, k=8)) for _ in range(count)]


def trained_by_the_library(texts, size, first):
    """The library's vocabulary where the numbers of the first tokens are no accident."""
    found = Tokenizer(models.WordPiece())
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, min_frequency=2, special_tokens=first, show_progress=False
    )
    found.train_from_iterator(texts, trainer)
    numbers = found.get_vocab()
    return sorted(numbers, key=numbers.__getitem__)


@pytest.mark.parametrize("seed", range(4))
def test_the_tokens_are_those_of_the_librarys_trainer(seed):
    texts = some_texts(seed)

    tokens = list(learn_wordpiece(counted(texts), 160).tokens)

    letters = sum(len(token.removeprefix("##")) == 1 for token in tokens)
    assert tokens == trained_by_the_library(texts, 160, tokens[: len(SPECIAL_TOKENS) + letters])


@pytest.mark.parametrize("threads", ["false", "true"])
def test_fresh_processes_learn_the_same(threads):
    code = (
        "import sys; sys.path.insert(0, 'tests/pipeline'); import test_wordpiece as t\n"
        "print(t.learn_wordpiece(t.counted(t.some_texts()), 300).sha256)"
    )
    environment = {"PATH": "", "TOKENIZERS_PARALLELISM": threads, "PYTHONHASHSEED": "random"}

    found = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )

    assert found.stdout.strip() == learn_wordpiece(counted(some_texts()), 300).sha256


@given(st.lists(st.text(LETTERS, max_size=6), max_size=20), st.randoms(use_true_random=False))
def test_the_order_of_the_texts_does_not_matter(texts, generator):
    shuffled = generator.sample(texts, len(texts))

    assert learn_wordpiece(counted(texts), 60) == learn_wordpiece(counted(shuffled), 60)


@given(st.lists(st.text(max_size=30), max_size=8))
def test_words_are_counted_as_bert_splits_them(texts):
    normal, split = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    whole = [word for t in texts for word, _ in split.pre_tokenize_str(normal.normalize_str(t))]

    assert counted(texts) == Counter(whole)


def test_the_rarest_words_are_removed_with_a_bound_on_the_error():
    texts = ["often " * 50, *(f"rare{n}" for n in range(200))]
    counts = WordCounts(most=100)

    for text in texts:
        counts.add(text)

    words = counts.words()
    assert len(words) <= 100
    assert 50 - counts.max_error <= words["often"] <= 50
    assert all(50 >= words.get(w, 0) >= 1 - counts.max_error for t in texts for w in t.split())
    assert counts.max_error > 0


def test_the_layout_is_berts():
    vocabulary = learn_wordpiece(counted(["a dog", "a dog"]), 100)

    assert vocabulary.tokens[:5] == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    assert "dog" in vocabulary.tokens
    assert vocabulary.tokenizer().encode("A DOG").tokens == ["a", "dog"]


def test_no_text_can_produce_a_special_token():
    cut = learn_wordpiece(counted(["sep cls mask [ ] sep"] * 2), 200).tokenizer()

    numbers = cut.encode("[SEP] [CLS] [MASK] [PAD]").ids

    assert not {0, 2, 3, 4} & set(numbers)


def test_characters_beyond_the_alphabet_make_their_words_unknown():
    texts = ["abc " * 9, *(chr(0x4E00 + n) for n in range(400))]
    vocabulary = learn_wordpiece(counted(texts), 100)

    assert len(vocabulary.tokens) <= 100
    assert vocabulary.tokenizer().encode("abc 丁" + chr(0x4E00 + 399)).tokens[0] == "abc"


def test_a_vocabulary_is_the_same_from_either_file(tmp_path):
    vocabulary = learn_wordpiece(counted(some_texts()), 200)
    (tmp_path / "vocab.txt").write_bytes(vocabulary.content)
    vocabulary.tokenizer().save(str(tmp_path / "tokenizer.json"))

    assert load_vocabulary(str(tmp_path / "vocab.txt")) == vocabulary
    assert load_vocabulary(str(tmp_path / "tokenizer.json")) == vocabulary


@needs_samples
def test_berts_own_vocabulary_is_read():
    vocabulary = load_vocabulary(str(SAMPLES / "bert_vocab" / "vocab.txt"))

    assert len(vocabulary.tokens) == 30522
    assert vocabulary.content == (SAMPLES / "bert_vocab" / "vocab.txt").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("vocab.txt", b"[PAD]\n[UNK]\na\n", r"lacks \[CLS\], \[SEP\], \[MASK\]"),
        ("vocab.txt", b"a\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", "begins with 'a'"),
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n", "a token twice"),
        ("vocab.txt", b"\xff\xfe", "is not a vocabulary"),
        ("tokenizer.json", b"{", "is not a vocabulary"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}}}', "is not a vocabulary"),
        ("tokenizer.json", b"[1]", "is not a vocabulary"),
    ],
)  # fmt: skip
def test_another_file_is_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(PmdError, match=words):
        load_vocabulary(str(tmp_path / name))


def test_numbers_with_gaps_are_refused(tmp_path):
    model = {"continuing_subword_prefix": "##", "vocab": {"[PAD]": 0, "[UNK]": 2}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))

    with pytest.raises(PmdError, match="with gaps"):
        load_vocabulary(str(tmp_path / "tokenizer.json"))


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)

    with pytest.raises(PmdError, match="pip install"):
        wordpiece.WordCounts()


def test_a_large_vocabulary_is_merged_to_its_size():
    generator = random.Random(1)
    words = {
        "".join(generator.choices("abcdefghij", k=7)): generator.randint(1, 9) for _ in range(3000)
    }

    assert len(learn_wordpiece(words, 1500).tokens) == 1500
    assert isinstance(learn_wordpiece(words, 1500), Vocabulary)
