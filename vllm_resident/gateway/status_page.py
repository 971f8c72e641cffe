"""The page at `/`: one file for people, which shows what `/pool/events` tells.

The file holds no data and needs no key. Its policy allows what stands in it, by its
digest, and requests to this server; nothing else, whatever an engine may be called.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from vllm_resident.gateway import asgi
from vllm_resident.gateway.asgi import Send

FILE = Path(__file__).with_name("status_page.html")


async def answer(method: str, send: Send) -> None:
    """The page, or only its headers."""
    page, headers = _load()
    if method == "HEAD":
        await asgi.begin(send, 200, {"content-type": "text/html", **headers})
        await send({"type": "http.response.body"})
    else:
        content_type = "text/html; charset=utf-8"
        await asgi.answer_bytes(send, 200, page, content_type, headers)


@functools.cache
def _load() -> tuple[bytes, dict[str, str]]:
    page = FILE.read_bytes()
    policy = [
        "default-src 'none'",
        f"script-src {_digests(page, 'script')}",
        f"style-src {_digests(page, 'style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return page, {
        "content-security-policy": "; ".join(policy),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


def _digests(page: bytes, tag: str) -> str:
    """Of what stands in the elements of that name, as the policy writes them."""
    pattern = rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode())
    parts = re.findall(pattern, page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(each).digest()) for each in parts]
    return " ".join(f"'sha256-{each.decode()}'" for each in digests)
