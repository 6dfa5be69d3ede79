/* units: http1.c chunk.c jsonscan.c sse.c */
/* How long the parsers take on what they meet every day: prints nanoseconds, the least of 15 rounds. Not a test.
 *
 *     gcc -std=c11 -D_GNU_SOURCE -O2 -fno-strict-aliasing -fstack-protector-strong native/tests/speed.c \
 *         native/http1.c native/chunk.c native/jsonscan.c native/sse.c -o speed && ./speed
 */
#include "../chunk.h"
#include "../http1.h"
#include "../jsonscan.h"
#include "../sse.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ROUNDS 15
#define CALLS 20000

static const char request_head[] =
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:8443\r\nAccept-Encoding: gzip, deflate\r\n"
    "Connection: keep-alive\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
    "User-Agent: OpenAI/Python 1.109.1\r\nX-Stainless-Lang: python\r\nX-Stainless-Package-Version: 1.109.1\r\n"
    "Authorization: Bearer asc_0123456789ab_0123456789012345678901234567890123456789012\r\n"
    "Content-Length: 1023\r\n\r\n";

#define FRAME \
    "data: {\"id\":\"chatcmpl-8e3b779482a388a4\",\"object\":\"chat.completion.chunk\",\"created\":1795418401," \
    "\"model\":\"tiny\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" op\"},\"logprobs\":null," \
    "\"finish_reason\":null,\"token_ids\":null}]"

static const char plain_frame[] = FRAME "}\n\n";
static const char usage_frame[] = FRAME ",\"usage\":{\"prompt_tokens\":34,\"total_tokens\":38,\"completion_tokens\":4,"
                                        "\"completion_tokens_details\":null}}\n\n";

static char body[4096], cjk[4096], escaped[4096], chunk[512];
static size_t body_len, cjk_len, escaped_len, chunk_len;
static json_request *scan;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void head_once(void)
{
    static http1_head head;
    static const http1_limits limits = {8192, 16384, 32768, 100};
    if (http1_parse_request(&head, request_head, sizeof request_head - 1, 0, &limits) != HTTP1_DONE)
        abort();
}

static void chunk_once(void)
{
    chunk_decoder decoder;
    size_t off, len, consumed;
    chunk_init(&decoder, &(chunk_limits)CHUNK_LIMITS);
    if (chunk_decode(&decoder, chunk, chunk_len, &off, &len, &consumed) != CHUNK_MORE || consumed != chunk_len)
        abort();
}

static void request_once(const char *text, size_t len)
{
    static const json_limits limits = {64, 10000, 64};
    json_request_start(scan, &limits, 1);
    json_request_feed(scan, text, len);
    if (json_request_end(scan) != JSON_OK)
        abort();
}

static void body_once(void)
{
    request_once(body, body_len);
}

static void cjk_once(void)
{
    request_once(cjk, cjk_len);
}

static void escaped_once(void)
{
    request_once(escaped, escaped_len);
}

static sse_scanner stream;

static void frame_once(void)
{
    sse_feed(&stream, plain_frame, sizeof plain_frame - 1);
}

static void usage_once(void)
{
    sse_feed(&stream, usage_frame, sizeof usage_frame - 1);
}

static void measure(const char *name, void (*once)(void), size_t bytes)
{
    double best = 1e18;
    for (int round = 0; round < ROUNDS; round++) {
        double start = now();
        for (int i = 0; i < CALLS; i++)
            once();
        double each = (now() - start) / CALLS;
        best = each < best ? each : best;
    }
    printf("%-38s %5zu bytes %8.1f ns %8.1f ns/KiB\n", name, bytes, best, best * 1024 / (double)bytes);
}

static size_t fill(char *out, const char *piece, int times)
{
    char *p = out + sprintf(out, "{\"model\":\"tiny\",\"messages\":[{\"role\":\"system\",\"content\":\"Be brief.\"}");
    for (int i = 0; i < times; i++)
        p += sprintf(p, ",{\"role\":\"user\",\"content\":\"%s%s%s%s\"}", piece, piece, piece, piece);
    p += sprintf(p, "],\"stream\":true,\"max_tokens\":12,\"temperature\":0.7,"
                    "\"stream_options\":{\"include_usage\":true}}");
    return (size_t)(p - out);
}

int main(void)
{
    scan = json_request_new();
    if (!scan)
        return 1;
    body_len = fill(body, "Please tell me what this does:\\n\\nfor (i = 0; i < n; i++) puts(a[i]); ", 3);
    cjk_len = fill(cjk, "\xe8\xaf\xb7\xe8\xa7\xa3\xe9\x87\x8a\xe8\xbf\x99\xe6\xae\xb5\xe4\xbb\xa3", 12);
    escaped_len = fill(escaped, "\\u8bf7\\u89e3\\u91ca\\u8fd9\\u6bb5", 7);
    chunk_len = (size_t)snprintf(chunk, sizeof chunk, "b4\r\n%0180d\r\n", 1);
    measure("request head, 10 fields", head_once, sizeof request_head - 1);
    measure("one whole chunk", chunk_once, chunk_len);
    measure("json_request, chat", body_once, body_len);
    measure("json_request, chat in Chinese", cjk_once, cjk_len);
    measure("json_request, chat in \\u escapes", escaped_once, escaped_len);
    sse_init(&stream, JSON_OPENAI);
    measure("sse, chat chunk", frame_once, sizeof plain_frame - 1);
    measure("sse, chat chunk with usage", usage_once, sizeof usage_frame - 1);
    sse_init(&stream, JSON_NONE);
    measure("sse, chat chunk, nothing counted", frame_once, sizeof plain_frame - 1);
    json_request_free(scan);
    return 0;
}
