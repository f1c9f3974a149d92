/* Compiled CPU path: screened TopK encode, TopK of given scores, sparse decode and its gradients.

   Plain C with AVX-512 (VNNI) and, where the processor has it, AMX; called through ctypes with
   addresses of tensors, so that it depends on no version of Python or torch. `native.py` declares
   the functions and lists where they run; `screened.py` has the mathematics of the bounds.

   Letters: N tokens, D width, M latents, k active. M' is M up to a multiple of 32, D' is D up to a
   multiple of 64. A panel is 16 consecutive latents, one AVX-512 register of scores. */

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef int64_t i64;
enum { F32, BF16, F16 };
enum { PANEL = 16, DEPTH = 64, ROW_BLOCK = 256, MOST_COLUMNS = 16 };
enum { OK, NO_MEMORY, BAD_INDEX, STALE_COPY, NEW_COLUMNS, ROWS_LEFT };

#define INLINE static inline __attribute__((always_inline))
#define SMALLER(a, b) ((a) < (b) ? (a) : (b))
#define LARGER(a, b) ((a) > (b) ? (a) : (b))

/* Expand a call once per dtype, so that the dtype is a constant inside. */
#define BY_DTYPE(dtype, call_f32, call_bf16, call_f16) \
  ((dtype) == F32 ? (call_f32) : (dtype) == BF16 ? (call_bf16) : (call_f16))

/* -- what the processor has -------------------------------------------------------------------- */

unsigned resae_source_version(void) { return SOURCE_VERSION; }

/* Bit 0: AVX-512 with VNNI, without which nothing here may be called. Bit 1: AMX, permitted. */
int resae_features(void) {
  __builtin_cpu_init();
  int all = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512vnni");
  if (!all) return 0;
#if defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a, b, c, d;
  __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
  int has_tiles = (d >> 24 & 1) && (d >> 25 & 1); /* AMX-TILE, AMX-INT8 */
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
  if (has_tiles && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0) return 3;
#endif
  return 1;
}

/* -- entries of 32 and 16 bit ------------------------------------------------------------------ */

INLINE i64 size_of(int dtype) { return dtype == F32 ? 4 : 2; }

INLINE const void *row_at(const void *start, i64 row, i64 stride, int dtype) {
  return (const char *)start + row * stride * size_of(dtype);
}

/* Mask of the first `left` of 16 lanes. */
INLINE __mmask16 first(i64 left) {
  return left >= 16 ? (__mmask16)0xFFFF : (__mmask16)((1u << left) - 1);
}

INLINE __m512 load(const void *row, i64 at, __mmask16 mask, int dtype) {
  if (dtype == F32) return _mm512_maskz_loadu_ps(mask, (const float *)row + at);
  __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)row + at);
  if (dtype == F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __m256i to_bf16(__m512 v) { /* round to nearest, ties to even; NaN stays NaN */
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}

INLINE __m512 rounded(__m512 v, int dtype) {
  if (dtype == F32) return v;
  if (dtype == F16) return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(v)), 16));
}

INLINE void store(void *row, i64 at, __mmask16 mask, __m512 v, int dtype) {
  if (dtype == F32) {
    _mm512_mask_storeu_ps((float *)row + at, mask, v);
    return;
  }
  __m256i half = dtype == F16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : to_bf16(v);
  _mm256_mask_storeu_epi16((uint16_t *)row + at, mask, half);
}

/* -- the largest of a list --------------------------------------------------------------------- */

/* Scores as integers in whose order selection is done: 0 for what is not positive, NaN largest. */
INLINE __m512i keys_of(__m512 scores) {
  __mmask16 nan = _mm512_cmp_ps_mask(scores, scores, _CMP_UNORD_Q);
  __m512i keys = _mm512_max_epi32(_mm512_castps_si512(scores), _mm512_setzero_si512());
  return _mm512_mask_mov_epi32(keys, nan, _mm512_set1_epi32(INT32_MAX));
}

INLINE i64 count_at_least(const int32_t *keys, i64 n, int32_t least) {
  i64 count = 0;
  __m512i level = _mm512_set1_epi32(least);
  for (i64 i = 0; i < n; i += 16)
    count += _mm_popcnt_u32(_mm512_mask_cmpge_epi32_mask(
        first(n - i), _mm512_loadu_si512(keys + i), level));
  return count;
}

/* The kth largest of n ≥ k keys ≥ 0, by bisection. `keys` is readable up to a multiple of 16. */
static int32_t kth_largest(const int32_t *keys, i64 n, i64 k) {
  __m512i largest = _mm512_setzero_si512(), smallest = _mm512_set1_epi32(INT32_MAX);
  for (i64 i = 0; i < n; i += 16) {
    __mmask16 mask = first(n - i);
    __m512i some = _mm512_loadu_si512(keys + i);
    largest = _mm512_mask_max_epi32(largest, mask, largest, some);
    smallest = _mm512_mask_min_epi32(smallest, mask, smallest, some);
  }
  /* count(keys ≥ low) ≥ k, count(keys ≥ high) < k */
  i64 low = _mm512_reduce_min_epi32(smallest), high = (i64)_mm512_reduce_max_epi32(largest) + 1;
  while (high - low > 1) {
    i64 middle = (low + high) / 2, count = count_at_least(keys, n, (int32_t)middle);
    if (count == k) { /* the kth is the smallest of these */
      __m512i least = _mm512_set1_epi32(INT32_MAX), level = _mm512_set1_epi32((int32_t)middle);
      for (i64 i = 0; i < n; i += 16) {
        __m512i some = _mm512_loadu_si512(keys + i);
        __mmask16 above = _mm512_mask_cmpge_epi32_mask(first(n - i), some, level);
        least = _mm512_mask_min_epi32(least, above, least, some);
      }
      return _mm512_reduce_min_epi32(least);
    }
    if (count > k) low = middle;
    else high = middle;
  }
  return (int32_t)low;
}

/* Keep the k best of n entries in order of latent: the larger key, of equals the lower latent. */
static i64 keep_best(int32_t *latents, int32_t *keys, i64 n, i64 k) {
  if (n <= k) return n;
  int32_t kth = kth_largest(keys, n, k);
  i64 above = kth == INT32_MAX ? 0 : count_at_least(keys, n, kth + 1);
  i64 ties = k - above, kept = 0;
  for (i64 i = 0; i < n; i++) {
    if (keys[i] < kth || (keys[i] == kth && ties-- <= 0)) continue;
    latents[kept] = latents[i];
    keys[kept++] = keys[i];
  }
  return kept;
}

/* Order n entries by key, descending, stably: bottom-up merges over runs sorted by insertion. */
static void sort_entries(int32_t *latents, int32_t *keys, i64 n, int32_t *spare) {
  enum { RUN = 16 };
  for (i64 start = 0; start < n; start += RUN)
    for (i64 i = start + 1; i < SMALLER(start + RUN, n); i++) {
      int32_t key = keys[i], latent = latents[i];
      i64 j = i;
      for (; j > start && keys[j - 1] < key; j--) {
        keys[j] = keys[j - 1];
        latents[j] = latents[j - 1];
      }
      keys[j] = key;
      latents[j] = latent;
    }
  int32_t *from_k = keys, *from_l = latents, *to_k = spare, *to_l = spare + n;
  for (i64 run = RUN; run < n; run *= 2) {
    for (i64 start = 0; start < n; start += 2 * run) {
      i64 a = start, middle = SMALLER(start + run, n), b = middle, end = SMALLER(b + run, n);
      for (i64 out = start; out < end; out++) {
        int left = b >= end || (a < middle && from_k[a] >= from_k[b]);
        i64 i = left ? a++ : b++;
        to_k[out] = from_k[i];
        to_l[out] = from_l[i];
      }
    }
    int32_t *k_ = from_k, *l_ = from_l;
    from_k = to_k, from_l = to_l, to_k = k_, to_l = l_;
  }
  if (from_k != keys) {
    memcpy(keys, from_k, n * sizeof *keys);
    memcpy(latents, from_l, n * sizeof *latents);
  }
}

/* Write the code of one row from n ≤ k entries with keys > 0 in order of latent. */
static void write_code(int32_t *latents, int32_t *keys, i64 n, i64 k, int sorted, int32_t *spare,
                       void *acts, i64 *indices, int dtype) {
  if (sorted) sort_entries(latents, keys, n, spare);
  for (i64 j = 0; j < k; j += 16) {
    __mmask16 mask = first(k - j), mine = n > j ? first(n - j) : 0;
    __m512i some = _mm512_maskz_loadu_epi32(mine, keys + j);
    store(acts, j, mask, _mm512_castsi512_ps(some), dtype);
  }
  for (i64 j = 0; j < k; j++) indices[j] = j < n ? latents[j] : 0;
}

/* -- the candidates of a row ------------------------------------------------------------------- */

/* Latents met so far that may be among the row's k best, in order, with their scores or upper
   bounds. */
typedef struct {
  int32_t *latents, *keys; /* keys: room for as many, which lists of one thread share */
  float *values;
  i64 n, limit, capacity;
  float least;  /* no latent below this is among the k best */
  int overflow; /* more candidates than there is room for: the row is given up */
} list;

INLINE i64 next_limit(i64 kept, i64 k, i64 capacity) {
  return SMALLER(kept + LARGER(k, 48), capacity - PANEL);
}

INLINE void append(list *row, __mmask16 mask, int32_t latent, __m512 values) {
  const __m512i lanes =
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i latents = _mm512_add_epi32(lanes, _mm512_set1_epi32(latent));
  _mm512_storeu_si512(row->latents + row->n, _mm512_maskz_compress_epi32(mask, latents));
  _mm512_storeu_ps(row->values + row->n, _mm512_maskz_compress_ps(mask, values));
  row->n += _mm_popcnt_u32(mask);
}

/* Keep the entries that reach `least`. */
static void drop_below(list *row) {
  i64 kept = 0;
  __m512 least = _mm512_set1_ps(row->least);
  for (i64 i = 0; i < row->n; i += 16) {
    __m512 values = _mm512_loadu_ps(row->values + i);
    __m512i latents = _mm512_loadu_si512(row->latents + i);
    __mmask16 reach =
        _mm512_mask_cmp_ps_mask(first(row->n - i), values, least, _CMP_GE_OQ);
    _mm512_storeu_ps(row->values + kept, _mm512_maskz_compress_ps(reach, values));
    _mm512_storeu_si512(row->latents + kept, _mm512_maskz_compress_epi32(reach, latents));
    kept += _mm_popcnt_u32(reach);
  }
  row->n = kept;
}

/* -- TopK of given scores ---------------------------------------------------------------------- */

/* Keep the k best of a list of plain scores; `least` becomes the kth. Ties with it that come later
   are latents of a higher index and lose, so that later entries must exceed it: but they may be
   NaN, which is above everything and is pushed apart. */
static void keep_best_scores(list *row, i64 k) {
  for (i64 i = 0; i < row->n; i += 16)
    _mm512_storeu_si512(row->keys + i, keys_of(_mm512_loadu_ps(row->values + i)));
  i64 n = row->n;
  if (n > k) {
    int32_t kth = kth_largest(row->keys, n, k);
    i64 above = kth == INT32_MAX ? 0 : count_at_least(row->keys, n, kth + 1);
    i64 ties = k - above, kept = 0;
    for (i64 i = 0; i < n; i++) {
      if (row->keys[i] < kth || (row->keys[i] == kth && ties-- <= 0)) continue;
      row->latents[kept] = row->latents[i];
      row->values[kept] = row->values[i];
      row->keys[kept++] = row->keys[i];
    }
    row->n = kept;
    memcpy(&row->least, &kth, sizeof kth);
  }
  row->limit = next_limit(row->n, k, row->capacity);
}

/* Lanes of 16 scores that are above their thresholds and above 0, or NaN. A NaN threshold is above
   every score but NaN. */
INLINE __mmask16 above_threshold(__m512 scores, __m512 thresholds) {
  __mmask16 above = _mm512_cmp_ps_mask(scores, thresholds, _CMP_GT_OQ) &
                    _mm512_cmp_ps_mask(scores, _mm512_setzero_ps(), _CMP_GT_OQ);
  return above | _mm512_cmp_ps_mask(scores, scores, _CMP_UNORD_Q);
}

/* The k best scores of a row into `row`; of those above `thresholds` [M] alone, unless that is null.
   Returns how many there are above. While no more than k are, they are only moved together. */
INLINE i64 select_row(list *row, const void *scores, const void *thresholds, i64 M, i64 k, int dtype) {
  i64 n_active = 0;
  row->n = 0;
  row->least = 0.0f;
  row->limit = next_limit(0, k, row->capacity);
  __m512 least = _mm512_setzero_ps();
  for (i64 j = 0; j < M; j += 16) {
    __mmask16 mask = first(M - j);
    __m512 some = load(scores, j, mask, dtype);
    __mmask16 above = _mm512_mask_cmp_ps_mask(mask, some, least, _CMP_NLE_UQ); /* or NaN */
    if (thresholds) {
      __mmask16 active = mask & above_threshold(some, load(thresholds, j, mask, dtype));
      n_active += _mm_popcnt_u32(active);
      above &= active;
    }
    if (!above) continue;
    append(row, above, (int32_t)j, some);
    if (row->n > row->limit) {
      keep_best_scores(row, k);
      least = _mm512_set1_ps(row->least);
    }
  }
  keep_best_scores(row, k);
  return n_active;
}

static i64 select_row_of(list *row, const void *scores, const void *thresholds, i64 M, i64 k,
                         int dtype) {
  if (!thresholds)
    return BY_DTYPE(dtype, select_row(row, scores, 0, M, k, F32), select_row(row, scores, 0, M, k, BF16),
                    select_row(row, scores, 0, M, k, F16));
  return BY_DTYPE(dtype, select_row(row, scores, thresholds, M, k, F32),
                  select_row(row, scores, thresholds, M, k, BF16),
                  select_row(row, scores, thresholds, M, k, F16));
}

/* Entries of 4 bytes that a list of this capacity takes, its keys apart. */
INLINE i64 list_words(i64 capacity) { return 2 * (capacity + PANEL); }

INLINE list make_list(int32_t *memory, int32_t *keys, i64 capacity) {
  list row = {.latents = memory, .values = (float *)(memory + capacity + PANEL)};
  row.keys = keys;
  row.capacity = capacity;
  return row;
}

INLINE i64 roomy(i64 k) { return (2 * k + 128 + PANEL) / 16 * 16; }

/* TopK of relu(scores), [N, M] with unit stride along a row: ties to the lower index, NaN first,
   padding last. With `thresholds` [M], else null: of the scores above them, which are counted into
   n_active [N]. */
int resae_select(const void *scores, i64 stride, int dtype, i64 N, i64 M, i64 k, int sorted,
                 int threads, const void *thresholds, void *acts, i64 *indices, int32_t *n_active) {
  i64 capacity = roomy(k), words = 3 * (capacity + PANEL) + 2 * k;
  threads = (int)LARGER(1, SMALLER(threads, SMALLER(N, N * M / 65536)));
  int32_t *memory = malloc(threads * words * sizeof *memory);
  if (!memory) return NO_MEMORY;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int32_t *mine = memory + omp_get_thread_num() * words;
    int32_t *keys = mine + list_words(capacity);
    list row = make_list(mine, keys, capacity);
#pragma omp for
    for (i64 n = 0; n < N; n++) {
      i64 active = select_row_of(&row, row_at(scores, n, stride, dtype), thresholds, M, k, dtype);
      if (thresholds) n_active[n] = (int32_t)active;
      write_code(row.latents, row.keys, row.n, k, sorted, keys + capacity + PANEL,
                 (char *)acts + n * k * size_of(dtype), indices + n * k, dtype);
    }
  }
  free(memory);
  return OK;
}

/* -- the 8-bit copy ---------------------------------------------------------------------------- */

/* The 8-bit copy of a weight and its bounds. `screening_native.py` keeps its memory alive. */
typedef struct {
  i64 M, D;
  const void *weight; /* [M, D], rows `weight_stride` entries apart */
  i64 weight_stride;
  i64 weight_dtype;
  const void *live_bias;      /* [M] in the weight's dtype, or null: as it is now */
  const int8_t *packed;       /* [M'/16, D'/4, 16, 4]: q of the weight, as VNNI and AMX read it */
  const int32_t *start;       /* [M'], −128 Σ q: undoes the unsigned levels of VNNI */
  const float *steps;         /* [M'], s: the step of each row */
  const float *shift;         /* [M'], −s Σ q (u − ½), u the dither of the residual */
  const float *bias;          /* [M'], −inf past M */
  const float *bounds;        /* [M']; certain: of the rebuilding error of w */
  const float *norm_bounds;   /* [M'], certain: of ‖ŵ‖; statistical: null */
  const float *dither;        /* [D'], u */
  const float *weight_dither; /* [D'], v − ½; 0 past D */
  const float *columns;       /* [n_columns, M']: the weight's columns at outlier dimensions */
  const int32_t *column_dimensions;
  i64 n_columns;
  /* Entries of the weight as they were when it was copied, one of every `sample_step` rows. */
  const void *samples;
  i64 sample_step;
  float ratio, largest_bias, largest_bound, outlier, rounding;
} copy;

/* Do the weight and bias still hold their samples? */
static int holds_samples(const copy *c) {
  i64 size = size_of((int)c->weight_dtype), n = 0;
  int same = 1;
  for (i64 m = 0; c->live_bias && m < c->M; m += c->sample_step)
    same &= _mm512_cvtss_f32(load(c->live_bias, m, 1, (int)c->weight_dtype)) == c->bias[m];
  for (i64 m = 0; m < c->M; m += c->sample_step, n++) {
    const char *now = (const char *)row_at(c->weight, m, c->weight_stride, (int)c->weight_dtype) +
                      c->D / 2 * size;
    const char *then = (const char *)c->samples + n * size;
    same &= size == 4 ? *(const int32_t *)now == *(const int32_t *)then
                      : *(const int16_t *)now == *(const int16_t *)then;
  }
  return same;
}

INLINE i64 padded_depth(i64 D) { return (D + DEPTH - 1) / DEPTH * DEPTH; }
INLINE i64 padded_latents(i64 M) { return (M + 31) / 32 * 32; }

/* Quantise rows of the weight with the dither subtracted again, q = ⌊w/s + v⌋; per row also
   −Σ q (u − ½) · s, ‖w‖, and for the certain margin ‖w − ŵ‖ and ‖ŵ‖ (else null). */
INLINE void quantise_row(const void *row, int dtype, i64 D, float levels, const float *dither,
                         const float *weight_dither, int8_t *q, float *step, float *shift,
                         float *size, float *error, float *norm, int32_t *start) {
  __m512 peak = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (i64 d = 0; d < D; d += 16) {
    __m512 w = load(row, d, first(D - d), dtype);
    peak = _mm512_max_ps(_mm512_abs_ps(w), peak); /* a NaN here is seen in the squares */
    squares = _mm512_fmadd_ps(w, w, squares);
  }
  float s = LARGER(_mm512_reduce_max_ps(peak), 1e-30f) / levels;
  *step = s;
  *size = sqrtf(_mm512_reduce_add_ps(squares));
  __m512 inverse = _mm512_set1_ps(1.0f / s), half = _mm512_set1_ps(0.5f);
  __m512 along = _mm512_setzero_ps(), errors = along, norms = along, s_ = _mm512_set1_ps(s);
  __m512i sum = _mm512_setzero_si512();
  for (i64 d = 0; d < D; d += 16) {
    __mmask16 mask = first(D - d);
    __m512 w = load(row, d, mask, dtype), v = _mm512_loadu_ps(weight_dither + d);
    __m512 level = _mm512_roundscale_ps(_mm512_fmadd_ps(w, inverse, _mm512_add_ps(v, half)),
                                        _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    level = _mm512_maskz_mov_ps(mask, level);
    __m512i whole = _mm512_cvtps_epi32(level);
    _mm_storeu_si128((__m128i *)(q + d), _mm512_cvtepi32_epi8(whole));
    sum = _mm512_add_epi32(sum, whole);
    __m512 u = _mm512_sub_ps(_mm512_loadu_ps(dither + d), half);
    along = _mm512_fmadd_ps(level, u, along);
    if (error) {
      __m512 rebuilt = _mm512_maskz_mul_ps(mask, _mm512_sub_ps(level, v), s_);
      __m512 off = _mm512_sub_ps(w, rebuilt);
      errors = _mm512_fmadd_ps(off, off, errors);
      norms = _mm512_fmadd_ps(rebuilt, rebuilt, norms);
    }
  }
  *shift = -s * _mm512_reduce_add_ps(along);
  *start = -128 * _mm512_reduce_add_epi32(sum);
  if (error) {
    *error = sqrtf(_mm512_reduce_add_ps(errors));
    *norm = sqrtf(_mm512_reduce_add_ps(norms));
  }
}

int resae_quantise(const void *weight, i64 stride, int dtype, i64 M, i64 D, float levels,
                   const float *dither, const float *weight_dither, int threads, int8_t *packed,
                   int32_t *start, float *steps, float *shift, float *size, float *error,
                   float *norm) {
  i64 depth = padded_depth(D), panels = padded_latents(M) / PANEL;
  int8_t *memory = calloc(threads * PANEL, depth);
  if (!memory) return NO_MEMORY;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (i64 p = 0; p < panels; p++) {
    int8_t *q = memory + omp_get_thread_num() * PANEL * depth;
    for (i64 l = 0; l < PANEL; l++) {
      i64 m = p * PANEL + l;
      int8_t *to = q + l * depth;
      if (m >= M) {
        memset(to, 0, depth);
        continue;
      }
      const void *row = row_at(weight, m, stride, dtype);
      float *e = error ? error + m : 0, *n = norm ? norm + m : 0;
      BY_DTYPE(dtype,
               quantise_row(row, F32, D, levels, dither, weight_dither, to, steps + m, shift + m,
                            size + m, e, n, start + m),
               quantise_row(row, BF16, D, levels, dither, weight_dither, to, steps + m, shift + m,
                            size + m, e, n, start + m),
               quantise_row(row, F16, D, levels, dither, weight_dither, to, steps + m, shift + m,
                            size + m, e, n, start + m));
    }
    /* Transpose: 16 latents' next 4 entries beside each other, 16 such steps at a time. */
    const __m512i rows = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32((int)(depth / 4)));
    for (i64 d = 0; d < depth / 4; d++)
      _mm512_storeu_si512(packed + (p * depth / 4 + d) * 64,
                          _mm512_i32gather_epi32(rows, (const int *)q + d, 4));
  }
  free(memory);
  return OK;
}

/* -- screening --------------------------------------------------------------------------------- */

/* One residual, in units of its own step t. */
typedef struct {
  float step, inverse; /* t, 1/t */
  float along;         /* Σ (v − ½)(q − u + ½) */
  float factor, norm_factor; /* λ = factor · bounds + norm_factor · norm_bounds */
  float norm, inner;   /* ‖r‖ / t, with and without the outlier dimensions */
  float slack;         /* rounding of the float32 sums */
  int exact;           /* not to be screened: not finite, or zero */
  int outlying;        /* an entry stretches the step: its dimension wants a column */
  int n_outliers;      /* entries that are multiplied exactly, by columns of the copy */
  const float *columns[MOST_COLUMNS];
  float outliers[MOST_COLUMNS]; /* in units of t */
} residual;

typedef struct {
  const copy *c;
  const void *x, *prediction, *pre_bias;
  const void *thresholds; /* [M], or null: the k best, whatever their scores */
  i64 x_stride, prediction_stride, k;
  int dtype;      /* of x, prediction, pre_bias, thresholds and the codes */
  float rounding; /* relative, of scores that are rounded to 16 bit before they are compared */
  i64 capacity;
} job;

/* r = x − prediction − pre_bias, rounded to x's dtype; its sum of squares and largest magnitude. */
INLINE void form_residual(const job *w, i64 n, float *r, int dtype, float *squares, float *peak) {
  i64 D = w->c->D;
  const void *x = row_at(w->x, n, w->x_stride, dtype);
  const void *prediction =
      w->prediction ? row_at(w->prediction, n, w->prediction_stride, dtype) : 0;
  __m512 sum = _mm512_setzero_ps(), most = sum;
  for (i64 d = 0; d < D; d += 16) {
    __mmask16 mask = first(D - d);
    __m512 v = load(x, d, mask, dtype);
    if (prediction) v = _mm512_sub_ps(v, load(prediction, d, mask, dtype));
    if (w->pre_bias) v = _mm512_sub_ps(v, load(w->pre_bias, d, mask, dtype));
    v = rounded(v, dtype);
    _mm512_storeu_ps(r + d, v);
    sum = _mm512_fmadd_ps(v, v, sum);
    most = _mm512_max_ps(most, _mm512_abs_ps(v));
  }
  *squares = _mm512_reduce_add_ps(sum);
  *peak = _mm512_reduce_max_ps(most);
}

/* Quantise r with the entries at outlier dimensions taken out (they are multiplied exactly): levels
   as signed bytes. Entries of r past D, up to D', are 0. */
static void quantise_residual(const copy *c, float *r, float squares, float peak,
                              int8_t *levels, residual *out) {
  i64 D = c->D, depth = padded_depth(D);
  float norm = sqrtf(squares), inner = squares;
  float values[MOST_COLUMNS];
  for (i64 o = 0; o < c->n_columns; o++) { /* taken out briefly, in place */
    values[o] = r[c->column_dimensions[o]];
    r[c->column_dimensions[o]] = 0.0f;
  }
  if (c->n_columns) {
    __m512 most = _mm512_setzero_ps(), sum = most;
    for (i64 d = 0; d < depth; d += 16) {
      __m512 v = _mm512_loadu_ps(r + d);
      most = _mm512_max_ps(most, _mm512_abs_ps(v));
      sum = _mm512_fmadd_ps(v, v, sum);
    }
    peak = _mm512_reduce_max_ps(most);
    inner = _mm512_reduce_add_ps(sum);
  }
  out->n_outliers = 0;
  for (i64 o = 0; o < c->n_columns; o++) {
    if (fabsf(values[o]) > peak) {
      out->columns[out->n_outliers] = c->columns + o * padded_latents(c->M);
      out->outliers[out->n_outliers++] = values[o];
    } else { /* no outlier in this row */
      r[c->column_dimensions[o]] = values[o];
      inner += values[o] * values[o];
    }
  }
  float step = peak / 126.0f;
  out->exact = !(step > 1e-30f) || !isfinite(norm);
  if (out->exact) step = 1.0f;
  out->outlying = !out->exact && peak * sqrtf((float)D) > c->outlier * sqrtf(inner);
  float inverse = 1.0f / step, inner_norm = sqrtf(inner) * inverse;
  out->step = step;
  out->inverse = inverse;
  out->norm = norm * inverse;
  out->inner = inner_norm;
  const __m512 half = _mm512_set1_ps(0.5f), scale = _mm512_set1_ps(inverse);
  __m512 along = _mm512_setzero_ps(), errors = along;
  for (i64 d = 0; d < depth; d += 16) {
    __mmask16 mask = D > d ? first(D - d) : 0;
    __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(r + d), scale);
    __m512 u = _mm512_loadu_ps(c->dither + d);
    __m512 level = _mm512_roundscale_ps(_mm512_add_ps(scaled, u),
                                        _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    level = _mm512_maskz_mov_ps(mask, level);
    __m512i whole = _mm512_cvtps_epi32(level);
    _mm_storeu_si128((__m128i *)(levels + d), _mm512_cvtepi32_epi8(whole));
    __m512 centred = _mm512_maskz_sub_ps(mask, level, _mm512_sub_ps(u, half));
    along = _mm512_fmadd_ps(centred, _mm512_loadu_ps(c->weight_dither + d), along);
    if (c->norm_bounds) {
      __m512 off = _mm512_sub_ps(scaled, centred);
      errors = _mm512_fmadd_ps(off, off, errors);
    }
  }
  for (i64 o = 0; o < c->n_columns; o++) r[c->column_dimensions[o]] = values[o];
  for (int o = 0; o < out->n_outliers; o++) out->outliers[o] *= inverse;
  out->along = _mm512_reduce_add_ps(along);
  float rounding = c->rounding * out->norm;
  if (c->norm_bounds) {
    out->factor = inner_norm;
    out->norm_factor = sqrtf(_mm512_reduce_add_ps(errors)) + rounding;
  } else {
    float spread = c->ratio * inner_norm;
    out->factor = sqrtf(spread * spread + 1.0f) + rounding;
    out->norm_factor = 0.0f;
  }
  out->slack = c->rounding * c->largest_bias * inverse;
}

INLINE __m512 width_of(const copy *c, const residual *r, __m512i latents, __mmask16 mask) {
  __m512 zero = _mm512_setzero_ps();
  __m512 width = _mm512_mul_ps(
      _mm512_set1_ps(r->factor), _mm512_mask_i32gather_ps(zero, mask, latents, c->bounds, 4));
  if (!c->norm_bounds) return width;
  return _mm512_fmadd_ps(_mm512_set1_ps(r->norm_factor),
                         _mm512_mask_i32gather_ps(zero, mask, latents, c->norm_bounds, 4), width);
}

/* Entries from which on `raise_least` has work to do. With thresholds every candidate is kept: all
   active latents are counted. */
INLINE i64 limit_of(const list *row, const job *w) {
  return w->thresholds ? row->capacity - PANEL : next_limit(row->n, w->k, row->capacity);
}

/* Raise `least` to what the kth best latent so far reaches for certain, and drop what does not. */
static void raise_least(list *row, const job *w, const residual *r) {
  if (row->overflow) return;
  if (row->n > w->k && !w->thresholds) {
    for (i64 i = 0; i < row->n; i += 16) {
      __mmask16 mask = first(row->n - i);
      __m512 width = width_of(w->c, r, _mm512_loadu_si512(row->latents + i), mask);
      __m512 upper = _mm512_loadu_ps(row->values + i);
      __m512 lower = _mm512_fnmadd_ps(_mm512_set1_ps(2.0f), width, upper);
      lower = _mm512_max_ps(lower, _mm512_setzero_ps());
      _mm512_storeu_si512(row->keys + i, _mm512_castps_si512(lower));
    }
    int32_t kth = kth_largest(row->keys, row->n, w->k);
    float lower;
    memcpy(&lower, &kth, sizeof lower);
    row->least = LARGER(row->least, lower - lower * w->rounding - r->slack);
    drop_below(row);
  }
  row->limit = limit_of(row, w);
  if (row->n > row->limit) {
    row->overflow = 1;
    row->n = 0;
    row->least = INFINITY;
  }
}

/* Upper bounds, in units of t, of 16 scores of one residual from their integer products. */
INLINE void push(list *row, const job *w, const residual *r, i64 latent,
                 __m512i products, __m512 steps, __m512 shift, __m512 bias, __m512 bounds) {
  const copy *c = w->c;
  __m512 upper = _mm512_sub_ps(_mm512_cvtepi32_ps(products), _mm512_set1_ps(r->along));
  upper = _mm512_fmadd_ps(upper, steps, shift);
  upper = _mm512_fmadd_ps(bias, _mm512_set1_ps(r->inverse), upper);
  upper = _mm512_fmadd_ps(bounds, _mm512_set1_ps(r->factor), upper);
  if (c->norm_bounds)
    upper = _mm512_fmadd_ps(_mm512_loadu_ps(c->norm_bounds + latent),
                            _mm512_set1_ps(r->norm_factor), upper);
  for (int o = 0; o < r->n_outliers; o++)
    upper = _mm512_fmadd_ps(_mm512_loadu_ps(r->columns[o] + latent),
                            _mm512_set1_ps(r->outliers[o]), upper);
  __m512 least = _mm512_set1_ps(row->least);
  if (w->thresholds) { /* none reaches a threshold that is NaN: `max` returns its second argument */
    __m512 levels = load(w->thresholds, latent, first(LARGER(0, c->M - latent)), w->dtype);
    levels = _mm512_max_ps(_mm512_setzero_ps(), levels);
    least = _mm512_fmadd_ps(levels, _mm512_set1_ps(r->inverse), least);
  }
  __mmask16 reach = _mm512_cmp_ps_mask(upper, least, _CMP_GE_OQ);
  if (__builtin_expect(!reach, 1)) return;
  append(row, reach, (int32_t)latent, upper);
  if (row->n > row->limit) raise_least(row, w, r);
}

/* A block of residuals, quantised. */
typedef struct {
  i64 n;
  residual *rows;
  float *residuals; /* [n, D'], r */
  uint8_t *levels;  /* [n, D'], q + 128; VNNI */
  int8_t *tiles;    /* [n/16, D'/64, 16, 64], q; AMX */
} block;

/* Integer products of R rows with P panels by VNNI, and what comes of them. For a single row the
   sums are split in two, so that enough of them are under way. */
INLINE void vnni_tile(const job *w, const block *b, list *lists, i64 row, int R, i64 panel, int P) {
  const copy *c = w->c;
  i64 depth = padded_depth(c->D);
  enum { SPLIT = 2 };
  __m512i sums[8][4], more[4];
  const int8_t *panels = c->packed + panel * PANEL * depth;
  const uint8_t *levels = b->levels + row * depth;
  for (int p = 0; p < P; p++) {
    __m512i start = _mm512_loadu_si512(c->start + (panel + p) * PANEL);
    for (int i = 0; i < R; i++) sums[i][p] = start;
    more[p] = _mm512_setzero_si512();
  }
  for (i64 d = 0; d < depth; d += 4 * SPLIT) {
    for (int half = 0; half < SPLIT; half++) {
      i64 at = d + 4 * half;
      for (int p = 0; p < P; p++) {
        __m512i weights = _mm512_loadu_si512(panels + p * PANEL * depth + at * PANEL);
        for (int i = 0; i < R; i++) {
          __m512i four = _mm512_set1_epi32(*(const int *)(levels + i * depth + at));
          __m512i *sum = R == 1 && half ? more + p : &sums[i][p];
          *sum = _mm512_dpbusd_epi32(*sum, four, weights);
        }
      }
    }
  }
  for (int p = 0; p < P; p++) {
    i64 latent = (panel + p) * PANEL;
    __m512 steps = _mm512_loadu_ps(c->steps + latent), shift = _mm512_loadu_ps(c->shift + latent);
    __m512 bias = _mm512_loadu_ps(c->bias + latent), bounds = _mm512_loadu_ps(c->bounds + latent);
    for (int i = 0; i < R; i++) {
      __m512i products = R == 1 ? _mm512_add_epi32(sums[0][p], more[p]) : sums[i][p];
      push(lists + row + i, w, b->rows + row + i, latent,
           products, steps, shift, bias, bounds);
    }
  }
}

/* Panels [from, to), an even number of them. */
static void screen_by_vnni(const job *w, const block *b, list *lists, i64 from, i64 to) {
  i64 panel = from;
  if (b->n == 1) {
    for (; panel + 4 <= to; panel += 4) vnni_tile(w, b, lists, 0, 1, panel, 4);
  }
  for (; panel < to; panel += 2) {
    i64 row = 0;
    for (; row + 8 <= b->n; row += 8) vnni_tile(w, b, lists, row, 8, panel, 2);
    for (; row + 4 <= b->n; row += 4) vnni_tile(w, b, lists, row, 4, panel, 2);
    for (; row + 2 <= b->n; row += 2) vnni_tile(w, b, lists, row, 2, panel, 2);
    for (; row < b->n; row++) vnni_tile(w, b, lists, row, 1, panel, 2);
  }
}

/* The same by AMX: 32 rows with 32 latents at a time. */
__attribute__((target("amx-tile,amx-int8"))) static void screen_by_amx(const job *w, const block *b,
                                                                       list *lists, i64 from,
                                                                       i64 to) {
  const copy *c = w->c;
  i64 depth = padded_depth(c->D), row_tiles = (b->n + 15) / 16, tile = 16 * depth;
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
  /* The compiler declares that the next line reads 8 bytes. */
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  int32_t products[4][16][16] __attribute__((aligned(64))); /* [row tile · 2 + panel] */
  for (i64 panel = from; panel < to; panel += 2) {
    const int8_t *left = c->packed + panel * tile, *right = left + tile;
    __m512 steps[2], shift[2], bias[2], bounds[2];
    for (int p = 0; p < 2; p++) {
      i64 latent = (panel + p) * PANEL;
      steps[p] = _mm512_loadu_ps(c->steps + latent);
      shift[p] = _mm512_loadu_ps(c->shift + latent);
      bias[p] = _mm512_loadu_ps(c->bias + latent);
      bounds[p] = _mm512_loadu_ps(c->bounds + latent);
    }
    for (i64 t = 0; t < row_tiles; t += 2) {
      const int8_t *upper = b->tiles + t * tile, *lower = upper + tile;
      int two = t + 1 < row_tiles;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (i64 d = 0; d < tile; d += 16 * DEPTH) {
        _tile_loadd(4, upper + d, DEPTH);
        _tile_loadd(6, left + d, DEPTH);
        _tile_loadd(7, right + d, DEPTH);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        if (two) {
          _tile_loadd(5, lower + d, DEPTH);
          _tile_dpbssd(2, 5, 6);
          _tile_dpbssd(3, 5, 7);
        }
      }
      _tile_stored(0, products[0], 64);
      _tile_stored(1, products[1], 64);
      if (two) {
        _tile_stored(2, products[2], 64);
        _tile_stored(3, products[3], 64);
      }
      i64 rows = SMALLER(32, b->n - 16 * t);
      for (i64 i = 0; i < rows; i++) {
        i64 row = 16 * t + i;
        for (int p = 0; p < 2; p++)
          push(lists + row, w, b->rows + row,
               (panel + p) * PANEL, _mm512_load_si512(products[i / 16 * 2 + p][i % 16]), steps[p],
               shift[p], bias[p], bounds[p]);
      }
    }
  }
  _tile_release();
}

/* -- exact scores of the candidates ------------------------------------------------------------ */

enum { AT_ONCE = 4 };

/* ⟨r, w⟩ of four rows of the weight. */
INLINE void dot_four(const float *r, const void *const *rows, i64 D, int dtype, float *out) {
  __m512 sums[AT_ONCE], more[AT_ONCE];
  for (int i = 0; i < AT_ONCE; i++) sums[i] = more[i] = _mm512_setzero_ps();
  i64 d = 0;
  for (; d + 32 <= D; d += 32) {
    __m512 a = _mm512_loadu_ps(r + d), b = _mm512_loadu_ps(r + d + 16);
    for (int i = 0; i < AT_ONCE; i++) {
      sums[i] = _mm512_fmadd_ps(a, load(rows[i], d, 0xFFFF, dtype), sums[i]);
      more[i] = _mm512_fmadd_ps(b, load(rows[i], d + 16, 0xFFFF, dtype), more[i]);
    }
  }
  for (; d < D; d += 16) {
    __mmask16 mask = first(D - d);
    __m512 a = _mm512_maskz_loadu_ps(mask, r + d);
    for (int i = 0; i < AT_ONCE; i++)
      sums[i] = _mm512_fmadd_ps(a, load(rows[i], d, mask, dtype), sums[i]);
  }
  for (int i = 0; i < AT_ONCE; i++) out[i] = _mm512_reduce_add_ps(_mm512_add_ps(sums[i], more[i]));
}

static void dot_four_of(const float *r, const void *const *rows, i64 D, int dtype, float *out) {
  BY_DTYPE(dtype, dot_four(r, rows, D, F32, out), dot_four(r, rows, D, BF16, out),
           dot_four(r, rows, D, F16, out));
}

/* Scratch of one row's end, `capacity` entries each. */
typedef struct {
  float *width, *scores;
  int32_t *which, *spare, *keys;
} scratch;

/* Score the `count` candidates named by `s->which` exactly; false if a score lies outside its
   bounds: the copy is of another weight. A score that is not finite gives the row up. */
static int score_some(const list *row, const job *w, residual *r, const float *values, scratch *s,
                      i64 count) {
  const copy *c = w->c;
  for (i64 i = 0; i < count; i += AT_ONCE) {
    const void *rows[AT_ONCE];
    float out[AT_ONCE];
    for (i64 j = 0; j < AT_ONCE; j++) {
      i64 latent = row->latents[s->which[SMALLER(i + j, count - 1)]];
      rows[j] = row_at(c->weight, latent, c->weight_stride, (int)c->weight_dtype);
      if (i + AT_ONCE + j < count) { /* the next four, while these are multiplied */
        const char *next = row_at(c->weight, row->latents[s->which[i + AT_ONCE + j]],
                                  c->weight_stride, (int)c->weight_dtype);
        for (i64 line = 0; line < SMALLER(c->D * size_of((int)c->weight_dtype), 512); line += 64)
          _mm_prefetch(next + line, _MM_HINT_T0);
      }
    }
    dot_four_of(values, rows, c->D, (int)c->weight_dtype, out);
    for (i64 j = 0; j < AT_ONCE && i + j < count; j++) {
      i64 at = s->which[i + j];
      i64 latent = row->latents[at];
      float score = out[j];
      if (c->live_bias)
        score += _mm512_cvtss_f32(load(c->live_bias, latent, 1, (int)c->weight_dtype));
      if (!isfinite(score)) {
        r->exact = 1;
        return 1;
      }
      float largest = c->norm_bounds ? c->norm_bounds[latent] : c->bounds[latent];
      float allowed = s->width[at] + r->slack + 16 * c->rounding * r->norm * largest;
      float middle = row->values[at] - s->width[at];
      if (!(fabsf(score * r->inverse - middle) <= allowed)) return 0;
      if (w->thresholds) {
        __m512 level = load((const char *)w->thresholds + latent * size_of(w->dtype), 0, 1, w->dtype);
        if (!(above_threshold(rounded(_mm512_set1_ps(score), w->dtype), level) & 1)) score = 0.0f;
      }
      s->scores[at] = score;
    }
  }
  return 1;
}

/* The code of one row from its candidates. Those with the k best approximate scores are scored
   first: the least of these scores is a tighter bound for the rest. With thresholds all candidates
   are scored, and `n_active` is the number of those above. */
static int finish_row(list *row, const job *w, residual *r, const float *values, scratch *s,
                      int sorted, void *acts, i64 *indices, int32_t *n_active, i64 *scored) {
  const copy *c = w->c;
  raise_least(row, w, r);
  i64 n = row->n, k = w->k, count = 0;
  if (row->overflow) r->exact = 1;
  if (r->exact) return OK;
  for (i64 i = 0; i < n; i += 16) {
    __m512 width = width_of(c, r, _mm512_loadu_si512(row->latents + i), first(n - i));
    __m512 middle = _mm512_sub_ps(_mm512_loadu_ps(row->values + i), width);
    _mm512_storeu_ps(s->width + i, width);
    middle = _mm512_max_ps(middle, _mm512_setzero_ps());
    _mm512_storeu_si512(row->keys + i, _mm512_castps_si512(middle));
  }
  int32_t kth = n > k && !w->thresholds ? kth_largest(row->keys, n, k) : 0;
  for (i64 i = 0; i < n; i++)
    if (row->keys[i] >= kth) s->which[count++] = (int32_t)i;
  if (!score_some(row, w, r, values, s, count)) return STALE_COPY;
  if (count < n && !r->exact) {
    float least = INFINITY;
    for (i64 i = 0; i < count; i++) least = SMALLER(least, s->scores[s->which[i]]);
    least *= r->inverse;
    least -= fabsf(least) * w->rounding + r->slack + 16 * c->rounding * r->norm * c->largest_bound;
    i64 first_count = count;
    for (i64 i = 0; i < n; i++) {
      if (row->keys[i] >= kth) continue;
      if (row->values[i] >= least) s->which[count++] = (int32_t)i;
      else s->scores[i] = 0.0f;
    }
    scratch rest = *s;
    rest.which += first_count;
    if (!score_some(row, w, r, values, &rest, count - first_count)) return STALE_COPY;
  }
  if (r->exact) return OK;
  *scored += count;
  i64 positive = 0;
  for (i64 i = 0; i < n; i += 16) {
    __m512i keys = keys_of(rounded(_mm512_loadu_ps(s->scores + i), w->dtype));
    __mmask16 mask = _mm512_mask_cmpgt_epi32_mask(first(n - i), keys, _mm512_setzero_si512());
    __m512i latents = _mm512_loadu_si512(row->latents + i);
    _mm512_storeu_si512(row->keys + positive, _mm512_maskz_compress_epi32(mask, keys));
    _mm512_storeu_si512(row->latents + positive, _mm512_maskz_compress_epi32(mask, latents));
    positive += _mm_popcnt_u32(mask);
  }
  if (n_active) *n_active = (int32_t)positive;
  positive = keep_best(row->latents, row->keys, positive, k);
  write_code(row->latents, row->keys, positive, k, sorted, s->spare, acts, indices, w->dtype);
  return OK;
}

/* -- a block of rows --------------------------------------------------------------------------- */

/* Memory of a block, in one piece; the latents are shared out in `parts`. */
typedef struct {
  char *memory;
  block b;
  list *lists;   /* [parts, n] */
  scratch *ends; /* [parts] */
} workspace;

INLINE i64 aligned(i64 bytes) { return (bytes + 63) / 64 * 64; }

static void *take(char **at, i64 bytes) {
  void *piece = *at;
  *at += aligned(bytes);
  return piece;
}

static int allocate(workspace *to, const job *w, i64 n, i64 parts) {
  i64 depth = padded_depth(w->c->D), tiled = (n + 31) / 32 * 32, most = w->capacity + PANEL;
  i64 row = sizeof(residual) + depth * sizeof(float) + depth;
  i64 part = n * (sizeof(list) + list_words(w->capacity) * 4 + 64) + sizeof(scratch) +
             4 * most * 4 + 2 * w->k * 4;
  to->memory = malloc(n * row + tiled * depth + parts * (part + 8 * 64) + 16 * 64);
  if (!to->memory) return NO_MEMORY;
  char *at = to->memory + (aligned((i64)(intptr_t)to->memory) - (i64)(intptr_t)to->memory);
  block *b = &to->b;
  b->rows = take(&at, n * sizeof *b->rows);
  b->residuals = take(&at, n * depth * sizeof *b->residuals);
  b->levels = take(&at, n * depth);
  b->tiles = take(&at, tiled * depth);
  to->lists = take(&at, parts * n * sizeof *to->lists);
  to->ends = take(&at, parts * sizeof *to->ends);
  for (i64 p = 0; p < parts; p++) {
    scratch *s = to->ends + p;
    *s = (scratch){take(&at, most * 4), take(&at, most * 4), take(&at, most * 4),
                   take(&at, 2 * w->k * 4), take(&at, most * 4)};
    for (i64 i = 0; i < n; i++)
      to->lists[p * n + i] =
          make_list(take(&at, list_words(w->capacity) * 4), s->keys, w->capacity);
  }
  return OK;
}

/* Form and quantise n residuals; true if an entry of one needs its dimension as a column. The
   largest entries, over the root mean square of the rest of their row, go into `relative [D]`. */
static int prepare(const job *w, block *b, i64 first_row, int amx, float *relative) {
  const copy *c = w->c;
  i64 D = c->D, depth = padded_depth(D), tile = 16 * depth;
  int outlying = 0;
  for (i64 i = 0; i < b->n; i++) {
    float *r = b->residuals + i * depth, squares, peak;
    memset(r + D, 0, (depth - D) * sizeof *r);
    BY_DTYPE(w->dtype, form_residual(w, first_row + i, r, F32, &squares, &peak),
             form_residual(w, first_row + i, r, BF16, &squares, &peak),
             form_residual(w, first_row + i, r, F16, &squares, &peak));
    int8_t *levels = (int8_t *)b->levels + i * depth;
    residual *row = b->rows + i;
    quantise_residual(c, r, squares, peak, levels, row);
    if (row->outlying) {
      outlying = 1;
      float scale = sqrtf((float)D) * row->inverse / row->inner;
#pragma omp critical(relative)
      for (i64 d = 0; d < D; d++) relative[d] = LARGER(relative[d], fabsf(r[d]) * scale);
    }
    for (i64 d = 0; d < depth; d += DEPTH) {
      __m512i some = _mm512_loadu_si512(levels + d);
      if (amx) _mm512_storeu_si512(b->tiles + i / 16 * tile + d * 16 + i % 16 * DEPTH, some);
      else _mm512_storeu_si512(levels + d, _mm512_xor_si512(some, _mm512_set1_epi8((char)0x80)));
    }
  }
  return outlying;
}

static void begin_lists(const job *w, list *lists, int32_t *keys, const block *b) {
  for (i64 i = 0; i < b->n; i++) {
    list *row = lists + i;
    row->keys = keys;
    row->n = row->overflow = 0;
    row->limit = limit_of(row, w);
    row->least = b->rows[i].exact ? INFINITY : -b->rows[i].slack;
  }
}

/* Put what several parts of the latents left of one row into the first of its lists. */
static void join_lists(list *row, i64 stride, i64 parts, const job *w, const residual *r) {
  float least = -INFINITY;
  for (i64 p = 0; p < parts; p++) {
    raise_least(row + p * stride, w, r);
    least = LARGER(least, row[p * stride].least);
    row->overflow |= row[p * stride].overflow;
  }
  for (i64 p = 0; p < parts && !row->overflow; p++) {
    list *other = row + p * stride;
    other->least = least;
    drop_below(other);
    if (p == 0) continue;
    if (row->n + other->n > row->capacity) {
      row->overflow = 1;
      return;
    }
    memcpy(row->latents + row->n, other->latents, other->n * sizeof *other->latents);
    memcpy(row->values + row->n, other->values, other->n * sizeof *other->values);
    row->n += other->n;
  }
}

/* Encode N residuals.

   Returns OK; NEW_COLUMNS: nothing is written but `relative`, which says at which dimensions
   entries stretch the steps; STALE_COPY; NO_MEMORY. `left [N]` is set to 1 for rows that are left
   to the exact path, else to 0; `counts` are the number of (row, latent) pairs that were scored
   exactly, and of rows left. `thresholds` and `n_active` as of `resae_select`. */
int resae_screened_encode(const copy *c, const void *x, i64 x_stride, const void *prediction,
                          i64 prediction_stride, const void *pre_bias, int dtype, i64 N, i64 k,
                          int sorted, int use_amx, int accept_outliers, int threads,
                          const void *thresholds, void *acts, i64 *indices, int32_t *n_active,
                          uint8_t *left, float *relative, i64 *counts) {
  job work = {c, x, prediction, pre_bias, thresholds, x_stride, prediction_stride, k, dtype,
              dtype == F32 ? 0.0f : dtype == BF16 ? 1.0f / 128 : 1.0f / 1024, 0};
  const job *w = &work;
  if (!holds_samples(c)) return STALE_COPY;
  i64 panels = padded_latents(c->M) / PANEL;
  /* With thresholds k bounds no more than what is kept of the candidates. */
  work.capacity = LARGER(2048, thresholds ? c->M / 16 : 8 * k) + PANEL;
  threads = (int)LARGER(1, SMALLER(threads, N * panels * c->D / (1 << 16)));
  /* Few rows share their latents out among threads, many their rows. */
  i64 block_rows = SMALLER(ROW_BLOCK, (N + threads - 1) / threads);
  i64 parts = 1;
  if (block_rows < 32) {
    block_rows = SMALLER(N, ROW_BLOCK);
    parts = threads;
  }
  i64 blocks = (N + block_rows - 1) / block_rows;
  int amx = use_amx && SMALLER(N, block_rows) > 4;
  int status = OK, team = parts > 1 ? 1 : (int)SMALLER(threads, blocks);
  i64 total = 0, rows_left = 0;
#pragma omp parallel num_threads(team) if (team > 1) reduction(+ : total, rows_left)
  {
    workspace space;
    int mine = allocate(&space, w, block_rows, parts);
#pragma omp for schedule(dynamic)
    for (i64 which = 0; which < blocks; which++) {
      int seen;
#pragma omp atomic read
      seen = status;
      if (mine != OK || seen != OK) continue;
      i64 from = which * block_rows;
      space.b.n = SMALLER(block_rows, N - from);
      if (prepare(w, &space.b, from, amx, relative) && !accept_outliers) {
#pragma omp atomic write
        status = NEW_COLUMNS;
        continue;
      }
i64 n = space.b.n, found = 0, given_up = 0;
#pragma omp parallel for num_threads((int)parts) if (parts > 1)
      for (i64 part = 0; part < parts; part++) {
        list *lists = space.lists + part * n;
        begin_lists(w, lists, space.ends[part].keys, &space.b);
        i64 begin = panels / 2 * part / parts * 2, end = panels / 2 * (part + 1) / parts * 2;
        if (amx) screen_by_amx(w, &space.b, lists, begin, end);
        else screen_by_vnni(w, &space.b, lists, begin, end);
      }
#pragma omp parallel for num_threads((int)parts) if (parts > 1 && n > 1)                           \
    reduction(+ : found, given_up)
      for (i64 i = 0; i < n; i++) {
        i64 at = from + i;
        residual *r = space.b.rows + i;
        list *row = space.lists + i;
        scratch *end = space.ends + (parts > 1 ? omp_get_thread_num() : 0);
        for (i64 part = 0; part < parts; part++) row[part * n].keys = end->keys; /* this thread's */
        if (parts > 1) join_lists(row, n, parts, w, r);
        int ended = finish_row(row, w, r, space.b.residuals + i * padded_depth(c->D), end, sorted,
                               (char *)acts + at * k * size_of(dtype), indices + at * k,
                               thresholds ? n_active + at : 0, &found);
        left[at] = (uint8_t)r->exact;
        given_up += r->exact;
        if (ended != OK)
#pragma omp atomic write
          status = ended;
      }
      total += found;
      rows_left += given_up;
    }
    if (mine != OK)
#pragma omp atomic write
      status = mine;
    free(space.memory);
  }
  counts[0] = total;
  counts[1] = rows_left;
  return status;
}

/* -- sparse decode ----------------------------------------------------------------------------- */

/* One code of each token and its dictionary. */
typedef struct {
  const void *acts; /* [N, k] */
  const i64 *indices;
  const void *W; /* [M, D], rows `stride` entries apart */
  i64 k, M, stride;
} code;

/* Rows ahead of the one being added that are prefetched: rows lie anywhere in the dictionary. */
enum { ROWS_AHEAD = 6 };

INLINE void prefetch_strip(const void *row, i64 d, int C, int dtype) {
  const char *at = (const char *)row + d * size_of(dtype);
  for (i64 byte = 0; byte < 16 * C * size_of(dtype); byte += 64)
    _mm_prefetch(at + byte, _MM_HINT_T0);
}

/* out[d …] = Σ acts · W + prediction + bias, of 16·C entries from d (`mask`: of the last 16);
   summed in float32 and rounded once. */
INLINE void decode_strip(const code *codes, i64 n_codes, i64 n, const void *bias,
                         const void *prediction, void *out, i64 d, int C, __mmask16 mask,
                         int dtype) {
  __m512 sums[24];
  for (int c = 0; c < C; c++) sums[c] = _mm512_setzero_ps();
  for (const code *m = codes; m < codes + n_codes; m++) {
    const i64 *indices = m->indices + n * m->k;
    const char *acts = (const char *)m->acts + n * m->k * size_of(dtype);
    for (i64 j = 0; j < SMALLER(m->k, ROWS_AHEAD); j++)
      prefetch_strip(row_at(m->W, indices[j], m->stride, dtype), d, C, dtype);
    for (i64 j = 0; j < m->k; j++) {
      if (j + ROWS_AHEAD < m->k)
        prefetch_strip(row_at(m->W, indices[j + ROWS_AHEAD], m->stride, dtype), d, C, dtype);
      float act = _mm512_cvtss_f32(load(acts, j, 1, dtype));
      if (act == 0.0f) continue; /* padding */
      const void *row = row_at(m->W, indices[j], m->stride, dtype);
      __m512 a = _mm512_set1_ps(act);
      for (int c = 0; c < C; c++)
        sums[c] = _mm512_fmadd_ps(a, load(row, d + 16 * c, mask, dtype), sums[c]);
    }
  }
  for (int c = 0; c < C; c++) {
    i64 at = d + 16 * c;
    __m512 sum = sums[c];
    if (prediction) sum = _mm512_add_ps(sum, load(prediction, at, mask, dtype));
    if (bias) sum = _mm512_add_ps(sum, load(bias, at, mask, dtype));
    store(out, at, mask, sum, dtype);
  }
}

INLINE void decode_row(const code *codes, i64 n_codes, i64 n, const void *bias,
                       const void *prediction, void *out, i64 D, int dtype) {
#define STRIPS(C)                                                                                  \
  for (; d + 16 * (C) <= D; d += 16 * (C))                                                         \
    decode_strip(codes, n_codes, n, bias, prediction, out, d, C, 0xFFFF, dtype)
  i64 d = 0;
  STRIPS(24);
  STRIPS(8);
  STRIPS(4);
  STRIPS(1);
  if (d < D) decode_strip(codes, n_codes, n, bias, prediction, out, d, 1, first(D - d), dtype);
#undef STRIPS
}

static int all_within(const i64 *indices, i64 n, i64 M) {
  for (i64 i = 0; i < n; i++)
    if (indices[i] < 0 || indices[i] >= M) return 0;
  return 1;
}

/* out [N, D] = Σ over codes, + bias [D] + prediction [N, D]. Everything has one dtype and is
   contiguous but for the dictionaries, whose rows are. Returns BAD_INDEX if an index lies outside
   its dictionary. */
int resae_decode(const code *codes, i64 n_codes, i64 N, i64 D, int dtype, const void *bias,
                 const void *prediction, int threads, void *out) {
  i64 entries = 0;
  for (const code *m = codes; m < codes + n_codes; m++) {
    entries += m->k;
    if (!all_within(m->indices, N * m->k, m->M)) return BAD_INDEX;
  }
  threads = (int)LARGER(1, SMALLER(threads, SMALLER(N, N * entries * D / (1 << 17))));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (i64 n = 0; n < N; n++) {
    const void *from = prediction ? row_at(prediction, n, D, dtype) : 0;
    void *to = (char *)out + n * D * size_of(dtype);
    BY_DTYPE(dtype, decode_row(codes, n_codes, n, bias, from, to, D, F32),
             decode_row(codes, n_codes, n, bias, from, to, D, BF16),
             decode_row(codes, n_codes, n, bias, from, to, D, F16));
  }
  return OK;
}

/* -- gradients of a decode --------------------------------------------------------------------- */

/* Sums over the lanes of each of 16 registers. */
INLINE __m512 lane_sums(const __m512 *v) {
  __m512 pairs[8], quads[4], halves[2];
  for (int i = 0; i < 8; i++)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                             _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; i++)
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xDD));
  return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                       _mm512_shuffle_f32x4(halves[0], halves[1], 0xDD));
}

/* ⟨x, row⟩ of L ≤ 16 rows, each in 16 partial sums; lanes L … 15 are 0. */
INLINE __m512 dots(const void *x, const void *const *rows, int L, i64 D, int dtype) {
  __m512 sums[16];
  for (int l = 0; l < 16; l++) sums[l] = _mm512_setzero_ps();
#define STEP(mask)                                                                                 \
  do {                                                                                             \
    __m512 some = load(x, d, mask, dtype);                                                         \
    for (int l = 0; l < L; l++)                                                                    \
      sums[l] = _mm512_fmadd_ps(some, load(rows[l], d, mask, dtype), sums[l]);                     \
  } while (0)
  i64 d = 0;
  for (; d + 16 <= D; d += 16) STEP(0xFFFF);
  if (d < D) STEP(first(D - d));
#undef STEP
  return lane_sums(sums);
}

/* out[j] = ⟨x, W[indices[j]]⟩ of k latents: 16 at a time, then 8, the last one repeated. */
INLINE void sample_row(const void *x, const i64 *indices, const void *W, i64 stride, i64 k, i64 D,
                       int dtype, void *out) {
  const void *rows[16];
  i64 j = 0;
#define SOME(L)                                                                                    \
  do {                                                                                             \
    for (int l = 0; l < (L); l++)                                                                  \
      rows[l] = row_at(W, indices[SMALLER(j + l, k - 1)], stride, dtype);                          \
    store(out, j, first(SMALLER(k - j, L)), dots(x, rows, L, D, dtype), dtype);                    \
    j += (L);                                                                                      \
  } while (0)
  while (j + 8 < k) SOME(16);
  while (j < k) SOME(8);
#undef SOME
}

/* out [N, k] = ⟨x [N, D], W [M, D] at the index⟩. Everything has one dtype and is contiguous but
   for W, whose rows are. */
int resae_sddmm(const void *x, const i64 *indices, const void *W, i64 stride, int dtype, i64 N,
                i64 k, i64 M, i64 D, int threads, void *out) {
  if (!all_within(indices, N * k, M)) return BAD_INDEX;
  threads = (int)LARGER(1, SMALLER(threads, SMALLER(N, N * k * D / (1 << 17))));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (i64 n = 0; n < N; n++) {
    const void *from = row_at(x, n, D, dtype);
    void *to = (char *)out + n * k * size_of(dtype);
    BY_DTYPE(dtype, sample_row(from, indices + n * k, W, stride, k, D, F32, to),
             sample_row(from, indices + n * k, W, stride, k, D, BF16, to),
             sample_row(from, indices + n * k, W, stride, k, D, F16, to));
  }
  return OK;
}

/* The bits of an act; 0 for both zeros, which are padding. */
INLINE uint32_t act_bits(const void *acts, i64 e, int dtype) {
  uint32_t bits = dtype == F32 ? ((const uint32_t *)acts)[e] : ((const uint16_t *)acts)[e];
  return bits == (dtype == F32 ? 0x80000000u : 0x8000u) ? 0 : bits;
}

/* Σ weights · rows over the entries of a code [N, k] that name the latent: weights [N, k], rows
   [N, D], `stride` entries apart, to out [M, D]. */
typedef struct {
  const void *weights, *rows;
  i64 stride;
  void *out;
} latent_sum;

/* Counting sort of the entries of a code [N, k] whose act is not 0, by latent and then by token:
   for each sum its weights, [N·k] of them one after another in `sorted`; tokens, and the end of each
   latent's entries. The acts are the weights of the first sum. */
INLINE void sort_by_latent(const latent_sum *sums, i64 n_sums, const i64 *indices, i64 N, i64 k,
                           i64 M, int dtype, void *sorted, i64 *tokens, i64 *ends) {
  memset(ends, 0, M * sizeof *ends);
  const void *acts = sums->weights;
  for (i64 e = 0; e < N * k; e++) ends[indices[e]] += act_bits(acts, e, dtype) != 0;
  for (i64 m = 0, start = 0; m < M; m++) {
    i64 count = ends[m];
    ends[m] = start;
    start += count;
  }
  for (i64 n = 0; n < N; n++)
    for (i64 e = n * k; e < n * k + k; e++) {
      if (!act_bits(acts, e, dtype)) continue;
      i64 at = ends[indices[e]]++;
      tokens[at] = n;
      for (i64 s = 0; s < n_sums; s++) {
        uint32_t bits = act_bits(sums[s].weights, e, dtype);
        if (dtype == F32) ((uint32_t *)sorted)[s * N * k + at] = bits;
        else ((uint16_t *)sorted)[s * N * k + at] = (uint16_t)bits;
      }
    }
}

/* Ask for pages of 2 MiB in new memory that is written throughout: faults on pages of 4 KiB would
   take most of the time of writing it. */
static void take_in_large_pages(void *memory, i64 bytes) {
#if defined(__linux__)
  const uintptr_t page = 2 << 20;
  uintptr_t begin = ((uintptr_t)memory + page - 1) / page * page;
  uintptr_t end = ((uintptr_t)memory + bytes) / page * page;
  if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE); /* refused: as before */
#endif
}

/* The sums by latent, in order of token: each row of an output is the decode of one long code,
   whose dictionary is `rows`. Everything has one dtype and is contiguous but for `rows`, whose rows
   are. */
int resae_scatter_outer(const latent_sum *sums, i64 n_sums, const i64 *indices, int dtype, i64 N,
                        i64 k, i64 M, i64 D, int threads) {
  enum { LATENTS = 32 };
  i64 entries = N * k, size = size_of(dtype);
  if (!all_within(indices, entries, M)) return BAD_INDEX;
  i64 *ends = malloc((M + entries) * sizeof *ends + n_sums * entries * size);
  if (!ends) return NO_MEMORY;
  i64 *tokens = ends + M;
  char *weights = (char *)(tokens + entries);
  BY_DTYPE(dtype, sort_by_latent(sums, n_sums, indices, N, k, M, F32, weights, tokens, ends),
           sort_by_latent(sums, n_sums, indices, N, k, M, BF16, weights, tokens, ends),
           sort_by_latent(sums, n_sums, indices, N, k, M, F16, weights, tokens, ends));
  for (i64 s = 0; s < n_sums; s++) take_in_large_pages(sums[s].out, M * D * size);
  threads = (int)LARGER(1, SMALLER(threads, n_sums * (entries + M) * D / (1 << 17)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (i64 s = 0; s < n_sums; s++) {
#pragma omp for schedule(dynamic, LATENTS) nowait
    for (i64 m = 0; m < M; m++) {
      i64 start = m ? ends[m - 1] : 0;
      code its = {weights + (s * entries + start) * size, tokens + start, sums[s].rows,
                  ends[m] - start, N, sums[s].stride};
      void *to = (char *)sums[s].out + m * D * size;
      BY_DTYPE(dtype, decode_row(&its, 1, 0, 0, 0, to, D, F32),
               decode_row(&its, 1, 0, 0, 0, to, D, BF16),
               decode_row(&its, 1, 0, 0, 0, to, D, F16));
    }
  }
  free(ends);
  return OK;
}

/* out [M] = Σ acts over the entries [n] that name the latent, one after another, in float32. */
int resae_scatter_sum(const float *acts, const i64 *indices, i64 n, i64 M, float *out) {
  if (!all_within(indices, n, M)) return BAD_INDEX;
  memset(out, 0, M * sizeof *out);
  for (i64 e = 0; e < n; e++) out[indices[e]] += acts[e];
  return OK;
}

/* -- exact encode of few rows ------------------------------------------------------------------ */

/* out[r · L + l] = ⟨residuals[r], weight[latent + l]⟩ of L latents and R rows, L · R = 16. Latents
   past the last one repeat it. */
INLINE void dot_tile(const copy *c, const float *residuals, i64 latent, int L, int R, int dtype,
                     float *out) {
  i64 depth = padded_depth(c->D), d = 0;
  const void *rows[16];
  __m512 sums[16];
  for (int l = 0; l < L; l++)
    rows[l] = row_at(c->weight, SMALLER(latent + l, c->M - 1), c->weight_stride, dtype);
  for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();
#define STEP(mask)                                                                                 \
  for (int r = 0; r < R; r++) {                                                                    \
    __m512 x = _mm512_loadu_ps(residuals + r * depth + d); /* 0 past D */                          \
    for (int l = 0; l < L; l++)                                                                    \
      sums[r * L + l] = _mm512_fmadd_ps(x, load(rows[l], d, mask, dtype), sums[r * L + l]);        \
  }
  for (; d + 16 <= c->D; d += 16) STEP(0xFFFF)
  if (d < c->D) STEP(first(c->D - d))
#undef STEP
  _mm512_storeu_ps(out, lane_sums(sums));
}

/* Scores of 16 latents from `latent` for n residuals, rounded to `dtype`: into scores [n, M']. */
INLINE void score_panel(const copy *c, const float *residuals, i64 n, i64 latent, int dtype,
                        float *scores) {
  i64 depth = padded_depth(c->D), M = padded_latents(c->M), row = 0;
  __mmask16 mask = first(c->M - latent);
  __m512 bias = _mm512_setzero_ps();
  if (c->bias) bias = load(c->bias, latent, mask, dtype);
  float sums[4][4][4];
  for (; row + 4 <= n; row += 4) {
    for (int i = 0; i < 4; i++)
      dot_tile(c, residuals + row * depth, latent + 4 * i, 4, 4, dtype, sums[i][0]);
    for (int r = 0; r < 4; r++) {
      float *to = scores + (row + r) * M + latent;
      for (int i = 0; i < 4; i++) memcpy(to + 4 * i, sums[i][r], 16);
      _mm512_storeu_ps(to, rounded(_mm512_add_ps(_mm512_loadu_ps(to), bias), dtype));
    }
  }
  for (; row < n; row++) {
    dot_tile(c, residuals + row * depth, latent, 16, 1, dtype, sums[0][0]);
    __m512 panel = _mm512_add_ps(_mm512_loadu_ps(sums[0][0]), bias);
    _mm512_storeu_ps(scores + row * M + latent, rounded(panel, dtype));
  }
}

/* Encode x − prediction − pre_bias [N, D] by all scores: float32 sums, rounded to the dtype of the
   inputs. For few rows: every score is held at once. Contiguous but for the rows of the weight.
   `thresholds` and `n_active` as of `resae_select`. */
int resae_exact_encode(const void *x, const void *prediction, const void *pre_bias,
                       const void *weight, i64 weight_stride, const void *bias, int dtype, i64 N,
                       i64 M, i64 D, i64 k, int sorted, int threads, const void *thresholds,
                       void *acts, i64 *indices, int32_t *n_active) {
  copy fake = {.M = M, .D = D, .weight = weight, .weight_stride = weight_stride, .bias = bias};
  const copy *c = &fake;
  job w = {.c = c,
           .x = x,
           .prediction = prediction,
           .pre_bias = pre_bias,
           .x_stride = D,
           .prediction_stride = D};
  i64 depth = padded_depth(D), panels = (M + PANEL - 1) / PANEL, capacity = roomy(k);
  i64 words = 3 * (capacity + PANEL) + 2 * k, levels = thresholds ? padded_latents(M) : 0;
  float *residuals = malloc((N * (depth + padded_latents(M)) + levels + words) * sizeof *residuals);
  if (!residuals) return NO_MEMORY;
  float *scores = residuals + N * depth, *wide = scores + N * padded_latents(M), squares, peak;
  for (i64 m = 0; m < (thresholds ? M : 0); m += 16) /* as the scores, in float32 */
    _mm512_storeu_ps(wide + m, load(thresholds, m, first(M - m), dtype));
  for (i64 n = 0; n < N; n++) {
    float *r = residuals + n * depth;
    BY_DTYPE(dtype, form_residual(&w, n, r, F32, &squares, &peak),
             form_residual(&w, n, r, BF16, &squares, &peak),
             form_residual(&w, n, r, F16, &squares, &peak));
  }
  threads = (int)LARGER(1, SMALLER(threads, N * M * D / (1 << 18)));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (i64 p = 0; p < panels; p++)
    BY_DTYPE(dtype, score_panel(c, residuals, N, p * PANEL, F32, scores),
             score_panel(c, residuals, N, p * PANEL, BF16, scores),
             score_panel(c, residuals, N, p * PANEL, F16, scores));
  int32_t *memory = (int32_t *)(wide + levels);
  int32_t *keys = memory + list_words(capacity);
  list row = make_list(memory, keys, capacity);
  for (i64 n = 0; n < N; n++) {
    i64 active = select_row_of(&row, scores + n * padded_latents(M), thresholds ? wide : 0, M, k, F32);
    if (thresholds) n_active[n] = (int32_t)active;
    write_code(row.latents, row.keys, row.n, k, sorted, keys + capacity + PANEL,
               (char *)acts + n * k * size_of(dtype), indices + n * k, dtype);
  }
  free(residuals);
  return OK;
}

/* -- online step ------------------------------------------------------------------------------- */

/* out [N, D] = source A + c, all contiguous: a decode that names every row. For few tokens, as A is
   read anew for each. */
static int affine_rows(const void *source, const void *A, const void *c, int dtype, i64 N, i64 D,
                       int threads, void *out) {
  i64 *rows = malloc(N * D * sizeof *rows);
  if (!rows) return NO_MEMORY;
  for (i64 i = 0; i < N * D; i++) rows[i] = i % D;
  code every = {source, rows, A, D, D, D};
  int status = resae_decode(&every, 1, N, D, dtype, c, 0, threads, out);
  free(rows);
  return status;
}

/* Arguments that the online steps of one layer share. Everything is contiguous and of one dtype. */
typedef struct {
  const void *A, *c; /* [D, D], [D]: of the prediction `source A + c`; null where it is given */
  const void *b_dec; /* [D] or null */
  const void *W_dec; /* [M, D] */
  i64 k, dtype, sorted, use_amx;
} layer;

/* One layer while the model runs: the code of x − prediction − b_dec [N, D] by screening, and
   x_hat = prediction + b_dec + its decode. If the layer has A, the argument `prediction` is the
   source of the prediction `source A + c`. Everything is contiguous. Returns ROWS_LEFT if a row
   needs the exact path, otherwise as `resae_screened_encode`. */
int resae_online_step(const copy *screen, const layer *l, const void *x, const void *prediction,
                      i64 N, int threads, void *acts, i64 *indices, void *x_hat) {
  i64 D = screen->D, predicted = N * D * sizeof(float);
  int dtype = (int)l->dtype;
  char *memory = calloc(predicted + D * sizeof(float) + N, 1);
  if (!memory) return NO_MEMORY;
  float *relative = (float *)(memory + predicted);
  int status = OK;
  if (l->A) {
    status = affine_rows(prediction, l->A, l->c, dtype, N, D, threads, memory);
    prediction = memory;
  }
  i64 counts[2] = {0, 0};
  if (status == OK)
    status = resae_screened_encode(screen, x, D, prediction, D, l->b_dec, dtype, N, l->k,
                                   (int)l->sorted, (int)l->use_amx,
                                   screen->n_columns == MOST_COLUMNS, threads, 0, acts, indices, 0,
                                   (uint8_t *)(relative + D), relative, counts);
  if (status == OK && counts[1]) status = ROWS_LEFT;
  if (status == OK) {
    code its = {acts, indices, l->W_dec, l->k, screen->M, D};
    status = resae_decode(&its, 1, N, D, dtype, l->b_dec, prediction, threads, x_hat);
  }
  free(memory);
  return status;
}
