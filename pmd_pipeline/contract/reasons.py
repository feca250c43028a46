"""What became of a record, and why it was not kept: one closed vocabulary for both packages."""

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
    "bad_row": "the upstream row cannot be understood",
    "bad_box": "the region has no area inside the image",
    "heldout": "the image is in an evaluation split (Karpathy's, or Flickr30k's val and test)",
    "licence": "the image's licence is none of those that the recipe allows",
    "limit": "the record lies beyond --limit in key order",
    "no_caption": "upstream has the image, but no text for it",
    "no_image": "upstream has the text, but says nowhere what image it belongs to",
    "no_text": "the text is empty",
    "not_text": "the bytes are no text: another encoding than UTF-8, or zeros",
    "optout_list": "somebody asked to leave the image out (optout.txt beside the dataset)",
    "page_language": "the page is in another language (WIT)",
    "repeat": "the record already has this caption on this box",
    "rule": "upstream's own rule for PMD refuses the text (WIT)",
    "split": "upstream's split is not one that the recipe takes",
    "too_long": "the document has more characters than the recipe takes",
    "video": "the row is a video (YFCC100M)",
}
"""Decisions of the recipe; a filter adds its own name."""

FAILURE_REASONS = {
    "blocked_address": "the address is not http or https, or leads where nobody may be sent",
    "bomb": "more pixels than the recipe decodes",
    "caption_mismatch": "the local shard has another caption for this address",
    "changed": "the bytes are not those whose sha256 is known",
    "connect": "no connection, or it broke",
    "crash": "decoding it kills the process that does",
    "dns": "the host has no address",
    "empty": "the answer has no body",
    "http_403": "forbidden",
    "http_404": "not found",
    "http_410": "gone",
    "http_429": "too many requests, still after the last attempt",
    "http_4xx": "another refusal",
    "http_5xx": "the server is in trouble, still after the last attempt",
    "no_part": "its part is not built: run the same command again",
    "not_an_image": "the bytes are no image that can be read",
    "not_in_archive": "none of the local images has this name",
    "opt_out": "the answer's X-Robots-Tag or TDM-Reservation forbids to keep the image",
    "placeholder": "the picture that hosts show in place of a removed one",
    "redirects": "more redirects than anyone needs",
    "robots": "the host's robots.txt forbids to ask for this address",
    "svg": "a drawing, not a picture",
    "timeout": "no whole answer in the time allowed",
    "tls": "the certificate is wrong, or TLS failed",
    "too_large": "more bytes than the recipe fetches",
    "truncated": "the image ends early",
    "wrong_size": "not the proportions that upstream states, so its boxes do not fit",
}
"""What the world did; a closed vocabulary."""
