/* A filter: frames of float32 from standard input through a model that export_c() wrote, to standard output.
 *
 *     cc -std=c11 -O3 -march=native -I FOLDER -o stream examples/stream.c FOLDER/tsr_runtime.c
 *     ./stream FOLDER/model.bin < frames.f32 > results.f32
 *
 * Each frame is read, run and written before the next one is read, as in a device or a plug-in, and no memory is
 * allocated once the first one is. A bidirectional model needs whole sequences: all of the input is one.
 */
#include <stdio.h>
#include <stdlib.h>

#include "tsr_runtime.h"

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "%s: %s\n", what, why);
    return EXIT_FAILURE;
}

/* All bytes of a file, from memory that malloc() gave; NULL if it cannot be read. */
static unsigned char *read_all(FILE *file, size_t *size)
{
    size_t room = 1 << 16;
    unsigned char *bytes = malloc(room);
    *size = 0;
    while (bytes != NULL) {
        *size += fread(bytes + *size, 1, room - *size, file);
        if (*size < room)
            break;
        unsigned char *larger = realloc(bytes, room *= 2);
        if (larger == NULL)
            free(bytes);
        bytes = larger;
    }
    return bytes;
}

static tsr_status filter_frames(tsr_stream *stream, float *x, float *y)
{
    const tsr_model *model = stream->model;
    while (fread(x, sizeof *x, model->inputs, stdin) == model->inputs) {
        tsr_status status = tsr_step(stream, x, y);
        if (status != TSR_OK)
            return status;
        fwrite(y, sizeof *y, model->outputs, stdout);
    }
    return TSR_OK;
}

static tsr_status filter_sequence(tsr_stream *stream)
{
    const tsr_model *model = stream->model;
    size_t size;
    float *x = (float *)(void *)read_all(stdin, &size);
    size_t steps = size / (sizeof *x * model->inputs), bytes = tsr_run_bytes(model, steps);
    float *y = malloc(sizeof *y * model->outputs * steps + 1);
    void *scratch = malloc(bytes + 1);
    tsr_status status = TSR_ERROR_MEMORY;
    if (x != NULL && y != NULL && scratch != NULL)
        status = tsr_run(stream, x, y, steps, scratch, bytes);
    if (status == TSR_OK)
        fwrite(y, sizeof *y * model->outputs, steps, stdout);
    free(x);
    free(y);
    free(scratch);
    return status;
}

int main(int count, char **arguments)
{
    if (count != 2)
        return fail("usage", "stream MODEL.bin < frames.f32 > results.f32");
    FILE *file = fopen(arguments[1], "rb");
    if (file == NULL)
        return fail(arguments[1], "cannot be opened");
    size_t size;
    unsigned char *blob = read_all(file, &size);
    fclose(file);
    if (blob == NULL)
        return fail(arguments[1], "there is not enough memory");

    tsr_model model;
    tsr_stream stream;
    tsr_status status = tsr_open(&model, blob, size);
    if (status != TSR_OK)
        return fail(arguments[1], tsr_message(status));
    if (model.inputs == 0)
        return fail(arguments[1], "the model has no inputs, so there are no frames");
    void *memory = malloc(model.stream_bytes);
    float *x = malloc(sizeof *x * model.inputs + 1), *y = malloc(sizeof *y * model.outputs + 1);
    if (memory == NULL || x == NULL || y == NULL)
        return fail(arguments[1], "there is not enough memory");
    status = tsr_init(&stream, &model, memory, model.stream_bytes);
    if (status == TSR_OK)
        status = model.bidirectional ? filter_sequence(&stream) : filter_frames(&stream, x, y);
    free(memory);
    free(blob);
    free(x);
    free(y);
    if (status != TSR_OK)
        return fail(arguments[1], tsr_message(status));
    return fflush(stdout) == 0 ? EXIT_SUCCESS : fail("standard output", "cannot be written");
}
