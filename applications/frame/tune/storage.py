"""The address of a study without its password, and texts that hold it."""

from __future__ import annotations

import re
from urllib.parse import quote, quote_plus, unquote_plus

HIDDEN = "***"
SHORT = 3
"""Letters of a password that is no secret, and is part of every other word."""
_USER = re.compile(r"(?<=://)([^/@]*?):(.*)@", re.DOTALL)
_QUERY = re.compile(r"([?&](?:password|passwd|pwd|sslpassword)=)([^&]*)", re.IGNORECASE)


def password(address: str | None) -> str | None:
    """That of an address such as ``postgresql+psycopg2://user:password@host/name``, as it is written there."""
    found = _USER.search(address or "") or _QUERY.search(address or "")
    return found[2] if found and found[2] else None


def without_password(text: str, address: str | None) -> str:
    """A text, be it the address itself, a command or an error, without the password of the address in any writing."""
    secret = password(address)
    if address is not None:
        text = text.replace(address, _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1:{HIDDEN}@", address)))
    if secret is None or len(secret) < SHORT:
        return text
    plain = unquote_plus(secret)
    for written in sorted({secret, plain, quote(plain, safe=""), quote_plus(plain), repr(plain)[1:-1]}, key=len)[::-1]:
        text = text.replace(written, HIDDEN)
    return text
