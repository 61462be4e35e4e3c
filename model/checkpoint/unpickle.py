"""`python unpickle.py SOURCE TARGET SECONDS BYTES`: the tensors of a file that torch.save wrote, as safetensors.

A program of its own, run by convert.py, so that a damaged or hostile file can harm nothing but this process: it may use
SECONDS of a core, BYTES of memory, and write no more than those. Only tensors and plain values are unpickled. The reason why
a file can't be read is printed, and the status is 1.
"""

import json
import re
import resource
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def main(source: Path, target: Path, seconds: int, num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    for limit in (resource.RLIMIT_DATA, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (num_bytes, num_bytes))
    try:
        write_tensors(source, target)
    except Exception as error:
        print(reason(error))
        sys.exit(1)


def write_tensors(source: Path, target: Path) -> None:
    # Files older than PyTorch 1.6 are no archives and can't be mapped.
    loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    metadata = {"format": "pt"}
    if isinstance(loaded, dict) and "model" in loaded and "model_args" in loaded:  # nanoGPT's
        metadata["model_args"] = json.dumps(loaded["model_args"])
        loaded = loaded["model"]
    tensors = distinct(loaded)
    found, size = sum(tensor.nbytes for tensor in tensors.values()), source.stat().st_size
    if found > size:  # a single number, repeated by a stride of 0
        raise ValueError(f"its tensors have {found} bytes, the file only {size}")
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    for name, tensor in tensors.items():
        is_alone = users[tensor.untyped_storage().data_ptr()] == 1
        tensors[name] = tensor.contiguous() if is_alone else tensor.clone(memory_format=torch.contiguous_format)
    save_file(tensors, target, metadata)


def distinct(loaded: Any) -> dict[str, Tensor]:
    """The tensors of a state dict; of names that share one tensor, such as a tied head's, only the first."""
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds no tensors by name, but a {type(loaded).__name__}")
    names: dict[Any, str] = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            found = f"{type(name).__name__} {name!r:.80} to {type(tensor).__name__}"
            raise ValueError(f"it must map names to tensors, but maps {found}")
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        names.setdefault(view if tensor.numel() else name, name)
    return {name: loaded[name] for name in names.values()}


def reason(error: Exception) -> str:
    """One line. torch's own tells at length how to read the file in spite of its danger."""
    text = str(error)
    if code := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {code[1]}, which is neither a tensor nor a plain value and could run code"
    text = text.rsplit("WeightsUnpickler error: ", 1)[-1]
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
