/* The real tokens of a row, chunk by chunk, and the places of the states before each chunk. */

/* The real tokens of one row, and the current chunk of them.  Padding is not part of them. */
typedef struct {
  int64_t begin, all;     /* where the row begins, how many real tokens it has */
  const int32_t *index;   /* their numbers in the row, or NULL: all of them */
  const int32_t *segments; /* of the row, or NULL */
  int64_t states;
  int count;              /* of the chunk */
  int64_t at[CHUNK];      /* begin + number */
  float *B, *C;           /* [token][n] */
  int spans;              /* of one document each */
  int span[CHUNK + 1];    /* the first token of each span, then count */
  int begins;             /* whether the first span begins a document; the others do */
} kj_tokens;

INLINE int64_t kj_at(const kj_tokens *tokens, int64_t i) {
  return tokens->begin + (tokens->index ? tokens->index[i] : i);
}

/* Whether real token i begins a document. The first one continues an initial state. */
INLINE int kj_begins(const kj_tokens *tokens, int64_t i) {
  if (!tokens->segments || i == 0) return 0;
  return tokens->segments[kj_at(tokens, i) - tokens->begin] != tokens->segments[kj_at(tokens, i - 1) - tokens->begin];
}

/* For `count` tokens from number `start` on, and each tap of the window of `width` inputs that ends at the token: 1 if
 * the input belongs to the token's document, else 0. NULL if all do. */
static const uint8_t *kj_valid(const kj_tokens *tokens, int64_t start, int64_t count, int64_t width, uint8_t *room) {
  int all = 1;
  if (!tokens->segments) return NULL;
  for (int64_t i = start; i < start + count; i++) {
    uint8_t same = 1;
    for (int64_t j = width - 1; j >= 0; j--) {
      room[(i - start) * width + j] = same;
      int64_t number = i - (width - 1) + j; /* of the input */
      if (number > 0 && number < tokens->all && kj_begins(tokens, number)) same = all = 0;
    }
  }
  return all ? NULL : room;
}

static kj_tokens begin_row(int64_t row, int64_t length, const uint8_t *mask, const int32_t *segments, int32_t *index) {
  kj_tokens tokens = {.begin = row * length, .all = length};
  if (segments) tokens.segments = segments + row * length;
  if (mask) {
    tokens.index = index;
    tokens.all = 0;
    for (int64_t t = 0; t < length; t++)
      if (mask[row * length + t]) index[tokens.all++] = (int32_t)t;
  }
  return tokens;
}

/* Chunk number `chunk` of the row, or 0 if there is none. */
static int kj_chunk(const kj_scan *call, kj_tokens *tokens, int64_t chunk) {
  int64_t first = chunk * CHUNK, n = call->states;
  if (first >= tokens->all) return 0;
  tokens->count = tokens->all - first < CHUNK ? (int)(tokens->all - first) : CHUNK;
  tokens->spans = 0;
  tokens->begins = kj_begins(tokens, first);
  for (int i = 0; i < tokens->count; i++) {
    tokens->at[i] = kj_at(tokens, first + i);
    if (i == 0 || kj_begins(tokens, first + i)) tokens->span[tokens->spans++] = i;
    for (int64_t k = 0; k < n; k++) {
      tokens->B[i * n + k] = number_at(call->B, tokens->at[i] * call->B.row + k);
      tokens->C[i * n + k] = number_at(call->C, tokens->at[i] * call->C.row + k);
    }
  }
  tokens->span[tokens->spans] = tokens->count;
  return 1;
}

/* Whether span number `span` of the chunk begins a document, whose state before is zero.  Zeros replace the state: a
 * product with 0 would keep NaN and infinity of the document before. */
INLINE int kj_clears(const kj_tokens *tokens, int span) { return span || tokens->begins; }

static int64_t padded(int64_t channels) { return (channels + WIDEST - 1) / WIDEST * WIDEST; }

static int64_t chunks_of(int64_t length) { return (length + CHUNK - 1) / CHUNK; }

int64_t kj_scan_checkpoints(int64_t batch, int64_t length, int64_t channels, int64_t states) {
  return batch * chunks_of(length) * padded(channels) * states;
}

/* A strip's checkpoint is [n][WIDEST] for every instruction set: the backward pass may use another one. */
static float *kj_checkpoint(const kj_scan *call, int64_t row, int64_t chunk, int64_t strip) {
  int64_t place = row * chunks_of(call->length) + chunk;
  return call->checkpoints + (place * padded(call->channels) + strip) * call->states;
}
