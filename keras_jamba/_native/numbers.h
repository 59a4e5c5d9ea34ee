/* Numbers of 16 bits, and tensors of any of the three dtypes, one number at a time. */

static float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}

static float half_to_float(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13); /* infinity and NaN */
  /* Not as a product of subnormal floats, which a thread may flush to zero. */
  float magnitude = rest < 0x400 ? (float)rest * 0x1p-24f : bits_to_float(rest << 13) * 0x1p112f;
  return bits_to_float(sign | float_to_bits(magnitude));
}

static uint16_t float_to_half(float x) { /* to nearest, ties to even */
  uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds beyond 65504 */
  if (rest < 0x38800000) /* subnormal: the addition rounds at the right place */
    return (uint16_t)(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - float_to_bits(0.5f)));
  return (uint16_t)(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

static float number_at(kj_tensor x, int64_t at) {
  if (x.dtype == KJ_FLOAT32) return ((const float *)x.data)[at];
  uint16_t half = ((const uint16_t *)x.data)[at];
  return x.dtype == KJ_FLOAT16 ? half_to_float(half) : bits_to_float((uint32_t)half << 16);
}

static void put_number(kj_tensor y, int64_t at, float x) {
  if (y.dtype == KJ_FLOAT32) {
    ((float *)y.data)[at] = x;
  } else if (y.dtype == KJ_FLOAT16) {
    ((uint16_t *)y.data)[at] = float_to_half(x);
  } else {
    uint32_t bits = float_to_bits(x);
    uint32_t rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
    ((uint16_t *)y.data)[at] = (uint16_t)(rounded >> 16);
  }
}

static void put_zeros(kj_tensor y, int64_t token, int64_t first, int64_t count) {
  int64_t size = y.dtype == KJ_FLOAT32 ? 4 : 2;
  if (y.data) memset((char *)y.data + (token * y.row + first) * size, 0, count * size);
}
