/* A call of attention: its tasks, and the sums over their parts. */

/* y of one query and head: the parts of its splits, each scaled to the greatest score of all. */
static void join_parts(const kj_attention *call, const kj_spread *spread, int64_t row, int64_t r, float *sum) {
  int64_t c = call->width, repeats = call->heads / call->groups, per_group = call->queries * repeats;
  const float *parts = spread->parts + row * spread->splits * spread->step;
  const float *greatest = parts + spread->rows * spread->wide;
  float most = -INFINITY, total = 0;
  memset(sum, 0, c * sizeof(float));
  for (int64_t at = r; at < r + spread->splits * spread->step; at += spread->step)
    if (greatest[at] > most) most = greatest[at];
  for (int64_t split = 0; split < spread->splits; split++) {
    int64_t at = split * spread->step;
    float weight = greatest[at + spread->rows + r];
    if (weight == 0) continue; /* it sees none of these keys */
    float scale = exp2f(greatest[at + r] - most);
    total += scale * weight;
    for (int64_t i = 0; i < c; i++) sum[i] += scale * parts[at + r * spread->wide + i];
  }
  int64_t token = row * call->queries + r % per_group / repeats;
  int64_t to = token * call->y.row + (r / per_group * repeats + r % repeats) * c;
  for (int64_t i = 0; i < c; i++) put_number(call->y, to + i, total == 0 ? 0 : sum[i] / total);
}

int kj_attention_forward(const kj_attention *call) {
  const kj_set *set = set_for(call->isa);
  if (!set) return KJ_NO_SUCH_ISA;
  kj_attention of_rows = *call;
  int64_t c = call->width, batch = call->batch, columns = call->heads * c;
  of_rows.query.row = of_rows.y.row = columns;
  of_rows.key.row = of_rows.value.row = call->groups * c;
  int64_t units = batch * call->keys * (call->groups * c + call->queries * columns / 4);
  int64_t threads = useful_threads(call->threads, units, call->parallel);
  kj_spread spread = {.splits = 1, .rows = call->queries * call->heads, .wide = padded(c)};
  /* Enough tasks to keep all threads busy to the end. */
  if (threads > 1) spread.splits = (4 * threads + batch - 1) / batch;
  if (spread.splits > call->keys / 256 + 1) spread.splits = call->keys / 256 + 1;
  spread.step = padded(spread.rows * (spread.wide + 2));
  kj_job job = {.set = set, .attention = &of_rows, .spread = &spread, .rows = batch * spread.splits, .length = 1};
  job.shares = 1;
  job.bytes[0] = rounded(attention_floats(&spread, call->queries) * sizeof(float));
  int64_t floats = batch * spread.splits * spread.step;
  char *memory = malloc((floats + c) * sizeof(float) + 64);
  if (!memory) return KJ_NO_MEMORY;
  spread.parts = align(memory);
  int error = run(&job, threads, call->parallel, call->pool);
  for (int64_t row = 0; !error && row < batch; row++)
    for (int64_t r = 0; r < spread.rows; r++) join_parts(&of_rows, &spread, row, r, spread.parts + floats);
  free(memory);
  return error;
}
