// One float, for soft.inl. Included inside an anonymous namespace by scalar.cpp.
struct Floats1 {
  using V = float;
  using I = int32_t;
  using M = bool;
  static constexpr int kWidth = 1, kVectors = 4;

  template <class T>
  DYNFED_INLINE V load(const T* p) {
    return to_float(*p);
  }
  DYNFED_INLINE void store(float* p, V v) { *p = v; }
  DYNFED_INLINE void store(BFloat16* p, V v) { *p = to_bfloat16(v); }
  DYNFED_INLINE void store(Float16* p, V v) { *p = to_float16(v); }
  template <class T>
  DYNFED_INLINE void stream(T* p, V v) {
    store(p, v);
  }
  DYNFED_INLINE void fence() {}

  DYNFED_INLINE V set(float v) { return v; }
  DYNFED_INLINE V add(V a, V b) { return a + b; }
  DYNFED_INLINE V sub(V a, V b) { return a - b; }
  DYNFED_INLINE V mul(V a, V b) { return a * b; }
  // Rounded twice: without the instruction `fma` is a call, and nothing here needs one rounding.
  DYNFED_INLINE V fma(V a, V b, V c) { return a * b + c; }
  DYNFED_INLINE V fnma(V a, V b, V c) { return c - a * b; }
  DYNFED_INLINE V min(V a, V b) { return a < b ? a : b; }
  DYNFED_INLINE V max(V a, V b) { return a > b ? a : b; }
  DYNFED_INLINE V product_error(V a, V b, V p) { return V(double(a) * double(b) - double(p)); }
  DYNFED_INLINE V reciprocal(V y) { return 1.0f / y; }
  DYNFED_INLINE V round(V v) {  // from 2^23 on there is nothing to round
    const float magnitude = __builtin_fabsf(v);
    if (!(magnitude < 8388608.0f)) return v;
    const float whole = float(int32_t(magnitude)), rest = magnitude - whole;
    const bool up = rest > 0.5f || (rest == 0.5f && (int32_t(whole) & 1) != 0);
    return __builtin_copysignf(up ? whole + 1.0f : whole, v);
  }
  DYNFED_INLINE I to_int(V v) { return v >= -2147483648.0f && v < 2147483648.0f ? int32_t(v) : INT32_MIN; }
  DYNFED_INLINE I plus(I a, I b) { return int32_t(uint32_t(a) + uint32_t(b)); }
  DYNFED_INLINE V power(int32_t shift, I down) {
    const int32_t k = int32_t(uint32_t(shift) - uint32_t(down));
    return bit_cast<float>(uint32_t(k < 7 ? 7 : k > 247 ? 247 : k) << 23);
  }
  DYNFED_INLINE M ge(V a, V b) { return a >= b; }
  DYNFED_INLINE M le(V a, V b) { return a <= b; }
  DYNFED_INLINE M ordered(V a) { return a == a; }
  DYNFED_INLINE M both(M a, M b) { return a && b; }
  DYNFED_INLINE bool full(M m) { return m; }
  DYNFED_INLINE V select(M m, V a, V b) { return m ? a : b; }
  DYNFED_INLINE double sum(V v) { return v; }
  DYNFED_INLINE void store_index(uint8_t* p, I i) { *p = uint8_t(i); }

  template <int kMost>
  struct Finder {
    explicit Finder(const NearestPlan& p) : plan(p) {}
    I find(V x) const {
      I i = 0;
      for (int half = kMost / 2; half > 0; half /= 2) i += x >= plan.mid[i + half - 1] ? half : 0;
      return i;
    }
    V center(I i) const { return plan.center[i]; }

   private:
    const NearestPlan& plan;
  };
};
