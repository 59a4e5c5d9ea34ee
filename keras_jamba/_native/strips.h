/* Strips of channels for one instruction set: WIDEST of them, a cache line of float32, in PARTS vectors.
 *
 * The cache lines of a strip in consecutive tokens map to the same few sets of the first-level cache and evict each
 * other.  So a chunk's lines are read once, before all computation, and written once, after it. */

#define PARTS (WIDEST / LANES)

/* Returns the number of channels from `first` on, at most one vector. */
INLINE int V(lanes)(int64_t channels, int64_t first) {
  int64_t rest = channels - first;
  return rest < 0 ? 0 : rest < LANES ? (int)rest : LANES;
}

/* `count` tokens, CHUNK at most, of the strip from channel `first` on: token i of part p is place[p * step + i]. Zeros
 * fill the tokens up to CHUNK. */
static NOINLINE void V(read_strip)(int64_t channels, kj_tensor x, const int64_t *at, int count, int64_t first,
                                   vf *place, int64_t step) {
  if (!x.data) return;
  for (int i = 0; i < count; i++) {
    for (int p = 0; p < PARTS; p++) {
      int64_t channel = first + p * LANES;
      place[p * step + i] = V(load)(x, at[i], channel, V(lanes)(channels, channel));
    }
    V(prefetch)(x, at[i], first);
  }
  for (int i = count; i < CHUNK; i++)
    for (int p = 0; p < PARTS; p++) place[p * step + i] = (vf){0};
}

static NOINLINE void V(write_strip)(int64_t channels, kj_tensor y, const int64_t *at, int count, int64_t first,
                                    const vf *place, int64_t step) {
  if (!y.data) return;
  for (int i = 0; i < count; i++) {
    V(prefetch_to_write)(y, at[i], first);
    for (int p = 0; p < PARTS; p++) {
      int64_t channel = first + p * LANES;
      V(store)(y, at[i], channel, V(lanes)(channels, channel), place[p * step + i]);
    }
  }
}
