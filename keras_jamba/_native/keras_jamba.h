/* What keras_jamba/_native/__init__.py calls.  Its ctypes structures mirror these field by field. */
#ifndef KERAS_JAMBA_H
#define KERAS_JAMBA_H

#include <stdint.h>

enum { KJ_FLOAT32, KJ_BFLOAT16, KJ_FLOAT16 };
enum { KJ_FASTEST, KJ_PLAIN, KJ_AVX2, KJ_AVX512 }; /* instruction sets */
enum { KJ_OK, KJ_NO_MEMORY, KJ_NO_SUCH_ISA };

/* A tensor of one of the three dtypes; NULL data for None. `row` is the stride between two tokens in elements: a slice
 * of a wider matrix's columns is a tensor too. */
typedef struct {
  void *data;
  int64_t dtype, row;
} kj_tensor;

/* Calls its first argument with its second on the given number of threads, and returns when all have finished: OpenMP's
 * GOMP_parallel. */
typedef void (*kj_parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

/* The caller's thread pool, which runs work when a thread is free: `start` returns 0 if it accepted the work. */
typedef struct {
  int (*start)(const void *context, void (*work)(void *), void *data);
  const void *context;
} kj_pool;

/* The selective scan, as keras_jamba.ops.selective_scan defines it: b rows, t tokens, e channels, n states.
 * Pointers to float are float32.  `checkpoints` holds kj_scan_checkpoints(...) floats; NULL if no gradient is
 * requested.  A gradient has the dtype of its tensor. */
typedef struct {
  int64_t batch, length, channels, states, softplus, threads, isa;
  kj_tensor u, delta, B, C, z;            /* (b, t, e), (b, t, e), (b, t, n), (b, t, n), (b, t, e) or NULL */
  const float *A, *D, *bias, *initial;    /* (e, n), (e,) or NULL, (e,) or NULL, (b, e, n) or NULL */
  const uint8_t *mask;                    /* (b, t) or NULL */
  const int32_t *segments;                /* (b, t) or NULL */
  kj_tensor y;                            /* (b, t, e): written by forward */
  float *last, *checkpoints;              /* (b, e, n) or NULL; written by forward, checkpoints read by backward */
  kj_tensor grad_y;                       /* read by backward from here on */
  const float *grad_last;                 /* (b, e, n) or NULL */
  kj_tensor grad_u, grad_delta, grad_B, grad_C, grad_z; /* written by backward; grad_z NULL with z */
  float *grad_A, *grad_D, *grad_bias, *grad_initial;    /* NULL if not requested */
  kj_parallel parallel; /* the caller's threads in one of two forms, or NULL: the call starts its own */
  const kj_pool *pool;
} kj_scan;

/* The causal depthwise convolution over w tokens, followed by SiLU if `silu` is set. */
typedef struct {
  int64_t batch, length, channels, width, silu, threads, isa;
  kj_tensor x, initial;            /* (b, t, e), (b, w - 1, e) or NULL */
  const float *kernel, *bias;      /* (w, e), (e,) or NULL */
  const uint8_t *mask;             /* (b, t) or NULL */
  const int32_t *segments;         /* (b, t) or NULL */
  kj_tensor y;                     /* (b, t, e): written by forward */
  kj_tensor grad_y;                /* read by backward from here on */
  kj_tensor grad_x, grad_initial;  /* written by backward; grad_initial NULL with initial */
  float *grad_kernel, *grad_bias;  /* (w, e), (e,) or NULL */
  kj_parallel parallel;            /* as above */
  const kj_pool *pool;
} kj_conv;

/* The weighted sum of the k of x perceptrons in `indices`, for each of a few tokens: down(silu(gate(token)) *
 * up(token)), or down(gelu(up(token))) without a gate. */
typedef struct {
  int64_t tokens, width, hidden, experts, per_token, threads, isa;
  kj_tensor token, up, down, gate; /* (s, 1, d), (x, d, f), (x, f, d), (x, d, f) or NULL */
  const float *weights;            /* (s, k) */
  const int32_t *indices;          /* (s, k); an index out of range adds nothing */
  kj_tensor y;                     /* (s, 1, d) */
  kj_parallel parallel;            /* as above */
  const kj_pool *pool;
} kj_experts;

/* Attention of a few queries to many keys.  A query sees the keys of its document; with `causal` none at a later
 * position; and with a `window` above 0 those at a distance below it, and sinks.  One that sees none gives zeros.
 * Tensors are contiguous: strides are not read. */
typedef struct {
  int64_t batch, queries, keys, heads, groups, width, causal, window, threads, isa;
  kj_tensor query, key, value;                  /* (b, t, h, c), (b, s, g, c), (b, s, g, c) */
  const int32_t *positions, *documents;         /* (b, t) */
  const int32_t *key_positions, *key_documents; /* (b, s) */
  const int32_t *sinks;                         /* (b, s) or NULL; above 0 for sinks */
  kj_tensor y;                                  /* (b, t, h, c) */
  kj_parallel parallel;                         /* as above */
  const kj_pool *pool;
} kj_attention;

int64_t kj_scan_checkpoints(int64_t batch, int64_t length, int64_t channels, int64_t states);
int kj_scan_forward(const kj_scan *call);
int kj_scan_backward(const kj_scan *call);
int kj_conv_forward(const kj_conv *call);
int kj_conv_backward(const kj_conv *call);
int kj_experts_forward(const kj_experts *call);
int kj_attention_forward(const kj_attention *call);
int kj_isa_available(int64_t isa);
/* Six: the sizes of kj_scan, kj_conv, kj_experts and kj_attention in bytes, the tokens of a chunk, the channels of a
 * strip. */
void kj_layout(int64_t *numbers);

#endif
