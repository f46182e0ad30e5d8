"""Bytes as they come in -> where a request ends. Pure.

Only requests that have arrived whole are given a thread (worker.py), so something has to know when that is. It reads
no more of HTTP than the length of a message (RFC 9112 section 6), and refuses whatever could be measured in two ways:
what gunicorn's parser makes of the bytes afterwards must end where this says.
"""

import re

# gunicorn takes 100 fields of 8,190 bytes; no browser or proxy comes near this.
MAX_HEAD_BYTES = 32_768
# Clients that send in chunks send large ones; counting a body of tiny ones would hold up everybody else.
MAX_CHUNKS = 4_096
_MAX_CHUNK_LINE_BYTES = 256
_MAX_TRAILER_BYTES = 8_192

_LENGTH_NAME = re.compile(rb"\r\n[ \t]*content-length[ \t]*:")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*\r\n")
_CODING_NAME = re.compile(rb"\r\n[ \t]*transfer-encoding[ \t]*:")
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n")
_EXPECTS = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*\r\n", re.IGNORECASE)
# Those of HTTP/1.0 know no "100 Continue" and would take it for the answer.
_HTTP_1_0 = re.compile(rb"(?:\r\n)?[^\r]* HTTP/1\.0\r\n")
_CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(;[^\r\n]*)?")


class FramingError(ValueError):
    """These bytes are no request that can be taken; carries the status to answer with."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Incoming:
    """What has come in on one connection and was not yet handed on: the request at its front, and what follows it."""

    def __init__(self, max_body_bytes: int) -> None:
        self.buffer = bytearray()
        self.expects_continue = False
        """The client waits for a "100 Continue" before it sends the body."""
        self._max_body_bytes = max_body_bytes
        self._forget_request()

    def _forget_request(self) -> None:
        self._body_from = 0
        self._end: int | None = None
        self._chunk_at = 0
        self._chunks = 0
        self._chunked_bytes = 0

    def take(self) -> bytes | None:
        """Return the request at the front if it is whole, and forget it. Raises FramingError."""
        if not self._body_from and not self._read_head():
            return None
        if self._end is None:
            self._find_last_chunk()
        if self._end is None or len(self.buffer) < self._end:
            return None
        request = bytes(self.buffer[: self._end])
        del self.buffer[: self._end]
        self.expects_continue = False
        self._forget_request()
        return request

    def _read_head(self) -> bool:
        end = self.buffer.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
        if end < 0:
            if len(self.buffer) >= MAX_HEAD_BYTES:
                raise FramingError(431, "the head of the request is too large")
            return False
        head = bytes(self.buffer[: end + 4])
        self._body_from = self._chunk_at = end + 4
        length = _body_length(head)
        if length is not None:
            self._check_size(length)
            self._end = self._body_from + length
        self.expects_continue = length != 0 and _EXPECTS.search(head) is not None and not _HTTP_1_0.match(head)
        return True

    def _check_size(self, body_bytes: int) -> None:
        if body_bytes > self._max_body_bytes:
            raise FramingError(413, "the body is too large")

    def _find_last_chunk(self) -> None:
        """Go on from the chunk that was incomplete the last time."""
        while True:
            line_end = self.buffer.find(b"\r\n", self._chunk_at, self._chunk_at + _MAX_CHUNK_LINE_BYTES)
            if line_end < 0:
                if len(self.buffer) - self._chunk_at >= _MAX_CHUNK_LINE_BYTES:
                    raise FramingError(400, "the size of a chunk is missing")
                return
            match = _CHUNK_LINE.fullmatch(self.buffer, self._chunk_at, line_end)
            if match is None:
                raise FramingError(400, "the size of a chunk is no number")
            size = int(match[1], 16)
            if size == 0:
                self._find_end_of_trailers(line_end)
                return
            if not self._skip_chunk(line_end + 2, size):
                return

    def _skip_chunk(self, data_from: int, size: int) -> bool:
        """Move on to the chunk behind this one; False while this one is not here."""
        # Without what stands around the data: a body may be as large in chunks as in one piece.
        self._check_size(self._chunked_bytes + size)
        data_end = data_from + size
        if len(self.buffer) < data_end + 2:
            return False
        if self.buffer[data_end : data_end + 2] != b"\r\n":
            raise FramingError(400, "a chunk is longer than its size")
        self._chunk_at = data_end + 2
        self._chunked_bytes += size
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise FramingError(413, "the body has too many chunks")
        return True

    def _find_end_of_trailers(self, last_line_end: int) -> None:
        end = self.buffer.find(b"\r\n\r\n", last_line_end, last_line_end + _MAX_TRAILER_BYTES)
        if end >= 0:
            self._end = end + 4
        elif len(self.buffer) - last_line_end >= _MAX_TRAILER_BYTES:
            raise FramingError(431, "the trailers of the request are too large")


def _body_length(head: bytes) -> int | None:
    """Return the body's length in bytes; None where it comes in chunks."""
    if head.count(b"\n") != head.count(b"\r\n") or b"\n " in head or b"\n\t" in head:
        raise FramingError(400, "the head of the request is malformed")
    # Every request comes by here: the expressions are for those heads alone that have the words in them.
    small = head.lower()
    lengths = len(_LENGTH_NAME.findall(small)) if b"content-length" in small else 0
    codings = len(_CODING_NAME.findall(small)) if b"transfer-encoding" in small else 0
    if not lengths and not codings:
        return 0
    if codings:
        if codings > 1 or lengths or not _CHUNKED.search(small):
            raise FramingError(400, "the length of the body is given in two ways or by an unknown one")
        return None
    length = _LENGTH.search(small)
    if lengths > 1 or length is None:
        raise FramingError(400, "the length of the body is no number")
    return int(length[1])
