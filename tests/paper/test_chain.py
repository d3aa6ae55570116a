"""The chain from the published files to the numbers of Table 2, for every data set of the paper.

Formats, names, addresses and code path are the real ones; networks are small and random. A server
on this machine stands in for the places where the files are published. What is made smaller:
networks and images; the sides to which Inception and LPIPS enlarge images; numbers of samples,
training images, jackknife blocks and steps of the ODE's solution.
"""

import hashlib
import io
import json
import math
import pickle
import shutil
import socket
import sys
import threading
import types
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from urllib.parse import urlsplit

import diffusers
import huggingface_hub
import matplotlib
import numpy as np
import pytest
import torch
import torchvision
import transformers
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from pandas.io.formats.style import Styler
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from test_denoisers_adm import TINY, reference
from test_inception_features import Blank
from test_latent import (
    AUTOENCODER,
    UNET,
    OriginalAutoencoder,
    OriginalUNet,
    original_checkpoint,
    save_stable_diffusion,
)
from test_pickles import (
    ADM,
    SONG,
    EasyDict,
    Persistent,
    _reconstruct_persistent_obj,
    persistent,
    small_network,
)
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from traitlets.config import Config

from amedlib import metrics
from amedlib.datasets import loaders
from amedlib.datasets.entries import DATASETS
from amedlib.datasets.files import ASSETS, DATA, cache_folder
from amedlib.datasets.inception import inception_features
from amedlib.datasets.loaders import INCEPTION, PROMPTS, VGG, load_dataset
from amedlib.denoisers import adm, latent
from amedlib.denoisers.unet import DhariwalUNet, SongUNet
from amedlib.files import load_tensors
from amedlib.sampling import make_latents
from amedlib.study import execute, plans, procedures, store, uncertainty
from amedlib.study import run as runs
from amedlib.study.store import predictor_path, result_path

SAMPLES = 8
COMMIT = "0" * 40
# The least size that our rules for OpenAI's networks allow.
SMALLEST = TINY | {"img_resolution": 4, "attn_resolutions": (2,)}
PAPER = [name for name in DATASETS if not name.startswith(("digits", "cifar10_small"))]
# Those that differ from another one in files and names alone.
TWINS = ["ffhq", "afhqv2", "lsun_cat", *(name for name in PAPER if "_guidance_" in name)]
MODELS = {  # data set: what its first assets hold; guidance is no part of the files
    "cifar10": "song",
    "ffhq": "song",
    "afhqv2": "song",
    "imagenet64": "dhariwal",
    "lsun_bedroom": "consistency",
    "lsun_cat": "consistency",
    "lsun_bedroom_ldm": "latent",
    "stable_diffusion": "text",
}


def model_of(name):
    return MODELS.get(name, "guided")


# --- the published files, in small --------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.files`` by path, as a plain server and as the Hugging Face hub do."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self):
        file = self.server.files.get(urlsplit(self.path).path)
        content = file.read_bytes() if file else b""
        self.send_response(200 if file else 404)
        self.send_header("Content-Length", len(content))
        if file:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        return content

    do_HEAD = answer

    def do_GET(self):
        path = urlsplit(self.path).path
        self.wfile.write(self.answer())
        if path in self.server.files and not path.startswith("/api/"):
            self.server.sent.append(path)


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.sent = {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def edm_pickle(network, init_kwargs):
    """A checkpoint as EDM's training writes it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(
            sys.modules["torch_utils.persistence"],
            "_reconstruct_persistent_obj",
            _reconstruct_persistent_obj,
            raising=False,
        )
        patch.setattr(sys.modules["dnnlib.util"], "EasyDict", EasyDict, raising=False)
        patch.setattr(Persistent, "source", "raise SystemExit\n")
        options = EasyDict(path="cifar10.zip")
        content = {"ema": persistent(network, init_kwargs), "dataset_kwargs": options}
        return pickle.dumps(content, 4)


def saved(state, **options):
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


def text_to_image_files(folder):
    """A small Stable Diffusion by the paths at which the hub has its files, and what it says."""
    save_stable_diffusion(folder)
    repository, files = latent.STABLE_DIFFUSION, {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        for revision in ("main", COMMIT):
            files[f"/{repository}/resolve/{revision}/{path.relative_to(folder)}"] = path
    about = folder / "about.json"
    about.write_text(json.dumps({"id": repository, "sha": COMMIT, "siblings": []}))
    return files | {f"/api/models/{repository}": about}


@cache
def inception_weights():
    """torch-fidelity's format: the older one of torch, to which the published size belongs."""
    torch.manual_seed(0)
    network = Blank("inception", ["2048"], io.BytesIO(saved({})))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return saved(network.state_dict(), _use_new_zipfile_serialization=False)


@cache
def vgg_weights():
    torch.manual_seed(0)
    with torch.device("meta"):  # the other layers are large, and LPIPS does without them
        features = torchvision.models.vgg16(weights=None).features
    features.to_empty(device="cpu")
    for parameter in features.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state = features.state_dict()
    return saved({f"features.{name}": value for name, value in state.items()})


@cache
def direct_inception():
    return FeatureExtractorInceptionV3("direct", ["2048"], io.BytesIO(inception_weights()))


@torch.no_grad()
def features_of(images):
    return direct_inception()(images)[0].double().numpy()


@cache
def statistics(asset):
    """Mean and covariance of features, and what OpenAI's files hold besides."""
    generator = np.random.default_rng(sorted(ASSETS).index(asset))
    images = generator.integers(0, 256, (32, 3, 8, 8), dtype=np.uint8)
    features = features_of(torch.from_numpy(images))
    more = {"arr_0": images.transpose(0, 2, 3, 1)} if asset.startswith("VIRTUAL") else {}
    file = io.BytesIO()
    np.savez(file, mu=features.mean(0), sigma=np.cov(features, rowvar=False), **more)
    return file.getvalue()


class Model:
    """A network of random weights: its files, and D(x; t) from what the files were made of."""

    def __init__(self, kind, seed, folder):
        self.kind, self.decode = kind, lambda x: x
        getattr(self, f"_{kind}")(seed, folder)

    def _song(self, seed, folder):
        kwargs = SONG | {"img_channels": 3}
        network = small_network("EDMPrecond", kwargs, seed)
        self.files, self.denoise = [edm_pickle(network, kwargs)], network

    def _dhariwal(self, seed, folder):
        kwargs = ADM | {"img_channels": 3, "label_dim": 5}
        network = small_network("EDMPrecond", kwargs, seed)
        self.files, self.denoise = [edm_pickle(network, kwargs)], network

    def _consistency(self, seed, folder):
        network, state = reference(SMALLEST, scale_shift=False, order="qkv", dims=2, seed=seed)

        def denoise(x, t, labels):
            total = t**2 + 0.25
            out, _ = network(x / total.sqrt(), 250 * t.log().expand(len(x)))
            return 0.25 / total * x + 0.5 * t / total.sqrt() * out

        self.files, self.denoise = [saved(state)], denoise

    def _guided(self, seed, folder):
        network, state = reference(SMALLEST, out=6, classes=5, seed=seed)
        judge, judge_state = reference(SMALLEST, out=5, pools=True, seed=seed + 1)

        def denoise(x, t, labels):
            scaled, step = x / (1 + t**2).sqrt(), adm.timestep(t).expand(len(x))
            with torch.enable_grad():
                scaled.requires_grad_()
                log_p = (judge(scaled, step)[0].log_softmax(1) * labels).sum()
                (gradient,) = torch.autograd.grad(log_p, scaled)
            eps = network(scaled.detach(), step, labels.argmax(1))[0][:, :3]
            eps = eps - self.guidance * t / (1 + t**2).sqrt() * gradient
            return (x - t * eps).clamp(-1, 1)

        self.files, self.denoise = [saved(state), saved(judge_state)], denoise

    def _latent(self, seed, folder):
        torch.manual_seed(seed)
        network, coder = OriginalUNet(UNET).eval(), OriginalAutoencoder(AUTOENCODER).eval()
        original_checkpoint(folder / "model.ckpt", network, OriginalUNet(UNET), coder)
        latent.convert_ldm(
            folder / "model.ckpt", cache_folder() / "lsun_bedroom_ldm", UNET, AUTOENCODER
        )
        levels = latent_levels(0.0015, 0.0195)

        def denoise(x, t, labels):
            return x - t * network((x / (1 + t**2).sqrt()).float(), step_of(levels, t, len(x)))

        self.files, self.denoise = [], denoise
        self.decode = lambda x: coder.decode(x.float() / 0.5).clamp(-1, 1)

    def _text(self, seed, folder):
        folder = folder / "hub"
        folder.mkdir()
        self.hub = text_to_image_files(folder)
        network = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
        encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
        ids = [tokenizer(text, padding="max_length", truncation=True) for text in ("", *PROMPTS)]
        with torch.no_grad():
            self.texts = encoder(torch.tensor([each.input_ids for each in ids]))[0]
        levels = latent_levels(0.00085, 0.012)

        def denoise(x, t, labels):
            scaled, step = (x / (1 + t**2).sqrt()).float(), step_of(levels, t, len(x))
            plain = network(scaled, step, self.texts[:1].expand(len(x), -1, -1)).sample
            return x - t * (plain + 7.5 * (network(scaled, step, labels).sample - plain))

        self.files, self.denoise = [], denoise


def latent_levels(start, end):
    betas = np.linspace(start**0.5, end**0.5, 1000) ** 2
    return np.sqrt(1 / np.cumprod(1 - betas) - 1)


def step_of(levels, t, count):
    step = np.interp(np.log1p(float(t) ** 2), np.log1p(levels**2), np.arange(1000))
    return torch.full((count,), step, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    yield folder
    shutil.rmtree(folder)  # some hundred MB


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.fixture(autouse=True)
def smaller(monkeypatch, folder):
    """What is made smaller, and where downloads are kept."""
    monkeypatch.setenv("AMED_DATA", str(folder / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(adm, "_LSUN", adm._LSUN | SMALLEST)
    monkeypatch.setattr(adm, "_IMAGENET", adm._IMAGENET | SMALLEST | {"label_dim": 5})
    monkeypatch.setattr(adm, "_CLASSIFIER", adm._CLASSIFIER | SMALLEST | {"label_dim": 5})
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    enlarged = metrics._enlarged
    monkeypatch.setattr(metrics, "_enlarged", lambda images, side: enlarged(images, 32))
    for module in (execute, procedures, runs, store, uncertainty):
        monkeypatch.setattr(module, "BLOCKS", 2)
    monkeypatch.setattr(store, "SOLUTION", store.SOLUTION | {"num_steps": 9})
    loaders._load.cache_clear()
    outside, look_up = [], socket.getaddrinfo

    def looked_up(host, *args, **options):
        outside.extend({host} - {"127.0.0.1", b"127.0.0.1"})
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    yield
    loaders._load.cache_clear()
    assert not outside


@pytest.fixture
def publish(server, folder, models, monkeypatch):
    """Puts a data set's files on the server and registers their addresses and checksums there."""

    def put(asset, content):
        known = ASSETS[asset]
        urls = [server.url + urlsplit(url).path for url in known.urls]
        file = folder / asset.replace("/", "-")
        if not file.exists():
            file.write_bytes(content)
        server.files[urlsplit(urls[-1]).path] = file  # where there are two, the first one is down
        found = {
            "size": known.size and len(content),
            "sha256": known.sha256 and hashlib.sha256(content).hexdigest(),
            "md5": known.md5 and hashlib.md5(content).hexdigest(),
        }
        monkeypatch.setitem(ASSETS, asset, replace(known, urls=tuple(urls), **found))

    def publish(name, **changes):
        entry, kind = DATASETS[name], model_of(name)
        key = entry.assets[0] if entry.assets else name  # guidance is no part of the files
        if key not in models:
            models[key] = Model(kind, PAPER.index(name), folder)
        model = models[key]
        model.guidance = entry.guidance
        for asset, content in zip(entry.assets, model.files, strict=False):
            put(asset, content)
        put(INCEPTION, inception_weights())
        put(VGG, vgg_weights())
        if kind == "text":
            server.files |= model.hub
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
            monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
            template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        else:
            put(entry.assets[-1], statistics(entry.assets[-1]))
        digest = ASSETS[INCEPTION].sha256
        reader = partial(inception_features, sha256=digest)
        monkeypatch.setattr(loaders, "inception_features", reader)
        side = 4 if kind in ("consistency", "guided") else 8
        shrunk = {
            "shape": (entry.shape[0], side, side),
            "samples": SAMPLES,
            "batch": 4,
            "training": entry.training | {"images": 2, "batch": 2},
        }
        monkeypatch.setitem(DATASETS, name, replace(entry, **shrunk | changes))
        return model

    return publish


# --- from the files to the numbers --------------------------------------------------------------


def by_hand(data, model, times):
    """Final states of DDIM, and images from 0 to 255; what the Run of that row should have."""
    x = make_latents(range(SAMPLES), data.shape).double() * times[0]
    labels = data.labels and data.labels(range(SAMPLES))
    for t, t_next in pairwise(times):
        with torch.no_grad():
            x = x + (t_next - t) / t * (x - model.denoise(x, t, labels))
    with torch.no_grad():
        return x, (model.decode(x) * 127.5 + 128).floor().clamp(0, 255).to(torch.uint8)


def fid(images, reference):
    """By torch-fidelity's network, and a formula for fewer images than features."""
    with np.load(io.BytesIO(reference)) as file:
        mean, covariance = file["mu"], file["sigma"]
    features = features_of(images)
    centred = (features - features.mean(0)) / math.sqrt(len(features) - 1)
    roots = np.linalg.eigvalsh(centred @ covariance @ centred.T).clip(0) ** 0.5
    parts = ((features.mean(0) - mean) ** 2).sum(), (centred**2).sum(), covariance.trace()
    return sum(parts) - 2 * roots.sum()


@contextmanager
def evaluations(data):
    """What the network of a data set returns, call by call."""
    kinds = SongUNet, DhariwalUNet, diffusers.UNet2DModel, diffusers.UNet2DConditionModel
    network = next(module for module in data.denoiser.modules() if isinstance(module, kinds))
    outputs = []
    hook = network.register_forward_hook(lambda *call: outputs.append(call[-1][0]))
    yield outputs
    hook.remove()


def addresses(names):
    """Paths on the server of the files that are sent."""
    return [urlsplit(ASSETS[name].urls[-1]).path for name in names]


def compare_by_hand(entry, results_dir, ddim, states, images):
    """The stored results of a Run of DDIM against its final states and images, made by hand."""
    half = ddim.precision == "float16"
    (kept,) = (results_dir / entry.name / "endpoints").glob("*")
    error = (states - load_tensors(kept)[0]["x"].double()).square().flatten(1).sum(1)
    found = store.load_result(ddim.with_metric("endpoint_error"), results_dir).value
    assert found == pytest.approx(error.mean().sqrt().item(), rel=0.02 if half else 1e-4)
    if "fd" in entry.metrics:
        found = store.load_result(ddim.with_metric("fd"), results_dir).value
        reference = statistics(entry.assets[-1])
        expected, other = fid(images, reference), fid(images.flip(1), reference)
        # In half precision a sample's grey level may depend on the number of threads.
        assert found == pytest.approx(expected, rel=2e-3 if half else 1e-3)
        assert other != pytest.approx(expected, rel=5e-3)  # what colours are matters


def test_statistics_have_the_published_size():
    """It does not depend on the numbers in the file: 2048 means, 2048x2048 covariances, names."""
    asset = "fid-refs/ffhq-64x64.npz"
    assert len(statistics(asset)) == ASSETS[asset].size


def check_entry(entry, data, model, ddim):
    """Time points, labels and ranges of what was loaded are those of its files."""
    times = ddim.times()
    assert times[[0, -1]].tolist() == pytest.approx([entry.sigma_max, entry.sigma_min])
    assert ddim.schedule == (entry.schedule or "polynomial")
    owner = getattr(data.denoiser, "denoiser", data.denoiser)  # of a guided one
    if model.kind in ("consistency", "guided", "latent", "text"):
        assert (owner.sigma_min, owner.sigma_max) == (entry.sigma_min, entry.sigma_max)
    labels = data.labels and data.labels(range(SAMPLES))
    if model.kind == "text":
        expected = model.texts[[1 + seed % len(PROMPTS) for seed in range(SAMPLES)]]
        torch.testing.assert_close(labels, expected)
        assert torch.pdist(model.texts.flatten(1)).min() > 0
    elif model.kind in ("dhariwal", "guided"):
        assert labels.shape == (SAMPLES, 5) and labels.argmax(1).unique().numel() > 1
        assert torch.equal(labels.sum(1), torch.ones(SAMPLES))
        assert torch.equal(data.labels([3]), labels[3:4])
    else:
        assert labels is None


# The rows whose steps are learned, and one that is computed by hand.
METHODS = ["AMED-Solver", "AMED-Plugin", "DDIM"]


@pytest.mark.parametrize("name", PAPER)
def test_from_files_to_numbers(name, publish, server, tmp_path, monkeypatch):
    model = publish(name)
    entry, how = DATASETS[name], {"results_dir": tmp_path, "progress": False}
    data = load_dataset(name, "cpu")
    planned = {
        metric: plans.table2(
            name, METHODS[2:] if name in TWINS else METHODS, entry.nfes[:1], [0], metric=metric
        )
        for metric in entry.metrics
    }
    first = planned[entry.metrics[0]]  # the other one is measured with it
    if len(first) > 1:
        execute.measure(first[:-1], **how)
    with evaluations(data) as outputs:
        measured = {metric: execute.measure(plan, **how) for metric, plan in planned.items()}
    # those of DDIM, and where it is alone those of the ODE's solution
    calls = entry.nfes[0] // entry.evaluations_per_call + 8 * (name in TWINS)
    assert sum(map(len, outputs)) == SAMPLES * calls * entry.evaluations_per_call
    assert {str(output.dtype) for output in outputs} == {f"torch.{entry.precision}"}
    for plan in measured.values():
        for result in plan["result"]:
            assert result.nfe == entry.nfes[0] and np.isfinite(result.value) and result.value > 0
            assert len(result.replicates) == execute.BLOCKS and result.error > 0
            assert data.fingerprint in result.fingerprint

    # all that is learned was learned as the entry says
    for run in planned["endpoint_error"]["run"][:-1]:
        assert result_path(run, tmp_path).is_file()
        tensors, metadata = load_tensors(predictor_path(run, tmp_path))
        assert json.loads(metadata["bottleneck_size"]) == list(data.denoiser.bottleneck_size)
        assert tensors["log"].shape == (1, run.num_steps - 1, 3)
        assert tensors["log"].isfinite().all() and (tensors["log"][..., 0] > 0).all()
        training = json.loads(metadata["training"])
        assert training["gradient"] == entry.training.get("gradient", "reverse")
        assert training["loss"] == entry.training.get("loss", "l2")
        assert training["precision"] == entry.precision

    # the row of DDIM by hand
    ddim = planned["endpoint_error"]["run"].iloc[-1]
    check_entry(entry, data, model, ddim)
    states, images = by_hand(data, model, ddim.times())
    compare_by_hand(entry, tmp_path, ddim, states, images)
    if entry.precision != "float32" and name not in TWINS:
        single = tmp_path / "single"
        ddim = replace(ddim, precision="float32")
        for result in execute.compute(ddim, single, progress=False):
            store.save_result(result, single)
        compare_by_hand(entry, single, ddim, states, images)

    # numbers are kept, and so are the files: each was sent once
    monkeypatch.setattr(
        execute, "load_dataset", lambda *_: pytest.fail("nothing is to be computed")
    )
    for metric, plan in planned.items():
        again = execute.measure(plan, **how)["result"]
        assert again.tolist() == measured[metric]["result"].tolist()
    needed = [*entry.assets, *[INCEPTION] * ("fd" in entry.metrics)]
    needed += [VGG] * (entry.training.get("loss") == "lpips")
    before = Counter(server.sent)
    assert all(before[path] == 1 for path in addresses(needed))
    loaders._load.cache_clear()
    second = load_dataset(name, "cpu")
    assert second.denoiser is not data.denoiser and second.fingerprint == data.fingerprint
    if "fd" in entry.metrics and name not in TWINS:
        assert second.features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape == (1, 2048)
    assert Counter(server.sent) == before and max(before.values()) == 1


# --- the notebook -------------------------------------------------------------------------------


@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    """Runs a notebook with parameters, as papermill injects them, in this process."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell.instance(config=config)

    def run_notebook(name, **parameters):
        notebook = load_notebook_node(str(DATA.parent / "notebooks" / name))
        notebook = parameterize_notebook(notebook, parameters)
        values, texts = [], []
        for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
            with capture_output() as captured:
                outcome = shell.run_cell(cell.source)
            outcome.raise_error()
            values.append(outcome.result)
            texts += [output.data.get("text/markdown", "") for output in captured.outputs]
        return values, texts

    with matplotlib.rc_context():
        yield run_notebook
    InteractiveShell.clear_instance()


def test_notebook_of_table_2(publish, run_notebook, tmp_path):
    publish("cifar10", batch=100)
    parameters = {"dataset": "cifar10", "n_samples": 20, "nfes": [3], "seeds": [0]}
    results = str(tmp_path / "results")
    values, texts = run_notebook("table2.ipynb", **parameters, results_dir=results)
    tables = [value.data for value in values if isinstance(value, Styler)]
    for table, metric, columns in (
        (tables[0], "fd", [("NFE 3", "FID"), ("NFE 3", "paper")]),
        (tables[1], "endpoint_error", [("NFE 3", "endpoint error")]),
    ):
        assert list(table.index) == list(plans.METHODS) and list(table.columns) == columns
        plan = plans.table2("cifar10", nfes=[3], seeds=[0], n_samples=20, metric=metric)
        for run, cell in zip(plan["run"], table[columns[0]], strict=True):
            value, half = (float(number) for number in cell.split(" ± "))
            result = store.load_result(run, tmp_path / "results")
            assert value == pytest.approx(result.value, abs=half) and half > 0
    assert list(tables[0]["NFE 3", "paper"])[3:5] == ["93.36", "155.7"]  # DDIM and DPM-Solver-2
    start = "*FID of 20 samples to published statistics of the training images"
    (caption,) = [text for text in texts if text.startswith(start)]
    assert "Both are FID: values compare." in caption
    assert "EDM with 79 NFE" in caption
