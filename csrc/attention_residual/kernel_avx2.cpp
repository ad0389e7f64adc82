#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "attention_residual/kernel.h"

#if defined(__x86_64__)
// clang-format off: the order counts
#include "common/avx2_begin.h"
#include "attention_residual/kernel_impl.h"
#include "common/isa_end.h"
// clang-format on
#endif
