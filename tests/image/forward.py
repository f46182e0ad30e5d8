"""Carries connections from one address to another, each HOST:PORT or the path of a Unix socket.

    python3 forward.py LISTEN CONNECT

The container under test has no network. One of these in the container's network leads from a socket in a shared
directory to its port, another one on the host leads from a port to that socket: this is how the port is published, and
it stays published while containers come and go behind it.
"""

import asyncio
import sys
from asyncio import StreamReader, StreamWriter
from contextlib import suppress

_PIECE_BYTES = 65_536


async def main() -> None:
    listen, target = sys.argv[1:]

    async def carry_both(reader: StreamReader, writer: StreamWriter) -> None:
        try:
            there = await _connect(target)
        except OSError:
            # As if nobody listened: the client comes again.
            writer.close()
            return
        await asyncio.gather(_carry(reader, there[1]), _carry(there[0], writer))

    if "/" in listen:
        server = await asyncio.start_unix_server(carry_both, listen)
    else:
        host, _, port = listen.rpartition(":")
        server = await asyncio.start_server(carry_both, host, int(port))
    await server.serve_forever()


async def _connect(address: str) -> tuple[StreamReader, StreamWriter]:
    if "/" in address:
        return await asyncio.open_unix_connection(address)
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _carry(reader: StreamReader, writer: StreamWriter) -> None:
    with suppress(OSError):
        while piece := await reader.read(_PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
    writer.close()


if __name__ == "__main__":
    asyncio.run(main())
