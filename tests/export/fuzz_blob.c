/* Damage a blob in many ways; whatever tsr_open() lets pass must run without leaving its memory (sanitizers look).
 *
 *     fuzz_blob MODEL.bin FORGERIES
 *
 * Every truncation and every changed byte must be refused. Forgeries have a right checksum: words of the header, the
 * tables and the arrays are changed, and what passes is run.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tsr_runtime.h"

static uint32_t random_state = 1;

static uint32_t random_below(uint32_t end)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state % end;
}

static uint32_t crc32_by_bits(const unsigned char *bytes, size_t count)
{
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < count; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}

static void die(const char *why)
{
    fprintf(stderr, "%s\n", why);
    exit(EXIT_FAILURE);
}

static void *allocate(size_t bytes)
{
    void *memory = malloc(bytes + 1);
    if (memory == NULL)
        die("no memory");
    return memory;
}

/* Open a copy that has no byte more than it needs. */
static tsr_status open_copy(const unsigned char *blob, size_t size)
{
    unsigned char *copy = malloc(size > 0 ? size : 1);
    tsr_model model;
    if (copy == NULL)
        die("no memory");
    memcpy(copy, blob, size);
    tsr_status status = tsr_open(&model, copy, size);
    free(copy);
    return status;
}

static void run_model(const tsr_model *model)
{
    enum { STEPS = 2 };
    if (model->stream_bytes > 1u << 24)
        return;
    size_t scratch_bytes = tsr_run_bytes(model, STEPS);
    void *memory = malloc(model->stream_bytes), *scratch = allocate(scratch_bytes);
    float *x = calloc(STEPS * (size_t)model->inputs + 1, sizeof *x), *y = allocate(STEPS * sizeof *y * model->outputs);
    float *state = allocate(sizeof *state * model->state_floats);
    tsr_stream stream;
    if (memory == NULL || x == NULL || tsr_init(&stream, model, memory, model->stream_bytes) != TSR_OK)
        die("no memory");
    tsr_step(&stream, x, y);
    tsr_run(&stream, x, y, STEPS, scratch, scratch_bytes);
    tsr_get_state(&stream, state);
    tsr_set_state(&stream, state);
    free(memory);
    free(scratch);
    free(x);
    free(y);
    free(state);
}

static int forge(const unsigned char *blob, size_t size)
{
    unsigned char *copy = malloc(size);
    if (copy == NULL)
        die("no memory");
    memcpy(copy, blob, size);
    for (uint32_t changes = 1 + random_below(3); changes > 0; changes--) {
        uint32_t words = (uint32_t)(size - 28) / 4, word;
        size_t at = 28 + 4 * (size_t)random_below(random_below(2) ? words : words < 128 ? words : 128);
        memcpy(&word, copy + at, 4);
        uint32_t values[] = {0, 1, word + 1, word - 1, random_below(64), 1u << random_below(32), 0xffffffff, word * 2};
        memcpy(copy + at, &values[random_below(8)], 4);
    }
    uint32_t crc = crc32_by_bits(copy + 28, size - 28);
    memcpy(copy + 24, &crc, 4);
    tsr_model model;
    int passes = tsr_open(&model, copy, size) == TSR_OK;
    if (passes)
        run_model(&model);
    free(copy);
    return passes;
}

int main(int count, char **arguments)
{
    FILE *file = count == 3 ? fopen(arguments[1], "rb") : NULL;
    if (file == NULL)
        die("usage: fuzz_blob MODEL.bin FORGERIES");
    size_t room = 1 << 20;
    unsigned char *blob = allocate(room);
    size_t size = fread(blob, 1, room, file);
    fclose(file);
    if (open_copy(blob, size) != TSR_OK)
        die("the blob itself is refused");
    for (size_t cut = 0; cut < size; cut++)
        if (open_copy(blob, cut) == TSR_OK)
            die("a truncated blob passes");
    for (size_t at = 0; at < size; at++) {
        unsigned char change = (unsigned char)(1 + random_below(255));
        blob[at] ^= change;
        if (open_copy(blob, size) == TSR_OK)
            die("a damaged blob passes");
        blob[at] ^= change;
    }
    long forgeries = strtol(arguments[2], NULL, 10), passed = 0;
    for (long i = 0; i < forgeries; i++)
        passed += forge(blob, size);
    printf("%ld of %ld forgeries pass\n", passed, forgeries);
    free(blob);
    return EXIT_SUCCESS;
}
