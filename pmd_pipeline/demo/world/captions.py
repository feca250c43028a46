"""What people say of a scene: a small grammar, and one style per source. All of it is true."""

import random
from collections.abc import Sequence
from dataclasses import replace

from pmd_pipeline.demo.world.languages import LANGUAGES
from pmd_pipeline.demo.world.scenes import Ground, Group, Scene

COUNTS = {1: "a", 2: "two", 3: "three"}

WHERE = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}


def phrase(group: Group, *, size: bool = False, place: bool = False) -> str:
    """The group as a noun phrase.

    >>> phrase(Group(2, "large", "red", "star", "left"), size=True, place=True)
    'two large red stars on the left'
    >>> phrase(Group(1, "small", "orange", "cross", "top"))
    'an orange cross'
    """
    words = [group.size] if size else []
    words += [group.colour, group.shape if group.count == 1 else plural(group.shape)]
    article = COUNTS[group.count]
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words, *([WHERE[group.place]] if place else [])])


def plural(noun: str) -> str:
    """More than one of them.

    >>> plural("cross"), plural("heart")
    ('crosses', 'hearts')
    """
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def ground_phrase(ground: Ground) -> str:
    """The ground as a noun phrase.

    >>> ground_phrase(Ground("striped", "grey"))
    'a striped grey background'
    """
    return f"a {ground.pattern} {ground.colour} background"


def listing(parts: Sequence[str]) -> str:
    """The parts as one phrase.

    >>> listing(["a star", "a heart", "a cross"])
    'a star, a heart and a cross'
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def things(scene: Scene, *, size: bool = False, place: bool = False) -> str:
    """All groups of the scene as one phrase."""
    return listing([phrase(group, size=size, place=place) for group in scene.groups])


def sentence(text: str) -> str:
    """The text with a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def five_sentences(scene: Scene, dice: random.Random) -> list[str]:
    """COCO: five people, one sentence each, about ten words."""
    one = dice.choice(scene.groups)
    verb = "is" if scene.groups[0].count == 1 else "are"
    ground = ground_phrase(scene.ground)
    return [
        sentence(f"{things(scene, size=True)} on {ground}"),
        sentence(f"there {verb} {things(scene, place=True)}"),
        sentence(f"this is a picture of {things(scene)}"),
        sentence(f"{phrase(one, size=True, place=True)} of {ground}"),
        sentence(f"a {scene.ground.colour} background with {things(scene)} on it"),
    ]


def photo_title(scene: Scene, dice: random.Random) -> str:
    """SBU: what the photographer calls it, about twelve words."""
    text = dice.choice(
        (
            f"{things(scene, place=True)} of the {scene.ground.colour} wall at home",
            f"{things(scene, size=True)} in front of {ground_phrase(scene.ground)}",
            f"{things(scene)} - I love the {scene.ground.pattern} look",
        )
    )
    return text[0].upper() + text[1:]


def alt_text(scene: Scene, dice: random.Random) -> str:
    """CC3M: lower case, tokenised, about ten words."""
    return dice.choice(
        (
            f"{things(scene)} isolated on {ground_phrase(scene.ground)} .",
            f"illustration of {things(scene, size=True)}",
            f"{things(scene)} on the {scene.ground.colour} wall of person",
        )
    )


def stock_title(scene: Scene, dice: random.Random) -> str:
    """CC12M: a web page's alternative text as it was, about seventeen words."""
    text = dice.choice(
        (
            f"{things(scene, size=True, place=True)} - Stock Photo, Vector Art",
            f"Poster by <PERSON> | {things(scene, size=True)} on {scene.ground.colour} paper",
            f"{things(scene, size=True)} on {ground_phrase(scene.ground)}, Free Download for Kids",
        )
    )
    return text[0].upper() + text[1:]


def narrative(scene: Scene, dice: random.Random) -> str:
    """Localized Narratives: a sentence for each group and one for the ground."""
    opening = dice.choice(("In this image I can see", "In this picture we can see", "There we see"))
    first, *others = (phrase(group, size=True, place=True) for group in scene.groups)
    said = [f"{opening} {first} of the image."]
    said += [f"Next to that I can also see {other}." for other in others]
    kind = "of a single tone" if scene.ground.pattern == "plain" else scene.ground.pattern
    said.append(f"In the background the colour is {scene.ground.colour} and it is {kind}.")
    return " ".join(said)


def region_phrases(group: Group) -> list[str]:
    """Visual Genome: what one shape of the group is called, about five words."""
    return [
        phrase(replace(group, count=1), size=True, place=True),
        f"the {group.shape} is {group.colour}",
        f"the {group.colour} {group.shape} is {group.size}",
    ]


def encyclopedic(scene: Scene, dice: random.Random) -> str:
    """WIT: the caption under a picture in an article, about thirteen words."""
    text = dice.choice(
        (
            f"example of {things(scene, place=True)}, as seen in geometry",
            f"{things(scene)} shown together on {ground_phrase(scene.ground)}",
            f"diagram with {things(scene, size=True)}",
        )
    )
    return text[0].upper() + text[1:]


def post_title(scene: Scene, dice: random.Random) -> str:
    """RedCaps: what somebody writes above a post, about ten words."""
    return dice.choice(
        (
            f"I painted {things(scene)} today",
            f"My first try: {things(scene)}!",
            f"{things(scene, size=True)}, what do you think?",
        )
    )


def description(scene: Scene, dice: random.Random) -> str:
    """YFCC100M: what the photographer writes below the photo, about thirteen words."""
    return dice.choice(
        (
            f"I took this picture of {things(scene)} last summer.",
            f"Here you can see {things(scene, place=True)}.",
            f"We found {things(scene, size=True)}.\n\nEnjoy the picture!",
        )
    )


def foreign(scene: Scene, language: str) -> str:
    """What is in the scene in another language: kinds and colours, in words that need no ending."""
    things_seen = {(group.shape, group.colour) for group in scene.groups}
    return LANGUAGES[language].tell(sorted(things_seen))
