#pragma once

#include "abi.h"
#include "team.h"

namespace {

void share_add_layernorm(Worker& worker, const ELEMENT* x, const ELEMENT* residual, const NormArgs& norm, int64_t rows,
                         int64_t columns, ELEMENT* normed, ELEMENT* total) {
  worker.share(rows, [&](int64_t r, Claim& claim) {
    ELEMENT* const own = room<ELEMENT>(2 * columns);
    const ELEMENT* row = x + r * columns;
    if (residual) {
      ELEMENT* const added = own + columns;
      for (int64_t i = 0; i < columns; i += LANES) store(added + i, load(row + i) + load(residual + r * columns + i));
      row = added;
    }
    f32x16 sums{}, squares{};
    for (int64_t i = 0; i < columns; i += LANES) sums += load(row + i);
    const float mean = sum(sums) / columns;
    for (int64_t i = 0; i < columns; i += LANES) {
      const f32x16 distance = load(row + i) - mean;
      squares += distance * distance;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) / columns + norm.eps);
    for (int64_t i = 0; i < columns; i += LANES) {
      f32x16 y = (load(row + i) - mean) * factor;
      if (norm.weight) y *= load(norm.weight + i);
      if (norm.bias) y += load(norm.bias + i);
      store(own + i, y);
    }
    if (!claim()) return;
    if (residual) std::memcpy(total + r * columns, row, columns * sizeof *row);
    std::memcpy(normed + r * columns, own, columns * sizeof *own);
  });
}

}  // namespace

// kernels.ops.Ops.add_layernorm of x (rows, columns), columns a multiple of LANES. `weight` and `bias` may be null;
// so may `residual`, and then `total` is not written.
extern "C" int64_t add_layernorm(const ELEMENT* x, const ELEMENT* residual, const ELEMENT* weight, const ELEMENT* bias,
                                 int64_t rows, int64_t columns, float eps, ELEMENT* normed, ELEMENT* total,
                                 int threads) {
  return team().run(threads, [=](Worker& worker) {
    share_add_layernorm(worker, x, residual, NormArgs{weight, bias, eps}, rows, columns, normed, total);
  });
}
