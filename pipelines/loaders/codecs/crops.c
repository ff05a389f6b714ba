/* Crops of stored images: read, compare the CRC32, decode the window of a JPEG, resize it to each view, as Pillow does, bit for bit.
 *
 * One call renders a chunk of images, without Python: ctypes releases Python's lock for its time.
 * Decoding is libjpeg-turbo's (the library that Pillow itself uses), of the rows and columns of the window alone. Resizing
 * is Pillow's src/libImaging/Resample.c: width first, weights of 22 bits, pixels rounded between the passes. The products
 * are summed in 32-bit integers, whose order does not matter: so vectors give the same bits as Pillow's loops.
 */
#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

#include "libjpeg62.h"

enum { BITS = 22, SPLIT = 15, PADDING = 64, CACHED = 512 };
enum { OK = 0, UNREAD = 1, DAMAGED = 2, UNDECODED = 3, NO_MEMORY = 4 };
enum { BICUBIC = 0, BILINEAR = 1 };
enum { STORED_JPEG = 0, STORED_RAW = 1 };

typedef uint8_t u8;

typedef struct { /* weights of one axis: `taps` of each output, a multiple of 4 (those beyond are 0) */
  int in, out, filter, taps;
  int32_t *first, *count; /* [out] first input pixel, and number of weights */
  int32_t *weights;       /* [out][taps] */
  int32_t *split;         /* [out][taps]: of each 4 weights k the int16 pairs k >> 15 and k & 32767: hi01 hi23 lo01 lo23 */
} Weights;

typedef struct { u8 *data; size_t size; } Buffer;

typedef struct {
  struct jpeg_decompress_struct jpeg;
  struct jpeg_error_mgr errors;
  struct jpeg_source_mgr source;
  jmp_buf failed;
  unsigned decoded; /* images so far */
  Buffer file, pixels, between, frame;
  Weights once[2], cached[CACHED];
} Codec;

typedef struct { int64_t fd, offset, size, crc, mode, height, width, top, left, rows, columns, first_crop, crops; } Image;
typedef struct { int64_t row, top, left, height, width, resized_height, resized_width, offset_top, offset_left; } Crop;

static u8 *room(Buffer *buffer, size_t size) {
  size += PADDING; /* vectors read and write beyond the end */
  if (buffer->size < size) {
    free(buffer->data);
    buffer->size = size + size / 4;
    buffer->data = calloc(1, buffer->size);
    if (!buffer->data) buffer->size = 0;
  }
  return buffer->data;
}

/* --- CRC32, zlib's ------------------------------------------------------------------------------------------------ */

static uint32_t crc_table[256];

__attribute__((constructor)) static void make_crc_table(void) {
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; bit++) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
    crc_table[i] = c;
  }
}

static uint32_t crc_bytes(uint32_t crc, const u8 *data, size_t size) {
#if defined(__ARM_FEATURE_CRC32)
  for (; size >= 8; data += 8, size -= 8) { uint64_t word; memcpy(&word, data, 8); crc = __crc32d(crc, word); }
#endif
  while (size--) crc = crc_table[(crc ^ *data++) & 255] ^ (crc >> 8);
  return crc;
}

#if defined(__PCLMUL__) && defined(__AVX2__)
/* Folding by carry-less products: Gopal et al., "Fast CRC computation for generic polynomials using PCLMULQDQ", Intel 2009. */
static uint32_t crc_folded(uint32_t crc, const u8 *data, size_t size) { /* size: a multiple of 16, at least 64 */
  const __m128i by64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), by16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  const __m128i to32 = _mm_set_epi64x(0, 0x0163cd6124), barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  const __m128i low = _mm_setr_epi32(~0, 0, ~0, 0);
  __m128i x[4], product;
  for (int i = 0; i < 4; i++) x[i] = _mm_loadu_si128((const __m128i *)data + i);
  x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)crc));
  for (data += 64, size -= 64; size >= 64; data += 64, size -= 64)
    for (int i = 0; i < 4; i++) {
      product = _mm_xor_si128(_mm_clmulepi64_si128(x[i], by64, 0x00), _mm_clmulepi64_si128(x[i], by64, 0x11));
      x[i] = _mm_xor_si128(product, _mm_loadu_si128((const __m128i *)data + i));
    }
  __m128i y = x[0];
  for (int i = 1; i < 4; i++)
    y = _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(y, by16, 0x00), _mm_clmulepi64_si128(y, by16, 0x11)), x[i]);
  for (; size >= 16; data += 16, size -= 16) {
    product = _mm_xor_si128(_mm_clmulepi64_si128(y, by16, 0x00), _mm_clmulepi64_si128(y, by16, 0x11));
    y = _mm_xor_si128(product, _mm_loadu_si128((const __m128i *)data));
  }
  y = _mm_xor_si128(_mm_srli_si128(y, 8), _mm_clmulepi64_si128(y, by16, 0x10));
  y = _mm_xor_si128(_mm_srli_si128(y, 4), _mm_clmulepi64_si128(_mm_and_si128(y, low), to32, 0x00));
  product = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(y, low), barrett, 0x10), low);
  y = _mm_xor_si128(y, _mm_clmulepi64_si128(product, barrett, 0x00));
  return (uint32_t)_mm_extract_epi32(y, 1);
}
#endif

uint32_t deitfast_crc32(const u8 *data, size_t size) {
  uint32_t crc = ~0u;
#if defined(__PCLMUL__) && defined(__AVX2__)
  if (size >= 64) {
    size_t whole = size & ~(size_t)15;
    crc = crc_folded(crc, data, whole);
    data += whole, size -= whole;
  }
#endif
  return ~crc_bytes(crc, data, size);
}

/* --- decoding ----------------------------------------------------------------------------------------------------- */

static void fail(j_common_ptr jpeg) { longjmp(((Codec *)jpeg->client_data)->failed, 1); }
static void warn(j_common_ptr jpeg, int level) { if (level < 0) fail(jpeg); } /* corrupt data: let Pillow judge it */
static void be_silent(j_common_ptr jpeg) { (void)jpeg; }
static void nothing(j_decompress_ptr jpeg) { (void)jpeg; }
static int no_more(j_decompress_ptr jpeg) { fail((j_common_ptr)jpeg); return 0; } /* the file is cut */
static void skip(j_decompress_ptr jpeg, long bytes) {
  if (bytes <= 0) return;
  if ((size_t)bytes > jpeg->src->bytes_in_buffer) fail((j_common_ptr)jpeg);
  jpeg->src->next_input_byte += bytes;
  jpeg->src->bytes_in_buffer -= (size_t)bytes;
}

/* Decode a window to 4 bytes a pixel (the last one undefined): *pixels is its first pixel, *stride the bytes of a row. */
static int decode(Codec *codec, const u8 *data, const Image *image, u8 **pixels, size_t *stride) {
  struct jpeg_decompress_struct *jpeg = &codec->jpeg;
  codec->source.next_input_byte = data;
  codec->source.bytes_in_buffer = (size_t)image->size;
  codec->errors.num_warnings = 0;
  if (setjmp(codec->failed)) {
    jpeg_abort_decompress(jpeg);
    return UNDECODED;
  }
  if (++codec->decoded % 64 == 0) { /* frees the tables that were dropped; each time it would cost 14 us */
    jpeg_destroy_decompress(jpeg);
    jpeg_CreateDecompress(jpeg, 62, sizeof *jpeg);
    jpeg->src = &codec->source;
  }
  for (int i = 0; i < 4; i++) /* else a damaged file without tables is decoded with those of the file before it */
    jpeg->quant_tbl_ptrs[i] = jpeg->dc_huff_tbl_ptrs[i] = jpeg->ac_huff_tbl_ptrs[i] = NULL;
  int found = jpeg_read_header(jpeg, 1), space = jpeg->jpeg_color_space;
  int known = space == JCS_YCbCr || space == JCS_GRAYSCALE || space == JCS_RGB;
  if (!jpeg->progressive_mode && jpeg->comps_in_scan < jpeg->num_components) known = 0; /* a color may be missing */
  if (found != JPEG_HEADER_OK || !known || jpeg->image_height != image->height || jpeg->image_width != image->width) {
    jpeg_abort_decompress(jpeg);
    return UNDECODED;
  }
  jpeg->out_color_space = JCS_EXT_RGBX;
  jpeg->dct_method = JDCT_ISLOW;
  jpeg->do_fancy_upsampling = 1;
  jpeg_start_decompress(jpeg);
  /* A progressive file without its last scans is smoothed from block to block, other than where only a part is decoded. */
  for (int i = 0; jpeg->coef_bits && i < 64 * jpeg->num_components; i++)
    if (jpeg->coef_bits[0][i]) fail((j_common_ptr)jpeg);
  /* Chroma is interpolated: the outermost columns of what is decoded lack a neighbor, so decode one more on each side;
   * and libjpeg does not interpolate fewer than three columns of chroma, so decode sixteen where the image has them. */
  unsigned first = image->left > 0 ? (unsigned)image->left - 1 : 0, end = (unsigned)(image->left + image->columns + 1);
  if (end < first + 16) end = first + 16;
  if (end > jpeg->image_width) end = jpeg->image_width;
  if (end < first + 16) first = end > 16 ? end - 16 : 0;
  unsigned columns = end - first;
  if (columns < jpeg->image_width) jpeg_crop_scanline(jpeg, &first, &columns);
  *stride = (size_t)jpeg->output_width * 4;
  u8 *out = room(&codec->pixels, *stride * (size_t)(image->rows + 1));
  if (!out) {
    jpeg_abort_decompress(jpeg);
    return NO_MEMORY;
  }
  if (image->top > 0) jpeg_skip_scanlines(jpeg, (unsigned)image->top);
  while (jpeg->output_scanline < image->top + image->rows) {
    u8 *row = out + *stride * (jpeg->output_scanline - (size_t)image->top);
    jpeg_read_scanlines(jpeg, &row, 1);
  }
  jpeg_abort_decompress(jpeg);
  *pixels = out + 4 * (size_t)(image->left - first);
  return OK;
}

/* Copy a window of raw pixels, 3 bytes each, to 4 bytes each. */
static int expand(Codec *codec, const u8 *data, size_t row_bytes, const Image *image, u8 **pixels, size_t *stride) {
  *stride = (size_t)image->columns * 4;
  u8 *out = *pixels = room(&codec->pixels, *stride * (size_t)image->rows);
  if (!out) return NO_MEMORY;
  for (int64_t y = 0; y < image->rows; y++) {
    const u8 *from = data + row_bytes * (size_t)(image->top + y) + 3 * (size_t)image->left;
    for (int64_t x = 0; x < image->columns; x++, from += 3, out += 4) out[0] = from[0], out[1] = from[1], out[2] = from[2];
  }
  return OK;
}

/* --- resizing ----------------------------------------------------------------------------------------------------- */

static double bicubic(double x) {
  x = fabs(x);
  double near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1, far = (((x - 5) * x + 8) * x - 4) * -0.5;
  return x < 1.0 ? near : x < 2.0 ? far : 0.0;
}

static double bilinear(double x) { x = fabs(x); return x < 1.0 ? 1.0 - x : 0.0; }

static void release(Weights *w) {
  free(w->first);
  memset(w, 0, sizeof *w);
}

/* Pillow's precompute_coeffs and normalize_coeffs_8bpc. */
static int compute(Weights *w, int in, int out, int filter) {
  double scale = (double)in / out, stretch = scale < 1.0 ? 1.0 : scale, support = (filter == BICUBIC ? 2.0 : 1.0) * stretch;
  int taps = ((int)ceil(support) * 2 + 1 + 3) & ~3;
  release(w);
  int32_t *all = malloc(sizeof(int32_t) * (size_t)out * (2 + 2 * (size_t)taps));
  double *raw = malloc(sizeof(double) * (size_t)taps);
  if (!all || !raw) {
    free(all), free(raw);
    return NO_MEMORY;
  }
  *w = (Weights){in, out, filter, taps, all, all + out, all + 2 * (size_t)out, all + (2 + (size_t)taps) * (size_t)out};
  for (int i = 0; i < out; i++) {
    double center = (i + 0.5) * scale, sum = 0.0, inverse = 1.0 / stretch;
    int first = (int)(center - support + 0.5), end = (int)(center + support + 0.5);
    if (first < 0) first = 0;
    if (end > in) end = in;
    int count = end - first;
    if (filter == BICUBIC)
      for (int j = 0; j < count; j++) raw[j] = bicubic((j + first - center + 0.5) * inverse);
    else
      for (int j = 0; j < count; j++) raw[j] = bilinear((j + first - center + 0.5) * inverse);
    for (int j = 0; j < count; j++) sum += raw[j];
    int32_t *k = w->weights + (size_t)i * taps, *split = w->split + (size_t)i * taps;
    for (int j = 0; j < taps; j++) {
      double weight = j >= count ? 0.0 : sum != 0.0 ? raw[j] / sum : raw[j];
      k[j] = j >= count ? 0 : (int)((weight < 0 ? -0.5 : 0.5) + weight * (1 << BITS));
    }
    for (int j = 0; j < taps; j += 4)
      for (int pair = 0; pair < 2; pair++) {
        uint32_t a = (uint32_t)k[j + 2 * pair], b = (uint32_t)k[j + 2 * pair + 1];
        split[j + pair] = (int32_t)(((a >> SPLIT) & 0xFFFF) | ((b >> SPLIT) << 16));
        split[j + 2 + pair] = (int32_t)((a & 0x7FFF) | ((b & 0x7FFF) << 16));
      }
    w->first[i] = first, w->count[i] = count;
  }
  free(raw);
  return OK;
}

/* Return the weights of an axis; those of small inputs are kept, as crops of a data set repeat their sizes. */
static const Weights *weights(Codec *codec, int in, int out, int filter, int axis) {
  Weights *w = in < CACHED && out <= CACHED ? &codec->cached[in] : &codec->once[axis];
  if (w->in != in || w->out != out || w->filter != filter || !w->first)
    if (compute(w, in, out, filter)) return NULL;
  return w;
}

#if defined(__AVX2__)
typedef __m256i Ints;

static inline Ints pair(int32_t weights) { return _mm256_set1_epi32(weights); }

/* sums + the products of int16 pairs */
static inline Ints add_products(Ints sums, Ints pixels, Ints weights) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpwssd_epi32(sums, pixels, weights);
#else
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pixels, weights));
#endif
}

/* (high x 2^15 + low) >> 22; `low` begins with the half that rounds */
static inline Ints total(Ints high, Ints low) {
  return _mm256_srai_epi32(_mm256_add_epi32(high, _mm256_srai_epi32(low, SPLIT)), BITS - SPLIT);
}

static inline Ints load2(const u8 *a, const u8 *b) {
  Ints first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)a));
  return _mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i *)b), 1);
}

/* One output column of four rows, 4 bytes a pixel in, 3 words a pixel out (the fourth is overwritten by the next pixel). */
static inline void column(const u8 *const p[4], const int32_t *k, int count, int16_t *const out[4]) {
  const Ints taps01 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
  const Ints taps23 = _mm256_broadcastsi128_si256(_mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
  Ints high_a = _mm256_setzero_si256(), high_b = high_a, low_a = _mm256_set1_epi32(1 << (BITS - 1)), low_b = low_a;
  for (int j = 0; j < count; j += 4) {
    Ints a = load2(p[0] + 4 * j, p[1] + 4 * j), b = load2(p[2] + 4 * j, p[3] + 4 * j);
    Ints a01 = _mm256_shuffle_epi8(a, taps01), a23 = _mm256_shuffle_epi8(a, taps23);
    Ints b01 = _mm256_shuffle_epi8(b, taps01), b23 = _mm256_shuffle_epi8(b, taps23);
    Ints high01 = pair(k[j]), high23 = pair(k[j + 1]), low01 = pair(k[j + 2]), low23 = pair(k[j + 3]);
    high_a = add_products(add_products(high_a, a01, high01), a23, high23);
    high_b = add_products(add_products(high_b, b01, high01), b23, high23);
    low_a = add_products(add_products(low_a, a01, low01), a23, low23);
    low_b = add_products(add_products(low_b, b01, low01), b23, low23);
  }
  Ints words = _mm256_packs_epi32(total(high_a, low_a), total(high_b, low_b)); /* rows 0 2 | 1 3 */
  words = _mm256_min_epi16(_mm256_max_epi16(words, _mm256_setzero_si256()), _mm256_set1_epi16(255));
  __m128i even = _mm256_castsi256_si128(words), odd = _mm256_extracti128_si256(words, 1);
  _mm_storel_epi64((__m128i *)out[0], even);
  _mm_storel_epi64((__m128i *)out[1], odd);
  _mm_storeh_pd((double *)out[2], _mm_castsi128_pd(even));
  _mm_storeh_pd((double *)out[3], _mm_castsi128_pd(odd));
}

/* 16 values of one output row, from words. */
static inline Ints values(const int16_t *p, size_t stride, const int32_t *k, int count) {
  Ints high_a = _mm256_setzero_si256(), high_b = high_a, low_a = _mm256_set1_epi32(1 << (BITS - 1)), low_b = low_a;
  for (int j = 0; j < count; j += 4)
    for (int half = 0; half < 2; half++) {
      int row = j + 2 * half, last = count - 1; /* beyond the last row the weights are 0 */
      Ints a = _mm256_loadu_si256((const Ints *)(p + stride * (size_t)(row < last ? row : last)));
      Ints b = _mm256_loadu_si256((const Ints *)(p + stride * (size_t)(row + 1 < last ? row + 1 : last)));
      Ints first = _mm256_unpacklo_epi16(a, b), second = _mm256_unpackhi_epi16(a, b);
      Ints high = pair(k[j + half]), low = pair(k[j + 2 + half]);
      high_a = add_products(high_a, first, high), high_b = add_products(high_b, second, high);
      low_a = add_products(low_a, first, low), low_b = add_products(low_b, second, low);
    }
  return _mm256_packs_epi32(total(high_a, low_a), total(high_b, low_b)); /* in the order of the input */
}

static inline void row_of_values(const int16_t *p, size_t stride, const int32_t *k, int count, u8 *to, size_t bytes) {
  for (size_t x = 0; x < bytes; x += 32) {
    Ints a = values(p + x, stride, k, count), b = values(p + x + 16, stride, k, count);
    Ints out = _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xD8);
    if (x + 32 <= bytes) {
      _mm256_storeu_si256((Ints *)(to + x), out);
    } else { /* what lies beyond may be another thread's */
      u8 tail[32];
      _mm256_storeu_si256((Ints *)tail, out);
      memcpy(to + x, tail, bytes - x);
    }
  }
}
#else
static int32_t clipped(int32_t sum) {
  sum >>= BITS;
  return sum < 0 ? 0 : sum > 255 ? 255 : sum;
}
#endif

/* Resize rows of 4 bytes a pixel to rows of 3 words. */
static void resize_width(const u8 *from, size_t stride, int rows, const Weights *w, int16_t *to, size_t to_stride) {
#if defined(__AVX2__)
  for (int y = 0; y < rows; y += 4) {
    size_t r[4];
    for (int i = 0; i < 4; i++) r[i] = (size_t)(y + i < rows ? y + i : rows - 1); /* the last row again: the same result */
    for (int x = 0; x < w->out; x++) {
      const u8 *p = from + 4 * (size_t)w->first[x];
      int16_t *q = to + 3 * (size_t)x;
      const u8 *in[4] = {p + r[0] * stride, p + r[1] * stride, p + r[2] * stride, p + r[3] * stride};
      int16_t *out[4] = {q + r[0] * to_stride, q + r[1] * to_stride, q + r[2] * to_stride, q + r[3] * to_stride};
      const int32_t *k = w->split + (size_t)x * w->taps;
      if (w->count[x] <= 4) column(in, k, 4, out); /* enlarged: the compiler unrolls this one */
      else column(in, k, w->count[x], out);
    }
  }
#else
  for (int y = 0; y < rows; y++)
    for (int x = 0; x < w->out; x++) {
      const u8 *p = from + (size_t)y * stride + 4 * (size_t)w->first[x];
      const int32_t *k = w->weights + (size_t)x * w->taps;
      int32_t sum[4] = {1 << (BITS - 1), 1 << (BITS - 1), 1 << (BITS - 1), 0};
      for (int j = 0; j < w->count[x]; j++)
        for (int channel = 0; channel < 4; channel++) sum[channel] += p[4 * j + channel] * k[j];
      for (int channel = 0; channel < 3; channel++) to[(size_t)y * to_stride + 3 * (size_t)x + channel] = (int16_t)clipped(sum[channel]);
    }
#endif
}

/* Resize columns of words to bytes; a row has `bytes` values, and padding in `from`. */
static void resize_height(const int16_t *from, size_t stride, const Weights *w, u8 *to, size_t to_stride, size_t bytes) {
  for (int y = 0; y < w->out; y++, to += to_stride) {
    const int16_t *p = from + stride * (size_t)w->first[y];
#if defined(__AVX2__)
    const int32_t *k = w->split + (size_t)y * w->taps;
    if (w->count[y] == 4) row_of_values(p, stride, k, 4, to, bytes);
    else row_of_values(p, stride, k, w->count[y], to, bytes);
#else
    const int32_t *k = w->weights + (size_t)y * w->taps;
    for (size_t x = 0; x < bytes; x++) {
      int32_t sum = 1 << (BITS - 1);
      for (int j = 0; j < w->count[y]; j++) sum += p[stride * (size_t)j + x] * k[j];
      to[x] = (u8)clipped(sum);
    }
#endif
  }
}

/* Resize 4 bytes a pixel, [rows][columns], to 3, [height][width]. */
static int resize(Codec *codec, const u8 *from, size_t stride, int rows, int columns, u8 *to, size_t to_stride, int height, int width, int filter) {
  if (height == rows && width == columns) { /* a copy */
    for (int y = 0; y < rows; y++, from += stride, to += to_stride)
      for (int x = 0; x < columns; x++) memcpy(to + 3 * x, from + 4 * (size_t)x, 3);
    return OK;
  }
  size_t values = 3 * (size_t)width, between_stride = values + 32;
  int16_t *between = (int16_t *)room(&codec->between, 2 * between_stride * (size_t)rows);
  if (!between) return NO_MEMORY;
  if (width != columns) {
    const Weights *across = weights(codec, columns, width, filter, 0);
    if (!across) return NO_MEMORY;
    resize_width(from, stride, rows, across, between, between_stride);
  } else {
    for (int y = 0; y < rows; y++)
      for (size_t x = 0; x < values; x++) between[between_stride * (size_t)y + x] = from[stride * (size_t)y + x / 3 * 4 + x % 3];
  }
  if (height != rows) {
    const Weights *down = weights(codec, rows, height, filter, 1);
    if (!down) return NO_MEMORY;
    resize_height(between, between_stride, down, to, to_stride, values);
  } else {
    for (int y = 0; y < rows; y++)
      for (size_t x = 0; x < values; x++) to[to_stride * (size_t)y + x] = (u8)between[between_stride * (size_t)y + x];
  }
  return OK;
}

/* Write a view to its row of the batch, which must be black where the view does not reach. */
static int render_crop(Codec *codec, const u8 *pixels, size_t stride, const Crop *crop, u8 *out, int side, int filter) {
  const u8 *from = pixels + stride * (size_t)crop->top + 4 * (size_t)crop->left;
  int rows = (int)crop->height, columns = (int)crop->width, height = (int)crop->resized_height, width = (int)crop->resized_width;
  size_t out_stride = 3 * (size_t)side;
  out += out_stride * (size_t)side * (size_t)crop->row;
  if (height == side && width == side && !crop->offset_top && !crop->offset_left)
    return resize(codec, from, stride, rows, columns, out, out_stride, height, width, filter);
  size_t frame_stride = 3 * (size_t)width;
  u8 *frame = room(&codec->frame, frame_stride * (size_t)height);
  if (!frame) return NO_MEMORY;
  int status = resize(codec, from, stride, rows, columns, frame, frame_stride, height, width, filter);
  if (status) return status;
  int64_t x0 = crop->offset_left > 0 ? crop->offset_left : 0, x1 = crop->offset_left + side < width ? crop->offset_left + side : width;
  for (int64_t y = crop->offset_top > 0 ? crop->offset_top : 0; x0 < x1 && y < height && y < crop->offset_top + side; y++)
    memcpy(out + out_stride * (size_t)(y - crop->offset_top) + 3 * (size_t)(x0 - crop->offset_left), frame + frame_stride * (size_t)y + 3 * (size_t)x0, 3 * (size_t)(x1 - x0));
  return OK;
}

/* --- what Python calls -------------------------------------------------------------------------------------------- */

static int start(Codec *codec) {
  codec->jpeg.err = jpeg_std_error(&codec->errors);
  codec->errors.error_exit = fail, codec->errors.emit_message = warn, codec->errors.output_message = be_silent;
  codec->jpeg.client_data = codec;
  if (setjmp(codec->failed)) return 0; /* a library of another version */
  jpeg_CreateDecompress(&codec->jpeg, 62, sizeof codec->jpeg);
  codec->jpeg.client_data = codec;
  codec->source = (struct jpeg_source_mgr){NULL, 0, nothing, no_more, skip, jpeg_resync_to_restart, nothing};
  codec->jpeg.src = &codec->source;
  return 1;
}

Codec *deitfast_codec_new(void) {
  Codec *codec = calloc(1, sizeof *codec);
  if (codec && start(codec)) return codec;
  free(codec);
  return NULL;
}

void deitfast_codec_free(Codec *codec) {
  jpeg_destroy_decompress(&codec->jpeg);
  free(codec->file.data), free(codec->pixels.data), free(codec->between.data), free(codec->frame.data);
  for (int i = 0; i < 2; i++) release(&codec->once[i]);
  for (int i = 0; i < CACHED; i++) release(&codec->cached[i]);
  free(codec);
}

static int read_file(Codec *codec, const Image *image) {
  if (image->fd < 0 || image->size <= 0 || !room(&codec->file, (size_t)image->size)) return UNREAD;
  for (int64_t done = 0; done < image->size;) {
    ssize_t got = pread((int)image->fd, codec->file.data + done, (size_t)(image->size - done), image->offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return UNREAD;
    done += got;
  }
  return OK;
}

/* Render `count` images' crops to `out`, uint8 [B][side][side][3]; `statuses` says of each image whether that was done. */
void deitfast_render(Codec *codec, const Image *images, int64_t count, const Crop *crops, u8 *out, int side, int filter, int check, int32_t *statuses) {
  for (int64_t i = 0; i < count; i++) {
    const Image *image = &images[i];
    u8 *pixels = NULL;
    size_t stride = 0;
    int status = read_file(codec, image);
    if (!status && check && image->crc >= 0 && deitfast_crc32(codec->file.data, (size_t)image->size) != (uint32_t)image->crc) status = DAMAGED;
    if (!status)
      status = image->mode == STORED_JPEG ? decode(codec, codec->file.data, image, &pixels, &stride)
                                          : expand(codec, codec->file.data, 3 * (size_t)image->width, image, &pixels, &stride);
    for (int64_t j = 0; !status && j < image->crops; j++)
      status = render_crop(codec, pixels, stride, &crops[image->first_crop + j], out, side, filter);
    statuses[i] = status;
  }
}

/* Decode a window of a JPEG in memory to `out`, uint8 [rows][columns][3]. */
int deitfast_decode(Codec *codec, const u8 *data, const Image *image, u8 *out) {
  u8 *pixels = NULL;
  size_t stride = 0;
  int status = decode(codec, data, image, &pixels, &stride), rows = (int)image->rows, columns = (int)image->columns;
  return status ? status : resize(codec, pixels, stride, rows, columns, out, 3 * (size_t)columns, rows, columns, BICUBIC);
}

/* Resize uint8 [rows][columns][3], whose rows are row_bytes apart, to uint8 [height][width][3]. */
int deitfast_resize(Codec *codec, const u8 *data, int64_t row_bytes, int rows, int columns, u8 *out, int height, int width, int filter) {
  Image image = {.rows = rows, .columns = columns};
  u8 *pixels = NULL;
  size_t stride = 0;
  int status = expand(codec, data, (size_t)row_bytes, &image, &pixels, &stride);
  return status ? status : resize(codec, pixels, stride, rows, columns, out, 3 * (size_t)width, height, width, filter);
}
