"""`python -m tests.bench.products`: ms of all products of a step of GPT-2 125M, ours and oneDNN's, in turns.

Medians of `--repeats` turns. `--avx2` holds all of them to AVX2.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

from tests.bench.run import AVX2

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 32, 256])
parser.add_argument("--repeats", type=int, default=9)
parser.add_argument("--avx2", action="store_true")


def main() -> None:
    args = parser.parse_args()
    if args.avx2:
        os.environ |= AVX2  # oneDNN reads it at its first product, PyTorch when it is first needed
    import torch

    from kernels import torch_ops
    from kernels.cpu.build import Shape
    from kernels.cpu.compiled import load
    from tests.bench.checkpoints import ALTERNATING_125M, all_dense

    config = all_dense(ALTERNATING_125M)
    width, inner = config.n_embd, config.n_inner
    shapes = [(3 * width, width), (width, width), (inner, width), (width, inner)] * config.n_layer
    weights = [torch.randn(shape) / 50 for shape in (*shapes, (config.padded_vocab_size, width))]
    ops = load(Shape(config.head_dim, torch.bfloat16))
    assert ops, "nothing can be compiled here"
    bf16, sides = torch.bfloat16, dict[str, tuple[torch.dtype, list[Callable[[torch.Tensor], torch.Tensor]]]]()

    def products(module: object, dtype: torch.dtype) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        packed = [module.pack(weight.to(dtype), quantize=False) for weight in weights]  # type: ignore[attr-defined]
        return [lambda x, each=each: module.linear(x, each, None) for each in packed]  # type: ignore[attr-defined, misc]

    sides["ours, bf16"] = bf16, products(ops, bf16)
    sides["oneDNN, bf16"] = bf16, products(torch_ops, bf16)
    sides["oneDNN, float32"] = torch.float32, products(torch_ops, torch.float32)
    print(f"{'rows':>5}" + "".join(f"{name:>18}" for name in sides), flush=True)
    for rows in args.rows:
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.repeats + 1):
            for name, (dtype, calls) in sides.items():
                inputs = {columns: torch.randn(rows, columns, dtype=dtype) for columns in (width, inner)}
                started = time.perf_counter()
                with torch.inference_mode():
                    for weight, call in zip(weights, calls, strict=True):
                        call(inputs[weight.shape[1]])
                times[name].append(time.perf_counter() - started)
        medians = (1e3 * statistics.median(values[1:]) for values in times.values())
        print(f"{rows:>5}" + "".join(f"{ms:>18.1f}" for ms in medians), flush=True)


if __name__ == "__main__":
    main()
