// Sixteen floats, for soft.inl. Included inside an anonymous namespace by avx512.cpp and avx512vbmi.cpp, each of which compiles
// its own copy.
struct Floats512 {
  using V = __m512;
  using I = __m512i;
  using M = __mmask16;
  static constexpr int kWidth = 16, kVectors = 4;

  DYNFED_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  DYNFED_INLINE V load(const BFloat16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half(p)), 16));
  }
  DYNFED_INLINE V load(const Float16* p) { return _mm512_cvtph_ps(half(p)); }
  DYNFED_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  DYNFED_INLINE void store(BFloat16* p, V v) {
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  DYNFED_INLINE void store(Float16* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  DYNFED_INLINE void stream(float* p, V v) { _mm512_stream_ps(p, v); }
  template <class T>
  DYNFED_INLINE void stream(T* p, V v) {
    store(p, v);
  }
  DYNFED_INLINE void fence() { _mm_sfence(); }

  DYNFED_INLINE V set(float v) { return _mm512_set1_ps(v); }
  DYNFED_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
  DYNFED_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  DYNFED_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  DYNFED_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  DYNFED_INLINE V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
  DYNFED_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
  DYNFED_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
  DYNFED_INLINE V product_error(V a, V b, V p) { return _mm512_fmsub_ps(a, b, p); }
  DYNFED_INLINE V reciprocal(V y) {  // an estimate to 2^-14, and Newton's step
    const V r = _mm512_rcp14_ps(y);
    return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(y, r, set(1.0f)), r);
  }
  DYNFED_INLINE V round(V v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  DYNFED_INLINE I to_int(V v) { return _mm512_cvtps_epi32(v); }
  DYNFED_INLINE I plus(I a, I b) { return _mm512_add_epi32(a, b); }
  DYNFED_INLINE V power(int32_t shift, I down) {
    const I k = _mm512_sub_epi32(_mm512_set1_epi32(shift), down);
    const I kept = _mm512_min_epi32(_mm512_max_epi32(k, _mm512_set1_epi32(7)), _mm512_set1_epi32(247));
    return _mm512_castsi512_ps(_mm512_slli_epi32(kept, 23));
  }
  DYNFED_INLINE M ge(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  DYNFED_INLINE M le(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  DYNFED_INLINE M ordered(V a) { return _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q); }
  DYNFED_INLINE M both(M a, M b) { return M(a & b); }
  DYNFED_INLINE bool full(M m) { return m == 0xffff; }
  DYNFED_INLINE V select(M m, V a, V b) { return _mm512_mask_blend_ps(m, b, a); }
  DYNFED_INLINE double sum(V v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }
  DYNFED_INLINE void store_index(uint8_t* p, I i) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(i)); }

  // Bisection: sixteen boundaries are a register, thirty-two are two, of more the last four halvings look into memory.
  template <int kMost>
  struct Finder {
    explicit Finder(const NearestPlan& p)
        : plan(p), first(_mm512_load_ps(kMost > 32 ? p.coarse : p.mid)), second(_mm512_load_ps(p.mid + 16)),
          low(_mm512_load_ps(p.center)), high(_mm512_load_ps(p.center + 16)) {}
    I find(V x) const {
      I i = _mm512_setzero_si512();
      if (kMost == 32) i = step<16>(x, i, _mm512_set1_ps(plan.mid[15]));
#pragma GCC unroll 4
      for (int half = 8; half > 0; half /= 2) {
        const I at = _mm512_add_epi32(i, _mm512_set1_epi32(half - 1));
        const V mid = kMost == 32 ? _mm512_permutex2var_ps(first, at, second) : _mm512_permutexvar_ps(at, first);
        i = _mm512_mask_add_epi32(i, ge(x, mid), i, _mm512_set1_epi32(half));
      }
      if (kMost <= 32) return i;
      i = _mm512_slli_epi32(i, 4);
      // Of the sixteenth coarse one there is no boundary, as there is none beyond the last centre.
#pragma GCC unroll 4
      for (int half = 8; half > 0; half /= 2) {
        const V mid = _mm512_i32gather_ps(_mm512_add_epi32(i, _mm512_set1_epi32(half - 1)), plan.mid, 4);
        i = _mm512_mask_add_epi32(i, ge(x, mid), i, _mm512_set1_epi32(half));
      }
      return i;
    }
    V center(I i) const {
      if (kMost == 16) return _mm512_permutexvar_ps(i, low);
      if (kMost == 32) return _mm512_permutex2var_ps(low, i, high);
      return _mm512_i32gather_ps(i, plan.center, 4);
    }

   private:
    template <int kStep>
    static I step(V x, I i, V mid) {
      return _mm512_mask_add_epi32(i, ge(x, mid), i, _mm512_set1_epi32(kStep));
    }
    const NearestPlan& plan;
    V first, second, low, high;
  };

 private:
  DYNFED_INLINE __m256i half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
};
