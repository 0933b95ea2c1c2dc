// What every core header needs. The core holds arithmetic only: no torch, no CUDA types, no allocation, no threads.
#pragma once
#include <cstdint>
#include <cstring>

// The same functions are compiled once per instruction set. They must have internal linkage (`static`): as plain `inline`
// the linker would keep one copy of them, perhaps the AVX-512 one, and every other file would run it.
#if defined(__CUDACC__)
#define DYNFED_INLINE static __host__ __device__ __forceinline__
#else
#define DYNFED_INLINE static inline __attribute__((always_inline))
#endif

#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the packed layout is read and written in whole words");
#endif

namespace dynfed {

// Type punning goes through memcpy: reading a uint32_t array through a uint16_t pointer gave wrong randoms under -O3.
template <class To, class From>
DYNFED_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace dynfed
