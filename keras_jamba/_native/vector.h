/* Vectors of LANES floats and the functions on them, for one instruction set.
 *
 * Included once for each, with LANES, V(name) (which makes names of their own) and one of WITH_AVX2 and
 * WITH_AVX512, or neither, defined.  Types are the compiler's vector extension, so that plain arithmetic is written
 * once; what it lacks stands here. */

typedef float V(f) __attribute__((vector_size(4 * LANES)));
typedef int32_t V(i) __attribute__((vector_size(4 * LANES)));
typedef uint16_t V(h) __attribute__((vector_size(2 * LANES)));
/* The same anywhere in memory: no alignment is asked of a caller's arrays. */
typedef float V(fu) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t V(hu) __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#define vf V(f)
#define vi V(i)
#define vh V(h)
#define vfu V(fu)
#define vhu V(hu)

INLINE vf V(splat)(float x) { return x - (vf){0}; }

INLINE vf V(choose)(vi where, vf a, vf b) { return (vf)((where & (vi)a) | (~where & (vi)b)); }

INLINE vf V(max)(vf x, float bound) { /* NaN stays NaN */
#if defined(WITH_AVX512)
  return (vf)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x);
#elif defined(WITH_AVX2)
  return (vf)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x);
#else
  vf b = V(splat)(bound);
  return V(choose)(x < b, b, x);
#endif
}

/* The larger of each pair; NaN if either is. */
INLINE vf V(larger)(vf x, vf y) { return V(choose)((x > y) | (x != x), x, y); }

INLINE vf V(abs)(vf x) { return (vf)((vi)x & 0x7fffffff); }

/* 2**r for r in [-1/2, 1/2]: the best polynomial of degree 5 with p(0) = 1, 9.2e-8 off at most, relatively. */
INLINE vf V(exp2_part)(vf r) {
  vf p = r * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  return p * r + 1.0f;
}

/* 2**(x y) where |x y| <= 126, which must hold: NaN, too, comes out as something else. Exactly 1 for 0. */
INLINE vf V(exp2_product)(vf x, vf y) {
  vf moved = x * y + 12582912.0f; /* 1.5 * 2**23: rounds to an integer, which is in the lowest bits */
  vf p = V(exp2_part)(x * y - (moved - 12582912.0f));
  return (vf)((vi)p + ((vi)moved << 23));
}

/* 2**x for any x. Exactly 1 for 0, so a state is held exactly; NaN stays NaN; below 2**-126, at most 2**-126; above
 * the largest numbers AVX-512 gives infinity and the others stay at 2**127.5. */
INLINE vf V(exp2)(vf x) {
#if defined(WITH_AVX512)
  vf whole = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(WITH_AVX2)
  x = (vf)_mm256_min_ps(_mm256_set1_ps(127.49f), (__m256)V(max)(x, -126.0f));
  vf whole = (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = V(max)(x, -126.0f);
  x = -V(max)(-x, -127.49f);
  vf whole = (x + 12582912.0f) - 12582912.0f; /* 1.5 * 2**23: adding it rounds to an integer */
#endif
  vf p = V(exp2_part)(x - whole);
#if defined(WITH_AVX512)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return (vf)((vi)p + (__builtin_convertvector(whole, vi) << 23));
#endif
}

INLINE vf V(exp)(vf x) { return V(exp2)(x * LOG2E); }

INLINE vf V(sigmoid)(vf x) { return 1.0f / (1.0f + V(exp)(-x)); }

/* log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), and log1p(y) = 2 atanh(y / (2 + y)) as its series: with y <= 1 the
 * argument is at most 1/3 and ten terms leave less than half a unit in the last place. */
INLINE vf V(softplus)(vf x) {
  vf y = V(exp)(-V(abs)(x));
  vf s = y / (2.0f + y), q = s * s;
  vf p = q * (2.0f / 19) + 2.0f / 17;
  p = p * q + 2.0f / 15;
  p = p * q + 2.0f / 13;
  p = p * q + 2.0f / 11;
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  p = p * q + 2.0f;
  return V(max)(x, 0.0f) + s * p;
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

/* Four vectors to one: in every 128 bits the sums over pairs of what a, b, c and d have there, [a b c d]. */
INLINE vf V(pairs)(vf a, vf b) {
#if LANES == 4
  return SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7);
#elif LANES == 8
  return SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
#else
  return SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
         SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#endif
}

INLINE vf V(quads)(vf ab, vf cd) {
#if LANES == 4
  return SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7);
#elif LANES == 8
  return SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
#else
  return SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#endif
}

/* Adds to `sums` what belongs to two such vectors: HALF floats of the one, then as many of the other, number i of them
 * a part of the sum of vector i % 4. */
#define HALF (LANES == 16 ? 8 : 4)
INLINE void V(add_sums)(float *sums, vf one, vf other) {
#if LANES == 4
  *(vfu *)sums += one;
  *(vfu *)(sums + 4) += other;
#elif LANES == 8
  *(vfu *)sums += SHUFFLE(one, other, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(one, other, 4, 5, 6, 7, 12, 13, 14, 15);
#else
  *(vfu *)sums += SHUFFLE(one, other, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  SHUFFLE(one, other, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#endif
}

INLINE float V(sum)(vf x) {
  float parts[LANES], total = 0;
  memcpy(parts, &x, sizeof x);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) parts[i] += parts[i + width];
  total = parts[0];
  return total;
}

INLINE vf V(halves_to_floats)(vh x) {
#if defined(WITH_AVX512)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(WITH_AVX2)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  vf y;
  for (int i = 0; i < LANES; i++) y[i] = half_to_float(x[i]);
  return y;
#endif
}

INLINE vh V(floats_to_halves)(vf x) {
#if defined(WITH_AVX512)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(WITH_AVX2)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vh y;
  for (int i = 0; i < LANES; i++) y[i] = float_to_half(x[i]);
  return y;
#endif
}

INLINE vh V(floats_to_bfloats)(vf x) { /* to nearest, ties to even; NaN stays NaN */
  vi bits = (vi)x;
  vi rounded = bits + 0x7fff + ((bits >> 16) & 1);
  vi chosen = (vi)V(choose)(x == x, (vf)rounded, (vf)(bits | 0x400000));
  return __builtin_convertvector(chosen >> 16, vh);
}

/* `count` numbers of a token from channel `first` on; zeros fill the lanes after them. */
INLINE vf V(load)(kj_tensor x, int64_t token, int64_t first, int count) {
  int64_t at = token * x.row + first;
  if (x.dtype == KJ_FLOAT32) {
    const float *from = (const float *)x.data + at;
    if (count == LANES) return *(const vfu *)from;
    vf y = {0};
    memcpy(&y, from, count * sizeof(float));
    return y;
  }
  const uint16_t *from = (const uint16_t *)x.data + at;
  vh half = {0};
  if (count == LANES) half = *(const vhu *)from;
  else memcpy(&half, from, count * sizeof(uint16_t));
  if (x.dtype == KJ_FLOAT16) return V(halves_to_floats)(half);
  return (vf)(__builtin_convertvector(half, vi) << 16);
}

INLINE void V(prefetch)(kj_tensor x, int64_t token, int64_t first) {
  if (x.data) __builtin_prefetch((const char *)x.data + (token * x.row + first) * (x.dtype == KJ_FLOAT32 ? 4 : 2));
}

INLINE void V(store)(kj_tensor y, int64_t token, int64_t first, int count, vf x) {
  int64_t at = token * y.row + first;
  if (y.dtype == KJ_FLOAT32) {
    float *to = (float *)y.data + at;
    if (count == LANES) *(vfu *)to = x;
    else memcpy(to, &x, count * sizeof(float));
    return;
  }
  uint16_t *to = (uint16_t *)y.data + at;
  vh half = y.dtype == KJ_FLOAT16 ? V(floats_to_halves)(x) : V(floats_to_bfloats)(x);
  if (count == LANES) *(vhu *)to = half;
  else memcpy(to, &half, count * sizeof(uint16_t));
}

/* The same of a vector of channels, or zeros for NULL. */
INLINE vf V(load_channels)(const float *x, int64_t first, int count) {
  return x ? V(load)((kj_tensor){(void *)x, KJ_FLOAT32, 0}, 0, first, count) : (vf){0};
}
