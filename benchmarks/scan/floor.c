/* What this machine can do at most: exponentials and bytes a second on so many threads, printed as JSON.
 *
 *   cc -O3 -std=c11 -ffp-contract=fast floor.c -o floor -lm -pthread && ./floor 2
 *
 * Exponentials are those of the library's own function on registers, in the fastest instruction set there is; bytes
 * are read and written by memcpy between arrays far larger than the caches.  The best of several tries. */

#define _POSIX_C_SOURCE 200809L
#include "../../keras_jamba/_native/keras_jamba.c"

#include <stdio.h>
#include <time.h>

#define TRIES 7
#define REPEATS 200000
#define BYTES ((size_t)1 << 27)

#define RATE(set, lanes)                                                       \
  static double exponentials_##set(void) {                                     \
    f_##set x = splat_##set(-0.01f), y[SIDE], to[SIDE];                        \
    EACH y[k] = splat_##set(0.5f + k);                                         \
    for (int i = 0; i < REPEATS; i++) {                                 \
      exp2_products_##set(x, y, to);                                           \
      __asm__ volatile("" : "+m"(to), "+m"(y));                                \
    }                                                                          \
    return (double)REPEATS * SIDE * lanes;                                       \
  }

RATE(plain, 4)
#if HAVE_X86 && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
RATE(avx2, 8)
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
RATE(avx512, 16)
#pragma GCC pop_options
#endif

static double exponentials(void *memory) {
  (void)memory;
#if HAVE_X86 && !defined(__clang__)
  if (kj_isa_available(KJ_AVX512)) return exponentials_avx512();
  if (kj_isa_available(KJ_AVX2)) return exponentials_avx2();
#endif
  return exponentials_plain();
}

static double bytes(void *memory) {
  memcpy(memory, (char *)memory + BYTES, BYTES);
  __asm__ volatile("" : : "r"(memory) : "memory");
  return 2.0 * BYTES;
}

typedef struct {
  double (*work)(void *);
  void *memory;
  double done;
} worker;

static void *work(void *given) {
  worker *w = given;
  w->done = w->work(w->memory);
  return NULL;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static double rate(double (*what)(void *), void **memory, int threads) {
  double best = 0;
  for (int attempt = 0; attempt < TRIES; attempt++) {
    worker workers[64];
    pthread_t started[64];
    double begun = now(), done = 0;
    for (int i = 0; i < threads; i++) {
      workers[i] = (worker){what, memory[i], 0};
      if (pthread_create(&started[i], NULL, work, &workers[i])) exit(1);
    }
    for (int i = 0; i < threads; i++) pthread_join(started[i], NULL), done += workers[i].done;
    double found = done / (now() - begun);
    best = found > best ? found : best;
  }
  return best;
}

int main(int count, char **arguments) {
  int threads = count > 1 ? atoi(arguments[1]) : 1;
  void *memory[64];
  threads = threads < 1 ? 1 : threads > 64 ? 64 : threads;
  for (int i = 0; i < threads; i++) {
    memory[i] = malloc(2 * BYTES);
    if (!memory[i]) return 1;
    memset(memory[i], 1, 2 * BYTES);
  }
  printf("{\"exponentials\": %.4g, \"bytes\": %.4g}\n", rate(exponentials, memory, threads), rate(bytes, memory, threads));
  return 0;
}
