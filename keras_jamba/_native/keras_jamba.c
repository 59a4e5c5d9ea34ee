/* The selective scan and the short convolution of Mamba, experts, and attention of a few queries, on a CPU: C11, libm
 * and POSIX threads.
 *
 * This file holds the choice of an instruction set at run time, and the kernels with their sums over rows.
 * numbers.h, tokens.h and threads.h are common to all sets; vector.h, strips.h, scan.h, scan_step.h, convolution.h,
 * experts.h and attention.h are included once per set; attention_call.h and xla_ffi.h use all of them.  There is no
 * global state and every call frees its memory, so calls from several threads are independent. */

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_X86 1
#include <immintrin.h>
#endif
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "keras_jamba.h"

#define CHUNK 16   /* tokens */
#define WIDEST 16  /* lanes of the widest set, and a cache line of float32: channels per strip */
#define SIDE 4     /* vectors that a function of vector.h works on side by side; CHUNK is a multiple */
#define GROUP SIDE /* states that run through a chunk together */
#define EACH for (int k = 0; k < SIDE; k++)
#define LOG2E 1.44269504088896341f
#define LN2 0.693147180559945309f
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

#include "numbers.h"
#include "tokens.h"

/* ---------------------------------------------------------------- one piece of work */

/* One row and the strips of channels from `first` up to `last`, with the memory of the thread that does it. */
typedef struct {
  int64_t row, first, last;
  kj_tokens tokens;
  void *work;       /* a strip_work, or what a convolution needs */
  void *rates;      /* of all channels */
  void *state;      /* [vector][n][lane]: the states, or their gradient */
  void *replayed;   /* 2 [n][lane] */
  void *sums;       /* [token][B and C][n][lane] */
  void *grad_rates; /* [vector][n + 2][lane]: gradients of A, D and the bias */
  float *partial_B, *partial_C;          /* (b, t, n), this share of the channels */
  float *rows_A, *rows_D, *rows_bias;    /* (b, e, n), (b, e), (b, e) */
  float *rows_kernel;                    /* (b, w, e) */
} kj_task;

/* The tokens that chose one expert: those of assignments order[first] to order[first + count - 1]. */
typedef struct {
  int64_t expert, first, count;
} kj_group;

/* Assignments of tokens to experts, sorted by expert, and their outputs, one part per split of the hidden channels:
 * partial[split][place in the order][step]. */
typedef struct {
  int64_t assignments, used, splits, most, step, hidden_step; /* most: of a group */
  kj_group *groups;
  int32_t *order;
  float *partial;
} kj_plan;

/* Parts of an attention, one per row and split of its keys: for each of `rows` queries and heads its weighted sum of
 * values, `wide` floats, then their greatest scores, then the sums of their weights. */
typedef struct {
  int64_t splits, rows, wide, step;
  float *parts;
} kj_spread;

#define KEYS 64 /* per block: SIDE vectors of the widest set */

/* Returns the floats that a task needs: queries, weights of a block, and what is visible. */
static int64_t attention_floats(const kj_spread *spread, int64_t queries) {
  return spread->rows * (spread->wide + KEYS) + (queries + 1) * KEYS;
}

/* ---------------------------------------------------------------- instruction sets */

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define V(name) JOIN(name, SET)

#define SET plain
#define LANES 4
#include "vector.h"
#include "strips.h"
#include "scan.h"
#include "scan_step.h"
#include "convolution.h"
#include "experts.h"
#include "attention.h"
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
#include "strips.h"
#include "scan.h"
#include "scan_step.h"
#include "convolution.h"
#include "experts.h"
#include "attention.h"
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
#include "strips.h"
#include "scan.h"
#include "scan_step.h"
#include "convolution.h"
#include "experts.h"
#include "attention.h"
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
  void (*scan_step)(const kj_scan *, const kj_task *);
  void (*scan_backward)(const kj_scan *, const kj_task *);
  void (*conv)(const kj_conv *, const kj_task *, int backward);
  void (*experts)(const kj_experts *, const kj_plan *, int64_t, float *);
  void (*attention)(const kj_attention *, const kj_spread *, int64_t, float *);
} kj_set;

#define TABLE(set, lanes) \
  {lanes, sizeof(strip_work_##set), scan_rates_##set, scan_forward_##set, scan_step_##set, scan_backward_##set, \
   conv_##set, experts_##set, attention_##set}
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

void kj_layout(int64_t *numbers) {
  numbers[0] = sizeof(kj_scan), numbers[1] = sizeof(kj_conv), numbers[2] = sizeof(kj_experts);
  numbers[3] = sizeof(kj_attention), numbers[4] = CHUNK, numbers[5] = WIDEST;
}

static const kj_set *set_for(int64_t isa) {
  if (isa == KJ_FASTEST)
    for (isa = KJ_AVX512; !kj_isa_available(isa);) isa--;
  return kj_isa_available(isa) ? &sets[isa] : NULL;
}

#include "threads.h"

/* ---------------------------------------------------------------- the scan */

static kj_job scan_job(const kj_scan *call, const kj_set *set, int backward, int64_t *threads) {
  int64_t n = call->states, strip = WIDEST * sizeof(float);
  int64_t units = call->batch * call->length * call->channels * n;
  kj_job job = {.set = set, .scan = call, .backward = backward, .rows = call->batch, .length = call->length};
  *threads = useful_threads(call->threads, backward ? 3 * units : units, call->parallel);
  job.strips = padded(call->channels) / WIDEST;
  job.shares = shares_for(*threads, call->batch, job.strips);
  int64_t most = (job.strips + job.shares - 1) / job.shares;
  job.bytes[0] = rounded(set->work_size);
  job.bytes[1] = rounded(most * n * strip);
  job.bytes[2] = rounded(2 * n * strip);
  if (backward) {
    job.bytes[3] = rounded(2 * CHUNK * n * set->lanes * sizeof(float));
    job.bytes[4] = rounded(most * (n + 2) * strip);
  }
  return job;
}

/* Allocates the memory of a call: the rates of all channels, which it sets, then `floats` numbers. */
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
  job.step = call->length == 1 && !call->checkpoints;
  if (job.step) return run(&job, threads, call->parallel, call->pool);
  float *memory = with_rates(call, &job, 0);
  if (!memory) return KJ_NO_MEMORY;
  int error = run(&job, threads, call->parallel, call->pool);
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
  int error = run(&job, threads, call->parallel, call->pool);
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
  int64_t units = call->batch * call->length * call->channels;
  *threads = useful_threads(call->threads, units * (backward ? 4 : 2), call->parallel);
  job.strips = padded(call->channels) / WIDEST;
  job.shares = shares_for(*threads, call->batch, job.strips);
  int64_t most = (job.strips + job.shares - 1) / job.shares, step = call->width - 1 + CHUNK;
  int64_t floats = WIDEST * (2 * step + CHUNK + 2 * most * call->width) + (set->lanes + step) * call->width;
  job.bytes[0] = rounded(floats * sizeof(float));
  return job;
}

int kj_conv_forward(const kj_conv *call) {
  const kj_set *set = set_for(call->isa);
  if (!set) return KJ_NO_SUCH_ISA;
  int64_t threads;
  kj_job job = conv_job(call, set, 0, &threads);
  return run(&job, threads, call->parallel, call->pool);
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
  int error = run(&job, threads, call->parallel, call->pool);
  if (!error) {
    add_rows(call->grad_kernel, job.shared.rows_kernel, b, k * e);
    add_rows(call->grad_bias, job.shared.rows_bias, b, e);
  }
  free(memory);
  return error;
}

/* ---------------------------------------------------------------- experts */

/* Sorts the assignments by expert; those without an expert join no group. */
static void sort_assignments(const kj_experts *call, kj_plan *plan) {
  int64_t all = call->tokens * call->per_token, done = 0;
  for (int64_t expert = 0; expert < call->experts; expert++) {
    kj_group *group = &plan->groups[plan->used];
    *group = (kj_group){expert, done, 0};
    for (int32_t i = 0; i < all; i++)
      if (call->indices[i] == expert) plan->order[done++] = i;
    group->count = done - group->first;
    if (group->count > plan->most) plan->most = group->count;
    if (group->count) plan->used++;
  }
  plan->assignments = done;
}

/* y = the weighted sums of the parts, in the order of experts and splits. */
static int add_parts(const kj_experts *call, const kj_plan *plan) {
  int64_t d = call->width;
  float *sums = calloc(call->tokens * d, sizeof(float));
  if (!sums) return KJ_NO_MEMORY;
  for (int64_t i = 0; i < plan->assignments; i++) {
    float weight = call->weights[plan->order[i]], *sum = sums + plan->order[i] / call->per_token * d;
    for (int64_t split = 0; split < plan->splits; split++) {
      const float *part = plan->partial + (split * plan->assignments + i) * plan->step;
      for (int64_t c = 0; c < d; c++) sum[c] += weight * part[c];
    }
  }
  for (int64_t token = 0; token < call->tokens; token++)
    for (int64_t c = 0; c < d; c++) put_number(call->y, token * call->y.row + c, sums[token * d + c]);
  free(sums);
  return KJ_OK;
}

/* Enough tasks to keep all threads busy to the end, each of at least four strips. */
static kj_job experts_job(const kj_experts *call, const kj_set *set, kj_plan *plan, int64_t *threads) {
  int64_t matrices = call->gate.data ? 3 : 2, weights = plan->used * matrices * call->width * call->hidden;
  *threads = useful_threads(call->threads, weights / 2 * (1 + plan->most / 4), call->parallel);
  int64_t strips = padded(call->hidden) / WIDEST;
  plan->splits = plan->used ? (2 * *threads + plan->used - 1) / plan->used : 1;
  if (plan->splits > (strips + 3) / 4) plan->splits = (strips + 3) / 4;
  if (*threads == 1) plan->splits = 1;
  plan->step = padded(call->width);
  int64_t lanes = SIDE * WIDEST, widest = (strips + plan->splits - 1) / plan->splits * WIDEST;
  plan->hidden_step = (widest + lanes - 1) / lanes * lanes;
  kj_job job = {.set = set, .experts = call, .plan = plan, .rows = plan->used * plan->splits, .length = 1, .shares = 1};
  job.bytes[0] = rounded(plan->most * (call->width + 2 * plan->hidden_step) * sizeof(float));
  return job;
}

int kj_experts_forward(const kj_experts *call) {
  const kj_set *set = set_for(call->isa);
  if (!set) return KJ_NO_SUCH_ISA;
  kj_plan plan = {0};
  int64_t threads;
  int error = KJ_NO_MEMORY;
  plan.groups = malloc((call->experts + 1) * sizeof(kj_group));
  plan.order = malloc((call->tokens * call->per_token + 1) * sizeof(int32_t));
  if (plan.groups && plan.order) {
    sort_assignments(call, &plan);
    kj_job job = experts_job(call, set, &plan, &threads);
    plan.partial = malloc((plan.splits * plan.assignments * plan.step + 1) * sizeof(float));
    if (plan.partial) error = run(&job, threads, call->parallel, call->pool);
    if (!error) error = add_parts(call, &plan);
  }
  free(plan.groups), free(plan.order), free(plan.partial);
  return error;
}

#include "attention_call.h"
#include "xla_ffi.h"
