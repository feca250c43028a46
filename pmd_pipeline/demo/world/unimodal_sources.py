"""Sources without pairs: images with classes, articles, and lines of books."""

from io import BytesIO
from itertools import count

import pyarrow as pa
import pyarrow.parquet as pq

from pmd_pipeline.demo.world.captions import (
    background_phrase,
    five_sentences,
    narrative,
    phrase,
    scene_phrase,
    sentence,
)
from pmd_pipeline.demo.world.sample_source import SampleImage, SampleSource, WebImage
from pmd_pipeline.demo.world.scenes import SHAPES, Scene, make_scene

_TEXTS_PER_SAMPLE = 4
"""Articles, and stories, for each image of another source."""

_NEWS_QUIRKS = ("null", "blank", "zeros")
_LINES_PER_DOCUMENT = 1000
"""Lines of a document in the recipe of BookCorpus."""

_CLASS_NAMES = {f"n9000000{number}": shape for number, shape in enumerate(SHAPES, start=1)}
"""Names of classes by their ImageNet id."""


def imagenet1k(source: SampleSource) -> None:
    """ImageNet-1K: a folder of images for each class, and the list of classes."""
    classes = list(_CLASS_NAMES.items())
    for sample in source.samples(("cmyk", "cut", "png")):
        folder, shape = classes[sample.number % len(classes)]
        scene = _scene_of_shape(shape, f"{source.seed}/{source.name}/{sample.number}")
        path = f"train/{folder}/{folder}_{sample.number}.JPEG"
        source.raw_images[path] = WebImage(scene, sample.response)
        source.expect(sample)
    lines = [f"{folder} {shape}\n" for folder, shape in _CLASS_NAMES.items()]
    source.files["LOC_synset_mapping.txt"] = "".join(lines).encode()


def ccnews(source: SampleSource) -> None:
    """CC-News: a table with an article in each row."""
    reasons = {"null": "bad_row", "blank": "no_text", "zeros": "not_text"}
    articles: list[str | None] = []
    for number in range(_TEXTS_PER_SAMPLE * source.scenes):
        sample = source.sample(number, source.quirk_of(number, _NEWS_QUIRKS))
        variants = {"null": None, "blank": " ", "zeros": "\0"}
        articles.append(variants[sample.quirk] if sample.quirk else _article(sample))
        source.expect(sample, reasons.get(sample.quirk or ""))
    table = pa.table({"title": [f"No. {i}" for i in range(len(articles))], "text": articles})
    out = BytesIO()
    pq.write_table(table, out)
    source.files["train-00000-of-00001.parquet"] = out.getvalue()


def bookcorpus(source: SampleSource) -> None:
    """BookCorpus: stories with a sentence on each line; a few lines are not UTF-8."""
    lines: list[bytes] = []
    num_good = 0
    for number in range(_TEXTS_PER_SAMPLE * source.scenes):
        sample = source.sample(number, source.quirk_of(number, ("latin",)))
        if sample.quirk:
            lines.append("Voilà, c'est tout".encode("latin-1"))
            source.expect(sample, "not_text")
        story = _story(sample)
        lines += [line.encode() for line in story]
        num_good += len(story)
    source.expect(source.sample(0), pairs=-(-num_good // _LINES_PER_DOCUMENT))
    source.files["books_large_p1.txt"] = b"\n".join(lines) + b"\n"


def _scene_of_shape(shape: str, name: str) -> Scene:
    """A scene with one group, of the shape."""
    scenes = (make_scene(f"{name}/{tries}") for tries in count())
    return next(one for one in scenes if [group.shape for group in one.groups] == [shape])


def _article(sample: SampleImage) -> str:
    scene, rng = sample.scene, sample.rng
    sentences = [
        f"A new picture was shown today. {narrative(scene, rng)}",
        " ".join(rng.sample(five_sentences(scene, rng), 2)),
        f"Those who came liked {phrase(rng.choice(scene.groups), size=True)} most.",
    ]
    rng.shuffle(sentences)
    return "\n".join([sentence(f"{scene_phrase(scene)} on show")[:-1], *sentences])


def _story(sample: SampleImage) -> list[str]:
    scene, rng = sample.scene, sample.rng
    first, *others = scene.groups
    verb = "was" if first.count == 1 else "were"
    lines = [sentence(f"once there {verb} {phrase(first, size=True)}")]
    lines += [sentence(f"then came {phrase(other, size=True, position=True)}") for other in others]
    lines.append(sentence(f"they all lived on {background_phrase(scene.background)}"))
    lines.append(rng.choice(("Nobody ever moved them.", "They liked it there.")))
    return lines
