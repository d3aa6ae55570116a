"""Downloads, from a server on this machine that can be told to misbehave."""

import hashlib
import multiprocessing
import os
import random
import re
import socket
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from amedlib.datasets import entries, files, loaders
from amedlib.datasets.files import ASSETS, DATA, Asset, fetch

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
def serving(content=CONTENT, plan=(), ranges=True, etag='"1"'):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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


def test_a_spoilt_lock_file_is_named(cache):
    cache.mkdir()
    (cache / "checksums.lock").write_text("sha256:0\n")
    with pytest.raises(ValueError, match="A line of .*checksums.lock must be checksum, size, time"):
        fetch(whole(closed_port()), progress=False)


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
        assert asset.urls and all(url.startswith("https://") for url in asset.urls)
        assert asset.urls[0].endswith(f"/{name}")
        assert asset.sha256 is None or re.fullmatch("[0-9a-f]{64}", asset.sha256)
        assert asset.md5 is None or re.fullmatch("[0-9a-f]{32}", asset.md5)
    # Its publishers put the first digits of the checksum into the name.
    inception = ASSETS["weights-inception-2015-12-05-6726825d.pth"]
    assert inception.sha256.startswith("6726825d")
    assert all(url.endswith("inception-2015-12-05-6726825d.pth") for url in inception.urls)
