"""Requests that are wrong, as bytes, each with the answers that it may get."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

BODY = 2**20
"""Most bytes of a body that the server is told to take."""
BODY_S = 3.0
"""Seconds that it is told to wait for one, and for the head of a request."""

DRAW, EDIT = "/v1/images/generations", "/v1/images/edits"
ASKED: dict[str, Any] = {"model": "emoji-flux", "prompt": "red apple", "num_inference_steps": 8}


@dataclass(frozen=True)
class Wrong:
    """A request that is wrong.

    Attributes:
        name: what is wrong.
        pieces: its bytes, with `pause` seconds after each piece; the client then waits for the answer.
        statuses: what it may be answered with.
        formed: whether the answer has OpenAI's form. What is no HTTP, uvicorn refuses in plain text or not at all, and
            closes the connection.
    """

    name: str
    pieces: Sequence[bytes]
    statuses: tuple[int, ...] = (400,)
    formed: bool = True
    pause: float = 0.0


def request(path: str, body: bytes, *, method: str = "POST", kind: str = "application/json", length: int = -1) -> bytes:
    """The bytes of a request; `length` replaces the length that it names."""
    head = f"{method} {path} HTTP/1.1\r\nhost: chaos\r\ncontent-type: {kind}\r\n"
    return f"{head}content-length: {len(body) if length < 0 else length}\r\n\r\n".encode() + body


def _json(name: str, **fields: Any) -> Wrong:
    return Wrong(name, [request(DRAW, json.dumps({**ASKED, **fields}).encode())])


def _raw(name: str, body: bytes, path: str = DRAW) -> Wrong:
    return Wrong(name, [request(path, body)])


def _form(name: str, body: bytes, kind: str = "multipart/form-data; boundary=b") -> Wrong:
    return Wrong(name, [request(EDIT, body, kind=kind)])


def _upload(name: str, picture: bytes) -> Wrong:
    parts = [f'--b\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n' for n, v in ASKED.items()]
    file = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + picture + b"\r\n--b--\r\n"
    return _form(name, "".join(parts).encode() + file)


def _bomb(side: int) -> bytes:
    """A picture of a few kilobytes and many pixels."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


def _claiming(width: int, height: int) -> bytes:
    """The head of a PNG that claims to be as large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


_CHUNK = b"10000\r\n" + b" " * 65536 + b"\r\n"


def _chunked(chunks: bytes) -> bytes:
    """A request whose body comes in chunks, without a length."""
    return f"POST {DRAW} HTTP/1.1\r\nhost: chaos\r\ntransfer-encoding: chunked\r\n\r\n".encode() + chunks


_BODY = json.dumps(ASKED).encode()
_PART = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx'

WRONG: Sequence[Wrong] = (
    _json("NaN guidance", guidance_scale=float("nan")),
    _raw("1e400 guidance", _BODY[:-1] + b', "guidance_scale": 1e400}'),
    _json("minus infinity", guidance_scale=float("-inf")),
    _json("NaN tolerance", tolerance=float("nan")),
    _json("unknown field", num_inference_stepz=8),
    _json("text for a number", num_inference_steps="8"),
    _json("list for a text", prompt=["red", "apple"]),
    _json("object for a number", seed={"a": 1}),
    _json("true for a number", n=True),
    _json("too many steps", num_inference_steps=10**30),
    _json("too many images", n=10**6),
    _json("negative seed", seed=-1),
    _json("half a character", prompt="\ud800"),
    _json("half a character as a field", **{"\ud800": 1}),
    _json("tiny size", size="1x1"),
    _json("huge size", size="99999x99999"),
    _json("thin size", size="8x16384"),
    _json("huge speedup", speedup=1e308),
    _json("huge prompt", prompt="x" * 100_000),
    _json("unknown class", model="fashion-dit", prompt="9" * 3000),
    Wrong("unknown model", [request(DRAW, b'{"model": "x", "prompt": "x"}')], (404,)),
    _raw("no JSON", b"{"),
    _raw("no object", b"[1]"),
    _raw("nested lists", b"[" * 100_000),
    _raw("nested objects", b'{"model":' * 50_000),
    _raw("huge number", b'{"seed": ' + b"9" * 5000 + b"}"),
    _raw("no text", b"\xff\xfe\x00"),
    _raw("no body", b""),
    Wrong("too large", [request(DRAW, b" " * (BODY + 1))], (413,)),
    Wrong("too large by its own word", [request(DRAW, b"", length=10**15)], (413,)),
    Wrong("too large in chunks", [_chunked(_CHUNK * (2 * BODY // 65536) + b"0\r\n\r\n")], (413,)),
    _upload("a bomb", _bomb(8000)),
    _upload("a larger bomb", _claiming(2**31 - 1, 2**31 - 1)),
    _upload("a picture cut off", _claiming(64, 64)),
    _upload("no picture", b"\x00" * 5000),
    _upload("a tiny picture", _bomb(1)),
    Wrong("a large upload", [request(EDIT, b"\x00" * (BODY + 1), kind="multipart/form-data; boundary=b")], (413,)),
    _form("no boundary", b"x", "multipart/form-data"),
    _form("no multipart", b"\x00\xff garbage"),
    _form("a part without a name", b"--b\r\nX: y\r\n\r\nx\r\n--b--\r\n"),
    _form("a part with a broken head", b"--b\r\n\x01\x02: y\r\n\r\nx\r\n--b--\r\n"),
    _form("a form cut off", _PART),
    _form("a huge field", _PART + b"x" * (BODY - 200) + b"\r\n--b--\r\n"),
    _form("too many fields", b"a=1&" * 1000, "application/x-www-form-urlencoded"),
    _form("no form", _BODY, "text/plain"),
    Wrong("a body that stalls", [request(DRAW, _BODY[:5], length=len(_BODY))], (408,)),
    Wrong("a body that trickles", [request(DRAW, b"{", length=99), *[b" "] * 12], (408,), pause=BODY_S / 10),
    Wrong("a form that stalls", [request(EDIT, _PART, kind="multipart/form-data; boundary=b", length=999)], (408,)),
    Wrong("unknown path", [request("/v1/nothing", b"")], (404,)),
    Wrong("wrong method", [request(DRAW, b"", method="GET")], (405,)),
    Wrong("wrong query", [request("/v1/jobs?limit=x", b"", method="GET")]),
    Wrong("unknown job", [request("/v1/jobs/%00%ff", b"", method="GET")], (404,)),
    Wrong("unknown request", [request("/v1/requests/x", b"", method="DELETE")], (404,)),
    Wrong("nothing", [b""], (), formed=False),
    Wrong("a head that stalls", [b"POST / HTTP/1.1\r\nhost:"], (), formed=False),
    Wrong("a second head that stalls", [request("/health", b"", method="GET"), b"POST /"], (200,), False, 0.5),
    Wrong("no HTTP", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"], formed=False),
    Wrong("no length", [request(DRAW, b"x").replace(b"content-length: 1", b"content-length: x")], formed=False),
    Wrong("two lengths", [request(DRAW, b"x").replace(b"\r\n\r\n", b"\r\ncontent-length: 2\r\n\r\n")], formed=False),
    Wrong("a head too large", [b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 30_000], formed=False),
    Wrong("a broken chunk", [_chunked(_CHUNK + b"zz\r\n")], formed=False),
)  # fmt: skip
