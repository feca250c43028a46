"""True captions of scenes: a small grammar, and one style per source."""

import random
from collections.abc import Sequence
from dataclasses import replace

from pmd_pipeline.demo.world.languages import LANGUAGES
from pmd_pipeline.demo.world.scenes import Background, Group, Scene

COUNTS = {1: "a", 2: "two", 3: "three"}

POSITION_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}


def phrase(group: Group, *, size: bool = False, position: bool = False) -> str:
    """The group as a noun phrase.

    >>> phrase(Group(2, "large", "red", "star", "left"), size=True, position=True)
    'two large red stars on the left'
    >>> phrase(Group(1, "small", "orange", "cross", "top"))
    'an orange cross'
    """
    words = [group.size] if size else []
    words += [group.colour, group.shape if group.count == 1 else plural(group.shape)]
    article = COUNTS[group.count]
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words, *([POSITION_PHRASES[group.position]] if position else [])])


def plural(noun: str) -> str:
    """The plural of a noun.

    >>> plural("cross"), plural("heart")
    ('crosses', 'hearts')
    """
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def background_phrase(background: Background) -> str:
    """The background as a noun phrase.

    >>> background_phrase(Background("striped", "grey"))
    'a striped grey background'
    """
    return f"a {background.pattern} {background.colour} background"


def enumeration(parts: Sequence[str]) -> str:
    """The parts as one phrase.

    >>> enumeration(["a star", "a heart", "a cross"])
    'a star, a heart and a cross'
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def scene_phrase(scene: Scene, *, size: bool = False, position: bool = False) -> str:
    """All groups of the scene as one phrase."""
    return enumeration([phrase(group, size=size, position=position) for group in scene.groups])


def sentence(text: str) -> str:
    """The text with a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def five_sentences(scene: Scene, rng: random.Random) -> list[str]:
    """COCO: five captions of about ten words."""
    one = rng.choice(scene.groups)
    verb = "is" if scene.groups[0].count == 1 else "are"
    background = background_phrase(scene.background)
    return [
        sentence(f"{scene_phrase(scene, size=True)} on {background}"),
        sentence(f"there {verb} {scene_phrase(scene, position=True)}"),
        sentence(f"this is a picture of {scene_phrase(scene)}"),
        sentence(f"{phrase(one, size=True, position=True)} of {background}"),
        sentence(f"a {scene.background.colour} background with {scene_phrase(scene)} on it"),
    ]


def photo_title(scene: Scene, rng: random.Random) -> str:
    """SBU: the photographer's title, about twelve words."""
    text = rng.choice(
        (
            f"{scene_phrase(scene, position=True)} of the {scene.background.colour} wall at home",
            f"{scene_phrase(scene, size=True)} in front of {background_phrase(scene.background)}",
            f"{scene_phrase(scene)} - I love the {scene.background.pattern} look",
        )
    )
    return text[0].upper() + text[1:]


def alt_text(scene: Scene, rng: random.Random) -> str:
    """CC3M: lower case, tokenised, about ten words."""
    return rng.choice(
        (
            f"{scene_phrase(scene)} isolated on {background_phrase(scene.background)} .",
            f"illustration of {scene_phrase(scene, size=True)}",
            f"{scene_phrase(scene)} on the {scene.background.colour} wall of person",
        )
    )


def stock_title(scene: Scene, rng: random.Random) -> str:
    """CC12M: unchanged alternative text of a web page, about seventeen words."""
    sized = scene_phrase(scene, size=True)
    text = rng.choice(
        (
            f"{scene_phrase(scene, size=True, position=True)} - Stock Photo, Vector Art",
            f"Poster by <PERSON> | {sized} on {scene.background.colour} paper",
            f"{sized} on {background_phrase(scene.background)}, Free Download for Kids",
        )
    )
    return text[0].upper() + text[1:]


def narrative(scene: Scene, rng: random.Random) -> str:
    """Localized Narratives: a sentence for each group and one for the background."""
    opening = rng.choice(("In this image I can see", "In this picture we can see", "There we see"))
    first, *others = (phrase(group, size=True, position=True) for group in scene.groups)
    texts = [f"{opening} {first} of the image."]
    texts += [f"Next to that I can also see {other}." for other in others]
    kind = "of a single tone" if scene.background.pattern == "plain" else scene.background.pattern
    texts.append(f"In the background the colour is {scene.background.colour} and it is {kind}.")
    return " ".join(texts)


def region_phrases(group: Group) -> list[str]:
    """Visual Genome: phrases for one shape of the group, about five words."""
    return [
        phrase(replace(group, count=1), size=True, position=True),
        f"the {group.shape} is {group.colour}",
        f"the {group.colour} {group.shape} is {group.size}",
    ]


def encyclopedic(scene: Scene, rng: random.Random) -> str:
    """WIT: the caption of an image in an article, about thirteen words."""
    text = rng.choice(
        (
            f"example of {scene_phrase(scene, position=True)}, as seen in geometry",
            f"{scene_phrase(scene)} shown together on {background_phrase(scene.background)}",
            f"diagram with {scene_phrase(scene, size=True)}",
        )
    )
    return text[0].upper() + text[1:]


def post_title(scene: Scene, rng: random.Random) -> str:
    """RedCaps: the title of a post, about ten words."""
    return rng.choice(
        (
            f"I painted {scene_phrase(scene)} today",
            f"My first try: {scene_phrase(scene)}!",
            f"{scene_phrase(scene, size=True)}, what do you think?",
        )
    )


def description(scene: Scene, rng: random.Random) -> str:
    """YFCC100M: the photographer's description, about thirteen words."""
    return rng.choice(
        (
            f"I took this picture of {scene_phrase(scene)} last summer.",
            f"Here you can see {scene_phrase(scene, position=True)}.",
            f"We found {scene_phrase(scene, size=True)}.\n\nEnjoy the picture!",
        )
    )


def foreign(scene: Scene, language: str) -> str:
    """The shapes and colours of the scene in another language."""
    pairs = {(group.shape, group.colour) for group in scene.groups}
    return LANGUAGES[language].describe(sorted(pairs))
