/* units: jsonscan.c */
/* Requests and answers, whole and byte by byte in blocks of one byte. */
#include "../jsonscan.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const json_limits limits = {64, 10000, 64};

static enum json_error request(json_request *scan, const char *text, size_t len, size_t step, const json_limits *in_force)
{
    json_request_start(scan, in_force, 7);
    for (size_t at = 0, n; at < len; at += n) {
        n = len - at < step ? len - at : step;
        char *piece = malloc(n);
        memcpy(piece, text + at, n);
        json_request_feed(scan, piece, n);
        free(piece);
    }
    return json_request_end(scan);
}

static json_fields verdict(const char *text, enum json_error expected)
{
    json_request *whole = json_request_new(), *split = json_request_new();
    assert(whole && split);
    size_t len = strlen(text);
    for (size_t step = 1; step < 20; step++) {
        enum json_error a = request(whole, text, len, len ? len : 1, &limits), b = request(split, text, len, step, &limits);
        if (a != expected || b != expected) {
            fprintf(stderr, "%s\n  whole: %s; by %zu: %s\n", text, json_error_sentence(a), step, json_error_sentence(b));
            abort();
        }
        if (a == JSON_OK)
            assert(memcmp(json_request_fields(whole), json_request_fields(split), sizeof(json_fields)) == 0);
    }
    json_fields fields = *json_request_fields(whole);
    json_request_free(whole);
    json_request_free(split);
    return fields;
}

static void requests(void)
{
    const char *text = " {\"x\":[{\"model\":1}], \"mo\\u0064el\" : \"a\\\"\\u00e9\\ud83d\\ude00\", \"stream\":true,\"n\":2,"
                       "\"max_tokens\":12,\"stream_options\":{\"include_usage\":true,\"y\":{}},\"z\":-1.5e+3}\r\n";
    json_fields f = verdict(text, JSON_OK);
    assert(f.model_len == 8 && memcmp(f.model, "a\"\xc3\xa9\xf0\x9f\x98\x80", 8) == 0);
    assert(memcmp(text + f.model_off, "\"a\\\"\\u00e9\\ud83d\\ude00\"", f.model_raw_len) == 0 && f.model_raw_len == 23);
    assert(f.stream == 1 && f.n == 2 && f.max_tokens == 12 && f.include_usage == 1 && f.continuous_usage == -1);
    assert(memcmp(text + f.options_off, "{\"include_usage\":true,\"y\":{}}", f.options_raw_len) == 0);
    assert(text[f.open_off - 1] == '{' && !f.empty);
    f = verdict("{}", JSON_OK);
    assert(f.empty && f.open_off == 1 && f.stream == -1 && f.n == -1 && f.max_tokens == -1 && !f.has_model);
    f = verdict("{\"parameters\":{\"max_new_tokens\":5},\"stream\":null,\"stream_options\":null}", JSON_OK);
    assert(f.max_tokens == 5 && f.stream == -1 && f.options_raw_len == 4);
    f = verdict("{\"max_output_tokens\":1,\"max_tokens\":2,\"max_completion_tokens\":3}", JSON_OK);
    assert(f.max_tokens == 3);
    f = verdict("{\"parameters\":7,\"tools\":[{\"parameters\":{\"max_new_tokens\":\"x\",\"max_new_tokens\":1}}]}", JSON_OK);
    assert(f.max_tokens == -1);
}

static void refusals(void)
{
    verdict("", JSON_SYNTAX);
    verdict("[]", JSON_NOT_OBJECT);
    verdict("\xef\xbb\xbf{}", JSON_SYNTAX);
    verdict("{\"a\":1", JSON_TRUNCATED);
    verdict("{} x", JSON_TRAILING);
    verdict("{\"a\":1,}", JSON_SYNTAX);
    verdict("{\"a\":[1,]}", JSON_SYNTAX);
    verdict("{\"a\":[1}", JSON_SYNTAX);
    verdict("{\"a\":01}", JSON_SYNTAX);
    verdict("{\"a\":1.}", JSON_SYNTAX);
    verdict("{\"a\":-}", JSON_SYNTAX);
    verdict("{\"a\":nul}", JSON_SYNTAX);
    verdict("{\"a\":NaN}", JSON_SYNTAX);
    verdict("{\"a\":\"\n\"}", JSON_SYNTAX);
    verdict("{\"a\":\"\\x\"}", JSON_SYNTAX);
    verdict("{\"a\":\"\\ud800\"}", JSON_SYNTAX);
    verdict("{\"a\":\"\\ud800\\n\"}", JSON_SYNTAX);
    verdict("{\"a\":\"\\ude00\"}", JSON_SYNTAX);
    verdict("{\"a\":\"\xc0\x80\"}", JSON_SYNTAX);
    verdict("{\"a\":\"aaaaaaaaaaaaaaaaaaaa\xed\xa0\x80\"}", JSON_SYNTAX);
    verdict("{\"a\":\"\xf4\x90\x80\x80\"}", JSON_SYNTAX);
    verdict("{\"a\":\"\xe2\x82\"}", JSON_SYNTAX);
    verdict("{\"model\":\"a\",\"mod\\u0065l\":\"b\"}", JSON_DUPLICATE);
    verdict("{\"aaaaaaaaaaaaaaaaaaaaaaaaa\":1,\"b\":2,\"aaaaaaaaaaaaaaaaaaaaaaaa\\u0061\":1}", JSON_DUPLICATE);
    verdict("{\"stream_options\":{\"include_usage\":true,\"include_usage\":false}}", JSON_DUPLICATE);
    verdict("{\"model\":null}", JSON_FIELD);
    verdict("{\"model\":{}}", JSON_FIELD);
    verdict("{\"stream\":\"true\"}", JSON_FIELD);
    verdict("{\"stream_options\":[]}", JSON_FIELD);
    verdict("{\"max_tokens\":1.0}", JSON_FIELD);
    verdict("{\"max_tokens\":\"1\"}", JSON_FIELD);
    verdict("{\"max_tokens\":-1}", JSON_FIELD);
    verdict("{\"n\":9223372036854775808}", JSON_FIELD);
    verdict("{\"n\":[]}", JSON_FIELD);
}

/* Each limit: what just fits, and one more. */
static void at_limits(void)
{
    json_request *scan = json_request_new();
    json_limits small = {3, 4, 5};
    assert(request(scan, "{\"a\":[[1]]}", 11, 99, &small) == JSON_OK);
    assert(request(scan, "{\"a\":[[[]]]}", 12, 99, &small) == JSON_DEPTH);
    assert(request(scan, "{\"a\":1,\"b\":{\"c\":1,\"a\":1}}", 25, 99, &small) == JSON_OK);
    assert(request(scan, "{\"a\":1,\"b\":{\"c\":1,\"a\":1,\"d\":0}}", 31, 99, &small) == JSON_KEYS);
    assert(request(scan, "{\"a\":-1234}", 11, 1, &small) == JSON_OK);
    assert(request(scan, "{\"a\":-12345}", 12, 1, &small) == JSON_NUMBER);
    /* a depth over what the stack can hold is clamped */
    json_limits deep = {1000, 10, 10};
    char text[512] = "{\"a\":", *p = text + 5;
    memset(p, '[', 64);
    assert(request(scan, text, 5 + 63, 99, &deep) == JSON_TRUNCATED);
    assert(request(scan, text, 5 + 64, 99, &deep) == JSON_DEPTH);
    /* the table of names grows, and is empty again afterwards */
    char *many = malloc(200000), *q = many;
    for (int round = 0; round < 2; round++) {
        q = many;
        *q++ = '{';
        for (int i = 0; i < 10000; i++)
            q += sprintf(q, "\"k%d\":0,", i);
        q[-1] = '}';
        assert(request(scan, many, (size_t)(q - many), 4096, &limits) == JSON_OK);
    }
    json_request_free(scan);
    free(many);
    char model[JSON_MODEL_MAX + 32];
    for (int over = 0; over < 2; over++) {
        q = model + sprintf(model, "{\"model\":\"");
        memset(q, 'm', JSON_MODEL_MAX + (size_t)over);
        strcpy(q + JSON_MODEL_MAX + over, "\"}");
        assert(verdict(model, over ? JSON_FIELD : JSON_OK).model_len == (over ? 0 : JSON_MODEL_MAX) || over);
    }
}

static json_facts answer(const char *text, enum json_dialect dialect)
{
    json_answer whole, split;
    size_t len = strlen(text);
    char *exact = malloc(len);
    memcpy(exact, text, len);
    json_answer_start(&whole, dialect);
    assert(json_answer_feed(&whole, exact, len));
    free(exact);
    json_answer_start(&split, dialect);
    for (size_t i = 0; i < len; i++) {
        char *one = malloc(1);
        *one = text[i];
        assert(json_answer_feed(&split, one, 1));
        free(one);
    }
    assert(memcmp(json_answer_facts(&whole), json_answer_facts(&split), sizeof(json_facts)) == 0);
    return *json_answer_facts(&whole);
}

static void usage_lies_at(const char *text, const char *member)
{
    json_facts f = answer(text, JSON_OPENAI);
    assert(f.usage_raw_len == strlen(member) && memcmp(text + f.usage_off, member, f.usage_raw_len) == 0);
}

static void answers(void)
{
    usage_lies_at("{\"a\":1 , \"usage\" : {\"x\":[{}]} }", ", \"usage\" : {\"x\":[{}]}");
    usage_lies_at("{\"usage\":{} , \"b\":2}", "\"usage\":{} ,");
    usage_lies_at("{\"usage\":{}}", "\"usage\":{}");
    usage_lies_at("{\"a\":{\"usage\":{}},\"usage\":null}", ",\"usage\":null");
    usage_lies_at("{\"usage\": null ,\"b\":1}", "\"usage\": null ,");
    usage_lies_at("{\"a\":{\"usage\":null},\"usage\":1}", "");
    assert(answer("{\"choices\":[{\"index\":2,\"delta\":{\"index\":5}}]}", JSON_OPENAI).index == 2);
    assert(answer("{\"choices\":[{\"index\":-1}],\"index\":3}", JSON_OPENAI).index == -1);
    {
        const json_fields f = verdict("{\"stream_options\": {\"include_usage\" : false }}", JSON_OK);
        assert(f.include_usage == 0 && f.include_off == 38 && f.include_raw_len == 5);
    }
    usage_lies_at("{\"a\":[{\"usage\":{\"prompt_tokens\":1}},\"\\\"usage\\\":{\"]}", "");
    json_facts f = answer("{\"choices\":[{\"usage\":{\"prompt_tokens\":9},\"delta\":{\"content\":\"\",\"tool_calls\":[]},"
                          "\"finish_reason\":\"tool_calls\"}],\"finish_reason\":\"stop\"}", JSON_OPENAI);
    assert(f.usage_in == -1 && f.finish == FINISH_TOOL && !f.has_content && !f.choices_empty && !f.has_error);
    assert(answer("{\"choices\":[{\"delta\":{\"tool_calls\":[{}]}}]}", JSON_OPENAI).has_content);
    assert(answer("{\"choices\":[{\"text\":\"\\u0020\"}]}", JSON_OPENAI).has_content);
    assert(answer("{\"choices\":[],\"usage\":{\"completion_tokens\":0}}", JSON_OPENAI).choices_empty);
    assert(answer("{\"usage\":{\"completion_tokens\":0}}", JSON_OPENAI).usage_out == 0);
    assert(answer("{\"error\":{\"message\":\"x\"}}", JSON_OPENAI).has_error);
    assert(!answer("{\"error\":null,\"a\":{\"error\":1}}", JSON_RESPONSES).has_error);
    f = answer("{\"type\":\"message_start\",\"message\":{\"stop_reason\":\"max_tokens\",\"usage\":{\"input_tokens\":3}}}",
               JSON_MESSAGES);
    assert(f.usage_in == 3 && f.usage_out == -1 && f.finish == FINISH_LENGTH && f.type_len == 13);
    f = answer("{\"response\":{\"status\":\"incomplete\",\"usage\":{\"output_tokens\":4}},"
               "\"type\":\"response.code_interpreter_call_code.delta\"}", JSON_RESPONSES);
    assert(f.has_content && f.usage_out == 4 && f.finish == FINISH_LENGTH && f.type_len == 40);
    f = answer("{\"token\":{\"id\":1},\"generated_text\":\"\",\"details\":{\"finish_reason\":\"eos_token\",\"generated_tokens\":2,"
               "\"input_length\":6}}", JSON_TGI);
    assert(f.has_content && f.final_text && f.finish == FINISH_STOP && f.usage_in == 6 && f.usage_out == 2);
    json_answer broken;
    json_answer_start(&broken, JSON_OPENAI);
    assert(!json_answer_feed(&broken, "{\"usage\":{\"prompt_tokens\":1}]", 30) && json_answer_facts(&broken)->usage_in == 1);
}

int main(void)
{
    requests();
    refusals();
    at_limits();
    answers();
    return 0;
}
