/* The passes of resize.h with AVX2: products of pixels and 15-bit halves of the weights, as words, two to a sum. */
#include <immintrin.h>

enum { DIGITS = 4, SPLIT = 15 };

typedef __m256i Vector;

/* Cut the 4 weights k of one output into pairs of words, k >> 15 and k & 32767: high 01, high 23, low 01, low 23, 4 apart. */
static void cut(const int32_t *k, int32_t *digits) {
  for (int pair = 0; pair < 2; pair++) {
    uint32_t a = (uint32_t)k[2 * pair], b = (uint32_t)k[2 * pair + 1];
    digits[4 * pair] = (int32_t)(((a >> SPLIT) & 0xFFFF) | ((b >> SPLIT) << 16));
    digits[4 * pair + 8] = (int32_t)((a & 0x7FFF) | ((b & 0x7FFF) << 16));
  }
}

/* sums + the products of the words' pairs */
static inline Vector add_products(Vector sums, Vector words, Vector pair) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpwssd_epi32(sums, words, pair);
#else
  return _mm256_add_epi32(sums, _mm256_madd_epi16(words, pair));
#endif
}

typedef struct { Vector high, low; } Sums; /* of 8 values */

static inline Sums no_sums(void) { return (Sums){_mm256_setzero_si256(), _mm256_set1_epi32(HALF)}; }

static inline void add(Sums *s, Vector words01, Vector words23, const int32_t *k) {
  s->high = add_products(add_products(s->high, words01, _mm256_set1_epi32(k[0])), words23, _mm256_set1_epi32(k[4]));
  s->low = add_products(add_products(s->low, words01, _mm256_set1_epi32(k[8])), words23, _mm256_set1_epi32(k[12]));
}

static inline Vector total(const Sums *s) { /* (high x 2^15 + low) >> 22 */
  return _mm256_srai_epi32(_mm256_add_epi32(s->high, _mm256_srai_epi32(s->low, SPLIT)), BITS - SPLIT);
}

static inline const int32_t *digits_of(const Weights *w, int i) { return w->digits + (size_t)(i / 4 * (w->taps / 4)) * 16 + i % 4; }

static inline Vector load2(const u8 *a, const u8 *b) {
  Vector first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)a));
  return _mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i *)b), 1);
}

/* One output column of four rows, 4 bytes a pixel in, 3 out (the fourth is overwritten by the next pixel). */
static inline void column(const u8 *const p[4], const int32_t *k, int count, u8 *const out[4]) {
  const Vector taps01 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
  const Vector taps23 = _mm256_broadcastsi128_si256(_mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
  Sums a = no_sums(), b = no_sums();
  for (int j = 0; j < count; j += 4, k += 16) {
    Vector pixels_a = load2(p[0] + 4 * j, p[1] + 4 * j), pixels_b = load2(p[2] + 4 * j, p[3] + 4 * j);
    add(&a, _mm256_shuffle_epi8(pixels_a, taps01), _mm256_shuffle_epi8(pixels_a, taps23), k);
    add(&b, _mm256_shuffle_epi8(pixels_b, taps01), _mm256_shuffle_epi8(pixels_b, taps23), k);
  }
  Vector words = _mm256_packs_epi32(total(&a), total(&b)), bytes = _mm256_packus_epi16(words, words); /* rows 0 2 0 2 | 1 3 1 3 */
  uint64_t even = (uint64_t)_mm256_extract_epi64(bytes, 0), odd = (uint64_t)_mm256_extract_epi64(bytes, 2);
  uint32_t pixel[4] = {(uint32_t)even, (uint32_t)odd, (uint32_t)(even >> 32), (uint32_t)(odd >> 32)};
  for (int i = 0; i < 4; i++) memcpy(out[i], &pixel[i], 4);
}

/* Resize rows of 4 bytes a pixel to rows of 3; the byte behind a row is overwritten. */
static void resize_width(const u8 *from, size_t stride, int rows, const Weights *w, u8 *to, size_t to_stride) {
  for (int y = 0; y < rows; y += 4) {
    size_t r[4];
    for (int i = 0; i < 4; i++) r[i] = (size_t)(y + i < rows ? y + i : rows - 1); /* the last row again: the same result */
    for (int x = 0; x < w->out; x++) {
      const u8 *p = from + 4 * (size_t)w->first[x];
      u8 *q = to + 3 * (size_t)x;
      const u8 *in[4] = {p + r[0] * stride, p + r[1] * stride, p + r[2] * stride, p + r[3] * stride};
      u8 *out[4] = {q + r[0] * to_stride, q + r[1] * to_stride, q + r[2] * to_stride, q + r[3] * to_stride};
      const int32_t *k = digits_of(w, x);
      if (w->count[x] <= 4) column(in, k, 4, out); /* enlarged: the compiler unrolls this one */
      else column(in, k, w->count[x], out);
    }
  }
}

static inline Vector words_at(const u8 *p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p)); }

/* 16 values of 4 rows, as pairs of words of two rows: 01 and 23, each the first and the second 4 of both lanes. */
static inline void interleave(const u8 *const rows[4], size_t x, Vector out[4]) {
  Vector a = words_at(rows[0] + x), b = words_at(rows[1] + x), c = words_at(rows[2] + x), d = words_at(rows[3] + x);
  out[0] = _mm256_unpacklo_epi16(a, b), out[1] = _mm256_unpacklo_epi16(c, d);
  out[2] = _mm256_unpackhi_epi16(a, b), out[3] = _mm256_unpackhi_epi16(c, d);
}

static inline void store16(u8 *to, size_t inside, const Sums s[2]) {
  Vector words = _mm256_packs_epi32(total(&s[0]), total(&s[1]));
  __m128i out = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  if (inside >= 16) {
    _mm_storeu_si128((__m128i *)to, out);
  } else { /* what lies beyond may be another thread's */
    u8 tail[16];
    _mm_storeu_si128((__m128i *)tail, out);
    memcpy(to, tail, inside);
  }
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
    for (size_t x = 0; x < bytes; x += 16) {
      Vector pixels[4];
      if (w->count[y] <= 4) { /* enlarged: several output rows are made of the same four */
        rows4(from, stride, w, w->first[y], rows);
        interleave(rows, x, pixels);
        for (int row = y; row < end; row++) {
          Sums s[2] = {no_sums(), no_sums()};
          for (int i = 0; i < 2; i++) add(&s[i], pixels[2 * i], pixels[2 * i + 1], digits_of(w, row));
          store16(to + to_stride * (size_t)row + x, bytes - x, s);
        }
      } else {
        Sums s[2] = {no_sums(), no_sums()};
        for (int j = 0; j < w->count[y]; j += 4) {
          rows4(from, stride, w, w->first[y] + j, rows);
          interleave(rows, x, pixels);
          for (int i = 0; i < 2; i++) add(&s[i], pixels[2 * i], pixels[2 * i + 1], digits_of(w, y) + 4 * j);
        }
        store16(to + to_stride * (size_t)y + x, bytes - x, s);
      }
    }
  }
}
