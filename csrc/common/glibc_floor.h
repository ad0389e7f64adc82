#pragma once

// The library shall load wherever torch does, on glibc 2.28.  Of a function that later versions of glibc have anew, the
// linker takes the newest; these lines ask for the first.  (The new one differs in error handling only.)
#if defined(__x86_64__) && defined(__gnu_linux__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
#endif
