"""The decoder's ops on the KV cache, whatever the device: what the model imports.

CPU tensors go to cpu.py. There are no Triton kernels yet, so no other device is served; nothing falls back silently.
"""

from kernels.cpu import decode_attention, kv_write, prefill_attention

__all__ = [
    "decode_attention",
    "kv_write",
    "prefill_attention",
]
