/* Checks of the kernels under sanitizers: errors of exp2, softplus and sigmoid, and random calls.
 *
 * tests/ops/test_native.py builds and runs this file. Every array has exactly the needed size, so the address sanitizer
 * finds every access outside it. Every instruction set and thread count must give the results of plain C on one thread.
 */

#include "../../keras_jamba/_native/keras_jamba.c"

#include <math.h>
#include <stdio.h>

static unsigned long long seed = 88172645463325252ULL;

static unsigned random_number(unsigned below) { /* xorshift */
  seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
  return (unsigned)(seed >> 33) % below;
}

static float random_float(float low, float high) { return low + (high - low) * (float)random_number(1 << 24) / (1 << 24); }

static void fail(const char *what, double got, double bound) {
  printf("%s: %g, more than %g\n", what, got, bound);
  exit(1);
}

/* ---------------------------------------------------------------- vector functions */

#define CHECK_FUNCTIONS(set, lanes)                                                                           \
  static void functions_##set(void) {                                                                         \
    double worst[5] = {0};                                                                                    \
    for (int i = 0; i < 50000; i++) {                                                                         \
      float x = i % 2 ? random_float(-126, 127) : random_float(-1e-3f, 1e-3f), y = random_float(-80, 80);     \
      if (i == 0) x = y = 0;                                                                                  \
      f_##set p[SIDE], q[SIDE], s[SIDE], t[SIDE], g[SIDE], by[SIDE];                                          \
      EACH p[k] = splat_##set(x), s[k] = g[k] = splat_##set(y), by[k] = splat_##set(0.992f);                  \
      exp2_products_##set(p[0], by, q);                                                                       \
      exp2_##set(p);                                                                                          \
      sigmoid_##set(g, g);                                                                                    \
      softplus_##set(s, t);                                                                                   \
      double found[] = {p[0][lanes - 1], q[1][0], s[2][0], g[3][0], t[3][0]};                                 \
      double logistic = 1 / (1 + exp(-(double)y));                                                            \
      double right[] = {exp2(x), exp2((double)x * 0.992f), log1p(exp((double)y)), logistic, logistic};        \
      for (int k = 0; k < 5; k++) worst[k] = fmax(worst[k], fabs(found[k] / right[k] - 1));                   \
      if (x == 0 && (p[0][0] != 1 || q[0][0] != 1)) fail(#set " exp2(0) - 1", p[0][0] - 1, 0);                         \
    }                                                                                                         \
    printf(#set ": relative errors of exp2 %.2g, of products %.2g, softplus %.2g, sigmoid %.2g\n", worst[0],  \
           worst[1], worst[2], worst[3]);                                                                     \
    if (worst[0] > 2e-7) fail(#set " exp2", worst[0], 2e-7);                                                  \
    /* without a fused multiply-add the product is rounded, by up to 4e-6 here */                             \
    if (worst[1] > (lanes == 4 ? 4e-6 : 2e-7)) fail(#set " exp2_product", worst[1], 2e-7);                    \
    if (worst[2] > 8e-6) fail(#set " softplus", worst[2], 8e-6);                                              \
    if (worst[3] > 8e-6) fail(#set " sigmoid", worst[3], 8e-6);                                               \
    if (worst[4] > 8e-6) fail(#set " slope of softplus", worst[4], 8e-6);                                     \
    f_##set odd[SIDE] = {splat_##set(NAN), splat_##set(1000), splat_##set(-1000)}, nan[SIDE] = {odd[0]};      \
    f_##set *much = &odd[1], *little = &odd[2];                                                               \
    exp2_##set(odd);                                                                                          \
    softplus_##set(nan, NULL);                                                                                \
    if (odd[0][0] == odd[0][0] || nan[0][0] == nan[0][0]) fail(#set " NaN", 0, 0);                            \
    if (!((*much)[0] > 1e38f)) fail(#set " 2**1000", (*much)[0], 1e38);                                             \
    if (!((*little)[0] >= 0 && (*little)[0] <= 1.2e-38f)) fail(#set " 2**-1000", (*little)[0], 1.2e-38);               \
  }

CHECK_FUNCTIONS(plain, 4)
#if HAVE_X86 && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
CHECK_FUNCTIONS(avx2, 8)
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
CHECK_FUNCTIONS(avx512, 16)
#pragma GCC pop_options
#endif

/* Converts every 16-bit number to float and back. */
static void check_halves(void) {
  for (unsigned bits = 0; bits < 1 << 16; bits++) {
    float x = half_to_float((uint16_t)bits);
    if (x == x && float_to_half(x) != bits) fail("a float16 round trip", bits, 0);
    if (x != x && !((float_to_half(x) & 0x7fff) > 0x7c00)) fail("a float16 NaN", bits, 0);
  }
}

/* ---------------------------------------------------------------- random calls */

typedef struct {
  void (*work)(void *);
  void *data;
} kj_member;

static void *member(void *given) {
  ((kj_member *)given)->work(((kj_member *)given)->data);
  return NULL;
}

/* Runs `work` on `threads` threads, the calling thread included, as OpenMP does. */
static void team(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
  kj_member given = {work, data};
  pthread_t started[8];
  (void)flags;
  for (unsigned i = 1; i < threads; i++)
    if (pthread_create(&started[i], NULL, member, &given)) fail("a thread", i, 0);
  work(data);
  for (unsigned i = 1; i < threads; i++) pthread_join(started[i], NULL);
}

/* Returns `count` random numbers of a dtype, in memory of exactly their size. */
static kj_tensor draw(int64_t count, int64_t row, int dtype, float low, float high) {
  kj_tensor x = {malloc(count * (dtype == KJ_FLOAT32 ? 4 : 2)), dtype, row};
  for (int64_t i = 0; i < count; i++) put_number(x, i, random_float(low, high));
  return x;
}

static float *draw_floats(int64_t count, float low, float high) {
  return draw(count, 0, KJ_FLOAT32, low, high).data;
}

static void *draw_mask(int64_t count) {
  uint8_t *mask = malloc(count);
  for (int64_t i = 0; i < count; i++) mask[i] = random_number(4) != 0;
  return mask;
}

static int32_t *draw_segments(int64_t batch, int64_t length) {
  int32_t *segments = malloc(batch * length * sizeof *segments);
  for (int64_t i = 0; i < batch * length; i++)
    segments[i] = i % length ? segments[i - 1] + (random_number(5) == 0) : (int32_t)random_number(3);
  return segments;
}

/* Returns memory for a result, filled with NaN to reveal unwritten values. */
static kj_tensor blank(int64_t count, int64_t row, int dtype) {
  kj_tensor x = {malloc(count * (dtype == KJ_FLOAT32 ? 4 : 2)), dtype, row};
  memset(x.data, 0xff, count * (dtype == KJ_FLOAT32 ? 4 : 2));
  return x;
}

/* Fails if `found` differs from `right` by more than `bound`, relative to the largest value of `right`. */
static void compare(const char *what, kj_tensor found, kj_tensor right, int64_t count, double bound) {
  double worst = 0, scale = 1e-3;
  for (int64_t i = 0; i < count; i++) {
    double difference = fabs((double)number_at(found, i) - number_at(right, i));
    if (!(difference < 1e30)) fail(what, NAN, bound);
    worst = fmax(worst, difference);
    scale = fmax(scale, fabs(number_at(right, i)));
  }
  if (worst > bound * scale) fail(what, worst / scale, bound);
}

typedef struct {
  kj_tensor x[12];
  int64_t count[12];
  int used;
} results;

static void keep(results *all, kj_tensor x, int64_t count) {
  all->x[all->used] = x;
  all->count[all->used++] = count;
}

static void compare_all(const char *what, results *found, results *right, double bound) {
  for (int i = 0; i < right->used; i++) {
    compare(what, found->x[i], right->x[i], right->count[i], bound);
    if (found != right) free(found->x[i].data);
  }
}

static results run_scan(kj_scan call, int backward) {
  int64_t b = call.batch, t = call.length, e = call.channels, n = call.states;
  results all = {.used = 0};
  call.y = blank(b * t * e, e, call.u.dtype);
  call.last = blank(b * e * n, 0, KJ_FLOAT32).data;
  call.checkpoints = backward ? blank(kj_scan_checkpoints(b, t, e, n), 0, KJ_FLOAT32).data : NULL;
  if (kj_scan_forward(&call)) fail("kj_scan_forward", 1, 0);
  keep(&all, call.y, b * t * e);
  keep(&all, (kj_tensor){call.last, KJ_FLOAT32, 0}, b * e * n);
  if (!backward) return all;
  struct { kj_tensor *to; kj_tensor like; int64_t count; } grads[] = {
      {&call.grad_u, call.u, b * t * e}, {&call.grad_delta, call.delta, b * t * e},
      {&call.grad_B, call.B, b * t * n}, {&call.grad_C, call.C, b * t * n}, {&call.grad_z, call.z, b * t * e}};
  for (int i = 0; i < 5; i++)
    if (grads[i].like.data) {
      *grads[i].to = blank(grads[i].count, i == 2 || i == 3 ? n : e, grads[i].like.dtype);
      keep(&all, *grads[i].to, grads[i].count);
    }
  struct { float **to; const float *like; int64_t count; } floats[] = {
      {&call.grad_A, call.A, e * n}, {&call.grad_D, call.D, e},
      {&call.grad_bias, call.bias, e}, {&call.grad_initial, call.initial, b * e * n}};
  for (int i = 0; i < 4; i++)
    if (floats[i].like) {
      *floats[i].to = blank(floats[i].count, 0, KJ_FLOAT32).data;
      keep(&all, (kj_tensor){*floats[i].to, KJ_FLOAT32, 0}, floats[i].count);
    }
  if (kj_scan_backward(&call)) fail("kj_scan_backward", 1, 0);
  free(call.checkpoints);
  return all;
}

/* Draws a call of the scan; `documents`: with segments for certain. `free_scan` frees its arrays. */
static kj_scan draw_scan(int documents) {
  static const int lengths[] = {1, 2, 15, 16, 17, 33, 64, 100}, sizes[] = {1, 3, 4, 8, 16, 17, 64};
  int64_t b = 1 + random_number(3), t = lengths[random_number(8)], e = 1 + random_number(40), n = sizes[random_number(7)];
  int64_t wide = e + random_number(3), narrow = n + random_number(3); /* rows with padding after them */
  int dtype = random_number(3);
  kj_scan call = {.batch = b, .length = t, .channels = e, .states = n, .softplus = random_number(2)};
  float high = random_number(5) ? 0.5f : 20.0f;
  call.u = draw((b * t - 1) * wide + e, wide, dtype, -1, 1);
  call.delta = draw((b * t - 1) * wide + e, wide, dtype, call.softplus ? -high : 1e-6f, high);
  call.B = draw((b * t - 1) * narrow + n, narrow, dtype, -1, 1);
  call.C = draw((b * t - 1) * narrow + n, narrow, dtype, -1, 1);
  if (random_number(2)) call.z = draw((b * t - 1) * wide + e, wide, dtype, -2, 2);
  call.A = draw_floats(e * n, -16, -0.1f);
  if (random_number(2)) call.D = draw_floats(e, -1, 1);
  if (random_number(2)) call.bias = draw_floats(e, 0, 0.1f);
  if (random_number(2)) call.initial = draw_floats(b * e * n, -1, 1);
  if (random_number(3) == 0) call.mask = draw_mask(b * t);
  if (random_number(3) == 0 || documents) call.segments = draw_segments(b, t);
  call.grad_y = draw(b * t * e, e, dtype, -1, 1);
  if (random_number(2)) call.grad_last = draw_floats(b * e * n, -1, 1);
  call.threads = 1;
  call.parallel = random_number(2) ? team : NULL;
  call.isa = KJ_PLAIN;
  return call;
}

static void free_scan(kj_scan call) {
  free(call.u.data), free(call.delta.data), free(call.B.data), free(call.C.data), free(call.z.data);
  free((void *)call.A), free((void *)call.D), free((void *)call.bias), free((void *)call.initial);
  free((void *)call.mask), free((void *)call.segments), free(call.grad_y.data), free((void *)call.grad_last);
}

static void fuzz_scan(void) {
  kj_scan call = draw_scan(0);
  int backward = random_number(4) != 0;
  results right = run_scan(call, backward);
  double bound = call.u.dtype == KJ_FLOAT32 ? 2e-5 : call.u.dtype == KJ_FLOAT16 ? 2e-3 : 1.6e-2;
  for (call.isa = KJ_PLAIN; call.isa <= KJ_AVX512; call.isa++)
    for (call.threads = 1; call.threads < 5 && kj_isa_available(call.isa); call.threads += 3) {
      results found = run_scan(call, backward);
      compare_all("a scan on another instruction set", &found, &right, bound);
    }
  compare_all("a scan", &right, &right, bound);
  for (int i = 0; i < right.used; i++) free(right.x[i].data);
  free_scan(call);
}

static results run_conv(kj_conv call) {
  int64_t b = call.batch, t = call.length, e = call.channels, k = call.width;
  results all = {.used = 0};
  call.y = blank(b * t * e, e, call.x.dtype);
  call.grad_x = blank(b * t * e, e, call.x.dtype);
  call.grad_kernel = blank(k * e, 0, KJ_FLOAT32).data;
  keep(&all, call.y, b * t * e);
  keep(&all, call.grad_x, b * t * e);
  keep(&all, (kj_tensor){call.grad_kernel, KJ_FLOAT32, 0}, k * e);
  if (call.bias) {
    call.grad_bias = blank(e, 0, KJ_FLOAT32).data;
    keep(&all, (kj_tensor){call.grad_bias, KJ_FLOAT32, 0}, e);
  }
  if (call.initial.data) {
    call.grad_initial = blank(b * (k - 1) * e, e, call.x.dtype);
    keep(&all, call.grad_initial, b * (k - 1) * e);
  }
  if (kj_conv_forward(&call) || kj_conv_backward(&call)) fail("kj_conv", 1, 0);
  return all;
}

/* As `draw_scan`. */
static kj_conv draw_conv(int documents) {
  int64_t b = 1 + random_number(3), t = 1 + random_number(40), e = 1 + random_number(40);
  int64_t k = 1 + random_number(random_number(4) ? 6 : 24), wide = e + random_number(3);
  int dtype = random_number(3);
  kj_conv call = {.batch = b, .length = t, .channels = e, .width = k, .silu = random_number(2)};
  call.x = draw((b * t - 1) * wide + e, wide, dtype, -2, 2);
  call.kernel = draw_floats(k * e, -1, 1);
  if (random_number(2)) call.bias = draw_floats(e, -1, 1);
  if (random_number(2)) call.initial = draw(b * (k - 1) * e, e, dtype, -1, 1);
  if (random_number(3) == 0) call.mask = draw_mask(b * t);
  if (random_number(3) == 0 || documents) call.segments = draw_segments(b, t);
  call.grad_y = draw(b * t * e, e, dtype, -1, 1);
  call.threads = 1;
  call.parallel = random_number(2) ? team : NULL;
  call.isa = KJ_PLAIN;
  return call;
}

static void free_conv(kj_conv call) {
  free(call.x.data), free((void *)call.kernel), free((void *)call.bias), free(call.initial.data);
  free((void *)call.mask), free((void *)call.segments), free(call.grad_y.data);
}

static void fuzz_conv(void) {
  kj_conv call = draw_conv(0);
  results right = run_conv(call);
  double bound = call.x.dtype == KJ_FLOAT32 ? 1e-5 : call.x.dtype == KJ_FLOAT16 ? 2e-3 : 1.6e-2;
  for (call.isa = KJ_PLAIN; call.isa <= KJ_AVX512; call.isa++)
    for (call.threads = 1; call.threads < 5 && kj_isa_available(call.isa); call.threads += 3) {
      results found = run_conv(call);
      compare_all("a convolution on another instruction set", &found, &right, bound);
    }
  compare_all("a convolution", &right, &right, bound);
  for (int i = 0; i < right.used; i++) free(right.x[i].data);
  free_conv(call);
}

static void fuzz_experts(void) {
  int64_t s = 1 + random_number(16), d = 20 + random_number(60), f = 1 + random_number(random_number(3) ? 90 : 900);
  int64_t x = 1 + random_number(9), k = 1 + random_number(4);
  int dtype = random_number(3), weights = random_number(3);
  kj_experts call = {.tokens = s, .width = d, .hidden = f, .experts = x, .per_token = k};
  call.token = draw(s * d, d, dtype, -1, 1);
  call.up = draw(x * d * f, f, weights, -1, 1);
  call.down = draw(x * f * d, d, weights, -0.3f, 0.3f);
  if (random_number(2)) call.gate = draw(x * d * f, f, weights, -1, 1);
  call.weights = draw_floats(s * k, 0, 1);
  int32_t *indices = malloc(s * k * sizeof *indices);
  for (int64_t i = 0; i < s * k; i++) indices[i] = (int32_t)random_number(x + 2) - 1; /* some of no expert */
  call.indices = indices;
  kj_tensor right = blank(s * d, d, dtype);
  call.threads = 1;
  call.parallel = random_number(2) ? team : NULL;
  call.isa = KJ_PLAIN;
  call.y = right;
  if (kj_experts_forward(&call)) fail("kj_experts", 1, 0);
  /* the sigmoid's error of 4e-6, and cancellation in sums of up to 1000 terms: at most 1.1e-4 in 4,000 calls */
  double bound = dtype == KJ_FLOAT32 ? 2e-4 : dtype == KJ_FLOAT16 ? 2e-3 : 1.6e-2;
  for (call.isa = KJ_PLAIN; call.isa <= KJ_AVX512; call.isa++)
    for (call.threads = 1; call.threads < 5 && kj_isa_available(call.isa); call.threads += 3) {
      call.y = blank(s * d, d, dtype);
      if (kj_experts_forward(&call)) fail("kj_experts", 1, 0);
      compare("experts on another instruction set", call.y, right, s * d, bound);
      free(call.y.data);
    }
  free(call.token.data), free(call.up.data), free(call.down.data), free(call.gate.data);
  free((void *)call.weights), free(indices), free(right.data);
}

static const int32_t *draw_integers(int64_t count, unsigned below) { /* mostly zeros */
  int32_t *x = malloc(count * sizeof *x);
  for (int64_t i = 0; i < count; i++) x[i] = random_number(3) ? 0 : random_number(below);
  return x;
}

static void fuzz_attention(void) {
  int64_t b = 1 + random_number(3), t = 1 + random_number(4), s = 1 + random_number(random_number(4) ? 200 : 2000);
  int64_t g = 1 + random_number(3), h = g * (1 + random_number(3)), c = 1 + random_number(40), dtype = random_number(3);
  kj_attention call = {.batch = b, .queries = t, .keys = s, .heads = h, .groups = g, .width = c};
  call.causal = random_number(2), call.window = random_number(2) * random_number(100);
  call.query = draw(b * t * h * c, h * c, dtype, -2, 2), call.key = draw(b * s * g * c, g * c, dtype, -2, 2);
  call.value = draw(b * s * g * c, g * c, dtype, -2, 2);
  call.positions = draw_integers(b * t, s), call.documents = draw_integers(b * t, 2);
  call.key_positions = draw_integers(b * s, s), call.key_documents = draw_integers(b * s, 2);
  call.sinks = random_number(2) ? draw_integers(b * s, 2) : NULL;
  kj_tensor right = blank(b * t * h * c, h * c, dtype);
  call.threads = 1;
  call.parallel = random_number(2) ? team : NULL;
  call.isa = KJ_PLAIN;
  call.y = right;
  if (kj_attention_forward(&call)) fail("kj_attention", 1, 0);
  double bound = dtype == KJ_FLOAT32 ? 1e-5 : dtype == KJ_FLOAT16 ? 1e-3 : 8e-3;
  for (call.isa = KJ_PLAIN; call.isa <= KJ_AVX512; call.isa++)
    for (call.threads = 1; call.threads < 5 && kj_isa_available(call.isa); call.threads += 3) {
      call.y = blank(b * t * h * c, h * c, dtype);
      if (kj_attention_forward(&call)) fail("kj_attention", 1, 0);
      compare("attention on another instruction set", call.y, right, b * t * h * c, bound);
      free(call.y.data);
    }
  free(call.query.data), free(call.key.data), free(call.value.data), free(right.data);
  free((void *)call.positions), free((void *)call.documents), free((void *)call.key_positions);
  free((void *)call.key_documents), free((void *)call.sinks);
}

#include "check_isolation.h"

int main(int count, char **arguments) {
  int rounds = count > 1 ? atoi(arguments[1]) : 300;
  if (count > 2) seed ^= strtoull(arguments[2], NULL, 10) * 0x9e3779b97f4a7c15ULL;
  functions_plain();
#if HAVE_X86 && !defined(__clang__)
  if (kj_isa_available(KJ_AVX2)) functions_avx2();
  if (kj_isa_available(KJ_AVX512)) functions_avx512();
#endif
  check_halves();
  for (int i = 0; i < rounds; i++) {
    fuzz_scan(), fuzz_conv(), fuzz_experts(), fuzz_attention();
    isolate_scan(), isolate_conv();
  }
  if (2 * changed_documents < damaged_documents) fail("documents without a change by damage", changed_documents, 0);
  printf("%d damaged documents, of which %d changed, changed no other\n", damaged_documents, changed_documents);
  printf("%d random scans, convolutions, experts and attentions agree\n", rounds);
  return 0;
}
