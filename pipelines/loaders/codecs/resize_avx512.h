/* The passes of resize.h with AVX-512: products of pixels and bytes of the weights, four to a sum (VNNI).
 *
 * A weight is d2 x 2^16 + d1 x 2^8 + d0, each digit from -128 to 127: weights are below 1.2 x 2^22, so d2 fits as well.
 */
#include <immintrin.h>

enum { DIGITS = 3 };

typedef __m512i Vector;

/* Cut the 4 weights k of one output into the bytes of 3 integers, which lie 4 apart. */
static void cut(const int32_t *k, int32_t *digits) {
  for (int digit = 0; digit < 3; digit++) {
    uint32_t bytes = 0;
    for (int j = 0; j < 4; j++) {
      int32_t rest = k[j];
      for (int i = 0; i < digit; i++) rest = (rest - (int8_t)(uint8_t)rest) >> 8;
      bytes |= (uint32_t)(uint8_t)rest << (8 * j);
    }
    digits[4 * (2 - digit)] = (int32_t)bytes; /* the highest first */
  }
}

/* The pixels' sums: 16 integers, of 4 pixels each. `k`: the digits, the highest first. */
static inline Vector sum4(Vector pixels, const Vector k[3]) {
  Vector sums = _mm512_dpbusd_epi32(_mm512_set1_epi32(HALF >> 16), pixels, k[0]);
  sums = _mm512_dpbusd_epi32(_mm512_slli_epi32(sums, 8), pixels, k[1]);
  return _mm512_srai_epi32(_mm512_dpbusd_epi32(_mm512_slli_epi32(sums, 8), pixels, k[2]), BITS);
}

typedef struct { Vector digit[3]; } Sums; /* of more than 4 weights: a sum for each digit */

static const int32_t ROUNDING[3] = {HALF >> 16, 0, 0};

static inline Sums no_sums(void) {
  Sums s;
  for (int d = 0; d < 3; d++) s.digit[d] = _mm512_set1_epi32(ROUNDING[d]);
  return s;
}

static inline void add(Sums *s, Vector pixels, const Vector k[3]) {
  for (int d = 0; d < 3; d++) s->digit[d] = _mm512_dpbusd_epi32(s->digit[d], pixels, k[d]);
}

static inline Vector total(const Sums *s) {
  Vector sums = _mm512_add_epi32(_mm512_slli_epi32(s->digit[0], 8), s->digit[1]);
  return _mm512_srai_epi32(_mm512_add_epi32(_mm512_slli_epi32(sums, 8), s->digit[2]), BITS);
}

static inline Vector bytes4(Vector a, Vector b, Vector c, Vector d) {
  return _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
}

/* Each of 4 outputs' integers four times: for its 4 channels. */
static inline Vector spread(const int32_t *four) {
  const Vector to = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_permutexvar_epi32(to, _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)four)));
}

/* Four output columns of four rows; the 4 bytes behind them are overwritten. */
static inline void columns4(const u8 *const rows[4], const Weights *w, int x, u8 *const to[4]) {
  const Vector by_channel = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const int32_t *first = w->first + x, *count = w->count + x;
  const int32_t *k = w->digits + (size_t)(x / 4) * (size_t)(w->taps / 4) * 12;
  int most = count[0] > count[1] ? count[0] : count[1], later = count[2] > count[3] ? count[2] : count[3];
  if (later > most) most = later;
  Vector sums[4];
  if (first[3] - first[0] <= 12) { /* the weights' pixels of all four lie within 16 pixels, from first[0] + j on */
    __m128i apart = _mm_sub_epi32(_mm_loadu_si128((const __m128i *)first), _mm_set1_epi32(first[0]));
    int32_t offsets[4];
    _mm_storeu_si128((__m128i *)offsets, _mm_mullo_epi32(apart, _mm_set1_epi32(0x04040404)));
    const Vector at = _mm512_add_epi8(by_channel, spread(offsets));
    const size_t begin = 4 * (size_t)first[0];
    if (most <= 4) {
      const Vector digits[3] = {spread(k), spread(k + 4), spread(k + 8)};
      for (int i = 0; i < 4; i++) sums[i] = sum4(_mm512_permutexvar_epi8(at, _mm512_loadu_si512(rows[i] + begin)), digits);
    } else {
      Sums s[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
      for (int j = 0; j < most; j += 4, k += 12) {
        const Vector digits[3] = {spread(k), spread(k + 4), spread(k + 8)};
        for (int i = 0; i < 4; i++) add(&s[i], _mm512_permutexvar_epi8(at, _mm512_loadu_si512(rows[i] + begin + 4 * (size_t)j)), digits);
      }
      for (int i = 0; i < 4; i++) sums[i] = total(&s[i]);
    }
  } else {
    Sums s[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
    for (int j = 0; j < most; j += 4, k += 12) {
      const Vector digits[3] = {spread(k), spread(k + 4), spread(k + 8)};
      size_t at[4]; /* beyond the last pixel all weights are 0 */
      for (int c = 0; c < 4; c++) at[c] = 4 * (size_t)(first[c] + j < w->in ? first[c] + j : w->in - 1);
      for (int i = 0; i < 4; i++) {
        Vector pixels = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[i] + at[0])));
        pixels = _mm512_inserti32x4(pixels, _mm_loadu_si128((const __m128i *)(rows[i] + at[1])), 1);
        pixels = _mm512_inserti32x4(pixels, _mm_loadu_si128((const __m128i *)(rows[i] + at[2])), 2);
        pixels = _mm512_inserti32x4(pixels, _mm_loadu_si128((const __m128i *)(rows[i] + at[3])), 3);
        add(&s[i], _mm512_shuffle_epi8(pixels, by_channel), digits);
      }
    }
    for (int i = 0; i < 4; i++) sums[i] = total(&s[i]);
  }
  /* a lane a column, in it four pixels of the rows: to a lane a row, in it four pixels without their fourth bytes */
  const Vector by_row = _mm512_add_epi8(
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 16, 17, 18, 32, 33, 34, 48, 49, 50, 0, 0, 0, 0)),
      _mm512_set_epi32(0x0C0C0C0C, 0x0C0C0C0C, 0x0C0C0C0C, 0x0C0C0C0C, 0x08080808, 0x08080808, 0x08080808, 0x08080808, 0x04040404, 0x04040404, 0x04040404, 0x04040404, 0, 0, 0, 0));
  Vector out = _mm512_permutexvar_epi8(by_row, bytes4(sums[0], sums[1], sums[2], sums[3]));
  _mm_storeu_si128((__m128i *)to[0], _mm512_castsi512_si128(out));
  _mm_storeu_si128((__m128i *)to[1], _mm512_extracti32x4_epi32(out, 1));
  _mm_storeu_si128((__m128i *)to[2], _mm512_extracti32x4_epi32(out, 2));
  _mm_storeu_si128((__m128i *)to[3], _mm512_extracti32x4_epi32(out, 3));
}

/* Resize rows of 4 bytes a pixel to rows of 3; up to PADDING bytes behind a row are overwritten. */
static void resize_width(const u8 *from, size_t stride, int rows, const Weights *w, u8 *to, size_t to_stride) {
  for (int y = 0; y < rows; y += 4) {
    const u8 *in[4];
    u8 *out[4];
    for (int i = 0; i < 4; i++) {
      size_t row = (size_t)(y + i < rows ? y + i : rows - 1); /* the last row again: the same result */
      in[i] = from + stride * row, out[i] = to + to_stride * row;
    }
    for (int x = 0; x < w->out; x += 4) {
      columns4(in, w, x, out);
      for (int i = 0; i < 4; i++) out[i] += 12;
    }
  }
}

/* 64 bytes of 4 rows, those of a column next to each other: columns 0 to 3 of each lane, 4 to 7, 8 to 11, 12 to 15. */
static inline void interleave(const u8 *const rows[4], size_t x, Vector out[4]) {
  Vector a = _mm512_loadu_si512(rows[0] + x), b = _mm512_loadu_si512(rows[1] + x);
  Vector c = _mm512_loadu_si512(rows[2] + x), d = _mm512_loadu_si512(rows[3] + x);
  Vector low01 = _mm512_unpacklo_epi8(a, b), high01 = _mm512_unpackhi_epi8(a, b);
  Vector low23 = _mm512_unpacklo_epi8(c, d), high23 = _mm512_unpackhi_epi8(c, d);
  out[0] = _mm512_unpacklo_epi16(low01, low23), out[1] = _mm512_unpackhi_epi16(low01, low23);
  out[2] = _mm512_unpacklo_epi16(high01, high23), out[3] = _mm512_unpackhi_epi16(high01, high23);
}

static inline void digits_of(const Weights *w, int y, int group, Vector k[3]) {
  const int32_t *at = w->digits + (size_t)((y / 4) * (w->taps / 4) + group) * 12 + y % 4;
  for (int d = 0; d < 3; d++) k[d] = _mm512_set1_epi32(at[4 * d]);
}

static inline void rows4(const u8 *from, size_t stride, const Weights *w, int first, const u8 *rows[4]) {
  for (int i = 0; i < 4; i++) rows[i] = from + stride * (size_t)(first + i < w->in ? first + i : w->in - 1); /* their weights are 0 */
}

/* Resize columns; a row has `bytes` values, and padding in `from`. */
static void resize_height(const u8 *from, size_t stride, const Weights *w, u8 *to, size_t to_stride, size_t bytes) {
  const u8 *rows[4];
  for (int y = 0, end; y < w->out; y = end) {
    for (end = y + 1; end < w->out && w->first[end] == w->first[y] && w->count[end] <= 4;) end++;
    if (w->count[y] > 4) end = y + 1;
    for (size_t x = 0; x < bytes; x += 64) {
      __mmask64 inside = bytes - x < 64 ? ((__mmask64)1 << (bytes - x)) - 1 : ~(__mmask64)0;
      Vector pixels[4], k[3];
      if (w->count[y] <= 4) { /* enlarged: several output rows are made of the same four */
        rows4(from, stride, w, w->first[y], rows);
        interleave(rows, x, pixels);
        for (int row = y; row < end; row++) {
          digits_of(w, row, 0, k);
          Vector out = bytes4(sum4(pixels[0], k), sum4(pixels[1], k), sum4(pixels[2], k), sum4(pixels[3], k));
          _mm512_mask_storeu_epi8(to + to_stride * (size_t)row + x, inside, out);
        }
      } else {
        Sums s[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
        for (int j = 0; j < w->count[y]; j += 4) {
          rows4(from, stride, w, w->first[y] + j, rows);
          interleave(rows, x, pixels);
          digits_of(w, y, j / 4, k);
          for (int i = 0; i < 4; i++) add(&s[i], pixels[i], k);
        }
        _mm512_mask_storeu_epi8(to + to_stride * (size_t)y + x, inside, bytes4(total(&s[0]), total(&s[1]), total(&s[2]), total(&s[3])));
      }
    }
  }
}
