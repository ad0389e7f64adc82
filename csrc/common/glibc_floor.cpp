// Reference counts of std::shared_ptr read this flag of glibc 2.32.  Our own in its place lets the library load
// on 2.28, as torch does; that it is false, "there may be several threads", is always right.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
