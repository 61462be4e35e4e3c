"""The ops of the decoder that read or write the KV cache.

CPU tensors go to cpu.py. There are no Triton kernels yet, so no other device is served; nothing falls back silently.
"""

from kernels.band import PAGE_SIZE
from kernels.cpu import decode_attention, kv_write, prefill_attention
from kernels.plan import DecodePlan, PrefillPlan, plan_decode

__all__ = [
    "PAGE_SIZE",
    "DecodePlan",
    "PrefillPlan",
    "decode_attention",
    "kv_write",
    "plan_decode",
    "prefill_attention",
]
