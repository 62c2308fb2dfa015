"""The malformed requests themselves: heads, JSON bodies, forms, what comes slowly, and chance changes of good ones."""

from __future__ import annotations

import gzip
import json
import random
import struct
import zlib
from collections.abc import Iterator
from itertools import chain, islice, repeat

from _malformed import ANSWERED, CHANCE, CUT, REFUSED, Case

PREDICT, SCORES = "/v1/predict", "/v1/huggingface"


def cases(count: int, seconds: float, chance: random.Random) -> Iterator[Case]:
    """``count`` malformed requests: slow ones, then in turns each of the fixed ones and as many chance changes.

    Args:
        seconds: what the server lets a head or a body take.
    """
    fixed = [*_heads(), *_bodies(), *_forms()]
    turns = chain.from_iterable([*fixed, *(_changed(chance) for _ in fixed)] for _ in repeat(None))
    return islice(chain(_slow(seconds), turns), count)


def _post(body: bytes, *headers: bytes, path: str = PREDICT, media: bytes = b"application/json",
          length: int | None = None) -> bytes:  # fmt: skip
    """A request whose length and headers may be wrong."""
    size = b"Content-Length: %d" % (len(body) if length is None else length)
    lines = [b"POST %s HTTP/1.1" % path.encode(), b"Host: x", b"Content-Type: " + media, b"Connection: close", size]
    return b"\r\n".join([*lines, *headers]) + b"\r\n\r\n" + body


_GOOD = b'{"texts": ["A warm and moving film."]}'


def _heads() -> Iterator[Case]:
    """What is no HTTP, or no request that this server knows."""
    end, close = b"\r\n\r\n", b"\r\nHost: x\r\nConnection: close"
    for name, content in {
        "no HTTP": b"hello" + end, "binary": bytes(range(256)) + end,
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + end,
        "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "no version": b"GET /" + end,
        "no method": b" / HTTP/1.1" + close + end, "blank in the path": b"GET /a b HTTP/1.1" + close + end,
        "no host": b"GET / HTTP/1.1" + end, "two hosts": b"GET / HTTP/1.1" + close + b"\r\nHost: y" + end,
        "header without a name": b"GET / HTTP/1.1" + close + b"\r\n: x" + end,
        "header without a colon": b"GET / HTTP/1.1" + close + b"\r\nhello" + end,
        "blank before the colon": b"GET / HTTP/1.1" + close + b"\r\nA : x" + end,
        "folded header": b"GET /nowhere HTTP/1.1" + close + b"\r\nA: x\r\n y" + end,
        "NUL in a header": b"GET / HTTP/1.1" + close + b"\r\nA: \0" + end,
        "huge header": b"GET / HTTP/1.1" + close + b"\r\nA: " + b"x" * 200_000 + end,
        "many headers": b"GET / HTTP/1.1" + close + b"".join(b"\r\nA%d: x" % number for number in range(20_000)) + end,
        "huge path": b"GET /" + b"x" * 200_000 + b" HTTP/1.1" + close + end,
        "long path": b"GET /" + b"x" * 20_000 + b" HTTP/1.1" + close + end,
    }.items():  # fmt: skip
        yield Case(f"head: {name}", [content], REFUSED)
    for method in ("PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW", "X" * 900):
        for path in (PREDICT, "/", "/healthz", "/docs/files/swagger-ui.css"):
            yield Case("head: method", [f"{method} {path} HTTP/1.1".encode() + close + end], REFUSED)
    for path in ("//", "/%", "/%00", "/%ff%fe", "/v1/predict/", "/V1/predict", "/../etc/passwd", "*",
    "http://x/nowhere",
                 "/docs/files/..%2f..%2fapp.py", "/docs/files/%00", "/docs/files/" + "x" * 5000, "/docs/files/",
                 "/problems/%0a", "/problems/" + "x" * 3000, "/problems/\\u0000",
                 "/nowhere?" + "a=b&" * 3000):  # fmt: skip
        for method in ("GET", "POST"):
            yield Case("head: path", [f"{method} {path} HTTP/1.1".encode() + close + end], REFUSED)
    for coding in (b"gzip", b"chunked, gzip", b"gzip, chunked", b"identity", b"\xff"):
        lines = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        yield Case("head: transfer coding", [lines + b"Transfer-Encoding: " + coding + end + _GOOD], REFUSED)
    for length in (b"-1", b"+5", b"0x26", b"1e2", b"38, 39", b"", b"9" * 400, b"38\r\nContent-Length: 39",
                   b"38\r\nTransfer-Encoding: chunked"):  # fmt: skip
        lines = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        yield Case("head: length", [lines + b"Content-Length: " + length + end + _GOOD], REFUSED)
    for header in (b"Expect: 200-maybe", b"Upgrade: websocket\r\nSec-WebSocket-Key: x", b"X-Request-ID: \xff\xfe",
                   b"Authorization: Bearer \xff", b"X-API-Key: \x80", b"Accept: \xff",
                   b"Cookie: " + b"a" * 9000):  # fmt: skip
        yield Case("head: odd header", [_post(_GOOD, header)], ANSWERED)


def _bodies() -> Iterator[Case]:
    """JSON that is none, or not what the paths take."""
    deep = 50_000
    for body in (
        b"", b" ", b"{", b"[", b'"', b"nul", b"'a'", b"{'texts': ['a']}", b'{"texts": ["a"],}', b'{"texts": ["a"]} x',
        b'{"texts": ["a"]}{"texts": ["a"]}', b'{"texts": ["\xff"]}', b'{"texts": ["\xc0\xaf"]}',
        b'{"texts": ["\xed\xa0\x80"]}',
        b'{"texts": ["\\ud800"]}', b'{"texts": ["\\ud800\\ud800"]}', b'{"texts": ["\\udc00\\ud800"]}',
        b'{"texts": ["\\x"]}',
        b'{"texts": ["a\nb"]}', b'{"texts": ["\0"]}', b"\xef\xbb\xbf" + _GOOD, _GOOD.decode().encode("utf-16"),
        _GOOD.decode().encode("utf-32"), b"[" * deep, b'{"texts":' * deep, b"[" * deep + b"]" * deep,
        b'{"texts": [' + b"[" * deep + b"]" * deep + b"]}",
        b"null", b"true", b"0", b"-0", b"1e999", b"NaN", b"-Infinity", b"9" * 5000, b'"texts"', b"[]", b"{}",
        b'["a"]',
        b'{"texts": null}', b'{"texts": "a"}', b'{"texts": []}', b'{"texts": {}}', b'{"texts": {"0": "a"}}',
        b'{"texts": [null]}',
        b'{"texts": [1]}', b'{"texts": [["a"]]}', b'{"texts": NaN}', b'{"texts": [NaN]}', b'{"texts": Infinity}',
        b'{"texts": [1e400]}',
        b'{"texts": [%s]}' % (b"9" * 5000), b'{"texts": [""]}', b'{"texts": [" \\t\\n"]}', b'{"texts": ["a", ""]}',
        b'{"texts": ["\\u200b"]}', b'{"texts": ["a"], "texts": 1}', b'{"texts": 1, "texts": []}',
        b'{"TEXTS": ["a"]}', b'{"texts": ["a"], "": 1}',
        b'{"texts": ["a"], "windows": 1}', b'{"texts": ["a"], "windows": "true"}',
        b'{"texts": ["a"], "windows": null}',
        b'{"texts": ["a"], "version": 1}', b'{"texts": ["a"], "version": "-1"}', b'{"texts": ["a"], "version": "1 "}',
        b'{"texts": ["a"], "version": "\\u0661"}', b'{"texts": ["a"], "version": "%s"}' % (b"9" * 18),
        b'{"texts": ["a"], "version": "0"}',
        b'{"texts": ["a"], "model": "../rekd"}', b'{"texts": ["a"], "model": "rekd_selector"}',
        b'{"texts": ["a"], "model": ""}',
        b'{"texts": ["a"], "model": "%s"}' % (b"m" * 5000), b'{"texts": ["a"], "model": 1}',
        b'{"texts": ["a"], "model": "\\u0000"}',
        json.dumps({"texts": ["a"] * 257}).encode(), json.dumps({"texts": [""] * 257}).encode(),
        json.dumps({"texts": [1] * 9000}).encode(),
        json.dumps({"texts": ["a " * 50_001]}).encode(), b'{"texts": ["' + b"a" * (17 << 20) + b'"]}',
        b" " * (17 << 20),
    ):  # fmt: skip
        empty_name = b'"model": ""' in body  # means the usual one
        zero_width = b"200b" in body  # a text to a tokenizer
        expected = ANSWERED if empty_name or zero_width else REFUSED
        yield Case("JSON: texts", [_post(body)], expected)
    for body in (
        b"{}", b'{"inputs": null}', b'{"inputs": 1}', b'{"inputs": {}}', b'{"inputs": []}', b'{"inputs": [null]}',
        b'{"inputs": ""}',
        b'{"inputs": "a", "input": "b"}', b'{"inputs": "a", "parameters": []}',
        b'{"inputs": "a", "parameters": {"top_k": 0}}',
        b'{"inputs": "a", "parameters": {"top_k": -1}}', b'{"inputs": "a", "parameters": {"top_k": NaN}}',
        b'{"inputs": "a", "parameters": {"top_k": 1.5}}',
        b'{"inputs": "a", "parameters": {"function_to_apply": "none"}}',
        b'{"inputs": "a", "parameters": {"x": 1}}', b'{"inputs": "a", "options": 1}', b'{"inputs": "\\ud800"}',
        b'{"inputs": [["a", "b"]]}',
        b'{"inputs": "a", "options": ' + b"[" * deep + b"]" * deep + b"}",
    ):  # fmt: skip
        yield Case("JSON: inputs", [_post(body, path=SCORES)], REFUSED)
    for body in (b'{"inputs": "a", "parameters": {"top_k": %s}}' % (b"9" * 4000),
                 b'{"inputs": "a", "options": {"a": NaN, "b": [1e999, %s]}}' % (b"9" * 4000)):  # fmt: skip
        yield Case("JSON: numbers", [_post(body, path=SCORES)], ANSWERED)
    for media in (b"", b"text/plain", b"application", b"application/json-patch+json",
    b"application/x-www-form-urlencoded",
                  b"\xff/\xff", b"a" * 5000, b"image/png", b"application/xml", b"*/*"):  # fmt: skip
        yield Case("media type", [_post(_GOOD, media=media)], REFUSED)
    bomb = gzip.compress(b"\0" * (64 << 20), mtime=0)
    for coding in (b"gzip", b"deflate", b"br", b"zstd", b"gzip, gzip", b"\xff", b"x" * 3000):
        yield Case("compressed", [_post(bomb, b"Content-Encoding: " + coding)], REFUSED)
    for length, half_closed in ((len(_GOOD) + 5, True), (1 << 40, True), (len(_GOOD) - 5, False), (0, False)):
        expected = CUT if half_closed else REFUSED
        yield Case("wrong length", [_post(_GOOD, length=length)], expected, half_closed)
    for cut in range(0, 200, 9):
        yield Case("cut", [_post(_GOOD)[:cut]], CUT, True)
    chunked = _post(b"").partition(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n\r\n"
    for body in (b"hello", b"zz\r\n", b"-1\r\n", b"5\r\nab", b"ffffffffffffffffffff\r\n", b"2\r\n{}\r\n0\r\n\r\n",
    b"26\r\n" + _GOOD + b"x\r\n0\r\n\r\n",
                 b"5;" + b"x" * 70_000):  # fmt: skip
        yield Case("chunks", [chunked + body], CUT, True)
    yield Case("pipelined", [_post(b"{").replace(b"Connection: close\r\n", b"") + b"hello\r\n\r\n"], REFUSED)


def _forms() -> Iterator[Case]:
    """multipart/form-data that is none, or holds no image. The model reads texts, so no image is right."""
    part = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    file, end = b'; filename="a.png"', b"--x--\r\n"
    header = struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100_000)), (b"IEND", b""))
    )
    media = b"multipart/form-data; boundary=x"
    for kind, body, declared in (
        ("empty", b"", media), ("no boundary", part % (b"image", file, b"x") + end, b"multipart/form-data"),
        ("another boundary", part % (b"image", file, b"x") + end, b"multipart/form-data; boundary=y"),
        ("huge boundary", part % (b"image", file, b"x") + end, b"multipart/form-data; boundary=" + b"y" * 5000),
        ("odd boundary", part % (b"image", file, b"x") + end, b'multipart/form-data; boundary="\xff"'),
        ("no end", part % (b"image", file, b"x"), media), ("no parts", end, media), ("no name",
        b"--x\r\n\r\nx\r\n" + end, media),
        ("no disposition", b"--x\r\nA: b\r\n\r\nx\r\n" + end, media), ("broken header",
        b"--x\r\n\xff\xff\r\n\r\nx\r\n" + end, media),
        ("huge part header", b"--x\r\nA: " + b"b" * 100_000 + b"\r\n\r\nx\r\n" + end, media),
        ("many part headers", b"--x\r\n" + b"A: b\r\n" * 5000 + b"\r\nx\r\n" + end, media),
        ("no file", part % (b"image", b"", b"x") + end, media), ("no image", part % (b"image", file,
        b"x") + end, media),
        ("empty file", part % (b"image", file, b"") + end, media),
        ("pixel bomb", part % (b"image", file, bomb) + end, media),
        ("many files", part % (b"image", file, b"x") * 70 + end, media), ("many fields", part % (b"a", b"",
        b"x") * 20 + end, media),
        ("large field", part % (b"model", b"", b"m" * 100_000) + end, media), ("odd field", part % (b"\xff\xfe",
        b"", b"\xff") + end, media),
        ("windows", part % (b"windows", b"", b"yes") + part % (b"image", file, b"x") + end, media),
        ("nested", part % (b"image", file, part % (b"image", file, b"x") + end) + end, media),
        ("charset", part % (b"image", file, b"x") + end, media + b"; charset=nonesuch"),
        ("header charset", part % (b"image*", b"; filename*=nonesuch''%ff", b"x") + end, media),
        ("a real image", part % (b"image", file, _png()) + end, media), ("forms of text", part % (b"texts", b"",
        b"good") + end, media),
    ):  # fmt: skip
        yield Case(f"form: {kind}", [_post(body, media=declared)], REFUSED)


def _png() -> bytes:
    header = struct.pack(">II5B", 1, 1, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0\1\2\3")), (b"IEND", b""))
    )


def _slow(seconds: float) -> Iterator[Case]:
    """What does not come, or a byte at a time."""
    pauses, whole = [seconds / 4] * 8, _post(_GOOD)
    yield Case("slow: nothing", [], CUT)
    yield Case("slow: no end of the head", [whole[:40]], REFUSED)
    yield Case("slow: no body", [whole[: -len(_GOOD)]], REFUSED)
    yield Case("slow: no end of the body", [whole[:-3]], REFUSED)
    for start in (10, len(whole) - 10):
        drops = [piece for pause, byte in zip(pauses, whole[start:], strict=False) for piece in (pause, bytes([byte]))]
        yield Case("slow: drops", [whole[:start], *drops], REFUSED)
    second = whole.replace(b"Connection: close\r\n", b"") + whole[:40]
    yield Case("slow: a second head", [second], CUT)


def _changed(chance: random.Random) -> Case:
    """A good request with some bytes changed, of the body or of all."""
    path, good = chance.choice([
        (PREDICT, b'{"texts": ["A warm film.", "\xc3\x9cber \xf0\x9f\x8e\xac"], "windows": true, "version": "1"}'),
        (SCORES, b'{"inputs": ["A dull story."], "parameters": {"top_k": 1}, "options": {"wait": true}}'),
        (PREDICT,
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + _png() + b"\r\n--x--\r\n"),
    ])  # fmt: skip
    media = b"multipart/form-data; boundary=x" if good.startswith(b"--x") else b"application/json"
    if chance.random() < 0.7:
        return Case("changed: body", [_post(_mutated(chance, good), path=path, media=media)], ANSWERED)
    return Case("changed: request", [_mutated(chance, _post(good, path=path, media=media))], CHANCE)


def _mutated(chance: random.Random, good: bytes) -> bytes:
    body = bytearray(good)
    for _ in range(chance.randint(1, 6)):
        start = chance.randrange(len(body) + 1)
        end = min(start + chance.choice([0, 1, 1, 2, 8, 40]), len(body))
        tokens = [b"", chance.randbytes(chance.randint(1, 5)), body[start:end] * 2, b'"', b"{", b"[", b"\0",
        b"\r\n", b"1e999",
                  b"\\ud800", b"NaN", b"null", b"--x", b"-1"]  # fmt: skip
        body[start:end] = chance.choice(tokens)
    return bytes(body)
