"""A proxy before a real S3 server that does to requests and answers what networks and servers do on bad days."""

import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ALWAYS = 10**6


@dataclass
class Fault:
    """What happens to the requests (`METHOD path`) that match, as often as `times` says."""

    matches: str = ""
    times: int = ALWAYS
    # Instead of the server's answer; the server hears nothing of the request.
    answer: bytes | None = None
    # The server's answer, or what stands for it, is changed.
    edit: Callable[[bytes], bytes] | None = None
    # So many bytes of the answer are sent, then the connection ends, or is reset.
    cut: int | None = None
    reset: bool = False
    # So many bytes of the request are read, then the connection is reset.
    request_cut: int | None = None
    hang: bool = False


@dataclass
class Faulty:
    """The proxy: its address, what goes wrong, and every request that came."""

    upstream: str
    faults: list[Fault] = field(default_factory=list)
    # Asked first, with `METHOD path`: what happens to this request, if anything.
    choose: Callable[[str], Fault | None] = lambda _request: None
    seen: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    url: str = ""
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.seen)

    def fault_for(self, request: str) -> Fault:
        """Return what is chosen for the request, or the first fault that is left for it, and use that up."""
        chosen = self.choose(request)
        if chosen is not None:
            return chosen
        with self.lock:
            self.seen.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.matches, request):
                    fault.times -= 1
                    return fault
        return Fault()


@contextmanager
def faulty(
    upstream: str, *faults: Fault, choose: Callable[[str], Fault | None] = lambda _request: None
) -> Iterator[Faulty]:
    """Run the proxy."""
    proxy = Faulty(upstream, list(faults), choose)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    with _Server(("127.0.0.1", 0), handler) as server:
        proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.ended.set()
            server.shutdown()
            thread.join(10)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: Any) -> None:
        """Say nothing: connections that break are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20
    proxy: Faulty

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._pass
        raise AttributeError(name)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _pass(self) -> None:
        fault = self.proxy.fault_for(f"{self.command} {self.path}")
        if fault.hang:
            self.proxy.ended.wait(20)
            self.close_connection = True
            return
        if fault.request_cut is not None:
            self.rfile.read(min(fault.request_cut, int(self.headers.get("Content-Length", 0))))
            self._end(reset=True)
            return
        body = self._body()
        self.proxy.bodies.append(body)
        self.proxy.headers.append(dict(self.headers.items()))
        answer = fault.answer if fault.answer is not None else self._forward(body)
        answer = fault.edit(answer) if fault.edit else answer
        self.wfile.write(answer if fault.cut is None else answer[: fault.cut])
        self.wfile.flush()
        if fault.cut is not None or fault.reset:
            self._end(reset=fault.reset)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            raise NotImplementedError("nothing here sends in chunks")
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _forward(self, body: bytes) -> bytes:
        host = urlsplit(self.proxy.upstream)
        with closing(HTTPConnection(str(host.hostname), host.port, timeout=20)) as upstream:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {"expect", "connection"}:
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            content = answer.read()
        length = answer.headers["Content-Length"] if self.command == "HEAD" else str(len(content))
        kept = [(n, v) for n, v in answer.headers.items() if n.lower() not in {"content-length", "transfer-encoding"}]
        return raw_answer(answer.status, content, {**dict(kept), "Content-Length": length or "0"})

    def _end(self, *, reset: bool) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # http.server's own way out would say goodbye properly.
            self.connection.close()


def raw_answer(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """Return an answer as it goes over the wire."""
    given = {"Content-Length": str(len(body)), **(headers or {})}
    lines = [f"HTTP/1.1 {status} so", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def refusal(status: int, code: str, message: str = "so it is", **more: str) -> Callable[[str], bytes]:
    """Return S3's answer for an error, by method: HEAD has no body."""
    elements = "".join(f"<{name}>{text}</{name}>" for name, text in {"Code": code, "Message": message, **more}.items())
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error>{elements}</Error>'.encode()
    headers = {"Content-Type": "application/xml", "Date": "Mon, 01 Jan 2001 00:00:00 GMT"}

    def answer(method: str) -> bytes:
        return raw_answer(status, b"" if method == "HEAD" else body, headers)

    return answer


def refuse(
    status: int, code: str, message: str = "so it is", *, method: str = r"\w+", path: str = "", **more: str
) -> list[Fault]:
    """Return the faults by which a server refuses requests; only where it is not HEAD can it say why."""
    answer = refusal(status, code, message, **more)
    said = Fault(matches=f"^{method} .*{path}", answer=answer("GET"))
    return [said] if method not in {r"\w+", "HEAD"} else [Fault(f"^HEAD .*{path}", answer=answer("HEAD")), said]
