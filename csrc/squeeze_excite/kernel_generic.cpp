#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "squeeze_excite/kernel.h"

#define FUSED_ATTN_ISA generic
#define FUSED_ATTN_LANES 4
#define FUSED_ATTN_PANEL_VECTORS 2
#define FUSED_ATTN_BLOCK_ROWS 4
#include "squeeze_excite/kernel_impl.h"
