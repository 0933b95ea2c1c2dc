// AVX-512 (F, BW, DQ, VL). The pragma comes first and holds to the end: nothing else in this file may run elsewhere.
#include "kernels.h"
#ifdef DYNFED_X86
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of its own _mm512_undefined_epi32
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
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
#include "kernels.inl"

}  // namespace

extern const Kernels kAvx512Kernels = Table<Avx512>::make();

}  // namespace dynfed
#endif
