/* The selective scan and the short convolution of Mamba on a CPU: C11, libm and POSIX threads.
 *
 * This file holds what all instruction sets share: the walk over rows and chunks, threads, sums over rows, and the
 * choice at run time.  vector.h, scan.h and convolution.h are included once for each set.  There is no global state:
 * every call starts its threads and frees its memory, so calls from several threads do not meet. */

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_X86 1
#include <immintrin.h>
#endif
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "keras_jamba.h"

#define CHUNK 16
#define GROUP 4         /* states that the backward pass takes through a chunk together: four, see vector.h */
#define FORWARD_GROUP 4 /* the same for the forward pass, no fewer */
#define WIDEST 16       /* lanes of the widest set, and a cache line of float32: channels go by so many */
#define LOG2E 1.44269504088896341f
#define LN2 0.693147180559945309f
#define INLINE static inline __attribute__((always_inline))

/* ---------------------------------------------------------------- numbers of 16 bits, one at a time */

static float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}

static float half_to_float(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13); /* infinity and NaN */
  float magnitude = bits_to_float(rest << 13) * 0x1p112f; /* exact, the subnormal ones too */
  return bits_to_float(sign | float_to_bits(magnitude));
}

static uint16_t float_to_half(float x) { /* to nearest, ties to even */
  uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds beyond 65504 */
  if (rest < 0x38800000) /* subnormal: the addition rounds at the right place */
    return (uint16_t)(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - float_to_bits(0.5f)));
  return (uint16_t)(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

static float number_at(kj_tensor x, int64_t at) {
  if (x.dtype == KJ_FLOAT32) return ((const float *)x.data)[at];
  uint16_t half = ((const uint16_t *)x.data)[at];
  return x.dtype == KJ_FLOAT16 ? half_to_float(half) : bits_to_float((uint32_t)half << 16);
}

static void put_number(kj_tensor y, int64_t at, float x) {
  if (y.dtype == KJ_FLOAT32) {
    ((float *)y.data)[at] = x;
  } else if (y.dtype == KJ_FLOAT16) {
    ((uint16_t *)y.data)[at] = float_to_half(x);
  } else {
    uint32_t bits = float_to_bits(x);
    uint32_t rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
    ((uint16_t *)y.data)[at] = (uint16_t)(rounded >> 16);
  }
}

static void put_zeros(kj_tensor y, int64_t token, int64_t first, int64_t count) {
  int64_t size = y.dtype == KJ_FLOAT32 ? 4 : 2;
  if (y.data) memset((char *)y.data + (token * y.row + first) * size, 0, count * size);
}

/* ---------------------------------------------------------------- the tokens of a row */

/* The real tokens of one row, and of them the chunk that is being worked on.  Tokens that the mask takes out are
 * nowhere in here: for the arithmetic they do not exist. */
typedef struct {
  int64_t begin, all;     /* where the row begins, how many real tokens it has */
  const int32_t *index;   /* their numbers in the row, or NULL: all of them */
  const int32_t *segments; /* of the row, or NULL */
  int64_t states;
  int count;              /* of the chunk */
  int64_t at[CHUNK];      /* begin + number */
  float *B, *C;           /* [token][n] */
  const float *keep;      /* 0 where a document begins, else 1; NULL where none does */
  float kept[CHUNK];
} kj_tokens;

INLINE int64_t kj_at(const kj_tokens *tokens, int64_t i) { return tokens->begin + (tokens->index ? tokens->index[i] : i); }

/* Whether real token i is of another document than the one before it. The first goes on with an initial state. */
INLINE int kj_begins(const kj_tokens *tokens, int64_t i) {
  if (!tokens->segments || i == 0) return 0;
  return tokens->segments[kj_at(tokens, i) - tokens->begin] != tokens->segments[kj_at(tokens, i - 1) - tokens->begin];
}

static kj_tokens begin_row(int64_t row, int64_t length, const uint8_t *mask, const int32_t *segments, int32_t *index) {
  kj_tokens tokens = {.begin = row * length, .all = length};
  if (segments) tokens.segments = segments + row * length;
  if (mask) {
    tokens.index = index;
    tokens.all = 0;
    for (int64_t t = 0; t < length; t++)
      if (mask[row * length + t]) index[tokens.all++] = (int32_t)t;
  }
  return tokens;
}

/* Chunk number `chunk` of the row, or 0 if there is none. */
static int kj_chunk(const kj_scan *call, kj_tokens *tokens, int64_t chunk) {
  int64_t first = chunk * CHUNK, n = call->states;
  if (first >= tokens->all) return 0;
  tokens->count = tokens->all - first < CHUNK ? (int)(tokens->all - first) : CHUNK;
  tokens->keep = NULL;
  for (int i = 0; i < tokens->count; i++) {
    tokens->at[i] = kj_at(tokens, first + i);
    tokens->kept[i] = kj_begins(tokens, first + i) ? 0.0f : 1.0f;
    if (tokens->kept[i] == 0) tokens->keep = tokens->kept;
    for (int64_t k = 0; k < n; k++) {
      tokens->B[i * n + k] = number_at(call->B, tokens->at[i] * call->B.row + k);
      tokens->C[i * n + k] = number_at(call->C, tokens->at[i] * call->C.row + k);
    }
  }
  return 1;
}

static int64_t padded(int64_t channels) { return (channels + WIDEST - 1) / WIDEST * WIDEST; }

static int64_t chunks_of(int64_t length) { return (length + CHUNK - 1) / CHUNK; }

int64_t kj_scan_checkpoints(int64_t batch, int64_t length, int64_t channels, int64_t states) {
  return batch * chunks_of(length) * padded(channels) * states;
}

static float *kj_checkpoint(const kj_scan *call, int64_t row, int64_t chunk, int64_t channel) {
  int64_t place = row * chunks_of(call->length) + chunk;
  return call->checkpoints + (place * padded(call->channels) + channel) * call->states;
}

/* ---------------------------------------------------------------- one piece of work */

/* One row and the strips of channels from `first` up to `last`, with the memory of the thread that does it. */
typedef struct {
  int64_t row, first, last;
  kj_tokens tokens;
  void *work;       /* a strip_work, or what a convolution needs */
  void *rates;      /* of all channels */
  void *state;      /* [vector][n][lane]: the states, or their gradient */
  void *replayed;   /* 2 [n][lane] */
  float *sums;      /* [token][group of states][WIDEST] */
  void *grad_rates; /* [vector][n + 2][lane]: gradients of A, D and the bias */
  float *partial_B, *partial_C;          /* (b, t, n), this share of the channels */
  float *rows_A, *rows_D, *rows_bias;    /* (b, e, n), (b, e), (b, e) */
  float *rows_kernel;                    /* (b, k, e) */
} kj_task;

/* ---------------------------------------------------------------- instruction sets */

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define V(name) JOIN(name, SET)

#define SET plain
#define LANES 4
#include "vector.h"
#include "scan.h"
#include "convolution.h"
#include "end.h"

#if HAVE_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define WITH_AVX2
#define SET avx2
#define LANES 8
#include "vector.h"
#include "scan.h"
#include "convolution.h"
#include "end.h"
#undef WITH_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#endif
#define WITH_AVX512
#define SET avx512
#define LANES 16
#include "vector.h"
#include "scan.h"
#include "convolution.h"
#include "end.h"
#undef WITH_AVX512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

typedef struct {
  int lanes;
  int64_t work_size;
  void (*rates)(const kj_scan *, void *);
  void (*scan_forward)(const kj_scan *, const kj_task *);
  void (*scan_backward)(const kj_scan *, const kj_task *);
  void (*conv)(const kj_conv *, const kj_task *, int backward);
} kj_set;

#define TABLE(set, lanes) \
  {lanes, sizeof(strip_work_##set), scan_rates_##set, scan_forward_##set, scan_backward_##set, conv_##set}
static const kj_set sets[] = {
    [KJ_PLAIN] = TABLE(plain, 4),
#if HAVE_X86
    [KJ_AVX2] = TABLE(avx2, 8),
    [KJ_AVX512] = TABLE(avx512, 16),
#endif
};

int kj_isa_available(int64_t isa) {
  if (isa == KJ_PLAIN) return 1;
#if HAVE_X86
  __builtin_cpu_init();
  int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == KJ_AVX2) return avx2;
  if (isa == KJ_AVX512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
  return 0;
}

static const kj_set *set_for(int64_t isa) {
  if (isa == KJ_FASTEST)
    for (isa = KJ_AVX512; !kj_isa_available(isa);) isa--;
  return kj_isa_available(isa) ? &sets[isa] : NULL;
}

/* ---------------------------------------------------------------- threads */

/* What the threads of one call share.  It outlives the call where a thread comes too late: the backend's own threads
 * may keep a core busy waiting for their next work, and a call does not wait for a thread that has not begun. */
typedef struct {
  const kj_set *set;
  const kj_scan *scan; /* one of the two */
  const kj_conv *conv;
  int backward;
  int64_t rows, shares, strips, length, tasks;
  int64_t bytes[5]; /* of a thread: work, state, replayed, sums, grad_rates */
  kj_task shared;   /* what all tasks have in common; partial_B and partial_C of the first share */
  atomic_llong next;
  atomic_int users, failed;
  pthread_mutex_t lock; /* of `done` */
  pthread_cond_t all_done;
  int64_t done;
} kj_job;

static void *align(void *p) { return (void *)(((uintptr_t)p + 63) & ~(uintptr_t)63); }

static int64_t rounded(int64_t bytes) { return (bytes + 127) / 64 * 64; }

/* Nothing comes of numbers below the normal ones, and they can cost a hundred times the others' time. */
static unsigned flush_subnormals(void) {
#if HAVE_X86
  unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  return before;
#else
  return 0;
#endif
}

static void restore(unsigned before) {
#if HAVE_X86
  _mm_setcsr(before);
#endif
}

static void clear_unreal(const kj_job *job, const kj_task *task) {
  const uint8_t *mask = job->scan ? job->scan->mask : job->conv->mask;
  int64_t e = job->scan ? job->scan->channels : job->conv->channels;
  int64_t first = task->first * WIDEST, last = task->last * WIDEST;
  if (last > e) last = e;
  if (!mask) return;
  for (int64_t t = 0; t < job->length; t++) {
    int64_t token = task->row * job->length + t;
    if (mask[token]) continue;
    if (job->conv) {
      put_zeros(job->backward ? job->conv->grad_x : job->conv->y, token, first, last - first);
    } else if (!job->backward) {
      put_zeros(job->scan->y, token, first, last - first);
    } else {
      put_zeros(job->scan->grad_u, token, first, last - first);
      put_zeros(job->scan->grad_delta, token, first, last - first);
      put_zeros(job->scan->grad_z, token, first, last - first);
      int64_t n = job->scan->states;
      memset(task->partial_B + token * n, 0, n * sizeof(float));
      memset(task->partial_C + token * n, 0, n * sizeof(float));
    }
  }
}

static void do_task(kj_job *job, kj_task task, int64_t number, char *memory, int32_t *index) {
  int64_t share = number % job->shares;
  task.row = number / job->shares;
  task.first = job->strips * share / job->shares;
  task.last = job->strips * (share + 1) / job->shares;
  void **places[] = {&task.work, &task.state, &task.replayed, (void **)&task.sums, &task.grad_rates};
  for (int i = 0; i < 5; i++) {
    *places[i] = memory;
    memory += job->bytes[i];
  }
  if (job->conv) {
    task.tokens = begin_row(task.row, job->length, job->conv->mask, job->conv->segments, index);
    clear_unreal(job, &task);
    job->set->conv(job->conv, &task, job->backward);
    return;
  }
  int64_t per_share = job->rows * job->length * job->scan->states;
  if (job->backward) {
    task.partial_B += share * per_share;
    task.partial_C += share * per_share;
  }
  task.tokens = begin_row(task.row, job->length, job->scan->mask, job->scan->segments, index);
  task.tokens.states = job->scan->states;
  task.tokens.B = (float *)memory;
  task.tokens.C = task.tokens.B + CHUNK * job->scan->states;
  clear_unreal(job, &task);
  (job->backward ? job->set->scan_backward : job->set->scan_forward)(job->scan, &task);
}

static void let_go(kj_job *job) {
  if (--job->users) return;
  pthread_mutex_destroy(&job->lock);
  pthread_cond_destroy(&job->all_done);
  free(job);
}

/* Does tasks until none is left.  Nothing but the job itself may be looked at before there is a task. */
static void work_through(kj_job *job) {
  int64_t number = job->next++, finished = 0, bytes = 64;
  if (number >= job->tasks) return;
  int64_t states = job->scan ? job->scan->states : 0;
  for (int i = 0; i < 5; i++) bytes += job->bytes[i];
  char *memory = malloc(bytes + 2 * CHUNK * states * sizeof(float));
  int32_t *index = malloc(job->length * sizeof(int32_t));
  int enough = memory && index;
  unsigned before = flush_subnormals();
  for (; number < job->tasks; number = job->next++, finished++) {
    if (enough) do_task(job, job->shared, number, align(memory), index);
    else job->failed = 1;
  }
  restore(before);
  free(memory);
  free(index);
  pthread_mutex_lock(&job->lock);
  job->done += finished;
  if (job->done == job->tasks) pthread_cond_signal(&job->all_done);
  pthread_mutex_unlock(&job->lock);
}

static void *helper(void *job) {
  work_through(job);
  let_go(job);
  return NULL;
}

/* Runs all tasks on up to `threads` threads, this one among them; one that cannot be started is done without. */
static int run(const kj_job *planned, int64_t threads) {
  kj_job *job = malloc(sizeof *job);
  pthread_attr_t detached;
  if (!job) return KJ_NO_MEMORY;
  memcpy(job, planned, sizeof *job);
  job->tasks = job->rows * job->shares;
  job->users = 1;
  pthread_mutex_init(&job->lock, NULL);
  pthread_cond_init(&job->all_done, NULL);
  if (threads > job->tasks) threads = job->tasks;
  pthread_attr_init(&detached);
  pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
  for (int64_t i = 1; i < threads; i++) {
    pthread_t started;
    job->users++;
    if (pthread_create(&started, &detached, helper, job)) {
      job->users--;
      break;
    }
  }
  pthread_attr_destroy(&detached);
  work_through(job);
  pthread_mutex_lock(&job->lock);
  while (job->done < job->tasks) pthread_cond_wait(&job->all_done, &job->lock);
  pthread_mutex_unlock(&job->lock);
  int failed = job->failed;
  let_go(job);
  return failed ? KJ_NO_MEMORY : KJ_OK;
}

/* As many threads as are worth their start: each has some 100 microseconds of work, at 0.4 nanoseconds a unit. */
static int64_t useful_threads(int64_t threads, int64_t units) {
  int64_t most = units / 250000 + 1;
  return threads < 1 ? 1 : threads < most ? threads : most;
}

/* Into how many shares the channels are cut so that the threads are busy to the end. */
static int64_t shares_for(int64_t threads, int64_t rows, int64_t strips) {
  if (threads == 1 || rows % threads == 0 || rows >= 8 * threads) return 1;
  int64_t shares = (4 * threads + rows - 1) / rows;
  if (rows < threads && threads % rows == 0) shares = threads / rows;
  return shares < strips ? shares : strips;
}

/* ---------------------------------------------------------------- the scan */

static kj_job scan_job(const kj_scan *call, const kj_set *set, int backward, int64_t *threads) {
  int64_t n = call->states, strip = WIDEST * sizeof(float), groups = (n + GROUP - 1) / GROUP;
  int64_t units = call->batch * call->length * call->channels * n;
  kj_job job = {.set = set, .scan = call, .backward = backward, .rows = call->batch, .length = call->length};
  *threads = useful_threads(call->threads, backward ? 3 * units : units);
  job.strips = padded(call->channels) / WIDEST;
  job.shares = shares_for(*threads, call->batch, job.strips);
  int64_t most = (job.strips + job.shares - 1) / job.shares;
  job.bytes[0] = rounded(set->work_size);
  job.bytes[1] = rounded(most * n * strip);
  job.bytes[2] = rounded(2 * n * strip);
  if (backward) {
    job.bytes[3] = rounded(CHUNK * groups * strip);
    job.bytes[4] = rounded(most * (n + 2) * strip);
  }
  return job;
}

/* Memory is the call's own; `floats` numbers after the rates of all channels, which are set. */
static float *with_rates(const kj_scan *call, kj_job *job, int64_t floats) {
  int64_t rates = padded(call->channels) * call->states;
  char *memory = malloc((rates + floats) * sizeof(float) + 64);
  if (!memory) return NULL;
  job->shared.rates = align(memory);
  job->set->rates(call, job->shared.rates);
  return (float *)memory;
}

int kj_scan_forward(const kj_scan *call) {
  const kj_set *set = set_for(call->isa);
  if (!set) return KJ_NO_SUCH_ISA;
  int64_t threads;
  kj_job job = scan_job(call, set, 0, &threads);
  float *memory = with_rates(call, &job, 0);
  if (!memory) return KJ_NO_MEMORY;
  int error = run(&job, threads);
  free(memory);
  return error;
}

/* sums[i] = the sum over `rows` of from[row][i], in the order of the rows. */
static void add_rows(float *sums, const float *from, int64_t rows, int64_t count) {
  if (!sums) return;
  memset(sums, 0, count * sizeof(float));
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < count; i++) sums[i] += from[row * count + i];
}

static void add_shares(kj_tensor to, const float *from, int64_t shares, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    float sum = from[i];
    for (int64_t share = 1; share < shares; share++) sum += from[share * count + i];
    put_number(to, i, sum);
  }
}

int kj_scan_backward(const kj_scan *call) {
  const kj_set *set = set_for(call->isa);
  if (!set) return KJ_NO_SUCH_ISA;
  int64_t threads, b = call->batch, e = call->channels, n = call->states, tokens = b * call->length * n;
  kj_job job = scan_job(call, set, 1, &threads);
  float *memory = with_rates(call, &job, b * e * (n + 2) + 2 * job.shares * tokens);
  if (!memory) return KJ_NO_MEMORY;
  float *rows_A = (float *)job.shared.rates + padded(e) * n;
  job.shared.rows_A = rows_A;
  job.shared.rows_D = rows_A + b * e * n;
  job.shared.rows_bias = job.shared.rows_D + b * e;
  job.shared.partial_B = job.shared.rows_bias + b * e;
  job.shared.partial_C = job.shared.partial_B + job.shares * tokens;
  int error = run(&job, threads);
  if (!error) {
    add_rows(call->grad_A, rows_A, b, e * n);
    add_rows(call->grad_D, job.shared.rows_D, b, e);
    add_rows(call->grad_bias, job.shared.rows_bias, b, e);
    add_shares(call->grad_B, job.shared.partial_B, job.shares, tokens);
    add_shares(call->grad_C, job.shared.partial_C, job.shares, tokens);
  }
  free(memory);
  return error;
}

/* ---------------------------------------------------------------- the convolution */

static kj_job conv_job(const kj_conv *call, const kj_set *set, int backward, int64_t *threads) {
  kj_job job = {.set = set, .conv = call, .backward = backward, .rows = call->batch, .length = call->length};
  *threads = useful_threads(call->threads, call->batch * call->length * call->channels * (backward ? 4 : 2));
  job.strips = padded(call->channels) / WIDEST;
  job.shares = shares_for(*threads, call->batch, job.strips);
  job.bytes[0] = rounded(4 * call->width * set->lanes * sizeof(float));
  return job;
}

int kj_conv_forward(const kj_conv *call) {
  const kj_set *set = set_for(call->isa);
  if (!set) return KJ_NO_SUCH_ISA;
  int64_t threads;
  kj_job job = conv_job(call, set, 0, &threads);
  return run(&job, threads);
}

int kj_conv_backward(const kj_conv *call) {
  const kj_set *set = set_for(call->isa);
  if (!set) return KJ_NO_SUCH_ISA;
  int64_t threads, b = call->batch, e = call->channels, k = call->width;
  kj_job job = conv_job(call, set, 1, &threads);
  float *memory = malloc(b * e * (k + 1) * sizeof(float) + 64);
  if (!memory) return KJ_NO_MEMORY;
  job.shared.rows_kernel = memory;
  job.shared.rows_bias = memory + b * k * e;
  int error = run(&job, threads);
  if (!error) {
    add_rows(call->grad_kernel, job.shared.rows_kernel, b, k * e);
    add_rows(call->grad_bias, job.shared.rows_bias, b, e);
  }
  free(memory);
  return error;
}

#include "xla_ffi.h"
