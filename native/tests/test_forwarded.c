/* units: forwarded.c */
/* X-Forwarded-For from its end: addresses in every form, words, and lists with holes. */
#include "../forwarded.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The list from its end, joined by spaces; what is no address is "?". */
static void reads(const char *value, const char *wanted)
{
    char found[512] = "", text[FORWARDED_TEXT];
    size_t len = strlen(value);
    char *copy = malloc(len ? len : 1);
    memcpy(copy, value, len);
    uint8_t address[16];
    enum forwarded_result result;
    while ((result = forwarded_last(copy, &len, address)) != FORWARDED_END) {
        if (result == FORWARDED_ADDRESS)
            forwarded_text(address, text);
        else
            strcpy(text, "?");
        strcat(strcat(found, found[0] ? " " : ""), text);
    }
    free(copy);
    if (strcmp(found, wanted) != 0) {
        fprintf(stderr, "%s: %s instead of %s\n", value, found, wanted);
        abort();
    }
}

int main(void)
{
    reads("", "");
    reads(" ,\t, ,", "");
    reads("192.0.2.1", "192.0.2.1");
    reads("192.0.2.1, 198.51.100.2,203.0.113.3", "203.0.113.3 198.51.100.2 192.0.2.1");
    reads(",192.0.2.1,, 198.51.100.2 ,", "198.51.100.2 192.0.2.1");
    reads("192.0.2.1:443", "192.0.2.1");
    reads("2001:DB8::1", "2001:db8::1");
    reads("[2001:db8::1]", "2001:db8::1");
    reads("[2001:db8::1]:65535", "2001:db8::1");
    reads("::ffff:192.0.2.1", "192.0.2.1");
    reads("2001:db8:1111:2222:3333:4444:5555:6666", "2001:db8:1111:2222:3333:4444:5555:6666");
    reads("unknown, _hidden, \"192.0.2.1\"", "? ? ?");
    reads("192.0.2, 192.0.2.1.1, 256.0.0.1, 192.0.2.1:, 192.0.2.1:x, 192.0.2.1:123456", "? ? ? ? ? ?");
    reads("[2001:db8::1, 2001:db8::1], [2001:db8::1]x, [], [2001:db8::1]:", "? ? ? ? ?");
    reads("fe80::1%eth0, 192.0.2.1 198.51.100.2", "? ?");
    reads("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "?");
    uint8_t address[16];
    size_t len = 11;
    assert(forwarded_last("192.0.2.1\0x", &len, address) == FORWARDED_OTHER && len == 0);
    return 0;
}
