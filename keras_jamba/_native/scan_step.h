/* The selective scan of a single token for one instruction set, for decoding: from one state to the next.
 *
 * Lanes are states, which are contiguous in memory, so nothing is transposed. */

/* h = exp(delta A) h + drive B for SIDE channels from `first` on, and the sums of C h. */
INLINE void V(step_states)(const kj_scan *call, const kj_tokens *tokens, int64_t row, int64_t first, int64_t end,
                           const float *delta, const float *drive, float *sums) {
  const int64_t states = call->states, e = call->channels;
  vf total[SIDE] = {{0}};
  for (int64_t n = 0; n < states; n += LANES) {
    int count[SIDE];
    vf x[SIDE], h[SIDE];
    vf B = V(load_channels)(tokens->B, n, V(lanes)(states, n)), C = V(load_channels)(tokens->C, n, V(lanes)(states, n));
    EACH {
      int64_t at = (first + k) * states + n;
      count[k] = first + k < end ? V(lanes)(states, n) : 0;
      x[k] = V(load_channels)(call->A, at, count[k]) * (delta[k] * LOG2E);
      h[k] = V(load_channels)(call->initial, row * e * states + at, count[k]);
    }
    V(exp2)(x);
    EACH {
      h[k] = x[k] * h[k] + drive[k] * B;
      total[k] += h[k] * C;
      kj_tensor last = {call->last, KJ_FLOAT32, 0};
      if (call->last) V(store)(last, 0, (row * e + first + k) * states + n, count[k], h[k]);
    }
  }
  V(sums)(total, SIDE, sums);
}

static void V(scan_step)(const kj_scan *call, const kj_task *task) {
  const int64_t e = call->channels, row = task->row, begin = task->first * WIDEST;
  const int64_t end = task->last * WIDEST < e ? task->last * WIDEST : e, states = call->states;
  kj_tokens tokens = task->tokens;
  if (!kj_chunk(call, &tokens, 0)) { /* padding */
    for (int64_t i = (row * e + begin) * states; call->last && i < (row * e + end) * states; i++)
      call->last[i] = call->initial ? call->initial[i] : 0.0f;
    return;
  }
  for (int64_t first = begin; first < end; first += SIDE * LANES) {
    vf u[SIDE], delta[SIDE], drive[SIDE], y[SIDE], z[SIDE], gate[SIDE];
    int count[SIDE];
    EACH count[k] = V(lanes)(end, first + k * LANES);
    EACH u[k] = V(load)(call->u, row, first + k * LANES, count[k]);
    EACH delta[k] = V(load)(call->delta, row, first + k * LANES, count[k]);
    EACH delta[k] += V(load_channels)(call->bias, first + k * LANES, count[k]);
    if (call->softplus) V(softplus)(delta, NULL);
    EACH drive[k] = delta[k] * u[k];
    for (int64_t i = 0; i < SIDE * LANES && first + i < end; i += SIDE)
      V(step_states)(call, &tokens, row, first + i, end, (float *)delta + i, (float *)drive + i, (float *)y + i);
    EACH y[k] += V(load_channels)(call->D, first + k * LANES, count[k]) * u[k];
    if (call->z.data) {
      EACH z[k] = V(load)(call->z, row, first + k * LANES, count[k]);
      V(sigmoid)(z, gate);
      EACH y[k] *= z[k] * gate[k];
    }
    EACH V(store)(call->y, row, first + k * LANES, count[k], y[k]);
  }
}
