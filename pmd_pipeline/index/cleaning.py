"""Optional cleaning of captions; the paper does none. The rules are `Clean` in `recipe.py`."""

import html as entity
import re


def clean(text: str, *, entities: bool, html: bool, urls: bool, camera_names: bool) -> str:
    """The text without what the switches name; they apply in the order of the parameters.

    The result may hold runs of white space: apply `one_line` to it.

    >>> clean("<b>Us</b> &amp; a dog<br>www.example.org", entities=True, html=True, urls=True,
    ...       camera_names=True)
    'Us & a dog  '
    """
    if entities and "&" in text:
        text = _unescape(text)
    if html and "<" in text:
        text = _TAG.sub(_replacement, text)
    if urls:
        text = _URL.sub(" ", text)
    if camera_names and is_camera_name(text):
        return ""
    return text


def is_camera_name(text: str) -> bool:
    """Whether the whole text is a camera's file name, a number, or a date in digits.

    >>> is_camera_name("DSC_0042.JPG"), is_camera_name("Studio 54")
    (True, False)
    """
    return _CAMERA_NAME.fullmatch(text.strip()) is not None


def _unescape(text: str) -> str:
    try:
        return entity.unescape(text)
    except (
        ValueError
    ):  # a character reference of thousands of digits, which Python refuses to parse
        return text


def _replacement(tag: re.Match[str]) -> str:
    attributes = tag["attributes"]
    if attributes and attributes.strip(" /") and "=" not in attributes:
        return tag[0]  # not a tag: "a <b and c> d"
    return " " if tag["breaking"] else ""


_BREAKING = "blockquote|br|center|dd|div|dl|dt|h[1-6]|hr|img|li|ol|p|pre|table|td|th|tr|ul"
"""Tags that separate the text before them from the text after them."""

_INLINE = (
    "a|abbr|acronym|b|big|cite|code|del|em|embed|font|i|iframe|ins|object|param|q|s|small|span"
    "|strike|strong|sub|sup|tbody|thead|tt|u"
)

_TAG = re.compile(
    rf"</?(?:(?P<breaking>{_BREAKING})|{_INLINE})(?P<attributes>[\s/][^<>]*)?>", re.IGNORECASE
)
"""Only names of HTML elements, so that `<3`, `a < b` and `<PERSON>` stay."""

_URL = re.compile(r"""\b(?:https?://|www\.)[^\s<>"]+""", re.IGNORECASE)

_CAMERA_NAME = re.compile(
    r"""
    (?:
        (?: _?(?: cimg | dcp | dsc[fn]? | dscn | gopr | hpim | img | imgp | mg | mvc | p(?=\d{6})
                | pano | pict | sany | vid | wp )
            [ _-]* \d [\d _().-]* [a-z]?
        )
      | \d [\d\s_.,:/()-]*
    )
    (?: \. (?: arw | bmp | cr2 | dng | gif | heic | jpe?g | mov | mp4 | nef | orf | png | raw
             | tiff? ) )?
    """,
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)
