"""Optional cleaning of captions; the paper does none of it. See `Clean` in `recipe.py`."""

import html as entity
import re


def clean(text: str, *, entities: bool, html: bool, urls: bool, camera_names: bool) -> str:
    """The text without what the switches name, in the order in which they stand.

    Blanks are left as they fall: `one_line` comes after.

    >>> clean("<b>Us</b> &amp; a dog<br>www.example.org", entities=True, html=True, urls=True,
    ...       camera_names=True)
    'Us & a dog  '
    """
    if entities and "&" in text:
        text = _without_entities(text)
    if html and "<" in text:
        text = _TAG.sub(_instead_of_tag, text)
    if urls:
        text = _URL.sub(" ", text)
    if camera_names and is_camera_name(text):
        return ""
    return text


def is_camera_name(text: str) -> bool:
    """Say whether the text is nothing but a camera's file name, a number or a date in digits.

    >>> is_camera_name("DSC_0042.JPG"), is_camera_name("Studio 54")
    (True, False)
    """
    return _CAMERA_NAME.fullmatch(text.strip()) is not None


def _without_entities(text: str) -> str:
    try:
        return entity.unescape(text)
    except ValueError:  # a number of thousands of digits, which Python refuses to read
        return text


def _instead_of_tag(found: re.Match[str]) -> str:
    attributes = found["attributes"]
    if attributes and attributes.strip(" /") and "=" not in attributes:
        return found[0]  # "a <b and c> d"
    return " " if found["breaking"] else ""


_BREAKING = "blockquote|br|center|dd|div|dl|dt|h[1-6]|hr|img|li|ol|p|pre|table|td|th|tr|ul"
"""Tags between whose neighbours a reader sees a gap."""

_INLINE = (
    "a|abbr|acronym|b|big|cite|code|del|em|embed|font|i|iframe|ins|object|param|q|s|small|span"
    "|strike|strong|sub|sup|tbody|thead|tt|u"
)

_TAG = re.compile(
    rf"</?(?:(?P<breaking>{_BREAKING})|{_INLINE})(?P<attributes>[\s/][^<>]*)?>", re.IGNORECASE
)
"""Names that HTML has, so that `<3`, `a < b` and `<PERSON>` are text."""

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
