"""Converted checkpoints compute what their source does. What can't be converted is refused by name, and leaves nothing."""

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

import model.checkpoint.convert
from model.checkpoint import unpickle
from model.checkpoint.convert import convert
from model.checkpoint.files import CheckpointError
from model.checkpoint.tokenizer import r50k_base
from model.checkpoint.vocabulary import load_tokenizer
from service.cli import main
from tests.model.checkpoint.checkpoints import tiny
from tests.model.checkpoint.vocabularies import r50k_merges, r50k_vocab, spelled, write_vocabulary
from tests.model.logits import our_logits, transformers_logits

State = dict[str, Tensor]
TOKENS = torch.randint(331, (2, 50), generator=torch.Generator().manual_seed(3))
BYTES = {spelled(bytes([byte])): byte for byte in range(256)} | {"<end>": 256}


def refused(source: Path, target: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(source, target)
    assert not target.exists()
    assert list(target.parent.glob("*.tmp")) == []


def write_own_vocabulary(directory: Path) -> None:
    write_vocabulary(directory, BYTES, [])
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))


@pytest.fixture
def without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpickle in this process, for tests that are about something else: a process of its own takes 2 s to begin."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        try:
            unpickle.write_tensors(Path(command[3]), Path(command[4]))
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, unpickle.reason(error))
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr("model.checkpoint.convert.subprocess.run", run)


in_process = pytest.mark.usefixtures("without_a_process")


# Hugging Face's


def as_pickles(directory: Path, *, shards: int = 1, legacy: bool = False) -> Path:
    """The weights of a directory as transformers saved them before safetensors, which repeated a tied head."""
    (stored,) = directory.glob("*.safetensors")
    state = load_file(stored)
    stored.unlink()
    (embedding,) = [name for name in state if name.endswith(("wte.weight", "embed_tokens.weight"))]
    state.setdefault("lm_head.weight", state[embedding])
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return directory
    weight_map = {name: f"pytorch_model-{n % shards + 1:05}-of-{shards:05}.bin" for n, name in enumerate(state)}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in state if weight_map[name] == file}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.mark.parametrize(
    ("arch", "how"), [("gpt2", {}), ("gpt_neo", {"legacy": True}), ("opt", {"shards": 3}), ("opt-350m", {})]
)
@in_process
def test_pytorch_models_keep_their_logits_and_their_texts(arch: str, how: dict[str, Any], tmp_path: Path) -> None:
    source = tiny(arch, tmp_path)
    expected = transformers_logits(source, TOKENS)
    as_pickles(source, **how)
    write_own_vocabulary(source)
    (source / "generation_config.json").write_text('{"eos_token_id": 256}')
    (source / "training_args.bin").write_bytes(b"of no interest")
    convert(source, tmp_path / "out")
    found = our_logits(tmp_path / "out", TOKENS)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() <= 1e-4
    assert (transformers_logits(tmp_path / "out", TOKENS) - expected).abs().max() <= 1e-4
    assert load_tokenizer(tmp_path / "out").fingerprint() == load_tokenizer(source).fingerprint()
    for name in ("config.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not list((tmp_path / "out").glob("*.bin*"))


@in_process
def test_the_file_itself_may_be_named_and_may_have_any_name(tmp_path: Path) -> None:
    source = as_pickles(tiny("gpt2", tmp_path))
    write_own_vocabulary(source)
    (source / "pytorch_model.bin").rename(source / "step-100.pt")
    convert(source / "step-100.pt", tmp_path / "out")
    convert(source, tmp_path / "again")
    assert torch.equal(our_logits(tmp_path / "out", TOKENS), our_logits(tmp_path / "again", TOKENS))


@in_process
def test_weights_keep_their_dtype_and_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    source = as_pickles(tiny("gpt2", tmp_path))
    write_own_vocabulary(source)
    state = {name: tensor.half() for name, tensor in torch.load(source / "pytorch_model.bin").items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    torch.save(state, source / "pytorch_model.bin")
    convert(source, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == state.keys() - {"lm_head.weight"}
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < (source / "pytorch_model.bin").stat().st_size


@in_process
def test_a_gpt2_without_a_tokenizer_gets_the_one_that_was_assumed(tmp_path: Path) -> None:
    source = as_pickles(tiny("gpt2", tmp_path, vocab_size=50257))
    config = json.loads((source / "config.json").read_text())
    for eos_id in (50256, 11):
        (source / "config.json").write_text(json.dumps(config | {"bos_token_id": 50256, "eos_token_id": eos_id}))
        convert(source, tmp_path / f"out{eos_id}")
        theirs, ours = AutoTokenizer.from_pretrained(tmp_path / f"out{eos_id}"), load_tokenizer(tmp_path / f"out{eos_id}")
        assert theirs.encode("Once upon a time") == ours.encode("Once upon a time") == [7454, 2402, 257, 640]
        assert theirs.model_max_length == 256
        assert ours.eos_id == eos_id


# nanoGPT's: a small model of the same shape as its model.py


class Block(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, 3 * width, bias=bias), "c_proj": nn.Linear(width, width, bias=bias)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width, bias=bias), "c_proj": nn.Linear(4 * width, width, bias=bias)}
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.attn["c_attn"](self.ln_1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.attn["c_proj"](mixed)
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self, *, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int, bias: bool):
        super().__init__()
        parts = {
            "wte": nn.Embedding(vocab_size, n_embd),
            "wpe": nn.Embedding(block_size, n_embd),
            "h": nn.ModuleList(Block(n_embd, n_head, bias) for _ in range(n_layer)),
            "ln_f": nn.LayerNorm(n_embd, bias=bias),
        }
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.2, generator=generator)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](torch.arange(tokens.shape[1]))
        for block in self.transformer["h"]:  # type: ignore[attr-defined]
            x = block(x)
        out: Tensor = self.lm_head(self.transformer["ln_f"](x))
        return out


def write_nanogpt(directory: Path, *, prefix: str = "", **changes: Any) -> NanoGPT:
    """ckpt.pt as nanoGPT's train.py writes it: model, optimizer, arguments and settings."""
    args: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "bias": True, "vocab_size": 50304}
    nano = NanoGPT(**args | changes)
    optimizer = torch.optim.AdamW(nano.parameters())
    nano.lm_head.weight.grad = torch.ones_like(nano.lm_head.weight)
    optimizer.step()
    state = {prefix + name: tensor for name, tensor in nano.state_dict().items()}
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint: dict[str, Any] = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": args | {"dropout": 0.0} | changes,
    }
    checkpoint |= {"iter_num": 5, "best_val_loss": torch.tensor(3.5), "config": {"dataset": "openwebtext"}}
    torch.save(checkpoint, directory / "ckpt.pt")
    return nano


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@in_process
def test_nanogpt(bias: bool, prefix: str, tmp_path: Path) -> None:
    nano = write_nanogpt(tmp_path / "run", bias=bias, prefix=prefix)
    convert(tmp_path / "run", tmp_path / "out")
    expected = nano(TOKENS)[..., :50257]  # no token of the text, but padding
    assert (our_logits(tmp_path / "out", TOKENS) - expected).abs().max() <= 1e-4
    assert (transformers_logits(tmp_path / "out", TOKENS) - expected).abs().max() <= 1e-4
    assert load_tokenizer(tmp_path / "out").fingerprint() == r50k_base().fingerprint()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("Once upon a time") == [7454, 2402, 257, 640]


@in_process
def test_nanogpt_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    nano = write_nanogpt(tmp_path / "run", vocab_size=331)
    message = "ckpt.pt has a vocabulary of 331 tokens, which is not r50k_base's 50257: put the model's tokenizer.json, or "
    refused(tmp_path / "run", tmp_path / "out", message)
    write_own_vocabulary(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "out")
    assert (our_logits(tmp_path / "out", TOKENS) - nano(TOKENS)).abs().max() <= 1e-4
    assert load_tokenizer(tmp_path / "out").eos_id == 256


@in_process
def test_nanogpt_with_an_untied_head(tmp_path: Path) -> None:
    write_nanogpt(tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "ckpt.pt")
    checkpoint["model"]["lm_head.weight"] = checkpoint["model"]["lm_head.weight"].flip(0)
    torch.save(checkpoint, tmp_path / "run" / "ckpt.pt")
    convert(tmp_path / "run", tmp_path / "out")
    found = our_logits(tmp_path / "out", TOKENS)
    assert (transformers_logits(tmp_path / "out", TOKENS) - found).abs().max() <= 1e-4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ckpt: ckpt["model_args"].pop("n_head"), "ckpt.pt: model_args: n_head is missing"),
        (lambda ckpt: ckpt["model_args"].update(bias=1), "ckpt.pt: model_args: bias must be true or false, got 1"),
        (lambda ckpt: ckpt["model_args"].update(n_layer=3), r"is no GPT-2 of its sizes; missing or left over: h\.2\.attn"),
        (lambda ckpt: ckpt["model"].pop("transformer.wte.weight"), "missing or left over: wte.weight"),
        (lambda ckpt: ckpt["model"].update(rope=torch.ones(1)), "missing or left over: rope"),
        (lambda ckpt: ckpt["model_args"].update(block_size=65), r"wpe.weight has shape \(64, 32\), expected \(65, 32\)"),
        (
            lambda ckpt: ckpt["model"].update(step=3),
            "ckpt.pt can't be read: it must map names to tensors, but maps str 'step' to int",
        ),
        (lambda ckpt: ckpt.update(model_args=[1]), "ckpt.pt: model_args: must be an object, got list"),
        (
            lambda ckpt: ckpt.pop("model_args"),
            "ckpt.pt can't be read: it must map names to tensors, but maps str 'model' to dict",
        ),
    ],
)
@in_process
def test_nanogpt_that_is_not_whole(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    write_nanogpt(tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "ckpt.pt")
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "run" / "ckpt.pt")
    refused(tmp_path / "run", tmp_path / "out", message)


# llm.c's


def write_llm_c(file: Path, source: Path, version: int, dtype: torch.dtype) -> None:
    """As llm.c's train_gpt2.py writes a model of transformers: a header, then tensors, those of all layers together."""
    config, state = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    vocab, layers = config["vocab_size"], config["n_layer"]
    padded = -(-vocab // 128) * 128
    header = np.zeros(256, dtype=np.int32)
    sizes = [20240326, version, config["n_positions"], vocab, layers, config["n_head"], config["n_embd"], padded]
    header[: len(sizes)] = sizes
    order = [F.pad(tensors["wte.weight"], (0, 0, 0, padded - vocab)), tensors["wpe.weight"]]
    for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        order += [tensors[f"h.{i}.{name}.weight"].t() for i in range(layers)]
        order += [tensors[f"h.{i}.{name}.bias"] for i in range(layers)]
    order += [tensors["ln_f.weight"], tensors["ln_f.bias"]]
    with file.open("wb") as opened:
        opened.write(header.tobytes())
        for tensor in order:
            as_integers = tensor.to(dtype).contiguous().view(torch.int16 if dtype is torch.bfloat16 else torch.int32)
            opened.write(as_integers.numpy().tobytes())


@pytest.mark.parametrize(("version", "dtype", "tolerance"), [(3, torch.float32, 1e-4), (5, torch.bfloat16, 1e-4)])
def test_llm_c(version: int, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    source = tiny("gpt2", tmp_path, vocab_size=50257)
    write_llm_c(tmp_path / "model.bin", source, version, dtype)
    convert(tmp_path / "model.bin", tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    rounded = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(rounded, source / "model.safetensors", {"format": "pt"})
    expected = transformers_logits(source, TOKENS)
    assert (our_logits(tmp_path / "out", TOKENS) - expected).abs().max() <= tolerance
    assert load_tokenizer(tmp_path / "out").fingerprint() == r50k_base().fingerprint()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, 4, r"model.bin: llm.c's version 4 is not supported, only 3 and 5"),
        (4, 4, r"model.bin has \d+ bytes, but its header tells of \d+"),
        (4, 2**31 - 1, r"model.bin has \d+ bytes, but its header tells of \d+"),
        (6, 0, r"model.bin: the header names sizes below 1: .*'n_embd': 0"),
        (5, 7, "n_embd 64 is not a multiple of n_head 7"),
        (3, 50000, "has a vocabulary of 50000 tokens, which is not r50k_base's 50257"),
    ],
)
def test_llm_c_headers_that_can_not_be(place: int, value: int, message: str, tmp_path: Path) -> None:
    write_llm_c(tmp_path / "model.bin", tiny("gpt2", tmp_path, vocab_size=50257), 3, torch.float32)
    with (tmp_path / "model.bin").open("r+b") as file:
        file.seek(4 * place)
        file.write(value.to_bytes(4, "little"))
    refused(tmp_path / "model.bin", tmp_path / "out", message)


def test_llm_c_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes((20240326).to_bytes(4, "little"))
    refused(tmp_path / "model.bin", tmp_path / "out", "model.bin ends within llm.c's header")


# llama.cpp's


END = 700  # the id of <|endoftext|> in what write_gguf writes


def write_gguf(file: Path, source: Path, quantised: str, **changes: Any) -> None:
    """As llama.cpp's converter writes a GPT-2: linears as (outputs, inputs), the head next to the embedding."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    config = json.loads((source / "config.json").read_text()) | changes
    writer = gguf.GGUFWriter(file, config.get("architecture", "gpt2"))
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(config.get("pre", "gpt-2"))
    # The first of r50k_base: gguf takes seconds for all.
    tokens = [*list(r50k_vocab())[:END], "<|endoftext|>", "<user>", f"[PAD{END + 2}]"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * END + [3, 4, 5])
    writer.add_token_merges(r50k_merges()[: END - 256])
    writer.add_eos_token_id(config.get("eos", END))
    writer.add_bos_token_id(END)
    writer.add_add_bos_token(config.get("add_bos", False))
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm", "ln_2": "ffn_norm"}
    names |= {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    for name, tensor in {**state, "output.weight": state["wte.weight"]}.items():
        is_linear = name.startswith("h.") and tensor.dim() == 2
        array = np.ascontiguousarray((tensor.t() if is_linear else tensor).numpy())
        for ours, theirs in names.items():
            name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\g<1>{theirs}.", name)
        name = re.sub(r"^h\.", "blk.", name)
        kind = gguf.GGMLQuantizationType[quantised if array.ndim == 2 and name != "position_embd.weight" else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("quantised", "tolerance"), [("F32", 1e-5), ("F16", 1e-3), ("Q8_0", 2e-2)])
def test_gguf(quantised: str, tolerance: float, tmp_path: Path) -> None:
    source = tiny("gpt2", tmp_path, vocab_size=END + 3, n_layer=2)
    write_gguf(tmp_path / "tiny.gguf", source, quantised)
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    expected = transformers_logits(source, TOKENS)
    assert (our_logits(tmp_path / "out", TOKENS) - expected).abs().mean() <= tolerance * expected.std()
    ours, theirs = load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours.encode("Once upon<user>") == theirs.encode("Once upon<user>")
    assert ours.encode("<user>") == [END + 1]
    assert (ours.eos_id, theirs.eos_token_id, ours.special_tokens) == (END, END, {"<|endoftext|>": END})
    assert ours.bos_id is None
    write_gguf(tmp_path / "tiny.gguf", source, quantised, add_bos=True)
    convert(tmp_path / "tiny.gguf", tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").bos_id == END


def test_gguf_that_can_not_be_read(tmp_path: Path) -> None:
    source = tiny("gpt2", tmp_path, vocab_size=END + 3, n_layer=2)
    for changes, message in (
        ({"architecture": "gptneox"}, "architecture 'gptneox' is not supported, only 'gpt2'"),
        ({"eos": END + 3}, f"{END + 3} tokens have {END + 3} kinds, and their ends are {END + 3} and {END + 3}"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre 'llama-bpe' is not supported, only 'gpt-2'"),
    ):
        write_gguf(tmp_path / "tiny.gguf", source, "F32", **changes)
        refused(tmp_path / "tiny.gguf", tmp_path / "out", f"tiny.gguf can't be read as GGUF: {message}")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for size in (10, 1000, len(whole) - 1000):
        (tmp_path / "tiny.gguf").write_bytes(whole[:size])
        refused(tmp_path / "tiny.gguf", tmp_path / "out", "tiny.gguf can't be read as GGUF: ")


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    refused(
        tmp_path / "tiny.gguf", tmp_path / "out", r"tiny.gguf: a package of its own reads GGUF: pip install 'banded\[gguf\]'"
    )


# Damaged and hostile


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def bomb(file: Path) -> None:
    """A tuple of two tuples of two tuples and so on, 40 levels deep, whose hash takes days."""
    pickled = b"\x80\x02}q\xff)q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(40)) + b"h\xffh\x28K\x01s."
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"wte.weight": Code()}, "it asks for posix.mkdir, which is neither a tensor nor a plain value and could run code"),
        ({"wte.weight": Path("a")}, "it asks for pathlib.PosixPath, which is neither a tensor"),
        ({"wte.weight": torch.zeros(1).expand(1 << 33)}, r"its tensors have 34359738368 bytes, the file only \d+"),
        ({"wte.weight": 1.0}, "it must map names to tensors, but maps str 'wte.weight' to float"),
        ({1: torch.ones(1)}, "it must map names to tensors, but maps int 1 to Tensor"),
        ({}, "gpt2 lacks 40 tensors that config.json asks for"),
        ([torch.ones(1)], "it holds no tensors by name, but a list"),
        (b"", "EOFError"),
        (b"hello", "pytorch_model.bin can't be read: "),
        (pickle.dumps({"a": 1}), "pytorch_model.bin can't be read: "),
    ],
)
@in_process
def test_pickles_that_are_no_weights(content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tiny("gpt2", tmp_path)
    write_own_vocabulary(source)
    (source / "model.safetensors").unlink()
    if isinstance(content, bytes):
        (source / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, source / "pytorch_model.bin")
    refused(source, tmp_path / "out", message)
    assert not (tmp_path / "ran").exists()


@in_process
def test_damage_anywhere_in_a_file(tmp_path: Path) -> None:
    source = as_pickles(tiny("gpt2", tmp_path))
    write_own_vocabulary(source)
    whole = (source / "pytorch_model.bin").read_bytes()
    for size in (10, len(whole) - 30):
        (source / "pytorch_model.bin").write_bytes(whole[:size])
        refused(source, tmp_path / "out", "pytorch_model.bin can't be read: ")


def test_a_file_that_takes_for_ever_ends_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.checkpoint.convert, "SECONDS", 4)
    source = tiny("gpt2", tmp_path)
    write_own_vocabulary(source)
    (source / "model.safetensors").unlink()
    bomb(source / "pytorch_model.bin")
    message = "pytorch_model.bin can't be read: the process that read it ended with status -9, after 4 s of a core at most"
    refused(source, tmp_path / "out", message)


def test_a_file_that_takes_much_memory_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.checkpoint.convert, "BYTES", 1 << 20)
    source = as_pickles(tiny("gpt2", tmp_path))
    write_own_vocabulary(source)
    refused(source, tmp_path / "out", "pytorch_model.bin can't be read: ")


# What is refused


@in_process
def test_sources_that_can_not_be(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(tmp_path / "nowhere", out, "nowhere: no such file or directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", out, "empty holds no pytorch_model.bin, ckpt.pt or the like")
    refused(tiny("gpt2", tmp_path), out, "gpt2 holds safetensors, which are served as they are")
    for name in ("a.pt", "b.ckpt"):
        torch.save({"a": torch.ones(1)}, tmp_path / "empty" / name)
    refused(tmp_path / "empty", out, "empty holds a.pt, b.ckpt: name one of them")
    refused(tmp_path / "empty" / "a.pt", out, "a.pt is no checkpoint of nanoGPT, and there is no config.json next to it")


def test_what_can_not_be_served_is_refused_before_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.checkpoint.convert, "unpickle", lambda *_: pytest.fail("weights were read"))
    source = as_pickles(tiny("gpt2", tmp_path))
    refused(source, tmp_path / "out", "gpt2: there is neither tokenizer.json nor vocab.json with merges.txt")
    (source / "config.json").write_text('{"model_type": "llama"}')
    refused(source, tmp_path / "out", "gpt2/config.json: model_type 'llama' is not supported")


@in_process
def test_a_target_that_exists_is_left_alone(tmp_path: Path) -> None:
    write_nanogpt(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="out exists already; a model is converted into a new directory"):
        convert(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    convert(tmp_path / "run", tmp_path / "out")  # an empty directory is as good as none


def test_a_fresh_users_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The two commands that the documents show, and the refusal that names the first."""
    write_nanogpt(tmp_path / "run")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BANDED_")}

    def banded(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "import sys; from service.cli import main; sys.exit(main())", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment | {"BANDED_COMPILE": "0"}
        )

    # In this process: one of its own takes seconds to begin.
    monkeypatch.chdir(tmp_path)
    assert main(["complete", "Once", "--model", "run"]) == 2
    assert (
        capsys.readouterr().err
        == "banded: run holds no config.json; to make a model of ckpt.pt: banded convert run NEW_DIRECTORY\n"
    )
    converted = banded("convert", "run", "out")
    assert converted.stdout == "out can be served: banded serve --model out\n", converted.stderr
    assert "50304 tokens are taken for r50k_base's 50257, padded" in converted.stderr
    assert "nanoGPT's exact GELU is assumed" in converted.stderr
    completed = banded("complete", "Once upon", "--model", "out", "--max-tokens", "5", "--dtype", "float32")
    assert completed.stdout.startswith("Once upon"), completed.stderr
