/* The passes of resize.h as plain loops, for processors whose vectors are not used here. */
enum { DIGITS = 1 };

static void cut(const int32_t *k, int32_t *digits) { (void)k, (void)digits; }

static u8 clipped(int32_t sum) {
  sum >>= BITS;
  return (u8)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

/* Resize rows of 4 bytes a pixel to rows of 3. */
static void resize_width(const u8 *from, size_t stride, int rows, const Weights *w, u8 *to, size_t to_stride) {
  for (int y = 0; y < rows; y++)
    for (int x = 0; x < w->out; x++) {
      const u8 *p = from + (size_t)y * stride + 4 * (size_t)w->first[x];
      const int32_t *k = w->weights + (size_t)x * (size_t)w->taps;
      int32_t sum[4] = {HALF, HALF, HALF, HALF};
      for (int j = 0; j < w->count[x]; j++)
        for (int channel = 0; channel < 4; channel++) sum[channel] += p[4 * j + channel] * k[j];
      for (int channel = 0; channel < 3; channel++) to[(size_t)y * to_stride + 3 * (size_t)x + (size_t)channel] = clipped(sum[channel]);
    }
}

/* Resize columns; a row has `bytes` values. */
static void resize_height(const u8 *from, size_t stride, const Weights *w, u8 *to, size_t to_stride, size_t bytes) {
  for (int y = 0; y < w->out; y++, to += to_stride) {
    const u8 *p = from + stride * (size_t)w->first[y];
    const int32_t *k = w->weights + (size_t)y * (size_t)w->taps;
    for (size_t x = 0; x < bytes; x++) {
      int32_t sum = HALF;
      for (int j = 0; j < w->count[y]; j++) sum += p[stride * (size_t)j + x] * k[j];
      to[x] = clipped(sum);
    }
  }
}
