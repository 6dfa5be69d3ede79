/* units: names.c */
/* Sets of header names: exact, patterns, case, and what may not be a member. */
#include "../names.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

static bool add(asc_names *s, const char *n) { return names_add(s, n, strlen(n)); }
static bool has(const asc_names *s, const char *n) { return names_has(s, n, strlen(n)); }

static void exact_and_patterns(void)
{
    asc_names *s = names_new();
    assert(s != NULL);
    assert(add(s, "content-type") && add(s, "x-ratelimit-*") && add(s, "x-*-time") && add(s, "content-type"));
    assert(has(s, "content-type") && has(s, "Content-Type") && has(s, "CONTENT-TYPE"));
    assert(!has(s, "content-typ") && !has(s, "content-type2") && !has(s, ""));
    assert(has(s, "X-RateLimit-Remaining") && has(s, "x-ratelimit-") && !has(s, "x-ratelimi"));
    assert(has(s, "x-total-time") && has(s, "x--time") && !has(s, "x-time"));
    names_free(s);
}

static void refused_members(void)
{
    asc_names *s = names_new();
    char longest[200];
    memset(longest, 'a', sizeof longest);
    assert(!names_add(s, longest, 129) && names_add(s, longest, 128));
    assert(!names_has(s, longest, 129));
    assert(!add(s, "") && !add(s, "Upper") && !add(s, "a b") && !add(s, "a*b*c") && !add(s, "a:b") && !add(s, "a\r"));
    names_free(s);
    names_free(NULL);
}

static void many(void)
{
    asc_names *s = names_new();
    char name[16];
    for (int i = 0; i < 256; i++) {
        snprintf(name, sizeof name, "x-name-%d", i);
        assert(add(s, name));
    }
    assert(!add(s, "one-more"));
    for (int i = 0; i < 256; i++) {
        snprintf(name, sizeof name, "X-NAME-%d", i);
        assert(has(s, name));
    }
    assert(!has(s, "x-name-256"));
    names_free(s);
}

int main(void)
{
    exact_and_patterns();
    refused_members();
    many();
    puts("names: 3 passed");
    return 0;
}
