/* The selective scan for one instruction set: forward and backward of one row and a range of its strips of channels.
 *
 * A strip is WIDEST channels, a cache line of float32, in PARTS vectors; a chunk is CHUNK tokens.  The forward pass
 * leaves the state before each chunk; the backward pass goes through the chunks from the last to the first and
 * computes each one's states again from there, so nothing of tokens x channels x state is ever kept.  Inside a chunk
 * some states at a time run over all tokens: they stay in registers, and what belongs to the chunk in the first-level
 * cache. */

#define PARTS (WIDEST / LANES)

/* One chunk of one vector of channels; `raw` is delta before the softplus, the second line for the backward pass. */
typedef struct {
  vf delta[CHUNK], drive[CHUNK], u[CHUNK], raw[CHUNK], y[CHUNK];
  vf z[CHUNK], grad_y[CHUNK], grad_drive[CHUNK], grad_delta[CHUNK];
} V(part);

/* ... and of a strip, with the states of the GROUP that is being worked on. */
typedef struct {
  V(part) parts[PARTS];
  vf states[CHUNK][GROUP], decays[CHUNK][GROUP];
} V(strip_work);

#define part_t V(part)
#define strip_t V(strip_work)

/* How many of the channels from `first` on there are, up to a whole vector. */
INLINE int V(lanes)(const kj_scan *call, int64_t first) {
  int64_t rest = call->channels - first;
  return rest < 0 ? 0 : rest < LANES ? (int)rest : LANES;
}

/* Between (e, n) in memory and [n][lane]. */
INLINE void V(gather_states)(const float *from, int64_t states, int count, vf *to) {
  for (int64_t n = 0; n < states; n++) {
    vf x = {0};
    if (from)
      for (int i = 0; i < count; i++) x[i] = from[i * states + n];
    to[n] = x;
  }
}

INLINE void V(scatter_states)(float *to, int64_t states, int count, const vf *from) {
  for (int64_t n = 0; n < states; n++)
    for (int i = 0; i < count; i++) to[i * states + n] = from[n][i];
}

/* delta after bias and softplus, and delta u, of one chunk. */
INLINE void V(prepare)(const kj_scan *call, const kj_tokens *tokens, int64_t first, int count, part_t *part) {
  vf bias = V(load_channels)(call->bias, first, count);
  for (int i = 0; i < tokens->count; i++) {
    int64_t at = tokens->at[i];
    vf raw = V(load)(call->delta, at, first, count) + bias;
    vf delta = call->softplus ? V(softplus)(raw) : raw;
    part->raw[i] = raw;
    part->u[i] = V(load)(call->u, at, first, count);
    part->delta[i] = delta;
    part->drive[i] = delta * part->u[i];
    part->y[i] = (vf){0};
  }
}

/* Asks for the next strip. Down a column of a matrix no processor sees by itself what comes next. */
INLINE void V(prefetch_strip)(const kj_scan *call, const kj_tokens *tokens, int64_t first, int backward) {
  for (int i = 0; i < tokens->count; i++) {
    V(prefetch)(call->delta, tokens->at[i], first + WIDEST);
    V(prefetch)(call->u, tokens->at[i], first + WIDEST);
    V(prefetch)(call->z, tokens->at[i], first + WIDEST);
    if (backward) V(prefetch)(call->grad_y, tokens->at[i], first + WIDEST);
  }
}

/* `size` states from number `n` on, over the tokens of a chunk: adds C h to y, and moves the state on. `work`: keeps
 * states and decays there, or NULL. `tame`: no decay of the chunk is below 2**-126 or above 2**126. */
INLINE void V(forward_states)(int size, int tame, int64_t n, const kj_tokens *tokens, const vf *rates, vf *state,
                              part_t *part, strip_t *work) {
  const float *B = tokens->B + n, *C = tokens->C + n, *keep = tokens->keep;
  const int64_t states = tokens->states;
  const int count = tokens->count;
  vf h[FORWARD_GROUP], A[FORWARD_GROUP];
  for (int k = 0; k < size; k++) h[k] = state[n + k], A[k] = rates[n + k];
  for (int i = 0; i < count; i++, B += states, C += states) {
    vf delta = part->delta[i], drive = part->drive[i], y = part->y[i];
#pragma GCC unroll 8
    for (int k = 0; k < size; k++) {
      vf decay = tame ? V(exp2_product)(delta, A[k]) : V(exp2)(delta * A[k]);
      if (keep) decay *= keep[i];
      h[k] = decay * h[k] + drive * B[k];
      y += h[k] * C[k];
      if (work) {
        work->decays[i][k] = decay;
        work->states[i][k] = h[k];
      }
    }
    part->y[i] = y;
  }
  for (int k = 0; k < size; k++) state[n + k] = h[k];
}

/* Whether all |delta A| of the chunk, in powers of two, are at most 126. */
INLINE int V(is_tame)(const kj_tokens *tokens, const vf *rates, const part_t *part) {
  vf delta = {0}, A = {0};
  for (int i = 0; i < tokens->count; i++) delta = V(larger)(delta, V(abs)(part->delta[i]));
  for (int64_t n = 0; n < tokens->states; n++) A = V(larger)(A, V(abs)(rates[n]));
  vi good = delta * A <= 126.0f;
  int all = -1;
  for (int i = 0; i < LANES; i++) all &= good[i];
  return all;
}

INLINE void V(forward_part)(const kj_scan *call, const kj_tokens *tokens, int64_t first, const vf *rates, vf *state,
                            part_t *part) {
  int count = V(lanes)(call, first);
  int64_t n = 0;
  V(prepare)(call, tokens, first, count, part);
  int tame = V(is_tame)(tokens, rates, part);
  for (; tame && n + FORWARD_GROUP <= call->states; n += FORWARD_GROUP)
    V(forward_states)(FORWARD_GROUP, 1, n, tokens, rates, state, part, NULL);
  for (; n < call->states; n++) V(forward_states)(1, 0, n, tokens, rates, state, part, NULL);
  vf D = V(load_channels)(call->D, first, count);
  for (int i = 0; i < tokens->count; i++) {
    vf y = part->y[i] + D * part->u[i];
    if (call->z.data) {
      vf z = V(load)(call->z, tokens->at[i], first, count);
      y *= z * V(sigmoid)(z);
    }
    V(store)(call->y, tokens->at[i], first, count, y);
  }
}

static void V(scan_forward)(const kj_scan *call, const kj_task *task) {
  strip_t *work = task->work;
  int64_t states = call->states, e = call->channels, row = task->row;
  int64_t begin = task->first * WIDEST, end = task->last * WIDEST;
  kj_tokens tokens = task->tokens;
  vf *state = task->state;
  for (int64_t first = begin; first < end && first < e; first += LANES) {
    const float *initial = call->initial ? call->initial + (row * e + first) * states : NULL;
    V(gather_states)(initial, states, V(lanes)(call, first), state + (first - begin) / LANES * states);
  }
  for (int64_t chunk = 0; kj_chunk(call, &tokens, chunk); chunk++)
    for (int64_t first = begin; first < end && first < e; first += LANES) {
      vf *now = state + (first - begin) / LANES * states;
      if (first % WIDEST == 0) V(prefetch_strip)(call, &tokens, first, 0);
      if (call->checkpoints) memcpy(kj_checkpoint(call, row, chunk, first), now, states * sizeof(vf));
      V(forward_part)(call, &tokens, first, (const vf *)task->rates + first / LANES * states, now, work->parts);
    }
  if (!call->last) return;
  for (int64_t first = begin; first < end && first < e; first += LANES)
    V(scatter_states)(call->last + (row * e + first) * states, states, V(lanes)(call, first),
                      state + (first - begin) / LANES * states);
}

/* The gradient of `size` states from number `n` on, over the tokens of a chunk, last to first. `grad` is that of the
 * state, `grad_rates` that of A; `sums` collects those of B and C over channels, see V(add_sums). */
INLINE void V(backward_states)(int size, int64_t n, const kj_tokens *tokens, const vf *rates, const vf *before,
                               vf *grad, vf *grad_rates, float *sums, part_t *part, strip_t *work) {
  const int64_t states = tokens->states, groups = (states + GROUP - 1) / GROUP;
  vf g[GROUP], r[GROUP], A[GROUP];
  for (int k = 0; k < size; k++) g[k] = grad[n + k], r[k] = (vf){0}, A[k] = rates[n + k];
  for (int i = tokens->count - 1; i >= 0; i--) {
    const float *B = tokens->B + i * states + n, *C = tokens->C + i * states + n;
    const vf *past = i ? work->states[i - 1] : before + n;
    vf delta = part->delta[i], drive = part->drive[i], grad_y = part->grad_y[i];
    vf grad_drive = part->grad_drive[i], grad_delta = part->grad_delta[i];
    vf of_B[GROUP], of_C[GROUP];
#pragma GCC unroll 8
    for (int k = 0; k < size; k++) {
      of_C[k] = work->states[i][k] * grad_y;
      g[k] += grad_y * C[k];
      of_B[k] = g[k] * drive;
      grad_drive += g[k] * B[k];
      g[k] *= work->decays[i][k];
      vf exponent = g[k] * past[k];
      grad_delta += exponent * A[k];
      r[k] += exponent * delta;
    }
    part->grad_drive[i] = grad_drive;
    part->grad_delta[i] = grad_delta;
    float *sum = sums + (i * groups + n / GROUP) * WIDEST;
    if (size == GROUP) {
      V(add_sums)(sum, V(quads)(V(pairs)(of_B[0], of_B[1]), V(pairs)(of_B[2], of_B[3])),
                  V(quads)(V(pairs)(of_C[0], of_C[1]), V(pairs)(of_C[2], of_C[3])));
    } else {
      sum[n % GROUP] += V(sum)(of_B[0]);
      sum[HALF + n % GROUP] += V(sum)(of_C[0]);
    }
  }
  for (int k = 0; k < size; k++) grad[n + k] = g[k], grad_rates[n + k] += r[k];
}

/* y's gradient before the gate, where the backward pass of the states begins. */
INLINE void V(begin_backward)(const kj_scan *call, const kj_tokens *tokens, int64_t first, int count, part_t *part) {
  for (int i = 0; i < tokens->count; i++) {
    part->grad_y[i] = V(load)(call->grad_y, tokens->at[i], first, count);
    if (call->z.data) {
      vf z = V(load)(call->z, tokens->at[i], first, count);
      part->z[i] = z;
      part->grad_y[i] *= z * V(sigmoid)(z);
    }
    part->grad_drive[i] = part->grad_delta[i] = (vf){0};
  }
}

/* What is left of a chunk after the states: the gate, the skip, softplus, and writing it all. */
INLINE void V(finish_backward)(const kj_scan *call, const kj_tokens *tokens, int64_t first, int count, vf *grad_D,
                               vf *grad_bias, part_t *part) {
  vf D = V(load_channels)(call->D, first, count);
  for (int i = 0; i < tokens->count; i++) {
    int64_t at = tokens->at[i];
    vf u = part->u[i], delta = part->delta[i], grad_y = part->grad_y[i];
    if (call->z.data) {
      vf z = part->z[i], s = V(sigmoid)(z);
      vf out = V(load)(call->grad_y, at, first, count);
      V(store)(call->grad_z, at, first, count, out * (part->y[i] + D * u) * s * (1.0f + z * (1.0f - s)));
    }
    *grad_D += grad_y * u;
    V(store)(call->grad_u, at, first, count, part->grad_drive[i] * delta + grad_y * D);
    vf grad_delta = part->grad_delta[i] * LN2 + part->grad_drive[i] * u;
    if (call->softplus) grad_delta *= V(sigmoid)(part->raw[i]);
    *grad_bias += grad_delta;
    V(store)(call->grad_delta, at, first, count, grad_delta);
  }
}

/* One chunk of one vector of channels; `grad` is the gradient of its state, `grad_rates` [n + 2][lane] those of A, D
 * and the bias. */
INLINE void V(backward_part)(const kj_scan *call, const kj_task *task, const kj_tokens *tokens, int64_t chunk,
                             int64_t first, vf *grad, vf *grad_rates) {
  strip_t *work = task->work;
  part_t *part = work->parts;
  int64_t states = call->states, n = 0;
  int count = V(lanes)(call, first);
  const vf *rates = (const vf *)task->rates + first / LANES * states;
  vf *state = task->replayed, *before = state + states;
  memcpy(before, kj_checkpoint(call, task->row, chunk, first), states * sizeof(vf));
  memcpy(state, before, states * sizeof(vf));
  V(prepare)(call, tokens, first, count, part);
  V(begin_backward)(call, tokens, first, count, part);
  int tame = V(is_tame)(tokens, rates, part);
  for (; n + GROUP <= states; n += GROUP) {
    if (tame) V(forward_states)(GROUP, 1, n, tokens, rates, state, part, work);
    else V(forward_states)(GROUP, 0, n, tokens, rates, state, part, work);
    V(backward_states)(GROUP, n, tokens, rates, before, grad, grad_rates, task->sums, part, work);
  }
  for (; n < states; n++) {
    V(forward_states)(1, 0, n, tokens, rates, state, part, work);
    V(backward_states)(1, n, tokens, rates, before, grad, grad_rates, task->sums, part, work);
  }
  V(finish_backward)(call, tokens, first, count, grad_rates + states, grad_rates + states + 1, part);
}

/* The gradients of B and C of one chunk, from the sums over this task's channels. */
INLINE void V(put_sums)(const kj_scan *call, const kj_task *task, const kj_tokens *tokens) {
  int64_t states = call->states, groups = (states + GROUP - 1) / GROUP;
  for (int i = 0; i < tokens->count; i++)
    for (int64_t n = 0; n < states; n++) {
      const float *sum = task->sums + (i * groups + n / GROUP) * WIDEST + n % GROUP;
      float of_B = 0, of_C = 0;
      for (int k = 0; k < HALF; k += 4) of_B += sum[k], of_C += sum[HALF + k];
      task->partial_B[tokens->at[i] * states + n] = of_B;
      task->partial_C[tokens->at[i] * states + n] = of_C;
    }
}

static void V(scan_backward)(const kj_scan *call, const kj_task *task) {
  int64_t states = call->states, e = call->channels, row = task->row;
  int64_t begin = task->first * WIDEST, end = task->last * WIDEST, groups = (states + GROUP - 1) / GROUP;
  kj_tokens tokens = task->tokens;
  vf *grad = task->state, *grad_rates = task->grad_rates;
  memset(grad_rates, 0, (end - begin) / LANES * (states + 2) * sizeof(vf));
  for (int64_t first = begin; first < end && first < e; first += LANES) {
    const float *last = call->grad_last ? call->grad_last + (row * e + first) * states : NULL;
    V(gather_states)(last, states, V(lanes)(call, first), grad + (first - begin) / LANES * states);
  }
  for (int64_t chunk = chunks_of(tokens.all) - 1; chunk >= 0; chunk--) {
    kj_chunk(call, &tokens, chunk);
    memset(task->sums, 0, CHUNK * groups * WIDEST * sizeof(float));
    for (int64_t first = begin; first < end && first < e; first += LANES) {
      int64_t part = (first - begin) / LANES;
      if (first % WIDEST == 0) V(prefetch_strip)(call, &tokens, first, 1);
      V(backward_part)(call, task, &tokens, chunk, first, grad + part * states, grad_rates + part * (states + 2));
    }
    V(put_sums)(call, task, &tokens);
  }
  for (int64_t first = begin; first < end && first < e; first += LANES) {
    int64_t part = (first - begin) / LANES, channel = row * e + first;
    int count = V(lanes)(call, first);
    const vf *found = grad_rates + part * (states + 2);
    if (call->grad_initial)
      V(scatter_states)(call->grad_initial + channel * states, states, count, grad + part * states);
    V(scatter_states)(task->rows_A + channel * states, states, count, found);
    memcpy(task->rows_D + channel, found + states, count * sizeof(float));
    memcpy(task->rows_bias + channel, found + states + 1, count * sizeof(float));
  }
}

/* A, transposed and times log2(e): [vector of channels][n][lane]. */
static void V(scan_rates)(const kj_scan *call, void *rates) {
  for (int64_t first = 0; first < call->channels; first += LANES) {
    vf *to = (vf *)rates + first / LANES * call->states;
    V(gather_states)(call->A + first * call->states, call->states, V(lanes)(call, first), to);
    for (int64_t n = 0; n < call->states; n++) to[n] *= LOG2E;
  }
}

#undef part_t
#undef strip_t
