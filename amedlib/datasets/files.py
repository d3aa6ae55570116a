"""The files of the paper's data sets: where they are published, downloaded once and verified.

They lie in one folder, see ``cache_folder``. A file gets its name there only after its size and
checksum were found right. ``checksums.lock`` beside the files has a line for each, "checksum, size,
time of modification in ns, name": a checksum that nobody publishes is pinned there by the first
download, and a file that still has the size and time of its line is not hashed again.

Of our own, since pooch begins a download that broke off from its first byte. What only downloads
need is imported there: the embedded data sets make do without.
"""

import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from amedlib.checks import of_the_study, require
from amedlib.files import write_atomically

LOCK_FILE = "checksums.lock"
TRIES = 4  # per address
BACKOFF = 1.0  # seconds before the second try; twice as many before each further one
TIMEOUT = (10, 60)  # seconds to connect, and without a byte
CHUNK = 1 << 16  # bytes; what a broken connection loses at most
LARGE = 10**9  # bytes from which on licence and size are announced
TRANSIENT = (408, 416, 429, 500, 502, 503, 504)  # HTTP statuses that may be different next time

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
    """

    name: str
    urls: tuple[str, ...]
    licence: str
    size: int | None = None
    sha256: str | None = None
    md5: str | None = None

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


def _edm(path: str, **known) -> Asset:
    url = f"https://nvlabs-fi-cdn.nvidia.com/edm/{path}"
    return Asset(path.removeprefix("pretrained/"), (url,), "CC BY-NC-SA 4.0 (NVIDIA)", **known)


def _openai(path: str, **known) -> Asset:
    url = f"https://openaipublic.blob.core.windows.net/{path}"
    return Asset(Path(path).name, (url,), "MIT (OpenAI)", **known)


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
        _edm("fid-refs/cifar10-32x32.npz"),
        _edm(
            "fid-refs/ffhq-64x64.npz",
            size=33_571_316,
            sha256="c78359df3b784dd472ff1ec53beefd9aeae9dace7df592128ed6b9d0c9f09c47",
        ),
        _edm("fid-refs/afhqv2-64x64.npz"),
        _edm("fid-refs/imagenet-64x64.npz"),  # not the -baseline one, which is of other weights
        _openai(
            "consistency/edm_bedroom256_ema.pt",
            size=2_105_395_349,
            sha256="5947bb5ae7b664feef1796ebe0a531efcf689d76e81d03ba88159dd8019b674f",
        ),
        _openai("consistency/edm_cat256_ema.pt"),
        _openai("diffusion/jul-2021/256x256_diffusion.pt"),
        _openai("diffusion/jul-2021/256x256_classifier.pt"),
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
    them to download it.

    Args:
        asset: for example ``ASSETS["edm-cifar10-32x32-uncond-vp.pkl"]``.
        progress: show a progress bar.

    Raises:
        ValueError: no address gave the file, or the file is not the one that was published or
            pinned by the first download.
        OSError: the disk is full, or the cache folder cannot be written.
    """
    folder = cache_folder()
    path = folder / asset.name
    if _is_verified(asset, folder):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.guard"):
            if path.exists():  # placed by hand, or by a process that was faster
                try:
                    checksum = _verify(asset, path, folder)
                except ValueError as error:
                    raise ValueError(
                        f"The file {path} is not the right one, {error}; "
                        "delete the file to have it downloaded again."
                    ) from None
            else:
                checksum = _download(asset, path, folder, progress)
            _record(asset.name, checksum, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"No space is left for {asset.name} in {folder}, where the part that was downloaded is "
            "kept; free some, or set AMED_DATA to a folder on another disk",
        ) from None
    return path


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _records(folder: Path) -> dict[str, tuple[str, str]]:
    """Checksum and stamp of the files that were verified, by their name."""
    records = {}
    path = folder / LOCK_FILE
    if path.exists():
        for line in path.read_text().splitlines():
            fields = line.split(maxsplit=3)
            require(len(fields) == 4, f"A line of {path}", line, "checksum, size, time and name")
            checksum, size, modified, name = fields
            records[name] = checksum, f"{size} {modified}"
    return records


def _record(name: str, checksum: str, folder: Path) -> None:
    with FileLock(f"{folder / LOCK_FILE}.guard"):
        records = _records(folder) | {name: (checksum, _stamp(folder / name))}
        lines = (f"{checksum} {stamp} {name}\n" for name, (checksum, stamp) in records.items())
        write_atomically(folder / LOCK_FILE, "".join(sorted(lines)).encode())


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
        found = f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
    if expected not in (None, found):
        reason = f"its checksum is {found} and not {expected}"
        if not asset.checksum:
            reason += (
                " as when it was pinned (to accept the change, delete the line of "
                f"{asset.name} in {folder / LOCK_FILE})"
            )
        raise ValueError(reason)
    return found


def _download(asset: Asset, path: Path, folder: Path, progress: bool) -> str:
    """Bring the file to ``path`` from the first address that has the right one; its checksum."""
    with of_the_study(f"The download of {asset.name}"):
        import requests
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

    part = Path(f"{path}.part")
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
            checksum = _verify(asset, part, folder)
        except requests.RequestException as error:
            answer = error.response
            reason = type(error).__name__ if answer is None else f"HTTP {answer.status_code}"
            failures.append(f"{url} ({reason})")
        except ValueError as error:
            part.unlink()
            _etag(part).unlink(missing_ok=True)
            failures.append(f"{url} ({error})")
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
        return False
    return error.response is None or error.response.status_code in TRANSIENT


def _etag(part: Path) -> Path:
    """Beside a partial download, which version of the file it is of, as the server names it."""
    return Path(f"{part}.etag")


def _append_rest(asset: Asset, url: str, part: Path, progress: bool) -> None:
    """Append to ``part`` what it lacks of ``url``, or write it anew where that cannot be had."""
    import requests

    done = part.stat().st_size if part.exists() else 0
    if done and done == asset.size:
        return
    etag = _etag(part).read_text() if done and _etag(part).exists() else ""
    # The wire carries the file's own bytes, which a range counts.
    headers = {"Accept-Encoding": "identity"}
    # Without a checksum, only the server can tell that both halves are of the same version.
    if done and (etag or asset.checksum):
        headers["Range"] = f"bytes={done}-"
        if etag:
            headers["If-Range"] = etag
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # the file ends before: these bytes are not its own
            part.unlink(missing_ok=True)
        response.raise_for_status()
        resumed = response.status_code == 206
        if not resumed:
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else asset.size
        if total and total > LARGE and not resumed:
            print(f"{asset.name}: {total / 1e9:.1f} GB, licence {asset.licence}", flush=True)
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(
                total=total,
                initial=done,
                desc=asset.name,
                unit="B",
                unit_scale=True,
                disable=not progress,
            ) as bar,
        ):
            if not resumed:  # the part is empty now, so that tag and bytes cannot disagree
                tag = response.headers.get("ETag", "")
                _etag(part).write_text("" if tag.startswith("W/") else tag)
            # Raises where the body ends before Content-Length, which urllib3 1 does not notice.
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())


def fingerprint(names: Sequence[str]) -> str:
    """A hash of the verified checksums of files, by their names in ``ASSETS``.

    Raises:
        ValueError: one of them has not been fetched.
    """
    records = _records(cache_folder())
    for name in names:
        require(name in records, "the file", name, "fetched before its fingerprint is taken")
    return hashlib.sha256("".join(records[name][0] for name in names).encode()).hexdigest()[:12]
