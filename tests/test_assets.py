"""Downloads, from a server on this machine that can be told to misbehave."""

import errno
import hashlib
import io
import multiprocessing
import os
import random
import re
import socket
import threading
import time
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from test_denoisers_adm import TINY, reference
from test_pickles import SONG, mark, small_network, write  # noqa: F401

from amedlib.datasets import entries, files, loaders
from amedlib.datasets.files import ASSETS, DATA, Asset, fetch, load
from amedlib.denoisers import adm

NAME = "weights.pt"
CONTENT = random.Random(0).randbytes(1_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ALTERED = CONTENT[:500_000] + bytes([CONTENT[500_000] ^ 1]) + CONTENT[500_001:]


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.content`` under any path.

    ``server.plan`` has what happens to the next requests: a status from 400 to 599 that is the
    answer, or a number of bytes after which the connection breaks, or a negative number of bytes
    after which the server waits for ``server.go``. When the plan is used up, all goes well.
    ``server.asked`` counts requests; ``server.log`` has (Range, status, bytes sent) of the answers.
    """

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.asked += 1
        assert self.headers["Accept-Encoding"] == "identity"  # a range counts the file's own bytes
        status, cut = 200, None
        if server.plan:
            planned = server.plan.popleft()
            if 400 <= planned < 600:
                server.log.append((self.headers["Range"], planned, 0))
                return self.send_error(planned)
            cut = planned
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        condition = self.headers["If-Range"]
        holds = condition is None or (condition == server.etag and not condition.startswith("W/"))
        if asked and server.ranges and holds:
            start = int(asked[1])
            status = 206 if start < len(server.content) else 416
        body = server.content[start:] if status != 416 else b""
        self.send_response(status)
        self.send_header("Content-Length", len(body))
        if status != 200:
            span = "*" if status == 416 else f"{start}-{len(server.content) - 1}"
            self.send_header("Content-Range", f"bytes {span}/{len(server.content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        if cut is not None and cut < 0:
            self.wfile.write(body[:-cut])
            server.reached.set()
            server.go.wait(20)
            body, cut = body[-cut:], None
        sent = body[:cut]
        server.log.append((self.headers["Range"], status, len(sent)))
        try:
            self.wfile.write(sent)
        except OSError:  # the other side is gone
            pass
        self.close_connection = True


@contextmanager
def serving(content=CONTENT, plan=(), ranges=True, etag='"1"', handler=Handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.content, server.plan, server.ranges, server.etag = content, deque(plan), ranges, etag
    server.asked, server.log = 0, []
    server.reached, server.go = threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/{NAME}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.go.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder; no waiting between tries."""
    monkeypatch.setenv("AMED_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(files, "BACKOFF", 0)
    return tmp_path / "cache"


def asset_of(*servers, **known):
    urls = tuple(server if isinstance(server, str) else server.url for server in servers)
    return Asset(NAME, urls, "MIT", **known)


def whole(*servers):
    return asset_of(*servers, size=len(CONTENT), sha256=SHA256)


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/{NAME}"


def only_guards(cache):
    return {p.name for p in cache.iterdir()} <= {f"{NAME}.guard", "checksums.lock.guard"}


@pytest.mark.parametrize(
    "known",
    [
        {"size": len(CONTENT), "sha256": SHA256},
        {"size": len(CONTENT), "md5": hashlib.md5(CONTENT).hexdigest()},
        {"sha256": SHA256},
        {},
    ],
    ids=["sha256", "md5", "unknown size", "unknown"],
)
def test_a_download_is_complete_and_happens_once(cache, known):
    with serving() as server:
        path = fetch(asset_of(server, **known), progress=False)
        assert path == cache / NAME and path.read_bytes() == CONTENT
        assert fetch(asset_of(server, **known), progress=False) == path
    assert server.log == [(None, 200, len(CONTENT))]
    assert not list(cache.glob("*.part*"))


@pytest.mark.parametrize("cut", [0, 1, 65_536, 500_001, len(CONTENT) - 1])
@pytest.mark.parametrize(
    ("known", "etag"),
    [
        ({"sha256": SHA256}, '"1"'),
        ({"sha256": SHA256}, 'W/"1"'),
        ({"sha256": SHA256}, None),
        ({}, '"1"'),
    ],
    ids=["sha256", "weak tag", "no tag", "unknown"],
)
def test_a_broken_connection_is_resumed(cut, known, etag):
    with serving(plan=[cut], etag=etag) as server:
        path = fetch(asset_of(server, **known), progress=False)
    assert path.read_bytes() == CONTENT
    (_, first), (asked, status, rest) = server.log[0][1:], server.log[1]
    kept = len(CONTENT) - rest
    assert first == cut and cut - files.CHUNK < kept <= cut
    assert (asked, status) == ((f"bytes={kept}-", 206) if kept else (None, 200))
    assert len(server.log) == 2


def test_a_later_call_resumes_what_an_earlier_one_left(cache):
    with serving(plan=[200_000, 404]) as server:
        with pytest.raises(ValueError, match="HTTP 404"):
            fetch(whole(server), progress=False)
        assert (cache / f"{NAME}.part").stat().st_size > 0 and not (cache / NAME).exists()
        assert fetch(whole(server), progress=False).read_bytes() == CONTENT
    assert [status for _, status, _ in server.log] == [200, 404, 206]
    assert server.log[2][0] is not None


def fetch_when_told(pipe):
    pipe.send(fetch(pipe.recv(), progress=False))


@contextmanager
def processes(number):
    """Processes that fetch the asset that is sent to them, and send its path back."""
    # Forked, because importing the library anew takes seconds.
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(number)]
    children = [context.Process(target=fetch_when_told, args=(end,)) for _, end in pipes]
    for child in children:
        child.start()
    try:
        yield children, [pipe for pipe, _ in pipes]
    finally:
        for child in children:
            child.kill()
            child.join()


def test_a_killed_download_is_resumed(cache):
    part = cache / f"{NAME}.part"
    with processes(1) as (children, pipes), serving(plan=[-400_000]) as server:
        pipes[0].send(whole(server))
        assert server.reached.wait(20)
        while not (part.exists() and part.stat().st_size >= 300_000):
            assert children[0].is_alive()
        children[0].kill()
        children[0].join()
        server.go.set()
        kept = part.stat().st_size
        assert fetch(whole(server), progress=False).read_bytes() == CONTENT
    assert (f"bytes={kept}-", 206, len(CONTENT) - kept) in server.log


def test_two_processes_download_a_file_once(cache):
    with processes(2) as (_, pipes), serving(plan=[-400_000]) as server:
        for pipe in pipes:
            pipe.send(whole(server))
        assert server.reached.wait(20)
        time.sleep(0.3)  # for the other one to ask the server too, if it does
        assert server.asked == 1 and not (cache / NAME).exists()
        server.go.set()
        assert [pipe.recv() for pipe in pipes] == [cache / NAME] * 2
    assert server.asked == 1 and (cache / NAME).read_bytes() == CONTENT


def test_threads_download_their_files_side_by_side_and_pin_all(cache):
    names = [f"{i}.npz" for i in range(24)]
    with serving(CONTENT[:1000]) as server:
        wanted = [replace(asset_of(server), name=name) for name in names * 2]
        threads = [threading.Thread(target=fetch, args=(asset, False)) for asset in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert server.asked == len(names)
    lines = (cache / "checksums.lock").read_text().splitlines()
    assert sorted(line.split()[-1] for line in lines) == sorted(names)


def test_a_server_without_ranges_starts_over():
    with serving(plan=[300_000], ranges=False) as server:
        assert fetch(whole(server), progress=False).read_bytes() == CONTENT
    assert [status for _, status, _ in server.log] == [200, 200]
    assert server.log[1][0] is not None and server.log[1][2] == len(CONTENT)


@pytest.mark.parametrize("etag", ['"1"', 'W/"1"', None], ids=["strong", "weak", "none"])
def test_two_versions_are_not_mixed(cache, etag):
    """Without a published checksum nothing later would notice it."""
    with serving(plan=[300_000, 404], etag=etag) as server:
        with pytest.raises(ValueError, match="HTTP 404"):
            fetch(asset_of(server), progress=False)
        server.content, server.etag = bytes(len(CONTENT)), etag and etag.replace("1", "2")
        assert fetch(asset_of(server), progress=False).read_bytes() == server.content
    assert server.log[-1][1:] == (200, len(CONTENT))


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {}], ids=["sha256", "unknown"])
def test_a_part_that_is_whole_or_too_long(cache, known):
    """As a kill between the last byte and the final name leaves it, or an earlier version."""
    for surplus in (b"", b"more"):
        (cache / NAME).unlink(missing_ok=True)
        cache.mkdir(exist_ok=True)
        (cache / f"{NAME}.part").write_bytes(CONTENT + surplus)
        with serving() as server:
            assert fetch(asset_of(server, **known), progress=False).read_bytes() == CONTENT


def test_a_whole_part_of_known_size_needs_no_server(cache):
    cache.mkdir()
    (cache / f"{NAME}.part").write_bytes(CONTENT)
    assert fetch(whole(closed_port()), progress=False).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("known", "content", "reason"),
    [
        ({"sha256": SHA256}, ALTERED, f"its checksum is sha256:.* and not sha256:{SHA256}"),
        ({"md5": hashlib.md5(CONTENT).hexdigest()}, ALTERED, "its checksum is md5:.* and not md5:"),
        ({"size": len(CONTENT)}, CONTENT[:-1], "it has 999999 bytes and not 1000000"),
        ({"size": len(CONTENT)}, CONTENT + b"1", "it has 1000001 bytes and not 1000000"),
    ],
    ids=["one bit, sha256", "one bit, md5", "a byte less", "a byte more"],
)
def test_another_file_is_refused(cache, known, content, reason):
    with serving(content) as server:
        with pytest.raises(ValueError, match=rf"from {server.url} \({reason}"):
            fetch(asset_of(server, **known), progress=False)
    assert only_guards(cache)


def test_a_busy_server_is_asked_again():
    with serving(plan=[503, 503]) as server:
        assert fetch(whole(server), progress=False).read_bytes() == CONTENT
    assert [status for _, status, _ in server.log] == [503, 503, 200]


def test_waiting_times_grow(monkeypatch):
    waits = []
    monkeypatch.setattr(files, "BACKOFF", 1.0)
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    with serving(plan=[503] * files.TRIES) as server:
        with pytest.raises(ValueError, match="HTTP 503"):
            fetch(whole(server), progress=False)
    assert waits == [1, 2, 4] and len(server.log) == files.TRIES


@pytest.mark.parametrize("first", ["dead", "gone", "altered", "breaks off"])
def test_the_next_mirror_is_tried(cache, first):
    plan = {"gone": [404], "breaks off": [200_000] * files.TRIES}.get(first, [])
    with serving(ALTERED if first == "altered" else CONTENT, plan) as bad, serving() as good:
        asset = whole(closed_port() if first == "dead" else bad, good)
        assert fetch(asset, progress=False).read_bytes() == CONTENT
    assert len(good.log) == 1
    assert len(bad.log) == {"dead": 0, "breaks off": files.TRIES}.get(first, 1)
    if first == "breaks off":  # and goes on where the first one stopped
        assert good.log[0][1] == 206


def test_without_a_network_one_sentence_says_what_to_do(cache):
    urls = closed_port(), closed_port()
    with pytest.raises(ValueError) as caught:
        fetch(whole(*urls), progress=False)
    assert str(caught.value) == (
        f"{NAME} could not be downloaded from {urls[0]} (ConnectionError) or {urls[1]} "
        f"(ConnectionError); try again, or place the file by hand at {cache / NAME}."
    )
    assert only_guards(cache)


def test_the_first_download_pins_what_nobody_publishes(cache):
    with serving() as server:
        path = fetch(asset_of(server), progress=False)
        lock = cache / "checksums.lock"
        size, modified = path.stat().st_size, path.stat().st_mtime_ns
        assert lock.read_text() == f"sha256:{SHA256} {size} {modified} {NAME}\n"
        path.unlink()
        server.content = ALTERED
        remedy = f"to accept the change, delete the line of {NAME} in {lock}"
        with pytest.raises(ValueError, match=re.escape(remedy)):
            fetch(asset_of(server), progress=False)
        assert not path.exists() and not (cache / f"{NAME}.part").exists()
        lock.write_text("")  # the deliberate acceptance
        assert fetch(asset_of(server), progress=False).read_bytes() == ALTERED
        path.write_bytes(CONTENT)  # and a change on the disk
        with pytest.raises(ValueError, match=re.escape(remedy)):
            fetch(asset_of(server), progress=False)
        assert path.read_bytes() == CONTENT


def test_a_checksum_published_later_counts_more_than_the_pin(cache):
    with serving(ALTERED) as server:
        path = fetch(asset_of(server), progress=False)
        with pytest.raises(ValueError, match=f"not sha256:{SHA256}; delete the file"):
            fetch(asset_of(server, sha256=SHA256), progress=False)
        server.content = CONTENT
        path.unlink()
        assert fetch(asset_of(server, sha256=SHA256), progress=False).read_bytes() == CONTENT
    assert (cache / "checksums.lock").read_text().startswith(f"sha256:{SHA256} ")


def test_a_file_placed_by_hand_is_verified_and_pinned(cache):
    cache.mkdir()
    path = cache / NAME
    path.write_bytes(ALTERED)
    with pytest.raises(ValueError) as caught:
        fetch(whole(closed_port()), progress=False)
    altered = hashlib.sha256(ALTERED).hexdigest()
    assert str(caught.value) == (
        f"The file {path} is not the right one, its checksum is sha256:{altered} and not "
        f"sha256:{SHA256}; delete the file to have it downloaded again."
    )
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="it has 999999 bytes and not 1000000; delete"):
        fetch(whole(closed_port()), progress=False)
    path.write_bytes(CONTENT)
    assert fetch(whole(closed_port()), progress=False) == path
    assert fetch(asset_of(closed_port()), progress=False) == path  # pinned above
    path.write_bytes(ALTERED)
    with pytest.raises(ValueError, match="as when it was pinned"):
        fetch(asset_of(closed_port()), progress=False)


def test_a_verified_file_is_hashed_again_only_after_it_was_touched(cache, monkeypatch):
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: hashed.append(1) or digest(*a))
    with serving() as server:
        for _ in range(3):
            path = fetch(whole(server), progress=False)
        assert len(hashed) == 1
        os.utime(path, ns=(0, 0))
        fetch(whole(server), progress=False)
        fetch(whole(server), progress=False)
    assert len(hashed) == 2


@pytest.mark.parametrize("line", ["sha256:0", "sha256:0 a b c", "0 1 2 c", "sha1:0 1 2 c", "\xe9"])
def test_a_spoilt_lock_file_is_named(cache, line):
    cache.mkdir()
    (cache / "checksums.lock").write_text(f"{line}\n", "latin-1")
    with pytest.raises(ValueError, match="A line of .*checksums.lock must be checksum, size, time"):
        fetch(whole(closed_port()), progress=False)


@pytest.mark.parametrize(
    "edited",
    [
        "\n{0}\n\n{1}\n",
        "# by hand\n{0}\n   # and\n{1}\n",
        "{0}\r\n{1}\r\n",
        "  {0} \t\n{1}   \n\t\n",
        "\ufeff{0}\n{1}",
        "{0}\n{1}\n{1}\n",
    ],
    ids=["blank lines", "comments", "CRLF", "spaces", "byte order mark", "twice"],
)
def test_a_lock_file_that_an_editor_touched_is_read(cache, edited):
    others = [f"{i}.npz" for i in (1, 2)]
    with serving(CONTENT[:1000]) as server:
        for name in others:
            fetch(replace(asset_of(server), name=name), progress=False)
    lock = cache / "checksums.lock"
    text = edited.format(*lock.read_text().splitlines())
    lock.write_bytes(text.encode())
    for name in others:  # no server: these are known to be right
        assert fetch(replace(asset_of(closed_port()), name=name), progress=False) == cache / name
    with serving() as server:
        fetch(asset_of(server), progress=False)
    lines = lock.read_text().splitlines()
    assert [line.split()[-1] for line in lines if line.endswith((".npz", ".pt"))][-1] == NAME
    assert [line for line in lines if line.startswith("#")] == [
        line.strip() for line in text.splitlines() if "#" in line
    ]
    for name in (NAME, *others):
        assert fetch(replace(asset_of(closed_port()), name=name), progress=False) == cache / name


# --- a file system without locks ----------------------------------------------------------------


@pytest.fixture(params=["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def without_locks(request, monkeypatch):
    def flock(*_):
        raise OSError(getattr(errno, request.param), "no locks")

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.mark.filterwarnings("ignore:flock not supported")  # of filelock, which has a way for ENOSYS
def test_a_file_system_without_locks_will_do(cache, without_locks):
    with serving(plan=[300_000]) as server:
        assert fetch(asset_of(server), progress=False).read_bytes() == CONTENT
        assert fetch(asset_of(server), progress=False) == cache / NAME
    assert [status for _, status, _ in server.log] == [200, 206]
    assert (cache / "checksums.lock").read_text().startswith(f"sha256:{SHA256} ")
    with pytest.raises(ValueError, match="HTTP 404"), serving(plan=[300_000, 404]) as server:
        fetch(replace(asset_of(server), name="b"), progress=False)
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_without_locks_two_downloads_at_once_do_not_mix(cache, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", flock)
    found = []
    with serving(plan=[-400_000]) as server:
        asset = asset_of(server)
        first = threading.Thread(target=lambda: found.append(fetch(asset, progress=False)))
        first.start()
        assert server.reached.wait(20)
        assert fetch(asset, progress=False).read_bytes() == CONTENT
        server.go.set()
        first.join()
    assert found == [cache / NAME] and found[0].read_bytes() == CONTENT


def test_other_troubles_with_the_cache_get_one_sentence(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    with serving() as server:
        with monkeypatch.context() as patch:
            patch.setattr("fcntl.flock", flock)
            with pytest.raises(
                OSError, match=r"cannot be kept in .*\(Input/output error\); set AMED"
            ):
                fetch(whole(server), progress=False)
        (tmp_path / "file").touch()
        monkeypatch.setenv("AMED_DATA", str(tmp_path / "file"))
        with pytest.raises(
            OSError, match=f"{NAME} cannot be kept in .*file .*; set AMED_DATA to a"
        ):
            fetch(whole(server), progress=False)
    assert server.asked == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is full")
def test_a_full_disk_gets_one_sentence(cache):
    cache.mkdir()
    (cache / f"{NAME}.part").symlink_to("/dev/full")
    with serving() as server:
        with pytest.raises(OSError, match=f"No space is left for {NAME} in {cache}, where"):
            fetch(whole(server), progress=False)
    assert not (cache / NAME).exists() and not (cache / "checksums.lock").exists()


@pytest.mark.parametrize("progress", [True, False])
def test_licence_and_size_are_announced_before_a_large_download(capsys, monkeypatch, progress):
    monkeypatch.setattr(files, "LARGE", len(CONTENT) - 1)
    with serving(plan=[300_000]) as server:
        fetch(whole(server), progress=progress)
    printed = capsys.readouterr()
    assert printed.out == f"{NAME}: 0.0 GB, licence MIT\n"
    assert (NAME in printed.err and "100%" in printed.err) == progress


def test_a_small_download_announces_nothing(capsys, monkeypatch):
    monkeypatch.setattr(files, "LARGE", len(CONTENT))
    with serving(plan=[300_000], ranges=False) as server:
        fetch(whole(server), progress=False)
    assert capsys.readouterr() == ("", "")


# --- answers that are not the file ----------------------------------------------------------------


class Answers(BaseHTTPRequestHandler):
    """Gives the answers of ``server.plan`` one by one, and the last one ever after.

    An answer is a status, headers and a body; the headers have all that is sent. The connection is
    closed at its end.
    """

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.asked += 1
        server.log.append(self.headers["Range"])
        status, headers, body = server.plan[0]
        if len(server.plan) > 1:
            server.plan.popleft()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:  # the other side is gone
            pass


def answering(*plan):
    return serving(plan=plan, handler=Answers)


def answer(body=CONTENT, status=200, **headers):
    """An answer with its length, unless other headers are given; ``_`` in names is a hyphen."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"Content-Length": len(body), "ETag": '"1"'} | headers, body


def span(begin, end=1_000_000, **headers):
    """A well-formed answer with the bytes from ``begin`` to before ``end``."""
    said = {"Content_Range": f"bytes {begin}-{end - 1}/1000000"}
    return answer(CONTENT[begin:end], 206, **said | headers)


def half_of_it(cache, asset):
    """The length of a part that an earlier call left."""
    with serving(plan=[300_000, 404]) as server:
        with pytest.raises(ValueError, match="HTTP 404"):
            fetch(replace(asset, urls=(server.url,)), progress=False)
    return (cache / f"{NAME}.part").stat().st_size


PAGE = b"<!DOCTYPE html>\n<html><body>Please log in.</body></html>"
BINARY = {"Content_Type": "application/octet-stream"}
KNOWN = pytest.mark.parametrize("known", [{"sha256": SHA256}, {}], ids=["sha256", "unknown"])


@KNOWN
@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (answer(PAGE, Content_Type="text/html; charset=utf-8"), "web page"),
        (answer(PAGE, **BINARY), "web page"),
        (answer(PAGE), "web page"),
        (answer(b"\xef\xbb\xbf \r\n" + PAGE.lower()), "web page"),
        (answer(b"<?xml version='1.0'?><Error><Code>Expired</Code></Error>", **BINARY), "web page"),
        (answer(b'{"error": "expired"}', **BINARY), "web page"),
        (answer(CONTENT, Content_Type="TEXT/HTML"), "web page"),
        (answer(CONTENT, Content_Type="application/problem+json"), "web page"),
        (answer(PAGE, 206, Content_Range=f"bytes 0-{len(PAGE) - 1}/{len(PAGE)}"), "web page"),
        (answer(b""), "it is empty"),
        ((200, {}, b""), "it is empty"),
        (answer(b"", 204), "HTTP 204"),
        (answer(b"", 304), "HTTP 304"),
        (answer(PAGE, 300), "web page|HTTP 300"),
        (answer(CONTENT, Content_Encoding="gzip"), "encoding gzip"),
    ],
    ids=str,
)
def test_what_is_no_file_is_refused_and_not_pinned(cache, known, said, reason):
    with answering(said) as server:
        with pytest.raises(ValueError, match=rf"could not be downloaded from .* \(.*({reason})"):
            fetch(asset_of(server, **known), progress=False)
        assert server.asked == 1  # it would be no other one the next time
    assert only_guards(cache)
    with serving() as server:  # and the right file is taken ever after
        assert fetch(asset_of(server, **known), progress=False).read_bytes() == CONTENT


@KNOWN
def test_the_mirror_of_a_login_page_is_tried(known):
    with answering(answer(PAGE)) as bad, serving() as good:
        assert fetch(asset_of(bad, good, **known), progress=False).read_bytes() == CONTENT


@KNOWN
@pytest.mark.parametrize("said", [answer(PAGE), answer(CONTENT, Content_Type="text/html")])
def test_a_page_does_not_take_the_place_of_half_a_file(cache, known, said):
    kept = half_of_it(cache, asset_of(**known))
    with answering(said) as server:
        with pytest.raises(ValueError, match="web page"):
            fetch(asset_of(server, **known), progress=False)
    with serving() as server:
        assert fetch(asset_of(server, **known), progress=False).read_bytes() == CONTENT
    assert server.log == [(f"bytes={kept}-", 206, len(CONTENT) - kept)]


def test_a_page_placed_by_hand_is_refused(cache):
    cache.mkdir()
    for content, reason in ((PAGE, "it is a web page"), (b"", "it is empty")):
        (cache / NAME).write_bytes(content)
        with pytest.raises(ValueError, match=f"{NAME} is not the right one, {reason}.*; delete"):
            fetch(asset_of(closed_port()), progress=False)
    assert not (cache / "checksums.lock").exists()


@KNOWN
@pytest.mark.parametrize(
    "said",
    [
        lambda kept: answer(CONTENT, 206),
        lambda kept: answer(CONTENT, 206, Content_Range=f"bytes {kept}-999999/1000000"),
        lambda kept: answer(CONTENT, 206, Content_Range="bytes 0-999999/1000000"),
        lambda kept: (206, {"Content-Range": f"bytes {kept}-999999/1000000"}, CONTENT),
        lambda kept: (206, {}, CONTENT),
        lambda kept: span(kept - 1),
        lambda kept: span(kept + 1),
        lambda kept: answer(CONTENT[kept:], 206, Content_Range="bytes=1/2"),
        lambda kept: span(kept, 400_000),  # and the next request is for what is lacking then
        lambda kept: answer(CONTENT),
        lambda kept: span(kept, ETag='"2"'),
        lambda kept: answer(ALTERED[kept:], 206, Content_Range=f"bytes {kept}-999999/1000001"),
        lambda kept: answer(b"", 416, Content_Range="bytes */1000"),
        lambda kept: answer(b"", 416),
    ],
    ids=[
        "whole without a range",
        "whole as if it were the rest",
        "whole and says so",
        "whole of no length as if it were the rest",
        "whole of no length without a range",
        "begins before",
        "begins behind",
        "no range",
        "less than the rest",
        "status 200",
        "of another version",
        "of a file of another length",
        "beyond the end",
        "beyond an end",
    ],
)
def test_a_range_is_what_was_asked_for_or_the_file_is_begun_anew(cache, known, said):
    kept = half_of_it(cache, asset_of(**known))
    part_of_it = said(kept) == span(kept, 400_000)
    with answering(said(kept), span(400_000) if part_of_it else answer()) as server:
        assert fetch(asset_of(server, **known), progress=False).read_bytes() == CONTENT
    whole_at_once = said(kept)[0] == 200 or said(kept)[1].get("Content-Range", "")[6:8] == "0-"
    then = [] if whole_at_once else ["bytes=400000-" if part_of_it else None]
    assert server.log == [f"bytes={kept}-", *then]


@KNOWN
def test_a_server_that_names_no_range_is_believed_by_the_length(cache, known):
    kept = half_of_it(cache, asset_of(**known))
    with answering(answer(CONTENT[kept:], 206)) as server:
        assert fetch(asset_of(server, **known), progress=False).read_bytes() == CONTENT
    assert server.asked == 1


@KNOWN
@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (answer(CONTENT, 206), "HTTP 206 with another range"),
        (answer(CONTENT, 206, Content_Range="bytes 5-1000004/1000005"), "HTTP 206 with another"),
        (span(0, 500_000), "HTTP 206 with another range|500000 bytes came of 1000000"),
        (answer(b"", 416), "HTTP 416"),
        (answer(b"", 416, Content_Range="bytes */0"), "HTTP 416"),
    ],
)
def test_a_server_of_odd_ranges_is_given_up(cache, known, said, reason):
    with answering(said) as server:
        with pytest.raises(ValueError, match=reason):
            fetch(asset_of(server, **known), progress=False)
        assert server.asked == files.TRIES
    assert not (cache / NAME).exists() and not (cache / "checksums.lock").exists()
    with serving() as server:
        assert fetch(asset_of(server, **known), progress=False).read_bytes() == CONTENT


def test_a_part_that_the_server_says_is_whole_is_not_sent_again(cache):
    """As a kill between the last byte and the final name leaves it."""
    cache.mkdir()
    (cache / f"{NAME}.part").write_bytes(CONTENT)
    (cache / f"{NAME}.part.etag").write_text('1000000 "1"')
    with serving() as server:
        assert fetch(asset_of(server), progress=False).read_bytes() == CONTENT
    assert server.log == [(f"bytes={len(CONTENT)}-", 416, 0)]


@pytest.mark.parametrize("about", ["", '"1"', " ", "x y"])
def test_a_part_of_which_nothing_is_known_is_sent_again(cache, about):
    cache.mkdir()
    (cache / f"{NAME}.part").write_bytes(ALTERED[:500_001])
    (cache / f"{NAME}.part.etag").write_text(about)
    with serving(etag='"2"') as server:
        assert fetch(asset_of(server), progress=False).read_bytes() == CONTENT


def test_a_file_of_another_length_is_refused_before_it_is_sent(cache):
    endless = (200, {"Content-Length": 10**12}, CONTENT)
    with answering(endless) as server:
        with pytest.raises(ValueError, match="it has 1000000000000 bytes and not 1000000"):
            fetch(whole(server), progress=False)
        assert server.asked == 1
    assert only_guards(cache)


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {"size": len(CONTENT)}, {"read": "npz"}])
def test_a_body_without_a_length_that_breaks_off_is_refused(cache, known):
    content = CONTENT
    if "read" in known:
        file = io.BytesIO()
        np.savez(file, mu=np.zeros(3), sigma=np.eye(3))
        content, known = file.getvalue(), {"read": files.read_statistics}
    with answering((200, {}, content[:-100]), (200, {}, content)) as server:
        with pytest.raises(ValueError, match="its checksum is|bytes and not|it cannot be read"):
            fetch(asset_of(server, **known), progress=False)
        assert only_guards(cache)
        assert fetch(asset_of(server, **known), progress=False).read_bytes() == content


# --- what is pinned is what can be read -----------------------------------------------------------


UNPUBLISHED = [asset for asset in ASSETS.values() if not asset.checksum]


@pytest.mark.parametrize("asset", UNPUBLISHED, ids=lambda asset: asset.name)
def test_what_the_loader_cannot_read_is_not_pinned(cache, asset):
    """A plain text, say, of a server that says it with status 200."""
    with serving(b"Too many requests, try again later.") as server:
        asset = replace(asset, urls=(server.url,))
        with pytest.raises(ValueError, match=f"{asset.name} could not be .*it cannot be read: The"):
            fetch(asset, progress=False)
    assert not (cache / asset.name).exists() and not (cache / "checksums.lock").exists()
    (cache / asset.name).parent.mkdir(exist_ok=True)
    (cache / asset.name).write_bytes(CONTENT)
    with pytest.raises(
        ValueError, match=f"{asset.name} is not the right one, it cannot .*; delete"
    ):
        fetch(asset, progress=False)
    assert not (cache / "checksums.lock").exists()


@pytest.fixture
def published(request, monkeypatch):
    """The networks of three data sets in small, as their publishers' files have them."""
    least = TINY | {"img_resolution": 4, "attn_resolutions": (2,)}
    monkeypatch.setattr(adm, "_LSUN", adm._LSUN | least)
    monkeypatch.setattr(adm, "_IMAGENET", adm._IMAGENET | least | {"label_dim": 5})
    monkeypatch.setattr(adm, "_CLASSIFIER", adm._CLASSIFIER | least | {"label_dim": 5})

    def saved(state):
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    write_pickle = request.getfixturevalue("write")
    edm = write_pickle(small_network("EDMPrecond", SONG), SONG).read_bytes()
    consistency = saved(reference(least, scale_shift=False, order="qkv", dims=2)[1])
    diffusion = saved(reference(least, out=6, classes=5)[1])
    classifier = saved(reference(least, out=5, pools=True)[1])
    contents = {"afhqv2": [edm], "lsun_cat": [consistency], "imagenet256": [diffusion, classifier]}
    # what can be read, but is another network
    other = {"afhqv2": consistency, "lsun_cat": classifier, "imagenet256": consistency}
    return contents, other


@pytest.mark.parametrize("name", ["afhqv2", "lsun_cat", "imagenet256"])
def test_checkpoints_are_pinned_once_their_network_is_made(cache, monkeypatch, published, name):
    contents, other = published
    assets = entries.DATASETS[name].assets[: len(contents[name])]
    lock = cache / "checksums.lock"
    with serving(other[name]) as server:
        for asset in assets:
            monkeypatch.setitem(ASSETS, asset, replace(ASSETS[asset], urls=(server.url,)))
        with pytest.raises(ValueError, match="it cannot be read: "):
            loaders._load.__wrapped__(name, "cpu")
        assert not lock.exists()
    with ExitStack() as servers:
        for asset, content in zip(assets, contents[name], strict=True):
            url = servers.enter_context(serving(content)).url
            monkeypatch.setitem(ASSETS, asset, replace(ASSETS[asset], urls=(url,)))
        data = loaders._load.__wrapped__(name, "cpu")
    assert sorted(line.split()[-1] for line in lock.read_text().splitlines()) == sorted(assets)
    assert data.fingerprint == files.fingerprint(assets)
    again = loaders._load.__wrapped__(name, "cpu")  # no server: they are there
    x, t = torch.ones(2, 3, 4, 4), torch.tensor(1.0)
    if name == "afhqv2":
        x = torch.ones(2, SONG["img_channels"], 8, 8)
    labels = data.labels and data.labels(range(2))
    assert torch.equal(data.denoiser(x, t, labels), again.denoiser(x, t, labels))


def test_what_can_be_read_is_pinned_and_loaded(cache):
    file = io.BytesIO()
    np.savez(file, mu=np.arange(3.0), sigma=np.eye(3))
    with serving(file.getvalue()) as server:
        asset = replace(ASSETS["fid-refs/afhqv2-64x64.npz"], urls=(server.url,))
        assert load(asset).mean.tolist() == [0, 1, 2]
        assert load(asset).covariance.tolist() == np.eye(3).tolist()
    assert server.asked == 1
    assert (cache / "checksums.lock").read_text().endswith(f" {asset.name}\n")


def test_a_file_that_was_pinned_unread_is_named_with_its_line(cache):
    """As earlier versions of the library did with a login page."""
    asset = replace(ASSETS["fid-refs/afhqv2-64x64.npz"], urls=(closed_port(),))
    path = cache / asset.name
    path.parent.mkdir(parents=True)
    path.write_bytes(PAGE)
    size, modified = path.stat().st_size, path.stat().st_mtime_ns
    digest = hashlib.sha256(PAGE).hexdigest()
    lock = cache / "checksums.lock"
    lock.write_text(f"sha256:{digest} {size} {modified} {asset.name}\n")
    with pytest.raises(ValueError) as caught:
        load(asset)
    remedy = f"delete the file {path} and the line of {asset.name} in {lock}."
    assert str(caught.value).startswith(f"The file {path} is not a whole npz file")
    assert str(caught.value).endswith(remedy)


def test_the_cache_is_where_amed_data_says(tmp_path, monkeypatch):
    monkeypatch.setenv("AMED_DATA", str(tmp_path / "else/where"))
    with serving() as server:
        path = fetch(replace(whole(server), name="fid-refs/a.npz"), progress=False)
    assert path == tmp_path / "else/where/fid-refs/a.npz" and path.read_bytes() == CONTENT
    monkeypatch.delenv("AMED_DATA")
    assert files.cache_folder() == DATA / "cache"


def test_the_registry():
    wanted = {name for entry in entries.DATASETS.values() for name in entry.assets}
    assert set(ASSETS) == wanted | {loaders.INCEPTION, loaders.VGG}
    for name, asset in ASSETS.items():
        assert asset.name == name and asset.licence
        assert asset.checksum or asset.read
        assert asset.urls and all(url.startswith("https://") for url in asset.urls)
        assert asset.urls[0].endswith(f"/{name}")
        assert asset.sha256 is None or re.fullmatch("[0-9a-f]{64}", asset.sha256)
        assert asset.md5 is None or re.fullmatch("[0-9a-f]{32}", asset.md5)
    # Its publishers put the first digits of the checksum into the name.
    inception = ASSETS["weights-inception-2015-12-05-6726825d.pth"]
    assert inception.sha256.startswith("6726825d")
    assert all(url.endswith("inception-2015-12-05-6726825d.pth") for url in inception.urls)
