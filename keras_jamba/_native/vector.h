/* Vectors of LANES floats and the functions on them, for one instruction set.
 *
 * Included once for each, with LANES, V(name) (which makes names of their own) and one of WITH_AVX2 and
 * WITH_AVX512, or neither, defined.  Types are the compiler's vector extension, so that plain arithmetic is written
 * once; what it lacks stands here. */

typedef float V(f) __attribute__((vector_size(4 * LANES)));
typedef int32_t V(i) __attribute__((vector_size(4 * LANES)));
typedef uint16_t V(h) __attribute__((vector_size(2 * LANES)));
/* Unaligned vectors: a caller's arrays need no alignment. */
typedef float V(fu) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t V(iu) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t V(hu) __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#define vf V(f)
#define vi V(i)
#define vh V(h)
#define vfu V(fu)
#define viu V(iu)
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

/* The functions below process SIDE vectors at once: each vector is one long chain of dependent instructions, and
 * out-of-order execution covers about one such chain. */

/* 2**r for r in [-1/2, 1/2]: the best polynomial of degree 5 with p(0) = 1, 9.2e-8 off at most, relatively. */
INLINE void V(exp2_part)(const vf *r, vf *p) {
  EACH p[k] = r[k] * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
  EACH p[k] = p[k] * r[k] + 0x1.c6b752p-5f;
  EACH p[k] = p[k] * r[k] + 0x1.ebf9bcp-3f;
  EACH p[k] = p[k] * r[k] + 0x1.62e42ap-1f;
  EACH p[k] = p[k] * r[k] + 1.0f;
}

/* 2**(x y) where |x y| <= 126, which the caller guarantees; NaN gives another number. Exactly 1 for 0. */
INLINE void V(exp2_products)(vf x, const vf *y, vf *to) {
  vf moved[SIDE], r[SIDE], p[SIDE];
  EACH moved[k] = x * y[k] + 12582912.0f; /* 1.5 * 2**23: rounds to an integer, which is in the lowest bits */
  EACH r[k] = moved[k] - 12582912.0f;
  EACH r[k] = x * y[k] - r[k];
  V(exp2_part)(r, p);
  EACH to[k] = (vf)((vi)p[k] + ((vi)moved[k] << 23));
}

/* 2**x for any x. Exactly 1 for 0, so a state is held exactly; NaN stays NaN; below 2**-126, at most 2**-126; above
 * the largest numbers AVX-512 gives infinity and the others stay at 2**127.5. */
INLINE void V(exp2)(vf *x) {
  vf rounded[SIDE], r[SIDE], p[SIDE];
#if defined(WITH_AVX512)
  EACH rounded[k] = (vf)_mm512_roundscale_ps((__m512)x[k], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(WITH_AVX2)
  EACH x[k] = (vf)_mm256_min_ps(_mm256_set1_ps(127.49f), (__m256)V(max)(x[k], -126.0f));
  EACH rounded[k] = (vf)_mm256_round_ps((__m256)x[k], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  EACH x[k] = V(max)(x[k], -126.0f);
  EACH x[k] = -V(max)(-x[k], -127.49f);
  EACH rounded[k] = (x[k] + 12582912.0f) - 12582912.0f; /* see above */
#endif
  EACH r[k] = x[k] - rounded[k];
  V(exp2_part)(r, p);
#if defined(WITH_AVX512)
  EACH x[k] = (vf)_mm512_scalef_ps((__m512)p[k], (__m512)rounded[k]);
#else
  EACH rounded[k] = (vf)((vi)rounded[k] & (x[k] == x[k])); /* in C the conversion of NaN to an integer is undefined */
  EACH x[k] = (vf)((vi)p[k] + (__builtin_convertvector(rounded[k], vi) << 23));
#endif
}

INLINE void V(sigmoid)(const vf *x, vf *to) {
  vf y[SIDE];
  EACH y[k] = x[k] * -LOG2E;
  V(exp2)(y);
  EACH to[k] = 1.0f / (1.0f + y[k]);
}

/* log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), and log1p(y) = 2 atanh(y / (2 + y)) as its series: with y <= 1 the
 * argument is at most 1/3 and ten terms leave less than half a unit in the last place. Its slope, skipped if NULL,
 * is the sigmoid. */
INLINE void V(softplus)(vf *x, vf *slope) {
  vf y[SIDE], s[SIDE], q[SIDE], p[SIDE];
  EACH y[k] = V(abs)(x[k]) * -LOG2E;
  V(exp2)(y);
  EACH s[k] = y[k] / (2.0f + y[k]);
  if (slope) EACH slope[k] = V(choose)(x[k] < 0.0f, y[k], V(splat)(1.0f)) / (1.0f + y[k]);
  EACH q[k] = s[k] * s[k];
  EACH p[k] = q[k] * (2.0f / 19) + 2.0f / 17;
  EACH p[k] = p[k] * q[k] + 2.0f / 15;
  EACH p[k] = p[k] * q[k] + 2.0f / 13;
  EACH p[k] = p[k] * q[k] + 2.0f / 11;
  EACH p[k] = p[k] * q[k] + 2.0f / 9;
  EACH p[k] = p[k] * q[k] + 2.0f / 7;
  EACH p[k] = p[k] * q[k] + 2.0f / 5;
  EACH p[k] = p[k] * q[k] + 2.0f / 3;
  EACH p[k] = p[k] * q[k] + 2.0f;
  EACH x[k] = V(max)(x[k], 0.0f) + s[k] * p[k];
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

INLINE float V(sum)(vf x) {
  float parts[LANES], total = 0;
  memcpy(parts, &x, sizeof x);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) parts[i] += parts[i + width];
  total = parts[0];
  return total;
}

/* The sums over the lanes of `count` vectors. */
INLINE void V(sums)(const vf *x, int64_t count, float *to) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    vf four = V(quads)(V(pairs)(x[i], x[i + 1]), V(pairs)(x[i + 2], x[i + 3]));
    for (int k = 0; k < 4; k++) {
      float sum = 0;
      for (int lane = k; lane < LANES; lane += 4) sum += four[lane];
      to[i + k] = sum;
    }
  }
  for (; i < count; i++) to[i] = V(sum)(x[i]);
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

/* Prefetches a line two strips after this one into the second-level cache. Hardware prefetching does not follow the
 * columns of a matrix. */
#define AHEAD (2 * WIDEST)
INLINE void V(prefetch)(kj_tensor x, int64_t token, int64_t first) {
  __builtin_prefetch((const char *)x.data + (token * x.row + first + AHEAD) * (x.dtype == KJ_FLOAT32 ? 4 : 2), 0, 2);
}

INLINE void V(prefetch_to_write)(kj_tensor y, int64_t token, int64_t first) {
  __builtin_prefetch((char *)y.data + (token * y.row + first + AHEAD) * (y.dtype == KJ_FLOAT32 ? 4 : 2), 1, 2);
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
