"""Words for shapes and colours in six other languages, in forms that need no agreement."""

from typing import NamedTuple


class Language(NamedTuple):
    """How a language lists the contents of an image.

    Args:
        sentence: a sentence with one gap for the list.
        separator: text between two items of the list.
        coloured: format of a shape with its colour, `{shape}` and `{colour}`.
        shapes: nouns by the English noun.
        colours: words by the English word.
    """

    sentence: str
    separator: str
    coloured: str
    shapes: dict[str, str]
    colours: dict[str, str]

    def describe(self, scene_phrase: list[tuple[str, str]]) -> str:
        """A sentence that lists these pairs of shape and colour."""
        listed = [
            self.coloured.format(shape=self.shapes[shape], colour=self.colours[colour])
            for shape, colour in scene_phrase
        ]
        return self.sentence.format(self.separator.join(listed))


_SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")


def _shapes(words: str) -> dict[str, str]:
    return dict(zip(_SHAPES, words.split(), strict=True))


def _colours(words: str) -> dict[str, str]:
    return dict(zip(_COLOURS, words.split(), strict=True))


LANGUAGES = {
    "de": Language(
        "Auf diesem Bild sieht man folgende Formen: {}",
        " und ",
        "{shape} in {colour}",
        _shapes("Kreis Quadrat Dreieck Stern Herz Kreuz"),
        _colours("Rot Orange Gelb Grün Blau Lila Rosa Schwarz"),
    ),
    "fr": Language(
        "Sur cette image on voit les formes suivantes : {}",
        " et ",
        "{shape} de couleur {colour}",
        _shapes("cercle carré triangle étoile cœur croix"),
        _colours("rouge orange jaune verte bleue violette rose noire"),
    ),
    "es": Language(
        "En esta imagen se ven las siguientes figuras: {}",
        " y ",
        "{shape} de color {colour}",
        _shapes("círculo cuadrado triángulo estrella corazón cruz"),
        _colours("rojo naranja amarillo verde azul morado rosa negro"),
    ),
    "ru": Language(
        "На этой картинке нарисованы фигуры: {}",  # noqa: RUF001 - Cyrillic on purpose
        " и ",
        "{shape} {colour} цвета",
        _shapes("круг квадрат треугольник звезда сердце крест"),
        _colours("красного оранжевого жёлтого зелёного синего фиолетового розового чёрного"),
    ),
    "ja": Language(
        "この写真には つぎの形が あります\u3000{}",
        "\u3000",
        "{colour}の{shape}",
        _shapes("丸 四角 三角 星 ハート 十字"),
        _colours("赤色 オレンジ色 黄色 緑色 青色 紫色 ピンク色 黒色"),
    ),
    "ar": Language(
        "في هذه الصورة نرى الأشكال التالية: {}",
        " و ",
        "{shape} باللون {colour}",
        _shapes("دائرة مربع مثلث نجمة قلب صليب"),
        _colours("الأحمر البرتقالي الأصفر الأخضر الأزرق البنفسجي الوردي الأسود"),
    ),
}
"""Languages by the code of fastText and Wikipedia. The Japanese has blanks, so it has words."""
