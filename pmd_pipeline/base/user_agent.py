"""What we call ourselves to servers."""

from importlib.metadata import version

from pmd_pipeline.contract.errors import PmdError

PRODUCT = "pmd-flava"
"""What robots.txt and X-Robots-Tag call us, and how our User-Agent begins."""


def user_agent(contact: str) -> str:
    """What we call ourselves: honest, and with the user's contact where they gave one.

    Raises:
        PmdError: the contact cannot be part of a header.
    """
    if not (contact.isascii() and contact.isprintable()):
        raise PmdError(f"fetch.contact = {contact!r}: write it in ASCII, without line breaks")
    name = f"{PRODUCT}/{version('pmd-flava')} (research dataset builder"
    return f"{name}; {contact})" if contact else f"{name})"
