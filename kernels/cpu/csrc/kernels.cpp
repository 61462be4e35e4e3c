// The CPU kernels that kernels/cpu/compiled.py calls, as one unit for the compiler.
//
// kernels/cpu/build.py compiles this where it runs, for one ELEMENT (the type of activations, keys and values) and
// one HEAD_DIM. A row's arithmetic depends on its own numbers and pages only, so its bits are the same in any batch.

#include "blocks.h"  // which includes all others but the last
#include "sampling.h"

// The functions that Python calls return what Team::run does.
extern "C" int64_t oldest_job() { return team().oldest(); }

// From now on helpers of our own share the work: see Team::uses_helpers.
extern "C" void use_helpers() { team().uses_helpers = true; }
