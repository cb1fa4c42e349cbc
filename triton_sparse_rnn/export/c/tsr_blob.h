/* The blob that export_c() wrote: what stands where, and whether all of it fits together. A part of tsr_runtime.c.
 *
 * SPDX-License-Identifier: Apache-2.0
 * Written by triton-sparse-rnn; ship it as tsr_runtime.h says.
 *
 * All numbers are little-endian, of 32 bits where nothing else is said; offsets count 64 bytes from the beginning.
 *
 *   bytes 0..63   magic (8 bytes), order, version, size in bytes (64 bits), CRC-32 of all bytes from 28 on,
 *                 layers, matrices, inputs, outputs, five zeros
 *   then          8 numbers for each layer: kind, inputs, hidden units, outputs of a direction, directions, its first
 *                 matrix, function, zero
 *   then          16 numbers for each matrix: pattern, dtype, gates, rows of a gate, columns, vectors, and where there
 *                 are values, counts, places, (how many) places, words, (how many) words, scales, biases; two zeros
 *   then          the arrays, each at a multiple of 64 bytes
 *
 * The matrices of a layer are, for each direction, the input's (weight_ih), the recurrent one (weight_hh) and, where h
 * is projected, that of the projection (weight_hr). A linear layer has one; a function of single numbers has none.
 *
 * A matrix has gates * rows rows, of which 16 of one gate are a unit group. Group by group, and in it gate by gate, its
 * weights are vectors of 16, a weight for each row of the group (the last group is filled up with zeros):
 *
 *   dense     a vector for each column
 *   blocks    `counts` says how many vectors there are, `places` which column each multiplies
 *   picks     each row of a vector has its own column out of a bank of 32. Vectors of one bank are entries of 4, 3, 2
 *             and then 1; `counts` says how many entries there are of each, `places` the bank of each entry. A word for
 *             each row holds the picks of 1, 2, 3 or 4 entries, 5 bits each
 *
 * `scales` is a float for each row, of int8 weights; `biases` one for each row and, of a GRU, each row of four gates:
 * r, z, the input's part of n, the recurrent part of n.
 */
#ifndef TSR_BLOB_H
#define TSR_BLOB_H

#include "tsr_runtime.h"
#include "tsr_vectors.h"

enum { RNN_TANH = 1, RNN_RELU, GRU, LSTM, LINEAR, POINTWISE };
enum { DENSE, BLOCKS, PICKS };
enum { RELU = 1, SIGMOID, TANH };
enum { VERSION = 1, HEADER_BYTES = 64, LAYER_BYTES = 32, MATRIX_BYTES = 64, CRC_FROM = 28, ENTRY_SIZES = 4 };
#define MOST_UNITS (1u << 24) /* of any size of a layer, so that no product of three leaves 64 bits */

struct layer {
    uint32_t kind, inputs, hidden, outputs, directions, first_matrix, function;
};

struct matrix {
    uint32_t pattern, dtype, gates, rows, columns, vectors, groups, places_count, words_count;
    const unsigned char *values, *counts, *places, *words, *scales, *biases;
};

TSR_INLINE uint32_t u32_at(const unsigned char *from)
{
    uint32_t number;
    memcpy(&number, from, 4);
    return number;
}

TSR_INLINE uint32_t header_at(const unsigned char *blob, int number) { return u32_at(blob + 4 * number); }

/* Entries whose picks are in a word, of entries of so many vectors. */
TSR_INLINE uint32_t entries_in_word(uint32_t vectors) { return 5 - vectors; }

/* Of a gate's rows, which may be filled up. */
TSR_INLINE uint32_t groups_of(uint32_t rows) { return (rows + LANES - 1) / LANES; }

/* Floats of a buffer that is read in whole banks and written in whole vectors. */
TSR_INLINE size_t padded(size_t floats) { return (floats + BANK - 1) / BANK * BANK; }

TSR_INLINE uint32_t biases_of(uint32_t kind) { return kind == GRU || kind == LSTM ? 4 : 1; }

TSR_INLINE uint32_t gates_of(uint32_t kind) { return kind == GRU ? 3 : kind == LSTM ? 4 : 1; }

TSR_INLINE int is_recurrent(const struct layer *layer) { return layer->kind <= LSTM; }

/* Matrices of each direction. */
TSR_INLINE uint32_t matrices_of(const struct layer *layer)
{
    return layer->kind == POINTWISE ? 0 : layer->kind == LINEAR ? 1 : layer->outputs == layer->hidden ? 2 : 3;
}

TSR_INLINE struct layer read_layer(const unsigned char *blob, uint32_t number)
{
    const unsigned char *at = blob + HEADER_BYTES + (size_t)LAYER_BYTES * number;
    struct layer layer = {u32_at(at),      u32_at(at + 4),  u32_at(at + 8), u32_at(at + 12),
                          u32_at(at + 16), u32_at(at + 20), u32_at(at + 24)};
    return layer;
}

TSR_INLINE const unsigned char *matrix_record(const unsigned char *blob, uint32_t number)
{
    return blob + HEADER_BYTES + (size_t)LAYER_BYTES * header_at(blob, 7) + (size_t)MATRIX_BYTES * number;
}

TSR_INLINE struct matrix read_matrix(const unsigned char *blob, uint32_t number)
{
    const unsigned char *at = matrix_record(blob, number);
    struct matrix m;
    m.pattern = u32_at(at);
    m.dtype = u32_at(at + 4);
    m.gates = u32_at(at + 8);
    m.rows = u32_at(at + 12);
    m.columns = u32_at(at + 16);
    m.vectors = u32_at(at + 20);
    m.groups = groups_of(m.rows);
    m.values = blob + (size_t)64 * u32_at(at + 24);
    m.counts = blob + (size_t)64 * u32_at(at + 28);
    m.places = blob + (size_t)64 * u32_at(at + 32);
    m.places_count = u32_at(at + 36);
    m.words = blob + (size_t)64 * u32_at(at + 40);
    m.words_count = u32_at(at + 44);
    m.scales = blob + (size_t)64 * u32_at(at + 48);
    m.biases = blob + (size_t)64 * u32_at(at + 52);
    return m;
}

TSR_INLINE uint32_t weight_bytes(uint32_t dtype) { return dtype == F32 ? 4 : dtype == I8 ? 1 : 2; }

/* By half bytes: a table of 16. */
static uint32_t crc32_of(const unsigned char *bytes, size_t count)
{
    static const uint32_t table[16] = {0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4,
                                       0x4db26158, 0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
                                       0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < count; i++) {
        crc = table[(crc ^ bytes[i]) & 15] ^ (crc >> 4);
        crc = table[(crc ^ (uint32_t)(bytes[i] >> 4)) & 15] ^ (crc >> 4);
    }
    return ~crc;
}

/* Whether an array of so many bytes lies in the blob; bytes are below 2^60. */
static int is_inside(size_t size, const unsigned char *offset, uint64_t bytes)
{
    uint64_t begin = (uint64_t)64 * u32_at(offset);
    return begin <= size && bytes <= size - begin;
}

static int all_below(const unsigned char *numbers, uint32_t count, uint32_t end)
{
    for (uint32_t i = 0; i < count; i++)
        if (u32_at(numbers + (size_t)4 * i) >= end)
            return 0;
    return 1;
}

/* Whether counts add up to the vectors, places and words that a sparse matrix has. */
static int counts_fit(const struct matrix *m)
{
    uint64_t vectors = 0, places = 0, words = 0;
    uint64_t count = (uint64_t)m->groups * m->gates * (m->pattern == PICKS ? ENTRY_SIZES : 1);
    for (uint64_t i = 0; i < count; i++) {
        uint32_t entries = u32_at(m->counts + 4 * i);
        uint32_t size = m->pattern == PICKS ? (uint32_t)(ENTRY_SIZES - i % ENTRY_SIZES) : 1;
        vectors += (uint64_t)entries * size;
        places += entries;
        words += ((uint64_t)entries + entries_in_word(size) - 1) / entries_in_word(size);
    }
    return vectors == m->vectors && places == m->places_count && (m->pattern != PICKS || words == m->words_count);
}

/* Whether a matrix has these sizes, and reads nothing but its inputs and the blob. */
static tsr_status check_matrix(const tsr_model *model, uint32_t number, uint32_t gates, uint32_t rows,
                               uint32_t columns, uint32_t biases)
{
    if (number >= header_at(model->blob, 8))
        return TSR_ERROR_LAYERS;
    const unsigned char *at = matrix_record(model->blob, number);
    struct matrix m = read_matrix(model->blob, number);
    if (m.pattern > PICKS || m.dtype >= DTYPES || m.gates != gates || m.rows != rows || m.columns != columns)
        return TSR_ERROR_LAYERS;
    uint64_t rows_of_blocks = (uint64_t)m.groups * gates;
    uint64_t counts = m.pattern == DENSE ? 0 : m.pattern == BLOCKS ? 4 : 4 * ENTRY_SIZES;
    if (m.pattern == DENSE && m.vectors != rows_of_blocks * columns)
        return TSR_ERROR_INDICES;
    if (!is_inside(model->blob_bytes, at + 24, (uint64_t)m.vectors * LANES * weight_bytes(m.dtype)) ||
        !is_inside(model->blob_bytes, at + 28, rows_of_blocks * counts) ||
        !is_inside(model->blob_bytes, at + 32, m.pattern == DENSE ? 0 : (uint64_t)4 * m.places_count) ||
        !is_inside(model->blob_bytes, at + 40, m.pattern == PICKS ? (uint64_t)64 * m.words_count : 0) ||
        !is_inside(model->blob_bytes, at + 48, m.dtype == I8 ? rows_of_blocks * LANES * 4 : 0) ||
        !is_inside(model->blob_bytes, at + 52, (uint64_t)m.groups * biases * LANES * 4))
        return TSR_ERROR_INDICES;
    if (m.pattern == DENSE)
        return TSR_OK;
    uint32_t end = m.pattern == PICKS ? (columns + BANK - 1) / BANK : columns;
    return counts_fit(&m) && all_below(m.places, m.places_count, end) ? TSR_OK : TSR_ERROR_INDICES;
}

/* Whether a layer takes `inputs` and has all the matrices that it needs. */
static tsr_status check_layer(const tsr_model *model, const struct layer *layer, uint32_t inputs)
{
    int functions = layer->kind == POINTWISE ? TANH : 0;
    if (layer->kind < RNN_TANH || layer->kind > POINTWISE || layer->inputs != inputs || layer->hidden < 1 ||
        layer->hidden > MOST_UNITS || layer->outputs < 1 || layer->outputs > layer->hidden ||
        layer->function > (uint32_t)functions || (functions && layer->function == 0) || layer->directions < 1 ||
        layer->directions > (is_recurrent(layer) ? 2u : 1u) || layer->first_matrix > MOST_UNITS ||
        (layer->outputs != layer->hidden && layer->kind != LSTM) ||
        (layer->kind == POINTWISE && layer->hidden != inputs))
        return TSR_ERROR_LAYERS;
    uint32_t number = layer->first_matrix, gates = gates_of(layer->kind);
    tsr_status status = TSR_OK;
    for (uint32_t d = 0; d < layer->directions && layer->kind != POINTWISE && status == TSR_OK; d++) {
        status = check_matrix(model, number++, gates, layer->hidden, inputs, biases_of(layer->kind));
        if (status == TSR_OK && is_recurrent(layer))
            status = check_matrix(model, number++, gates, layer->hidden, layer->outputs, 0);
        if (status == TSR_OK && layer->outputs != layer->hidden)
            status = check_matrix(model, number++, 1, layer->outputs, layer->hidden, 0);
    }
    return status;
}

#endif
