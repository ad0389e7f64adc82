#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "elementwise_attention/kernel.h"

#if defined(__x86_64__)
// clang-format off: the order counts
#include "common/avx512_begin.h"
#include "elementwise_attention/kernel_impl.h"
#include "common/isa_end.h"
// clang-format on
#endif
