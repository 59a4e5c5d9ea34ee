/* Attention of a few queries to many keys, for one instruction set.  Reading keys and values from memory takes most of
 * the time, so each is read once, for all queries, and blocks that no query sees are not read.
 *
 * A task is one row and a range of its keys, in blocks of KEYS.  It keeps the greatest score of each query and head so
 * far, to which all weights are relative, and scales the sums when it grows. */

#define TOKENS 4 /* keys at once: as many chains of dependent additions */
#define AHEAD_BYTES 4096

/* seen[t][i]: whether query t of a row sees key `first` + i, all bits or none.  No query sees a key after the last.
 * any[i]: whether one of them does.  Returns the number of such keys. */
static int64_t V(visibility)(const kj_attention *call, int64_t row, int64_t first, int64_t count, int32_t *seen,
                             int32_t *any) {
  int32_t at[KEYS] = {0}, of[KEYS], sink[KEYS] = {0};
  int64_t from = row * call->keys + first, found = 0;
  for (int64_t i = count; i < KEYS; i++) of[i] = INT32_MIN;
  memcpy(at, call->key_positions + from, count * sizeof(int32_t));
  memcpy(of, call->key_documents + from, count * sizeof(int32_t));
  if (call->sinks) memcpy(sink, call->sinks + from, count * sizeof(int32_t));
  memset(any, 0, KEYS * sizeof(int32_t));
  for (int64_t t = 0; t < call->queries; t++) {
    int32_t position = call->positions[row * call->queries + t], document = call->documents[row * call->queries + t];
    for (int64_t i = 0; i < KEYS; i += LANES) {
      vi distance = position - *(viu *)(at + i), sees = *(viu *)(of + i) == document;
      if (call->causal) sees &= distance >= 0;
      if (call->window) {
        vi window = (vi){0} + (int32_t)call->window;
        sees &= ((distance < window) & (distance > -window)) | (*(viu *)(sink + i) > 0);
      }
      *(viu *)(seen + t * KEYS + i) = sees;
      *(viu *)(any + i) |= sees;
    }
  }
  for (int64_t i = 0; i < KEYS; i++) found -= any[i];
  return found;
}

/* Starts to read the token `AHEAD_BYTES` after this one.  Hardware prefetching stops at page boundaries. */
INLINE void V(prefetch_token)(kj_tensor x, int64_t token, int64_t columns) {
  int64_t size = x.dtype == KJ_FLOAT32 ? 4 : 2;
  const char *from = (const char *)x.data + token * x.row * size + AHEAD_BYTES;
  for (int64_t at = 0; at < columns * size; at += 64) __builtin_prefetch(from + at, 0, 3);
}

/* weights[r][i] = the product of query r and key i, of all heads. */
INLINE void V(score)(const kj_attention *call, kj_tensor x, int64_t token, int64_t count, const float *query,
                     int64_t wide, float *weights) {
  const int64_t c = call->width, whole = c / LANES * LANES;
  const int64_t per_group = call->queries * (call->heads / call->groups);
  for (int64_t i = 0; i < count; i += TOKENS) {
    int64_t at[TOKENS];
    for (int k = 0; k < TOKENS; k++) at[k] = token + (i + k < count ? i + k : count - 1);
    for (int k = 0; k < TOKENS; k++) V(prefetch_token)(x, at[k], call->groups * c);
    for (int64_t group = 0; group < call->groups; group++)
      for (int64_t r = group * per_group; r < (group + 1) * per_group; r++) {
        vf sum[TOKENS] = {0};
        for (int64_t j = 0; j < whole; j += LANES) {
          vf q = *(const vfu *)(query + r * wide + j);
          for (int k = 0; k < TOKENS; k++) sum[k] += q * V(load)(x, at[k], group * c + j, LANES);
        }
        if (whole < c) {
          vf q = *(const vfu *)(query + r * wide + whole);
          for (int k = 0; k < TOKENS; k++) sum[k] += q * V(load)(x, at[k], group * c + whole, (int)(c - whole));
        }
        V(sums)(sum, TOKENS, weights + r * KEYS + i);
      }
  }
}

/* sums[r] += the values times the weights of query r.  With `any`, values that no query sees count as zeros, because
 * NaN times a weight of 0 is NaN. */
INLINE void V(mix)(const kj_attention *call, kj_tensor x, int64_t token, int64_t count, const float *weights,
                   const int32_t *any, int64_t wide, float *sums) {
  const int64_t c = call->width, per_group = call->queries * (call->heads / call->groups);
  for (int64_t i = 0; i < count; i += TOKENS) {
    int64_t at[TOKENS];
    for (int k = 0; k < TOKENS; k++) at[k] = token + (i + k < count ? i + k : count - 1);
    for (int k = 0; k < TOKENS; k++) V(prefetch_token)(x, at[k], call->groups * c);
    for (int64_t group = 0; group < call->groups; group++)
      for (int64_t j = 0; j < c; j += LANES) {
        vf value[TOKENS];
        if (j + LANES <= c)
          for (int k = 0; k < TOKENS; k++) value[k] = V(load)(x, at[k], group * c + j, LANES);
        else
          for (int k = 0; k < TOKENS; k++) value[k] = V(load)(x, at[k], group * c + j, (int)(c - j));
        if (any)
          for (int k = 0; k < TOKENS; k++) value[k] = (vf)((vi)value[k] & any[i + k]);
        for (int64_t r = group * per_group; r < (group + 1) * per_group; r++) {
          const float *weight = weights + r * KEYS + i;
          vf even = *(vfu *)(sums + r * wide + j), odd = {0};
          for (int k = 0; k < TOKENS; k += 2) even += weight[k] * value[k];
          for (int k = 1; k < TOKENS; k += 2) odd += weight[k] * value[k];
          *(vfu *)(sums + r * wide + j) = even + odd;
        }
      }
  }
}

/* The same two, compiled for each dtype. */
#define WITH(x, type, call)                       \
  if (x.dtype == type) {                          \
    x.dtype = type; /* a constant from here on */ \
    call;                                         \
    return;                                       \
  }
#define WITH_EACH(x, call)    \
  {                           \
    WITH(x, KJ_FLOAT32, call)  \
    WITH(x, KJ_BFLOAT16, call) \
    WITH(x, KJ_FLOAT16, call)  \
  }

static NOINLINE void V(score_block)(const kj_attention *call, int64_t token, int64_t count, const float *query,
                                    int64_t wide, float *weights) {
  kj_tensor x = call->key;
  WITH_EACH(x, V(score)(call, x, token, count, query, wide, weights));
}

static NOINLINE void V(mix_block)(const kj_attention *call, int64_t token, int64_t count, const float *weights,
                                  const int32_t *any, int64_t wide, float *sums) {
  kj_tensor x = call->value;
  if (any) WITH_EACH(x, V(mix)(call, x, token, count, weights, any, wide, sums));
  WITH_EACH(x, V(mix)(call, x, token, count, weights, NULL, wide, sums));
}
#undef WITH_EACH
#undef WITH

/* Turns scores into weights relative to the greatest score, which it returns.  Hidden keys get 0. */
static NOINLINE float V(weigh)(float *scores, const int32_t *seen, float most, float *total) {
  const vf none = V(splat)(-INFINITY);
  vf greatest = V(splat)(most), sum = {0};
  for (int64_t i = 0; i < KEYS; i += LANES) {
    vf x = V(choose)(*(const viu *)(seen + i), *(vfu *)(scores + i), none);
    greatest = V(choose)(x > greatest, x, greatest);
    *(vfu *)(scores + i) = x;
  }
  for (int i = 0; i < LANES; i++)
    if (greatest[i] > most) most = greatest[i];
  float shift = most == -INFINITY ? 0 : most;
  for (int64_t i = 0; i < KEYS; i += SIDE * LANES) {
    vf x[SIDE];
    EACH x[k] = V(max)(*(vfu *)(scores + i + k * LANES) - shift, -126.0f);
    V(exp2)(x);
    EACH x[k] = (vf)((vi)x[k] & *(const viu *)(seen + i + k * LANES));
    EACH *(vfu *)(scores + i + k * LANES) = x[k];
    EACH sum += x[k];
  }
  *total = V(sum)(sum);
  return most;
}

/* The queries of a row by group, token and head of the group, in units that make weights powers of 2. */
static void V(read_queries)(const kj_attention *call, int64_t row, int64_t wide, float *query) {
  const int64_t c = call->width, repeats = call->heads / call->groups;
  for (int64_t group = 0; group < call->groups; group++)
    for (int64_t t = 0; t < call->queries; t++)
      for (int64_t k = 0; k < repeats; k++, query += wide)
        for (int64_t i = 0; i < wide; i++) {
          int64_t at = (row * call->queries + t) * call->query.row + (group * repeats + k) * c + i;
          query[i] = i < c ? number_at(call->query, at) * (LOG2E / sqrtf((float)c)) : 0;
        }
}

static void V(attention)(const kj_attention *call, const kj_spread *spread, int64_t number, float *memory) {
  const int64_t row = number / spread->splits, split = number % spread->splits, repeats = call->heads / call->groups;
  const int64_t first = call->keys * split / spread->splits, after = call->keys * (split + 1) / spread->splits;
  const int64_t wide = spread->wide, rows = spread->rows, token = row * call->keys;
  float *query = memory, *weights = query + rows * wide;
  int32_t *any = (int32_t *)(weights + rows * KEYS), *seen = any + KEYS;
  float *sums = spread->parts + number * spread->step, *most = sums + rows * wide, *total = most + rows;
  memset(sums, 0, spread->step * sizeof(float));
  for (int64_t r = 0; r < rows; r++) most[r] = -INFINITY;
  V(read_queries)(call, row, wide, query);
  for (int64_t at = first, count; at < after; at += count) {
    count = after - at < KEYS ? after - at : KEYS;
    int64_t found = V(visibility)(call, row, at, count, seen, any);
    if (!found) continue;
    V(score_block)(call, token + at, count, query, wide, weights);
    for (int64_t r = 0; r < rows; r++) {
      float before = most[r], part;
      int64_t t = r / repeats % call->queries;
      most[r] = V(weigh)(weights + r * KEYS, seen + t * KEYS, before, &part);
      if (most[r] == before) {
        total[r] += part;
        continue;
      }
      float scale = before == -INFINITY ? 0 : exp2f(before - most[r]);
      total[r] = total[r] * scale + part;
      for (int64_t j = 0; j < wide; j++) sums[r * wide + j] *= scale;
    }
    V(mix_block)(call, token + at, count, weights, found < KEYS ? any : NULL, wide, sums);
  }
}
#undef TOKENS
#undef AHEAD_BYTES
