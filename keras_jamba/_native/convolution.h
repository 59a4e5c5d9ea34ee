/* The causal depthwise convolution and SiLU for one instruction set: one row and a range of its strips of channels.
 *
 * A window of `width` inputs moves over the real tokens of the row; where a document begins it is emptied. */

/* The gradient of input number `source` of the row is whole: the inputs before the row have negative numbers. */
INLINE void V(put_grad_x)(const kj_conv *call, const kj_task *task, int64_t source, int64_t first, int count, vf grad) {
  int64_t past = call->width - 1;
  if (source >= 0) V(store)(call->grad_x, kj_at(&task->tokens, source), first, count, grad);
  else V(store)(call->grad_initial, task->row * past + past + source, first, count, grad);
}

INLINE void V(conv_part)(const kj_conv *call, const kj_task *task, int64_t first, int width, int backward) {
  const kj_tokens *tokens = &task->tokens;
  int64_t e = call->channels, valid_from = 0;
  int count = e - first < LANES ? (int)(e - first) : LANES, past = width - 1;
  vf locals[16]; /* registers, where the width is known to be small */
  vf *w = width <= 4 ? locals : task->work, *window = w + width, *grad_x = window + width, *grad_w = grad_x + width;
  vf bias = V(load_channels)(call->bias, first, count), grad_bias = {0};
  for (int j = 0; j < width; j++) {
    w[j] = V(load_channels)(call->kernel, j * e + first, count);
    window[j] = grad_x[j] = grad_w[j] = (vf){0};
  }
  if (call->initial.data) {
    for (int j = 0; j < past; j++) window[j] = V(load)(call->initial, task->row * past + j, first, count);
    valid_from = -past;
  }
  for (int64_t i = 0; i <= tokens->all; i++) {
    if (i == tokens->all || kj_begins(tokens, i)) {
      if (backward)
        for (int j = 0; j < past; j++)
          if (i - past + j >= valid_from) V(put_grad_x)(call, task, i - past + j, first, count, grad_x[j]);
      if (i == tokens->all) break;
      for (int j = 0; j < past; j++) window[j] = grad_x[j] = (vf){0};
      valid_from = i;
    }
    int64_t at = kj_at(tokens, i);
    V(prefetch)(call->x, at, first + WIDEST);
    if (backward) V(prefetch)(call->grad_y, at, first + WIDEST);
    window[past] = V(load)(call->x, at, first, count);
    vf y = bias;
    for (int j = 0; j < width; j++) y += w[j] * window[j];
    if (!backward) {
      if (call->silu) y *= V(sigmoid)(y);
      V(store)(call->y, at, first, count, y);
    } else {
      vf grad = V(load)(call->grad_y, at, first, count);
      if (call->silu) {
        vf s = V(sigmoid)(y);
        grad *= s * (1.0f + y * (1.0f - s));
      }
      grad_bias += grad;
      grad_x[past] = (vf){0};
      for (int j = 0; j < width; j++) {
        grad_w[j] += grad * window[j];
        grad_x[j] += grad * w[j];
      }
      if (i - past >= valid_from) V(put_grad_x)(call, task, i - past, first, count, grad_x[0]);
      for (int j = 0; j < past; j++) grad_x[j] = grad_x[j + 1];
    }
    for (int j = 0; j < past; j++) window[j] = window[j + 1];
  }
  if (!backward) return;
  for (int j = 0; j < width; j++)
    memcpy(task->rows_kernel + (task->row * width + j) * e + first, &grad_w[j], count * sizeof(float));
  memcpy(task->rows_bias + task->row * e + first, &grad_bias, count * sizeof(float));
}

static void V(conv)(const kj_conv *call, const kj_task *task, int backward) {
  int64_t last = task->last * WIDEST < call->channels ? task->last * WIDEST : call->channels;
  for (int64_t first = task->first * WIDEST; first < last; first += LANES) {
    if (call->width == 4 && backward) V(conv_part)(call, task, first, 4, 1);
    else if (call->width == 4) V(conv_part)(call, task, first, 4, 0);
    else V(conv_part)(call, task, first, (int)call->width, backward);
  }
}
