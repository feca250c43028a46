"""The name under which requests are sent."""

from importlib.metadata import version

from pmd_pipeline.contract.errors import PmdError

PRODUCT = "pmd-flava"
"""Product token: begins the User-Agent, and is matched in robots.txt and X-Robots-Tag."""


def user_agent(contact: str) -> str:
    """The User-Agent header, with the user's contact where there is one.

    Raises:
        PmdError: the contact cannot be part of a header.
    """
    if not (contact.isascii() and contact.isprintable()):
        raise PmdError(f"fetch.contact = {contact!r}: write it in ASCII, without line breaks")
    name = f"{PRODUCT}/{version('pmd-flava')} (research dataset builder"
    return f"{name}; {contact})" if contact else f"{name})"
