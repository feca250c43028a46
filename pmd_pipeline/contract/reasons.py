"""Statuses of records, and the closed vocabulary of reasons why a pair is not kept."""

from enum import StrEnum


class Status(StrEnum):
    """`status` of a ledger row, in img2dataset's words as far as it has them.

    Attributes:
        SUCCESS: the image is in the tar.
        DROPPED: a decision of the recipe left the record out; `reason` is in `DROP_REASONS` or
            the name of a filter.
        FAILED_TO_DOWNLOAD: no bytes came; `reason` is in `FAILURE_REASONS`.
        FAILED_TO_RESIZE: bytes came, but no image could be made of them; likewise.
    """

    SUCCESS = "success"
    DROPPED = "dropped"
    FAILED_TO_DOWNLOAD = "failed_to_download"
    FAILED_TO_RESIZE = "failed_to_resize"


DROP_REASONS = {
    "bad_row": "the upstream row cannot be parsed",
    "bad_box": "the region has no area inside the image",
    "heldout": "the image is in an evaluation split (Karpathy's, or Flickr30k's val and test)",
    "licence": "the recipe does not allow the licence of the image",
    "limit": "the record lies beyond --limit in key order",
    "no_caption": "upstream has no text for the image",
    "no_image": "upstream does not state which image the text belongs to",
    "no_text": "the text is empty",
    "not_text": "the bytes are not text: not UTF-8, or zero bytes",
    "optout_list": "the image is on the opt-out list (optout.txt beside the dataset)",
    "page_language": "the page is in another language (WIT)",
    "repeat": "the record already has this caption on this box",
    "rule": "the rule of PMD's authors rejects the text (WIT)",
    "split": "the recipe does not include this upstream split",
    "too_long": "the document has more characters than the recipe allows",
    "video": "the row is a video (YFCC100M)",
}
"""Reasons of drops, which are decisions of the recipe; a filter adds its own name."""

FAILURE_REASONS = {
    "blocked_address": "the address is not http or https, or leads to a private network",
    "bomb": "more pixels than the recipe allows to decode",
    "caption_mismatch": "the local shard has another caption for this address",
    "changed": "the bytes have another SHA-256 than expected",
    "connect": "the connection failed or broke",
    "crash": "decoding the image crashes the decoder",
    "dns": "DNS has no address for the host",
    "empty": "the response has no body",
    "http_403": "forbidden",
    "http_404": "not found",
    "http_410": "gone",
    "http_429": "too many requests, still after the last attempt",
    "http_4xx": "another 4xx status",
    "http_5xx": "a server error, still after the last attempt",
    "no_part": "the part is not built yet; run the same command again",
    "not_an_image": "the bytes are not an image in a supported format",
    "not_in_archive": "no local image has this name",
    "opt_out": "X-Robots-Tag or TDM-Reservation of the response forbids to keep the image",
    "placeholder": "a placeholder that the host serves for a removed image",
    "redirects": "too many redirects",
    "robots": "robots.txt of the host disallows this address",
    "svg": "an SVG drawing, which has no pixels",
    "timeout": "no complete response within the timeout",
    "tls": "TLS failed, or the certificate is invalid",
    "too_large": "more bytes than the recipe allows",
    "truncated": "the image data ends early",
    "wrong_size": "other proportions than upstream states, so the boxes do not fit",
}
"""Reasons of failures, which are the fault of the world."""
