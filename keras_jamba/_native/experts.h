/* Perceptrons of a few tokens for one instruction set.  Reading the weights from memory takes most of the time, so each
 * is read once.
 *
 * A task is one expert and a range of its hidden channels, with all tokens that chose it. */

#define ROWS 8 /* rows of weights in registers, one vector each */

/* A row is about one page of memory, and hardware prefetching stops at page boundaries. */
INLINE void V(prefetch_next)(kj_tensor w, int64_t row, int64_t first) {
  __builtin_prefetch((const char *)w.data + (row * w.row + first) * (w.dtype == KJ_FLOAT32 ? 4 : 2), 0, 3);
}

/* acc[m][c] += the sum over `rows` of x[m][i] w[i][c], for the rows of w from `top` on and `columns` of its columns
 * from `left` on. `acc` is padded to a complete vector. */
INLINE void V(add_rows)(kj_tensor w, int64_t top, int rows, int64_t left, int64_t columns, const float *x,
                        int64_t x_step, int64_t count, float *acc, int64_t step) {
  for (int64_t c = 0; c < columns; c += LANES) {
    vf row[ROWS];
    for (int i = 0; i < rows; i++) row[i] = V(load)(w, top + i, left + c, V(lanes)(columns, c));
    for (int i = 0; i < rows && rows > 1; i++) V(prefetch_next)(w, top + rows + i, left + c);
    for (int64_t m = 0; m < count; m++) {
      vf even = *(vfu *)(acc + m * step + c), odd = {0};
      for (int i = 0; i < rows; i += 2) even += x[m * x_step + i] * row[i];
      for (int i = 1; i < rows; i += 2) odd += x[m * x_step + i] * row[i];
      *(vfu *)(acc + m * step + c) = even + odd;
    }
  }
}

INLINE void V(add_matrix)(kj_tensor w, int64_t top, int64_t rows, int64_t left, int64_t columns, const float *x,
                          int64_t x_step, int64_t count, float *acc, int64_t step) {
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS) V(add_rows)(w, top + i, ROWS, left, columns, x + i, x_step, count, acc, step);
  for (; i < rows; i++) V(add_rows)(w, top + i, 1, left, columns, x + i, x_step, count, acc, step);
}

/* The same, compiled for each dtype, and for the one token of a single row. */
static NOINLINE void V(add_product)(kj_tensor w, int64_t top, int64_t rows, int64_t left, int64_t columns,
                                    const float *x, int64_t x_step, int64_t count, float *acc, int64_t step) {
#define WITH(type)                                                                                           \
  if (w.dtype == type) {                                                                                      \
    w.dtype = type; /* a constant from here on, as `1` is */                                                  \
    if (count == 1) V(add_matrix)(w, top, rows, left, columns, x, x_step, 1, acc, step);                      \
    else V(add_matrix)(w, top, rows, left, columns, x, x_step, count, acc, step);                             \
  }
  WITH(KJ_FLOAT32)
  WITH(KJ_BFLOAT16)
  WITH(KJ_FLOAT16)
#undef WITH
}

/* hidden = silu(gate) * hidden, or gelu(hidden) where there is no gate. */
INLINE void V(activate)(float *hidden, const float *gate, int64_t count) {
  if (!gate) {
    for (int64_t i = 0; i < count; i++) hidden[i] *= 0.5f * (1.0f + erff(hidden[i] * 0.707106781186547524f));
    return;
  }
  for (int64_t i = 0; i < count; i += SIDE * LANES) {
    vf g[SIDE], open[SIDE];
    EACH g[k] = *(const vfu *)(gate + i + k * LANES);
    V(sigmoid)(g, open);
    EACH *(vfu *)(hidden + i + k * LANES) *= g[k] * open[k];
  }
}

static void V(experts)(const kj_experts *call, const kj_plan *plan, int64_t number, float *memory) {
  const kj_group *group = &plan->groups[number / plan->splits];
  const int64_t split = number % plan->splits, strips = padded(call->hidden) / WIDEST, d = call->width;
  const int64_t first = strips * split / plan->splits * WIDEST, after = strips * (split + 1) / plan->splits * WIDEST;
  const int64_t columns = (after < call->hidden ? after : call->hidden) - first, step = plan->hidden_step;
  float *x = memory, *hidden = x + plan->most * d, *gate = call->gate.data ? hidden + plan->most * step : NULL;
  float *y = plan->partial + (split * plan->assignments + group->first) * plan->step;
  memset(hidden, 0, (gate ? 2 : 1) * plan->most * step * sizeof(float));
  memset(y, 0, group->count * plan->step * sizeof(float));
  for (int64_t m = 0; m < group->count; m++) {
    int64_t token = plan->order[group->first + m] / call->per_token;
    for (int64_t i = 0; i < d; i++) x[m * d + i] = number_at(call->token, token * call->token.row + i);
  }
  V(add_product)(call->up, group->expert * d, d, first, columns, x, d, group->count, hidden, step);
  if (gate) V(add_product)(call->gate, group->expert * d, d, first, columns, x, d, group->count, gate, step);
  V(activate)(hidden, gate, group->count * step);
  int64_t top = group->expert * call->hidden + first;
  V(add_product)(call->down, top, columns, 0, d, hidden, step, group->count, y, plan->step);
}
#undef ROWS
