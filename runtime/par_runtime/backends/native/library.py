"""Loading the compiled ``step.c``: its structures as ctypes, and the reasons why it cannot be used."""

from __future__ import annotations

import ctypes
from pathlib import Path

from par_runtime.backends.native.compiled import KernelError, compiled_file, once, open_compiled
from par_runtime.bundle import Bundle

#: dtype of a stored matrix -> its number in matrix.h
STORED = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "int4": 4}
#: what a matrix is multiplied in -> its number in matrix.h
ARITHMETIC = {"fp32": 0, "bf16": 1, "int8": 2}

TILES, SMMLA = 4, 8  #: of AMX, and of ARM in int8: bits of parvis_extra_instructions()
HEAD_MULTIPLE = 8  #: attention.h takes so many numbers of a head at a time

Pointers = ctypes.POINTER(ctypes.c_void_p)


class Matrix(ctypes.Structure):
    """``Matrix`` of matrix.h: one packed matrix."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stored", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("arithmetic", ctypes.c_int64),
        ("scales", ctypes.c_int64),
        ("layout", ctypes.c_int64),
    )


class Model(ctypes.Structure):
    """``Model`` of step.c: sizes and weights. step.c has the shapes."""

    _fields_ = (
        ("dim", ctypes.c_int64),
        ("n_layers", ctypes.c_int64),
        ("n_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("ffn_dim", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("cache_slots", ctypes.c_int64),
        ("head_columns", ctypes.c_int64),
        ("cache", ctypes.c_int64),
        ("attention_scale", ctypes.c_float),
        ("embed", ctypes.c_void_p),
        ("embed_rows", ctypes.c_int64),
        ("embed_stored", ctypes.c_int64),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("wqkv", ctypes.POINTER(Matrix)),
        ("wo", ctypes.POINTER(Matrix)),
        ("w13", ctypes.POINTER(Matrix)),
        ("w2", ctypes.POINTER(Matrix)),
        ("attention_norm", Pointers),
        ("ffn_norm", Pointers),
        ("norm", ctypes.c_void_p),
        ("output", Matrix),
    )


class Step(ctypes.Structure):
    """``Step`` of step.c: what a call is given. step.c has the shapes."""

    _fields_ = (
        ("model", ctypes.POINTER(Model)),
        ("rows", ctypes.c_int64),
        ("query", ctypes.c_int64),
        ("images", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("write", ctypes.c_void_p),
        ("cache_row", ctypes.c_void_p),
        ("uncond_row", ctypes.c_void_p),
        ("guidance", ctypes.c_void_p),
        ("temperature", ctypes.c_void_p),
        ("top_k", ctypes.c_void_p),
        ("top_p", ctypes.c_void_p),
        ("uniform", ctypes.c_void_p),
        ("keys", Pointers),
        ("values", Pointers),
        ("tokens", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("record", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
    )


def library_file() -> Path | None:
    """The compiled library beside this file; None where the installation built none."""
    return compiled_file("_step")


def open_library(file: Path | None) -> ctypes.CDLL:
    """Load ``file``, check that its structures have the sizes of those above, and declare its functions.

    Raises KernelError.
    """
    sizes = [
        ctypes.sizeof(Matrix),
        Matrix.layout.offset,
        ctypes.sizeof(Model),
        Model.output.offset,
        ctypes.sizeof(Step),
        Step.workspace.offset,
    ]
    return open_compiled(file, _declare, "parvis_", sizes)


def _declare(lib: ctypes.CDLL) -> None:
    """Declare the functions of ``step.c``. Raises AttributeError where one is missing."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    lib.parvis_struct_sizes.argtypes = (pointer,)
    lib.parvis_instructions.restype = ctypes.c_char_p
    lib.parvis_extra_instructions.restype = ctypes.c_int
    lib.parvis_pool_open.restype = lib.parvis_pool_close.restype = None
    lib.parvis_pool_open.argtypes = (ctypes.c_int, Pointers)
    lib.parvis_pool_close.argtypes = (Pointers,)
    lib.parvis_settle.argtypes = (pointer,)
    lib.parvis_workspace.restype = integer
    lib.parvis_workspace.argtypes = (ctypes.POINTER(Model), integer, integer, ctypes.c_int)
    lib.parvis_draw.argtypes = (pointer, integer, integer, *[pointer] * 6)
    lib.parvis_step.argtypes = (pointer, ctypes.POINTER(Step))
    lib.parvis_products.argtypes = (
        ctypes.POINTER(Matrix), pointer, integer, integer, integer, integer, pointer, pointer
    )  # fmt: skip
    lib.parvis_packed_bytes.restype = integer
    lib.parvis_packed_bytes.argtypes = (integer, integer)
    lib.parvis_product_rows.restype = integer
    lib.parvis_product_rows.argtypes = (integer,)
    lib.parvis_layout.restype = integer
    lib.parvis_layout.argtypes = (integer, integer)
    lib.parvis_matrix_bytes.restype = integer
    lib.parvis_matrix_bytes.argtypes = (ctypes.POINTER(Matrix), integer, integer)
    lib.parvis_pack_matrix.argtypes = (
        pointer, ctypes.POINTER(Matrix), pointer, pointer, integer, integer, ctypes.c_int, pointer
    )  # fmt: skip


def matrix_of(lib: ctypes.CDLL, dtype: str, arithmetic: str, group: int = 0, scales: str = "float32") -> Matrix:
    """How this CPU multiplies a matrix in ``arithmetic``, one of ``dtypes.ARITHMETICS``; its ``data`` is missing.

    ``group`` and ``scales``, their dtype: of a quantised matrix. In "int8" others are multiplied in bf16.
    """
    if not group and arithmetic == "int8":
        arithmetic = "bf16"
    matrix = Matrix(stored=STORED[dtype], group=group, arithmetic=ARITHMETIC[arithmetic], scales=STORED[scales])
    matrix.layout = lib.parvis_layout(matrix.stored, matrix.arithmetic)
    return matrix


_opened = once(open_library)


def library() -> ctypes.CDLL | None:
    """The compiled ``step.c``; None where it cannot be used on this machine. Loaded once."""
    opened = _opened(library_file())
    return None if isinstance(opened, KernelError) else opened


def has_tiles(lib: ctypes.CDLL) -> bool:
    """Whether AMX multiplies in bf16, and many rows in int8, and makes attention to keys in bf16."""
    return bool(lib.parvis_extra_instructions() & TILES)


def described(lib: ctypes.CDLL) -> str:
    """The instructions that the kernels use, as ``parvis doctor`` prints them."""
    instructions: str = lib.parvis_instructions().decode()
    extra = lib.parvis_extra_instructions()
    dots = [name for bit, name in ((1, "bf16"), (2, "int8")) if extra & bit]
    products = "AMX and dot products" if extra & TILES else "matrix products" if extra & SMMLA else "dot products"
    return f"{instructions} with {products} in {' and '.join(dots)}" if dots else instructions


def why_not(bundle: Bundle) -> str | None:
    """Why ``bundle`` cannot run on the C kernels on this machine, or None where it can."""
    lib = _opened(library_file())
    if isinstance(lib, KernelError):
        return str(lib)
    m, panel = bundle.model, lib.parvis_panel()
    inner = m["n_heads"] * m["head_dim_padded"]
    if any(size % panel for size in (m["dim"], inner, m["ffn_dim"])):
        return f"a width of the model is not a multiple of {panel}"
    if m["head_dim_padded"] % HEAD_MULTIPLE:
        return f"its heads have {m['head_dim_padded']} numbers, which is not a multiple of {HEAD_MULTIPLE}"
    if not bundle.weights or bundle.weights["output"].dtype not in STORED:
        return "the manifest has no table of weights in fp32, fp16, bf16, int8 or int4; export the bundle again"
    return None
