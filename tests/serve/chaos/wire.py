"""HTTP by hand: a client of a test leaves, stalls and lies, which clients of libraries do not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Wire:
    """A connection to the server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    status: int = 0

    async def send(self, pieces: Sequence[bytes], pause: float = 0.0) -> None:
        """Send, and stop where the server has closed its end; it may have answered before."""
        try:
            for piece in pieces:
                self.writer.write(piece)
                await self.writer.drain()
                await asyncio.sleep(pause)
        except ConnectionError:
            pass

    async def parts(self) -> AsyncIterator[bytes]:
        """Read an answer: its status, then yield its body in parts."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        self.status = int(head[0].split()[1])
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        if headers.get("transfer-encoding") != "chunked":
            length = int(headers.get("content-length", -1))
            yield await (self.reader.read() if length < 0 else self.reader.readexactly(length))
            return
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]

    async def body(self) -> bytes:
        """Read an answer."""
        return b"".join([part async for part in self.parts()])

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Read a stream of server-sent events; an answer that is none counts as one event."""
        left = b""
        async for part in self.parts():
            if self.status != 200:
                yield json.loads(part)
                continue
            *events, left = (left + part).split(b"\n\n")
            for event in events:
                lines = [line[6:] for line in event.splitlines() if line.startswith(b"data: ")]
                if lines:
                    yield json.loads(lines[0])


@asynccontextmanager
async def connected(port: int, abrupt: bool = False) -> AsyncIterator[Wire]:
    """A connection, which is closed at the end, if `abrupt` with a reset."""
    wire = Wire(*await asyncio.open_connection("127.0.0.1", port, limit=2**24))
    try:
        yield wire
    finally:
        if abrupt:
            wire.writer.transport.abort()
        wire.writer.close()
