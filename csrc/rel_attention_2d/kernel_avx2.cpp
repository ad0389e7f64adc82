#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "rel_attention_2d/kernel.h"

#if defined(__x86_64__)
// clang-format off: the order counts
#include "common/avx2_begin.h"
#include "rel_attention_2d/kernel_impl.h"
#include "common/isa_end.h"
// clang-format on
#endif
