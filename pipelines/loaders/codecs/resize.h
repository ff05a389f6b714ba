/* Pillow's resize of 8-bit pixels, bit for bit: src/libImaging/Resample.c.
 *
 * Width first, weights of 22 bits, pixels rounded between the passes. The products are summed in 32-bit integers, whose
 * order does not matter: so vectors give the same bits as Pillow's loops. They multiply what a processor multiplies best,
 * bytes (AVX-512 VNNI) or words (AVX2): each weight is cut into such digits, and the digits' sums are shifted together.
 */
#ifndef DEITFAST_RESIZE_H
#define DEITFAST_RESIZE_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BITS = 22, HALF = 1 << (BITS - 1), PADDING = 64, CACHED = 512 };
enum { OK = 0, UNREAD = 1, DAMAGED = 2, UNDECODED = 3, NO_MEMORY = 4 };
enum { BICUBIC = 0, BILINEAR = 1 };

typedef uint8_t u8;

typedef struct { u8 *data; size_t size; } Buffer;

/* Weights of one axis. Outputs are taken four at a time, and weights as well: those beyond the last are 0. */
typedef struct {
  int in, out, filter, taps; /* taps: of each output, a multiple of 4 */
  int32_t *first, *count;    /* [out rounded up to 4] first input pixel, and number of weights */
  int32_t *weights;          /* [out][taps] */
  int32_t *digits;           /* [out / 4][taps / 4][digit][4 outputs]: what `vectors` takes for 4 weights of an output */
} Weights;

typedef struct { Weights once[2], cached[CACHED]; Buffer between; } Resizer;

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

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "resize_avx512.h"
#elif defined(__AVX2__)
#include "resize_avx2.h"
#else
#include "resize_plain.h"
#endif

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
  int most = (int)ceil(support) * 2 + 1, taps = (most + 3) & ~3;
  size_t outputs = ((size_t)out + 3) & ~(size_t)3;
  release(w);
  int32_t *all = calloc(outputs * (2 + (size_t)taps + (size_t)taps / 4 * DIGITS), sizeof(int32_t));
  double *raw = malloc(sizeof(double) * (size_t)most);
  if (!all || !raw) {
    free(all), free(raw);
    return NO_MEMORY;
  }
  *w = (Weights){in, out, filter, taps, all, all + outputs, all + 2 * outputs, all + (2 + (size_t)taps) * outputs};
  for (int i = 0; i < (int)outputs; i++) {
    double center = (i + 0.5) * scale, sum = 0.0, inverse = 1.0 / stretch;
    int first = (int)(center - support + 0.5), end = (int)(center + support + 0.5);
    if (first < 0) first = 0;
    if (end > in) end = in;
    int count = end - first;
    w->first[i] = i < out ? first : w->first[i - 1], w->count[i] = i < out ? count : 0;
    if (i >= out) continue;
    if (filter == BICUBIC)
      for (int j = 0; j < count; j++) raw[j] = bicubic((j + first - center + 0.5) * inverse);
    else
      for (int j = 0; j < count; j++) raw[j] = bilinear((j + first - center + 0.5) * inverse);
    for (int j = 0; j < count; j++) sum += raw[j];
    int32_t *k = w->weights + (size_t)i * (size_t)taps;
    for (int j = 0; j < count; j++) {
      double weight = sum != 0.0 ? raw[j] / sum : raw[j];
      k[j] = (int)((weight < 0 ? -0.5 : 0.5) + weight * (1 << BITS));
    }
    for (int j = 0; j < taps; j += 4) cut(k + j, w->digits + (size_t)(i / 4 * (taps / 4) + j / 4) * 4 * DIGITS + i % 4);
  }
  free(raw);
  return OK;
}

/* Return the weights of an axis; those of small inputs are kept, as crops of a data set repeat their sizes. */
static const Weights *weights(Resizer *resizer, int in, int out, int filter, int axis) {
  Weights *w = in < CACHED && out <= CACHED ? &resizer->cached[in] : &resizer->once[axis];
  if (w->in != in || w->out != out || w->filter != filter || !w->first)
    if (compute(w, in, out, filter)) return NULL;
  return w;
}

static void without_fourth(const u8 *from, size_t stride, int rows, int columns, u8 *to, size_t to_stride) {
  for (int y = 0; y < rows; y++, from += stride, to += to_stride)
    for (int x = 0; x < columns; x++) memcpy(to + 3 * (size_t)x, from + 4 * (size_t)x, 3);
}

/* Resize 4 bytes a pixel, [rows][columns], to 3, [height][width]. */
static int resize(Resizer *resizer, const u8 *from, size_t stride, int rows, int columns, u8 *to, size_t to_stride, int height, int width, int filter) {
  u8 *between = to;
  size_t between_stride = to_stride, values = 3 * (size_t)width;
  if (width != columns || height != rows) { /* resize_width writes beyond a row's end */
    between_stride = values + PADDING;
    between = room(&resizer->between, between_stride * (size_t)rows);
    if (!between) return NO_MEMORY;
  }
  if (width != columns) {
    const Weights *across = weights(resizer, columns, width, filter, 0);
    if (!across) return NO_MEMORY;
    resize_width(from, stride, rows, across, between, between_stride);
  } else {
    without_fourth(from, stride, rows, columns, between, between_stride);
  }
  if (height != rows) { /* these weights may take the place of those */
    const Weights *down = weights(resizer, rows, height, filter, 1);
    if (!down) return NO_MEMORY;
    resize_height(between, between_stride, down, to, to_stride, values);
  } else if (width != columns) {
    for (int y = 0; y < rows; y++) memcpy(to + to_stride * (size_t)y, between + between_stride * (size_t)y, values);
  }
  return OK;
}

static void release_resizer(Resizer *resizer) {
  free(resizer->between.data);
  for (int i = 0; i < 2; i++) release(&resizer->once[i]);
  for (int i = 0; i < CACHED; i++) release(&resizer->cached[i]);
}
#endif
