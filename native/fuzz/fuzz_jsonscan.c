/* units: jsonscan.c */
/* Any bytes as a request and as an answer of each dialect: whole and in pieces must tell the same; every offset lies
 * within the text. The first byte chooses the size of the pieces. */
#include "../jsonscan.h"

#include <stdlib.h>
#include <string.h>

static void check(bool holds)
{
    if (!holds)
        abort();
}

static char *copy(const uint8_t *data, size_t n)
{
    char *piece = malloc(n ? n : 1);
    memcpy(piece, data, n);
    return piece;
}

static enum json_error request(json_request *scan, const uint8_t *data, size_t size, size_t step)
{
    static const json_limits limits = {12, 60, 24};
    json_request_start(scan, &limits, 42);
    for (size_t at = 0, n; at < size; at += n) {
        n = size - at < step ? size - at : step;
        char *piece = copy(data + at, n);
        json_request_feed(scan, piece, n);
        free(piece);
    }
    return json_request_end(scan);
}

static bool answer(json_answer *scan, enum json_dialect dialect, const uint8_t *data, size_t size, size_t step)
{
    bool fine = true;
    json_answer_start(scan, dialect);
    for (size_t at = 0, n; at < size; at += n) {
        n = size - at < step ? size - at : step;
        char *piece = copy(data + at, n);
        fine = json_answer_feed(scan, piece, n);
        free(piece);
    }
    return fine;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    size_t step = 1 + data[0] % 24;
    data++, size--;
    json_request *whole = json_request_new(), *split = json_request_new();
    enum json_error error = request(whole, data, size, size);
    check(request(split, data, size, step) == error);
    const json_fields *f = json_request_fields(whole);
    if (error == JSON_OK) {
        check(memcmp(f, json_request_fields(split), sizeof *f) == 0);
        check(f->model_off + f->model_raw_len <= size && f->options_off + f->options_raw_len <= size);
        check(f->open_off <= size);
        check(!f->has_model || (data[f->model_off] == '"' && data[f->model_off + f->model_raw_len - 1] == '"'));
        check(data[f->open_off - 1] == '{');
    }
    json_request_free(whole);
    json_request_free(split);
    for (enum json_dialect dialect = JSON_OPENAI; dialect <= JSON_TGI; dialect++) {
        json_answer a, b;
        bool fine = answer(&a, dialect, data, size, size);
        const json_facts *facts = json_answer_facts(&a);
        check(answer(&b, dialect, data, size, step) == fine);
        check(memcmp(facts, json_answer_facts(&b), sizeof *facts) == 0);
        check(facts->usage_off + facts->usage_raw_len <= size && facts->usage_in >= -1 && facts->usage_out >= -1);
    }
    return 0;
}
