// AVX-512 with VBMI. The pragma comes first and holds to the end: nothing else in this file may run elsewhere.
#include "kernels.h"
#ifdef DYNFED_X86
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of its own _mm512_undefined_epi32
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c,bmi2")
#include <immintrin.h>

#include "../core/convert.h"
#include "../core/eden.h"
#include "../core/eigh.h"
#include "../core/pack.h"
#include "../core/philox.h"
#include "../core/quantize.h"
#include "../core/rotate.h"

namespace dynfed {
namespace {

#include "floats_avx512.inl"

#include "avx512.inl"

// Any byte of a vector goes anywhere in one instruction, and any eight bits of a 64-bit word become a byte.
struct Avx512Vbmi : Avx512 {
  template <int B, bool kNoisy, class T>
  static Codes quantize64(const T* x, float inverse, const uint16_t* noise) {
    if constexpr (B == 1) {
      return Avx512::quantize64<B, kNoisy>(x, inverse, noise);
    } else {
      __m512i q[4];
      fixed_points<kNoisy>(x, inverse, noise, q);
      // A level is the third byte of its 32 bits.
      alignas(64) uint8_t index[64];
      for (int i = 0; i < 64; ++i) index[i] = uint8_t(4 * (i & 31) + 2);
      const __m512i third = _mm512_load_si512(index);
      const __m512i low = _mm512_permutex2var_epi8(q[0], third, q[1]), high = _mm512_permutex2var_epi8(q[2], third, q[3]);
      return _mm512_add_epi8(_mm512_mask_blend_epi64(0xF0, low, high), _mm512_set1_epi8(char(1 << (B - 1))));
    }
  }

  template <int B>
  static void pack64(Codes c, uint8_t* out) {
    if constexpr (B == 1 || B == 2 || B == 4 || B == 8) return Avx512::pack64<B>(c, out);  // one instruction narrows
    alignas(64) uint8_t index[64];
    for (int i = 0; i < 64; ++i) index[i] = uint8_t(i / B * 8 + i % B);
    const __m512i w = _mm512_permutexvar_epi8(_mm512_load_si512(index), by_eights<B & 7>(by_pairs<B>(c)));
    _mm512_storeu_si512(out, w);  // what lies beyond 8 * B bytes is written again by the next block
  }

  template <int B>
  static Codes unpack64(const uint8_t* in) {
    if constexpr (B == 1 || B == 8) return Avx512::unpack64<B>(in);
    alignas(64) uint8_t index[64], shift[64];
    for (int i = 0; i < 64; ++i) {
      index[i] = uint8_t((i & 7) < B ? i / 8 * B + (i & 7) : 0);  // the word's own bytes, then any
      shift[i] = uint8_t(B * (i & 7));
    }
    // Whole vectors: masked loads in cache are as fast, but from memory they took up to three times as long.
    const __m512i bytes = B <= 4 ? _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)))
                                 : _mm512_loadu_si512(in);
    const __m512i w = _mm512_permutexvar_epi8(_mm512_load_si512(index), bytes);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_load_si512(shift), w), _mm512_set1_epi8(char((1 << B) - 1)));
  }
};

#include "kernels.inl"

}  // namespace

extern const Kernels kAvx512VbmiKernels = Table<Avx512Vbmi>::make();

}  // namespace dynfed
#endif
