"""The decoder, top to bottom: attention over pages, linear, block, model.

Shapes: N tokens in a step, H heads of size D, C = H * D the width, F the inner width, V the vocabulary, V' with its padding;
"..." stands for N, or for windows and their tokens. Parameter names are GPT-2's. Weights of linears are (out, in).
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kernels.long_rows import highest
from kernels.names import Activation, PatternKind
from kernels.ops import BlockParts, LinearParts, Ops, Weight
from kernels.plan import StepPlan
from model.config import GPTConfig

# attend(layer, q, k, v) -> out, all (..., H, D): how the tokens of a call see each other and what came earlier.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# adapt(linear, x, ops, activation) -> out: the linear's result with what adapters add to it.
Adapt = Callable[["Linear", Tensor, Ops, Activation | None], Tensor]

# So many of the highest logits are exact in fp32, whatever the dtype of the weights.
RESCORED = 8


class KVPool(NamedTuple):
    """Keys and values of one layer, each (pages, H, PAGE_SIZE, D)."""

    k: Tensor
    v: Tensor


class PagedAttention:
    """Attention over the paged KV cache, q, k and v (N, H, D): first the decode rows, then the prompt chunks."""

    def __init__(self, config: GPTConfig, ops: Ops, pools: list[KVPool], plans: dict[PatternKind, StepPlan]):
        self.config = config
        self.ops = ops
        self.pools = pools
        self.plans = plans

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pool, plan = self.pools[layer], self.plans[self.config.kind(layer)]
        scale, count = self.config.scale_of(layer), plan.num_decodes
        self.ops.kv_write(k, v, pool.k, pool.v, plan.slot_mapping)
        parts = []
        if plan.decode:
            parts.append(self.ops.decode_attention(q[:count], pool.k, pool.v, plan.decode, scale))
        if plan.prefill:
            parts.append(self.ops.prefill_attention(q[count:], pool.k, pool.v, plan.prefill, scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Linear(nn.Module):
    """activation(x @ weight.T + bias) by the ops. An adapter finds it by its name: h.3.attn.c_attn is in layer 3.

    Its weight is a parameter until `pack`, and from then on the ops' own.
    """

    def __init__(self, name: str, inputs: int, outputs: int, *, bias: bool):
        super().__init__()
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.weight: Tensor = nn.Parameter(torch.empty(outputs, inputs))
        self.bias: Tensor | None = nn.Parameter(torch.empty(outputs)) if bias else None
        self.packed: Weight | None = None

    def pack(self, ops: Ops, *, quantize: bool) -> None:
        self.packed = ops.pack(self.weight.detach(), quantize=quantize)
        del self.weight

    @property
    def stored(self) -> Weight:
        return self.weight if self.packed is None else self.packed

    def apply_to(self, x: Tensor, ops: Ops, activation: Activation | None = None, adapt: Adapt | None = None) -> Tensor:
        """(..., outputs) of x (..., inputs)."""
        if adapt is not None:
            return adapt(self, x, ops, activation)
        return ops.linear(x, self.stored, self.bias, activation)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.head_dim = layer, config.n_head, config.head_dim
        self.c_attn = Linear(f"h.{layer}.attn.c_attn", config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = Linear(f"h.{layer}.attn.c_proj", config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, attend: Attend, ops: Ops, adapt: Adapt | None) -> Tensor:
        qkv = self.c_attn.apply_to(x, ops, adapt=adapt)  # (..., 3 * C)
        q, k, v = qkv.unflatten(-1, (3, self.n_head, self.head_dim)).unbind(-3)  # (..., H, D) each
        out = attend(self.layer, q, k, v).flatten(-2)  # (..., C)
        return self.c_proj.apply_to(out, ops, adapt=adapt)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_fc = Linear(f"h.{layer}.mlp.c_fc", config.n_embd, config.n_inner, bias=config.bias)
        self.c_proj = Linear(f"h.{layer}.mlp.c_proj", config.n_inner, config.n_embd, bias=config.bias)
        self.activation = config.activation

    def forward(self, x: Tensor, ops: Ops, adapt: Adapt | None) -> Tensor:
        inner = self.c_fc.apply_to(x, ops, self.activation, adapt)  # (..., F)
        return self.c_proj.apply_to(inner, ops, adapt=adapt)  # (..., C)


def add_norm(norm: nn.LayerNorm, x: Tensor, update: Tensor | None, ops: Ops) -> tuple[Tensor, Tensor]:
    """The norm of x + update, and the sum, both (..., C): one pass adds a block's output and norms the residual stream."""
    return ops.add_layernorm(x, update, norm.weight, norm.bias, norm.eps)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.ln_1 = layer_norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = layer_norm(config)
        self.mlp = MLP(config, layer)

    def parts(self, pool: KVPool, kind: PatternKind, scale: float) -> BlockParts:
        linears = (self.attn.c_attn, self.attn.c_proj, self.mlp.c_fc, self.mlp.c_proj)
        c_attn, c_proj, c_fc, mlp_c_proj = (LinearParts(linear.stored, linear.bias) for linear in linears)
        return BlockParts(self.ln_1, c_attn, c_proj, self.ln_2, c_fc, mlp_c_proj, *pool, kind, scale)

    def forward(
        self, x: Tensor, update: Tensor | None, attend: Attend, ops: Ops, adapt: Adapt | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream x (..., C), and an update that the next norm adds to it, in the same pass.

        run_blocks in kernels/cpu/csrc/blocks.h repeats this.
        """
        if self.pre_norm:
            normed, x = add_norm(self.ln_1, x, update, ops)
            normed, x = add_norm(self.ln_2, x, self.attn(normed, attend, ops, adapt), ops)
            return x, self.mlp(normed, ops, adapt)
        x, _ = add_norm(self.ln_1, x, self.attn(x, attend, ops, adapt), ops)
        x, _ = add_norm(self.ln_2, x, self.mlp(x, ops, adapt), ops)
        return x, None


class GPT(nn.Module):
    """The decoder. `forward` gives hidden states; `logits` projects the rows that are wanted."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        width, token_width, num_positions = config.n_embd, config.token_width, config.n_positions + config.position_offset
        # Without initial values. To draw them on the meta device, torch would import its compiler, which takes seconds.
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.padded_vocab_size, token_width), freeze=False)
        self.wpe = nn.Embedding.from_pretrained(torch.empty(num_positions, width), freeze=False)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        projected = token_width != width
        self.project_in = Linear("project_in", token_width, width, bias=False) if projected else None
        self.project_out = Linear("project_out", width, token_width, bias=False) if projected else None
        self.ln_f = layer_norm(config) if config.final_norm else None
        self.lm_head = None if config.tied_head else Linear("lm_head", token_width, config.padded_vocab_size, bias=False)
        self._packed_head: Weight | None = None

    @property
    def head(self) -> Tensor:
        """The output projection (V', C)."""
        return (self.wte if self.lm_head is None else self.lm_head).weight

    def pack(self, ops: Ops, *, quantize: bool = False) -> None:
        """Lay out all weights as `ops` read them fastest. Such a model can't be trained or saved any more.

        The head is kept next to its packed copy, because rows of it are looked up.
        """
        self._packed_head = ops.pack(self.head.detach(), quantize=quantize)
        for module in self.modules():
            if isinstance(module, Linear) and module is not self.lm_head:
                module.pack(ops, quantize=quantize)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, ops: Ops, adapt: Adapt | None = None) -> Tensor:
        """Hidden states (..., C) of `tokens` (...) at `positions` (...), counted from 0."""
        x, update = self.embed(tokens, positions, ops), None
        for block in self.h:
            x, update = block(x, update, attend, ops, adapt)
        return self.norm(x, update, ops)

    def embed(self, tokens: Tensor, positions: Tensor, ops: Ops) -> Tensor:
        """The input of the first block (..., C)."""
        x = self.wte(tokens)
        if self.project_in is not None:
            x = self.project_in.apply_to(x, ops)
        return x + self.wpe(positions + self.config.position_offset)

    def head_input(self, hidden: Tensor, ops: Ops) -> Tensor:
        """Hidden states (..., C) as the head multiplies them, as wide as a row of the token embedding."""
        return hidden if self.project_out is None else self.project_out.apply_to(hidden, ops)

    def norm(self, x: Tensor, update: Tensor | None, ops: Ops) -> Tensor:
        """Hidden states (..., C) from the output of the last block."""
        if self.ln_f is not None:
            return add_norm(self.ln_f, x, update, ops)[0]
        return x if update is None else x + update

    def logits(self, hidden: Tensor, ops: Ops) -> Tensor:
        """Next-token logits (..., V) fp32 of hidden states (..., C), without the padding of the vocabulary.

        Rounded to 16 bits, the largest logits may become equal, so the RESCORED highest are computed again in fp32.
        """
        head = self.head
        hidden = self.head_input(hidden, ops)
        product = ops.project(hidden, head if self._packed_head is None else self._packed_head)
        logits = product.float()[..., : self.config.vocab_size]  # rows stay 16-byte aligned
        if product.dtype != torch.float32 and not logits.requires_grad:
            rows, inputs = logits.flatten(0, -2), hidden.flatten(0, -2)
            columns = highest(rows, min(RESCORED, self.config.vocab_size))  # (rows, RESCORED)
            # No matrix product, because its bits depend on the number of rows.
            exact = (head[columns].float() * inputs.float().unsqueeze(-2)).sum(-1)
            rows.scatter_(-1, columns, exact)
        return logits

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal(n_embd ** -0.5), residual projections divided by sqrt(2 * n_layer), biases 0, norms 1, positions sinusoids.

        GPT-2 uses 0.02 at any width, and random positions and attention. From here a model learns sooner to copy what it
        has seen (model/training/NOTES.md). With sinusoids, attention to the previous token is one rotation for all
        positions instead of a fact about each. Attention's output projection is the transpose of its values' projection,
        so from the first update on a head adds what it attends to (Trockman & Kolter 2023, mimetic initialization).
        """
        generator = torch.Generator().manual_seed(seed)
        width = self.config.n_embd**-0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                residual = name.endswith("c_proj.weight")
                std = width / math.sqrt(2 * self.config.n_layer) if residual else width
                parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))
        named = dict(self.named_parameters())
        for layer in range(self.config.n_layer):
            value = named[f"h.{layer}.attn.c_attn.weight"][-self.config.n_embd :]
            named[f"h.{layer}.attn.c_proj.weight"].copy_(value.T / math.sqrt(2 * self.config.n_layer))
        self.wpe.weight.copy_(math.sqrt(2) * width * sinusoids(*self.wpe.weight.shape))


def sinusoids(count: int, width: int) -> Tensor:
    """Positions (count, width) as in Vaswani et al. 2017: first all sines, then all cosines.

    The slowest turns once in `count` positions instead of in about 63 thousand: more of them are fast enough to tell
    neighbours apart.
    """
    frequencies = (count / math.tau) ** -(torch.arange(0, width, 2) / width)
    angles = torch.arange(count)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width]


class PagedGPT:
    """A model over pools of pages, one for each layer."""

    def __init__(self, model: GPT, ops: Ops, pools: list[KVPool]):
        config = model.config
        self._model, self._ops, self._pools = model, ops, pools
        blocks = enumerate(zip(cast(Iterable[Block], model.h), pools, strict=True))
        parts = [block.parts(pool, config.kind(layer), config.scale_of(layer)) for layer, (block, pool) in blocks]
        self._native_forward = ops.native_forward(parts, model.ln_f, config.activation, pre_norm=config.pre_norm)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        plans: dict[PatternKind, StepPlan],
        adapt: Adapt | None = None,
        begins: Callable[[], object] = lambda: None,
    ) -> Tensor:
        """Hidden states (N, C) of a step's tokens (N,): first the decode rows, then the prompt chunks.

        Takes the native forward if the ops have one and no row has an adapter. On a CPU, calls `begins` ahead of the blocks.
        """
        model, ops = self._model, self._ops
        if self._native_forward is None or adapt is not None:
            if not tokens.is_cuda:
                begins()
            attend = PagedAttention(model.config, ops, self._pools, plans)
            return cast(Tensor, model(tokens, positions, attend, ops, adapt))
        return self._native_forward(model.embed(tokens, positions, ops), plans, begins)


def layer_norm(config: GPTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, elementwise_affine=config.norm_affine)
