// Intel's AMX: registers that hold tiles of up to 16 rows of 64 bytes, for attention and products.
#pragma once

#include "abi.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef AMX
namespace {

constexpr int TILE_ROWS = 16;

bool request_tiles() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }
const bool has_tiles = request_tiles();

// Configures this thread's tiles for as long as it lives: 0 to 5 with `rows` rows, 6 and 7 for the other factor.
struct AmxTiles {
  explicit AmxTiles(int64_t rows) {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; i++) shape.bytes[i] = BLOCK, shape.rows[i] = i < 6 ? rows : BLOCK / GROUP;
    _tile_loadconfig(&shape);
  }
  ~AmxTiles() { _tile_release(); }
};

// Tiles 0 to 3 collect sums.
#define ZERO_SUMS() _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3)
#define STORE_SUMS(TARGET, STEP, STRIDE)                                     \
  _tile_stored(0, TARGET, STRIDE); _tile_stored(1, TARGET + STEP, STRIDE);     \
  _tile_stored(2, TARGET + 2 * STEP, STRIDE); _tile_stored(3, TARGET + 3 * STEP, STRIDE)

}  // namespace
#else
constexpr bool has_tiles = false;
#endif
