"""Checkpoints that are pickles, read without running anything that they carry.

A pickle is a program: an ordinary unpickler imports and calls what the file names, and EDM's files
bring Python source to execute besides. Here the opcodes are interpreted by a stack machine that
knows the thirty or so which EDM's files consist of, and the few names that these call, each with a
stand-in of ours that only checks and records. Any other opcode or name refuses the file. Work and
memory are bounded by ``MAX_STEPS`` and by the size of the file.

The format is that of ``torch_utils/persistence.py`` (version 6) of NVlabs/edm, with tensors as
torch reduces them: each storage is the bytes of a ``torch.save`` in the format before zip files
(``torch.serialization._legacy_save``).
"""

import io
import math
import mmap
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

#: Opcodes and entries of modules that a file may have; EDM's largest network has about 100,000.
MAX_STEPS = 1_000_000

_STORAGES = {
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
}
_NUMPY_SCALARS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "?"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = {
    "BINFLOAT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "SHORT_BINBYTES",
    "BINBYTES",
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
class _Record:
    """Stands for an object of the file: a "module", "storage" or numpy "dtype"."""

    kind: str
    name: str
    state: Any = None


def _check(condition, complaint):
    if not condition:
        raise ValueError(complaint)


def _check_autograd(requires_grad, hooks):
    _check(type(requires_grad) is bool, "requires_grad of a tensor is not a bool")
    _check(type(hooks) is dict and not hooks, "a tensor has hooks")


def _plain(value, depth):
    """A copy of a value made of numbers, strings, lists, tuples and dicts, ``depth`` deep."""
    if value is None or type(value) in (bool, float):
        return value
    if type(value) is int and abs(value) < 2**31 or type(value) is str and len(value) <= 100:
        return value
    if depth and type(value) in (list, tuple) and len(value) <= 64:
        return type(value)(_plain(item, depth - 1) for item in value)
    if depth and type(value) is dict and len(value) <= 64:
        return {_plain(key, 0): _plain(item, depth - 1) for key, item in value.items()}
    raise ValueError("its constructor arguments are more than a few plain values")


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
        sentence = " ".join(str(error).split()).partition(". ")[0][:300].rstrip(".")
        raise ValueError(f"The file {path} is refused: {kind}{sentence}.") from error


class _Reader:
    """The stack machine and its stand-ins, with what is left to spend on one file."""

    def __init__(self, size):
        self.steps, self.size, self.bytes = MAX_STEPS, size, size
        self.claims = {}  # storages by their keys
        self.seen = set()  # modules
        self.tensor_calls = {
            "collections OrderedDict": self._dict,
            "torch._utils _rebuild_parameter": self._parameter,
            "torch._utils _rebuild_tensor_v2": self._tensor,
        }
        self.network_calls = self.tensor_calls | {
            "dnnlib.util EasyDict": self._dict,
            "numpy dtype": self._dtype,
            "numpy.core.multiarray scalar": self._scalar,
            "numpy._core.multiarray scalar": self._scalar,
            "torch.nn.modules.container ModuleDict": self._module_dict,
            "torch.storage _load_from_bytes": self._storage,
            "torch_utils.persistence _reconstruct_persistent_obj": self._persistent,
        }

    def _spend(self, steps):
        self.steps -= steps
        _check(self.steps >= 0, f"it has more than {MAX_STEPS} opcodes and entries")

    def run(self, stream, names, storage=None):
        """The value of one pickle.

        names: what stands for the globals that it may name. storage: what stands for a storage,
        from its persistent id; without it, persistent ids are refused.
        """
        stack, marked, memo = [], [], {}

        def since_mark():
            nonlocal stack
            items, stack = stack, marked.pop()
            return items

        def target(kind):
            _check(type(stack[-1]) is kind, f"it fills something that is not a {kind.__name__}")
            return stack[-1]

        def fill(items):
            keys = items[::2]
            _check(len(items) % 2 == 0, "a key of it has no value")
            _check(all(type(key) is str for key in keys), "a key of it is not a string")
            target(dict).update(zip(keys, items[1::2], strict=True))

        # genops bounds every length by what is left in the stream, and calls nothing.
        for opcode, value, _ in pickletools.genops(stream):
            self._spend(1)
            match opcode.name:
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINPUT" | "LONG_BINPUT":
                    memo[value] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[value])
                case name if name in _VALUES:
                    stack.append(value)
                case name if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                case name if name in _EMPTY:
                    stack.append(_EMPTY[name]())
                case name if name in _TUPLES:
                    items = [stack.pop() for _ in range(_TUPLES[name])]
                    stack.append(tuple(reversed(items)))
                case "MARK":
                    marked.append(stack)
                    stack = []
                case "TUPLE":
                    items = since_mark()
                    stack.append(tuple(items))
                case "APPEND":
                    item = stack.pop()
                    target(list).append(item)
                case "APPENDS":
                    items = since_mark()
                    target(list).extend(items)
                case "SETITEM":
                    item, key = stack.pop(), stack.pop()
                    fill([key, item])
                case "SETITEMS":
                    fill(since_mark())
                case "ADDITEMS":
                    items = since_mark()
                    _check(all(type(item) is str for item in items), "a set holds more than names")
                    target(set).update(items)
                case "GLOBAL" | "STACK_GLOBAL":
                    if opcode.name == "STACK_GLOBAL":
                        name, module = stack.pop(), stack.pop()
                        _check(type(name) is type(module) is str, "the name of a global is no text")
                        value = f"{module} {name}"
                    _check(value in names, f"it asks for {value.replace(' ', '.')[:100]!r}")
                    stack.append(names[value])
                case "REDUCE" | "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    _check(type(arguments) is tuple, "it calls with arguments that are no tuple")
                    # nothing but our stand-ins can be called: the machine makes no other callables
                    _check(callable(function), "it calls something that is not a function")
                    stack.append(function(*arguments))
                case "BUILD":
                    state = stack.pop()
                    self._set_state(stack[-1], state)
                case "BINPERSID" if storage:
                    stack.append(storage(stack.pop()))
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    _check(len(stack) == 1 and not marked, "its pickle ends with a filled stack")
                    return stack.pop()
                case name:
                    raise ValueError(f"it asks for the pickle opcode {name}")

    @staticmethod
    def _set_state(record, state):
        """What BUILD does: once per object, and only where the format has it."""
        match record:
            case _Record("module", "ModuleDict", None) if type(state) is dict:
                record.state = state
            case _Record("dtype", _, None):
                expected = (3, "|" if record.name == "b1" else "<", None, None, None, -1, -1, 0)
                plain = type(state) is tuple and all(
                    type(v) in (int, str, type(None)) for v in state
                )
                _check(plain and state == expected, "a numpy dtype is not plain")
                record.state = state
            case dict() if type(state) is dict and list(state) == ["_metadata"]:
                pass  # versions of the modules, an attribute of the dict that is a state dict
            case _:
                raise ValueError("it sets the state of something that takes none")

    @staticmethod
    def _dict():
        return {}

    @staticmethod
    def _module_dict():
        return _Record("module", "ModuleDict")

    @staticmethod
    def _dtype(name, align, copy):
        _check(type(name) is str and name in _NUMPY_SCALARS, "a numpy dtype is not a plain number")
        return _Record("dtype", name)

    @staticmethod
    def _scalar(dtype, content):
        match dtype, content:
            case _Record("dtype", name, tuple()), bytes():
                code = _NUMPY_SCALARS[name]
                _check(len(content) == struct.calcsize(code), "a numpy scalar has a wrong length")
                return struct.unpack(code, content)[0]
        raise ValueError("a numpy scalar is not made of a dtype and bytes")

    @staticmethod
    def _persistent(meta):
        match meta:
            case {
                "type": str() as kind,
                "version": int() as version,
                "module_src": str(),  # never looked at
                "class_name": str() as name,
                "state": dict() as state,
            } if (kind, version) == ("class", 6):
                _check(re.fullmatch(r"\w{1,64}", name), "the name of a class is no identifier")
                return _Record("module", name, state)
        raise ValueError("a persistent object is not a class of version 6 with source and state")

    def claim(self, identity):
        """A storage without content, from the persistent id that ``torch.save`` gives it."""
        match identity:
            case ("storage", torch.dtype() as dtype, str() as key, str(), int() as count, *views):
                _check(views in ([], [None]), "a storage is a view of another one")
                _check(
                    0 < count * dtype.itemsize <= self.size,
                    "a storage claims to be empty or larger than the file",
                )
                flat = torch.empty(count, dtype=dtype, device="meta")
                known = self.claims.setdefault(key, flat)
                _check(
                    (known.dtype, known.numel()) == (dtype, count),
                    "a storage has two types or two lengths",
                )
                return _Record("storage", key, flat)
        raise ValueError("a persistent id is not that of a storage")

    def legacy(self, stream, calls):
        """What was saved, and the keys of its storages, whose content follows in the stream."""
        names = _STORAGES | calls
        magic, version, system = (self.run(stream, {}) for _ in range(3))
        _check(
            (magic, version) == (0x1950A86A20F9469CFC6C, 1001)
            and type(system) is dict
            and system.get("little_endian") is True,
            "it is not a little-endian file of torch.save",
        )
        saved = self.run(stream, names, self.claim)
        return saved, self.run(stream, {})

    def _storage(self, content):
        _check(type(content) is bytes, "a storage is not made of bytes")
        self.bytes -= len(content)
        _check(self.bytes >= 0, "its storages are larger than the file")
        self.claims.clear()
        stream = io.BytesIO(content)
        saved, keys = self.legacy(stream, {})
        _check(
            type(saved) is _Record and keys == [saved.name], "a storage is not saved as one storage"
        )
        start, count, dtype = stream.tell() + 8, saved.state.numel(), saved.state.dtype
        _check(
            int.from_bytes(content[start - 8 : start], "little") == count
            and len(content) - start == saved.state.nbytes,
            "a storage does not have the length that it claims",
        )
        # a copy that can be written to
        flat = torch.frombuffer(bytearray(memoryview(content)[start:]), dtype=dtype)
        return _Record("storage", saved.name, flat)

    @staticmethod
    def _tensor(storage, offset, size, stride, requires_grad, hooks):
        _check(
            type(storage) is _Record and storage.kind == "storage",
            "a tensor is not made of a storage",
        )
        flat = storage.state
        _check(
            type(size) is type(stride) is tuple and len(size) == len(stride) <= 8,
            "the sizes and strides of a tensor are not tuples of one length, at most 8",
        )
        numbers = (offset, *size, *stride)
        _check(
            all(type(n) is int and 0 <= n <= flat.numel() for n in numbers)
            and 0 not in size
            and math.prod(size) <= flat.numel()
            and offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) < flat.numel(),
            "a tensor reaches beyond its storage",
        )
        _check_autograd(requires_grad, hooks)
        return flat.as_strided(size, stride, offset)

    @staticmethod
    def _parameter(tensor, requires_grad, hooks):
        _check(type(tensor) is torch.Tensor, "a parameter is not made of a tensor")
        _check_autograd(requires_grad, hooks)
        return tensor

    def collect(self, module, prefix="", depth=0):
        """Names and tensors of the state dict of a module, in its order."""
        place = prefix.rstrip(".") or "it"
        _check(
            type(module) is _Record and module.kind == "module" and type(module.state) is dict,
            f"{place} is not a module",
        )
        _check(depth <= 8, "its modules are nested more than 8 deep")
        # no module twice: neither a cycle nor a tree that grows by sharing
        _check(id(module) not in self.seen, f"{place} is a module that is in the network twice")
        self.seen.add(id(module))
        parameters, buffers, modules = (
            module.state.get(part) for part in ("_parameters", "_buffers", "_modules")
        )
        transient = module.state.get("_non_persistent_buffers_set", set())
        _check(
            type(parameters) is type(buffers) is type(modules) is dict and type(transient) is set,
            f"{place} has no parameters, buffers and modules",
        )
        self._spend(len(parameters) + len(buffers) + len(modules))
        for name in (*parameters, *buffers, *modules):
            _check(re.fullmatch(r"\w{1,64}", name), f"{name[:64]!r} is no name of a parameter")
        kept = {name: buffer for name, buffer in buffers.items() if name not in transient}
        for name, tensor in (parameters | kept).items():
            if tensor is not None:
                _check(type(tensor) is torch.Tensor, f"{prefix}{name} is not a tensor")
                yield prefix + name, tensor
        for name, child in modules.items():
            if child is not None:
                yield from self.collect(child, f"{prefix}{name}.", depth + 1)


def load_edm_pickle(path, key="ema") -> EDMCheckpoint:
    """A network of one of EDM's checkpoints (``network-snapshot-*.pkl``), as data.

    Nothing of the file is imported, compiled or called: see the module's description. The tensors
    are copies, so the file may change afterwards; memory is at most about twice its size, besides
    the mapped file.

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
        size = len(stream)
        reader = _Reader(size)
        content = reader.run(stream, reader.network_calls)
        _check(stream.tell() == size, "bytes follow the end of its pickle")
        _check(type(content) is dict, "it does not hold a dict")
        _check(
            key in content, f"it holds no {key!r} but {[name[:40] for name in list(content)[:8]]}"
        )
        state = dict(reader.collect(content[key]))
        _check(state, f"its {key!r} has no parameters")
        # one tensor under many names costs nothing here, but would wherever it is copied
        _check(
            sum(t.nbytes for t in state.values()) <= size, "its tensors are larger than the file"
        )
        network = content[key]
        arguments, init_kwargs = (network.state.get(f"_init_{part}") for part in ("args", "kwargs"))
        _check(
            type(arguments) is tuple and not arguments and type(init_kwargs) is dict,
            f"its {key!r} was not constructed with recorded keyword arguments alone",
        )
        return EDMCheckpoint(network.name, _plain(init_kwargs, depth=3), state)


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

    ``torch.load(weights_only=True)`` reads the file, after the stack machine of this module found
    nothing in it but tensors within their storages: torch's own restriction was incomplete before
    2.6 (CVE-2025-32434) and 2.10 (CVE-2026-24747). A zip file (the format since torch 1.6) is
    mapped: the tensors read it when they are used, so it has to stay as it is.

    Tensors are floating-point, int32 or int64, and none is empty or larger than its storage.

    Args:
        path: the file, usually ``.pt`` or ``.pth``.

    Raises:
        ValueError: the file is missing, damaged, or holds anything but a flat dict of tensors.
    """
    with _refusing(path):
        size = Path(path).stat().st_size
        reader = _Reader(size)
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            if zipped:
                source, content = str(path), _saved_in_zip(file, reader)
            else:  # from memory: given a file, torch would first try whether it is a tar archive
                source = io.BytesIO(file.read())
                content, _ = reader.legacy(source, reader.tensor_calls)
                source.seek(0)
        _check(type(content) is dict, "it does not hold a dict")
        for name, tensor in content.items():
            kind = type(tensor).__name__
            _check(kind == "Tensor", f"it is no flat dict of tensors, {name[:64]!r} is a {kind}")
        claimed = sum(flat.nbytes for flat in reader.claims.values())
        _check(claimed <= size, "its storages are larger than the file")
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
        return {name: tensor.detach() for name, tensor in loaded.items()}


def _saved_in_zip(file, reader):
    """What a zip file by ``torch.save`` holds, its tensors without content."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        _check(len(entries) == len(archive.infolist()), "its zip has two entries of one name")
        # torch.save never compresses: what is in the file is not larger than the file
        _check(
            all(entry.compress_type == zipfile.ZIP_STORED for entry in entries.values())
            and sum(entry.file_size for entry in entries.values()) <= reader.size,
            "its zip is compressed",
        )
        pickles = [name for name in entries if name.endswith(".pkl")]
        _check(
            len(pickles) == 1 and pickles[0].endswith("/data.pkl"),
            f"its zip is not of torch.save, or a TorchScript program, with pickles {pickles[:4]}",
        )
        folder = pickles[0].removesuffix("data.pkl")
        stream = io.BytesIO(archive.read(pickles[0]))
        content = reader.run(stream, _STORAGES | reader.tensor_calls, reader.claim)
        for key, flat in reader.claims.items():
            entry = entries.get(f"{folder}data/{key}")
            _check(entry and entry.file_size == flat.nbytes, "a storage is not in its zip")
        return content
