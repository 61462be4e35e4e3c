"""The decoder, top to bottom: attention over a whole window or over pages, block, model.

Shapes: N tokens in a step, B windows of T tokens, H heads of size D, C = H * D the width, V the vocabulary.
Parameter names are GPT-2's; linear weights are stored (out, in).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import ops
from kernels.plan import DecodePlan, PrefillPlan
from model.config import Activation, AttentionKind, GPTConfig

# attend(layer, q, k, v) -> out, all (..., H, D): how the tokens of this call see each other and what came before.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# Logits that are exact in fp32 whatever the dtype of the weights.
RESCORED = 8

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


class WindowAttention:
    """Causal attention inside whole windows, q, k and v (B, T, H, D): differentiable, keeps no cache. Training's form."""

    def __init__(self, config: GPTConfig):
        self.config = config

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        band, scale = self.config.band_of(layer), self.config.scale_of(layer)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        if band is None or q.shape[2] <= band:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            out = banded_window_attention(q, k, v, band, scale)
        return out.transpose(1, 2)


def banded_window_attention(q: Tensor, k: Tensor, v: Tensor, band: int, scale: float) -> Tensor:
    """Banded causal attention of (B, H, T, D) in blocks of `band` queries, each against its own and the previous block.

    Work and memory grow with T * band, not T * T.
    """
    batch, heads, length, dim = q.shape
    blocks = math.ceil(length / band)

    def cut(x: Tensor) -> Tensor:  # (B, H, T, D) -> (B * blocks, H, band, D)
        x = F.pad(x, (0, 0, 0, blocks * band - length))
        return x.view(batch, heads, blocks, band, dim).transpose(1, 2).reshape(batch * blocks, heads, band, dim)

    def with_previous(x: Tensor) -> Tensor:  # keys of block b - 1, then of block b
        x = cut(x).view(batch, blocks, heads, band, dim)
        previous = F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat((previous, x), dim=3).view(batch * blocks, heads, 2 * band, dim)

    distance = torch.arange(band, device=q.device)[:, None] + band - torch.arange(2 * band, device=q.device)
    mask = ((distance >= 0) & (distance < band)).repeat(blocks, 1, 1)  # (blocks, band, 2 * band)
    mask[0, :, :band] = False  # the first block has nothing before it
    mask = mask.repeat(batch, 1, 1).unsqueeze(1)
    out = F.scaled_dot_product_attention(cut(q), with_previous(k), with_previous(v), attn_mask=mask, scale=scale)
    out = out.view(batch, blocks, heads, band, dim).transpose(1, 2).reshape(batch, heads, blocks * band, dim)
    return out[:, :, :length]


class KVPool(NamedTuple):
    """Keys and values of one layer, each (pages, H, PAGE_SIZE, D)."""

    k: Tensor
    v: Tensor


class GroupPlan(NamedTuple):
    """What the layers of one KV group share in a step: where new keys go and which pages each token reads."""

    slot_mapping: Tensor  # (N,) page * PAGE_SIZE + offset of each token's key
    decode: DecodePlan
    prefill: PrefillPlan


class PagedAttention:
    """Attention over the paged KV cache, q, k and v (N, H, D): decode rows first, then the prompt chunks."""

    def __init__(self, config: GPTConfig, pools: list[KVPool], plans: dict[AttentionKind, GroupPlan], num_decodes: int):
        self.config = config
        self.pools = pools
        self.plans = plans
        self.num_decodes = num_decodes

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pool, plan = self.pools[layer], self.plans[self.config.kind(layer)]
        scale = self.config.scale_of(layer)
        ops.kv_write(k, v, pool.k, pool.v, plan.slot_mapping)
        out = torch.empty_like(q)
        if self.num_decodes:
            rows = slice(None, self.num_decodes)
            out[rows] = ops.decode_attention(q[rows], pool.k, pool.v, plan.decode, scale)
        if self.num_decodes < q.shape[0]:
            rows = slice(self.num_decodes, None)
            out[rows] = ops.prefill_attention(q[rows], pool.k, pool.v, plan.prefill, scale)
        return out


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, self.head_dim))  # (..., 3, H, D)
        q, k, v = qkv.unbind(-3)
        return self.c_proj(attend(layer, q, k, v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.ln_1 = layer_norm(config)
        self.attn = Attention(config)
        self.ln_2 = layer_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        if self.pre_norm:
            x = x + self.attn(self.ln_1(x), layer, attend)
            return x + self.mlp(self.ln_2(x))
        x = self.ln_1(x + self.attn(x, layer, attend))
        return self.ln_2(x + self.mlp(x))


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
        self.ln_f = layer_norm(config) if config.final_norm else nn.Identity()
        self.lm_head = None if config.tied_head else nn.Linear(config.token_width, config.padded_vocab_size, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states (..., C) of `tokens` (...) at `positions` (...), counted from 0."""
        x = self.project_in(self.wte(tokens)) + self.wpe(positions + self.config.position_offset)
        for layer, block in enumerate(self.h):
            x = block(x, layer, attend)
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., V) fp32 of hidden states (..., C). The padding of the vocabulary is cut off.

        A 16-bit product rounds its largest logits onto each other, so the RESCORED highest are computed again in fp32.
        """
        head = (self.wte if self.lm_head is None else self.lm_head).weight
        hidden = self.project_out(hidden)
        logits = F.linear(hidden, head)[..., : self.config.vocab_size].float()
        if head.dtype != torch.float32 and not logits.requires_grad:
            highest = logits.topk(min(RESCORED, self.config.vocab_size)).indices  # (..., RESCORED)
            exact = torch.matmul(head[highest].float(), hidden.float().unsqueeze(-1)).squeeze(-1)
            logits.scatter_(-1, highest, exact)
        return logits

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's initialisation: normal(0.02), residual projections divided by sqrt(2 * n_layer), biases 0, norms 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))


def layer_norm(config: GPTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, elementwise_affine=config.norm_affine)
