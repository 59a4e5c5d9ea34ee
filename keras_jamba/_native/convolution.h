/* The causal depthwise convolution and SiLU for one instruction set: one row and a range of its strips of channels, in
 * chunks of tokens as in the scan.  The `past` inputs that the windows reach back to precede the tokens of a chunk.  In
 * the backward pass, the gradients of the next `past` tokens follow the chunk's gradients. */

/* One chunk of one vector of channels. `w` and `bias`: of these channels; `x`: the inputs, the past first; `valid`:
 * from kj_valid, NULL if all are; `out`: the results. The second line is for the backward pass: `grad` is that of y,
 * and from token `count` on that of y before SiLU; `sums` are for the kernel, then for the bias. */
typedef struct {
  const vf *w, *x;
  vf bias, *out;
  vf *grad, *sums;
  const uint8_t *valid;
  int count, silu;
} V(window);

/* Computes y before SiLU, of SIDE tokens from number i on. */
INLINE void V(slide)(const V(window) *chunk, int width, const uint8_t *valid, int i, vf *y) {
  EACH y[k] = chunk->bias;
  for (int j = 0; j < width; j++)
    EACH if (!valid || valid[(i + k) * width + j]) y[k] += chunk->w[j] * chunk->x[i + k + j];
}

INLINE void V(conv_forward)(const V(window) *chunk, int width, const uint8_t *valid) {
  for (int i = 0; i < chunk->count; i += SIDE) {
    vf *y = chunk->out + i, gate[SIDE];
    V(slide)(chunk, width, valid, i, y);
    if (!chunk->silu) continue;
    V(sigmoid)(y, gate);
    EACH y[k] *= gate[k];
  }
}

INLINE void V(conv_backward)(const V(window) *chunk, int width, const uint8_t *valid) {
  vf *grad = chunk->grad;
  for (int i = 0; chunk->silu && i < chunk->count; i += SIDE) {
    vf y[SIDE], gate[SIDE];
    V(slide)(chunk, width, valid, i, y);
    V(sigmoid)(y, gate);
    EACH if (i + k < chunk->count) grad[i + k] *= gate[k] * (1.0f + y[k] * (1.0f - gate[k]));
  }
  for (int i = 0; i < chunk->count; i++) {
    vf total = {0};
    for (int j = 0; j < width; j++) {
      int reached = i + width - 1 - j; /* the token whose tap j is input i */
      if (!valid || valid[i * width + j]) chunk->sums[j] += grad[i] * chunk->x[i + j];
      if (!valid || valid[reached * width + j]) total += chunk->w[j] * grad[reached];
    }
    chunk->sums[width] += grad[i];
    chunk->out[i] = total;
  }
}

INLINE void V(conv_chunk)(const V(window) *chunk, int width, int backward) {
  if (chunk->valid) {
    if (backward) V(conv_backward)(chunk, width, chunk->valid);
    else V(conv_forward)(chunk, width, chunk->valid);
  } else if (width == 4) { /* the usual one, unrolled */
    if (backward) V(conv_backward)(chunk, 4, NULL);
    else V(conv_forward)(chunk, 4, NULL);
  } else {
    if (backward) V(conv_backward)(chunk, width, NULL);
    else V(conv_forward)(chunk, width, NULL);
  }
}

/* Input `number` of the row; those before the row have negative numbers. */
INLINE vf V(input)(const kj_conv *call, const kj_task *task, int64_t number, int64_t first) {
  int count = V(lanes)(call->channels, first);
  int64_t past = call->width - 1;
  if (number >= 0) return V(load)(call->x, kj_at(&task->tokens, number), first, count);
  return call->initial.data ? V(load)(call->initial, task->row * past + past + number, first, count) : (vf){0};
}

INLINE void V(load_kernel)(const kj_conv *call, int64_t first, vf *w) {
  for (int64_t j = 0; j < call->width; j++)
    w[j] = V(load_channels)(call->kernel + j * call->channels, first, V(lanes)(call->channels, first));
}

/* Computes the gradients of the inputs before the row from those of y before SiLU of the first tokens; and the sums. */
INLINE void V(end_row)(const kj_conv *call, const kj_task *task, int64_t first, vf *w, const uint8_t *valid,
                       const vf *grad, const vf *sums) {
  int64_t e = call->channels, width = call->width, past = width - 1;
  int count = V(lanes)(e, first);
  V(load_kernel)(call, first, w);
  for (int64_t i = 0; i < past && call->grad_initial.data; i++) {
    vf total = {0};
    for (int64_t j = 0; j <= i; j++)
      if (!valid || valid[(i - j) * width + j]) total += w[j] * grad[i - j];
    V(store)(call->grad_initial, task->row * past + i, first, count, total);
  }
  for (int64_t j = 0; j < width; j++)
    memcpy(task->rows_kernel + (task->row * width + j) * e + first, &sums[j], count * sizeof(float));
  memcpy(task->rows_bias + task->row * e + first, &sums[width], count * sizeof(float));
}

static void V(conv)(const kj_conv *call, const kj_task *task, int backward) {
  const int64_t e = call->channels, width = call->width, past = width - 1, step = past + CHUNK;
  const int64_t begin = task->first * WIDEST, end = task->last * WIDEST, vectors = (end - begin) / LANES;
  const int64_t all = task->tokens.all, chunks = chunks_of(all);
  vf *x = task->work, *grad = x + PARTS * step, *out = grad + PARTS * step, *w = out + PARTS * CHUNK;
  vf *followed = w + width, *sums = followed + vectors * past; /* of all vectors, from chunk to chunk */
  uint8_t *room = (uint8_t *)(sums + vectors * (width + 1));
  const uint8_t *valid = NULL;
  memset(followed, 0, vectors * (past + width + 1) * sizeof(vf));
  for (int64_t done = 0; done < chunks; done++) {
    int64_t start = (backward ? chunks - 1 - done : done) * CHUNK, at[CHUNK];
    int count = all - start < CHUNK ? (int)(all - start) : CHUNK;
    for (int i = 0; i < count; i++) at[i] = kj_at(&task->tokens, start + i);
    valid = kj_valid(&task->tokens, start, count + past, width, room);
    for (int64_t strip = begin; strip < end; strip += WIDEST) {
      V(read_strip)(e, call->x, at, count, strip, x + past, step);
      if (backward) V(read_strip)(e, call->grad_y, at, count, strip, grad, step);
      for (int p = 0; p < PARTS && strip + p * LANES < e; p++) {
        int64_t first = strip + p * LANES, number = (first - begin) / LANES;
        vf bias = V(load_channels)(call->bias, first, V(lanes)(e, first));
        V(window) chunk = {w, x + p * step, bias, out + p * CHUNK, grad + p * step, sums + number * (width + 1),
                           valid, count, (int)call->silu};
        V(load_kernel)(call, first, w);
        for (int64_t j = 0; j < past; j++) x[p * step + j] = V(input)(call, task, start - past + j, first);
        if (backward) memcpy(chunk.grad + count, followed + number * past, past * sizeof(vf));
        V(conv_chunk)(&chunk, (int)width, backward);
        if (backward) memcpy(followed + number * past, chunk.grad, past * sizeof(vf));
      }
      V(write_strip)(e, backward ? call->grad_x : call->y, at, count, strip, out, CHUNK);
    }
  }
  for (int64_t first = begin; backward && first < end && first < e; first += LANES) {
    int64_t number = (first - begin) / LANES;
    V(end_row)(call, task, first, w, valid, followed + number * past, sums + number * (width + 1));
  }
}
