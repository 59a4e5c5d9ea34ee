/* The selective scan for one instruction set: forward and backward of one row and a range of its strips of channels.
 *
 * It processes the row in chunks of CHUNK tokens, and each chunk in strips, see strips.h.  The forward pass stores the
 * state before each chunk.  The backward pass visits the chunks from last to first and recomputes their states, so no
 * array of size tokens x channels x state exists.  Inside a chunk, GROUP states at a time run over all tokens: they
 * stay in registers, and the chunk's data in the first-level cache. */

/* One chunk of one vector of channels: inputs, then results; the last line is for the backward pass. `z` becomes the
 * gate's slope and then z's gradient; `slope` is that of the softplus. */
typedef struct {
  vf u[CHUNK], delta[CHUNK], z[CHUNK];
  vf drive[CHUNK], y[CHUNK];
  vf grad_y[CHUNK], slope[CHUNK], grad_drive[CHUNK], grad_delta[CHUNK];
} V(part);

/* ... and of a strip, with the states of the GROUP that is being worked on. */
typedef struct {
  V(part) parts[PARTS];
  vf states[CHUNK][GROUP], decays[CHUNK][GROUP];
} V(strip_work);

#define part_t V(part)
#define STEP (sizeof(part_t) / sizeof(vf))
#define strip_t V(strip_work)

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

/* Computes delta after bias and softplus, and delta u, of one chunk. */
static NOINLINE void V(prepare)(const kj_scan *call, const kj_tokens *tokens, int64_t first, int backward,
                                part_t *part) {
  vf bias = V(load_channels)(call->bias, first, V(lanes)(call->channels, first));
  for (int i = 0; i < tokens->count; i += SIDE) {
    vf *delta = part->delta + i;
    EACH delta[k] += bias;
    if (call->softplus) V(softplus)(delta, backward ? part->slope + i : NULL);
    EACH part->drive[i + k] = delta[k] * part->u[i + k];
    EACH part->y[i + k] = (vf){0};
  }
}

/* exp(delta A) of GROUP states from number `n` on, or of one, at the tokens of a chunk. `tame`: from find_tame. */
static NOINLINE void V(decays)(int size, const uint8_t *tame, int64_t n, const kj_tokens *tokens, const vf *rates,
                               const part_t *part, strip_t *work) {
  for (int i = 0; i < tokens->count; i++)
    if (size == GROUP && tame[i]) {
      V(exp2_products)(part->delta[i], rates + n, work->decays[i]);
    } else {
      vf x[SIDE] = {{0}};
      for (int k = 0; k < size; k++) x[k] = part->delta[i] * rates[n + k];
      V(exp2)(x);
      EACH work->decays[i][k] = x[k];
    }
}

/* `size` states from number `n` on, over the tokens of a chunk: adds C h to y, and moves the state on. `all`: leaves
 * every token's state in `work`. */
INLINE void V(forward_states)(int size, int all, int64_t n, const kj_tokens *tokens, vf *state, part_t *part,
                              strip_t *work) {
  const float *B = tokens->B + n, *C = tokens->C + n;
  const int64_t states = tokens->states;
  vf h[GROUP];
  for (int k = 0; k < size; k++) h[k] = state[n + k];
  for (int s = 0; s < tokens->spans; s++) {
    for (int k = 0; k < size && kj_clears(tokens, s); k++) h[k] = (vf){0};
    for (int i = tokens->span[s]; i < tokens->span[s + 1]; i++, B += states, C += states) {
      vf drive = part->drive[i], y = part->y[i];
#pragma GCC unroll 8
      for (int k = 0; k < size; k++) {
        h[k] = work->decays[i][k] * h[k] + drive * B[k];
        y += h[k] * C[k];
        if (all) work->states[i][k] = h[k];
      }
      part->y[i] = y;
    }
  }
  for (int k = 0; k < size; k++) state[n + k] = h[k];
}

INLINE int V(are_tame)(vf exponents) {
  vi good = exponents <= 126.0f;
  int all = -1;
  for (int i = 0; i < LANES; i++) all &= good[i];
  return all != 0;
}

/* For each token of the chunk, whether all its |delta A|, in powers of two, are at most 126. The answer for a token does
 * not depend on others: NaN in a document must not change the rounding in another. */
static NOINLINE void V(find_tame)(const kj_tokens *tokens, const vf *rates, const part_t *part, uint8_t *tame) {
  vf delta = {0}, A = {0};
  for (int i = 0; i < tokens->count; i++) delta = V(larger)(delta, V(abs)(part->delta[i]));
  for (int64_t n = 0; n < tokens->states; n++) A = V(larger)(A, V(abs)(rates[n]));
  int all = V(are_tame)(delta * A);
  for (int i = 0; i < tokens->count; i++) tame[i] = all || V(are_tame)(V(abs)(part->delta[i]) * A);
}

INLINE void V(forward_part)(const kj_scan *call, const kj_tokens *tokens, int64_t first, const vf *rates, vf *state,
                            part_t *part, strip_t *work) {
  int64_t n = 0;
  V(prepare)(call, tokens, first, 0, part);
  uint8_t tame[CHUNK];
  V(find_tame)(tokens, rates, part, tame);
  for (; n + GROUP <= call->states; n += GROUP) {
    V(decays)(GROUP, tame, n, tokens, rates, part, work);
    V(forward_states)(GROUP, 0, n, tokens, state, part, work);
  }
  for (; n < call->states; n++) {
    V(decays)(1, tame, n, tokens, rates, part, work);
    V(forward_states)(1, 0, n, tokens, state, part, work);
  }
  vf D = V(load_channels)(call->D, first, V(lanes)(call->channels, first));
  for (int i = 0; i < tokens->count; i += SIDE) {
    vf gate[SIDE];
    EACH part->y[i + k] += D * part->u[i + k];
    if (!call->z.data) continue;
    V(sigmoid)(part->z + i, gate);
    EACH part->y[i + k] *= part->z[i + k] * gate[k];
  }
}

static void V(scan_forward)(const kj_scan *call, const kj_task *task) {
  strip_t *work = task->work;
  part_t *parts = work->parts;
  int64_t states = call->states, e = call->channels, row = task->row;
  int64_t begin = task->first * WIDEST, end = task->last * WIDEST;
  kj_tokens tokens = task->tokens;
  vf *state = task->state;
  for (int64_t first = begin; first < end && first < e; first += LANES) {
    const float *initial = call->initial ? call->initial + (row * e + first) * states : NULL;
    V(gather_states)(initial, states, V(lanes)(call->channels, first), state + (first - begin) / LANES * states);
  }
  for (int64_t chunk = 0; kj_chunk(call, &tokens, chunk); chunk++)
    for (int64_t strip = begin; strip < end; strip += WIDEST) {
      V(read_strip)(e, call->u, tokens.at, tokens.count, strip, parts->u, STEP);
      V(read_strip)(e, call->delta, tokens.at, tokens.count, strip, parts->delta, STEP);
      V(read_strip)(e, call->z, tokens.at, tokens.count, strip, parts->z, STEP);
      for (int p = 0; p < PARTS && strip + p * LANES < e; p++) {
        int64_t first = strip + p * LANES;
        vf *now = state + (first - begin) / LANES * states;
        for (int64_t n = 0; call->checkpoints && n < states; n++)
          *(vfu *)(kj_checkpoint(call, row, chunk, strip) + n * WIDEST + p * LANES) = now[n];
        V(forward_part)(call, &tokens, first, (const vf *)task->rates + first / LANES * states, now, parts + p, work);
      }
      V(write_strip)(e, call->y, tokens.at, tokens.count, strip, parts->y, STEP);
    }
  if (!call->last) return;
  for (int64_t first = begin; first < end && first < e; first += LANES)
    V(scatter_states)(call->last + (row * e + first) * states, states, V(lanes)(call->channels, first),
                      state + (first - begin) / LANES * states);
}

/* The gradient of `size` states from number `n` on, over the tokens of a chunk, last to first. `grad` is that of the
 * state, `grad_rates` that of A; `sums` collects those of B and C, [token][B and C][n], a sum for each lane. */
INLINE void V(backward_states)(int size, int64_t n, const kj_tokens *tokens, const vf *rates, const vf *before,
                               vf *grad, vf *grad_rates, vf *sums, part_t *part, const strip_t *work) {
  const int64_t states = tokens->states;
  const vf zeros[GROUP] = {{0}};
  vf g[GROUP], r[GROUP];
  for (int k = 0; k < size; k++) g[k] = grad[n + k], r[k] = (vf){0};
  for (int s = tokens->spans - 1; s >= 0; s--) {
    const vf *first_past = kj_clears(tokens, s) ? zeros : before + n;
    for (int i = tokens->span[s + 1] - 1; i >= tokens->span[s]; i--) {
      const float *B = tokens->B + i * states + n, *C = tokens->C + i * states + n;
      const vf *past = i > tokens->span[s] ? work->states[i - 1] : first_past;
      vf *of_B = sums + 2 * i * states + n, *of_C = of_B + states;
      vf delta = part->delta[i], drive = part->drive[i], grad_y = part->grad_y[i];
      vf grad_drive = part->grad_drive[i], grad_delta = part->grad_delta[i];
#pragma GCC unroll 8
      for (int k = 0; k < size; k++) {
        of_C[k] += work->states[i][k] * grad_y;
        g[k] += grad_y * C[k];
        of_B[k] += g[k] * drive;
        grad_drive += g[k] * B[k];
        g[k] *= work->decays[i][k];
        vf exponent = g[k] * past[k];
        grad_delta += exponent * rates[n + k];
        r[k] += exponent * delta;
      }
      part->grad_drive[i] = grad_drive;
      part->grad_delta[i] = grad_delta;
    }
    for (int k = 0; k < size && kj_clears(tokens, s); k++) g[k] = (vf){0};
  }
  for (int k = 0; k < size; k++) grad[n + k] = g[k], grad_rates[n + k] += r[k];
}

/* Computes y's gradient before the gate, the input of the states' backward pass. */
INLINE void V(begin_backward)(const kj_scan *call, const kj_tokens *tokens, part_t *part) {
  for (int i = 0; i < tokens->count; i += SIDE) {
    if (call->z.data) {
      vf *z = part->z + i, *out = part->grad_y + i, gate[SIDE];
      V(sigmoid)(z, gate);
      EACH {
        vf given = out[k];
        out[k] = given * z[k] * gate[k];
        z[k] = given * gate[k] * (1.0f + z[k] * (1.0f - gate[k]));
      }
    }
    EACH part->grad_drive[i + k] = part->grad_delta[i + k] = (vf){0};
  }
}

/* The gradients of the gate, the skip and softplus, after those of the states. */
INLINE void V(finish_backward)(const kj_scan *call, const kj_tokens *tokens, int64_t first, vf *grad_D, vf *grad_bias,
                               part_t *part) {
  vf D = V(load_channels)(call->D, first, V(lanes)(call->channels, first));
  for (int i = 0; i < tokens->count; i++) {
    vf u = part->u[i], grad_y = part->grad_y[i], grad_drive = part->grad_drive[i];
    vf grad_delta = part->grad_delta[i] * LN2 + grad_drive * u;
    if (call->softplus) grad_delta *= part->slope[i];
    part->z[i] *= part->y[i] + D * u;
    part->u[i] = grad_drive * part->delta[i] + grad_y * D;
    part->delta[i] = grad_delta;
    *grad_D += grad_y * u;
    *grad_bias += grad_delta;
  }
}

/* One chunk of one vector of channels; `grad` is the gradient of its state, `grad_rates` [n + 2][lane] those of A, D
 * and the bias. */
INLINE void V(backward_part)(const kj_scan *call, const kj_task *task, const kj_tokens *tokens, int64_t chunk,
                             int64_t first, vf *grad, vf *grad_rates, part_t *part) {
  strip_t *work = task->work;
  int64_t states = call->states, n = 0;
  const vf *rates = (const vf *)task->rates + first / LANES * states;
  vf *state = task->replayed, *before = state + states;
  const float *kept = kj_checkpoint(call, task->row, chunk, first / WIDEST * WIDEST) + first % WIDEST;
  for (int64_t i = 0; i < states; i++) state[i] = before[i] = *(const vfu *)(kept + i * WIDEST);
  V(prepare)(call, tokens, first, 1, part);
  V(begin_backward)(call, tokens, part);
  uint8_t tame[CHUNK];
  V(find_tame)(tokens, rates, part, tame);
  for (; n + GROUP <= states; n += GROUP) {
    V(decays)(GROUP, tame, n, tokens, rates, part, work);
    V(forward_states)(GROUP, 1, n, tokens, state, part, work);
    V(backward_states)(GROUP, n, tokens, rates, before, grad, grad_rates, task->sums, part, work);
  }
  for (; n < states; n++) {
    V(decays)(1, tame, n, tokens, rates, part, work);
    V(forward_states)(1, 1, n, tokens, state, part, work);
    V(backward_states)(1, n, tokens, rates, before, grad, grad_rates, task->sums, part, work);
  }
  V(finish_backward)(call, tokens, first, grad_rates + states, grad_rates + states + 1, part);
}

/* The gradients of B and C of one chunk, from the sums over this task's channels. */
INLINE void V(put_sums)(const kj_scan *call, const kj_task *task, const kj_tokens *tokens) {
  const vf *sum = task->sums;
  for (int i = 0; i < tokens->count; i++) {
    V(sums)(sum, call->states, task->partial_B + tokens->at[i] * call->states);
    V(sums)(sum + call->states, call->states, task->partial_C + tokens->at[i] * call->states);
    sum += 2 * call->states;
  }
}

static void V(scan_backward)(const kj_scan *call, const kj_task *task) {
  int64_t states = call->states, e = call->channels, row = task->row;
  int64_t begin = task->first * WIDEST, end = task->last * WIDEST;
  kj_tokens tokens = task->tokens;
  vf *grad = task->state, *grad_rates = task->grad_rates;
  part_t *parts = ((strip_t *)task->work)->parts;
  memset(grad_rates, 0, (end - begin) / LANES * (states + 2) * sizeof(vf));
  for (int64_t first = begin; first < end && first < e; first += LANES) {
    const float *last = call->grad_last ? call->grad_last + (row * e + first) * states : NULL;
    V(gather_states)(last, states, V(lanes)(call->channels, first), grad + (first - begin) / LANES * states);
  }
  for (int64_t chunk = chunks_of(tokens.all) - 1; chunk >= 0; chunk--) {
    kj_chunk(call, &tokens, chunk);
    memset(task->sums, 0, 2 * CHUNK * states * sizeof(vf));
    for (int64_t strip = begin; strip < end; strip += WIDEST) {
      V(read_strip)(e, call->u, tokens.at, tokens.count, strip, parts->u, STEP);
      V(read_strip)(e, call->delta, tokens.at, tokens.count, strip, parts->delta, STEP);
      V(read_strip)(e, call->z, tokens.at, tokens.count, strip, parts->z, STEP);
      V(read_strip)(e, call->grad_y, tokens.at, tokens.count, strip, parts->grad_y, STEP);
      for (int p = 0; p < PARTS && strip + p * LANES < e; p++) {
        int64_t number = (strip - begin) / LANES + p;
        V(backward_part)(call, task, &tokens, chunk, strip + p * LANES, grad + number * states,
                         grad_rates + number * (states + 2), parts + p);
      }
      V(write_strip)(e, call->grad_u, tokens.at, tokens.count, strip, parts->u, STEP);
      V(write_strip)(e, call->grad_delta, tokens.at, tokens.count, strip, parts->delta, STEP);
      V(write_strip)(e, call->grad_z, tokens.at, tokens.count, strip, parts->z, STEP);
    }
    V(put_sums)(call, task, &tokens);
  }
  for (int64_t first = begin; first < end && first < e; first += LANES) {
    int64_t part = (first - begin) / LANES, channel = row * e + first;
    int count = V(lanes)(call->channels, first);
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
    V(gather_states)(call->A + first * call->states, call->states, V(lanes)(call->channels, first), to);
    for (int64_t n = 0; n < call->states; n++) to[n] *= LOG2E;
  }
}

#undef part_t
#undef STEP
#undef strip_t
