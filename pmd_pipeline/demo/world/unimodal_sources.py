"""The sources that are no pairs: images of one class each, articles, and the lines of books."""

from io import BytesIO
from itertools import count

import pyarrow as pa
import pyarrow.parquet as pq

from pmd_pipeline.demo.world.captions import (
    five_sentences,
    ground_phrase,
    narrative,
    phrase,
    sentence,
    things,
)
from pmd_pipeline.demo.world.plan import OnWeb, Picture, Plan
from pmd_pipeline.demo.world.scenes import SHAPES, Scene, make_scene

_TALES = 4
"""Articles, and stories, for each picture of another source."""

_NEWS_QUIRKS = ("null", "blank", "zeros")
_LINES = 1000
"""Lines of a document, as the recipe of BookCorpus has it."""

_CLASSES = {f"n9000000{number}": shape for number, shape in enumerate(SHAPES, start=1)}
"""Classes as ImageNet names them, with a word for each."""


def imagenet1k(plan: Plan) -> None:
    """ImageNet-1K: a folder of images for each class, and the list of classes."""
    classes = list(_CLASSES.items())
    for picture in plan.pictures(("cmyk", "cut", "png")):
        folder, shape = classes[picture.number % len(classes)]
        scene = _all_of(shape, f"{plan.seed}/{plan.source}/{picture.number}")
        path = f"train/{folder}/{folder}_{picture.number}.JPEG"
        plan.loose[path] = OnWeb(scene, picture.answer)
        plan.expect(picture)
    lines = [f"{folder} {shape}\n" for folder, shape in _CLASSES.items()]
    plan.files["LOC_synset_mapping.txt"] = "".join(lines).encode()


def ccnews(plan: Plan) -> None:
    """CC-News: a table with an article in each row."""
    reasons = {"null": "bad_row", "blank": "no_text", "zeros": "not_text"}
    articles: list[str | None] = []
    for number in range(_TALES * plan.scenes):
        picture = plan.picture(number, plan.quirk_of(number, _NEWS_QUIRKS))
        odd = {"null": None, "blank": " ", "zeros": "\0"}
        articles.append(odd[picture.quirk] if picture.quirk else _article(picture))
        plan.expect(picture, reasons.get(picture.quirk or ""))
    table = pa.table({"title": [f"No. {i}" for i in range(len(articles))], "text": articles})
    out = BytesIO()
    pq.write_table(table, out)
    plan.files["train-00000-of-00001.parquet"] = out.getvalue()


def bookcorpus(plan: Plan) -> None:
    """BookCorpus: a sentence on each line, one story after another; a few lines are no text."""
    lines: list[bytes] = []
    num_good = 0
    for number in range(_TALES * plan.scenes):
        picture = plan.picture(number, plan.quirk_of(number, ("latin",)))
        if picture.quirk:
            lines.append("Voilà, c'est tout".encode("latin-1"))
            plan.expect(picture, "not_text")
        story = _story(picture)
        lines += [line.encode() for line in story]
        num_good += len(story)
    plan.expect(plan.picture(0), pairs=-(-num_good // _LINES))
    plan.files["books_large_p1.txt"] = b"\n".join(lines) + b"\n"


def _all_of(shape: str, name: str) -> Scene:
    """A scene with nothing but one group of a shape."""
    scenes = (make_scene(f"{name}/{tries}") for tries in count())
    return next(one for one in scenes if [group.shape for group in one.groups] == [shape])


def _article(picture: Picture) -> str:
    scene, dice = picture.scene, picture.dice
    told = [
        f"A new picture was shown today. {narrative(scene, dice)}",
        " ".join(dice.sample(five_sentences(scene, dice), 2)),
        f"Those who came liked {phrase(dice.choice(scene.groups), size=True)} most.",
    ]
    dice.shuffle(told)
    return "\n".join([sentence(f"{things(scene)} on show")[:-1], *told])


def _story(picture: Picture) -> list[str]:
    scene, dice = picture.scene, picture.dice
    first, *others = scene.groups
    verb = "was" if first.count == 1 else "were"
    lines = [sentence(f"once there {verb} {phrase(first, size=True)}")]
    lines += [sentence(f"then came {phrase(other, size=True, place=True)}") for other in others]
    lines.append(sentence(f"they all lived on {ground_phrase(scene.ground)}"))
    lines.append(dice.choice(("Nobody ever moved them.", "They liked it there.")))
    return lines
