"""Where a request ends: the same however its bytes come in, and the same as gunicorn's own parser says afterwards."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
from gunicorn import http
from gunicorn.config import Config
from gunicorn.http.errors import ParseException
from hypothesis import example, given, settings
from hypothesis import strategies as st

from appliance.wire.framing import MAX_CHUNKS, MAX_HEAD_BYTES, FramingError, Incoming

LIMIT = 4_096
POST = b"POST /collect HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def taken(pieces: Iterable[bytes]) -> tuple[list[bytes], int, bytes]:
    """Return the requests that were taken, the status of the refusal (0: none), and what was left while none came."""
    incoming = Incoming(LIMIT)
    requests: list[bytes] = []
    for piece in pieces:
        incoming.buffer += piece
        try:
            while (request := incoming.take()) is not None:
                requests.append(request)
        except FramingError as error:
            return requests, error.status, b""
    return requests, 0, bytes(incoming.buffer)


def bytewise(data: bytes) -> Iterator[bytes]:
    return (data[n : n + 1] for n in range(len(data)))


def cut(data: bytes, places: Iterable[int]) -> Iterator[bytes]:
    """Cut at these places, wherever they are."""
    ends = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return (data[start:end] for start, end in pairwise(ends))


def with_length(body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return POST + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


def in_chunks(*chunks: bytes, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    body = b"".join(b"%x" % len(chunk) + extension + b"\r\n" + chunk + b"\r\n" for chunk in chunks)
    return CHUNKED + body + b"0\r\n" + trailers + b"\r\n"


def head_of(size: int) -> bytes:
    start = POST + b"X-Pad: "
    return start + b"x" * (size - len(start) - 4) + b"\r\n\r\n"


WHOLE: dict[str, bytes] = {
    "no body": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "no header at all": b"GET / HTTP/1.1\r\n\r\n",
    "an empty line before it": b"\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
    "a length of nothing": with_length(b""),
    "a body": with_length(b"hello"),
    "a body as large as allowed": with_length(b"x" * LIMIT),
    "a length with zeros in front": POST + b"Content-Length: 0005\r\n\r\nhello",
    "a length in other letters and blanks": POST + b"cOnTeNt-LeNgTh:\t 5 \t\r\n\r\nhello",
    "a body that looks like a head": with_length(b"\r\n\r\nGET / HTTP/1.1\r\nContent-Length: 9\r\n\r\n"),
    "a name that only ends like the length": POST + b"X-Content-Length: 7\r\n\r\n",
    "a value that speaks of lengths": POST + b"X: content-length: 7\r\n\r\n",
    "no chunk but the last": in_chunks(),
    "chunks": in_chunks(b"hello", b" ", b"world"),
    "a chunk that holds line ends": in_chunks(b"\r\n0\r\n\r\n", b"\r\n"),
    "sizes with zeros in front": CHUNKED + b"00000005\r\nhello\r\n000\r\n\r\n",
    "sizes in other letters": CHUNKED + b"A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n",
    "chunk extensions": in_chunks(b"hello", extension=b';a=1;b="c d";e'),
    "a blank before a chunk extension": in_chunks(b"hello", extension=b" ;a"),
    "trailers": in_chunks(b"hello", trailers=b"X-Sum: 1\r\nX-More: 2\r\n"),
    "coding in other letters": POST + b"TRANSFER-encoding: Chunked\r\n\r\n0\r\n\r\n",
    "a head as large as allowed": head_of(MAX_HEAD_BYTES),
}


@pytest.mark.parametrize("request_bytes", WHOLE.values(), ids=WHOLE)
def test_a_whole_request_is_taken_to_the_byte_however_it_comes_in(request_bytes: bytes) -> None:
    following = b"GET /next HTTP/1.1\r\n\r\n"
    assert taken([request_bytes]) == ([request_bytes], 0, b"")
    assert taken([request_bytes, following]) == ([request_bytes, following], 0, b"")
    assert taken([request_bytes + following]) == ([request_bytes, following], 0, b"")
    assert taken(bytewise(request_bytes + following)) == ([request_bytes, following], 0, b"")


@pytest.mark.parametrize("request_bytes", WHOLE.values(), ids=WHOLE)
def test_no_part_of_a_request_is_taken_for_a_whole_one(request_bytes: bytes) -> None:
    places = {*range(min(len(request_bytes), 300)), *range(max(0, len(request_bytes) - 300), len(request_bytes))}
    for end in places:
        assert taken([request_bytes[:end]]) == ([], 0, request_bytes[:end])


MANY_TRAILERS = b"".join(b"X-%d: %s\r\n" % (n, b"x" * 100) for n in range(100))
REFUSED: dict[str, tuple[int, bytes]] = {
    "obs-fold": (400, POST + b"X: a\r\n b\r\n\r\n"),
    "obs-fold with a tab": (400, POST + b"X: a\r\n\tb\r\n\r\n"),
    "a folded length": (400, POST + b"Content-Length:\r\n 5\r\n\r\nhello"),
    "bare LF in the head": (400, b"POST / HTTP/1.1\nHost: x\r\n\r\n"),
    "bare LF in front of a length": (400, POST + b"X: a\nContent-Length: 5\r\n\r\nhello"),
    "a blank before the name": (400, POST + b" Content-Length: 5\r\n\r\nhello"),
    "a blank before the colon": (400, POST + b"Content-Length : 5\r\n\r\nhello"),
    "two lengths": (400, POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!"),
    "two equal lengths": (400, POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello"),
    "a list of lengths": (400, POST + b"Content-Length: 5, 5\r\n\r\nhello"),
    "a negative length": (400, POST + b"Content-Length: -5\r\n\r\nhello"),
    "a length with a sign": (400, POST + b"Content-Length: +5\r\n\r\nhello"),
    "a hexadecimal length": (400, POST + b"Content-Length: 0x5\r\n\r\nhello"),
    "a length with an underscore": (400, POST + b"Content-Length: 1_0\r\n\r\nhello!!!!!"),
    "a length in superscript": (400, POST + b"Content-Length: \xb2\r\n\r\nhe"),
    "a length of nothing but blanks": (400, POST + b"Content-Length:  \r\n\r\n"),
    "a length of many digits": (400, POST + b"Content-Length: " + b"0" * 400 + b"5\r\n\r\nhello"),
    "a length with a bare CR": (400, POST + b"Content-Length: 5\r\r\n\r\nhello"),
    "both lengths": (400, POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "both lengths the other way round": (
        400,
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    ),
    "two codings": (400, POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "a list of codings": (400, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "chunked twice": (400, POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    "an unknown coding": (400, POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    "identity": (400, POST + b"Transfer-Encoding: identity\r\n\r\n"),
    "an empty coding": (400, POST + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n"),
    "a quoted coding": (400, POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n'),
    "a coding with a vertical tab": (400, POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
    "a coding with a blank before the colon": (400, POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
    "a chunk without a size": (400, CHUNKED + b"\r\nhello\r\n0\r\n\r\n"),
    "a chunk size that is no number": (400, CHUNKED + b"xyz\r\nhello\r\n0\r\n\r\n"),
    "a chunk size with a sign": (400, CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n"),
    "a chunk size with 0x": (400, CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n"),
    "a blank before a chunk size": (400, CHUNKED + b" 5\r\nhello\r\n0\r\n\r\n"),
    "a chunk size that overflows": (400, CHUNKED + b"100000005\r\nhello\r\n0\r\n\r\n"),
    "a chunk size with a bare LF": (400, CHUNKED + b"5\nhello\r\n0\r\n\r\n"),
    "a chunk size with a bare CR": (400, CHUNKED + b"5\r\r\nhello\r\n0\r\n\r\n"),
    "a chunk size with both the wrong way round": (400, CHUNKED + b"5\n\r\nhello\r\n0\r\n\r\n"),
    "a chunk extension with a bare LF": (400, CHUNKED + b"5;a\nb\r\nhello\r\n0\r\n\r\n"),
    "a chunk extension with a bare CR": (400, CHUNKED + b"5;a\rb\r\nhello\r\n0\r\n\r\n"),
    "an endless chunk extension": (400, CHUNKED + b"5;" + b"a" * 300),
    "a chunk longer than its size": (400, CHUNKED + b"4\r\nhello\r\n0\r\n\r\n"),
    "a chunk shorter than its size": (400, CHUNKED + b"6\r\nhello\r\n0\r\n\r\n"),
    "a chunk that ends with bare LF": (400, CHUNKED + b"5\r\nhello\n0\r\n\r\n"),
    "a body too large": (413, POST + b"Content-Length: %d\r\n\r\n" % (LIMIT + 1)),
    "a body far too large": (413, POST + b"Content-Length: 999999999999999\r\n\r\n"),
    "a chunk too large": (413, CHUNKED + b"%x\r\n" % (LIMIT + 1)),
    "a chunk far too large": (413, CHUNKED + b"ffffffff\r\n"),
    "chunks too large together": (413, in_chunks(*[b"x" * 1000] * 5)),
    "a head too large": (431, head_of(MAX_HEAD_BYTES + 1)),
    "a head that never ends": (431, POST + b"X: " + b"x" * MAX_HEAD_BYTES),
    "a head of line ends": (431, b"\r\n\r" * MAX_HEAD_BYTES),
    "a head of nothing": (431, bytes(MAX_HEAD_BYTES)),
    "trailers too large": (431, in_chunks(b"hello", trailers=MANY_TRAILERS)),
    "trailers that never end": (431, CHUNKED + b"0\r\n" + b"x" * 8_300),
}


@pytest.mark.parametrize(("status", "data"), REFUSED.values(), ids=REFUSED)
def test_what_is_malformed_or_too_large_is_refused_however_it_comes_in(status: int, data: bytes) -> None:
    assert taken([data]) == ([], status, b"")
    assert taken([WHOLE["a body"] + data]) == ([WHOLE["a body"]], status, b"")
    assert taken(cut(data, range(0, len(data), 7)))[:2] == ([], status)


def many_chunks(number: int) -> bytes:
    return in_chunks(*[b"x"] * number)


def test_a_body_of_very_many_chunks_is_refused_before_it_is_whole() -> None:
    assert taken([many_chunks(MAX_CHUNKS)])[:2] == ([many_chunks(MAX_CHUNKS)], 0)
    bomb = many_chunks(MAX_CHUNKS + 1).removesuffix(b"0\r\n\r\n")
    assert taken([bomb])[:2] == ([], 413)
    assert taken(cut(bomb, range(0, len(bomb), 100)))[:2] == ([], 413)


def test_a_body_in_chunks_may_be_as_large_as_any_other() -> None:
    pieces = [b"x" * 64] * (LIMIT // 64)
    assert taken([in_chunks(*pieces)]) == ([in_chunks(*pieces)], 0, b"")
    assert taken([in_chunks(*pieces, b"y")])[:2] == ([], 413)


OLD_POST = b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
EXPECTING: dict[str, tuple[bool, bytes]] = {
    "a body to come": (True, POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"),
    "chunks to come": (True, POST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "other letters": (True, POST + b"eXPECT:100-Continue \r\nContent-Length: 5\r\n\r\n"),
    "half a body": (True, POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhe"),
    "half a head": (False, POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n"),
    "another expectation": (False, POST + b"Expect: 200-ok\r\nContent-Length: 5\r\n\r\n"),
    "none": (False, POST + b"X-Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"),
    "HTTP/1.0, whose clients know no 100": (False, OLD_POST),
    "HTTP/1.0 after an empty line": (False, b"\r\n" + OLD_POST),
}


@pytest.mark.parametrize(("expected", "data"), EXPECTING.values(), ids=EXPECTING)
def test_a_client_is_asked_to_continue_only_when_it_waits_for_that(data: bytes, *, expected: bool) -> None:
    incoming = Incoming(LIMIT)
    incoming.buffer += data
    assert incoming.take() is None
    assert incoming.expects_continue is expected


def test_one_client_that_waits_does_not_make_the_next_request_wait() -> None:
    incoming = Incoming(LIMIT)
    incoming.buffer += with_length(b"hello", b"Expect: 100-continue")[:-5]
    assert incoming.take() is None
    incoming.buffer += b"hello" + POST
    assert incoming.take() is not None
    assert incoming.take() is None
    assert not incoming.expects_continue


# ---- anything at all

NAMES = [b"Content-Length", b"content-length", b"Transfer-Encoding", b"Content_Length", b"Host", b"X", b"Expect", b""]
VALUES = [b"0", b"3", b"5", b"05", b"5 ", b"\t5", b"5,5", b"\xb2", b"chunked", b"CHUNKED", b"gzip, chunked", b"x", b""]
COLONS = [b":", b": ", b" : ", b":\x0b", b""]
ENDS = [b"\r\n"] * 8 + [b"\n", b"\r", b"\r\n ", b"\r\n\t", b"\r\r\n", b"\x00", b""]
STARTS = [
    b"POST /collect HTTP/1.1",
    b"GET / HTTP/1.0",
    b"\r\nGET / HTTP/1.1",
    b"GET /",
    b"PRI * HTTP/2.0",
    b"\r\n",
    b"",
]
SIZES = [b"0", b"1", b"5", b"00", b"5 ", b"5;a", b"5 ;a=b", b'5;a="\r\n"', b"0;a", b"fffffffff", b"-1", b""]
DATA = [b"hello", b"h", b"", b"\r\n", b"0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"x" * 100]
TRAILERS = [b"", b"", b"X: y\r\n", b"Content-Length: 5\r\n", b"X: y\n", b"X: a\r\n b\r\n", b"\r"]

ends = st.sampled_from(ENDS)
headers = st.builds(
    lambda *parts: b"".join(parts), st.sampled_from(NAMES), st.sampled_from(COLONS), st.sampled_from(VALUES), ends
)
heads = st.builds(
    lambda start, end, lines, last: start + end + b"".join(lines) + last,
    st.sampled_from(STARTS),
    ends,
    st.lists(headers, max_size=4),
    ends,
)
bodies = st.lists(st.sampled_from(DATA), max_size=3).map(b"".join)
chunks = st.builds(lambda *parts: b"".join(parts), st.sampled_from(SIZES), ends, st.sampled_from(DATA), ends)
chunked_bodies = st.builds(
    lambda parts, last, trailers, end: b"".join(parts) + last + trailers + end,
    st.lists(chunks, max_size=3),
    st.sampled_from([b"0\r\n", b"0\n", b"0;a\r\n", b""]),
    st.sampled_from(TRAILERS),
    ends,
)
garbled = st.builds(lambda *parts: b"".join(parts), heads, bodies | chunked_bodies)
# Well-formed but for the chunks: else most examples end at the head.
nearly_chunked = chunked_bodies.map(lambda body: CHUNKED + body)
well_formed = st.sampled_from(list(WHOLE.values())).filter(lambda request: len(request) < 1000)


def spoilt(request: bytes, place: int, gone: int, instead: bytes) -> bytes:
    start = place % (len(request) + 1)
    return request[:start] + instead + request[start + gone :]


spoilt_ones = st.builds(
    spoilt, well_formed, st.integers(0, 1000), st.integers(0, 3), st.sampled_from([*ENDS, b"0", b";", b":", b" "])
)
anything = st.binary(max_size=60) | garbled | nearly_chunked | spoilt_ones | well_formed
streams = st.lists(anything, max_size=4).map(b"".join)
many = settings(max_examples=600, deadline=None, database=None)


@many
@given(data=streams, places=st.lists(st.integers(0, 5000), max_size=12))
def test_bytes_in_pieces_make_the_same_requests_as_at_once(data: bytes, places: list[int]) -> None:
    at_once = taken([data])
    assert taken(cut(data, places)) == at_once
    assert taken(bytewise(data)) == at_once


@many
@given(requests=st.lists(well_formed, max_size=5), places=st.lists(st.integers(0, 5000), max_size=12))
def test_pipelined_requests_come_out_one_by_one_and_in_order(requests: list[bytes], places: list[int]) -> None:
    assert taken(cut(b"".join(requests), places)) == (requests, 0, b"")


@many
@given(data=streams)
def test_what_is_taken_and_what_is_left_is_all_that_came_in(data: bytes) -> None:
    requests, status, rest = taken([data])
    assert data.startswith(b"".join(requests))
    assert status or b"".join(requests) + rest == data


# ---- gunicorn's parser, which reads the same bytes afterwards

FOLLOWING = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


def left_by_parser(request: bytes, size: int) -> bytes | None:
    """Let gunicorn read a request in pieces with another behind it; return what it leaves, None where it refuses."""
    source = iter([*cut(request, range(0, len(request), size)), FOLLOWING])
    parser = http.get_parser(Config(), source, ("127.0.0.1", 1))
    try:
        message = next(parser)
        message.body.read()
    except (ParseException, OSError, StopIteration):
        return None
    return bytes(parser.unreader.take_buffered()) + b"".join(source)


@many
@given(data=streams)
@example(data=CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n")
@example(data=CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n")
@example(data=b"\r\n\r\nGET / HTTP/1.1\r\n\r\n")
@example(data=b"\r\nContent-Length: 5\r\n\r\nhello")
@example(data=POST + b"X: a\rContent-Length: 5\r\n\r\nhello")
@example(data=POST + b"Content_Length: 5\r\n\r\nhello")
@example(data=POST + b"Content-Length\xc2\xa0: 5\r\n\r\nhello")
def test_gunicorn_never_ends_a_request_at_another_place(data: bytes) -> None:
    for request in taken([data])[0]:
        left = left_by_parser(request, len(request))
        assert left in {FOLLOWING, None}
        assert left_by_parser(request, 3) == left


@pytest.mark.parametrize("request_bytes", WHOLE.values(), ids=WHOLE)
def test_gunicorn_ends_a_well_formed_request_at_the_same_place(request_bytes: bytes) -> None:
    expected = FOLLOWING if len(request_bytes) < MAX_HEAD_BYTES else None
    assert left_by_parser(request_bytes, len(request_bytes)) == expected
    assert left_by_parser(request_bytes, 100) == expected
