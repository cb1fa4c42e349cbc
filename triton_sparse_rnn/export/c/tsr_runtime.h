/* Pruned recurrent and linear layers as plain C11: what triton-sparse-rnn's export_c() wrote runs here.
 *
 * SPDX-License-Identifier: Apache-2.0
 * Written by triton-sparse-rnn, https://pypi.org/project/triton-sparse-rnn. You may ship this file, changed or not, in
 * source or compiled, in programs under any licence. The weights that it runs belong to whoever trained them.
 *
 * A model is a chain of layers in one blob of bytes, which is read where it lies and never written to. A stream is one
 * sequence in progress: the states of all layers, in memory that the caller gives. Nothing is allocated, nothing is
 * global: any number of streams, each in one thread at a time, may share a model.
 *
 *     tsr_model model;
 *     if (tsr_open(&model, bytes, size) != TSR_OK) ...
 *     tsr_stream stream;
 *     if (tsr_init(&stream, &model, malloc(model.stream_bytes), model.stream_bytes) != TSR_OK) ...
 *     while (...) tsr_step(&stream, x, y);     x[model.inputs] -> y[model.outputs]
 *     tsr_reset(&stream);                      and the next sequence begins
 *
 * Compile tsr_runtime.c as C11 with optimisation and for the processor that is to run it, as with -O3 -march=native:
 * AVX-512, AVX2 with FMA, NEON of 64-bit ARM, or plain C are chosen by what the compiler may use. Define TSR_PLAIN for
 * plain C anywhere. No library is needed, libm neither. Not for -ffast-math.
 */
#ifndef TSR_RUNTIME_H
#define TSR_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum tsr_status {
    TSR_OK = 0,
    TSR_ERROR_MAGIC,      /* the bytes are no blob of export_c() */
    TSR_ERROR_ORDER,      /* this machine is not little-endian */
    TSR_ERROR_VERSION,    /* a blob of another version: use the tsr_runtime.c that was exported with it */
    TSR_ERROR_SIZE,       /* truncated, or longer than it says */
    TSR_ERROR_CHECKSUM,   /* damaged */
    TSR_ERROR_LAYERS,     /* sizes of layers do not fit together */
    TSR_ERROR_INDICES,    /* a matrix names inputs that there are not, or leaves the blob */
    TSR_ERROR_MEMORY,     /* less memory was given than is needed */
    TSR_ERROR_DIRECTIONS  /* a bidirectional layer has no step: it takes whole sequences, tsr_run() */
} tsr_status;

/* Filled in by tsr_open(); to be read only. */
typedef struct tsr_model {
    const unsigned char *blob;
    size_t blob_bytes;
    size_t stream_bytes;    /* memory that a stream needs */
    uint32_t inputs;        /* floats of x in a step */
    uint32_t outputs;       /* floats of y in a step */
    uint32_t state_floats;  /* of tsr_get_state() and tsr_set_state() */
    uint32_t layers;
    uint32_t widest;        /* floats between two layers, at most */
    int bidirectional;      /* whether a layer is */
} tsr_model;

/* Filled in by tsr_init(); one thread at a time. */
typedef struct tsr_stream {
    const tsr_model *model;
    float *memory;
} tsr_stream;

/* Read a blob and check all of it, so that whatever passes cannot make the other functions leave their memory.
 *
 * `blob` must stay where it is while the model is used. Any alignment is right; 64 bytes are the fastest.
 */
tsr_status tsr_open(tsr_model *model, const void *blob, size_t bytes);

/* Begin a stream with states of zero, in `memory` of at least model->stream_bytes, of any alignment.
 *
 * Model and memory must stay where they are while the stream is used. Nothing need be freed but that memory.
 */
tsr_status tsr_init(tsr_stream *stream, const tsr_model *model, void *memory, size_t bytes);

/* Set all states to zero, as before the first step. */
void tsr_reset(tsr_stream *stream);

/* Advance by one time step: x [inputs] -> y [outputs]. They may be the same memory. */
tsr_status tsr_step(tsr_stream *stream, const float *x, float *y);

/* Memory that tsr_run() needs for so many time steps: none without a bidirectional layer. SIZE_MAX: too many. */
size_t tsr_run_bytes(const tsr_model *model, size_t steps);

/* Advance by a whole sequence: x [steps, inputs] -> y [steps, outputs], with scratch memory of tsr_run_bytes().
 *
 * It begins with the states of the stream and leaves those that torch.nn calls h_n and c_n: call tsr_reset() between
 * sequences. The backward direction of a layer begins at the last step.
 */
tsr_status tsr_run(tsr_stream *stream, const float *x, float *y, size_t steps, void *scratch, size_t bytes);

/* Copy the states, [state_floats]: layer after layer, its directions one after another, of each h and then an LSTM's c.
 */
void tsr_get_state(const tsr_stream *stream, float *state);
void tsr_set_state(tsr_stream *stream, const float *state);

/* Which instructions the runtime was compiled for: "AVX-512", "AVX2", "NEON" or "plain C". */
const char *tsr_instructions(void);

/* What a status means, in English. */
const char *tsr_message(tsr_status status);

#ifdef __cplusplus
}
#endif

#endif
