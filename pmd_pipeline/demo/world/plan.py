"""One source of the world while it is written: its pictures, its files, and its truth."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from pmd_pipeline.base.record import url_id
from pmd_pipeline.contract.models import Counts
from pmd_pipeline.demo.world.captions import foreign
from pmd_pipeline.demo.world.languages import LANGUAGES
from pmd_pipeline.demo.world.responses import FAILURE, new_home
from pmd_pipeline.demo.world.scenes import Scene, make_scene

QUIRK_EVERY = 7
"""One picture in so many has a quirk."""

_QUIRK_AT = 3


class OnWeb(NamedTuple):
    """What is at an address of the world, or in a file: a scene, and the kind of answer."""

    scene: Scene
    answer: str


@dataclass(frozen=True)
class Picture:
    """One image of a source.

    Args:
        number: from 0 up.
        scene: what it shows.
        dice: for all that is said of it.
        quirk: what is odd about it: a kind of answer, a language, or a word of the source's own.
        answer: what the server does when it is asked for.
    """

    number: int
    scene: Scene
    dice: random.Random
    quirk: str | None
    answer: str

    def digits(self, count: int) -> str:
        """A decimal number of so many digits."""
        return str(self.dice.randrange(10 ** (count - 1), 10**count))

    def hexes(self, count: int) -> str:
        """A hexadecimal number of so many digits."""
        return f"{self.dice.getrandbits(4 * count):0{count}x}"

    def said(self, style: Callable[[Scene, random.Random], str]) -> str:
        """A caption in the style of the source; another language, or nothing, by its quirk."""
        if self.quirk in LANGUAGES:
            return foreign(self.scene, self.quirk)
        return "" if self.quirk == "blank" else style(self.scene, self.dice)


class Plan:
    """Collects what a source consists of.

    `files` are the annotation files by name, `loose` the images that lie among them, `images` the
    files of archives by path, `web` what is at each address (host and path).
    """

    def __init__(self, source: str, seed: int, scenes: int) -> None:
        self.source = source
        self.seed = seed
        self.scenes = scenes
        self.files: dict[str, bytes] = {}
        self.loose: dict[str, OnWeb] = {}
        self.images: dict[str, Scene] = {}
        self.web: dict[str, OnWeb] = {}
        self._kept = 0
        self._dropped = Counter[str]()
        self._failed = Counter[str]()

    def pictures(self, quirks: Sequence[str]) -> Iterator[Picture]:
        """The source's pictures; each seventh has a quirk, and quirks come in turn."""
        for number in range(self.scenes):
            yield self.picture(number, self.quirk_of(number, quirks))

    @staticmethod
    def quirk_of(number: int, quirks: Sequence[str]) -> str | None:
        """The quirk of picture `number`."""
        turn, place = divmod(number, QUIRK_EVERY)
        return quirks[turn % len(quirks)] if place == _QUIRK_AT else None

    def picture(self, number: int, quirk: str | None = None, *, source: str = "") -> Picture:
        """Picture `number` of this source, or of another one."""
        name = f"{self.seed}/{source or self.source}/{number}"
        return Picture(
            number=number,
            scene=make_scene(name),
            dice=random.Random(f"words/{name}"),
            quirk=quirk,
            answer=quirk if quirk in FAILURE else "jpeg",
        )

    def put(self, url: str, picture: Picture) -> str:
        """Put the picture at `url`, which is returned."""
        address = address_of(url)
        self.web[address] = OnWeb(picture.scene, picture.answer)
        if picture.answer == "moved":
            self.web[new_home(address)] = OnWeb(picture.scene, "jpeg")
        return url

    def expect(self, picture: Picture, dropped: str | None = None, *, pairs: int = 1) -> None:
        """Count pairs of a picture: dropped for this reason, else kept or failed by its answer."""
        failed = FAILURE[picture.answer]
        if dropped:
            self._dropped[dropped] += pairs
        elif failed:
            self._failed[failed] += pairs
        else:
            self._kept += pairs

    def counts(self) -> Counts:
        """What a build must report."""
        dropped = {reason: count for reason, count in sorted(self._dropped.items()) if count}
        failed = {reason: count for reason, count in sorted(self._failed.items()) if count}
        return Counts(
            pairs_in=self._kept + sum(dropped.values()) + sum(failed.values()),
            kept=self._kept,
            dropped=dropped,
            failed=failed,
        )


def address_of(url: str) -> str:
    """Host and path of `url` in the spelling in which they are asked for."""
    parts = urlsplit(url_id(url))
    return f"{parts.netloc}{parts.path}{'?' if parts.query else ''}{parts.query}"
