"""EDM's format read back, and hostile files refused in one sentence and without effect."""

import copy
import copyreg
import io
import os
import pickle
import random
import struct
import sys
import time
import tracemalloc
import types
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from amedlib.datasets import checkpoints
from amedlib.datasets.checkpoints import EDMCheckpoint, edm_network, load_edm_pickle, load_pt
from amedlib.denoisers.edm import build
from amedlib.denoisers.layers import Linear

SONG = {
    "img_resolution": 8,
    "img_channels": 2,
    "label_dim": 0,
    "use_fp16": True,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.13,
    "augment_dim": 9,
}
SMALL = SONG | {"model_channels": 4, "channel_mult": [1], "attn_resolutions": []}
NCSNPP = SONG | {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
    "sigma_max": 50,
}
ADM = {
    "img_resolution": 8,
    "img_channels": 2,
    "label_dim": 3,
    "model_type": "DhariwalUNet",
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": [4],
}


# The format, as torch_utils/persistence.py and dnnlib of EDM write it.


class Persistent:
    """An instance of a persistent class: pickled with the source of its module."""

    source = ""

    def __init__(self, class_name, state):
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.source}
        meta |= {"class_name": self.class_name, "state": self.state}
        return _reconstruct_persistent_obj, (meta,), None


def _reconstruct_persistent_obj(meta):
    exec(meta["module_src"], {})  # what EDM does
    return meta["state"]


class EasyDict(dict):
    pass


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
EasyDict.__module__ = "dnnlib.util"


def persistent(module, init_kwargs=None):
    """A module of ours as EDM would have it: persistent, but for the containers of torch."""
    children = {name: persistent(child) for name, child in module.named_children()}
    if type(module) is nn.ModuleDict:
        container = nn.ModuleDict()
        container.__dict__["_modules"] = children
        return container
    state = module.__dict__ | {
        "_modules": children,
        "_init_args": (),
        "_init_kwargs": init_kwargs or {"init_weight": np.sqrt(0.2), "bias": np.bool_(True)},
        "skip_scale": np.sqrt(0.5),
    }
    return Persistent(type(module).__name__, state)


@pytest.fixture
def mark(tmp_path):
    """A file that exists when something was executed."""
    return tmp_path / "mark"


@pytest.fixture
def write(tmp_path, mark, monkeypatch):
    """Writes the checkpoint of a network as EDM's training does."""
    for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules["dnnlib.util"].EasyDict = EasyDict
    # in the folder, so that its length is not in the files
    monkeypatch.chdir(mark.parent)
    monkeypatch.setattr(Persistent, "source", f"open({mark.name!r}, 'w').close()\n")

    def write(network, init_kwargs, protocol=4):
        data = {
            "ema": persistent(network, init_kwargs),
            "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2, "_init_kwargs": EasyDict(a=1)}),
            "augment_pipe": Persistent("AugmentPipe", {"p": 0.12, "xflip": 1e8}),
            "dataset_kwargs": EasyDict(path="cifar10.zip", max_size=50_000, xflip=False),
        }
        path = tmp_path / "network-snapshot.pkl"
        path.write_bytes(pickle.dumps(data, protocol))
        return path

    return write


def small_network(precond, kwargs, seed=0):
    torch.manual_seed(seed)
    network = build(precond, kwargs).eval().requires_grad_(False)
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    return network


NETWORKS = [("EDMPrecond", SONG), ("VEPrecond", NCSNPP), ("VPPrecond", SONG), ("EDMPrecond", ADM)]


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize(("precond", "kwargs"), NETWORKS)
def test_round_trip(write, mark, precond, kwargs, protocol):
    network = small_network(precond, kwargs)
    path = write(network, kwargs, protocol)
    before = torch.get_rng_state(), set(sys.modules), dict(os.environ)
    class_name, init_kwargs, state = load_edm_pickle(path)
    loaded = edm_network(path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (set(sys.modules), dict(os.environ)) == before[1:]
    assert not mark.exists()

    assert (class_name, init_kwargs) == (precond, kwargs)
    assert list(state) == list(network.state_dict())
    for name, tensor in network.state_dict().items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x = torch.randn(2, 2, 8, 8, generator=torch.manual_seed(1))
    labels = torch.eye(3)[:2] if kwargs["label_dim"] else None
    assert torch.equal(loaded(x, 0.7, labels), network(x, 0.7, labels))


def test_the_mark_shows_what_an_ordinary_unpickler_executes(write, mark):
    path = write(small_network("EDMPrecond", SONG), SONG)
    pickle.loads(path.read_bytes())
    assert mark.exists()


def test_half_precision_is_recorded_as_it_is_and_built_in_float32(write):
    network = small_network("EDMPrecond", SONG).half()
    path = write(network, SONG)
    assert {t.dtype for t in load_edm_pickle(path).state.values()} == {torch.float16}
    loaded = edm_network(path).state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded[name], tensor.float())


def test_tensors_keep_their_layout(write):
    """Strides and offsets: parts of larger storages."""
    layer = Linear(3, 4)
    layer.weight.data = torch.arange(24.0).reshape(4, 6)[:, 2:5]
    layer.bias.data = torch.arange(8.0)[::2]
    state = load_edm_pickle(write(layer, None)).state
    assert torch.equal(state["weight"], layer.weight) and torch.equal(state["bias"], layer.bias)
    assert state["weight"].stride() == (6, 1) and state["bias"].stride() == (2,)


def test_large_storages(write):
    """They lie outside of the frames of their pickle."""
    network = Linear(200, 300)
    state = load_edm_pickle(write(network, None)).state
    assert torch.equal(state["weight"], network.weight)


def test_buffers_that_are_not_persistent_stay_out(write):
    layer = Linear(2, 2)
    layer.register_buffer("kept", torch.ones(1))
    layer.register_buffer("transient", torch.ones(1), persistent=False)
    layer.register_buffer("absent", None)
    assert list(load_edm_pickle(write(layer, None)).state) == list(layer.state_dict())


def test_no_such_network(write):
    path = write(Linear(2, 2), None)
    with pytest.raises(ValueError, match=r"holds no 'net' but \['ema', 'loss_fn'"):
        load_edm_pickle(path, key="net")
    with pytest.raises(ValueError, match="refused: it is not a module"):
        load_edm_pickle(path, key="dataset_kwargs")
    with pytest.raises(ValueError, match="it is not a module with parameters, buffers and modules"):
        load_edm_pickle(path, key="loss_fn")


# An assembler of pickles: values, calls of any name, states, and raw opcodes.


@dataclass
class Call:
    function: str  # module and name, with a space between
    arguments: tuple = ()
    state: object = None
    opcode: bytes = pickle.REDUCE


@dataclass
class Raw:
    opcodes: bytes


def named(function) -> bytes:
    return b"c%b\n%b\n" % tuple(part.encode() for part in function.split(" "))


def assemble(value) -> bytes:
    match value:
        case Raw(opcodes):
            return opcodes
        case Call(function, arguments, state, opcode):
            code = named(function) + assemble(arguments) + opcode
            return code if state is None else code + assemble(state) + pickle.BUILD
        case tuple() | list():
            end = {tuple: b"(%bt", list: b"](%be"}[type(value)]
            return end % b"".join(map(assemble, value))
        case dict():
            return b"}(%bu" % b"".join(assemble(item) for pair in value.items() for item in pair)
        case _:  # a constant, by the ordinary pickler, between PROTO and STOP
            return pickle.dumps(value, 3)[2:-1].removesuffix(b"q\x00")


def program(value, protocol=4) -> bytes:
    return bytes([0x80, protocol]) + assemble(value) + b"."


def storage_bytes(tensor) -> bytes:
    typed = tensor.__reduce_ex__(4)[1][0]
    return typed.__reduce__()[1][0]


def storage(content=None):
    content = storage_bytes(torch.arange(6.0)) if content is None else content
    return Call("torch.storage _load_from_bytes", (content,))


HOOKS = Call("collections OrderedDict")


def tensor(of=None, offset=0, size=(2, 3), stride=(3, 1), requires_grad=False, hooks=HOOKS, *more):
    of = storage() if of is None else of
    arguments = (of, offset, size, stride, requires_grad, hooks, *more)
    return Call("torch._utils _rebuild_tensor_v2", arguments)


def module(parameters=None, modules=None, name="EDMPrecond", version=6, **state):
    state = {
        "_parameters": {"weight": tensor()} if parameters is None else parameters,
        "_buffers": {},
        "_modules": modules or {},
        "_init_args": (),
        "_init_kwargs": SONG,
    } | state
    meta = {"type": "class", "version": version, "module_src": "raise SystemExit"}
    meta |= {"class_name": name, "state": state}
    return Call("torch_utils.persistence _reconstruct_persistent_obj", (meta,))


def checkpoint(extra=None, **changes) -> bytes:
    return program({"ema": module(**changes), "extra": extra})


def test_the_assembler_makes_files_that_are_read(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(checkpoint())
    class_name, init_kwargs, state = load_edm_pickle(path)
    assert (class_name, init_kwargs) == ("EDMPrecond", SONG)
    assert torch.equal(state["weight"], torch.arange(6.0).reshape(2, 3))


class Trap:
    """Executes when its state is set."""

    def __setstate__(self, state):
        Path(state).touch()


LEGACY = storage_bytes(torch.arange(6.0))
HEAD = LEGACY[: LEGACY.index(b"\x80\x02(X\x07\x00\x00\x00storage")]
SYSTEM = Raw(named("os system"))
OS = Call("builtins __import__", ("os",))


def touch(mark):
    return f"touch {mark}"


def python(mark):
    return f"open({str(mark)!r}, 'w').close()"


# Each leaves the mark when an ordinary unpickler reads it: the value, and what the refusal names.
ARMED = {
    "os.system": (lambda m: Call("os system", (touch(m),)), "'os.system'"),
    "posix.system": (lambda m: Call("posix system", (touch(m),)), "'posix.system'"),
    "subprocess": (lambda m: Call("subprocess call", (["touch", str(m)],)), "'subprocess.call'"),
    "eval": (lambda m: Call("builtins eval", (python(m),)), "'builtins.eval'"),
    "exec": (lambda m: Call("builtins exec", (python(m),)), "'builtins.exec'"),
    "environment": (
        lambda m: Call("builtins exec", (f"import os; os.environ['AMED'] = '1'; {python(m)}",)),
        "'builtins.exec'",
    ),
    "getattr": (
        lambda m: Call("operator call", (Call("builtins getattr", (OS, "system")), touch(m))),
        "'operator.call'",
    ),
    "import": (lambda m: [OS, Call("os system", (touch(m),))], "'builtins.__import__'"),
    "map": (
        lambda m: Call("builtins list", (Call("builtins map", (SYSTEM, [touch(m)])),)),
        "'builtins.list'",
    ),
    "nested": (
        lambda m: tensor(Call("collections OrderedDict", (Call("os system", (touch(m),)),))),
        "'os.system'",
    ),
    "as a hook": (lambda m: tensor(hooks={"0": Call("os system", (touch(m),))}), "'os.system'"),
    "codecs": (
        lambda m: Call("os system", (Call("_codecs encode", (touch(m), "latin1")),)),
        "'os.system'",
    ),
    "dotted": (
        lambda m: Call("pathlib Path.touch", (Call("pathlib Path", (str(m),)),)),
        "'pathlib.Path.touch'",
    ),
    "dotted from the stack": (
        lambda m: Raw(
            assemble("torch.storage") + assemble("os.system") + b"\x93%bR" % assemble((touch(m),))
        ),
        "'torch.storage.os.system'",
    ),
    "setstate": (
        lambda m: Call(f"{__name__} Trap", (), str(m), pickle.NEWOBJ),
        f"'{__name__}.Trap'",
    ),
    "new object with keywords": (
        lambda m: Raw(
            assemble(Call(f"{__name__} Trap"))[:-3] + b")}\x92" + assemble(str(m)) + b"b"
        ),
        f"'{__name__}.Trap'",
    ),
    "instance": (lambda m: Raw(b"(" + assemble(touch(m)) + b"iposix\nsystem\n"), "opcode INST"),
    "object": (lambda m: Raw(b"(cos\nsystem\n" + assemble(touch(m)) + b"o"), "'os.system'"),
    "global": (lambda m: Raw(b"cos\nsystem\n" + assemble((touch(m),)) + b"R"), "'os.system'"),
    "extension": (lambda m: Raw(b"\x82\xf0" + assemble((touch(m),)) + b"R"), "opcode EXT1"),
    "memo": (  # a harmless name is remembered, another one put in its place, and that one called
        lambda m: [
            Raw(b"ccollections\nOrderedDict\nq\x07"),
            Raw(b"cos\nsystem\nq\x07"),
            Raw(b"h\x07" + assemble((touch(m),)) + b"R"),
        ],
        "'os.system'",
    ),
    "inner pickle": (
        lambda m: storage(HEAD + program(Call("os system", (touch(m),))) + pickle.dumps([], 2)),
        "'os.system'",
    ),
    "first inner pickle": (
        lambda m: storage(program(Call("os system", (touch(m),)))),
        "'os.system'",
    ),
    "inner pickle in the inner pickle": (
        lambda m: storage(
            HEAD + program(storage(program(Call("os system", (touch(m),))))) + pickle.dumps([], 2)
        ),
        "'torch.storage._load_from_bytes'",
    ),
}


@pytest.fixture
def armed(mark, monkeypatch):
    """``os.system`` as an extension, EDM's module as an ordinary unpickler would find it."""
    copyreg.add_extension("posix", "system", 240)
    for name in ("torch_utils", "torch_utils.persistence"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = lambda meta: None
    monkeypatch.setattr(torch.storage, "os", os, raising=False)
    yield mark
    copyreg.remove_extension("posix", "system", 240)
    os.environ.pop("AMED", None)


def world(path):
    """What a file could change: environment, modules (zipfile loads encodings), folder, itself."""
    modules = {name for name in sys.modules if not name.startswith("encodings.")}
    return dict(os.environ), modules, set(path.parent.iterdir()), path.read_bytes()


def refusal(path, load=load_edm_pickle):
    """The sentence that refuses the file; it names the file, and nothing else happened."""
    before = world(path)
    start = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        load(path)
    assert time.perf_counter() - start < 20
    assert world(path) == before
    sentence = str(caught.value)
    assert sentence.startswith(f"The file {path} is refused: ") and sentence.endswith(".")
    assert "\n" not in sentence and len(sentence) < 400 + len(str(path))
    return sentence


@pytest.mark.parametrize("name", ARMED)
def test_nothing_is_executed(tmp_path, armed, name):
    value, complaint = ARMED[name]
    path = tmp_path / "hostile.pkl"
    for content in (program(value(armed)), checkpoint(value(armed))):
        path.write_bytes(content)
        assert complaint in refusal(path)
        assert not armed.exists()
        # it was armed: an ordinary unpickler executes it, whatever becomes of it afterwards
        try:
            pickle.loads(content)
        except Exception as error:
            assert not isinstance(error, pickle.UnpicklingError | ImportError), error
        assert armed.exists()
        armed.unlink()


def replaced(old, new):
    assert LEGACY.count(old) == 1
    return LEGACY.replace(old, new)


LOAD = named("torch.storage _load_from_bytes")
SIX = struct.pack("<q", 6)
FLOATS = b"storageq\x00ctorch\nFloatStorage"


def nested(innermost, depth):
    for _ in range(depth):
        innermost = module(parameters={}, modules={"a" * 64: innermost})
    return innermost


CYCLE = {"_parameters": {}, "_buffers": {}, "_modules": {"a": Raw(b"h\x63")}}
CYCLE = Raw(b"q\x63" + assemble(CYCLE))
MANY = 60_000  # below the limit of the test below

HARMFUL = {
    # names of torch, which do more than our stand-ins
    **{
        name: (program(Call(name, (1,))), f"asks for '{name.replace(' ', '.')}'")
        for name in (
            "torch._utils _rebuild_wrapper_subclass",
            "torch._utils _rebuild_device_tensor_from_numpy",
            "torch._utils _rebuild_meta_tensor_no_storage",
            "torch._utils _rebuild_sparse_tensor",
            "torch._utils _rebuild_parameter_with_state",
            "torch._tensor _rebuild_from_type_v2",
            "torch.serialization load",
            "torch.jit load",
            "torch FloatStorage",
            "torch.nn.modules.linear Linear",
            "numpy.core.multiarray _reconstruct",
            "_codecs encode",
            "copyreg _reconstructor",
        )
    },
    # the tensors
    "offset": (checkpoint(tensor(offset=1)), "beyond its storage"),
    "size": (checkpoint(tensor(size=(3, 3))), "beyond its storage"),
    "stride": (checkpoint(tensor(stride=(4, 1))), "beyond its storage"),
    "negative offset": (checkpoint(tensor(offset=-1)), "beyond its storage"),
    "negative size": (checkpoint(tensor(size=(-2, -3))), "beyond its storage"),
    "negative stride": (checkpoint(tensor(offset=5, stride=(-3, -1))), "beyond its storage"),
    "expanded": (checkpoint(tensor(size=(2**40, 6), stride=(0, 1))), "beyond its storage"),
    "expanded a little": (checkpoint(tensor(size=(6, 6), stride=(0, 1))), "beyond its storage"),
    "overflow": (checkpoint(tensor(size=(2**62, 4), stride=(2**62, 1))), "beyond its storage"),
    "long integer": (checkpoint(tensor(offset=2**2000)), "beyond its storage"),
    "float size": (checkpoint(tensor(size=(2.0, 3))), "beyond its storage"),
    "bool size": (checkpoint(tensor(size=(True, 3))), "beyond its storage"),
    "empty": (checkpoint(tensor(size=(0, 3))), "beyond its storage"),
    "lengths": (checkpoint(tensor(size=(6,))), "beyond its storage"),
    "list": (checkpoint(tensor(size=[2, 3])), "beyond its storage"),
    "dimensions": (checkpoint(tensor(size=(1,) * 9, stride=(1,) * 9)), "beyond its storage"),
    "tensor as storage": (
        checkpoint(tensor(tensor())),
        "calls torch._utils._rebuild_tensor_v2 with",
    ),
    "bytes as storage": (
        checkpoint(tensor(b"123456789")),
        "calls torch._utils._rebuild_tensor_v2 with",
    ),
    "module as storage": (
        checkpoint(tensor(module())),
        "calls torch._utils._rebuild_tensor_v2 with",
    ),
    "hooks": (checkpoint(tensor(hooks={"0": 1})), "has hooks"),
    "hooks that are none": (
        checkpoint(tensor(hooks=None)),
        "calls torch._utils._rebuild_tensor_v2 with",
    ),
    "requires_grad": (
        checkpoint(tensor(requires_grad="yes")),
        "calls torch._utils._rebuild_tensor_v2 with",
    ),
    "metadata": (
        checkpoint(tensor(None, 0, (2, 3), (3, 1), False, HOOKS, {})),
        "calls torch._utils._rebuild_tensor_v2 with",
    ),
    "parameter": (
        checkpoint(Call("torch._utils _rebuild_parameter", (storage(), True, HOOKS))),
        "calls torch._utils._rebuild_parameter with",
    ),
    # the storages
    "storage of text": (checkpoint(storage("abc")), "calls torch.storage._load_from_bytes with"),
    "no storage": (checkpoint(storage(b"abc")), "malformed"),
    "storage longer": (checkpoint(storage(LEGACY + b"\0")), "the length that it claims"),
    "storage shorter": (checkpoint(storage(LEGACY[:-1])), "the length that it claims"),
    "storage that stops": (checkpoint(storage(LEGACY[:200])), "refused"),
    "storage of another length": (
        checkpoint(storage(replaced(SIX, struct.pack("<q", 5)))),
        "the length that it claims",
    ),
    "huge storage": (
        checkpoint(storage(replaced(b"K\x06N", b"\x8a\x06\0\0\0\0\0\x7fN"))),
        "larger than the file",
    ),
    "empty storage": (checkpoint(storage(replaced(b"K\x06N", b"K\0N"))), "not that of a storage"),
    "doubles": (
        checkpoint(storage(replaced(FLOATS, FLOATS.replace(b"Float", b"Double")))),
        "the length that it claims",
    ),
    "integers that are no storage": (
        checkpoint(storage(replaced(FLOATS, FLOATS.replace(b"Float", b"Untyped")))),
        "'torch.UntypedStorage'",
    ),
    "view": (checkpoint(storage(replaced(b"K\x06N", b"K\x06)"))), "not that of a storage"),
    "big-endian": (
        checkpoint(storage(replaced(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))),
        "little-endian",
    ),
    # persistent ids, states, targets
    "persistent id": (checkpoint(Raw(b"K\x01Q")), "not that of a storage"),
    "persistent id in text": (checkpoint(Raw(b"Pabc\n")), "opcode PERSID"),
    "inner persistent id": (
        checkpoint(storage(HEAD + program(Raw(b"K\x01Q")) + pickle.dumps([], 2))),
        "not that of a storage",
    ),
    "extension 2": (checkpoint(Raw(b"\x83\xf0\0)R")), "opcode EXT2"),
    "extension 4": (checkpoint(Raw(b"\x84\0\0\0\x01")), "opcode EXT4"),
    "state of a tensor": (checkpoint(Raw(assemble(tensor()) + b")b")), "takes none"),
    "state of a dict": (checkpoint(Raw(b"}" + assemble({"a": 1}) + b"b")), "takes none"),
    "state twice": (
        checkpoint(Call("torch.nn.modules.container ModuleDict", (), Raw(b"}b}"), b"\x81")),
        "takes none",
    ),
    "slot of a module": (
        checkpoint(
            Call("torch.nn.modules.container ModuleDict", (), (None, {"state": tensor()}), b"\x81")
        ),
        "takes none",
    ),
    "state of a name": (
        checkpoint(Raw(b"ccollections\nOrderedDict\n" + assemble({"name": "os.system"}) + b"b")),
        "takes none",
    ),
    "sum of tensors": (  # an ordinary unpickler calls what has no update but an add
        checkpoint(Raw(assemble(tensor()) + b"(" + assemble("a") + b"\x90")),
        "not a set",
    ),
    "item of a tensor": (checkpoint(Raw(assemble(tensor()) + b"K\0K\0s")), "not a string"),
    "key of a tensor": (checkpoint(Raw(assemble(tensor()) + b"\x8c\0K\0s")), "not a dict"),
    "append to a tensor": (checkpoint(Raw(assemble(tensor()) + b"K\0a")), "no attribute 'append'"),
    "extend a module": (checkpoint(Raw(assemble(module()) + b"(K\0e")), "no attribute 'append'"),
    "set of lists": (checkpoint(Raw(b"\x8f(]\x90")), "not a string"),
    "call of a value": (checkpoint(Raw(b"K\x01)R")), "not a function"),
    "call of a module": (checkpoint(Raw(assemble(module()) + b")R")), "not a function"),
    "arguments": (checkpoint(Call("collections OrderedDict", ([],))), "argument"),
    "no tuple": (checkpoint(Raw(b"ccollections\nOrderedDict\n]R")), "no tuple"),
    "global of numbers": (checkpoint(Raw(b"K\x01K\x02\x93")), "requires str"),
    # numpy
    "object dtype": (
        checkpoint(Call("numpy dtype", ("O8", False, True))),
        "calls numpy.dtype with",
    ),
    "swapped dtype": (
        checkpoint(Call("numpy dtype", ("f8", False, True), (3, ">", None, None, None, -1, -1, 0))),
        "takes none",
    ),
    "tensor in a dtype": (
        checkpoint(Call("numpy dtype", ("f8", False, True), (tensor(),) * 8)),
        "takes none",
    ),
    "scalar": (
        checkpoint(Call("numpy.core.multiarray scalar", (1, b"\0" * 8))),
        "calls numpy.core.multiarray.scalar with",
    ),
    # memo and stack
    "no memo": (checkpoint(Raw(b"h\x63")), "malformed"),
    "no stack": (b"\x80\x04\x85.", "malformed"),
    "no mark": (b"\x80\x04Kt.", "refused"),
    "below the mark": (b"\x80\x04K\x01(\x85t.", "malformed"),
    "odd items": (b"\x80\x04}(K\x01u.", "not a string"),
    "more on the stack": (b"\x80\x04K\x01K\x02.", "does not hold a dict"),
    "recursive arguments": (
        checkpoint(_init_kwargs={"a": Raw(b"]\x71\x63h\x63a")}),
        "more than a few plain values",
    ),
    "recursive module": (  # it is remembered before it gets its state, which has it as a child
        program({"ema": Call("torch.nn.modules.container ModuleDict", (), CYCLE, pickle.NEWOBJ)}),
        "in the network twice",
    ),
    "recursion without end": (b"\x80\x04]q\0" + b"h\0a" * 1000 + b".", "does not hold a dict"),
    # what would take memory or time
    "index": (b"\x80\x04Nr\xff\xff\xff\xff.", "does not hold a dict"),
    "sets": (b"\x80\x04" + b"\x8f" * MANY * 2 + b".", "opcodes"),
    "frame in a frame": (
        b"\x80\x04\x95" + struct.pack("<Q", 99) + b"\x95" + struct.pack("<Q", 2**62) + b"N" * 99,
        "new frame before end",
    ),
    "value across frames": (
        b"\x80\x04\x95" + struct.pack("<Q", 3) + b"B\x10\0\0\0" + bytes(16) + b".",
        "before end of frame",
    ),
    "doubling in a list of keys": (
        checkpoint(storage(HEAD + b"\x80\x02}.\x80\x02])" + b"q\0h\0\x86" * 1000 + b"a.")),
        "not those that it lists",
    ),
    "parameters of many modules": (
        checkpoint(
            parameters=Raw(assemble({"weight": tensor()}) + b"q\x63"),
            modules={"a": module(parameters=Raw(b"h\x63"))},
        ),
        "in the network twice",
    ),
    "names that grow": (program({"ema": nested(module(), 4)}), "nested too deep"),
    "bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".", "opcode BINBYTES8"),
    "many bytes": (b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b".", "ends before its time"),
    "text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".", "opcode BINUNICODE8"),
    "integer": (b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b".", "opcode LONG4"),
    "long integer of decimals": (b"L" + b"9" * 100_000 + b"L\n.", "refused"),
    "long integers": (b"\x80\x04\x8b" + struct.pack("<i", MANY) + b"\x7f" * MANY + b".", "LONG4"),
    "frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"K\x01.", "does not hold a dict"),
    "buffer": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "deep tuples": (b"\x80\x04)" + b"\x85" * MANY * 2 + b".", "80000 opcodes"),
    "deep tuple": (b"\x80\x04)" + b"\x85" * MANY + b".", "does not hold a dict"),
    "deep tuple as key": (b"\x80\x04})" + b"\x85" * MANY + b"Ns.", "not a string"),
    "deep lists": (b"\x80\x04" + b"]" * (MANY // 2) + b"a" * (MANY // 2 - 1) + b".", "hold a dict"),
    "marks": (b"\x80\x04" + b"(" * MANY * 2 + b".", "80000 opcodes"),
    "doubling": (b"\x80\x04)" + b"q\0h\0\x86" * (MANY // 3) + b".", "does not hold a dict"),
    "doubling as key": (b"\x80\x04})" + b"q\0h\0\x86" * (MANY // 3) + b"Ns.", "not a string"),
    "doubling arguments": (
        checkpoint(_init_kwargs={"a": Raw(b")" + b"q\0h\0\x86" * 1000)}),
        "more than a few plain values",
    ),
    "one storage many times": (
        program([Raw(assemble(storage())[:-1] + b"q\x02R")] + [Raw(LOAD + b"h\x02R")] * 30),
        "its storages are larger than the file",
    ),
    "one tensor under many names": (
        checkpoint(
            parameters={
                "p0": Raw(
                    assemble(tensor(storage(storage_bytes(torch.zeros(10**5))), 0, (10**5,), (1,)))
                    + b"q\x63"
                )
            }
            | {f"p{i}": Raw(b"h\x63") for i in range(1, 9)}
        ),
        "its tensors are larger than the file",
    ),
    "one module many times": (
        program(
            {"ema": module(modules={"a": Raw(assemble(module()) + b"q\x63"), "b": Raw(b"h\x63")})}
        ),
        "in the network twice",
    ),
    # files that are something else
    "empty file": (b"", "empty"),
    "garbage": (b"\xff\xfe\xfd", "opcode 255"),
    "text file": (b"hello world\n", "refused"),
    "zip": (b"PK\x03\x04" + bytes(26), "refused"),
    "trailing": (checkpoint() + b"\n", "bytes follow the end"),
    "two pickles": (checkpoint() * 2, "bytes follow the end"),
    "truncated": (checkpoint()[:-1], "ends before its time"),
    "protocol 0": (pickle.dumps({"ema": 1}, 0), "opcode"),
    "a list": (program([1]), "does not hold a dict"),
    # networks that are none
    "no module": (program({"ema": 1}), "not a module"),
    "version": (checkpoint(version=5), "_reconstruct_persistent_obj with"),
    "version as tensor": (checkpoint(version=tensor()), "_reconstruct_persistent_obj with"),
    "class name": (checkpoint(name="os;system"), "no identifier"),
    "no parameters": (checkpoint(parameters={}), "no parameters"),
    "parameters of numbers": (checkpoint(parameters={"weight": 1}), "weight is not a tensor"),
    "a dot": (checkpoint(parameters={"a.b": tensor()}), "'a.b' is no name"),
    "positional": (checkpoint(_init_args=(8, 2)), "keyword arguments alone"),
    "not recorded": (checkpoint(_init_kwargs=None), "keyword arguments alone"),
    "tensor as argument": (checkpoint(_init_kwargs={"a": tensor()}), "plain values"),
    "huge argument": (checkpoint(_init_kwargs={"a": 2**40}), "plain values"),
    "long argument": (checkpoint(_init_kwargs={"a": "a" * 1000}), "plain values"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(checkpoints, "MAX_STEPS", 80_000)
    content, complaint = HARMFUL[name]
    path = tmp_path / "hostile.pkl"
    path.write_bytes(content)
    assert complaint in refusal(path)


@pytest.mark.parametrize("name", ["bytes", "many bytes", "text", "frame", "index", "huge storage"])
def test_what_is_claimed_is_not_allocated(tmp_path, name):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(HARMFUL[name][0])
    tracemalloc.start()
    try:
        refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "iDDPMPrecond"}, "precond_class must be one of"),
        ({"name": "Persistent"}, "precond_class must be one of"),
        ({"_init_kwargs": SONG | {"model_type": "os.system"}}, "model_type must be one of"),
        ({"_init_kwargs": SONG | {"command": "a"}}, "argument name for SongUNet must be one of"),
        ({"_init_kwargs": SONG | {"model_channels": "8"}}, "refused"),
        ({"_init_kwargs": SONG | {"model_channels": 2**30}}, "ask for more numbers than it holds"),
        ({"_init_kwargs": SONG | {"num_blocks": 2**30}}, "ask for more numbers than it holds"),
        ({"_init_kwargs": SONG | {"channel_mult_emb": 2**30}}, "more numbers than it holds"),
        ({"_init_kwargs": SONG | {"label_dim": 2**30}}, "ask for more numbers than it holds"),
        ({"_init_kwargs": {}}, "given with img_resolution"),
        ({"_init_kwargs": SMALL}, "Missing key"),
    ],
)
def test_no_network_of_edm(tmp_path, changes, complaint):
    path = tmp_path / "a.pkl"
    large = tensor(storage(storage_bytes(torch.zeros(10_000))), 0, (10_000,), (1,))
    path.write_bytes(checkpoint(parameters={"weight": large}, **changes))
    assert complaint in refusal(path, edm_network)


def mutated(content, generator):
    """Some bytes changed, or a piece cut out, doubled or cut off."""
    content, place = bytearray(content), generator.randrange(len(content))
    piece = content[place : place + generator.choice([1, 2, 8, 100])]
    match generator.randrange(6):
        case 0:
            return bytes(content[:place])
        case 1:
            del content[place : place + len(piece)]
        case 2:
            content[place:place] = piece
        case _:
            for _ in range(generator.choice([1, 1, 3])):
                content[generator.randrange(len(content))] = generator.randrange(256)
    return bytes(content)


STOPPED = ValueError | LookupError | TypeError | AttributeError | EOFError
STOPPED |= pickle.UnpicklingError | struct.error


def test_damaged_files_are_read_or_refused(tmp_path, write, mark):
    content = write(Linear(3, 4), SONG).read_bytes()
    path, generator = tmp_path / "damaged.pkl", random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1000):
        path.write_bytes(mutated(content, generator))
        start = time.perf_counter()
        try:
            found = load_edm_pickle(path)
        except ValueError as error:
            outcomes["refused"] += 1
            assert str(error).startswith(f"The file {path} is refused: ")
            # by a check, or by the unpickler: nothing that torch had to stop
            assert isinstance(error.__cause__, STOPPED)
        else:
            outcomes["read"] += 1
            assert isinstance(found, EDMCheckpoint)
            assert all(t.is_floating_point() and t.numel() for t in found.state.values())
            repr(found.init_kwargs)
        assert time.perf_counter() - start < 5
    assert min(outcomes.values()) > 50
    assert not mark.exists()


# Files of torch.save.


def archive(path, saved, storages=None, compression=zipfile.ZIP_STORED, **more):
    """A zip file as torch.save writes it, with any pickle in it."""
    entries = {"data.pkl": program(saved, 2), "version": b"3\n"}
    entries |= {f"data/{key}": content for key, content in (storages or {}).items()} | more
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(f"archive/{name}", content)
    return path


def kept(key="0", count=6, kind="torch FloatStorage"):
    return Raw(assemble(("storage", Raw(named(kind)), key, "cpu", count)) + pickle.BINPERSID)


SIX_FLOATS = {"0": np.arange(6, dtype=np.float32).tobytes()}


def test_the_archive_is_read(tmp_path):
    path = archive(tmp_path / "a.pt", {"weight": tensor(kept())}, SIX_FLOATS)
    assert torch.equal(load_pt(path)["weight"], torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("zipped", [True, False])
def test_saved_tensors(tmp_path, zipped):
    shared = torch.randn(4, 6, dtype=torch.float64)
    network = small_network("EDMPrecond", ADM)
    tensors = {
        "long": torch.arange(3),
        "half": torch.randn(2, 3).half(),
        "bfloat16": torch.randn(2, 3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "view": shared[:, 1:3],
        "transposed": shared.T,
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    for number, saved in enumerate((tensors, network.state_dict())):
        path = tmp_path / f"{number}.pt"
        torch.save(saved, path, _use_new_zipfile_serialization=zipped)
        loaded = load_pt(path)
        assert list(loaded) == list(saved) and type(loaded) is dict
        for name, value in saved.items():
            assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
            assert loaded[name].stride() == value.stride()
            assert type(loaded[name]) is torch.Tensor and not loaded[name].requires_grad


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (touch(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_saved_object_is_not_executed(tmp_path, mark, zipped):
    path = tmp_path / "hostile.pt"
    torch.save({"a": Evil(mark)}, path, _use_new_zipfile_serialization=zipped)
    assert "'posix.system'" in refusal(path, load_pt)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # it was armed
    assert mark.exists()


@pytest.mark.parametrize(
    ("saved", "complaint"),
    [
        ([torch.ones(2)], "does not hold a dict"),
        (torch.ones(2), "does not hold a dict"),
        ({"state_dict": {"a": torch.ones(2)}}, "no flat dict of tensors, 'state_dict' is a dict"),
        ({"epoch": 3, "a": torch.ones(2)}, "no flat dict of tensors, 'epoch' is a int"),
        ({3: torch.ones(2)}, "not a string"),
        ({"a": torch.ones(1).expand(10)}, "beyond its storage"),
        ({"a": torch.ones(2).to_sparse()}, "'torch._utils._rebuild_sparse_tensor'"),
        ({"a": torch.ones(2, device="meta")}, "'torch._utils._rebuild_meta_tensor_no_storage'"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "'torch.ComplexFloatStorage'"),
        ({"a": nn.Linear(2, 2)}, "'torch.nn.modules.linear.Linear'"),
    ],
)
def test_what_is_saved_is_no_flat_dict_of_tensors(tmp_path, saved, complaint):
    path = tmp_path / "a.pt"
    torch.save(saved, path)
    assert complaint in refusal(path, load_pt)


@pytest.mark.parametrize(
    ("value", "options", "complaint"),
    [
        (tensor(kept(), offset=1), {}, "beyond its storage"),
        (tensor(kept(count=5)), {}, "not in its zip"),
        (tensor(kept(count=7)), {}, "not in its zip"),
        (tensor(kept(count=2**40)), {}, "larger than the file"),
        (tensor(kept("1")), {}, "not in its zip"),
        (tensor(kept("../version")), {}, "not in its zip"),
        ([tensor(kept()), kept(count=5)], {}, "two storages of one key"),
        (
            [tensor(kept()), kept(count=3, kind="torch DoubleStorage")],
            {},
            "two storages of one key",
        ),
        (tensor(kept(kind="os system")), {}, "'os.system'"),
        (tensor(storage()), {}, "'torch.storage._load_from_bytes'"),
        (module(), {}, "'torch_utils.persistence._reconstruct_persistent_obj'"),
        (Raw(assemble(tensor(kept())) + b"K\0K\0s"), {}, "not a string"),
        (tensor(kept()), {"compression": zipfile.ZIP_DEFLATED}, "compressed"),
        (tensor(kept()), {"constants.pkl": b"\x80\x02)."}, "TorchScript"),
        (tensor(kept()), {"code/data.pkl": b"\x80\x02)."}, "not of torch.save"),
    ],
)
def test_archives_that_are_refused(tmp_path, value, options, complaint):
    path = archive(tmp_path / "a.pt", {"weight": value}, SIX_FLOATS, **options)
    assert complaint in refusal(path, load_pt)


def test_an_archive_of_another_byte_order(tmp_path):
    path = archive(tmp_path / "a.pt", {"weight": tensor(kept())}, SIX_FLOATS, byteorder=b"little")
    assert torch.equal(load_pt(path)["weight"], torch.arange(6.0).reshape(2, 3))
    archive(path, {"weight": tensor(kept())}, SIX_FLOATS, byteorder=b"big")
    assert "not little-endian" in refusal(path, load_pt)


def test_an_archive_that_claims_more_than_it_has(tmp_path):
    path = archive(tmp_path / "a.pt", {"weight": tensor(kept())}, SIX_FLOATS)
    content = path.read_bytes()
    sizes = content.rindex(b"archive/data.pkl") - 46 + 20  # in the list at the end
    claimed = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(content[:sizes] + claimed + content[sizes + 8 :])
    tracemalloc.start()
    try:
        assert "compressed" in refusal(path, load_pt)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    extra = content.index(b"archive/data/0") - 2  # before the content: what to skip
    path.write_bytes(content[:extra] + b"\xff\xff" + content[extra + 2 :])
    assert "offset" in refusal(path, load_pt)


def test_an_archive_whose_storages_lie_on_each_other(tmp_path):
    tensors = {f"a{key}": tensor(kept(str(key), 9999), 0, (9999,), (1,)) for key in range(9)}
    path = archive(tmp_path / "a.pt", tensors, {"0": bytes(4 * 9999)})
    with zipfile.ZipFile(path, "a") as file:
        for key in range(1, 9):
            entry = copy.copy(file.getinfo("archive/data/0"))
            entry.filename = f"archive/data/{key}"
            file.filelist.append(entry)
        file.comment = b"changed"
    assert "larger than the file" in refusal(path, load_pt)


def saved_before_zip(keys=lambda keys: keys, again=1, end=b""):
    """A file of a tensor, with another list of the storages in it."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0)}, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    start = content.rindex(b"\x80\x02]")
    listed = pickle.loads(content[start:])
    length = len(pickle.dumps(listed, 2))
    rest = content[start + length :] * again
    return content[:start] + pickle.dumps(keys(listed), 2) + rest + end


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        # a tensor of what was in memory before
        ({"keys": lambda keys: []}, "not those that it lists"),
        ({"keys": lambda keys: keys * 2, "again": 2}, "not those that it lists"),
        ({"keys": lambda keys: ["other"]}, "not those that it lists"),
        ({"keys": lambda keys: [keys]}, "not those that it lists"),
        ({"keys": lambda keys: keys[0]}, "not those that it lists"),
        ({"end": b"\0"}, "the length that it claims"),
        ({"again": 0}, "the length that it claims"),
    ],
)
def test_storages_before_zip_that_are_not_listed(tmp_path, changes, complaint):
    path = tmp_path / "a.pt"
    path.write_bytes(saved_before_zip())
    assert torch.equal(load_pt(path)["a"], torch.arange(6.0))
    path.write_bytes(saved_before_zip(**changes))
    assert complaint in refusal(path, load_pt)


def test_what_is_written_to_a_mapped_tensor_does_not_reach_its_file(tmp_path):
    path = archive(tmp_path / "a.pt", {"weight": tensor(kept())}, SIX_FLOATS)
    before = path.read_bytes()
    load_pt(path)["weight"].zero_()
    assert path.read_bytes() == before
    assert torch.equal(load_pt(path)["weight"], torch.arange(6.0).reshape(2, 3))


def test_an_archive_with_two_pickles_of_one_name(tmp_path):
    path = archive(tmp_path / "a.pt", {"weight": tensor(kept())}, SIX_FLOATS)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data.pkl", program(Call("os system", ("true",))))
    assert "two entries" in refusal(path, load_pt)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello", LEGACY, HEAD, bytes(10_240)])
def test_files_that_torch_did_not_save(tmp_path, content):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    refusal(path, load_pt)


@pytest.mark.parametrize("load", [load_edm_pickle, edm_network, load_pt])
def test_a_missing_file(tmp_path, load):
    with pytest.raises(ValueError, match=r"^The file .*a\.pt is missing\.$"):
        load(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is missing"):
        load(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_saved_tensors_are_read_or_refused(tmp_path, zipped):
    buffer, generator = io.BytesIO(), random.Random(1)
    saved = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(3)}
    torch.save(saved, buffer, _use_new_zipfile_serialization=zipped)
    outcomes = {"read": 0, "refused": 0}
    for number in range(200):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(mutated(buffer.getvalue(), generator))
        try:
            found = load_pt(path)
        except ValueError as error:
            outcomes["refused"] += 1
            assert str(error).startswith(f"The file {path} is refused: ")
        else:
            outcomes["read"] += 1
            assert all(type(t) is torch.Tensor and t.sum().numel() for t in found.values())
    assert min(outcomes.values()) > 20
