/* Vectors of 16 floats, the rows of a unit group, in whatever registers there are. A part of tsr_runtime.c.
 *
 * SPDX-License-Identifier: Apache-2.0
 * Written by triton-sparse-rnn; ship it as tsr_runtime.h says.
 *
 * v16          16 floats
 * v_bank       32 neighbouring floats, out of which each lane of a vector takes its own
 * v_picks      16 words of 32 bits, one for each lane: its pick in the lowest 5 bits, later picks above
 */
#ifndef TSR_VECTORS_H
#define TSR_VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(_MSC_VER) && !defined(__clang__)
#define TSR_INLINE static __forceinline
#elif defined(__GNUC__)
#define TSR_INLINE static inline __attribute__((always_inline))
#else
#define TSR_INLINE static inline
#endif

enum { F32, F16, BF16, I8, DTYPES }; /* of stored weights */
enum { LANES = 16, BANK = 32, PICK_BITS = 5 };

#if defined(TSR_PLAIN)
#define TSR_INSTRUCTIONS "plain C"
#elif defined(__AVX512F__)
#define TSR_INSTRUCTIONS "AVX-512"
#elif defined(__AVX2__) && (defined(__FMA__) || defined(_MSC_VER))
#define TSR_INSTRUCTIONS "AVX2"
#define TSR_AVX2
#elif defined(__aarch64__) || defined(_M_ARM64)
#define TSR_INSTRUCTIONS "NEON"
#define TSR_NEON
#else
#define TSR_INSTRUCTIONS "plain C"
#define TSR_PLAIN
#endif

/* A float16 without the processor's help: its bits stand in those of a float, 112 too low in the exponent. */
TSR_INLINE float float_of_half(uint16_t half)
{
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 0x1p112f; /* exact, of subnormal numbers too */
    memcpy(&bits, &value, 4);
    if ((half & 0x7c00) == 0x7c00)
        bits |= 0x7f800000; /* infinity or NaN */
    bits |= (uint32_t)(half & 0x8000) << 16;
    memcpy(&value, &bits, 4);
    return value;
}

#if defined(TSR_PLAIN)

typedef struct { float lane[LANES]; } v16;
typedef struct { const float *inputs; } v_bank;
typedef struct { uint32_t lane[LANES]; } v_picks;

#define EACH_LANE for (int i = 0; i < LANES; i++)

TSR_INLINE v16 v_load(const void *from) { v16 v; memcpy(&v, from, sizeof v); return v; }
TSR_INLINE void v_store(float *to, v16 v) { memcpy(to, &v, sizeof v); }
TSR_INLINE v16 v_set(float x) { v16 v; EACH_LANE v.lane[i] = x; return v; }
TSR_INLINE v16 v_add(v16 a, v16 b) { EACH_LANE a.lane[i] += b.lane[i]; return a; }
TSR_INLINE v16 v_sub(v16 a, v16 b) { EACH_LANE a.lane[i] -= b.lane[i]; return a; }
TSR_INLINE v16 v_mul(v16 a, v16 b) { EACH_LANE a.lane[i] *= b.lane[i]; return a; }
TSR_INLINE v16 v_div(v16 a, v16 b) { EACH_LANE a.lane[i] /= b.lane[i]; return a; }
TSR_INLINE v16 v_add_product(v16 sum, v16 a, v16 b) { EACH_LANE sum.lane[i] += a.lane[i] * b.lane[i]; return sum; }
TSR_INLINE v16 v_clamp(v16 x, float limit)
{
    EACH_LANE x.lane[i] = x.lane[i] < -limit ? -limit : x.lane[i] > limit ? limit : x.lane[i];
    return x;
}
TSR_INLINE v16 v_one_beyond(v16 x, float limit, v16 value)
{
    EACH_LANE value.lane[i] = x.lane[i] < -limit ? -1.0f : x.lane[i] > limit ? 1.0f : value.lane[i];
    return value;
}
TSR_INLINE v16 v_relu(v16 x) { EACH_LANE x.lane[i] = x.lane[i] < 0.0f ? 0.0f : x.lane[i]; return x; }

TSR_INLINE v16 v_load_weights(const unsigned char *from, int dtype)
{
    v16 v;
    if (dtype == I8) {
        signed char bytes[LANES];
        memcpy(bytes, from, sizeof bytes);
        EACH_LANE v.lane[i] = bytes[i];
    } else if (dtype == F32) {
        v = v_load(from);
    } else {
        uint16_t halves[LANES];
        memcpy(halves, from, sizeof halves);
        if (dtype == F16) {
            EACH_LANE v.lane[i] = float_of_half(halves[i]);
        } else {
            uint32_t bits[LANES];
            EACH_LANE bits[i] = (uint32_t)halves[i] << 16;
            memcpy(&v, bits, sizeof v);
        }
    }
    return v;
}

TSR_INLINE v_bank v_load_bank(const float *inputs) { v_bank bank = {inputs}; return bank; }
TSR_INLINE v_picks v_load_picks(const unsigned char *from) { v_picks p; memcpy(&p, from, sizeof p); return p; }
TSR_INLINE v_picks v_next_picks(v_picks p) { EACH_LANE p.lane[i] >>= PICK_BITS; return p; }
TSR_INLINE v16 v_pick(v_bank bank, v_picks p)
{
    v16 v;
    EACH_LANE v.lane[i] = bank.inputs[p.lane[i] % BANK];
    return v;
}

#elif defined(__AVX512F__)

#include <immintrin.h>

typedef __m512 v16;
typedef struct { __m512 low, high; } v_bank;
typedef __m512i v_picks;

TSR_INLINE v16 v_load(const void *from) { return _mm512_loadu_ps(from); }
TSR_INLINE void v_store(float *to, v16 v) { _mm512_storeu_ps(to, v); }
TSR_INLINE v16 v_set(float x) { return _mm512_set1_ps(x); }
TSR_INLINE v16 v_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
TSR_INLINE v16 v_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
TSR_INLINE v16 v_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
TSR_INLINE v16 v_add_product(v16 sum, v16 a, v16 b) { return _mm512_fmadd_ps(a, b, sum); }
TSR_INLINE v16 v_div(v16 a, v16 b) /* a reciprocal of 14 bits and a step of Newton's: it waits less than a division */
{
    v16 guess = _mm512_rcp14_ps(b);
    return v_mul(a, v_add_product(guess, guess, _mm512_fnmadd_ps(b, guess, v_set(1.0f))));
}
TSR_INLINE v16 v_clamp(v16 x, float limit) /* of a NaN, min and max return the second operand */
{
    return _mm512_min_ps(v_set(limit), _mm512_max_ps(v_set(-limit), x));
}
TSR_INLINE v16 v_one_beyond(v16 x, float limit, v16 value)
{
    value = _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, v_set(-limit), _CMP_LT_OQ), v_set(-1.0f));
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, v_set(limit), _CMP_GT_OQ), v_set(1.0f));
}
TSR_INLINE v16 v_relu(v16 x) { return _mm512_max_ps(v_set(0.0f), x); }

TSR_INLINE v16 v_load_weights(const unsigned char *from, int dtype)
{
    if (dtype == I8)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
    if (dtype == F32)
        return v_load(from);
    __m256i halves = _mm256_loadu_si256((const __m256i *)from);
    if (dtype == F16)
        return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

TSR_INLINE v_bank v_load_bank(const float *inputs)
{
    v_bank bank = {v_load(inputs), v_load(inputs + 16)};
    return bank;
}
TSR_INLINE v_picks v_load_picks(const unsigned char *from) { return _mm512_loadu_si512(from); }
TSR_INLINE v_picks v_next_picks(v_picks p) { return _mm512_srli_epi32(p, PICK_BITS); }
TSR_INLINE v16 v_pick(v_bank bank, v_picks p) { return _mm512_permutex2var_ps(bank.low, p, bank.high); }

#elif defined(TSR_AVX2)

#include <immintrin.h>

typedef struct { __m256 a, b; } v16;
typedef struct { __m256 part[4]; } v_bank;
typedef struct { __m256i a, b; } v_picks;

TSR_INLINE v16 v_pair(__m256 a, __m256 b) { v16 v = {a, b}; return v; }
TSR_INLINE v16 v_load(const void *from)
{
    return v_pair(_mm256_loadu_ps(from), _mm256_loadu_ps((const float *)from + 8));
}
TSR_INLINE void v_store(float *to, v16 v) { _mm256_storeu_ps(to, v.a); _mm256_storeu_ps(to + 8, v.b); }
TSR_INLINE v16 v_set(float x) { return v_pair(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
TSR_INLINE v16 v_add(v16 x, v16 y) { return v_pair(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
TSR_INLINE v16 v_sub(v16 x, v16 y) { return v_pair(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
TSR_INLINE v16 v_mul(v16 x, v16 y) { return v_pair(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
TSR_INLINE v16 v_div(v16 x, v16 y) { return v_pair(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
TSR_INLINE v16 v_add_product(v16 sum, v16 x, v16 y)
{
    return v_pair(_mm256_fmadd_ps(x.a, y.a, sum.a), _mm256_fmadd_ps(x.b, y.b, sum.b));
}
TSR_INLINE v16 v_clamp(v16 x, float limit) /* of a NaN, min and max return the second operand */
{
    __m256 low = _mm256_set1_ps(-limit), high = _mm256_set1_ps(limit);
    return v_pair(_mm256_min_ps(high, _mm256_max_ps(low, x.a)), _mm256_min_ps(high, _mm256_max_ps(low, x.b)));
}
TSR_INLINE __m256 v_half_beyond(__m256 x, float limit, __m256 value)
{
    __m256 below = _mm256_cmp_ps(x, _mm256_set1_ps(-limit), _CMP_LT_OQ);
    __m256 above = _mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_GT_OQ);
    value = _mm256_blendv_ps(value, _mm256_set1_ps(-1.0f), below);
    return _mm256_blendv_ps(value, _mm256_set1_ps(1.0f), above);
}
TSR_INLINE v16 v_one_beyond(v16 x, float limit, v16 value)
{
    return v_pair(v_half_beyond(x.a, limit, value.a), v_half_beyond(x.b, limit, value.b));
}
TSR_INLINE v16 v_relu(v16 x)
{
    return v_pair(_mm256_max_ps(_mm256_setzero_ps(), x.a), _mm256_max_ps(_mm256_setzero_ps(), x.b));
}

TSR_INLINE __m256 v_load_half(const unsigned char *from, int dtype)
{
    if (dtype == I8)
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
    __m128i halves = _mm_loadu_si128((const __m128i *)from);
    if (dtype == BF16)
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#if defined(__F16C__) || defined(_MSC_VER)
    return _mm256_cvtph_ps(halves);
#else
    uint16_t half[8];
    float value[8];
    _mm_storeu_si128((__m128i *)half, halves);
    for (int i = 0; i < 8; i++)
        value[i] = float_of_half(half[i]);
    return _mm256_loadu_ps(value);
#endif
}
TSR_INLINE v16 v_load_weights(const unsigned char *from, int dtype)
{
    if (dtype == F32)
        return v_load(from);
    return v_pair(v_load_half(from, dtype), v_load_half(from + (dtype == I8 ? 8 : 16), dtype));
}

TSR_INLINE v_bank v_load_bank(const float *inputs)
{
    v_bank bank = {{_mm256_loadu_ps(inputs), _mm256_loadu_ps(inputs + 8), _mm256_loadu_ps(inputs + 16),
                    _mm256_loadu_ps(inputs + 24)}};
    return bank;
}
TSR_INLINE v_picks v_load_picks(const unsigned char *from)
{
    v_picks p = {_mm256_loadu_si256((const __m256i *)from), _mm256_loadu_si256((const __m256i *)(from + 32))};
    return p;
}
TSR_INLINE v_picks v_next_picks(v_picks p)
{
    v_picks next = {_mm256_srli_epi32(p.a, PICK_BITS), _mm256_srli_epi32(p.b, PICK_BITS)};
    return next;
}
TSR_INLINE __m256 v_pick_half(v_bank bank, __m256i p) /* vpermps looks at 3 bits, vblendvps at the highest one */
{
    __m256 bit_3 = _mm256_castsi256_ps(_mm256_slli_epi32(p, 28)), bit_4 = _mm256_castsi256_ps(_mm256_slli_epi32(p, 27));
    __m256 low = _mm256_blendv_ps(_mm256_permutevar8x32_ps(bank.part[0], p),
                                  _mm256_permutevar8x32_ps(bank.part[1], p), bit_3);
    __m256 high = _mm256_blendv_ps(_mm256_permutevar8x32_ps(bank.part[2], p),
                                   _mm256_permutevar8x32_ps(bank.part[3], p), bit_3);
    return _mm256_blendv_ps(low, high, bit_4);
}
TSR_INLINE v16 v_pick(v_bank bank, v_picks p) { return v_pair(v_pick_half(bank, p.a), v_pick_half(bank, p.b)); }

#else /* TSR_NEON */

#include <arm_neon.h>

typedef struct { float32x4_t part[4]; } v16;
typedef struct { uint8x16x4_t low, high; } v_bank;
typedef struct { uint32x4_t part[4]; } v_picks;

#define EACH_PART for (int i = 0; i < 4; i++)

TSR_INLINE v16 v_load(const void *from)
{
    v16 v; /* by bytes, which may lie anywhere */
    EACH_PART v.part[i] = vreinterpretq_f32_u8(vld1q_u8((const uint8_t *)from + 16 * i));
    return v;
}
TSR_INLINE void v_store(float *to, v16 v) { EACH_PART vst1q_f32(to + 4 * i, v.part[i]); }
TSR_INLINE v16 v_set(float x) { v16 v; EACH_PART v.part[i] = vdupq_n_f32(x); return v; }
TSR_INLINE v16 v_add(v16 a, v16 b) { EACH_PART a.part[i] = vaddq_f32(a.part[i], b.part[i]); return a; }
TSR_INLINE v16 v_sub(v16 a, v16 b) { EACH_PART a.part[i] = vsubq_f32(a.part[i], b.part[i]); return a; }
TSR_INLINE v16 v_mul(v16 a, v16 b) { EACH_PART a.part[i] = vmulq_f32(a.part[i], b.part[i]); return a; }
TSR_INLINE v16 v_div(v16 a, v16 b) { EACH_PART a.part[i] = vdivq_f32(a.part[i], b.part[i]); return a; }
TSR_INLINE v16 v_add_product(v16 sum, v16 a, v16 b)
{
    EACH_PART sum.part[i] = vfmaq_f32(sum.part[i], a.part[i], b.part[i]);
    return sum;
}
TSR_INLINE v16 v_clamp(v16 x, float limit) /* min and max return a NaN */
{
    EACH_PART x.part[i] = vminq_f32(vdupq_n_f32(limit), vmaxq_f32(vdupq_n_f32(-limit), x.part[i]));
    return x;
}
TSR_INLINE v16 v_one_beyond(v16 x, float limit, v16 value)
{
    EACH_PART {
        uint32x4_t below = vcltq_f32(x.part[i], vdupq_n_f32(-limit)), above = vcgtq_f32(x.part[i], vdupq_n_f32(limit));
        value.part[i] = vbslq_f32(below, vdupq_n_f32(-1.0f), vbslq_f32(above, vdupq_n_f32(1.0f), value.part[i]));
    }
    return value;
}
TSR_INLINE v16 v_relu(v16 x) { EACH_PART x.part[i] = vmaxq_f32(vdupq_n_f32(0.0f), x.part[i]); return x; }

TSR_INLINE v16 v_load_weights(const unsigned char *from, int dtype)
{
    v16 v;
    if (dtype == F32)
        return v_load(from);
    if (dtype == I8) {
        int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(from));
        int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
        v.part[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
        v.part[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(low)));
        v.part[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
        v.part[3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)));
        return v;
    }
    EACH_PART {
        uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(from + 8 * i));
        v.part[i] = dtype == F16 ? vcvt_f32_f16(vreinterpret_f16_u16(halves))
                                 : vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
    }
    return v;
}

TSR_INLINE v_bank v_load_bank(const float *inputs)
{
    v_bank bank;
    EACH_PART {
        bank.low.val[i] = vreinterpretq_u8_f32(vld1q_f32(inputs + 4 * i));
        bank.high.val[i] = vreinterpretq_u8_f32(vld1q_f32(inputs + 16 + 4 * i));
    }
    return bank;
}
TSR_INLINE v_picks v_load_picks(const unsigned char *from)
{
    v_picks p;
    EACH_PART p.part[i] = vreinterpretq_u32_u8(vld1q_u8(from + 16 * i));
    return p;
}
TSR_INLINE v_picks v_next_picks(v_picks p) { EACH_PART p.part[i] = vshrq_n_u32(p.part[i], PICK_BITS); return p; }
TSR_INLINE v16 v_pick(v_bank bank, v_picks p) /* a table is 64 bytes: one for each half of the bank */
{
    v16 v;
    EACH_PART {
        uint32x4_t pick = vandq_u32(p.part[i], vdupq_n_u32(BANK - 1));
        uint8x16_t bytes = vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), pick, 0x04040404));
        uint8x16_t low = vqtbl4q_u8(bank.low, bytes);
        v.part[i] = vreinterpretq_f32_u8(vqtbx4q_u8(low, bank.high, vsubq_u8(bytes, vdupq_n_u8(64))));
    }
    return v;
}

#endif

/* tanh(x) = x P(x^2) / Q(x^2) up to the limit, the rational approximation of Eigen; from 8.32 on, 1 is nearer. The
 * error is at most 4e-7. Infinity gives exactly 1, so that a gate that it closes is 0. */
TSR_INLINE v16 v_tanh(v16 x)
{
    v16 inside = v_clamp(x, 7.90531110763549805f), square = v_mul(inside, inside);
    v16 p = v_add_product(v_set(2.00018790482477e-13f), v_set(-2.76076847742355e-16f), square);
    p = v_add_product(v_set(-8.60467152213735e-11f), p, square);
    p = v_add_product(v_set(5.12229709037114e-08f), p, square);
    p = v_add_product(v_set(1.48572235717979e-05f), p, square);
    p = v_add_product(v_set(6.37261928875436e-04f), p, square);
    p = v_add_product(v_set(4.89352455891786e-03f), p, square);
    v16 q = v_add_product(v_set(1.18534705686654e-04f), v_set(1.19825839466702e-06f), square);
    q = v_add_product(v_set(2.26843463243900e-03f), q, square);
    q = v_add_product(v_set(4.89352518554385e-03f), q, square);
    return v_one_beyond(x, 8.32f, v_div(v_mul(inside, p), q));
}

TSR_INLINE v16 v_sigmoid(v16 x)
{
    v16 half = v_set(0.5f);
    return v_add_product(half, v_tanh(v_mul(x, half)), half);
}

#endif
