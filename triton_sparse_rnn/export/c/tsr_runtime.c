/* The cells and streams of tsr_runtime.h.
 *
 * SPDX-License-Identifier: Apache-2.0
 * Written by triton-sparse-rnn; ship it as tsr_runtime.h says.
 *
 *     RNN   h = act(W_ih x + W_hh h + b)
 *     GRU   r = s(W_ir x + W_hr h + b_r)   z = s(W_iz x + W_hz h + b_z)
 *           n = tanh(W_in x + b_in + r (W_hn h + b_hn))   h = n + z (h - n)
 *     LSTM  i, f, o = s(W_ih x + W_hh h + b)   g = tanh(...)   c = f c + i g   h = W_hr (o tanh(c))
 *
 * The memory of a stream is x, and then, of each layer, for each direction of a recurrent one h, what becomes the next
 * h and an LSTM's c, or else its outputs. Each is filled up with zeros to whole banks and begins at a multiple of 64
 * bytes; what is filled up stays zero, as weights and biases of such rows are zeros.
 */
#include "tsr_runtime.h"

#include "tsr_products.h"

/* Matrices of one direction, and how their products are computed. */
struct product {
    struct matrix matrix;
    struct cursor at;
    multiply *multiply;
};

static struct product make_product(const unsigned char *blob, uint32_t number)
{
    struct product product;
    product.matrix = read_matrix(blob, number);
    product.at = begin(&product.matrix);
    product.multiply = multiply_of(&product.matrix);
    return product;
}

TSR_INLINE void next_group(struct product *product, const float *x, v16 *sums)
{
    product->multiply(&product->matrix, &product->at, x, sums);
}

static void step_rnn(struct product *ih, struct product *hh, const float *x, const float *h, float *next, int is_tanh)
{
    for (uint32_t g = 0; g < ih->matrix.groups; g++) {
        v16 p, q;
        next_group(ih, x, &p);
        next_group(hh, h, &q);
        v16 sum = v_add(v_add(p, q), v_load(ih->matrix.biases + (size_t)64 * g));
        v_store(next + LANES * g, is_tanh ? v_tanh(sum) : v_relu(sum));
    }
}

static void step_gru(struct product *ih, struct product *hh, const float *x, const float *h, float *next)
{
    for (uint32_t g = 0; g < ih->matrix.groups; g++) {
        v16 p[3], q[3];
        const unsigned char *bias = ih->matrix.biases + (size_t)256 * g;
        next_group(ih, x, p);
        next_group(hh, h, q);
        v16 r = v_sigmoid(v_add(v_add(p[0], q[0]), v_load(bias)));
        v16 z = v_sigmoid(v_add(v_add(p[1], q[1]), v_load(bias + 64)));
        v16 n = v_tanh(v_add_product(v_add(p[2], v_load(bias + 128)), r, v_add(q[2], v_load(bias + 192))));
        v_store(next + LANES * g, v_add_product(n, z, v_sub(v_load(h + LANES * g), n)));
    }
}

static void step_lstm(struct product *ih, struct product *hh, const float *x, const float *h, float *next, float *c)
{
    for (uint32_t g = 0; g < ih->matrix.groups; g++) {
        v16 p[4], q[4];
        const unsigned char *bias = ih->matrix.biases + (size_t)256 * g;
        next_group(ih, x, p);
        next_group(hh, h, q);
        for (int gate = 0; gate < 4; gate++)
            p[gate] = v_add(v_add(p[gate], q[gate]), v_load(bias + 64 * gate));
        v16 input = v_mul(v_sigmoid(p[0]), v_tanh(p[2]));
        v16 cell = v_add_product(input, v_sigmoid(p[1]), v_load(c + LANES * g));
        v_store(c + LANES * g, cell);
        v_store(next + LANES * g, v_mul(v_sigmoid(p[3]), v_tanh(cell)));
    }
}

static void step_linear(struct product *weight, const float *x, float *y)
{
    for (uint32_t g = 0; g < weight->matrix.groups; g++) {
        v16 sum;
        next_group(weight, x, &sum);
        v_store(y + LANES * g, v_add(sum, v_load(weight->matrix.biases + (size_t)64 * g)));
    }
}

static void project(struct product *weight, const float *x, float *y)
{
    for (uint32_t g = 0; g < weight->matrix.groups; g++) {
        v16 sum;
        next_group(weight, x, &sum);
        v_store(y + LANES * g, sum);
    }
}

static void step_pointwise(uint32_t function, const float *x, float *y, uint32_t count)
{
    for (uint32_t i = 0; i < count; i += LANES) {
        v16 v = v_load(x + i);
        v_store(y + i, function == RELU ? v_relu(v) : function == TANH ? v_tanh(v) : v_sigmoid(v));
    }
    for (size_t i = count; i < padded(count); i++)
        y[i] = 0.0f; /* where sigmoid(0) is not 0 */
}

/* Advance one direction of a recurrent layer. `state` is h, the next h, c. */
static void step_direction(const unsigned char *blob, const struct layer *layer, uint32_t direction, const float *x,
                           float *state)
{
    uint32_t number = layer->first_matrix + direction * matrices_of(layer);
    struct product ih = make_product(blob, number), hh = make_product(blob, number + 1);
    float *h = state, *next = h + padded(layer->outputs), *c = next + padded(layer->hidden);
    if (layer->kind == GRU)
        step_gru(&ih, &hh, x, h, next);
    else if (layer->kind == LSTM)
        step_lstm(&ih, &hh, x, h, next, c);
    else
        step_rnn(&ih, &hh, x, h, next, layer->kind == RNN_TANH);
    if (layer->outputs == layer->hidden) {
        memcpy(h, next, sizeof *h * padded(layer->hidden));
    } else {
        struct product hr = make_product(blob, number + 2);
        project(&hr, next, h);
    }
}

/* Floats that a layer has in the memory of a stream, in one direction. */
static size_t direction_floats(const struct layer *layer)
{
    if (!is_recurrent(layer))
        return padded(layer->outputs);
    return padded(layer->outputs) + padded(layer->hidden) * (layer->kind == LSTM ? 2 : 1);
}

/* Advance a layer that is not bidirectional; returns its outputs. */
static const float *step_layer(const unsigned char *blob, const struct layer *layer, const float *x, float *own)
{
    if (is_recurrent(layer)) {
        step_direction(blob, layer, 0, x, own);
    } else if (layer->kind == LINEAR) {
        struct product weight = make_product(blob, layer->first_matrix);
        step_linear(&weight, x, own);
    } else {
        step_pointwise(layer->function, x, own, layer->hidden);
    }
    return own;
}

static tsr_status check_header(const unsigned char *blob, size_t bytes)
{
    if (bytes < HEADER_BYTES || memcmp(blob, "TSRCHAIN", 8) != 0)
        return TSR_ERROR_MAGIC;
    if (header_at(blob, 2) != 0x01020304)
        return TSR_ERROR_ORDER;
    if (header_at(blob, 3) != VERSION)
        return TSR_ERROR_VERSION;
    if (((uint64_t)header_at(blob, 5) << 32 | header_at(blob, 4)) != bytes)
        return TSR_ERROR_SIZE;
    if (header_at(blob, 6) != crc32_of(blob + CRC_FROM, bytes - CRC_FROM))
        return TSR_ERROR_CHECKSUM;
    uint64_t layers = header_at(blob, 7), matrices = header_at(blob, 8), inputs = header_at(blob, 9);
    uint64_t tables = HEADER_BYTES + LAYER_BYTES * layers + MATRIX_BYTES * matrices;
    return tables <= bytes && layers > 0 && inputs <= MOST_UNITS ? TSR_OK : TSR_ERROR_LAYERS;
}

tsr_status tsr_open(tsr_model *model, const void *blob, size_t bytes)
{
    memset(model, 0, sizeof *model);
    tsr_status status = check_header(blob, bytes);
    if (status != TSR_OK)
        return status;
    tsr_model read = {0};
    read.blob = blob;
    read.blob_bytes = bytes;
    read.layers = header_at(blob, 7);
    read.inputs = header_at(blob, 9);
    read.outputs = header_at(blob, 10);
    uint64_t floats = padded(read.inputs), states = 0;
    uint32_t width = read.inputs;
    read.widest = width;
    for (uint32_t i = 0; i < read.layers; i++) {
        struct layer layer = read_layer(blob, i);
        status = check_layer(&read, &layer, width);
        if (status != TSR_OK)
            return status;
        width = layer.outputs * layer.directions;
        floats += (uint64_t)direction_floats(&layer) * layer.directions;
        if (is_recurrent(&layer))
            states += (uint64_t)(layer.outputs + (layer.kind == LSTM ? layer.hidden : 0)) * layer.directions;
        read.widest = width > read.widest ? width : read.widest;
        read.bidirectional |= layer.directions > 1;
    }
    if (width != read.outputs || floats >= SIZE_MAX / 8 || states > UINT32_MAX)
        return TSR_ERROR_LAYERS;
    read.stream_bytes = sizeof(float) * (size_t)floats + 63;
    read.state_floats = (uint32_t)states;
    *model = read;
    return TSR_OK;
}

static float *align(void *memory) { return (float *)(((uintptr_t)memory + 63) & ~(uintptr_t)63); }

tsr_status tsr_init(tsr_stream *stream, const tsr_model *model, void *memory, size_t bytes)
{
    if (memory == NULL || bytes < model->stream_bytes)
        return TSR_ERROR_MEMORY;
    stream->model = model;
    stream->memory = align(memory);
    tsr_reset(stream);
    return TSR_OK;
}

void tsr_reset(tsr_stream *stream) { memset(stream->memory, 0, stream->model->stream_bytes - 63); }

tsr_status tsr_step(tsr_stream *stream, const float *x, float *y)
{
    const tsr_model *model = stream->model;
    if (model->bidirectional)
        return TSR_ERROR_DIRECTIONS;
    float *memory = stream->memory;
    const float *between = memory;
    if (model->inputs > 0)
        memcpy(memory, x, sizeof *x * model->inputs);
    memory += padded(model->inputs);
    for (uint32_t i = 0; i < model->layers; i++) {
        struct layer layer = read_layer(model->blob, i);
        between = step_layer(model->blob, &layer, between, memory);
        memory += direction_floats(&layer);
    }
    memcpy(y, between, sizeof *y * model->outputs);
    return TSR_OK;
}

/* Whole rows between two layers of a sequence. */
static size_t row_floats(const tsr_model *model) { return padded(model->widest); }

size_t tsr_run_bytes(const tsr_model *model, size_t steps)
{
    size_t row_bytes = 2 * sizeof(float) * row_floats(model);
    if (!model->bidirectional)
        return 0;
    return steps > (SIZE_MAX - 63) / row_bytes ? SIZE_MAX : steps * row_bytes + 63;
}

/* Run a layer over a sequence: from [steps, row] -> to [steps, row], which is zero where it is not written. */
static void run_layer(const tsr_model *model, const struct layer *layer, const float *from, float *to, size_t steps,
                      float *memory)
{
    size_t row = row_floats(model);
    memset(to, 0, sizeof *to * steps * row);
    for (uint32_t d = 0; d < layer->directions; d++, memory += direction_floats(layer))
        for (size_t i = 0; i < steps; i++) {
            size_t t = d == 0 ? i : steps - 1 - i;
            if (is_recurrent(layer))
                step_direction(model->blob, layer, d, from + t * row, memory);
            else
                step_layer(model->blob, layer, from + t * row, memory);
            memcpy(to + t * row + d * layer->outputs, memory, sizeof *to * layer->outputs);
        }
}

tsr_status tsr_run(tsr_stream *stream, const float *x, float *y, size_t steps, void *scratch, size_t bytes)
{
    const tsr_model *model = stream->model;
    size_t needed = tsr_run_bytes(model, steps), row = row_floats(model);
    if (bytes < needed || needed == SIZE_MAX || (needed > 0 && scratch == NULL))
        return TSR_ERROR_MEMORY;
    if (!model->bidirectional) {
        for (size_t t = 0; t < steps; t++)
            tsr_step(stream, x + t * model->inputs, y + t * model->outputs);
        return TSR_OK;
    }
    float *from = align(scratch), *to = from + steps * row, *memory = stream->memory + padded(model->inputs);
    memset(from, 0, sizeof *from * steps * row);
    for (size_t t = 0; t < steps && model->inputs > 0; t++)
        memcpy(from + t * row, x + t * model->inputs, sizeof *x * model->inputs);
    for (uint32_t i = 0; i < model->layers; i++) {
        struct layer layer = read_layer(model->blob, i);
        run_layer(model, &layer, from, to, steps, memory);
        memory += direction_floats(&layer) * layer.directions;
        float *swapped = from;
        from = to;
        to = swapped;
    }
    for (size_t t = 0; t < steps; t++)
        memcpy(y + t * model->outputs, from + t * row, sizeof *y * model->outputs);
    return TSR_OK;
}

/* Visit the states of a stream in order, and copy them from or to [state_floats]. */
static void copy_states(const tsr_stream *stream, float *to, const float *from)
{
    const tsr_model *model = stream->model;
    float *memory = stream->memory + padded(model->inputs);
    for (uint32_t i = 0; i < model->layers; i++) {
        struct layer layer = read_layer(model->blob, i);
        for (uint32_t d = 0; d < layer.directions; d++, memory += direction_floats(&layer)) {
            float *states[2] = {memory, memory + padded(layer.outputs) + padded(layer.hidden)};
            uint32_t sizes[2] = {layer.outputs, layer.hidden};
            int count = !is_recurrent(&layer) ? 0 : layer.kind == LSTM ? 2 : 1;
            for (int k = 0; k < count; k++) {
                if (to != NULL) {
                    memcpy(to, states[k], sizeof *to * sizes[k]);
                    to += sizes[k];
                } else {
                    memcpy(states[k], from, sizeof *from * sizes[k]);
                    from += sizes[k];
                }
            }
        }
    }
}

void tsr_get_state(const tsr_stream *stream, float *state) { copy_states(stream, state, NULL); }

void tsr_set_state(tsr_stream *stream, const float *state) { copy_states(stream, NULL, state); }

const char *tsr_instructions(void) { return TSR_INSTRUCTIONS; }

const char *tsr_message(tsr_status status)
{
    switch (status) {
    case TSR_OK: return "no error";
    case TSR_ERROR_MAGIC: return "these bytes are no model that export_c() wrote";
    case TSR_ERROR_ORDER: return "the model is for little-endian machines";
    case TSR_ERROR_VERSION: return "the model is of another version than this runtime";
    case TSR_ERROR_SIZE: return "the model is truncated or longer than it says";
    case TSR_ERROR_CHECKSUM: return "the model is damaged: its checksum is another";
    case TSR_ERROR_LAYERS: return "the sizes of the model's layers do not fit together";
    case TSR_ERROR_INDICES: return "the model's indices do not fit its sizes";
    case TSR_ERROR_MEMORY: return "too little memory was given";
    case TSR_ERROR_DIRECTIONS: return "the model is bidirectional: it takes whole sequences";
    }
    return "unknown error";
}
