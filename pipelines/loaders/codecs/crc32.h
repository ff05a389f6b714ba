/* CRC32 as zlib computes it. */
#ifndef DEITFAST_CRC32_H
#define DEITFAST_CRC32_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__PCLMUL__) && defined(__SSE4_1__)
#include <immintrin.h>
#endif
#if defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

static uint32_t crc_table[256];

__attribute__((constructor)) static void make_crc_table(void) {
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; bit++) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
    crc_table[i] = c;
  }
}

static uint32_t crc_bytes(uint32_t crc, const uint8_t *data, size_t size) {
#if defined(__ARM_FEATURE_CRC32)
  for (; size >= 8; data += 8, size -= 8) { uint64_t word; memcpy(&word, data, 8); crc = __crc32d(crc, word); }
#endif
  while (size--) crc = crc_table[(crc ^ *data++) & 255] ^ (crc >> 8);
  return crc;
}

#if defined(__PCLMUL__) && defined(__SSE4_1__)
/* Folding by carry-less products: Gopal et al., "Fast CRC computation for generic polynomials using PCLMULQDQ", Intel 2009. */
static uint32_t crc_folded(uint32_t crc, const uint8_t *data, size_t size) { /* size: a multiple of 16, at least 64 */
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

static uint32_t crc32_of(const uint8_t *data, size_t size) {
  uint32_t crc = ~0u;
#if defined(__PCLMUL__) && defined(__SSE4_1__)
  if (size >= 64) {
    size_t whole = size & ~(size_t)15;
    crc = crc_folded(crc, data, whole);
    data += whole, size -= whole;
  }
#endif
  return ~crc_bytes(crc, data, size);
}
#endif
