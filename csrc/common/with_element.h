// Included by simd.h, so that code for an instruction set can be inlined into it, and by tensor_view.h.

// run(T{}) with the C++ type T of the elements.
template <class Run>
inline __attribute__((always_inline)) void with_element(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::float32: return run(float{});
    case DType::float16: return run(c10::Half{});
    case DType::bfloat16: return run(c10::BFloat16{});
  }
}
