// Eight floats, for soft.inl. Included inside an anonymous namespace by avx2.cpp.
struct Floats256 {
  using V = __m256;
  using I = __m256i;
  using M = __m256;
  static constexpr int kWidth = 8, kVectors = 2;  // sixteen registers

  DYNFED_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  DYNFED_INLINE V load(const BFloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half(p)), 16));
  }
  DYNFED_INLINE V load(const Float16* p) { return _mm256_cvtph_ps(half(p)); }
  DYNFED_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  DYNFED_INLINE void store(BFloat16* p, V v) {
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const V kept = _mm256_blendv_ps(_mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), _mm256_castsi256_ps(rounded), ordered(v));
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
    const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(pairs));
  }
  DYNFED_INLINE void store(Float16* p, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  DYNFED_INLINE void stream(float* p, V v) { _mm256_stream_ps(p, v); }
  template <class T>
  DYNFED_INLINE void stream(T* p, V v) {
    store(p, v);
  }
  DYNFED_INLINE void fence() { _mm_sfence(); }

  DYNFED_INLINE V set(float v) { return _mm256_set1_ps(v); }
  DYNFED_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
  DYNFED_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  DYNFED_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  DYNFED_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  DYNFED_INLINE V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
  DYNFED_INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
  DYNFED_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
  DYNFED_INLINE V product_error(V a, V b, V p) { return _mm256_fmsub_ps(a, b, p); }
  // The estimate there is, to 2^-12, would need two of Newton's steps.
  DYNFED_INLINE V reciprocal(V y) { return _mm256_div_ps(set(1.0f), y); }
  DYNFED_INLINE V round(V v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  DYNFED_INLINE I to_int(V v) { return _mm256_cvtps_epi32(v); }
  DYNFED_INLINE I plus(I a, I b) { return _mm256_add_epi32(a, b); }
  DYNFED_INLINE V power(int32_t shift, I down) {
    const I k = _mm256_sub_epi32(_mm256_set1_epi32(shift), down);
    const I kept = _mm256_min_epi32(_mm256_max_epi32(k, _mm256_set1_epi32(7)), _mm256_set1_epi32(247));
    return _mm256_castsi256_ps(_mm256_slli_epi32(kept, 23));
  }
  DYNFED_INLINE M ge(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  DYNFED_INLINE M le(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
  DYNFED_INLINE M ordered(V a) { return _mm256_cmp_ps(a, a, _CMP_ORD_Q); }
  DYNFED_INLINE M both(M a, M b) { return _mm256_and_ps(a, b); }
  DYNFED_INLINE bool full(M m) { return _mm256_movemask_ps(m) == 0xff; }
  DYNFED_INLINE V select(M m, V a, V b) { return _mm256_blendv_ps(b, a, m); }
  DYNFED_INLINE double sum(V v) {
    const __m256d all = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    double lane[4];
    _mm256_storeu_pd(lane, all);
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
  }
  DYNFED_INLINE void store_index(uint8_t* p, I i) {
    const __m256i words = _mm256_packus_epi32(i, i), bytes = _mm256_packus_epi16(words, words);
    const uint32_t low = uint32_t(_mm256_extract_epi32(bytes, 0)), high = uint32_t(_mm256_extract_epi32(bytes, 4));
    memcpy(p, &low, 4);
    memcpy(p + 4, &high, 4);
  }

  // Up to sixteen boundaries are compared one by one; of more, sixteen and then four halvings, which look into memory.
  template <int kMost>
  struct Finder {
    explicit Finder(const NearestPlan& p) : plan(p), compared(kMost > 16 ? 15 : p.count - 1) {}
    I find(V x) const {
      const float* const mids = kMost > 16 ? plan.coarse : plan.mid;
      I i = _mm256_setzero_si256();
      for (int j = 0; j < compared; ++j) i = _mm256_sub_epi32(i, _mm256_castps_si256(ge(x, set(mids[j]))));
      if (kMost <= 16) return i;
      i = _mm256_slli_epi32(i, 4);
#pragma GCC unroll 4
      for (int half = 8; half > 0; half /= 2) {
        const V mid = _mm256_i32gather_ps(plan.mid, _mm256_add_epi32(i, _mm256_set1_epi32(half - 1)), 4);
        i = _mm256_add_epi32(i, _mm256_and_si256(_mm256_castps_si256(ge(x, mid)), _mm256_set1_epi32(half)));
      }
      return i;
    }
    V center(I i) const {
      if (kMost > 16) return _mm256_i32gather_ps(plan.center, i, 4);
      const V low = _mm256_permutevar8x32_ps(load(plan.center), i), high = _mm256_permutevar8x32_ps(load(plan.center + 8), i);
      return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));  // the sign: bit 3 of i
    }

   private:
    const NearestPlan& plan;
    int compared;
  };

 private:
  DYNFED_INLINE __m128i half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
};
