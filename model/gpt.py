"""The decoder, top to bottom: attention over a whole window or over pages, block, model.

Shapes: N tokens in a step, B windows of T tokens, H heads of size D, C = H * D the width, V the vocabulary.
Parameter names are GPT-2's; linear weights are stored (out, in).
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kernels.long_rows import highest
from kernels.names import PatternKind
from kernels.ops import BlockParts, Ops, Weight
from kernels.plan import StepPlan
from model.config import GPTConfig

# attend(layer, q, k, v) -> out, all (..., H, D): how the tokens of this call see each other and what came before.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# Logits that are exact in fp32 whatever the dtype of the weights.
RESCORED = 8


class KVPool(NamedTuple):
    """Keys and values of one layer, each (pages, H, PAGE_SIZE, D)."""

    k: Tensor
    v: Tensor


class PagedAttention:
    """Attention over the paged KV cache, q, k and v (N, H, D): decode rows first, then the prompt chunks."""

    def __init__(self, config: GPTConfig, ops: Ops, pools: list[KVPool], plans: dict[PatternKind, StepPlan]):
        self.config = config
        self.ops = ops
        self.pools = pools
        self.plans = plans

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pool, plan = self.pools[layer], self.plans[self.config.kind(layer)]
        scale, count, slots = self.config.scale_of(layer), plan.num_decodes, plan.slot_mapping
        parts = []
        if plan.decode:
            rows = q[:count], k[:count], v[:count]
            parts.append(self.ops.decode_step(*rows, pool.k, pool.v, slots[:count], plan.decode, scale))
        if plan.prefill:
            self.ops.kv_write(k[count:], v[count:], pool.k, pool.v, slots[count:])
            parts.append(self.ops.prefill_attention(q[count:], pool.k, pool.v, plan.prefill, scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, layer: int, attend: Attend, ops: Ops) -> Tensor:
        qkv = ops.linear(x, self.c_attn.weight, self.c_attn.bias).unflatten(
            -1, (3, self.n_head, self.head_dim)
        )  # (..., 3, H, D)
        q, k, v = qkv.unbind(-3)
        return ops.linear(attend(layer, q, k, v).flatten(-2), self.c_proj.weight, self.c_proj.bias)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.activation = config.activation

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        inner = ops.linear(x, self.c_fc.weight, self.c_fc.bias, self.activation)
        return ops.linear(inner, self.c_proj.weight, self.c_proj.bias)


def add_norm(norm: nn.LayerNorm, x: Tensor, update: Tensor | None, ops: Ops) -> tuple[Tensor, Tensor]:
    """The norm of x + update, and the sum, both (..., C): the residual stream takes an update with the norm behind it."""
    return ops.add_layernorm(x, update, norm.weight, norm.bias, norm.eps)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.ln_1 = layer_norm(config)
        self.attn = Attention(config)
        self.ln_2 = layer_norm(config)
        self.mlp = MLP(config)

    def parts(self, pool: KVPool, kind: PatternKind, scale: float) -> BlockParts:
        attn, mlp = self.attn, self.mlp
        return BlockParts(self.ln_1, attn.c_attn, attn.c_proj, self.ln_2, mlp.c_fc, mlp.c_proj, *pool, kind, scale)

    def forward(
        self, x: Tensor, update: Tensor | None, layer: int, attend: Attend, ops: Ops
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream x (..., C), and what is still to be added to it: the next norm adds it in the same pass.

        run_blocks in kernels/cpu/csrc/kernels.cpp repeats this.
        """
        if self.pre_norm:
            normed, x = add_norm(self.ln_1, x, update, ops)
            normed, x = add_norm(self.ln_2, x, self.attn(normed, layer, attend, ops), ops)
            return x, self.mlp(normed, ops)
        x, _ = add_norm(self.ln_1, x, self.attn(x, layer, attend, ops), ops)
        x, _ = add_norm(self.ln_2, x, self.mlp(x, ops), ops)
        return x, None


class GPT(nn.Module):
    """The decoder. `forward` gives hidden states, `logits` projects the rows that somebody will look at."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.token_width)
        self.wpe = nn.Embedding(config.n_positions + config.position_offset, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        projected = config.token_width != config.n_embd
        self.project_in = nn.Linear(config.token_width, config.n_embd, bias=False) if projected else nn.Identity()
        self.project_out = nn.Linear(config.n_embd, config.token_width, bias=False) if projected else nn.Identity()
        self.ln_f = layer_norm(config) if config.final_norm else None
        self.lm_head = None if config.tied_head else nn.Linear(config.token_width, config.padded_vocab_size, bias=False)
        self._packed_head: Weight | None = None

    @property
    def head(self) -> Tensor:
        """The output projection (V', C)."""
        return (self.wte if self.lm_head is None else self.lm_head).weight

    def pack(self, ops: Ops, *, quantize: bool = False) -> None:
        """Lay out the weights of all products as `ops` read them fastest. Such a model can't be trained or saved any more.

        The head stays beside its packed copy: rows of it are looked up.
        """
        self._packed_head = ops.pack(self.head.detach(), quantize=quantize)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                weight = module.weight.detach()
                del module.weight  # what comes instead need not be a parameter, or a tensor
                module.weight = ops.pack(weight, quantize=quantize)  # type: ignore[assignment]

    @staticmethod
    def _project(projection: nn.Module, x: Tensor, ops: Ops) -> Tensor:
        return ops.linear(x, projection.weight, None) if isinstance(projection, nn.Linear) else x

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, ops: Ops) -> Tensor:
        """Hidden states (..., C) of `tokens` (...) at `positions` (...), counted from 0."""
        x, update = self.embed(tokens, positions, ops), None
        for layer, block in enumerate(self.h):
            x, update = block(x, update, layer, attend, ops)
        return self.norm(x, update, ops)

    def embed(self, tokens: Tensor, positions: Tensor, ops: Ops) -> Tensor:
        """What the first block gets."""
        return self._project(self.project_in, self.wte(tokens), ops) + self.wpe(positions + self.config.position_offset)

    def norm(self, x: Tensor, update: Tensor | None, ops: Ops) -> Tensor:
        """Hidden states from what the last block gives."""
        if self.ln_f is not None:
            return add_norm(self.ln_f, x, update, ops)[0]
        return x if update is None else x + update

    def logits(self, hidden: Tensor, ops: Ops) -> Tensor:
        """Next-token logits (..., V) fp32 of hidden states (..., C). The padding of the vocabulary is cut off.

        A product rounded to 16 bits makes the largest logits equal, so the RESCORED highest are computed again in fp32.
        """
        head = self.head
        hidden = self._project(self.project_out, hidden, ops)
        product = ops.project(hidden, head if self._packed_head is None else self._packed_head)
        logits = product.float()[..., : self.config.vocab_size]  # rows stay 16-byte aligned
        if product.dtype != torch.float32 and not logits.requires_grad:
            rows, inputs = logits.flatten(0, -2), hidden.flatten(0, -2)
            columns = highest(rows, min(RESCORED, self.config.vocab_size))  # (rows, RESCORED)
            # Not a matrix product: that has other bits for one row than for several.
            exact = (head[columns].float() * inputs.float().unsqueeze(-2)).sum(-1)
            rows.scatter_(-1, columns, exact)
        return logits

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal(n_embd ** -0.5), residual projections divided by sqrt(2 * n_layer), biases 0, norms 1, positions sinusoids.

        GPT-2 has 0.02 at any width, and random positions and attention. From here a model learnt sooner to copy what it had
        seen (ARCHITECTURE.md): attention to the token before is one rotation for all positions, instead of a fact about
        each; and attention's output projection is its values' transpose, so that a head adds what it attends to, which
        matters from the first update on (after mimetic initialization: Trockman & Kolter 2023).
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
    """Positions (count, width) as in Vaswani et al. 2017, sines behind each other and then cosines.

    The slowest turns once in `count` positions, instead of in some 63 thousand: more are fast, and tell neighbours apart.
    """
    frequencies = (count / math.tau) ** -(torch.arange(0, width, 2) / width)
    angles = torch.arange(count)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width]


class PagedGPT:
    """A model over pools of pages, one for each layer."""

    def __init__(self, model: GPT, ops: Ops, pools: list[KVPool]):
        """All blocks are one call where `ops` have that."""
        config = model.config
        self._model, self._ops, self._pools = model, ops, pools
        blocks = enumerate(zip(cast(Iterable[Block], model.h), pools, strict=True))
        parts = [block.parts(pool, config.kind(layer), config.scale_of(layer)) for layer, (block, pool) in blocks]
        self._all_blocks = ops.fuse(parts, config.activation, pre_norm=config.pre_norm)

    @property
    def is_one_call(self) -> bool:
        return self._all_blocks is not None

    def __call__(
        self, tokens: Tensor, positions: Tensor, plans: dict[PatternKind, StepPlan], adapted: Ops | None = None
    ) -> Tensor:
        """Hidden states (N, C) of a step's tokens (N,): decode rows first, then the prompt chunks. `adapted` ops run one by
        one."""
        model, ops = self._model, adapted or self._ops
        if self._all_blocks is None or adapted:
            hidden: Tensor = model(tokens, positions, PagedAttention(model.config, ops, self._pools, plans), ops)
            return hidden
        return model.norm(*self._all_blocks(model.embed(tokens, positions, ops), plans), ops)


def layer_norm(config: GPTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, elementwise_affine=config.norm_affine)
