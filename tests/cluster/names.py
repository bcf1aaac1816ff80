"""Serve DNS names from a file: `names ADDRESS FILE`.

The file has JSON such as {"router.headrace.test": ["10.0.0.1"]}, and is read for each query, as a headless
Service follows its pods. Names that are not in it do not exist. The order of addresses changes from reply to
reply.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any

from dnslib import QTYPE, RCODE, RR, A, DNSRecord

TTL = 1


class Server(asyncio.DatagramProtocol):
    """Answers queries over UDP."""

    def __init__(self, zone: Path) -> None:
        self._zone = zone
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        query = DNSRecord.parse(data)
        reply = query.reply()
        name = str(query.q.qname).removesuffix(".")
        addresses = json.loads(self._zone.read_text(encoding="ascii")).get(name)
        if addresses is None:
            reply.header.rcode = RCODE.NXDOMAIN
        elif query.q.qtype == QTYPE.A:
            for address in random.sample(addresses, len(addresses)):
                reply.add_answer(RR(query.q.qname, QTYPE.A, rdata=A(address), ttl=TTL))
        self._transport.sendto(reply.pack(), addr)


async def main(address: str, zone: Path) -> None:
    """Serve until the process ends."""
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: Server(zone), local_addr=(address, 53))
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
