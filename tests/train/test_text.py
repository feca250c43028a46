import hashlib
import json
import pickle

import pytest
from tiny_datasets import write_vocabulary

from flava_train.data.wordpiece import WordPiece, load_wordpiece
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.tokens import SPECIAL_TOKENS

HOLES = """{"model": {"type": "WordPiece", "vocab": {"a": 3, "b": null}},
"normalizer": {"type": "BertNormalizer", "lowercase": true}}"""
PLAIN = [*SPECIAL_TOKENS, "a", "b", "dog", "##s", "sep", "[", "]"]
CLS, SEP, UNKNOWN = 2, 3, 1


@pytest.fixture
def samples(pytestconfig):
    folder = pytestconfig.rootpath.parent / "shared" / "samples"
    if not folder.is_dir():
        pytest.skip("the samples are not beside this checkout")
    return folder


def test_a_row_is_cls_tokens_sep_and_padding():
    tokens, lengths = WordPiece(PLAIN).encode(["A dogs", "", "zebra b"], 6)

    assert tokens.tolist() == [
        [CLS, 5, 7, 8, SEP, 0],
        [CLS, SEP, 0, 0, 0, 0],
        [CLS, UNKNOWN, 6, SEP, 0, 0],
    ]
    assert lengths.tolist() == [5, 2, 4]


def test_a_truncated_row_still_ends_with_sep():
    tokens, lengths = WordPiece(PLAIN).encode(["a b a b a b", "a b"], 4)

    assert tokens.tolist() == [[CLS, 5, 6, SEP], [CLS, 5, 6, SEP]]
    assert lengths.tolist() == [4, 4]


def test_documents_have_a_sep_between_them():
    tokens, lengths = WordPiece(PLAIN).encode_documents(["a dog\n\nb\n\ndogs", "a"], 9)

    assert tokens.tolist() == [[CLS, 5, 7, SEP, 6, SEP, 7, 8, SEP], [CLS, 5, SEP, *[0] * 6]]
    assert lengths.tolist() == [9, 3]


@pytest.mark.parametrize("text", ["[SEP]", "a [SEP] b", "[CLS][MASK]", "[PAD]", "[ SEP ]"])
def test_special_tokens_are_never_parsed_from_a_text(text):
    wordpiece = WordPiece(PLAIN)

    assert not set(wordpiece.token_ids(text)) & (set(wordpiece.special_ids) - {UNKNOWN})


def test_half_a_surrogate_pair_is_an_unknown_token():
    assert WordPiece(PLAIN).token_ids("\ud800") == [UNKNOWN]


def test_captions_get_the_tokens_of_bert(samples):
    transformers = pytest.importorskip("transformers")
    vocabulary = samples / "bert_vocab" / "vocab.txt"
    content = json.loads((samples / "photos" / "captions.json").read_text())
    captions = [one["caption"] for one in content["annotations"]]
    captions += ["Ünïcødé 北京 café…", "don't  stop\t!?", "\u200b\x00 x\u00a0y", "a" * 120 + " b"]
    theirs = transformers.BertTokenizer(vocab=str(vocabulary), do_lower_case=True)

    ours = load_wordpiece(str(vocabulary))

    expected = theirs(captions, padding="max_length", truncation=True, max_length=24)
    tokens, lengths = ours.encode(captions, 24)
    assert tokens.tolist() == expected["input_ids"]
    assert lengths.tolist() == [sum(mask) for mask in expected["attention_mask"]]


def test_both_file_formats_give_the_same_tokenizer(tmp_path):
    lines = tmp_path / "vocab.txt"
    lines.write_text("\n".join(PLAIN) + "\n")
    numbers = {piece: number for number, piece in enumerate(PLAIN)}
    described = {
        "model": {"type": "WordPiece", "vocab": dict(sorted(numbers.items()))},
        "normalizer": {"type": "BertNormalizer", "lowercase": True},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))

    one, other = load_wordpiece(str(lines)), load_wordpiece(str(tmp_path / "tokenizer.json"))

    assert one.vocabulary == other.vocabulary == load_wordpiece(str(tmp_path)).vocabulary
    assert one.sha256 == other.sha256 == hashlib.sha256(lines.read_bytes()).hexdigest()


def test_a_pickled_tokenizer_gives_the_same_tokens(tmp_path):
    wordpiece = load_wordpiece(write_vocabulary(tmp_path / "vocab.txt"))

    again = pickle.loads(pickle.dumps(wordpiece))  # noqa: S301  # our own

    assert again.token_ids("dog abc") == wordpiece.token_ids("dog abc")
    assert again.sha256 == wordpiece.sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", "[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n", "is not its first token"),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n", r"no \[MASK\]"),
        ("vocab.txt", "\n".join([*PLAIN, "a"]), "has a token twice"),
        ("vocab.txt", "", r"no \[PAD\]"),
        ("tokenizer.json", "{", "is no vocabulary"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}}}', "not a WordPiece"),
        (
            "tokenizer.json",
            '{"model": {"type": "WordPiece", "vocab": {}}, "normalizer": null}',
            "not that of uncased BERT",
        ),
        (
            "tokenizer.json",
            HOLES,
            "are not 0 to n - 1",
        ),
    ],
)
def test_an_invalid_vocabulary_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)

    with pytest.raises(PmdError, match=message):
        load_wordpiece(str(tmp_path / name))


def test_bytes_that_are_not_utf_8_are_refused(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")

    with pytest.raises(PmdError, match="cannot read the tokenizer"):
        load_wordpiece(str(tmp_path / "vocab.txt"))


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(PmdError, match=r"has no tokenizer\.json and no vocab\.txt"):
        load_wordpiece(str(tmp_path))


def test_a_tokenizer_of_the_hub_needs_its_commit():
    with pytest.raises(PmdError, match=r"data\.revision"):
        load_wordpiece("google-bert/bert-base-uncased", "main")
