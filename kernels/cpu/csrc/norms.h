#pragma once

#include "abi.h"

// kernels.ops.Ops.add_layernorm of x (rows, columns), columns a multiple of LANES. `weight` and `bias` may be null;
// so may `residual`, and then `total` is not written.
extern "C" void add_layernorm(const ELEMENT* x, const ELEMENT* residual, const ELEMENT* weight, const ELEMENT* bias,
                              int64_t rows, int64_t columns, float eps, ELEMENT* normed, ELEMENT* total, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    const ELEMENT* row = x + r * columns;
    if (residual) {
      for (int64_t i = 0; i < columns; i += LANES)
        store(total + r * columns + i, load(row + i) + load(residual + r * columns + i));
      row = total + r * columns;
    }
    f32x16 sums{}, squares{};
    for (int64_t i = 0; i < columns; i += LANES) sums += load(row + i);
    const float mean = sum(sums) / columns;
    for (int64_t i = 0; i < columns; i += LANES) {
      const f32x16 distance = load(row + i) - mean;
      squares += distance * distance;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) / columns + eps);
    for (int64_t i = 0; i < columns; i += LANES) {
      f32x16 y = (load(row + i) - mean) * factor;
      if (weight) y *= load(weight + i);
      if (bias) y += load(bias + i);
      store(normed + r * columns + i, y);
    }
  }
}
