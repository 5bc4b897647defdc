"""What a file is that is no checkpoint of ours, and what to do about it: by its first bytes, its name or its keys.

Only for messages: nothing here decides how a file is read.
"""

from __future__ import annotations

import errno
import re
import shlex
import stat
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from par_model.checkpoint.errors import shown, some
from par_model.system import naming

HEAD_BYTES = 512
STATE_DICT = "save the weights with torch.save(model.state_dict(), path) and give that file"
UNPACK = "unpack it and give the checkpoint in it"
#: First bytes -> what the file is, and what to do.
MAGIC: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the weights: run 'git lfs pull' in its repository, or download the file itself",
    ),
    (b"GGUF", f"is a GGUF file of llama.cpp: {STATE_DICT} from the training's own checkpoint"),
    (
        b"\x89HDF\r\n\x1a\n",
        "is an HDF5 file of Keras: give the .pt of a training in PyTorch",
    ),
    (b"\x1f\x8b", f"is a gzip archive: {UNPACK}"),
    (b"BZh", f"is a bzip2 archive: {UNPACK}"),
    (b"\xfd7zXZ\x00", f"is an xz archive: {UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"is a zstd archive: {UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"is a 7z archive: {UNPACK}"),
    (b"Rar!", f"is a RAR archive: {UNPACK}"),
    (b"\x93NUMPY", f"is an array of numpy: {STATE_DICT}"),
    (b"\x89PNG", "is a picture, not a checkpoint: give the .pt or .safetensors of the weights"),
    (b"\xff\xd8\xff", "is a picture, not a checkpoint: give the .pt or .safetensors of the weights"),
    (b"%PDF", "is a PDF document, not a checkpoint: give the .pt or .safetensors of the weights"),
    (b"tjgg", f"is a GGML file of llama.cpp: {STATE_DICT} from the training's own checkpoint"),
    (b"lmgg", f"is a GGML file of llama.cpp: {STATE_DICT} from the training's own checkpoint"),
    (b"ftrt", "is a plan of TensorRT: give the checkpoint that it was made from"),
    (b"ptrt", "is a plan of TensorRT: give the checkpoint that it was made from"),
)
#: End of a name -> what the file is, for formats without first bytes of their own.
ENDINGS: tuple[tuple[str, str], ...] = (
    (".onnx", "is an ONNX graph: give the PyTorch checkpoint that it was made from"),
    (".pb", "is a graph of TensorFlow, which holds no PAR model of PyTorch: give the .pt of the training"),
    (".ckpt.index", "is a part of a checkpoint of TensorFlow: give the .pt of a training in PyTorch"),
    (".ckpt.meta", "is a part of a checkpoint of TensorFlow: give the .pt of a training in PyTorch"),
    (".tflite", "is a model of TensorFlow Lite: give the .pt of the training"),
    (".msgpack", "is a checkpoint of Flax, which holds no PAR model of PyTorch: give the .pt of the training"),
    (".distcp", "is one rank's part of a checkpoint of torch.distributed: give its folder"),
    (".engine", "is a plan of TensorRT: give the checkpoint that it was made from"),
    (".plan", "is a plan of TensorRT: give the checkpoint that it was made from"),
    (".crdownload", "is a download that did not end: download it again"),
    (".part", "is a download that did not end: download it again"),
    (".incomplete", "is a download that did not end: download it again"),
    (".aria2", "is a download that did not end: download it again"),
)
#: errno of the system's faults, where another file would not help -> what to do.
SYSTEM = {
    errno.EACCES: "change its permissions, or run it as another user",
    errno.EIO: "the disk reports an error: check the disk, and its connection",
    errno.ENOMEM: "the system is out of memory: free some",
    errno.ESTALE: "the network's disk has lost it: try again, or mount that disk again",
}
#: The magic number that begins a file of ``torch.save`` from before torch 1.6, as text (pickle protocol 0).
LEGACY_TEXT = b"L119547037146038801333356"


def not_a_file(path: Path) -> str | None:
    """Why nothing can be read from ``path``, or None for a regular file or a folder. Nothing is opened."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "no such file; give a checkpoint: .pt, .safetensors or an index of shards"
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "no valid file name"
        number = error.errno if isinstance(error, OSError) else None
        remedy = SYSTEM.get(number or 0, "give a checkpoint: .pt, .safetensors or an index of shards")
        return f"cannot be read ({reason.lower()}); {remedy}"
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    return f"is {kind}, not a file: checkpoints are mapped into memory, so save it to a disk and give that file"


def file_problem(path: Path) -> str | None:
    """What the file at ``path`` is if it is surely no checkpoint, with what to do; None otherwise. Raises OSError."""
    with naming(path), path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        return "is empty; copy or download it again"
    for magic, what in MAGIC:
        if head.startswith(magic):
            return what
    for ending, what in ENDINGS:
        if path.name.endswith(ending):
            return what
    if head[257:262] == b"ustar":
        return f"is a tar archive: {UNPACK}"
    if head[4:8] == b"TFL3":
        return dict(ENDINGS)[".tflite"]
    if not head.strip(b"\0") and len(head) == HEAD_BYTES:
        return "begins with zeros: a download or a copy of it did not end; copy or download it again"
    if head.startswith(b"PK"):
        return _zip_problem(path)
    return _text_problem(head)


def _zip_problem(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
        return None  # a truncated checkpoint: the reader says so
    if any(name.endswith("/constants.pkl") for name in names):
        return f"is a TorchScript archive: load it with torch.jit.load and {STATE_DICT}"
    if any(name.endswith("data.pkl") for name in names):
        return None
    if any(name.endswith(".npy") for name in names):
        return f"holds arrays of numpy: {STATE_DICT}"
    if "model.weights.h5" in names:
        return "is an archive of Keras, which holds no PAR model of PyTorch: give the .pt of the training"
    return f"is a zip archive ({some(names)}), which torch.save did not write: {UNPACK}"


def _text_problem(head: bytes) -> str | None:
    """What a file of text is. Text is what no checkpoint begins with, but for the oldest format."""
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return (
            "is a web page, not the weights: download the file itself (on the hub: 'resolve' in place of 'blob' in the "
            "address, or hf://OWNER/REPOSITORY/FILE)"
        )
    printable = len(head) > 16 and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    if not printable or head.startswith(LEGACY_TEXT):
        return None
    first = head.decode("ascii").strip().splitlines()
    kind = "JSON" if start.startswith((b"{", b"[")) else "text"
    return f"is {kind}, not a checkpoint (it begins {shown(first[0] if first else '')}); give the file of the weights"


# --- folders -----------------------------------------------------------------------------------------------------


def folder_problem(folder: Path) -> str | None:
    """What a folder is that holds no single checkpoint file, with what to do; None where nothing is known of it."""
    names = {entry.name for entry in folder.iterdir()}
    if "manifest.json" in names and "weights.data" in names:
        return (
            "is a bundle already: 'parvis generate' takes it as it is; to export again give the checkpoint that it was "
            "made from"
        )
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return (
            "is a checkpoint of torch.distributed in parts (.distcp): make it one file with 'python -m torch."
            f"distributed.checkpoint.format_utils dcp_to_torch {shlex.quote(str(folder))} model.pt' and give model.pt"
        )
    if any(re.fullmatch(r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_(model|optim)_states\.pt", name) for name in names) or (
        "zero_to_fp32.py" in names
    ):
        return f"is a checkpoint of DeepSpeed in parts: make it one file with {ZERO_TO_FP32}"
    if "saved_model.pb" in names or any(re.search(r"\.(index|data-\d+-of-\d+)$", name) for name in names):
        return "is a checkpoint of TensorFlow, which holds no PAR model of PyTorch: give the .pt of the training"
    if "_CHECKPOINT_METADATA" in names or "flax_model.msgpack" in names:
        return "is a checkpoint of Flax, which holds no PAR model of PyTorch: give the .pt of the training"
    if any(name.startswith("adapter_model.") for name in names):
        return ADAPTER
    return None


ZERO_TO_FP32 = "'python zero_to_fp32.py . OUT' in the folder that DeepSpeed saved, and give the file in OUT"
ADAPTER = (
    "holds an adapter (LoRA), not a model: merge it into its base model (in PEFT merge_and_unload()), then "
    "torch.save(model.state_dict(), path)"
)


# --- keys --------------------------------------------------------------------------------------------------------


Ours = Literal["par", "vq", "video"]


class Kind(NamedTuple):
    """A kind of checkpoint that this package reads."""

    key: str  #: one of its keys, which no other kind has
    state_dict: str  #: what it is
    advice: str  #: what to do with it, where another kind is expected


OURS: dict[Ours, Kind] = {
    "par": Kind("tok_embeddings.weight", "a PAR or LlamaGen state dict", "a PAR model: give it as --checkpoint"),
    "vq": Kind(
        "encoder.conv_blocks.0.res.0.conv2.weight",
        "a VQ tokenizer state dict",
        "an image tokenizer: give it as --tokenizer",
    ),
    "video": Kind(
        "encoder_layers.0.conv.weight",
        "a video tokenizer state dict (MAGVIT-v2's layout with FSQ)",
        "a video tokenizer: give it as --tokenizer",
    ),
}


def keys_problem(tensors: Mapping[str, Tensor]) -> str | None:
    """What the tensors of a file are, where they are no weights of ours, with what to do; None where it is unknown."""
    names = list(tensors)

    def any_key(pattern: str) -> str | None:
        return next((name for name in names if re.search(pattern, name)), None)

    if key := any_key(r"(^|\.)lora_|\.(lora|adapter)s?\."):
        return f"{ADAPTER} ({key[:80]})"
    if key := any_key(r"(^|\.)_?flat_param(_\d+)?$"):
        return (
            f"holds FSDP's flattened parameters ({key[:80]}): save the whole state dict, with "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
        )
    if key := any_key(r"\.(absmax|quant_map|quant_state\..*|SCB|qweight|qzeros|g_idx|weight_scale|weight_packed)$"):
        return f"holds quantized weights ({key[:80]}): give the checkpoint that was quantized, in fp32, bf16 or fp16"
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0 and tensor.ndim <= 1]
    if empty and len(empty) > len(names) // 2:
        return (
            f"its tensors are empty ({empty[0][:80]}): ZeRO-3 of DeepSpeed keeps them in other files; make them one "
            f"file with {ZERO_TO_FP32}"
        )
    if key := any_key(r"^cls_embedding\.(cap_proj|uncond_embedding)"):
        return (
            f"is a text-to-image model ({key[:80]}), which takes the features of a text model; parvis runs "
            "class-conditional models: give one trained with --gpt-type c2i"
        )
    return None


def architecture_problem(names: Collection[str]) -> str | None:
    """The architecture that the keys ``names`` belong to, where it is a known one that is not ours."""
    for pattern, what in (
        (
            r"^quantizers?\.(mask|codebook|project_(in|out))\b",
            "a MAGVIT-v2 tokenizer with lookup-free quantisation (LFQ)",
        ),
        (r"^(encoder\.)?conv_in\.conv\.|^encoder\.conv_first\.conv\.", "a video tokenizer of another layout"),
        (r"^encoder\.down\.\d|^decoder\.up\.\d", "an image tokenizer of taming-transformers or latent diffusion"),
        (r"^(encoder\.down_blocks|decoder\.up_blocks)\.", "an image tokenizer of diffusers"),
        (r"^blocks\.\d+\.attn\.mat_qkv|^word_embed\.", "a VAR model"),
        (r"^(z_proj|mask_token|diffloss)\b", "a MAR model"),
        (r"(^|\.)(embed_tokens|lm_head)\.weight$", "a language model of transformers"),
        (r"^(x_embedder|t_embedder)\.|^(down_blocks|up_blocks)\.", "a diffusion model"),
        (r"^transformer\.(wte|h\.\d)", "a GPT-2 model"),
        (r"^(blocks|encoder\.layer|vision_model)\.", "a vision transformer"),
    ):
        if key := next((name for name in names if re.search(pattern, name)), None):
            return (
                f"is {what} ({key[:80]}); parvis reads PAR and LlamaGen models, LlamaGen's tokenizers (VQ-16, VQ-8), "
                "and video tokenizers of MAGVIT-v2's layout with FSQ"
            )
    return None


def content_problem(content: Mapping[Any, Any]) -> str | None:
    """What a file is whose content holds no weights by name; None where it is unknown."""
    keys: Collection[Any] = content.keys()
    if {"state", "param_groups"} <= set(keys):
        return "holds the state of an optimizer, not weights: give the file of the model beside it"
    if "optimizer_state_dict" in keys and "ds_version" in keys:
        return "holds the optimizer's part of a checkpoint of DeepSpeed: give the file ..._model_states.pt beside it"
    return None
