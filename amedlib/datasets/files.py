"""The files of the paper's data sets: where they are published, downloaded once and verified.

They lie in one folder, see ``cache_folder``. A file gets its name there only after its size and
checksum were found right. ``checksums.lock`` beside the files has a line for each, "checksum, size,
time of modification in ns, name": a checksum that nobody publishes is pinned there by the first
download that could be read, and a file that still has the size and time of its line is not hashed
again. Blank lines and those that begin with # are left alone.

Of our own, since pooch begins a download that broke off from its first byte. What only downloads
need is imported there: the embedded data sets make do without.
"""

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from amedlib.checks import of_the_study, require
from amedlib.datasets.checkpoints import edm_network, load_pt
from amedlib.datasets.inception import read_statistics
from amedlib.denoisers import adm
from amedlib.files import write_atomically

LOCK_FILE = "checksums.lock"
TRIES = 4  # per address
BACKOFF = 1.0  # seconds before the second try; twice as many before each further one
TIMEOUT = (10, 60)  # seconds to connect, and without a byte
CHUNK = 1 << 16  # bytes; what a broken connection loses at most
LARGE = 10**9  # bytes from which on licence and size are announced
TRANSIENT = (408, 416, 429, 500, 502, 503, 504)  # HTTP statuses that may be different next time
# What fcntl.flock says where the file system has no locks, as some of clusters.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
NO_DATA = "it is a web page or a message, such as a login form, and no data"
# How such begin; no file of data does.
PAGE = re.compile(rb"""(\xef\xbb\xbf)?\s*(<[a-z!?]|\{\s*")""", re.IGNORECASE)

# What comes with the project: beside the library in a clone, inside it where it was installed.
_INSIDE = Path(__file__).resolve().parents[1] / "data"
INSTALLED = _INSIDE.is_dir()
DATA = _INSIDE if INSTALLED else _INSIDE.parents[1] / "data"


@dataclass(frozen=True)
class Asset:
    """A published file.

    Attributes:
        name: its path in the cache folder.
        urls: its addresses, in the order in which they are tried.
        licence: in a few words.
        size: in bytes, or None where it is not known.
        sha256: hexadecimal, or None where it is not published.
        md5: the same; counts only without ``sha256``.
        read: what makes of the file what is in it, and raises ``ValueError`` where it is another
            one. A checksum that is not published is pinned after that.
    """

    name: str
    urls: tuple[str, ...]
    licence: str
    size: int | None = None
    sha256: str | None = None
    md5: str | None = None
    read: Callable | None = None

    @property
    def checksum(self) -> str | None:
        """The published checksum as "algorithm:digest", or None."""
        if self.sha256:
            return f"sha256:{self.sha256}"
        return f"md5:{self.md5}" if self.md5 else None


# Licences, as these say: the README of NVlabs/edm, of all its material; the READMEs of
# openai/consistency_models and NVlabs/edm, of guided-diffusion with its statistics; torch-fidelity,
# of its code and of the origin of the weights, tensorflow/models.
_GITHUB = "https://github.com"
_REFERENCES = "diffusion/jul-2021/ref_batches"


def _of_pt(build: Callable) -> Callable:
    return lambda path: build(load_pt(path))


def _edm(path: str, read=edm_network, **known) -> Asset:
    url = f"https://nvlabs-fi-cdn.nvidia.com/edm/{path}"
    licence = "CC BY-NC-SA 4.0 (NVIDIA)"
    return Asset(path.removeprefix("pretrained/"), (url,), licence, read=read, **known)


def _openai(path: str, read=read_statistics, **known) -> Asset:
    url = f"https://openaipublic.blob.core.windows.net/{path}"
    return Asset(Path(path).name, (url,), "MIT (OpenAI)", read=read, **known)


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        _edm(
            "pretrained/edm-cifar10-32x32-uncond-vp.pkl",
            sha256="4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da",
        ),
        _edm(
            "pretrained/edm-ffhq-64x64-uncond-vp.pkl",
            size=247_513_128,
            sha256="f6f8f24a2b46ae79807b0f919e2550c6ed37cc3f8b7a2100629092cad9b5d2f5",
        ),
        _edm("pretrained/edm-afhqv2-64x64-uncond-vp.pkl"),
        _edm("pretrained/edm-imagenet-64x64-cond-adm.pkl"),
        _edm("fid-refs/cifar10-32x32.npz", read_statistics),
        _edm(
            "fid-refs/ffhq-64x64.npz",
            read_statistics,
            size=33_571_316,
            sha256="c78359df3b784dd472ff1ec53beefd9aeae9dace7df592128ed6b9d0c9f09c47",
        ),
        _edm("fid-refs/afhqv2-64x64.npz", read_statistics),
        # not the -baseline one, which is of other weights
        _edm("fid-refs/imagenet-64x64.npz", read_statistics),
        _openai(
            "consistency/edm_bedroom256_ema.pt",
            _of_pt(adm.cm_denoiser),
            size=2_105_395_349,
            sha256="5947bb5ae7b664feef1796ebe0a531efcf689d76e81d03ba88159dd8019b674f",
        ),
        _openai("consistency/edm_cat256_ema.pt", _of_pt(adm.cm_denoiser)),
        _openai("diffusion/jul-2021/256x256_diffusion.pt", _of_pt(adm.adm_denoiser)),
        _openai("diffusion/jul-2021/256x256_classifier.pt", _of_pt(adm.adm_classifier)),
        _openai(
            f"{_REFERENCES}/lsun/bedroom/VIRTUAL_lsun_bedroom256.npz",
            size=1_054_074_338,
            md5="765035466f3da1de10de3b72ff1a361b",
        ),
        _openai(f"{_REFERENCES}/lsun/cat/VIRTUAL_lsun_cat256.npz"),
        _openai(f"{_REFERENCES}/imagenet/256/VIRTUAL_imagenet256_labeled.npz"),
        Asset(
            "weights-inception-2015-12-05-6726825d.pth",
            (  # the same file under two names
                f"{_GITHUB}/toshas/torch-fidelity/releases/download/v0.2.0/"
                "weights-inception-2015-12-05-6726825d.pth",
                f"{_GITHUB}/mseitzer/pytorch-fid/releases/download/fid_weights/"
                "pt_inception-2015-12-05-6726825d.pth",
            ),
            "Apache-2.0",
            size=95_628_359,
            sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        ),
        Asset(  # the backbone of LPIPS
            "vgg16-397923af.pth",
            ("https://download.pytorch.org/models/vgg16-397923af.pth",),
            "BSD-3-Clause (torchvision)",
            size=553_433_881,
            sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        ),
    )
}


def cache_folder() -> Path:
    """``AMED_DATA`` of the environment, else ``data/cache`` of the clone, or the user's cache."""
    default = "~/.cache/amedlib" if INSTALLED else DATA / "cache"
    return Path(os.environ.get("AMED_DATA") or default).expanduser().absolute()


def fetch(asset: Asset, progress: bool = True) -> Path:
    """The verified file of ``asset``, which is downloaded unless it is there.

    A download that was cut off goes on where it stopped, in this call or in a later one. A file
    placed by hand is verified in the same way. Processes that want the same file wait for one of
    them to download it; where the file system has no locks, each downloads it for itself, from its
    first byte.

    Args:
        asset: for example ``ASSETS["edm-cifar10-32x32-uncond-vp.pkl"]``.
        progress: show a progress bar.

    Raises:
        ValueError: no address gave the file; or the file is not the one that was published or
            pinned by the first download, or cannot be read.
        OSError: the disk is full, or the cache folder cannot be written.
    """
    folder = cache_folder()
    path = folder / asset.name
    if _is_verified(asset, folder):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path) as part:
            if path.exists():  # placed by hand, or by a process that was faster
                try:
                    checksum = _verify(asset, path, folder)
                except ValueError as error:
                    raise ValueError(
                        f"The file {path} is not the right one, {error}; "
                        "delete the file to have it downloaded again."
                    ) from None
            else:
                checksum = _download(asset, path, part, folder, progress)
            _record(asset.name, checksum, folder)
    except OSError as error:
        reason = (
            f"{asset.name} cannot be kept in {folder} ({error.strerror or error}); set AMED_DATA "
            "to a folder that can be written"
        )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = (
                f"No space is left for {asset.name} in {folder}, where the part that was "
                "downloaded is kept; free some, or set AMED_DATA to a folder on another disk"
            )
        raise OSError(error.errno, reason) from None
    return path


def load(asset: Asset):
    """What is in the file of ``asset``, which is fetched: what ``asset.read`` makes of it.

    Raises:
        ValueError: as ``fetch``; or the file was pinned once, and cannot be read.
    """
    path = fetch(asset)
    try:
        return asset.read(path)
    except ValueError as error:
        if asset.checksum:
            raise
        raise ValueError(
            f"{error} To have another one downloaded, delete the file {path} and the line of "
            f"{asset.name} in {cache_folder() / LOCK_FILE}."
        ) from error


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """One process at a time is in here for the same path; yields where to download to."""
    lock = FileLock(f"{path}.guard")
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter of filelock, for ENOSYS
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        # Nobody else writes to the same file, at the price of never going on with one.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as own:
            yield Path(own) / "part"
        return
    try:
        yield Path(f"{path}.part")
    finally:
        lock.release()


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _lines(folder: Path) -> list[tuple[str, str, str, str]]:
    """Name, checksum, stamp and text of the lock file's lines; of a comment, the text alone."""
    path, lines = folder / LOCK_FILE, []
    content = path.read_text("utf-8-sig", errors="replace") if path.exists() else ""
    for line in map(str.strip, content.splitlines()):
        name, checksum, stamp = "", "", ""
        if line and not line.startswith("#"):
            found = re.fullmatch(r"((?:sha256|md5):[0-9a-f]+)\s+(\d+)\s+(-?\d+)\s+(.+)", line)
            allowed = "checksum, size, time and name, and can be deleted if it is not"
            require(bool(found), f"A line of {path}", line, allowed)
            checksum, *times, name = found.groups()
            stamp = " ".join(times)
        lines.append((name, checksum, stamp, line))
    return lines


def _records(folder: Path) -> dict[str, tuple[str, str]]:
    """Checksum and stamp of the files that were verified, by their name."""
    return {name: (checksum, stamp) for name, checksum, stamp, _ in _lines(folder) if name}


def _record(name: str, checksum: str, folder: Path) -> None:
    with _alone(folder / LOCK_FILE):
        kept = [line for other, _, _, line in _lines(folder) if other != name]
        lines = [*kept, f"{checksum} {_stamp(folder / name)} {name}"]
        write_atomically(folder / LOCK_FILE, "".join(f"{line}\n" for line in lines).encode())


def _is_verified(asset: Asset, folder: Path) -> bool:
    """Whether the file was verified and has not been touched since; reads no file's content."""
    path = folder / asset.name
    record = _records(folder).get(asset.name)
    if record is None or not path.is_file():
        return False
    return record == (asset.checksum or record[0], _stamp(path))


def _verify(asset: Asset, path: Path, folder: Path) -> str:
    """Checksum of ``path``; ``ValueError`` with a clause that says why it is not the asset."""
    size = path.stat().st_size
    if asset.size not in (None, size):
        raise ValueError(f"it has {size} bytes and not {asset.size}")
    pinned, _ = _records(folder).get(asset.name, (None, None))
    expected = asset.checksum or pinned
    algorithm = expected.split(":")[0] if expected else "sha256"
    with open(path, "rb") as file:
        _refuse_page(file.read(CHUNK))
        file.seek(0)
        found = f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
    if expected not in (None, found):
        reason = f"its checksum is {found} and not {expected}"
        if not asset.checksum:
            reason += (
                " as when it was pinned (to accept the change, delete the line of "
                f"{asset.name} in {folder / LOCK_FILE})"
            )
        raise ValueError(reason)
    if not expected and asset.read:
        try:
            asset.read(path)
        except ValueError as error:
            raise ValueError(f"it cannot be read: {str(error).rstrip('.')}") from error
    return found


def _refuse_page(head: bytes) -> None:
    """``ValueError`` with a clause, unless a file of data may begin so."""
    if not head:
        raise ValueError("it is empty")
    if PAGE.match(head):
        raise ValueError(NO_DATA)


class _Again(ValueError):
    """An answer that is not what was asked for, and may be another one next time; a clause."""


def _download(asset: Asset, path: Path, part: Path, folder: Path, progress: bool) -> str:
    """Bring the file to ``path`` from the first address that has the right one; its checksum."""
    with of_the_study(f"The download of {asset.name}"):
        import requests
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

    failures = []
    for url in asset.urls:
        persistently = Retrying(
            retry=retry_if_exception(_is_transient),
            stop=stop_after_attempt(TRIES),
            wait=wait_exponential(multiplier=BACKOFF),
            reraise=True,
        )
        try:
            persistently(_append_rest, asset, url, part, progress)
        except requests.RequestException as error:
            answer = error.response
            reason = type(error).__name__ if answer is None else f"HTTP {answer.status_code}"
            failures.append(f"{url} ({reason})")
            continue
        except ValueError as error:  # of an answer: what is there of the file stays
            failures.append(f"{url} ({error})")
            continue
        try:
            checksum = _verify(asset, part, folder)
        except ValueError as error:
            failures.append(f"{url} ({error})")
            part.unlink()
            _etag(part).unlink(missing_ok=True)
        else:
            part.replace(path)
            _etag(part).unlink(missing_ok=True)
            return checksum
    raise ValueError(
        f"{asset.name} could not be downloaded from {' or '.join(failures)}; "
        f"try again, or place the file by hand at {path}."
    )


def _is_transient(error: BaseException) -> bool:
    import requests

    if not isinstance(error, requests.RequestException):
        return isinstance(error, _Again)
    return error.response is None or error.response.status_code in TRANSIENT


def _etag(part: Path) -> Path:
    """Beside a partial download, of which file it is: its length and version, as a server says."""
    return Path(f"{part}.etag")


def _append_rest(asset: Asset, url: str, part: Path, progress: bool) -> None:
    """Append to ``part`` what it lacks of ``url``, or write it anew where that cannot be had."""
    done = part.stat().st_size if part.exists() else 0
    if done and done == asset.size:
        return
    about = _etag(part).read_text() if done and _etag(part).exists() else ""
    length, _, etag = about.partition(" ")
    known = int(length) if length.isdecimal() else asset.size or 0
    with _ask(asset, url, done, etag) as response:
        if response.status_code == 416:
            if done and response.headers.get("Content-Range") == f"bytes */{done}":
                return  # nothing is lacking
            part.unlink(missing_ok=True)  # the file ends before: these bytes are not its own
        begin, total = _place(response, part, done, known, etag)
        if None not in (total, asset.size) and total != asset.size:
            raise ValueError(f"it has {total} bytes and not {asset.size}")
        # Raises where the body ends before Content-Length, which urllib3 1 does not notice.
        chunks = response.iter_content(CHUNK)
        head = next(chunks, b"")
        if not begin:  # before anything is written: no page takes the place of half a file
            _refuse_page(head)
        expected = total or asset.size
        if not begin and expected and expected > LARGE:
            print(f"{asset.name}: {expected / 1e9:.1f} GB, licence {asset.licence}", flush=True)
        shown = {"desc": asset.name, "unit": "B", "unit_scale": True, "disable": not progress}
        with (
            open(part, "ab" if begin else "wb") as file,
            tqdm(total=expected, initial=begin, **shown) as bar,
        ):
            if not begin:  # the part is empty now, so that tag and bytes cannot disagree
                tag = response.headers.get("ETag", "")
                tag = "" if tag.startswith("W/") else tag
                _etag(part).write_text(f"{expected or ''} {tag}")
            for chunk in chain([head], chunks):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    size = part.stat().st_size
    if total is not None and size != total:
        if size > total:
            part.unlink()
        raise _Again(f"{size} bytes came of {total}")


def _ask(asset: Asset, url: str, done: int, etag: str):
    """The answer of a server that is asked for what is behind the first ``done`` bytes."""
    import requests

    # The wire carries the file's own bytes, which a range counts.
    headers = {"Accept-Encoding": "identity"}
    # Without a checksum, only the server can tell that both halves are of the same version.
    if done and (etag or asset.checksum):
        headers["Range"] = f"bytes={done}-"
        if etag:
            headers["If-Range"] = etag
    return requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)


def _place(response, part: Path, done: int, known: int, etag: str) -> tuple[int, int | None]:
    """Where in the file an answer begins, and how long the file is, or None; by its headers.

    ``known`` and ``etag`` are what was said of length and version at first; 0 and "" for nothing.

    Raises:
        requests.HTTPError: the status is an error.
        ValueError: it is no answer with the file; a clause.
        _Again: it is another range than was asked for, or of another version. The part is deleted,
            so that the next request is for the whole file.
    """
    response.raise_for_status()
    headers, status = response.headers, response.status_code
    if re.search("html|xml|json", headers.get("Content-Type", ""), re.IGNORECASE):
        raise ValueError(NO_DATA)
    encoding = headers.get("Content-Encoding", "identity")
    if status not in (200, 206) or encoding != "identity":
        raise ValueError(f"HTTP {status}, encoding {encoding}")
    length = headers.get("Content-Length", "")
    length = int(length) if length.isdecimal() else None
    if status == 200:
        return 0, length
    said = headers.get("Content-Range", f"bytes {done}-{known - 1}/{known}")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", said)
    begin, last = map(int, found.groups()[:2]) if found else (None, None)
    if begin in (0, done) and length in (None, last - begin + 1):
        total = None if found[3] == "*" else int(found[3])
        other = etag and headers.get("ETag", etag) != etag or known and total not in (None, known)
        if not (begin and other):
            return begin, total
    part.unlink(missing_ok=True)
    raise _Again("HTTP 206 with another range, or of another version, than was asked for")


def fingerprint(names: Sequence[str]) -> str:
    """A hash of the verified checksums of files, by their names in ``ASSETS``.

    Raises:
        ValueError: one of them has not been fetched.
    """
    records = _records(cache_folder())
    for name in names:
        require(name in records, "the file", name, "fetched before its fingerprint is taken")
    return hashlib.sha256("".join(records[name][0] for name in names).encode()).hexdigest()[:12]
