"""Checkpoints that are pickles, read without running anything that they carry.

A pickle is a program: an ordinary unpickler imports and calls what the file names, and EDM's files
bring Python source to execute besides. Here Python's unpickler is left with the opcodes that such
files consist of, and the few names in them stay names: a call of one is a ``match`` of ours, which
checks and records. Any other opcode, name or argument refuses the file. ``torch.load`` never sees
it; work and memory are bounded by ``MAX_STEPS`` and by the size of the file.

It is the unpickler that the standard library has in Python: the opcodes of the one in C are fixed,
and so it hashes what a file takes for a key (tuples of tuples: without end, or until the stack is
full) and allocates as much as the largest index that a file names.

The format is that of ``torch_utils/persistence.py`` (version 6) of NVlabs/edm, with tensors as
torch reduces them: each storage is the bytes of a ``torch.save`` in the format before zip files
(``torch.serialization._legacy_save``).
"""

import io
import math
import mmap
import pickle
import pickletools
import re
import struct
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from amedlib.denoisers.edm import build

#: Opcodes that a file may have; EDM's largest network has about 100,000.
MAX_STEPS = 1_000_000

_KEPT = """PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL
    STACK_GLOBAL BINPERSID NONE NEWTRUE NEWFALSE BINFLOAT BININT BININT1 BININT2 LONG1 BINUNICODE
    SHORT_BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST
    APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS REDUCE NEWOBJ BUILD""".split()
_DTYPES = {"BFloat16": torch.bfloat16, "Double": torch.float64, "Float": torch.float32}
_DTYPES |= {"Half": torch.float16, "Int": torch.int32, "Long": torch.int64}
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()}
_NUMPY_SCALARS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "?"}
# The names that files may have, and what a call of them is to _call.
_OF_TENSORS = {
    "collections.OrderedDict": "dict",
    "torch._utils._rebuild_parameter": "parameter",
    "torch._utils._rebuild_tensor_v2": "tensor",
}
_OF_NETWORKS = _OF_TENSORS | {
    "dnnlib.util.EasyDict": "dict",
    "numpy.dtype": "dtype",
    "numpy.core.multiarray.scalar": "scalar",
    "numpy._core.multiarray.scalar": "scalar",
    "torch.nn.modules.container.ModuleDict": "modules",
    "torch.storage._load_from_bytes": "storage",
    "torch_utils.persistence._reconstruct_persistent_obj": "module",
}


class EDMCheckpoint(NamedTuple):
    """A network of EDM as its file records it.

    Attributes:
        class_name: of the preconditioner, such as "EDMPrecond".
        init_kwargs: the arguments of its constructor, plain values.
        state: parameters and persistent buffers by their names in a state dict, in the file's
            floating-point dtype, on the CPU.
    """

    class_name: str
    init_kwargs: dict[str, Any]
    state: dict[str, torch.Tensor]


@dataclass(eq=False, slots=True)
class _Name:
    """Stands for a class or function of the file."""

    name: str


@dataclass(eq=False, slots=True)
class _Record:
    """Stands for an object of the file, by its state: module (dict), storage (tensor), dtype."""

    name: str
    state: Any = None


def _check(condition, complaint):
    if not condition:
        raise ValueError(complaint)


@contextmanager
def _refusing(path):
    """Whatever is wrong with the file becomes one ``ValueError`` that names it."""
    if not Path(path).is_file():
        raise ValueError(f"The file {path} is missing.")
    try:
        yield
    except Exception as error:  # damaged files make libraries raise exceptions of many kinds
        known = isinstance(error, ValueError)
        kind = "" if known else f"it is malformed, {type(error).__name__}: "
        sentence = str(error) or "it ends before its time"  # an EOFError
        sentence = " ".join(sentence.split()).partition(". ")[0][:300].rstrip(".")
        raise ValueError(f"The file {path} is refused: {kind}{sentence}.") from error


class _Opcodes(dict):
    """What the opcodes do, and what is left to spend on all pickles of one file."""

    def __init__(self, size):
        names = {c: pickle._Unpickler.dispatch[c].__name__ for (c,) in map(vars(pickle).get, _KEPT)}
        super().__init__({code: getattr(_Pickle, name) for code, name in names.items()})
        self.steps, self.bytes = MAX_STEPS, 2 * size  # storages are read, and then copied

    def __getitem__(self, code):
        self.steps -= 1
        if self.steps < 0:
            raise ValueError(f"it has more than {MAX_STEPS} opcodes")
        return super().__getitem__(code)

    def __missing__(self, code):
        opcode = pickletools.code2op.get(chr(code))
        raise ValueError(f"it asks for the pickle opcode {opcode.name if opcode else code}")

    def spend(self, nbytes):
        self.bytes -= nbytes
        _check(self.bytes >= 0, "its storages are larger than the file")


class _Pickle(pickle._Unpickler):
    """One pickle of a file.

    names: the globals that it may name. allocate: makes a storage, from its key, dtype and length;
    without it, there are none.
    """

    def __init__(self, stream, opcodes, names=(), allocate=None):
        super().__init__(stream)
        self.dispatch, self.names, self.allocate, self.storages = opcodes, names, allocate, {}

    def find_class(self, module, name):
        name = f"{module}.{name}"
        if self.allocate and name in _STORAGES:
            return _STORAGES[name]
        _check(name in self.names, f"it asks for {name[:100]!r}")
        return _Name(name)

    def persistent_load(self, identity):
        match identity:
            case "storage", torch.dtype() as dtype, str() as key, str(), int() as count, *view if (
                count > 0 and view in ([], [None])
            ):
                if key not in self.storages:
                    self.storages[key] = self.allocate(key, dtype, count)
                flat = self.storages[key]
                _check((flat.dtype, len(flat)) == (dtype, count), "it has two storages of one key")
                return _Record(key, flat)
        raise ValueError("a persistent id is not that of a storage, with content of its own")

    def load_reduce(self):
        arguments, function = self.stack.pop(), self.stack.pop()
        _check(type(function) is _Name, "it calls something that is not a function")
        _check(type(arguments) is tuple, "it calls with arguments that are no tuple")
        self.append(_call(function.name, arguments, self.dispatch))

    load_newobj = load_reduce

    def _fill(self, kind, keys, *values):
        # nothing else is filled (torch lets pickles write to tensors), and nothing else is hashed
        _check(all(type(key) is str for key in keys), f"a key of a {kind.__name__} is not a string")
        _check(type(self.stack[-1]) is kind, f"it fills something that is not a {kind.__name__}")
        self.stack[-1].update(zip(keys, *values, strict=True) if values else keys)

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._fill(dict, [key], [value])

    def load_setitems(self):
        items = self.pop_mark()
        self._fill(dict, items[::2], items[1::2])

    def load_additems(self):
        items = self.pop_mark()
        self._fill(set, items)

    def load_build(self):
        state = self.stack.pop()
        match self.stack[-1], state:
            case _Record("ModuleDict", None) as record, dict():
                record.state = state
            case _Record(_, None) as record, (int(3), "<" | "|", None, None, None, -1, -1, 0):
                record.state = state  # of a plain number
            case dict(), dict() if state.keys() == {"_metadata"}:
                pass  # versions of the modules, an attribute of the dict that is a state dict
            case _:
                raise ValueError("it sets the state of something that takes none, or not this one")


def _call(name, arguments, opcodes):
    """What stands for the value of a call."""
    match _OF_NETWORKS[name], arguments:
        case "dict", ():
            return {}
        case "modules", ():
            return _Record("ModuleDict")
        case "module", ({"type": "class", "version": int(6), "state": dict() as state} as meta,):
            name = meta.get("class_name")  # and "module_src", the source, which is never looked at
            identifier = type(name) is str and re.fullmatch(r"\w{1,64}", name)
            _check(identifier, "the name of a class is no identifier")
            return _Record(name, state)
        case "dtype", (str() as kind, bool(), bool()) if kind in _NUMPY_SCALARS:
            return _Record(_NUMPY_SCALARS[kind])
        case "scalar", (_Record(code, tuple()), bytes() as content):
            return struct.unpack(code, content)[0]
        case "storage", (bytes() as content,):
            storage = _legacy(opcodes, content)
            _check(type(storage) is _Record, "a storage is not saved as one storage")
            return storage
        case "tensor", (_Record(_, torch.Tensor() as flat), *place, bool(), dict() as hooks):
            _check(not hooks, "a tensor has hooks")
            _check(_within(flat, *place), "a tensor reaches beyond its storage")
            offset, size, stride = place
            return flat.as_strided(size, stride, offset)
        case "parameter", (torch.Tensor() as tensor, bool(), dict() as hooks):
            _check(not hooks, "a tensor has hooks")
            return tensor
    raise ValueError(f"it calls {name} with other arguments than a checkpoint does")


def _within(flat, offset, size, stride):
    """Whether a tensor has content, and all of it in its storage."""
    return (
        type(size) is type(stride) is tuple
        and len(size) == len(stride) <= 8
        and all(type(n) is int and 0 <= n <= len(flat) for n in (offset, *size, *stride))
        and 0 < math.prod(size) <= len(flat)
        and offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) < len(flat)
    )


def _legacy(opcodes, content, names=()):
    """What ``torch.save`` wrote before zip files: five pickles, and the storages' contents."""
    opcodes.spend(len(content))
    stream = io.BytesIO(content)

    def allocate(key, dtype, count):
        opcodes.spend(count * dtype.itemsize)
        return torch.empty(count, dtype=dtype)

    magic, version, system = (_Pickle(stream, opcodes).load() for _ in range(3))
    known = (magic, version) == (0x1950A86A20F9469CFC6C, 1001) and type(system) is dict
    little = known and system.get("little_endian") is True
    _check(little, "it is not a little-endian file of torch.save")
    reader = _Pickle(stream, opcodes, names, allocate)
    saved, keys = reader.load(), _Pickle(stream, opcodes).load()
    _check(keys == sorted(reader.storages), "its storages are not those that it lists")
    lengths = []
    for flat in map(reader.storages.get, keys):
        count = int.from_bytes(stream.read(8), "little")
        filled = stream.readinto(flat.view(torch.uint8).numpy())
        lengths.append((count, filled) == (len(flat), flat.nbytes))
    exact = all(lengths) and stream.tell() == len(content)
    _check(exact, "a storage does not have the length that it claims")
    return saved


def _state_dict(module, seen, prefix=""):
    """Names and tensors of the state dict of a module, in its order."""
    place = prefix.rstrip(".") or "it"
    state = module.state if type(module) is _Record and type(module.state) is dict else {}
    parts = [state.get(part) for part in ("_parameters", "_buffers", "_modules")]
    transient = state.get("_non_persistent_buffers_set", set())
    typed = all(type(part) is dict for part in parts) and type(transient) is set
    _check(typed, f"{place} is not a module with parameters, buffers and modules")
    # none twice, none deep: neither a cycle nor a tree or names that grow by sharing
    _check(seen.isdisjoint(map(id, parts)), f"{place} is a module that is in the network twice")
    _check(len(prefix) <= 200, "its modules are nested too deep")
    seen.update(map(id, parts))
    for part in parts:
        for name, value in part.items():
            _check(re.fullmatch(r"\w{1,64}", name), f"{name[:64]!r} is no name of a parameter")
            if value is None or part is parts[1] and name in transient:
                continue
            if part is parts[2]:
                yield from _state_dict(value, seen, f"{prefix}{name}.")
            else:
                _check(type(value) is torch.Tensor, f"{prefix}{name} is not a tensor")
                yield prefix + name, value


def _plain(value, depth=3):
    """Whether a value consists of a few numbers, strings, lists, tuples and dicts."""
    match value:
        case None | bool() | float():
            return True
        case int():
            return abs(value) < 2**31
        case str():
            return len(value) <= 100
        case dict() if depth and len(value) <= 64:
            return all(_plain(key, 0) and _plain(item, depth - 1) for key, item in value.items())
        case list() | tuple() if depth and len(value) <= 64:
            return all(_plain(item, depth - 1) for item in value)
    return False


def load_edm_pickle(path, key="ema") -> EDMCheckpoint:
    """A network of one of EDM's checkpoints (``network-snapshot-*.pkl``), as data.

    Nothing of the file is imported, compiled or called: see the module's description. The tensors
    are copies, so the file may change afterwards; memory is at most about three times its size.

    Args:
        path: the file.
        key: which network of it; "ema" is the one to sample from.

    Raises:
        ValueError: the file is missing, is not such a checkpoint, or asks for anything else.
    """
    with (
        _refusing(path),
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream,
    ):
        opcodes = _Opcodes(len(stream))
        content = _Pickle(stream, opcodes, _OF_NETWORKS).load()
        _check(stream.tell() == len(stream), "bytes follow the end of its pickle")
        _check(type(content) is dict, "it does not hold a dict")
        held = [name[:40] for name in list(content)[:8]]
        _check(key in content, f"it holds no {key!r} but {held}")
        state = dict(_state_dict(content[key], set()))
        # one tensor under many names costs nothing here, but would wherever it is copied
        nbytes = sum(tensor.nbytes for tensor in state.values())
        _check(nbytes <= len(stream), "its tensors are larger than the file")
        _check(nbytes, f"its {key!r} has no parameters")
        network = content[key]
        init_kwargs = network.state.get("_init_kwargs")
        recorded = network.state.get("_init_args") == () and type(init_kwargs) is dict
        _check(recorded, f"its {key!r} was not constructed with recorded keyword arguments alone")
        _check(_plain(init_kwargs), "its constructor arguments are more than a few plain values")
        return EDMCheckpoint(network.name, init_kwargs, state)


class _Uninitialised(TorchFunctionMode):
    """Start values of networks are not drawn, and not more of them allocated than ``left``."""

    def __init__(self, left):
        super().__init__()
        self.left = left

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (torch.randn, torch.rand, torch.ones, torch.zeros):
            return function(*args, **(kwargs or {}))
        shape = args[0] if isinstance(args[0], tuple) else args
        self.left -= math.prod(shape)
        _check(self.left >= 0, "its constructor arguments ask for more numbers than it holds")
        return torch.empty(shape)


def edm_network(path, key="ema") -> torch.nn.Module:
    """The network of one of EDM's checkpoints, built by :func:`amedlib.denoisers.edm.build`.

    Args:
        path, key: as in :func:`load_edm_pickle`.

    Returns:
        The network in evaluation mode and float32 on the CPU, without gradients.

    Raises:
        ValueError: as :func:`load_edm_pickle`; or the recorded arguments give no network, or not
            one with these parameters.
    """
    class_name, init_kwargs, state = load_edm_pickle(path, key)
    with _refusing(path), _Uninitialised(sum(tensor.numel() for tensor in state.values())):
        network = build(class_name, init_kwargs)
        network.load_state_dict(state, strict=True)
    return network.eval().requires_grad_(False)


def load_pt(path) -> dict[str, torch.Tensor]:
    """The tensors of a ``torch.save`` of one flat dict, on the CPU.

    A zip file (the format since torch 1.6) is mapped: the tensors read it when they are used, so
    it has to stay as it is. What is written to them does not reach the file.

    Tensors are floating-point, int32 or int64, and none is empty or larger than its storage.

    Args:
        path: the file, usually ``.pt`` or ``.pth``.

    Raises:
        ValueError: the file is missing, damaged, not little-endian, or holds anything but a flat
            dict of tensors.
    """
    with _refusing(path), open(path, "rb") as file:
        # not closed, as the tensors are in it
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        opcodes = _Opcodes(len(mapped))
        if mapped[:4] == b"PK\x03\x04":
            content = _zipped(opcodes, file, mapped)
        else:
            content = _legacy(opcodes, mapped[:], _OF_TENSORS)
        _check(type(content) is dict, "it does not hold a dict")
        for name, tensor in content.items():
            kind = type(tensor).__name__
            _check(kind == "Tensor", f"it is no flat dict of tensors, {name[:64]!r} is a {kind}")
        return content


def _zipped(opcodes, file, mapped):
    """What ``torch.save`` wrote to a zip file, with storages that are mapped."""
    archive = zipfile.ZipFile(file)
    listed, size = archive.infolist(), len(mapped)
    entries = {entry.filename: entry for entry in listed}
    _check(len(entries) == len(listed), "its zip has two entries of one name")
    # torch.save never compresses: what is in the file is not larger than the file
    plain = (entry.compress_type == zipfile.ZIP_STORED for entry in listed)
    small = (max(entry.compress_size, entry.file_size) <= size for entry in listed)
    _check(all(plain) and all(small), "its zip is compressed")
    pickles = [name for name in entries if name.endswith(".pkl")]
    alone = len(pickles) == 1 and pickles[0].endswith("/data.pkl")
    _check(alone, f"its zip is not of torch.save, or a TorchScript program, with {pickles[:4]}")
    folder = pickles[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    _check(order not in entries or archive.read(order) == b"little", "it is not little-endian")

    def allocate(key, dtype, count):
        opcodes.spend(count * dtype.itemsize)
        entry = entries.get(f"{folder}data/{key}")
        there = entry and entry.file_size == count * dtype.itemsize
        _check(there, "a storage of this length is not in its zip")
        lengths = struct.unpack_from("<2H", mapped, entry.header_offset + 26)  # of name and more
        start = entry.header_offset + 30 + sum(lengths)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)

    stream = io.BytesIO(archive.read(pickles[0]))
    return _Pickle(stream, opcodes, _OF_TENSORS, allocate).load()
