"""Synthetic rows in the format of YFCC100M's file of 25 columns, to measure indexing.

`python benchmarks/yfcc_rows.py rows.tsv 300000` writes a file; equal seeds give equal bytes. The
shares of titles, descriptions, videos, camera names and languages are guesses: no real figures are
published.
"""

import random
import sys
from pathlib import Path
from urllib.parse import quote_plus

from pmd_pipeline.sources.yfcc100m import photo_hash

DESCRIPTION_SHARE = 0.35
TITLE_SHARE = 0.85
CAMERA_NAME_SHARE = 0.35
"""Share of the titles that are file names of a camera."""

VIDEO_SHARE = 0.008

WORDS = {
    "en": "the a dog cat beach sunset over our old house with my friends on holiday in summer from "
    "garden flowers near river mountain view and children playing at night street lights of city "
    "wedding party walking through park snow morning train station market bridge it's 50% + more",
    "de": "der die das Hund Straße über mit schönen Grüße aus München alte Brücke im Winter und "
    "Kinder spielen am Fluss unser Haus Abendhimmel für große Berge",
    "fr": "le la les été à la plage château près de la forêt avec mes amis déjà l'église vieux "
    "marché nuit montagne rivière où fenêtre",
    "es": "el la los niños en la playa montaña señor años después corazón de la ciudad con amigos "
    "puente viejo mañana jardín",
    "pt": "o a os crianças coração na praia avó não são João da cidade com amigos ponte velha",
    "it": "il la i bambini sulla spiaggia città più vecchia casa con gli amici perché montagna",
    "ja": "東京 の 夜景 桜 の 花 祭り 海 と 山 猫 と 犬 駅前 散歩 夕焼け 神社",
    "zh": "北京 的 夜晚 公園 裡 的 花 台灣 海邊 日落 老 房子 貓 和 狗 火車站",
    "ru": "собака на пляже закат над рекой старый дом зимой дети играют в парке город ночью",
}
LANGUAGE_SHARES = (0.6, 0.06, 0.06, 0.08, 0.04, 0.05, 0.05, 0.04, 0.02)
"""Shares of the languages of `WORDS`, in order."""

LICENCES = (
    ("Attribution License", "by"),
    ("Attribution-NonCommercial License", "by-nc"),
    ("Attribution-NonCommercial-NoDerivs License", "by-nc-nd"),
    ("Attribution-NonCommercial-ShareAlike License", "by-nc-sa"),
    ("Attribution-NoDerivs License", "by-nd"),
    ("Attribution-ShareAlike License", "by-sa"),
)
CAMERA_NAMES = ("IMG_{:04}", "DSC_{:04}", "DSC{:05}", "DSCN{:04}", "P10{:05}", "100_{:04}", "{:03}")


def write_rows(path: Path, count: int, seed: int) -> None:
    """Write `count` rows of 25 columns to `path`."""
    rng = random.Random(seed)
    words = [text.split() for text in WORDS.values()]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number in range(count):
            file.write("\t".join(_fields(rng, number, words)) + "\n")


def _fields(rng: random.Random, number: int, words: list[list[str]]) -> list[str]:
    photo, owner = 10_000_000 + 97 * number, f"{rng.randrange(10**7, 10**8)}@N00"
    language_words = rng.choices(words, LANGUAGE_SHARES)[0]
    title = description = ""
    if rng.random() < TITLE_SHARE:
        title = _title(rng, language_words)
    if rng.random() < DESCRIPTION_SHARE:
        description = _description(rng, language_words)
    server, secret = rng.randrange(1, 9000), f"{rng.getrandbits(40):010x}"
    address = f"http://farm{server % 9 + 1}.staticflickr.com/{server}/{photo}_{secret}.jpg"
    licence, kind = rng.choice(LICENCES)
    taken = f"20{rng.randrange(4, 14):02}-{rng.randrange(1, 13):02}-11 16:20:05.0"
    has_position = rng.random() < 0.48
    return [
        str(number),
        str(photo),
        photo_hash(address.encode()).decode(),
        owner,
        quote_plus(f"{language_words[0]} {owner[:4]}"),
        taken if rng.random() < 0.98 else "null",
        str(1_100_000_000 + number),
        "Canon+EOS+450D",
        quote_plus(title),
        quote_plus(description),
        ",".join(quote_plus(word) for word in rng.choices(language_words, k=rng.randrange(8))),
        "",
        f"{rng.uniform(-180, 180):.6f}" if has_position else "",
        f"{rng.uniform(-90, 90):.6f}" if has_position else "",
        "16" if has_position else "",
        f"http://www.flickr.com/photos/{owner}/{photo}/",
        address,
        licence,
        f"http://creativecommons.org/licenses/{kind}/2.0/",
        str(server),
        str(server % 9 + 1),
        secret,
        secret[::-1],
        "jpg",
        "1" if rng.random() < VIDEO_SHARE else "0",
    ]


def _title(rng: random.Random, language_words: list[str]) -> str:
    if rng.random() < CAMERA_NAME_SHARE:
        return rng.choice(CAMERA_NAMES).format(rng.randrange(1000))
    return " ".join(rng.choices(language_words, k=rng.randrange(1, 7)))


def _description(rng: random.Random, language_words: list[str]) -> str:
    sentences = [
        " ".join(rng.choices(language_words, k=rng.randrange(3, 16))).capitalize()
        for _ in range(rng.choices((1, 2, 3, 8), (60, 22, 12, 6))[0])
    ]
    if rng.random() < 0.1:
        sentences.append('See <a href="http://example.org/set/12" rel="nofollow">more</a>')
    return rng.choice((". ", ".\n", ".\n\n")).join(sentences)


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]), int(sys.argv[2]), seed=0)
