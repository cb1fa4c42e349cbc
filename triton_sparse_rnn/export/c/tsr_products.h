/* A matrix times a vector of inputs, one unit group after another. A part of tsr_runtime.c.
 *
 * SPDX-License-Identifier: Apache-2.0
 * Written by triton-sparse-rnn; ship it as tsr_runtime.h says.
 */
#ifndef TSR_PRODUCTS_H
#define TSR_PRODUCTS_H

#include "tsr_blob.h"

/* How far a matrix has been read: all its arrays are in the order in which they are needed. */
struct cursor {
    const unsigned char *values, *counts, *places, *words, *scales;
};

TSR_INLINE struct cursor begin(const struct matrix *m)
{
    struct cursor at = {m->values, m->counts, m->places, m->words, m->scales};
    return at;
}

TSR_INLINE uint32_t next_u32(const unsigned char **at)
{
    uint32_t number = u32_at(*at);
    *at += 4;
    return number;
}

/* Four sums, so that an addition need not wait for the one before. */
#define BEGIN_SUMS v16 sum_0 = v_set(0.0f), sum_1 = sum_0, sum_2 = sum_0, sum_3 = sum_0
#define TOTAL v_add(v_add(sum_0, sum_1), v_add(sum_2, sum_3))
#define ADD(sum, input)                                                     \
    (sum = v_add_product(sum, v_load_weights(at->values, dtype), (input)), \
     at->values += LANES * weight_bytes((uint32_t)dtype))

TSR_INLINE v16 add_dense(const struct matrix *m, struct cursor *at, const float *x, int dtype)
{
    BEGIN_SUMS;
    uint32_t c = 0;
    for (; c + 4 <= m->columns; c += 4) {
        ADD(sum_0, v_set(x[c]));
        ADD(sum_1, v_set(x[c + 1]));
        ADD(sum_2, v_set(x[c + 2]));
        ADD(sum_3, v_set(x[c + 3]));
    }
    for (; c < m->columns; c++)
        ADD(sum_0, v_set(x[c]));
    return TOTAL;
}

TSR_INLINE v16 add_blocks(struct cursor *at, const float *x, int dtype)
{
    BEGIN_SUMS;
    uint32_t count = next_u32(&at->counts);
    for (; count >= 4; count -= 4) {
        ADD(sum_0, v_set(x[next_u32(&at->places)]));
        ADD(sum_1, v_set(x[next_u32(&at->places)]));
        ADD(sum_2, v_set(x[next_u32(&at->places)]));
        ADD(sum_3, v_set(x[next_u32(&at->places)]));
    }
    if (count > 0)
        ADD(sum_0, v_set(x[next_u32(&at->places)]));
    if (count > 1)
        ADD(sum_1, v_set(x[next_u32(&at->places)]));
    if (count > 2)
        ADD(sum_2, v_set(x[next_u32(&at->places)]));
    return TOTAL;
}

#define NEXT_BANK (bank = v_load_bank(x + (size_t)BANK * next_u32(&at->places)))
#define NEXT_WORD (picks = v_load_picks(at->words), at->words += 4 * LANES)
#define ADD_PICKED(sum) (ADD(sum, v_pick(bank, picks)), picks = v_next_picks(picks))

/* Loops of entries of one size each: how many vectors a bank has is never a branch. */
TSR_INLINE v16 add_picks(struct cursor *at, const float *x, int dtype)
{
    BEGIN_SUMS;
    v_bank bank;
    v_picks picks;
    for (uint32_t entries = next_u32(&at->counts); entries > 0; entries--) { /* of 4 vectors */
        NEXT_WORD, NEXT_BANK;
        ADD_PICKED(sum_0), ADD_PICKED(sum_1), ADD_PICKED(sum_2), ADD_PICKED(sum_3);
    }
    uint32_t entries = next_u32(&at->counts);
    for (; entries >= 2; entries -= 2) { /* of 3 */
        NEXT_WORD, NEXT_BANK;
        ADD_PICKED(sum_0), ADD_PICKED(sum_1), ADD_PICKED(sum_2);
        NEXT_BANK;
        ADD_PICKED(sum_3), ADD_PICKED(sum_0), ADD_PICKED(sum_1);
    }
    if (entries > 0) {
        NEXT_WORD, NEXT_BANK;
        ADD_PICKED(sum_0), ADD_PICKED(sum_1), ADD_PICKED(sum_2);
    }
    entries = next_u32(&at->counts);
    for (; entries >= 3; entries -= 3) { /* of 2 */
        NEXT_WORD, NEXT_BANK;
        ADD_PICKED(sum_0), ADD_PICKED(sum_1);
        NEXT_BANK;
        ADD_PICKED(sum_2), ADD_PICKED(sum_3);
        NEXT_BANK;
        ADD_PICKED(sum_0), ADD_PICKED(sum_1);
    }
    if (entries > 0) {
        NEXT_WORD, NEXT_BANK;
        ADD_PICKED(sum_0), ADD_PICKED(sum_1);
        if (entries > 1) {
            NEXT_BANK;
            ADD_PICKED(sum_2), ADD_PICKED(sum_3);
        }
    }
    entries = next_u32(&at->counts);
    for (; entries >= 4; entries -= 4) { /* of 1 */
        NEXT_WORD, NEXT_BANK;
        ADD_PICKED(sum_0), NEXT_BANK;
        ADD_PICKED(sum_1), NEXT_BANK;
        ADD_PICKED(sum_2), NEXT_BANK;
        ADD_PICKED(sum_3);
    }
    if (entries > 0) {
        NEXT_WORD, NEXT_BANK;
        ADD_PICKED(sum_0);
        for (; entries > 1; entries--) {
            NEXT_BANK;
            ADD_PICKED(sum_1);
        }
    }
    return TOTAL;
}

/* The products of all gates of the next group: sums[gates]. Inputs are filled up with zeros to whole banks. */
TSR_INLINE void multiply_as(const struct matrix *m, struct cursor *from, const float *x, v16 *sums, int pattern,
                            int dtype)
{
    struct cursor own = *from, *at = &own; /* which may stay in registers */
    for (uint32_t gate = 0; gate < m->gates; gate++) {
        v16 sum = pattern == DENSE    ? add_dense(m, at, x, dtype)
                  : pattern == BLOCKS ? add_blocks(at, x, dtype)
                                      : add_picks(at, x, dtype);
        if (dtype == I8) {
            sum = v_mul(sum, v_load(at->scales));
            at->scales += 4 * LANES;
        }
        sums[gate] = sum;
    }
    *from = own;
}

#undef BEGIN_SUMS
#undef TOTAL
#undef ADD
#undef NEXT_BANK
#undef NEXT_WORD
#undef ADD_PICKED

/* One function for each pattern and dtype, so that its inner loop knows both. */
#define MULTIPLY(pattern, dtype)                                                                                   \
    static void multiply_##pattern##_##dtype(const struct matrix *m, struct cursor *at, const float *x, v16 *sums) \
    {                                                                                                              \
        multiply_as(m, at, x, sums, pattern, dtype);                                                               \
    }
#define MULTIPLY_DTYPES(pattern) \
    MULTIPLY(pattern, F32)       \
    MULTIPLY(pattern, F16)       \
    MULTIPLY(pattern, BF16)      \
    MULTIPLY(pattern, I8)
MULTIPLY_DTYPES(DENSE)
MULTIPLY_DTYPES(BLOCKS)
MULTIPLY_DTYPES(PICKS)
#undef MULTIPLY_DTYPES
#undef MULTIPLY

typedef void multiply(const struct matrix *m, struct cursor *at, const float *x, v16 *sums);

static multiply *multiply_of(const struct matrix *m)
{
    static multiply *const all[][DTYPES] = {
        {multiply_DENSE_F32, multiply_DENSE_F16, multiply_DENSE_BF16, multiply_DENSE_I8},
        {multiply_BLOCKS_F32, multiply_BLOCKS_F16, multiply_BLOCKS_BF16, multiply_BLOCKS_I8},
        {multiply_PICKS_F32, multiply_PICKS_F16, multiply_PICKS_BF16, multiply_PICKS_I8},
    };
    return all[m->pattern][m->dtype];
}

#endif
