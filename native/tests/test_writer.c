/* units: writer.c */
/* The bounded writer: never past its end, and what goes into a log line cannot leave its string. */
#include "../writer.h"

#include <assert.h>
#include <stdio.h>

static void bounds(void)
{
    char room[8];
    asc_writer w = {.at = room, .end = room + sizeof room};
    put_literal(&w, "12345");
    put_literal(&w, "6789");
    assert(w.full && w.at == room + 5);
    put_literal(&w, "678");
    assert(w.at == room + 8);
    put_u64(&w, 1);
    assert(w.at == room + 8);
}

static void numbers(void)
{
    char room[64];
    asc_writer w = {.at = room, .end = room + sizeof room};
    put_u64(&w, 0);
    put_literal(&w, " ");
    put_u64(&w, UINT64_MAX);
    put_literal(&w, " ");
    put_i64(&w, INT64_MIN);
    *w.at = 0;
    assert(!w.full && strcmp(room, "0 18446744073709551615 -9223372036854775808") == 0);
}

static void json_strings(void)
{
    char room[128];
    asc_writer w = {.at = room, .end = room + sizeof room};
    const char nasty[] = "a\"b\\c\n\r\t\x01\x7f\xc3\xa9z";
    put_json(&w, nasty, sizeof nasty - 1);
    *w.at = 0;
    assert(strcmp(room, "a\\\"b\\\\c\\u000a\\u000d\\u0009\\u0001\\u007f\\u00c3\\u00a9z") == 0);
}

int main(void)
{
    bounds();
    numbers();
    json_strings();
    puts("writer: 3 passed");
    return 0;
}
