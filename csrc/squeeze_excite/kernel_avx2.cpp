#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "squeeze_excite/kernel.h"

#if defined(__x86_64__)
// clang-format off: the order counts
#include "common/avx2_begin.h"
#include "squeeze_excite/kernel_impl.h"
#include "common/isa_end.h"
// clang-format on
#endif
