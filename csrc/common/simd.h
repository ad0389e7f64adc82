// What kernels are written with.  Included once per instruction set, inside the namespace of an op and FUSED_ATTN_ISA.
// Nothing here has an include guard or includes of a library, see for_each_instruction_set.h.
// clang-format off: the order counts
#include "common/vectors.h"
#include "common/elements.h"
#include "common/products.h"
#include "common/scratch.h"
#include "common/with_element.h"
// clang-format on
