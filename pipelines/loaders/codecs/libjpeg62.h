/* What this project uses of libjpeg's interface, version 6.2 of its ABI, as libjpeg-turbo 2 and 3 keep it (libjpeg.so.62).
 *
 * Taken from jpeglib.h: Copyright (C) 1991-1998, Thomas G. Lane; Copyright (C) 2009-2024, D. R. Commander and others.
 * This software is based in part on the work of the Independent JPEG Group.
 *
 * It is here so that a compiler is all that a machine needs: the library itself is the one that Pillow brought along.
 * jpeg_CreateDecompress compares its size of the structure with ours, and refuses another version.
 */
#ifndef LIBJPEG62_H
#define LIBJPEG62_H
#include <stddef.h>

typedef struct jpeg_common_struct *j_common_ptr;
typedef struct jpeg_decompress_struct *j_decompress_ptr;

enum { JCS_GRAYSCALE = 1, JCS_YCbCr = 3, JCS_RGB = 2, JCS_EXT_RGBX = 7 };
enum { JDCT_ISLOW = 0 };
enum { JPEG_HEADER_OK = 1 };
enum { JPOOL_PERMANENT = 0 };

struct jpeg_error_mgr {
  void (*error_exit)(j_common_ptr);
  void (*emit_message)(j_common_ptr, int);
  void (*output_message)(j_common_ptr);
  void (*format_message)(j_common_ptr, char *);
  void (*reset_error_mgr)(j_common_ptr);
  int msg_code;
  union { int i[8]; char s[80]; } msg_parm;
  int trace_level;
  long num_warnings;
  const char *const *jpeg_message_table;
  int last_jpeg_message;
  const char *const *addon_message_table;
  int first_addon_message, last_addon_message;
};

struct jpeg_source_mgr {
  const unsigned char *next_input_byte;
  size_t bytes_in_buffer;
  void (*init_source)(j_decompress_ptr);
  int (*fill_input_buffer)(j_decompress_ptr);
  void (*skip_input_data)(j_decompress_ptr, long);
  int (*resync_to_restart)(j_decompress_ptr, int);
  void (*term_source)(j_decompress_ptr);
};

struct jpeg_memory_mgr {
  void *(*alloc_small)(j_common_ptr, int pool, size_t size);
}; /* its other members are not used here */

struct jpeg_common_struct {
  struct jpeg_error_mgr *err;
  struct jpeg_memory_mgr *mem;
  void *progress, *client_data;
  int is_decompressor, global_state;
};

struct jpeg_decompress_struct {
  struct jpeg_error_mgr *err;
  struct jpeg_memory_mgr *mem;
  void *progress, *client_data;
  int is_decompressor, global_state;
  struct jpeg_source_mgr *src;
  unsigned image_width, image_height;
  int num_components, jpeg_color_space, out_color_space;
  unsigned scale_num, scale_denom;
  double output_gamma;
  int buffered_image, raw_data_out, dct_method, do_fancy_upsampling, do_block_smoothing;
  int quantize_colors, dither_mode, two_pass_quantize, desired_number_of_colors;
  int enable_1pass_quant, enable_external_quant, enable_2pass_quant;
  unsigned output_width, output_height;
  int out_color_components, output_components, rec_outbuf_height, actual_number_of_colors;
  unsigned char **colormap;
  unsigned output_scanline;
  int input_scan_number;
  unsigned input_iMCU_row;
  int output_scan_number;
  unsigned output_iMCU_row;
  int (*coef_bits)[64];
  void *quant_tbl_ptrs[4], *dc_huff_tbl_ptrs[4], *ac_huff_tbl_ptrs[4];
  int data_precision;
  void *comp_info;
  int progressive_mode, arith_code;
  unsigned char arith_dc_L[16], arith_dc_U[16], arith_ac_K[16];
  unsigned restart_interval;
  int saw_JFIF_marker;
  unsigned char JFIF_major_version, JFIF_minor_version, density_unit;
  unsigned short X_density, Y_density;
  int saw_Adobe_marker;
  unsigned char Adobe_transform;
  int CCIR601_sampling;
  void *marker_list;
  int max_h_samp_factor, max_v_samp_factor, min_DCT_scaled_size;
  unsigned total_iMCU_rows;
  void *sample_range_limit;
  int comps_in_scan;
  void *cur_comp_info[4];
  unsigned MCUs_per_row, MCU_rows_in_scan;
  int blocks_in_MCU, MCU_membership[10], Ss, Se, Ah, Al, unread_marker;
  void *modules[11];
};

struct jpeg_error_mgr *jpeg_std_error(struct jpeg_error_mgr *);
void jpeg_CreateDecompress(j_decompress_ptr, int version, size_t size);
void jpeg_destroy_decompress(j_decompress_ptr);
void jpeg_abort_decompress(j_decompress_ptr);
int jpeg_read_header(j_decompress_ptr, int require_image);
int jpeg_start_decompress(j_decompress_ptr);
unsigned jpeg_read_scanlines(j_decompress_ptr, unsigned char **rows, unsigned max_rows);
unsigned jpeg_skip_scanlines(j_decompress_ptr, unsigned rows);
void jpeg_crop_scanline(j_decompress_ptr, unsigned *xoffset, unsigned *width);
int jpeg_resync_to_restart(j_decompress_ptr, int desired);
#endif
