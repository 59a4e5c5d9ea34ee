/* Checks that NaN and infinity in a document, and in masked tokens, leave all other documents as they are, bit for bit.
 *
 * check_kernels.c includes this file. Each check calls a kernel twice, with and without damage. */

/* The tokens of row `row` whose segment is `id`, and what tells them from others. */
typedef struct {
  int64_t row, length, tokens;
  int32_t id;
  const uint8_t *mask;
  const int32_t *segments;
} document;

static int damaged_documents, changed_documents; /* that the damage changed, so that the checks compare something */

static document draw_document(int64_t batch, int64_t length, const uint8_t *mask, const int32_t *segments) {
  document it = {random_number(batch), length, batch * length, 0, mask, segments};
  it.id = segments[it.row * length + random_number(length)];
  return it;
}

static int contains(const document *it, int64_t token) {
  return token / it->length == it->row && it->segments[token] == it->id;
}

/* Whether the first (or last) real token of the row is in the document, and with it the state before (or after). */
static int has_end(const document *it, int last) {
  for (int64_t i = 0; i < it->length; i++) {
    int64_t token = it->row * it->length + (last ? it->length - 1 - i : i);
    if (!it->mask || it->mask[token]) return contains(it, token);
  }
  return 0;
}

static float bad_number(void) { return random_number(2) ? NAN : random_number(2) ? INFINITY : -INFINITY; }

/* Returns a copy with damage in half of the tokens of the document, and in half of the masked tokens of all rows. */
static kj_tensor damaged(kj_tensor x, int64_t width, const document *it) {
  int64_t count = (it->tokens - 1) * x.row + width, bytes = count * (x.dtype == KJ_FLOAT32 ? 4 : 2);
  kj_tensor copy = {x.data ? malloc(bytes) : NULL, x.dtype, x.row};
  if (!x.data) return copy;
  memcpy(copy.data, x.data, bytes);
  for (int64_t i = 0; i < it->tokens; i++)
    if (random_number(2) && (contains(it, i) || (it->mask && !it->mask[i])))
      put_number(copy, i * x.row + random_number(width), bad_number());
  return copy;
}

/* Returns a copy of `(batch, size)` with damage in the row of the document if the state belongs to it. */
static kj_tensor damaged_rows(kj_tensor x, int64_t size, const document *it, int belongs) {
  int64_t bytes = it->tokens / it->length * size * (x.dtype == KJ_FLOAT32 ? 4 : 2);
  kj_tensor copy = {x.data ? malloc(bytes) : NULL, x.dtype, x.row};
  if (!x.data) return copy;
  memcpy(copy.data, x.data, bytes);
  if (belongs && size) put_number(copy, it->row * size + random_number(size), bad_number());
  return copy;
}

static int equal_bits(kj_tensor a, kj_tensor b, int64_t first, int64_t count) {
  int64_t bytes = a.dtype == KJ_FLOAT32 ? 4 : 2;
  return !memcmp((char *)a.data + first * bytes, (char *)b.data + first * bytes, count * bytes);
}

static void same_tokens(const char *what, kj_tensor found, kj_tensor right, int64_t width, const document *it) {
  for (int64_t i = 0; i < it->tokens; i++)
    if (!contains(it, i) && !equal_bits(found, right, i * width, width)) fail(what, i, 0);
}

static void same_rows(const char *what, kj_tensor found, kj_tensor right, int64_t size, const document *it, int belongs) {
  for (int64_t i = 0; i < it->tokens / it->length; i++)
    if (!(belongs && i == it->row) && !equal_bits(found, right, i * size, size)) fail(what, i, 0);
}

static void count_document(kj_tensor found, kj_tensor right, int64_t width, const document *it) {
  damaged_documents++;
  changed_documents += !equal_bits(found, right, it->row * it->length * width, it->length * width);
}

static void free_results(results *all) {
  for (int i = 0; i < all->used; i++) free(all->x[i].data);
}

static int64_t draw_isa(void) {
  int64_t isa = KJ_PLAIN + random_number(3);
  return kj_isa_available(isa) ? isa : KJ_PLAIN;
}

static void isolate_scan(void) {
  kj_scan call = draw_scan(1), bad = call;
  int64_t b = call.batch, e = call.channels, n = call.states, widths[] = {e, e, n, n, e};
  document it = draw_document(b, call.length, call.mask, call.segments);
  int first = has_end(&it, 0), last = has_end(&it, 1), of_z = call.z.data != NULL;
  call.isa = bad.isa = draw_isa();
  call.threads = bad.threads = 1 + 3 * random_number(2);
  bad.u = damaged(call.u, e, &it), bad.delta = damaged(call.delta, e, &it), bad.z = damaged(call.z, e, &it);
  bad.B = damaged(call.B, n, &it), bad.C = damaged(call.C, n, &it), bad.grad_y = damaged(call.grad_y, e, &it);
  bad.initial = damaged_rows((kj_tensor){(void *)call.initial, KJ_FLOAT32, 0}, e * n, &it, first).data;
  bad.grad_last = damaged_rows((kj_tensor){(void *)call.grad_last, KJ_FLOAT32, 0}, e * n, &it, last).data;
  results right = run_scan(call, 1), found = run_scan(bad, 1);
  count_document(found.x[0], right.x[0], e, &it);
  same_tokens("a scan beside a damaged document", found.x[0], right.x[0], e, &it);
  same_rows("a last state beside a damaged document", found.x[1], right.x[1], e * n, &it, last);
  for (int i = 0; i < 4 + of_z; i++)
    same_tokens("a gradient of a scan beside a damaged document", found.x[2 + i], right.x[2 + i], widths[i], &it);
  int end = right.used - 1;
  if (call.initial) same_rows("a gradient of an initial state", found.x[end], right.x[end], e * n, &it, first);
  free_results(&right), free_results(&found);
  free(bad.u.data), free(bad.delta.data), free(bad.z.data), free(bad.B.data), free(bad.C.data), free(bad.grad_y.data);
  free((void *)bad.initial), free((void *)bad.grad_last);
  free_scan(call);
}

static void isolate_conv(void) {
  kj_conv call = draw_conv(1), bad = call;
  int64_t e = call.channels, past = call.width - 1;
  document it = draw_document(call.batch, call.length, call.mask, call.segments);
  int first = has_end(&it, 0);
  call.isa = bad.isa = draw_isa();
  call.threads = bad.threads = 1 + 3 * random_number(2);
  bad.x = damaged(call.x, e, &it), bad.grad_y = damaged(call.grad_y, e, &it);
  bad.initial = damaged_rows(call.initial, past * e, &it, first);
  results right = run_conv(call), found = run_conv(bad);
  count_document(found.x[0], right.x[0], e, &it);
  same_tokens("a convolution beside a damaged document", found.x[0], right.x[0], e, &it);
  same_tokens("a gradient of a convolution beside a damaged document", found.x[1], right.x[1], e, &it);
  int end = right.used - 1;
  if (call.initial.data) same_rows("a gradient of an initial window", found.x[end], right.x[end], past * e, &it, first);
  free_results(&right), free_results(&found);
  free(bad.x.data), free(bad.grad_y.data), free(bad.initial.data);
  free_conv(call);
}
