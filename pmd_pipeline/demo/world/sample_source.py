"""One source of the sample world: images, files, and the counts that a build must report."""

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
from pmd_pipeline.demo.world.responses import RESPONSE_REASONS, moved_address
from pmd_pipeline.demo.world.scenes import Scene, make_scene

QUIRK_EVERY = 7
"""One image in this many has a quirk."""

_QUIRK_AT = 3


class WebImage(NamedTuple):
    """An image at an address, or in a file: its scene, and the kind of response."""

    scene: Scene
    response: str


@dataclass(frozen=True)
class SampleImage:
    """One image of a source.

    Args:
        number: index in its source, from 0.
        scene: content of the image.
        rng: random numbers for its captions and names.
        quirk: its irregularity: a kind of response, a language, or a case of the source's own.
        response: kind of the server's response.
    """

    number: int
    scene: Scene
    rng: random.Random
    quirk: str | None
    response: str

    def random_digits(self, count: int) -> str:
        """A decimal number of `count` digits."""
        return str(self.rng.randrange(10 ** (count - 1), 10**count))

    def random_hex(self, count: int) -> str:
        """A hexadecimal number of `count` digits."""
        return f"{self.rng.getrandbits(4 * count):0{count}x}"

    def caption(self, style: Callable[[Scene, random.Random], str]) -> str:
        """A caption in the style of the source; by its quirk, in another language or empty."""
        if self.quirk in LANGUAGES:
            return foreign(self.scene, self.quirk)
        return "" if self.quirk == "blank" else style(self.scene, self.rng)


class SampleSource:
    """A source of the sample world, filled by its writer.

    `files` are the annotation files by name, `raw_images` the images beside them, `images` the
    images of archives by path, `web` the images by address (host and path).
    """

    def __init__(self, name: str, seed: int, scenes: int) -> None:
        self.name = name
        self.seed = seed
        self.scenes = scenes
        self.files: dict[str, bytes] = {}
        self.raw_images: dict[str, WebImage] = {}
        self.images: dict[str, Scene] = {}
        self.web: dict[str, WebImage] = {}
        self._kept = 0
        self._dropped = Counter[str]()
        self._failed = Counter[str]()

    def samples(self, quirks: Sequence[str]) -> Iterator[SampleImage]:
        """The source's images; one in `QUIRK_EVERY` has a quirk, and all quirks occur in order."""
        for number in range(self.scenes):
            yield self.sample(number, self.quirk_of(number, quirks))

    @staticmethod
    def quirk_of(number: int, quirks: Sequence[str]) -> str | None:
        """The quirk of image `number`."""
        cycle, position = divmod(number, QUIRK_EVERY)
        return quirks[cycle % len(quirks)] if position == _QUIRK_AT else None

    def sample(self, number: int, quirk: str | None = None, *, owner: str = "") -> SampleImage:
        """Image `number` of this source, or of the source `owner`."""
        name = f"{self.seed}/{owner or self.name}/{number}"
        return SampleImage(
            number=number,
            scene=make_scene(name),
            rng=random.Random(f"words/{name}"),
            quirk=quirk,
            response=quirk if quirk in RESPONSE_REASONS else "jpeg",
        )

    def put(self, url: str, sample: SampleImage) -> str:
        """Serve the image at `url`; returns `url`."""
        address = address_of(url)
        self.web[address] = WebImage(sample.scene, sample.response)
        if sample.response == "moved":
            self.web[moved_address(address)] = WebImage(sample.scene, "jpeg")
        return url

    def expect(self, sample: SampleImage, dropped: str | None = None, *, pairs: int = 1) -> None:
        """Count pairs of an image: dropped for a reason, or else kept or failed by its response."""
        failed = RESPONSE_REASONS[sample.response]
        if dropped:
            self._dropped[dropped] += pairs
        elif failed:
            self._failed[failed] += pairs
        else:
            self._kept += pairs

    def counts(self) -> Counts:
        """The counts that a build must report."""
        dropped = {reason: count for reason, count in sorted(self._dropped.items()) if count}
        failed = {reason: count for reason, count in sorted(self._failed.items()) if count}
        return Counts(
            pairs_in=self._kept + sum(dropped.values()) + sum(failed.values()),
            kept=self._kept,
            dropped=dropped,
            failed=failed,
        )


def address_of(url: str) -> str:
    """Host and path of `url` as a client requests them."""
    parts = urlsplit(url_id(url))
    return f"{parts.netloc}{parts.path}{'?' if parts.query else ''}{parts.query}"
