/* Crops of stored images: read, compare the CRC32, decode the window of a JPEG, resize it to each view, as Pillow does, bit for bit.
 *
 * One call renders a chunk of images, without Python: ctypes releases Python's lock for its time.
 * Decoding is libjpeg-turbo's (the library that Pillow itself uses), of the rows and columns of the window alone.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "crc32.h"
#include "libjpeg62.h"
#include "resize.h"

enum { STORED_JPEG = 0, STORED_RAW = 1, BEHIND = 6144, ROWS = 16, TABLES = 8192 };

typedef struct {
  struct jpeg_decompress_struct jpeg;
  struct jpeg_error_mgr errors;
  struct jpeg_source_mgr source;
  jmp_buf failed;
  void *(*alloc_small)(j_common_ptr, int, size_t); /* libjpeg's own */
  _Alignas(16) u8 tables[TABLES]; /* one image's */
  size_t tables_used;
  Buffer file, pixels, frame;
  Resizer resizer;
} Codec;

typedef struct { int64_t fd, offset, size, crc, mode, height, width, top, left, rows, columns, first_crop, crops; } Image;
typedef struct { int64_t row, top, left, height, width, resized_height, resized_width, offset_top, offset_left; } Crop;

/* --- decoding ----------------------------------------------------------------------------------------------------- */

static void fail(j_common_ptr jpeg) { longjmp(((Codec *)jpeg->client_data)->failed, 1); }
static void warn(j_common_ptr jpeg, int level) { if (level < 0) fail(jpeg); } /* corrupt data: let Pillow judge it */
static void be_silent(j_common_ptr jpeg) { (void)jpeg; }
static void nothing(j_decompress_ptr jpeg) { (void)jpeg; }
static int no_more(j_decompress_ptr jpeg) { fail((j_common_ptr)jpeg); return 0; }
static void skip(j_decompress_ptr jpeg, long bytes) {
  if (bytes <= 0) return;
  if ((size_t)bytes > jpeg->src->bytes_in_buffer) fail((j_common_ptr)jpeg);
  jpeg->src->next_input_byte += bytes;
  jpeg->src->bytes_in_buffer -= (size_t)bytes;
}

/* Put end markers behind the file: libjpeg-turbo's fast Huffman decoder wants 512 bytes more for each block of an MCU,
 * of which there are 10 at most, and would leave the last 3 KB, which may be all of a small file, to the slow one. */
static void put_end(u8 *behind) {
  uint64_t markers;
  memcpy(&markers, "\xFF\xD9\xFF\xD9\xFF\xD9\xFF\xD9", 8);
  for (size_t i = 0; i < BEHIND; i += 8) memcpy(behind + i, &markers, 8);
}

/* Quantization and Huffman tables are all that libjpeg keeps from image to image. As they are dropped, so is their memory:
 * it would grow otherwise, and to make the decoder anew costs 14 us. */
static void *alloc_small(j_common_ptr jpeg, int pool, size_t size) {
  Codec *codec = jpeg->client_data;
  size_t rounded = (size + 15) & ~(size_t)15;
  if (pool != JPOOL_PERMANENT || rounded > TABLES - codec->tables_used) return codec->alloc_small(jpeg, pool, size);
  codec->tables_used += rounded;
  return codec->tables + codec->tables_used - rounded;
}

/* Decode a window to 4 bytes a pixel (the last one undefined): *pixels is its first pixel, *stride the bytes of a row.
 * The file is in codec->file. */
static int decode(Codec *codec, const Image *image, u8 **pixels, size_t *stride) {
  struct jpeg_decompress_struct *jpeg = &codec->jpeg;
  put_end(codec->file.data + image->size);
  codec->source.next_input_byte = codec->file.data;
  codec->source.bytes_in_buffer = (size_t)image->size + BEHIND;
  codec->errors.num_warnings = 0;
  if (setjmp(codec->failed)) {
    jpeg_abort_decompress(jpeg);
    return UNDECODED;
  }
  for (int i = 0; i < 4; i++) /* else a damaged file without tables is decoded with those of the file before it */
    jpeg->quant_tbl_ptrs[i] = jpeg->dc_huff_tbl_ptrs[i] = jpeg->ac_huff_tbl_ptrs[i] = NULL;
  codec->tables_used = 0;
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
    if (jpeg->coef_bits[i / 64][i % 64]) fail((j_common_ptr)jpeg);
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
  for (int64_t done = 0; (done = (int64_t)jpeg->output_scanline - image->top) < image->rows;) {
    u8 *rows[ROWS];
    int64_t wanted = image->rows - done < ROWS ? image->rows - done : ROWS;
    for (int64_t i = 0; i < wanted; i++) rows[i] = out + *stride * (size_t)(done + i);
    jpeg_read_scanlines(jpeg, rows, (unsigned)wanted);
  }
  if (codec->source.bytes_in_buffer < BEHIND) fail((j_common_ptr)jpeg); /* the file is cut: let Pillow judge it */
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

/* Write a view to its row of the batch, which must be black where the view does not reach. */
static int render_crop(Codec *codec, const u8 *pixels, size_t stride, const Crop *crop, u8 *out, int side, int filter) {
  const u8 *from = pixels + stride * (size_t)crop->top + 4 * (size_t)crop->left;
  int rows = (int)crop->height, columns = (int)crop->width, height = (int)crop->resized_height, width = (int)crop->resized_width;
  size_t out_stride = 3 * (size_t)side;
  out += out_stride * (size_t)side * (size_t)crop->row;
  if (height == side && width == side && !crop->offset_top && !crop->offset_left)
    return resize(&codec->resizer, from, stride, rows, columns, out, out_stride, height, width, filter);
  size_t frame_stride = 3 * (size_t)width;
  u8 *frame = room(&codec->frame, frame_stride * (size_t)height);
  if (!frame) return NO_MEMORY;
  int status = resize(&codec->resizer, from, stride, rows, columns, frame, frame_stride, height, width, filter);
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
  codec->alloc_small = codec->jpeg.mem->alloc_small, codec->jpeg.mem->alloc_small = alloc_small;
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
  free(codec->file.data), free(codec->pixels.data), free(codec->frame.data);
  release_resizer(&codec->resizer);
  free(codec);
}

static int read_file(Codec *codec, const Image *image) {
  if (image->fd < 0 || image->size <= 0 || !room(&codec->file, (size_t)image->size + BEHIND)) return UNREAD;
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
    if (!status && check && image->crc >= 0 && crc32_of(codec->file.data, (size_t)image->size) != (uint32_t)image->crc) status = DAMAGED;
    if (!status)
      status = image->mode == STORED_JPEG ? decode(codec, image, &pixels, &stride)
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
  if (!room(&codec->file, (size_t)image->size + BEHIND)) return NO_MEMORY;
  memcpy(codec->file.data, data, (size_t)image->size);
  int status = decode(codec, image, &pixels, &stride), rows = (int)image->rows, columns = (int)image->columns;
  return status ? status : resize(&codec->resizer, pixels, stride, rows, columns, out, 3 * (size_t)columns, rows, columns, BICUBIC);
}

/* Resize uint8 [rows][columns][3], whose rows are row_bytes apart, to uint8 [height][width][3]. */
int deitfast_resize(Codec *codec, const u8 *data, int64_t row_bytes, int rows, int columns, u8 *out, int height, int width, int filter) {
  Image image = {.rows = rows, .columns = columns};
  u8 *pixels = NULL;
  size_t stride = 0;
  int status = expand(codec, data, (size_t)row_bytes, &image, &pixels, &stride);
  return status ? status : resize(&codec->resizer, pixels, stride, rows, columns, out, 3 * (size_t)width, height, width, filter);
}

uint32_t deitfast_crc32(const u8 *data, size_t size) { return crc32_of(data, size); }
